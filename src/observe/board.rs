//! TensorBoard: curves, histograms, panels, maps, text, layouts and the table of hyper-parameters.

use std::collections::BTreeMap;

use super::{HeldOutReport, Metrics, Observer, StepReport};
use crate::panel::{before_after, panel};
use crate::tensorboard::{Category, Chart, EventWriter, HParam};
use crate::{BoxError, Error, Group, Objective, Policy, Result, RunFolder, Sample};

/// Prompts of the picture that shows samples before and after.
const BEFORE_AFTER_PROMPTS: usize = 6;

/// TensorBoard curves, histograms, group panels, maps, sample tables and the run's row among the hyper-parameters.
pub struct TensorBoard {
    writer: EventWriter,
    run: RunFolder,
    first_step: usize,
    panel_groups: usize,
}

impl TensorBoard {
    /// Writes into the run's folder; panels show the first `panel_groups` groups of a step.
    pub fn create(run: &RunFolder, first_step: usize, panel_groups: usize) -> Result<Self> {
        let writer = EventWriter::create(run.path(), first_step)?;
        Ok(Self { writer, run: run.clone(), first_step, panel_groups })
    }

    /// Writes what the run is: its configuration as text and as hyper-parameters, and charts in which runs overlay.
    ///
    /// `optimised` and `held_out` are names of rewards.
    pub fn describe(mut self, config_toml: &str, optimised: &[String], held_out: &[String]) -> Result<Self> {
        if self.first_step == 0 {
            self.writer.text("config", 0, &format!("```toml\n{config_toml}\n```"))?;
        }
        let mut finals = vec!["reward".to_string()];
        finals.extend(held_out.iter().flat_map(|name| ["mean", "rise"].map(|kind| format!("held_out/{name}/{kind}"))));
        finals.extend(["kl", "entropy", "diversity"].map(String::from));
        let finals: Vec<&str> = finals.iter().map(String::as_str).collect();
        let hparams = hyper_parameters(config_toml)?;
        self.writer.hparams(&hparams, &finals, &group_of(&self.run, &hparams))?;
        self.writer.layout(&charts(optimised, held_out))?;
        self.writer.flush()?;
        Ok(self)
    }

    fn scalars(&mut self, step: usize, metrics: &Metrics) -> Result<()> {
        for (name, value) in metrics {
            self.writer.scalar(name, step, *value)?;
        }
        Ok(())
    }

    fn samples<P: Policy>(&mut self, report: &StepReport<'_, P>) -> Result<()> {
        let rewards: Vec<f32> = report.groups.iter().flat_map(Group::rewards).collect();
        let advantages: Vec<f32> = report.advantages.iter().flatten().copied().collect();
        self.writer.histogram("reward", report.step, &rewards)?;
        self.writer.histogram("advantage", report.step, &advantages)?;
        let shown = &report.groups[..self.panel_groups.min(report.groups.len())];
        if let Some(picture) = panel(shown, report.advantages, report.reward_names) {
            self.writer.image("panel/train", report.step, &picture)?;
        }
        for (name, map) in report.maps() {
            self.writer.image(&format!("maps/{name}"), report.step, &map)?;
        }
        self.writer.text("samples", report.step, &table(shown, report.advantages, report.reward_names))
    }
}

impl<P: Policy> Observer<P> for TensorBoard {
    fn step(&mut self, report: &StepReport<'_, P>) -> Result<(), BoxError> {
        self.scalars(report.step, report.metrics)?;
        if report.with_samples {
            self.samples(report)?;
        }
        if let Some(fault) = &report.fault {
            self.writer.text("skipped_updates", report.step, fault.why)?;
        }
        self.writer.flush()?;
        Ok(())
    }

    fn held_out(&mut self, report: &HeldOutReport<'_, P>) -> Result<(), BoxError> {
        self.scalars(report.step, report.metrics)?;
        let shown = &report.groups[..self.panel_groups.min(report.groups.len())];
        if let Some(picture) = panel(shown, &[], report.reward_names) {
            self.writer.image("panel/held_out", report.step, &picture)?;
            // Not where the samples of the first evaluation are not on disk.
            if let Ok(both) = before_after(&self.run, BEFORE_AFTER_PROMPTS, Some(report.step)) {
                self.writer.image("panel/before_after", report.step, &both)?;
            }
        }
        self.writer.flush()?;
        Ok(())
    }

    // A run that broke off leaves no mark: it may be resumed, and the first mark stays.
    fn finish(&mut self) -> Result<(), BoxError> {
        self.writer.session_end(true)?;
        self.writer.flush()?;
        Ok(())
    }
}

/// Runs of one configuration are one row of the table, whatever their seeds.
fn group_of(run: &RunFolder, hparams: &BTreeMap<String, HParam>) -> String {
    let name = run.path().parent().and_then(|name| name.file_name()).unwrap_or_default();
    format!("{} {:08x}", name.to_string_lossy(), crc32c::crc32c(format!("{hparams:?}").as_bytes()))
}

/// Sections and keys of a configuration that decide no number of the run, or that runs of one row differ in.
const NOT_COMPARED: [&str; 4] = ["log", "held_out", "name", "seed"];

/// The settings that runs are most often compared by. TensorBoard shows the first five names in the order of their bytes, in
/// which capitals come before all others.
const FIRST_COLUMNS: [(&str, &str); 5] = [
    ("rewards", "Rewards"),
    ("rollout.group_size", "Group size"),
    ("objective.kl_weight", "KL weight"),
    ("objective.surrogate", "Surrogate"),
    ("optim.lr", "Learning rate"),
];

/// Every setting by its dotted name, or its title in [`FIRST_COLUMNS`].
///
/// TensorBoard takes the columns from one run of a folder, so what may have other keys elsewhere (a list, a table inside a
/// section) is one text, and an option of the objective that is off says so.
fn hyper_parameters(config_toml: &str) -> Result<BTreeMap<String, HParam>> {
    let mut table: toml::Table = toml::from_str(config_toml).map_err(|error| Error::config(error.to_string()))?;
    table.retain(|key, _| !NOT_COMPARED.contains(&key));
    let mut found = HParam::settings(&table, 1);
    let options = serde_json::to_value(Objective::default()).map_err(|error| Error::config(error.to_string()))?;
    for (key, _) in options.as_object().into_iter().flatten().filter(|(_, value)| value.is_null()) {
        found.entry(format!("objective.{key}")).or_insert(HParam::Text("off".into()));
    }
    for (name, title) in FIRST_COLUMNS {
        found.remove(name).and_then(|value| found.insert(title.into(), value));
    }
    Ok(found)
}

/// What is looked at first: is it learning, is it hacking, is it healthy.
fn charts(optimised: &[String], held_out: &[String]) -> Vec<Category> {
    let chart = |title: &str, tags: &[String]| Chart { title: title.into(), tags: tags.to_vec() };
    let one = |title: &str, tag: &str| chart(title, &[format!("^{}$", escaped(tag))]);
    let mut learning = vec![one("reward", "reward")];
    learning.extend(optimised.iter().map(|name| one(name, &format!("rewards/{name}/mean"))));
    let mut watched: Vec<Chart> = held_out.iter().map(|name| one(name, &format!("held_out/{name}/mean"))).collect();
    watched.push(one("hacking alarm", "alarm/hacking"));
    let health = vec![
        one("KL to the reference", "kl"),
        one("entropy", "entropy"),
        one("deviation inside groups", "reward_group_std"),
        one("diversity inside groups", "diversity"),
        chart("clipped ratios", &["^clip_ratio/low_mean$".into(), "^clip_ratio/high_mean$".into()]),
        one("gradient norm", "grad_norm"),
    ];
    [("optimised", learning), ("held out", watched), ("health", health)]
        .map(|(title, charts)| Category { title: title.into(), charts })
        .into()
}

/// A tag as a regular expression that matches nothing else: rewards may have any name.
fn escaped(tag: &str) -> String {
    let is_plain = |letter: char| letter.is_alphanumeric() || "/_- ".contains(letter);
    tag.chars().flat_map(|letter| (!is_plain(letter)).then_some('\\').into_iter().chain([letter])).collect()
}

/// The groups' samples as a Markdown table.
fn table<P: Policy>(groups: &[Group<P>], advantages: &[Vec<f32>], names: &[String]) -> String {
    let cell = |text: &str| text.replace('|', "\\|").replace('\n', " ");
    let mut lines = vec![
        format!("| prompt | draw | sample | reward | {} | advantage |", names.join(" | ")),
        format!("|---|---|---|---|{}---|", "---|".repeat(names.len())),
    ];
    for (group, advantages) in groups.iter().zip(advantages) {
        let draws = group.draws();
        for at in group.ranking() {
            // A user's rollout may give more scores than samples.
            let (Some(scores), Some(completion)) = (group.scores.get(at), group.completions.get(at)) else {
                continue;
            };
            let draw = draws.get(at).copied().unwrap_or(at);
            let values: Vec<String> =
                scores.values.iter().map(|score| score.map_or("–".into(), |score| format!("{score:.4}"))).collect();
            let sample = completion.sample.text().map_or("(image)".into(), cell);
            let advantage = advantages.get(at).copied().unwrap_or_default();
            lines.push(format!(
                "| {} | {draw} | {sample} | {:.4} | {} | {advantage:+.3} |",
                cell(&group.prompt.text),
                scores.total,
                values.join(" | ")
            ));
        }
    }
    lines.join("\n")
}
