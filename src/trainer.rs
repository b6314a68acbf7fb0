//! The loop: GRPO's Algorithm 1 (Shao et al., 2024, arXiv 2402.03300) on one screen, [`Trainer::step`].

use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::checkpoint::{Checkpoint, Checkpoints};
use crate::held_out::{Evaluation, HeldOut, PromptMeans};
use crate::metrics::{memory_peak_gb, reward_metrics};
use crate::observe::{Console, HeldOutReport, JsonLines, Observer, SampleFiles, StepReport, TensorBoard};
use crate::update::{Row, Update};
use crate::{
    AdamW, Error, Group, GroupSampler, GroupSize, IndexedPrompt, Objective, OptimConfig, Policy, Prompt, Result,
    RewardSet, Rollout, RunFolder, Seed, advantages, self_check,
};

/// How many prompts and samples a step has, and how they are split to fit memory.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RolloutConfig {
    /// Prompts of one step.
    pub prompts_per_step: usize,
    /// Samples of one prompt.
    pub group_size: GroupSize,
    /// Samples drawn at a time; does not change them.
    pub rows_per_call: usize,
    /// Samples differentiated together, a micro-batch; does not change the gradient but for rounding.
    pub rows_per_backward: usize,
    /// Micro-batches replayed and differentiated side by side on a CPU, whose cores the operations of a small policy do
    /// not keep busy; each takes memory of its own, and no bit changes. Other devices take one at a time.
    pub parts_at_once: usize,
    /// Score on a second thread while the next samples are drawn; does not change them.
    pub overlap: bool,
}

impl Default for RolloutConfig {
    fn default() -> Self {
        Self {
            prompts_per_step: 8,
            group_size: GroupSize::default(),
            rows_per_call: 64,
            rows_per_backward: 64,
            parts_at_once: 1,
            overlap: true,
        }
    }
}

/// How often what is recorded.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// Pictures and samples every so many steps.
    pub samples_every: usize,
    /// Groups in a panel.
    pub panel_groups: usize,
    /// Held-out prompts every so many steps, and before the first and after the last.
    pub held_out_every: usize,
    /// A checkpoint every so many steps, and after the last.
    pub checkpoint_every: usize,
    /// Checkpoints kept.
    pub keep_checkpoints: usize,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { samples_every: 10, panel_groups: 4, held_out_every: 50, checkpoint_every: 50, keep_checkpoints: 2 }
    }
}

/// A run without its parts: everything that is a number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// The root of all randomness of the run.
    pub seed: u64,
    /// Steps of the run.
    pub n_steps: usize,
    /// The samples of a step.
    pub rollout: RolloutConfig,
    /// What is minimised.
    pub objective: Objective,
    /// How the parameters move.
    pub optim: OptimConfig,
    /// What is recorded.
    pub log: LogConfig,
}

impl TrainConfig {
    /// The configuration as TOML, for the run's folder.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|error| Error::config(error.to_string()))
    }

    /// Refuses values that cannot be meant.
    pub fn check(&self) -> Result<()> {
        let rollout = &self.rollout;
        let counts = [
            ("n_steps", self.n_steps),
            ("rollout.prompts_per_step", rollout.prompts_per_step),
            ("rollout.rows_per_call", rollout.rows_per_call),
            ("rollout.rows_per_backward", rollout.rows_per_backward),
            ("rollout.parts_at_once", rollout.parts_at_once),
            ("log.samples_every", self.log.samples_every),
            ("log.held_out_every", self.log.held_out_every),
            ("log.checkpoint_every", self.log.checkpoint_every),
            ("log.keep_checkpoints", self.log.keep_checkpoints),
        ];
        if let Some((name, _)) = counts.iter().find(|(_, value)| *value == 0) {
            return Err(Error::config(format!("{name} is 0; give at least 1")));
        }
        self.objective.check()?;
        self.optim.check()
    }
}

/// What a checkpoint says beside the tensors.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    /// The settings that a resumption must share, as TOML text, because text is compared exactly.
    config: String,
    /// Training prompts, which decide the order of the data.
    n_prompts: usize,
    /// The run's first evaluation, which later ones are compared with.
    held_out_start: Option<PromptMeans>,
    /// After how many steps held-out prompts were last scored.
    evaluated_at: Option<usize>,
}

/// Trains a policy with GRPO.
pub struct Trainer<P: Policy> {
    config: TrainConfig,
    policy: P,
    reference: Option<P>,
    rollout: Box<dyn Rollout<P>>,
    prompts: Vec<Prompt>,
    optimizer: AdamW,
    held_out: Option<HeldOut<P>>,
    held_out_start: Option<PromptMeans>,
    evaluated_at: Option<usize>,
    observers: Vec<Box<dyn Observer<P>>>,
    checkpoints: Option<Checkpoints>,
    n_done: usize,
}

impl<P: Policy> Trainer<P> {
    /// A trainer before its first step. The reference is a frozen policy; it may be absent where `kl_weight` is 0.
    pub fn new(
        config: TrainConfig,
        policy: P,
        reference: Option<P>,
        rollout: Box<dyn Rollout<P>>,
        prompts: Vec<Prompt>,
    ) -> Result<Self> {
        config.check()?;
        if prompts.len() < config.rollout.prompts_per_step {
            return Err(Error::config(format!(
                "there are {} prompts and rollout.prompts_per_step is {}; give more prompts or take fewer a step",
                prompts.len(),
                config.rollout.prompts_per_step
            )));
        }
        if config.objective.kl_weight > 0.0 && reference.is_none() {
            let message = "objective.kl_weight is positive but there is no reference; give one or set it to 0";
            return Err(Error::config(message));
        }
        let optimizer = AdamW::new(policy.params(), config.optim)?;
        Ok(Self {
            config,
            policy,
            reference,
            rollout,
            prompts,
            optimizer,
            held_out: None,
            held_out_start: None,
            evaluated_at: None,
            observers: Vec::new(),
            checkpoints: None,
            n_done: 0,
        })
    }

    /// Scores `group_size` samples of each of these prompts before, during and after training, with fixed seeds.
    #[must_use]
    pub fn hold_out(mut self, prompts: Vec<Prompt>, rewards: RewardSet<P::Sample>, group_size: GroupSize) -> Self {
        let sampler = GroupSampler::new(rewards, group_size, self.config.rollout.rows_per_call);
        self.held_out = Some(HeldOut::new(prompts, sampler));
        self
    }

    /// Adds an observer.
    #[must_use]
    pub fn observe(mut self, observer: impl Observer<P> + 'static) -> Self {
        self.observers.push(Box::new(observer));
        self
    }

    /// Records the run in its folder: curves, panels, samples and checkpoints.
    ///
    /// A folder with a checkpoint of this run is gone on with: steps, data order, optimiser and logs.
    pub fn record_in(mut self, run: &RunFolder, config_toml: &str) -> Result<Self> {
        let log = self.config.log;
        let checkpoints = run.checkpoints(log.keep_checkpoints);
        if let Some(path) = checkpoints.latest()? {
            self.resume(&Checkpoint::load(&path)?)?;
        }
        run.describe(config_toml, self.config.seed)?;
        self.checkpoints = Some(checkpoints);
        let first_step = self.n_done;
        let board = TensorBoard::create(run, first_step, log.panel_groups, config_toml)?;
        let console = Console::new(first_step, self.config.n_steps);
        Ok(self
            .observe(JsonLines::create(run, first_step)?)
            .observe(board)
            .observe(SampleFiles::create(run, log.panel_groups))
            .observe(console))
    }

    /// Takes over a checkpoint of the same run.
    pub fn resume(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        let theirs: State = checkpoint.state()?;
        let ours = self.state()?;
        if (&theirs.config, theirs.n_prompts) != (&ours.config, ours.n_prompts) {
            let line = differing_line(&theirs, &ours);
            return Err(Error::config(format!(
                "the checkpoint is of another run ({line}); resume with the configuration of its config.toml"
            )));
        }
        checkpoint.restore(&mut self.optimizer)?;
        self.n_done = checkpoint.step;
        // A run that broke in its first step starts again, held-out prompts included.
        if self.n_done > 0 {
            (self.held_out_start, self.evaluated_at) = (theirs.held_out_start, theirs.evaluated_at);
        }
        Ok(())
    }

    fn state(&self) -> Result<State> {
        let science = TrainConfig {
            log: LogConfig::default(),
            rollout: RolloutConfig {
                prompts_per_step: self.config.rollout.prompts_per_step,
                group_size: self.config.rollout.group_size,
                rows_per_backward: self.config.rollout.rows_per_backward,
                ..RolloutConfig::default()
            },
            ..self.config
        };
        Ok(State {
            config: science.to_toml()?,
            n_prompts: self.prompts.len(),
            held_out_start: self.held_out_start.clone(),
            evaluated_at: self.evaluated_at,
        })
    }

    /// Trains to the last step. An error leaves a checkpoint of all steps done before it.
    pub fn run(&mut self) -> Result<()> {
        self.check_policy()?;
        // Also where the run broke between a step and the evaluation that was due after it.
        if self.n_done == 0 || self.is_due(self.config.log.held_out_every) && self.evaluated_at != Some(self.n_done) {
            self.evaluate()?;
        }
        while self.n_done < self.config.n_steps {
            let Err(error) = self.step().and_then(|()| self.after_step()) else { continue };
            self.save_checkpoint()?;
            return Err(error);
        }
        self.observers.iter_mut().try_for_each(|observer| observer.finish()).map_err(Error::Observer)
    }

    /// One step of Algorithm 1.
    pub fn step(&mut self) -> Result<()> {
        let start = Instant::now();
        let step = self.n_done;
        let seed = Seed::new(self.config.seed).named("rollout").fold(step as u64);
        let prompts = batch_of(&self.prompts, self.config.rollout.prompts_per_step, self.config.seed, step);
        let groups = self.rollout.collect(&self.policy, &prompts, seed)?;
        let rollout_s = start.elapsed().as_secs_f64();

        let names = self.rollout.reward_names();
        let rewards: Vec<Vec<f32>> = groups.iter().map(Group::rewards).collect();
        let advantages = advantages(&rewards, &self.config.objective.advantage)?;
        let mut metrics = reward_metrics(&groups, &names);

        let rate = self.config.optim.rate(step, self.config.n_steps);
        let update = Update {
            objective: &self.config.objective,
            rows_per_backward: self.config.rollout.rows_per_backward,
            // One device does one thing at a time.
            parts_at_once: if self.policy.params().device().is_cpu() { self.config.rollout.parts_at_once } else { 1 },
            policy: &self.policy,
            reference: self.reference.as_ref(),
        };
        metrics.extend(update.apply(&Row::of(&groups, &advantages), &mut self.optimizer, rate)?);

        metrics.insert("time/rollout_s".into(), rollout_s);
        let phases = self.rollout.phase_times();
        metrics.extend(phases.into_iter().map(|(phase, seconds)| (format!("time/{phase}_s"), seconds)));
        let step_s = start.elapsed().as_secs_f64();
        let n_samples: usize = rewards.iter().map(Vec::len).sum();
        metrics.insert("time/step_s".into(), step_s);
        metrics.insert("throughput/images_per_s".into(), n_samples as f64 / step_s);
        metrics.extend(memory_peak_gb().map(|gb| ("memory/peak_gb".to_string(), gb)));

        self.n_done += 1;
        let report = StepReport {
            step,
            n_steps: self.config.n_steps,
            metrics: &metrics,
            groups: &groups,
            advantages: &advantages,
            reward_names: &names,
            with_samples: step.is_multiple_of(self.config.log.samples_every) || self.n_done == self.config.n_steps,
        };
        self.observers.iter_mut().try_for_each(|observer| observer.step(&report)).map_err(Error::Observer)
    }

    fn after_step(&mut self) -> Result<()> {
        if self.is_due(self.config.log.held_out_every) {
            self.evaluate()?;
        }
        if self.is_due(self.config.log.checkpoint_every) { self.save_checkpoint() } else { Ok(()) }
    }

    /// Whether what happens every so many steps, and after the last, happens now.
    fn is_due(&self, every: usize) -> bool {
        self.n_done == self.config.n_steps || self.n_done.is_multiple_of(every)
    }

    fn save_checkpoint(&self) -> Result<()> {
        let Some(checkpoints) = &self.checkpoints else { return Ok(()) };
        let state = serde_json::to_value(self.state()?).map_err(|error| Error::config(error.to_string()))?;
        checkpoints.save(self.n_done, &self.optimizer, &state).map(drop)
    }

    /// Scores the held-out prompts, always with the same draws.
    fn evaluate(&mut self) -> Result<()> {
        let Some(held_out) = &mut self.held_out else { return Ok(()) };
        let Evaluation { groups, reward_names, means, seconds } = held_out.evaluate(&self.policy)?;
        let mut metrics = means.metrics(self.held_out_start.as_ref());
        metrics.insert("time/held_out_s".into(), seconds);
        self.held_out_start.get_or_insert(means);
        let report =
            HeldOutReport { step: self.n_done, metrics: &metrics, groups: &groups, reward_names: &reward_names };
        self.observers.iter_mut().try_for_each(|observer| observer.held_out(&report)).map_err(Error::Observer)?;
        self.evaluated_at = Some(self.n_done);
        Ok(())
    }

    fn check_policy(&self) -> Result<()> {
        let prompts: Vec<&Prompt> = self.prompts.iter().take(2).collect();
        self_check::before_training(&self.policy, &prompts, Seed::new(self.config.seed).named("self_check"))
    }

    /// The policy as it stands.
    pub fn policy(&self) -> &P {
        &self.policy
    }

    /// Steps done.
    pub fn n_done(&self) -> usize {
        self.n_done
    }

    /// Gives the trained policy back.
    pub fn into_policy(self) -> P {
        self.policy
    }
}

/// The first setting in which two states differ, for a message.
fn differing_line(theirs: &State, ours: &State) -> String {
    let lines = |state: &State| -> Vec<String> {
        state.config.lines().map(String::from).chain([format!("n_prompts = {}", state.n_prompts)]).collect()
    };
    let (theirs, ours) = (lines(theirs), lines(ours));
    let differs = theirs.iter().zip(&ours).find(|(theirs, ours)| theirs != ours);
    differs.map_or("other settings".into(), |(theirs, ours)| format!("there {theirs}, here {ours}"))
}

/// The prompts of a step: each epoch is a permutation of its own, cut into whole steps.
fn batch_of(prompts: &[Prompt], n: usize, seed: u64, step: usize) -> Vec<IndexedPrompt<'_>> {
    let steps_per_epoch = (prompts.len() / n).max(1);
    let (epoch, part) = (step / steps_per_epoch, step % steps_per_epoch);
    let order = Seed::new(seed).named("data").fold(epoch as u64).draws().permutation(prompts.len());
    order.iter().skip(part * n).take(n).map(|&idx| (idx, &prompts[idx])).collect()
}
