//! What each arm did to each reward: paired differences with their intervals.

use std::collections::{BTreeMap, BTreeSet};

use grpo::RunRewards;
use serde::Serialize;

use super::arms::{ArmRuns, Arms, Pairing};
use super::record::{Evaluation, Judged, LeftOut, Run};
use super::training::{Cost, Training};
use super::verdict::{self, Verdict};
use super::{OPTIMISED, Options};
use crate::intervals::{Interval, METHOD, Row, bootstrap};

/// The share of intervals that hold the true difference.
pub(super) const LEVEL: f64 = 0.95;
/// What the policy before training is called.
pub(super) const UNTRAINED: &str = "no RL";

/// Everything that a report says in numbers and names.
#[derive(Clone, Debug, Serialize)]
pub struct Facts {
    /// The ablation's name, or the arms'.
    pub title: String,
    /// How intervals are made.
    pub method: &'static str,
    /// The share of intervals that hold the true difference.
    pub level: f64,
    /// The arm that others are compared with.
    pub baseline: Option<String>,
    /// The held-out reward that is the score one is after.
    pub evaluation: Option<String>,
    /// The held-out rewards that decide verdicts.
    pub judges: Vec<String>,
    /// Every reward that is watched, judges and targets.
    pub watched: Vec<String>,
    /// All seeds.
    pub seeds: Vec<u64>,
    /// Held-out prompts.
    pub n_prompts: usize,
    /// Different texts among them: the prompts that are resampled.
    pub n_texts: usize,
    /// Samples of a prompt.
    pub n_samples: usize,
    /// Texts of held-out prompts that an arm is trained on as well.
    pub trained_on: BTreeSet<String>,
    /// The column by which the evaluation is told apart.
    pub by: String,
    /// The policy before training first, then the arms.
    pub arms: Vec<ArmReport>,
    /// Runs that are not compared.
    pub left_out: Vec<LeftOut>,
    /// Whether runs of a seed begin with the same samples.
    pub pairing: Pairing,
    /// Whether the runs are those of an ablation.
    pub is_ablation: bool,
}

/// One arm.
#[derive(Clone, Debug, Serialize)]
pub struct ArmReport {
    /// Its name.
    pub name: String,
    /// What is said of it.
    pub about: String,
    /// What it optimises, with its weights; nothing of the policy before training.
    pub optimised: BTreeMap<String, f32>,
    /// The seeds it was trained under.
    pub seeds: Vec<u64>,
    /// What it did, in a word and a sentence.
    pub verdict: Option<Verdict>,
    /// What it optimises, on held-out prompts, where that is watched.
    pub target: Option<Effect>,
    /// What became of each watched reward.
    pub effects: BTreeMap<String, Effect>,
    /// What became of the evaluation, one kind of prompt at a time.
    pub groups: Vec<Group>,
    /// The run of its numbers while training.
    pub training: Training,
    /// What it took.
    pub cost: Option<Cost>,
    /// Its runs.
    pub runs: Vec<RunFacts>,
    /// The configuration of its first run.
    pub config: String,
}

/// What an arm did to a reward on held-out prompts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Effect {
    /// Whether the arm optimised it, alone or in a mix, a gate or a joined reward.
    pub optimised: bool,
    /// The mean before training.
    pub start: f64,
    /// The mean after training.
    pub end: f64,
    /// The mean difference from before training.
    pub rise: Option<Interval>,
    /// The mean difference from the baseline after training.
    pub against: Option<Interval>,
}

/// The evaluation on one kind of prompt.
#[derive(Clone, Debug, Serialize)]
pub struct Group {
    /// The kind.
    pub name: String,
    /// What became of it.
    pub effect: Effect,
}

/// Where a run is and what made it.
#[derive(Clone, Debug, Serialize)]
pub struct RunFacts {
    /// Its seed.
    pub seed: u64,
    /// Its folder, as the report was asked for it.
    pub path: String,
    /// The processes that worked on it, those alike once.
    pub processes: Vec<Process>,
}

/// A process that worked on a run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Process {
    /// Its command line.
    pub command: String,
    /// The commit of the folder it was started in.
    pub commit: Option<String>,
    /// The version of the library.
    pub version: String,
}

/// A quantity of a held-out prompt.
pub(super) type Quantity<'a> = &'a dyn Fn(&Judged) -> Option<f64>;

/// What a run optimises, as such a quantity.
pub(super) type Target = Box<dyn Fn(&Judged) -> Option<f64>>;

/// Two evaluations a seed, and what differs between them.
pub(super) struct Paired {
    pub(super) before: f64,
    pub(super) after: f64,
    /// Of the differences, one row a text.
    pub(super) rows: Vec<Row>,
}

/// Pairs evaluations by seed and by prompt; `None` where no prompt has the quantity in all of them.
pub(super) fn paired(evaluations: &[(&Evaluation, &Evaluation)], quantity: Quantity<'_>) -> Option<Paired> {
    let (first, _) = evaluations.first()?;
    let mut texts: BTreeMap<&str, Row> = BTreeMap::new();
    let (mut before, mut after, mut n_prompts) = (0.0, 0.0, 0.0);
    for (idx, prompt) in &first.prompts {
        let of = |evaluation: &Evaluation| quantity(evaluation.prompts.get(idx).filter(|p| p.text == prompt.text)?);
        let ends: Option<Vec<(f64, f64)>> =
            evaluations.iter().map(|(before, after)| Some((of(before)?, of(after)?))).collect();
        let Some(ends) = ends else { continue };
        let n_seeds = ends.len() as f64;
        before += ends.iter().map(|(before, _)| before).sum::<f64>() / n_seeds;
        after += ends.iter().map(|(_, after)| after).sum::<f64>() / n_seeds;
        n_prompts += 1.0;
        let row = texts.entry(&prompt.text).or_insert_with(|| Row { weight: 0.0, by_seed: vec![0.0; ends.len()] });
        // The mean over the prompts of this text so far, and this one.
        row.weight += 1.0;
        for (mean, (before, after)) in row.by_seed.iter_mut().zip(&ends) {
            *mean += (after - before - *mean) / row.weight;
        }
    }
    let rows: Vec<Row> = texts.into_values().collect();
    (n_prompts > 0.0).then(|| Paired { before: before / n_prompts, after: after / n_prompts, rows })
}

/// An arm after training, or the policy before it.
#[derive(Clone, Copy)]
pub(super) struct Side<'a> {
    pub(super) runs: &'a [Run],
    pub(super) when: When,
}

/// Before training or after it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum When {
    Before,
    After,
}

impl<'a> Side<'a> {
    fn end(&self, run: &'a Run) -> Option<&'a Evaluation> {
        run.ends().map(|(start, end)| if self.when == When::After { end } else { start })
    }

    /// Before and after training, a pair a seed.
    pub(super) fn rises(&self) -> Vec<(&'a Evaluation, &'a Evaluation)> {
        self.runs.iter().filter_map(|run| Some((run.ends()?.0, self.end(run)?))).collect()
    }

    /// The baseline's end and this one's, a pair for each seed of both.
    fn against(&self, baseline: &'a ArmRuns) -> Vec<(&'a Evaluation, &'a Evaluation)> {
        let pair = |run: &'a Run| {
            let there = baseline.runs.iter().find(|there| there.seed == run.seed)?;
            Some((there.ends()?.1, self.end(run)?))
        };
        self.runs.iter().filter_map(pair).collect()
    }

    fn effect(&self, baseline: Option<&'a ArmRuns>, quantity: Quantity<'_>) -> Option<Effect> {
        let rises = paired(&self.rises(), quantity)?;
        let against = baseline.and_then(|baseline| paired(&self.against(baseline), quantity));
        Some(Effect {
            optimised: false,
            start: rises.before,
            end: rises.after,
            rise: bootstrap(&rises.rows, LEVEL).filter(|_| self.when == When::After),
            against: against.and_then(|against| bootstrap(&against.rows, LEVEL)),
        })
    }
}

/// The mean of one reward.
pub(super) fn of_reward(name: &str) -> impl Fn(&Judged) -> Option<f64> + use<> {
    let name = name.to_string();
    move |judged| judged.means.get(&name).copied()
}

/// What a run optimises, as a quantity of a held-out prompt: the mix where it is watched as one, or else the weighted sum of
/// its rewards. `None` where they are not watched as they are optimised: some not at all, or without their changes or gates.
pub(super) fn of_target(rewards: &RunRewards) -> Option<Target> {
    if rewards.held_out.iter().any(|name| name == OPTIMISED) {
        return Some(Box::new(of_reward(OPTIMISED)));
    }
    let weights = rewards.optimised.clone();
    let is_plain = |name: &String| rewards.held_out.contains(name);
    if weights.is_empty() || !weights.keys().all(is_plain) || rewards.sources.iter().ne(weights.keys()) {
        return None;
    }
    Some(Box::new(move |judged: &Judged| {
        let parts = weights.iter().filter_map(|(name, weight)| Some(f64::from(*weight) * judged.means.get(name)?));
        parts.reduce(|sum, part| sum + part)
    }))
}

impl Facts {
    pub(super) fn of(arms: &Arms, options: &Options) -> Self {
        let any = arms.arms.first().and_then(|arm| arm.runs.first()?.ends());
        let prompts = any.map(|(start, _)| &start.prompts);
        let texts: BTreeSet<&str> = prompts.into_iter().flatten().map(|(_, judged)| judged.text.as_str()).collect();
        let untrained = arms.untrained().map(|arm| untrained(arms, arm, options));
        let trained = arms.arms.iter().map(|arm| trained(arms, arm, options));
        Self {
            title: arms.title.clone(),
            method: METHOD,
            level: LEVEL,
            baseline: arms.baseline.clone(),
            evaluation: arms.evaluation.clone(),
            judges: arms.judges.clone(),
            watched: arms.watched.clone(),
            seeds: arms.seeds(),
            n_prompts: prompts.map_or(0, BTreeMap::len),
            n_texts: texts.len(),
            n_samples: prompts.into_iter().flatten().map(|(_, judged)| judged.scores.len()).max().unwrap_or(0),
            trained_on: arms
                .arms
                .iter()
                .flat_map(|arm| &arm.runs)
                .flat_map(|run| run.rewards.trained_on.clone())
                .collect(),
            by: options.by.clone(),
            arms: untrained.into_iter().chain(trained).collect(),
            left_out: arms.left_out.clone(),
            pairing: arms.pairing.clone(),
            is_ablation: arms.is_ablation,
        }
    }

    /// The arm of this name.
    pub fn arm(&self, name: &str) -> Option<&ArmReport> {
        self.arms.iter().find(|arm| arm.name == name)
    }
}

/// The policy before training, on the draws of these runs.
fn untrained(arms: &Arms, arm: &ArmRuns, options: &Options) -> ArmReport {
    let side = Side { runs: &arm.runs, when: When::Before };
    let baseline = arms.baseline.as_ref().and_then(|name| arms.arm(name));
    ArmReport {
        name: UNTRAINED.into(),
        about: "The policy before training, on the same draws.".into(),
        optimised: BTreeMap::new(),
        seeds: arm.runs.iter().map(|run| run.seed).collect(),
        verdict: None,
        target: None,
        effects: effects(arms, &side, baseline, &BTreeSet::new()),
        groups: groups(arms, &side, baseline, (&options.by, false)),
        training: Training::default(),
        cost: None,
        runs: Vec::new(),
        config: String::new(),
    }
}

fn trained(arms: &Arms, arm: &ArmRuns, options: &Options) -> ArmReport {
    let side = Side { runs: &arm.runs, when: When::After };
    // An arm is not compared with itself.
    let baseline = arms.baseline.as_ref().filter(|name| **name != arm.name).and_then(|name| arms.arm(name));
    let first = arm.runs.first();
    let rewards = first.map(|run| run.rewards.clone()).unwrap_or_default();
    let seen: BTreeSet<String> = arms.watched.iter().filter(|name| is_seen(&rewards, name)).cloned().collect();
    let target = of_target(&rewards);
    let effect = target.as_ref().and_then(|target| side.effect(None, target));
    let judges: Vec<String> = arms.judges.iter().filter(|judge| !seen.contains(*judge)).cloned().collect();
    let optimises_evaluation = arms.evaluation.as_ref().is_some_and(|name| seen.contains(name));
    ArmReport {
        name: arm.name.clone(),
        about: arm.about.clone(),
        seeds: arm.runs.iter().map(|run| run.seed).collect(),
        verdict: target.as_ref().and_then(|target| verdict::of(&side, (&rewards, target), &judges)),
        target: effect.map(|effect| Effect { optimised: true, ..effect }),
        effects: effects(arms, &side, baseline, &seen),
        groups: groups(arms, &side, baseline, (&options.by, optimises_evaluation)),
        training: Training::of(arms, arm, target.as_deref()),
        cost: options.times.then(|| Cost::of(arm)),
        runs: arm.runs.iter().map(RunFacts::of).collect(),
        config: first.map(|run| run.config.clone()).unwrap_or_default(),
        optimised: rewards.optimised,
    }
}

/// Whether an arm optimises anything that has a say in a watched reward.
fn is_seen(rewards: &RunRewards, name: &String) -> bool {
    let parts = rewards.held_out_sources.get(name);
    rewards.sources.contains(name) || parts.is_some_and(|parts| !parts.is_disjoint(&rewards.sources))
}

fn effects(
    arms: &Arms,
    side: &Side<'_>,
    baseline: Option<&ArmRuns>,
    seen: &BTreeSet<String>,
) -> BTreeMap<String, Effect> {
    let effect = |name: &String| {
        let effect = side.effect(baseline, &of_reward(name))?;
        Some((name.clone(), Effect { optimised: seen.contains(name), ..effect }))
    };
    arms.watched.iter().filter_map(effect).collect()
}

/// The evaluation on the prompts of each kind, in the order in which the kinds first come.
fn groups(arms: &Arms, side: &Side<'_>, baseline: Option<&ArmRuns>, (by, optimised): (&str, bool)) -> Vec<Group> {
    let Some(evaluation) = &arms.evaluation else { return Vec::new() };
    let kind = |judged: &Judged| {
        judged.columns.get(by).map(|value| value.as_str().map_or_else(|| value.to_string(), str::to_string))
    };
    let mut names: Vec<String> = Vec::new();
    let start = side.rises().into_iter().next().map(|(start, _)| start);
    for name in start.into_iter().flat_map(|start| start.prompts.values().filter_map(kind)) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let group = |name: String| {
        let of = |judged: &Judged| of_reward(evaluation)(judged).filter(|_| kind(judged).as_ref() == Some(&name));
        let effect = side.effect(baseline, &of)?;
        Some(Group { name, effect: Effect { optimised, ..effect } })
    };
    // One kind is no division.
    if names.len() < 2 { Vec::new() } else { names.into_iter().filter_map(group).collect() }
}

impl RunFacts {
    fn of(run: &Run) -> Self {
        let mut processes: Vec<Process> = Vec::new();
        for meta in run.processes() {
            let command = meta.command.join(" ");
            let process = Process { command, commit: meta.commit.clone(), version: meta.grpo.clone() };
            if !processes.contains(&process) {
                processes.push(process);
            }
        }
        Self { seed: run.seed, path: run.path.display().to_string(), processes }
    }
}
