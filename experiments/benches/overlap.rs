//! How much of the rewards' time the overlapped rollout hides, on the miniature with scorers of stated slowness.
//!
//! `cargo bench -p grpo-experiments --bench overlap`. The scorer waits for so long that scoring takes a given share of
//! sampling; it waits asleep, as for a server or a GPU. Hidden is `(sampling + scoring − wall) / scoring`, where the wall
//! is that of one `collect`. The last chunk of a step has nothing left to hide behind, so of `n` chunks at most
//! `(n − 1) / n` is hidden. The groups must be those of the sampler that takes turns, bit for bit.

#![expect(clippy::print_stdout, reason = "a bench speaks to a person")]

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use candle_core::Device;
use grpo::{
    Group, GroupSampler, GroupSize, IndexedPrompt, OverlappedSampler, Prompt, RewardSet, Rollout, Seed, reward_fn,
};
use grpo_policies::simplear::{SimpleAr, Stage};
use image::RgbImage;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const PROMPTS: usize = 16;
const GROUP: usize = 8;
/// Each setting is measured so often; the middle one counts.
const ROUNDS: usize = 3;

fn main() -> Result<()> {
    grpo_policies::keep_freed_memory();
    let policy = SimpleAr::shapes(Stage::Sft, &Device::Cpu)?;
    let prompts: Vec<Prompt> = (0..PROMPTS).map(|n| Prompt::new(["a red star", "two rings"][n % 2])).collect();
    println!(
        "{:>6} {:>9} {:>9} {:>9} {:>9} {:>7} {:>7}",
        "chunks", "sampling", "scoring", "in turn", "overlap", "hidden", "limit"
    );
    for chunks in [2, 4, 8, 16] {
        for share in [0.25, 0.5, 0.9] {
            measure(&policy, &prompts, chunks, share)?;
        }
    }
    Ok(())
}

/// One line of the table.
fn measure(policy: &SimpleAr, prompts: &[Prompt], chunks: usize, share: f64) -> Result<()> {
    let rows = PROMPTS * GROUP / chunks;
    let batch: Vec<IndexedPrompt<'_>> = prompts.iter().enumerate().collect();
    let size = GroupSize::new(GROUP)?;
    let mut times = Vec::new();
    for round in 0..ROUNDS as u64 {
        let seed = Seed::new(round);
        let (plain, sampling) =
            timed(|| Ok(GroupSampler::new(scorer(0.0)?, size, rows).collect(policy, &batch, seed)?))?;
        let pause = share * sampling / (PROMPTS * GROUP) as f64;
        let mut in_turn = GroupSampler::new(scorer(pause)?, size, rows);
        let (_, turns) = timed(|| Ok(in_turn.collect(policy, &batch, seed)?))?;
        let mut overlapped = OverlappedSampler::new(scorer(pause)?, size, rows);
        let (groups, wall) = timed(|| Ok(overlapped.collect(policy, &batch, seed)?))?;
        ensure!(same(&plain, &groups), "overlap has changed the groups");
        let phases = Rollout::<SimpleAr>::phase_times(&overlapped);
        let (sampling, scoring) = (phases["sample"], phases["score"]);
        times.push([(sampling + scoring - wall) / scoring, sampling, scoring, turns, wall]);
    }
    times.sort_by(|a, b| a[0].total_cmp(&b[0]));
    let [hidden, sampling, scoring, turns, wall] = times[ROUNDS / 2];
    let limit = (chunks - 1) as f64 / chunks as f64;
    println!(
        "{chunks:>6} {sampling:>7.2} s {scoring:>7.2} s {turns:>7.2} s {wall:>7.2} s {:>5.0} % {:>5.0} %",
        100.0 * hidden,
        100.0 * limit
    );
    Ok(())
}

/// Brightness, after a pause of so many seconds for each image.
fn scorer(pause: f64) -> Result<RewardSet<RgbImage>> {
    let reward = reward_fn("slow", move |_: &Prompt, image: &RgbImage| {
        std::thread::sleep(Duration::from_secs_f64(pause));
        Ok(image.as_raw().iter().map(|&byte| f32::from(byte)).sum::<f32>() / image.as_raw().len() as f32)
    });
    Ok(RewardSet::new().with(reward, 1.0)?)
}

fn same(a: &[Group<SimpleAr>], b: &[Group<SimpleAr>]) -> bool {
    let parts = |group: &Group<SimpleAr>| {
        let samples: Vec<RgbImage> = group.completions.iter().map(|completion| completion.sample.clone()).collect();
        let log_probs: Vec<Vec<f32>> =
            group.completions.iter().map(|completion| completion.log_probs.to_vec()).collect();
        (group.prompt_idx, samples, log_probs, group.rewards())
    };
    a.iter().map(parts).eq(b.iter().map(parts))
}

fn timed<T>(work: impl FnOnce() -> Result<T>) -> Result<(T, f64)> {
    let clock = Instant::now();
    let done = work()?;
    Ok((done, clock.elapsed().as_secs_f64()))
}
