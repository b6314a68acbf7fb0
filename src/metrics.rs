//! The numbers of a step; names, units, formulas and meanings are in `src/docs/metrics.md`.

use crate::advantage::{advantage_shares, is_flat, mean, std_dev};
use crate::observe::Metrics;
use crate::{Group, Objective, Policy, Rollout, Sample, Scores};

/// What the rewards gave a step's groups.
pub(crate) fn reward_metrics<P: Policy>(groups: &[Group<P>], names: &[String]) -> Metrics {
    let rewards: Vec<Vec<f32>> = groups.iter().map(Group::rewards).collect();
    let all: Vec<f32> = rewards.iter().flatten().copied().collect();
    let deviations: Vec<f64> = rewards.iter().map(|group| std_dev(group)).collect();
    let n_groups = groups.len().max(1) as f64;
    let n_flat = rewards.iter().filter(|group| is_flat(group)).count();
    let lengths: Vec<f32> = groups
        .iter()
        .flat_map(|group| group.completions.iter().map(|completion| completion.log_probs.len() as f32))
        .collect();
    let mut metrics = Metrics::from([
        ("reward".to_string(), mean(&all)),
        ("reward_std".to_string(), std_dev(&all)),
        ("reward_group_std".to_string(), deviations.iter().sum::<f64>() / n_groups),
        ("frac_reward_zero_std".to_string(), n_flat as f64 / n_groups),
        ("completions/mean_length".to_string(), mean(&lengths)),
        ("completions/min_length".to_string(), f64::from(lengths.iter().copied().fold(f32::INFINITY, f32::min))),
        ("completions/max_length".to_string(), f64::from(lengths.iter().copied().fold(0.0, f32::max))),
    ]);
    for (column, name) in names.iter().enumerate() {
        let scores: Vec<f32> = groups.iter().flat_map(|group| group.scores_of(column)).collect();
        // A reward that applies to no prompt of the step has no mean, which is not a mean of 0.
        if !scores.is_empty() {
            metrics.insert(format!("rewards/{name}/mean"), mean(&scores));
            metrics.insert(format!("rewards/{name}/std"), std_dev(&scores));
        }
        for (other, other_name) in names.iter().enumerate().skip(column + 1) {
            let correlation = correlation(groups, column, other);
            metrics.extend(correlation.map(|r| (format!("rewards/correlation/{name}_{other_name}"), r)));
        }
    }
    metrics.extend(terminated(groups));
    metrics.extend(diversity(groups).map(|diversity| ("diversity".to_string(), diversity)));
    metrics
}

/// How many samples were cut off, and how long those are that ended by themselves; none where the policy does not tell.
///
/// As in TRL, the lengths are 0 where every sample was cut off.
fn terminated<P: Policy>(groups: &[Group<P>]) -> Metrics {
    let completions = || groups.iter().flat_map(|group| &group.completions);
    let finished: Option<Vec<bool>> = completions().map(|completion| P::finished(&completion.trace)).collect();
    let Some(finished) = finished.filter(|finished| !finished.is_empty()) else { return Metrics::new() };
    let ended = completions().zip(&finished).filter(|(_, finished)| **finished);
    let lengths: Vec<f32> = ended.map(|(completion, _)| completion.log_probs.len() as f32).collect();
    Metrics::from([
        ("completions/clipped_ratio".to_string(), 1.0 - lengths.len() as f64 / finished.len() as f64),
        ("completions/mean_terminated_length".to_string(), mean(&lengths)),
        (
            "completions/min_terminated_length".to_string(),
            lengths.iter().copied().reduce(f32::min).map_or(0.0, f64::from),
        ),
        (
            "completions/max_terminated_length".to_string(),
            lengths.iter().copied().reduce(f32::max).map_or(0.0, f64::from),
        ),
    ])
}

/// The correlation of two rewards inside groups: of their differences from the group's mean, over all samples that both
/// apply to. `None` where one of them never differs within a group.
fn correlation<P: Policy>(groups: &[Group<P>], a: usize, b: usize) -> Option<f64> {
    let (mut aa, mut bb, mut ab) = (0.0, 0.0, 0.0);
    for group in groups {
        let (of_a, of_b) = (group.scores_of(a), group.scores_of(b));
        if of_a.len() != of_b.len() || is_flat(&of_a) && is_flat(&of_b) {
            continue;
        }
        let (mean_a, mean_b) = (mean(&of_a), mean(&of_b));
        for (x, y) in of_a.iter().zip(&of_b) {
            let (x, y) = (f64::from(*x) - mean_a, f64::from(*y) - mean_b);
            (aa, bb, ab) = (aa + x * x, bb + y * y, ab + x * y);
        }
    }
    (aa > 0.0 && bb > 0.0).then(|| ab / (aa * bb).sqrt())
}

/// The mean over groups of the mean difference between two of their samples; `None` where samples have no difference.
pub(crate) fn diversity<P: Policy>(groups: &[Group<P>]) -> Option<f64> {
    let of_group = |group: &Group<P>| {
        let samples: Vec<&P::Sample> = group.completions.iter().map(|completion| &completion.sample).collect();
        let pairs = samples.iter().enumerate().flat_map(|(at, a)| samples[at + 1..].iter().map(move |b| (*a, *b)));
        let differences: Vec<f64> = pairs.map(|(a, b)| a.difference(b)).collect::<Option<_>>()?;
        Some(differences.iter().sum::<f64>() / differences.len().max(1) as f64)
    };
    let of_groups: Vec<f64> = groups.iter().map(of_group).collect::<Option<_>>()?;
    (!of_groups.is_empty()).then(|| of_groups.iter().sum::<f64>() / of_groups.len() as f64)
}

/// What advantages are made of: the rewards' scores and, where it is one of them, the KL.
pub(crate) struct Judged {
    /// The rewards' names.
    names: Vec<String>,
    pub(crate) weights: Vec<f32>,
    /// `[P][G]`, each with one value a reward.
    pub(crate) scores: Vec<Vec<Scores>>,
    kl: Option<Vec<f32>>,
    objective: Objective,
}

impl Judged {
    /// `kl` is each sample's sum over its choices, where the KL acts in the reward.
    pub(crate) fn new<P: Policy>(
        groups: &[Group<P>],
        rollout: &dyn Rollout<P>,
        kl: Option<Vec<f32>>,
        objective: &Objective,
    ) -> Self {
        let (mut names, mut weights) = (rollout.reward_names(), rollout.reward_weights());
        let mut scores: Vec<Vec<Scores>> = groups.iter().map(|group| group.scores.clone()).collect();
        if let Some(kl) = &kl {
            let weight = -objective.kl_weight as f32;
            names.push("kl".into());
            weights.push(weight);
            for (scores, kl) in scores.iter_mut().flatten().zip(kl) {
                scores.values.push(Some(*kl));
            }
        }
        Self { names, weights, scores, kl, objective: *objective }
    }

    /// The names of the rewards that the user gave.
    pub(crate) fn names(&self) -> &[String] {
        &self.names[..self.names.len() - usize::from(self.kl.is_some())]
    }

    /// What each reward does to the advantages, and the KL where it is one of them.
    pub(crate) fn metrics(&self, n_choices: usize) -> Metrics {
        let mut metrics = Metrics::new();
        let shares = advantage_shares(&self.scores, &self.weights, &self.objective.advantage);
        for (name, share) in self.names.iter().zip(shares.into_iter().flatten()) {
            metrics.insert(format!("rewards/{name}/advantage_share"), share);
        }
        if let Some(kl) = &self.kl {
            let sum: f64 = kl.iter().map(|kl| f64::from(*kl)).sum();
            metrics.insert("kl".into(), sum / n_choices.max(1) as f64);
        }
        metrics
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::testing::ToyPolicy;
    use crate::{BoxError, Completion, LogProbs, Params, Prompt, Request};

    /// The values that TRL logged for the rewards of `tests/golden/trl.py`.
    #[test]
    fn reward_metrics_are_trls() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/trl.safetensors");
        let golden = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
        let case_of = |name: &str, case: usize| -> Vec<f64> {
            let row = golden[name].narrow(0, case, 1).unwrap().flatten_all().unwrap();
            row.to_dtype(DType::F64).unwrap().to_vec1().unwrap()
        };
        let names = ["r0", "r1", "r2"].map(String::from);
        for case in 0..golden["in/rewards"].dim(0).unwrap() {
            let weights = case_of("in/weights", case);
            let groups =
                case_of("in/rewards", case).chunks(4 * 3).map(|rows| group(rows, &weights)).collect::<Vec<_>>();
            let metrics = reward_metrics(&groups, &names);
            let near = |name: &str, expected: f64| match metrics.get(name) {
                Some(got) => assert!((got - expected).abs() < 1e-6, "case {case}: {name} is {got}, not {expected}"),
                None => assert!(expected.is_nan(), "case {case}: {name} is missing"),
            };
            for name in ["reward", "reward_std", "frac_reward_zero_std"] {
                near(name, case_of(&format!("metric/group/{name}"), case)[0]);
            }
            for (column, name) in names.iter().enumerate() {
                near(&format!("rewards/{name}/mean"), case_of("metric/group/rewards_mean", case)[column]);
                near(&format!("rewards/{name}/std"), case_of("metric/group/rewards_std", case)[column]);
            }
        }
    }

    fn group(rows: &[f64], weights: &[f64]) -> Group<ToyPolicy> {
        let scores = rows.chunks(weights.len()).map(|row| Scores {
            values: row.iter().map(|x| (!x.is_nan()).then_some(*x as f32)).collect(),
            total: row.iter().zip(weights).filter(|(x, _)| !x.is_nan()).map(|(x, w)| x * w).sum::<f64>() as f32,
        });
        let scores: Vec<Scores> = scores.collect();
        let completion = |_: &Scores| Completion { sample: "a".into(), trace: vec![0], log_probs: vec![-1.0] };
        let completions = scores.iter().map(completion).collect();
        Group { prompt_idx: 0, prompt: Prompt::new("any"), completions, scores, excluded: Vec::new() }
    }

    #[test]
    fn correlation_is_that_of_differences_inside_groups() {
        // Inside each group b falls as a rises; between groups both rise together.
        let low = group(&[0.0, 1.0, 1.0, 0.0], &[1.0, 1.0]);
        let high = group(&[10.0, 11.0, 11.0, 10.0], &[1.0, 1.0]);
        let metrics = reward_metrics(&[low, high], &["a".to_string(), "b".to_string()]);
        assert!((metrics["rewards/correlation/a_b"] + 1.0).abs() < 1e-9);
        assert_eq!(metrics["diversity"], 0.0, "all samples are one word");
    }

    /// Traces are lengths and whether they ended; nothing is drawn.
    struct Ended;

    impl Policy for Ended {
        type Sample = String;
        type Trace = (usize, Option<bool>);

        fn sample(&self, _: &[Request<'_>]) -> Result<Vec<Completion<Self>>, BoxError> {
            Ok(Vec::new())
        }
        fn log_probs(&self, _: &[(&Prompt, &Self::Trace)]) -> Result<LogProbs, BoxError> {
            Err("not asked for".into())
        }
        fn params(&self) -> Params {
            Params::none()
        }
        fn finished(trace: &Self::Trace) -> Option<bool> {
            trace.1
        }
    }

    /// Expected values as `_generate` of TRL 1.16's `GRPOTrainer` defines them, worked out by hand.
    #[test]
    fn samples_that_were_cut_off_count_apart() {
        let check = |traces: &[(usize, Option<bool>)], expected: Option<[f64; 4]>| {
            let of = |&(length, finished): &(usize, Option<bool>)| Completion {
                sample: String::new(),
                trace: (length, finished),
                log_probs: vec![-1.0; length],
            };
            let (prompt, completions) = (Prompt::new("any"), traces.iter().map(of).collect());
            let metrics = terminated(&[Group::<Ended> {
                prompt_idx: 0,
                prompt,
                completions,
                scores: Vec::new(),
                excluded: Vec::new(),
            }]);
            let names = ["clipped_ratio", "mean_terminated_length", "min_terminated_length", "max_terminated_length"];
            let got = names.map(|name| metrics.get(&format!("completions/{name}")).copied());
            assert_eq!(got, expected.map_or([None; 4], |values| values.map(Some)), "{traces:?}");
        };
        let (ended, cut) = (Some(true), Some(false));
        check(&[(3, ended), (8, cut), (6, ended), (8, cut)], Some([0.5, 4.5, 3.0, 6.0]));
        check(&[(1, ended), (2, ended), (2, ended), (3, ended)], Some([0.0, 2.0, 1.0, 3.0]));
        check(&[(8, cut), (8, cut)], Some([1.0, 0.0, 0.0, 0.0]));
        check(&[(8, ended), (8, None)], None);
        check(&[], None);
    }
}
