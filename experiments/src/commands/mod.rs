//! The commands, one file each.

mod ablate;
mod draw;
mod eval;
mod generate;
mod import;
mod import_qwen;
mod nll;
mod plan;
mod pretrain;
mod report;
mod run_parts;
mod score;
mod show;
mod tokenizer;
mod tokens;
mod train;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;

use clap::builder::RangedU64ValueParser;
use clap::{Args, Subcommand};
use grpo_policies::decoder::Compute;
use grpo_policies::simplear::SimpleAr;
use grpo_rewards::evaluation::sha256;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use crate::config::PolicySource;
use crate::failure::{Failure, Outcome};
use crate::parts;

pub use run_parts::PartsArgs;

/// What `grpo` can do.
#[derive(Subcommand)]
pub enum Command {
    /// Train a visual tokenizer on images.
    Tokenizer(tokenizer::Tokenizer),
    /// Pretrain a decoder on images as tokens.
    Pretrain(pretrain::Pretrain),
    /// Fine-tune a policy on images as tokens.
    Sft(pretrain::Sft),
    /// Train a policy with GRPO.
    Train(train::Train),
    /// Train the arms of an ablation under several seeds, and report what differs.
    Ablate(ablate::Ablate),
    /// Compare runs: what rose, what fell, and how sure that is, as a page, as Markdown and as JSON.
    Report(report::ReportRuns),
    /// Draw images for prompts.
    Generate(generate::Generate),
    /// Encode a corpus, or some images, as codes.
    Tokenize(tokens::Tokenize),
    /// Decode codes to images.
    Detokenize(tokens::Detokenize),
    /// Score images with any rewards, each against every prompt.
    Score(score::Score),
    /// Evaluate a policy, or any model's images, on GenEval, DPG-Bench or the HPSv2 benchmark.
    Eval(eval::Eval),
    /// Make a published model into a folder that this library loads.
    Import(import::Import),
    /// Print a configuration with every default filled in.
    Show(show::Show),
    /// Render captioned scenes of the Shapes world, as the reward models are trained on.
    Draw(draw::Draw),
}

impl Command {
    /// Runs it.
    pub fn run(self) -> Outcome<()> {
        match self {
            Self::Tokenizer(command) => command.run(),
            Self::Pretrain(command) => command.run(),
            Self::Sft(command) => command.run(),
            Self::Train(command) => command.run(),
            Self::Ablate(command) => command.run(),
            Self::Report(command) => command.run(),
            Self::Generate(command) => command.run(),
            Self::Tokenize(command) => command.run(),
            Self::Detokenize(command) => command.run(),
            Self::Score(command) => command.run(),
            Self::Eval(command) => command.run(),
            Self::Import(command) => command.run(),
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
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Where a decoder computes, and in what.
#[derive(Args)]
pub struct DeviceArgs {
    /// cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    pub device: String,
    /// What a decoder's activations are on CUDA; weights, sums and gradients are f32, and so is everything on the CPU.
    #[arg(long, value_name = "TYPE", default_value = "bf16", value_parser = ["bf16", "f32"])]
    compute: String,
}

impl DeviceArgs {
    /// The type of activations.
    pub fn compute(&self) -> Compute {
        if self.compute == "f32" { Compute::F32 } else { Compute::Bf16 }
    }
}

impl PolicyArgs {
    /// What runs that start from it share: the checksums of its files, or that it is embedded, and in what it computes.
    pub fn fingerprint(&self) -> Outcome<Value> {
        let mut files = BTreeMap::new();
        for (policy, part) in self.policy.iter().flat_map(|policy| [(policy, ""), (policy, "cosmos")]) {
            // Loading it tells of a folder that is missing.
            let Ok(entries) = std::fs::read_dir(policy.join(part)) else { continue };
            for path in entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| path.is_file()) {
                // By its name in the folder, however that was spelt.
                let name = path.strip_prefix(policy).unwrap_or(&path).display().to_string();
                files.insert(name, sha256(&path)?);
            }
        }
        let device = self.device.device.split(':').next().unwrap_or_default();
        // The CPU computes in f32 alone.
        let compute = if device == "cpu" { "f32" } else { self.device.compute.as_str() };
        Ok(json!({"files": files, "device": device, "compute": compute}))
    }

    /// The policy of a configuration, on the device and in the type that were asked for.
    pub fn load(&self, source: PolicySource) -> Outcome<SimpleAr> {
        let device = parts::device(&self.device.device)?;
        Ok(parts::policy(source, self.policy.as_deref(), &device)?.with_compute(self.device.compute()))
    }
}

/// Which policy is looked at, and at which size.
#[derive(Args)]
pub struct SampledPolicyArgs {
    #[command(flatten)]
    policy: PolicyArgs,
    /// Size of images in pixels, HEIGHTxWIDTH or one number for both; the policy's own where absent.
    #[arg(long, value_name = "PIXELS", value_parser = size, requires = "policy")]
    size: Option<(usize, usize)>,
}

impl SampledPolicyArgs {
    /// The policy.
    pub fn load(&self) -> Outcome<SimpleAr> {
        let source = match self.size {
            None => PolicySource::ShapesSft,
            Some((height, width)) => PolicySource::Folder { height, width },
        };
        self.policy.load(source)
    }
}

/// Parses a count that may not be 0.
pub fn at_least_one() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..)
}

/// `512` or `512x768`: rows and columns of pixels.
fn size(text: &str) -> Result<(usize, usize), String> {
    let (height, width) = text.split_once('x').unwrap_or((text, text));
    let side = |text: &str| text.parse().ok().filter(|side| (1..=1 << 16).contains(side));
    side(height).zip(side(width)).ok_or_else(|| "give HEIGHTxWIDTH in pixels, such as 512x512, or one number".into())
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
