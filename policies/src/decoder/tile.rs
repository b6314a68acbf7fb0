//! What a pass on the CPU works in: rows in tiles, and memory that outlives the pass.

use std::sync::{Mutex, PoisonError};

use super::cache::RowCache;

/// Hidden states and logits of the last pass, and what passes work in.
///
/// A pass that is no greater than the one before allocates nothing, except in a thread that never had a tile so large:
/// each thread has memory for the left operands of its products and for scores, and lends a piece for its tile.
#[derive(Debug, Default)]
pub(crate) struct DecodeBuffers {
    /// What goes through the layers, `[tokens, H]`.
    pub(super) x: Vec<f32>,
    /// `[tokens, H]`.
    pub(super) hidden: Vec<f32>,
    /// `[tokens, slice]`.
    pub(super) logits: Vec<f32>,
    /// What tiles work in.
    pub(super) memory: Memory,
    /// What products by columns are made in.
    pub(super) strips: Vec<f32>,
}

impl DecodeBuffers {
    /// `[tokens, slice]`, those of the last pass.
    pub(crate) fn logits(&self) -> &[f32] {
        &self.logits
    }
}

/// Pieces of memory, as many as have been lent at once.
#[derive(Debug, Default)]
pub(super) struct Memory(Mutex<Vec<Vec<f32>>>);

impl Memory {
    /// Lends `n` numbers, which are whatever they were, to `work`.
    pub(super) fn lend<R>(&self, n: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
        // Nothing that a panic leaves half done lies in them.
        let pieces = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut piece = pieces().pop().unwrap_or_default();
        piece.resize(piece.len().max(n), 0.0);
        let made = work(&mut piece[..n]);
        pieces().push(piece);
        made
    }
}

/// Rows whose tokens are worked on together.
pub(super) struct Tile<'a, R> {
    pub(super) rows: &'a mut [RowCache],
    /// The tokens of each row.
    pub(super) runs: &'a [R],
    /// `[tokens, width]`; used up.
    pub(super) from: &'a mut [f32],
    /// `[tokens, width]`, of another width perhaps.
    pub(super) to: &'a mut [f32],
}

impl<R: AsRef<[u32]> + Sync> Tile<'_, R> {
    /// Works on at most so many rows at a time, side by side.
    pub(super) fn for_each(self, most: usize, work: &(impl Fn(Tile<'_, R>) + Sync)) {
        let n_tiles = self.rows.len().div_ceil(most);
        if n_tiles <= 1 {
            return work(self);
        }
        let (first, second) = self.split(n_tiles / 2 * most);
        rayon::join(|| first.for_each(most, work), || second.for_each(most, work));
    }

    /// The first so many rows, and the others.
    fn split(self, n_rows: usize) -> (Self, Self) {
        let n_tokens = |runs: &[R]| runs.iter().map(|run| run.as_ref().len()).sum::<usize>();
        let (all, before) = (n_tokens(self.runs).max(1), n_tokens(&self.runs[..n_rows]));
        let (at_from, at_to) = (self.from.len() / all * before, self.to.len() / all * before);
        let (rows, more_rows) = self.rows.split_at_mut(n_rows);
        let (runs, more_runs) = self.runs.split_at(n_rows);
        let (from, more_from) = self.from.split_at_mut(at_from);
        let (to, more_to) = self.to.split_at_mut(at_to);
        (Self { rows, runs, from, to }, Self { rows: more_rows, runs: more_runs, from: more_from, to: more_to })
    }
}
