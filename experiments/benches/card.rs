//! SimpleAR on a card at the 0.5B shape, with random weights: images drawn, updates, AdamW, a whole step by phase.
//!
//! `cargo bench -p grpo-experiments --features cuda --bench card -- [draw|train|adamw|step]... [--small] [--log]`;
//! experiments/benches/gpu.sh builds it on a machine without a card and runs it on one with. `--small` takes a tiny shape
//! and few tokens: what the simulator can do.
//!
//! Beside each time stands its floor, from what the card was measured to do in the same run: a copy of 1 GB for its
//! memory, a product of 8192³ in bf16 for its multiply-adds. Drawing must read every weight but the embedding at each token
//! once for all rows, and each row's keys and values so far; an update's operations are 6 to a weight and token, the
//! embedding left out, and 14/4 of the forward attention's; AdamW with the norm moves 32 bytes a parameter. MFU is the floor's share.

#![expect(clippy::print_stdout, reason = "a bench speaks to a person")]

#[path = "peer/report.rs"]
mod report;

use std::time::Instant;

use anyhow::{Result, bail};
use candle_core::{DType, Device, Tensor};
use grpo::{AdamW, Gradients, LossGradient, OptimConfig, Policy, Prompt, Request, Seed};
use grpo_policies::cosmos::{Cosmos, CosmosConfig};
use grpo_policies::decoder::{Decoder, DecoderConfig};
use grpo_policies::simplear::{Drawn, Law, ScoredAs, SimpleAr, TextTokenizer};

use report::Table;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const KINDS: [&str; 4] = ["draw", "train", "adamw", "step"];
const COLUMNS: [&str; 5] = ["case", "seconds", "speed", "floor", "share of floor"];
const CAPTION: &str = "a photo of a red star left of two blue circles";

/// What the card does at its best.
struct Card {
    device: Device,
    bytes_per_s: f64,
    operations_per_s: f64,
    small: bool,
}

impl Card {
    fn measure(small: bool) -> Result<Self> {
        let device = grpo_policies::cuda::device(0)?;
        let mut card = Self { device, bytes_per_s: f64::NAN, operations_per_s: f64::NAN, small };
        if small {
            // candle's own kernels, which the simulator has not, would fill these.
            return Ok(card);
        }
        let n = 1 << 28;
        let numbers = Tensor::zeros(n, DType::F32, &card.device)?;
        let copies = card.seconds(5, || Ok(numbers.copy()?))?;
        card.bytes_per_s = 8.0 * n as f64 / copies;
        let side = 8192;
        let matrix = Tensor::ones((side, side), DType::BF16, &card.device)?;
        let products = card.seconds(5, || Ok(matrix.matmul(&matrix)?))?;
        card.operations_per_s = 2.0 * (side as f64).powi(3) / products;
        Ok(card)
    }

    /// The median over `rounds` of what work takes, after a first that is not counted.
    fn seconds<T>(&self, rounds: usize, mut work: impl FnMut() -> Result<T>) -> Result<f64> {
        let mut all = Vec::with_capacity(rounds);
        for round in 0..=rounds {
            let (_, seconds) = self.once(&mut work)?;
            if round > 0 {
                all.push(seconds);
            }
        }
        all.sort_by(f64::total_cmp);
        Ok(all.get(rounds / 2).copied().unwrap_or(f64::NAN))
    }

    /// What work gives, and what it takes until the card has done it.
    fn once<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<(T, f64)> {
        self.device.synchronize()?;
        let clock = Instant::now();
        let given = work()?;
        self.device.synchronize()?;
        Ok((given, clock.elapsed().as_secs_f64()))
    }

    /// The policy for images of `side` by `side` tokens.
    fn policy(&self, side: usize) -> Result<SimpleAr> {
        let text = TextTokenizer::of_words(CAPTION.split(' '))?;
        let shape = match self.small {
            true => CosmosConfig { channels: 8, ..CosmosConfig::shapes() },
            false => CosmosConfig::dv8x16x16(),
        };
        // The simulator knows no convolution: there pictures are decoded on the CPU.
        let of_pictures = if self.small { &Device::Cpu } else { &self.device };
        let cosmos = Cosmos::init(shape, Seed::new(1), of_pictures)?;
        let vocab_size = text.n_ids() as usize + cosmos.n_codes() as usize;
        let config = match self.small {
            true => DecoderConfig { vocab_size, num_hidden_layers: 2, ..DecoderConfig::default() },
            false => DecoderConfig {
                vocab_size,
                hidden_size: 896,
                intermediate_size: 4864,
                num_hidden_layers: 24,
                num_attention_heads: 14,
                num_key_value_heads: 2,
                max_position_embeddings: 4608,
                rope_theta: 1e6,
                ..DecoderConfig::default()
            },
        };
        let decoder = Decoder::init(config, Seed::new(2))?.on_device(&self.device)?;
        Ok(SimpleAr::new(decoder, cosmos.into(), text.into(), (side, side))?)
    }
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let flag = |name: &str| arguments.iter().any(|argument| argument == name);
    let named: Vec<&str> = arguments.iter().map(String::as_str).filter(|word| !word.starts_with("--")).collect();
    if let Some(name) = named.iter().find(|name| !KINDS.contains(name)) {
        bail!("`{name}` is no case; give some of {KINDS:?}");
    }
    let card = Card::measure(flag("--small"))?;
    println!("memory {:.2} TB/s, products {:.0} TFLOP/s", card.bytes_per_s / 1e12, card.operations_per_s / 1e12);
    let mut table = Table::new(&COLUMNS);
    for kind in KINDS.iter().filter(|kind| named.is_empty() || named.contains(kind)) {
        let rows = match *kind {
            "draw" => draw(&card)?,
            "train" => train(&card)?,
            "adamw" => vec![adamw(&card)?],
            _ => step(&card)?,
        };
        for row in rows {
            println!("| {} |", row.join(" | "));
            table.push(row);
        }
    }
    println!("\n{table}");
    let speed = format!("{:.2} TB/s and {:.0} TFLOP/s", card.bytes_per_s / 1e12, card.operations_per_s / 1e12);
    let about = format!(
        "`--bench card` on a card of {speed}, 0.5B shape, random weights; the bench's head says what floors are."
    );
    if flag("--log") { table.log("SimpleAR on a card", &about) } else { Ok(()) }
}

/// A row of the table: seconds, what is done in them, and the seconds that the card would need at its best.
fn row(case: String, seconds: f64, speed: String, floor: f64) -> Vec<String> {
    vec![case, format!("{seconds:.3}"), speed, format!("{floor:.3}"), format!("{:.2}", floor / seconds)]
}

/// So many rows of one prompt.
fn drawn(policy: &SimpleAr, rows: usize) -> Result<Vec<Drawn>> {
    let prompt = Prompt::new(CAPTION);
    let requests: Vec<Request<'_>> =
        (0..rows).map(|row| Request { prompt: &prompt, seed: Seed::new(3).fold(row as u64) }).collect();
    Ok(policy.draw(&requests)?)
}

fn guided() -> Law {
    Law { guidance: 6.0, scored_as: ScoredAs::Conditional, ..Law::default() }
}

fn draw(card: &Card) -> Result<Vec<Vec<String>>> {
    let (sides, batches): (&[usize], &[usize]) =
        if card.small { (&[3], &[1, 2]) } else { (&[16, 32, 64], &[1, 4, 28, 64]) };
    let mut rows = Vec::new();
    for side in sides {
        let plain = card.policy(*side)?;
        let guided = plain.detached()?.with_law(guided())?;
        for (policy, branches, name) in [(&plain, 1, ""), (&guided, 2, ", guided")] {
            for batch in batches {
                let seconds = card.seconds(1, || drawn(policy, *batch))?;
                rows.push(drawn_row(card, policy, (*batch, branches, name), seconds));
            }
        }
    }
    Ok(rows)
}

/// The row of a batch that was drawn in so many seconds.
fn drawn_row(
    card: &Card,
    policy: &SimpleAr,
    (batch, branches, name): (usize, usize, &str),
    seconds: f64,
) -> Vec<String> {
    let (height, width) = policy.grid();
    let (n, config) = (height * width, policy.decoder().config());
    let weights = policy.decoder().n_elements() - config.vocab_size * config.hidden_size;
    let cached = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim();
    let caches = branches * batch * cached * (n / 2 + CAPTION.split(' ').count());
    let floor = n as f64 * (2 * weights + caches) as f64 / card.bytes_per_s;
    let speed = format!("{:.3} s/image, {:.0} tokens/s", seconds / batch as f64, (batch * n) as f64 / seconds);
    row(format!("draw {batch} of {} px{name}", 16 * height), seconds, speed, floor)
}

/// Operations of a forward and a backward pass over rows of so many tokens.
fn operations(policy: &SimpleAr, rows: usize, tokens: usize) -> f64 {
    let config = policy.decoder().config();
    let multiplied = policy.decoder().n_elements() - config.vocab_size * config.hidden_size;
    let heads = config.num_attention_heads * config.head_dim();
    let attention = 3.5 * 4.0 * (tokens * tokens) as f64 / 2.0 * heads as f64 * config.num_hidden_layers as f64;
    rows as f64 * (6.0 * (multiplied * tokens) as f64 + attention)
}

/// Forward and backward of so many rows, from drawn tokens.
fn update(policy: &SimpleAr, drawn: &[Drawn], gradients: &mut Gradients) -> Result<()> {
    let prompt = Prompt::new(CAPTION);
    let batch: Vec<_> = drawn.iter().map(|drawn| (&prompt, &drawn.trace)).collect();
    let log_probs = policy.log_probs(&batch).map_err(anyhow::Error::from_boxed)?;
    let (n, device) = (log_probs.values().elem_count(), log_probs.values().device());
    let upstream = Tensor::from_vec(vec![-1.0 / n as f32; n], log_probs.values().shape(), &Device::Cpu)?;
    let upstream = LossGradient::new(upstream.to_device(device)?);
    policy.backward(&log_probs, &upstream, gradients).map_err(anyhow::Error::from_boxed)
}

/// Rows whose tokens are a formula: drawing them would take longer than what is measured.
fn formula(policy: &SimpleAr, rows: usize) -> Vec<Drawn> {
    let (height, width) = policy.grid();
    let codes = |row: usize| -> Vec<u32> {
        (0..height * width)
            .map(|at| ((row * 7919 + at * 104_729) % policy.cosmos().n_codes() as usize) as u32)
            .collect()
    };
    (0..rows).map(|row| Drawn { trace: policy.trace_of(&codes(row)), log_probs: Vec::new(), n_passes: 0 }).collect()
}

fn train(card: &Card) -> Result<Vec<Vec<String>>> {
    let (side, batches): (usize, &[usize]) = if card.small { (3, &[1]) } else { (64, &[1, 4, 8]) };
    let plain = card.policy(side)?;
    let mut rows = Vec::new();
    for (recompute, policy) in [(false, plain.copy()?), (true, plain.copy()?.recompute_layers())] {
        for batch in batches {
            let traces = formula(&policy, *batch);
            let mut gradients = Gradients::new();
            let seconds = card.seconds(3, || update(&policy, &traces, &mut gradients))?;
            let tokens = policy.prompt_ids(CAPTION, "")?.len() + side * side - 1;
            let floor = operations(&policy, *batch, tokens) / card.operations_per_s;
            let again = if recompute { ", layers recomputed" } else { "" };
            let speed = format!("{:.0} tokens/s", (batch * tokens) as f64 / seconds);
            rows.push(row(format!("update {batch} x {tokens}{again}"), seconds, speed, floor));
        }
    }
    Ok(rows)
}

fn adamw(card: &Card) -> Result<Vec<String>> {
    let policy = card.policy(if card.small { 3 } else { 16 })?;
    let mut gradients = Gradients::new();
    update(&policy, &formula(&policy, 1), &mut gradients)?;
    let mut optimiser = AdamW::new(policy.params(), OptimConfig::default())?.on_device(policy.device_optimiser());
    let seconds = card.seconds(5, || Ok(optimiser.step(&gradients, 1e-6)?))?;
    let bytes = 32.0 * policy.params().n_elements() as f64;
    Ok(row(
        "AdamW with the norm".into(),
        seconds,
        format!("{:.0} GB/s", bytes / seconds / 1e9),
        bytes / card.bytes_per_s,
    ))
}

/// Log-probabilities under the reference.
fn scored(reference: &SimpleAr, drawn: &[Drawn]) -> Result<()> {
    let prompt = Prompt::new(CAPTION);
    let rows: Vec<_> = drawn.iter().map(|drawn| (&prompt, &drawn.trace)).collect();
    reference.log_probs(&rows).map_err(anyhow::Error::from_boxed)?;
    Ok(())
}

/// A whole step of 64 images of 1024 px, by phase: draw, decode, reference, update, optimiser.
fn step(card: &Card) -> Result<Vec<Vec<String>>> {
    let (side, batch, part) = if card.small { (3, 2, 1) } else { (64, 64, 8) };
    let policy = card.policy(side)?;
    let reference = policy.frozen()?;
    let mut optimiser = AdamW::new(policy.params(), OptimConfig::default())?.on_device(policy.device_optimiser());
    let (mut rows, mut whole) = (Vec::new(), 0.0);
    // The first step is not told: it loads modules and takes memory.
    for told in [false, true] {
        let mut phase = |name: &str, seconds: f64| {
            if told {
                whole += seconds;
                rows.push(row(
                    format!("step of {batch}: {name}"),
                    seconds,
                    format!("{:.2} images/s", batch as f64 / seconds),
                    f64::NAN,
                ));
            }
        };
        let (images, seconds) = card.once(|| drawn(&policy, batch))?;
        phase("draw", seconds);
        let codes: Vec<Vec<u32>> = images.iter().map(|drawn| drawn.trace.codes.clone()).collect();
        let decode = |codes: &[Vec<u32>]| Ok::<_, grpo::Error>(policy.decode(codes)?.len());
        phase("decode pixels", card.once(|| Ok(codes.chunks(part).map(decode).collect::<Result<Vec<_>, _>>()?))?.1);
        phase("reference", card.once(|| images.chunks(part).try_for_each(|images| scored(&reference, images)))?.1);
        let mut gradients = Gradients::new();
        let mut back = |drawn: &[Drawn]| update(&policy, drawn, &mut gradients);
        phase("forward and backward", card.once(|| images.chunks(part).try_for_each(&mut back))?.1);
        phase("AdamW", card.once(|| Ok(optimiser.step(&gradients, 1e-6)?))?.1);
    }
    rows.push(row(format!("step of {batch}"), whole, format!("{:.2} images/s", batch as f64 / whole), f64::NAN));
    Ok(rows)
}
