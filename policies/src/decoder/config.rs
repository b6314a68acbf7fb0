//! The sizes of a decoder, under the names of a Hugging Face `config.json`.

use std::collections::BTreeMap;

use grpo::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::safetensors_file::Precision;

/// Longest table of rotary angles that is made without being asked for; 32,768 positions of 64 are 8 MB.
const MOST_POSITIONS: usize = 1 << 20;

/// The sizes of a Qwen2.5-shaped decoder: the tiny one and the 1.5B one differ in nothing else.
///
/// Read from a Hugging Face `config.json`, where an absent key means what it means to Hugging Face and keys that the
/// decoder does not need are kept for the next reader. The default is the miniature.
///
/// ```
/// use grpo_policies::decoder::DecoderConfig;
/// let config = DecoderConfig { vocab_size: 300, ..DecoderConfig::default() };
/// config.check()?;
/// assert_eq!(config.head_dim(), 32);
/// # Ok::<(), grpo::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DecoderConfig {
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the gated layer.
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key-value heads, each shared by a group of query heads.
    pub num_key_value_heads: usize,
    /// Longest row.
    #[serde(default = "default_positions")]
    pub max_position_embeddings: usize,
    /// Added to the mean of squares.
    #[serde(default = "default_eps")]
    pub rms_norm_eps: f64,
    /// Base of the rotary wavelengths.
    #[serde(default = "default_theta")]
    pub rope_theta: f64,
    /// Whether the head is the embedding.
    #[serde(default)]
    pub tie_word_embeddings: bool,
    /// How the tokens of an image are numbered; a key that Hugging Face's Qwen2 does not know, as the next.
    #[serde(default, skip_serializing_if = "ImagePositions::is_line")]
    pub image_positions: ImagePositions,
    /// Rows and columns of an image's tokens, of a checkpoint that was saved here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_grid: Option<(usize, usize)>,
    /// Every other key of the file it was read from, for the file it is written to.
    #[serde(flatten)]
    pub other: BTreeMap<String, Value>,
}

/// How the tokens of an image are numbered for rotary positions (SimpleAR, table 3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImagePositions {
    /// On from the text, one after the other: the published checkpoints.
    #[default]
    Line,
    /// By line and column of the image, as in Qwen2-VL (arXiv 2409.12191): half of the frequencies turn by the line and
    /// half by the column. The paper's own two-dimensional code is not public.
    Grid,
}

impl ImagePositions {
    fn is_line(&self) -> bool {
        *self == Self::Line
    }
}

fn default_positions() -> usize {
    32_768
}

fn default_eps() -> f64 {
    1e-6
}

/// What `Qwen2Config` takes where nothing is said; the published models say 1e6.
fn default_theta() -> f64 {
    1e4
}

impl Default for DecoderConfig {
    fn default() -> Self {
        Self {
            vocab_size: 1_100,
            hidden_size: 128,
            intermediate_size: 384,
            num_hidden_layers: 6,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            max_position_embeddings: 512,
            rms_norm_eps: default_eps(),
            rope_theta: 1e6,
            tie_word_embeddings: true,
            image_positions: ImagePositions::Line,
            image_grid: None,
            other: BTreeMap::new(),
        }
    }
}

/// Keys of a `config.json` that would change the arithmetic and so may not be ignored.
#[derive(Deserialize)]
struct Arithmetic {
    #[serde(default)]
    hidden_act: Option<String>,
    #[serde(default)]
    head_dim: Option<usize>,
    #[serde(default)]
    use_sliding_window: bool,
    #[serde(default)]
    layer_types: Option<Vec<String>>,
    #[serde(default)]
    rope_scaling: Option<serde_json::Value>,
    #[serde(default)]
    rope_parameters: Option<RopeParameters>,
}

/// Where transformers 5 writes what version 4 wrote at the top level.
#[derive(Deserialize)]
struct RopeParameters {
    #[serde(default)]
    rope_theta: Option<f64>,
    #[serde(default)]
    rope_type: Option<String>,
}

impl DecoderConfig {
    /// Reads a `config.json`, checks it, and refuses variants of the architecture that are not built here.
    pub fn from_json(json: &str) -> Result<Self> {
        let fault = |error: serde_json::Error| Error::config(format!("config.json: {error}"));
        let mut config: Self = serde_json::from_str(json).map_err(fault)?;
        let arithmetic: Arithmetic = serde_json::from_str(json).map_err(fault)?;
        if let Some(theta) = arithmetic.rope_parameters.as_ref().and_then(|rope| rope.rope_theta) {
            config.rope_theta = theta;
        }
        config.check()?;
        arithmetic.check(config.head_dim())?;
        Ok(config)
    }

    /// The `config.json` of weights of this precision, as `transformers` 4 and 5 read it.
    ///
    /// Keys that the decoder does not need are written as they were read.
    pub fn to_json(&self, precision: Precision) -> Result<String> {
        let fault = |error: serde_json::Error| Error::config(format!("config.json: {error}"));
        let dtype = match precision {
            Precision::F32 => "float32",
            Precision::Bf16 => "bfloat16",
            Precision::F16 => "float16",
        };
        let mut file = self.clone();
        let defaults = [
            ("architectures", json!(["Qwen2ForCausalLM"])),
            ("model_type", json!("qwen2")),
            ("hidden_act", json!("silu")),
            ("bos_token_id", Value::Null),
            ("eos_token_id", Value::Null),
            ("pad_token_id", Value::Null),
        ];
        for (key, value) in defaults {
            file.other.entry(key.to_owned()).or_insert(value);
        }
        // Version 4 reads the first spelling of each, version 5 the second.
        file.other.insert("torch_dtype".into(), json!(dtype));
        file.other.insert("dtype".into(), json!(dtype));
        let rope = json!({"rope_theta": self.rope_theta, "rope_type": "default"});
        file.other.insert("rope_parameters".into(), rope);
        Ok(serde_json::to_string_pretty(&file).map_err(fault)? + "\n")
    }

    /// Numbers of one head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads.max(1)
    }

    /// Arithmetic of a pass over a row of `length` ids of which `scored` are scored, in FLOP: two for each weight of a layer
    /// and id, causal attention's half of the products, and the head where it is asked. A training step takes three times as
    /// much, with the passes back; what is made again does not count.
    pub fn forward_flops(&self, length: usize, scored: usize) -> f64 {
        let (hidden, head_dim) = (self.hidden_size as f64, self.head_dim() as f64);
        let (length, scored) = (length as f64, scored as f64);
        let queries = self.num_attention_heads as f64 * head_dim;
        let keys = self.num_key_value_heads as f64 * head_dim;
        let weights = hidden * (2.0 * queries + 2.0 * keys + 3.0 * self.intermediate_size as f64);
        // Scores and their use, of half of all pairs.
        let attention = 2.0 * queries * length * length;
        let layers = self.num_hidden_layers as f64 * (2.0 * weights * length + attention);
        layers + 2.0 * self.vocab_size as f64 * hidden * scored
    }

    /// An error that names the first size that cannot be meant.
    pub fn check(&self) -> Result<()> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("max_position_embeddings", self.max_position_embeddings),
        ];
        if let Some((name, _)) = sizes.iter().find(|(_, size)| *size == 0) {
            return refuse(format!("{name} is 0; give at least 1"));
        }
        if let Some((name, size)) = sizes.iter().find(|(_, size)| *size > 1 << 31) {
            return refuse(format!("{name} is {size}; give at most 2147483648"));
        }
        let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads);
        if !self.hidden_size.is_multiple_of(heads) || !self.head_dim().is_multiple_of(2) {
            let hidden = self.hidden_size;
            return refuse(format!(
                "hidden_size {hidden} does not give {heads} heads an even width; make it a multiple of {}",
                2 * heads
            ));
        }
        if !heads.is_multiple_of(kv_heads) {
            return refuse(format!(
                "num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}; make it one"
            ));
        }
        if self.max_position_embeddings > MOST_POSITIONS {
            let positions = self.max_position_embeddings;
            return refuse(format!("max_position_embeddings is {positions}; give at most {MOST_POSITIONS}"));
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps > 0.0) {
            return refuse(format!("rms_norm_eps is {}; give a small positive number", self.rms_norm_eps));
        }
        if !(self.rope_theta.is_finite() && self.rope_theta > 1.0) {
            return refuse(format!("rope_theta is {}; give a number above 1", self.rope_theta));
        }
        Ok(())
    }

    /// Every tensor of the weights by its Hugging Face name, with its shape.
    pub(super) fn shapes(&self) -> Vec<(String, Vec<usize>)> {
        let (hidden, wide) = (self.hidden_size, self.intermediate_size);
        let kv = self.num_key_value_heads * self.head_dim();
        let mut shapes = vec![
            ("model.embed_tokens.weight".to_owned(), vec![self.vocab_size, hidden]),
            ("model.norm.weight".to_owned(), vec![hidden]),
        ];
        if !self.tie_word_embeddings {
            shapes.push(("lm_head.weight".to_owned(), vec![self.vocab_size, hidden]));
        }
        for layer in 0..self.num_hidden_layers {
            let parts: [(&str, &[usize]); 12] = [
                ("input_layernorm.weight", &[hidden]),
                ("self_attn.q_proj.weight", &[hidden, hidden]),
                ("self_attn.q_proj.bias", &[hidden]),
                ("self_attn.k_proj.weight", &[kv, hidden]),
                ("self_attn.k_proj.bias", &[kv]),
                ("self_attn.v_proj.weight", &[kv, hidden]),
                ("self_attn.v_proj.bias", &[kv]),
                ("self_attn.o_proj.weight", &[hidden, hidden]),
                ("post_attention_layernorm.weight", &[hidden]),
                ("mlp.gate_proj.weight", &[wide, hidden]),
                ("mlp.up_proj.weight", &[wide, hidden]),
                ("mlp.down_proj.weight", &[hidden, wide]),
            ];
            shapes.extend(parts.map(|(name, shape)| (format!("model.layers.{layer}.{name}"), shape.to_vec())));
        }
        shapes
    }
}

impl Arithmetic {
    fn check(&self, head_dim: usize) -> Result<()> {
        if let Some(act) = self.hidden_act.as_ref().filter(|act| *act != "silu") {
            return refuse(format!("hidden_act is `{act}`; only `silu` is built"));
        }
        if let Some(given) = self.head_dim.filter(|given| *given != head_dim) {
            return refuse(format!(
                "head_dim is {given}; only hidden_size / num_attention_heads = {head_dim} is built"
            ));
        }
        if self.use_sliding_window {
            return refuse("use_sliding_window is true; only full attention is built".to_owned());
        }
        let windowed = |kind: &&String| kind.as_str() != "full_attention";
        if let Some(kind) = self.layer_types.iter().flatten().find(windowed) {
            return refuse(format!("layer_types holds `{kind}`; only `full_attention` is built"));
        }
        if let Some(scaling) = &self.rope_scaling {
            return refuse(format!("rope_scaling is {scaling}; only null is built"));
        }
        match self.rope_parameters.as_ref().and_then(|rope| rope.rope_type.as_deref()) {
            None | Some("default") => Ok(()),
            Some(kind) => refuse(format!("rope_type is `{kind}`; only `default` is built")),
        }
    }
}

fn refuse(message: String) -> Result<()> {
    Err(Error::config(format!("decoder config: {message}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TINY: &str = r#""vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "use_pos_skipping": false"#;

    fn read(more: &str) -> Result<DecoderConfig> {
        DecoderConfig::from_json(&format!("{{{TINY}{more}}}"))
    }

    #[test]
    fn what_is_not_said_is_what_hugging_face_takes() {
        let config = read("").unwrap();
        // `Qwen2Config()` of transformers 5.23.
        assert_eq!((config.rope_theta, config.rms_norm_eps, config.max_position_embeddings), (1e4, 1e-6, 32_768));
        assert!(!config.tie_word_embeddings);
        assert_eq!(config.other, BTreeMap::from([("use_pos_skipping".to_owned(), json!(false))]));
    }

    /// The file of Qwen2.5-0.5B-Instruct, and what SimpleAR's training adds.
    const PUBLISHED: &str = r#"{"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
        "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2",
        "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "transformers_version": "4.43.1", "use_cache": true, "use_sliding_window": false, "vocab_size": 151936,
        "use_pos_skipping": false, "pos_skipping_range": 4096, "mm_spatial_pool_mode": "bilinear"}"#;

    #[test]
    fn a_published_file_is_read_and_written_with_all_its_keys() {
        let config = DecoderConfig::from_json(PUBLISHED).unwrap();
        assert_eq!((config.vocab_size, config.head_dim(), config.rope_theta), (151_936, 64, 1e6));
        let written: Value = serde_json::from_str(&config.to_json(Precision::F16).unwrap()).unwrap();
        let mut want: Value = serde_json::from_str(PUBLISHED).unwrap();
        for (key, value) in [
            ("torch_dtype", json!("float16")),
            ("dtype", json!("float16")),
            ("pad_token_id", Value::Null),
            ("rope_parameters", json!({"rope_theta": 1e6, "rope_type": "default"})),
        ] {
            want[key] = value;
        }
        assert_eq!(written, want);
        let again = DecoderConfig::from_json(&written.to_string()).unwrap();
        assert_eq!(again.to_json(Precision::F16).unwrap(), config.to_json(Precision::F16).unwrap());
    }

    /// Of Qwen2.5-0.5B's 357.9 million weights in layers, few (biases, norms) are in no product.
    #[test]
    fn arithmetic_is_twice_the_weights_and_the_attention() {
        let config = DecoderConfig {
            vocab_size: 215_672,
            hidden_size: 896,
            intermediate_size: 4864,
            num_hidden_layers: 24,
            num_attention_heads: 14,
            num_key_value_heads: 2,
            ..DecoderConfig::default()
        };
        let layers = config.forward_flops(1, 0) - 24.0 * 2.0 * 896.0;
        assert!((layers / 2.0 / 357_898_112.0 - 1.0).abs() < 1e-3, "{layers}");
        assert_eq!(config.forward_flops(1, 1) - config.forward_flops(1, 0), 2.0 * 215_672.0 * 896.0);
        let attention = config.forward_flops(1000, 0) - 1000.0 * layers;
        assert_eq!(attention, 24.0 * 2.0 * 896.0 * 1e6);
    }

    #[test]
    fn the_base_of_wavelengths_is_found_where_either_version_writes_it() {
        assert_eq!(read(r#", "rope_theta": 5e4"#).unwrap().rope_theta, 5e4);
        read(r#", "head_dim": 8, "layer_types": ["full_attention", "full_attention"], "rope_scaling": null"#).unwrap();
        let nested = read(r#", "rope_parameters": {"rope_theta": 7e4, "rope_type": "default"}"#).unwrap();
        assert_eq!(nested.rope_theta, 7e4);
    }

    #[test]
    fn what_is_not_built_is_refused() {
        for (more, message) in [
            (r#", "hidden_act": "gelu""#, "hidden_act is `gelu`; only `silu` is built"),
            (r#", "use_sliding_window": true"#, "use_sliding_window is true"),
            (r#", "layer_types": ["full_attention", "sliding_attention"]"#, "layer_types holds `sliding_attention`"),
            (r#", "rope_scaling": {"type": "yarn"}"#, "rope_scaling is"),
            (r#", "rope_parameters": {"rope_type": "yarn"}"#, "rope_type is `yarn`"),
            (r#", "head_dim": 16"#, "head_dim is 16"),
        ] {
            let error = read(more).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
        assert!(DecoderConfig::from_json("{").is_err());
        assert!(DecoderConfig::from_json(r#"{"vocab_size": 3}"#).unwrap_err().to_string().contains("hidden_size"));
    }

    #[test]
    fn sizes_that_cannot_be_meant_are_named() {
        let check = |change: &dyn Fn(&mut DecoderConfig)| {
            let mut config = DecoderConfig::default();
            change(&mut config);
            config.check().unwrap_err().to_string()
        };
        assert!(check(&|c| c.vocab_size = 0).contains("vocab_size is 0"));
        assert!(check(&|c| c.hidden_size = 130).contains("make it a multiple of 8"));
        assert!(check(&|c| c.num_key_value_heads = 3).contains("no multiple of num_key_value_heads 3"));
        assert!(check(&|c| c.rms_norm_eps = f64::NAN).contains("rms_norm_eps is NaN"));
        assert!(check(&|c| c.rope_theta = 0.0).contains("rope_theta is 0"));
        assert!(check(&|c| c.intermediate_size = usize::MAX).contains("intermediate_size"));
    }
}
