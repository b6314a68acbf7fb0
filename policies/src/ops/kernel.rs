//! Matrix products whose every element is one chain of fused multiply-adds in index order.
//!
//! An element depends on its own row and column alone: never on how many rows are multiplied together, on
//! the tile it falls in or on the number of threads. Sampling rests on this, for a row of a batch must get
//! the same bits whatever its neighbours (`gemm`, which training uses, takes other paths for few rows).
//!
//! The right operand is repacked into panels of two vectors' width, so the inner loop loads each of its
//! vectors once for all rows of a tile. Vector width is chosen at run time by `pulp`, without `unsafe`.

use pulp::{Arch, Simd, WithSimd};

/// Vectors side by side in a tile.
const VECTORS: usize = 2;
/// Bytes of a cache line; panels start on one, since a vector load across two lines costs double.
const LINE: usize = 64;

/// A right operand `[k, n]`, cut into panels `[k, width]` and padded with zeros.
#[derive(Clone, Debug)]
pub(crate) struct Panels {
    data: Vec<f32>,
    start: usize,
    width: usize,
    n: usize,
    k: usize,
}

impl Panels {
    /// Packs the transpose of the rows of `weight`, `[n, k]`: products are then `x · weightᵀ`.
    pub(crate) fn of_rows(weight: &[f32], n: usize, k: usize) -> Self {
        let mut panels = Self::zeros(n, k);
        let width = panels.width;
        if k == 0 {
            return panels;
        }
        for (row, values) in weight.chunks_exact(k).take(n).enumerate() {
            let column = row % width;
            let panel = panels.panel_mut(row / width);
            for (slot, value) in panel.iter_mut().skip(column).step_by(width).zip(values) {
                *slot = *value;
            }
        }
        panels
    }

    /// Packs `matrix`, `[k, n]`, as it is: products are then `x · matrix`.
    pub(crate) fn of_matrix(matrix: &[f32], k: usize, n: usize) -> Self {
        let mut panels = Self::zeros(n, k);
        let width = panels.width;
        if n == 0 {
            return panels;
        }
        for panel in 0..n.div_ceil(width) {
            let columns = panel * width..((panel + 1) * width).min(n);
            let packed = panels.panel_mut(panel);
            for (line, row) in packed.chunks_exact_mut(width).zip(matrix.chunks_exact(n)) {
                line[..columns.len()].copy_from_slice(&row[columns.clone()]);
            }
        }
        panels
    }

    fn zeros(n: usize, k: usize) -> Self {
        let width = VECTORS * Arch::new().dispatch(Lanes);
        let len = n.div_ceil(width) * width * k;
        let data = vec![0.0; len + LINE / size_of::<f32>()];
        // `align_offset` may decline; the panels are then merely slower.
        let start = data.as_ptr().align_offset(LINE).min(LINE / size_of::<f32>());
        Self { data, start, width, n, k }
    }

    /// How many columns a product has.
    pub(crate) fn n(&self) -> usize {
        self.n
    }

    fn panel(&self, index: usize) -> &[f32] {
        let size = self.width * self.k;
        &self.data[self.start + index * size..][..size]
    }

    fn panel_mut(&mut self, index: usize) -> &mut [f32] {
        let size = self.width * self.k;
        &mut self.data[self.start + index * size..][..size]
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
}

/// `out += left · right` over the first `depth` terms and the first `columns` columns.
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

    /// Computes it on this thread.
    pub(crate) fn add(self) {
        Arch::new().dispatch(self);
    }
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // Sixteen sums fill half of the 32 registers of AVX-512; twelve fit the 16 of AVX2.
        if S::F32_LANES >= 16 { self.tiles::<S, 8>(simd) } else { self.tiles::<S, 6>(simd) }
    }
}

impl Product<'_> {
    #[inline(always)]
    fn tiles<S: Simd, const R: usize>(mut self, simd: S) {
        let rows = self.left.rows();
        for panel in 0..self.columns.div_ceil(self.right.width) {
            let mut row = 0;
            while row + R <= rows {
                self.tile::<S, R>(simd, panel, row);
                row += R;
            }
            match rows - row {
                7 => self.tile::<S, 7>(simd, panel, row),
                6 => self.tile::<S, 6>(simd, panel, row),
                5 => self.tile::<S, 5>(simd, panel, row),
                4 => self.tile::<S, 4>(simd, panel, row),
                3 => self.tile::<S, 3>(simd, panel, row),
                2 => self.tile::<S, 2>(simd, panel, row),
                1 => self.tile::<S, 1>(simd, panel, row),
                _ => {}
            }
        }
    }

    #[inline(always)]
    fn tile<S: Simd, const R: usize>(&mut self, simd: S, panel: usize, row: usize) {
        let width = self.right.width;
        let lines = &S::as_simd_f32s(self.right.panel(panel)).0.as_chunks::<VECTORS>().0[..self.depth];
        let sums = match self.left {
            Left::Rows { data, stride, .. } => row_sums::<S, R>(simd, &data[row * stride..], stride, lines),
            Left::Columns { data, stride, .. } => column_sums::<S, R>(simd, &data[row..], stride, lines),
        };
        let first = panel * width;
        let columns = width.min(self.columns - first);
        for (r, sum) in sums.iter().enumerate() {
            let out = &mut self.out[(row + r) * self.out_stride + first..][..columns];
            if columns == width { add_whole(simd, out, sum) } else { add_part(simd, out, sum) }
        }
    }
}

#[inline(always)]
fn add_whole<S: Simd>(simd: S, out: &mut [f32], sum: &[S::f32s; VECTORS]) {
    for (slot, value) in S::as_mut_simd_f32s(out).0.iter_mut().zip(sum) {
        *slot = simd.add_f32s(*slot, *value);
    }
}

#[inline(always)]
fn add_part<S: Simd>(simd: S, out: &mut [f32], sum: &[S::f32s; VECTORS]) {
    for (part, value) in out.chunks_mut(S::F32_LANES).zip(sum) {
        let old = simd.partial_load_f32s(part);
        simd.partial_store_f32s(part, simd.add_f32s(old, *value));
    }
}

#[inline(always)]
fn row_sums<S: Simd, const R: usize>(
    simd: S,
    data: &[f32],
    stride: usize,
    lines: &[[S::f32s; VECTORS]],
) -> [[S::f32s; VECTORS]; R] {
    let depth = lines.len();
    let mut rows: [&[f32]; R] = [&[]; R];
    for (r, row) in rows.iter_mut().enumerate() {
        *row = &data[r * stride..][..depth];
    }
    let mut sums = [[simd.splat_f32s(0.0); VECTORS]; R];
    for p in 0..depth {
        let [first, second] = lines[p];
        for r in 0..R {
            let scalar = simd.splat_f32s(rows[r][p]);
            sums[r][0] = simd.mul_add_f32s(scalar, first, sums[r][0]);
            sums[r][1] = simd.mul_add_f32s(scalar, second, sums[r][1]);
        }
    }
    sums
}

#[inline(always)]
fn column_sums<S: Simd, const R: usize>(
    simd: S,
    data: &[f32],
    stride: usize,
    lines: &[[S::f32s; VECTORS]],
) -> [[S::f32s; VECTORS]; R] {
    let mut sums = [[simd.splat_f32s(0.0); VECTORS]; R];
    for (p, [first, second]) in lines.iter().enumerate() {
        let column = &data[p * stride..][..R];
        for r in 0..R {
            let scalar = simd.splat_f32s(column[r]);
            sums[r][0] = simd.mul_add_f32s(scalar, *first, sums[r][0]);
            sums[r][1] = simd.mul_add_f32s(scalar, *second, sums[r][1]);
        }
    }
    sums
}

#[cfg(test)]
#[expect(clippy::excessive_nesting, reason = "every shape is tried with every layout")]
mod tests {
    use super::*;
    use crate::ops::testing::normals;

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
