//! From logits to a choice: temperature and truncation, guidance, and the distribution that they leave.

mod distribution;

use grpo::{Error, Result};
use serde::{Deserialize, Serialize};

pub(crate) use distribution::Distribution;

/// Which log-probabilities are trained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScoredAs {
    /// Those of the law itself; a law that replay cannot differentiate exactly is refused.
    #[default]
    Law,
    /// Those of the conditional model at the law's temperature, while guidance and truncation shape the samples.
    ///
    /// Ratios are then no longer those of the behaviour; the difference is logged at every step as
    /// `sampling/sampling_logp_difference`.
    Conditional,
}

/// How a distribution is shaped before a choice is drawn, in this order.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Shaping {
    /// Logits are divided by it.
    pub(crate) temperature: f32,
    /// Only so many of the likeliest choices remain.
    pub(crate) top_k: Option<usize>,
    /// Only the likeliest choices that together reach this probability remain; 1 keeps all.
    pub(crate) top_p: f32,
    /// Only choices of at least this share of the likeliest one's probability remain; 0 keeps all.
    pub(crate) min_p: f32,
    /// Only the likeliest choice remains.
    pub(crate) greedy: bool,
}

impl Shaping {
    /// Whether choices are cut away, so that replay at the temperature alone is not exact.
    pub(crate) fn truncates(&self) -> bool {
        self.greedy || self.top_k.is_some() || self.top_p < 1.0 || self.min_p > 0.0
    }

    /// Refuses numbers that cannot be meant.
    pub(crate) fn check(&self) -> Result<()> {
        if !(self.temperature > 0.0 && self.temperature.is_finite()) {
            return Err(Error::config(format!(
                "temperature is {}; give a positive number, 1 in the paper, or greedy = true",
                self.temperature
            )));
        }
        if self.top_k == Some(0) {
            return Err(Error::config("top_k is 0; give at least 1, or leave it out to keep all"));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(Error::config(format!("top_p is {}; give a number in (0, 1], 1 keeps all", self.top_p)));
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return Err(Error::config(format!("min_p is {}; give a number in [0, 1], 0 keeps all", self.min_p)));
        }
        Ok(())
    }
}
