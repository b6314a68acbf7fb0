//! How fast images are drawn: tokens a second and seconds an image by size, batch and guidance, beside the machine's floor.
//!
//! `cargo bench -p grpo-experiments --bench sampling -- [miniature|half]... [256|512|1024]... [x1|x4|x28|x64]...
//! [plain|guided]... [--memory GB] [--device cuda:0] [--log]` measures all cases, or those that are named and need no more
//! memory than that. Weights are random and the text's vocabulary is small, so that head and embedding are about those of
//! the 64,000 codes; guidance is of scale 6.
//!
//! A large decoder takes hours for 4,096 tokens, so a case is measured where images stand at their first, middle and last
//! tokens: the cache of one row is made with arbitrary tokens and repeated, some tokens of every row are drawn by
//! SimpleAR's own loop, law and draw included, and what a step takes is integrated over the image by trapezoids. A step's
//! time is that of a run less that of one that draws one token and reads none; where the machine is busy with other work the
//! difference means little. The prompt of 16 tokens counts as read, in both branches of guidance, and neither the packing of
//! the weights nor the decoding of pixels is part of it.
//!
//! A step's floor is the longer of two: its weights and caches at the speed at which memory is read, its multiply-adds at the
//! speed of candle's matrix product, both measured in the same rounds. Weights that stay in a cache may beat the former.
//! Before the first lap the codes of a small image must be those that `SimpleAr::draw` gives.

#![expect(clippy::print_stdout, reason = "a bench speaks to a person")]

#[path = "peer/mod.rs"]
#[expect(dead_code, reason = "a peer in Python, and what is said of one, is for other benches")]
mod peer;
#[path = "sampling/worker.rs"]
mod worker;

use anyhow::{Context, Result, bail};
use grpo_policies::decoder::DecoderConfig;

use peer::arguments::Arguments;
use peer::contender::{Contender, Lap};
use peer::report::Table;
use peer::shapes::{self, SHAPES};
use peer::{THREADS, median, race};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const ROUNDS: usize = 3;
/// Places of an image where steps are measured, evenly spaced from the first to the last.
const DEPTHS: usize = 3;
const PROMPT: usize = 16;
const SIZES: [&str; 3] = ["256", "512", "1024"];
const BATCHES: [&str; 4] = ["x1", "x4", "x28", "x64"];
const LAWS: [&str; 2] = ["plain", "guided"];
/// Pixels of a visual token's side.
const PIXELS: usize = 16;
/// Memory of those who measure the floors.
const FLOORS_GB: f64 = 1.1;
const COLUMNS: [&str; 6] =
    ["case", "tokens/s", "s an image", "ms a step: first, middle, last", "floor of these, ms", "time over floor"];

/// So many images of a size drawn together.
#[derive(Clone, Copy, Debug)]
struct Case {
    batch: usize,
    guided: bool,
    /// Visual tokens of an image.
    n_tokens: usize,
    /// Tokens of each row that are drawn at a depth.
    steps: usize,
}

fn main() -> Result<()> {
    grpo_policies::keep_freed_memory();
    let arguments = Arguments::read()?;
    if let [first, rest @ ..] = &arguments.words[..]
        && first == "worker"
    {
        return worker::run(rest);
    }
    arguments.check(&[&SHAPES, &SIZES, &BATCHES, &LAWS])?;
    let mut table = Table::new(&COLUMNS);
    let floor = |mode: &str| Contender::start_worker(&[arguments.device.clone(), mode.into()]);
    let mut floors = vec![floor("reading")?, floor("products")?];
    for shape in arguments.chosen(&SHAPES) {
        for size in arguments.chosen(&SIZES) {
            measure(&arguments, (shape, size), &mut floors, &mut table)?;
        }
    }
    println!("\n{table}");
    match arguments.log {
        true => table.log("how fast images are drawn", &about(&arguments.device)),
        false => Ok(()),
    }
}

fn about(device: &str) -> String {
    format!(
        "`cargo bench -p grpo-experiments --bench sampling`, device {device}, {THREADS} threads, f32, medians of {ROUNDS} \
         rounds at {DEPTHS} places of an image; the bench's head says what is measured."
    )
}

/// All cases of a shape and a size, one after another in each lap of one process.
fn measure(
    arguments: &Arguments,
    (shape, size): (&str, &str),
    floors: &mut Vec<Contender>,
    table: &mut Table,
) -> Result<()> {
    let config = shapes::config(shape)?;
    let n_tokens = (size.parse::<usize>()? / PIXELS).pow(2);
    let mut cases = Vec::new();
    // A clock tells fewer of longer ones apart.
    let steps = if shape == "miniature" { 16 } else { 2 };
    for batch in arguments.chosen(&BATCHES) {
        let batch = batch.trim_start_matches('x').parse()?;
        for law in arguments.chosen(&LAWS) {
            let case = Case { batch, guided: law == "guided", n_tokens, steps };
            let gigabytes = case.bytes(&config) / 1e9 + FLOORS_GB;
            match gigabytes <= arguments.memory_gb {
                true => cases.push(case),
                false => table.push(case.skipped(shape, gigabytes)),
            }
        }
    }
    if cases.is_empty() {
        return Ok(());
    }
    let words = [arguments.device.clone(), "draw".into(), shape.into(), n_tokens.to_string(), steps.to_string()];
    let words = words.into_iter().chain(cases.iter().map(|case| format!("{},{}", case.batch, case.guided)));
    floors.push(Contender::start_worker(&words.collect::<Vec<_>>())?);
    let laps = race(floors, ROUNDS)?;
    let ours = floors.pop().context("no contender")?.end()?;
    println!("{shape} {size} px: peak memory {:.2} GB", ours.peak_bytes / 1e9);
    for (index, case) in cases.iter().enumerate() {
        let row = case.row((shape, &config), index * DEPTHS, &laps)?;
        println!("{}", row.join(" | "));
        table.push(row);
    }
    Ok(())
}

impl Case {
    fn name(&self, shape: &str) -> String {
        let side = self.n_tokens.isqrt() * PIXELS;
        format!("{shape} {side} px x {}{}", self.batch, if self.guided { ", guided" } else { "" })
    }

    /// Tokens that stand before the one that is drawn first, at each place.
    fn depths(n_tokens: usize, steps: usize) -> [usize; DEPTHS] {
        // A device keeps a token's room behind a row.
        std::array::from_fn(|at| PROMPT + at * (n_tokens - steps - 1) / (DEPTHS - 1))
    }

    /// Rows of the decoder: one of each branch.
    fn rows(&self) -> usize {
        if self.guided { 2 * self.batch } else { self.batch }
    }

    /// Of the codes, the head's.
    fn n_codes(config: &DecoderConfig) -> usize {
        config.vocab_size - worker::text_ids(config)
    }

    /// Numbers of the weights that a step multiplies.
    fn multiplied(config: &DecoderConfig) -> usize {
        let (hidden, wide) = (config.hidden_size, config.intermediate_size);
        let projected = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim();
        let layer = hidden * (projected + hidden + 3 * wide);
        config.num_hidden_layers * layer + Self::n_codes(config) * hidden
    }

    /// Bytes of a row's cache for each token.
    fn cached(config: &DecoderConfig) -> usize {
        4 * config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim()
    }

    /// What a worker holds: weights thrice while they are packed, caches, each row's logits and laws, and a row for each
    /// place to copy from.
    fn bytes(&self, config: &DecoderConfig) -> f64 {
        let weights = 3 * (Self::multiplied(config) + config.vocab_size * config.hidden_size);
        let laws = 4 * self.rows() * Self::n_codes(config);
        let caches = (self.rows() + DEPTHS) * (PROMPT + self.n_tokens) * Self::cached(config);
        (4 * (weights + laws) + caches) as f64
    }

    fn skipped(&self, shape: &str, gigabytes: f64) -> Vec<String> {
        let mut row = vec![self.name(shape), format!("left out: needs {gigabytes:.1} GB")];
        row.resize(COLUMNS.len(), String::new());
        row
    }

    /// Seconds of a step at a depth at the least, where memory gives so many bytes and products so many operations a second.
    fn floor(&self, config: &DecoderConfig, depth: usize, (reading, products): (f64, f64)) -> f64 {
        let rows = self.rows();
        // The middle one of the tokens that are read.
        let seen = depth + self.steps.div_ceil(2);
        let bytes = 4 * Self::multiplied(config) + rows * seen * Self::cached(config);
        let attention = 4 * config.num_attention_heads * config.head_dim() * config.num_hidden_layers * seen;
        let operations = rows * (2 * Self::multiplied(config) + attention);
        (bytes as f64 / reading).max(operations as f64 / products)
    }

    /// The table's row, from the laps of both floors and ours, whose values from `first` on are this case's.
    fn row(&self, (shape, config): (&str, &DecoderConfig), first: usize, laps: &[Vec<Lap>]) -> Result<Vec<String>> {
        let [reading, products, ours] = laps else { bail!("{} contenders and not three", laps.len()) };
        let depths = Self::depths(self.n_tokens, self.steps);
        let mut rounds = Vec::new();
        for ((reading, products), ours) in reading.iter().zip(products).zip(ours) {
            let steps = ours.value.get(first..first + DEPTHS).context("a lap lacks cases")?;
            let speeds = (reading.value[0], products.value[0]);
            rounds.push([steps.to_vec(), depths.map(|depth| self.floor(config, depth, speeds)).to_vec()]);
        }
        // Of steps, and then of their floors.
        let at_depths = |which: usize| {
            let at = |depth: usize| median(rounds.iter().map(|round| round[which][depth]));
            (0..DEPTHS).map(|depth| format!("{:.3}", 1e3 * at(depth))).collect::<Vec<_>>().join(", ")
        };
        let whole = median(rounds.iter().map(|[steps, _]| self.n_tokens as f64 * mean(steps)));
        let over = median(rounds.iter().map(|[steps, floors]| mean(steps) / mean(floors)));
        Ok(vec![
            self.name(shape),
            format!("{:.1}", (self.batch * self.n_tokens) as f64 / whole),
            format!("{:.3}", whole / self.batch as f64),
            at_depths(0),
            at_depths(1),
            format!("{over:.2}"),
        ])
    }
}

/// The mean height of a line through evenly spaced points.
fn mean(points: &[f64]) -> f64 {
    let areas = points.windows(2).map(|ends| (ends[0] + ends[1]) / 2.0);
    areas.sum::<f64>() / (points.len() - 1) as f64
}
