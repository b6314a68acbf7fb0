//! What becomes of a sample that a reward cannot judge: an error, or the sample leaves its group and is counted; never a 0.

#![expect(clippy::unwrap_used, clippy::panic, reason = "in a test a failure is a panic, helpers included")]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use grpo::observe::{Metrics, StepReport};
use grpo::testing::ToyPolicy;
use grpo::{
    AdvantageConfig, BoxError, FailedScores, Group, GroupSampler, GroupSize, IndexedPrompt, Observer,
    OverlappedSampler, Prompt, Reward, RewardSet, Rollout, RunFolder, Seed, TrainConfig, Trainer, advantages,
    combined_advantages, reward_fn,
};

/// How a scorer goes wrong on the samples that are marked.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    NotANumber,
    Infinite,
    Exception,
    Panic,
    /// The whole batch has one score too few; a sample that is marked has none even alone.
    ShortAnswer,
    /// The marked samples' failures are given one by one, as a remote scorer does for a time-out.
    Named,
}

const FAULTS: [Fault; 6] =
    [Fault::NotANumber, Fault::Infinite, Fault::Exception, Fault::Panic, Fault::ShortAnswer, Fault::Named];

/// Judges texts by their vowels, and fails on marked ones.
struct Scorer {
    fault: Fault,
    marked: Vec<String>,
    n_calls: Arc<AtomicUsize>,
}

fn vowels(text: &str) -> f32 {
    text.chars().filter(|c| "aeiou".contains(*c)).count() as f32
}

impl Reward<String> for Scorer {
    fn name(&self) -> &str {
        "scorer"
    }

    fn score(&self, prompt: &Prompt, text: &String) -> Result<f32, BoxError> {
        let scores = self.score_batch(&[(prompt, text)])?;
        scores.first().copied().ok_or_else(|| "no score".into())
    }

    fn score_batch(&self, batch: &[(&Prompt, &String)]) -> Result<Vec<f32>, BoxError> {
        self.n_calls.fetch_add(1, Ordering::Relaxed);
        let mut scores = Vec::new();
        for (_, text) in batch {
            let marked = self.marked.contains(text);
            match self.fault {
                _ if !marked => scores.push(vowels(text)),
                Fault::NotANumber => scores.push(f32::NAN),
                Fault::Infinite => scores.push(f32::NEG_INFINITY),
                Fault::Exception | Fault::Named => return Err(format!("cannot read `{text}`").into()),
                Fault::Panic => panic!("index out of bounds for `{text}`"),
                Fault::ShortAnswer => {}
            }
        }
        Ok(scores)
    }

    fn score_each(&self, batch: &[(&Prompt, &String)]) -> Vec<Result<f32, BoxError>> {
        if self.fault != Fault::Named {
            return match self.score_batch(batch) {
                Ok(scores) if scores.len() == batch.len() => scores.into_iter().map(Ok).collect(),
                _ => batch.iter().map(|(prompt, text)| self.score(prompt, text)).collect(),
            };
        }
        let judge = |text: &String| match self.marked.contains(text) {
            true => Err("timed out after 3 tries".into()),
            false => Ok(vowels(text)),
        };
        batch.iter().map(|(_, text)| judge(text)).collect()
    }
}

const SIZE: usize = 5;

fn prompts() -> Vec<Prompt> {
    (0..3).map(|i| Prompt::new(format!("prompt {i}"))).collect()
}

/// Three groups of five texts, drawn as ever and judged by these rewards.
fn groups(rewards: RewardSet<String>, failed: FailedScores, overlapped: bool) -> grpo::Result<Vec<Group<ToyPolicy>>> {
    let (policy, prompts) = (ToyPolicy::new(8, 6).unwrap(), prompts());
    let batch: Vec<IndexedPrompt<'_>> = prompts.iter().enumerate().collect();
    let size = GroupSize::new(SIZE).unwrap();
    match overlapped {
        true => OverlappedSampler::new(rewards, size, SIZE).on_failed(failed).collect(&policy, &batch, Seed::new(3)),
        false => GroupSampler::new(rewards, size, 2 * SIZE).on_failed(failed).collect(&policy, &batch, Seed::new(3)),
    }
}

fn sound() -> RewardSet<String> {
    RewardSet::new().with(reward_fn("scorer", |_: &Prompt, text: &String| Ok(vowels(text))), 1.0).unwrap()
}

fn broken(fault: Fault, marked: &[&str]) -> RewardSet<String> {
    let marked = marked.iter().map(ToString::to_string).collect();
    RewardSet::new().with(Scorer { fault, marked, n_calls: Arc::default() }, 1.0).unwrap()
}

fn of_groups(groups: &[Group<ToyPolicy>]) -> Vec<Vec<f32>> {
    let scores: Vec<_> = groups.iter().map(|group| group.scores.clone()).collect();
    combined_advantages(&scores, &[1.0], &AdvantageConfig::default()).unwrap()
}

const EXCLUDE: FailedScores = FailedScores::Exclude { max_share: 0.4 };

/// Each fault on the first, a middle and the last sample of the middle group: under `error` the run stops with the
/// reward's name, under `exclude` the sample is gone and named, and the rest have the advantages of a group without it.
#[test]
fn a_failed_sample_is_an_error_or_leaves_its_group() {
    let whole = groups(sound(), FailedScores::Error, false).unwrap();
    for fault in FAULTS {
        for draw in [0, 2, SIZE - 1] {
            let text = whole[1].completions[draw].sample.clone();
            let twins = whole.iter().flat_map(|group| &group.completions).filter(|c| c.sample == text).count();
            assert_eq!(twins, 1, "the marked text must be drawn once");
            let error = groups(broken(fault, &[&text]), FailedScores::Error, false).err().unwrap().to_string();
            assert!(error.starts_with("reward `scorer`: "), "{fault:?}: {error}");
            for overlapped in [false, true] {
                let got = groups(broken(fault, &[&text]), EXCLUDE, overlapped).unwrap();
                let kept: Vec<f32> = (0..SIZE).filter(|at| *at != draw).map(|at| whole[1].rewards()[at]).collect();
                assert_eq!(got[1].rewards(), kept, "{fault:?} on draw {draw}");
                let expected = advantages(&[whole[0].rewards(), kept, whole[2].rewards()], &AdvantageConfig::default());
                assert_eq!(of_groups(&got), expected.unwrap(), "{fault:?} on draw {draw}");
                let excluded = &got[1].excluded;
                assert_eq!((excluded.len(), excluded[0].draw, excluded[0].prompt_idx), (1, draw, 1));
                assert_eq!(excluded[0].reward, "scorer");
                assert_eq!(got[1].draws(), (0..SIZE).filter(|at| *at != draw).collect::<Vec<_>>());
                assert!(got[0].excluded.is_empty() && got[2].excluded.is_empty());
            }
        }
    }
}

#[test]
fn the_reason_is_the_scorers_own() {
    let whole = groups(sound(), FailedScores::Error, false).unwrap();
    let text = whole[0].completions[1].sample.clone();
    let check = |fault, expected: &str| {
        let got = groups(broken(fault, &[&text]), EXCLUDE, false).unwrap();
        assert_eq!(got[0].excluded[0].why, expected, "{fault:?}");
    };
    check(Fault::NotANumber, "scored NaN");
    check(Fault::Infinite, "scored -inf");
    check(Fault::Exception, &format!("cannot read `{text}`"));
    check(Fault::Panic, &format!("panicked: index out of bounds for `{text}`"));
    check(Fault::ShortAnswer, "no score");
    check(Fault::Named, "timed out after 3 tries");
}

#[test]
fn a_scorer_that_is_gone_stops_the_run_at_once() {
    let n_calls = Arc::new(AtomicUsize::new(0));
    let counted = n_calls.clone();
    let gone = reward_fn("gone", move |_: &Prompt, _: &String| {
        counted.fetch_add(1, Ordering::Relaxed);
        Err("connection refused".into())
    });
    let rewards = RewardSet::new().with(gone, 1.0).unwrap();
    let error = groups(rewards, FailedScores::Exclude { max_share: 0.1 }, true).err().unwrap().to_string();
    let expected = "reward `gone`: 5 of 15 samples could not be judged, more than failed_scores.exclude.max_share = 0.1 \
                    allows; the last, draw 4 of prompt `prompt 0`: connection refused";
    assert_eq!(error, expected);
    // The batch of five, which fails with its first sample, and then each of the five alone.
    assert_eq!(n_calls.load(Ordering::Relaxed), 6, "the first group is enough");
}

#[test]
fn a_share_that_cannot_be_meant_is_refused() {
    for max_share in [1.0, -0.1, f64::NAN] {
        let mut config = TrainConfig { n_steps: 1, ..TrainConfig::default() };
        config.rollout.failed_scores = FailedScores::Exclude { max_share };
        let error = config.check().unwrap_err().to_string();
        assert!(error.contains("failed_scores.exclude.max_share is"), "{error}");
    }
}

#[test]
fn the_choice_is_one_word_or_one_table_of_toml() {
    let parse = |text: &str| toml::from_str::<TrainConfig>(text).map(|config| config.rollout.failed_scores);
    assert_eq!(parse("").unwrap(), FailedScores::Error);
    assert_eq!(parse("rollout.failed_scores = \"error\"").unwrap(), FailedScores::Error);
    let exclude = |max_share| FailedScores::Exclude { max_share };
    assert_eq!(parse("rollout.failed_scores.exclude = {}").unwrap(), exclude(0.1));
    assert_eq!(parse("rollout.failed_scores = { exclude = { max_share = 0.3 } }").unwrap(), exclude(0.3));
    assert!(parse("rollout.failed_scores = \"zero\"").is_err());
}

/// Keeps every step's numbers and what was excluded.
#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Vec<(Metrics, usize, usize)>>>);

impl Observer<ToyPolicy> for Kept {
    fn step(&mut self, report: &StepReport<'_, ToyPolicy>) -> Result<(), BoxError> {
        let n_samples = report.groups.iter().map(|group| group.completions.len()).sum();
        self.0.lock().unwrap().push((report.metrics.clone(), report.excluded.len(), n_samples));
        Ok(())
    }
}

/// A scorer that fails on texts with a certain letter: the run goes on, counts them, and leaves out a group of which
/// less than two are left.
#[test]
fn a_run_goes_on_without_the_samples_that_failed() {
    let fails = |text: &str| text.starts_with('a');
    let flaky = || {
        let score = move |_: &Prompt, text: &String| match fails(text) {
            true => Err("no answer".into()),
            false => Ok(vowels(text)),
        };
        RewardSet::new().with(reward_fn("flaky", score), 1.0).unwrap()
    };
    let mut config = TrainConfig { n_steps: 8, ..TrainConfig::default() };
    config.rollout.failed_scores = FailedScores::Exclude { max_share: 0.9 };
    config.rollout.group_size = GroupSize::new(2).unwrap();
    config.rollout.prompts_per_step = 3;
    config.objective.kl_weight = 0.0;
    let sampler = GroupSampler::new(flaky(), config.rollout.group_size, 64).on_failed(config.rollout.failed_scores);
    let (kept, folder) = (Kept::default(), tempfile::tempdir().unwrap());
    let policy = ToyPolicy::new(8, 6).unwrap();
    let mut trainer = Trainer::new(config, policy, None, Box::new(sampler), prompts()).unwrap().observe(kept.clone());
    let run = RunFolder::create(folder.path(), "flaky", 0).unwrap();
    // Left by a run that was killed and goes on from the start.
    let excluded = run.path().join("excluded");
    std::fs::create_dir(&excluded).unwrap();
    (0..8).for_each(|step| std::fs::write(excluded.join(format!("step-{step:05}.jsonl")), "stale").unwrap());
    trainer = trainer.hold_out(prompts(), flaky(), GroupSize::new(20).unwrap()).record_in(&run, "").unwrap();
    trainer.run().unwrap();
    let steps = kept.0.lock().unwrap();
    let mut n_groups = 0.0;
    for (metrics, n_excluded, n_samples) in steps.iter() {
        assert_eq!(metrics["excluded/samples"], *n_excluded as f64);
        assert_eq!(metrics["rewards/flaky/failed"], *n_excluded as f64);
        // A group that has lost one of its two samples is left out with the other.
        assert_eq!(*n_samples as f64, 6.0 - 2.0 * metrics["excluded/groups"]);
        n_groups += metrics["excluded/groups"];
    }
    assert!(n_groups > 0.0, "no group was left out, so the test shows nothing");
    let named = |kind: &str| {
        let files = std::fs::read_dir(&excluded).unwrap().map(|file| file.unwrap().path());
        let files = files.filter(|path| path.file_name().unwrap().to_string_lossy().starts_with(kind));
        files.map(|path| std::fs::read_to_string(path).unwrap()).collect::<Vec<_>>()
    };
    let (of_steps, of_held_out) = (named("step-"), named("held_out-"));
    assert!(of_steps.iter().all(|lines| lines.contains("no answer")), "{of_steps:?}");
    assert_eq!(of_steps.len(), steps.iter().filter(|(_, n_excluded, _)| *n_excluded > 0).count());
    let metrics = std::fs::read_to_string(run.path().join("metrics.jsonl")).unwrap();
    let n_held_out = of_held_out.last().unwrap().lines().count();
    assert!(metrics.contains(&format!("\"held_out/excluded\":{n_held_out}.0")), "{n_held_out}: {metrics}");
}
