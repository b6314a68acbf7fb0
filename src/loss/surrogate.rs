//! The surrogate of one choice: its value and the slopes that make the gradient.

use crate::objective::{Objective, Surrogate};

/// A surrogate's value at one choice.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Choice {
    pub(super) value: f64,
    /// Its derivative by `log ρ`.
    pub(super) by_log_ratio: f64,
    /// Its derivative by `log π` where the ratio is held constant.
    pub(super) by_log_prob: f64,
}

impl Objective {
    /// The surrogate of a choice with this ratio, advantage and log-prob.
    pub(super) fn surrogate_at(&self, ratio: f64, advantage: f64, log_prob: f64) -> Choice {
        match self.surrogate {
            Surrogate::Clip => self.clip_at(ratio, advantage),
            Surrogate::Cispo { cap } => {
                let weight = at_most(cap, ratio) * advantage;
                Choice { value: -weight * log_prob, by_log_ratio: 0.0, by_log_prob: -weight }
            }
            Surrogate::Sapo { temperature_positive, temperature_negative } => {
                let temperature = if advantage > 0.0 { temperature_positive } else { temperature_negative };
                let gate = 1.0 / (1.0 + (-temperature * (ratio - 1.0)).exp());
                Choice {
                    value: -advantage * 4.0 * gate / temperature,
                    by_log_ratio: -advantage * 4.0 * gate * (1.0 - gate) * ratio,
                    by_log_prob: 0.0,
                }
            }
        }
    }

    fn clip_at(&self, ratio: f64, advantage: f64) -> Choice {
        let capped = self.clip_delta.map_or(ratio, |delta| at_most(delta, ratio));
        let clipped = within(1.0 - self.clip_low, 1.0 + self.clip_high, ratio);
        let (free, bound) = (capped * advantage, clipped * advantage);
        // Where the clip binds, or the cap does, the value no longer moves with the ratio.
        let moves = free <= bound && capped == ratio;
        let by_log_ratio = if moves { -ratio * advantage } else { 0.0 };
        Choice { value: -at_most(bound, free), by_log_ratio, by_log_prob: 0.0 }
    }

    /// Whether the clip binds below and above at this ratio and advantage; CISPO's cap counts as above.
    pub(super) fn binds(&self, ratio: f64, advantage: f64) -> (bool, bool) {
        match self.surrogate {
            Surrogate::Clip => {
                (ratio < 1.0 - self.clip_low && advantage < 0.0, ratio > 1.0 + self.clip_high && advantage > 0.0)
            }
            Surrogate::Cispo { cap } => (false, ratio > cap && advantage > 0.0),
            Surrogate::Sapo { .. } => (false, false),
        }
    }
}

/// The lesser of the two; NaN where `x` is, which `f64::min` would turn into the limit and a fault into a loss.
pub(super) fn at_most(limit: f64, x: f64) -> f64 {
    if x > limit { limit } else { x }
}

/// `x` between the bounds; NaN where `x` is.
pub(super) fn within(low: f64, high: f64, x: f64) -> f64 {
    if x < low { low } else { at_most(high, x) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Four corners of the clip: the ratio inside and outside, the advantage of either sign; clip at 0.8 and 1.2.
    #[test]
    fn clip_takes_the_pessimistic_side() {
        let objective = Objective::default();
        let cases = [
            (1.5, 2.0, -2.4, 0.0),
            (0.5, 2.0, -1.0, -1.0),
            (1.5, -2.0, 3.0, 3.0),
            (0.5, -2.0, 1.6, 0.0),
            (1.1, 2.0, -2.2, -2.2),
        ];
        for (ratio, advantage, value, by_log_ratio) in cases {
            let got = objective.surrogate_at(ratio, advantage, -1.0);
            assert!((got.value - value).abs() < 1e-12 && (got.by_log_ratio - by_log_ratio).abs() < 1e-12, "{got:?}");
        }
    }

    #[test]
    fn a_cap_bounds_the_loss_of_negative_advantages() {
        let objective = Objective { clip_delta: Some(4.0), ..Objective::default() };
        let far = objective.surrogate_at(9.0, -2.0, -1.0);
        assert_eq!((far.value, far.by_log_ratio), (8.0, 0.0));
        let near = objective.surrogate_at(3.0, -2.0, -1.0);
        assert_eq!((near.value, near.by_log_ratio), (6.0, 6.0));
    }
}
