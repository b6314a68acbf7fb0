//! `grpo draw`: the corpus on which the miniature's reward models are trained.

use std::path::PathBuf;

use clap::Args;
use grpo::Seed;
use grpo_rewards::shapes::{self, Split};

use super::tell;
use crate::failure::Outcome;

/// Render captioned scenes with false captions beside the true one: images.bin and captions.jsonl.
#[derive(Args)]
pub struct Draw {
    /// How many scenes.
    #[arg(short)]
    n: usize,
    /// Where they go.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// The seed of the scenes.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Leave out the combinations that the policy never sees in training.
    #[arg(long)]
    train_only: bool,
}

impl Draw {
    /// Runs it.
    pub fn run(self) -> Outcome<()> {
        let split = if self.train_only { Split::Train } else { Split::All };
        shapes::write_corpus(&self.out, self.n, Seed::new(self.seed), shapes::DEFAULT_SIDE, split)?;
        tell(&format!("{} scenes in {}", self.n, self.out.display()));
        Ok(())
    }
}
