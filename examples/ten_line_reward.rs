//! A new scorer in ten lines: how red an image is. It appears in TensorBoard and in the panels with no other change.
//!
//! ```text
//! cargo run --release --example ten_line_reward
//! ```

#![expect(clippy::print_stdout, reason = "an example speaks to a person")]

use std::path::Path;

use anyhow::Result;
use candle_core::Device;
use grpo::{
    BoxError, GroupSampler, GroupSize, Prompt, Reward, RewardSet, RolloutConfig, RunFolder, TrainConfig, Trainer,
};
use grpo_policies::simplear::{SimpleAr, Stage};
use image::RgbImage;

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

fn main() -> Result<()> {
    let mut config = TrainConfig { n_steps: 20, ..Default::default() };
    config.rollout = RolloutConfig { prompts_per_step: 4, ..config.rollout };
    config.optim.lr = 5e-4;
    config.log.samples_every = 5;

    let policy = SimpleAr::shapes(Stage::Sft, &Device::Cpu)?;
    let reference = policy.frozen()?;
    let rewards = RewardSet::new().with(Redness, 1.0)?;
    let rollout = GroupSampler::new(rewards, GroupSize::default(), config.rollout.rows_per_call);
    let rollout = rollout.on_failed(config.rollout.failed_scores);
    let prompts = ["a photo of a circle", "a photo of a square", "a photo of a star", "a photo of two rings"];

    let run = RunFolder::fresh(Path::new("runs"), "ten_line_reward", config.seed)?;
    let prompts = prompts.map(Prompt::new).to_vec();
    let trainer = Trainer::new(config, policy, Some(reference), Box::new(rollout), prompts)?;
    trainer.record_in(&run, &config.to_toml()?)?.run()?;
    println!("look at rewards/redness/mean and panel/train: tensorboard --logdir {}", run.path().display());
    Ok(())
}
