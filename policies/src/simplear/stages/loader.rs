//! Rows ahead of the trainer: read, worded and tokenised on a thread of their own.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use crossbeam_channel::{Receiver, bounded};
use grpo::{Error, Result, Seed};

use super::rows::{RowConfig, TrainingRow};
use crate::simplear::TextTokenizer;
use crate::tokens::{Order, TokenSet};

/// Batches that wait for the trainer.
const AHEAD: usize = 4;

/// Where rows come from and what they say.
#[derive(Clone)]
pub(super) struct Source {
    pub(super) tokens: Arc<TokenSet>,
    pub(super) text: Arc<TextTokenizer>,
    pub(super) config: RowConfig,
    /// Decides what rows say.
    pub(super) seed: Seed,
}

impl Source {
    /// A row as it is said in an epoch.
    pub(super) fn row(&self, index: usize, epoch: u64) -> Result<TrainingRow> {
        let row = self.tokens.row(index)?;
        let text = self.config.text(&row.lines, self.seed.fold(epoch).fold(index as u64));
        self.text.training_row(text.as_deref(), &row.codes, self.config.max_caption_tokens)
    }
}

/// Batches in order, from some step on.
pub(super) struct Loader {
    batches: Receiver<Result<Vec<TrainingRow>>>,
    thread: Option<JoinHandle<()>>,
    /// The step whose batch comes next.
    next: usize,
}

impl Loader {
    /// Starts reading the batch of step `first`.
    pub(super) fn start(source: Source, mut order: Order, batch: usize, first: usize) -> Self {
        let (send, batches) = bounded(AHEAD);
        let thread = std::thread::spawn(move || {
            let n = order.n_trained() as u64;
            let mut rows = |step: usize| {
                let positions = (step * batch) as u64..((step + 1) * batch) as u64;
                positions.map(|position| source.row(order.row(position), position / n)).collect()
            };
            // Until the trainer has ended, and its receiver with it.
            (first..).all(|step| send.send(rows(step)).is_ok());
        });
        Self { batches, thread: Some(thread), next: first }
    }

    /// Whether the batch of this step comes next.
    pub(super) fn is_at(&self, step: usize) -> bool {
        self.next == step
    }

    /// The next batch, and for how many seconds it was not there.
    pub(super) fn next(&mut self) -> Result<(Vec<TrainingRow>, f64)> {
        let clock = Instant::now();
        let Ok(rows) = self.batches.recv() else {
            // The thread ends before its receiver by a panic alone, which is the trainer's then.
            match self.thread.take().map(JoinHandle::join) {
                Some(Err(panic)) => std::panic::resume_unwind(panic),
                _ => return Err(Error::config("the thread that reads rows has ended; start the run again")),
            }
        };
        self.next += 1;
        Ok((rows?, clock.elapsed().as_secs_f64()))
    }
}
