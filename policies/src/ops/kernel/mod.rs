//! Matrix products whose every element is one chain of fused multiply-adds in index order.
//!
//! An element depends on its own row and column alone: never on how many rows are multiplied together, on
//! the tile it falls in or on the number of threads. Sampling rests on this, for a row of a batch must get
//! the same bits whatever its neighbours (`gemm` takes other paths for few rows).
//!
//! Both operands are repacked so that the inner loop reads straight on: the right one into panels of two vectors'
//! width, the left one into tiles of up to fourteen rows. On AVX-512 a tile's sums then fill 28 of the 32 registers,
//! and the loop runs at the multiply-adds' own speed (measured on a Zen 4: 105 to 117 of 113 to 118 GFLOP/s a core, with
//! `gemm` 0.19 at 95 to 105). Vector width is chosen at run time by `pulp`, without `unsafe`.

mod panels;

use std::cell::Cell;
use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

pub(crate) use panels::Panels;
use panels::{Rows, VECTORS};

use super::vector::{self, vectorised};

/// Numbers of the panels that meet a tile one after another.
const GROUP: usize = 1 << 15;
/// Parts that each thread gets of a product by columns, since threads are not equally fast.
const SHARES: usize = 2;
/// Numbers of strips that one thread adds up in less time than it takes to share them.
const TOGETHER: usize = 1 << 15;

/// A left operand of `rows` rows, as it lies in memory.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Left<'a> {
    /// `[rows, k]`, each row `stride` after the last.
    Rows { data: &'a [f32], stride: usize, rows: usize },
    /// `[k, rows]`, each line `stride` after the last: the product uses its transpose.
    Columns { data: &'a [f32], stride: usize, rows: usize },
}

impl Left<'_> {
    fn rows(&self) -> usize {
        match self {
            Self::Rows { rows, .. } | Self::Columns { rows, .. } => *rows,
        }
    }

    /// Lays rows from `first` on side by side, `[depth, height]`, as many as `tile` holds.
    #[inline(always)]
    fn pack(&self, first: usize, depth: usize, tile: &mut [f32]) {
        let height = tile.len() / depth;
        match *self {
            Self::Rows { data, stride, .. } => {
                Rows { data: &data[first * stride..], stride, depth, n: height }.interleave(height, tile);
            }
            Self::Columns { data, stride, .. } => copy_columns(&data[first..], stride, height, tile),
        }
    }
}

/// Copies the first `height` numbers of each line.
#[inline(always)]
fn copy_columns(data: &[f32], stride: usize, height: usize, tile: &mut [f32]) {
    match height {
        14 => copy_lines::<14>(data, stride, tile),
        13 => copy_lines::<13>(data, stride, tile),
        12 => copy_lines::<12>(data, stride, tile),
        11 => copy_lines::<11>(data, stride, tile),
        10 => copy_lines::<10>(data, stride, tile),
        6 => copy_lines::<6>(data, stride, tile),
        _ => {
            for (p, line) in tile.chunks_exact_mut(height).enumerate() {
                line.copy_from_slice(&data[p * stride..][..height]);
            }
        }
    }
}

/// Copies lines of a fixed length, for which no call is made: those of the tiles that many rows are cut into.
#[inline(always)]
fn copy_lines<const N: usize>(data: &[f32], stride: usize, tile: &mut [f32]) {
    for (p, line) in tile.as_chunks_mut::<N>().0.iter_mut().enumerate() {
        if let Some(from) = data[p * stride..].first_chunk::<N>() {
            *line = *from;
        }
    }
}

/// `left · right` over the first `depth` terms and the first `columns` columns, in the place of `out` or added to it.
pub(crate) struct Product<'a> {
    pub(crate) left: Left<'a>,
    pub(crate) right: &'a Panels,
    pub(crate) depth: usize,
    pub(crate) columns: usize,
    /// `[rows, columns]`, each row `out_stride` after the last.
    pub(crate) out: &'a mut [f32],
    pub(crate) out_stride: usize,
}

impl<'a> Product<'a> {
    /// The whole of both operands, `x` being `[rows, k]` and `out` `[rows, n]`.
    pub(crate) fn of_rows(x: &'a [f32], right: &'a Panels, out: &'a mut [f32]) -> Self {
        let (k, n) = (right.k, right.n);
        let rows = out.len().checked_div(n).unwrap_or(0);
        Self { left: Left::Rows { data: x, stride: k, rows }, right, depth: k, columns: n, out, out_stride: n }
    }

    /// Adds it to `out`, on this thread.
    pub(crate) fn add(self) {
        self.compute(Onto::Out);
    }

    /// Computes it on this thread.
    pub(crate) fn compute(self, onto: Onto) {
        Arch::new().dispatch(Compute { product: self, onto });
    }

    /// Computes it on all threads, each taking some of the columns: for few rows and a right operand that is read once
    /// from memory. `strips` is memory for what they make.
    pub(crate) fn by_columns(self, onto: Onto, strips: &mut Vec<f32>) {
        let (rows, width) = (self.left.rows(), self.right.width);
        let mut tiles = TILES.take();
        let height = Arch::new().dispatch(Pack { left: self.left, depth: self.depth, tiles: &mut tiles });
        let tasks = SHARES * rayon::current_num_threads();
        let strip = self.columns.div_ceil(width).div_ceil(tasks).max(1) * width;
        let part = (strip * rows).max(1);
        let n = self.columns.div_ceil(strip) * strip * rows;
        strips.resize(strips.len().max(n), 0.0);
        let (packed, right, depth) = (&tiles[..rows * self.depth], self.right, self.depth);
        strips[..n].par_chunks_mut(part).enumerate().for_each(|(index, out)| {
            let columns = strip.min(self.columns - index * strip);
            let (first_panel, out_stride, onto) = (index * strip / width, strip, Onto::Zero);
            Sweep { tiles: packed, height, depth, right, first_panel, columns, out, out_stride, onto }.run();
        });
        let made = &strips[..n];
        let lines = self.out.par_chunks_mut(self.out_stride.max(1)).enumerate();
        lines.with_min_len(TOGETHER.div_ceil(self.columns.max(1))).for_each(|(row, out)| {
            for (out, made) in out[..self.columns].chunks_mut(strip).zip(made.chunks(part)) {
                let made = &made[row * strip..];
                match onto {
                    Onto::Zero => out.copy_from_slice(&made[..out.len()]),
                    Onto::Out => vectorised!(vector::add(out, made)),
                }
            }
        });
        TILES.set(tiles);
    }
}

/// What a product is added to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Onto {
    /// Nothing: what `out` held is lost.
    Zero,
    Out,
}

/// All of a product on one thread.
struct Compute<'a> {
    product: Product<'a>,
    onto: Onto,
}

impl WithSimd for Compute<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // Taken and not borrowed: a closure would not be compiled for the wide vectors.
        let mut tiles = TILES.take();
        let Self { product: Product { left, right, depth, columns, out, out_stride }, onto } = self;
        let rows = left.rows();
        let height = Pack { left, depth, tiles: &mut tiles }.with_simd(simd);
        let packed = &tiles[..rows * depth];
        Sweep { tiles: packed, height, depth, right, first_panel: 0, columns, out, out_stride, onto }.with_simd(simd);
        TILES.set(tiles);
    }
}

thread_local! {
    /// The left operand of the product that this thread is about, tile by tile.
    static TILES: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Packs a left operand tile by tile; gives the height of a tile.
struct Pack<'a> {
    left: Left<'a>,
    depth: usize,
    tiles: &'a mut Vec<f32>,
}

impl WithSimd for Pack<'_> {
    type Output = usize;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> usize {
        // A tile's sums, a line of the panel and a factor fit the 32 registers of AVX-512, and the 16 of AVX2.
        let most = if S::F32_LANES >= 16 { 14 } else { S::F32_LANES.min(6) };
        let (rows, depth) = (self.left.rows(), self.depth);
        if rows == 0 || depth == 0 {
            return 1;
        }
        let height = rows.div_ceil(rows.div_ceil(most));
        self.tiles.resize(self.tiles.len().max(rows * depth), 0.0);
        for (index, tile) in self.tiles[..rows * depth].chunks_mut(height * depth).enumerate() {
            self.left.pack(index * height, depth, tile);
        }
        height
    }
}

/// A packed left operand times some panels of the right one. Panels that fit the second cache together meet all tiles before
/// the next, so that they come from memory once, and a tile's rows of the result are written a stretch at a time.
struct Sweep<'a> {
    tiles: &'a [f32],
    height: usize,
    depth: usize,
    right: &'a Panels,
    first_panel: usize,
    /// Counted from the first panel's.
    columns: usize,
    out: &'a mut [f32],
    out_stride: usize,
    onto: Onto,
}

impl Sweep<'_> {
    fn run(self) {
        Arch::new().dispatch(self);
    }
}

impl WithSimd for Sweep<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let tiles = self.tiles;
        if tiles.is_empty() && self.onto == Onto::Zero {
            // Of no terms: no tile writes the sums, which are zeros.
            self.out.chunks_mut(self.out_stride.max(1)).for_each(|row| row[..self.columns].fill(0.0));
        }
        let panels = self.columns.div_ceil(self.right.width);
        let group = (GROUP / (self.right.width * self.depth).max(1)).max(1);
        for first in (0..panels).step_by(group) {
            for (index, tile) in tiles.chunks((self.height * self.depth).max(1)).enumerate() {
                self.panels(simd, first..(first + group).min(panels), (index * self.height, tile));
            }
        }
    }
}

impl Sweep<'_> {
    /// Panels times a tile whose first row and packed numbers are given.
    #[inline(always)]
    fn panels<S: Simd>(&mut self, simd: S, panels: Range<usize>, tile: (usize, &[f32])) {
        for panel in panels {
            self.any_tile(simd, panel, tile);
        }
    }

    /// One panel times a tile.
    #[inline(always)]
    fn any_tile<S: Simd>(&mut self, simd: S, panel: usize, tile: (usize, &[f32])) {
        match tile.1.len() / self.depth {
            14 => self.tile::<S, 14>(simd, panel, tile),
            13 => self.tile::<S, 13>(simd, panel, tile),
            12 => self.tile::<S, 12>(simd, panel, tile),
            11 => self.tile::<S, 11>(simd, panel, tile),
            10 => self.tile::<S, 10>(simd, panel, tile),
            9 => self.tile::<S, 9>(simd, panel, tile),
            8 => self.tile::<S, 8>(simd, panel, tile),
            7 => self.tile::<S, 7>(simd, panel, tile),
            6 => self.tile::<S, 6>(simd, panel, tile),
            5 => self.tile::<S, 5>(simd, panel, tile),
            4 => self.tile::<S, 4>(simd, panel, tile),
            3 => self.tile::<S, 3>(simd, panel, tile),
            2 => self.tile::<S, 2>(simd, panel, tile),
            _ => self.tile::<S, 1>(simd, panel, tile),
        }
    }

    #[inline(always)]
    fn tile<S: Simd, const R: usize>(&mut self, simd: S, panel: usize, (row, tile): (usize, &[f32])) {
        let width = self.right.width;
        let lines =
            &S::as_simd_f32s(self.right.panel(self.first_panel + panel)).0.as_chunks::<VECTORS>().0[..self.depth];
        let sums = sums::<S, R>(simd, tile.as_chunks::<R>().0, lines);
        let first = panel * width;
        let columns = width.min(self.columns - first);
        for (r, sum) in sums.iter().enumerate() {
            let out = &mut self.out[(row + r) * self.out_stride + first..][..columns];
            if columns == width { add_whole(simd, self.onto, out, sum) } else { add_part(simd, self.onto, out, sum) }
        }
    }
}

#[inline(always)]
fn add_whole<S: Simd>(simd: S, onto: Onto, out: &mut [f32], sum: &[S::f32s; VECTORS]) {
    for (slot, value) in S::as_mut_simd_f32s(out).0.iter_mut().zip(sum) {
        let old = if onto == Onto::Zero { simd.splat_f32s(0.0) } else { *slot };
        *slot = simd.add_f32s(old, *value);
    }
}

#[inline(always)]
fn add_part<S: Simd>(simd: S, onto: Onto, out: &mut [f32], sum: &[S::f32s; VECTORS]) {
    for (part, value) in out.chunks_mut(S::F32_LANES).zip(sum) {
        let old = if onto == Onto::Zero { simd.splat_f32s(0.0) } else { simd.partial_load_f32s(part) };
        simd.partial_store_f32s(part, simd.add_f32s(old, *value));
    }
}

#[inline(always)]
fn sums<S: Simd, const R: usize>(simd: S, tile: &[[f32; R]], lines: &[[S::f32s; VECTORS]]) -> [[S::f32s; VECTORS]; R] {
    let mut sums = [[simd.splat_f32s(0.0); VECTORS]; R];
    for (factors, [first, second]) in tile.iter().zip(lines) {
        for (sum, factor) in sums.iter_mut().zip(factors) {
            let factor = simd.splat_f32s(*factor);
            sum[0] = simd.mul_add_f32s(factor, *first, sum[0]);
            sum[1] = simd.mul_add_f32s(factor, *second, sum[1]);
        }
    }
    sums
}

#[cfg(test)]
#[expect(clippy::excessive_nesting, reason = "every shape is tried with every layout")]
mod tests {
    use super::*;
    use crate::ops::testing::{normals, with_threads};

    fn naive(a: &[f32], b: &[f32], m: usize, k: usize, n: usize) -> Vec<f64> {
        let mut out = vec![0.0; m * n];
        for i in 0..m {
            for j in 0..n {
                out[i * n + j] = (0..k).map(|p| f64::from(a[i * k + p]) * f64::from(b[p * n + j])).sum();
            }
        }
        out
    }

    fn transpose(a: &[f32], rows: usize, columns: usize) -> Vec<f32> {
        (0..rows * columns).map(|i| a[(i % rows) * columns + i / rows]).collect()
    }

    #[test]
    fn every_shape_and_operand_order_is_the_product() {
        for (m, k, n) in [(1, 1, 1), (3, 5, 7), (8, 32, 32), (17, 33, 65), (13, 64, 31), (0, 3, 3), (2, 0, 4)] {
            let (a, b) = (normals(1, m * k), normals(2, k * n));
            let expected = naive(&a, &b, m, k, n);
            let (a_columns, b_rows) = (transpose(&a, m, k), transpose(&b, k, n));
            for right in [Panels::of_matrix(&b, k, n), Panels::of_rows(&b_rows, n, k)] {
                for left in [
                    Left::Rows { data: &a, stride: k, rows: m },
                    Left::Columns { data: &a_columns, stride: m, rows: m },
                ] {
                    let mut out = vec![1.0; m * n];
                    Product { left, right: &right, depth: k, columns: n, out: &mut out, out_stride: n }.add();
                    for (got, want) in out.iter().zip(&expected) {
                        assert!((f64::from(*got) - 1.0 - want).abs() < 1e-4, "{m} {k} {n}: {got} {want}");
                    }
                }
            }
        }
    }

    #[test]
    fn products_by_columns_have_the_same_bits() {
        for (m, k, n) in [(1, 70, 300), (3, 5, 7), (17, 33, 65), (0, 3, 3), (2, 0, 4)] {
            let (a, b) = (normals(1, m * k), normals(2, k * n));
            let right = Panels::of_matrix(&b, k, n);
            for onto in [Onto::Zero, Onto::Out] {
                let old = if onto == Onto::Zero { 0.0 } else { 1.0 };
                let (mut alone, mut own, mut shared) = (vec![old; m * n], vec![1.0; m * n], vec![1.0; m * n]);
                Product::of_rows(&a, &right, &mut alone).add();
                Product::of_rows(&a, &right, &mut own).compute(onto);
                with_threads(3, || Product::of_rows(&a, &right, &mut shared).by_columns(onto, &mut vec![7.0; 9]));
                for made in [own, shared] {
                    assert!(alone.iter().zip(&made).all(|(x, y)| x.to_bits() == y.to_bits()), "{m} {k} {n}");
                }
            }
        }
    }

    #[test]
    fn a_row_has_the_same_bits_whatever_its_neighbours() {
        let (k, n) = (129, 77);
        let (a, b) = (normals(3, 40 * k), normals(4, k * n));
        let right = Panels::of_matrix(&b, k, n);
        let mut all = vec![0.0; 40 * n];
        Product::of_rows(&a, &right, &mut all).add();
        for m in 1..40 {
            let mut some = vec![0.0; m * n];
            Product::of_rows(&a[(40 - m) * k..], &right, &mut some).add();
            assert!(some.iter().zip(&all[(40 - m) * n..]).all(|(x, y)| x.to_bits() == y.to_bits()), "{m} rows");
        }
    }
}
