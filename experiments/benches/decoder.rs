//! The decoder beside transformers and torch: the same weights, rows and threads, in turns, with the peak memory of each.
//!
//! `cargo bench -p grpo-experiments --bench decoder -- [PYTHON] [miniature|half]... [train|decode|adamw]... [x1|x2|x4]...
//! [--log]` races all shapes and cases, or those that are named; PYTHON is what benches/peers/make.sh made, and without it
//! there is no peer. Training is of 2 rows of the miniature and of 1 of half, or of so many as are named. `--log` writes the
//! table into LOG.md.
//!
//! Results are compared in the same run: loss and gradient norm within 1e-3, and at least the first 16 greedy tokens equal.
//! `ratio` is the peer's time over ours, the median over rounds of laps side by side. The floor is what the machine itself
//! needs, measured in the same rounds: for training the operations of both passes at the speed of candle's matrix product
//! on what the caches hold, for AdamW 28 bytes a parameter at the speed of its memory. Recomputed layers have the floor of
//! those that are kept. Peaks are of whole processes, loading included. Our AdamW takes the gradient's norm as well, which
//! the peer's does not; our snapshot for decoding is made once and timed apart.

#![expect(clippy::print_stdout, reason = "a bench speaks to a person")]

#[path = "peer/mod.rs"]
#[expect(dead_code, reason = "devices are for other benches")]
mod peer;
#[path = "decoder/worker.rs"]
mod worker;

use std::path::Path;

use anyhow::{Context, Result, ensure};
use grpo::Seed;
use grpo_policies::decoder::{Decoder, DecoderConfig};
use grpo_policies::safetensors_file::Precision;

use peer::arguments::Arguments;
use peer::contender::{Contender, End, Lap, peaks};
use peer::report::Table;
use peer::shapes::{self, SHAPES};
use peer::{THREADS, median, race, ratio, seconds};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const ROUNDS: usize = 5;
/// How far loss and gradient norm may be from the peer's, relative to it.
const TOLERANCE: f64 = 1e-3;
/// Greedy tokens that must be the peer's; later ones may part where two logits are as good as equal.
const EQUAL_TOKENS: usize = 16;
const KINDS: [&str; 3] = ["train", "decode", "adamw"];
/// Rows that are trained on at a time.
const BATCHES: [&str; 3] = ["x1", "x2", "x4"];
const COLUMNS: [&str; 7] = ["case", "ours", "peer", "ratio", "peak memory: ours, peer", "peer's over ours", "floor"];

/// What both sides do in a lap.
#[derive(Clone, Copy)]
enum Case {
    Train { batch: usize, length: usize, recompute: bool },
    Decode { batch: usize, prompt: usize, new: usize },
    AdamW,
}

/// A shape by name, its folder, and its counts.
struct Shape<'a> {
    name: &'a str,
    folder: &'a Path,
    config: DecoderConfig,
    n_params: usize,
}

fn main() -> Result<()> {
    grpo_policies::keep_freed_memory();
    let mut arguments = Arguments::read()?;
    if let [first, rest @ ..] = &arguments.words[..]
        && first == "worker"
    {
        return worker::run(&rest.iter().map(String::as_str).collect::<Vec<_>>());
    }
    // A path is no word of ours.
    let python = arguments.words.first().is_some_and(|word| word.contains('/')).then(|| arguments.words.remove(0));
    arguments.check(&[&SHAPES, &KINDS, &BATCHES])?;
    let table = race_all(python.as_deref(), &arguments)?;
    println!("\n{table}");
    match (arguments.log, python) {
        (false, _) => Ok(()),
        (true, Some(_)) => table.log("the decoder beside transformers and torch", &about()),
        (true, None) => table.log("the decoder beside the machine's floor", &about()),
    }
}

fn about() -> String {
    format!(
        "`cargo bench -p grpo-experiments --bench decoder`, {THREADS} threads, medians of {ROUNDS} rounds in turns; the \
         bench's head says what ratio and floor are."
    )
}

fn race_all(python: Option<&str>, arguments: &Arguments) -> Result<Table> {
    let mut table = Table::new(&COLUMNS);
    let named = BATCHES.iter().filter(|batch| arguments.words.iter().any(|word| word == *batch));
    let batches = named.map(|batch| Ok(batch.trim_start_matches('x').parse()?)).collect::<Result<Vec<usize>>>()?;
    for name in arguments.chosen(&SHAPES) {
        let folder = tempfile::tempdir()?;
        let shape = Shape::write(name, folder.path())?;
        for case in arguments.chosen(&KINDS).into_iter().flat_map(|kind| shape.cases(kind, &batches)) {
            table.push(shape.race(python, case)?);
        }
    }
    Ok(table)
}

impl<'a> Shape<'a> {
    /// Fresh weights in a Hugging Face folder.
    fn write(name: &'a str, folder: &'a Path) -> Result<Self> {
        let config = shapes::config(name)?;
        let decoder = Decoder::init(config.clone(), Seed::new(1))?;
        decoder.save(folder, Precision::F32)?;
        Ok(Self { name, folder, config, n_params: decoder.n_elements() })
    }

    fn is_small(&self) -> bool {
        self.name == "miniature"
    }

    fn cases(&self, kind: &str, batches: &[usize]) -> Vec<Case> {
        match kind {
            "train" => {
                let of_shape = [if self.is_small() { 2 } else { 1 }];
                let batches = if batches.is_empty() { &of_shape } else { batches };
                let case = |batch| [false, true].map(|recompute| Case::Train { batch, length: 512, recompute });
                batches.iter().flat_map(|batch| case(*batch)).collect()
            }
            "decode" => {
                let (prompt, new) = if self.is_small() { (64, 128) } else { (32, 24) };
                [1, 16].map(|batch| Case::Decode { batch, prompt, new }).to_vec()
            }
            _ => vec![Case::AdamW],
        }
    }

    /// The table's row of a case.
    fn race(&self, python: Option<&str>, case: Case) -> Result<Vec<String>> {
        let folder = self.folder.to_str().context("the temporary folder's name is not text")?;
        let arguments = |mode: &str, sizes: &[usize]| {
            let fixed = [folder.to_string(), THREADS.to_string(), mode.to_string()];
            fixed.into_iter().chain(sizes.iter().map(usize::to_string)).collect::<Vec<String>>()
        };
        let (ours, peer, sizes) = case.modes();
        let mut contenders = vec![Contender::start_worker(&arguments(ours, &sizes))?];
        let floor = case.floor_worker(self.n_params);
        if let Some((mode, sizes)) = &floor {
            contenders.push(Contender::start_worker(&arguments(mode, sizes))?);
        }
        if let Some(python) = python {
            contenders.push(Contender::start_peer(python, "decoder.py", &arguments(peer, &sizes))?);
        }
        let mut laps = race(&mut contenders, ROUNDS)?;
        let mut ends = contenders.into_iter().map(Contender::end).collect::<Result<Vec<End>>>()?;
        let peer = python.and_then(|_| Some((laps.pop()?, ends.pop()?)));
        let row = self.row(case, &laps, &ends[0], peer.as_ref());
        let note = peer.map(|(peer, _)| case.compare(&laps[0], &peer)).transpose()?.unwrap_or("no peer".into());
        let snapshot = ends[0].notes.get("snapshot_s").map(|s| format!("; snapshot made in {s:.3} s"));
        println!("{}: {note}{}", row[0], snapshot.unwrap_or_default());
        Ok(row)
    }

    /// From our laps and those of the floor, our end, and both of the peer's.
    fn row(&self, case: Case, laps: &[Vec<Lap>], end: &End, peer: Option<&(Vec<Lap>, End)>) -> Vec<String> {
        let ours = &laps[0];
        let [told, faster, peaks, lower] = match peer {
            None => [String::new(), String::new(), format!("{:.2} GB", end.peak_bytes / 1e9), String::new()],
            Some((laps, peer)) => {
                let [peaks, lower] = peaks(end, peer);
                [self.told(case, seconds(laps)), format!("{:.2}", ratio(ours, laps)), peaks, lower]
            }
        };
        let floor = laps.get(1).map(|floor| {
            let work = self.work(case);
            let share = |(floor, ours): (&Lap, &Lap)| work / floor.value[0] / ours.seconds;
            let share = median(floor.iter().zip(ours).map(share));
            let speed = median(floor.iter().map(|lap| lap.value[0]));
            let unit = if matches!(case, Case::AdamW) { "GB/s" } else { "GFLOP/s" };
            format!("{:.3} s at {:.0} {unit}; share of floor {share:.2}", work / speed, speed / 1e9)
        });
        vec![
            format!("{} {}", self.name, case.name()),
            self.told(case, seconds(ours)),
            told,
            faster,
            peaks,
            lower,
            floor.unwrap_or_default(),
        ]
    }

    /// A lap's time in the case's own unit.
    fn told(&self, case: Case, seconds: f64) -> String {
        match case {
            Case::Train { batch, length, .. } => {
                format!("{seconds:.3} s, {:.1} tokens/s", (batch * length) as f64 / seconds)
            }
            Case::Decode { batch, new, .. } => format!("{:.1} tokens/s", (batch * new) as f64 / seconds),
            Case::AdamW => format!("{seconds:.4} s, {:.1} GB/s", self.work(case) / seconds / 1e9),
        }
    }

    /// Floating-point operations of a lap, or the bytes of an update, which no program can do without.
    fn work(&self, case: Case) -> f64 {
        match case {
            Case::Train { batch, length, .. } => {
                let config = &self.config;
                // A row of the embedding is looked up, not multiplied.
                let multiplied = self.n_params - config.vocab_size * config.hidden_size;
                let heads = config.num_attention_heads * config.head_dim();
                // Two products forward and five backward over the lower half of each head's positions.
                let attention = 3.5 * 4.0 * (length * length) as f64 / 2.0 * heads as f64;
                6.0 * multiplied as f64 * (batch * length) as f64
                    + attention * (config.num_hidden_layers * batch) as f64
            }
            Case::Decode { .. } => f64::NAN,
            // Parameter, gradient and two moments are read, all but the gradient written.
            Case::AdamW => 28.0 * self.n_params as f64,
        }
    }
}

impl Case {
    fn name(self) -> String {
        match self {
            Self::Train { batch, length, recompute } => {
                format!("train {batch} x {length}{}", if recompute { ", layers recomputed" } else { "" })
            }
            Self::Decode { batch, prompt, new } => format!("decode {batch} x ({prompt} + {new})"),
            Self::AdamW => "AdamW".into(),
        }
    }

    /// Our mode, the peer's, and the sizes of both.
    fn modes(self) -> (&'static str, &'static str, Vec<usize>) {
        match self {
            Self::Train { batch, length, recompute } => {
                (if recompute { "train-recomputed" } else { "train" }, "train", vec![batch, length])
            }
            Self::Decode { batch, prompt, new } => ("decode", "decode", vec![batch, prompt, new]),
            Self::AdamW => ("adamw", "adamw", Vec::new()),
        }
    }

    /// The mode of our worker that measures the machine, where the case has a floor.
    fn floor_worker(self, n_params: usize) -> Option<(&'static str, Vec<usize>)> {
        match self {
            Self::Train { .. } => Some(("products", Vec::new())),
            Self::Decode { .. } => None,
            Self::AdamW => Some(("memory", vec![n_params])),
        }
    }

    /// How well the two agree; an error where they do not.
    fn compare(self, ours: &[Lap], peer: &[Lap]) -> Result<String> {
        let (ours, peer) = (ours.first().context("no lap")?, peer.first().context("no lap")?);
        match self {
            Self::Train { .. } => {
                let off = |(ours, peer): (&f64, &f64)| (ours - peer).abs() / peer.abs();
                let off: Vec<f64> = ours.value.iter().zip(&peer.value).map(off).collect();
                let agree = off.len() == 2 && off.iter().all(|off| *off <= TOLERANCE);
                ensure!(agree, "loss and gradient norm are {:?}, the peer's {:?}", ours.value, peer.value);
                Ok(format!(
                    "loss {:.5}, off by {:.0e}; gradient norm {:.5}, off by {:.0e}",
                    ours.value[0], off[0], ours.value[1], off[1]
                ))
            }
            Self::Decode { new, .. } => {
                let n_equal = ours.value.iter().zip(&peer.value).take_while(|(ours, peer)| ours == peer).count();
                ensure!(n_equal >= EQUAL_TOKENS.min(new), "{n_equal} tokens are the peer's; {EQUAL_TOKENS} must be");
                Ok(format!("{n_equal} of {new} greedy tokens are the peer's"))
            }
            Self::AdamW => Ok("nothing to compare; tests/golden has AdamW's numbers".into()),
        }
    }
}
