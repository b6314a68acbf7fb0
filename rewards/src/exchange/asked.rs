//! What a reward and a detector make of verdicts.

use grpo::{BoxError, Prompt};
use image::RgbImage;

use super::{Said, Until, Verdict};
use crate::geneval::Detection;

/// Whoever is asked.
pub(crate) trait Asked {
    /// Every row's verdict in the batch's order; with [`Until::Failure`] perhaps only of its first rows, up to a failed
    /// one.
    fn verdicts<T: Said>(&self, batch: &[(&Prompt, &RgbImage)], until: Until) -> Vec<Verdict<T>>;

    /// As [`Reward::score`](grpo::Reward::score).
    fn score(&self, prompt: &Prompt, image: &RgbImage) -> Result<f32, BoxError> {
        only(self.verdicts(&[(prompt, image)], Until::Failure))
    }

    /// As [`Reward::score_batch`](grpo::Reward::score_batch).
    fn score_batch(&self, batch: &[(&Prompt, &RgbImage)]) -> Result<Vec<f32>, BoxError> {
        all_or_first_failure(self.verdicts(batch, Until::Failure))
    }

    /// As [`Reward::score_each`](grpo::Reward::score_each).
    fn score_each(&self, batch: &[(&Prompt, &RgbImage)]) -> Vec<Result<f32, BoxError>> {
        self.verdicts(batch, Until::End).into_iter().map(|verdict| verdict.map_err(Into::into)).collect()
    }

    /// As [`Detector::detect`](crate::geneval::Detector::detect).
    fn detect(&self, image: &RgbImage) -> Result<Vec<Detection>, BoxError> {
        only(self.verdicts(&[(&Prompt::new(""), image)], Until::Failure))
    }
}

/// What is said of all rows, or the failure of the first one of which nothing is.
pub(super) fn all_or_first_failure<T>(verdicts: Vec<Verdict<T>>) -> Result<Vec<T>, BoxError> {
    let named = |(row, verdict): (usize, Verdict<T>)| verdict.map_err(|message| format!("row {row}: {message}").into());
    verdicts.into_iter().enumerate().map(named).collect()
}

/// What is said of the only picture of a question.
fn only<T>(verdicts: Vec<Verdict<T>>) -> Result<T, BoxError> {
    let verdict = verdicts.into_iter().next();
    verdict.unwrap_or_else(|| Err("nothing was said of the picture".into())).map_err(Into::into)
}
