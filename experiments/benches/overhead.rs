//! What metrics, records and self-checks cost, as a share of the run's time, all in one run.
//!
//! `cargo bench -p grpo-experiments --bench overhead -- 30` runs so many steps of the published miniature
//! (`experiments/shapes_clip.toml`, without its evaluations) and adds up the times that it logs itself.

#![expect(clippy::print_stdout, reason = "a bench speaks to a person")]

use anyhow::{Context, Result};
use candle_core::Device;
use grpo::{
    AdvantageConfig, GroupSize, Objective, OptimConfig, OverlappedSampler, RewardSet, RolloutConfig, RunFolder, Scale,
    TrainConfig, Trainer, chart,
};
use grpo_policies::simplear::{SimpleAr, Stage};
use grpo_rewards::clip::ClipReward;
use grpo_rewards::geneval::Metadata;
use grpo_rewards::shapes::train_prompts;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> Result<()> {
    let n_steps = std::env::args().find_map(|argument| argument.parse().ok()).unwrap_or(30);
    let config = TrainConfig {
        n_steps,
        rollout: RolloutConfig {
            prompts_per_step: 12,
            group_size: GroupSize::new(8)?,
            rows_per_backward: 32,
            parts_at_once: 4,
            ..Default::default()
        },
        objective: Objective {
            kl_weight: 0.03,
            advantage: AdvantageConfig { scale: Scale::Batch, ..Default::default() },
            ..Default::default()
        },
        optim: OptimConfig { lr: 5e-4, ..Default::default() },
        ..Default::default()
    };
    let policy = SimpleAr::shapes(Stage::Sft, &Device::Cpu)?;
    let reference = policy.frozen()?;
    let prompts = train_prompts().iter().map(Metadata::to_prompt).collect::<grpo::Result<_>>()?;
    let rewards = RewardSet::new().with(ClipReward::tiny()?, 1.0)?;
    let rollout = OverlappedSampler::new(rewards, config.rollout.group_size, config.rollout.rows_per_call);
    let folder = tempfile::tempdir()?;
    let run = RunFolder::create(folder.path(), "overhead", 0)?;
    let mut trainer = Trainer::new(config, policy, Some(reference), Box::new(rollout), prompts)?
        .record_in(&run, &config.to_toml()?)?;
    trainer.run()?;

    let curves = chart::curves(&run)?;
    let sum = |name: &str| -> Result<f64> {
        let curve = curves.get(name).with_context(|| format!("the run logged no {name}"))?;
        Ok(curve.iter().map(|(_, seconds)| seconds).sum())
    };
    let (steps, metrics, records) = (sum("time/step_s")?, sum("time/metrics_s")?, sum("time/record_s")?);
    let checks = sum("time/self_check_s")?;
    let all = steps + records + checks;
    println!("{n_steps} steps: {steps:.2} s of work, pictures every {} steps", config.log.samples_every);
    for (what, seconds) in [("metrics", metrics), ("event files, lines, pictures", records), ("self-checks", checks)] {
        println!("{what:<30} {:6.1} ms a step   {:.2} %", 1e3 * seconds / n_steps as f64, 100.0 * seconds / all);
    }
    println!("{:<30} {:>21.2} % of the run", "together", 100.0 * (metrics + records + checks) / all);
    Ok(())
}
