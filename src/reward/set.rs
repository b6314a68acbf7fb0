//! Rewards with their weights, what they give each sample, and what becomes of a sample that one of them fails on.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use serde::{Deserialize, Serialize};

use super::Reward;
use crate::{BoxError, Error, Prompt, Result};

/// Rewards with their weights: the only place where several scores become one.
pub struct RewardSet<S> {
    members: Vec<Member<S>>,
}

struct Member<S> {
    reward: Box<dyn Reward<S>>,
    weight: f32,
}

/// What a [`RewardSet`] gave one sample.
#[derive(Clone, Debug, PartialEq)]
pub struct Scores {
    /// One score per reward, in the order of [`RewardSet::names`]; `None` where it does not apply.
    pub values: Vec<Option<f32>>,
    /// The weighted sum over the rewards that apply.
    pub total: f32,
}

/// A sample that a reward could not judge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failed {
    /// The reward's name.
    pub reward: String,
    /// What it did.
    pub why: String,
}

/// One value a reward, or a row: a score, a failure, or `None` where the reward does not apply.
pub type Apart = Vec<Option<Result<f32, Failed>>>;

/// What becomes of a sample whose score is missing or not finite: never a score of 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum FailedScores {
    /// The run stops with an error that names the reward and what it said; where a score is not finite, the prompt too.
    #[default]
    Error,
    /// The sample leaves its group, whose other advantages are those of a group without it; it is counted and named.
    Exclude {
        /// The share of a step's samples that may fail before the run stops after all; of a held-out evaluation's
        /// likewise. Groups drawn anew count by themselves, against the same number.
        #[serde(default = "tenth")]
        max_share: f64,
    },
}

fn tenth() -> f64 {
    0.1
}

impl FailedScores {
    /// Refuses a share that cannot be meant.
    pub fn check(&self) -> Result<()> {
        match self {
            Self::Exclude { max_share } if !(0.0..1.0).contains(max_share) => Err(Error::config(format!(
                "failed_scores.exclude.max_share is {max_share}; give a share of at least 0 and below 1"
            ))),
            _ => Ok(()),
        }
    }
}

impl<S> Default for RewardSet<S> {
    fn default() -> Self {
        Self::new()
    }
}

impl<S> RewardSet<S> {
    /// A set without rewards; scoring with it is an error.
    pub fn new() -> Self {
        Self { members: Vec::new() }
    }

    /// Adds a reward; names must differ and weights be finite.
    pub fn with(mut self, reward: impl Reward<S> + 'static, weight: f32) -> Result<Self> {
        let name = reward.name();
        if !weight.is_finite() {
            return Err(Error::config(format!("weight of reward `{name}` is {weight}; give a finite number")));
        }
        if name.is_empty() || self.names().any(|other| other == name) {
            return Err(Error::config(format!(
                "reward name `{name}` is empty or taken; give each reward its own name"
            )));
        }
        self.members.push(Member { reward: Box::new(reward), weight });
        Ok(self)
    }

    /// The names, in the order of the scores' columns.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.members.iter().map(|member| member.reward.name())
    }

    /// The weights, in the order of the names.
    pub fn weights(&self) -> Vec<f32> {
        self.members.iter().map(|member| member.weight).collect()
    }

    /// The names of all that has a say in each reward, itself, its gate and its parts, in the order of [`RewardSet::names`].
    pub fn sources(&self) -> Vec<Vec<String>> {
        self.members.iter().map(|member| member.reward.sources()).collect()
    }

    /// Whether a reward has a say on this prompt.
    pub fn applies_to(&self, prompt: &Prompt) -> bool {
        self.members.iter().any(|member| member.reward.applies_to(prompt))
    }

    /// How many rewards there are.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// Scores every row with every reward that applies to its prompt.
    ///
    /// An error names the reward where a score is missing or not finite or where it panics, and the prompt where one score
    /// is at fault or no reward applies.
    pub fn score(&self, batch: &[(&Prompt, &S)]) -> Result<Vec<Scores>> {
        self.check(batch)?;
        let column = |member: &Member<S>| member.column(batch, |rows| member.checked_scores(rows));
        let columns: Vec<Vec<Option<f32>>> = self.members.iter().map(column).collect::<Result<_>>()?;
        Ok((0..batch.len()).map(|row| self.sum(columns.iter().map(|column| column[row]).collect())).collect())
    }

    /// As [`RewardSet::score`], with a failure for each sample that a reward could not judge; the first reward that
    /// failed is named.
    pub fn score_each(&self, batch: &[(&Prompt, &S)]) -> Result<Vec<Result<Scores, Failed>>> {
        let sum = |row: Apart| {
            let values: Result<Vec<Option<f32>>, Failed> = row.into_iter().map(Option::transpose).collect();
            values.map(|values| self.sum(values))
        };
        Ok(self.score_apart(batch)?.into_iter().map(sum).collect())
    }

    /// Every row's scores by reward, each with a failure of its own; `None` where a reward does not apply.
    pub fn score_apart(&self, batch: &[(&Prompt, &S)]) -> Result<Vec<Apart>> {
        self.check(batch)?;
        let column = |member: &Member<S>| member.column(batch, |rows| Ok(member.each_score(rows)));
        let columns: Vec<Apart> = self.members.iter().map(column).collect::<Result<_>>()?;
        let mut columns: Vec<_> = columns.into_iter().map(Vec::into_iter).collect();
        Ok(batch.iter().map(|_| columns.iter_mut().map(|column| column.next().flatten()).collect()).collect())
    }

    /// That there is a reward, and one for every prompt.
    fn check(&self, batch: &[(&Prompt, &S)]) -> Result<()> {
        if self.members.is_empty() {
            return Err(Error::config("the reward set is empty; add at least one reward"));
        }
        match batch.iter().find(|(prompt, _)| !self.applies_to(prompt)) {
            None => Ok(()),
            Some((prompt, _)) => Err(Error::config(format!(
                "no reward applies to prompt `{}`; add one that does, or leave the prompt out",
                prompt.text
            ))),
        }
    }

    fn sum(&self, values: Vec<Option<f32>>) -> Scores {
        let parts = self.members.iter().zip(&values).filter_map(|(member, value)| Some(member.weight * (*value)?));
        Scores { total: parts.fold(0.0, |total, part| total + part), values }
    }
}

impl<S> Member<S> {
    /// One entry a row, `None` where the reward does not apply; `ask` sees the rows to which it does.
    fn column<T>(
        &self,
        batch: &[(&Prompt, &S)],
        ask: impl FnOnce(&[(&Prompt, &S)]) -> Result<Vec<T>>,
    ) -> Result<Vec<Option<T>>> {
        let applies: Vec<bool> = batch.iter().map(|(prompt, _)| self.reward.applies_to(prompt)).collect();
        let rows = batch.iter().zip(&applies).filter(|(_, applies)| **applies).map(|(row, _)| *row);
        let mut given = ask(&rows.collect::<Vec<_>>())?.into_iter();
        Ok(applies.into_iter().map(|applies| if applies { given.next() } else { None }).collect())
    }

    fn checked_scores(&self, batch: &[(&Prompt, &S)]) -> Result<Vec<f32>> {
        if batch.is_empty() {
            return Ok(Vec::new());
        }
        let name = self.reward.name();
        let scores = guarded(|| self.reward.score_batch(batch)).and_then(|scores| scores);
        let scores = scores.map_err(|source| Error::reward(name, source))?;
        let fault = |message| Error::Reward { name: name.into(), message, source: None };
        if scores.len() != batch.len() {
            return Err(fault(miscounted(scores.len(), batch.len())));
        }
        match scores.iter().position(|score| !score.is_finite()) {
            None => Ok(scores),
            Some(row) => Err(fault(format!(
                "scored {} for prompt `{}` (row {row} of its batch); return a finite number, or `false` from `applies_to`",
                scores[row], batch[row].0.text
            ))),
        }
    }

    /// One finite score, or what went wrong, for each row.
    fn each_score(&self, batch: &[(&Prompt, &S)]) -> Vec<Result<f32, Failed>> {
        if batch.is_empty() {
            return Vec::new();
        }
        let failed = |why: String| Failed { reward: self.reward.name().into(), why };
        let checked = |score: Result<f32, BoxError>| match score {
            Ok(score) if score.is_finite() => Ok(score),
            Ok(score) => Err(failed(format!("scored {score}"))),
            Err(error) => Err(failed(error.to_string())),
        };
        match guarded(|| self.reward.score_each(batch)) {
            Ok(scores) if scores.len() == batch.len() => scores.into_iter().map(checked).collect(),
            Ok(scores) => vec![Err(failed(miscounted(scores.len(), batch.len()))); batch.len()],
            // What panics on one sample of a batch has judged none of it.
            Err(panic) if batch.len() == 1 => vec![Err(failed(panic.to_string()))],
            Err(_) => batch.chunks(1).flat_map(|one| self.each_score(one)).collect(),
        }
    }
}

fn miscounted(n_scores: usize, n_samples: usize) -> String {
    format!("returned {n_scores} scores for {n_samples} samples; return one per sample, in order")
}

/// What `work` gives, or its panic as an error: a researcher's scorer must not take the run with it.
fn guarded<T>(work: impl FnOnce() -> T) -> Result<T, BoxError> {
    // The scorer is only asked again, through a shared reference: what it left half done is its own.
    catch_unwind(AssertUnwindSafe(work)).map_err(|panic| format!("panicked: {}", message_of(panic.as_ref())).into())
}

/// The text that a panic was raised with.
pub(crate) fn message_of(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("without a text")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reward_fn;

    struct Fixed(Vec<f32>);

    impl Reward<u8> for Fixed {
        fn name(&self) -> &str {
            "fixed"
        }
        fn score(&self, _: &Prompt, _: &u8) -> Result<f32, BoxError> {
            Ok(self.0[0])
        }
        fn score_batch(&self, _: &[(&Prompt, &u8)]) -> Result<Vec<f32>, BoxError> {
            Ok(self.0.clone())
        }
        fn applies_to(&self, prompt: &Prompt) -> bool {
            prompt.text != "other"
        }
    }

    fn error_of(scores: Vec<f32>) -> String {
        let prompt = Prompt::new("a cat");
        let set = RewardSet::new().with(Fixed(scores), 1.0).unwrap();
        set.score(&[(&prompt, &0), (&prompt, &1)]).unwrap_err().to_string()
    }

    #[test]
    fn a_score_that_cannot_be_used_names_reward_prompt_and_row() {
        assert_eq!(
            error_of(vec![1.0]),
            "reward `fixed`: returned 1 scores for 2 samples; return one per sample, in order"
        );
        assert_eq!(
            error_of(vec![1.0, f32::NAN]),
            "reward `fixed`: scored NaN for prompt `a cat` (row 1 of its batch); return a finite number, or `false` from `applies_to`"
        );
    }

    #[test]
    fn totals_are_weighted_and_leave_out_what_does_not_apply() {
        let set = RewardSet::new()
            .with(Fixed(vec![2.0]), 0.5)
            .unwrap()
            .with(reward_fn("value", |_: &Prompt, x: &u8| Ok(f32::from(*x))), 3.0)
            .unwrap();
        let (cat, other) = (Prompt::new("a cat"), Prompt::new("other"));
        let rows = set.score(&[(&cat, &4), (&other, &5)]).unwrap();
        assert_eq!(rows[0], Scores { values: vec![Some(2.0), Some(4.0)], total: 13.0 });
        assert_eq!(rows[1], Scores { values: vec![None, Some(5.0)], total: 15.0 });
    }

    #[test]
    fn a_prompt_without_any_reward_is_an_error() {
        let set = RewardSet::new().with(Fixed(vec![]), 1.0).unwrap();
        let error = set.score(&[(&Prompt::new("other"), &0)]).unwrap_err().to_string();
        assert!(error.starts_with("no reward applies to prompt `other`"), "{error}");
    }

    #[test]
    fn names_must_differ() {
        let twice = RewardSet::new().with(Fixed(vec![]), 1.0).unwrap().with(Fixed(vec![]), 1.0);
        assert!(twice.is_err());
    }
}
