//! Keys and values of what has been read, one set per row.

use candle_core::{Result as TensorResult, Tensor};
use grpo::{Error, Result};

/// Keys and values of each row's tokens so far, with room for `capacity` of them.
///
/// Made by [`super::Snapshot::prefill`], advanced by [`super::Snapshot::decode_step`].
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
}

/// Keys and values by layer, `[rows, kv_heads, capacity, head_dim]`.
#[derive(Clone, Debug)]
pub(super) struct DeviceCache {
    pub(super) keys: Vec<Tensor>,
    pub(super) values: Vec<Tensor>,
    pub(super) lengths: Vec<usize>,
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
        match &self.store {
            Store::Host(rows) => rows.iter().map(|row| row.length).collect(),
            Store::Device(cache) => cache.lengths.clone(),
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

    pub(super) fn has_room(&self) -> Result<()> {
        match self.lengths().iter().position(|length| *length >= self.capacity) {
            None => Ok(()),
            Some(row) => Err(Error::config(format!(
                "row {row} of the cache is full at {} tokens; prefill with a greater capacity",
                self.capacity
            ))),
        }
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
        Ok(Self { keys: select(&self.keys)?, values: select(&self.values)?, lengths })
    }
}

/// Row numbers, each as often as told; an error unless there is one number per row and a row remains.
pub(super) fn repeated(repeats: &[usize], rows: usize) -> Result<Vec<usize>> {
    if repeats.len() != rows || repeats.iter().all(|times| *times == 0) {
        return Err(Error::config(format!("repeats {repeats:?} for {rows} rows; give one number per row, not all 0")));
    }
    Ok(repeats.iter().enumerate().flat_map(|(row, times)| std::iter::repeat_n(row, *times)).collect())
}
