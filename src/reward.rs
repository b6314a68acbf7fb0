//! Rewards: what is good, as a number, and how several of them are mixed.

use crate::{BoxError, Error, Prompt, Result};

/// Judges samples of kind `S`; higher is better. Required: `name` and `score`.
///
/// ```
/// use grpo::{BoxError, Prompt, Reward};
///
/// /// Counts the letters of the prompt's `wanted` column.
/// struct Letters;
///
/// impl Reward<String> for Letters {
///     fn name(&self) -> &str {
///         "letters"
///     }
///     fn score(&self, prompt: &Prompt, text: &String) -> Result<f32, BoxError> {
///         let wanted: String = prompt.column("wanted")?;
///         Ok(text.chars().filter(|c| wanted.contains(*c)).count() as f32)
///     }
/// }
/// # let prompt = Prompt::new("say it").with("wanted", "ae");
/// # assert_eq!(Letters.score(&prompt, &"banana".to_string()).unwrap(), 3.0);
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot judge `{S}`",
    note = "implement `Reward<{S}>` or wrap a closure with `reward_fn`"
)]
pub trait Reward<S>: Send + Sync {
    /// The name under which scores appear in logs and panels.
    fn name(&self) -> &str;

    /// The score of one sample.
    fn score(&self, prompt: &Prompt, sample: &S) -> Result<f32, BoxError>;

    /// The scores of a batch, in its order. Override where a model is faster on a batch; `score` then calls this with one.
    fn score_batch(&self, batch: &[(&Prompt, &S)]) -> Result<Vec<f32>, BoxError> {
        batch.iter().map(|(prompt, sample)| self.score(prompt, sample)).collect()
    }

    /// The scores of a batch, in its order, each with a failure of its own; called where failed samples are excluded.
    ///
    /// As provided, a batch that fails as a whole (an error, or a wrong number of scores) is scored again sample by
    /// sample, so that only what fails alone is lost. Override where a scorer knows which sample failed.
    fn score_each(&self, batch: &[(&Prompt, &S)]) -> Vec<Result<f32, BoxError>> {
        match self.score_batch(batch) {
            Ok(scores) if scores.len() == batch.len() => scores.into_iter().map(Ok).collect(),
            _ => batch.iter().map(|(prompt, sample)| self.score(prompt, sample)).collect(),
        }
    }

    /// `false` where this reward has no say; the mix leaves it out of that prompt.
    fn applies_to(&self, _prompt: &Prompt) -> bool {
        true
    }
}

impl<S, R: Reward<S> + ?Sized> Reward<S> for Box<R> {
    fn name(&self) -> &str {
        (**self).name()
    }

    fn score(&self, prompt: &Prompt, sample: &S) -> Result<f32, BoxError> {
        (**self).score(prompt, sample)
    }

    fn score_batch(&self, batch: &[(&Prompt, &S)]) -> Result<Vec<f32>, BoxError> {
        (**self).score_batch(batch)
    }

    fn score_each(&self, batch: &[(&Prompt, &S)]) -> Vec<Result<f32, BoxError>> {
        (**self).score_each(batch)
    }

    fn applies_to(&self, prompt: &Prompt) -> bool {
        (**self).applies_to(prompt)
    }
}

/// A reward from a closure.
///
/// ```
/// use grpo::{reward_fn, Reward, Prompt};
/// let length = reward_fn("length", |_prompt, text: &String| Ok(text.len() as f32));
/// assert_eq!(length.score(&Prompt::new("any"), &"four".to_string()).unwrap(), 4.0);
/// ```
pub fn reward_fn<S, F>(name: impl Into<String>, score: F) -> RewardFn<F>
where
    F: Fn(&Prompt, &S) -> Result<f32, BoxError> + Send + Sync,
{
    RewardFn { name: name.into(), score }
}

/// What [`reward_fn`] makes.
#[derive(Clone, Debug)]
pub struct RewardFn<F> {
    name: String,
    score: F,
}

impl<S, F> Reward<S> for RewardFn<F>
where
    F: Fn(&Prompt, &S) -> Result<f32, BoxError> + Send + Sync,
{
    fn name(&self) -> &str {
        &self.name
    }

    fn score(&self, prompt: &Prompt, sample: &S) -> Result<f32, BoxError> {
        (self.score)(prompt, sample)
    }
}

/// Rewards with their weights: the only place where several scores become one.
pub struct RewardSet<S> {
    members: Vec<Member<S>>,
}

struct Member<S> {
    reward: Box<dyn Reward<S>>,
    weight: f32,
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
    /// An error names the reward and the prompt where a score is missing or not finite, or where no reward applies.
    pub fn score(&self, batch: &[(&Prompt, &S)]) -> Result<Vec<Scores>> {
        if self.members.is_empty() {
            return Err(Error::config("the reward set is empty; add at least one reward"));
        }
        let mut rows = vec![Scores { values: vec![None; self.len()], total: 0.0 }; batch.len()];
        for (column, member) in self.members.iter().enumerate() {
            let applies: Vec<usize> = (0..batch.len()).filter(|&row| member.reward.applies_to(batch[row].0)).collect();
            let chosen: Vec<(&Prompt, &S)> = applies.iter().map(|&row| batch[row]).collect();
            let scores = member.checked_scores(&chosen)?;
            for (row, score) in applies.into_iter().zip(scores) {
                rows[row].values[column] = Some(score);
                rows[row].total += member.weight * score;
            }
        }
        match rows.iter().position(|row| row.values.iter().all(Option::is_none)) {
            None => Ok(rows),
            Some(row) => Err(Error::config(format!(
                "no reward applies to prompt `{}`; add one that does, or leave the prompt out",
                batch[row].0.text
            ))),
        }
    }
}

impl<S> Member<S> {
    fn checked_scores(&self, batch: &[(&Prompt, &S)]) -> Result<Vec<f32>> {
        if batch.is_empty() {
            return Ok(Vec::new());
        }
        let name = self.reward.name();
        let scores = self.reward.score_batch(batch).map_err(|source| Error::reward(name, source))?;
        let fault = |message| Error::Reward { name: name.into(), message, source: None };
        if scores.len() != batch.len() {
            return Err(fault(format!(
                "returned {} scores for {} samples; return one per sample, in order",
                scores.len(),
                batch.len()
            )));
        }
        match scores.iter().position(|score| !score.is_finite()) {
            None => Ok(scores),
            Some(row) => Err(fault(format!(
                "scored {} on row {row} of prompt `{}`; return a finite number, or `false` from `applies_to`",
                scores[row], batch[row].0.text
            ))),
        }
    }
}

/// What a [`RewardSet`] gave one sample.
#[derive(Clone, Debug, PartialEq)]
pub struct Scores {
    /// One score per reward, in the order of [`RewardSet::names`]; `None` where it does not apply.
    pub values: Vec<Option<f32>>,
    /// The weighted sum over the rewards that apply.
    pub total: f32,
}

#[cfg(test)]
mod tests {
    use super::*;

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
            "reward `fixed`: scored NaN on row 1 of prompt `a cat`; return a finite number, or `false` from `applies_to`"
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
