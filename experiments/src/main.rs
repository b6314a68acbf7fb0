//! The `grpo` command.

mod commands;
mod config;
mod corpora;
mod failure;
mod judges;
mod parts;
mod prompts;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use commands::Command;

// Tensors are large and short-lived; the system's allocator gives each one back to the kernel and faults it in again.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Reinforcement learning with GRPO: train, sample, score and evaluate image policies.
///
/// Science stands in TOML files, place and device in flags. People's text goes to standard error, results to
/// standard output; --json makes them one JSON object a line.
#[derive(Parser)]
#[command(name = "grpo", version, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "Examples:
  grpo train experiments/shapes_clip.toml               train the miniature under CLIP
  grpo train experiments/shapes_clip.toml --resume      go on with a run that was broken off
  grpo generate --prompt 'a photo of a red star' -n 4   draw four images
  grpo score --reward clip --prompt 'a red star' a.png  what CLIP says of an image
  grpo eval geneval --policy runs/shapes_clip/0/policy  the six tasks of GenEval on held-out prompts
  grpo show experiments/shapes_clip.toml                the configuration with every default filled in";

fn main() -> ExitCode {
    grpo_policies::keep_freed_memory();
    match Cli::parse().command.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // A closed standard error leaves the exit code to speak.
            drop(writeln!(std::io::stderr(), "error: {failure}"));
            ExitCode::from(failure.exit_code())
        }
    }
}
