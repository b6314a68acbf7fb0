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
use super::tile::{DecodeBuffers, Memory, Tile};
use super::weights::Layer;
use super::{Decoder, DecoderConfig};
use crate::ops::kernel::{Onto, Panels, Product};
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

/// What the tokens of a tile become in a layer, one part behind another in one piece of memory; each `[tokens, width]`.
struct Parts<'a> {
    normed: &'a mut [f32],
    qkv: &'a mut [f32],
    attended: &'a mut [f32],
    gate_up: &'a mut [f32],
    active: &'a mut [f32],
    /// Memory of products by columns, where they are shared that way.
    strips: Option<&'a mut Vec<f32>>,
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
        let mut buffers = DecodeBuffers::default();
        self.extend(&mut rows, prompts, &mut buffers);
        let mut lasts = Vec::with_capacity(prompts.len() * config.hidden_size);
        let mut end = 0;
        for prompt in prompts {
            end += prompt.len() * config.hidden_size;
            lasts.extend_from_slice(&buffers.hidden[end - config.hidden_size..end]);
        }
        Ok((rows, tensor(lasts, (prompts.len(), config.hidden_size))?))
    }

    /// Reads each row's run of ids and leaves the hidden states after every one of them, row after row.
    pub(super) fn extend<R>(&self, rows: &mut [RowCache], runs: &[R], buffers: &mut DecodeBuffers)
    where
        R: AsRef<[u32]> + Sync,
    {
        let DecodeBuffers { x, hidden, memory, strips, .. } = buffers;
        let width = self.config.hidden_size;
        let n_tokens = runs.iter().map(|run| run.as_ref().len()).sum();
        [&mut *x, &mut *hidden].into_iter().for_each(|numbers| numbers.resize(n_tokens * width, 0.0));
        let tile = Tile { rows, runs, from: x, to: hidden };
        if self.by_columns(n_tokens) {
            return self.advance(tile, memory, Some(strips));
        }
        let longest = runs.iter().map(|run| run.as_ref().len()).max().unwrap_or(0);
        let most = (tile_rows(runs.len() * longest) / longest.max(1)).max(1);
        tile.for_each(most, &|tile| self.advance(tile, memory, None));
    }

    /// Whether threads share the columns of each product and not the rows: where weights come from memory at every pass,
    /// and there are too few rows for each thread to be worth a pass of its own.
    fn by_columns(&self, n_tokens: usize) -> bool {
        self.n_bytes > CACHED_BYTES && n_tokens < TILE_ROWS.end * rayon::current_num_threads()
    }

    /// The hidden states that the last pass left, `[tokens, H]`.
    pub(super) fn hidden(&self, buffers: DecodeBuffers) -> Result<Tensor> {
        let width = self.config.hidden_size;
        Ok(tensor(buffers.hidden, (buffers.x.len() / width, width))?)
    }

    /// Leaves the logits of hidden states, `[tokens, H]`.
    pub(super) fn logits_of(&self, hidden: &Tensor, buffers: &mut DecodeBuffers) -> Result<()> {
        let (rows, width) = hidden.dims2()?;
        if width != self.config.hidden_size {
            return Err(Error::Shape {
                what: "the hidden states",
                got: hidden.dims().to_vec(),
                expected: vec![rows, self.config.hidden_size],
            });
        }
        let hidden = hidden.contiguous()?;
        buffers.hidden.clear();
        buffers.hidden.extend_from_slice(host(&hidden)?.values()?);
        self.logits(buffers);
        Ok(())
    }

    /// Leaves the logits of the hidden states that the last pass left.
    pub(super) fn logits(&self, buffers: &mut DecodeBuffers) {
        let DecodeBuffers { hidden, logits, strips, .. } = buffers;
        let (n, width) = (self.head.n(), self.config.hidden_size);
        let rows = hidden.len() / width;
        logits.resize(rows * n, 0.0);
        if self.by_columns(rows) {
            return Product::of_rows(hidden, &self.head, logits).by_columns(Onto::Zero, strips);
        }
        let tile = tile_rows(rows);
        let tasks = logits.par_chunks_mut((tile * n).max(1)).zip(hidden.par_chunks(tile * width));
        tasks.for_each(|(out, hidden)| Product::of_rows(hidden, &self.head, out).compute(Onto::Zero));
    }

    /// Reads each row's run of ids and writes the hidden states after every one of them.
    fn advance<R>(&self, tile: Tile<'_, R>, memory: &Memory, strips: Option<&mut Vec<f32>>)
    where
        R: AsRef<[u32]> + Sync,
    {
        let n_tokens = tile.from.len() / self.config.hidden_size;
        let widths = self.widths();
        memory.lend(n_tokens * widths.iter().sum::<usize>(), |numbers| {
            let mut left = numbers;
            let mut part = |width: usize| left.split_off_mut(..n_tokens * width).unwrap_or_default();
            let [normed, qkv, attended, gate_up, active] = widths.map(&mut part);
            self.advance_in(tile, Parts { normed, qkv, attended, gate_up, active, strips });
        });
    }

    fn advance_in<R: AsRef<[u32]> + Sync>(&self, tile: Tile<'_, R>, mut parts: Parts<'_>) {
        let Tile { rows, runs, from: x, to: hidden } = tile;
        let width = self.config.hidden_size;
        for (cache, run) in rows.iter_mut().zip(runs) {
            cache.image_start = self.rope.image_start(cache.image_start, run.as_ref(), cache.length);
        }
        for (x, id) in x.chunks_exact_mut(width).zip(runs.iter().flat_map(AsRef::as_ref)) {
            x.copy_from_slice(&self.embedding[*id as usize * width..][..width]);
        }
        for (index, layer) in self.layers.iter().enumerate() {
            self.project(layer, x, &mut parts);
            let attending = Tile { rows, runs, from: parts.qkv, to: parts.attended };
            match parts.strips.is_some() {
                true => attending.for_each(1, &|tile| self.attend_rows(index, tile)),
                false => self.attend_rows(index, attending),
            }
            self.finish_layer(layer, x, &mut parts);
        }
        rows.iter_mut().zip(runs).for_each(|(cache, run)| cache.length += run.as_ref().len());
        self.norm_all(&self.norm, x, hidden);
    }

    /// Of the parts of a tile, in their order.
    fn widths(&self) -> [usize; 5] {
        let (config, hidden) = (&self.config, self.config.hidden_size);
        let projected = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim();
        [hidden, projected, hidden, 2 * config.intermediate_size, config.intermediate_size]
    }

    fn norm_all(&self, weight: &[f32], x: &[f32], normed: &mut [f32]) {
        let eps = self.config.rms_norm_eps as f32;
        vectorised!(normalise_rows(x, weight, eps, normed));
    }

    fn project(&self, layer: &HostLayer, x: &[f32], parts: &mut Parts<'_>) {
        self.norm_all(&layer.input_norm, x, parts.normed);
        parts.qkv.chunks_exact_mut(layer.qkv_bias.len()).for_each(|row| row.copy_from_slice(&layer.qkv_bias));
        compute(&mut parts.strips, Onto::Out, Product::of_rows(parts.normed, &layer.qkv, parts.qkv));
    }

    fn finish_layer(&self, layer: &HostLayer, x: &mut [f32], parts: &mut Parts<'_>) {
        compute(&mut parts.strips, Onto::Out, Product::of_rows(parts.attended, &layer.out, x));
        self.norm_all(&layer.post_norm, x, parts.normed);
        compute(&mut parts.strips, Onto::Zero, Product::of_rows(parts.normed, &layer.gate_up, parts.gate_up));
        let wide = self.config.intermediate_size;
        vectorised!(activate_rows(parts.gate_up, wide, parts.active));
        compute(&mut parts.strips, Onto::Out, Product::of_rows(parts.active, &layer.down, x));
    }

    /// Attends within each row, from queries, keys and values.
    fn attend_rows<R: AsRef<[u32]>>(&self, layer: usize, tile: Tile<'_, R>) {
        let (qkv_width, width) = (self.layers[layer].qkv_bias.len(), self.config.hidden_size);
        let per_position = self.config.num_hidden_layers * self.config.num_key_value_heads * self.config.head_dim();
        let mut tokens = tile.from.chunks_exact_mut(qkv_width).zip(tile.to.chunks_exact_mut(width));
        let mut scores = SCORES.take();
        for (cache, run) in tile.rows.iter_mut().zip(tile.runs) {
            let capacity = cache.keys.len() / per_position;
            scores.resize(scores.len().max(capacity), 0.0);
            for (offset, (qkv, attended)) in (0..run.as_ref().len()).zip(&mut tokens) {
                let place = Place { index: cache.length + offset, image_start: cache.image_start };
                let token = Token { layer, place, capacity, qkv, attended };
                vectorised!(self.attend(cache, token, &mut scores));
            }
        }
        SCORES.set(scores);
    }
}

/// Computes a product, by columns where there is memory for it.
fn compute(strips: &mut Option<&mut Vec<f32>>, onto: Onto, product: Product<'_>) {
    match strips {
        Some(strips) => product.by_columns(onto, strips),
        None => product.compute(onto),
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
        for head in queries.chunks_exact_mut(d).chain(keys.chunks_exact_mut(d)) {
            self.rope.rotate(head, place);
        }
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
                let scores = &mut scores[..vector::whole(seen, capacity)];
                scores.fill(0.0);
                vector::add_weighted(scores, &queries[member * d..][..d], all_keys, capacity);
                scores.iter_mut().for_each(|score| *score *= scale);
                let (_, sum) = vector::exp_shifted(scores, seen);
                let out = &mut attended[member * d..][..d];
                out.fill(0.0);
                vector::add_weighted(out, &scores[..seen], all_values, d);
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
                let (mut rows, first) = engine.prefill(&[&[1, 2, 3, 4, 5], &[6], &[7, 8]], 12).unwrap();
                let mut buffers = DecodeBuffers::default();
                let runs: [&[u32]; 3] = [&[10, 11, 12], &[], &[20]];
                engine.extend(&mut rows, &runs, &mut buffers);
                engine.logits(&mut buffers);
                (first.flatten_all().unwrap().to_vec1::<f32>().unwrap(), buffers.hidden, buffers.logits)
            })
        };
        let by_rows = run(0, 2);
        for n_threads in [1, 3] {
            assert!(run(usize::MAX, n_threads) == by_rows, "{n_threads} threads");
        }
    }
}
