//! Arithmetic of rewards: changed, gated and joined scores, each a reward like any other.
//!
//! What is logged under a reward's name is the score that counts, that is, after its changes. Normalisation within the
//! group (z-scores, ranks) needs the group and is the objective's: see [`Combine`](crate::Combine).
//! A score that is not finite passes every change as it is, so that it is found and not hidden.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Failed, Reward, RewardSet};
use crate::{BoxError, Error, Prompt, Result};

/// One step of arithmetic on a score.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Change {
    /// Cut to `[low, high]`.
    Clip {
        /// The least score.
        low: f32,
        /// The greatest.
        high: f32,
    },
    /// `scale · score + offset`.
    Affine {
        /// The factor.
        #[serde(default = "one")]
        scale: f32,
        /// What is added.
        #[serde(default)]
        offset: f32,
    },
    /// `(score − mean) / std`, a z-score by statistics that were measured once.
    Standardise {
        /// The mean of the scores on a sample of the policy's images.
        mean: f32,
        /// Their standard deviation.
        std: f32,
    },
    /// 1 where the score is at least this, else 0.
    AtLeast(f32),
}

fn one() -> f32 {
    1.0
}

impl Change {
    /// Refuses numbers that cannot be meant.
    pub fn check(&self) -> Result<()> {
        let finite = |values: &[f32]| values.iter().all(|value| value.is_finite());
        let (holds, must) = match *self {
            Self::Clip { low, high } => (finite(&[low, high]) && low < high, "two finite numbers, low below high"),
            Self::Affine { scale, offset } => (finite(&[scale, offset]) && scale != 0.0, "a scale that is not 0"),
            Self::Standardise { mean, std } => (finite(&[mean, std]) && std > 0.0, "a std above 0"),
            Self::AtLeast(limit) => (limit.is_finite(), "a finite number"),
        };
        if holds { Ok(()) } else { Err(Error::config(format!("change of a reward is {self:?}; give {must}"))) }
    }

    fn of(self, score: f32) -> f32 {
        match self {
            _ if !score.is_finite() => score,
            Self::Clip { low, high } => score.clamp(low, high),
            Self::Affine { scale, offset } => scale * score + offset,
            Self::Standardise { mean, std } => (score - mean) / std,
            Self::AtLeast(limit) => f32::from(score >= limit),
        }
    }
}

/// A reward whose scores go through changes, in order.
///
/// ```
/// use grpo::{Change, Changed, Prompt, Reward, reward_fn};
///
/// let length = reward_fn("length", |_: &Prompt, text: &String| Ok(text.len() as f32));
/// let clipped = Changed::new(length, vec![Change::Clip { low: 0.0, high: 4.0 }])?;
/// assert_eq!(clipped.score(&Prompt::new("any"), &"a long text".to_string()).unwrap(), 4.0);
/// # Ok::<(), grpo::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Changed<R> {
    reward: R,
    changes: Vec<Change>,
}

impl<R> Changed<R> {
    /// The reward after these changes.
    pub fn new(reward: R, changes: Vec<Change>) -> Result<Self> {
        changes.iter().try_for_each(Change::check)?;
        Ok(Self { reward, changes })
    }

    fn of(&self, score: f32) -> f32 {
        self.changes.iter().fold(score, |score, change| change.of(score))
    }
}

impl<S, R: Reward<S>> Reward<S> for Changed<R> {
    fn name(&self) -> &str {
        self.reward.name()
    }

    fn score(&self, prompt: &Prompt, sample: &S) -> Result<f32, BoxError> {
        self.reward.score(prompt, sample).map(|score| self.of(score))
    }

    fn score_batch(&self, batch: &[(&Prompt, &S)]) -> Result<Vec<f32>, BoxError> {
        Ok(self.reward.score_batch(batch)?.into_iter().map(|score| self.of(score)).collect())
    }

    fn score_each(&self, batch: &[(&Prompt, &S)]) -> Vec<Result<f32, BoxError>> {
        self.reward.score_each(batch).into_iter().map(|score| Ok(self.of(score?))).collect()
    }

    fn applies_to(&self, prompt: &Prompt) -> bool {
        self.reward.applies_to(prompt)
    }

    fn sources(&self) -> Vec<String> {
        let changed = (!self.changes.is_empty()).then(|| format!("{} after changes", self.reward.name()));
        self.reward.sources().into_iter().chain(changed).collect()
    }
}

/// A reward that counts only where another one, the gate, gives at least a threshold.
///
/// The gate judges first, so samples that it keeps out are never shown to the reward. Where the gate does not apply to a
/// prompt, it stands open.
pub struct Gated<S> {
    reward: Box<dyn Reward<S>>,
    gate: Box<dyn Reward<S>>,
    at_least: f32,
    otherwise: f32,
}

impl<S> Gated<S> {
    /// `reward` where `gate` gives at least `at_least`; `otherwise` elsewhere.
    pub fn new(reward: Box<dyn Reward<S>>, gate: Box<dyn Reward<S>>, at_least: f32, otherwise: f32) -> Result<Self> {
        if at_least.is_finite() && otherwise.is_finite() {
            return Ok(Self { reward, gate, at_least, otherwise });
        }
        Err(Error::config(format!(
            "gate of reward `{}` has at_least {at_least} and otherwise {otherwise}; give finite numbers",
            reward.name()
        )))
    }

    fn ask(&self, batch: &[(&Prompt, &S)], how: How) -> Result<Vec<Result<f32, BoxError>>, BoxError> {
        let gate = self.gate.name();
        let kept_out = |opened: Option<Result<f32, BoxError>>| match opened {
            Some(Err(error)) => Some(Err(format!("its gate `{gate}` failed: {error}").into())),
            Some(Ok(score)) if !score.is_finite() => Some(Err(format!("its gate `{gate}` scored {score}").into())),
            Some(Ok(score)) if score < self.at_least => Some(Ok(self.otherwise)),
            _ => None,
        };
        let kept_out: Vec<Option<Result<f32, BoxError>>> =
            asked(self.gate.as_ref(), batch, how)?.into_iter().map(kept_out).collect();
        let shown: Vec<(&Prompt, &S)> =
            batch.iter().zip(&kept_out).filter(|(_, out)| out.is_none()).map(|(row, _)| *row).collect();
        let mut scores = how.of(self.reward.as_ref(), &shown)?.into_iter();
        let missing = || Err("its score was lost".into());
        Ok(kept_out.into_iter().map(|out| out.unwrap_or_else(|| scores.next().unwrap_or_else(missing))).collect())
    }
}

impl<S> Reward<S> for Gated<S> {
    fn name(&self) -> &str {
        self.reward.name()
    }

    fn score(&self, prompt: &Prompt, sample: &S) -> Result<f32, BoxError> {
        self.score_each(&[(prompt, sample)]).pop().unwrap_or_else(|| Err("nothing was scored".into()))
    }

    fn score_batch(&self, batch: &[(&Prompt, &S)]) -> Result<Vec<f32>, BoxError> {
        self.ask(batch, How::Together)?.into_iter().collect()
    }

    fn score_each(&self, batch: &[(&Prompt, &S)]) -> Vec<Result<f32, BoxError>> {
        spread(self.ask(batch, How::Each), batch.len())
    }

    fn applies_to(&self, prompt: &Prompt) -> bool {
        self.reward.applies_to(prompt)
    }

    fn sources(&self) -> Vec<String> {
        [self.reward.sources(), self.gate.sources()].concat()
    }
}

/// How several scores become one, where all of them must be good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Joining {
    /// The worst of them.
    Lowest,
    /// Their product; meant for scores in `[0, 1]`.
    Product,
}

/// Several rewards as one, by [`Joining`]; those that do not apply to a prompt are left out of it.
///
/// A weighted sum is what a [`RewardSet`](super::RewardSet) makes, which logs its members one by one.
pub struct Joined<S> {
    name: String,
    rewards: Vec<Box<dyn Reward<S>>>,
    joining: Joining,
}

impl<S> Joined<S> {
    /// Two rewards or more under one name.
    pub fn new(name: impl Into<String>, rewards: Vec<Box<dyn Reward<S>>>, joining: Joining) -> Result<Self> {
        let name = name.into();
        if rewards.len() < 2 {
            return Err(Error::config(format!("reward `{name}` joins {}; name at least 2", rewards.len())));
        }
        Ok(Self { name, rewards, joining })
    }

    fn ask(&self, batch: &[(&Prompt, &S)], how: How) -> Result<Vec<Result<f32, BoxError>>, BoxError> {
        let mut joined: Vec<Option<Result<f32, BoxError>>> = batch.iter().map(|_| None).collect();
        for reward in &self.rewards {
            for (joined, score) in joined.iter_mut().zip(asked(reward.as_ref(), batch, how)?) {
                *joined = match (joined.take(), score) {
                    (before, None) => before,
                    (Some(Err(error)), _) => Some(Err(error)),
                    (_, Some(Err(error))) => Some(Err(format!("`{}` failed: {error}", reward.name()).into())),
                    (None, Some(Ok(score))) => Some(Ok(score)),
                    (Some(Ok(before)), Some(Ok(score))) => Some(Ok(self.joining.of(before, score))),
                };
            }
        }
        let missing = || Err(format!("no reward of `{}` applies", self.name).into());
        Ok(joined.into_iter().map(|score| score.unwrap_or_else(missing)).collect())
    }
}

impl Joining {
    fn of(self, a: f32, b: f32) -> f32 {
        match self {
            _ if !a.is_finite() => a,
            _ if !b.is_finite() => b,
            Self::Lowest => a.min(b),
            Self::Product => a * b,
        }
    }
}

impl<S> Reward<S> for Joined<S> {
    fn name(&self) -> &str {
        &self.name
    }

    fn score(&self, prompt: &Prompt, sample: &S) -> Result<f32, BoxError> {
        self.score_each(&[(prompt, sample)]).pop().unwrap_or_else(|| Err("nothing was scored".into()))
    }

    fn score_batch(&self, batch: &[(&Prompt, &S)]) -> Result<Vec<f32>, BoxError> {
        self.ask(batch, How::Together)?.into_iter().collect()
    }

    fn score_each(&self, batch: &[(&Prompt, &S)]) -> Vec<Result<f32, BoxError>> {
        spread(self.ask(batch, How::Each), batch.len())
    }

    fn applies_to(&self, prompt: &Prompt) -> bool {
        self.rewards.iter().any(|reward| reward.applies_to(prompt))
    }

    fn sources(&self) -> Vec<String> {
        let parts = self.rewards.iter().flat_map(|reward| reward.sources());
        std::iter::once(self.name.clone()).chain(parts).collect()
    }
}

/// A whole mix as one reward, which scores the weighted sum: to watch on held-out prompts exactly what is optimised.
pub struct Mixed<S> {
    name: String,
    rewards: Arc<RewardSet<S>>,
}

impl<S> Mixed<S> {
    /// The mix under a name.
    pub fn new(name: impl Into<String>, rewards: impl Into<Arc<RewardSet<S>>>) -> Self {
        Self { name: name.into(), rewards: rewards.into() }
    }
}

impl<S> Reward<S> for Mixed<S> {
    fn name(&self) -> &str {
        &self.name
    }

    fn score(&self, prompt: &Prompt, sample: &S) -> Result<f32, BoxError> {
        self.score_each(&[(prompt, sample)]).pop().unwrap_or_else(|| Err("nothing was scored".into()))
    }

    fn score_batch(&self, batch: &[(&Prompt, &S)]) -> Result<Vec<f32>, BoxError> {
        Ok(self.rewards.score(batch)?.into_iter().map(|scores| scores.total).collect())
    }

    fn score_each(&self, batch: &[(&Prompt, &S)]) -> Vec<Result<f32, BoxError>> {
        let failed = |failed: Failed| format!("`{}` failed: {}", failed.reward, failed.why).into();
        let rows = self.rewards.score_each(batch).map_err(BoxError::from);
        let rows =
            rows.map(|rows| rows.into_iter().map(|row| row.map(|scores| scores.total).map_err(failed)).collect());
        spread(rows, batch.len())
    }

    fn applies_to(&self, prompt: &Prompt) -> bool {
        self.rewards.applies_to(prompt)
    }

    fn sources(&self) -> Vec<String> {
        let parts = self.rewards.sources().into_iter().flatten();
        std::iter::once(self.name.clone()).chain(parts).collect()
    }
}

/// Whether a failure is the batch's or the sample's.
#[derive(Clone, Copy)]
enum How {
    Together,
    Each,
}

impl How {
    fn of<S>(self, reward: &dyn Reward<S>, batch: &[(&Prompt, &S)]) -> Result<Vec<Result<f32, BoxError>>, BoxError> {
        let scores = match (self, batch) {
            (_, []) => Vec::new(),
            (Self::Together, _) => reward.score_batch(batch)?.into_iter().map(Ok).collect(),
            (Self::Each, _) => reward.score_each(batch),
        };
        if scores.len() == batch.len() {
            return Ok(scores);
        }
        Err(format!("`{}` returned {} scores for {} samples", reward.name(), scores.len(), batch.len()).into())
    }
}

/// One reward's scores of a batch; `None` where it does not apply.
fn asked<S>(
    reward: &dyn Reward<S>,
    batch: &[(&Prompt, &S)],
    how: How,
) -> Result<Vec<Option<Result<f32, BoxError>>>, BoxError> {
    let applies: Vec<bool> = batch.iter().map(|(prompt, _)| reward.applies_to(prompt)).collect();
    let chosen: Vec<(&Prompt, &S)> =
        batch.iter().zip(&applies).filter(|(_, applies)| **applies).map(|(row, _)| *row).collect();
    let mut scores = how.of(reward, &chosen)?.into_iter();
    Ok(applies.into_iter().map(|applies| if applies { scores.next() } else { None }).collect())
}

/// A failure of the whole batch is one of each of its samples.
fn spread(scores: Result<Vec<Result<f32, BoxError>>, BoxError>, n_samples: usize) -> Vec<Result<f32, BoxError>> {
    scores.unwrap_or_else(|error| {
        let message = error.to_string();
        (0..n_samples).map(|_| Err(message.clone().into())).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{RewardFn, reward_fn};

    fn value() -> RewardFn<impl Fn(&Prompt, &f32) -> Result<f32, BoxError> + Send + Sync> {
        reward_fn("value", |_: &Prompt, x: &f32| if *x == 13.0 { Err("unlucky".into()) } else { Ok(*x) })
    }

    /// The scores of `samples`, together where that works and else one by one; an error as its text.
    fn of(reward: &dyn Reward<f32>, samples: &[f32]) -> Vec<Result<f32, String>> {
        let prompt = Prompt::new("any");
        let batch: Vec<(&Prompt, &f32)> = samples.iter().map(|x| (&prompt, x)).collect();
        let each: Vec<Result<f32, String>> =
            reward.score_each(&batch).into_iter().map(|score| score.map_err(|error| error.to_string())).collect();
        let together: Result<Vec<f32>, String> = reward.score_batch(&batch).map_err(|error| error.to_string());
        match each.iter().find(|score| score.is_err()) {
            None => assert_eq!(together.unwrap().len(), each.len()),
            Some(_) => assert!(together.is_err(), "a failure must not pass in a batch"),
        }
        for (sample, each) in samples.iter().zip(&each) {
            assert_eq!(format!("{each:?}"), format!("{:?}", reward.score(&prompt, sample).map_err(|e| e.to_string())));
        }
        each
    }

    #[test]
    fn what_has_a_say_is_named() {
        let boxed = |name: &str| -> Box<dyn Reward<f32>> { Box::new(reward_fn(name, |_: &Prompt, x: &f32| Ok(*x))) };
        let gated = Gated::new(boxed("a"), boxed("gate"), 0.5, 0.0).unwrap();
        let changed = Changed::new(gated, vec![Change::AtLeast(0.5)]).unwrap();
        assert_eq!(changed.sources(), ["a", "gate", "a after changes"]);
        let mix = RewardSet::new().with(boxed("a"), 1.0).unwrap().with(boxed("b"), -2.0).unwrap();
        let mixed = Mixed::new("optimised", mix);
        assert_eq!(mixed.sources(), ["optimised", "a", "b"]);
        assert_eq!(of(&mixed, &[1.0, 3.0]), [Ok(-1.0), Ok(-3.0)]);
        let joined = Joined::new("both", vec![boxed("a"), boxed("b")], Joining::Lowest).unwrap();
        assert_eq!(joined.sources(), ["both", "a", "b"]);
    }

    #[test]
    fn changes_are_applied_in_order() {
        let check = |changes: Vec<Change>, expected: [f32; 3]| {
            let scores = of(&Changed::new(value(), changes.clone()).unwrap(), &[-1.0, 0.5, 3.0]);
            assert_eq!(scores, expected.map(Ok), "{changes:?}");
        };
        let clip = Change::Clip { low: 0.0, high: 1.0 };
        let double = Change::Affine { scale: 2.0, offset: 1.0 };
        check(vec![], [-1.0, 0.5, 3.0]);
        check(vec![clip], [0.0, 0.5, 1.0]);
        check(vec![clip, double], [1.0, 2.0, 3.0]);
        check(vec![double, clip], [0.0, 1.0, 1.0]);
        check(vec![Change::Standardise { mean: 1.0, std: 0.5 }], [-4.0, -1.0, 4.0]);
        check(vec![Change::AtLeast(0.5)], [0.0, 1.0, 1.0]);
    }

    #[test]
    fn what_is_not_finite_passes_every_change() {
        let all = [
            Change::Clip { low: 0.0, high: 1.0 },
            Change::AtLeast(0.5),
            Change::Affine { scale: 2.0, offset: 1.0 },
            Change::Standardise { mean: 0.0, std: 1.0 },
        ];
        for change in all {
            let changed = Changed::new(value(), vec![change]).unwrap();
            assert!(of(&changed, &[f32::NAN])[0].clone().unwrap().is_nan(), "{change:?}");
            assert_eq!(of(&changed, &[f32::INFINITY])[0], Ok(f32::INFINITY), "{change:?}");
        }
    }

    #[test]
    fn a_change_that_cannot_be_meant_is_refused() {
        let error = |change| Changed::new(value(), vec![change]).err().unwrap().to_string();
        assert_eq!(
            error(Change::Clip { low: 1.0, high: 1.0 }),
            "change of a reward is Clip { low: 1.0, high: 1.0 }; give two finite numbers, low below high"
        );
        assert!(error(Change::Standardise { mean: 0.0, std: 0.0 }).ends_with("give a std above 0"));
        assert!(error(Change::Affine { scale: 0.0, offset: 1.0 }).ends_with("give a scale that is not 0"));
        assert!(error(Change::AtLeast(f32::NAN)).ends_with("give a finite number"));
    }

    #[test]
    fn a_gate_keeps_samples_from_the_reward() {
        let sign = || Box::new(reward_fn("sign", |_: &Prompt, x: &f32| Ok(if x.is_nan() { *x } else { x.signum() })));
        let judge = reward_fn("judge", |_: &Prompt, x: &f32| match *x < 0.0 {
            true => Err("shown what the gate keeps out".into()),
            false => Ok(10.0 * x),
        });
        let gated = Gated::new(Box::new(judge), sign(), 0.0, -5.0).unwrap();
        assert_eq!(of(&gated, &[2.0, -1.0, 0.5, -2.0]), [Ok(20.0), Ok(-5.0), Ok(5.0), Ok(-5.0)]);
        assert_eq!(of(&gated, &[1.0, f32::NAN])[1], Err("its gate `sign` scored NaN".into()));
        let broken = Gated::new(sign(), Box::new(value()), 0.0, 0.0).unwrap();
        assert_eq!(of(&broken, &[2.0, 13.0, 3.0]), [Ok(1.0), Err("its gate `value` failed: unlucky".into()), Ok(1.0)]);
    }

    /// Has a say on prompts that name it.
    struct Named(&'static str, f32);

    impl Reward<f32> for Named {
        fn name(&self) -> &str {
            self.0
        }
        fn score(&self, _: &Prompt, x: &f32) -> Result<f32, BoxError> {
            Ok(self.1 * x)
        }
        fn applies_to(&self, prompt: &Prompt) -> bool {
            prompt.text.contains(self.0)
        }
    }

    #[test]
    fn joined_rewards_leave_out_those_that_do_not_apply() {
        let both = |joining| Joined::new("both", vec![Box::new(Named("a", 2.0)), Box::new(Named("b", -1.0))], joining);
        let [a, ab, none] = ["a", "a b", ""].map(Prompt::new);
        for (joining, expected) in [(Joining::Lowest, [6.0, -3.0]), (Joining::Product, [6.0, -18.0])] {
            let joined = both(joining).unwrap();
            assert_eq!(joined.score_batch(&[(&a, &3.0), (&ab, &3.0)]).unwrap(), expected);
            assert!(joined.applies_to(&a) && !joined.applies_to(&none));
        }
        let alone = Joined::<f32>::new("one", vec![Box::new(Named("a", 1.0))], Joining::Lowest).err().unwrap();
        assert_eq!(alone.to_string(), "reward `one` joins 1; name at least 2");
    }

    #[test]
    fn a_joined_failure_names_its_reward_and_no_number_is_never_lost() {
        let other = || Box::new(reward_fn("other", |_: &Prompt, x: &f32| Ok(-x)));
        for joining in [Joining::Lowest, Joining::Product] {
            let rewards: Vec<Box<dyn Reward<f32>>> = vec![other(), Box::new(value())];
            let joined = Joined::new("both", rewards, joining).unwrap();
            let scores = of(&joined, &[1.0, 13.0, f32::NAN]);
            assert_eq!(scores[..2], [Ok(-1.0), Err("`value` failed: unlucky".into())]);
            assert!(scores[2].clone().unwrap().is_nan(), "{joining:?}");
            for infinite in [f32::INFINITY, f32::NEG_INFINITY] {
                assert!(of(&joined, &[infinite])[0].clone().unwrap().is_infinite(), "{joining:?}");
            }
            assert_eq!([joining.of(f32::INFINITY, 0.5), joining.of(0.5, f32::INFINITY)], [f32::INFINITY; 2]);
        }
    }

    #[test]
    fn a_closed_gate_does_not_apply_where_its_reward_does_not() {
        let gated = Gated::new(Box::new(Named("a", 1.0)), Box::new(Named("b", 1.0)), 5.0, 0.0).unwrap();
        let [a, ab, b] = ["a", "a b", "b"].map(Prompt::new);
        assert!(gated.applies_to(&a) && !gated.applies_to(&b));
        assert_eq!(gated.score_batch(&[(&a, &3.0), (&ab, &3.0), (&ab, &7.0)]).unwrap(), [3.0, 0.0, 7.0]);
    }
}
