//! `grpo tokenizer`: a visual tokenizer from images alone.

use std::path::PathBuf;

use clap::Args;
use grpo::Seed;
use grpo_policies::cosmos::{Cosmos, Reconstruction};
use grpo_policies::stage::Stage;
use grpo_policies::tokens;

use super::pretrain::{finish, open_run, resolved};
use super::tokens::tell_skipped;
use super::{ConfigArgs, tell};
use crate::config::{self, TokenizerFile};
use crate::corpora::CorpusArgs;
use crate::failure::{Failure, Outcome};
use crate::parts;

/// Train a visual tokenizer (Cosmos' architecture) on a corpus's images.
#[derive(Args)]
pub struct Tokenizer {
    #[command(flatten)]
    config: ConfigArgs,
    #[command(flatten)]
    corpus: CorpusArgs,
    /// Where runs go: the run's folder is DIR/{name}/{seed}, and the tokenizer its `policy`.
    #[arg(long, value_name = "DIR", default_value = "runs")]
    out: PathBuf,
    /// Go on with the run in that folder.
    #[arg(long)]
    resume: bool,
    /// cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: String,
}

impl Tokenizer {
    /// Runs it.
    pub fn run(self) -> Outcome<()> {
        let file: TokenizerFile = config::read(&self.config.config, &self.config.changes)?;
        file.stage.check()?;
        if file.n_images == 0 {
            return Err(Failure::user("n_images is 0; give at least one more than data.validation_images"));
        }
        let run = open_run(&self.out, (&file.name, file.stage.seed), self.resume)?;
        let device = parts::device(&self.device)?;
        let corpus = self.corpus.open(&file.corpus.columns)?;
        let workers = std::thread::available_parallelism().map_or(1, usize::from);
        let (images, skipped) = tokens::pictures((corpus.as_ref(), &file.corpus), file.n_images, workers)?;
        tell_skipped(&skipped);
        let seed = Seed::new(file.stage.seed).named("cosmos");
        let cosmos = Cosmos::init(file.cosmos.clone(), seed, &device)?;
        tell(&format!("visual tokenizer: {} parameters, {} images", cosmos.params().n_elements(), images.len()));
        let learner = Reconstruction::new(cosmos, file.data, images, seed)?;
        let mut stage = Stage::new(file.stage.clone(), learner)?.record_in(&run, &resolved(&file)?)?;
        stage.run()?;
        finish(&run, "tokenizer")
    }
}
