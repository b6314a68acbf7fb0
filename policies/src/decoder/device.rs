//! Cached decoding out of candle's operations, for devices that have none of our own yet.

use std::ops::Range;

use candle_core::{DType, Tensor};
use grpo::Result;

use super::Decoder;
use super::cache::DeviceCache;
use crate::ops::rms_norm::rms_norm;
use crate::ops::rope::Place;

#[derive(Debug)]
pub(super) struct DeviceEngine {
    decoder: Decoder,
    /// The rows of the head that can be chosen, transposed: `[H, slice]`.
    head: Tensor,
}

impl DeviceEngine {
    pub(super) fn new(decoder: &Decoder, slice: Range<usize>) -> Result<Self> {
        let decoder = decoder.frozen()?;
        let head = decoder.head_rows(slice)?.t()?;
        Ok(Self { decoder, head })
    }

    pub(super) fn prefill(&self, prompts: &[&[u32]], capacity: usize) -> Result<(DeviceCache, Tensor)> {
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        let (hidden, attention) = self.decoder.forward_with(prompts, |attention, qkv| {
            let [_, k, v] = attention.split(qkv)?;
            let room = capacity - k.dim(2)?;
            keys.push(k.pad_with_zeros(2, 0, room)?.contiguous()?);
            values.push(v.pad_with_zeros(2, 0, room)?.contiguous()?);
            Ok(())
        })?;
        let lengths = attention.lengths.to_vec();
        let last: Vec<(usize, usize)> = lengths.iter().enumerate().map(|(row, length)| (row, length - 1)).collect();
        let image_starts = attention.image_starts.to_vec();
        Ok((DeviceCache { keys, values, lengths, image_starts }, self.decoder.hidden_at(&hidden, &last)?))
    }

    /// Reads each row's run of ids; the hidden states after every one of them, row after row.
    ///
    /// Shorter runs are filled up with their last token, which writes what it wrote before; an empty one with a token
    /// behind the row's end, which nobody sees.
    pub(super) fn extend(&self, cache: &mut DeviceCache, runs: &[&[u32]]) -> Result<Tensor> {
        let config = self.decoder.config();
        let longest = runs.iter().map(|run| run.len()).max().unwrap_or(0);
        let (mut ids, mut places, mut real) = (Vec::new(), Vec::new(), Vec::new());
        for (row, run) in runs.iter().enumerate() {
            let length = cache.lengths[row];
            let image_start = self.decoder.rope().image_start(cache.image_starts[row], run, length);
            cache.image_starts[row] = image_start;
            for offset in 0..longest {
                let last = offset.min(run.len().saturating_sub(1));
                ids.push(run.get(last).copied().unwrap_or(0));
                places.push(Place { index: length + last, image_start });
            }
            real.extend((0..run.len()).map(|offset| (row * longest + offset) as u32));
        }
        let places = Places { shape: (runs.len(), longest), places };
        let mut x = self.decoder.embed(&ids)?;
        for (index, layer) in self.decoder.layers().iter().enumerate() {
            let qkv = self.decoder.project(layer, &x)?;
            let attended = self.attend(cache, index, &qkv, &places)?;
            x = self.decoder.finish_layer(layer, &x, &attended)?;
        }
        cache.lengths.iter_mut().zip(runs).for_each(|(length, run)| *length += run.len());
        let n_real = real.len();
        let x = x.index_select(&Tensor::from_vec(real, n_real, x.device())?, 0)?;
        Ok(rms_norm(&x, self.decoder.norm(), config.rms_norm_eps)?)
    }

    /// Stores the new tokens' keys and values and attends to all so far: `[rows · tokens, h · d]`.
    fn attend(&self, cache: &DeviceCache, layer: usize, qkv: &Tensor, places: &Places) -> Result<Tensor> {
        let config = self.decoder.config();
        let ((rows, tokens), d) = (places.shape, config.head_dim());
        let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        let (keys, values) = (&cache.keys[layer], &cache.values[layer]);
        let capacity = keys.dim(2)?;
        let positions: Vec<u32> = places.places.iter().map(|place| place.index as u32).collect();
        let positions = Tensor::from_vec(positions, rows * tokens, qkv.device())?;
        let (cos, sin) = self.decoder.rope().tables(places.places.iter().copied(), qkv.device())?;
        let shape = (rows, 1, tokens, d / 2);
        let (cos, sin) = (cos.reshape(shape)?, sin.reshape(shape)?);
        let part = |first: usize, n: usize| {
            qkv.narrow(1, first * d, n * d)?.contiguous()?.reshape((rows, tokens, n, d))?.transpose(1, 2)?.contiguous()
        };
        let q = self.decoder.rope().composite_with(&part(0, heads)?, &cos, &sin)?;
        let k = self.decoder.rope().composite_with(&part(heads, kv_heads)?, &cos, &sin)?;
        let v = part(heads + kv_heads, kv_heads)?;
        let place = positions.reshape((rows, 1, tokens, 1))?.broadcast_as((rows, kv_heads, tokens, d))?.contiguous()?;
        keys.scatter_set(&place, &k.contiguous()?, 2)?;
        values.scatter_set(&place, &v, 2)?;
        let q = q.reshape((rows, kv_heads, heads / kv_heads * tokens, d))?;
        let scores = (q.matmul(&keys.t()?)? / (d as f64).sqrt())?.to_dtype(DType::F32)?;
        let scores = scores.reshape((rows, heads, tokens, capacity))?.broadcast_add(&self.seen(places, capacity)?)?;
        let weights = scores.broadcast_sub(&scores.max_keepdim(3)?)?.exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(3)?)?.to_dtype(qkv.dtype())?;
        let weights = weights.reshape((rows, kv_heads, heads / kv_heads * tokens, capacity))?;
        let attended = weights.matmul(values)?.reshape((rows, heads, tokens, d))?;
        Ok(attended.transpose(1, 2)?.reshape((rows * tokens, heads * d))?)
    }

    /// 0 at positions that a token may see and negative infinity at others, `[rows, 1, tokens, capacity]`.
    fn seen(&self, places: &Places, capacity: usize) -> Result<Tensor> {
        let bias = |last: usize, position: usize| if position <= last { 0.0 } else { f32::NEG_INFINITY };
        let of_place = |place: &Place| {
            let last = place.index;
            (0..capacity).map(move |position| bias(last, position))
        };
        let mask: Vec<f32> = places.places.iter().flat_map(of_place).collect();
        let (rows, tokens) = places.shape;
        Ok(Tensor::from_vec(mask, (rows, 1, tokens, capacity), self.decoder.device())?)
    }

    pub(super) fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(hidden.matmul(&self.head)?)
    }
}

/// Where the tokens of a pass stand.
struct Places {
    /// Rows and tokens of each.
    shape: (usize, usize),
    /// Where each token stands, row after row.
    places: Vec<Place>,
}
