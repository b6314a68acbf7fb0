//! Run folders as they are read: curves, held-out scores by prompt, and what the run was.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use grpo::observe::Metrics;
use grpo::{Error, Result, RunFolder, RunRewards};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::ablation::{Plan, n_steps};

/// Folders below one that is named, in which a run is looked for: ablation, arm, seed.
const DEPTH: usize = 3;

/// What the named folders hold.
#[derive(Default)]
pub(super) struct Found {
    /// The plan of the ablation among them, or of that which they are in.
    pub(super) plan: Option<Plan>,
    /// Whether its whole folder was named, so that what is missing there is to be told.
    pub(super) is_whole: bool,
    pub(super) runs: Vec<Run>,
    /// Runs that cannot be read, or are not whole.
    pub(super) left_out: Vec<LeftOut>,
}

/// A run that is not compared.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LeftOut {
    /// Its folder's last two names, which are its arm and its seed.
    pub run: String,
    /// Why.
    pub why: String,
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
    /// Those of processes that worked on the run before.
    #[serde(default)]
    pub(super) earlier: Vec<Meta>,
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
    /// Texts of its samples by draw, where they are texts.
    pub(super) texts: BTreeMap<usize, String>,
    /// Each sample's scores by draw.
    pub(super) scores: BTreeMap<usize, BTreeMap<String, f64>>,
}

/// Finds the runs in these folders; an error where there is none, or one of an arm and seed twice.
pub(super) fn find(folders: &[&Path]) -> Result<Found> {
    let mut found = Found::default();
    for folder in folders {
        if let Some(plan) = plan_of(folder)? {
            found.is_whole |= folder.join(Plan::FILE).exists();
            found.plan.get_or_insert(plan);
        }
        let before = found.runs.len() + found.left_out.len();
        look_into(folder, DEPTH, &mut found)?;
        if found.runs.len() + found.left_out.len() == before {
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

/// The plan in a folder, or in those that an arm's and a run's folder are in.
fn plan_of(folder: &Path) -> Result<Option<Plan>> {
    let Ok(whole) = folder.canonicalize() else { return Ok(None) };
    for above in whole.ancestors().take(DEPTH) {
        if let Some(plan) = Plan::read(above)? {
            return Ok(Some(plan));
        }
    }
    Ok(None)
}

fn look_into(folder: &Path, depth: usize, found: &mut Found) -> Result<()> {
    if folder.join("metrics.jsonl").exists() && folder.join("rewards.json").exists() {
        let names: Vec<String> = folder.iter().rev().take(2).map(|name| name.to_string_lossy().into_owned()).collect();
        let left_out = |why| LeftOut { run: names.iter().rev().cloned().collect::<Vec<_>>().join("/"), why };
        match Run::read(folder).map(|run| (run.fault(), run)) {
            Ok((None, run)) => found.runs.push(run),
            Ok((Some(why), _)) => found.left_out.push(left_out(why)),
            Err(error) => found.left_out.push(left_out(error.to_string())),
        }
        return Ok(());
    }
    if depth == 0 || !folder.is_dir() {
        return Ok(());
    }
    let entries = fs::read_dir(folder).map_err(|error| Error::file(folder, error))?;
    let mut inner: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    inner.retain(|path| path.is_dir());
    inner.sort();
    inner.iter().try_for_each(|path| look_into(path, depth - 1, found))
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
        let meta = path.join("meta.json");
        let meta = serde_json::from_str(&read(&meta)?).map_err(|error| Error::file(&meta, error))?;
        let (steps, evaluations) = lines(&run)?;
        Ok(Self { arm, seed, path: path.into(), rewards: run.rewards()?, config, meta, steps, evaluations })
    }

    /// Why the run cannot be compared; `None` where it is whole.
    fn fault(&self) -> Option<String> {
        let n_steps = match n_steps(&self.config) {
            Ok(n_steps) => n_steps,
            Err(error) => return Some(error.to_string()),
        };
        match self.evaluations.first().zip(self.evaluations.last()) {
            None if self.rewards.held_out.is_empty() => Some("it holds out no prompts".into()),
            None => Some("it stopped before its first evaluation was over".into()),
            Some((first, _)) if first.step != 0 => Some("its evaluation before training is missing".into()),
            Some((_, last)) if last.step != n_steps => {
                Some(format!("its last evaluation is after step {} of {n_steps}", last.step))
            }
            Some(_) => None,
        }
    }

    /// The processes that worked on it, the first one first.
    pub(super) fn processes(&self) -> impl Iterator<Item = &Meta> {
        self.meta.earlier.iter().chain([&self.meta])
    }

    /// The first and the last evaluation.
    pub(super) fn ends(&self) -> Option<(&Evaluation, &Evaluation)> {
        self.evaluations.first().zip(self.evaluations.last())
    }
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|error| Error::file(path, error))
}

/// The numbers of the run's steps, `step` among them, and its evaluations with the scores of their prompts.
fn lines(run: &RunFolder) -> Result<(Vec<Metrics>, Vec<Evaluation>)> {
    let path = run.metrics();
    let (mut steps, mut evaluations) = (Vec::new(), BTreeMap::new());
    let file = fs::File::open(&path).map_err(|error| Error::file(&path, error))?;
    for line in BufReader::new(file).lines() {
        let line = line.map_err(|error| Error::file(&path, error))?;
        // A line that a crash cut short is of a run that is not whole.
        let Ok(line) = serde_json::from_str::<BTreeMap<String, Value>>(&line) else { continue };
        let kind = line.get("kind").and_then(Value::as_str).unwrap_or_default().to_string();
        let step = line.get("step").and_then(Value::as_u64).unwrap_or_default() as usize;
        let metrics = line.into_iter().filter_map(|(name, value)| Some((name, value.as_f64()?))).collect();
        match kind.as_str() {
            "step" => steps.push(metrics),
            // One that was made again takes the place of the one before.
            "held_out" => drop(evaluations.insert(step, metrics)),
            _ => {}
        }
    }
    let evaluations = evaluations.into_iter().map(|(step, metrics)| {
        let prompts = judged(&run.samples().join(format!("held_out-{step:05}")))?;
        Ok(Evaluation { step, metrics, prompts })
    });
    Ok((steps, evaluations.collect::<Result<_>>()?))
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
    text: Option<String>,
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
        judged.texts.extend(line.text.map(|text| (line.draw, text)));
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
