//! Low-rank adapters (LoRA; Hu et al., 2021, arXiv 2106.09685, section 4.1), in PEFT's file format.
//!
//! A targeted projection becomes `W·x + (alpha / rank) · B·A·x` with `W` frozen, `A` of `[rank, in]` and `B` of
//! `[out, rank]`. As in PEFT, `A` starts uniform in `±1/√in` (its `kaiming_uniform_(a=√5)`) and `B` at zero, so training
//! starts at the base. Deviations from PEFT: there is no dropout; what its other switches would change is refused.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use candle_core::{Tensor, Var};
use grpo::{Error, Params, Result, Seed};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::weights::{Layer, find, fitting};
use super::{Decoder, DecoderConfig};
use crate::ops::linear::{linear, linear_residual};
use crate::safetensors_file::{self, Precision};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";

/// Keys of an `adapter_config.json` that change the arithmetic where they are set.
const NOT_BUILT: [&str; 20] = [
    "alora_invocation_tokens",
    "alpha_pattern",
    "arrow_config",
    "bias",
    "exclude_modules",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "layers_to_transform",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "use_rslora",
    "velora_config",
];

/// A projection of every layer, under Hugging Face's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum LoraTarget {
    /// Queries.
    #[serde(rename = "q_proj")]
    Query,
    /// Keys.
    #[serde(rename = "k_proj")]
    Key,
    /// Values.
    #[serde(rename = "v_proj")]
    Value,
    /// What heads attended to, back to the residual stream.
    #[serde(rename = "o_proj")]
    Output,
    /// The gate of the gated layer.
    #[serde(rename = "gate_proj")]
    Gate,
    /// What is gated.
    #[serde(rename = "up_proj")]
    Up,
    /// The gated layer, back to the residual stream.
    #[serde(rename = "down_proj")]
    Down,
}

impl LoraTarget {
    /// Every projection of a layer.
    pub const ALL: [Self; 7] = [Self::Query, Self::Key, Self::Value, Self::Output, Self::Gate, Self::Up, Self::Down];

    /// Where the projection lies in a layer.
    fn path(self) -> &'static str {
        match self {
            Self::Query => "self_attn.q_proj",
            Self::Key => "self_attn.k_proj",
            Self::Value => "self_attn.v_proj",
            Self::Output => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        }
    }

    fn weight_name(self, layer: usize) -> String {
        format!("model.layers.{layer}.{}.weight", self.path())
    }

    /// PEFT's name of `A` or `B`.
    fn adapter_name(self, layer: usize, which: char) -> String {
        format!("base_model.model.model.layers.{layer}.{}.lora_{which}.weight", self.path())
    }

    /// Outputs and inputs of the projection.
    fn widths(self, config: &DecoderConfig) -> (usize, usize) {
        let (hidden, wide) = (config.hidden_size, config.intermediate_size);
        match self {
            Self::Query | Self::Output => (hidden, hidden),
            Self::Key | Self::Value => (config.num_key_value_heads * config.head_dim(), hidden),
            Self::Gate | Self::Up => (wide, hidden),
            Self::Down => (hidden, wide),
        }
    }
}

/// Which projections are adapted, and how much.
///
/// ```
/// use grpo::Seed;
/// use grpo_policies::decoder::{Decoder, DecoderConfig, LoraConfig, LoraTarget};
/// let config = DecoderConfig { vocab_size: 50, num_hidden_layers: 1, ..DecoderConfig::default() };
/// let lora = LoraConfig { rank: 4, alpha: 8.0, targets: [LoraTarget::Query, LoraTarget::Value].into() };
/// let adapted = Decoder::init(config, Seed::new(1))?.with_lora(lora, Seed::new(2))?;
/// assert_eq!(adapted.params().len(), 4);
/// assert!(adapted.params().get("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight").is_some());
/// # Ok::<(), grpo::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraConfig {
    /// Rows of `A`, columns of `B`.
    pub rank: usize,
    /// What the adapters make is scaled by `alpha / rank`.
    pub alpha: f64,
    /// The projections of every layer that are adapted.
    pub targets: BTreeSet<LoraTarget>,
}

impl LoraConfig {
    /// An error that names the first setting that cannot be meant for this decoder.
    pub fn check(&self, config: &DecoderConfig) -> Result<()> {
        let refuse = |message: String| Err(Error::config(format!("lora: {message}")));
        let (rank, most) = (self.rank, config.hidden_size);
        if rank == 0 || rank > most {
            return refuse(format!("rank is {rank}; give 1 to {most}, the hidden size"));
        }
        if !(self.alpha.is_finite() && self.alpha > 0.0) {
            return refuse(format!("alpha is {}; give a positive number, such as twice the rank", self.alpha));
        }
        if self.targets.is_empty() {
            return refuse("targets is empty; name at least one projection, such as q_proj".to_owned());
        }
        Ok(())
    }

    fn scale(&self) -> f64 {
        self.alpha / self.rank as f64
    }

    /// Every adapter tensor by PEFT's name, with its shape.
    fn shapes(&self, config: &DecoderConfig) -> Vec<(String, Vec<usize>)> {
        let of_layer = |layer: usize| {
            self.targets.iter().flat_map(move |target| {
                let (out, input) = target.widths(config);
                [
                    (target.adapter_name(layer, 'A'), vec![self.rank, input]),
                    (target.adapter_name(layer, 'B'), vec![out, self.rank]),
                ]
            })
        };
        (0..config.num_hidden_layers).flat_map(of_layer).collect()
    }

    fn draw(&self, decoder: &Decoder, seed: Seed) -> Result<BTreeMap<String, Tensor>> {
        let mut tensors = BTreeMap::new();
        for (name, shape) in self.shapes(&decoder.config) {
            let n = shape.iter().product();
            let values: Vec<f32> = match name.ends_with("lora_A.weight") {
                false => vec![0.0; n],
                true => {
                    let bound = 1.0 / (shape.last().copied().unwrap_or(1) as f64).sqrt();
                    let mut draws = seed.named(&name).draws();
                    (0..n).map(|_| (bound * (2.0 * draws.uniform() - 1.0)) as f32).collect()
                }
            };
            tensors.insert(name, Tensor::from_vec(values, shape, decoder.device())?);
        }
        Ok(tensors)
    }

    fn from_peft(json: &str) -> Result<Self> {
        #[derive(Deserialize)]
        struct Peft {
            peft_type: String,
            r: usize,
            lora_alpha: f64,
            target_modules: BTreeSet<LoraTarget>,
        }
        let fault = |error: serde_json::Error| Error::config(error.to_string());
        let all: Map<String, Value> = serde_json::from_str(json).map_err(fault)?;
        let Peft { peft_type, r, lora_alpha, target_modules } = serde_json::from_str(json).map_err(fault)?;
        if peft_type != "LORA" {
            return Err(Error::config(format!("peft_type is `{peft_type}`; only `LORA` is built")));
        }
        for key in NOT_BUILT {
            let unset = match all.get(key) {
                None | Some(Value::Null | Value::Bool(false)) => true,
                Some(Value::Array(values)) => values.is_empty(),
                Some(Value::Object(values)) => values.is_empty(),
                Some(value) => value == "none",
            };
            if !unset {
                let value = all.get(key).unwrap_or(&Value::Null);
                return Err(Error::config(format!("{key} is {value}; only adapters without it are built")));
            }
        }
        Ok(Self { rank: r, alpha: lora_alpha, targets: target_modules })
    }

    fn to_peft(&self) -> Value {
        json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": null,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "target_modules": self.targets,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "modules_to_save": null,
            "use_dora": false,
            "use_rslora": false,
        })
    }
}

/// `A` and `B` of one projection.
#[derive(Clone, Debug)]
struct Adapter {
    a: Tensor,
    b: Tensor,
    scale: f64,
}

impl Adapter {
    /// What it adds to the weight, `[out, in]`.
    fn merged_in(&self) -> Result<Tensor> {
        Ok((self.b.detach().matmul(&self.a.detach())? * self.scale)?)
    }
}

/// The adapters of one layer; none where the decoder is plain.
#[derive(Clone, Debug, Default)]
pub(super) struct Adapters(BTreeMap<LoraTarget, Adapter>);

impl Adapters {
    /// Adds to `out` what the adapters of `parts` make of `x`: projections of it that lie side by side, with their
    /// weights.
    ///
    /// Their `B` stand on the diagonal of one matrix, so that nothing as wide as `out` is made but the sum.
    pub(super) fn add(&self, out: Tensor, x: &Tensor, parts: &[(LoraTarget, &Tensor)]) -> Result<Tensor> {
        let adapters: Vec<Option<&Adapter>> = parts.iter().map(|(target, _)| self.0.get(target)).collect();
        let a: Vec<&Tensor> = adapters.iter().flatten().map(|adapter| &adapter.a).collect();
        let Some(Adapter { a: first, scale, .. }) = adapters.iter().flatten().next() else { return Ok(out) };
        let rank = first.dim(0)?;
        let (mut blocks, mut n_before) = (Vec::with_capacity(parts.len()), 0);
        for (adapter, (_, weight)) in adapters.iter().zip(parts) {
            let Some(adapter) = adapter else {
                blocks.push(Tensor::zeros((weight.dim(0)?, a.len() * rank), x.dtype(), x.device())?);
                continue;
            };
            n_before += 1;
            blocks.push(adapter.b.pad_with_zeros(1, (n_before - 1) * rank, (a.len() - n_before) * rank)?);
        }
        let low = (linear(x, &Tensor::cat(&a, 0)?)? * *scale)?;
        Ok(linear_residual(&low, &Tensor::cat(&blocks, 0)?, &out)?)
    }
}

impl Decoder {
    /// The same weights, frozen and shared, below fresh trainable adapters on the decoder's device.
    ///
    /// The adapters are all its parameters; at first they add nothing. A decoder that has adapters is refused.
    pub fn with_lora(self, lora: LoraConfig, seed: Seed) -> Result<Self> {
        lora.check(&self.config)?;
        let tensors = lora.draw(&self, seed)?;
        self.adapted(lora, tensors)
    }

    /// The rank, the scale and the targets, where the decoder has adapters.
    pub fn lora(&self) -> Option<&LoraConfig> {
        self.lora.as_ref()
    }

    /// Reads trainable adapters from a folder as PEFT writes it: `adapter_config.json`, `adapter_model.safetensors`.
    ///
    /// A missing, unknown or misshapen tensor, and a setting that is not built here, are errors that name it.
    pub fn load_adapter(self, folder: impl AsRef<Path>) -> Result<Self> {
        let path = folder.as_ref().join(CONFIG);
        let json = fs::read_to_string(&path).map_err(|error| Error::file(&path, error))?;
        let lora = LoraConfig::from_peft(&json).map_err(|error| Error::file(&path, error))?;
        lora.check(&self.config).map_err(|error| Error::file(&path, error))?;
        let path = folder.as_ref().join(WEIGHTS);
        let mut tensors = safetensors_file::read(&path)?;
        for tensor in tensors.values_mut() {
            *tensor = tensor.to_device(self.device())?;
        }
        let tensors = fitting(lora.shapes(&self.config), tensors).map_err(|error| Error::file(&path, error))?;
        self.adapted(lora, tensors)
    }

    /// Writes the adapters as PEFT does, for [`Decoder::load_adapter`] and `PeftModel.from_pretrained`.
    pub fn save_adapter(&self, folder: impl AsRef<Path>) -> Result<()> {
        let Some(lora) = &self.lora else {
            return Err(Error::config(
                "the decoder has no adapter to save; add one with with_lora, or save the weights",
            ));
        };
        let folder = folder.as_ref();
        fs::create_dir_all(folder).map_err(|error| Error::file(folder, error))?;
        let path = folder.join(CONFIG);
        fs::write(&path, format!("{:#}\n", lora.to_peft())).map_err(|error| Error::file(path, error))?;
        safetensors_file::write(folder.join(WEIGHTS), &self.adapters(), Precision::F32)
    }

    /// A plain trainable decoder whose weights are `W + (alpha / rank) · B·A`, or copies where nothing is adapted.
    pub fn merge(&self) -> Result<Self> {
        let merged = Self::from_tensors(self.config.clone(), self.merged_tensors()?, true)?;
        Ok(Self { rope: self.rope.clone(), recompute: self.recompute, ..merged })
    }

    /// The weights by Hugging Face name with the adapters merged in; what is not adapted is shared.
    pub fn merged_tensors(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut tensors = self.tensors();
        for (index, layer) in self.layers.iter().enumerate() {
            for (target, adapter) in &layer.adapters.0 {
                let name = target.weight_name(index);
                let merged = (find(&tensors, &name)? + adapter.merged_in()?)?;
                tensors.insert(name, merged);
            }
        }
        Ok(tensors)
    }

    fn adapted(self, lora: LoraConfig, tensors: BTreeMap<String, Tensor>) -> Result<Self> {
        if self.lora.is_some() {
            return Err(Error::config("the decoder has an adapter already; merge it first"));
        }
        let mut vars = BTreeMap::new();
        for (name, tensor) in tensors {
            vars.insert(name, Var::from_tensor(&tensor)?);
        }
        let tensors = vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
        let base = Self { recompute: self.recompute, ..self.base()? };
        base.attach(lora, &tensors, Params::new(vars)?)
    }

    /// The weights below the adapters, shared.
    pub(super) fn base(&self) -> Result<Self> {
        self.with_tensors(self.tensors(), Params::none())
    }

    /// The same base below copies of the adapters, trainable.
    pub(super) fn copy_adapted(&self, lora: &LoraConfig) -> Result<Self> {
        let base = Self { recompute: self.recompute, ..self.base()? };
        base.adapted(lora.clone(), self.adapters())
    }

    /// Adapters that have been checked, onto a base.
    pub(super) fn attach(
        mut self,
        lora: LoraConfig,
        tensors: &BTreeMap<String, Tensor>,
        params: Params,
    ) -> Result<Self> {
        let part = |target: LoraTarget, layer, which| find(tensors, &target.adapter_name(layer, which));
        for (index, layer) in self.layers.iter_mut().enumerate() {
            for target in &lora.targets {
                let (a, b) = (part(*target, index, 'A')?, part(*target, index, 'B')?);
                layer.adapters.0.insert(*target, Adapter { a, b, scale: lora.scale() });
            }
        }
        Ok(Self { lora: Some(lora), params, ..self })
    }

    /// The adapters by PEFT's names, without a graph.
    pub(super) fn adapters(&self) -> BTreeMap<String, Tensor> {
        let of_layer = |(index, layer): (usize, &Layer)| {
            let both = |(target, adapter): (&LoraTarget, &Adapter)| {
                [
                    (target.adapter_name(index, 'A'), adapter.a.detach()),
                    (target.adapter_name(index, 'B'), adapter.b.detach()),
                ]
            };
            layer.adapters.0.iter().flat_map(both).collect::<Vec<_>>()
        };
        self.layers.iter().enumerate().flat_map(of_layer).collect()
    }
}
