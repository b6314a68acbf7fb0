//! A run's numbers, as they stand in a TOML file.

use serde::{Deserialize, Serialize};

use crate::{Error, FailedScores, GroupSize, Objective, OptimConfig, Result};

/// How many prompts and samples a step has, and how they are split to fit memory.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RolloutConfig {
    /// Prompts of one step.
    pub prompts_per_step: usize,
    /// Samples of one prompt.
    pub group_size: GroupSize,
    /// Samples drawn at a time; does not change them.
    pub rows_per_call: usize,
    /// Samples differentiated together, a micro-batch; does not change the gradient but for rounding.
    pub rows_per_backward: usize,
    /// Micro-batches replayed and differentiated side by side on a CPU, whose cores the operations of a small policy do
    /// not keep busy; each takes memory of its own, and no bit changes. Other devices take one at a time.
    pub parts_at_once: usize,
    /// Groups of equal rewards teach nothing; up to so many times a step, they are replaced by groups of further prompts
    /// (dynamic sampling, DAPO §3.2, arXiv 2503.14476). 0 keeps them. Arms of an ablation then no longer share prompts.
    pub max_resamples: usize,
    /// Score on a second thread while the next samples are drawn; does not change them.
    pub overlap: bool,
    /// What becomes of a sample that a reward cannot judge.
    pub failed_scores: FailedScores,
}

impl Default for RolloutConfig {
    fn default() -> Self {
        Self {
            prompts_per_step: 8,
            group_size: GroupSize::default(),
            rows_per_call: 64,
            rows_per_backward: 64,
            parts_at_once: 1,
            max_resamples: 0,
            overlap: true,
            failed_scores: FailedScores::Error,
        }
    }
}

/// How often what is recorded.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// Pictures and samples every so many steps.
    pub samples_every: usize,
    /// Groups in a panel.
    pub panel_groups: usize,
    /// Held-out prompts every so many steps, and before the first and after the last.
    pub held_out_every: usize,
    /// Held-out prompts, spread over the list, whose pictures are kept, the first of them in the board's panel; all where
    /// absent. Scores are kept of all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub held_out_pictures: Option<usize>,
    /// A checkpoint every so many steps, and after the last.
    pub checkpoint_every: usize,
    /// Checkpoints kept.
    pub keep_checkpoints: usize,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self {
            samples_every: 10,
            panel_groups: 4,
            held_out_every: 50,
            held_out_pictures: None,
            checkpoint_every: 50,
            keep_checkpoints: 2,
        }
    }
}

/// A run without its parts: everything that is a number.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// The root of all randomness of the run.
    pub seed: u64,
    /// Steps of the run.
    pub n_steps: usize,
    /// The samples of a step.
    pub rollout: RolloutConfig,
    /// What is minimised.
    pub objective: Objective,
    /// How the parameters move.
    pub optim: OptimConfig,
    /// An update whose loss or gradient is not finite is skipped; after so many in a row the run stops.
    pub max_skips_in_row: usize,
    /// What is recorded.
    pub log: LogConfig,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            seed: 0,
            n_steps: 0,
            rollout: RolloutConfig::default(),
            objective: Objective::default(),
            optim: OptimConfig::default(),
            max_skips_in_row: 3,
            log: LogConfig::default(),
        }
    }
}

impl TrainConfig {
    /// The configuration as TOML, for the run's folder.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|error| Error::config(error.to_string()))
    }

    /// What decides the run's numbers, without what only decides how and where they are computed and recorded.
    pub(crate) fn science(&self) -> Self {
        Self {
            log: LogConfig::default(),
            rollout: RolloutConfig {
                prompts_per_step: self.rollout.prompts_per_step,
                group_size: self.rollout.group_size,
                rows_per_backward: self.rollout.rows_per_backward,
                max_resamples: self.rollout.max_resamples,
                ..RolloutConfig::default()
            },
            max_skips_in_row: Self::default().max_skips_in_row,
            ..*self
        }
    }

    /// Refuses values that cannot be meant.
    pub fn check(&self) -> Result<()> {
        let rollout = &self.rollout;
        let counts = [
            ("n_steps", self.n_steps),
            ("rollout.prompts_per_step", rollout.prompts_per_step),
            ("rollout.rows_per_call", rollout.rows_per_call),
            ("rollout.rows_per_backward", rollout.rows_per_backward),
            ("rollout.parts_at_once", rollout.parts_at_once),
            ("max_skips_in_row", self.max_skips_in_row),
            ("log.samples_every", self.log.samples_every),
            ("log.held_out_every", self.log.held_out_every),
            ("log.checkpoint_every", self.log.checkpoint_every),
            ("log.keep_checkpoints", self.log.keep_checkpoints),
        ];
        if let Some((name, _)) = counts.iter().find(|(_, value)| *value == 0) {
            return Err(Error::config(format!("{name} is 0; give at least 1")));
        }
        rollout.failed_scores.check()?;
        self.objective.check()?;
        self.optim.check()
    }
}
