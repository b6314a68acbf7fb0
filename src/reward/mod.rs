//! Rewards: what is good, as a number, and how several of them are mixed.

mod arithmetic;
mod set;

pub use arithmetic::{Change, Changed, Gated, Joined, Joining, Mixed};
pub(crate) use set::message_of;
pub use set::{Apart, Failed, FailedScores, RewardSet, Scores};

use std::sync::Arc;

use crate::{BoxError, Prompt};

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

    /// The names of all that has a say in the score: a wrapper adds its gate or its parts. A report marks them as optimised.
    fn sources(&self) -> Vec<String> {
        vec![self.name().into()]
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

    fn sources(&self) -> Vec<String> {
        (**self).sources()
    }
}

/// One reward in several places: a mix, a gate and the held-out scores share what it loaded.
impl<S, R: Reward<S> + ?Sized> Reward<S> for Arc<R> {
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

    fn sources(&self) -> Vec<String> {
        (**self).sources()
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
