//! The commands, one file each.

mod draw;
mod eval;
mod generate;
mod pretrain;
mod score;
mod show;
mod train;

use std::io::Write;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};

use crate::failure::{Failure, Outcome};

/// What `grpo` can do.
#[derive(Subcommand)]
pub enum Command {
    /// Train the miniature's visual tokenizer and decoder from nothing.
    Pretrain(pretrain::Pretrain),
    /// Fine-tune a policy on captioned images.
    Sft(pretrain::Sft),
    /// Train a policy with GRPO.
    Train(train::Train),
    /// Draw images for prompts.
    Generate(generate::Generate),
    /// Score images against a prompt.
    Score(score::Score),
    /// Evaluate a policy on a benchmark.
    Eval(eval::Eval),
    /// Print a configuration with every default filled in.
    Show(show::Show),
    /// Render captioned scenes of the Shapes world, as the reward models are trained on.
    Draw(draw::Draw),
}

impl Command {
    /// Runs it.
    pub fn run(self) -> Outcome<()> {
        match self {
            Self::Pretrain(command) => command.run(),
            Self::Sft(command) => command.run(),
            Self::Train(command) => command.run(),
            Self::Generate(command) => command.run(),
            Self::Score(command) => command.run(),
            Self::Eval(command) => command.run(),
            Self::Show(command) => command.run(),
            Self::Draw(command) => command.run(),
        }
    }
}

/// A file of settings and changes to it.
#[derive(Args)]
pub struct ConfigArgs {
    /// The TOML file.
    pub config: PathBuf,
    /// Change one value, such as --set optim.lr=1e-4; may be given again.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub changes: Vec<String>,
}

/// Which policy, and where it computes.
#[derive(Args)]
pub struct PolicyArgs {
    /// A checkpoint's folder; the embedded miniature after fine-tuning where absent.
    #[arg(long, value_name = "DIR")]
    pub policy: Option<PathBuf>,
    /// cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    pub device: String,
}

/// Says something to a person.
pub fn tell(line: &str) {
    // A closed standard error is no reason to stop.
    drop(writeln!(std::io::stderr(), "{line}"));
}

/// Prints a line of the result.
pub fn print(line: &str) -> Outcome<()> {
    writeln!(std::io::stdout(), "{line}").map_err(|error| Failure::user(format!("standard output: {error}")))
}

/// A progress bar for `n` steps; invisible where standard error is no terminal.
pub fn progress(n: usize) -> ProgressBar {
    let bar = ProgressBar::new(n as u64);
    match ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed} (left {eta}) {msg}") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
