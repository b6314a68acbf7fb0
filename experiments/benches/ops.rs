//! The decoder's operations and the optimiser's beside the compositions of candle's operations that they stand in for.
//!
//! `cargo bench -p grpo-experiments --bench ops -- [miniature|half]... [OPERATION]... [--device cuda:0] [--log]` races all
//! shapes and operations, or those that are named: forward, and forward and backward through candle's graph with a gradient
//! of ones. (Policies on the CPU run the same loops without the graph: bench decoder measures that.) Both sides are processes
//! of their own, laps in turns, and their peak memory shows what a graph keeps. On a GPU both
//! are the composition: our kernels there are parts of whole passes, which bench card times.
//!
//! The stock side is each operation's `composite`, the oracle of its test; for `linear` a product and a sum; for `adamw` the
//! lines of candle-nn's, after the norm by tensors that ours takes as well. `ratio` is the stock time over ours, the median
//! over rounds. The floor is the longer of two: the operations that no program can do without at the speed of candle's
//! matrix product, and operands and results, each moved once, at the speed of memory that is read and written; `norm`
//! only reads. What fits a cache may beat the latter. Candle's own pool has all threads on the stock side, and one on ours
//! as wherever we run.
//!
//! Of every lap the results of both sides are compared: a sample of each tensor's elements within 1e-3 of its root mean
//! square; the norm within 1e-2, as candle adds its squares in f32.

#![expect(clippy::print_stdout, reason = "a bench speaks to a person")]

#[path = "ops/case.rs"]
mod case;
#[path = "peer/mod.rs"]
#[expect(dead_code, reason = "a peer in Python is for other benches")]
mod peer;
#[path = "ops/worker.rs"]
mod worker;

use anyhow::{Context, Result, ensure};

use case::{Case, OPERATIONS, Pass};
use peer::arguments::Arguments;
use peer::contender::{Contender, Lap, peaks};
use peer::report::Table;
use peer::shapes::{self, SHAPES};
use peer::{THREADS, median, race};
use worker::FINGERPRINT;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const ROUNDS: usize = 5;
const COLUMNS: [&str; 8] = [
    "operation",
    "ours, ms",
    "stock, ms",
    "ratio",
    "ours",
    "share of floor",
    "peak memory: ours, stock",
    "stock over ours",
];
/// The floors' contenders, in this order.
const FLOORS: [&str; 3] = ["memory", "reading", "products"];

fn main() -> Result<()> {
    grpo_policies::keep_freed_memory();
    let arguments = Arguments::read()?;
    if let [first, rest @ ..] = &arguments.words[..]
        && first == "worker"
    {
        return worker::run(rest);
    }
    arguments.check(&[&SHAPES, &OPERATIONS])?;
    let floor = |mode: &&str| Contender::start_worker(&[arguments.device.clone(), mode.to_string()]);
    let mut contenders = FLOORS.iter().map(floor).collect::<Result<Vec<_>>>()?;
    let mut table = Table::new(&COLUMNS);
    for shape in arguments.chosen(&SHAPES) {
        for operation in arguments.chosen(&OPERATIONS) {
            measure(&arguments.device, (shape, operation), &mut contenders, &mut table)?;
        }
    }
    println!("\n{table}");
    match arguments.log {
        true => table.log("operations beside candle's", &about(&arguments.device)),
        false => Ok(()),
    }
}

fn about(device: &str) -> String {
    format!(
        "`cargo bench -p grpo-experiments --bench ops`, device {device}, {THREADS} threads, f32, medians of {ROUNDS} rounds \
         in turns; the bench's head says what ratio and floor are."
    )
}

fn measure(
    device: &str,
    (shape, operation): (&str, &str),
    contenders: &mut Vec<Contender>,
    table: &mut Table,
) -> Result<()> {
    let case = Case::new(operation, &shapes::config(shape)?)?;
    for (side, candle_threads) in [("ours", 1), ("stock", THREADS)] {
        let arguments = [device, side, shape, operation].map(String::from);
        contenders.push(Contender::start_with(&arguments, candle_threads)?);
    }
    let laps = race(contenders, ROUNDS)?;
    let stock = contenders.pop().context("no contender")?.end()?;
    let ours = contenders.pop().context("no contender")?.end()?;
    compare(&case, &laps).with_context(|| format!("{shape} {operation}"))?;
    let [peaks, lower] = peaks(&ours, &stock);
    for (at, pass) in case.passes.iter().enumerate() {
        let mut row = vec![format!("{shape} {operation} {}, {}", pass.name, case.sizes())];
        row.extend(told(pass, at, &laps));
        row.extend([peaks.clone(), lower.clone()]);
        println!("{}", row.join(" | "));
        table.push(row);
    }
    Ok(())
}

/// An error where a lap's results are not the stock side's.
fn compare(case: &Case, laps: &[Vec<Lap>]) -> Result<()> {
    let [ours, stock] = [FLOORS.len(), FLOORS.len() + 1].map(|side| &laps[side]);
    for (ours, stock) in ours.iter().zip(stock) {
        let [ours, stock] = [ours, stock].map(|lap| &lap.value[case.passes.len()..]);
        ensure!(ours.len() == stock.len() && !ours.is_empty(), "{} numbers beside {}", ours.len(), stock.len());
        for (tensor, (ours, stock)) in ours.chunks(FINGERPRINT).zip(stock.chunks(FINGERPRINT)).enumerate() {
            // Each begins with the root of the mean square.
            let size = stock[0];
            let off = ours.iter().zip(stock).map(|(ours, stock)| (ours - stock).abs() / size);
            let off = off.fold(0.0, f64::max);
            ensure!(off <= case.tolerance, "tensor {tensor} is off by {off:.1e} of its root mean square");
        }
    }
    Ok(())
}

/// The cells of a pass's times, from the laps of the floors and of both sides.
fn told(pass: &Pass, at: usize, laps: &[Vec<Lap>]) -> [String; 5] {
    let value = |who: usize, at: usize| laps[who].iter().map(move |lap| lap.value[at]);
    let (ours, stock) = (FLOORS.len(), FLOORS.len() + 1);
    let (bytes_from, products) = (usize::from(pass.only_reads), FLOORS.len() - 1);
    let floors: Vec<(f64, f64)> = value(bytes_from, 0)
        .zip(value(products, 0))
        .map(|(memory, products)| (pass.bytes / memory, pass.operations / products))
        .collect();
    let share = median(floors.iter().zip(value(ours, at)).map(|((bytes, ops), ours)| bytes.max(*ops) / ours));
    let seconds = median(value(ours, at));
    // In the unit of the longer floor.
    let by_memory = median(floors.iter().map(|(bytes, ops)| bytes - ops)) > 0.0;
    let (work, unit) = if by_memory { (pass.bytes, "GB/s") } else { (pass.operations, "GFLOP/s") };
    [
        format!("{:.3}", 1e3 * seconds),
        format!("{:.3}", 1e3 * median(value(stock, at))),
        format!("{:.2}", median(value(stock, at).zip(value(ours, at)).map(|(stock, ours)| stock / ours))),
        format!("{:.1} {unit}", work / seconds / 1e9),
        format!("{share:.2}"),
    ]
}
