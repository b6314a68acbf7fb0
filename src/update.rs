//! One batch of scored samples becomes one or several optimiser steps.

use std::ops::Range;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use crate::loss::{LossParts, Targets, loss, padded, token_weights};
use crate::observe::Metrics;
use crate::{AdamW, BoxError, Error, Gradients, Group, LogProbs, Objective, Policy, Prompt, Result, Scoring};

/// One sample of the batch: what is replayed and how good it was.
pub(crate) struct Row<'a, P: Policy> {
    prompt: &'a Prompt,
    trace: &'a P::Trace,
    sampled: &'a [f32],
    advantage: f32,
}

impl<'a, P: Policy> Row<'a, P> {
    /// The samples of all groups in order.
    pub(crate) fn of(groups: &'a [Group<P>], advantages: &[Vec<f32>]) -> Vec<Self> {
        let rows = groups.iter().zip(advantages).flat_map(|(group, advantages)| {
            group.completions.iter().zip(advantages).map(|(completion, &advantage)| Row {
                prompt: &group.prompt,
                trace: &completion.trace,
                sampled: &completion.log_probs,
                advantage,
            })
        });
        rows.collect()
    }
}

/// The rows with all that stays fixed while the parameters move.
struct Batch<'a, P: Policy> {
    rows: &'a [Row<'a, P>],
    /// Log-probs of the choices when they were drawn, `[rows][T]`.
    old: Vec<Vec<f32>>,
    /// Log-probs of the choices under the reference, `[rows][T]`.
    reference: Option<Vec<Vec<f32>>>,
    /// The weight of each row's choices in the loss of the whole batch.
    weights: Vec<f32>,
}

impl<P: Policy> Batch<'_, P> {
    /// The constants of some rows, in the shape of their log-probs under the current weights.
    fn targets(&self, log_probs: &LogProbs, part: Range<usize>) -> Result<Targets> {
        let (n_rows, width) = log_probs.values().dims2()?;
        let device = log_probs.values().device();
        let tensor = |rows: &[Vec<f32>]| -> Result<Tensor> {
            let longest = rows.iter().map(Vec::len).max().unwrap_or(0);
            if rows.len() != n_rows || longest != width {
                let (got, expected) = (vec![n_rows, width], vec![rows.len(), longest]);
                return Err(Error::Shape { what: "the replayed log-probs", got, expected });
            }
            padded(&rows.iter().map(Vec::as_slice).collect::<Vec<_>>(), width, device)
        };
        let advantages: Vec<f32> = self.rows[part.clone()].iter().map(|row| row.advantage).collect();
        let weights = Tensor::from_slice(&self.weights[part.clone()], (n_rows, 1), device)?;
        Ok(Targets {
            old: tensor(&self.old[part.clone()])?,
            reference: self.reference.as_ref().map(|rows| tensor(&rows[part])).transpose()?,
            advantages: Tensor::from_vec(advantages, (n_rows, 1), device)?,
            weights: log_probs.mask().broadcast_mul(&weights)?,
        })
    }
}

/// What an update needs beside the rows.
pub(crate) struct Update<'a, P: Policy> {
    pub(crate) objective: &'a Objective,
    pub(crate) rows_per_backward: usize,
    pub(crate) parts_at_once: usize,
    pub(crate) policy: &'a P,
    pub(crate) reference: Option<&'a P>,
}

/// Sums over the batch that become metrics.
#[derive(Default)]
struct Totals {
    loss: f64,
    parts: LossParts,
    entropy: Option<f64>,
    difference: f64,
    max_difference: f64,
    n_choices: f64,
}

impl<P: Policy> Update<'_, P> {
    /// `objective.n_epochs` optimiser steps; returns the metrics of the last one and the times of all.
    pub(crate) fn apply(&self, rows: &[Row<'_, P>], optimizer: &mut AdamW, rate: f64) -> Result<Metrics> {
        let start = Instant::now();
        let reference = match self.reference.filter(|_| self.objective.kl_weight > 0.0) {
            Some(reference) => Some(self.score(reference, rows)?),
            None => None,
        };
        let reference_s = start.elapsed().as_secs_f64();
        let start = Instant::now();
        let old: Vec<Vec<f32>> = match self.policy.scoring() {
            Scoring::Exact => rows.iter().map(|row| row.sampled.to_vec()).collect(),
            Scoring::Conditional => self.score(self.policy, rows)?,
        };
        let lengths: Vec<usize> = old.iter().map(Vec::len).collect();
        let weights = token_weights(&lengths, self.objective.aggregation);
        let batch = Batch { rows, old, reference, weights };
        let mut metrics = Metrics::new();
        for epoch in 0..self.objective.n_epochs {
            let (gradients, totals) = self.gradients(&batch)?;
            let norm = optimizer.step(&gradients, rate)?;
            if epoch == 0 {
                // Later epochs have moved: only the first compares sampler and scorer on equal weights.
                let mean = totals.difference / totals.n_choices.max(1.0);
                metrics.insert("sampling/sampling_logp_difference/mean".into(), mean);
                metrics.insert("sampling/sampling_logp_difference/max".into(), totals.max_difference);
            }
            metrics.insert("grad_norm".into(), norm);
            self.record(&totals, &mut metrics);
        }
        metrics.insert("learning_rate".into(), rate);
        metrics.insert("time/reference_s".into(), reference_s);
        metrics.insert("time/update_s".into(), start.elapsed().as_secs_f64());
        Ok(metrics)
    }

    fn record(&self, totals: &Totals, metrics: &mut Metrics) {
        metrics.insert("loss".into(), totals.loss);
        if let Some(entropy) = totals.entropy {
            metrics.insert("entropy".into(), entropy / totals.n_choices.max(1.0));
        }
        metrics.insert("clip_ratio/low_mean".into(), totals.parts.clipped_low);
        metrics.insert("clip_ratio/high_mean".into(), totals.parts.clipped_high);
        metrics.insert("clip_ratio/region_mean".into(), totals.parts.clipped_low + totals.parts.clipped_high);
        if self.objective.kl_weight > 0.0 {
            metrics.insert("kl".into(), totals.parts.kl);
        }
    }

    /// Sums over micro-batches, each computed alone and added in order: how many are computed at once changes no bit.
    fn gradients(&self, batch: &Batch<'_, P>) -> Result<(Gradients, Totals)> {
        let (mut gradients, mut totals) = (Gradients::new(), Totals::default());
        let n_rows = batch.rows.len();
        let ranges: Vec<Range<usize>> = (0..n_rows)
            .step_by(self.rows_per_backward)
            .map(|start| start..(start + self.rows_per_backward).min(n_rows))
            .collect();
        for ranges in ranges.chunks(self.parts_at_once) {
            let done: Vec<Result<_>> = ranges.par_iter().map(|range| self.part(batch, range.clone())).collect();
            for part in done {
                let (of_part, totals_of_part) = part?;
                gradients.add_all(of_part)?;
                totals += totals_of_part;
            }
        }
        Ok((gradients, totals))
    }

    fn part(&self, batch: &Batch<'_, P>, range: Range<usize>) -> Result<(Gradients, Totals)> {
        let log_probs = log_probs(self.policy, &batch.rows[range.clone()])?;
        let loss = loss(log_probs.values(), &batch.targets(&log_probs, range.clone())?, self.objective)?;
        let mut gradients = Gradients::new();
        self.policy
            .backward(&log_probs, &loss.gradient, &mut gradients)
            .map_err(|source| Error::policy("backward", source))?;
        let mut totals = Totals { loss: loss.value, parts: loss.parts, ..Totals::default() };
        totals.add(&log_probs, &batch.rows[range])?;
        Ok((gradients, totals))
    }

    /// Log-probs of every row's choices under `policy`, without a gradient, `[rows][T]`.
    fn score(&self, policy: &P, rows: &[Row<'_, P>]) -> Result<Vec<Vec<f32>>> {
        let of_part = |rows: &[Row<'_, P>]| -> Result<Vec<Vec<f32>>> {
            let mut values = log_probs(policy, rows)?.rows()?;
            values.iter_mut().zip(rows).for_each(|(values, row)| values.truncate(row.sampled.len()));
            Ok(values)
        };
        let mut scored = Vec::with_capacity(rows.len());
        for rows in rows.chunks(self.rows_per_backward.saturating_mul(self.parts_at_once)) {
            let done: Vec<Result<_>> = rows.par_chunks(self.rows_per_backward).map(of_part).collect();
            for part in done {
                scored.extend(part?);
            }
        }
        Ok(scored)
    }
}

fn log_probs<P: Policy>(policy: &P, rows: &[Row<'_, P>]) -> Result<LogProbs> {
    let batch: Vec<(&Prompt, &P::Trace)> = rows.iter().map(|row| (row.prompt, row.trace)).collect();
    policy.log_probs(&batch).map_err(|source: BoxError| Error::policy("log_probs", source))
}

impl Totals {
    fn add<P: Policy>(&mut self, log_probs: &LogProbs, rows: &[Row<'_, P>]) -> Result<()> {
        let sum = |tensor: &Tensor| -> Result<f64> {
            Ok(f64::from((tensor * log_probs.mask())?.sum_all()?.to_scalar::<f32>()?))
        };
        if let Some(entropy) = log_probs.entropy() {
            *self.entropy.get_or_insert(0.0) += sum(&entropy.to_dtype(DType::F32)?)?;
        }
        let (_, width) = log_probs.values().dims2()?;
        let sampled: Vec<&[f32]> = rows.iter().map(|row| &row.sampled[..row.sampled.len().min(width)]).collect();
        let sampled = padded(&sampled, width, &Device::Cpu)?.to_device(log_probs.values().device())?;
        let difference = ((log_probs.values().detach() - sampled)?.abs()? * log_probs.mask())?;
        self.difference += sum(&difference)?;
        if difference.elem_count() > 0 {
            self.max_difference = self.max_difference.max(f64::from(difference.max_all()?.to_scalar::<f32>()?));
        }
        self.n_choices += f64::from(log_probs.mask().sum_all()?.to_scalar::<f32>()?);
        Ok(())
    }
}

impl std::ops::AddAssign for Totals {
    fn add_assign(&mut self, part: Self) {
        self.loss += part.loss;
        self.parts += part.parts;
        self.entropy = match (self.entropy, part.entropy) {
            (Some(sum), Some(part)) => Some(sum + part),
            (sum, part) => sum.or(part),
        };
        self.difference += part.difference;
        self.max_difference = self.max_difference.max(part.max_difference);
        self.n_choices += part.n_choices;
    }
}
