//! Group Relative Policy Optimization (GRPO; Shao et al., 2024, arXiv 2402.03300).
//!
//! For each prompt a [`Policy`] draws a group of samples, [`Reward`]s score them, [`advantages`] normalise the scores
//! within the group, and [`loss`] raises the likelihood of the better ones with a clipped ratio, held near a frozen
//! reference by a KL term. [`Trainer`] is the loop; a [`Rollout`] decides where and when samples are drawn and scored.
//!
//! ```
//! use grpo::testing::ToyPolicy;
//! use grpo::{GroupSampler, OptimConfig, Prompt, RewardSet, TrainConfig, Trainer, reward_fn};
//!
//! let config = TrainConfig { n_steps: 20, optim: OptimConfig { lr: 0.2, ..Default::default() }, ..Default::default() };
//! let policy = ToyPolicy::new(5, 3)?; // words of three letters out of five
//! let reference = policy.copy()?;
//!
//! let letter_a = reward_fn("letter_a", |_prompt, text: &String| Ok(text.matches('a').count() as f32));
//! let rewards = RewardSet::new().with(letter_a, 1.0)?;
//! let rollout = GroupSampler::new(rewards, config.rollout.group_size, config.rollout.rows_per_call);
//! let prompts = (0..8).map(|i| Prompt::new(format!("prompt {i}"))).collect();
//!
//! let mut trainer = Trainer::new(config, policy, Some(reference), Box::new(rollout), prompts)?;
//! trainer.run()?;
//! assert!(grpo::testing::probability_of(trainer.policy(), 0, 0)? > 0.5); // it began at 0.2
//! # Ok::<(), grpo::Error>(())
//! ```
//!
//! | module | what |
//! |---|---|
//! | [`Prompt`], [`Policy`], [`Reward`], [`Rollout`] | the vocabulary: one trait or noun a file |
//! | [`advantages`], [`loss`], [`objective`] | pure functions and their settings, paper and equation in the head |
//! | [`Trainer`], [`AdamW`], [`Checkpoint`] | the loop, the optimiser, exact resume |
//! | [`observe`], [`tensorboard`], [`panel`](fn@panel), [`chart`] | where numbers and pictures go |
//! | [`picture`] | untrusted pictures decoded, resized and cropped as published programs do |
//! | [`testing`] | a toy policy whose every probability is known; `check_policy` and `check_reward` for your own |

#![forbid(unsafe_code)]

mod advantage;
mod batch;
pub mod chart;
mod checkpoint;
mod collect;
mod config;
mod error;
mod gradients;
mod heat_map;
mod held_out;
pub mod host;
pub mod loss;
mod memory;
mod metrics;
pub mod objective;
pub mod observe;
mod optim;
mod panel;
pub mod picture;
mod policy;
mod progress;
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
mod write_whole;

pub use advantage::{AdvantageConfig, Baseline, Combine, Scale, advantages, combined_advantages};
pub use checkpoint::{Checkpoint, Checkpoints};
pub use config::{LogConfig, RolloutConfig, TrainConfig};
pub use error::{BoxError, Error, Result};
pub use gradients::Gradients;
pub use held_out::held_out_seed;
pub use memory::PeakMemory;
pub use objective::{Aggregation, Objective, Surrogate};
pub use observe::Observer;
pub use optim::{AdamW, Decayed, DeviceOptimiser, OptimConfig, Schedule, StepNumbers};
pub use panel::{before_after, gallery, panel};
pub use policy::{Completion, LogProbs, LossGradient, Params, Policy, Request, Sample, Scoring};
pub use prompt::Prompt;
pub use reward::{
    Apart, Change, Changed, Failed, FailedScores, Gated, Joined, Joining, Mixed, Reward, RewardFn, RewardSet, Scores,
    reward_fn,
};
pub use rollout::{Excluded, Group, GroupSampler, GroupSize, IndexedPrompt, OverlappedSampler, Rollout};
pub use run_folder::{RunFolder, RunRewards};
pub use seed::{Draws, Seed};
pub use trainer::Trainer;
pub use write_whole::write_whole;

/// The README's and the guides' code blocks are compiled with the documentation's tests.
#[cfg(doctest)]
mod readme {
    #[doc = include_str!("../README.md")]
    struct Readme;

    #[doc = include_str!("docs/add_a_reward.md")]
    struct AddAReward;
}
