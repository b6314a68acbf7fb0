//! One progress for many runs.

use std::io::{IsTerminal, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use grpo::observe::StepReport;
use grpo::{BoxError, Observer, Policy};
use indicatif::{ProgressBar, ProgressStyle};

/// Parts of a run that the bar can tell apart.
const PARTS: usize = 1000;

/// A bar over all runs on a terminal, a line a run elsewhere; both on standard error.
pub(super) struct Progress {
    bar: Option<ProgressBar>,
    n_runs: usize,
    state: Mutex<State>,
}

struct State {
    /// Parts done, of [`PARTS`] a run.
    done: usize,
    /// Those of them that were done before.
    before: usize,
    runs: usize,
    started: Instant,
}

impl Progress {
    /// Over so many runs, of which some were finished before.
    pub(super) fn new(n_runs: usize, n_finished: usize) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new((n_runs * PARTS) as u64).with_position((n_finished * PARTS) as u64);
            match ProgressStyle::with_template("{bar:30} {percent}% {elapsed} (left {eta}) {msg}") {
                Ok(style) => bar.with_style(style),
                Err(_) => bar,
            }
        });
        let done = n_finished * PARTS;
        let state = State { done, before: done, runs: n_finished, started: Instant::now() };
        Self { bar, n_runs, state: Mutex::new(state) }
    }

    pub(super) fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.println(line),
            // A closed standard error is no reason to stop.
            None => drop(writeln!(std::io::stderr(), "{line}")),
        }
    }

    /// A run has come from one part of [`PARTS`] to another; what it says of itself is shown on the bar.
    fn advance(&self, from: usize, to: usize, message: String) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).done += to - from;
        if let Some(bar) = &self.bar {
            bar.inc((to - from) as u64);
            bar.set_message(message);
        }
    }

    /// A run is over.
    pub(super) fn end_run(&self, line: &str) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.runs += 1;
        let seconds = state.started.elapsed().as_secs_f64();
        let (new, left) = (state.done - state.before, (self.n_runs * PARTS).saturating_sub(state.done));
        let left = if new == 0 { 0.0 } else { seconds * left as f64 / new as f64 };
        self.say(&format!(
            "{line}  ({} of {} runs, {:.0} min, {:.0} min left)",
            state.runs,
            self.n_runs,
            seconds / 60.0,
            left / 60.0
        ));
    }

    pub(super) fn close(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Tells the common progress of one run.
pub(super) struct Watch {
    progress: Arc<Progress>,
    label: String,
    /// The part of [`PARTS`] that the run has come to.
    at: usize,
}

impl Watch {
    pub(super) fn new(progress: Arc<Progress>, label: String) -> Self {
        Self { progress, label, at: 0 }
    }
}

impl<P: Policy> Observer<P> for Watch {
    fn step(&mut self, report: &StepReport<'_, P>) -> Result<(), BoxError> {
        let now = (PARTS * (report.step + 1) / report.n_steps.max(1)).clamp(self.at, PARTS);
        let reward = report.metrics.get("reward").copied().unwrap_or_default();
        let message = format!("{} step {}/{} reward {reward:.3}", self.label, report.step + 1, report.n_steps);
        self.progress.advance(self.at, now, message);
        self.at = now;
        if let Some(fault) = &report.fault {
            self.progress.say(&format!("{}: step {}: an update was skipped: {}", self.label, report.step, fault.why));
        }
        Ok(())
    }
}
