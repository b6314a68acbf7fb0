//! The loop: GRPO's Algorithm 1 (Shao et al., 2024, arXiv 2402.03300) on one screen, [`Trainer::step`].

use std::time::Instant;

use crate::batch::{Batch, ChoiceWeights, ScoredRows, choice_advantages};
use crate::checkpoint::{Checkpoint, Checkpoints};
use crate::collect::{Collected, StepPlan};
use crate::held_out::{Evaluation, HeldOut};
use crate::memory::PeakMemory;
use crate::metrics::{Judged, reward_metrics};
use crate::observe::{
    Console, Fault, HeldOutReport, JsonLines, Metrics, Observer, PositionMaps, SampleFiles, StepReport, TensorBoard,
};
use crate::progress::{Progress, State};
use crate::update::Update;
use crate::{
    AdamW, BoxError, Error, Excluded, FailedScores, Group, GroupSampler, GroupSize, Policy, Prompt, Result, RewardSet,
    Rollout, RunFolder, RunRewards, Seed, TrainConfig, combined_advantages, held_out_seed, self_check,
};

/// Trains a policy with GRPO.
pub struct Trainer<P: Policy> {
    config: TrainConfig,
    policy: P,
    reference: Option<P>,
    rollout: Box<dyn Rollout<P>>,
    prompts: Vec<Prompt>,
    optimizer: AdamW,
    choice_weights: Option<ChoiceWeights<P>>,
    held_out: Option<HeldOut<P>>,
    observers: Vec<Box<dyn Observer<P>>>,
    checkpoints: Option<Checkpoints>,
    progress: Progress,
    n_done: usize,
    /// Updates that the optimiser had taken when the last whole step was done.
    updates_when_whole: usize,
    /// Seconds that the observers took after the step before.
    record_s: f64,
    /// Seconds that the checks before training took, until they are logged.
    self_check_s: Option<f64>,
    memory: PeakMemory,
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
        self_check::parts(&config.objective, &policy, reference.as_ref())?;
        let optimizer = AdamW::new(policy.params(), config.optim)?.on_device(policy.device_optimiser());
        Ok(Self {
            config,
            policy,
            reference,
            rollout,
            prompts,
            optimizer,
            choice_weights: None,
            held_out: None,
            observers: Vec::new(),
            checkpoints: None,
            progress: Progress::default(),
            n_done: 0,
            updates_when_whole: 0,
            record_s: 0.0,
            self_check_s: None,
            memory: PeakMemory::default(),
        })
    }

    /// Scores `group_size` samples of each of these prompts before, during and after training, on draws that all runs share.
    #[must_use]
    pub fn hold_out(self, prompts: Vec<Prompt>, rewards: RewardSet<P::Sample>, group_size: GroupSize) -> Self {
        self.hold_out_from(prompts, rewards, group_size, held_out_seed())
    }

    /// As [`Trainer::hold_out`], with samples drawn from this node: runs of one seed share it and other seeds have others,
    /// so that a mean over seeds is one over draws as well.
    #[must_use]
    pub fn hold_out_from(
        mut self,
        prompts: Vec<Prompt>,
        rewards: RewardSet<P::Sample>,
        group_size: GroupSize,
        seed: Seed,
    ) -> Self {
        let rollout = &self.config.rollout;
        let sampler = GroupSampler::new(rewards, group_size, rollout.rows_per_call).on_failed(rollout.failed_scores);
        self.held_out = Some(HeldOut::new(prompts, sampler, seed));
        self
    }

    /// Multiplies the advantage of each choice by a weight of its own, `[G][T]` for a group (GCPO and STAGE weigh image
    /// tokens by position, entropy or likeness). The normaliser stays that of all choices.
    #[must_use]
    pub fn weigh_choices(
        mut self,
        weights: impl Fn(&Group<P>) -> Result<Vec<Vec<f32>>, BoxError> + Send + Sync + 'static,
    ) -> Self {
        self.choice_weights = Some(Box::new(weights));
        self
    }

    /// Adds an observer.
    #[must_use]
    pub fn observe(mut self, observer: impl Observer<P> + 'static) -> Self {
        self.observers.push(Box::new(observer));
        self
    }

    /// Records the run in its folder: curves, panels, samples and checkpoints; `config_toml` says what the run is.
    ///
    /// A folder with a checkpoint of this run is gone on with: steps, data order, optimiser and logs. Call it after
    /// [`Trainer::hold_out`], whose rewards have charts of their own.
    pub fn record_in(self, run: &RunFolder, config_toml: &str) -> Result<Self> {
        let recorded = self.record_quietly_in(run, config_toml)?;
        let console = Console::new(recorded.n_done, recorded.config.n_steps);
        Ok(recorded.observe(console))
    }

    /// As [`Trainer::record_in`], and says nothing on the console: one of several runs whose progress is shown as one.
    pub fn record_quietly_in(mut self, run: &RunFolder, config_toml: &str) -> Result<Self> {
        let log = self.config.log;
        let checkpoints = run.checkpoints(log.keep_checkpoints);
        if let Some(path) = checkpoints.latest()? {
            self.resume(&Checkpoint::load(&path)?)?;
        }
        run.describe(config_toml, self.config.seed)?;
        run.name_rewards(&self.rewards_of_run())?;
        self.checkpoints = Some(checkpoints);
        let first_step = self.n_done;
        let held_out = self.rewards_of_run().held_out;
        let board = TensorBoard::create(run, first_step, log.panel_groups)?.describe(
            config_toml,
            &self.rollout.reward_names(),
            &held_out,
        )?;
        // A line of an evaluation says that its samples are there, and the board shows them: both come after the files.
        Ok(self
            .observe(SampleFiles::create(run, log.panel_groups).held_out_pictures(log.held_out_pictures))
            .observe(JsonLines::create(run, first_step)?)
            .observe(board))
    }

    fn rewards_of_run(&self) -> RunRewards {
        let optimised = RunRewards {
            optimised: self.rollout.reward_names().into_iter().zip(self.rollout.reward_weights()).collect(),
            sources: self.rollout.reward_sources().into_iter().flatten().collect(),
            ..Default::default()
        };
        self.held_out.iter().fold(optimised, |optimised, held_out| held_out.watched(optimised, &self.prompts))
    }

    /// Takes over a checkpoint of the same run.
    pub fn resume(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        let theirs: State = checkpoint.state()?;
        theirs.check_same_run(&self.state()?)?;
        if let (Some(start), Some(held_out)) = (&theirs.progress.held_out_start, &self.held_out) {
            start.check_draws(held_out.seed())?;
        }
        checkpoint.restore(&mut self.optimizer)?;
        if let Some(reference) = self.moving_reference() {
            checkpoint.restore_reference(&reference.params())?;
        }
        self.n_done = checkpoint.step;
        self.updates_when_whole = self.optimizer.n_updates();
        // A run that broke in its first step starts again, held-out prompts included.
        if self.n_done > 0 {
            self.progress = theirs.progress;
        }
        Ok(())
    }

    fn state(&self) -> Result<State> {
        let rewards = self.rollout.reward_names().into_iter().zip(self.rollout.reward_weights()).collect();
        State::of(&self.config, rewards, &self.prompts, &self.progress)
    }

    /// Trains to the last step. An error leaves a checkpoint of all steps done before it; one in the middle of a step's
    /// several updates leaves the last that was written before.
    pub fn run(&mut self) -> Result<()> {
        self.self_check_s = Some(timed(|| self.check_policy())?.1);
        let evaluated = self.progress.evaluated_at == Some(self.n_done);
        // Also where the run broke between a step and the evaluation that was due after it.
        if self.n_done == 0 || self.is_due(self.config.log.held_out_every) && !evaluated {
            self.evaluate()?;
        }
        while self.n_done < self.config.n_steps {
            let Err(error) = self.step().and_then(|()| self.after_step()) else { continue };
            // A step that broke between its updates is not whole: the checkpoint before it is the one to go on from.
            if self.optimizer.n_updates() == self.updates_when_whole {
                self.save_checkpoint()?;
            }
            return Err(error);
        }
        self.observers.iter_mut().try_for_each(|observer| observer.finish()).map_err(Error::Observer)
    }

    /// One step of Algorithm 1.
    pub fn step(&mut self) -> Result<()> {
        let clock = Instant::now();
        self.memory.forget();
        let Collected { groups, excluded, mut metrics } = self.collect()?;
        self.memory.end_phase("rollout", &mut metrics);
        let objective = &self.config.objective.clone();
        let update = Update {
            objective,
            rows_per_backward: self.config.rollout.rows_per_backward,
            // One device does one thing at a time.
            parts_at_once: if self.policy.params().device().is_cpu() { self.config.rollout.parts_at_once } else { 1 },
            policy: &self.policy,
            reference: self.reference.as_ref(),
        };
        let (scored, reference_s) = timed(|| ScoredRows::score(&update, &groups))?;
        self.memory.end_phase("reference", &mut metrics);
        let judged = Judged::new(&groups, self.rollout.as_ref(), scored.kl_of_samples(objective), objective);
        let advantages = combined_advantages(&judged.scores, &judged.weights, &objective.advantage)?;
        let of_choices = choice_advantages(&groups, &advantages, self.choice_weights.as_ref())?;
        let rate = self.config.optim.rate(self.n_done, self.config.n_steps);
        let applied = update.apply(&mut Batch::new(&scored, of_choices, objective), &mut self.optimizer, rate)?;
        self.memory.end_phase("update", &mut metrics);
        // What the weights of this moment make of the batch, for those who look for the fault.
        let replayed = match &applied.fault {
            Some(_) => update.score(&self.policy, &scored.rows).unwrap_or_default(),
            None => Vec::new(),
        };
        let n_choices = scored.n_choices();
        let (described, metrics_s) =
            timed(|| Ok((reward_metrics(&groups, judged.names()), judged.metrics(n_choices))))?;
        self.progress.count(n_choices, applied.fault.is_some(), applied.n_taken);
        metrics.extend(described.0.into_iter().chain(described.1).chain(applied.metrics));
        metrics.insert("time/reference_s".into(), reference_s);
        *metrics.entry("time/metrics_s".into()).or_default() += metrics_s;
        self.measure_work(&mut metrics, &groups, n_choices, clock.elapsed().as_secs_f64());
        self.n_done += 1;
        self.sync_reference()?;
        self.updates_when_whole = self.optimizer.n_updates();
        let fault = applied.fault.as_deref().map(|why| Fault {
            why,
            replayed: &replayed,
            reference: scored.reference.as_deref(),
        });
        let (groups, advantages, positions) = (&groups, &advantages, &applied.positions);
        self.tell(&Told { metrics, groups, excluded: &excluded, advantages, positions, fault })?;
        self.progress.check_diverged(self.config.max_skips_in_row, self.n_done - 1, applied.fault.as_deref())
    }

    fn measure_work(&mut self, metrics: &mut Metrics, groups: &[Group<P>], n_choices: usize, step_s: f64) {
        let n_samples: usize = groups.iter().map(|group| group.completions.len()).sum();
        metrics.extend(self.progress.metrics());
        // Of those asked for: a group may have been left out.
        let n_prompts = self.config.rollout.prompts_per_step.min(self.prompts.len());
        metrics.extend([
            ("epoch".to_string(), ((self.n_done + 1) * n_prompts) as f64 / self.prompts.len() as f64),
            ("time/record_s".into(), self.record_s),
            ("time/step_s".into(), step_s),
            ("throughput/images_per_s".into(), n_samples as f64 / step_s),
            ("throughput/tokens_per_s".into(), n_choices as f64 / step_s),
        ]);
        metrics.extend(self.self_check_s.take().map(|seconds| ("time/self_check_s".to_string(), seconds)));
        // Neither JSON nor a chart has a sign for what is no number: it is left out, and a fault tells of it.
        metrics.retain(|_, value| value.is_finite());
    }

    /// Tells the observers of the step that was just done.
    fn tell(&mut self, told: &Told<'_, P>) -> Result<()> {
        let step = self.n_done - 1;
        let report = StepReport {
            step,
            n_steps: self.config.n_steps,
            metrics: &told.metrics,
            groups: told.groups,
            excluded: told.excluded,
            advantages: told.advantages,
            reward_names: &self.rollout.reward_names(),
            with_samples: step.is_multiple_of(self.config.log.samples_every) || self.n_done == self.config.n_steps,
            positions: told.positions,
            grid: self.policy.grid(),
            fault: told.fault,
        };
        let observers = &mut self.observers;
        let tell = || observers.iter_mut().try_for_each(|observer| observer.step(&report)).map_err(Error::Observer);
        self.record_s = timed(tell)?.1;
        Ok(())
    }

    fn collect(&mut self) -> Result<Collected<P>> {
        StepPlan { config: &self.config, prompts: &self.prompts, step: self.n_done }
            .collect(self.rollout.as_mut(), &self.policy)
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

    /// The reference, where the objective moves it.
    fn moving_reference(&self) -> Option<&P> {
        self.reference.as_ref().filter(|_| self.config.objective.reference_sync.is_some())
    }

    /// Moves the reference towards the policy where that is due (TR-DPO's soft update).
    fn sync_reference(&self) -> Result<()> {
        let (Some(sync), Some(reference)) = (self.config.objective.reference_sync, &self.reference) else {
            return Ok(());
        };
        if !self.n_done.is_multiple_of(sync.every) {
            return Ok(());
        }
        let params = reference.params();
        for (name, var) in self.policy.params().iter() {
            let Some(theirs) = params.get(name) else { continue };
            theirs.set(&((var.as_tensor() * sync.share)? + (theirs.as_tensor() * (1.0 - sync.share))?)?)?;
        }
        Ok(())
    }

    fn save_checkpoint(&self) -> Result<()> {
        let Some(checkpoints) = &self.checkpoints else { return Ok(()) };
        let state = serde_json::to_value(self.state()?).map_err(|error| Error::config(error.to_string()))?;
        let reference = self.moving_reference().map(P::params).unwrap_or_default();
        checkpoints.save(self.n_done, &self.optimizer, &reference, &state).map(drop)
    }

    /// Scores the held-out prompts, always with the same draws.
    fn evaluate(&mut self) -> Result<()> {
        let Some(held_out) = &mut self.held_out else { return Ok(()) };
        let Evaluation { groups, reward_names, means, diversity, seconds } = held_out.evaluate(&self.policy)?;
        let mut metrics = means.metrics(self.progress.held_out_start.as_ref());
        metrics.extend(crate::held_out::hacking_alarm(&metrics, &self.rollout.reward_names(), &reward_names));
        metrics.extend(diversity.map(|diversity| ("held_out/diversity".to_string(), diversity)));
        metrics.insert("time/held_out_s".into(), seconds);
        let n_excluded: usize = groups.iter().map(|group| group.excluded.len()).sum();
        if self.config.rollout.failed_scores != FailedScores::Error || n_excluded > 0 {
            metrics.insert("held_out/excluded".into(), n_excluded as f64);
        }
        self.progress.held_out_start.get_or_insert(means);
        let report =
            HeldOutReport { step: self.n_done, metrics: &metrics, groups: &groups, reward_names: &reward_names };
        self.observers.iter_mut().try_for_each(|observer| observer.held_out(&report)).map_err(Error::Observer)?;
        self.progress.evaluated_at = Some(self.n_done);
        Ok(())
    }

    fn check_policy(&self) -> Result<()> {
        let prompts: Vec<&Prompt> = self.prompts.iter().take(2).collect();
        let seed = Seed::new(self.config.seed).named("self_check");
        self_check::before_training(&self.policy, &prompts, seed, &self.config.objective)
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

/// What a step has to tell beside what the trainer knows.
struct Told<'a, P: Policy> {
    metrics: Metrics,
    groups: &'a [Group<P>],
    excluded: &'a [Excluded],
    advantages: &'a [Vec<f32>],
    positions: &'a PositionMaps,
    fault: Option<Fault<'a>>,
}

fn timed<T>(work: impl FnOnce() -> Result<T>) -> Result<(T, f64)> {
    let clock = Instant::now();
    let done = work()?;
    Ok((done, clock.elapsed().as_secs_f64()))
}
