//! Arms × seeds, each a run: what they share, where they go, and how they are gone on with.

mod plan;
mod progress;
mod run;

pub(crate) use plan::{ArmPlan, Plan};
pub(crate) use run::n_steps;
pub use run::{Failed, Finished, Made};

use std::path::Path;

use grpo::Result;
use serde::Serialize;
use serde_json::Value;

/// Runs that differ in one thing: arms, each under every seed, from one checkpoint, on the same prompts and draws.
///
/// What an arm is, `A`, is the caller's: an `enum` of rewards, a whole configuration. It is kept with the runs as JSON, and
/// an arm that is another one when the ablation is gone on with is refused. So whatever decides a run's numbers stands in
/// it, or in what all [share](Ablation::sharing): a finished run is not looked into again.
pub struct Ablation<A> {
    name: String,
    seeds: Vec<u64>,
    arms: Vec<Arm<A>>,
    baseline: Option<String>,
    judges: Vec<String>,
    evaluation: Option<String>,
    shared: Value,
    only: Vec<String>,
    at_once: usize,
}

/// One arm of an ablation.
#[derive(Clone, Debug)]
pub struct Arm<A> {
    /// Its name in reports, and the name of its folder.
    pub name: String,
    /// What a reader should know of it, or nothing.
    pub about: String,
    /// What makes it what it is.
    pub setting: A,
}

/// One run of an ablation.
#[derive(Debug)]
pub struct Cell<'a, A> {
    /// Of this arm.
    pub arm: &'a Arm<A>,
    /// Under this seed.
    pub seed: u64,
}

impl<A: Serialize> Ablation<A> {
    /// An ablation without arms under these seeds; its runs go to `{root}/{name}/{arm}/{seed}`.
    pub fn new(name: impl Into<String>, seeds: impl IntoIterator<Item = u64>) -> Self {
        Self {
            name: name.into(),
            seeds: seeds.into_iter().collect(),
            arms: Vec::new(),
            baseline: None,
            judges: Vec::new(),
            evaluation: None,
            shared: Value::Null,
            only: Vec::new(),
            at_once: 1,
        }
    }

    /// Adds an arm.
    #[must_use]
    pub fn arm(self, name: impl Into<String>, setting: A) -> Self {
        self.with(Arm { name: name.into(), about: String::new(), setting })
    }

    /// Adds an arm with what is to be said of it.
    #[must_use]
    pub fn with(mut self, arm: Arm<A>) -> Self {
        self.arms.push(arm);
        self
    }

    /// The arm that others are compared with; each is compared with its own start alone where none is named.
    #[must_use]
    pub fn compared_with(mut self, baseline: impl Into<String>) -> Self {
        self.baseline = Some(baseline.into());
        self
    }

    /// The held-out rewards whose rise or fall decides an arm's verdict, where it does not optimise them; all that are
    /// watched where none is named.
    #[must_use]
    pub fn judged_by<T: Into<String>>(mut self, rewards: impl IntoIterator<Item = T>) -> Self {
        self.judges = rewards.into_iter().map(Into::into).collect();
        self
    }

    /// The held-out reward that is the score one is after: shown beside the optimised one, and task by task.
    #[must_use]
    pub fn evaluated_by(mut self, reward: impl Into<String>) -> Self {
        self.evaluation = Some(reward.into());
        self
    }

    /// What decides the numbers of all runs beside the arms' settings: the checkpoint they start from, the prompts. An ablation
    /// is not gone on with where it is another one.
    #[must_use]
    pub fn sharing(mut self, shared: Value) -> Self {
        self.shared = shared;
        self
    }

    /// Runs these arms alone; the others stay part of the ablation.
    #[must_use]
    pub fn only(mut self, arms: Vec<String>) -> Self {
        self.only = arms;
        self
    }

    /// An error where the ablation cannot be meant, or is not the one that was begun in `{root}/{name}`.
    pub fn check(&self, root: &Path) -> Result<()> {
        Plan::of(self)?.joined(&root.join(&self.name)).map(drop)
    }

    /// Trains so many runs at a time, each on a thread of its own; does not change them. Their times and peaks of memory are
    /// then those of several runs.
    #[must_use]
    pub fn at_once(mut self, n_runs: usize) -> Self {
        self.at_once = n_runs;
        self
    }
}
