//! What metrics, records and self-checks cost, as a share of a step's time, all in one run.
//!
//! `cargo bench -p grpo-experiments --bench overhead -- 30` runs so many steps of the published miniature
//! (`experiments/shapes_clip.toml`, without its evaluations) and adds up the times that it logs itself.

#![expect(clippy::print_stdout, reason = "a bench speaks to a person")]

#[path = "peer/published.rs"]
mod published;

use anyhow::{Context, Result};
use candle_core::Device;
use grpo::{OverlappedSampler, RunFolder, TrainConfig, Trainer, chart};
use published::Published;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> Result<()> {
    grpo_policies::keep_freed_memory();
    let n_steps = std::env::args().find_map(|argument| argument.parse().ok()).unwrap_or(30);
    let Published { config, policy, rewards, prompts } = Published::read(&Device::Cpu)?;
    let config = TrainConfig { n_steps, ..config };
    let reference = policy.frozen()?;
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
    let (work, metrics, records) = (sum("time/step_s")?, sum("time/metrics_s")?, sum("time/record_s")?);
    let checks = sum("time/self_check_s")?;
    // The checks are made once a run: of the published one's 118 steps.
    let per_step = [metrics / n_steps as f64, records / (n_steps - 1).max(1) as f64, checks / 118.0];
    let step = work / n_steps as f64 + per_step[1];
    println!("{n_steps} steps of {step:.2} s, with pictures every {} steps", config.log.samples_every);
    for (what, seconds) in
        ["metrics", "event files, lines, pictures", "self-checks over 118 steps"].iter().zip(per_step)
    {
        println!("{what:<30} {:6.1} ms a step   {:.2} %", 1e3 * seconds, 100.0 * seconds / step);
    }
    println!("{:<30} {:>21.2} % of a step", "together", 100.0 * per_step.iter().sum::<f64>() / step);
    Ok(())
}
