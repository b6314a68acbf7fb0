//! How long and how fast a stage trains, and what it records.

use grpo::{Error, OptimConfig, Result};
use serde::{Deserialize, Serialize};

/// How long and how fast a stage trains.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StagePlan {
    /// The root of all randomness.
    pub seed: u64,
    /// Optimiser steps; each takes one batch.
    pub n_steps: usize,
    /// Rate, schedule, decay and clipping.
    pub optim: OptimConfig,
    /// Keeps an average of the weights beside them that forgets this share's rest at each step, such as 0.999.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ema: Option<f64>,
    /// An update whose loss or gradient is not finite is skipped; after so many in a row the run stops.
    #[serde(default = "max_skips_in_row")]
    pub max_skips_in_row: usize,
    /// What is recorded.
    #[serde(default)]
    pub log: StageLog,
}

fn max_skips_in_row() -> usize {
    3
}

/// What a stage records, and how often.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StageLog {
    /// Steps between checkpoints.
    pub checkpoint_every: usize,
    /// Checkpoints that are kept.
    pub keep_checkpoints: usize,
    /// Steps between losses on what is held out.
    pub validate_every: usize,
    /// Steps between pictures; a loss on what is held out comes with them.
    pub pictures_every: usize,
}

impl Default for StageLog {
    fn default() -> Self {
        Self { checkpoint_every: 500, keep_checkpoints: 2, validate_every: 200, pictures_every: 200 }
    }
}

impl StagePlan {
    /// Refuses values that cannot be meant.
    pub fn check(&self) -> Result<()> {
        let counts = [
            ("n_steps", self.n_steps),
            ("max_skips_in_row", self.max_skips_in_row),
            ("log.checkpoint_every", self.log.checkpoint_every),
            ("log.keep_checkpoints", self.log.keep_checkpoints),
            ("log.validate_every", self.log.validate_every),
            ("log.pictures_every", self.log.pictures_every),
        ];
        if let Some((name, _)) = counts.iter().find(|(_, value)| *value == 0) {
            return Err(Error::config(format!("{name} is 0; give at least 1")));
        }
        if let Some(decay) = self.ema.filter(|decay| !(0.0..1.0).contains(decay)) {
            return Err(Error::config(format!("ema is {decay}; give a number in [0, 1), such as 0.999")));
        }
        self.optim.check()
    }
}
