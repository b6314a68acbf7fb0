//! Sampling's view of a decoder: the weights of one moment, without a graph.

use std::ops::Range;

use candle_core::Tensor;
use grpo::{Error, Result};

use super::cache::{Cache, Store, repeated};
use super::device::DeviceEngine;
use super::host::HostEngine;
use super::tile::DecodeBuffers;
use super::{Decoder, DecoderConfig};
use crate::ops::{is_host_f32, tensor};

/// The weights of one moment, packed for reading prompts and decoding token by token.
///
/// On the CPU every row's numbers are the same to the bit whatever rows it is decoded with and however many
/// threads there are. Training that follows does not change a snapshot: make a new one for each rollout.
///
/// ```
/// use grpo::Seed;
/// use grpo_policies::decoder::{Decoder, DecoderConfig, repeat_rows};
/// let config = DecoderConfig { vocab_size: 50, num_hidden_layers: 1, ..DecoderConfig::default() };
/// let snapshot = Decoder::init(config, Seed::new(1))?.snapshot(10..50)?;
/// let (cache, hidden) = snapshot.prefill(&[vec![1, 2, 3], vec![4]], 8)?;
/// let (mut cache, hidden) = (cache.expand(&[2, 2])?, repeat_rows(&hidden, &[2, 2])?);
/// assert_eq!(snapshot.logits(&hidden)?.dims(), [4, 40]);
/// let hidden = snapshot.decode_step(&mut cache, &[10, 11, 12, 13])?;
/// assert_eq!((hidden.dims(), cache.lengths()), (&[4, 128][..], vec![4, 4, 2, 2]));
/// # Ok::<(), grpo::Error>(())
/// ```
#[derive(Debug)]
pub struct Snapshot {
    config: DecoderConfig,
    slice: Range<usize>,
    engine: Engine,
}

#[derive(Debug)]
enum Engine {
    Host(Box<HostEngine>),
    Device(Box<DeviceEngine>),
}

impl Snapshot {
    pub(super) fn new(decoder: &Decoder, slice: Range<usize>) -> Result<Self> {
        let engine = if is_host_f32(decoder.embedding()) {
            Engine::Host(Box::new(HostEngine::new(decoder, slice.clone())?))
        } else {
            Engine::Device(Box::new(DeviceEngine::new(decoder, slice.clone())?))
        };
        Ok(Self { config: decoder.config().clone(), slice, engine })
    }

    /// As on a device without operations of our own; the oracle of the CPU's engine.
    #[cfg(test)]
    pub(super) fn composite(decoder: &Decoder, slice: Range<usize>) -> Result<Self> {
        let engine = Engine::Device(Box::new(DeviceEngine::new(decoder, slice.clone())?));
        Ok(Self { config: decoder.config().clone(), slice, engine })
    }

    /// The part of the vocabulary that logits are made for.
    pub fn slice(&self) -> Range<usize> {
        self.slice.clone()
    }

    /// Tokens of the longest row.
    pub fn max_positions(&self) -> usize {
        self.config.max_position_embeddings
    }

    /// Reads prompts of any lengths: a cache with room for `capacity` tokens a row, and the hidden states
    /// `[rows, H]` after each prompt's last token.
    pub fn prefill(&self, prompts: &[impl AsRef<[u32]>], capacity: usize) -> Result<(Cache, Tensor)> {
        let prompts: Vec<&[u32]> = prompts.iter().map(AsRef::as_ref).collect();
        self.config.check_ids(prompts.iter().copied())?;
        let longest = prompts.iter().map(|prompt| prompt.len()).max().unwrap_or(0);
        let most = self.config.max_position_embeddings;
        if capacity < longest || capacity > most {
            return Err(Error::config(format!(
                "cache capacity is {capacity}; give at least the longest prompt, {longest}, and at most {most}"
            )));
        }
        let (store, hidden) = match &self.engine {
            Engine::Host(engine) => {
                let (rows, hidden) = engine.prefill(&prompts, capacity)?;
                (Store::Host(rows), hidden)
            }
            Engine::Device(engine) => {
                let (cache, hidden) = engine.prefill(&prompts, capacity)?;
                (Store::Device(cache), hidden)
            }
        };
        Ok((Cache { store, capacity }, hidden))
    }

    /// Reads one more token in each row; the hidden states after it, `[rows, H]`.
    pub fn decode_step(&self, cache: &mut Cache, ids: &[u32]) -> Result<Tensor> {
        if ids.len() != cache.rows() {
            return Err(Error::config(format!(
                "{} tokens for a cache of {} rows; give one per row",
                ids.len(),
                cache.rows()
            )));
        }
        self.extend(cache, ids.as_chunks::<1>().0)
    }

    /// Reads a run of tokens in each row, none where it is empty; the hidden states after every one of them, row after
    /// row, `[tokens, H]`.
    ///
    /// Tokens that turn out to be wrong are taken back with [`Cache::truncate`].
    pub fn extend(&self, cache: &mut Cache, runs: &[impl AsRef<[u32]> + Sync]) -> Result<Tensor> {
        self.check_runs(cache, runs)?;
        match (&self.engine, &mut cache.store) {
            (Engine::Host(engine), Store::Host(rows)) => {
                let mut buffers = DecodeBuffers::default();
                engine.extend(rows, runs, &mut buffers);
                engine.hidden(buffers)
            }
            (Engine::Device(engine), Store::Device(cache)) => {
                engine.extend(cache, &runs.iter().map(AsRef::as_ref).collect::<Vec<_>>())
            }
            _ => Err(Error::config("the cache is another device's; prefill with this snapshot")),
        }
    }

    /// [`Snapshot::extend`] and [`Snapshot::logits`], into buffers: on the CPU, with those of an earlier step, a step
    /// allocates nothing.
    pub(crate) fn extend_logits<R>(&self, cache: &mut Cache, runs: &[R], buffers: &mut DecodeBuffers) -> Result<()>
    where
        R: AsRef<[u32]> + Sync,
    {
        if let Engine::Host(engine) = &self.engine {
            self.check_runs(cache, runs)?;
            if let Store::Host(rows) = &mut cache.store {
                engine.extend(rows, runs, buffers);
                engine.logits(buffers);
                return Ok(());
            }
        }
        let hidden = self.extend(cache, runs)?;
        self.logits_in(&hidden, buffers)
    }

    fn check_runs(&self, cache: &Cache, runs: &[impl AsRef<[u32]>]) -> Result<()> {
        if runs.len() != cache.rows() {
            let (got, rows) = (runs.len(), cache.rows());
            return Err(Error::config(format!("{got} runs of tokens for a cache of {rows} rows; give one per row")));
        }
        self.config.check_ids(runs.iter().map(AsRef::as_ref).filter(|run| !run.is_empty()))?;
        cache.check_room(runs)
    }

    /// Logits of the slice of the vocabulary, `[rows, slice]`, for hidden states `[rows, H]`.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        match &self.engine {
            Engine::Host(engine) => {
                let mut buffers = DecodeBuffers::default();
                engine.logits_of(hidden, &mut buffers)?;
                Ok(tensor(buffers.logits, (hidden.dim(0)?, self.slice.len()))?)
            }
            Engine::Device(engine) => engine.logits(hidden),
        }
    }

    /// [`Snapshot::logits`], into buffers.
    pub(crate) fn logits_in(&self, hidden: &Tensor, buffers: &mut DecodeBuffers) -> Result<()> {
        match &self.engine {
            Engine::Host(engine) => engine.logits_of(hidden, buffers)?,
            Engine::Device(engine) => buffers.logits = engine.logits(hidden)?.flatten_all()?.to_vec1()?,
        }
        Ok(())
    }
}

/// Repeats rows of hidden states as [`Cache::expand`] repeats rows of the cache.
pub fn repeat_rows(hidden: &Tensor, repeats: &[usize]) -> Result<Tensor> {
    let index: Vec<u32> = repeated(repeats, hidden.dim(0)?)?.into_iter().map(|row| row as u32).collect();
    Ok(hidden.index_select(&Tensor::from_slice(&index, index.len(), hidden.device())?, 0)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decoder::ImagePositions;
    use crate::ops::testing::distance;
    use grpo::Seed;

    #[test]
    fn the_composite_engine_agrees_with_the_host_one() {
        let image_positions = ImagePositions::Grid;
        let config =
            DecoderConfig { vocab_size: 60, num_hidden_layers: 2, image_positions, ..DecoderConfig::default() };
        let decoder = Decoder::init(config, Seed::new(3)).unwrap().with_image_grid((9, 2), 4);
        let prompts = [vec![1, 2, 3, 4, 5], vec![6], vec![7, 8]];
        let [(mut cache, mut hidden, host), (mut other_cache, mut other, device)] =
            [decoder.snapshot(9..60).unwrap(), Snapshot::composite(&decoder, 9..60).unwrap()].map(|snapshot| {
                let (cache, hidden) = snapshot.prefill(&prompts, 12).unwrap();
                let hidden = repeat_rows(&hidden, &[1, 2, 0]).unwrap();
                (cache.expand(&[1, 2, 0]).unwrap(), hidden, snapshot)
            });
        for step in 0..6 {
            assert!(distance(&hidden, &other) < 1e-4, "{step}: {}", distance(&hidden, &other));
            let (logits, want) = (host.logits(&hidden).unwrap(), device.logits(&other).unwrap());
            assert!(distance(&logits, &want) < 1e-4);
            let ids = [step, 10 + step, 20 + step];
            hidden = host.decode_step(&mut cache, &ids).unwrap();
            other = device.decode_step(&mut other_cache, &ids).unwrap();
            assert_eq!(cache.lengths(), other_cache.lengths());
        }
        assert!(host.decode_step(&mut other_cache, &[1, 2, 3]).is_err());
    }

    #[test]
    fn runs_of_any_length_are_read_as_one_by_one_and_taken_back() {
        let config = DecoderConfig { vocab_size: 60, num_hidden_layers: 2, ..DecoderConfig::default() };
        let decoder = Decoder::init(config, Seed::new(3)).unwrap();
        let prompts = [vec![1, 2, 3, 4, 5], vec![6], vec![7, 8]];
        for (snapshot, tolerance) in
            [(decoder.snapshot(9..60).unwrap(), 0.0), (Snapshot::composite(&decoder, 9..60).unwrap(), 1e-4)]
        {
            let (mut cache, _) = snapshot.prefill(&prompts, 12).unwrap();
            let (mut slow, mut truncated) = (cache.clone(), cache.clone());
            let runs: [&[u32]; 3] = [&[10, 11, 12], &[], &[20, 21, 22, 23, 24]];
            let hidden = snapshot.extend(&mut cache, &runs).unwrap();
            assert_eq!((hidden.dims(), cache.lengths()), (&[8, 128][..], vec![8, 1, 7]));
            let mut one_by_one = Vec::new();
            for step in 0..5 {
                let runs: Vec<&[u32]> = runs.iter().map(|run| run.get(step..=step).unwrap_or(&[])).collect();
                one_by_one.push(snapshot.extend(&mut slow, &runs).unwrap());
            }
            // Rows 0 and 2 both move in the first three steps, row 2 alone after.
            let want = [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (3, 0), (4, 0)];
            for (index, (step, row)) in want.into_iter().enumerate() {
                let (got, want) = (hidden.get(index).unwrap(), one_by_one[step].get(row).unwrap());
                assert!(distance(&got, &want) <= tolerance, "token {index}: {}", distance(&got, &want));
            }
            // Wrong tokens that are taken back leave nothing behind.
            let wrong: [&[u32]; 3] = [&[50, 51], &[52], &[53]];
            snapshot.extend(&mut truncated, &wrong).unwrap();
            truncated.truncate(&[5, 1, 2]).unwrap();
            let again = snapshot.extend(&mut truncated, &runs).unwrap();
            assert!(distance(&again, &hidden) <= tolerance);
            assert!(
                truncated.truncate(&[9, 1, 7]).unwrap_err().to_string().contains("row 0 of the cache has 8 tokens")
            );
            let error = snapshot.extend(&mut cache, &[vec![1; 5], vec![], vec![]]).unwrap_err().to_string();
            assert!(error.contains("row 0 of the cache has room for 4 more tokens, not for 5"), "{error}");
        }
    }
}
