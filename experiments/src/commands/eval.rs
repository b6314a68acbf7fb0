//! `grpo eval`: benchmarks.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use grpo::{Group, GroupSampler, GroupSize, IndexedPrompt, Prompt, RewardSet, Rollout, Seed, panel};
use grpo_policies::simplear::SimpleAr;
use grpo_rewards::geneval::{GenEval, Summary};
use grpo_rewards::shapes::ShapesDetector;

use super::generate::LawArgs;
use super::{PolicyArgs, print, tell};
use crate::config::PolicySource;
use crate::failure::{Failure, Outcome};
use crate::parts;

/// Evaluate a policy.
#[derive(Args)]
pub struct Eval {
    #[command(subcommand)]
    benchmark: Benchmark,
}

#[derive(Subcommand)]
enum Benchmark {
    /// GenEval's six tasks on the Shapes world's held-out prompts, by the exact detector.
    Geneval(Geneval),
}

impl Eval {
    /// Runs it.
    pub fn run(self) -> Outcome<()> {
        match self.benchmark {
            Benchmark::Geneval(geneval) => geneval.run(),
        }
    }
}

#[derive(Args)]
struct Geneval {
    #[command(flatten)]
    policy: PolicyArgs,
    /// Images of each prompt; 4 in the paper.
    #[arg(short, default_value_t = 4)]
    n: usize,
    /// The seed of the draws; with the default these are the trainer's held-out draws.
    #[arg(long)]
    seed: Option<u64>,
    #[command(flatten)]
    law: LawArgs,
    /// Keep a panel of all images in this file.
    #[arg(long, value_name = "PNG")]
    panel: Option<PathBuf>,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

impl Geneval {
    fn run(self) -> Outcome<()> {
        let device = parts::device(&self.policy.device)?;
        let policy = parts::policy(PolicySource::ShapesSft, self.policy.policy.as_deref(), &device)?;
        let policy = policy.with_law(self.law.law())?;
        let (_, prompts) = parts::shapes_prompts()?;
        let groups = self.draw(&policy, &prompts)?;
        let scores: Vec<Vec<f32>> = groups.iter().map(Group::rewards).collect();
        let summary = Summary::of(&prompts, &scores)?;
        match self.json {
            true => {
                print(&serde_json::to_string(&summary).map_err(|error| Failure::from(anyhow::Error::from(error)))?)?
            }
            false => print(&summary.to_string())?,
        }
        if let (Some(file), Some(picture)) = (&self.panel, panel(&groups, &[], &["geneval".into()])) {
            picture.save(file).map_err(|error| grpo::Error::file(file, error))?;
            tell(&format!("panel  {}", file.display()));
        }
        Ok(())
    }

    fn draw(&self, policy: &SimpleAr, prompts: &[Prompt]) -> Outcome<Vec<Group<SimpleAr>>> {
        let rewards = RewardSet::new().with(GenEval::new(ShapesDetector::new()), 1.0)?;
        let mut sampler = GroupSampler::new(rewards, GroupSize::new(self.n)?, 128);
        let indexed: Vec<IndexedPrompt<'_>> = prompts.iter().enumerate().collect();
        let seed = self.seed.map_or_else(grpo::held_out_seed, Seed::new);
        Ok(sampler.collect(policy, &indexed, seed)?)
    }
}
