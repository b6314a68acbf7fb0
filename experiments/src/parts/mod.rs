//! The one place where names become parts.

mod rewards;

use std::path::Path;
use std::sync::Arc;

use candle_core::Device;
use grpo::{GroupSampler, OverlappedSampler, Prompt, RewardSet, Rollout, TrainConfig};
use grpo_policies::simplear::{SimpleAr, Stage};
use grpo_rewards::geneval::Metadata;
use grpo_rewards::shapes;
use image::RgbImage;

use crate::commands::tell;
use crate::config::PolicySource;
use crate::failure::{Failure, Outcome};

pub use rewards::{Origin, ProviderArgs, RemoteDetector, ScorerArgs, Scorers};

/// The device of `--device`: `cpu`, `cuda` or `cuda:N`.
pub fn device(name: &str) -> Outcome<Device> {
    let ordinal = match name {
        "cpu" => return Ok(Device::Cpu),
        "cuda" => Some(0),
        other => other.strip_prefix("cuda:").and_then(|n| n.parse().ok()),
    };
    let Some(ordinal) = ordinal else {
        return Err(Failure::user(format!("--device {name}: give cpu, cuda or cuda:N")));
    };
    card(ordinal).map_err(|error| Failure::user(format!("--device {name}: {error}")))
}

#[cfg(feature = "cuda")]
fn card(ordinal: usize) -> Result<Device, String> {
    grpo_policies::cuda::device(ordinal).map_err(|error| format!("{error}; see nvidia-smi for the devices there are"))
}

#[cfg(not(feature = "cuda"))]
fn card(_: usize) -> Result<Device, String> {
    Err("this build has no CUDA; build with --features cuda".into())
}

/// A policy from its source; `folder` is that of `--policy`.
pub fn policy(source: PolicySource, folder: Option<&Path>, device: &Device) -> Outcome<SimpleAr> {
    let policy = match (source, folder) {
        (PolicySource::ShapesSft, None) => SimpleAr::shapes(Stage::Sft, device)?,
        (PolicySource::ShapesPretrained, None) => SimpleAr::shapes(Stage::Pretrained, device)?,
        // A folder given by flag stands in for the embedded miniature, at the size it was saved with.
        (PolicySource::ShapesSft | PolicySource::ShapesPretrained, Some(folder)) => {
            SimpleAr::load(folder, None, device)?
        }
        (PolicySource::Folder { height, width }, Some(folder)) => {
            SimpleAr::load(folder, Some((height, width)), device)?
        }
        (PolicySource::Folder { .. }, None) => {
            return Err(Failure::user("policy.folder needs --policy DIR, the checkpoint's folder"));
        }
    };
    for warning in policy.warnings() {
        tell(&format!("warning: {warning}"));
    }
    Ok(policy)
}

/// The rollout that a configuration asks for.
pub fn rollout(rewards: Arc<RewardSet<RgbImage>>, config: &TrainConfig) -> Box<dyn Rollout<SimpleAr>> {
    let (size, rows, failed) = (config.rollout.group_size, config.rollout.rows_per_call, config.rollout.failed_scores);
    match config.rollout.overlap {
        true => Box::new(OverlappedSampler::new(rewards, size, rows).on_failed(failed)),
        false => Box::new(GroupSampler::new(rewards, size, rows).on_failed(failed)),
    }
}

/// Prompts of the Shapes world.
pub fn prompts(metadata: &[Metadata]) -> Outcome<Vec<Prompt>> {
    Ok(metadata.iter().map(Metadata::to_prompt).collect::<grpo::Result<_>>()?)
}

/// The Shapes world's prompts for training and those held out.
pub fn shapes_prompts() -> Outcome<(Vec<Prompt>, Vec<Prompt>)> {
    Ok((prompts(&shapes::train_prompts())?, prompts(&shapes::held_out_prompts())?))
}
