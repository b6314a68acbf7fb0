//! Scores of many pictures as the six numbers that are published.

use std::collections::BTreeMap;
use std::fmt;

use grpo::{Error, Prompt, Result};
use serde::Serialize;

use super::metadata::Tag;

/// The published table: accuracy per task, and the mean of the tasks.
///
/// ```
/// use grpo_rewards::geneval::{Include, Metadata, Summary, Tag};
///
/// let (tag, include) = (Tag::SingleObject, vec![Include::new("cat", 1)]);
/// let metadata = Metadata { tag, include, exclude: vec![], prompt: "a photo of a cat".into() };
/// let summary = Summary::of(&[metadata.to_prompt()?], &[vec![1.0, 0.0]])?;
/// assert_eq!((summary.overall, summary.any_correct), (0.5, 1.0));
/// # Ok::<(), grpo::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// The share of right pictures, per task that has any.
    pub accuracy: BTreeMap<Tag, f64>,
    /// The unweighted mean of the tasks' accuracies: the number called "GenEval".
    pub overall: f64,
    /// The share of right pictures, whatever the task.
    pub image_accuracy: f64,
    /// The share of prompts with at least one right picture.
    pub any_correct: f64,
    /// How many prompts.
    pub prompts: usize,
    /// How many pictures.
    pub images: usize,
}

impl Summary {
    /// Sums up the scores of each prompt's pictures, 1 where right; every prompt needs at least one.
    pub fn of(prompts: &[Prompt], scores: &[Vec<f32>]) -> Result<Self> {
        if prompts.is_empty() || prompts.len() != scores.len() {
            let (prompts, rows) = (prompts.len(), scores.len());
            return Err(Error::config(format!(
                "{prompts} prompts with {rows} rows of scores; give one row for each prompt"
            )));
        }
        let mut tasks: BTreeMap<Tag, (usize, usize)> = BTreeMap::new();
        let mut any = 0;
        for (prompt, row) in prompts.iter().zip(scores) {
            if row.is_empty() {
                return Err(Error::config(format!(
                    "prompt `{}` has no scores; give one for each picture",
                    prompt.text
                )));
            }
            let right = row.iter().filter(|&&score| score > 0.5).count();
            let (task_right, task_images) = tasks.entry(prompt.column("tag")?).or_default();
            *task_right += right;
            *task_images += row.len();
            any += usize::from(right > 0);
        }
        let share = |part: usize, whole: usize| part as f64 / whole as f64;
        let (right, images) = tasks.values().fold((0, 0), |sum, task| (sum.0 + task.0, sum.1 + task.1));
        let accuracy: BTreeMap<Tag, f64> =
            tasks.into_iter().map(|(tag, (right, of))| (tag, share(right, of))).collect();
        Ok(Self {
            overall: accuracy.values().sum::<f64>() / accuracy.len() as f64,
            image_accuracy: share(right, images),
            any_correct: share(any, prompts.len()),
            prompts: prompts.len(),
            images,
            accuracy,
        })
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (tag, accuracy) in &self.accuracy {
            writeln!(f, "{tag:<14} {:>6.2} %", 100.0 * accuracy)?;
        }
        writeln!(f, "{:<14} {:>6.2} %", "overall", 100.0 * self.overall)?;
        write!(f, "{:<14} {:>6.2} %", "any correct", 100.0 * self.any_correct)?;
        write!(f, "  ({} prompts, {} pictures)", self.prompts, self.images)
    }
}
