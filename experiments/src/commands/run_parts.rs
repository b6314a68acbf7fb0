//! What a GRPO run is made of, beside its configuration: policy, scorers, prompts.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use grpo::{Mixed, Prompt, RewardSet, Seed, Trainer, held_out_seed};
use grpo_experiments::report::OPTIMISED;
use grpo_policies::simplear::SimpleAr;
use image::RgbImage;
use serde_json::{Value, json};

use super::{PolicyArgs, plan};
use crate::config::{RewardSource, TrainFile};
use crate::failure::Outcome;
use crate::judges::Judges;
use crate::parts::{self, ScorerArgs, Scorers};
use crate::prompts;

/// Where the parts of a run are.
#[derive(Args)]
pub struct PartsArgs {
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
    /// Keep each layer's input and make its activations again on the way back: far less memory, the same numbers, the
    /// time of one more forward pass.
    #[arg(long)]
    recompute_layers: bool,
}

/// The parts of one run or of several.
pub struct RunParts {
    args: PartsArgs,
    scorers: Scorers,
    trained: Vec<Prompt>,
    held_out: Vec<Prompt>,
}

impl PartsArgs {
    /// Reads the prompts and the scorers' places; an error where a scorer was given that none of these files asks for.
    pub fn open<'a>(self, files: impl IntoIterator<Item = &'a TrainFile>) -> Outcome<RunParts> {
        let scorers = self.scorers.scorers()?;
        let rewards = files.into_iter().flat_map(TrainFile::all_rewards);
        let asked = rewards.flat_map(RewardSource::scorers).collect();
        scorers.check_all_asked(&asked, "name it as rewards = [{ given = { name = \"NAME\" } }]")?;
        let (shapes, shapes_held_out) = parts::shapes_prompts()?;
        let read = |file: &Option<PathBuf>, shapes| file.as_ref().map_or(Ok(shapes), |path| prompts::read(path));
        let trained = read(&self.prompts, shapes)?;
        let held_out = read(&self.held_out_prompts, shapes_held_out)?;
        Ok(RunParts { args: self, scorers, trained, held_out })
    }
}

impl RunParts {
    /// What decides a run's rewards.
    pub fn judges(&self, file: &TrainFile) -> Outcome<Judges> {
        let rewards: [&[RewardSource]; 2] = [&file.rewards, &file.held_out.rewards];
        Judges::new(rewards, &self.scorers.origins()?, [&self.trained, &self.held_out])
    }

    /// What decides the runs of an ablation beside their configurations: the policy they start from, the prompts, and the
    /// scorers that these rewards ask for.
    pub fn shared(&self, rewards: &[RewardSource]) -> Outcome<Value> {
        let judges = Judges::new([&[], rewards], &self.scorers_of(rewards)?, [&self.trained, &self.held_out])?;
        Ok(json!({"judges": judges, "policy": self.args.policy.fingerprint()?}))
    }

    /// Where the scorers of these rewards are.
    pub fn scorers_of(&self, rewards: &[RewardSource]) -> Outcome<BTreeMap<String, String>> {
        let asked: BTreeSet<String> = rewards.iter().flat_map(RewardSource::scorers).collect();
        Ok(self.scorers.origins()?.into_iter().filter(|(name, _)| asked.contains(name)).collect())
    }

    /// The trainer, and the tokens of its longest prompt.
    pub fn trainer(&self, file: &TrainFile) -> Outcome<(Trainer<SimpleAr>, usize)> {
        let (trainer, prompt_tokens, _) = self.unwatched(file)?;
        if file.held_out.rewards.is_empty() {
            return Ok((trainer, prompt_tokens));
        }
        let watched = self.scorers.rewards(&file.held_out.rewards)?;
        Ok((trainer.hold_out(self.held_out.clone(), watched, file.held_out.samples_per_prompt), prompt_tokens))
    }

    /// The trainer of an ablation's run, whose held-out draws are those of all runs of its seed. Where an optimised reward is
    /// not watched as it is, because it has changes or a gate, the whole mix is watched under a name of its own.
    pub fn paired_trainer(&self, file: &TrainFile) -> Outcome<Trainer<SimpleAr>> {
        let (trainer, _, rewards) = self.unwatched(file)?;
        let mut watched = self.scorers.rewards(&file.held_out.rewards)?;
        if file.rewards.iter().any(|reward| !reward.is_plain()) {
            watched = watched.with(Mixed::new(OPTIMISED, rewards), 1.0)?;
        }
        let (size, draws) = (file.held_out.samples_per_prompt, held_out_seed().fold(file.seed));
        Ok(trainer.hold_out_from(self.held_out.clone(), watched, size, draws))
    }

    /// A trainer without held-out prompts, the tokens of its longest prompt, and what it optimises.
    fn unwatched(&self, file: &TrainFile) -> Outcome<(Trainer<SimpleAr>, usize, Arc<RewardSet<RgbImage>>)> {
        let policy = self.args.policy.load(file.policy)?.with_law(file.law.clone())?;
        let policy = match &file.lora {
            Some(lora) => policy.with_lora(lora.clone(), Seed::new(file.seed).named("lora"))?,
            None => policy,
        };
        let policy = if self.args.recompute_layers { policy.recompute_layers() } else { policy };
        let reference = match (file.objective.needs_reference(), file.objective.reference_sync) {
            (false, _) => None,
            (true, None) => Some(policy.frozen()?),
            (true, Some(_)) => Some(policy.copy()?),
        };
        let (config, rewards) = (file.train_config(), Arc::new(self.scorers.rewards(&file.rewards)?));
        let rollout = parts::rollout(Arc::clone(&rewards), &config);
        let prompt_tokens = plan::longest_prompt(&policy, &self.trained)?;
        Ok((Trainer::new(config, policy, reference, rollout, self.trained.clone())?, prompt_tokens, rewards))
    }
}
