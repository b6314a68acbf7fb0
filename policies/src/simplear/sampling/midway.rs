//! Rows in the middle of an image, for the benches: what a token costs there, without drawing those before it.

use candle_core::Tensor;
use grpo::{Result, Seed};

use super::{Branches, n_branches, one_by_one};
use crate::decoder::{Cache, Snapshot, repeat_rows};
use crate::simplear::SimpleAr;

/// Rows of which each has read the same tokens.
pub struct Midway<'a> {
    branches: Branches<'a>,
    seeds: Vec<Seed>,
    /// Of every row and branch.
    hidden: Tensor,
}

impl SimpleAr {
    /// One row for each seed behind what the one row of a cache has read, whose last hidden state, `[1, H]`, comes with it.
    ///
    /// Under guidance the unconditional branch has read the same.
    pub fn midway<'a>(
        &'a self,
        snapshot: &'a Snapshot,
        (read, hidden): (&Cache, &Tensor),
        seeds: Vec<Seed>,
    ) -> Result<Midway<'a>> {
        let repeats = [n_branches(&self.law) * seeds.len()];
        let (cache, hidden) = (read.expand(&repeats)?, repeat_rows(hidden, &repeats)?);
        Ok(Midway { branches: Branches::behind(&self.law, snapshot, (cache, &hidden))?, seeds, hidden })
    }
}

impl Midway<'_> {
    /// The codes of each row's next `n_tokens`, drawn as [`SimpleAr::draw`] does, token by token, and forgotten again.
    pub fn draw(&mut self, n_tokens: usize) -> Result<Vec<Vec<u32>>> {
        self.branches.snapshot.logits_in(&self.hidden, &mut self.branches.buffers)?;
        let rows = rayon::scope(|_| one_by_one(&mut self.branches, &self.seeds, n_tokens))?;
        // The last token is chosen and never read.
        self.branches.take_back(&vec![n_tokens.saturating_sub(1); self.seeds.len()])?;
        Ok(rows.into_iter().map(|row| row.choices).collect())
    }
}
