//! A SimpleAR policy out of a language model: what SimpleAR's training does before its first step.
//!
//! `smart_tokenizer_and_embedding_resize` of the published code, for Qwen2.5 (SimpleAR, arXiv 2504.11455, section 3):
//! the special tokens go behind the tokenizer's last id, the codebook behind them, and every new row of the embedding is
//! the mean of the old tokens' rows; an untied head gets its own mean. The rows by which the published models pad their
//! vocabulary belong to no token: they are overwritten and not part of the mean. Deviation: the mean is taken in f64.

use std::path::Path;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use grpo::{Error, Result};
use serde_json::Value;

use super::files::TOKENIZER;
use super::text::added_tokens;
use super::{Grid, SimpleAr, TextTokenizer};
use crate::cosmos::Cosmos;
use crate::decoder::folder::{Companions, GENERATION, TOKENIZER_CONFIG, read_text};
use crate::decoder::{Decoder, DecoderConfig};
use crate::safetensors_file::pieces;

impl SimpleAr {
    /// A trainable policy whose decoder is the Qwen2.5 language model of a Hugging Face folder, with new rows for the
    /// special tokens and the codebook of `cosmos`; it draws noise until it has been pretrained.
    ///
    /// Computes where `cosmos` does. The folder's `generation_config.json` is not carried on: it is about text.
    pub fn from_language_model(folder: &Path, cosmos: Arc<Cosmos>, grid: Grid) -> Result<Self> {
        let path = folder.join(TOKENIZER);
        let (text, n_old) = TextTokenizer::extended(&read_text(&path)?).map_err(|error| Error::file(path, error))?;
        let model = Decoder::load(folder, &Device::Cpu, false)?;
        if model.config().vocab_size < n_old as usize {
            return Err(Error::file(
                folder,
                format!(
                    "the tokenizer has {n_old} ids and the embedding {} rows; take both of one checkpoint",
                    model.config().vocab_size
                ),
            ));
        }
        let n_new = text.n_ids() as usize + cosmos.n_codes() as usize;
        let config = DecoderConfig { vocab_size: n_new, ..model.config().clone() };
        let mut tensors = model.tensors();
        drop(model);
        for (name, tensor) in &mut tensors {
            if ["model.embed_tokens.weight", "lm_head.weight"].contains(&name.as_str()) {
                *tensor = resized(tensor, n_old as usize, n_new)?;
            }
            *tensor = tensor.to_device(cosmos.device())?;
        }
        let decoder = Decoder::from_tensors(config, tensors, true)?;
        let mut companions = Companions::read(folder)?;
        companions.remove(GENERATION);
        if let Some(mut settings) = companions.json(TOKENIZER_CONFIG).cloned() {
            list_special_tokens(&mut settings, n_old);
            companions.replace(TOKENIZER_CONFIG, settings);
        }
        Ok(Self::new(decoder, cosmos, Arc::new(text), grid)?.with_companions(companions))
    }
}

/// The first `n_old` of `[V, H]` rows, and behind them their mean up to `[n_new, H]`.
fn resized(rows: &Tensor, n_old: usize, n_new: usize) -> Result<Tensor> {
    let width = rows.dim(1)?;
    let mut values = Vec::with_capacity(n_new * width);
    for piece in pieces(&rows.narrow(0, 0, n_old)?)? {
        values.extend(piece?);
    }
    let mut sums = vec![0f64; width];
    for row in values.chunks_exact(width) {
        sums.iter_mut().zip(row).for_each(|(sum, value)| *sum += f64::from(*value));
    }
    let mean: Vec<f32> = sums.iter().map(|sum| (sum / n_old as f64) as f32).collect();
    values.extend(mean.iter().cycle().take((n_new - n_old) * width));
    Ok(Tensor::from_vec(values, (n_new, width), &Device::Cpu)?)
}

/// `tokenizer_config.json` may list the added tokens a second time, by id.
fn list_special_tokens(settings: &mut Value, first: u32) {
    let Some(listed) = settings.get_mut("added_tokens_decoder").and_then(Value::as_object_mut) else { return };
    for mut token in added_tokens(first) {
        if let Some(id) = token.as_object_mut().and_then(|fields| fields.remove("id")) {
            listed.insert(id.to_string(), token);
        }
    }
}
