//! A whole GRPO step of the published miniature, phase by phase, and what its settings are worth.
//!
//! `cargo bench -p grpo-experiments --bench step -- [VARIANT]... [--device cuda:0] [--log]` takes the steps of
//! `experiments/shapes_clip.toml`, which are those of examples/grpo_simplear.rs: 12 prompts of 8 images of 64 tokens, the
//! embedded CLIP as reward, a reference, one update. Each variant is a process of its own and changes one thing, so the
//! first row is what the file says and the others are what it would cost without, or with: `apart` scores after sampling and
//! not beside it, `one_part` runs one backward pass at a time, `recomputed` makes layers again, `window` speculates over 16
//! places. The first four must have the same rewards and losses to the bit at each step.
//!
//! Seconds are those that a run logs (src/docs/metrics.md). Sampling and scoring overlap except in `apart`; pixels, a part
//! of sampling, are timed behind the step, by decoding its codes again. A backward pass is not logged apart from its forward
//! one, of which `reference` is a measure: the same rows through the same code. `ratio` is a variant's step over the
//! published one, the median over rounds of steps side by side.

#![expect(clippy::print_stdout, reason = "a bench speaks to a person")]

#[path = "peer/mod.rs"]
#[expect(dead_code, reason = "a peer in Python and floors are for other benches")]
mod peer;
#[path = "peer/published.rs"]
mod published;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use grpo::observe::{Metrics, StepReport};
use grpo::{BoxError, GroupSampler, Observer, OverlappedSampler, Rollout, Trainer};
use grpo_policies::simplear::SimpleAr;

use peer::arguments::{Arguments, device};
use peer::contender::{Contender, End, Lap, serve};
use peer::report::Table;
use peer::{THREADS, median, race, ratio, timed};
use published::Published;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const ROUNDS: usize = 5;
const VARIANTS: [&str; 5] = ["published", "apart", "one_part", "recomputed", "window"];
/// Variants that must train alike.
const ALIKE: [&str; 4] = ["published", "apart", "one_part", "recomputed"];
const WINDOW: usize = 16;
/// What a lap tells of its step, in this order, and behind it the seconds of decoding pixels.
const METRICS: [&str; 13] = [
    "reward",
    "loss",
    "time/step_s",
    "time/rollout_s",
    "time/sample_s",
    "time/score_s",
    "time/reference_s",
    "time/update_s",
    "throughput/images_per_s",
    "throughput/tokens_per_s",
    "memory/rollout_peak_gb",
    "memory/reference_peak_gb",
    "memory/update_peak_gb",
];
const COLUMNS: [&str; 8] = [
    "variant",
    "step, s",
    "ratio",
    "rollout, s: sample (pixels), score",
    "reference, s",
    "update, s: tokens/s",
    "images/s, tokens/s",
    "peak memory, GB: rollout, reference, update",
];

fn main() -> Result<()> {
    grpo_policies::keep_freed_memory();
    let arguments = Arguments::read()?;
    if let [first, variant, place] = &arguments.words[..]
        && first == "worker"
    {
        return work(variant, place);
    }
    arguments.check(&[&VARIANTS])?;
    let variants = arguments.chosen(&VARIANTS);
    let start = |variant: &&str| Contender::start_worker(&[variant.to_string(), arguments.device.clone()]);
    let mut contenders = variants.iter().map(start).collect::<Result<Vec<_>>>()?;
    let laps = race(&mut contenders, ROUNDS)?;
    contenders.into_iter().try_for_each(|contender| contender.end().map(drop))?;
    check_alike(&variants, &laps)?;
    let mut table = Table::new(&COLUMNS);
    for (variant, of_variant) in variants.iter().zip(&laps) {
        table.push(row(variant, of_variant, &laps[0]));
    }
    println!("\n{table}");
    match arguments.log {
        true => table.log("a step of GRPO by phase", &about(&arguments.device)),
        false => Ok(()),
    }
}

fn about(device: &str) -> String {
    format!(
        "`cargo bench -p grpo-experiments --bench step`, device {device}, {THREADS} threads, medians of {ROUNDS} steps in \
         turns behind one; the bench's head says what the variants are."
    )
}

/// An error where variants that change nothing but the time have other rewards or losses.
fn check_alike(variants: &[&str], laps: &[Vec<Lap>]) -> Result<()> {
    let trained = |laps: &[Lap]| laps.iter().map(|lap| [lap.value[0], lap.value[1]]).collect::<Vec<_>>();
    let mut alike = variants.iter().zip(laps).filter(|(variant, _)| ALIKE.contains(variant));
    let Some((_, first)) = alike.next() else { return Ok(()) };
    for (variant, other) in alike {
        let (got, due) = (trained(other), trained(first));
        ensure!(got == due, "{variant} has rewards and losses {got:?}; due are {due:?}");
    }
    println!("rewards and losses of the steps: {:?}", trained(first));
    Ok(())
}

fn row(variant: &str, laps: &[Lap], published: &[Lap]) -> Vec<String> {
    let of = |what: usize| median(laps.iter().map(|lap| lap.value[what]));
    let metric = |name: &str| of(METRICS.iter().position(|known| *known == name).unwrap_or(METRICS.len()));
    let time = |phase: &str| metric(&format!("time/{phase}_s"));
    let memory = |phase: &str| format!("{:.2}", metric(&format!("memory/{phase}_peak_gb")));
    let (step, per_s) = (time("step"), metric("throughput/tokens_per_s"));
    vec![
        variant.into(),
        format!("{step:.3}"),
        format!("{:.2}", ratio(published, laps)),
        format!("{:.3}: {:.3} ({:.3}), {:.3}", time("rollout"), time("sample"), of(METRICS.len()), time("score")),
        format!("{:.3}", time("reference")),
        format!("{:.3}: {:.0}", time("update"), step * per_s / time("update")),
        format!("{:.1}, {per_s:.0}", metric("throughput/images_per_s")),
        ["rollout", "reference", "update"].map(memory).join(", "),
    ]
}

/// What the last step logged and drew.
#[derive(Default)]
struct Step {
    metrics: Metrics,
    codes: Vec<Vec<u32>>,
}

#[derive(Clone, Default)]
struct Seen(Arc<Mutex<Step>>);

impl Observer<SimpleAr> for Seen {
    fn step(&mut self, report: &StepReport<'_, SimpleAr>) -> Result<(), BoxError> {
        let drawn = report.groups.iter().flat_map(|group| &group.completions);
        let codes = drawn.map(|completion| completion.trace.codes.clone()).collect();
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Step { metrics: report.metrics.clone(), codes };
        Ok(())
    }
}

/// A trainer that takes a step a lap.
fn work(variant: &str, place: &str) -> Result<()> {
    let Published { mut config, policy, rewards, prompts } = Published::read(&device(place)?)?;
    let policy = match variant {
        "recomputed" => policy.recompute_layers(),
        "window" => policy.with_window(WINDOW)?,
        "one_part" => {
            config.rollout.parts_at_once = 1;
            policy
        }
        "published" | "apart" => policy,
        _ => bail!("`{variant}` is none of {VARIANTS:?}"),
    };
    let (size, n_rows) = (config.rollout.group_size, config.rollout.rows_per_call);
    let rollout: Box<dyn Rollout<SimpleAr>> = match variant {
        "apart" => Box::new(GroupSampler::new(rewards, size, n_rows)),
        _ => Box::new(OverlappedSampler::new(rewards, size, n_rows)),
    };
    let (reference, seen) = (policy.frozen()?, Seen::default());
    let mut trainer = Trainer::new(config, policy, Some(reference), rollout, prompts)?.observe(seen.clone());
    let lap = || {
        trainer.step()?;
        let Step { metrics, codes } = std::mem::take(&mut *seen.0.lock().unwrap_or_else(PoisonError::into_inner));
        let call = |codes: &[Vec<u32>]| trainer.policy().decode(codes).map(drop);
        let ((), pixels_s) = timed(|| Ok(codes.chunks(n_rows).try_for_each(call)?))?;
        // Off Linux there is no peak.
        let metric = |name: &&str| metrics.get(*name).copied().unwrap_or(0.0);
        let value = METRICS.iter().map(metric).chain([pixels_s]).collect();
        let seconds = metrics.get("time/step_s").copied().context("the step logged no time")?;
        Ok(Lap { seconds, value })
    };
    serve(lap, |peak_bytes| End { peak_bytes, notes: BTreeMap::new() })
}
