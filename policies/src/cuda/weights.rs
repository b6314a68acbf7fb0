//! A decoder's weights of one moment, in the type that products take.

use candle_core::{Result, Tensor};

use super::gpu::{Buffer, Extent, Gpu, Kind};
use crate::decoder::{Decoder, Layer};

/// The sizes that kernels are told.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub(super) hidden: usize,
    pub(super) gated: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) eps: f32,
}

impl Sizes {
    pub(super) fn of(decoder: &Decoder) -> Self {
        let config = decoder.config();
        Self {
            hidden: config.hidden_size,
            gated: config.intermediate_size,
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim(),
            eps: config.rms_norm_eps as f32,
        }
    }

    /// Numbers of a token's queries, keys and values together.
    pub(super) fn qkv(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Numbers of a token's queries.
    pub(super) fn queries(&self) -> usize {
        self.heads * self.head_dim
    }

    pub(super) fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }
}

/// The weights of a layer: norms where they lie, the rest copied.
#[derive(Debug)]
pub(super) struct LayerWeights {
    pub(super) input_norm: u64,
    pub(super) post_norm: u64,
    pub(super) qkv: Buffer,
    pub(super) bias: Buffer,
    pub(super) out: Buffer,
    pub(super) gate_up: Buffer,
    pub(super) down: Buffer,
}

/// Rotary tables on the card.
#[derive(Debug)]
pub(super) struct Tables {
    pub(super) cos: Buffer,
    pub(super) sin: Buffer,
    pub(super) half: usize,
    /// Columns of images that stand in two dimensions; 0 where all is one line.
    pub(super) columns: usize,
}

/// All of a decoder but its head.
#[derive(Debug)]
pub(super) struct Weights {
    pub(super) kind: Kind,
    pub(super) sizes: Sizes,
    pub(super) embedding: u64,
    pub(super) norm: u64,
    pub(super) layers: Vec<LayerWeights>,
    pub(super) tables: Tables,
    /// What the places above point into.
    _tensors: Vec<Tensor>,
}

impl Weights {
    pub(super) fn of(gpu: &Gpu, decoder: &Decoder) -> Result<Self> {
        let kind = Kind::from(decoder.compute());
        let mut tensors = vec![decoder.embedding().clone(), decoder.norm().clone()];
        let (embedding, norm) = (gpu.address(decoder.embedding())?, gpu.address(decoder.norm())?);
        let mut layers = Vec::with_capacity(decoder.layers().len());
        for layer in decoder.layers() {
            tensors.extend([layer.input_norm.clone(), layer.post_norm.clone()]);
            layers.push(LayerWeights::of(gpu, layer, kind)?);
        }
        let rope = decoder.rope();
        let (cos, sin) = rope.numbers();
        let columns = rope.plane().map_or(0, |plane| plane.columns);
        let tables =
            Tables { cos: gpu.upload(cos)?, sin: gpu.upload(sin)?, half: decoder.config().head_dim() / 2, columns };
        Ok(Self { kind, sizes: Sizes::of(decoder), embedding, norm, layers, tables, _tensors: tensors })
    }
}

impl LayerWeights {
    fn of(gpu: &Gpu, layer: &Layer, kind: Kind) -> Result<Self> {
        Ok(Self {
            input_norm: gpu.address(&layer.input_norm)?,
            post_norm: gpu.address(&layer.post_norm)?,
            qkv: side_by_side(gpu, &layer.qkv, kind)?,
            bias: side_by_side(gpu, &layer.qkv_bias, Kind::F32)?,
            out: side_by_side(gpu, std::slice::from_ref(&layer.out), kind)?,
            gate_up: side_by_side(gpu, &layer.gate_up, kind)?,
            down: side_by_side(gpu, std::slice::from_ref(&layer.down), kind)?,
        })
    }
}

/// The numbers of tensors one behind another, in another type.
pub(super) fn side_by_side(gpu: &Gpu, tensors: &[Tensor], kind: Kind) -> Result<Buffer> {
    let buffer = gpu.room(tensors.iter().map(Tensor::elem_count).sum(), kind)?;
    let mut first = 0;
    for tensor in tensors {
        let n = tensor.elem_count();
        let (from, to) = (gpu.address(tensor)?, buffer.at(first * kind.bytes()));
        gpu.launch_for("cast", kind, Extent::over(n.div_ceil(4)), &[&to, &from, &n])?;
        first += n;
    }
    Ok(buffer)
}
