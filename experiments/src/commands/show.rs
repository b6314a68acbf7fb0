//! `grpo show`: the resolved configuration.

use clap::Args;

use super::{ConfigArgs, print};
use crate::config::{self, TrainFile};
use crate::failure::{Failure, Outcome};

/// Print a training configuration with every default filled in; the same text is kept in the run's folder.
#[derive(Args)]
pub struct Show {
    #[command(flatten)]
    config: ConfigArgs,
    /// One JSON object instead of TOML.
    #[arg(long)]
    json: bool,
}

impl Show {
    /// Runs it.
    pub fn run(self) -> Outcome<()> {
        let file: TrainFile = config::read(&self.config.config, &self.config.changes)?;
        file.train_config().check()?;
        file.law.check_trainable()?;
        let ours = |error: anyhow::Error| Failure::from(error);
        let text = match self.json {
            true => serde_json::to_string(&file).map_err(|error| ours(error.into()))?,
            false => toml::to_string(&file).map_err(|error| ours(error.into()))?,
        };
        print(text.trim_end())
    }
}
