//! The GRPO objective as pure functions of `[B, T]` tensors.
//!
//! Per choice (GRPO eq. 3, PPO's clip of Schulman et al., 2017, arXiv 1707.06347):
//! `l = −min(ρ·A, clip(ρ, 1 − clip_low, 1 + clip_high)·A) + kl_weight·KL`, with `ρ = exp(log π − log π_old)`.
//!
//! The sum over choices is weighted by [`token_weights`], which are computed for the whole batch before it is split:
//! a micro-batch takes its rows of them, so any split of a batch has the same gradient.

use candle_core::{Device, Tensor, Var};
use serde::{Deserialize, Serialize};

use crate::advantage::AdvantageConfig;
use crate::{Error, Result, kl};

/// Which mean over choices is minimised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Aggregation {
    /// The mean over sequences of each one's mean over choices (GRPO, `loss_type = "grpo"` in TRL).
    #[default]
    SequenceMean,
    /// The mean over all choices of the batch (DAPO, `loss_type = "dapo"` in TRL).
    TokenMean,
}

/// What is minimised.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Objective {
    /// The ratio is clipped below at `1 − clip_low`.
    pub clip_low: f64,
    /// The ratio is clipped above at `1 + clip_high`.
    pub clip_high: f64,
    /// Weight of the KL to the frozen reference, per choice; 0 needs no reference.
    pub kl_weight: f64,
    /// Which mean over choices is minimised.
    pub aggregation: Aggregation,
    /// How rewards become advantages.
    pub advantage: AdvantageConfig,
    /// Optimiser steps on one batch of samples (μ in the paper); clipping is idle at 1.
    pub n_epochs: usize,
}

impl Default for Objective {
    /// The values of SimpleAR's run (TRL's defaults of its time).
    fn default() -> Self {
        Self {
            clip_low: 0.2,
            clip_high: 0.2,
            kl_weight: 0.04,
            aggregation: Aggregation::SequenceMean,
            advantage: AdvantageConfig::default(),
            n_epochs: 1,
        }
    }
}

impl Objective {
    /// Refuses values that cannot be meant.
    pub fn check(&self) -> Result<()> {
        let positive = [("clip_low", self.clip_low), ("clip_high", self.clip_high)];
        for (name, value) in positive {
            if !(value > 0.0 && value.is_finite()) {
                return Err(Error::config(format!("{name} is {value}; give a positive number, 0.2 in the paper")));
            }
        }
        if !(self.kl_weight >= 0.0 && self.kl_weight.is_finite()) {
            return Err(Error::config(format!("kl_weight is {}; give 0 or a positive number", self.kl_weight)));
        }
        if !(self.advantage.eps >= 0.0 && self.advantage.eps.is_finite()) {
            return Err(Error::config(format!(
                "advantage.eps is {}; give 0 or a small positive number",
                self.advantage.eps
            )));
        }
        if self.n_epochs == 0 {
            return Err(Error::config("n_epochs is 0; the batch needs at least 1 optimiser step"));
        }
        Ok(())
    }
}

/// Weights of the choices in the loss, `[B][T]` with the given length of each row; they sum to 1.
///
/// Rows without a choice have no weight and do not count as sequences.
pub fn token_weights(lengths: &[usize], aggregation: Aggregation) -> Vec<f32> {
    let n_tokens: usize = lengths.iter().sum();
    let n_rows = lengths.iter().filter(|&&length| length > 0).count();
    let weight = |&length: &usize| match aggregation {
        _ if length == 0 => 0.0,
        Aggregation::SequenceMean => 1.0 / (n_rows as f64 * length as f64),
        Aggregation::TokenMean => 1.0 / n_tokens as f64,
    };
    lengths.iter().map(|length| weight(length) as f32).collect()
}

/// The constants of a micro-batch of `B` rows and `T` choices: all but the log-probs under the current weights.
#[derive(Clone, Debug)]
pub struct Targets {
    /// Log-probs of the choices when they were drawn, `[B, T]`.
    pub old: Tensor,
    /// Log-probs of the choices under the reference, `[B, T]`; `None` without a KL term.
    pub reference: Option<Tensor>,
    /// The advantage of each row, `[B, 1]`.
    pub advantages: Tensor,
    /// The weight of each choice, `[B, T]`: [`token_weights`] where the mask is 1, else 0.
    pub weights: Tensor,
}

/// The loss of a micro-batch, its gradient and what it is made of.
#[derive(Clone, Debug)]
pub struct Loss {
    /// This micro-batch's part of the batch's loss.
    pub value: f64,
    /// `d loss / d log_probs`, `[B, T]`.
    pub gradient: Tensor,
    /// What the sums over choices were, for the metrics.
    pub parts: LossParts,
}

/// Sums over a micro-batch's choices with the weights of the loss, so that parts of a batch add up to its mean.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossParts {
    /// KL to the reference in nats per choice.
    pub kl: f64,
    /// Share of choices with `ρ < 1 − clip_low` and a negative advantage.
    pub clipped_low: f64,
    /// Share of choices with `ρ > 1 + clip_high` and a positive advantage.
    pub clipped_high: f64,
}

impl std::ops::AddAssign for LossParts {
    fn add_assign(&mut self, other: Self) {
        self.kl += other.kl;
        self.clipped_low += other.clipped_low;
        self.clipped_high += other.clipped_high;
    }
}

/// `−min(ρ·A, clip(ρ)·A)` per choice, `[B, T]`; differentiable in `log_probs`.
///
/// Shapes: `log_probs` and `old` `[B, T]`, `advantages` `[B, 1]`.
pub fn clipped_ratio(log_probs: &Tensor, old: &Tensor, advantages: &Tensor, objective: &Objective) -> Result<Tensor> {
    same_shape("old log-probs", old, log_probs)?;
    let ratio = (log_probs - old)?.exp()?;
    let clipped = ratio.clamp((1.0 - objective.clip_low) as f32, (1.0 + objective.clip_high) as f32)?;
    let free = ratio.broadcast_mul(advantages)?;
    Ok(free.minimum(&clipped.broadcast_mul(advantages)?)?.neg()?)
}

/// The objective of a micro-batch and its gradient with respect to the log-probs, `[B, T]`.
pub fn loss(log_probs: &Tensor, targets: &Targets, objective: &Objective) -> Result<Loss> {
    same_shape("weights", &targets.weights, log_probs)?;
    let leaf = Var::from_tensor(&log_probs.detach())?;
    let mut per_choice = clipped_ratio(leaf.as_tensor(), &targets.old, &targets.advantages, objective)?;
    let mut parts = clip_shares(log_probs, targets, objective)?;
    if let Some(reference) = targets.reference.as_ref().filter(|_| objective.kl_weight > 0.0) {
        same_shape("reference log-probs", reference, log_probs)?;
        let kl = kl::k3(leaf.as_tensor(), reference)?;
        parts.kl = weighted_sum(&kl.detach(), &targets.weights)?;
        per_choice = (per_choice + (kl * objective.kl_weight)?)?;
    }
    let total = (per_choice * &targets.weights)?.sum_all()?;
    let value = f64::from(total.to_scalar::<f32>()?);
    let mut store = total.backward()?;
    let gradient = match store.remove(&leaf) {
        Some(gradient) => gradient.detach(),
        None => leaf.zeros_like()?,
    };
    Ok(Loss { value, gradient, parts })
}

fn clip_shares(log_probs: &Tensor, targets: &Targets, objective: &Objective) -> Result<LossParts> {
    let ratio = (log_probs.detach() - &targets.old)?.exp()?;
    let advantages = targets.advantages.broadcast_as(ratio.shape())?;
    let low = ratio.lt(1.0 - objective.clip_low)?.mul(&advantages.lt(0.0)?)?;
    let high = ratio.gt(1.0 + objective.clip_high)?.mul(&advantages.gt(0.0)?)?;
    let share = |hits: Tensor| weighted_sum(&hits.to_dtype(candle_core::DType::F32)?, &targets.weights);
    Ok(LossParts { kl: 0.0, clipped_low: share(low)?, clipped_high: share(high)? })
}

fn weighted_sum(values: &Tensor, weights: &Tensor) -> Result<f64> {
    Ok(f64::from((values * weights)?.sum_all()?.to_scalar::<f32>()?))
}

fn same_shape(what: &'static str, got: &Tensor, expected: &Tensor) -> Result<()> {
    if got.dims() == expected.dims() {
        return Ok(());
    }
    Err(Error::Shape { what, got: got.dims().to_vec(), expected: expected.dims().to_vec() })
}

/// Ragged rows as a `[B, T]` tensor, padded with 0.
pub(crate) fn padded(rows: &[&[f32]], width: usize, device: &Device) -> Result<Tensor> {
    let mut values = vec![0f32; rows.len() * width];
    for (row, target) in rows.iter().zip(values.chunks_mut(width.max(1))) {
        target[..row.len()].copy_from_slice(row);
    }
    Ok(Tensor::from_vec(values, (rows.len(), width), device)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(rows: &[[f32; 2]]) -> Tensor {
        Tensor::from_vec(rows.concat(), (rows.len(), 2), &Device::Cpu).unwrap()
    }

    fn targets(old: &[[f32; 2]], advantages: &[f32]) -> Targets {
        let lengths = vec![2; old.len()];
        let weights: Vec<f32> =
            token_weights(&lengths, Aggregation::SequenceMean).iter().flat_map(|&w| [w, w]).collect();
        Targets {
            old: tensor(old),
            reference: Some(tensor(&vec![[-1.5, -0.5]; old.len()])),
            advantages: Tensor::from_slice(advantages, (advantages.len(), 1), &Device::Cpu).unwrap(),
            weights: Tensor::from_vec(weights, (old.len(), 2), &Device::Cpu).unwrap(),
        }
    }

    /// Four corners of the clip: the ratio inside and outside, the advantage of either sign.
    /// Ratios e^0.5 = 1.648721 and e^-0.5 = 0.606531; clip at 0.8 and 1.2.
    #[test]
    fn clip_takes_the_pessimistic_side() {
        let log_probs = tensor(&[[-0.5, -1.5], [-0.5, -1.5]]);
        let old = tensor(&[[-1.0, -1.0], [-1.0, -1.0]]);
        let advantages = Tensor::new(&[[2.0f32], [-2.0]], &Device::Cpu).unwrap();
        let per_choice = clipped_ratio(&log_probs, &old, &advantages, &Objective::default()).unwrap();
        let got: Vec<Vec<f32>> = per_choice.to_vec2().unwrap();
        let expected = [[-2.4, -1.213_061_3], [3.297_442_5, 1.6]];
        for (got, expected) in got.iter().flatten().zip(expected.iter().flatten()) {
            assert!((got - expected).abs() < 1e-5, "{got} is not {expected}");
        }
    }

    #[test]
    fn gradient_equals_finite_differences() {
        let objective = Objective { kl_weight: 0.3, ..Default::default() };
        let targets = targets(&[[-1.0, -1.0], [-1.1, -0.7]], &[1.5, -0.5]);
        let at = [[-0.95f32, -1.35], [-1.0, -0.75]];
        let gradient: Vec<Vec<f32>> = loss(&tensor(&at), &targets, &objective).unwrap().gradient.to_vec2().unwrap();
        let value_at = |row: usize, column: usize, by: f32| {
            let mut moved = at;
            moved[row][column] += by;
            loss(&tensor(&moved), &targets, &objective).unwrap().value
        };
        for (row, column) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let slope = (value_at(row, column, 1e-2) - value_at(row, column, -1e-2)) / 2e-2;
            let got = f64::from(gradient[row][column]);
            assert!((got - slope).abs() < 1e-4, "[{row}, {column}]: {got} is not {slope}");
        }
    }

    #[test]
    fn a_split_batch_has_the_same_loss_and_gradient() {
        let objective = Objective::default();
        let whole = targets(&[[-1.0, -1.0], [-1.1, -0.7], [-0.2, -2.0]], &[1.5, -0.5, -1.0]);
        let log_probs = tensor(&[[-0.5, -1.3], [-1.0, -0.7], [-0.4, -1.8]]);
        let full = loss(&log_probs, &whole, &objective).unwrap();
        let rows = |t: &Tensor, at: usize| t.narrow(0, at, 1).unwrap();
        let mut value = 0.0;
        let mut gradients = Vec::new();
        for at in 0..3 {
            let part = Targets {
                old: rows(&whole.old, at),
                reference: whole.reference.as_ref().map(|t| rows(t, at)),
                advantages: rows(&whole.advantages, at),
                weights: rows(&whole.weights, at),
            };
            let part = loss(&rows(&log_probs, at), &part, &objective).unwrap();
            value += part.value;
            gradients.extend(part.gradient.to_vec2::<f32>().unwrap());
        }
        assert!((value - full.value).abs() < 1e-6);
        assert_eq!(gradients, full.gradient.to_vec2::<f32>().unwrap());
    }

    #[test]
    fn weights_of_ragged_rows_follow_the_aggregation() {
        assert_eq!(token_weights(&[1, 3, 0], Aggregation::SequenceMean), [0.5, 1.0 / 6.0, 0.0]);
        assert_eq!(token_weights(&[1, 3, 0], Aggregation::TokenMean), [0.25, 0.25, 0.0]);
    }

    #[test]
    fn clip_shares_count_only_the_side_that_binds() {
        let log_probs = tensor(&[[-0.5, -1.5], [-0.5, -1.5]]);
        let parts = loss(&log_probs, &targets(&[[-1.0, -1.0]; 2], &[1.0, -1.0]), &Objective::default()).unwrap().parts;
        assert!((parts.clipped_high - 0.25).abs() < 1e-6 && (parts.clipped_low - 0.25).abs() < 1e-6);
    }
}
