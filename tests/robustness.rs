//! What a step does when something is wrong, and the options of the loop that change what a step is.

#![expect(clippy::unwrap_used, reason = "a test and its helpers fail by panicking")]

use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::Tensor;
use grpo::objective::{Correction, Estimator, KlConfig, Place, ReferenceSync};
use grpo::testing::ToyPolicy;
use grpo::{
    AdvantageConfig, BoxError, Combine, Completion, Gradients, GroupSampler, GroupSize, LogProbs, LossGradient,
    Objective, Params, Policy, Prompt, Request, Reward, RewardSet, RunFolder, TrainConfig, Trainer, reward_fn,
};
use serde_json::Value;

/// A toy whose replayed log-probs, or whose gradient, are NaN at some of its steps.
struct Breaks {
    toy: ToyPolicy,
    at: Range<usize>,
    in_gradient: bool,
    n_sampled: AtomicUsize,
}

impl Breaks {
    fn new(at: Range<usize>, in_gradient: bool) -> Self {
        Self { toy: ToyPolicy::new(5, 3).unwrap(), at, in_gradient, n_sampled: AtomicUsize::new(0) }
    }

    /// NaN at the steps that break; each samples once, and the checks before training do so first.
    fn factor(&self) -> f64 {
        let step = self.n_sampled.load(Ordering::Relaxed).checked_sub(2);
        if step.is_some_and(|step| self.at.contains(&step)) { f64::NAN } else { 1.0 }
    }
}

impl Policy for Breaks {
    type Sample = String;
    type Trace = Vec<u32>;

    fn sample(&self, requests: &[Request<'_>]) -> Result<Vec<Completion<Self>>, BoxError> {
        self.n_sampled.fetch_add(1, Ordering::Relaxed);
        Ok(self.toy.sample(requests)?.into_iter().map(Completion::of).collect())
    }

    fn log_probs(&self, batch: &[(&Prompt, &Vec<u32>)]) -> Result<LogProbs, BoxError> {
        let log_probs = self.toy.log_probs(batch)?;
        let factor = if self.in_gradient { 1.0 } else { self.factor() };
        Ok(LogProbs::new((log_probs.values() * factor)?, log_probs.mask().clone())?)
    }

    fn params(&self) -> Params {
        self.toy.params()
    }

    fn backward(&self, log_probs: &LogProbs, gradient: &LossGradient, to: &mut Gradients) -> Result<(), BoxError> {
        let factor = if self.in_gradient { self.factor() } else { 1.0 };
        self.toy.backward(log_probs, &LossGradient::new((&gradient.log_probs * factor)?), to)
    }
}

fn letter_a() -> impl Reward<String> {
    reward_fn("letter_a", |_: &Prompt, text: &String| Ok(text.matches('a').count() as f32 / text.len() as f32))
}

fn config(n_steps: usize, objective: Objective) -> TrainConfig {
    let mut config = TrainConfig { seed: 5, n_steps, objective, ..TrainConfig::default() };
    (config.rollout.prompts_per_step, config.rollout.group_size) = (4, GroupSize::new(6).unwrap());
    config.optim.lr = 0.1;
    config
}

fn trainer_of<P: Policy<Sample = String>>(
    config: TrainConfig,
    policy: P,
    reference: Option<P>,
    rewards: RewardSet<String>,
) -> Trainer<P> {
    let rollout = GroupSampler::new(rewards, config.rollout.group_size, 100);
    let prompts = (0..10).map(|i| Prompt::new(format!("prompt {i}"))).collect();
    Trainer::new(config, policy, reference, Box::new(rollout), prompts).unwrap()
}

fn one(reward: impl Reward<String> + 'static) -> RewardSet<String> {
    RewardSet::new().with(reward, 1.0).unwrap()
}

fn weights(params: &Params) -> Vec<f32> {
    params.get("logits").unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn lines(run: &RunFolder) -> Vec<Value> {
    let text = std::fs::read_to_string(run.metrics()).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn no_kl() -> Objective {
    Objective { kl_weight: 0.0, ..Objective::default() }
}

#[test]
fn an_update_that_is_not_finite_is_skipped_dumped_and_counted() {
    for in_gradient in [false, true] {
        let root = tempfile::tempdir().unwrap();
        let run = RunFolder::create(root.path(), "breaks", 0).unwrap();
        let trainer = trainer_of(config(5, no_kl()), Breaks::new(1..3, in_gradient), None, one(letter_a()));
        let mut trainer = trainer.record_in(&run, "").unwrap();
        trainer.run().unwrap();
        let counts: Vec<f64> = lines(&run).iter().map(|line| line["skipped_updates"].as_f64().unwrap()).collect();
        assert_eq!(counts, [0.0, 1.0, 2.0, 2.0, 2.0]);
        assert!(lines(&run)[1].get("grad_norm").is_none() && lines(&run)[3].get("grad_norm").is_some());
        assert!(weights(&trainer.policy().params()).iter().all(|weight| weight.is_finite()));

        let dump = run.path().join("skipped/step-00002");
        let why = std::fs::read_to_string(dump.join("why.txt")).unwrap();
        let expected = if in_gradient { "the gradient norm is NaN" } else { "the loss is NaN" };
        assert!(why.starts_with(expected), "{why}");
        let samples = std::fs::read_to_string(dump.join("samples.jsonl")).unwrap();
        assert_eq!(samples.lines().count(), 24, "the whole batch, and not only the groups of a panel");
        let first: Value = serde_json::from_str(samples.lines().next().unwrap()).unwrap();
        for key in ["prompt", "text", "reward", "advantage", "log_probs", "trace"] {
            assert!(!first[key].is_null(), "{key} is not in {first}");
        }
        let replayed = std::fs::read_to_string(dump.join("log_probs.jsonl")).unwrap();
        assert_eq!(replayed.lines().count(), 24);
        assert_eq!(replayed.contains(r#""replayed":["NaN","NaN","NaN"]"#), !in_gradient, "{replayed}");
    }
}

#[test]
fn a_skipped_update_leaves_the_weights_where_they_were() {
    let trained = |at: Range<usize>, n_steps: usize| {
        let mut trainer = trainer_of(config(n_steps, no_kl()), Breaks::new(at, false), None, one(letter_a()));
        trainer.run().unwrap();
        weights(&trainer.policy().params())
    };
    assert_eq!(trained(2..4, 4), trained(9..9, 2));
    assert_ne!(trained(9..9, 3), trained(9..9, 2));
}

#[test]
fn too_many_skips_in_a_row_end_the_run_with_what_to_look_at() {
    let root = tempfile::tempdir().unwrap();
    let run = RunFolder::create(root.path(), "diverges", 0).unwrap();
    let trainer = trainer_of(config(9, no_kl()), Breaks::new(2..99, false), None, one(letter_a()));
    let error = trainer.record_in(&run, "").unwrap().run().unwrap_err().to_string();
    assert!(
        error
            .starts_with("training has diverged: 3 updates in a row were skipped, the last at step 4: the loss is NaN")
            && error.contains("skipped/step-00004"),
        "{error}"
    );
    assert_eq!(lines(&run).len(), 5, "every step is in the log");
    let kept: PathBuf = run.checkpoints(1).latest().unwrap().unwrap();
    assert!(kept.ends_with("step-5"), "{kept:?}");
}

/// Only words with an `a` differ: groups of equal rewards are replaced until they differ or the rounds are over.
#[test]
fn groups_of_equal_rewards_are_replaced_by_further_prompts() {
    let first = |_: &Prompt, text: &String| Ok(f32::from(u8::from(text.starts_with("aa"))));
    let flat_share = |max_resamples: usize| {
        let root = tempfile::tempdir().unwrap();
        let run = RunFolder::create(root.path(), "flat", 0).unwrap();
        let mut config = config(3, no_kl());
        (config.rollout.max_resamples, config.optim.lr) = (max_resamples, 1e-9);
        let policy = ToyPolicy::new(5, 3).unwrap();
        trainer_of(config, policy, None, one(reward_fn("first", first))).record_in(&run, "").unwrap().run().unwrap();
        let of = |name: &str| lines(&run).iter().filter_map(|line| line[name].as_f64()).sum::<f64>();
        (of("frac_reward_zero_std"), of("resampled_groups"))
    };
    let (before, none) = flat_share(0);
    let (after, replaced) = flat_share(6);
    assert!(before > 1.0 && after < before && none == 0.0 && replaced >= 4.0, "{before} {after} {replaced}");
}

#[test]
fn a_kl_in_the_reward_holds_the_policy_as_one_in_the_loss_does() {
    let distance = |kl_weight: f64| {
        let kl = KlConfig { place: Place::Reward, estimator: Estimator::K1, ..KlConfig::default() };
        let objective = Objective {
            kl_weight,
            kl,
            advantage: AdvantageConfig { scale: grpo::Scale::None, ..AdvantageConfig::default() },
            ..Objective::default()
        };
        let root = tempfile::tempdir().unwrap();
        let run = RunFolder::create(root.path(), "kl", 0).unwrap();
        let policy = ToyPolicy::new(5, 3).unwrap();
        let reference = policy.copy().unwrap();
        let trainer = trainer_of(config(40, objective), policy, Some(reference), one(letter_a()));
        trainer.record_in(&run, "").unwrap().run().unwrap();
        assert!(lines(&run)[1].get("rewards/kl/advantage_share").is_some());
        lines(&run).pop().unwrap()["kl"].as_f64().unwrap()
    };
    let (free, held) = (distance(1e-6), distance(0.5));
    assert!(free > 0.5 && held < 0.2, "free {free}, held {held}");
}

#[test]
fn a_second_epoch_has_the_true_ratio() {
    let root = tempfile::tempdir().unwrap();
    let run = RunFolder::create(root.path(), "epochs", 0).unwrap();
    let mut config = config(6, Objective { n_epochs: 3, ..no_kl() });
    config.optim.lr = 0.3;
    let trainer = trainer_of(config, ToyPolicy::new(5, 3).unwrap(), None, one(letter_a()));
    trainer.record_in(&run, "").unwrap().run().unwrap();
    let clipped: Vec<f64> = lines(&run).iter().map(|line| line["clip_ratio/region_mean"].as_f64().unwrap()).collect();
    assert!(clipped[0] > 0.1, "the third update of a batch meets the clip: {clipped:?}");
    let difference = lines(&run)[0]["sampling/sampling_logp_difference/max"].as_f64().unwrap();
    assert!(difference < 1e-6, "sampler and scorer are compared on equal weights: {difference}");
}

/// Weights of 0 for all but the first choice leave the other positions where they are.
#[test]
fn choices_without_weight_learn_nothing() {
    let mut trainer = trainer_of(config(5, no_kl()), ToyPolicy::new(5, 3).unwrap(), None, one(letter_a()))
        .weigh_choices(|group| Ok(vec![vec![1.0, 0.0, 0.0]; group.completions.len()]));
    trainer.run().unwrap();
    let logits = weights(&trainer.policy().params());
    assert!(logits[..5].iter().all(|x| *x != 0.0) && logits[5..].iter().all(|x| *x == 0.0), "{logits:?}");

    let mut trainer = trainer_of(config(5, no_kl()), ToyPolicy::new(5, 3).unwrap(), None, one(letter_a()))
        .weigh_choices(|group| Ok(vec![vec![1.0, f32::NAN, 0.0]; group.completions.len()]));
    let error = trainer.run().unwrap_err().to_string();
    assert!(error.contains("weigh_choices gave weights for prompt `prompt "), "{error}");
}

/// TR-DPO's soft update: both start at logits of 0, so a quarter of the policy's is what the reference has after one step.
#[test]
fn a_moving_reference_takes_its_share_of_the_policy() {
    let objective = Objective { reference_sync: Some(ReferenceSync { every: 1, share: 0.25 }), ..Objective::default() };
    let policy = ToyPolicy::new(5, 3).unwrap();
    let reference = policy.copy().unwrap();
    let moved = reference.params();
    let mut trainer = trainer_of(config(1, objective), policy, Some(reference), one(letter_a()));
    trainer.run().unwrap();
    let expected: Vec<f32> = weights(&trainer.policy().params()).iter().map(|weight| 0.25 * weight).collect();
    assert_eq!(weights(&moved), expected);
    assert!(expected.iter().any(|weight| *weight != 0.0));
}

#[test]
fn a_moving_reference_is_resumed_to_the_bit() {
    let root = tempfile::tempdir().unwrap();
    let objective = Objective { reference_sync: Some(ReferenceSync { every: 2, share: 0.5 }), ..Objective::default() };
    let objective = Objective { kl_weight: 0.5, ..objective };
    let start = |n_steps: usize, rewards: RewardSet<String>, run: &RunFolder| {
        let mut config = config(n_steps, objective);
        config.log.checkpoint_every = 3;
        let policy = ToyPolicy::new(5, 3).unwrap();
        let reference = policy.copy().unwrap();
        let moved = reference.params();
        (trainer_of(config, policy, Some(reference), rewards).record_in(run, "").unwrap(), moved)
    };
    let whole_run = RunFolder::create(root.path(), "whole", 0).unwrap();
    let (mut whole, reference) = start(8, one(letter_a()), &whole_run);
    whole.run().unwrap();
    assert_ne!(weights(&reference), [0.0; 15], "the reference has moved");
    assert_ne!(weights(&reference), weights(&whole.policy().params()));

    let broken_run = RunFolder::create(root.path(), "broken", 0).unwrap();
    let n_scored = AtomicUsize::new(0);
    let fails = reward_fn("letter_a", move |prompt: &Prompt, text: &String| {
        let n = n_scored.fetch_add(1, Ordering::Relaxed);
        if n < 5 * 24 { letter_a().score(prompt, text) } else { Err("out of order".into()) }
    });
    assert!(start(8, one(fails), &broken_run).0.run().is_err());
    let (mut resumed, resumed_reference) = start(8, one(letter_a()), &broken_run);
    assert_eq!(resumed.n_done(), 5);
    resumed.run().unwrap();
    assert_eq!(weights(&resumed.policy().params()), weights(&whole.policy().params()));
    assert_eq!(weights(&resumed_reference), weights(&reference));
}

/// Two rewards, one on a scale a hundred times larger: summed first it decides alone, normalised first both count.
#[test]
fn the_shares_of_two_rewards_are_logged() {
    let shares = |combine: Combine| {
        let root = tempfile::tempdir().unwrap();
        let run = RunFolder::create(root.path(), "shares", 0).unwrap();
        let loud = reward_fn("loud", |_: &Prompt, text: &String| Ok(100.0 * text.matches('a').count() as f32));
        let quiet = reward_fn("quiet", |_: &Prompt, text: &String| Ok(text.matches('b').count() as f32));
        let rewards = RewardSet::new().with(loud, 1.0).unwrap().with(quiet, 1.0).unwrap();
        let advantage = AdvantageConfig { combine, ..AdvantageConfig::default() };
        let config = config(2, Objective { advantage, ..no_kl() });
        let trainer = trainer_of(config, ToyPolicy::new(5, 3).unwrap(), None, rewards);
        trainer.record_in(&run, "").unwrap().run().unwrap();
        let first = lines(&run).remove(0);
        let of = |name: &str| first[format!("rewards/{name}/advantage_share")].as_f64().unwrap();
        assert!((of("loud") + of("quiet") - 1.0).abs() < 1e-9);
        assert!(first["rewards/correlation/loud_quiet"].as_f64().unwrap() < 0.0, "an a takes the place of a b");
        of("quiet")
    };
    assert!(shares(Combine::SumThenNormalise).abs() < 0.05);
    assert!((shares(Combine::NormaliseThenSum) - 0.5).abs() < 0.2);
}

/// A toy that gives its entropy without a graph, and whose second backward of a step may fail.
struct Detached {
    toy: ToyPolicy,
    fails_at: usize,
    n_backwards: AtomicUsize,
}

impl Detached {
    fn new(fails_at: usize) -> Self {
        Self { toy: ToyPolicy::new(5, 3).unwrap(), fails_at, n_backwards: AtomicUsize::new(0) }
    }
}

impl Policy for Detached {
    type Sample = String;
    type Trace = Vec<u32>;

    fn sample(&self, requests: &[Request<'_>]) -> Result<Vec<Completion<Self>>, BoxError> {
        Ok(self.toy.sample(requests)?.into_iter().map(Completion::of).collect())
    }

    fn log_probs(&self, batch: &[(&Prompt, &Vec<u32>)]) -> Result<LogProbs, BoxError> {
        let log_probs = self.toy.log_probs(batch)?;
        let entropy = log_probs.entropy().ok_or("the toy gives its entropy")?.detach();
        Ok(LogProbs::new(log_probs.values().clone(), log_probs.mask().clone())?.with_entropy(entropy)?)
    }

    fn params(&self) -> Params {
        self.toy.params()
    }

    fn backward(&self, log_probs: &LogProbs, gradient: &LossGradient, to: &mut Gradients) -> Result<(), BoxError> {
        match self.n_backwards.fetch_add(1, Ordering::Relaxed) == self.fails_at {
            true => Err("out of memory".into()),
            false => self.toy.backward(log_probs, gradient, to),
        }
    }
}

#[test]
fn an_entropy_without_a_graph_is_refused_where_a_bonus_needs_it() {
    let run = |objective: Objective| trainer_of(config(1, objective), Detached::new(99), None, one(letter_a())).run();
    let error = run(Objective { entropy_weight: 0.1, ..no_kl() }).unwrap_err().to_string();
    assert!(error.contains("no parameter gets a gradient from the entropy"), "{error}");
    assert!(run(Objective { top_entropy_share: 0.5, ..no_kl() }).is_ok(), "a share needs no gradient");
}

#[test]
fn a_correction_is_refused_where_sampler_and_scorer_are_one() {
    let objective = Objective { correction: Some(Correction::default()), ..no_kl() };
    let rollout = GroupSampler::new(one(letter_a()), GroupSize::new(6).unwrap(), 100);
    let prompts = (0..8).map(|i| Prompt::new(format!("prompt {i}"))).collect();
    let policy = ToyPolicy::new(5, 3).unwrap();
    let error = Trainer::new(config(1, objective), policy, None, Box::new(rollout), prompts).err().unwrap().to_string();
    assert!(error.starts_with("objective.correction weighs the scorer's law over the sampler's"), "{error}");
}

/// The step's first update is in the weights and the second is not: no checkpoint is right there but the one before.
#[test]
fn a_step_that_breaks_between_its_updates_is_not_kept() {
    let root = tempfile::tempdir().unwrap();
    let run = RunFolder::create(root.path(), "torn", 0).unwrap();
    let mut config = config(9, Objective { n_epochs: 2, ..no_kl() });
    config.log.checkpoint_every = 2;
    // One backward for the check, two for each step: the second one of the fourth step.
    let trainer = trainer_of(config, Detached::new(1 + 7), None, one(letter_a()));
    assert!(trainer.record_in(&run, "").unwrap().run().is_err());
    assert!(run.checkpoints(1).latest().unwrap().unwrap().ends_with("step-2"));

    let whole_run = RunFolder::create(root.path(), "whole", 0).unwrap();
    let mut whole = trainer_of(config, Detached::new(99), None, one(letter_a())).record_in(&whole_run, "").unwrap();
    whole.run().unwrap();
    let mut resumed = trainer_of(config, Detached::new(99), None, one(letter_a())).record_in(&run, "").unwrap();
    assert_eq!(resumed.n_done(), 2);
    resumed.run().unwrap();
    assert_eq!(weights(&resumed.policy().params()), weights(&whole.policy().params()));
}

#[test]
fn a_run_is_not_resumed_with_other_rewards_or_prompts() {
    let root = tempfile::tempdir().unwrap();
    let run = RunFolder::create(root.path(), "rewards", 0).unwrap();
    let toy = || ToyPolicy::new(5, 3).unwrap();
    trainer_of(config(2, no_kl()), toy(), None, one(letter_a())).record_in(&run, "").unwrap().run().unwrap();
    let refusal = |rewards: RewardSet<String>| {
        trainer_of(config(2, no_kl()), toy(), None, rewards).record_in(&run, "").err().unwrap().to_string()
    };
    let error = refusal(RewardSet::new().with(letter_a(), 0.1).unwrap());
    assert!(error.contains("there reward letter_a of weight 1, here reward letter_a of weight 0.1"), "{error}");
    let other = reward_fn("letter_b", |_: &Prompt, _: &String| Ok(0.0));
    assert!(refusal(one(letter_a()).with(other, 1.0).unwrap()).contains("letter_b"));
    let rollout = GroupSampler::new(one(letter_a()), GroupSize::new(6).unwrap(), 100);
    let prompts = (0..10).map(|i| Prompt::new(format!("other prompt {i}"))).collect();
    let trainer = Trainer::new(config(2, no_kl()), toy(), None, Box::new(rollout), prompts).unwrap();
    assert!(trainer.record_in(&run, "").err().unwrap().to_string().contains("texts of prompts"));
}

/// A mask that leaves out a sampled choice would be normalised by the wrong length.
#[test]
fn a_mask_that_is_not_the_sampled_choices_is_refused() {
    let mut trainer = trainer_of(config(1, no_kl()), Masked(ToyPolicy::new(5, 3).unwrap()), None, one(letter_a()));
    let error = trainer.run().unwrap_err().to_string();
    assert!(error.contains("the mask of a sample of 3 choices is 0 at place 2"), "{error}");
}

struct Masked(ToyPolicy);

impl Policy for Masked {
    type Sample = String;
    type Trace = Vec<u32>;

    fn sample(&self, requests: &[Request<'_>]) -> Result<Vec<Completion<Self>>, BoxError> {
        Ok(self.0.sample(requests)?.into_iter().map(Completion::of).collect())
    }

    fn log_probs(&self, batch: &[(&Prompt, &Vec<u32>)]) -> Result<LogProbs, BoxError> {
        let log_probs = self.0.log_probs(batch)?;
        let mask = Tensor::new(&[[1f32, 1.0, 0.0]], &candle_core::Device::Cpu)?.repeat((batch.len(), 1))?;
        Ok(LogProbs::new(log_probs.values().clone(), mask)?)
    }

    fn params(&self) -> Params {
        self.0.params()
    }
}

/// The toy's entropy at one place is the same for all samples, and so are the maps of a run on it.
#[test]
fn an_entropy_bonus_keeps_the_law_broad() {
    let entropy_after = |entropy_weight: f64, top_entropy_share: f64| {
        let objective = Objective { entropy_weight, top_entropy_share, ..no_kl() };
        let mut trainer = trainer_of(config(40, objective), ToyPolicy::new(5, 3).unwrap(), None, one(letter_a()));
        trainer.run().unwrap();
        let log_softmax: Tensor = trainer.policy().log_softmax().unwrap();
        let entropy = (log_softmax.exp().unwrap() * &log_softmax).unwrap().sum_all().unwrap().neg().unwrap();
        entropy.to_scalar::<f32>().unwrap() / 3.0
    };
    let (without, with) = (entropy_after(0.0, 1.0), entropy_after(2.0, 1.0));
    assert!(with > without + 0.3, "{without} without, {with} with a bonus");
    assert!(entropy_after(2.0, 0.5) > without + 0.3, "the bonus on half of the choices");
}
