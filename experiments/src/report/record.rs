//! Run folders as they are read: curves, held-out scores by prompt, and what the run was.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use grpo::observe::Metrics;
use grpo::{Error, Result, RunFolder, RunRewards};
use serde::Deserialize;
use serde_json::Value;

use crate::ablation::Plan;

/// Folders below one that is named, in which a run is looked for: ablation, arm, seed.
const DEPTH: usize = 3;

/// What the named folders hold.
pub(super) struct Found {
    /// The plan of the ablation among them.
    pub(super) plan: Option<Plan>,
    pub(super) runs: Vec<Run>,
}

/// One run.
pub(super) struct Run {
    /// The folder above the run's own.
    pub(super) arm: String,
    pub(super) seed: u64,
    pub(super) path: PathBuf,
    pub(super) rewards: RunRewards,
    /// The resolved configuration.
    pub(super) config: String,
    pub(super) meta: Meta,
    /// The numbers of each step.
    pub(super) steps: Vec<Metrics>,
    pub(super) evaluations: Vec<Evaluation>,
}

/// Where and by what a run was made.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct Meta {
    #[serde(default)]
    pub(super) command: Vec<String>,
    #[serde(default)]
    pub(super) commit: Option<String>,
    #[serde(default)]
    pub(super) grpo: String,
}

/// One evaluation of the held-out prompts.
pub(super) struct Evaluation {
    pub(super) step: usize,
    pub(super) metrics: Metrics,
    /// By the prompts' indices.
    pub(super) prompts: BTreeMap<usize, Judged>,
}

/// One held-out prompt of an evaluation.
#[derive(Default)]
pub(super) struct Judged {
    pub(super) text: String,
    pub(super) columns: BTreeMap<String, Value>,
    /// The mean over its samples, by reward.
    pub(super) means: BTreeMap<String, f64>,
    /// Pictures of its samples by draw, where they were kept.
    pub(super) pictures: BTreeMap<usize, PathBuf>,
    /// Each sample's scores by draw.
    pub(super) scores: BTreeMap<usize, BTreeMap<String, f64>>,
}

/// Finds the runs in these folders; an error where there is none, or one of an arm and seed twice.
pub(super) fn find(folders: &[&Path]) -> Result<Found> {
    let mut found = Found { plan: None, runs: Vec::new() };
    for folder in folders {
        if let Some(plan) = Plan::read(folder)? {
            found.plan.get_or_insert(plan);
        }
        let before = found.runs.len();
        look_into(folder, DEPTH, &mut found.runs)?;
        if found.runs.len() == before {
            return Err(Error::file(folder, "there is no run in it (no metrics.jsonl with rewards.json beside it)"));
        }
    }
    let place = |run: &Run| (run.arm.clone(), run.seed);
    for (at, run) in found.runs.iter().enumerate() {
        if let Some(other) = found.runs.iter().take(at).find(|other| place(other) == place(run)) {
            return Err(Error::file(
                &run.path,
                format!(
                    "arm `{}` has seed {} in {} as well; name the runs' folders by what they differ in",
                    run.arm,
                    run.seed,
                    other.path.display()
                ),
            ));
        }
    }
    Ok(found)
}

fn look_into(folder: &Path, depth: usize, runs: &mut Vec<Run>) -> Result<()> {
    if folder.join("metrics.jsonl").exists() && folder.join("rewards.json").exists() {
        runs.push(Run::read(folder)?);
        return Ok(());
    }
    if depth == 0 || !folder.is_dir() {
        return Ok(());
    }
    let entries = fs::read_dir(folder).map_err(|error| Error::file(folder, error))?;
    let mut inner: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    inner.retain(|path| path.is_dir());
    inner.sort();
    inner.iter().try_for_each(|path| look_into(path, depth - 1, runs))
}

/// What every file of settings of a run has.
#[derive(Deserialize)]
struct Length {
    n_steps: usize,
}

impl Run {
    fn read(path: &Path) -> Result<Self> {
        let name = |path: Option<&Path>| Some(path?.file_name()?.to_str()?.to_string());
        // `report .` names a folder by none of its names.
        let whole = path.canonicalize().map_err(|error| Error::file(path, error))?;
        let seed = name(Some(&whole)).and_then(|seed| seed.parse().ok());
        let arm = name(whole.parent());
        let (Some(seed), Some(arm)) = (seed, arm) else {
            return Err(Error::file(path, "the folder of a run is {arm}/{seed}, its last name a number; name it so"));
        };
        let run = RunFolder::open(path)?;
        let config = read(&path.join("config.toml"))?;
        let meta = serde_json::from_str(&read(&path.join("meta.json"))?).unwrap_or_default();
        let (steps, evaluations) = lines(&run)?;
        Ok(Self { arm, seed, path: path.into(), rewards: run.rewards()?, config, meta, steps, evaluations })
    }

    /// Why the run cannot be compared; `None` where it is whole.
    pub(super) fn fault(&self) -> Option<String> {
        let length: Length = match toml::from_str(&self.config) {
            Ok(length) => length,
            Err(error) => return Some(format!("its config.toml: {}", error.message())),
        };
        match (self.evaluations.first(), self.evaluations.last()) {
            (Some(first), _) if first.step != 0 => Some("its evaluation before training is missing".into()),
            (Some(_), Some(last)) if last.step == length.n_steps => None,
            (None, _) | (_, None) => Some("it holds out no prompts".into()),
            (_, Some(last)) => Some(format!("it stopped after step {} of {}", last.step, length.n_steps)),
        }
    }

    /// The first and the last evaluation.
    pub(super) fn ends(&self) -> Option<(&Evaluation, &Evaluation)> {
        self.evaluations.first().zip(self.evaluations.last())
    }
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|error| Error::file(path, error))
}

/// A line of `metrics.jsonl`.
#[derive(Deserialize)]
struct MetricsLine {
    step: usize,
    kind: String,
    #[serde(flatten)]
    metrics: BTreeMap<String, Value>,
}

/// The run's steps, and its evaluations with the scores of their prompts.
fn lines(run: &RunFolder) -> Result<(Vec<Metrics>, Vec<Evaluation>)> {
    let path = run.metrics();
    let (mut steps, mut evaluations) = (Vec::new(), Vec::new());
    for line in read(&path)?.lines() {
        // A line that a crash cut short is of a run that is not whole.
        let Ok(MetricsLine { step, kind, metrics }) = serde_json::from_str(line) else { continue };
        let metrics = metrics.into_iter().filter_map(|(name, value)| Some((name, value.as_f64()?))).collect();
        match kind.as_str() {
            "step" => steps.push(metrics),
            "held_out" => {
                let prompts = judged(&run.samples().join(format!("held_out-{step:05}")))?;
                evaluations.push(Evaluation { step, metrics, prompts });
            }
            _ => {}
        }
    }
    Ok((steps, evaluations))
}

/// What of a line of `samples.jsonl` a report is of.
#[derive(Deserialize)]
struct SampleLine {
    prompt_idx: usize,
    prompt: String,
    draw: usize,
    #[serde(default)]
    columns: BTreeMap<String, Value>,
    image: Option<String>,
    rewards: BTreeMap<String, Option<f64>>,
}

fn judged(folder: &Path) -> Result<BTreeMap<usize, Judged>> {
    let path = folder.join("samples.jsonl");
    let fault = |error: &dyn std::fmt::Display| Error::file(&path, error);
    let file = fs::File::open(&path).map_err(|error| fault(&error))?;
    let mut prompts: BTreeMap<usize, Judged> = BTreeMap::new();
    for (at, line) in BufReader::new(file).lines().enumerate() {
        let line = line.map_err(|error| fault(&error))?;
        let line: SampleLine =
            serde_json::from_str(&line).map_err(|error| fault(&format!("line {}: {error}", at + 1)))?;
        let judged = prompts.entry(line.prompt_idx).or_default();
        (judged.text, judged.columns) = (line.prompt, line.columns);
        // A name in a file that others may have written is not to lead out of the folder.
        let plain = line.image.filter(|name| !name.contains(['/', '\\']) && name != "..");
        judged.pictures.extend(plain.map(|name| (line.draw, folder.join(name))));
        let scores = line.rewards.into_iter().filter_map(|(name, score)| Some((name, score?)));
        judged.scores.insert(line.draw, scores.collect());
    }
    prompts.values_mut().for_each(Judged::average);
    Ok(prompts)
}

impl Judged {
    fn average(&mut self) {
        let mut sums: BTreeMap<&String, (f64, usize)> = BTreeMap::new();
        for (name, score) in self.scores.values().flatten() {
            let (sum, n) = sums.entry(name).or_default();
            (*sum, *n) = (*sum + score, *n + 1);
        }
        self.means = sums.into_iter().map(|(name, (sum, n))| (name.clone(), sum / n as f64)).collect();
    }
}
