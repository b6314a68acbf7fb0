//! `grpo import qwen`: a language model becomes a SimpleAR checkpoint that pretraining starts from.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use grpo_policies::cosmos::Cosmos;
use grpo_policies::safetensors_file::Precision;
use grpo_policies::simplear::SimpleAr;

use super::{size, tell};
use crate::failure::{Failure, Outcome};

/// Give a Qwen2.5 language model the special tokens and the codebook of SimpleAR: where its pretraining starts.
#[derive(Args)]
pub struct ImportQwen {
    /// The Hugging Face folder: config.json, model.safetensors or its shards, tokenizer.json.
    #[arg(long, value_name = "DIR")]
    from: PathBuf,
    /// The visual tokenizer, whose codes become tokens: config.json and model.safetensors.
    #[arg(long, value_name = "DIR")]
    cosmos: PathBuf,
    /// Where the SimpleAR folder goes.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Size of images in pixels, HEIGHTxWIDTH or one number for both; SimpleAR is pretrained at 512.
    #[arg(long, value_name = "PIXELS", default_value = "512", value_parser = size)]
    size: (usize, usize),
    /// Write weights rounded to bfloat16, half the size.
    #[arg(long)]
    bf16: bool,
}

impl ImportQwen {
    /// Runs it.
    pub fn run(self) -> Outcome<()> {
        if self.out.join("config.json").exists() {
            let out = self.out.display();
            return Err(Failure::user(format!("{out} already holds a model; give another --out or remove it")));
        }
        let cosmos = Arc::new(Cosmos::load(&self.cosmos, &candle_core::Device::Cpu)?);
        let grid = cosmos.grid(self.size.0, self.size.1)?;
        let policy = SimpleAr::from_language_model(&self.from, cosmos, grid)?;
        let precision = if self.bf16 { Precision::Bf16 } else { Precision::F32 };
        policy.save(&self.out, precision)?;
        let config = policy.decoder().config();
        let codes = policy.cosmos().n_codes();
        tell(&format!(
            "{}: {} ids, the last {codes} of them codes; it draws noise until it is pretrained",
            self.out.display(),
            config.vocab_size
        ));
        Ok(())
    }
}
