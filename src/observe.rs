//! Observers: where a run's numbers and pictures go.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::path::{Path, PathBuf};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value, json};

use crate::panel::panel;
use crate::tensorboard::EventWriter;
use crate::{BoxError, Error, Group, Policy, Result, RunFolder, Sample};

/// Metrics of one step by name, in name order; the names are documented in `src/docs/metrics.md`.
pub type Metrics = BTreeMap<String, f64>;

/// What the trainer tells its observers after a step.
pub struct StepReport<'a, P: Policy> {
    /// Steps done before this one: the first is 0.
    pub step: usize,
    /// Steps of the whole run.
    pub n_steps: usize,
    /// The step's numbers.
    pub metrics: &'a Metrics,
    /// The step's samples with their scores.
    pub groups: &'a [Group<P>],
    /// The advantage of every sample, in the groups' order.
    pub advantages: &'a [Vec<f32>],
    /// Names of the rewards, in the order of the scores.
    pub reward_names: &'a [String],
    /// Whether pictures are due at this step.
    pub with_samples: bool,
}

/// What the trainer tells its observers after samples of held-out prompts were scored.
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

/// TensorBoard curves, histograms and group panels.
pub struct TensorBoard {
    writer: EventWriter,
    panel_groups: usize,
}

impl TensorBoard {
    /// Writes into the run's folder; panels show the first `panel_groups` groups of a step.
    pub fn create(run: &RunFolder, first_step: usize, panel_groups: usize, config_toml: &str) -> Result<Self> {
        let mut writer = EventWriter::create(run.path(), first_step)?;
        if first_step == 0 {
            writer.text("config", 0, &format!("```toml\n{config_toml}\n```"))?;
        }
        Ok(Self { writer, panel_groups })
    }

    fn scalars(&mut self, step: usize, metrics: &Metrics) -> Result<()> {
        for (name, value) in metrics {
            self.writer.scalar(name, step, *value)?;
        }
        Ok(())
    }
}

impl<P: Policy> Observer<P> for TensorBoard {
    fn step(&mut self, report: &StepReport<'_, P>) -> Result<(), BoxError> {
        self.scalars(report.step, report.metrics)?;
        if report.with_samples {
            let rewards: Vec<f32> = report.groups.iter().flat_map(Group::rewards).collect();
            let advantages: Vec<f32> = report.advantages.iter().flatten().copied().collect();
            self.writer.histogram("reward", report.step, &rewards)?;
            self.writer.histogram("advantage", report.step, &advantages)?;
            let shown = &report.groups[..self.panel_groups.min(report.groups.len())];
            if let Some(picture) = panel(shown, report.advantages, report.reward_names) {
                self.writer.image("panel/train", report.step, &picture)?;
            }
        }
        self.writer.flush()?;
        Ok(())
    }

    fn held_out(&mut self, report: &HeldOutReport<'_, P>) -> Result<(), BoxError> {
        self.scalars(report.step, report.metrics)?;
        let shown = &report.groups[..self.panel_groups.min(report.groups.len())];
        if let Some(picture) = panel(shown, &[], report.reward_names) {
            self.writer.image("panel/held_out", report.step, &picture)?;
        }
        self.writer.flush()?;
        Ok(())
    }
}

/// One JSON object a step in `metrics.jsonl`.
pub struct JsonLines {
    file: File,
    path: PathBuf,
}

impl JsonLines {
    /// Appends to the run's file after dropping the lines of steps that will be done again.
    pub fn create(run: &RunFolder, first_step: usize) -> Result<Self> {
        let path = run.metrics();
        let kept = if path.exists() { lines_before(&path, first_step)? } else { String::new() };
        crate::checkpoint::write_synced(&path, kept.as_bytes())?;
        let file = OpenOptions::new().append(true).open(&path).map_err(|error| Error::file(&path, error))?;
        Ok(Self { file, path })
    }

    fn write(&mut self, kind: &str, step: usize, metrics: &Metrics) -> Result<()> {
        let mut line = Map::new();
        line.insert("step".into(), json!(step));
        line.insert("kind".into(), json!(kind));
        line.extend(metrics.iter().map(|(name, value)| (name.clone(), json!(value))));
        writeln!(self.file, "{}", Value::Object(line)).map_err(|error| Error::file(&self.path, error))
    }
}

fn lines_before(path: &Path, first_step: usize) -> Result<String> {
    let file = File::open(path).map_err(|error| Error::file(path, error))?;
    let mut kept = String::new();
    for line in BufReader::new(file).lines() {
        let line = line.map_err(|error| Error::file(path, error))?;
        // A line that a crash cut short is dropped: its step is done again.
        let Ok(value) = serde_json::from_str::<Value>(&line) else { continue };
        let step = value["step"].as_u64().unwrap_or(u64::MAX) as usize;
        // Held-out metrics at step N are written when N steps are done, before a checkpoint of step N.
        let done = if value["kind"] == "held_out" { step <= first_step && first_step > 0 } else { step < first_step };
        if done {
            kept.push_str(&line);
            kept.push('\n');
        }
    }
    Ok(kept)
}

impl<P: Policy> Observer<P> for JsonLines {
    fn step(&mut self, report: &StepReport<'_, P>) -> Result<(), BoxError> {
        Ok(self.write("step", report.step, report.metrics)?)
    }

    fn held_out(&mut self, report: &HeldOutReport<'_, P>) -> Result<(), BoxError> {
        Ok(self.write("held_out", report.step, report.metrics)?)
    }
}

/// Logged samples as files: `samples/step-N/` with the pictures, a panel and `samples.jsonl`.
pub struct SampleFiles {
    folder: PathBuf,
    n_groups: usize,
}

impl SampleFiles {
    /// Keeps the first `n_groups` groups of a logged step, and every held-out panel.
    pub fn create(run: &RunFolder, n_groups: usize) -> Self {
        Self { folder: run.samples(), n_groups }
    }

    fn folder(&self, name: &str) -> Result<PathBuf> {
        let folder = self.folder.join(name);
        fs::create_dir_all(&folder).map_err(|error| Error::file(&folder, error))?;
        Ok(folder)
    }
}

impl<P: Policy> Observer<P> for SampleFiles {
    fn step(&mut self, report: &StepReport<'_, P>) -> Result<(), BoxError> {
        if !report.with_samples {
            return Ok(());
        }
        let folder = self.folder(&format!("step-{:05}", report.step))?;
        let shown = &report.groups[..self.n_groups.min(report.groups.len())];
        write_groups(&folder, shown, report.advantages, report.reward_names)?;
        Ok(())
    }

    fn held_out(&mut self, report: &HeldOutReport<'_, P>) -> Result<(), BoxError> {
        let folder = self.folder(&format!("held_out-{:05}", report.step))?;
        write_groups(&folder, report.groups, &[], report.reward_names)?;
        Ok(())
    }
}

fn write_groups<P: Policy>(
    folder: &Path,
    groups: &[Group<P>],
    advantages: &[Vec<f32>],
    names: &[String],
) -> Result<()> {
    if let Some(picture) = panel(groups, advantages, names) {
        save_png(&folder.join("panel.png"), &picture)?;
    }
    let mut lines = String::new();
    for (row, group) in groups.iter().enumerate() {
        for (draw, completion) in group.completions.iter().enumerate() {
            let mut line = json!({"prompt_idx": group.prompt_idx, "prompt": group.prompt.text, "draw": draw});
            if let Some(picture) = completion.sample.picture() {
                let file = format!("{:05}-{draw:02}.png", group.prompt_idx);
                save_png(&folder.join(&file), picture)?;
                line["image"] = json!(file);
            }
            if let Some(text) = completion.sample.text() {
                line["text"] = json!(text);
            }
            line["advantage"] = json!(advantages.get(row).and_then(|row| row.get(draw)));
            if let Some(scores) = group.scores.get(draw) {
                line["reward"] = json!(scores.total);
                let by_name: Map<String, Value> =
                    names.iter().zip(&scores.values).map(|(name, score)| (name.clone(), json!(score))).collect();
                line["rewards"] = Value::Object(by_name);
            }
            line["trace"] = serde_json::to_value(&completion.trace).unwrap_or(Value::Null);
            lines.push_str(&format!("{line}\n"));
        }
    }
    crate::checkpoint::write_synced(&folder.join("samples.jsonl"), lines.as_bytes())
}

fn save_png(path: &Path, picture: &image::RgbImage) -> Result<()> {
    picture.save(path).map_err(|error| Error::file(path, error))
}

/// A progress bar on a terminal, a line every tenth of the run elsewhere; both on standard error.
pub struct Console {
    bar: Option<ProgressBar>,
    n_lines: usize,
}

impl Console {
    /// A console for a run that starts at `first_step` of `n_steps`.
    pub fn new(first_step: usize, n_steps: usize) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{bar:30} step {pos}/{len} {elapsed} (left {eta}) {msg}");
            let bar = ProgressBar::new(n_steps as u64).with_position(first_step as u64);
            style.map_or(bar.clone(), |style| bar.with_style(style))
        });
        Self { bar, n_lines: 0 }
    }

    fn say(&mut self, line: &str) {
        self.n_lines += 1;
        match &self.bar {
            Some(bar) => bar.println(line),
            // A closed standard error is no reason to stop a run.
            None => drop(writeln!(std::io::stderr(), "{line}")),
        }
    }
}

/// The numbers a person watches, where the step has them.
fn brief(metrics: &Metrics) -> String {
    let shown = [
        ("reward", "reward"),
        ("reward_group_std", "group std"),
        ("kl", "kl"),
        ("entropy", "entropy"),
        ("grad_norm", "grad"),
    ];
    let parts: Vec<String> = shown
        .iter()
        .filter_map(|(name, label)| metrics.get(*name).map(|value| format!("{label} {value:.3}")))
        .collect();
    parts.join("  ")
}

impl<P: Policy> Observer<P> for Console {
    fn step(&mut self, report: &StepReport<'_, P>) -> Result<(), BoxError> {
        let line = brief(report.metrics);
        if let Some(bar) = &self.bar {
            bar.set_message(line.clone());
            bar.inc(1);
        } else if report.step.is_multiple_of((report.n_steps / 20).max(1)) || report.step + 1 == report.n_steps {
            self.say(&format!("step {:>5}/{}  {line}", report.step + 1, report.n_steps));
        }
        Ok(())
    }

    fn held_out(&mut self, report: &HeldOutReport<'_, P>) -> Result<(), BoxError> {
        let parts: Vec<String> = report
            .reward_names
            .iter()
            .filter_map(|name| {
                let metric = |kind: &str| report.metrics.get(&format!("held_out/{name}/{kind}"));
                let error = |kind: &str| metric(kind).map_or(String::new(), |error| format!(" ± {error:.3}"));
                let rise = metric("rise").map(|rise| format!(" (rise {rise:+.3}{})", error("rise_sem")));
                Some(format!("{name} {:.3}{}{}", metric("mean")?, error("sem"), rise.unwrap_or_default()))
            })
            .collect();
        self.say(&format!("held-out prompts after {:>4} steps:  {}", report.step, parts.join("  ")));
        Ok(())
    }

    fn finish(&mut self) -> Result<(), BoxError> {
        if let Some(bar) = &self.bar {
            bar.finish();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resumed_log_drops_the_steps_that_are_done_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let lines = [
            r#"{"step":0,"kind":"held_out"}"#,
            r#"{"step":0,"kind":"step"}"#,
            r#"{"step":1,"kind":"step"}"#,
            r#"{"step":2,"kind":"held_out"}"#,
            r#"{"step":2,"kind":"step"}"#,
            r#"{"step":3,"ki"#,
        ];
        fs::write(&path, lines.join("\n")).unwrap();
        assert_eq!(lines_before(&path, 2).unwrap().lines().collect::<Vec<_>>(), &lines[..4]);
        assert_eq!(lines_before(&path, 0).unwrap(), "");
    }
}
