//! The tensors of a decoder: drawn, checked, and found by their Hugging Face names.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use grpo::{Error, Result, Seed};

use super::DecoderConfig;
use super::lora::Adapters;
use crate::safetensors_file::pieces;

/// Standard deviation of fresh weights, Qwen2's `initializer_range`.
const SPREAD: f64 = 0.02;

/// The weights of one layer.
#[derive(Clone, Debug)]
pub(crate) struct Layer {
    pub(crate) input_norm: Tensor,
    pub(crate) qkv: [Tensor; 3],
    pub(crate) qkv_bias: [Tensor; 3],
    pub(crate) out: Tensor,
    pub(crate) post_norm: Tensor,
    pub(crate) gate_up: [Tensor; 2],
    pub(crate) down: Tensor,
    pub(super) adapters: Adapters,
}

impl Layer {
    pub(super) fn find(tensors: &BTreeMap<String, Tensor>, layer: usize) -> Result<Self> {
        let part = |name: &str| find(tensors, &format!("model.layers.{layer}.{name}"));
        let qkv = |kind: &str| {
            Ok::<_, Error>([
                part(&format!("self_attn.q_proj.{kind}"))?,
                part(&format!("self_attn.k_proj.{kind}"))?,
                part(&format!("self_attn.v_proj.{kind}"))?,
            ])
        };
        Ok(Self {
            input_norm: part("input_layernorm.weight")?,
            qkv: qkv("weight")?,
            qkv_bias: qkv("bias")?,
            out: part("self_attn.o_proj.weight")?,
            post_norm: part("post_attention_layernorm.weight")?,
            gate_up: [part("mlp.gate_proj.weight")?, part("mlp.up_proj.weight")?],
            down: part("mlp.down_proj.weight")?,
            adapters: Adapters::default(),
        })
    }
}

/// The tensor of this name.
pub(super) fn find(tensors: &BTreeMap<String, Tensor>, name: &str) -> Result<Tensor> {
    tensors.get(name).cloned().ok_or_else(|| Error::config(format!("weights lack tensor `{name}`; give it")))
}

/// Fresh weights: normal with deviation 0.02, norms 1, biases 0. Each tensor draws from its own name's seed.
pub(super) fn draw(config: &DecoderConfig, seed: Seed) -> Result<BTreeMap<String, Tensor>> {
    let mut tensors = BTreeMap::new();
    for (name, shape) in config.shapes() {
        let n = shape.iter().product();
        let values: Vec<f32> = if name.ends_with("norm.weight") {
            vec![1.0; n]
        } else if name.ends_with("bias") {
            vec![0.0; n]
        } else {
            let mut draws = seed.named(&name).draws();
            (0..n).map(|_| (SPREAD * draws.normal()) as f32).collect()
        };
        tensors.insert(name, Tensor::from_vec(values, shape, &Device::Cpu)?);
    }
    Ok(tensors)
}

/// Checks names, shapes and numbers against the config; gives the tensors as contiguous f32.
pub(super) fn checked(
    config: &DecoderConfig,
    mut tensors: BTreeMap<String, Tensor>,
) -> Result<BTreeMap<String, Tensor>> {
    if config.tie_word_embeddings {
        drop_copy_of_embedding(&mut tensors)?;
    }
    fitting(config.shapes(), tensors)
}

/// The tensors of these names and shapes, none missing, none unknown, as contiguous finite f32.
pub(super) fn fitting(
    shapes: Vec<(String, Vec<usize>)>,
    mut tensors: BTreeMap<String, Tensor>,
) -> Result<BTreeMap<String, Tensor>> {
    let mut checked = BTreeMap::new();
    for (name, shape) in shapes {
        let Some(tensor) = tensors.remove(&name) else {
            return Err(Error::config(format!("weights lack tensor `{name}` of shape {shape:?}; give it")));
        };
        if tensor.dims() != shape {
            return Err(Error::config(format!(
                "tensor `{name}` has shape {:?}; the config expects {shape:?}",
                tensor.dims()
            )));
        }
        let tensor = tensor.detach().to_dtype(DType::F32)?.contiguous()?;
        for piece in pieces(&tensor)? {
            if let Some(value) = piece?.iter().find(|value| !value.is_finite()) {
                return Err(Error::config(format!(
                    "tensor `{name}` holds {value}; weights must be finite, take an earlier checkpoint"
                )));
            }
        }
        checked.insert(name, tensor);
    }
    match tensors.first_key_value() {
        None => Ok(checked),
        Some((name, tensor)) => Err(Error::config(format!(
            "weights hold tensor `{name}` of shape {:?}, which the config does not know; remove it or mend the config",
            tensor.dims()
        ))),
    }
}

/// Some writers store the tied head again; that is accepted where it is the embedding to the bit.
fn drop_copy_of_embedding(tensors: &mut BTreeMap<String, Tensor>) -> Result<()> {
    let Some(head) = tensors.remove("lm_head.weight") else { return Ok(()) };
    let same = match tensors.get("model.embed_tokens.weight") {
        Some(embedding) if embedding.dims() == head.dims() => {
            let mut pairs = pieces(embedding)?.zip(pieces(&head)?);
            pairs.try_fold(true, |same, (embedding, head)| Ok::<_, Error>(same && embedding? == head?))?
        }
        _ => false,
    };
    if same {
        return Ok(());
    }
    Err(Error::config(
        "weights hold `lm_head.weight` that differs from the embedding; set tie_word_embeddings to false or remove it",
    ))
}
