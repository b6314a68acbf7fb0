//! `grpo show`: the resolved configuration.

use clap::Args;
use grpo_policies::tokens::Settings;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{ConfigArgs, print};
use crate::config::{self, AblationFile, PretrainFile, SftFile, TokenizerFile, TrainFile};
use crate::failure::{Failure, Outcome};

/// Print a configuration of any stage with every default filled in; the same text is kept in the run's folder.
#[derive(Args)]
pub struct Show {
    #[command(flatten)]
    config: ConfigArgs,
    /// One JSON object instead of TOML.
    #[arg(long)]
    json: bool,
}

/// What a file is of, told by the tables that only such a file has.
const KINDS: [(&str, Kind); 5] = [
    ("arms", Kind::Ablation),
    ("rewards", Kind::Train),
    ("cosmos", Kind::Tokenizer),
    ("decoder", Kind::Pretrain),
    ("stage", Kind::Sft),
];

#[derive(Clone, Copy)]
enum Kind {
    Ablation,
    Train,
    Tokenizer,
    Pretrain,
    Sft,
    Tokens,
}

impl Show {
    /// Runs it.
    pub fn run(self) -> Outcome<()> {
        let path = &self.config.config;
        let table: toml::Table = config::read(path, &[])?;
        let kind = KINDS.iter().find(|(key, _)| table.contains_key(*key)).map_or(Kind::Tokens, |(_, kind)| *kind);
        match kind {
            Kind::Ablation => {
                let file = AblationFile::read(path, &self.config.changes, false)?;
                self.print(&file.resolved()?)
            }
            Kind::Train => self.show(|file: &TrainFile| {
                file.train_config().check()?;
                file.law.check_trainable()
            }),
            Kind::Tokenizer => self.show(|file: &TokenizerFile| {
                file.corpus.check()?;
                file.stage.check()
            }),
            Kind::Pretrain => self.show(|file: &PretrainFile| {
                file.data.check()?;
                file.stage.check()
            }),
            Kind::Sft => self.show(|file: &SftFile| {
                file.data.check()?;
                file.stage.check()
            }),
            Kind::Tokens => self.show(Settings::check),
        }
    }

    fn show<T: DeserializeOwned + Serialize>(&self, check: impl FnOnce(&T) -> grpo::Result<()>) -> Outcome<()> {
        let file: T = config::read(&self.config.config, &self.config.changes)?;
        check(&file)?;
        self.print(&file)
    }

    fn print(&self, file: &impl Serialize) -> Outcome<()> {
        let ours = |error: anyhow::Error| Failure::from(error);
        let text = match self.json {
            true => serde_json::to_string(file).map_err(|error| ours(error.into()))?,
            false => toml::to_string(file).map_err(|error| ours(error.into()))?,
        };
        print(text.trim_end())
    }
}
