//! One progress for many runs.

use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
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
    /// Parts that are done, or that will not be, of [`PARTS`] a run.
    past: usize,
    /// Those that this process did.
    done: usize,
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
        let state = State { past: n_finished * PARTS, done: 0, runs: n_finished, started: Instant::now() };
        Self { bar, n_runs, state: Mutex::new(state) }
    }

    fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.println(line),
            // A closed standard error is no reason to stop.
            None => drop(writeln!(std::io::stderr(), "{line}")),
        }
    }

    /// So many parts of a run are past; those before it was gone on with cost nothing now.
    fn pass(&self, n_parts: usize, n_done: usize) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        (state.past, state.done) = (state.past + n_parts, state.done + n_done);
        if let Some(bar) = &self.bar {
            bar.inc(n_parts as u64);
        }
    }

    fn show(&self, message: String) {
        if let Some(bar) = &self.bar {
            bar.set_message(message);
        }
    }

    /// A run is over.
    fn end_run(&self, line: &str) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.runs += 1;
        let seconds = state.started.elapsed().as_secs_f64();
        let left = (self.n_runs * PARTS).saturating_sub(state.past) as f64;
        let left = if state.done == 0 { 0.0 } else { seconds * left / state.done as f64 };
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
#[derive(Clone)]
pub(super) struct Watch {
    progress: Arc<Progress>,
    label: String,
    /// The part of [`PARTS`] that the run has come to.
    at: Arc<AtomicUsize>,
}

impl Watch {
    pub(super) fn new(progress: &Arc<Progress>, label: String) -> Self {
        Self { progress: Arc::clone(progress), label, at: Arc::default() }
    }

    /// The run goes on behind steps that were done before.
    pub(super) fn begin_at(&self, step: usize, n_steps: usize) {
        let at = PARTS * step / n_steps.max(1);
        self.at.store(at, Ordering::Relaxed);
        self.progress.pass(at, 0);
    }

    /// The run is over, by its end or before it.
    pub(super) fn end(&self, line: &str) {
        self.progress.pass(PARTS.saturating_sub(self.at.load(Ordering::Relaxed)), 0);
        self.progress.end_run(&format!("{} {line}", self.label));
    }
}

impl<P: Policy> Observer<P> for Watch {
    fn step(&mut self, report: &StepReport<'_, P>) -> Result<(), BoxError> {
        let before = self.at.load(Ordering::Relaxed);
        let now = (PARTS * (report.step + 1) / report.n_steps.max(1)).clamp(before, PARTS);
        self.at.store(now, Ordering::Relaxed);
        self.progress.pass(now - before, now - before);
        let reward = report.metrics.get("reward").copied().unwrap_or_default();
        self.progress.show(format!("{} step {}/{} reward {reward:.3}", self.label, report.step + 1, report.n_steps));
        if let Some(fault) = &report.fault {
            self.progress.say(&format!("{}: step {}: an update was skipped: {}", self.label, report.step, fault.why));
        }
        Ok(())
    }
}
