//! `grpo train`: GRPO from a TOML file.

use std::path::PathBuf;

use clap::Args;
use grpo::{Prompt, RunFolder, Seed, Trainer};
use grpo_policies::safetensors_file::Precision;
use grpo_policies::simplear::SimpleAr;

use super::{ConfigArgs, PolicyArgs, plan, print, tell};
use crate::config::{self, RewardSource, TrainFile};
use crate::failure::{Failure, Outcome};
use crate::judges::Judges;
use crate::parts::{self, ScorerArgs, Scorers};
use crate::prompts;

/// Train a policy with GRPO and record the run in a folder: curves, panels of samples, checkpoints.
#[derive(Args)]
pub struct Train {
    #[command(flatten)]
    config: ConfigArgs,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    scorers: ScorerArgs,
    /// What to train on: a prompt a line, or a JSON object with a "prompt" and columns a line; the Shapes world's where
    /// absent.
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// What is held out, as --prompts.
    #[arg(long, value_name = "FILE")]
    held_out_prompts: Option<PathBuf>,
    /// Where runs go: the run's folder is DIR/{name}/{seed}.
    #[arg(long, value_name = "DIR", default_value = "runs")]
    out: PathBuf,
    /// Go on with the run in that folder.
    #[arg(long)]
    resume: bool,
    /// Check the configuration, load every part and say what a step holds in memory, then stop.
    #[arg(long)]
    dry_run: bool,
    /// Keep each layer's input and make its activations again on the way back: far less memory, the same numbers, the
    /// time of one more forward pass.
    #[arg(long)]
    recompute_layers: bool,
}

impl Train {
    /// Runs it.
    pub fn run(self) -> Outcome<()> {
        let file: TrainFile = config::read(&self.config.config, &self.config.changes)?;
        file.train_config().check()?;
        file.law.check_trainable()?;
        let resolved = toml::to_string(&file).map_err(|error| Failure::from(anyhow::Error::from(error)))?;
        let scorers = self.scorers.scorers()?;
        let rewards = || file.rewards.iter().chain(&file.held_out.rewards);
        rewards().try_for_each(RewardSource::check).map_err(Failure::user)?;
        let asked = rewards().flat_map(RewardSource::scorers).collect();
        scorers.check_all_asked(&asked, "name it as rewards = [{ given = { name = \"NAME\" } }]")?;
        let prompts = self.prompts()?;
        let judges = Judges::new(
            [&file.rewards, &file.held_out.rewards],
            &scorers.origins()?,
            [&prompts.trained, &prompts.held_out],
        )?;
        let (trainer, prompt_tokens) = self.trainer(&file, &scorers, prompts)?;
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

    /// The trainer, and the tokens of its longest prompt.
    fn trainer(&self, file: &TrainFile, scorers: &Scorers, prompts: Prompts) -> Outcome<(Trainer<SimpleAr>, usize)> {
        let policy = self.policy.load(file.policy)?.with_law(file.law.clone())?;
        let policy = match &file.lora {
            Some(lora) => policy.with_lora(lora.clone(), Seed::new(file.seed).named("lora"))?,
            None => policy,
        };
        let policy = if self.recompute_layers { policy.recompute_layers() } else { policy };
        let reference = match (file.objective.needs_reference(), file.objective.reference_sync) {
            (false, _) => None,
            (true, None) => Some(policy.frozen()?),
            (true, Some(_)) => Some(policy.copy()?),
        };
        let config = file.train_config();
        let rollout = parts::rollout(scorers.rewards(&file.rewards)?, &config);
        let prompt_tokens = plan::longest_prompt(&policy, &prompts.trained)?;
        let trainer = Trainer::new(config, policy, reference, rollout, prompts.trained)?;
        if file.held_out.rewards.is_empty() {
            return Ok((trainer, prompt_tokens));
        }
        let watched = scorers.rewards(&file.held_out.rewards)?;
        Ok((trainer.hold_out(prompts.held_out, watched, file.held_out.samples_per_prompt), prompt_tokens))
    }

    fn prompts(&self) -> Outcome<Prompts> {
        let (shapes, shapes_held_out) = parts::shapes_prompts()?;
        let read = |file: &Option<PathBuf>, shapes| file.as_ref().map_or(Ok(shapes), |path| prompts::read(path));
        Ok(Prompts { trained: read(&self.prompts, shapes)?, held_out: read(&self.held_out_prompts, shapes_held_out)? })
    }
}

/// Prompts to train on and those held out.
struct Prompts {
    trained: Vec<Prompt>,
    held_out: Vec<Prompt>,
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
