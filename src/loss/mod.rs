//! The GRPO objective as a pure function of `[B, T]` tables.
//!
//! Per choice: `l = f·u(ρ, A) + kl_weight·KL`, with the ratio `ρ = exp(log π − log π_old)` of the choice or, under
//! [`Level::Sequence`], of its sample (`exp` of the mean log-ratio, GSPO eq. 7); `u` is the [`Surrogate`](crate::Surrogate)
//! and `f` the product of what takes a choice's say away: off-policy mask, entropy mask, sampler correction (TRL's
//! order). The loss is `Σ w·l − entropy_weight·mean H`, with [`row_weights`] of the whole batch: a micro-batch takes its rows of
//! them, so any split of a batch has the same gradient.
//!
//! It is computed on the host in f64, from f32 tables to an f32 gradient, in closed form: `[B, T]` is a thousandth of
//! the smallest activation of a policy, and a scalar loop can be read beside the equation.
//!
//! With a KL weight, a group of equal rewards still has the gradient of its KL, as in TRL and in GRPO eq. 3.

mod kl;
mod surrogate;
mod tables;

use ndarray::{Array1, Array2, ArrayView2, Axis};

pub use tables::{correction_weights, entropy_gate, row_weights};

use crate::objective::{Level, Objective, Place};
use crate::{Error, Result};

/// What stays fixed while the parameters move, for the `B` rows and `T` choices of a micro-batch.
#[derive(Clone, Debug)]
pub struct Targets {
    /// 1 where a choice counts and 0 where it is padding, `[B, T]`.
    pub mask: Array2<f32>,
    /// Log-probs of the choices before the batch's first update, `[B, T]`.
    pub old: Array2<f32>,
    /// Log-probs of the choices under the law that drew them, `[B, T]`.
    pub sampled: Array2<f32>,
    /// Log-probs of the choices under the reference, `[B, T]`; needed where the KL acts in the loss.
    pub reference: Option<Array2<f32>>,
    /// The advantage of each choice, `[B, T]`: the row's, times the choice's own weight where there is one.
    pub advantages: Array2<f32>,
    /// The weight of each row's choices in the batch's loss, `[B]`: [`row_weights`].
    pub weights: Array1<f64>,
    /// The weight of each choice's surrogate by [`correction_weights`], `[B, T]`; `None` without a correction.
    pub correction: Option<Array2<f32>>,
    /// What the entropy decides, over the whole batch.
    pub gate: EntropyGate,
}

/// Which choices of the batch the advantages and the entropy bonus act on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EntropyGate {
    /// Choices of at least this entropy, in nats.
    pub floor: f32,
    /// How many there are in the batch.
    pub n_kept: usize,
}

/// The loss of a micro-batch, its gradient and what it is made of.
#[derive(Clone, Debug)]
pub struct Loss {
    /// This micro-batch's part of the batch's loss.
    pub value: f64,
    /// `d loss / d log_probs`, `[B, T]`.
    pub gradient: Array2<f32>,
    /// `d loss / d entropy`, `[B, T]`; `None` without an entropy bonus.
    pub entropy_gradient: Option<Array2<f32>>,
    /// Sums over choices, for the metrics.
    pub parts: LossParts,
}

/// Sums and extremes over choices; parts of a batch are merged with [`LossParts::merge`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossParts {
    /// Choices that count.
    pub n_choices: f64,
    /// Ratios there are: one a choice, or one a row under [`Level::Sequence`].
    pub n_ratios: f64,
    /// Sum over choices of the KL to the reference, in nats, as it stands in the loss.
    pub kl: f64,
    /// Ratios clipped from below, with a negative advantage.
    pub clipped_low: f64,
    /// Ratios clipped from above, with a positive advantage.
    pub clipped_high: f64,
    /// The least share of a row's ratios that is clipped from below.
    pub low_min: f64,
    /// The largest share of a row's ratios that is clipped from above.
    pub high_max: f64,
    /// The loss without the entropy bonus.
    pub policy_loss: f64,
    /// Sum over choices of the entropy, in nats; `None` where the policy gives none.
    pub entropy: Option<f64>,
    /// The weights of [`Targets::correction`]: one a choice, or one a row where a row shares them.
    pub correction: Spread,
}

/// The least, the sum and the largest of some values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// The least; infinite where there is no value.
    pub min: f64,
    /// The sum.
    pub sum: f64,
    /// The largest; minus infinity where there is no value.
    pub max: f64,
    /// How many there are.
    pub n: f64,
}

impl Default for Spread {
    fn default() -> Self {
        Self { min: f64::INFINITY, sum: 0.0, max: f64::NEG_INFINITY, n: 0.0 }
    }
}

impl Spread {
    fn of(value: f64) -> Self {
        Self { min: value, sum: value, max: value, n: 1.0 }
    }

    fn merge(&mut self, other: &Self) {
        self.min = self.min.min(other.min);
        self.sum += other.sum;
        self.max = self.max.max(other.max);
        self.n += other.n;
    }
}

impl Default for LossParts {
    fn default() -> Self {
        Self {
            n_choices: 0.0,
            n_ratios: 0.0,
            kl: 0.0,
            clipped_low: 0.0,
            clipped_high: 0.0,
            low_min: f64::INFINITY,
            high_max: f64::NEG_INFINITY,
            policy_loss: 0.0,
            entropy: None,
            correction: Spread::default(),
        }
    }
}

impl LossParts {
    /// Takes in another part of the same batch.
    pub fn merge(&mut self, other: &Self) {
        self.n_choices += other.n_choices;
        self.n_ratios += other.n_ratios;
        self.kl += other.kl;
        self.clipped_low += other.clipped_low;
        self.clipped_high += other.clipped_high;
        self.low_min = self.low_min.min(other.low_min);
        self.high_max = self.high_max.max(other.high_max);
        self.policy_loss += other.policy_loss;
        self.entropy = match (self.entropy, other.entropy) {
            (Some(sum), Some(part)) => Some(sum + part),
            (sum, part) => sum.or(part),
        };
        self.correction.merge(&other.correction);
    }
}

/// The objective of a micro-batch and its gradient by the log-probs, `[B, T]`, and by the entropies, `[B, T]`.
///
/// `entropy` is needed where [`Objective::needs_entropy`] says so. What lies at padded places has no say.
pub fn loss(
    log_probs: ArrayView2<'_, f32>,
    entropy: Option<ArrayView2<'_, f32>>,
    targets: &Targets,
    objective: &Objective,
) -> Result<Loss> {
    objective.check()?;
    targets.check(log_probs.dim(), entropy)?;
    if objective.needs_entropy() {
        check_entropy(entropy, targets)?;
    }
    let mut loss = Loss {
        value: 0.0,
        gradient: Array2::zeros(log_probs.dim()),
        entropy_gradient: (objective.entropy_weight != 0.0).then(|| Array2::zeros(log_probs.dim())),
        parts: LossParts::default(),
    };
    let micro_batch = MicroBatch { log_probs, entropy, targets, objective };
    (0..log_probs.nrows()).for_each(|row| micro_batch.row(row).add_to(&mut loss));
    Ok(loss)
}

/// The entropy must be there and be a number: a comparison with NaN would leave choices out in silence.
fn check_entropy(entropy: Option<ArrayView2<'_, f32>>, targets: &Targets) -> Result<()> {
    let Some(entropy) = entropy else {
        return Err(Error::config(
            "entropy_weight or top_entropy_share needs the entropy of each choice; give it with LogProbs::with_entropy",
        ));
    };
    let of_choices = entropy.iter().zip(&targets.mask).filter(|(_, mask)| **mask > 0.0).map(|(entropy, _)| *entropy);
    match of_choices.into_iter().find(|entropy| !entropy.is_finite()) {
        None => Ok(()),
        Some(entropy) => Err(Error::NotFinite(format!("the entropy of a choice is {entropy}"))),
    }
}

struct MicroBatch<'a> {
    log_probs: ArrayView2<'a, f32>,
    entropy: Option<ArrayView2<'a, f32>>,
    targets: &'a Targets,
    objective: &'a Objective,
}

/// One sample, with what its choices share.
struct Row<'a> {
    batch: &'a MicroBatch<'a>,
    row: usize,
    /// Where its choices are.
    places: Vec<usize>,
    /// The ratio that its choices share, under [`Level::Sequence`].
    shared_ratio: Option<f64>,
    /// Whether its negative advantages are left out.
    off_policy: bool,
}

/// One choice's part of the loss.
#[derive(Default)]
struct Part {
    value: f64,
    kl: f64,
    by_log_prob: f64,
    by_log_ratio: f64,
    clipped: (bool, bool),
}

impl<'a> MicroBatch<'a> {
    fn row(&'a self, row: usize) -> Row<'a> {
        let Targets { mask, old, sampled, .. } = self.targets;
        let places: Vec<usize> = (0..mask.ncols()).filter(|&at| mask[[row, at]] > 0.0).collect();
        let mean_over = |table: &Array2<f32>| {
            let sum: f64 = places.iter().map(|&at| self.log_prob(row, at) - f64::from(table[[row, at]])).sum();
            sum / places.len().max(1) as f64
        };
        let shared_ratio = (self.objective.level == Level::Sequence).then(|| mean_over(old).exp());
        let off_policy = self.objective.off_policy_threshold.is_some_and(|threshold| -mean_over(sampled) > threshold);
        Row { batch: self, row, places, shared_ratio, off_policy }
    }

    fn log_prob(&self, row: usize, at: usize) -> f64 {
        f64::from(self.log_probs[[row, at]])
    }

    /// Whether the entropy at a choice is high enough for the advantages to act there.
    fn is_kept(&self, row: usize, at: usize) -> bool {
        let floor = self.targets.gate.floor;
        floor == f32::NEG_INFINITY || self.entropy.is_none_or(|entropy| entropy[[row, at]] >= floor)
    }
}

impl Row<'_> {
    fn add_to(&self, loss: &mut Loss) {
        let weight = self.batch.targets.weights[self.row];
        let mut shared_slope = 0.0;
        let (mut low, mut high) = (0.0, 0.0);
        for &at in &self.places {
            let part = self.part(at);
            loss.parts.policy_loss += weight * part.value;
            loss.parts.kl += part.kl;
            let own = if self.shared_ratio.is_some() { 0.0 } else { part.by_log_ratio };
            loss.gradient[[self.row, at]] = (weight * (part.by_log_prob + own)) as f32;
            shared_slope += weight * (part.by_log_ratio - own);
            low += f64::from(part.clipped.0);
            high += f64::from(part.clipped.1);
            loss.value += weight * part.value + self.entropy_bonus(at, &mut loss.entropy_gradient);
        }
        let n = self.places.len() as f64;
        if self.shared_ratio.is_some() {
            // `d log ρ / d log π` is one over the row's length at each of its choices.
            self.places.iter().for_each(|&at| loss.gradient[[self.row, at]] += (shared_slope / n) as f32);
        }
        self.count(low, high, &mut loss.parts);
        self.measure(&mut loss.parts);
    }

    fn measure(&self, parts: &mut LossParts) {
        if let Some(entropy) = self.batch.entropy {
            let of_row: f64 = self.places.iter().map(|&at| f64::from(entropy[[self.row, at]])).sum();
            *parts.entropy.get_or_insert(0.0) += of_row;
        }
        let Some(weights) = &self.batch.targets.correction else { return };
        let is_shared = self.batch.objective.correction.is_some_and(|correction| correction.level == Level::Sequence);
        // A weight that a row shares is counted once, also for a row without a choice.
        let first = [0].into_iter().filter(|_| is_shared && weights.ncols() > 0);
        let each = self.places.iter().copied().filter(|_| !is_shared);
        first.chain(each).for_each(|at| parts.correction.merge(&Spread::of(f64::from(weights[[self.row, at]]))));
    }

    fn part(&self, at: usize) -> Part {
        let (batch, objective) = (self.batch, self.batch.objective);
        let (targets, place) = (batch.targets, [self.row, at]);
        let log_prob = batch.log_prob(self.row, at);
        let ratio = self.shared_ratio.unwrap_or_else(|| (log_prob - f64::from(targets.old[place])).exp());
        let advantage = f64::from(targets.advantages[place]);
        let choice = objective.surrogate_at(ratio, advantage, log_prob);
        let silenced = self.off_policy && advantage < 0.0 || !batch.is_kept(self.row, at);
        let correction = targets.correction.as_ref().map_or(1.0, |weights| f64::from(weights[place]));
        let factor = if silenced { 0.0 } else { correction };
        let mut part = Part {
            value: factor * choice.value,
            by_log_prob: factor * choice.by_log_prob,
            by_log_ratio: factor * choice.by_log_ratio,
            clipped: objective.binds(ratio, advantage),
            ..Part::default()
        };
        if let Some(reference) = targets.reference.as_ref().filter(|_| objective.kl.place == Place::Loss) {
            let (kl, slope) = objective.kl.estimator.at(log_prob, f64::from(reference[place]));
            let scale = if objective.kl.bias_correction { ratio } else { 1.0 };
            part.kl = kl * scale;
            part.value += objective.kl_weight * part.kl;
            part.by_log_prob += objective.kl_weight * slope * scale;
            if objective.kl.bias_correction {
                part.by_log_ratio += objective.kl_weight * part.kl;
            }
        }
        part
    }

    /// The choice's part of the bonus, which is a mean over the choices that are kept.
    fn entropy_bonus(&self, at: usize, gradient: &mut Option<Array2<f32>>) -> f64 {
        let (Some(gradient), Some(entropy)) = (gradient, self.batch.entropy) else { return 0.0 };
        if !self.batch.is_kept(self.row, at) {
            return 0.0;
        }
        let weight = self.batch.objective.entropy_weight / self.batch.targets.gate.n_kept.max(1) as f64;
        gradient[[self.row, at]] = -weight as f32;
        -weight * f64::from(entropy[[self.row, at]])
    }

    fn count(&self, low: f64, high: f64, parts: &mut LossParts) {
        let n = self.places.len() as f64;
        parts.n_choices += n;
        // A ratio that the choices share is counted once, also for a row without any.
        let n_ratios = if self.shared_ratio.is_some() { 1.0 } else { n };
        let per_ratio = if n > 0.0 { n_ratios / n } else { 0.0 };
        parts.n_ratios += n_ratios;
        parts.clipped_low += low * per_ratio;
        parts.clipped_high += high * per_ratio;
        if n_ratios > 0.0 {
            parts.low_min = parts.low_min.min(low * per_ratio / n_ratios);
            parts.high_max = parts.high_max.max(high * per_ratio / n_ratios);
        }
    }
}

impl Targets {
    /// The targets of some of the rows, in the order given: a micro-batch of this batch.
    #[must_use]
    pub fn select(&self, rows: &[usize]) -> Self {
        let cut = |table: &Array2<f32>| table.select(Axis(0), rows);
        Self {
            mask: cut(&self.mask),
            old: cut(&self.old),
            sampled: cut(&self.sampled),
            reference: self.reference.as_ref().map(cut),
            advantages: cut(&self.advantages),
            weights: self.weights.select(Axis(0), rows),
            correction: self.correction.as_ref().map(cut),
            gate: self.gate,
        }
    }

    fn check(&self, shape: (usize, usize), entropy: Option<ArrayView2<'_, f32>>) -> Result<()> {
        let tables = [
            ("the mask", Some(&self.mask)),
            ("the old log-probs", Some(&self.old)),
            ("the sampled log-probs", Some(&self.sampled)),
            ("the reference log-probs", self.reference.as_ref()),
            ("the advantages", Some(&self.advantages)),
            ("the correction", self.correction.as_ref()),
        ];
        let tables = tables.iter().filter_map(|(what, table)| Some((*what, table.as_ref()?.dim())));
        let entropy = entropy.map(|entropy| ("the entropy", entropy.dim()));
        let weights = ("the weights of rows", (self.weights.len(), shape.1));
        match tables.chain(entropy).chain([weights]).find(|(_, dim)| *dim != shape) {
            None => Ok(()),
            Some((what, got)) => Err(Error::Shape { what, got: vec![got.0, got.1], expected: vec![shape.0, shape.1] }),
        }
    }
}
