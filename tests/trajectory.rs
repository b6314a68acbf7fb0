//! Runs that must agree do; the toy learns; a policy that would train wrongly is refused.

#![expect(clippy::unwrap_used, reason = "a test and its helpers fail by panicking")]

use candle_core::{DType, Device, Tensor, Var};
use grpo::testing::{ToyPolicy, probability_of};
use grpo::{
    BoxError, Checkpoint, Completion, GroupSampler, GroupSize, LogProbs, OptimConfig, Params, Policy, Prompt, Request,
    Reward, RewardSet, RolloutConfig, RunFolder, TrainConfig, Trainer, reward_fn,
};

fn letter_a() -> impl Reward<String> {
    reward_fn("letter_a", |_: &Prompt, text: &String| Ok(text.matches('a').count() as f32 / text.len() as f32))
}

fn config(seed: u64, n_steps: usize) -> TrainConfig {
    let mut config = TrainConfig { seed, n_steps, ..Default::default() };
    config.rollout = RolloutConfig { prompts_per_step: 4, group_size: GroupSize::new(6).unwrap(), ..config.rollout };
    config.optim = OptimConfig { lr: 0.1, ..config.optim };
    config.log.held_out_every = 4;
    config.log.checkpoint_every = 3;
    config
}

fn trainer<P: Policy<Sample = String>>(config: TrainConfig, policy: P, reference: P) -> grpo::Result<Trainer<P>> {
    let rewards = RewardSet::new().with(letter_a(), 1.0)?;
    let rollout = GroupSampler::new(rewards, config.rollout.group_size, config.rollout.rows_per_call);
    let prompts: Vec<Prompt> = (0..10).map(|i| Prompt::new(format!("prompt {i}"))).collect();
    Trainer::new(config, policy, Some(reference), Box::new(rollout), prompts)
}

fn toy(config: TrainConfig) -> Trainer<ToyPolicy> {
    let policy = ToyPolicy::new(5, 3).unwrap();
    let reference = policy.copy().unwrap();
    trainer(config, policy, reference).unwrap()
}

fn weights(trainer: &Trainer<ToyPolicy>) -> Vec<Vec<f32>> {
    trainer.policy().params().get("logits").unwrap().to_vec2().unwrap()
}

#[test]
fn the_toy_learns_for_three_seeds() {
    for seed in 0..3 {
        let mut trainer = toy(config(seed, 40));
        trainer.run().unwrap();
        for position in 0..3 {
            let probability = probability_of(trainer.policy(), position, 0).unwrap();
            assert!(
                probability > 0.7,
                "seed {seed}, position {position}: {probability} after 40 steps; it began at 0.2"
            );
        }
    }
}

#[test]
fn a_split_backward_follows_the_whole_one() {
    let whole = {
        let mut trainer = toy(config(1, 5));
        trainer.run().unwrap();
        weights(&trainer)
    };
    for rows in [1, 5, 6, 23] {
        let mut config = config(1, 5);
        config.rollout.rows_per_backward = rows;
        config.rollout.rows_per_call = rows;
        let mut trainer = toy(config);
        trainer.run().unwrap();
        for (a, b) in weights(&trainer).iter().flatten().zip(whole.iter().flatten()) {
            assert!((a - b).abs() < 1e-5, "{rows} rows a backward: {a} is not {b}");
        }
    }
}

#[test]
fn how_many_parts_are_computed_at_once_changes_no_bit() {
    let root = tempfile::tempdir().unwrap();
    let run_with = |rows: usize, at_once: usize| {
        let run = RunFolder::create(root.path(), &format!("{rows}-{at_once}"), 1).unwrap();
        let mut config = config(1, 4);
        (config.rollout.rows_per_backward, config.rollout.parts_at_once) = (rows, at_once);
        let mut trainer = recorded(config, &run);
        trainer.run().unwrap();
        (weights(&trainer), log_of(&run))
    };
    for rows in [1, 6, 23] {
        assert_eq!(run_with(rows, 3), run_with(rows, 1), "{rows} rows a part");
    }
}

/// The metrics of a run by line, without what a clock or the memory decides.
fn log_of(run: &RunFolder) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(run.metrics()).unwrap();
    let timeless = |line: &str| {
        let mut line: serde_json::Value = serde_json::from_str(line).unwrap();
        let volatile =
            |name: &String| ["time/", "throughput/", "memory/"].iter().any(|prefix| name.starts_with(prefix));
        line.as_object_mut().unwrap().retain(|name, _| !volatile(name));
        line
    };
    text.lines().map(timeless).collect()
}

fn recorded(config: TrainConfig, run: &RunFolder) -> Trainer<ToyPolicy> {
    let held_out = RewardSet::new().with(letter_a(), 1.0).unwrap();
    let prompts = vec![Prompt::new("held out"), Prompt::new("as well")];
    toy(config).hold_out(prompts, held_out, GroupSize::new(4).unwrap()).record_in(run, "a = 1").unwrap()
}

#[test]
fn a_resumed_run_equals_the_unbroken_one_to_the_bit() {
    let root = tempfile::tempdir().unwrap();
    let run_of = |name: &str| RunFolder::create(root.path(), name, 3).unwrap();
    let unbroken_run = run_of("unbroken");
    let mut unbroken = recorded(config(3, 9), &unbroken_run);
    unbroken.run().unwrap();

    // A step judges 24 training samples, an evaluation 8 held-out ones. The run breaks in its first step, in its sixth,
    // in the evaluation after the fourth and in the last one; the resumed one goes on from the checkpoint this leaves.
    for (name, n_train, n_held_out, n_done) in
        [("first", 0, 99, 0), ("sixth", 5 * 24, 99, 5), ("fourth", 999, 8, 4), ("last", 999, 3 * 8, 9)]
    {
        let broken_run = run_of(name);
        let error = broken(config(3, 9), n_train, n_held_out, &broken_run).unwrap_err().to_string();
        assert!(error.contains("out of order"), "{error}");
        let mut resumed = recorded(config(3, 9), &broken_run);
        assert_eq!(resumed.n_done(), n_done, "{name}");
        resumed.run().unwrap();

        assert_eq!(weights(&resumed), weights(&unbroken), "{name}");
        assert_eq!(log_of(&broken_run), log_of(&unbroken_run), "{name}");
    }
    assert_eq!(log_of(&unbroken_run).len(), 9 + 4, "nine steps, held-out prompts at 0, 4, 8 and 9");
    let rises = log_of(&unbroken_run).iter().filter(|line| line.get("held_out/letter_a/rise").is_some()).count();
    assert_eq!(rises, 3, "every evaluation but the first is compared with it");
}

#[test]
fn another_configuration_is_not_resumed() {
    let root = tempfile::tempdir().unwrap();
    let run = RunFolder::create(root.path(), "a", 3).unwrap();
    recorded(config(3, 3), &run).run().unwrap();
    let refusal = |config: TrainConfig| toy(config).record_in(&run, "").err().unwrap().to_string();
    let error = refusal(config(4, 3));
    assert!(
        error.contains("there seed = 3, here seed = 4") && error.contains("resume with the configuration"),
        "{error}"
    );
    let mut other_rate = config(3, 3);
    other_rate.optim.lr = 0.2;
    assert!(refusal(other_rate).contains("there lr = 0.1, here lr = 0.2"));
    let mut other_log = config(3, 3);
    other_log.log.samples_every = 1;
    other_log.rollout.rows_per_call = 1;
    assert!(toy(other_log).record_in(&run, "").is_ok(), "what does not change the run may change");
}

#[test]
fn a_damaged_checkpoint_is_named() {
    let root = tempfile::tempdir().unwrap();
    let run = RunFolder::create(root.path(), "a", 3).unwrap();
    recorded(config(3, 3), &run).run().unwrap();
    let path = run.checkpoints(1).latest().unwrap().unwrap();
    let params = path.join("params.safetensors");
    let bytes = std::fs::read(&params).unwrap();

    std::fs::write(&params, &bytes[..bytes.len() - 1]).unwrap();
    let error = Checkpoint::load(&path).err().unwrap().to_string();
    assert!(error.contains("params.safetensors") && error.contains("it is truncated"), "{error}");

    let mut flipped = bytes.clone();
    *flipped.last_mut().unwrap() ^= 1;
    std::fs::write(&params, &flipped).unwrap();
    let error = Checkpoint::load(&path).err().unwrap().to_string();
    assert!(error.contains("its checksum is not the manifest's"), "{error}");

    std::fs::remove_file(path.join("manifest.json")).unwrap();
    let error = Checkpoint::load(&path).err().unwrap().to_string();
    assert!(error.contains("manifest.json cannot be read"), "{error}");
    assert!(run.checkpoints(1).latest().unwrap().is_none(), "a folder without a manifest is no checkpoint");
}

/// The reward until it has judged so many samples; then it fails.
fn letter_a_until(n_samples: usize) -> impl Reward<String> {
    let (n_scored, good) = (std::sync::atomic::AtomicUsize::new(0), letter_a());
    reward_fn("letter_a", move |prompt: &Prompt, text: &String| {
        let call = n_scored.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        if call < n_samples { good.score(prompt, text) } else { Err("out of order".into()) }
    })
}

/// The recorded run until its rewards have judged so many training and held-out samples.
fn broken(config: TrainConfig, n_train: usize, n_held_out: usize, run: &RunFolder) -> grpo::Result<()> {
    let rewards = RewardSet::new().with(letter_a_until(n_train), 1.0)?;
    let rollout = GroupSampler::new(rewards, config.rollout.group_size, config.rollout.rows_per_call);
    let prompts: Vec<Prompt> = (0..10).map(|i| Prompt::new(format!("prompt {i}"))).collect();
    let policy = ToyPolicy::new(5, 3)?;
    let reference = policy.copy()?;
    let held_out = RewardSet::new().with(letter_a_until(n_held_out), 1.0)?;
    let held_out_prompts = vec![Prompt::new("held out"), Prompt::new("as well")];
    let trainer = Trainer::new(config, policy, Some(reference), Box::new(rollout), prompts)?;
    trainer.hold_out(held_out_prompts, held_out, GroupSize::new(4)?).record_in(run, "a = 1")?.run()
}

/// A toy with a fault: a parameter its log-probs do not reach, or another temperature when replaying.
struct Faulty {
    toy: ToyPolicy,
    unused: Option<Var>,
    replay_scale: f64,
}

impl Policy for Faulty {
    type Sample = String;
    type Trace = Vec<u32>;

    fn sample(&self, requests: &[Request<'_>]) -> Result<Vec<Completion<Self>>, BoxError> {
        let completions = self.toy.sample(requests)?;
        Ok(completions.into_iter().map(Completion::of).collect())
    }

    fn log_probs(&self, batch: &[(&Prompt, &Vec<u32>)]) -> Result<LogProbs, BoxError> {
        let log_probs = self.toy.log_probs(batch)?;
        Ok(LogProbs::new((log_probs.values() * self.replay_scale)?, log_probs.mask().clone())?)
    }

    fn params(&self) -> Params {
        let toy = self.toy.params();
        let vars = toy.iter().map(|(name, var)| (name.to_string(), var.clone()));
        Params::new(vars.chain(self.unused.iter().map(|var| ("unused".to_string(), var.clone())))).unwrap()
    }
}

fn refusal(unused: Option<Var>, replay_scale: f64) -> String {
    let make = || Faulty { toy: ToyPolicy::new(5, 3).unwrap(), unused: unused.clone(), replay_scale };
    trainer(config(0, 1), make(), make()).unwrap().run().unwrap_err().to_string()
}

#[test]
fn a_parameter_without_a_gradient_is_refused_by_name() {
    let unused = Var::from_tensor(&Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap()).unwrap();
    let error = refusal(Some(unused), 1.0);
    assert!(
        error.starts_with(
            "self-check before training: 1 of 2 trainable tensors get no gradient from the log-probs: unused"
        ),
        "{error}"
    );
}

#[test]
fn a_first_ratio_that_is_not_one_is_refused() {
    let error = refusal(None, 0.5);
    assert!(error.contains("the first ratio is 2.2361 at choice 0 and must be 1"), "{error}");
}

#[test]
fn a_nan_reward_names_itself_and_keeps_what_was_done() {
    let root = tempfile::tempdir().unwrap();
    let run = RunFolder::create(root.path(), "nan", 0).unwrap();
    let calls = std::sync::atomic::AtomicUsize::new(0);
    let breaks = reward_fn("breaks", move |_: &Prompt, text: &String| {
        let call = calls.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        Ok(if call < 2 * 24 { text.len() as f32 + call as f32 } else { f32::NAN })
    });
    let rewards = RewardSet::new().with(breaks, 1.0).unwrap();
    let config = config(0, 9);
    let rollout = GroupSampler::new(rewards, config.rollout.group_size, 100);
    let prompts: Vec<Prompt> = (0..10).map(|i| Prompt::new(format!("prompt {i}"))).collect();
    let policy = ToyPolicy::new(5, 3).unwrap();
    let reference = policy.copy().unwrap();
    let trainer = Trainer::new(config, policy, Some(reference), Box::new(rollout), prompts).unwrap();
    let mut trainer = trainer.record_in(&run, "").unwrap();
    let error = trainer.run().unwrap_err().to_string();
    assert!(error.starts_with("reward `breaks`: scored NaN for prompt `prompt "), "{error}");
    let kept = run.checkpoints(1).latest().unwrap().unwrap();
    assert_eq!(Checkpoint::load(&kept).unwrap().step, 2, "two steps were done before the NaN");
}
