//! Rollouts: where and when prompts become scored groups.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender};
use serde::{Deserialize, Serialize};

use crate::advantage::is_flat;
use crate::reward::message_of;
use crate::{
    Combine, Completion, Error, Failed, FailedScores, Policy, Prompt, Request, Result, RewardSet, Scores, Seed,
};

/// How many samples share a prompt: at least 2, checked while parsing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "usize", into = "usize")]
pub struct GroupSize(usize);

impl GroupSize {
    /// A group size; fewer than 2 samples have no deviation to be normalised by.
    pub fn new(n: usize) -> Result<Self> {
        if n < 2 {
            return Err(Error::config(format!("group_size is {n}; a group needs at least 2")));
        }
        Ok(Self(n))
    }

    /// The number.
    pub fn get(self) -> usize {
        self.0
    }
}

impl Default for GroupSize {
    /// 8, TRL's default.
    fn default() -> Self {
        Self(8)
    }
}

impl TryFrom<usize> for GroupSize {
    type Error = Error;

    fn try_from(n: usize) -> Result<Self> {
        Self::new(n)
    }
}

impl From<GroupSize> for usize {
    fn from(size: GroupSize) -> usize {
        size.0
    }
}

/// The samples of one prompt and what the rewards gave them.
pub struct Group<P: Policy> {
    /// The prompt's index in the data set; groups are formed by it, never by text.
    pub prompt_idx: usize,
    /// The prompt.
    pub prompt: Prompt,
    /// The samples, `[G]`, in the order of their draws; those of [`Group::excluded`] are not among them.
    pub completions: Vec<Completion<P>>,
    /// What each sample was given, `[G]`.
    pub scores: Vec<Scores>,
    /// Samples that a reward could not judge, in the order of their draws; they count nowhere.
    pub excluded: Vec<Excluded>,
}

/// A sample that left its group, because a reward could not judge it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Excluded {
    /// The prompt's index in the data set.
    pub prompt_idx: usize,
    /// Its text.
    pub prompt: String,
    /// Which of the prompt's samples it was.
    pub draw: usize,
    /// The reward that failed.
    pub reward: String,
    /// How.
    pub why: String,
}

impl<P: Policy> Group<P> {
    /// The weighted rewards, `[G]`.
    pub fn rewards(&self) -> Vec<f32> {
        self.scores.iter().map(|scores| scores.total).collect()
    }

    /// One reward's scores, `[G]`; those of samples it does not apply to are left out.
    pub fn scores_of(&self, reward: usize) -> Vec<f32> {
        self.scores.iter().filter_map(|scores| scores.values.get(reward).copied().flatten()).collect()
    }

    /// Which of the prompt's draws each sample is, `[G]`.
    pub fn draws(&self) -> Vec<usize> {
        let n_drawn = self.completions.len() + self.excluded.len();
        (0..n_drawn).filter(|draw| self.excluded.iter().all(|excluded| excluded.draw != *draw)).collect()
    }

    /// Takes in what the samples were given, and lets go of those that a reward could not judge.
    fn judge(&mut self, rows: impl Iterator<Item = Result<Scores, Failed>>) {
        let drawn = std::mem::take(&mut self.completions);
        for (draw, (completion, scores)) in drawn.into_iter().zip(rows).enumerate() {
            match scores {
                Ok(scores) => {
                    self.completions.push(completion);
                    self.scores.push(scores);
                }
                Err(Failed { reward, why }) => {
                    let (prompt_idx, prompt) = (self.prompt_idx, self.prompt.text.clone());
                    self.excluded.push(Excluded { prompt_idx, prompt, draw, reward, why });
                }
            }
        }
    }

    /// Whether all advantages of the group are 0: the sums are equal or, where rewards are normalised one by one, each is.
    pub(crate) fn teaches_nothing(&self, combine: Combine) -> bool {
        let n_rewards = self.scores.first().map_or(0, |scores| scores.values.len());
        match combine {
            Combine::SumThenNormalise => is_flat(&self.rewards()),
            Combine::NormaliseThenSum | Combine::RankThenSum => {
                (0..n_rewards).all(|reward| is_flat(&self.scores_of(reward)))
            }
        }
    }

    /// Indices of the samples, best reward first; equal rewards keep the order of their draws.
    pub fn ranking(&self) -> Vec<usize> {
        let rewards = self.rewards();
        let mut order: Vec<usize> = (0..rewards.len()).collect();
        order.sort_by(|&a, &b| rewards[b].total_cmp(&rewards[a]));
        order
    }
}

/// A prompt and its index in the data set.
pub type IndexedPrompt<'a> = (usize, &'a Prompt);

/// Decides where and when prompts become scored groups: here, on threads, ahead of the learner, from a file.
pub trait Rollout<P: Policy> {
    /// One scored group per prompt, in order. Sample `g` of prompt `i` is drawn from `seed.fold(i).fold(g)`.
    ///
    /// A group may be short of samples that a reward could not judge; the trainer leaves out one of fewer than 2.
    fn collect(&mut self, policy: &P, prompts: &[IndexedPrompt<'_>], seed: Seed) -> Result<Vec<Group<P>>>;

    /// The rewards' names, in the order of a group's scores.
    fn reward_names(&self) -> Vec<String>;

    /// The rewards' weights, in the order of the names.
    fn reward_weights(&self) -> Vec<f32>;

    /// The names of all that has a say in each reward, itself, its gate and its parts, in the order of the names.
    fn reward_sources(&self) -> Vec<Vec<String>> {
        self.reward_names().into_iter().map(|name| vec![name]).collect()
    }

    /// Seconds that the last `collect` spent in each of its phases, by name.
    fn phase_times(&self) -> BTreeMap<String, f64> {
        BTreeMap::new()
    }
}

/// Samples and scores in turn, on the caller's thread.
pub struct GroupSampler<S> {
    plan: Plan<S>,
    times: BTreeMap<String, f64>,
}

/// Scores on a second thread while the next chunk is being sampled; the same groups as [`GroupSampler`].
///
/// At most two chunks wait for the scorer, so samples do not pile up where scoring is the slower phase.
pub struct OverlappedSampler<S> {
    plan: Plan<S>,
    times: BTreeMap<String, f64>,
}

struct Plan<S> {
    rewards: Arc<RewardSet<S>>,
    group_size: GroupSize,
    prompts_per_call: usize,
    failed: FailedScores,
    /// The most samples that one call asked for: a step's, against which replacements are measured as well.
    most_asked: usize,
}

impl<S> Plan<S> {
    fn new(rewards: Arc<RewardSet<S>>, group_size: GroupSize, rows_per_call: usize) -> Self {
        let prompts_per_call = (rows_per_call / group_size.get()).max(1);
        Self { rewards, group_size, prompts_per_call, failed: FailedScores::Error, most_asked: 0 }
    }

    fn reward_names(&self) -> Vec<String> {
        self.rewards.names().map(String::from).collect()
    }

    fn ask_for(&mut self, prompts: &[IndexedPrompt<'_>]) {
        self.most_asked = self.most_asked.max(prompts.len() * self.group_size.get());
    }

    fn sample<P: Policy<Sample = S>>(
        &self,
        policy: &P,
        prompts: &[IndexedPrompt<'_>],
        seed: Seed,
    ) -> Result<Vec<Group<P>>> {
        let draws = 0..self.group_size.get() as u64;
        let requests: Vec<Request<'_>> = prompts
            .iter()
            .flat_map(|&(idx, prompt)| {
                draws.clone().map(move |draw| Request { prompt, seed: seed.fold(idx as u64).fold(draw) })
            })
            .collect();
        let completions = policy.sample(&requests).map_err(|source| Error::policy("sample", source))?;
        if completions.len() != requests.len() {
            let message = format!("returned {} completions for {} requests", completions.len(), requests.len());
            return Err(Error::policy("sample", message.into()));
        }
        let mut completions = completions.into_iter();
        let group = |&(prompt_idx, prompt): &IndexedPrompt<'_>| Group {
            prompt_idx,
            prompt: prompt.clone(),
            completions: completions.by_ref().take(self.group_size.get()).collect(),
            scores: Vec::new(),
            excluded: Vec::new(),
        };
        Ok(prompts.iter().map(group).collect())
    }

    /// Sends samples chunk by chunk; returns the seconds it took. The scorer hangs up only on an error, which it returns.
    fn sample_all<P: Policy<Sample = S>>(
        &self,
        policy: &P,
        prompts: &[IndexedPrompt<'_>],
        seed: Seed,
        to_scorer: &Sender<Vec<Group<P>>>,
    ) -> Result<f64> {
        let mut sampling = 0.0;
        for chunk in prompts.chunks(self.prompts_per_call) {
            let start = Instant::now();
            let sampled = self.sample(policy, chunk, seed)?;
            sampling += start.elapsed().as_secs_f64();
            if to_scorer.send(sampled).is_err() {
                break;
            }
        }
        Ok(sampling)
    }

    /// Scores chunks until there are no more; returns the groups and the seconds it took.
    fn score_all<P: Policy<Sample = S>>(&self, chunks: &Receiver<Vec<Group<P>>>) -> Result<(Vec<Group<P>>, f64)> {
        let (mut groups, mut scoring) = (Vec::new(), 0.0);
        for chunk in chunks {
            let start = Instant::now();
            groups.extend(self.score(chunk)?);
            self.check_share(&groups)?;
            scoring += start.elapsed().as_secs_f64();
        }
        Ok((groups, scoring))
    }

    /// An error where more samples have failed by now than may of all that are asked for: a scorer that is gone is
    /// noticed at once, and not after as many time-outs as the step has samples.
    fn check_share<P: Policy>(&self, groups: &[Group<P>]) -> Result<()> {
        let FailedScores::Exclude { max_share } = self.failed else { return Ok(()) };
        let n_asked = self.most_asked;
        let n_failed: usize = groups.iter().map(|group| group.excluded.len()).sum();
        let last = groups.iter().flat_map(|group| &group.excluded).next_back();
        let Some(last) = last.filter(|_| n_failed as f64 > max_share * n_asked as f64) else { return Ok(()) };
        let message = format!(
            "{n_failed} of {n_asked} samples could not be judged, more than failed_scores.exclude.max_share = \
             {max_share} allows; the last, draw {} of prompt `{}`: {}",
            last.draw, last.prompt, last.why
        );
        Err(Error::Reward { name: last.reward.clone(), message, source: None })
    }

    fn score<P: Policy<Sample = S>>(&self, mut groups: Vec<Group<P>>) -> Result<Vec<Group<P>>> {
        let batch: Vec<(&Prompt, &S)> = groups
            .iter()
            .flat_map(|group| group.completions.iter().map(|completion| (&group.prompt, &completion.sample)))
            .collect();
        let rows: Vec<Result<Scores, Failed>> = match self.failed {
            FailedScores::Error => self.rewards.score(&batch)?.into_iter().map(Ok).collect(),
            FailedScores::Exclude { .. } => self.rewards.score_each(&batch)?,
        };
        let mut rows = rows.into_iter();
        for group in &mut groups {
            let n_samples = group.completions.len();
            group.judge(rows.by_ref().take(n_samples));
        }
        Ok(groups)
    }
}

impl<S> GroupSampler<S> {
    /// Groups of `group_size`, at most `rows_per_call` samples at a time (but always whole groups).
    pub fn new(rewards: impl Into<Arc<RewardSet<S>>>, group_size: GroupSize, rows_per_call: usize) -> Self {
        Self { plan: Plan::new(rewards.into(), group_size, rows_per_call), times: BTreeMap::new() }
    }

    /// What becomes of a sample that a reward cannot judge; an error where this is not called. A trainer's configuration
    /// does not reach a sampler: give both the same rule.
    #[must_use]
    pub fn on_failed(mut self, failed: FailedScores) -> Self {
        self.plan.failed = failed;
        self
    }
}

impl<P: Policy> Rollout<P> for GroupSampler<P::Sample> {
    fn collect(&mut self, policy: &P, prompts: &[IndexedPrompt<'_>], seed: Seed) -> Result<Vec<Group<P>>> {
        self.plan.ask_for(prompts);
        let mut groups = Vec::with_capacity(prompts.len());
        let (mut sampling, mut scoring) = (0.0, 0.0);
        for chunk in prompts.chunks(self.plan.prompts_per_call) {
            let start = Instant::now();
            let sampled = self.plan.sample(policy, chunk, seed)?;
            sampling += start.elapsed().as_secs_f64();
            let start = Instant::now();
            groups.extend(self.plan.score(sampled)?);
            self.plan.check_share(&groups)?;
            scoring += start.elapsed().as_secs_f64();
        }
        self.times = BTreeMap::from([("sample".into(), sampling), ("score".into(), scoring)]);
        Ok(groups)
    }

    fn reward_names(&self) -> Vec<String> {
        self.plan.reward_names()
    }

    fn reward_weights(&self) -> Vec<f32> {
        self.plan.rewards.weights()
    }

    fn reward_sources(&self) -> Vec<Vec<String>> {
        self.plan.rewards.sources()
    }

    fn phase_times(&self) -> BTreeMap<String, f64> {
        self.times.clone()
    }
}

impl<S> OverlappedSampler<S> {
    /// Groups of `group_size`, at most `rows_per_call` samples at a time (but always whole groups).
    pub fn new(rewards: impl Into<Arc<RewardSet<S>>>, group_size: GroupSize, rows_per_call: usize) -> Self {
        Self { plan: Plan::new(rewards.into(), group_size, rows_per_call), times: BTreeMap::new() }
    }

    /// As [`GroupSampler::on_failed`].
    #[must_use]
    pub fn on_failed(mut self, failed: FailedScores) -> Self {
        self.plan.failed = failed;
        self
    }
}

impl<P: Policy> Rollout<P> for OverlappedSampler<P::Sample> {
    fn collect(&mut self, policy: &P, prompts: &[IndexedPrompt<'_>], seed: Seed) -> Result<Vec<Group<P>>> {
        self.plan.ask_for(prompts);
        let plan = &self.plan;
        let (sampling, scored) = std::thread::scope(|scope| {
            let (to_scorer, chunks) = crossbeam_channel::bounded::<Vec<Group<P>>>(2);
            let scorer = scope.spawn(move || plan.score_all(&chunks));
            let sampling = plan.sample_all(policy, prompts, seed, &to_scorer);
            drop(to_scorer);
            let scored = scorer.join().unwrap_or_else(|panic| {
                let message = format!("the scoring thread panicked: {}", message_of(panic.as_ref()));
                Err(Error::Contract { what: "rollout".into(), message })
            });
            (sampling, scored)
        });
        let (sampling, (groups, scoring)) = (sampling?, scored?);
        self.times = BTreeMap::from([("sample".into(), sampling), ("score".into(), scoring)]);
        Ok(groups)
    }

    fn reward_names(&self) -> Vec<String> {
        self.plan.reward_names()
    }

    fn reward_weights(&self) -> Vec<f32> {
        self.plan.rewards.weights()
    }

    fn reward_sources(&self) -> Vec<Vec<String>> {
        self.plan.rewards.sources()
    }

    fn phase_times(&self) -> BTreeMap<String, f64> {
        self.times.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reward_fn;
    use crate::testing::ToyPolicy;

    fn rewards() -> RewardSet<String> {
        let vowels = reward_fn("vowels", |_: &Prompt, text: &String| {
            Ok(text.chars().filter(|c| "aeiou".contains(*c)).count() as f32)
        });
        RewardSet::new().with(vowels, 1.0).unwrap()
    }

    fn texts(rollout: &mut dyn Rollout<ToyPolicy>) -> Vec<(usize, Vec<String>, Vec<u32>)> {
        let policy = ToyPolicy::new(6, 4).unwrap();
        let prompts: Vec<Prompt> = (0..5).map(|i| Prompt::new(format!("prompt {i}"))).collect();
        let batch: Vec<IndexedPrompt<'_>> = prompts.iter().enumerate().collect();
        let groups = rollout.collect(&policy, &batch, Seed::new(1)).unwrap();
        let row = |group: Group<ToyPolicy>| {
            let rewards = group.rewards();
            let (texts, log_probs): (Vec<_>, Vec<_>) =
                group.completions.into_iter().map(|c| (c.sample, c.log_probs)).unzip();
            (group.prompt_idx, texts, rewards.into_iter().chain(log_probs.concat()).map(f32::to_bits).collect())
        };
        groups.into_iter().map(row).collect()
    }

    #[test]
    fn neither_chunks_nor_threads_change_the_groups() {
        let size = GroupSize::new(3).unwrap();
        let whole = texts(&mut GroupSampler::new(rewards(), size, 100));
        assert_eq!(whole, texts(&mut GroupSampler::new(rewards(), size, 1)));
        assert_eq!(whole, texts(&mut OverlappedSampler::new(rewards(), size, 4)));
    }

    /// The first chunk's score is not given before the second chunk has been sampled, so in turn it never would be.
    #[test]
    fn scoring_runs_while_the_next_chunk_is_sampled() {
        struct Signals(ToyPolicy, Sender<()>);
        impl Policy for Signals {
            type Trace = <ToyPolicy as Policy>::Trace;
            type Sample = String;
            fn sample(&self, requests: &[Request<'_>]) -> Result<Vec<Completion<Self>>, crate::BoxError> {
                let sampled = self.0.sample(requests)?;
                self.1.send(())?;
                let same =
                    |c: Completion<ToyPolicy>| Completion { sample: c.sample, trace: c.trace, log_probs: c.log_probs };
                Ok(sampled.into_iter().map(same).collect())
            }
            fn log_probs(&self, rows: &[(&Prompt, &Self::Trace)]) -> Result<crate::LogProbs, crate::BoxError> {
                self.0.log_probs(rows)
            }
            fn params(&self) -> crate::Params {
                self.0.params()
            }
        }
        let (sampled, seen) = crossbeam_channel::unbounded();
        let both = std::sync::OnceLock::new();
        let waits = reward_fn("waits", move |_: &Prompt, _: &String| {
            let patience = std::time::Duration::from_secs(60);
            let second = || (0..2).all(|_| seen.recv_timeout(patience).is_ok());
            Ok(f32::from(u8::from(*both.get_or_init(second))))
        });
        let prompt = Prompt::new("any");
        let batch: Vec<IndexedPrompt<'_>> = (0..2).map(|i| (i, &prompt)).collect();
        let policy = Signals(ToyPolicy::new(6, 4).unwrap(), sampled);
        let rewards = RewardSet::new().with(waits, 1.0).unwrap();
        let mut rollout = OverlappedSampler::new(rewards, GroupSize::new(2).unwrap(), 2);
        let groups = rollout.collect(&policy, &batch, Seed::new(1)).unwrap();
        assert_eq!(groups[0].rewards(), [1.0, 1.0], "the second chunk was not sampled while the first was scored");
    }

    #[test]
    fn a_replacement_is_measured_against_its_step() {
        let rewards = || {
            let fails = |prompt: &Prompt, _: &String| if prompt.text == "bad" { Err("gone".into()) } else { Ok(1.0) };
            RewardSet::new().with(reward_fn("fails", fails), 1.0).unwrap()
        };
        let policy = ToyPolicy::new(6, 4).unwrap();
        let (good, bad) = (Prompt::new("good"), Prompt::new("bad"));
        let step: Vec<IndexedPrompt<'_>> = (0..8).map(|i| (i, &good)).collect();
        let size = GroupSize::new(2).unwrap();
        let mut rollout = GroupSampler::new(rewards(), size, 4).on_failed(FailedScores::Exclude { max_share: 0.2 });
        assert!(rollout.collect(&policy, &[(8, &bad)], Seed::new(1)).is_err(), "2 of 2");
        rollout.collect(&policy, &step, Seed::new(1)).unwrap();
        let replaced = rollout.collect(&policy, &[(8, &bad)], Seed::new(1)).unwrap();
        assert_eq!(replaced[0].excluded.len(), 2, "2 of the step's 16");
    }

    #[test]
    fn a_failing_reward_stops_the_overlapped_rollout_with_its_name() {
        let failing = reward_fn("broken", |_: &Prompt, _: &String| Err("the model is gone".into()));
        let rewards = RewardSet::new().with(failing, 1.0).unwrap();
        let policy = ToyPolicy::new(6, 4).unwrap();
        let prompt = Prompt::new("any");
        let batch: Vec<IndexedPrompt<'_>> = (0..20).map(|i| (i, &prompt)).collect();
        let mut rollout = OverlappedSampler::new(rewards, GroupSize::new(2).unwrap(), 2);
        let error = rollout.collect(&policy, &batch, Seed::new(1)).err().unwrap().to_string();
        assert_eq!(error, "reward `broken`: the model is gone");
    }

    #[test]
    fn a_group_of_one_is_refused_while_parsing() {
        let error = serde_json::from_str::<GroupSize>("1").unwrap_err().to_string();
        assert_eq!(error, "group_size is 1; a group needs at least 2");
    }
}
