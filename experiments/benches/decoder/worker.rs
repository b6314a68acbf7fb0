//! Our side of the race: one mode of the decoder, or of the machine itself, in a process of its own.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use candle_core::{Device, Tensor};
use grpo::{AdamW, Gradients, OptimConfig};
use grpo_policies::decoder::{Decoder, Snapshot, Targets, repeat_rows};

use crate::peer::contender::{End, Lap, serve};
use crate::peer::machine;
use crate::peer::timed;

/// Numbers of a gradient that are added up at a time.
const PIECE: usize = 1 << 20;

/// `FOLDER THREADS MODE SIZES...`, as peers/decoder.py; the threads were set by whoever started this.
pub fn run(arguments: &[&str]) -> Result<()> {
    let [folder, threads, mode, sizes @ ..] = arguments else { bail!("worker FOLDER THREADS MODE SIZES...") };
    let sizes: Vec<usize> = sizes.iter().map(|size| size.parse()).collect::<Result<_, _>>()?;
    let load = || Decoder::load(Path::new(folder), &Device::Cpu, true);
    match (*mode, &sizes[..]) {
        ("train", [batch, length]) => train(&load()?, *batch, *length),
        ("train-recomputed", [batch, length]) => train(&load()?.recompute_layers(), *batch, *length),
        ("decode", [batch, prompt, new]) => decode(&load()?, (*batch, *prompt), *new),
        ("adamw", []) => adamw(&load()?),
        _ => match machine::run(mode, &sizes, &Device::Cpu, threads.parse()?) {
            Some(done) => done,
            None => bail!("no mode `{mode}` of sizes {sizes:?}"),
        },
    }
}

/// What a worker ends with that has measured nothing beside its laps.
fn end(peak_bytes: f64) -> End {
    End { peak_bytes, notes: BTreeMap::new() }
}

/// The peer's rows: a formula, so that both sides read the same without a file.
fn rows(vocab: usize, batch: usize, length: usize) -> Vec<Vec<u32>> {
    let id = |at: usize| ((at * 7919 + 13) % vocab) as u32;
    (0..batch).map(|row| (row * length..(row + 1) * length).map(id).collect()).collect()
}

/// A forward and a backward pass of the mean next-token loss.
fn train(decoder: &Decoder, batch: usize, length: usize) -> Result<()> {
    let vocab = decoder.config().vocab_size;
    let rows = rows(vocab, batch, length);
    let targets = Targets {
        places: (0..batch).flat_map(|row| (0..length - 1).map(move |position| (row, position))).collect(),
        ids: rows.iter().flat_map(|row| row[1..].iter().copied()).collect(),
        slice: 0..vocab,
        temperature: 1.0,
    };
    let mut gradients = Gradients::new();
    let lap = || {
        let (loss, seconds) = timed(|| backward(decoder, &rows, &targets, &mut gradients))?;
        Ok(Lap { seconds, value: vec![loss, norm(&gradients)?] })
    };
    serve(lap, end)
}

/// The mean negative log-probability of the targets, and its gradient in the place of the last lap's.
fn backward(decoder: &Decoder, rows: &[Vec<u32>], targets: &Targets, gradients: &mut Gradients) -> Result<f64> {
    // As the peer's zero_grad: they are let go before there are others.
    *gradients = Gradients::new();
    let n = targets.ids.len();
    let scores = decoder.score(rows, targets)?;
    let by_log_probs = Tensor::full(-1.0 / n as f32, n, decoder.device())?;
    match &scores.tape {
        Some(tape) => tape.backward(&by_log_probs, None, gradients)?,
        None => gradients.add_backward(&(&scores.log_probs * &by_log_probs)?.sum_all()?, &decoder.params())?,
    }
    Ok(-scores.log_probs.to_vec1::<f32>()?.into_iter().map(f64::from).sum::<f64>() / n as f64)
}

/// In f64 and by pieces, as the peer's: f32 sums of so many squares differ in the digits that are compared.
fn norm(gradients: &Gradients) -> Result<f64> {
    let mut sum = 0.0;
    for (_, gradient) in gradients.iter() {
        let gradient = gradient.flatten_all()?;
        let n = gradient.elem_count();
        for start in (0..n).step_by(PIECE) {
            let piece = gradient.narrow(0, start, PIECE.min(n - start))?.to_vec1::<f32>()?;
            sum += piece.into_iter().map(|g| f64::from(g) * f64::from(g)).sum::<f64>();
        }
    }
    Ok(sum.sqrt())
}

/// Greedy decoding as the policies sample: prompts are read once, and all rows go on together.
fn decode(decoder: &Decoder, (batch, prompt): (usize, usize), new: usize) -> Result<()> {
    let vocab = decoder.config().vocab_size;
    let prompts = rows(vocab, batch, prompt);
    let (snapshot, snapshot_s) = timed(|| Ok(decoder.snapshot(0..vocab)?))?;
    let lap = || {
        let (ids, seconds) = timed(|| generate(&snapshot, &prompts, new))?;
        Ok(Lap { seconds, value: ids.into_iter().map(f64::from).collect() })
    };
    serve(lap, |peak_bytes| End { notes: BTreeMap::from([("snapshot_s".into(), snapshot_s)]), ..end(peak_bytes) })
}

/// The new ids of the first row.
fn generate(snapshot: &Snapshot, prompts: &[Vec<u32>], new: usize) -> Result<Vec<u32>> {
    let once = vec![1; prompts.len()];
    // The last token is chosen and never read.
    let room = prompts.iter().map(Vec::len).max().unwrap_or(0) + new - 1;
    let (cache, hidden) = snapshot.prefill(prompts, room)?;
    let (mut cache, mut hidden) = (cache.expand(&once)?, repeat_rows(&hidden, &once)?);
    let mut first = Vec::with_capacity(new);
    loop {
        let logits = snapshot.logits(&hidden)?.to_vec2::<f32>()?;
        let ids: Vec<u32> = logits.iter().map(|row| likeliest(row)).collect();
        first.push(*ids.first().context("no row")?);
        if first.len() == new {
            return Ok(first);
        }
        hidden = snapshot.decode_step(&mut cache, &ids)?;
    }
}

/// The first of the greatest, as torch's argmax.
fn likeliest(logits: &[f32]) -> u32 {
    let greatest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    logits.iter().position(|logit| *logit == greatest).unwrap_or(0) as u32
}

/// An update of every parameter; the norm of the gradient is part of it, as wherever we train.
fn adamw(decoder: &Decoder) -> Result<()> {
    // The peer clips nothing, and a clipped gradient is written once more.
    let config = OptimConfig { max_grad_norm: f64::MAX, ..OptimConfig::default() };
    let params = decoder.params();
    let mut gradients = Gradients::new();
    for (name, var) in params.iter() {
        gradients.add(name, &Tensor::full(0.01f32, var.shape(), var.device())?)?;
    }
    let mut optimizer = AdamW::new(params, config)?;
    let lap = || {
        let (_, seconds) = timed(|| Ok(optimizer.step(&gradients, config.lr)?))?;
        Ok(Lap { seconds, value: Vec::new() })
    };
    serve(lap, end)
}
