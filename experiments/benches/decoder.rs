//! The decoder against PyTorch and transformers on the same weights: training passes, cached decoding, AdamW.
//!
//! `cargo bench -p grpo-experiments --bench decoder -- PYTHON [miniature|half] [train|decode|adamw] [--log]`, where PYTHON
//! is what `experiments/benches/peers/make.sh` made. Every contender is a process of its own with two threads, f32; laps
//! go in turns, and a ratio is the median over rounds of two laps of the same moment. Losses, gradient norms and greedy
//! tokens must agree. `--log` writes the table into experiments/LOG.md.
//!
//! Floors are measured in the same run: operations over what candle's matrix product reaches on a square of 1,024 with
//! as many threads, bytes over what two threads read and write of large arrays.

#![expect(clippy::print_stdout, reason = "a bench speaks to a person")]

mod race;

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use candle_core::{Device, Tensor};
use grpo::{AdamW, Gradients, OptimConfig, Seed};
use grpo_policies::decoder::{Decoder, DecoderConfig, Targets};
use grpo_policies::safetensors_file::Precision;
use race::{Contender, End, Lap, median, race, serve, speed};
use rayon::prelude::*;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const THREADS: usize = 2;

/// What is timed on which shape: the contenders' arguments, and how often.
struct Case {
    name: &'static str,
    arguments: &'static [&'static str],
    rounds: usize,
    /// Tokens of a lap.
    tokens: usize,
}

const MINIATURE: [Case; 4] = [
    Case { name: "train, 2 x 512", arguments: &["train", "2", "512"], rounds: 9, tokens: 1024 },
    Case { name: "decode, batch 1", arguments: &["decode", "1", "64", "128"], rounds: 7, tokens: 128 },
    Case { name: "decode, batch 16", arguments: &["decode", "16", "64", "128"], rounds: 7, tokens: 2048 },
    Case { name: "adamw", arguments: &["adamw"], rounds: 9, tokens: 0 },
];

const HALF: [Case; 4] = [
    Case { name: "train, 1 x 512", arguments: &["train", "1", "512"], rounds: 4, tokens: 512 },
    Case { name: "decode, batch 1", arguments: &["decode", "1", "32", "24"], rounds: 4, tokens: 24 },
    Case { name: "decode, batch 16", arguments: &["decode", "16", "32", "24"], rounds: 4, tokens: 384 },
    Case { name: "adamw", arguments: &["adamw"], rounds: 5, tokens: 0 },
];

fn config(shape: &str) -> DecoderConfig {
    let sizes = match shape {
        "miniature" => (8_192, 256, 1_024, 6, 4),
        _ => (65_536, 896, 4_864, 24, 14),
    };
    let (vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads) = sizes;
    DecoderConfig {
        vocab_size,
        hidden_size,
        intermediate_size,
        num_hidden_layers,
        num_attention_heads,
        num_key_value_heads: 2,
        max_position_embeddings: 4_096,
        tie_word_embeddings: false,
        ..DecoderConfig::default()
    }
}

fn main() -> Result<()> {
    grpo_policies::keep_freed_memory();
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    if let ["worker", folder, rest @ ..] = &arguments[..] {
        return work(Path::new(folder), rest);
    }
    let Some((python, chosen)) = arguments.split_first() else {
        bail!("give the python that experiments/benches/peers/make.sh made; the file's head says more")
    };
    let wants = |kinds: &[&str], kind: &str| {
        let named: Vec<_> = chosen.iter().filter(|word| kinds.contains(word)).collect();
        named.is_empty() || named.contains(&&kind)
    };
    let (operations, bytes) = (multiply_speed()?, memory_speed());
    let mut lines = vec![
        "| shape | case | grpo | peer | speed | peak memory, grpo and peer | share of the floor |".to_string(),
        "|---|---|---|---|---|---|---|".into(),
    ];
    for (shape, cases) in [("miniature", MINIATURE), ("half", HALF)] {
        if !wants(&["miniature", "half"], shape) {
            continue;
        }
        let folder = tempfile::tempdir()?;
        Decoder::init(config(shape), Seed::new(1))?.save(folder.path(), Precision::F32)?;
        for case in cases.iter().filter(|case| wants(&["train", "decode", "adamw"], case.arguments[0])) {
            let floor = Floor { config: &config(shape), operations, bytes };
            lines.extend(compare(shape, case, python, folder.path(), &floor)?);
        }
    }
    let table = lines.join("\n");
    println!("{table}\n\nmultiply-adds {operations:.3e} FLOP/s, memory {bytes:.3e} B/s, load {}", load());
    if chosen.contains(&"--log") { log(&table) } else { Ok(()) }
}

fn load() -> String {
    std::fs::read_to_string("/proc/loadavg").unwrap_or_default().trim().to_string()
}

/// One case: ours, with layers made again where it trains, and the peer.
fn compare(shape: &str, case: &Case, python: &str, folder: &Path, floor: &Floor<'_>) -> Result<Vec<String>> {
    let kind = case.arguments[0];
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/peers/decoder.py");
    let mut names = vec!["grpo"];
    let mut contenders = vec![Contender::start("grpo", &mut ours(folder, case.arguments)?)?];
    if kind == "train" {
        let again = [&["again"], &case.arguments[1..]].concat();
        contenders.push(Contender::start("grpo, layers again", &mut ours(folder, &again)?)?);
        names.push("grpo, layers made again");
    }
    let mut peer = Command::new(python);
    peer.arg(program).arg(folder).arg(THREADS.to_string()).args(case.arguments);
    contenders.push(Contender::start("the peer", &mut peer)?);
    let laps = race(&mut contenders, case.rounds)?;
    let ends: Vec<End> = contenders.into_iter().map(Contender::end).collect::<Result<_>>()?;
    let (Some((peer, ours)), Some((peer_end, our_ends))) = (laps.split_last(), ends.split_last()) else {
        bail!("nobody ran")
    };
    let seconds = |laps: &[Lap]| median(laps.iter().map(|lap| lap.seconds));
    let shown = |seconds: f64| match case.tokens {
        0 => format!("{seconds:.3} s"),
        tokens => format!("{seconds:.3} s, {:.0} tokens/s", tokens as f64 / seconds),
    };
    let mut lines = Vec::new();
    for ((name, laps), end) in names.iter().zip(ours).zip(our_ends) {
        let agreement = agree(kind, &laps[0].value, &peer[0].value)?;
        let (mine, theirs) = (end.peak_bytes / 1e9, peer_end.peak_bytes / 1e9);
        lines.push(format!(
            "| {shape} | {}, {name}{agreement} | {} | {} | {:.2} | {mine:.2} GB, {theirs:.2} GB: {:.2} | {} |",
            case.name,
            shown(seconds(laps)),
            shown(seconds(peer)),
            speed(laps, peer),
            mine / theirs,
            floor.share(case, seconds(laps)),
        ));
    }
    Ok(lines)
}

fn ours(folder: &Path, arguments: &[&str]) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("worker").arg(folder).args(arguments);
    command.env("RAYON_NUM_THREADS", THREADS.to_string()).env("CANDLE_NUM_THREADS", THREADS.to_string());
    Ok(command)
}

/// An error where contenders computed different things; what is worth saying where they did not.
fn agree(kind: &str, ours: &[f64], peer: &[f64]) -> Result<String> {
    match kind {
        "train" => {
            let close = ours.len() == 2 && ours.iter().zip(peer).all(|(a, b)| (a - b).abs() < 1e-3 * b.abs());
            ensure!(close, "loss and gradient norm are {ours:?}; the peer's are {peer:?}");
            Ok(String::new())
        }
        "decode" => {
            let same = ours.iter().zip(peer).take_while(|(a, b)| a == b).count();
            ensure!(same >= 16, "only the first {same} tokens are the peer's");
            Ok(format!(" ({same} of {} tokens the same)", peer.len()))
        }
        _ => Ok(String::new()),
    }
}

/// What the machine could do at best.
struct Floor<'a> {
    config: &'a DecoderConfig,
    operations: f64,
    bytes: f64,
}

impl Floor<'_> {
    /// The least time over the time taken.
    fn share(&self, case: &Case, seconds: f64) -> String {
        let config = self.config;
        let width = config.hidden_size;
        let kv = config.num_key_value_heads * config.head_dim();
        let layer = width * (2 * width + 2 * kv) + 3 * width * config.intermediate_size;
        let read = (config.num_hidden_layers * layer + config.vocab_size * width) as f64;
        let least = match (case.arguments[0], &case.arguments[1..]) {
            ("train", [batch, length]) => {
                let (batch, length): (f64, f64) = (batch.parse().unwrap_or(0.0), length.parse().unwrap_or(0.0));
                // Both products of a causal square, once forward and two and a half times back.
                let attention = 3.5 * 2.0 * length * length * (width * config.num_hidden_layers) as f64;
                batch * (6.0 * read * length + attention) / self.operations
            }
            ("decode", [batch, _, new]) => {
                let (batch, new): (f64, f64) = (batch.parse().unwrap_or(0.0), new.parse().unwrap_or(0.0));
                new * (2.0 * read * batch / self.operations).max(4.0 * read / self.bytes)
            }
            _ => 28.0 * (read + (config.vocab_size * width) as f64) / self.bytes,
        };
        format!("{:.0} % of {least:.3} s", 100.0 * least / seconds)
    }
}

/// Operations a second of candle's product of squares of 1,024, the fastest of ten.
fn multiply_speed() -> Result<f64> {
    let square = Tensor::ones((1_024, 1_024), candle_core::DType::F32, &Device::Cpu)?;
    let mut best = f64::INFINITY;
    for _ in 0..10 {
        let start = Instant::now();
        square.matmul(&square)?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(2.0 * 1_024f64.powi(3) / best)
}

/// Bytes a second of reading four large arrays and writing three of them, the fastest of five.
fn memory_speed() -> f64 {
    const N: usize = 1 << 25;
    let mut arrays = [0.0, 1.0, 2.0].map(|x| vec![x; N]);
    let read = vec![1f32; N];
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        let start = Instant::now();
        let [a, b, c] = arrays.each_mut().map(|array| array.par_chunks_mut(1 << 14));
        a.zip(b).zip(c).zip(read.par_chunks(1 << 14)).for_each(|(((a, b), c), read)| {
            for (((a, b), c), x) in a.iter_mut().zip(b).zip(c).zip(read) {
                (*a, *b, *c) = (*a + x, *b + x, *c + x);
            }
        });
        best = best.min(start.elapsed().as_secs_f64());
    }
    28.0 * N as f64 / best
}

/// Puts the table on top of the log's entries.
fn log(table: &str) -> Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("LOG.md");
    let text = std::fs::read_to_string(&path)?;
    let at = text.find("\n## ").context("LOG.md has no entry")?;
    let words = |program: &str, arguments: &[&str]| -> Result<String> {
        Ok(String::from_utf8_lossy(&Command::new(program).args(arguments).output()?.stdout).trim().to_string())
    };
    let (date, commit) = (words("date", &["+%Y-%m-%d"])?, words("git", &["rev-parse", "--short", "HEAD"])?);
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpu =
        cpu.lines().find_map(|line| line.strip_prefix("model name")?.split(':').nth(1)).unwrap_or("unknown").trim();
    let title = format!(
        "\n## {date}: the decoder against PyTorch and transformers\n\nCommit {commit}, {cpu}, {THREADS} threads, f32; `cargo bench -p grpo-experiments --bench decoder -- PYTHON --log`; load {}.\n\n",
        load()
    );
    Ok(std::fs::write(path, [&text[..at], &title, table, "\n", &text[at..]].concat())?)
}

/// A contender of ours.
fn work(folder: &Path, arguments: &[&str]) -> Result<()> {
    let size = |at: usize| arguments.get(at).context("too few sizes")?.parse::<usize>().map_err(anyhow::Error::from);
    match arguments[0] {
        "decode" => decode(folder, (size(1)?, size(2)?, size(3)?)),
        "adamw" => adamw(folder),
        kind => train(folder, kind == "again", (size(1)?, size(2)?)),
    }
}

fn rows(vocabulary: usize, batch: usize, length: usize) -> Vec<Vec<u32>> {
    let id = |at: usize| ((at * 7_919 + 13) % vocabulary) as u32;
    (0..batch).map(|row| (0..length).map(|at| id(row * length + at)).collect()).collect()
}

fn train(folder: &Path, again: bool, (batch, length): (usize, usize)) -> Result<()> {
    let decoder = Decoder::load(folder, &Device::Cpu, true)?;
    let decoder = if again { decoder.recompute_layers() } else { decoder };
    let vocabulary = decoder.config().vocab_size;
    let rows = rows(vocabulary, batch, length);
    let places = (0..batch).flat_map(|row| (0..length - 1).map(move |at| (row, at))).collect();
    let ids: Vec<u32> = rows.iter().flat_map(|row| &row[1..]).copied().collect();
    let n = ids.len();
    let targets = Targets { places, ids, slice: 0..vocabulary, temperature: 1.0 };
    let by_log_probs = Tensor::full(-1.0 / n as f32, n, &Device::Cpu)?;
    serve(|| {
        let start = Instant::now();
        let scores = decoder.score(&rows, &targets)?;
        let mut gradients = Gradients::new();
        scores.tape.context("no tape")?.backward(&by_log_probs, None, &mut gradients)?;
        let seconds = start.elapsed().as_secs_f64();
        let loss = -scores.log_probs.mean_all()?.to_scalar::<f32>()?;
        Ok(Lap { seconds, value: vec![f64::from(loss), gradients.norm()?] })
    })
}

fn decode(folder: &Path, (batch, length, new): (usize, usize, usize)) -> Result<()> {
    let decoder = Decoder::load(folder, &Device::Cpu, false)?;
    let vocabulary = decoder.config().vocab_size;
    let rows = rows(vocabulary, batch, length);
    let snapshot = decoder.snapshot(0..vocabulary)?;
    drop(decoder);
    serve(|| {
        let start = Instant::now();
        let (mut cache, mut hidden) = snapshot.prefill(&rows, length + new)?;
        let mut first = Vec::with_capacity(new);
        for step in 0..new {
            let best = snapshot.logits(&hidden)?.argmax(1)?.to_vec1::<u32>()?;
            first.push(f64::from(best[0]));
            if step + 1 < new {
                hidden = snapshot.decode_step(&mut cache, &best)?;
            }
        }
        Ok(Lap { seconds: start.elapsed().as_secs_f64(), value: first })
    })
}

fn adamw(folder: &Path) -> Result<()> {
    let decoder = Decoder::load(folder, &Device::Cpu, true)?;
    let mut gradients = Gradients::new();
    for (name, var) in decoder.params().iter() {
        gradients.add_values(name, vec![0.01; var.elem_count()], var.shape())?;
    }
    let mut adamw = AdamW::new(decoder.params(), OptimConfig { lr: 1e-5, ..OptimConfig::default() })?;
    serve(|| {
        let start = Instant::now();
        adamw.step(&gradients, 1e-5)?;
        Ok(Lap { seconds: start.elapsed().as_secs_f64(), value: Vec::new() })
    })
}
