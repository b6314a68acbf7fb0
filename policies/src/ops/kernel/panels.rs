//! The right operand of a product, cut into panels.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// Vectors side by side in a tile.
pub(super) const VECTORS: usize = 2;
/// Steps of the depth that are packed together: a page's lines are read in one go, and those written stay in the first cache.
const PACKED_DEPTH: usize = 64;
/// Bytes of a cache line; panels start on one, since a vector load across two lines costs double.
const LINE: usize = 64;

/// Numbers that are copied at a time; the width of a panel is a multiple.
const LANES: usize = 8;
/// Numbers of a right operand from which on several threads pack it.
const SHARED_PACKING: usize = 1 << 16;

/// A right operand `[k, n]`, cut into panels `[k, width]`; what fills up the last one means nothing.
#[derive(Clone, Debug, Default)]
pub(crate) struct Panels {
    data: Vec<f32>,
    start: usize,
    pub(super) width: usize,
    pub(super) n: usize,
    pub(super) k: usize,
}

impl Panels {
    /// Packs the transpose of the rows of `weight`, `[n, k]`: products are then `x · weightᵀ`.
    pub(crate) fn of_rows(weight: &[f32], n: usize, k: usize) -> Self {
        let mut panels = Self::default();
        panels.pack_rows(weight, n, k);
        panels
    }

    /// Packs `matrix`, `[k, n]`, as it is: products are then `x · matrix`.
    pub(crate) fn of_matrix(matrix: &[f32], k: usize, n: usize) -> Self {
        let mut panels = Self::default();
        panels.pack_matrix(matrix, k, n);
        panels
    }

    /// [`Panels::of_rows`] into the memory there is.
    pub(crate) fn pack_rows(&mut self, weight: &[f32], n: usize, k: usize) {
        let width = self.reserve(n, k);
        self.fill(|panel, packed| {
            let n = width.min(n - panel * width);
            Rows { data: &weight[panel * width * k..], stride: k, depth: k, n }.interleave(width, packed);
        });
    }

    /// [`Panels::of_matrix`] into the memory there is.
    pub(crate) fn pack_matrix(&mut self, matrix: &[f32], k: usize, n: usize) {
        let width = self.reserve(n, k);
        self.fill(|panel, packed| {
            let columns = panel * width..((panel + 1) * width).min(n);
            for (line, row) in packed.chunks_exact_mut(width).zip(matrix.chunks_exact(n)) {
                let row = &row[columns.clone()];
                match (line.as_chunks_mut::<LANES>(), row.as_chunks::<LANES>()) {
                    // Whole panels are copied without a call.
                    ((line, _), (row, [])) => line.iter_mut().zip(row).for_each(|(line, row)| *line = *row),
                    _ => line[..row.len()].copy_from_slice(row),
                }
            }
        });
    }

    /// Makes room for `[k, n]`; gives the width of a panel.
    fn reserve(&mut self, n: usize, k: usize) -> usize {
        let width = VECTORS * Arch::new().dispatch(Lanes);
        let len = n.div_ceil(width) * width * k + LINE / size_of::<f32>();
        if self.data.len() < len {
            self.data = vec![0.0; len];
        }
        // `align_offset` may decline; the panels are then merely slower.
        let start = self.data.as_ptr().align_offset(LINE).min(LINE / size_of::<f32>());
        (self.start, self.width, self.n, self.k) = (start, width, n, k);
        width
    }

    /// Fills every panel by its number.
    fn fill(&mut self, fill: impl Fn(usize, &mut [f32]) + Sync) {
        let size = self.width * self.k;
        let all = &mut self.data[self.start..][..self.n.div_ceil(self.width) * size];
        if all.is_empty() {
            return;
        }
        match all.len() < SHARED_PACKING {
            true => all.chunks_exact_mut(size).enumerate().for_each(|(panel, packed)| fill(panel, packed)),
            false => all.par_chunks_exact_mut(size).enumerate().for_each(|(panel, packed)| fill(panel, packed)),
        }
    }

    /// How many terms the elements of a product have.
    pub(crate) fn k(&self) -> usize {
        self.k
    }

    /// How many columns a product has.
    pub(crate) fn n(&self) -> usize {
        self.n
    }

    pub(super) fn panel(&self, index: usize) -> &[f32] {
        let size = self.width * self.k;
        &self.data[self.start + index * size..][..size]
    }
}

struct Lanes;

impl WithSimd for Lanes {
    type Output = usize;
    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> usize {
        S::F32_LANES
    }
}

/// Rows of `depth` numbers, each `stride` after the last.
pub(super) struct Rows<'a> {
    pub(super) data: &'a [f32],
    pub(super) stride: usize,
    pub(super) depth: usize,
    pub(super) n: usize,
}

impl Rows<'_> {
    /// Lays them side by side, `[depth, width]`, where there are at most `width` of them.
    #[inline(always)]
    pub(super) fn interleave(&self, width: usize, out: &mut [f32]) {
        for first in (0..self.depth).step_by(PACKED_DEPTH) {
            let depth = PACKED_DEPTH.min(self.depth - first);
            let lines = &mut out[first * width..(first + depth) * width];
            let row = |row: usize| &self.data[row * self.stride + first..][..depth];
            let fours = self.n / 4 * 4;
            for at in (0..fours).step_by(4) {
                interleave_four([row(at), row(at + 1), row(at + 2), row(at + 3)], &mut lines[at..], width);
            }
            for at in fours..self.n {
                lines[at..].iter_mut().step_by(width).zip(row(at)).for_each(|(slot, value)| *slot = *value);
            }
        }
    }
}

/// Four rows at once, for stores of four numbers.
#[inline(always)]
fn interleave_four([a, b, c, d]: [&[f32]; 4], lines: &mut [f32], width: usize) {
    let rows = a.iter().zip(b).zip(c).zip(d);
    for (line, (((a, b), c), d)) in lines.chunks_mut(width).zip(rows) {
        if let Some(slots) = line.first_chunk_mut::<4>() {
            *slots = [*a, *b, *c, *d];
        }
    }
}
