//! `samples/`: pictures, texts, traces and scores as files.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::{Fault, HeldOutReport, Observer, StepReport};
use crate::panel::panel;
use crate::{BoxError, Error, Excluded, Group, Policy, Result, RunFolder, Sample, write_whole};

/// Logged samples as files: `samples/step-N/` with the pictures, a panel, maps and `samples.jsonl`.
///
/// A step whose update was skipped leaves all of its samples in `skipped/step-N/`, with `why.txt` and the
/// replayed log-probs. Samples that a reward could not judge are named in `excluded/step-N.jsonl`
/// and `excluded/held_out-N.jsonl`.
pub struct SampleFiles {
    run: RunFolder,
    n_groups: usize,
    held_out_pictures: Option<usize>,
}

impl SampleFiles {
    /// Keeps the first `n_groups` groups of a logged step, and every held-out panel.
    pub fn create(run: &RunFolder, n_groups: usize) -> Self {
        Self { run: run.clone(), n_groups, held_out_pictures: None }
    }

    /// Keeps pictures, traces and log-probs of so many held-out prompts only, spread over the list, and scores of all.
    #[must_use]
    pub fn held_out_pictures(self, n_prompts: Option<usize>) -> Self {
        Self { held_out_pictures: n_prompts, ..self }
    }
}

impl<P: Policy> Observer<P> for SampleFiles {
    fn step(&mut self, report: &StepReport<'_, P>) -> Result<(), BoxError> {
        if let Some(fault) = &report.fault {
            let folder = made(self.run.path().join(format!("skipped/step-{:05}", report.step)))?;
            Written { advantages: report.advantages, names: report.reward_names, every: 1 }
                .write(&folder, report.groups)?;
            write_fault(&folder, fault)?;
        }
        write_excluded(&self.run, &format!("step-{:05}.jsonl", report.step), report.excluded)?;
        if !report.with_samples {
            return Ok(());
        }
        let folder = made(self.run.samples().join(format!("step-{:05}", report.step)))?;
        for (name, map) in report.maps() {
            save_png(&folder.join(format!("map-{name}.png")), &map)?;
        }
        let shown = &report.groups[..self.n_groups.min(report.groups.len())];
        Written { advantages: report.advantages, names: report.reward_names, every: 1 }
            .write(&folder, shown)
            .map_err(BoxError::from)
    }

    fn held_out(&mut self, report: &HeldOutReport<'_, P>) -> Result<(), BoxError> {
        let folder = made(self.run.samples().join(format!("held_out-{:05}", report.step)))?;
        let every = report.groups.len().div_ceil(self.held_out_pictures.unwrap_or(usize::MAX).max(1)).max(1);
        Written { advantages: &[], names: report.reward_names, every }.write(&folder, report.groups)?;
        let excluded: Vec<Excluded> = report.groups.iter().flat_map(|group| group.excluded.iter().cloned()).collect();
        write_excluded(&self.run, &format!("held_out-{:05}.jsonl", report.step), &excluded)
    }
}

/// A line for each sample that could not be judged; no file where there is none, nor one of a run that was broken off.
fn write_excluded(run: &RunFolder, name: &str, excluded: &[Excluded]) -> Result<(), BoxError> {
    let folder = run.path().join("excluded");
    if excluded.is_empty() {
        let path = folder.join(name);
        return match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::file(&path, error).into()),
            _ => Ok(()),
        };
    }
    let lines = excluded.iter().map(|sample| Ok(serde_json::to_string(sample)? + "\n"));
    let lines = lines.collect::<Result<String, BoxError>>()?;
    Ok(write_whole(&made(folder)?.join(name), lines.as_bytes())?)
}

/// `why.txt`, and `log_probs.jsonl` with a line for each sample of `samples.jsonl`. A number that is none is a text.
fn write_fault(folder: &Path, fault: &Fault<'_>) -> Result<()> {
    write_whole(&folder.join("why.txt"), format!("{}\n", fault.why).as_bytes())?;
    let number = |x: &f32| if x.is_finite() { json!(x) } else { json!(x.to_string()) };
    let row = |row: &Vec<f32>| row.iter().map(number).collect::<Vec<_>>();
    let mut lines = String::new();
    for (at, replayed) in fault.replayed.iter().enumerate() {
        let reference = fault.reference.and_then(|rows| rows.get(at)).map(row);
        lines.push_str(&format!("{}\n", json!({"replayed": row(replayed), "reference": reference})));
    }
    write_whole(&folder.join("log_probs.jsonl"), lines.as_bytes())
}

fn made(folder: PathBuf) -> Result<PathBuf> {
    fs::create_dir_all(&folder).map_err(|error| Error::file(&folder, error))?;
    Ok(folder)
}

/// What is written of groups.
struct Written<'a> {
    advantages: &'a [Vec<f32>],
    names: &'a [String],
    /// Of one in so many prompts, pictures and all that replay needs; of the others the scores.
    every: usize,
}

impl Written<'_> {
    fn write<P: Policy>(&self, folder: &Path, groups: &[Group<P>]) -> Result<()> {
        if self.every == 1
            && let Some(picture) = panel(groups, self.advantages, self.names)
        {
            save_png(&folder.join("panel.png"), &picture)?;
        }
        let lines = groups.iter().enumerate().map(|(row, group)| self.lines(folder, row, group));
        write_whole(&folder.join("samples.jsonl"), lines.collect::<Result<String>>()?.as_bytes())
    }

    /// A line a sample of one group.
    fn lines<P: Policy>(&self, folder: &Path, row: usize, group: &Group<P>) -> Result<String> {
        let mut lines = String::new();
        for (at, draw) in group.draws().into_iter().enumerate() {
            let Some(mut line) = self.scored(group, at, draw) else { continue };
            line["advantage"] = json!(self.advantages.get(row).and_then(|row| row.get(at)));
            if row.is_multiple_of(self.every) {
                add_sample(&mut line, folder, group, (at, draw))?;
            }
            lines.push_str(&format!("{line}\n"));
        }
        Ok(lines)
    }

    /// The prompt with its columns, and what the rewards gave.
    fn scored<P: Policy>(&self, group: &Group<P>, at: usize, draw: usize) -> Option<Value> {
        group.completions.get(at)?;
        let mut line = json!({"prompt_idx": group.prompt_idx, "prompt": group.prompt.text, "draw": draw});
        if !group.prompt.columns.is_empty() {
            line["columns"] = json!(group.prompt.columns);
        }
        if let Some(scores) = group.scores.get(at) {
            line["reward"] = json!(scores.total);
            let by_name: Map<String, Value> =
                self.names.iter().zip(&scores.values).map(|(name, score)| (name.clone(), json!(score))).collect();
            line["rewards"] = Value::Object(by_name);
        }
        Some(line)
    }
}

/// The sample itself, its log-probs and its trace; a picture becomes a file.
fn add_sample<P: Policy>(line: &mut Value, folder: &Path, group: &Group<P>, (at, draw): (usize, usize)) -> Result<()> {
    let Some(completion) = group.completions.get(at) else { return Ok(()) };
    if let Some(picture) = completion.sample.picture() {
        let file = format!("{:05}-{draw:02}.png", group.prompt_idx);
        save_png(&folder.join(&file), picture)?;
        line["image"] = json!(file);
    }
    if let Some(text) = completion.sample.text() {
        line["text"] = json!(text);
    }
    line["log_probs"] = json!(completion.log_probs);
    line["trace"] = serde_json::to_value(&completion.trace).unwrap_or(Value::Null);
    Ok(())
}

fn save_png(path: &Path, picture: &image::RgbImage) -> Result<()> {
    picture.save(path).map_err(|error| Error::file(path, error))
}
