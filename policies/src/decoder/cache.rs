//! Keys and values of what has been read, one set per row.

use candle_core::{Result as TensorResult, Tensor};
use grpo::{Error, Result};

use crate::ops::rope::NO_IMAGE;

/// Keys and values of each row's tokens so far, with room for `capacity` of them.
///
/// Made by [`super::Snapshot::prefill`], advanced by [`super::Snapshot::decode_step`] and [`super::Snapshot::extend`].
#[derive(Clone, Debug)]
pub struct Cache {
    pub(super) store: Store,
    pub(super) capacity: usize,
}

#[derive(Clone, Debug)]
pub(super) enum Store {
    /// One allocation per row, so that threads own rows.
    Host(Vec<RowCache>),
    Device(DeviceCache),
}

/// One row's keys, `[layers, kv_heads, head_dim, capacity]`, and values, `[layers, kv_heads, capacity, head_dim]`.
///
/// Keys lie transposed so that the scores of neighbouring positions are made side by side.
#[derive(Clone, Debug)]
pub(super) struct RowCache {
    pub(super) keys: Vec<f32>,
    pub(super) values: Vec<f32>,
    pub(super) length: usize,
    /// Where the row's image begins.
    pub(super) image_start: usize,
}

/// Keys and values by layer, `[rows, kv_heads, capacity, head_dim]`.
#[derive(Clone, Debug)]
pub(super) struct DeviceCache {
    pub(super) keys: Vec<Tensor>,
    pub(super) values: Vec<Tensor>,
    pub(super) lengths: Vec<usize>,
    /// Where each row's image begins.
    pub(super) image_starts: Vec<usize>,
}

impl Cache {
    /// How many tokens each row can hold.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// How many rows there are.
    pub fn rows(&self) -> usize {
        match &self.store {
            Store::Host(rows) => rows.len(),
            Store::Device(cache) => cache.lengths.len(),
        }
    }

    /// How many tokens each row has read.
    pub fn lengths(&self) -> Vec<usize> {
        (0..self.rows()).map(|row| self.length(row)).collect()
    }

    fn length(&self, row: usize) -> usize {
        match &self.store {
            Store::Host(rows) => rows[row].length,
            Store::Device(cache) => cache.lengths[row],
        }
    }

    /// A cache with each row copied as often as `repeats` says, copies next to each other.
    pub fn expand(&self, repeats: &[usize]) -> Result<Self> {
        let index = repeated(repeats, self.rows())?;
        let store = match &self.store {
            Store::Host(rows) => Store::Host(index.iter().map(|row| rows[*row].clone()).collect()),
            Store::Device(cache) => Store::Device(cache.select(&index)?),
        };
        Ok(Self { store, capacity: self.capacity })
    }

    /// Leaves the rows that are to be kept, told by their numbers.
    pub(crate) fn retain(&mut self, mut keep: impl FnMut(usize) -> bool) -> Result<()> {
        match &mut self.store {
            Store::Host(rows) => {
                let mut numbers = 0..rows.len();
                rows.retain(|_| numbers.next().is_some_and(&mut keep));
            }
            Store::Device(cache) => {
                let index: Vec<usize> = (0..cache.lengths.len()).filter(|row| keep(*row)).collect();
                *cache = cache.select(&index)?;
            }
        }
        Ok(())
    }

    /// Forgets each row's tokens behind the first `lengths` of them.
    pub fn truncate(&mut self, lengths: &[usize]) -> Result<()> {
        let have = self.lengths();
        if lengths.len() != have.len() {
            let (got, rows) = (lengths.len(), have.len());
            return Err(Error::config(format!("{got} lengths for a cache of {rows} rows; give one per row")));
        }
        if let Some(row) = (0..have.len()).find(|row| lengths[*row] > have[*row]) {
            return Err(Error::config(format!(
                "row {row} of the cache has {} tokens and cannot be cut to {}; give at most what it has",
                have[row], lengths[row]
            )));
        }
        match &mut self.store {
            Store::Host(rows) => rows.iter_mut().zip(lengths).for_each(|(row, length)| {
                row.length = *length;
                forget_image(&mut row.image_start, *length);
            }),
            Store::Device(cache) => {
                cache.lengths.copy_from_slice(lengths);
                cache.image_starts.iter_mut().zip(lengths).for_each(|(start, length)| forget_image(start, *length));
            }
        }
        Ok(())
    }

    /// An error where a run of tokens does not fit behind its row.
    pub(super) fn check_room(&self, runs: &[impl AsRef<[u32]>]) -> Result<()> {
        // A device writes the filling of an empty run behind the row's end.
        let least = usize::from(matches!(self.store, Store::Device(_)));
        for (row, run) in runs.iter().enumerate() {
            let (length, n_tokens) = (self.length(row), run.as_ref().len().max(least));
            if length + n_tokens > self.capacity {
                return Err(Error::config(format!(
                    "row {row} of the cache has room for {} more tokens, not for {n_tokens}; prefill with a greater \
                     capacity",
                    self.capacity - length
                )));
            }
        }
        Ok(())
    }
}

impl DeviceCache {
    fn select(&self, index: &[usize]) -> TensorResult<Self> {
        let ids: Vec<u32> = index.iter().map(|row| *row as u32).collect();
        let select = |tensors: &[Tensor]| {
            tensors
                .iter()
                .map(|tensor| tensor.index_select(&Tensor::from_slice(&ids, ids.len(), tensor.device())?, 0))
                .collect::<TensorResult<Vec<_>>>()
        };
        let lengths = index.iter().map(|row| self.lengths[*row]).collect();
        let image_starts = index.iter().map(|row| self.image_starts[*row]).collect();
        Ok(Self { keys: select(&self.keys)?, values: select(&self.values)?, lengths, image_starts })
    }
}

/// An image begins behind a token; without that token there is none.
fn forget_image(start: &mut usize, length: usize) {
    if *start > length {
        *start = NO_IMAGE;
    }
}

/// Row numbers, each as often as told; an error unless there is one number per row and a row remains.
pub(super) fn repeated(repeats: &[usize], rows: usize) -> Result<Vec<usize>> {
    if repeats.len() != rows || repeats.iter().all(|times| *times == 0) {
        return Err(Error::config(format!("repeats {repeats:?} for {rows} rows; give one number per row, not all 0")));
    }
    Ok(repeats.iter().enumerate().flat_map(|(row, times)| std::iter::repeat_n(row, *times)).collect())
}
