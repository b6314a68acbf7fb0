//! One batch of scored samples becomes one or several optimiser steps.

use std::ops::Range;
use std::time::Instant;

use candle_core::Tensor;
use ndarray::Array2;
use rayon::prelude::*;

use crate::batch::{Batch, log_probs, table};
use crate::loss::{Loss, LossParts, loss};
use crate::objective::Place;
use crate::observe::{Metrics, PositionMaps};
use crate::{AdamW, Error, Gradients, LogProbs, LossGradient, Objective, Policy, Result, Surrogate};

/// What an update needs beside the batch.
pub(crate) struct Update<'a, P: Policy> {
    pub(crate) objective: &'a Objective,
    pub(crate) rows_per_backward: usize,
    pub(crate) parts_at_once: usize,
    pub(crate) policy: &'a P,
    pub(crate) reference: Option<&'a P>,
}

/// What an update was.
pub(crate) struct Applied {
    pub(crate) metrics: Metrics,
    pub(crate) positions: PositionMaps,
    /// Why an optimiser step was not taken: a loss or a gradient that is not finite.
    pub(crate) fault: Option<String>,
    /// Optimiser steps that were taken.
    pub(crate) n_taken: usize,
}

/// Sums over the batch that become metrics.
#[derive(Default)]
struct Totals {
    loss: f64,
    parts: LossParts,
    difference: f64,
    max_difference: f64,
    positions: Positions,
    /// Seconds that went into what is only logged.
    metrics_s: f64,
}

/// Sums by position.
#[derive(Default)]
struct Positions {
    n: Vec<f64>,
    entropy: Vec<f64>,
    push: Vec<f64>,
}

impl<P: Policy> Update<'_, P> {
    /// `objective.n_epochs` optimiser steps; the metrics are those of the last one.
    ///
    /// A loss or gradient that is not finite ends the update where it stands: see [`Applied::fault`].
    pub(crate) fn apply(&self, batch: &mut Batch<'_, P>, optimizer: &mut AdamW, rate: f64) -> Result<Applied> {
        let start = Instant::now();
        let mut applied =
            Applied { metrics: Metrics::new(), positions: PositionMaps::default(), fault: None, n_taken: 0 };
        for epoch in 0..self.objective.n_epochs {
            let (norm, totals) = match self.epoch(batch, optimizer, rate) {
                Ok(done) => done,
                Err(Error::NotFinite(what)) => {
                    applied.fault = Some(what);
                    break;
                }
                Err(error) => return Err(error),
            };
            applied.n_taken += 1;
            *applied.metrics.entry("time/metrics_s".into()).or_default() += totals.metrics_s;
            if epoch == 0 {
                // Later epochs have moved: only the first compares sampler and scorer on equal weights.
                totals.record_sampling(&mut applied.metrics);
            }
            applied.metrics.insert("grad_norm".into(), norm);
            self.record(&totals, &mut applied.metrics);
            applied.positions = totals.positions.means();
        }
        applied.metrics.insert("learning_rate".into(), rate);
        applied.metrics.insert("time/update_s".into(), start.elapsed().as_secs_f64());
        Ok(applied)
    }

    /// One optimiser step; returns the gradient's norm before clipping.
    fn epoch(&self, batch: &mut Batch<'_, P>, optimizer: &mut AdamW, rate: f64) -> Result<(f64, Totals)> {
        if self.objective.top_entropy_share < 1.0 {
            batch.set_gate(self)?;
        }
        let (gradients, totals) = self.gradients(batch)?;
        Ok((optimizer.step(&gradients, rate)?, totals))
    }

    fn record(&self, totals: &Totals, metrics: &mut Metrics) {
        let parts = &totals.parts;
        let n_choices = parts.n_choices.max(1.0);
        metrics.insert("loss".into(), totals.loss);
        if let Some(entropy) = parts.entropy {
            metrics.insert("entropy".into(), entropy / n_choices);
        }
        if self.objective.entropy_weight != 0.0 {
            metrics.insert("policy_loss".into(), parts.policy_loss);
        }
        if self.objective.needs_reference() && self.objective.kl.place == Place::Loss {
            metrics.insert("kl".into(), parts.kl / n_choices);
        }
        let n_ratios = parts.n_ratios.max(1.0);
        match self.objective.surrogate {
            Surrogate::Clip => {
                metrics.insert("clip_ratio/low_mean".into(), parts.clipped_low / n_ratios);
                metrics.insert("clip_ratio/high_mean".into(), parts.clipped_high / n_ratios);
                let both = parts.clipped_low + parts.clipped_high;
                metrics.insert("clip_ratio/region_mean".into(), both / n_ratios);
                if parts.n_ratios > 0.0 {
                    metrics.insert("clip_ratio/low_min".into(), parts.low_min);
                    metrics.insert("clip_ratio/high_max".into(), parts.high_max);
                }
            }
            Surrogate::Cispo { .. } => {
                metrics.insert("cispo_clip_ratio".into(), parts.clipped_high / n_ratios);
            }
            Surrogate::Sapo { .. } => {}
        }
    }

    /// Sums over micro-batches, each computed alone and added in order: how many are computed at once changes no bit.
    fn gradients(&self, batch: &Batch<'_, P>) -> Result<(Gradients, Totals)> {
        let (mut gradients, mut totals) = (Gradients::new(), Totals::default());
        let n_rows = batch.rows().len();
        let size = self.part_size(self.policy, batch.rows())?;
        let ranges: Vec<Range<usize>> =
            (0..n_rows).step_by(size).map(|start| start..(start + size).min(n_rows)).collect();
        if self.parts_at_once == 1 {
            // A sum of each gradient is enough: every part adds to it where it lies.
            for range in ranges {
                totals.merge(&self.part(batch, range, &mut gradients)?);
            }
            return Ok((gradients, totals));
        }
        let alone = |range: &Range<usize>| {
            let mut gradients = Gradients::new();
            let totals = self.part(batch, range.clone(), &mut gradients)?;
            Ok((gradients, totals))
        };
        for ranges in ranges.chunks(self.parts_at_once) {
            let done: Vec<Result<_>> = ranges.par_iter().map(alone).collect();
            for part in done {
                let (of_part, totals_of_part) = part?;
                gradients.add_all(of_part)?;
                totals.merge(&totals_of_part);
            }
        }
        Ok((gradients, totals))
    }

    /// Adds the gradients of some rows.
    fn part(&self, batch: &Batch<'_, P>, range: Range<usize>, gradients: &mut Gradients) -> Result<Totals> {
        let log_probs = log_probs(self.policy, &batch.rows()[range.clone()])?;
        let targets = batch.targets(&log_probs, range, self.objective)?;
        let values = table(log_probs.values())?;
        let entropy = log_probs.entropy().map(table).transpose()?;
        let loss = loss(values.view(), entropy.as_ref().map(|entropy| entropy.view()), &targets, self.objective)?;
        if !loss.value.is_finite() {
            return Err(Error::NotFinite(format!("the loss is {}", loss.value)));
        }
        self.policy
            .backward(&log_probs, &upstream(&loss, &log_probs)?, gradients)
            .map_err(|source| Error::policy("backward", source))?;
        let clock = Instant::now();
        let mut totals = Totals { loss: loss.value, parts: loss.parts, ..Totals::default() };
        totals.compare(&values, &targets);
        totals.positions.add(&loss, entropy.as_ref(), &targets);
        totals.metrics_s = clock.elapsed().as_secs_f64();
        Ok(totals)
    }
}

/// The loss's gradient where the policy computes.
fn upstream(loss: &Loss, log_probs: &LogProbs) -> Result<LossGradient> {
    let device = log_probs.values().device();
    let tensor = |table: &Array2<f32>| -> Result<Tensor> {
        let values: Vec<f32> = table.iter().copied().collect();
        Ok(Tensor::from_vec(values, table.dim(), device)?)
    };
    let gradient = LossGradient::new(tensor(&loss.gradient)?);
    Ok(match &loss.entropy_gradient {
        None => gradient,
        Some(entropy) => gradient.with_entropy(tensor(entropy)?),
    })
}

impl Totals {
    /// How far the replayed log-probs are from those the sampler gave.
    fn compare(&mut self, values: &Array2<f32>, targets: &crate::loss::Targets) {
        for ((value, sampled), mask) in values.iter().zip(&targets.sampled).zip(&targets.mask) {
            if *mask > 0.0 {
                let difference = f64::from((value - sampled).abs());
                self.difference += difference;
                self.max_difference = self.max_difference.max(difference);
            }
        }
    }

    fn record_sampling(&self, metrics: &mut Metrics) {
        let mean = self.difference / self.parts.n_choices.max(1.0);
        metrics.insert("sampling/sampling_logp_difference/mean".into(), mean);
        metrics.insert("sampling/sampling_logp_difference/max".into(), self.max_difference);
        let ratios = &self.parts.correction;
        if ratios.n > 0.0 {
            metrics.insert("sampling/importance_sampling_ratio/min".into(), ratios.min);
            metrics.insert("sampling/importance_sampling_ratio/mean".into(), ratios.sum / ratios.n);
            metrics.insert("sampling/importance_sampling_ratio/max".into(), ratios.max);
        }
    }

    fn merge(&mut self, part: &Self) {
        self.loss += part.loss;
        self.parts.merge(&part.parts);
        self.difference += part.difference;
        self.max_difference = self.max_difference.max(part.max_difference);
        self.positions.merge(&part.positions);
        self.metrics_s += part.metrics_s;
    }
}

impl Positions {
    fn add(&mut self, loss: &Loss, entropy: Option<&Array2<f32>>, targets: &crate::loss::Targets) {
        self.grow(targets.mask.ncols(), entropy.is_some());
        for ((row, at), _) in targets.mask.indexed_iter().filter(|(_, mask)| **mask > 0.0) {
            self.n[at] += 1.0;
            self.push[at] += f64::from(loss.gradient[[row, at]].abs()) / targets.weights[row];
            if let Some(entropy) = entropy {
                self.entropy[at] += f64::from(entropy[[row, at]]);
            }
        }
    }

    fn merge(&mut self, other: &Self) {
        self.grow(other.n.len(), !other.entropy.is_empty());
        let add = |sums: &mut [f64], others: &[f64]| sums.iter_mut().zip(others).for_each(|(sum, x)| *sum += x);
        add(&mut self.n, &other.n);
        add(&mut self.push, &other.push);
        add(&mut self.entropy, &other.entropy);
    }

    fn grow(&mut self, width: usize, with_entropy: bool) {
        let width = width.max(self.n.len());
        self.n.resize(width, 0.0);
        self.push.resize(width, 0.0);
        if with_entropy {
            self.entropy.resize(width, 0.0);
        }
    }

    fn means(&self) -> PositionMaps {
        let mean = |sums: &[f64]| sums.iter().zip(&self.n).map(|(sum, n)| (sum / n.max(1.0)) as f32).collect();
        PositionMaps { entropy: mean(&self.entropy), advantage: mean(&self.push) }
    }
}
