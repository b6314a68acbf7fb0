//! A step of groups judged over HTTP by a server that fails on one of its samples: the run's rule holds, and the other
//! samples have the advantages of groups without it.

use std::num::NonZeroUsize;

use grpo::testing::ToyPolicy;
use grpo::{
    AdvantageConfig, BoxError, Completion, FailedScores, Group, GroupSampler, GroupSize, IndexedPrompt, LogProbs,
    OverlappedSampler, Params, Policy, Prompt, Request, RewardSet, Rollout, Seed, advantages, combined_advantages,
};
use grpo_rewards::remote::{HttpConfig, HttpReward};
use image::{Rgb, RgbImage};
use serde_json::json;

use crate::wire::{Reply, server};

const N_PROMPTS: usize = 3;
const SIZE: usize = 5;

/// Draws pictures whose red says which sample it is.
struct Painter(ToyPolicy);

impl Policy for Painter {
    type Sample = RgbImage;
    type Trace = Vec<u32>;

    fn sample(&self, requests: &[Request<'_>]) -> Result<Vec<Completion<Self>>, BoxError> {
        let sampled = self.0.sample(requests)?.into_iter().zip(requests).enumerate();
        let painted = |(at, (completion, request)): (usize, (Completion<ToyPolicy>, &Request<'_>))| {
            let red = red_of(request.prompt.column("row")?, at % SIZE);
            let sample = RgbImage::from_pixel(3, 2, Rgb([red, 7, 9]));
            Ok(Completion { sample, trace: completion.trace, log_probs: completion.log_probs })
        };
        sampled.map(painted).collect()
    }

    fn log_probs(&self, batch: &[(&Prompt, &Vec<u32>)]) -> Result<LogProbs, BoxError> {
        self.0.log_probs(batch)
    }

    fn params(&self) -> Params {
        self.0.params()
    }
}

fn red_of(prompt: usize, draw: usize) -> u8 {
    (16 * prompt + draw + 1) as u8
}

/// In no order of the samples.
fn score_of(red: u8) -> f32 {
    (f32::from(red) * 1.7).sin()
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    NotANumber,
    Exception,
    TimeOut,
    ShortAnswer,
    Status500,
}

/// Judges one picture a request, and fails on the picture of this red.
fn reward(fault: Fault, marked: u8) -> HttpReward {
    let url = server(move |asked, _| {
        let red = asked.reds[0];
        match fault {
            _ if red != marked => Reply::ok(&json!({ "scores": [score_of(red)] })),
            Fault::NotANumber => Reply::status("200 OK", r#"{"scores": [NaN]}"#),
            Fault::Exception => Reply::ok(&json!({ "scores": [0], "errors": ["ValueError: no face"] })),
            Fault::ShortAnswer => Reply::ok(&json!({ "scores": [] })),
            Fault::Status500 => Reply::status("500 Internal Server Error", "out of memory"),
            Fault::TimeOut => Reply::Hang,
        }
    });
    let mut config = HttpConfig::new("far", url);
    config.limits.images_per_request = NonZeroUsize::MIN;
    config.limits.timeout_ms = if fault == Fault::TimeOut { 3000 } else { 60_000 };
    config.retry.times = 0;
    HttpReward::new(config).unwrap()
}

fn groups(reward: HttpReward, failed: FailedScores, overlapped: bool) -> grpo::Result<Vec<Group<Painter>>> {
    let policy = Painter(ToyPolicy::new(4, 3).unwrap());
    let prompts: Vec<Prompt> = (0..N_PROMPTS).map(|row| Prompt::new("any").with("row", row)).collect();
    let batch: Vec<IndexedPrompt<'_>> = prompts.iter().enumerate().collect();
    let rewards = RewardSet::new().with(reward, 1.0).unwrap();
    let size = GroupSize::new(SIZE).unwrap();
    match overlapped {
        true => OverlappedSampler::new(rewards, size, SIZE).on_failed(failed).collect(&policy, &batch, Seed::new(1)),
        false => GroupSampler::new(rewards, size, 100).on_failed(failed).collect(&policy, &batch, Seed::new(1)),
    }
}

/// One fault on one sample, under either rule.
fn check(fault: Fault, [prompt, draw]: [usize; 2], said: &str) {
    let far = || reward(fault, red_of(prompt, draw));
    let error = groups(far(), FailedScores::Error, false).err().unwrap().to_string();
    assert!(error.starts_with("reward `far`: ") && error.contains(said), "{fault:?}: {error}");
    for overlapped in [false, true] {
        let got = groups(far(), FailedScores::Exclude { max_share: 0.1 }, overlapped).unwrap();
        let kept = |row: usize| (0..SIZE).filter(move |&at| [row, at] != [prompt, draw]);
        let expected: Vec<Vec<f32>> =
            (0..N_PROMPTS).map(|row| kept(row).map(|at| score_of(red_of(row, at))).collect()).collect();
        let rewards: Vec<Vec<f32>> = got.iter().map(Group::rewards).collect();
        assert_eq!(rewards, expected, "{fault:?} on {prompt}, {draw}");
        let scores: Vec<_> = got.iter().map(|group| group.scores.clone()).collect();
        let config = AdvantageConfig::default();
        let of_step = combined_advantages(&scores, &[1.0], &config).unwrap();
        assert_eq!(of_step, advantages(&expected, &config).unwrap(), "{fault:?} on {prompt}, {draw}");
        let excluded: Vec<_> = got.iter().flat_map(|group| &group.excluded).collect();
        assert_eq!((excluded.len(), excluded[0].prompt_idx, excluded[0].draw), (1, prompt, draw));
        assert!(excluded[0].why.contains(said), "{fault:?}: {}", excluded[0].why);
    }
}

/// On the first, a middle and the last sample of the step.
#[test]
fn a_sample_that_a_server_fails_on_is_an_error_or_leaves_its_group() {
    let faults = [
        (Fault::NotANumber, "scored NaN"),
        (Fault::Exception, "ValueError: no face"),
        (Fault::TimeOut, "no answer within 3000 ms"),
        (Fault::ShortAnswer, "returned 0 scores for 1 images"),
        (Fault::Status500, "status 500 Internal Server Error: out of memory"),
    ];
    let places = [[0, 0], [1, 2], [N_PROMPTS - 1, SIZE - 1]];
    std::thread::scope(|scope| {
        for (fault, said) in faults {
            for place in places {
                scope.spawn(move || check(fault, place, said));
            }
        }
    });
}
