//! A SimpleAR checkpoint as a folder, and the one that comes with this crate.
//!
//! `config.json`, `model.safetensors` and `tokenizer.json` are Hugging Face's; `cosmos/` holds the visual tokenizer.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use grpo::{Error, Result};

use super::{SimpleAr, TextTokenizer};
use crate::cosmos::{Cosmos, CosmosConfig};
use crate::decoder::{Decoder, DecoderConfig};
use crate::safetensors_file::{self, Precision};

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const TOKENIZER: &str = "tokenizer.json";
const COSMOS: &str = "cosmos";

/// Which of the embedded checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// After pretraining on free scenes.
    Pretrained,
    /// After supervised fine-tuning on the six tasks: where GRPO starts.
    Sft,
}

impl SimpleAr {
    /// The miniature of the Shapes world that comes with this crate: 64 px images of 8 x 8 tokens, trainable.
    ///
    /// Made by `grpo pretrain` and `grpo sft` from nothing; see `experiments/LOG.md` for the commands.
    pub fn shapes(stage: Stage, device: &Device) -> Result<Self> {
        let config = DecoderConfig::from_json(include_str!("../../models/shapes/config.json"))?;
        let bytes: &[u8] = match stage {
            Stage::Pretrained => include_bytes!("../../models/shapes/pretrained.safetensors"),
            Stage::Sft => include_bytes!("../../models/shapes/model.safetensors"),
        };
        let tensors = safetensors_file::read_bytes("the embedded decoder", bytes)?;
        let decoder = Decoder::from_tensors(config, on_device(tensors, device)?, true)?;
        let text = TextTokenizer::from_json(include_str!("../../models/shapes/tokenizer.json"))?;
        Self::new(decoder, Arc::new(shapes_cosmos(device)?), Arc::new(text), (8, 8))
    }

    /// Reads a checkpoint folder for images of `height` x `width` pixels, trainable.
    pub fn load(folder: &Path, height: usize, width: usize, device: &Device) -> Result<Self> {
        if !folder.is_dir() {
            return Err(Error::file(
                folder,
                "there is no such folder; give one that holds config.json, model.safetensors, tokenizer.json and cosmos/",
            ));
        }
        let read = |name: &str| {
            let path = folder.join(name);
            fs::read_to_string(&path).map_err(|error| Error::file(path, error))
        };
        let config = DecoderConfig::from_json(&read(CONFIG)?)?;
        let tensors = safetensors_file::read(folder.join(WEIGHTS))?;
        let decoder = Decoder::from_tensors(config, on_device(tensors, device)?, true)
            .map_err(|error| Error::file(folder.join(WEIGHTS), error))?;
        let text = TextTokenizer::from_json(&read(TOKENIZER)?)?;
        let cosmos = Cosmos::load(folder.join(COSMOS), device)?;
        let grid = cosmos.grid(height, width)?;
        Self::new(decoder, Arc::new(cosmos), Arc::new(text), grid)
    }

    /// Writes what [`SimpleAr::load`] reads, the weights as bf16 or f32.
    pub fn save(&self, folder: &Path, precision: Precision) -> Result<()> {
        fs::create_dir_all(folder).map_err(|error| Error::file(folder, error))?;
        let write = |name: &str, text: String| {
            let path = folder.join(name);
            fs::write(&path, text).map_err(|error| Error::file(path, error))
        };
        let config =
            serde_json::to_string_pretty(self.decoder.config()).map_err(|error| Error::config(error.to_string()))?;
        write(CONFIG, config + "\n")?;
        write(TOKENIZER, self.text.json().to_string())?;
        safetensors_file::write(folder.join(WEIGHTS), &self.decoder.tensors(), precision)?;
        self.cosmos.save(folder.join(COSMOS), precision)
    }
}

/// The visual tokenizer of the Shapes world.
pub fn shapes_cosmos(device: &Device) -> Result<Cosmos> {
    let config: CosmosConfig = serde_json::from_str(include_str!("../../models/shapes/cosmos/config.json"))
        .map_err(|error| Error::config(format!("the embedded visual tokenizer: {error}")))?;
    Cosmos::from_bytes(config, include_bytes!("../../models/shapes/cosmos/model.safetensors"), device)
}

fn on_device(tensors: BTreeMap<String, Tensor>, device: &Device) -> Result<BTreeMap<String, Tensor>> {
    let mut moved = BTreeMap::new();
    for (name, tensor) in tensors {
        moved.insert(name, tensor.to_dtype(DType::F32)?.to_device(device)?);
    }
    Ok(moved)
}
