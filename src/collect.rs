//! A step's groups: which prompts, which of them anew, and which samples count.

use std::collections::BTreeSet;
use std::time::Instant;

use crate::observe::Metrics;
use crate::{Error, Excluded, FailedScores, Group, IndexedPrompt, Policy, Prompt, Result, Rollout, Seed, TrainConfig};

/// Which step it is, of which run.
pub(crate) struct StepPlan<'a> {
    pub(crate) config: &'a TrainConfig,
    pub(crate) prompts: &'a [Prompt],
    pub(crate) step: usize,
}

/// What a step learns from.
pub(crate) struct Collected<P: Policy> {
    /// Groups of at least 2 samples.
    pub(crate) groups: Vec<Group<P>>,
    /// Samples that a reward could not judge, those of groups that were left out included.
    pub(crate) excluded: Vec<Excluded>,
    /// The phases' times, and the counts of what was replaced and left out.
    pub(crate) metrics: Metrics,
}

impl StepPlan<'_> {
    /// The step's groups, those of equal rewards replaced as often as the configuration allows.
    pub(crate) fn collect<P: Policy>(&self, rollout: &mut dyn Rollout<P>, policy: &P) -> Result<Collected<P>> {
        let clock = Instant::now();
        let root = Seed::new(self.config.seed);
        let seed = root.named("rollout").fold(self.step as u64);
        let combine = self.config.objective.advantage.combine;
        let prompts = self.batch();
        let mut tried: BTreeSet<usize> = prompts.iter().map(|(idx, _)| *idx).collect();
        let mut groups = rollout.collect(policy, &prompts, seed)?;
        let mut phases = rollout.phase_times();
        let mut excluded: Vec<Excluded> = excluded_of(&groups);
        let mut n_resampled = 0;
        for round in 0..self.config.rollout.max_resamples as u64 {
            let flat: Vec<usize> = (0..groups.len()).filter(|&at| groups[at].teaches_nothing(combine)).collect();
            let seed_of_round = root.named("resample").fold(self.step as u64).fold(round);
            let order = seed_of_round.draws().permutation(self.prompts.len());
            let further = order.into_iter().filter(|idx| !tried.contains(idx)).take(flat.len());
            let further: Vec<IndexedPrompt<'_>> = further.map(|idx| (idx, &self.prompts[idx])).collect();
            if further.is_empty() {
                break;
            }
            tried.extend(further.iter().map(|(idx, _)| *idx));
            let replacements = rollout.collect(policy, &further, seed)?;
            rollout.phase_times().into_iter().for_each(|(name, seconds)| *phases.entry(name).or_default() += seconds);
            n_resampled += replacements.len();
            excluded.extend(excluded_of(&replacements));
            flat.into_iter().zip(replacements).for_each(|(at, group)| groups[at] = group);
        }
        let n_groups = groups.len();
        groups.retain(|group| group.completions.len() > 1);
        let mut metrics: Metrics =
            phases.into_iter().map(|(phase, seconds)| (format!("time/{phase}_s"), seconds)).collect();
        metrics.insert("time/rollout_s".into(), clock.elapsed().as_secs_f64());
        if self.config.rollout.max_resamples > 0 {
            metrics.insert("resampled_groups".into(), n_resampled as f64);
        }
        metrics.extend(self.counts(&excluded, n_groups - groups.len(), &rollout.reward_names()));
        match groups.is_empty() {
            false => Ok(Collected { groups, excluded, metrics }),
            true => Err(nothing_left(self.step, &excluded)),
        }
    }

    /// The prompts of the step: each epoch is a permutation of its own, cut into whole steps.
    fn batch(&self) -> Vec<IndexedPrompt<'_>> {
        let n = self.config.rollout.prompts_per_step;
        let steps_per_epoch = (self.prompts.len() / n).max(1);
        let (epoch, part) = (self.step / steps_per_epoch, self.step % steps_per_epoch);
        let seed = Seed::new(self.config.seed).named("data").fold(epoch as u64);
        let order = seed.draws().permutation(self.prompts.len());
        order.iter().skip(part * n).take(n).map(|&idx| (idx, &self.prompts[idx])).collect()
    }

    /// What was left out, where the configuration lets anything be.
    fn counts(&self, excluded: &[Excluded], n_groups: usize, names: &[String]) -> Metrics {
        let mut metrics = Metrics::new();
        // A rollout of one's own may leave out samples whatever this configuration says.
        if self.config.rollout.failed_scores != FailedScores::Error || !excluded.is_empty() {
            metrics.insert("excluded/samples".into(), excluded.len() as f64);
            metrics.insert("excluded/groups".into(), n_groups as f64);
            for name in names {
                let n_failed = excluded.iter().filter(|sample| sample.reward == *name).count();
                metrics.insert(format!("rewards/{name}/failed"), n_failed as f64);
            }
        }
        metrics
    }
}

fn excluded_of<P: Policy>(groups: &[Group<P>]) -> Vec<Excluded> {
    groups.iter().flat_map(|group| group.excluded.iter().cloned()).collect()
}

fn nothing_left(step: usize, excluded: &[Excluded]) -> Error {
    let nothing = format!("step {step} has no group of at least 2 samples");
    let Some(Excluded { reward, prompt, draw, why, .. }) = excluded.last() else {
        return Error::config(format!("{nothing}: the rollout gave no samples"));
    };
    let n = excluded.len();
    let message = format!("{nothing}: {n} could not be judged, the last, draw {draw} of prompt `{prompt}`: {why}");
    Error::Reward { name: reward.clone(), message, source: None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::ToyPolicy;
    use crate::{Completion, Scores};

    /// Of every group, all samples but one could not be judged.
    struct Short;

    impl Rollout<ToyPolicy> for Short {
        fn collect(&mut self, _: &ToyPolicy, prompts: &[IndexedPrompt<'_>], _: Seed) -> Result<Vec<Group<ToyPolicy>>> {
            let group = |&(prompt_idx, prompt): &IndexedPrompt<'_>| Group {
                prompt_idx,
                prompt: prompt.clone(),
                completions: vec![Completion { sample: "a".into(), trace: vec![0], log_probs: vec![-1.0] }],
                scores: vec![Scores { values: vec![Some(1.0)], total: 1.0 }],
                excluded: vec![Excluded {
                    prompt_idx,
                    prompt: prompt.text.clone(),
                    draw: 1,
                    reward: "judge".into(),
                    why: "timed out".into(),
                }],
            };
            Ok(prompts.iter().map(group).collect())
        }

        fn reward_names(&self) -> Vec<String> {
            vec!["judge".into()]
        }

        fn reward_weights(&self) -> Vec<f32> {
            vec![1.0]
        }
    }

    #[test]
    fn a_step_of_which_no_group_is_left_says_why() {
        let prompts: Vec<Prompt> = (0..2).map(|i| Prompt::new(format!("prompt {i}"))).collect();
        let mut config = TrainConfig::default();
        config.rollout.prompts_per_step = 2;
        let plan = StepPlan { config: &config, prompts: &prompts, step: 3 };
        let error = plan.collect(&mut Short, &ToyPolicy::new(4, 2).unwrap()).err().unwrap().to_string();
        assert_eq!(
            error,
            "reward `judge`: step 3 has no group of at least 2 samples: 2 could not be judged, the last, draw 1 of \
             prompt `prompt 0`: timed out"
        );
    }
}
