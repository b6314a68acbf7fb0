//! Cached decoding out of candle's operations, for devices that have none of our own yet.

use std::ops::Range;

use candle_core::{DType, Tensor};
use grpo::Result;

use super::Decoder;
use super::cache::DeviceCache;
use crate::ops::rms_norm::rms_norm;

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
        Ok((DeviceCache { keys, values, lengths }, self.decoder.hidden_at(&hidden, &last)?))
    }

    pub(super) fn step(&self, cache: &mut DeviceCache, ids: &[u32]) -> Result<Tensor> {
        let config = self.decoder.config();
        let mut x = self.decoder.embed(ids)?;
        for (index, layer) in self.decoder.layers().iter().enumerate() {
            let qkv = self.decoder.project(layer, &x)?;
            let attended = self.attend(cache, index, &qkv)?;
            x = self.decoder.finish_layer(layer, &x, &attended)?;
        }
        cache.lengths.iter_mut().for_each(|length| *length += 1);
        Ok(rms_norm(&x, self.decoder.norm(), config.rms_norm_eps)?)
    }

    /// Stores the new token's key and value and attends to all so far: `[rows, h · d]`.
    fn attend(&self, cache: &DeviceCache, layer: usize, qkv: &Tensor) -> Result<Tensor> {
        let config = self.decoder.config();
        let (rows, d) = (cache.lengths.len(), config.head_dim());
        let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        let (keys, values) = (&cache.keys[layer], &cache.values[layer]);
        let capacity = keys.dim(2)?;
        let positions: Vec<u32> = cache.lengths.iter().map(|length| *length as u32).collect();
        let positions = Tensor::from_vec(positions, rows, qkv.device())?;
        let (cos, sin) = self.decoder.rope().tables(capacity, qkv.device())?;
        let angles = |table: &Tensor| table.index_select(&positions, 0)?.reshape((rows, 1, d / 2));
        let (cos, sin) = (angles(&cos)?, angles(&sin)?);
        let part = |first: usize, n: usize| qkv.narrow(1, first * d, n * d)?.contiguous()?.reshape((rows, n, d));
        let q = self.decoder.rope().composite_with(&part(0, heads)?, &cos, &sin)?;
        let k = self.decoder.rope().composite_with(&part(heads, kv_heads)?, &cos, &sin)?;
        let v = part(heads + kv_heads, kv_heads)?;
        let place = positions.reshape((rows, 1, 1, 1))?.broadcast_as((rows, kv_heads, 1, d))?.contiguous()?;
        keys.scatter_set(&place, &k.unsqueeze(2)?.contiguous()?, 2)?;
        values.scatter_set(&place, &v.unsqueeze(2)?.contiguous()?, 2)?;
        let q = q.reshape((rows, kv_heads, heads / kv_heads, d))?;
        let scores = (q.matmul(&keys.t()?)? / (d as f64).sqrt())?.to_dtype(DType::F32)?;
        let scores = scores.broadcast_add(&self.seen(cache, capacity)?)?;
        let weights = scores.broadcast_sub(&scores.max_keepdim(3)?)?.exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(3)?)?.to_dtype(qkv.dtype())?;
        Ok(weights.matmul(values)?.reshape((rows, heads * d))?)
    }

    /// 0 at positions that a row has read and negative infinity at others, `[rows, 1, 1, capacity]`.
    fn seen(&self, cache: &DeviceCache, capacity: usize) -> Result<Tensor> {
        let bias = |length: usize, position: usize| if position <= length { 0.0 } else { f32::NEG_INFINITY };
        let mask: Vec<f32> = cache
            .lengths
            .iter()
            .flat_map(|length| (0..capacity).map(move |position| bias(*length, position)))
            .collect();
        Ok(Tensor::from_vec(mask, (cache.lengths.len(), 1, 1, capacity), self.decoder.device())?)
    }

    pub(super) fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(hidden.matmul(&self.head)?)
    }
}
