//! Runs sorted into arms: which are whole, what they are compared with, and whether they share their draws.

use std::collections::BTreeSet;

use grpo::{Error, Result};
use serde::Serialize;

use super::OPTIMISED;
use super::Options;
use super::record::{Found, LeftOut, Run};
use crate::ablation::{ArmPlan, Plan};

/// The evaluation that is meant where none is named.
const USUAL_EVALUATION: &str = "geneval";

/// Arms of whole runs.
pub(super) struct Arms {
    pub(super) title: String,
    pub(super) arms: Vec<ArmRuns>,
    pub(super) baseline: Option<String>,
    pub(super) evaluation: Option<String>,
    pub(super) judges: Vec<String>,
    /// All that is watched in every run, in the order of the first.
    pub(super) watched: Vec<String>,
    pub(super) left_out: Vec<LeftOut>,
    pub(super) pairing: Pairing,
    /// Whether the runs are those of an ablation.
    pub(super) is_ablation: bool,
}

/// The runs of one arm, by seed.
pub(super) struct ArmRuns {
    pub(super) name: String,
    pub(super) about: String,
    pub(super) runs: Vec<Run>,
}

/// Whether runs of a seed begin with the same samples.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Pairing {
    /// They do: their scores before training are equal.
    Shared,
    /// These do not; differences from them are paired by prompt alone.
    Apart(Vec<String>),
    /// No two arms have a seed in common.
    Unknown,
}

impl Arms {
    pub(super) fn of(found: Found, options: &Options) -> Result<Self> {
        let Found { plan, is_whole, runs, mut left_out } = found;
        let place = runs.first().map(|run| run.path.clone()).unwrap_or_default();
        let planned = plan.as_ref().map_or(&[][..], |plan| plan.arms.as_slice());
        let arms = sorted(runs, planned, &mut left_out);
        let all = || arms.iter().flat_map(|arm| &arm.runs);
        let Some(watched) = shared_rewards(all()) else {
            let why = left_out.first().map_or(String::new(), |left| format!(" (of {}: {})", left.run, left.why));
            return Err(Error::config(format!("no run is whole, and nothing can be compared{why}")));
        };
        if watched.is_empty() {
            return Err(Error::file(place, "the runs watch no reward in common; hold out the same in each"));
        }
        let names: Vec<&str> = arms.iter().map(|arm| arm.name.as_str()).collect();
        let baseline = match (&options.baseline, plan.as_ref().and_then(|plan| plan.baseline.as_ref())) {
            (Some(asked), _) => Some(known(asked, "--baseline", &names)?),
            // One whose runs are not whole yet is compared with later.
            (None, planned) => planned.filter(|planned| names.contains(&planned.as_str())).cloned(),
        };
        let there: Vec<&str> = watched.iter().map(String::as_str).collect();
        let planned = plan.as_ref().and_then(|plan| plan.evaluation.as_ref());
        let evaluation = match (&options.evaluation, planned) {
            (Some(asked), _) => Some(known(asked, "--evaluation", &there)?),
            (None, Some(planned)) => Some(known(planned, "the ablation's evaluation", &there)?),
            (None, None) => watched.iter().find(|name| *name == USUAL_EVALUATION).cloned(),
        };
        let planned = plan.as_ref().map_or(&[][..], |plan| plan.judges.as_slice());
        let judges = match (options.judges.as_slice(), planned) {
            ([], []) => watched.clone(),
            ([], planned) => {
                planned.iter().map(|name| known(name, "the ablation's judge", &there)).collect::<Result<_>>()?
            }
            (asked, _) => asked.iter().map(|name| known(name, "--judge", &there)).collect::<Result<_>>()?,
        };
        if let Some(plan) = plan.as_ref().filter(|_| is_whole) {
            left_out.extend(not_begun(plan, &arms, &left_out));
        }
        Ok(Self {
            title: plan.as_ref().map_or_else(|| names.join(", "), |plan| plan.name.clone()),
            is_ablation: plan.is_some(),
            pairing: pairing(&arms),
            baseline,
            evaluation,
            judges,
            arms,
            watched,
            left_out,
        })
    }

    /// All seeds of any arm.
    pub(super) fn seeds(&self) -> Vec<u64> {
        let seeds: BTreeSet<u64> = self.arms.iter().flat_map(|arm| arm.runs.iter().map(|run| run.seed)).collect();
        seeds.into_iter().collect()
    }

    pub(super) fn arm(&self, name: &str) -> Option<&ArmRuns> {
        self.arms.iter().find(|arm| arm.name == name)
    }

    /// The arm whose start stands for no training: the baseline, or the first.
    pub(super) fn untrained(&self) -> Option<&ArmRuns> {
        self.baseline.as_ref().and_then(|name| self.arm(name)).or(self.arms.first())
    }
}

/// The name, where it is among these.
fn known(name: &String, what: &str, there: &[&str]) -> Result<String> {
    match there.contains(&name.as_str()) {
        true => Ok(name.clone()),
        false => Err(Error::config(format!("{what} {name}: there are {}", there.join(", ")))),
    }
}

/// The rewards that every run watches, less the mix that is an arm's own; `None` where there is no run.
fn shared_rewards<'a>(mut runs: impl Iterator<Item = &'a Run>) -> Option<Vec<String>> {
    let mut watched = runs.next()?.rewards.held_out.clone();
    watched.retain(|name| name != OPTIMISED);
    runs.for_each(|run| watched.retain(|name| run.rewards.held_out.contains(name)));
    Some(watched)
}

/// The arms in the order of the plan, and then by name. A run that is not what its arm's first is, is left out.
fn sorted(runs: Vec<Run>, planned: &[ArmPlan], left_out: &mut Vec<LeftOut>) -> Vec<ArmRuns> {
    let mut arms: Vec<ArmRuns> = planned
        .iter()
        .map(|arm| ArmRuns { name: arm.name.clone(), about: arm.about.clone(), runs: Vec::new() })
        .collect();
    for run in runs {
        match arms.iter_mut().find(|arm| arm.name == run.arm) {
            None => arms.push(ArmRuns { name: run.arm.clone(), about: String::new(), runs: vec![run] }),
            Some(arm) => match arm.runs.first().and_then(|first| differs(first, &run)) {
                None => arm.runs.push(run),
                Some(why) => left_out.push(LeftOut { run: format!("{}/{}", run.arm, run.seed), why }),
            },
        }
    }
    arms.retain(|arm| !arm.runs.is_empty());
    arms.iter_mut().for_each(|arm| arm.runs.sort_by_key(|run| run.seed));
    arms
}

/// In what a run is not one of the arm's first; `None` where but its seed, what it records and what it watches differ.
fn differs(first: &Run, run: &Run) -> Option<String> {
    let science = |run: &Run| {
        let mut table: toml::Table = toml::from_str(&run.config).unwrap_or_default();
        table.retain(|key, _| !["seed", "log", "held_out"].contains(&key));
        table
    };
    let what = match (&first.rewards, &run.rewards) {
        (a, b) if a.optimised != b.optimised || a.sources != b.sources => "rewards",
        _ if science(first) != science(run) => "configuration",
        _ => return None,
    };
    Some(format!("its {what} are not those of seed {} of the arm; give it an arm of its own", first.seed))
}

/// Runs that are planned and of which there is no folder yet.
fn not_begun(plan: &Plan, arms: &[ArmRuns], left_out: &[LeftOut]) -> Vec<LeftOut> {
    let planned = plan.arms.iter().flat_map(|arm| plan.seeds.iter().map(move |seed| (&arm.name, *seed)));
    let is_there = |(name, seed): &(&String, u64)| {
        let whole = arms.iter().any(|arm| arm.name == **name && arm.runs.iter().any(|run| run.seed == *seed));
        whole || left_out.iter().any(|left| left.run == format!("{name}/{seed}"))
    };
    let missing = planned.filter(|run| !is_there(run));
    missing.map(|(name, seed)| LeftOut { run: format!("{name}/{seed}"), why: "it has not begun".into() }).collect()
}

/// Compares the first held-out scores of the runs of each seed.
fn pairing(arms: &[ArmRuns]) -> Pairing {
    let start = |run: &Run, name: &String| {
        let (start, _) = run.ends()?;
        let prompts = start.prompts.iter();
        Some(
            prompts
                .map(|(idx, judged)| (*idx, judged.text.clone(), judged.means.get(name).copied()))
                .collect::<Vec<_>>(),
        )
    };
    let (mut n_compared, mut apart) = (0, Vec::new());
    for (at, arm) in arms.iter().enumerate() {
        for run in &arm.runs {
            let before = arms.iter().take(at).flat_map(|arm| &arm.runs);
            let Some(there) = before.into_iter().find(|there| there.seed == run.seed) else { continue };
            n_compared += 1;
            let mut shared = run.rewards.held_out.iter().filter(|name| there.rewards.held_out.contains(name));
            if shared.any(|name| start(run, name) != start(there, name)) {
                apart.push(format!("{}/{}", run.arm, run.seed));
            }
        }
    }
    match (n_compared, apart.is_empty()) {
        (0, _) => Pairing::Unknown,
        (_, true) => Pairing::Shared,
        (_, false) => Pairing::Apart(apart),
    }
}
