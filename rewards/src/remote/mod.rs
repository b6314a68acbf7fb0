//! Judging over HTTP: a scorer on another machine, or one in another language that is a service already.
//!
//! The message is the one of [`exchange`](crate::exchange): `POST` to the configured URL, the question as the body
//! (`application/octet-stream`), answered by 200 and the answer's JSON. In Python a server needs nothing but
//!
//! ```python
//! line, pictures = body.split(b"\n", 1)
//! header = json.loads(line)                      # header["prompts"][i]["text"], ["columns"]
//! for n_bytes in header["images"]:
//!     picture, pictures = pictures[:n_bytes], pictures[n_bytes:]   # PIL.Image.open(io.BytesIO(picture))
//! ```
//!
//! and `{"scores": [...], "model": "...", "version": "..."}`; `examples/score_server.py` is a whole one. [`serve`] serves
//! any reward of Rust; `examples/score_server.rs` shows it.
//!
//! | what goes wrong | what is done | whose samples fail |
//! |---|---|---|
//! | a score is `null`, `NaN` or no number; a text in `errors` | nothing more | its own |
//! | no connection, a broken one, no answer within `timeout_ms`; status 429 or 503 | asked again, `retry.times` times, each wait twice the former | the request's |
//! | a redirect | not asked again | the request's |
//! | status 408 or another 5xx | asked again likewise, and then in halves | those it fails on |
//! | another status; an answer too long or not of the protocol; another count of scores; another `model` or `version` than in the first answer | asked in halves | those it fails on |
//! | a picture that cannot be encoded | it is not sent | its own |
//!
//! In halves: what a server refuses together is asked about again, half by half, and the half that it refuses is halved
//! again down to the one picture at fault. Where it refuses both, all that was asked about has failed, so that a server
//! that refuses everything is asked three times in place of one.
//!
//! Where the run's rule for failed samples is `error`, the first of them in the batch's order stops the run
//! ([`Reward::score_batch`]); where it is `exclude`, those named above are left out and counted, and all others keep
//! their scores ([`Reward::score_each`]). None is ever scored 0 for having failed.
//!
//! The core stays synchronous: a reward owns a small runtime of its own, and whoever asks for scores waits for it as
//! for a channel, on any thread, also one of another runtime.
//! Only loopback addresses are accepted unless `allow_remote` says so; no redirect is followed, no proxy is looked for
//! in the environment.

mod client;
mod config;
mod server;

use std::sync::atomic::{AtomicU64, Ordering};

use grpo::{BoxError, Prompt, Result, Reward};
use image::RgbImage;

use crate::exchange::{Answers, Asked, Plan, Pool, Question, Said, Until, Verdict, scatter};
use crate::geneval::{Detection, Detector};
use client::{Client, Fault};

pub use config::{HttpConfig, HttpLimits, Retry};
pub use server::{ServerConfig, serve};

/// Judges an image by what a server says.
///
/// ```no_run
/// use grpo::{Prompt, Reward};
/// use grpo_rewards::remote::{HttpConfig, HttpReward};
///
/// let reward = HttpReward::new(HttpConfig::new("hps", "http://127.0.0.1:8000/score"))?;
/// let score = reward.score(&Prompt::new("a rose"), &image::RgbImage::new(64, 64));
/// # Ok::<(), grpo::Error>(())
/// ```
#[derive(Debug)]
pub struct HttpReward(Service);

/// Finds objects by what a server says.
///
/// The question is that of a reward with an empty prompt, one picture at a time; the answer holds `detections`.
///
/// ```no_run
/// use grpo_rewards::geneval::GenEval;
/// use grpo_rewards::remote::{HttpConfig, HttpDetector};
///
/// let detector = HttpDetector::new(HttpConfig::new("geneval", "http://127.0.0.1:8000/detect"))?;
/// let reward = GenEval::new(detector);
/// # Ok::<(), grpo::Error>(())
/// ```
#[derive(Debug)]
pub struct HttpDetector(Service);

/// A server that is asked.
#[derive(Debug)]
struct Service {
    config: HttpConfig,
    client: Client,
    answers: Answers,
    /// Whoever holds one may have a request under way, its pictures in memory.
    permits: Pool<()>,
    next_id: AtomicU64,
}

impl HttpReward {
    /// Checks the configuration and reads the token; the server is first asked when there is something to judge.
    pub fn new(config: HttpConfig) -> Result<Self> {
        Service::new(config).map(Self)
    }

    /// Requests that were sent again so far, for any reason.
    pub fn n_retries(&self) -> u64 {
        self.0.client.n_retries()
    }

    /// The model and its version as the first answer named them; `None` before it.
    pub fn scorer(&self) -> Option<String> {
        self.0.answers.scorer()
    }
}

impl HttpDetector {
    /// Checks the configuration and reads the token; the server is first asked when there is a picture.
    pub fn new(config: HttpConfig) -> Result<Self> {
        Service::new(config).map(Self)
    }

    /// The model and its version as the first answer named them; `None` before it.
    pub fn scorer(&self) -> Option<String> {
        self.0.answers.scorer()
    }
}

impl Detector for HttpDetector {
    fn detect(&self, image: &RgbImage) -> Result<Vec<Detection>, BoxError> {
        self.0.detect(image)
    }
}

impl Service {
    fn new(config: HttpConfig) -> Result<Self> {
        let client = Client::new(&config)?;
        let permits = Pool::new(vec![(); config.limits.max_in_flight.get()]);
        Ok(Self { config, client, permits, answers: Answers::by_connection(), next_id: AtomicU64::new(0) })
    }

    fn ask<T: Said>(&self, question: Question) -> Result<Vec<Verdict<T>>, Fault> {
        let (id, n_images) = (question.id, question.n_images);
        let answer = self.client.post(question)?;
        self.answers.verdicts(&answer, id, n_images).map_err(Fault::refused)
    }

    /// What one request brings for these rows, and whether it was refused as a whole.
    fn together<T: Said>(&self, rows: &[(&Prompt, &RgbImage)]) -> (Vec<Verdict<T>>, bool) {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let mut refused = false;
        let ask = |question| {
            self.ask(question).map_err(|fault| {
                refused = fault.refused;
                format!("{}: {}", self.config.url, fault.message)
            })
        };
        let verdicts = self.permits.lend(|()| Question::ask(rows, id, self.config.encoding, ask));
        (verdicts, refused)
    }

    /// Likewise; what is refused together is asked about in halves, as long as one of two is accepted.
    fn judge<T: Said>(&self, rows: &[(&Prompt, &RgbImage)]) -> Vec<Verdict<T>> {
        let (mut verdicts, mut refused) = self.together(rows);
        let mut doubtful = 0..rows.len();
        while refused && doubtful.len() > 1 {
            let middle = usize::midpoint(doubtful.start, doubtful.end);
            let (first, second) = (doubtful.start..middle, middle..doubtful.end);
            let (of_first, first_refused) = self.together(&rows[first.clone()]);
            let (of_second, second_refused) = self.together(&rows[second.clone()]);
            if first_refused && second_refused {
                break;
            }
            verdicts.splice(doubtful, of_first.into_iter().chain(of_second));
            refused = first_refused || second_refused;
            doubtful = if first_refused { first } else { second };
        }
        verdicts
    }
}

impl Asked for Service {
    fn verdicts<T: Said>(&self, batch: &[(&Prompt, &RgbImage)], until: Until) -> Vec<Verdict<T>> {
        let limits = &self.config.limits;
        let rows_per_question = limits.images_per_request.get();
        scatter(batch, &Plan { rows_per_question, n_at_once: limits.max_in_flight.get(), until }, |rows| {
            self.judge(rows)
        })
    }
}

impl Reward<RgbImage> for HttpReward {
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
