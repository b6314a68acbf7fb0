//! `grpo eval`: benchmarks.

mod images;
mod report;

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use grpo::{Group, GroupSampler, GroupSize, IndexedPrompt, Prompt, Reward, RewardSet, Rollout, Seed, panel};
use grpo_policies::simplear::SimpleAr;
use grpo_rewards::geneval::{GenEval, Summary};
use grpo_rewards::shapes::{DEFAULT_SIDE, ShapesDetector, held_out_prompts, render, scene_for};
use image::RgbImage;

use self::images::{Dpg, FolderArgs, Hps};
use self::report::ReportArgs;
use super::generate::LawArgs;
use super::nll::Nll;
use super::{SampledPolicyArgs, at_least_one, print, tell};
use crate::failure::{Failure, Outcome};
use crate::parts;

/// Evaluate a policy, or images that are there.
#[derive(Args)]
pub struct Eval {
    #[command(subcommand)]
    benchmark: Benchmark,
}

#[derive(Subcommand)]
enum Benchmark {
    /// GenEval's six tasks: a policy on the Shapes world's held-out prompts, or a folder of any model's images.
    Geneval(Box<Geneval>),
    /// DPG-Bench on a folder of any model's images.
    Dpg(Dpg),
    /// The HPSv2 benchmark on folders of any model's images.
    Hps(Hps),
    /// What the visual tokenizer lets through: the same tasks on rendered scenes, encoded and decoded.
    Tokenizer(Tokenizer),
    /// Negative log-likelihood of images' tokens.
    Nll(Nll),
}

impl Eval {
    /// Runs it.
    pub fn run(self) -> Outcome<()> {
        match self.benchmark {
            Benchmark::Geneval(geneval) => geneval.run(),
            Benchmark::Dpg(dpg) => dpg.run(),
            Benchmark::Hps(hps) => hps.run(),
            Benchmark::Tokenizer(tokenizer) => tokenizer.run(),
            Benchmark::Nll(nll) => nll.run(),
        }
    }
}

#[derive(Args)]
struct Geneval {
    #[command(flatten)]
    policy: SampledPolicyArgs,
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
    #[command(flatten)]
    folder: FolderArgs,
    #[command(flatten)]
    out: ReportArgs,
}

impl Geneval {
    fn run(self) -> Outcome<()> {
        if let Some(images) = &self.folder.images {
            return self.folder.run(images, &self.out);
        }
        let policy = self.policy.load()?;
        let policy = policy.with_law(self.law.law())?;
        let (_, prompts) = parts::shapes_prompts()?;
        let groups = self.draw(&policy, &prompts)?;
        let scores: Vec<Vec<f32>> = groups.iter().map(Group::rewards).collect();
        let summary = Summary::of(&prompts, &scores)?;
        self.write(&summary)?;
        if let (Some(file), Some(picture)) = (&self.panel, panel(&groups, &[], &["geneval".into()])) {
            picture.save(file).map_err(|error| grpo::Error::file(file, error))?;
            tell(&format!("panel  {}", file.display()));
        }
        Ok(())
    }

    /// A file where one is named, standard output else.
    fn write(&self, summary: &Summary) -> Outcome<()> {
        if self.out.report.is_some() {
            return Err(Failure::user("--report is for --images DIR; a policy's table goes to --json FILE"));
        }
        match self.out.json.as_deref() {
            Some(path) if path != Path::new("-") => {
                let text = serde_json::to_string(summary).map_err(anyhow::Error::from)?;
                Ok(std::fs::write(path, text).map_err(|error| grpo::Error::file(path, error))?)
            }
            json => report_summary(summary, json.is_some()),
        }
    }

    fn draw(&self, policy: &SimpleAr, prompts: &[Prompt]) -> Outcome<Vec<Group<SimpleAr>>> {
        let rewards = RewardSet::new().with(GenEval::new(ShapesDetector::new()), 1.0)?;
        let mut sampler = GroupSampler::new(rewards, GroupSize::new(self.n)?, 128);
        let indexed: Vec<IndexedPrompt<'_>> = prompts.iter().enumerate().collect();
        let seed = self.seed.map_or_else(grpo::held_out_seed, Seed::new);
        Ok(sampler.collect(policy, &indexed, seed)?)
    }
}

/// The ceiling of any policy that writes with this tokenizer.
#[derive(Args)]
struct Tokenizer {
    #[command(flatten)]
    policy: SampledPolicyArgs,
    /// Scenes of each prompt.
    #[arg(short, default_value_t = 4, value_parser = at_least_one())]
    n: usize,
    /// The seed of the scenes.
    #[arg(long, default_value_t = 9)]
    seed: u64,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

impl Tokenizer {
    fn run(self) -> Outcome<()> {
        let policy = self.policy.load()?;
        let judge = GenEval::new(ShapesDetector::new());
        let (mut prompts, mut scores) = (Vec::new(), Vec::new());
        for (row, metadata) in held_out_prompts().iter().enumerate() {
            let seed = Seed::new(self.seed).fold(row as u64);
            let scene = |draw: usize| Ok(render(&scene_for(metadata, seed.fold(draw as u64))?, DEFAULT_SIDE));
            let scenes: Vec<RgbImage> = (0..self.n).map(scene).collect::<grpo::Result<_>>()?;
            let codes = policy.cosmos().encode(&scenes.iter().collect::<Vec<_>>())?;
            let prompt = metadata.to_prompt()?;
            let decoded = policy.decode(&codes)?;
            scores.push(decoded.iter().map(|image| judge.score(&prompt, image)).collect::<Result<Vec<f32>, _>>()?);
            prompts.push(prompt);
        }
        report_summary(&Summary::of(&prompts, &scores)?, self.json)
    }
}

fn report_summary(summary: &Summary, json: bool) -> Outcome<()> {
    match json {
        true => print(&serde_json::to_string(summary).map_err(|error| Failure::from(anyhow::Error::from(error)))?),
        false => print(&summary.to_string()),
    }
}
