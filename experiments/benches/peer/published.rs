//! The published miniature, `experiments/shapes_clip.toml` without its evaluations: what examples/grpo_simplear.rs trains.

use anyhow::{Context, Result};
use candle_core::Device;
use grpo::{Prompt, RewardSet, TrainConfig};
use grpo_policies::simplear::{SimpleAr, Stage};
use grpo_rewards::clip::ClipReward;
use grpo_rewards::geneval::Metadata;
use grpo_rewards::shapes::train_prompts;
use image::RgbImage;

/// What a trainer of it is made of.
pub struct Published {
    /// All that the file says of training.
    pub config: TrainConfig,
    /// The embedded policy, trainable.
    pub policy: SimpleAr,
    /// The embedded CLIP.
    pub rewards: RewardSet<RgbImage>,
    /// Of the Shapes world.
    pub prompts: Vec<Prompt>,
}

impl Published {
    /// As the file says it.
    pub fn read(device: &Device) -> Result<Self> {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/shapes_clip.toml");
        let file: toml::Table = toml::from_str(&std::fs::read_to_string(path)?)?;
        let section = |name: &str| file.get(name).cloned().with_context(|| format!("{path} has no [{name}]"));
        let config = TrainConfig {
            n_steps: file.get("n_steps").and_then(|n| n.as_integer()).context("no n_steps")?.try_into()?,
            rollout: section("rollout")?.try_into()?,
            objective: section("objective")?.try_into()?,
            optim: section("optim")?.try_into()?,
            ..Default::default()
        };
        Ok(Self {
            config,
            policy: SimpleAr::shapes(Stage::Sft, device)?,
            rewards: RewardSet::new().with(ClipReward::tiny()?, 1.0)?,
            prompts: train_prompts().iter().map(Metadata::to_prompt).collect::<grpo::Result<_>>()?,
        })
    }
}
