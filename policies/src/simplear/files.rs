//! A SimpleAR checkpoint as a folder, and the one that comes with this crate.
//!
//! `config.json`, `model.safetensors` or its shards, and `tokenizer.json` are Hugging Face's; `cosmos/` holds the
//! visual tokenizer.

use std::path::Path;
use std::sync::Arc;

use candle_core::Device;
use grpo::{Error, Result};

use super::{Grid, SimpleAr, TextTokenizer};
use crate::cosmos::{Cosmos, CosmosConfig};
use crate::decoder::folder::{Companions, GENERATION, on_device, read_text, write_text};
use crate::decoder::{Decoder, DecoderConfig};
use crate::safetensors_file::{self, Precision};

pub(super) const TOKENIZER: &str = "tokenizer.json";
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

    /// Reads a checkpoint folder, trainable, for images of `size` rows and columns of pixels, or of the size it was saved
    /// with.
    pub fn load(folder: &Path, size: Option<(usize, usize)>, device: &Device) -> Result<Self> {
        Self::load_as(folder, device, |decoder, cosmos| match (size, decoder.config().image_grid) {
            (Some((height, width)), _) => cosmos.grid(height, width),
            (None, Some(grid)) => Ok(grid),
            (None, None) => {
                let message = "config.json has no image_grid, so images have no size; give it, such as --size 512";
                Err(Error::file(folder, message))
            }
        })
    }

    /// As [`SimpleAr::load`], for images of so many rows and columns of tokens.
    pub fn load_with_grid(folder: &Path, grid: Grid, device: &Device) -> Result<Self> {
        Self::load_as(folder, device, |_, _| Ok(grid))
    }

    fn load_as(folder: &Path, device: &Device, grid: impl FnOnce(&Decoder, &Cosmos) -> Result<Grid>) -> Result<Self> {
        if !folder.is_dir() {
            return Err(Error::file(
                folder,
                "there is no such folder; give one that holds config.json, model.safetensors, tokenizer.json and cosmos/",
            ));
        }
        let decoder = Decoder::load(folder, device, true)?;
        let path = folder.join(TOKENIZER);
        let text = TextTokenizer::from_json(&read_text(&path)?).map_err(|error| Error::file(path, error))?;
        let cosmos = Cosmos::load(folder.join(COSMOS), device)?;
        let grid = grid(&decoder, &cosmos)?;
        let policy = Self::new(decoder, Arc::new(cosmos), Arc::new(text), grid);
        Ok(policy.map_err(|error| Error::file(folder, error))?.with_companions(Companions::read(folder)?))
    }

    /// Carries the files that stand beside a checkpoint, and looks in them for what the original's sampling heeds.
    pub(super) fn with_companions(mut self, companions: Companions) -> Self {
        let penalty = companions.json(GENERATION).and_then(|settings| settings.get("repetition_penalty")?.as_f64());
        if let Some(penalty) = penalty.filter(|penalty| *penalty != 1.0) {
            self.warnings = Arc::new(vec![format!(
                "{GENERATION} has repetition_penalty {penalty}, which the original's sampling applies to the \
                 conditional logits and this one does not; set it to 1 there before comparing samples"
            )]);
        }
        self.companions = Arc::new(companions);
        self
    }

    /// What in the checkpoint's folder makes the original sample otherwise than this policy does; a line each.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Writes what [`SimpleAr::load`] and, but for `cosmos/`, `transformers` read, and the files of the tokenizer that
    /// stood beside the checkpoint it was loaded from.
    pub fn save(&self, folder: &Path, precision: Precision) -> Result<()> {
        self.decoder.save(folder, precision)?;
        write_text(&folder.join(TOKENIZER), self.text.json())?;
        self.companions.write(folder)?;
        self.cosmos.save(folder.join(COSMOS), precision)
    }
}

/// The visual tokenizer of the Shapes world.
pub fn shapes_cosmos(device: &Device) -> Result<Cosmos> {
    let config: CosmosConfig = serde_json::from_str(include_str!("../../models/shapes/cosmos/config.json"))
        .map_err(|error| Error::config(format!("the embedded visual tokenizer: {error}")))?;
    Cosmos::from_bytes(config, include_bytes!("../../models/shapes/cosmos/model.safetensors"), device)
}
