//! `grpo train`: GRPO from a TOML file.

use std::path::PathBuf;

use clap::Args;
use grpo::RunFolder;
use grpo_policies::safetensors_file::Precision;
use grpo_policies::simplear::SimpleAr;

use super::{ConfigArgs, PartsArgs, plan, print, tell};
use crate::config::{self, TrainFile};
use crate::failure::{Failure, Outcome};

/// Train a policy with GRPO and record the run in a folder: curves, panels of samples, checkpoints.
#[derive(Args)]
pub struct Train {
    #[command(flatten)]
    config: ConfigArgs,
    #[command(flatten)]
    parts: PartsArgs,
    /// Where runs go: the run's folder is DIR/{name}/{seed}.
    #[arg(long, value_name = "DIR", default_value = "runs")]
    out: PathBuf,
    /// Go on with the run in that folder.
    #[arg(long)]
    resume: bool,
    /// Check the configuration, load every part and say what a step holds in memory, then stop.
    #[arg(long)]
    dry_run: bool,
}

impl Train {
    /// Runs it.
    pub fn run(self) -> Outcome<()> {
        let file: TrainFile = config::read(&self.config.config, &self.config.changes)?;
        file.check()?;
        let resolved = toml::to_string(&file).map_err(|error| Failure::from(anyhow::Error::from(error)))?;
        let parts = self.parts.open([&file])?;
        let judges = parts.judges(&file)?;
        let (trainer, prompt_tokens) = parts.trainer(&file)?;
        if self.dry_run {
            return print(&plan::describe(trainer.policy(), &file, prompt_tokens));
        }
        let run = match self.resume {
            true => RunFolder::open(self.out.join(&file.name).join(file.seed.to_string()))?,
            false => RunFolder::create(&self.out, &file.name, file.seed)?,
        };
        judges.check_or_write(&run, self.resume)?;
        let mut trainer = trainer.record_in(&run, &resolved)?;
        trainer.run()?;
        finish(&run, trainer.policy())
    }
}

/// Saves the trained policy and the pictures, and says where everything is.
fn finish(run: &RunFolder, policy: &SimpleAr) -> Outcome<()> {
    let folder = run.path().join("policy");
    policy.save(&folder, Precision::F32)?;
    tell(&format!("run folder   {}", run.path().display()));
    tell(&format!("policy       {}", folder.display()));
    if policy.decoder().lora().is_some() {
        let folder = run.path().join("adapter");
        policy.save_adapter(&folder)?;
        tell(&format!("adapter      {}", folder.display()));
    }
    for picture in run.draw_pictures(&["reward", "held_out/clip/mean", "held_out/geneval/mean", "kl"])? {
        tell(&format!("picture      {}", picture.display()));
    }
    if let Some(peaks) = plan::peaks(run)? {
        tell(&format!("peak memory  {peaks}"));
    }
    tell(&format!("TensorBoard  tensorboard --logdir {}", run.path().display()));
    Ok(())
}
