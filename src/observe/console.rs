//! Progress for a person.

use std::io::{IsTerminal, Write};

use indicatif::{ProgressBar, ProgressStyle};

use super::{HeldOutReport, Metrics, Observer, StepReport};
use crate::{BoxError, Policy};

/// A progress bar on a terminal, twenty lines a run elsewhere; both on standard error.
pub struct Console {
    bar: Option<ProgressBar>,
}

impl Console {
    /// A console for a run that starts at `first_step` of `n_steps`.
    pub fn new(first_step: usize, n_steps: usize) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{bar:30} step {pos}/{len} {elapsed} (left {eta}) {msg}");
            let bar = ProgressBar::new(n_steps as u64).with_position(first_step as u64);
            style.map_or(bar.clone(), |style| bar.with_style(style))
        });
        Self { bar }
    }

    /// Says something that is not part of the progress.
    pub fn say(&mut self, line: &str) {
        match &self.bar {
            Some(bar) => bar.println(line),
            // A closed standard error is no reason to stop a run.
            None => drop(writeln!(std::io::stderr(), "{line}")),
        }
    }

    /// Step `step` of `n_steps` is done.
    pub fn advance(&mut self, step: usize, n_steps: usize, line: String) {
        if let Some(bar) = &self.bar {
            bar.set_message(line);
            bar.inc(1);
        } else if step.is_multiple_of((n_steps / 20).max(1)) || step + 1 == n_steps {
            self.say(&format!("step {:>5}/{n_steps}  {line}", step + 1));
        }
    }

    /// Leaves the bar as it is.
    pub fn close(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish();
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
        if let Some(fault) = &report.fault {
            let (step, why) = (report.step, fault.why);
            self.say(&format!("step {step}: an update was skipped: {why}; its batch is in skipped/step-{step:05}"));
        }
        if let Some(last) = report.excluded.last() {
            let (step, n) = (report.step, report.excluded.len());
            let by = format!("the last by `{}`: {}", last.reward, last.why);
            self.say(&format!("step {step}: {n} samples excluded, {by}; all are in excluded/step-{step:05}.jsonl"));
        }
        self.advance(report.step, report.n_steps, line);
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
        if report.metrics.get("alarm/hacking") == Some(&1.0) {
            self.say("ALARM  an optimised reward rose while a watched one fell: look at panel/before_after for what it likes");
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<(), BoxError> {
        self.close();
        Ok(())
    }
}
