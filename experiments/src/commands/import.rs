//! `grpo import`: models of others, made into folders that this library loads.

use std::path::PathBuf;

use candle_core::Device;
use clap::{Args, Subcommand};
use grpo_policies::cosmos::{CosmosFiles, PublishedCosmos};
use grpo_policies::safetensors_file::Precision;

use super::import_qwen::ImportQwen;
use super::tell;
use crate::failure::{Failure, Outcome};

/// Make a published model into a folder that this library loads; nothing in its files is executed.
#[derive(Args)]
pub struct Import {
    #[command(subcommand)]
    model: Model,
}

#[derive(Subcommand)]
enum Model {
    /// NVIDIA's tokenizer Cosmos DV8x16x16, folded for single images.
    Cosmos(CosmosArgs),
    /// A Qwen2.5 language model, given SimpleAR's special tokens and codebook: where pretraining starts.
    Qwen(ImportQwen),
}

/// Give the published folder, or its files by name.
#[derive(Args)]
struct CosmosArgs {
    /// The folder with encoder.jit and decoder.jit, or model.pt, or autoencoder.jit.
    folder: Option<PathBuf>,
    /// The encoder's TorchScript archive, with --decoder.
    #[arg(long, value_name = "FILE")]
    encoder: Option<PathBuf>,
    /// The decoder's TorchScript archive, with --encoder.
    #[arg(long, value_name = "FILE")]
    decoder: Option<PathBuf>,
    /// A state dict or the archive of the whole autoencoder.
    #[arg(long, value_name = "FILE")]
    model: Option<PathBuf>,
    /// Where config.json and model.safetensors go.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Write the weights in bfloat16: half the size, and some latents round to other codes.
    #[arg(long)]
    bf16: bool,
}

impl Import {
    /// Runs it.
    pub fn run(self) -> Outcome<()> {
        match self.model {
            Model::Cosmos(args) => args.run(),
            Model::Qwen(args) => args.run(),
        }
    }
}

impl CosmosArgs {
    fn run(self) -> Outcome<()> {
        for name in ["config.json", "model.safetensors"] {
            if self.out.join(name).exists() {
                return Err(Failure::user(format!(
                    "--out {}: already holds a {name}; give another folder or remove it",
                    self.out.display()
                )));
            }
        }
        let precision = if self.bf16 { Precision::Bf16 } else { Precision::F32 };
        let files = match (self.folder, self.encoder, self.decoder, self.model) {
            (Some(folder), None, None, None) => CosmosFiles::in_folder(folder)?,
            (None, Some(encoder), Some(decoder), None) => CosmosFiles::Parts { encoder, decoder },
            (None, None, None, Some(model)) => CosmosFiles::Whole(model),
            _ => {
                return Err(Failure::user("give one of: the published folder; --encoder and --decoder; --model"));
            }
        };
        let published = PublishedCosmos::read(&files)?;
        let tokenizer = published.fold(&Device::Cpu)?;
        tell(&format!("read {} tensors, {} parameters", published.n_tensors(), published.n_parameters()));
        tokenizer.save(&self.out, precision)?;
        tell(&format!("folded for single images, in {}", self.out.display()));
        Ok(())
    }
}
