//! Held-out prompts: scored with the same draws before, during and after training, each time against the first.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::advantage::mean;
use crate::metrics::diversity;
use crate::observe::Metrics;
use crate::{Error, Group, GroupSampler, IndexedPrompt, Policy, Prompt, Result, Rollout, RunRewards, Seed};

/// What the rewards gave on average for each prompt.
///
/// The means are f32, which the f64 of JSON carries exactly.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PromptMeans {
    prompts: Vec<String>,
    /// Samples of each prompt.
    group_size: usize,
    /// The node that they are drawn from.
    #[serde(default = "held_out_seed")]
    seed: Seed,
    /// By reward; `None` for a prompt that the reward does not apply to.
    rewards: BTreeMap<String, Vec<Option<f32>>>,
}

/// Prompts that are never trained on, scored by rewards that need not be trained on either.
pub(crate) struct HeldOut<P: Policy> {
    prompts: Vec<Prompt>,
    sampler: GroupSampler<P::Sample>,
    seed: Seed,
}

/// One evaluation.
pub(crate) struct Evaluation<P: Policy> {
    pub(crate) groups: Vec<Group<P>>,
    pub(crate) reward_names: Vec<String>,
    pub(crate) means: PromptMeans,
    pub(crate) diversity: Option<f64>,
    pub(crate) seconds: f64,
}

impl<P: Policy> HeldOut<P> {
    pub(crate) fn new(prompts: Vec<Prompt>, sampler: GroupSampler<P::Sample>, seed: Seed) -> Self {
        Self { prompts, sampler, seed }
    }

    pub(crate) fn seed(&self) -> Seed {
        self.seed
    }

    /// Adds what is watched, and which of its prompts are trained on as well.
    pub(crate) fn watched(&self, optimised: RunRewards, trained: &[Prompt]) -> RunRewards {
        let trained: BTreeSet<&str> = trained.iter().map(|prompt| prompt.text.as_str()).collect();
        let texts = self.prompts.iter().map(|prompt| &prompt.text);
        let sources = Rollout::<P>::reward_sources(&self.sampler).into_iter().map(BTreeSet::from_iter);
        RunRewards {
            held_out: self.reward_names(),
            held_out_sources: self.reward_names().into_iter().zip(sources).collect(),
            trained_on: texts.filter(|text| trained.contains(text.as_str())).cloned().collect(),
            ..optimised
        }
    }

    pub(crate) fn reward_names(&self) -> Vec<String> {
        Rollout::<P>::reward_names(&self.sampler)
    }

    pub(crate) fn evaluate(&mut self, policy: &P) -> Result<Evaluation<P>> {
        let clock = Instant::now();
        let prompts: Vec<IndexedPrompt<'_>> = self.prompts.iter().enumerate().collect();
        let groups = self.sampler.collect(policy, &prompts, self.seed)?;
        let reward_names = self.reward_names();
        let means = PromptMeans::of(&groups, &reward_names, self.seed);
        let diversity = diversity(&groups);
        Ok(Evaluation { groups, reward_names, means, diversity, seconds: clock.elapsed().as_secs_f64() })
    }
}

/// The node from which held-out samples are drawn: not the run's, so that runs of other seeds are compared on the same
/// draws.
pub fn held_out_seed() -> Seed {
    Seed::new(0).named("held_out")
}

impl PromptMeans {
    fn of<P: Policy>(groups: &[Group<P>], names: &[String], seed: Seed) -> Self {
        let of_reward = |column: usize| {
            let scores = groups.iter().map(|group| group.scores_of(column));
            scores.map(|scores| (!scores.is_empty()).then(|| mean(&scores) as f32)).collect()
        };
        Self {
            prompts: groups.iter().map(|group| group.prompt.text.clone()).collect(),
            // Also where the rewards could not judge every sample.
            group_size: groups.first().map_or(0, |group| group.completions.len() + group.excluded.len()),
            seed,
            rewards: names.iter().enumerate().map(|(column, name)| (name.clone(), of_reward(column))).collect(),
        }
    }

    /// An error where a run is gone on with on other draws than it began with.
    pub(crate) fn check_draws(&self, seed: Seed) -> Result<()> {
        match self.seed == seed {
            true => Ok(()),
            false => Err(Error::config(
                "the checkpoint's held-out samples are of other draws; go on with the run by the command that began it, such \
                 as grpo ablate",
            )),
        }
    }

    /// Means over prompts, and their rises since `start` where that is of the same prompts and draws.
    pub(crate) fn metrics(&self, start: Option<&Self>) -> Metrics {
        let mut metrics = Metrics::new();
        let start = start.filter(|start| (&start.prompts, start.group_size) == (&self.prompts, self.group_size));
        for (name, now) in &self.rewards {
            metrics.extend(self.estimate(now, &format!("held_out/{name}/mean"), &format!("held_out/{name}/sem")));
            let Some(start) = start.and_then(|start| start.rewards.get(name)) else { continue };
            let rise = |(now, start): (&Option<f32>, &Option<f32>)| Some((*now)? - (*start)?);
            let rises: Vec<Option<f32>> = now.iter().zip(start).map(rise).collect();
            metrics.extend(self.estimate(
                &rises,
                &format!("held_out/{name}/rise"),
                &format!("held_out/{name}/rise_sem"),
            ));
        }
        metrics
    }

    /// The mean of one value a prompt and its standard error over distinct prompts, under these names; what is not known,
    /// the mean of no value or the error of one prompt, is left out.
    ///
    /// Samples of one prompt are not independent, and neither are rows that repeat its text: the error is that of a
    /// mean of clusters (Liang and Zeger, 1986), `C/(C − 1) · Σ_c (Σ_{i in c} (x_i − x̄))² / n²` for C distinct
    /// prompts, which is the usual one where none repeats.
    fn estimate(&self, values: &[Option<f32>], mean_name: &str, error_name: &str) -> Metrics {
        let known =
            self.prompts.iter().zip(values).filter_map(|(text, value)| Some((text.as_str(), f64::from((*value)?))));
        let known: Vec<(&str, f64)> = known.collect();
        if known.is_empty() {
            return Metrics::new();
        }
        let n = known.len() as f64;
        let mean = known.iter().map(|(_, value)| value).sum::<f64>() / n;
        let mut sums: BTreeMap<&str, f64> = BTreeMap::new();
        known.iter().for_each(|(text, value)| *sums.entry(text).or_default() += value - mean);
        let (clusters, squares) = (sums.len() as f64, sums.values().map(|sum| sum * sum).sum::<f64>());
        let mut metrics = Metrics::from([(mean_name.to_string(), mean)]);
        if sums.len() > 1 {
            metrics.insert(error_name.into(), (clusters / (clusters - 1.0) * squares).sqrt() / n);
        }
        metrics
    }
}

/// How many standard errors make a rise or a fall.
const EVIDENCE: f64 = 2.0;

/// `alarm/hacking`: 1 where, since the first evaluation, an optimised reward has risen on the held-out prompts by more than
/// two of its standard errors while a watched reward that is not optimised has fallen by more than two of its own; else 0.
///
/// Nothing where there is no evaluation to compare with, or not one reward of either kind among those watched.
pub(crate) fn hacking_alarm(metrics: &Metrics, optimised: &[String], watched: &[String]) -> Option<(String, f64)> {
    let z = |name: &String| {
        let rise = metrics.get(&format!("held_out/{name}/rise"))?;
        let error = metrics.get(&format!("held_out/{name}/rise_sem"))?;
        // Without spread, any difference is evidence.
        Some(if *rise == 0.0 { 0.0 } else { rise / error })
    };
    let known = |is_optimised: bool| -> Vec<f64> {
        watched.iter().filter(|name| optimised.contains(name) == is_optimised).filter_map(z).collect()
    };
    let (optimised, others) = (known(true), known(false));
    if optimised.is_empty() || others.is_empty() {
        return None;
    }
    let hacked = optimised.iter().any(|z| *z > EVIDENCE) && others.iter().any(|z| *z < -EVIDENCE);
    Some(("alarm/hacking".into(), f64::from(hacked)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn means(prompts: &[&str], values: &[Option<f32>]) -> PromptMeans {
        let rewards = BTreeMap::from([("r".to_string(), values.to_vec())]);
        PromptMeans {
            prompts: prompts.iter().map(ToString::to_string).collect(),
            group_size: 4,
            seed: held_out_seed(),
            rewards,
        }
    }

    fn near(metrics: &Metrics, name: &str, expected: f64) {
        assert!((metrics[name] - expected).abs() < 1e-7, "{name} is {}, not {expected}", metrics[name]);
    }

    #[test]
    fn a_rise_is_paired_by_prompt() {
        let prompts = ["a", "b", "c", "d"];
        let start = means(&prompts, &[Some(0.0), Some(0.5), None, Some(1.0)]);
        let now = means(&prompts, &[Some(0.25), Some(0.5), Some(0.75), Some(1.5)]);
        let metrics = now.metrics(Some(&start));
        // The differences 0.25, 0 and 0.5 have mean 0.25 and deviation 0.25.
        near(&metrics, "held_out/r/rise", 0.25);
        near(&metrics, "held_out/r/rise_sem", 0.25 / 3.0_f64.sqrt());
        // 0.25, 0.5, 0.75 and 1.5 have mean 0.75 and squared deviations of sum 0.875.
        near(&metrics, "held_out/r/mean", 0.75);
        near(&metrics, "held_out/r/sem", (0.875_f64 / 3.0 / 4.0).sqrt());
        assert_eq!(now.metrics(None).len(), 2, "the first evaluation has no rise");
        let others = means(&["a", "b", "c", "e"], &[Some(1.0); 4]);
        assert_eq!(now.metrics(Some(&others)).len(), 2, "other prompts have no rise");
    }

    #[test]
    fn a_prompt_that_is_asked_again_is_no_further_evidence() {
        let once = means(&["a", "b"], &[Some(0.0), Some(1.0)]).metrics(None);
        let thrice =
            means(&["a", "b", "a", "b", "a", "b"], &[Some(0.0), Some(1.0), Some(0.0), Some(1.0), Some(0.0), Some(1.0)]);
        let thrice = thrice.metrics(None);
        near(&thrice, "held_out/r/mean", 0.5);
        near(&thrice, "held_out/r/sem", once["held_out/r/sem"]);
        near(&once, "held_out/r/sem", 0.5);
    }

    #[test]
    fn what_is_not_known_is_not_logged() {
        assert_eq!(means(&["a", "b"], &[None, None]).metrics(None).len(), 0);
        let one = means(&["a", "a"], &[Some(1.0), Some(0.0)]).metrics(None);
        assert_eq!(one.keys().collect::<Vec<_>>(), ["held_out/r/mean"], "one prompt has no standard error");
    }

    #[test]
    fn the_alarm_needs_both_a_rise_and_a_fall() {
        let names = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
        let alarm = |clip: [f64; 2], geneval: [f64; 2]| {
            let metrics = Metrics::from([
                ("held_out/clip/rise".into(), clip[0]),
                ("held_out/clip/rise_sem".into(), clip[1]),
                ("held_out/geneval/rise".into(), geneval[0]),
                ("held_out/geneval/rise_sem".into(), geneval[1]),
            ]);
            hacking_alarm(&metrics, &names(&["clip"]), &names(&["clip", "geneval"])).map(|(_, value)| value)
        };
        assert_eq!(alarm([0.3, 0.1], [-0.3, 0.1]), Some(1.0));
        assert_eq!(alarm([0.3, 0.1], [-0.1, 0.1]), Some(0.0), "a fall within two errors is none");
        assert_eq!(alarm([0.1, 0.1], [-0.3, 0.1]), Some(0.0), "nor is a rise");
        assert_eq!(alarm([-0.3, 0.1], [0.3, 0.1]), Some(0.0), "the other way round is no hacking");
        assert_eq!(alarm([0.3, 0.0], [0.0, 0.0]), Some(0.0));
        assert_eq!(hacking_alarm(&Metrics::new(), &names(&["clip"]), &names(&["clip", "geneval"])), None);
    }

    #[test]
    fn what_a_checkpoint_carries_is_exact() {
        let values: Vec<Option<f32>> = (0..500).map(|n| Some((n as f32 * 0.618_034).sin() / 3.0)).collect();
        let prompts = vec!["a"; values.len()];
        let there = serde_json::to_vec(&means(&prompts, &values)).unwrap_or_default();
        let back: Option<PromptMeans> = serde_json::from_slice(&there).ok();
        assert_eq!(back, Some(means(&prompts, &values)));
    }
}
