//! The course of an arm's numbers while it was trained, over its seeds.

use std::collections::{BTreeMap, BTreeSet};

use grpo::observe::Metrics;
use serde::Serialize;

use super::arms::{ArmRuns, Arms};
use super::compare::{LEVEL, Quantity, of_reward, paired};
use super::record::{Evaluation, Run};
use crate::intervals::bootstrap;

/// Points of a curve of training steps: neighbours are averaged.
const POINTS: usize = 60;
/// What is drawn of the training steps.
const CURVES: [&str; 3] = ["reward", "kl", "entropy"];

/// A curve's value at a step, with a band around it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Point {
    /// Steps done.
    pub step: usize,
    /// The value.
    pub mean: f64,
    /// The band's lower end.
    pub low: f64,
    /// The band's upper end.
    pub high: f64,
}

/// The least, mean and greatest over seeds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// The mean.
    pub mean: f64,
    /// The least.
    pub low: f64,
    /// The greatest.
    pub high: f64,
}

/// The course of an arm's numbers.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Training {
    /// Held-out rewards at each evaluation, with the interval of their rise around the start's mean.
    pub held_out: BTreeMap<String, Vec<Point>>,
    /// What is optimised, likewise.
    pub target: Vec<Point>,
    /// Numbers of the training steps, with the least and the greatest seed.
    pub curves: BTreeMap<String, Vec<Point>>,
    /// Each optimised reward's share of the advantage, a mean over all steps.
    pub shares: BTreeMap<String, Spread>,
    /// Correlations of two rewards within groups, a mean over all steps.
    pub correlations: BTreeMap<String, Spread>,
    /// The diversity of held-out samples before training.
    pub diversity_start: Option<Spread>,
    /// And after it.
    pub diversity_end: Option<Spread>,
    /// The KL to the reference over the last tenth of the steps.
    pub kl: Option<Spread>,
    /// The correlation, over a run's evaluations, of what is optimised and the evaluation.
    pub with_evaluation: Option<Spread>,
    /// Samples drawn for training, all runs together.
    pub n_samples: usize,
    /// Held-out samples that a reward could not judge, before training and after it, all runs together.
    pub excluded: [usize; 2],
}

/// What an arm took, all runs together.
#[derive(Clone, Debug, Serialize)]
pub struct Cost {
    /// Seconds of training.
    pub train_s: f64,
    /// Seconds of scoring held-out prompts.
    pub held_out_s: f64,
    /// Samples drawn for training a second.
    pub samples_per_s: f64,
    /// The most memory that a run held, in GB, where it was told.
    pub peak_gb: Option<f64>,
}

impl Spread {
    fn of(values: &[f64]) -> Option<Self> {
        let n = values.len() as f64;
        let (low, high) = (values.iter().copied().reduce(f64::min)?, values.iter().copied().reduce(f64::max)?);
        Some(Self { mean: values.iter().sum::<f64>() / n, low, high })
    }
}

impl Training {
    pub(super) fn of(arms: &Arms, arm: &ArmRuns, target: Option<Quantity<'_>>) -> Self {
        let of_runs =
            |of: &dyn Fn(&Run) -> Option<f64>| Spread::of(&arm.runs.iter().filter_map(of).collect::<Vec<_>>());
        let diversity = |evaluation: &Evaluation| evaluation.metrics.get("held_out/diversity").copied();
        let watched = arms.watched.iter().map(|name| (name.clone(), held_out(arm, &of_reward(name))));
        let curve = |name: &str| (name.to_string(), curve(arm, name));
        let curves = CURVES.into_iter().map(curve).filter(|(_, points)| !points.is_empty());
        Self {
            held_out: watched.filter(|(_, points)| !points.is_empty()).collect(),
            target: target.map(|target| held_out(arm, target)).unwrap_or_default(),
            curves: curves.collect(),
            shares: means(arm, |name| name.strip_prefix("rewards/")?.strip_suffix("/advantage_share")),
            correlations: means(arm, |name| name.strip_prefix("rewards/correlation/")),
            diversity_start: of_runs(&|run| diversity(run.ends()?.0)),
            diversity_end: of_runs(&|run| diversity(run.ends()?.1)),
            kl: of_runs(&|run| mean_of(run, "kl", run.steps.len().saturating_sub((run.steps.len() / 10).max(1)))),
            with_evaluation: of_runs(&|run| with_evaluation(run, target?, arms.evaluation.as_ref()?)),
            n_samples: arm.runs.iter().map(n_samples).sum(),
            excluded: arm
                .runs
                .iter()
                .filter_map(Run::ends)
                .fold([0; 2], |[before, after], (start, end)| [before + excluded(start), after + excluded(end)]),
        }
    }
}

/// A quantity of held-out prompts at each evaluation that all runs of the arm have.
fn held_out(arm: &ArmRuns, quantity: Quantity<'_>) -> Vec<Point> {
    let Some(first) = arm.runs.first() else { return Vec::new() };
    let at = |step: usize| {
        let runs = arm.runs.iter().map(|run| &run.evaluations);
        let ends: Option<Vec<(&Evaluation, &Evaluation)>> =
            runs.map(|all| Some((all.first()?, all.iter().find(|evaluation| evaluation.step == step)?))).collect();
        let paired = paired(&ends?, quantity)?;
        let rise = bootstrap(&paired.rows, LEVEL)?;
        let from = paired.before;
        Some(Point { step, mean: from + rise.mean, low: from + rise.low, high: from + rise.high })
    };
    first.evaluations.iter().filter_map(|evaluation| at(evaluation.step)).collect()
}

/// A metric of the training steps, neighbours averaged, with the least and the greatest seed.
fn curve(arm: &ArmRuns, name: &str) -> Vec<Point> {
    let n_steps = arm.runs.iter().map(|run| run.steps.len()).min().unwrap_or(0);
    let width = n_steps.div_ceil(POINTS).max(1);
    let at = |from: usize| {
        let to = (from + width).min(n_steps);
        let of_run = |run: &Run| {
            let values: Vec<f64> =
                run.steps.get(from..to)?.iter().filter_map(|metrics| metrics.get(name).copied()).collect();
            Spread::of(&values).map(|spread| spread.mean)
        };
        let spread = Spread::of(&arm.runs.iter().filter_map(of_run).collect::<Vec<_>>())?;
        // Steps done: their numbers begin at 0.
        let step = arm.runs.first()?.steps.get(to - 1)?.get("step").map_or(to, |step| *step as usize + 1);
        Some(Point { step, mean: spread.mean, low: spread.low, high: spread.high })
    };
    (0..n_steps).step_by(width).filter_map(at).collect()
}

/// The mean of a metric over a run's steps, from one of them on.
fn mean_of(run: &Run, name: &str, from: usize) -> Option<f64> {
    let values: Vec<f64> = run.steps.iter().skip(from).filter_map(|metrics| metrics.get(name).copied()).collect();
    Spread::of(&values).map(|spread| spread.mean)
}

/// Means over all steps of the metrics whose name has a short form.
fn means(arm: &ArmRuns, short: impl Fn(&str) -> Option<&str>) -> BTreeMap<String, Spread> {
    let names = arm.runs.iter().flat_map(|run| run.steps.iter().flat_map(|metrics| metrics.keys()));
    let names: BTreeSet<&String> = names.filter(|name| short(name).is_some()).collect();
    let spread = |name: &String| {
        let of_runs: Vec<f64> = arm.runs.iter().filter_map(|run| mean_of(run, name, 0)).collect();
        Some((short(name)?.to_string(), Spread::of(&of_runs)?))
    };
    names.into_iter().filter_map(spread).collect()
}

/// Pearson's correlation over a run's evaluations; `None` of fewer than three, or where one of the two never changes.
fn with_evaluation(run: &Run, target: Quantity<'_>, evaluation: &str) -> Option<f64> {
    let mean = |at: &Evaluation, quantity: Quantity<'_>| {
        let values: Vec<f64> = at.prompts.values().filter_map(quantity).collect();
        Spread::of(&values).map(|spread| spread.mean)
    };
    let point = |at: &Evaluation| Some((mean(at, target)?, mean(at, &of_reward(evaluation))?));
    let points: Vec<(f64, f64)> = run.evaluations.iter().filter_map(point).collect();
    if points.len() < 3 {
        return None;
    }
    let n = points.len() as f64;
    let (x, y) = points.iter().fold((0.0, 0.0), |(x, y), point| (x + point.0 / n, y + point.1 / n));
    let sum = |of: &dyn Fn(f64, f64) -> f64| points.iter().map(|point| of(point.0 - x, point.1 - y)).sum::<f64>();
    let (xx, yy, xy) = (sum(&|x, _| x * x), sum(&|_, y| y * y), sum(&|x, y| x * y));
    (xx > 0.0 && yy > 0.0).then(|| xy / (xx * yy).sqrt())
}

fn excluded(evaluation: &Evaluation) -> usize {
    evaluation.metrics.get("held_out/excluded").map_or(0, |n| *n as usize)
}

/// Samples that a run drew for training.
fn n_samples(run: &Run) -> usize {
    let mut n_choices = 0.0;
    let of_step = |metrics: &Metrics| {
        let so_far = *metrics.get("num_choices")?;
        let new = so_far - std::mem::replace(&mut n_choices, so_far);
        Some((new / metrics.get("completions/mean_length")?).round() as usize)
    };
    run.steps.iter().filter_map(of_step).sum()
}

impl Cost {
    pub(super) fn of(arm: &ArmRuns) -> Self {
        let total = |name: &str| {
            let of_step = |metrics: &Metrics| metrics.get(name).copied();
            arm.runs.iter().flat_map(|run| run.steps.iter().filter_map(of_step)).sum::<f64>()
        };
        let evaluations = arm.runs.iter().flat_map(|run| &run.evaluations);
        let peaks =
            arm.runs.iter().flat_map(|run| run.steps.iter().filter_map(|metrics| metrics.get("memory/peak_gb")));
        let train_s = total("time/step_s");
        let n_samples: usize = arm.runs.iter().map(n_samples).sum();
        Self {
            train_s,
            held_out_s: evaluations.filter_map(|evaluation| evaluation.metrics.get("time/held_out_s")).sum(),
            samples_per_s: if train_s > 0.0 { n_samples as f64 / train_s } else { 0.0 },
            peak_gb: peaks.copied().reduce(f64::max),
        }
    }
}
