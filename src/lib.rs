//! Group Relative Policy Optimization.

#![forbid(unsafe_code)]

mod advantage;
mod checkpoint;
mod error;
pub mod kl;
pub mod loss;
mod metrics;
pub mod observe;
mod optim;
mod panel;
mod policy;
mod prompt;
mod reward;
mod rollout;
mod run_folder;
mod seed;
mod self_check;
pub mod tensorboard;
pub mod testing;
mod trainer;
mod update;

pub use advantage::{AdvantageConfig, Scale, advantages};
pub use checkpoint::{Checkpoint, Checkpoints};
pub use error::{BoxError, Error, Result};
pub use loss::{Aggregation, Objective};
pub use observe::Observer;
pub use optim::{AdamW, OptimConfig, Schedule};
pub use panel::panel;
pub use policy::{Completion, Gradients, LogProbs, Params, Policy, Request, Sample, Scoring};
pub use prompt::Prompt;
pub use reward::{Reward, RewardFn, RewardSet, Scores, reward_fn};
pub use rollout::{Group, GroupSampler, GroupSize, IndexedPrompt, OverlappedSampler, Rollout};
pub use run_folder::RunFolder;
pub use seed::{Draws, Seed};
pub use trainer::{LogConfig, RolloutConfig, TrainConfig, Trainer};
