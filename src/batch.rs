//! One step's samples as the rows of an update, with all that stays fixed while the parameters move.

use std::ops::Range;

use candle_core::Tensor;
use ndarray::{Array1, Array2};
use rayon::prelude::*;

use crate::loss::{EntropyGate, Targets, correction_weights, entropy_gate, row_weights};
use crate::objective::Place;
use crate::update::Update;
use crate::{BoxError, Error, Group, LogProbs, Objective, Policy, Prompt, Result, Scoring};

/// Weighs a group's choices, `[G][T]`: the advantage of a choice is its sample's times its weight.
pub(crate) type ChoiceWeights<P> = Box<dyn Fn(&Group<P>) -> Result<Vec<Vec<f32>>, BoxError> + Send + Sync>;

/// One sample of the batch: what is replayed, and how likely its choices were when they were drawn.
pub(crate) struct Row<'a, P: Policy> {
    pub(crate) prompt: &'a Prompt,
    pub(crate) trace: &'a P::Trace,
    pub(crate) sampled: &'a [f32],
}

/// The samples of all groups in order, scored under the weights that drew them and under the reference.
pub(crate) struct ScoredRows<'a, P: Policy> {
    pub(crate) rows: Vec<Row<'a, P>>,
    /// Log-probs of the choices before the first update, `[rows][T]`.
    pub(crate) old: Vec<Vec<f32>>,
    /// Log-probs of the choices under the reference, `[rows][T]`.
    pub(crate) reference: Option<Vec<Vec<f32>>>,
}

/// Scored rows with their advantages and the weights that are the whole batch's.
pub(crate) struct Batch<'a, P: Policy> {
    scored: &'a ScoredRows<'a, P>,
    /// The advantage of each choice, `[rows][T]`.
    advantages: Vec<Vec<f32>>,
    /// The weight of each row's choices in the loss of the whole batch.
    weights: Vec<f64>,
    gate: EntropyGate,
}

impl<'a, P: Policy> ScoredRows<'a, P> {
    /// Scores the groups' samples as far as the objective needs it.
    pub(crate) fn score(update: &Update<'_, P>, groups: &'a [Group<P>]) -> Result<Self> {
        let completions = groups.iter().flat_map(|group| group.completions.iter().map(|c| (&group.prompt, c)));
        let rows: Vec<Row<'_, P>> = completions
            .map(|(prompt, completion)| Row { prompt, trace: &completion.trace, sampled: &completion.log_probs })
            .collect();
        let reference = match update.reference.filter(|_| update.objective.needs_reference()) {
            Some(reference) => Some(update.score(reference, &rows)?),
            None => None,
        };
        let old = match update.policy.scoring() {
            Scoring::Exact => rows.iter().map(|row| row.sampled.to_vec()).collect(),
            Scoring::Conditional => update.score(update.policy, &rows)?,
        };
        Ok(Self { rows, old, reference })
    }

    /// The sum over each sample's choices of the KL to the reference, `[rows]`; `None` where it is not in the reward.
    pub(crate) fn kl_of_samples(&self, objective: &Objective) -> Option<Vec<f32>> {
        let reference = self.reference.as_ref().filter(|_| objective.kl.place == Place::Reward)?;
        let estimate =
            |(&old, &reference): (&f32, &f32)| objective.kl.estimator.at(f64::from(old), f64::from(reference)).0;
        let of_row = |(old, reference): (&Vec<f32>, &Vec<f32>)| old.iter().zip(reference).map(estimate).sum::<f64>();
        Some(self.old.iter().zip(reference).map(|row| of_row(row) as f32).collect())
    }

    pub(crate) fn n_choices(&self) -> usize {
        self.old.iter().map(Vec::len).sum()
    }
}

impl<'a, P: Policy> Batch<'a, P> {
    /// `advantages` of each sample's choices, `[rows][T]`.
    pub(crate) fn new(scored: &'a ScoredRows<'a, P>, advantages: Vec<Vec<f32>>, objective: &Objective) -> Self {
        let lengths: Vec<usize> = scored.old.iter().map(Vec::len).collect();
        let weights = row_weights(&lengths, objective.aggregation);
        let gate = EntropyGate { floor: f32::NEG_INFINITY, n_kept: scored.n_choices() };
        Self { scored, advantages, weights, gate }
    }

    pub(crate) fn rows(&self) -> &[Row<'a, P>] {
        &self.scored.rows
    }

    /// Finds the entropy above which choices are kept, under the weights of this moment.
    pub(crate) fn set_gate(&mut self, update: &Update<'_, P>) -> Result<()> {
        let mut entropies = Vec::new();
        for log_probs in update.replay(update.policy, self.rows())? {
            let Some(entropy) = log_probs.entropy() else {
                return Err(Error::config(
                    "top_entropy_share needs the entropy of each choice, which the policy does not give",
                ));
            };
            let (entropy, mask) = (table(entropy)?, table(log_probs.mask())?);
            entropies.extend(entropy.iter().zip(&mask).filter(|(_, mask)| **mask > 0.0).map(|(entropy, _)| *entropy));
        }
        self.gate = entropy_gate(&entropies, update.objective.top_entropy_share);
        Ok(())
    }

    /// The constants of some rows, in the shape of their log-probs under the current weights.
    pub(crate) fn targets(&self, log_probs: &LogProbs, part: Range<usize>, objective: &Objective) -> Result<Targets> {
        let shape = log_probs.values().dims2()?;
        let rows = &self.rows()[part.clone()];
        let sampled = padded(rows.iter().map(|row| row.sampled), shape)?;
        let old = padded(self.scored.old[part.clone()].iter().map(Vec::as_slice), shape)?;
        let mask = table(log_probs.mask())?;
        check_mask(rows, &mask)?;
        let of_reference = |rows: &Vec<Vec<f32>>| padded(rows[part.clone()].iter().map(Vec::as_slice), shape);
        let correction = objective
            .correction
            .as_ref()
            .map(|correction| correction_weights(old.view(), sampled.view(), mask.view(), correction));
        Ok(Targets {
            reference: self.scored.reference.as_ref().map(of_reference).transpose()?,
            advantages: padded(self.advantages[part.clone()].iter().map(Vec::as_slice), shape)?,
            weights: Array1::from(self.weights[part].to_vec()),
            gate: self.gate,
            correction,
            mask,
            old,
            sampled,
        })
    }
}

impl<P: Policy> Update<'_, P> {
    /// Log-probs of every row's choices under `policy`, without a gradient, `[rows][T]`.
    pub(crate) fn score(&self, policy: &P, rows: &[Row<'_, P>]) -> Result<Vec<Vec<f32>>> {
        let mut scored = Vec::with_capacity(rows.len());
        for log_probs in self.replay(policy, rows)? {
            scored.extend(log_probs.rows()?);
        }
        scored.iter_mut().zip(rows).for_each(|(values, row)| values.truncate(row.sampled.len()));
        Ok(scored)
    }

    /// The rows' replayed log-probs, micro-batch by micro-batch, without a graph.
    fn replay(&self, policy: &P, rows: &[Row<'_, P>]) -> Result<Vec<LogProbs>> {
        let mut replayed = Vec::new();
        let size = self.part_size(policy, rows)?;
        for rows in rows.chunks(size.saturating_mul(self.parts_at_once)) {
            let of_part = |rows| log_probs(policy, rows)?.detached();
            let done: Vec<Result<_>> = rows.par_chunks(size).map(of_part).collect();
            replayed.extend(done.into_iter().collect::<Result<Vec<_>>>()?);
        }
        Ok(replayed)
    }
}

impl<P: Policy> Update<'_, P> {
    /// Rows of a micro-batch: as many as were asked for, or fewer where there is memory for fewer.
    pub(crate) fn part_size(&self, policy: &P, rows: &[Row<'_, P>]) -> Result<usize> {
        let fitting = policy.rows_that_fit(&traces(rows)).map_err(|source| Error::policy("rows_that_fit", source))?;
        Ok(self.rows_per_backward.min(fitting).max(1))
    }
}

/// Prompts and traces, as policies take them.
fn traces<'a, P: Policy>(rows: &[Row<'a, P>]) -> Vec<(&'a Prompt, &'a P::Trace)> {
    rows.iter().map(|row| (row.prompt, row.trace)).collect()
}

pub(crate) fn log_probs<P: Policy>(policy: &P, rows: &[Row<'_, P>]) -> Result<LogProbs> {
    let batch = traces(rows);
    policy.log_probs(&batch).map_err(|source: BoxError| Error::policy("log_probs", source))
}

/// The advantage of every sample's choices, `[rows][T]`.
pub(crate) fn choice_advantages<P: Policy>(
    groups: &[Group<P>],
    advantages: &[Vec<f32>],
    weights: Option<&ChoiceWeights<P>>,
) -> Result<Vec<Vec<f32>>> {
    let mut rows = Vec::new();
    for (group, advantages) in groups.iter().zip(advantages) {
        let lengths = group.completions.iter().map(|completion| completion.log_probs.len());
        let Some(weights) = weights else {
            rows.extend(lengths.zip(advantages).map(|(length, &advantage)| vec![advantage; length]));
            continue;
        };
        let weights = weights(group).map_err(|source| Error::policy("weigh_choices", source))?;
        let fits = weights.iter().map(Vec::len).eq(lengths) && weights.iter().flatten().all(|w| w.is_finite());
        if !fits {
            return Err(Error::config(format!(
                "weigh_choices gave weights for prompt `{}` that are not one finite number for each choice of each sample",
                group.prompt.text
            )));
        }
        let weigh = |(weights, &advantage): (Vec<f32>, &f32)| weights.iter().map(|weight| weight * advantage).collect();
        rows.extend(weights.into_iter().zip(advantages).map(weigh));
    }
    Ok(rows)
}

/// Normalisers count the choices that were sampled: the mask must be 1 on each of them and 0 behind.
fn check_mask<P: Policy>(rows: &[Row<'_, P>], mask: &Array2<f32>) -> Result<()> {
    for (row, mask) in rows.iter().zip(mask.rows()) {
        let n = row.sampled.len();
        if let Some(at) = (0..mask.len()).find(|&at| (mask[at] != 0.0) != (at < n)) {
            let message = format!(
                "the mask of a sample of {n} choices is {} at place {at}; mask all of them and no more",
                mask[at]
            );
            return Err(Error::Contract { what: "policy".into(), message });
        }
    }
    Ok(())
}

/// A `[B, T]` tensor as a table on the host.
pub(crate) fn table(tensor: &Tensor) -> Result<Array2<f32>> {
    let shape = tensor.dims2()?;
    let values = tensor.detach().flatten_all()?.to_vec1::<f32>()?;
    Array2::from_shape_vec(shape, values).map_err(|error| Error::config(error.to_string()))
}

/// Ragged rows as a table, padded with 0; the longest must be the table's width.
fn padded<'a>(rows: impl ExactSizeIterator<Item = &'a [f32]>, shape: (usize, usize)) -> Result<Array2<f32>> {
    let (n_rows, mut longest) = (rows.len(), 0);
    let mut values = Array2::zeros(shape);
    for (row, mut target) in rows.zip(values.rows_mut()) {
        longest = longest.max(row.len());
        row.iter().zip(&mut target).for_each(|(value, target)| *target = *value);
    }
    if (n_rows, longest) != shape {
        let (got, expected) = (vec![shape.0, shape.1], vec![n_rows, longest]);
        return Err(Error::Shape { what: "the replayed log-probs", got, expected });
    }
    Ok(values)
}
