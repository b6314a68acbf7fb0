//! Two rewards compared, one of them yours: every arm under every seed, then a report with paired intervals.
//!
//! ```text
//! cargo run --release --example compare_rewards        # about five minutes on two cores
//! cargo run --release --example compare_rewards -- 3   # only so many steps a run, in a folder of its own
//! ```
//!
//! Killed, it goes on where it was when it is started again.

#![expect(clippy::print_stdout, reason = "an example speaks to a person")]

use std::path::Path;

use anyhow::{Context, Result};
use candle_core::Device;
use grpo::{
    BoxError, GroupSampler, GroupSize, Prompt, Reward, RewardSet, RolloutConfig, TrainConfig, Trainer, held_out_seed,
};
use grpo_experiments::report::Options;
use grpo_experiments::{Ablation, Cell, Report};
use grpo_policies::simplear::{SimpleAr, Stage};
use grpo_rewards::clip::ClipReward;
use grpo_rewards::geneval::{GenEval, Metadata};
use grpo_rewards::shapes::{ShapesDetector, held_out_prompts, train_prompts};
use image::RgbImage;
use serde::Serialize;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The share of red in an image's light, 0 to 1.
struct Redness;

impl Reward<RgbImage> for Redness {
    fn name(&self) -> &str {
        "redness"
    }
    fn score(&self, _: &Prompt, image: &RgbImage) -> Result<f32, BoxError> {
        let sum = |channel: usize| image.pixels().map(|pixel| f32::from(pixel[channel])).sum::<f32>();
        Ok(sum(0) / (sum(0) + sum(1) + sum(2)).max(1.0))
    }
}

/// What an arm optimises: kept with its runs, so that one of another reward is not gone on with by mistake.
#[derive(Serialize)]
enum Arm {
    Clip,
    ClipAndRedness { weight: f32 },
}

impl Arm {
    fn rewards(&self) -> grpo::Result<RewardSet<RgbImage>> {
        let clip = RewardSet::new().with(ClipReward::tiny()?, 1.0)?;
        match self {
            Self::Clip => Ok(clip),
            Self::ClipAndRedness { weight } => clip.with(Redness, *weight),
        }
    }
}

/// The run of an arm under a seed, and its configuration. What judges is the same in every arm.
fn run(cell: &Cell<'_, Arm>, n_steps: usize) -> grpo::Result<(Trainer<SimpleAr>, String)> {
    let rollout = RolloutConfig { prompts_per_step: 12, rows_per_backward: 32, parts_at_once: 4, ..Default::default() };
    let mut config = TrainConfig { seed: cell.seed, n_steps, rollout, ..Default::default() };
    (config.objective.kl_weight, config.optim.lr) = (0.15, 2e-4);
    (config.log.held_out_every, config.log.held_out_pictures) = (n_steps.div_ceil(3), Some(8));
    let policy = SimpleAr::shapes(Stage::Sft, &Device::Cpu)?;
    let reference = policy.frozen()?;
    let prompts = train_prompts().iter().map(Metadata::to_prompt).collect::<grpo::Result<_>>()?;
    let held_out = held_out_prompts().iter().step_by(3).map(Metadata::to_prompt).collect::<grpo::Result<_>>()?;
    let watched = RewardSet::new().with(ClipReward::tiny()?, 1.0)?.with(GenEval::new(ShapesDetector::new()), 1.0)?;
    let rollout = GroupSampler::new(cell.arm.setting.rewards()?, config.rollout.group_size, 64);
    let trainer = Trainer::new(config, policy, Some(reference), Box::new(rollout), prompts)?;
    let draws = held_out_seed().fold(cell.seed);
    let trainer = trainer.hold_out_from(held_out, watched.with(Redness, 1.0)?, GroupSize::new(4)?, draws);
    Ok((trainer, config.to_toml()?))
}

fn main() -> Result<()> {
    grpo_policies::keep_freed_memory();
    let n_steps = std::env::args().nth(1).map_or(Ok(30), |n| n.parse()).context("the argument is a number of steps")?;
    let finished = Ablation::new(format!("compare_rewards-{n_steps}"), [0, 1, 2])
        .arm("clip", Arm::Clip)
        .arm("clip-and-redness", Arm::ClipAndRedness { weight: 1.0 })
        .compared_with("clip")
        .judged_by(["clip", "geneval"])
        .evaluated_by("geneval")
        .run(Path::new("runs"), |cell| Ok(run(cell, n_steps)?), |_, _, _| Ok(()))?;
    finished.check()?;
    let report = Report::of(&[&finished.folder], &Options::default())?;
    report.verdicts().iter().for_each(|line| println!("{line}"));
    for file in report.write(&finished.folder.join("report"))? {
        println!("report  {}", file.display());
    }
    Ok(())
}
