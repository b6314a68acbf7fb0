//! What is minimised, as numbers and choices.
//!
//! TRL's `loss_type` names a pair of ours ([`LossType`]):
//!
//! | `loss_type` | [`Surrogate`] | [`Aggregation`] | source |
//! |---|---|---|---|
//! | `grpo` | `clip` | `sequence_mean` | Shao et al., 2024, arXiv 2402.03300, eq. 3 |
//! | `bnpo` | `clip` | `token_mean` | Xiao et al., 2025, arXiv 2506.02864, as TRL reads it |
//! | `dr_grpo` | `clip` | `fixed_length` | Liu et al., 2025, arXiv 2503.20783 |
//! | `dapo` | `clip` | `token_mean` | Yu et al., 2025, arXiv 2503.14476, eq. 8 |
//! | `cispo` | `cispo` | `token_mean` | MiniMax, 2025, arXiv 2506.13585 |
//! | `sapo` | `sapo` | `sequence_mean` | Gao et al., 2025, arXiv 2511.20347 |
//!
//! `bnpo` and `dapo` differ in TRL by the tokens that are counted: of the micro-batch, or of all of them. Here every
//! normaliser is that of the whole batch, however it is split, and the two are one.

use serde::{Deserialize, Serialize};

use crate::advantage::{AdvantageConfig, Combine};
use crate::{Error, Result};

/// The losses that TRL names, for those who look for one of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LossType {
    /// Clipped ratio, mean over sequences of their means.
    Grpo,
    /// Clipped ratio, mean over the batch's choices.
    Bnpo,
    /// Clipped ratio, sum over choices divided by a constant length.
    DrGrpo,
    /// Clipped ratio, mean over the batch's choices.
    Dapo,
    /// Capped ratio as a constant weight of the log-probability.
    Cispo,
    /// A smooth gate in the clip's place.
    Sapo,
}

/// Which function of ratio and advantage is minimised for each choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Surrogate {
    /// `−min(ρ·A, clip(ρ, 1 − clip_low, 1 + clip_high)·A)`.
    #[default]
    Clip,
    /// `−sg[min(ρ, cap)]·A·log π`: no choice loses its gradient (MiniMax-M1).
    Cispo {
        /// The most that a choice weighs; 5 in TRL's example.
        cap: f64,
    },
    /// `−A·4σ(τ(ρ − 1))/τ`, with a temperature τ for each sign of the advantage.
    Sapo {
        /// τ where the advantage is positive; 1 in the paper.
        temperature_positive: f64,
        /// τ elsewhere; 1.05 in the paper.
        temperature_negative: f64,
    },
}

impl Surrogate {
    /// SAPO with the paper's temperatures.
    pub const SAPO: Self = Self::Sapo { temperature_positive: 1.0, temperature_negative: 1.05 };
}

/// What one importance ratio is taken over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// Each choice has its own.
    #[default]
    Token,
    /// A sample's choices share one (GSPO, Zheng et al., 2025, arXiv 2507.18071, eq. 7).
    Sequence,
}

/// Which mean over choices is minimised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Aggregation {
    /// The mean over sequences of each one's mean over choices; a row without a choice counts as a sequence of 0.
    #[default]
    SequenceMean,
    /// The mean over all choices of the batch.
    TokenMean,
    /// The sum over choices divided by sequences times this length, which no sample's own length moves (Dr. GRPO).
    FixedLength(usize),
}

/// How far the policy is from its reference, per choice; with `Δ = log π_ref − log π`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Estimator {
    /// `−Δ`: unbiased; in the loss its gradient is 0 in expectation, so it belongs in the reward.
    K1,
    /// `Δ²/2`: biased as a value, but its gradient is that of the KL.
    K2,
    /// `exp(Δ) − Δ − 1`: unbiased and never negative (GRPO eq. 4).
    #[default]
    K3,
}

/// Where the KL acts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// Added to the loss of each choice.
    #[default]
    Loss,
    /// Its sum over a sample's choices is taken off the sample's reward, before advantages.
    Reward,
}

/// How the KL to the reference is estimated and where it acts; its weight is [`Objective::kl_weight`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KlConfig {
    /// The estimator.
    pub estimator: Estimator,
    /// Where it acts.
    pub place: Place,
    /// Multiplies it by the ratio, which makes it unbiased on choices of older weights (DeepSeek-V3.2, arXiv 2512.02556).
    pub bias_correction: bool,
}

/// What becomes of an importance ratio beyond its bounds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Beyond {
    /// It is brought back to the bound (TIS).
    #[default]
    Truncate,
    /// It becomes 0: the choice, or the sample, is left out (MIS, IcePop).
    Mask,
}

/// Weighs choices by scorer over sampler, `exp(log π_old − log π_sampled)`, where the two are not the same law (Yao et al.,
/// 2025, "Your efficient RL framework secretly brings you off-policy RL training").
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Correction {
    /// Over each choice, or over the product of a sample's choices.
    pub level: Level,
    /// What becomes of a ratio beyond the bounds.
    pub beyond: Beyond,
    /// The upper bound; 3 in TRL.
    pub max: f64,
    /// The lower bound, if there is one.
    pub min: Option<f64>,
}

impl Default for Correction {
    fn default() -> Self {
        Self { level: Level::Token, beyond: Beyond::Truncate, max: 3.0, min: None }
    }
}

/// Moves the reference towards the policy (TR-DPO, Gorbatovski et al., 2024, arXiv 2404.09656).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReferenceSync {
    /// Every so many steps; 512 in TRL.
    pub every: usize,
    /// The policy's share of the new reference; 0.6 in TRL, 1 replaces it.
    pub share: f64,
}

/// What is minimised.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Objective {
    /// Which function of ratio and advantage.
    pub surrogate: Surrogate,
    /// What a ratio is taken over.
    pub level: Level,
    /// The ratio is clipped below at `1 − clip_low`.
    pub clip_low: f64,
    /// The ratio is clipped above at `1 + clip_high`.
    pub clip_high: f64,
    /// Caps the ratio also where the advantage is negative and the clip does not bind (INTELLECT-2, arXiv 2505.07291).
    pub clip_delta: Option<f64>,
    /// Weight of the KL to the reference, per choice; 0 needs no reference.
    pub kl_weight: f64,
    /// How that KL is estimated and where it acts.
    pub kl: KlConfig,
    /// Weight of the mean entropy, which is taken off the loss.
    pub entropy_weight: f64,
    /// The share of choices, those of the highest entropy, that the advantages act on (Wang et al., 2025, arXiv
    /// 2506.01939: 0.2); 1 is all.
    pub top_entropy_share: f64,
    /// Leaves out samples of negative advantage whose mean `log π_sampled − log π` is above it (DeepSeek-V3.2).
    pub off_policy_threshold: Option<f64>,
    /// Weighs choices by scorer over sampler.
    pub correction: Option<Correction>,
    /// Which mean over choices is minimised.
    pub aggregation: Aggregation,
    /// How rewards become advantages.
    pub advantage: AdvantageConfig,
    /// Optimiser steps on one batch of samples (μ in the paper); clipping is idle at 1.
    pub n_epochs: usize,
    /// Moves the reference.
    pub reference_sync: Option<ReferenceSync>,
}

impl Default for Objective {
    /// The values of SimpleAR's run (TRL's defaults of its time).
    fn default() -> Self {
        Self {
            surrogate: Surrogate::Clip,
            level: Level::Token,
            clip_low: 0.2,
            clip_high: 0.2,
            clip_delta: None,
            kl_weight: 0.04,
            kl: KlConfig::default(),
            entropy_weight: 0.0,
            top_entropy_share: 1.0,
            off_policy_threshold: None,
            correction: None,
            aggregation: Aggregation::SequenceMean,
            advantage: AdvantageConfig::default(),
            n_epochs: 1,
            reference_sync: None,
        }
    }
}

impl Objective {
    /// The objective with another loss that TRL names; `length` is Dr. GRPO's, the longest sample there may be.
    #[must_use]
    pub fn with_loss(self, loss: LossType, length: usize) -> Self {
        let (surrogate, aggregation) = match loss {
            LossType::Grpo => (Surrogate::Clip, Aggregation::SequenceMean),
            LossType::Bnpo | LossType::Dapo => (Surrogate::Clip, Aggregation::TokenMean),
            LossType::DrGrpo => (Surrogate::Clip, Aggregation::FixedLength(length)),
            LossType::Cispo => (Surrogate::Cispo { cap: 5.0 }, Aggregation::TokenMean),
            LossType::Sapo => (Surrogate::SAPO, Aggregation::SequenceMean),
        };
        Self { surrogate, aggregation, ..self }
    }

    /// Whether log-probs under the reference are needed.
    pub fn needs_reference(&self) -> bool {
        self.kl_weight > 0.0
    }

    /// Whether the entropy of each choice's law is needed.
    pub fn needs_entropy(&self) -> bool {
        self.entropy_weight != 0.0 || self.top_entropy_share < 1.0
    }

    /// Refuses values that cannot be meant.
    pub fn check(&self) -> Result<()> {
        positive("clip_low", self.clip_low, "0.2 in the paper")?;
        positive("clip_high", self.clip_high, "0.2 in the paper")?;
        not_negative("kl_weight", self.kl_weight)?;
        not_negative("entropy_weight", self.entropy_weight)?;
        self.advantage.check()?;
        self.check_surrogate()?;
        self.check_kl()?;
        if !(self.top_entropy_share > 0.0 && self.top_entropy_share <= 1.0) {
            let share = self.top_entropy_share;
            return Err(Error::config(format!("top_entropy_share is {share}; give a share above 0 and at most 1")));
        }
        if let Some(threshold) = self.off_policy_threshold {
            not_negative("off_policy_threshold", threshold)?;
        }
        if let Some(correction) = &self.correction {
            positive("correction.max", correction.max, "3 in TRL")?;
            let min = correction.min.unwrap_or(0.0);
            if !(min >= 0.0 && min <= correction.max) {
                return Err(Error::config(format!(
                    "correction.min is {min}; give a number between 0 and correction.max, {}",
                    correction.max
                )));
            }
        }
        if let Some(sync) = self.reference_sync {
            self.check_sync(sync)?;
        }
        match self.n_epochs {
            0 => Err(Error::config("n_epochs is 0; the batch needs at least 1 optimiser step")),
            _ => Ok(()),
        }
    }

    fn check_surrogate(&self) -> Result<()> {
        match self.surrogate {
            Surrogate::Clip => {}
            Surrogate::Cispo { cap } => positive("surrogate.cispo.cap", cap, "5 in TRL's example")?,
            Surrogate::Sapo { temperature_positive, temperature_negative } => {
                positive("surrogate.sapo.temperature_positive", temperature_positive, "1 in the paper")?;
                positive("surrogate.sapo.temperature_negative", temperature_negative, "1.05 in the paper")?;
            }
        }
        if self.aggregation == Aggregation::FixedLength(0) {
            return Err(Error::config("aggregation.fixed_length is 0; give the longest sample there may be"));
        }
        match self.clip_delta {
            Some(delta) if self.surrogate != Surrogate::Clip => {
                Err(Error::config(format!("clip_delta is {delta} but the surrogate does not clip; leave it out")))
            }
            Some(delta) if !(delta > 1.0 + self.clip_high && delta.is_finite()) => Err(Error::config(format!(
                "clip_delta is {delta}; give a number above 1 + clip_high, {}",
                1.0 + self.clip_high
            ))),
            _ => Ok(()),
        }
    }

    fn check_kl(&self) -> Result<()> {
        if self.kl.place == Place::Loss {
            return Ok(());
        }
        if self.kl.bias_correction {
            return Err(Error::config("kl.bias_correction has no say where kl.place is \"reward\"; leave it out"));
        }
        match self.advantage.combine {
            Combine::SumThenNormalise => Ok(()),
            Combine::NormaliseThenSum | Combine::RankThenSum => Err(Error::config(
                "kl.place is \"reward\" and advantage.combine normalises each reward first, which would scale the KL to a \
                 deviation of 1, whatever kl_weight says; put the KL in the loss, or take \"sum_then_normalise\"",
            )),
        }
    }

    fn check_sync(&self, sync: ReferenceSync) -> Result<()> {
        if sync.every == 0 || !(sync.share > 0.0 && sync.share <= 1.0) {
            return Err(Error::config(format!(
                "reference_sync has every = {} and share = {}; give at least 1 step and a share above 0 and at most 1",
                sync.every, sync.share
            )));
        }
        match self.needs_reference() {
            true => Ok(()),
            false => Err(Error::config("reference_sync moves a reference that kl_weight = 0 never asks; leave it out")),
        }
    }
}

fn positive(name: &str, value: f64, usual: &str) -> Result<()> {
    match value > 0.0 && value.is_finite() {
        true => Ok(()),
        false => Err(Error::config(format!("{name} is {value}; give a positive number, {usual}"))),
    }
}

fn not_negative(name: &str, value: f64) -> Result<()> {
    match value >= 0.0 && value.is_finite() {
        true => Ok(()),
        false => Err(Error::config(format!("{name} is {value}; give 0 or a positive number"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_meant_is_refused_with_its_remedy() {
        let fine = Objective::default();
        assert!(fine.check().is_ok());
        let delta = Objective { clip_delta: Some(1.1), ..fine };
        let cases = [
            (Objective { clip_low: 0.0, ..fine }, "clip_low is 0; give a positive number, 0.2 in the paper"),
            (Objective { kl_weight: f64::NAN, ..fine }, "kl_weight is NaN; give 0 or a positive number"),
            (delta, "clip_delta is 1.1; give a number above 1 + clip_high, 1.2"),
            (Objective { surrogate: Surrogate::SAPO, ..delta }, "clip_delta is 1.1 but the surrogate does not clip"),
            (Objective { top_entropy_share: 0.0, ..fine }, "top_entropy_share is 0; give a share above 0"),
            (Objective { aggregation: Aggregation::FixedLength(0), ..fine }, "aggregation.fixed_length is 0"),
            (Objective { n_epochs: 0, ..fine }, "n_epochs is 0"),
            (
                Objective { correction: Some(Correction { min: Some(4.0), ..Default::default() }), ..fine },
                "correction.min is 4; give a number between 0 and correction.max, 3",
            ),
            (
                Objective { kl_weight: 0.0, reference_sync: Some(ReferenceSync { every: 9, share: 0.6 }), ..fine },
                "reference_sync moves a reference that kl_weight = 0 never asks",
            ),
        ];
        for (objective, expected) in cases {
            let error = objective.check().unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
    }

    #[test]
    fn every_choice_can_be_written_in_toml() {
        let text = r#"
            surrogate = { cispo = { cap = 5.0 } }
            level = "sequence"
            aggregation = { fixed_length = 1024 }
            kl = { estimator = "k1", place = "reward" }
            correction = { level = "sequence", beyond = "mask", max = 2.0 }
            reference_sync = { every = 512, share = 0.6 }
            advantage = { combine = "normalise_then_sum", clip = 5.0 }
        "#;
        let objective: Objective = toml::from_str(text).unwrap();
        assert_eq!(objective.aggregation, Aggregation::FixedLength(1024));
        assert_eq!(objective.kl.place, Place::Reward);
        assert_eq!(toml::from_str::<Objective>(&toml::to_string(&objective).unwrap()).unwrap(), objective);
    }
}
