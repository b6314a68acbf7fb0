//! Observers: where a run's numbers and pictures go.

mod board;
mod console;
mod json_lines;
mod sample_files;

use std::collections::BTreeMap;

pub use board::TensorBoard;
pub use console::Console;
pub use json_lines::JsonLines;
pub use sample_files::SampleFiles;

use image::RgbImage;

use crate::heat_map::heat_map;
use crate::{BoxError, Excluded, Group, Policy};

/// Metrics of one step by name, in name order; the names are documented in `src/docs/metrics.md`.
pub type Metrics = BTreeMap<String, f64>;

/// Means over a step's samples of what happened at each position, `[T]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PositionMaps {
    /// The entropy of the law, in nats; empty where the policy gives none.
    pub entropy: Vec<f32>,
    /// How hard the loss pushes a choice: `|d loss / d log π|` over the choice's weight in the loss, which is `|A|` where
    /// nothing clips, masks or weighs it.
    pub advantage: Vec<f32>,
}

/// What the trainer tells its observers after a step.
#[non_exhaustive]
pub struct StepReport<'a, P: Policy> {
    /// Steps done before this one: the first is 0.
    pub step: usize,
    /// Steps of the whole run.
    pub n_steps: usize,
    /// The step's numbers.
    pub metrics: &'a Metrics,
    /// The step's samples with their scores.
    pub groups: &'a [Group<P>],
    /// The step's samples that a reward could not judge, also of groups that were left out because of it.
    pub excluded: &'a [Excluded],
    /// The advantage of every sample, in the groups' order.
    pub advantages: &'a [Vec<f32>],
    /// Names of the rewards, in the order of the scores.
    pub reward_names: &'a [String],
    /// Whether pictures are due at this step.
    pub with_samples: bool,
    /// What happened where in the samples; empty where no update was taken.
    pub positions: &'a PositionMaps,
    /// Rows and columns in which a sample's choices lie, where they are a grid.
    pub grid: Option<(usize, usize)>,
    /// Why an update was skipped, and what to look at.
    pub fault: Option<Fault<'a>>,
}

/// A loss or a gradient that is not finite.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Fault<'a> {
    /// What was not finite.
    pub why: &'a str,
    /// The log-probs of every sample's choices as they were replayed for the update, `[rows][T]`, in the groups' order;
    /// empty where they cannot be.
    pub replayed: &'a [Vec<f32>],
    /// The same under the reference.
    pub reference: Option<&'a [Vec<f32>]>,
}

impl<P: Policy> StepReport<'_, P> {
    /// The step's position maps as pictures, by name; none where choices are no grid.
    pub fn maps(&self) -> Vec<(&'static str, RgbImage)> {
        let maps = [("entropy", &self.positions.entropy), ("advantage", &self.positions.advantage)];
        let drawn = |(name, values): (&'static str, &Vec<f32>)| Some((name, heat_map(name, values, self.grid?)?));
        maps.into_iter().filter_map(drawn).collect()
    }
}

/// What the trainer tells its observers after samples of held-out prompts were scored.
#[non_exhaustive]
pub struct HeldOutReport<'a, P: Policy> {
    /// Steps done: 0 is before training.
    pub step: usize,
    /// `held_out/…` metrics.
    pub metrics: &'a Metrics,
    /// The samples, always of the same prompts and seeds.
    pub groups: &'a [Group<P>],
    /// Names of the held-out rewards, in the order of the scores.
    pub reward_names: &'a [String],
}

/// Watches a run. Every method has a default that does nothing.
pub trait Observer<P: Policy> {
    /// After every step.
    fn step(&mut self, _report: &StepReport<'_, P>) -> Result<(), BoxError> {
        Ok(())
    }

    /// After every evaluation on held-out prompts.
    fn held_out(&mut self, _report: &HeldOutReport<'_, P>) -> Result<(), BoxError> {
        Ok(())
    }

    /// After the last step.
    fn finish(&mut self) -> Result<(), BoxError> {
        Ok(())
    }
}
