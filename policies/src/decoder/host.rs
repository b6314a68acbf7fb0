//! Cached decoding on the CPU, from slices to slices: a tile of rows goes through all layers on one thread, or, where few
//! rows meet weights that come from memory, all rows go together and threads share the columns of each product.
//!
//! Rows never meet: every product is [`kernel`](crate::ops::kernel)'s, whose elements depend on their own row and
//! column alone, and each row attends to its own cache. So neither neighbours nor tiles nor threads show in the bits.

use std::cell::Cell;
use std::ops::Range;

use candle_core::Tensor;
use grpo::{Error, Result};
use rayon::prelude::*;

use super::cache::RowCache;
use super::weights::Layer;
use super::{Decoder, DecoderConfig};
use crate::ops::kernel::{Panels, Product};
use crate::ops::rms_norm::normalise_rows;
use crate::ops::rope::{NO_IMAGE, Place, Rope};
use crate::ops::swiglu::activate_rows;
use crate::ops::vector::{self, vectorised};
use crate::ops::{host, tensor};

/// Limits of the rows of a tile: fewer read the weights too often, more leave threads without work.
const TILE_ROWS: Range<usize> = 8..64;
/// Bytes of weights that stay in the caches of a thread from one pass to the next.
const CACHED_BYTES: usize = 16 << 20;

#[derive(Debug)]
pub(super) struct HostEngine {
    config: DecoderConfig,
    embedding: Vec<f32>,
    layers: Vec<HostLayer>,
    norm: Vec<f32>,
    head: Panels,
    rope: std::sync::Arc<Rope>,
    /// Of the weights that every pass reads.
    n_bytes: usize,
}

#[derive(Debug)]
struct HostLayer {
    input_norm: Vec<f32>,
    qkv: Panels,
    qkv_bias: Vec<f32>,
    out: Panels,
    post_norm: Vec<f32>,
    gate_up: Panels,
    down: Panels,
}

impl HostLayer {
    fn new(layer: &Layer) -> Result<Self> {
        Ok(Self {
            input_norm: numbers(&layer.input_norm)?,
            qkv: packed(&Tensor::cat(&layer.qkv, 0)?)?,
            qkv_bias: numbers(&Tensor::cat(&layer.qkv_bias, 0)?)?,
            out: packed(&layer.out)?,
            post_norm: numbers(&layer.post_norm)?,
            gate_up: packed(&Tensor::cat(&layer.gate_up, 0)?)?,
            down: packed(&layer.down)?,
        })
    }
}

fn numbers(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.flatten_all()?.to_vec1()?)
}

fn packed(weight: &Tensor) -> Result<Panels> {
    let (n, k) = weight.dims2()?;
    Ok(Panels::of_rows(host(weight)?.values()?, n, k))
}

/// Buffers of a tile, reused by every layer.
struct Buffers {
    x: Vec<f32>,
    normed: Vec<f32>,
    qkv: Vec<f32>,
    attended: Vec<f32>,
    gate_up: Vec<f32>,
    active: Vec<f32>,
    /// Memory of products by columns, where they are shared that way.
    strips: Option<Vec<f32>>,
}

/// Rows that go through the layers together.
struct Tile<'a> {
    rows: &'a mut [RowCache],
    runs: &'a [&'a [u32]],
    /// `[tokens, H]`.
    hidden: &'a mut [f32],
    /// Tokens that each row has room for.
    capacity: usize,
}

impl HostEngine {
    pub(super) fn new(decoder: &Decoder, slice: Range<usize>) -> Result<Self> {
        Ok(Self {
            config: decoder.config().clone(),
            embedding: numbers(decoder.embedding())?,
            layers: decoder.layers().iter().map(HostLayer::new).collect::<Result<_>>()?,
            norm: numbers(decoder.norm())?,
            head: packed(&decoder.head_rows(slice)?)?,
            rope: decoder.rope().clone(),
            n_bytes: size_of::<f32>() * (decoder.n_elements() - decoder.embedding().elem_count()),
        })
    }

    pub(super) fn prefill(&self, prompts: &[&[u32]], capacity: usize) -> Result<(Vec<RowCache>, Tensor)> {
        let config = &self.config;
        let size = config
            .num_hidden_layers
            .checked_mul(config.num_key_value_heads * config.head_dim())
            .and_then(|size| size.checked_mul(capacity));
        let Some(size) = size else {
            return Err(Error::config(format!("a cache of {capacity} tokens is more than any memory; lower it")));
        };
        let empty = || RowCache { keys: vec![0.0; size], values: vec![0.0; size], length: 0, image_start: NO_IMAGE };
        let mut rows: Vec<RowCache> = prompts.iter().map(|_| empty()).collect();
        let hidden = self.extend(&mut rows, prompts)?;
        let lasts: Vec<u32> = prompts
            .iter()
            .scan(0, |end, prompt| {
                *end += prompt.len() as u32;
                Some(*end - 1)
            })
            .collect();
        let hidden = hidden.index_select(&Tensor::from_vec(lasts, prompts.len(), hidden.device())?, 0)?;
        Ok((rows, hidden))
    }

    /// Reads each row's run of ids; the hidden states after every one of them, row after row.
    pub(super) fn extend(&self, rows: &mut [RowCache], runs: &[&[u32]]) -> Result<Tensor> {
        let width = self.config.hidden_size;
        let per_head = self.config.num_hidden_layers * self.config.num_key_value_heads * self.config.head_dim();
        let capacity = rows.first().map_or(0, |row| row.keys.len() / per_head);
        let n_tokens = runs.iter().map(|run| run.len()).sum();
        let mut hidden = vec![0.0; n_tokens * width];
        if self.by_columns(n_tokens) {
            self.advance(Tile { rows, runs, hidden: &mut hidden, capacity }, true);
            return Ok(tensor(hidden, (n_tokens, width))?);
        }
        let longest = runs.iter().map(|run| run.len()).max().unwrap_or(0);
        let tile = (tile_rows(rows.len() * longest) / longest.max(1)).max(1);
        let (mut rows_left, mut hidden_left) = (rows, &mut hidden[..]);
        let mut tasks = Vec::with_capacity(runs.len().div_ceil(tile));
        for runs in runs.chunks(tile) {
            let (rows, rest) = rows_left.split_at_mut(runs.len());
            let n_tokens: usize = runs.iter().map(|run| run.len()).sum();
            let (hidden, more) = hidden_left.split_at_mut(n_tokens * width);
            tasks.push(Tile { rows, runs, hidden, capacity });
            (rows_left, hidden_left) = (rest, more);
        }
        tasks.into_par_iter().for_each(|tile| self.advance(tile, false));
        Ok(tensor(hidden, (n_tokens, width))?)
    }

    /// Whether threads share the columns of each product and not the rows: where weights come from memory at every pass,
    /// and there are too few rows for each thread to be worth a pass of its own.
    fn by_columns(&self, n_tokens: usize) -> bool {
        self.n_bytes > CACHED_BYTES && n_tokens < TILE_ROWS.end * rayon::current_num_threads()
    }

    pub(super) fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let (rows, _) = hidden.dims2()?;
        Ok(tensor(self.flat_logits(hidden)?, (rows, self.head.n()))?)
    }

    /// Logits, row by row.
    pub(super) fn logit_rows(&self, hidden: &Tensor) -> Result<Vec<Vec<f32>>> {
        Ok(self.flat_logits(hidden)?.chunks_exact(self.head.n().max(1)).map(<[f32]>::to_vec).collect())
    }

    fn flat_logits(&self, hidden: &Tensor) -> Result<Vec<f32>> {
        let (rows, width) = hidden.dims2()?;
        if width != self.config.hidden_size {
            return Err(Error::Shape {
                what: "the hidden states",
                got: hidden.dims().to_vec(),
                expected: vec![rows, self.config.hidden_size],
            });
        }
        let hidden = hidden.contiguous()?;
        let host = host(&hidden)?;
        let n = self.head.n();
        let mut out = vec![0.0; rows * n];
        if self.by_columns(rows) {
            Product::of_rows(host.values()?, &self.head, &mut out).add_by_columns(&mut Vec::new());
            return Ok(out);
        }
        let tile = tile_rows(rows);
        let tasks = out.par_chunks_mut(tile * n).zip(host.values()?.par_chunks(tile * width));
        tasks.for_each(|(out, hidden)| Product::of_rows(hidden, &self.head, out).add());
        Ok(out)
    }

    /// Reads each row's run of ids and writes the hidden states after every one of them.
    fn advance(&self, tile: Tile<'_>, by_columns: bool) {
        let Tile { rows, runs, hidden, capacity } = tile;
        let width = self.config.hidden_size;
        let mut buffers = self.buffers(hidden.len() / width, by_columns);
        for (cache, run) in rows.iter_mut().zip(runs) {
            cache.image_start = self.rope.image_start(cache.image_start, run, cache.length);
        }
        for (x, id) in buffers.x.chunks_exact_mut(width).zip(runs.iter().copied().flatten()) {
            x.copy_from_slice(&self.embedding[*id as usize * width..][..width]);
        }
        for (index, layer) in self.layers.iter().enumerate() {
            self.project(layer, &mut buffers);
            self.attend_all(index, (&mut *rows, runs), capacity, &mut buffers);
            self.finish_layer(layer, &mut buffers);
        }
        rows.iter_mut().zip(runs).for_each(|(cache, run)| cache.length += run.len());
        vectorised(|| normalise_rows(&buffers.x, &self.norm, self.config.rms_norm_eps as f32, hidden));
    }

    fn buffers(&self, tokens: usize, by_columns: bool) -> Buffers {
        let config = &self.config;
        let d = config.head_dim();
        let zeros = |width: usize| vec![0.0; tokens * width];
        Buffers {
            x: zeros(config.hidden_size),
            normed: zeros(config.hidden_size),
            qkv: zeros((config.num_attention_heads + 2 * config.num_key_value_heads) * d),
            attended: zeros(config.hidden_size),
            gate_up: zeros(2 * config.intermediate_size),
            active: zeros(config.intermediate_size),
            strips: by_columns.then(Vec::new),
        }
    }

    fn norm_all(&self, weight: &[f32], buffers: &mut Buffers) {
        let eps = self.config.rms_norm_eps as f32;
        vectorised(|| normalise_rows(&buffers.x, weight, eps, &mut buffers.normed));
    }

    fn project(&self, layer: &HostLayer, buffers: &mut Buffers) {
        self.norm_all(&layer.input_norm, buffers);
        buffers.qkv.chunks_exact_mut(layer.qkv_bias.len()).for_each(|row| row.copy_from_slice(&layer.qkv_bias));
        add(&mut buffers.strips, Product::of_rows(&buffers.normed, &layer.qkv, &mut buffers.qkv));
    }

    fn finish_layer(&self, layer: &HostLayer, buffers: &mut Buffers) {
        add(&mut buffers.strips, Product::of_rows(&buffers.attended, &layer.out, &mut buffers.x));
        self.norm_all(&layer.post_norm, buffers);
        buffers.gate_up.fill(0.0);
        add(&mut buffers.strips, Product::of_rows(&buffers.normed, &layer.gate_up, &mut buffers.gate_up));
        let wide = self.config.intermediate_size;
        vectorised(|| activate_rows(&buffers.gate_up, wide, &mut buffers.active));
        add(&mut buffers.strips, Product::of_rows(&buffers.active, &layer.down, &mut buffers.x));
    }

    /// Attends within each row, one row after another or side by side.
    fn attend_all(
        &self,
        layer: usize,
        (rows, runs): (&mut [RowCache], &[&[u32]]),
        capacity: usize,
        buffers: &mut Buffers,
    ) {
        let (qkv_width, width) = (self.layers[layer].qkv_bias.len(), self.config.hidden_size);
        let (mut qkv_left, mut attended_left) = (&mut buffers.qkv[..], &mut buffers.attended[..]);
        let tasks = rows.iter_mut().zip(runs).map(|(cache, run)| {
            let (qkv, more) = std::mem::take(&mut qkv_left).split_at_mut(run.len() * qkv_width);
            let (attended, rest) = std::mem::take(&mut attended_left).split_at_mut(run.len() * width);
            (qkv_left, attended_left) = (more, rest);
            (cache, qkv.chunks_exact_mut(qkv_width), attended.chunks_exact_mut(width))
        });
        let attend = |(cache, qkv, attended): (&mut RowCache, std::slice::ChunksExactMut<'_, f32>, _)| {
            let mut scores = SCORES.take();
            scores.resize(scores.len().max(capacity), 0.0);
            let attended: std::slice::ChunksExactMut<'_, f32> = attended;
            for (offset, (qkv, attended)) in qkv.zip(attended).enumerate() {
                let place = Place { index: cache.length + offset, image_start: cache.image_start };
                let token = Token { layer, place, capacity, qkv, attended };
                vectorised(|| self.attend(cache, token, &mut scores));
            }
            SCORES.set(scores);
        };
        match buffers.strips.is_some() {
            true => tasks.collect::<Vec<_>>().into_par_iter().for_each(attend),
            false => tasks.for_each(attend),
        }
    }
}

/// Adds a product, by columns where there is memory for it.
fn add(strips: &mut Option<Vec<f32>>, product: Product<'_>) {
    match strips {
        Some(strips) => product.add_by_columns(strips),
        None => product.add(),
    }
}

thread_local! {
    /// Scores of one head, as many as a row has room for tokens.
    static SCORES: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// A token that attends.
struct Token<'a> {
    layer: usize,
    /// Where it stands in its row.
    place: Place,
    capacity: usize,
    /// Its queries, keys and values.
    qkv: &'a mut [f32],
    attended: &'a mut [f32],
}

impl HostEngine {
    /// Stores a token's key and value and lets its queries attend to all of its row so far.
    #[inline(always)]
    fn attend(&self, cache: &mut RowCache, token: Token<'_>, scores: &mut [f32]) {
        let (heads, kv_heads) = (self.config.num_attention_heads, self.config.num_key_value_heads);
        let (d, group) = (self.config.head_dim(), heads / kv_heads);
        let Token { layer, place, capacity, qkv, attended } = token;
        let position = place.index;
        let (queries, rest) = qkv.split_at_mut(heads * d);
        let (keys, values) = rest.split_at_mut(kv_heads * d);
        queries.chunks_exact_mut(d).chain(keys.chunks_exact_mut(d)).for_each(|head| self.rope.rotate(head, place));
        let seen = position + 1;
        let scale = 1.0 / (d as f32).sqrt();
        for kv in 0..kv_heads {
            let head = (layer * kv_heads + kv) * d * capacity..(layer * kv_heads + kv + 1) * d * capacity;
            let (all_keys, all_values) = (&mut cache.keys[head.clone()], &mut cache.values[head]);
            for (line, key) in all_keys.chunks_exact_mut(capacity).zip(&keys[kv * d..][..d]) {
                line[position] = *key;
            }
            all_values[position * d..][..d].copy_from_slice(&values[kv * d..][..d]);
            for member in kv * group..(kv + 1) * group {
                let scores = &mut scores[..seen];
                scores.fill(0.0);
                vector::add_weighted(scores, &queries[member * d..][..d], all_keys, capacity);
                scores.iter_mut().for_each(|score| *score *= scale);
                let (_, sum) = vector::exp_shifted(scores);
                let out = &mut attended[member * d..][..d];
                out.fill(0.0);
                vector::add_weighted(out, scores, all_values, d);
                let norm = 1.0 / sum;
                out.iter_mut().for_each(|value| *value *= norm);
            }
        }
    }
}

fn tile_rows(rows: usize) -> usize {
    rows.div_ceil(2 * rayon::current_num_threads()).clamp(TILE_ROWS.start, TILE_ROWS.end).next_multiple_of(8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::with_threads;
    use grpo::Seed;

    #[test]
    fn columns_shared_by_threads_change_no_bit() {
        let config = DecoderConfig { vocab_size: 300, num_hidden_layers: 2, ..DecoderConfig::default() };
        let decoder = Decoder::init(config, Seed::new(3)).unwrap();
        let run = |n_bytes: usize, n_threads: usize| {
            let engine = HostEngine { n_bytes, ..HostEngine::new(&decoder, 9..300).unwrap() };
            with_threads(n_threads, || {
                let (mut rows, hidden) = engine.prefill(&[&[1, 2, 3, 4, 5], &[6], &[7, 8]], 12).unwrap();
                let more = engine.extend(&mut rows, &[&[10, 11, 12], &[], &[20]]).unwrap();
                let logits = engine.logits(&more).unwrap();
                [hidden, more, logits].map(|tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap())
            })
        };
        let by_rows = run(0, 2);
        for n_threads in [1, 3] {
            assert!(run(usize::MAX, n_threads) == by_rows, "{n_threads} threads");
        }
    }
}
