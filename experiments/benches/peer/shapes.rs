//! The decoders that are raced, by name.

use anyhow::{Result, bail};
use grpo_policies::decoder::DecoderConfig;

/// Both shapes; `half` is that of Qwen2.5-0.5B with a vocabulary of 65,536, so that its memory is that of the layers.
pub const SHAPES: [&str; 2] = ["miniature", "half"];

/// The sizes of a shape.
pub fn config(name: &str) -> Result<DecoderConfig> {
    let common = DecoderConfig {
        max_position_embeddings: 8192,
        rope_theta: 1e6,
        tie_word_embeddings: false,
        num_key_value_heads: 2,
        ..DecoderConfig::default()
    };
    match name {
        "miniature" => Ok(DecoderConfig {
            vocab_size: 8192,
            hidden_size: 256,
            intermediate_size: 1024,
            num_hidden_layers: 6,
            num_attention_heads: 4,
            ..common
        }),
        "half" => Ok(DecoderConfig {
            vocab_size: 65_536,
            hidden_size: 896,
            intermediate_size: 4864,
            num_hidden_layers: 24,
            num_attention_heads: 14,
            ..common
        }),
        _ => bail!("`{name}` is no shape; give one of {SHAPES:?}"),
    }
}
