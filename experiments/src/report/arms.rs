//! Runs sorted into arms: which are whole, what they are compared with, and whether they share their draws.

use std::collections::BTreeSet;

use grpo::{Error, Result};
use serde::Serialize;

use super::Options;
use super::record::{Found, Run};

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
    /// Arms that do not begin with the samples of the first, by name and seed.
    pub(super) unpaired: Vec<String>,
}

/// The runs of one arm, by seed.
pub(super) struct ArmRuns {
    pub(super) name: String,
    pub(super) about: String,
    pub(super) runs: Vec<Run>,
}

/// A run that is not compared.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LeftOut {
    /// Its arm.
    pub arm: String,
    /// Its seed.
    pub seed: u64,
    /// Why.
    pub why: String,
}

impl Arms {
    pub(super) fn of(found: Found, options: &Options) -> Result<Self> {
        let Found { plan, runs } = found;
        let first = runs.first().map(|run| run.path.clone()).unwrap_or_default();
        let (mut left_out, mut whole) = (Vec::new(), Vec::new());
        for run in runs {
            match run.fault() {
                Some(why) => left_out.push(LeftOut { arm: run.arm, seed: run.seed, why }),
                None => whole.push(run),
            }
        }
        let Some(watched) = shared_rewards(&whole) else {
            let why = left_out.first().map_or("", |run| run.why.as_str());
            return Err(Error::file(first, format!("no run is whole, and nothing can be compared: {why}")));
        };
        if watched.is_empty() {
            return Err(Error::file(first, "the runs watch no reward in common; hold out the same in each"));
        }
        let arms = sorted(whole, plan.as_ref().map_or(&[], |plan| plan.arms.as_slice()));
        let known = |name: &String, what: &str, there: Vec<&str>| match there.contains(&name.as_str()) {
            true => Ok(()),
            false => Err(Error::config(format!("{what} {name}: there are {}", there.join(", ")))),
        };
        let names = || arms.iter().map(|arm| arm.name.as_str()).collect::<Vec<_>>();
        let planned = plan.as_ref().and_then(|plan| plan.baseline.clone());
        let baseline = match &options.baseline {
            Some(baseline) => known(baseline, "--baseline", names()).map(|()| Some(baseline.clone()))?,
            None => planned.filter(|baseline| names().contains(&baseline.as_str())),
        };
        let watched_names = || watched.iter().map(String::as_str).collect::<Vec<_>>();
        let asked = options.evaluation.iter().map(|name| ("--evaluation", name));
        for (what, name) in asked.chain(options.judges.iter().map(|name| ("--judge", name))) {
            known(name, what, watched_names())?;
        }
        let planned = plan.as_ref().and_then(|plan| plan.evaluation.clone());
        let evaluation = options.evaluation.clone().or(planned).unwrap_or_else(|| USUAL_EVALUATION.into());
        let planned = plan.as_ref().map(|plan| plan.judges.clone()).unwrap_or_default();
        let judges = [options.judges.clone(), planned, watched.clone()];
        let judges = judges.into_iter().find(|judges| !judges.is_empty()).unwrap_or_default();
        let title = plan.map(|plan| plan.name).unwrap_or_else(|| names().join(", "));
        Ok(Self {
            title,
            unpaired: unpaired(&arms),
            baseline,
            evaluation: watched.contains(&evaluation).then_some(evaluation),
            judges: judges.into_iter().filter(|judge| watched.contains(judge)).collect(),
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

/// The rewards that every run watches; `None` where there is no run.
fn shared_rewards(runs: &[Run]) -> Option<Vec<String>> {
    let mut watched = runs.first()?.rewards.held_out.clone();
    runs.iter().for_each(|run| watched.retain(|name| run.rewards.held_out.contains(name)));
    Some(watched)
}

/// The arms in the order of the plan, and then by name.
fn sorted(runs: Vec<Run>, planned: &[crate::ablation::ArmPlan]) -> Vec<ArmRuns> {
    let mut arms: Vec<ArmRuns> = planned
        .iter()
        .map(|arm| ArmRuns { name: arm.name.clone(), about: arm.about.clone(), runs: Vec::new() })
        .collect();
    for run in runs {
        match arms.iter_mut().find(|arm| arm.name == run.arm) {
            Some(arm) => arm.runs.push(run),
            None => arms.push(ArmRuns { name: run.arm.clone(), about: String::new(), runs: vec![run] }),
        }
    }
    arms.retain(|arm| !arm.runs.is_empty());
    arms.iter_mut().for_each(|arm| arm.runs.sort_by_key(|run| run.seed));
    arms
}

/// Runs whose first held-out scores are not those of the first arm's run of their seed.
fn unpaired(arms: &[ArmRuns]) -> Vec<String> {
    let Some(first) = arms.first() else { return Vec::new() };
    let start = |run: &Run, name: &String| {
        let (start, _) = run.ends()?;
        Some(start.prompts.values().map(|judged| judged.means.get(name).copied()).collect::<Vec<_>>())
    };
    let differs = |run: &&Run| {
        let Some(there) = first.runs.iter().find(|there| there.seed == run.seed) else { return false };
        let shared = run.rewards.held_out.iter().filter(|name| there.rewards.held_out.contains(name));
        shared.into_iter().any(|name| start(run, name) != start(there, name))
    };
    let runs = arms.iter().skip(1).flat_map(|arm| arm.runs.iter());
    runs.filter(differs).map(|run| format!("{}/{}", run.arm, run.seed)).collect()
}
