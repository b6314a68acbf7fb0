//! The main job: SimpleAR in miniature gets better under a CLIP reward, and a score it never saw rises as well.
//!
//! ```text
//! cargo run --release --example grpo_simplear -- 1   # the seed, 0 where none is given
//! ```
//!
//! Everything it needs is embedded; ONNX Runtime is found or fetched on the first run.

#![expect(clippy::print_stdout, reason = "an example speaks to a person")]

use std::path::Path;

use anyhow::{Context, Result};
use candle_core::Device;
use grpo::{
    AdvantageConfig, GroupSize, LogConfig, Objective, OptimConfig, OverlappedSampler, RewardSet, RolloutConfig,
    RunFolder, Scale, Schedule, TrainConfig, Trainer,
};
use grpo_policies::safetensors_file::Precision;
use grpo_policies::simplear::{SimpleAr, Stage};
use grpo_rewards::clip::ClipReward;
use grpo_rewards::geneval::{GenEval, Metadata};
use grpo_rewards::shapes::{ShapesDetector, held_out_prompts, train_prompts};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> Result<()> {
    grpo_policies::keep_freed_memory();
    let seed =
        std::env::args().nth(1).map_or(Ok(0), |seed| seed.parse()).context("the argument is the seed, a number")?;
    let config = TrainConfig {
        seed,
        n_steps: 118,
        rollout: RolloutConfig {
            prompts_per_step: 12,
            group_size: GroupSize::new(8)?,
            rows_per_backward: 32,
            parts_at_once: 4,
            ..Default::default()
        },
        // Over the group's own deviation, groups whose rewards lie close together would weigh as much as the others.
        objective: Objective {
            kl_weight: 0.03,
            advantage: AdvantageConfig { scale: Scale::Batch, ..Default::default() },
            ..Default::default()
        },
        optim: OptimConfig {
            lr: 5e-4,
            n_warmup: 5,
            schedule: Schedule::Cosine { min_ratio: 0.05 },
            ..Default::default()
        },
        log: LogConfig { held_out_every: 59, ..Default::default() },
        ..Default::default()
    };

    // What learns, and what it must not stray from.
    let policy = SimpleAr::shapes(Stage::Sft, &Device::Cpu)?;
    let reference = policy.frozen()?;

    // What is optimised, and what is only watched.
    let optimised = RewardSet::new().with(ClipReward::tiny()?, 1.0)?;
    let watched = RewardSet::new().with(ClipReward::tiny()?, 1.0)?.with(GenEval::new(ShapesDetector::new()), 1.0)?;
    let prompts = train_prompts().iter().map(Metadata::to_prompt).collect::<grpo::Result<_>>()?;
    let held_out = held_out_prompts().iter().map(Metadata::to_prompt).collect::<grpo::Result<_>>()?;

    let run = RunFolder::fresh(Path::new("runs"), "grpo_simplear", seed)?;
    println!("run folder   {}\nwatch it     tensorboard --logdir {}", run.path().display(), run.path().display());
    let rollout = OverlappedSampler::new(optimised, config.rollout.group_size, config.rollout.rows_per_call);
    let rollout = rollout.on_failed(config.rollout.failed_scores);
    let mut trainer = Trainer::new(config, policy, Some(reference), Box::new(rollout), prompts)?
        .hold_out(held_out, watched, GroupSize::new(4)?)
        .record_in(&run, &config.to_toml()?)?;
    trainer.run()?;

    trainer.policy().save(&run.path().join("policy"), Precision::F32)?;
    for picture in run.draw_pictures(&["reward", "held_out/clip/mean", "held_out/geneval/mean", "kl"])? {
        println!("picture      {}", picture.display());
    }
    println!("policy       {}", run.path().join("policy").display());
    Ok(())
}
