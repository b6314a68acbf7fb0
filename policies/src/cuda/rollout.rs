//! Whole images drawn on a card: prompts read once, branches of guidance side by side, every choice made where the logits
//! are, and one token's work captured as a graph that is replayed until the last.
//!
//! Bytes of a step: all weights but the embedding once, and the keys and values of every row. Nothing comes back to the
//! host before the end.

use std::ops::Range;

use candle_core::Result as TensorResult;
use grpo::{Error, Result};
use rayon::prelude::*;

use super::arguments::{DrawOfRows, LawOfRows};
use super::batch::{Batch, image_start};
use super::gpu::{Buffer, Extent, Gpu, Kind};
use super::head::Head;
use super::layer::{Pass, TOKEN_THREADS, activate, embed, rms_norm, turn};
use super::products::Matrix;
use super::weights::{LayerWeights, Weights};
use crate::decoder::Decoder;
use crate::ops::rope::NO_IMAGE;
use crate::sampling::Shaping;

/// Keys that one block of attention reads: decode.cu's SPLIT.
const SPLIT: usize = 256;
/// Threads of a block that draws.
const DRAW_THREADS: usize = 1024;
/// Rows of the decoder that a launch can have: a grid's second and third side.
const MOST_ROWS: usize = 65_535;
/// The share of free memory that caches and logits may take.
const SHARE: f64 = 0.85;

/// Rows that are wanted.
pub(crate) struct Job<'a> {
    /// Prompts, each read once, and how many rows each has.
    pub(crate) prompts: &'a [Vec<u32>],
    pub(crate) repeats: &'a [usize],
    /// What the unconditional branch reads, and the scale of guidance.
    pub(crate) guidance: Option<(&'a [u32], f32)>,
    pub(crate) shaping: Shaping,
    /// The ids that compete.
    pub(crate) slice: Range<usize>,
    pub(crate) n_tokens: usize,
    /// A uniform number for each row and token.
    pub(crate) uniforms: &'a (dyn Fn(usize, usize) -> f64 + Sync),
}

/// Choices, counted from the slice's first id, and their log-probabilities, for each row.
pub(crate) type Drawn = (Vec<u32>, Vec<f32>);

/// Draws all rows of a job, as many at a time as there is memory for.
pub(crate) fn draw(decoder: &Decoder, job: &Job<'_>) -> Result<Vec<Drawn>> {
    let gpu = Gpu::of(decoder.embedding())?;
    let weights = Weights::of(&gpu, decoder)?;
    let head = Head::of(&gpu, decoder, job.slice.clone(), 1.0)?;
    let longest = job.prompts.iter().map(Vec::len).chain(job.guidance.map(|(ids, _)| ids.len())).max().unwrap_or(0);
    // The last token is chosen and never read.
    let capacity = (longest + job.n_tokens).saturating_sub(1).max(1);
    let most = rows_that_fit(&gpu, &weights, job, capacity)?;
    let owners: Vec<usize> =
        job.repeats.iter().enumerate().flat_map(|(prompt, times)| std::iter::repeat_n(prompt, *times)).collect();
    let mut drawn = Vec::with_capacity(owners.len());
    for first in (0..owners.len()).step_by(most) {
        let rows = first..owners.len().min(first + most);
        let part = Part { gpu: &gpu, weights: &weights, head: &head, job, decoder, capacity };
        drawn.extend(part.draw(rows.start, &owners[rows])?);
    }
    Ok(drawn)
}

/// How many rows caches and logits leave room for.
fn rows_that_fit(gpu: &Gpu, weights: &Weights, job: &Job<'_>, capacity: usize) -> Result<usize> {
    let (sizes, bytes) = (weights.sizes, weights.kind.bytes());
    let cache = 2 * weights.layers.len() * sizes.kv_heads * sizes.head_dim * capacity * bytes;
    let passing = 4 * (2 * sizes.hidden + sizes.qkv() + sizes.queries() + 3 * sizes.gated);
    let parts = 4 * sizes.heads * capacity.div_ceil(SPLIT) * (sizes.head_dim + 2);
    let branches = if job.guidance.is_some() { 2 } else { 1 };
    let longest = capacity.saturating_sub(job.n_tokens) + 1;
    // A prompt of its own for each row would be read by a pass of the whole decoder, two layers' activations at a time.
    let reading = longest * (bytes * (sizes.qkv() + sizes.queries() + 3 * sizes.gated) + 12 * sizes.hidden);
    let row = branches * (cache + passing + parts + 4 * job.slice.len()) + 16 * job.n_tokens + reading;
    let free = gpu.free_bytes()?;
    match (SHARE * free as f64) as usize / row {
        0 => Err(Error::config(format!(
            "one row of {capacity} tokens takes {:.2} GB and the card has {:.2} GB free; take a smaller image",
            row as f64 / 1e9,
            free as f64 / 1e9
        ))),
        rows => Ok(rows.min(MOST_ROWS / branches)),
    }
}

/// Rows that are drawn together.
struct Part<'a> {
    gpu: &'a Gpu,
    weights: &'a Weights,
    head: &'a Head,
    job: &'a Job<'a>,
    decoder: &'a Decoder,
    capacity: usize,
}

/// What rows are drawn with.
struct State {
    /// Rows that are wanted, and rows of the decoder: twice as many under guidance.
    wanted: usize,
    rows: usize,
    /// Keys and values of each layer, `[rows, kv, capacity, d]`.
    caches: Vec<[Buffer; 2]>,
    /// Tokens in each row's cache, where its image begins, and how many tokens of the image are drawn, i32.
    lengths: Buffer,
    images: Buffer,
    step: Buffer,
    /// The last token of each row.
    ids: Buffer,
    logits: Buffer,
    draw: DrawOfRows,
    /// What `draw` points to.
    _uniforms: Buffer,
    choices: Buffer,
    log_probs: Buffer,
    fault: Buffer,
}

/// Memory that a step's layers use one after another.
struct Scratch {
    x: Buffer,
    normed: Buffer,
    qkv: Buffer,
    attended: Buffer,
    gate_up: Buffer,
    active: Buffer,
    sums: Buffer,
    scales: Buffer,
    parts: usize,
}

impl Part<'_> {
    /// Draws the rows that belong to these prompts; `first` is the number of the first of them.
    fn draw(&self, first: usize, owners: &[usize]) -> Result<Vec<Drawn>> {
        let (gpu, n) = (self.gpu, self.job.n_tokens);
        let state = self.read(first, owners)?;
        self.choose(&state)?;
        if n > 1 {
            let scratch = self.scratch(state.rows)?;
            // Whatever a first use has to load is loaded outside the graph.
            self.step(&state, &scratch)?;
            if n > 2 {
                let graph = gpu.capture(|| self.step(&state, &scratch))?;
                (2..n).try_for_each(|_| gpu.replay(&graph))?;
            }
        }
        let choices: Vec<u32> = gpu.download(&state.choices, state.wanted * n)?;
        let log_probs: Vec<f32> = gpu.download(&state.log_probs, state.wanted * n)?;
        if gpu.download::<i32>(&state.fault, 1)? != [0] {
            return Err(Error::config(
                "the policy's logits are not finite, so nothing can be drawn; take an earlier checkpoint or a \
                 temperature nearer to 1",
            ));
        }
        Ok(choices.chunks(n).zip(log_probs.chunks(n)).map(|(a, b)| (a.to_vec(), b.to_vec())).collect())
    }

    /// Reads the prompts that occur among the rows, each once, into the caches of all their rows, and makes the logits of
    /// each row's first token.
    fn read(&self, first: usize, owners: &[usize]) -> Result<State> {
        let job = self.job;
        let mut prompts: Vec<&[u32]> = Vec::new();
        let mut which = Vec::with_capacity(2 * owners.len());
        for (row, owner) in owners.iter().enumerate() {
            if row == 0 || owners[row - 1] != *owner {
                prompts.push(&job.prompts[*owner]);
            }
            which.push(prompts.len() - 1);
        }
        if let Some((negative, _)) = job.guidance {
            which.extend(std::iter::repeat_n(prompts.len(), owners.len()));
            prompts.push(negative);
        }
        let rope = self.decoder.rope();
        let batch = Batch::new(self.gpu, &prompts, rope)?;
        let images: Vec<i32> =
            prompts.iter().map(|prompt| image_start(rope.image_start(NO_IMAGE, prompt, 0))).collect();
        let of = |value: &dyn Fn(usize) -> i32| which.iter().map(|prompt| value(*prompt)).collect::<Vec<i32>>();
        let firsts = self.gpu.upload(&of(&|prompt| batch.starts[prompt] as i32))?;
        let lengths = self.gpu.upload(&of(&|prompt| prompts[prompt].len() as i32))?;
        let images = self.gpu.upload(&of(&|prompt| images[prompt]))?;
        let state = self.state(first, owners.len(), (which.len(), lengths, images))?;
        let pass = Pass { gpu: self.gpu, weights: self.weights, batch: &batch };
        let longest = prompts.iter().map(|prompt| prompt.len()).max().unwrap_or(0);
        let mut x = pass.embedded()?;
        for (layer, cache) in self.weights.layers.iter().zip(&state.caches) {
            let (made, out) = pass.layer(layer, &x)?;
            self.fill(cache, made.qkv.at(0), (firsts.at(0), state.lengths.at(0)), (longest, state.rows))?;
            x = out;
        }
        let lasts: Vec<u32> =
            which.iter().map(|prompt| (batch.starts[*prompt] + prompts[*prompt].len() - 1) as u32).collect();
        let lasts = self.gpu.upload(&lasts)?;
        let hidden = pass.normed(x.at(0), self.weights.norm, Some((lasts.at(0), state.rows)))?;
        self.head.logits(self.gpu, hidden.at(0), state.rows, state.logits.at(0))?;
        Ok(state)
    }

    fn state(&self, first: usize, wanted: usize, (rows, lengths, images): (usize, Buffer, Buffer)) -> Result<State> {
        let (gpu, job, sizes) = (self.gpu, self.job, self.weights.sizes);
        let n = job.n_tokens;
        let size = rows * sizes.kv_heads * self.capacity * sizes.head_dim;
        let cache = |_: &LayerWeights| Ok([gpu.room(size, self.weights.kind)?, gpu.room(size, self.weights.kind)?]);
        let caches = self.weights.layers.iter().map(cache).collect::<TensorResult<Vec<_>>>()?;
        let uniform = |at: usize| (job.uniforms)(first + at / n, at % n);
        let uniforms: Vec<f64> = (0..wanted * n).into_par_iter().map(uniform).collect();
        let (uniforms, step) = (gpu.upload(&uniforms)?, gpu.upload(&[0i32])?);
        let (choices, log_probs, ids) = (gpu.words(wanted * n)?, gpu.words(wanted * n)?, gpu.words(rows)?);
        let (fault, logits) = (gpu.upload(&[0i32])?, gpu.words(rows * self.head.width)?);
        let draw = DrawOfRows {
            uniforms: uniforms.at(0),
            step: step.at(0),
            choices: choices.at(0),
            log_probs: log_probs.at(0),
            ids: ids.at(0),
            fault: fault.at(0),
            n_tokens: n as i32,
            offset: job.slice.start as u32,
        };
        Ok(State {
            wanted,
            rows,
            caches,
            lengths,
            images,
            step,
            ids,
            logits,
            draw,
            _uniforms: uniforms,
            choices,
            log_probs,
            fault,
        })
    }

    fn fill(
        &self,
        [keys, values]: &[Buffer; 2],
        qkv: u64,
        (firsts, lengths): (u64, u64),
        (longest, rows): (usize, usize),
    ) -> TensorResult<()> {
        let sizes = self.weights.sizes;
        let (heads, kv_heads, d) = (sizes.heads as i32, sizes.kv_heads as i32, sizes.head_dim as i32);
        let (keys, values, capacity) = (keys.at(0), values.at(0), self.capacity as i32);
        let arguments: [&dyn super::arguments::Argument; 9] =
            [&keys, &values, &qkv, &firsts, &lengths, &heads, &kv_heads, &d, &capacity];
        self.gpu.launch_for("fill_cache", self.weights.kind, Extent::new((longest, rows, 1), 128), &arguments)
    }

    fn scratch(&self, rows: usize) -> TensorResult<Scratch> {
        let (gpu, kind, sizes) = (self.gpu, self.weights.kind, self.weights.sizes);
        let parts = self.capacity.div_ceil(SPLIT);
        Ok(Scratch {
            x: gpu.words(rows * sizes.hidden)?,
            normed: gpu.room(rows * sizes.hidden, kind)?,
            qkv: gpu.room(rows * sizes.qkv(), kind)?,
            attended: gpu.room(rows * sizes.queries(), kind)?,
            gate_up: gpu.room(rows * 2 * sizes.gated, kind)?,
            active: gpu.room(rows * sizes.gated, kind)?,
            sums: gpu.words(rows * sizes.heads * parts * sizes.head_dim)?,
            scales: gpu.words(rows * sizes.heads * parts * 2)?,
            parts,
        })
    }

    /// Reads the last token of each row and draws the next.
    fn step(&self, state: &State, scratch: &Scratch) -> TensorResult<()> {
        let (gpu, weights, rows) = (self.gpu, self.weights, state.rows);
        embed(gpu, weights, (state.ids.at(0), rows), scratch.x.at(0))?;
        for (layer, cache) in weights.layers.iter().zip(&state.caches) {
            self.layer(layer, cache, state, scratch)?;
        }
        let (lengths, step, n) = (state.lengths.at(0), state.step.at(0), rows as i32);
        gpu.launch("advance", Extent::new((1, 1, 1), TOKEN_THREADS), &[&lengths, &step, &n])?;
        rms_norm(gpu, weights, (scratch.x.at(0), weights.norm), (0, rows), scratch.normed.at(0))?;
        self.head.logits(gpu, scratch.normed.at(0), rows, state.logits.at(0))?;
        self.choose(state)
    }

    fn layer(&self, layer: &LayerWeights, cache: &[Buffer; 2], state: &State, scratch: &Scratch) -> TensorResult<()> {
        let (gpu, weights, rows, sizes) = (self.gpu, self.weights, state.rows, self.weights.sizes);
        let (hidden, width, queries, gated) = (sizes.hidden, sizes.qkv(), sizes.queries(), sizes.gated);
        let matrix = |buffer: &Buffer, width: usize| Matrix::new(buffer.at(0), weights.kind, width);
        let stream = (Matrix::new(scratch.x.at(0), Kind::F32, hidden), true);
        let norm = |weight: u64| rms_norm(gpu, weights, (scratch.x.at(0), weight), (0, rows), scratch.normed.at(0));
        norm(layer.input_norm)?;
        let (normed, qkv) = (matrix(&scratch.normed, hidden), matrix(&scratch.qkv, width));
        gpu.apply([rows, width, hidden], normed, matrix(&layer.qkv, hidden), (qkv, false))?;
        let places = (state.lengths.at(0), state.images.at(0));
        turn(gpu, weights, (scratch.qkv.at(0), rows), places, (layer.bias.at(0), 1.0))?;
        self.attend(cache, state, scratch)?;
        let attended = matrix(&scratch.attended, queries);
        gpu.apply([rows, hidden, queries], attended, matrix(&layer.out, queries), stream)?;
        norm(layer.post_norm)?;
        let gate_up = matrix(&scratch.gate_up, 2 * gated);
        gpu.apply([rows, 2 * gated, hidden], normed, matrix(&layer.gate_up, hidden), (gate_up, false))?;
        activate(gpu, weights, (scratch.gate_up.at(0), rows), scratch.active.at(0))?;
        let active = matrix(&scratch.active, gated);
        gpu.apply([rows, hidden, gated], active, matrix(&layer.down, gated), stream)
    }

    /// Puts each row's new key and value into its cache and attends to all of it.
    fn attend(&self, [keys, values]: &[Buffer; 2], state: &State, scratch: &Scratch) -> TensorResult<()> {
        let (gpu, kind, sizes, rows) = (self.gpu, self.weights.kind, self.weights.sizes, state.rows);
        let (heads, kv_heads, d) = (sizes.heads as i32, sizes.kv_heads as i32, sizes.head_dim as i32);
        let (qkv, keys, values, lengths) = (scratch.qkv.at(0), keys.at(0), values.at(0), state.lengths.at(0));
        let capacity = self.capacity as i32;
        let arguments: [&dyn super::arguments::Argument; 8] =
            [&keys, &values, &qkv, &lengths, &heads, &kv_heads, &d, &capacity];
        gpu.launch_for("extend_cache", kind, Extent::new((rows, 1, 1), 128), &arguments)?;
        let (sums, scales, scale) = (scratch.sums.at(0), scratch.scales.at(0), sizes.scale());
        let arguments: [&dyn super::arguments::Argument; 10] =
            [&sums, &scales, &qkv, &keys, &values, &lengths, &heads, &kv_heads, &capacity, &scale];
        // decode.cu's Team: f32 of wide heads has room for half as many keys.
        let threads = if kind == Kind::F32 && sizes.head_dim > 64 { 64 } else { 128 };
        let extent = Extent::new((scratch.parts, sizes.kv_heads, rows), threads);
        gpu.launch_for(&format!("attend_part_{}", sizes.head_dim), kind, extent, &arguments)?;
        let (out, parts) = (scratch.attended.at(0), scratch.parts as i32);
        let extent = Extent::new((sizes.heads, rows, 1), sizes.head_dim);
        gpu.launch_for("attend_whole", kind, extent, &[&out, &sums, &scales, &lengths, &heads, &d, &parts])
    }

    /// Draws a token of each row from its logits.
    fn choose(&self, state: &State) -> TensorResult<()> {
        let shaping = self.job.shaping;
        let law = LawOfRows {
            guidance: self.job.guidance.map_or(1.0, |(_, scale)| scale),
            temperature: shaping.temperature,
            top_p: shaping.top_p,
            min_p: shaping.min_p,
            top_k: shaping.top_k.map_or(0, |k| i32::try_from(k).unwrap_or(i32::MAX)),
            greedy: i32::from(shaping.greedy),
        };
        let (logits, wanted, width) = (state.logits.at(0), state.wanted as i32, self.head.width as i32);
        let extent = Extent::new((state.wanted, 1, 1), DRAW_THREADS);
        self.gpu.launch("sample_rows", extent, &[&logits, &wanted, &width, &law, &state.draw])
    }
}
