//! The loop of a supervised stage: batches in, curves, pictures and checkpoints out, resumed to the bit.
//!
//! What is learned is a [`Learner`]: [`crate::simplear::CaptionedTokens`] learns images as tokens (pretraining and
//! fine-tuning), [`crate::cosmos::Reconstruction`] learns the tokens themselves. The loop owns what both share: the optimiser,
//! the moving average of the weights, checkpoints, the run's folder.

mod ema;
mod peak;
mod plan;
mod record;

use std::path::Path;
use std::time::Instant;

use grpo::observe::Metrics;
use grpo::{AdamW, Checkpoint, Checkpoints, Error, Gradients, Params, PeakMemory, Result, RunFolder};
use image::RgbImage;
use serde_json::{Value, json};

use ema::Average;
pub use peak::peak_flops;
pub use plan::{StageLog, StagePlan};
use record::Record;

/// What one step learned.
#[derive(Debug, Default)]
pub struct Learned {
    /// The loss of the step's batch before its update.
    pub loss: f64,
    /// Images of the batch.
    pub n_images: usize,
    /// Tokens that went through the network; 0 where there are none.
    pub n_tokens: usize,
    /// Arithmetic of the model for the batch, forward and back, in FLOP; 0 where it is not known.
    pub flops: f64,
    /// Seconds that the step waited for its batch.
    pub waited_s: f64,
    /// Further numbers by name.
    pub metrics: Metrics,
}

/// Something that is trained on batches, one a step.
pub trait Learner {
    /// What is trained.
    fn params(&self) -> Params;

    /// Adds the gradient of a step's loss. The batch is a function of the step alone.
    fn learn(&mut self, step: usize, gradients: &mut Gradients) -> Result<Learned>;

    /// The loss on what is never trained on; no number where nothing is held out.
    fn validate(&mut self) -> Result<Metrics>;

    /// What a person looks at, by name; the same prompts and draws at every step.
    fn pictures(&mut self) -> Result<Vec<(String, RgbImage)>>;

    /// Writes what the next stage starts from.
    fn save(&self, folder: &Path) -> Result<()>;

    /// What a resumed run must share beside the plan, a line each: data and sizes.
    fn identity(&self) -> Result<String>;
}

/// A stage that is being trained.
pub struct Stage<L: Learner> {
    plan: StagePlan,
    learner: L,
    optimizer: AdamW,
    average: Option<Average>,
    n_done: usize,
    n_tokens: u64,
    skips_in_row: usize,
    n_skipped: u64,
    evaluated_at: Option<usize>,
    checkpoints: Option<Checkpoints>,
    folder: Option<RunFolder>,
    record: Option<Record>,
    memory: PeakMemory,
    peak_flops: Option<f64>,
}

impl<L: Learner> Stage<L> {
    /// A stage before its first step.
    pub fn new(plan: StagePlan, learner: L) -> Result<Self> {
        plan.check()?;
        let params = learner.params();
        if params.is_empty() {
            return Err(Error::config("nothing is trainable; load the policy trainable, or make a new one"));
        }
        let average = plan.ema.map(|decay| Average::of(&params, decay)).transpose()?;
        let optimizer = AdamW::new(params, plan.optim)?.on_device(crate::device_optimiser());
        Ok(Self {
            plan,
            learner,
            optimizer,
            average,
            n_done: 0,
            n_tokens: 0,
            skips_in_row: 0,
            n_skipped: 0,
            evaluated_at: None,
            checkpoints: None,
            folder: None,
            record: None,
            memory: PeakMemory::default(),
            peak_flops: None,
        })
    }

    /// Says what the device can do at best, in FLOP a second, so that the share that is used can be logged.
    #[must_use]
    pub fn measure_against(self, peak_flops: Option<f64>) -> Self {
        Self { peak_flops, ..self }
    }

    /// Records the run in its folder, and goes on with the run that is there.
    pub fn record_in(mut self, run: &RunFolder, config_toml: &str) -> Result<Self> {
        let checkpoints = run.checkpoints(self.plan.log.keep_checkpoints);
        if let Some(path) = checkpoints.latest()? {
            self.resume(&Checkpoint::load(&path)?)?;
        }
        run.describe(config_toml, self.plan.seed)?;
        self.record = Some(Record::create(run, (self.n_done, self.plan.n_steps), config_toml)?);
        self.checkpoints = Some(checkpoints);
        self.folder = Some(run.clone());
        Ok(self)
    }

    /// The learner.
    pub fn learner(&self) -> &L {
        &self.learner
    }

    /// Steps done.
    pub fn n_done(&self) -> usize {
        self.n_done
    }

    /// Takes over a checkpoint of the same run.
    pub fn resume(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        let (theirs, ours) = (&checkpoint.state["identity"], self.identity()?);
        let lines = |text: &Value| text.as_str().unwrap_or_default().lines().map(String::from).collect::<Vec<_>>();
        let (theirs, ours) = (lines(theirs), lines(&Value::from(ours)));
        let n = theirs.len().max(ours.len());
        let line = |lines: &[String], at: usize| lines.get(at).cloned().unwrap_or_else(|| "nothing".into());
        if let Some(at) = (0..n).find(|at| theirs.get(*at) != ours.get(*at)) {
            return Err(Error::config(format!(
                "the checkpoint is of another run (there {}, here {}); resume with the configuration and the data of the run",
                line(&theirs, at),
                line(&ours, at)
            )));
        }
        checkpoint.restore(&mut self.optimizer)?;
        if let Some(average) = &self.average {
            checkpoint.restore_reference(average.params())?;
        }
        self.n_done = checkpoint.step;
        let count = |name: &str| checkpoint.state[name].as_u64().unwrap_or(0);
        (self.n_tokens, self.n_skipped) = (count("n_tokens"), count("n_skipped"));
        self.skips_in_row = count("skips_in_row") as usize;
        self.evaluated_at = checkpoint.state["evaluated_at"].as_u64().map(|step| step as usize);
        Ok(())
    }

    /// What decides the run's numbers, a line each.
    fn identity(&self) -> Result<String> {
        let decisive = StagePlan { log: StageLog::default(), ..self.plan.clone() };
        let plan = toml::to_string(&decisive).map_err(|error| Error::config(error.to_string()))?;
        Ok(format!("{plan}{}", self.learner.identity()?))
    }

    /// Trains to the last step. A batch that cannot be had and a divergence leave a checkpoint of all steps done before;
    /// another error, such as a full disk's, leaves the last that was due.
    pub fn run(&mut self) -> Result<()> {
        if self.n_done == 0 || self.evaluation_is_due() && self.evaluated_at != Some(self.n_done) {
            self.evaluate()?;
        }
        while self.n_done < self.plan.n_steps {
            self.step()?;
            self.after_step()?;
        }
        if let Some(run) = &self.folder {
            self.learner.save(&run.path().join("policy"))?;
            if let Some(average) = &mut self.average {
                average.exchange(self.optimizer.params())?;
                let saved = self.learner.save(&run.path().join("policy_ema"));
                average.exchange(self.optimizer.params())?;
                saved?;
            }
        }
        self.record.as_mut().map_or(Ok(()), Record::finish)
    }

    /// One update.
    pub fn step(&mut self) -> Result<()> {
        let clock = Instant::now();
        self.memory.forget();
        let mut gradients = Gradients::new();
        let learned = match self.learner.learn(self.n_done, &mut gradients) {
            Ok(learned) => learned,
            Err(error) => return Err(self.keep_what_is_done(error)),
        };
        if self.n_done == 0 {
            check_coverage(self.optimizer.params(), &gradients)?;
        }
        let rate = self.plan.optim.rate(self.n_done, self.plan.n_steps);
        let updated = match learned.loss.is_finite() {
            true => self.optimizer.step(&gradients, rate),
            false => Err(Error::NotFinite(format!("the loss is {}; nothing was updated", learned.loss))),
        };
        drop(gradients);
        let mut metrics = learned.metrics.clone();
        let fault = match updated {
            Ok(norm) => {
                metrics.insert("grad_norm".into(), norm);
                None
            }
            Err(Error::NotFinite(why)) => Some(why),
            Err(other) => return Err(other),
        };
        if let (Some(average), None) = (&mut self.average, &fault) {
            average.follow(self.optimizer.params())?;
        }
        self.memory.end_phase("update", &mut metrics);
        self.n_tokens += learned.n_tokens as u64;
        self.n_skipped += u64::from(fault.is_some());
        self.skips_in_row = if fault.is_some() { self.skips_in_row + 1 } else { 0 };
        self.n_done += 1;
        metrics.insert("learning_rate".into(), rate);
        self.measure_work(&mut metrics, &learned, clock.elapsed().as_secs_f64());
        if let Some(record) = &mut self.record {
            record.step(self.n_done - 1, &metrics, fault.as_deref())?;
        }
        match fault.filter(|_| self.skips_in_row >= self.plan.max_skips_in_row) {
            None => Ok(()),
            Some(why) => {
                let (n, last) = (self.skips_in_row, self.n_done - 1);
                let remedy = "start a new run with a lower stage.optim.lr";
                let message = format!("{n} updates in a row were skipped, the last at step {last}: {why}; {remedy}");
                Err(self.keep_what_is_done(Error::Diverged(message)))
            }
        }
    }

    fn measure_work(&self, metrics: &mut Metrics, learned: &Learned, step_s: f64) {
        metrics.extend([
            ("loss".to_string(), learned.loss),
            ("time/step_s".into(), step_s),
            ("time/data_s".into(), learned.waited_s),
            ("data/wait_share".into(), learned.waited_s / step_s),
            ("throughput/images_per_s".into(), learned.n_images as f64 / step_s),
            ("skipped_updates".into(), self.n_skipped as f64),
        ]);
        if learned.n_tokens > 0 {
            metrics.insert("throughput/tokens_per_s".into(), learned.n_tokens as f64 / step_s);
            metrics.insert("num_tokens".into(), self.n_tokens as f64);
        }
        if learned.flops > 0.0 {
            metrics.insert("throughput/tflops".into(), learned.flops / step_s / 1e12);
            let share = self.peak_flops.map(|peak| learned.flops / step_s / peak);
            metrics.extend(share.map(|share| ("throughput/mfu".to_string(), share)));
        }
        metrics.retain(|_, value| value.is_finite());
    }

    fn after_step(&mut self) -> Result<()> {
        if self.evaluation_is_due() {
            self.evaluate()?;
        }
        if self.is_due(self.plan.log.checkpoint_every) { self.save_checkpoint() } else { Ok(()) }
    }

    /// A loss on what is held out, or pictures, which come with one.
    fn evaluation_is_due(&self) -> bool {
        self.is_due(self.plan.log.validate_every) || self.is_due(self.plan.log.pictures_every)
    }

    /// Whether what happens every so many steps, and after the last, happens now.
    fn is_due(&self, every: usize) -> bool {
        self.n_done == self.plan.n_steps || self.n_done.is_multiple_of(every)
    }

    /// The loss on what is held out, of the weights and of their average, and pictures.
    fn evaluate(&mut self) -> Result<()> {
        let clock = Instant::now();
        let mut metrics = self.learner.validate()?;
        if let Some(average) = &mut self.average {
            average.exchange(self.optimizer.params())?;
            let averaged = self.learner.validate();
            average.exchange(self.optimizer.params())?;
            metrics.extend(averaged?.into_iter().map(|(name, value)| (format!("{name}_ema"), value)));
        }
        let with_pictures = self.n_done == 0 || self.is_due(self.plan.log.pictures_every);
        let pictures = if with_pictures { self.learner.pictures()? } else { Vec::new() };
        metrics.insert("time/validation_s".into(), clock.elapsed().as_secs_f64());
        if let Some(record) = &mut self.record {
            record.validation(self.n_done, &metrics, &pictures)?;
        }
        self.evaluated_at = Some(self.n_done);
        Ok(())
    }

    /// Saves the steps done before an error that came between them, and gives the error; one that keeps them from being saved
    /// as well is the lesser one.
    fn keep_what_is_done(&self, error: Error) -> Error {
        let name = format!("step-{}", self.n_done);
        let latest = self.checkpoints.as_ref().and_then(|checkpoints| checkpoints.latest().ok()?);
        if latest.is_none_or(|latest| !latest.ends_with(&name)) {
            drop(self.save_checkpoint());
        }
        error
    }

    fn save_checkpoint(&self) -> Result<()> {
        let Some(checkpoints) = &self.checkpoints else { return Ok(()) };
        let state = json!({
            "identity": self.identity()?,
            "n_tokens": self.n_tokens,
            "n_skipped": self.n_skipped,
            "skips_in_row": self.skips_in_row,
            "evaluated_at": self.evaluated_at,
        });
        let average = self.average.as_ref().map(|average| average.params().clone()).unwrap_or_default();
        checkpoints.save(self.n_done, &self.optimizer, &average, &state).map(drop)
    }
}

/// An error that names what gets no gradient: an operation that cuts it would leave a part of the model as it was.
fn check_coverage(params: &Params, gradients: &Gradients) -> Result<()> {
    let missing: Vec<&str> = params.iter().map(|(name, _)| name).filter(|name| gradients.get(name).is_none()).collect();
    match missing.first() {
        None => Ok(()),
        Some(first) => Err(Error::SelfCheck(format!(
            "{} of {} trainable tensors get no gradient, the first `{first}`; freeze them, or look for the operation that \
             cuts it",
            missing.len(),
            params.iter().count()
        ))),
    }
}
