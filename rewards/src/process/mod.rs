//! Judging in a program of one's own: a researcher's Python, kept running and asked over its standard input and output.
//!
//! The message is the one of [`exchange`](crate::exchange), a line and the pictures' bytes on stdin, a line back on
//! stdout; pictures travel as PNG. `rewards/python/grpo_scorer.py` speaks it, so that a reward is a function:
//!
//! ```python
//! from grpo_scorer import serve
//! serve(lambda prompt, image, columns: float(np.asarray(image).mean()))
//! ```
//!
//! Standard error is passed through, and its last line is part of the message when a program ends.
//!
//! | what goes wrong | what is done | whose samples fail |
//! |---|---|---|
//! | a score is `null`, `NaN` or no number; a text in `errors` (a Python exception) | nothing more | its own |
//! | no answer within `timeout_ms`, or the program ends | it is killed and started again, and asked once more | the question's |
//! | a line that is no answer, too long, of another question; another count of scores; another model | not asked again | the question's |
//! | a picture that cannot be encoded | it is not sent | its own |
//!
//! Where the run's rule for failed samples is `error`, the first of them in the batch's order stops the run
//! ([`Reward::score_batch`]); where it is `exclude`, those named above are left out and counted, and all others keep
//! their scores ([`Reward::score_each`]). None is ever scored 0 for having failed.
//!
//! No program outlives its reward or its run (on Unix). Each is started in a process group whose leader is a `/bin/sh`
//! that waits for the end of a pipe from the run, and then kills the group:
//!
//! - the reward is dropped, or the program was too slow: the program and all that it has started are killed, in the
//!   middle of a question as well, and the program is waited for;
//! - the run ends in any way that drops nothing, such as Ctrl-C, SIGTERM, SIGKILL, a panic that aborts or
//!   `std::process::exit`: they are killed likewise;
//! - whatever has left the group (`setsid`, a daemon, another machine) is not killed. A program that reads its standard
//!   input sees its end in all these cases: `grpo_scorer.py` then stops, after the question at hand.

mod child;
#[cfg(unix)]
mod group;

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use grpo::{BoxError, Error, Prompt, Result, Reward};
use image::RgbImage;
use serde::{Deserialize, Serialize};

use crate::exchange::{Answers, Asked, Encoding, Plan, Pool, Question, Said, Until, Verdict, scatter};
use crate::geneval::{Detection, Detector};
use child::{Child, Silence};

/// Which program judges, and how long it is waited for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProcessConfig {
    /// The reward's name in logs and panels.
    pub name: String,
    /// The program and its arguments, such as `["python3", "my_reward.py"]`; no shell reads them.
    pub command: Vec<String>,
    /// What a question may take.
    #[serde(default)]
    pub limits: ProcessLimits,
}

/// What a question to a process may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ProcessLimits {
    /// Processes of the program, each asked one question at a time.
    pub workers: NonZeroUsize,
    /// The most pictures of one question; fewer where they are large (see [`exchange`](crate::exchange)).
    pub images_per_request: NonZeroUsize,
    /// How long a question is waited for.
    pub timeout_ms: u64,
    /// How much longer the first answer of a process is waited for: it may have a model to load.
    pub start_timeout_ms: u64,
    /// The longest answer that is read.
    pub max_answer_bytes: usize,
}

impl Default for ProcessLimits {
    fn default() -> Self {
        Self {
            workers: NonZeroUsize::MIN,
            images_per_request: NonZeroUsize::MIN.saturating_add(15),
            timeout_ms: 60_000,
            start_timeout_ms: 300_000,
            max_answer_bytes: 1 << 20,
        }
    }
}

/// Judges an image by what a program says.
///
/// ```no_run
/// use grpo::{Prompt, Reward};
/// use grpo_rewards::process::{ProcessConfig, ProcessLimits, ProcessReward};
///
/// let command = ["python3", "examples/scorer.py"].map(String::from).to_vec();
/// let reward = ProcessReward::new(ProcessConfig { name: "red".into(), command, limits: ProcessLimits::default() })?;
/// let score = reward.score(&Prompt::new("a rose"), &image::RgbImage::new(64, 64));
/// # Ok::<(), grpo::Error>(())
/// ```
#[derive(Debug)]
pub struct ProcessReward(Service);

/// Finds objects by what a program says: `serve_detector` of `grpo_scorer.py`, or whatever answers with `detections`.
///
/// ```no_run
/// use grpo_rewards::geneval::GenEval;
/// use grpo_rewards::process::{ProcessConfig, ProcessDetector, ProcessLimits};
///
/// let command = ["python3", "my_detector.py"].map(String::from).to_vec();
/// let config = ProcessConfig { name: "geneval".into(), command, limits: ProcessLimits::default() };
/// let reward = GenEval::new(ProcessDetector::new(config)?);
/// # Ok::<(), grpo::Error>(())
/// ```
#[derive(Debug)]
pub struct ProcessDetector(Service);

/// A program that is asked.
#[derive(Debug)]
struct Service {
    config: ProcessConfig,
    workers: Pool<Worker>,
    answers: Answers,
    next_id: AtomicU64,
}

/// A place for a process; empty after one that could not be kept.
#[derive(Debug)]
struct Worker(Option<Child>);

impl ProcessReward {
    /// Starts the processes, so that a program that is not there is an error now; they may load their models meanwhile.
    pub fn new(config: ProcessConfig) -> Result<Self> {
        Service::new(config).map(Self)
    }

    /// The model and its version as the first answer named them; `None` before it.
    pub fn scorer(&self) -> Option<String> {
        self.0.answers.scorer()
    }
}

impl ProcessDetector {
    /// Starts the processes, as [`ProcessReward::new`] does.
    pub fn new(config: ProcessConfig) -> Result<Self> {
        Service::new(config).map(Self)
    }

    /// The model and its version as the first answer named them; `None` before it.
    pub fn scorer(&self) -> Option<String> {
        self.0.answers.scorer()
    }
}

impl Detector for ProcessDetector {
    fn detect(&self, image: &RgbImage) -> Result<Vec<Detection>, BoxError> {
        self.0.detect(image)
    }
}

impl Service {
    fn new(config: ProcessConfig) -> Result<Self> {
        let ProcessConfig { name, command, limits } = &config;
        if name.is_empty() || command.first().is_none_or(String::is_empty) {
            return Err(Error::config("a process reward needs a name and a command; give both"));
        }
        if limits.timeout_ms == 0 || limits.max_answer_bytes == 0 {
            return Err(Error::config(format!(
                "reward `{name}`: timeout_ms is {}, max_answer_bytes {}; give at least 1",
                limits.timeout_ms, limits.max_answer_bytes
            )));
        }
        let start = |_| {
            let child = Child::start(command, limits.max_answer_bytes);
            let child = child.map_err(|message| Error::config(format!("reward `{name}`: {message}")))?;
            Ok(Worker(Some(child)))
        };
        let workers = (0..limits.workers.get()).map(start).collect::<Result<Vec<Worker>>>()?;
        Ok(Self { workers: Pool::new(workers), config, answers: Answers::by_line(), next_id: AtomicU64::new(0) })
    }

    /// Asks once, and once more in a new process where the first one died or was too slow.
    fn ask<T: Said>(&self, worker: &mut Worker, question: Question) -> Result<Vec<Verdict<T>>, String> {
        let (id, n_images) = (question.id, question.n_images);
        let body = question.body.into();
        let line = match self.ask_once(worker, &body) {
            Err(Silence::Worthwhile(_)) => self.ask_once(worker, &body),
            answered => answered,
        };
        let line = line.map_err(|silence| match silence {
            Silence::Worthwhile(message) => format!("{message}; it was started again once"),
            Silence::Final(message) => message,
        })?;
        let verdicts = self.answers.verdicts(&line, id, n_images);
        // What was printed may belong to another question, and so would the next line.
        if verdicts.is_err() {
            worker.0 = None;
        }
        verdicts
    }

    fn ask_once(&self, worker: &mut Worker, body: &Arc<[u8]>) -> Result<Vec<u8>, Silence> {
        let limits = &self.config.limits;
        let mut child = match worker.0.take() {
            Some(child) => child,
            None => Child::start(&self.config.command, limits.max_answer_bytes).map_err(Silence::Final)?,
        };
        let answer = child.ask(
            body,
            Duration::from_millis(limits.timeout_ms),
            Duration::from_millis(limits.start_timeout_ms),
        )?;
        worker.0 = Some(child);
        Ok(answer)
    }
}

impl Asked for Service {
    fn verdicts<T: Said>(&self, batch: &[(&Prompt, &RgbImage)], until: Until) -> Vec<Verdict<T>> {
        let limits = &self.config.limits;
        // A batch that is smaller than all processes could take is divided evenly among them.
        let share = batch.len().div_ceil(limits.workers.get()).max(1);
        let rows_per_question = limits.images_per_request.get().min(share);
        scatter(batch, &Plan { rows_per_question, n_at_once: limits.workers.get(), until }, |rows| {
            let id = self.next_id.fetch_add(1, Ordering::Relaxed);
            let named = |message| format!("`{}` {message}", self.config.command.join(" "));
            let ask = |question| self.workers.lend(|worker| self.ask(worker, question)).map_err(named);
            Question::ask(rows, id, Encoding::Png, ask)
        })
    }
}

impl Reward<RgbImage> for ProcessReward {
    fn name(&self) -> &str {
        &self.0.config.name
    }

    fn score(&self, prompt: &Prompt, image: &RgbImage) -> Result<f32, BoxError> {
        self.0.score(prompt, image)
    }

    fn score_batch(&self, batch: &[(&Prompt, &RgbImage)]) -> Result<Vec<f32>, BoxError> {
        self.0.score_batch(batch)
    }

    fn score_each(&self, batch: &[(&Prompt, &RgbImage)]) -> Vec<Result<f32, BoxError>> {
        self.0.score_each(batch)
    }
}
