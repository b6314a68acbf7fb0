//! cuBLAS by what a product means to a layer.
//!
//! Our matrices lie in rows, cuBLAS's in columns: it sees the transpose of each, and makes the transpose of the result.

use candle_core::Result;

use super::gpu::{Gpu, Kind};

/// Rows of numbers on the card, `stride` numbers apart.
#[derive(Clone, Copy, Debug)]
pub(super) struct Matrix {
    pub(super) at: u64,
    pub(super) kind: Kind,
    pub(super) stride: usize,
}

impl Matrix {
    pub(super) fn new(at: u64, kind: Kind, stride: usize) -> Self {
        Self { at, kind, stride }
    }

    fn operand(self, transposed: bool) -> Operand {
        Operand { at: self.at, kind: self.kind, stride: self.stride, transposed }
    }
}

/// A matrix as cuBLAS is told of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Operand {
    pub(super) at: u64,
    pub(super) kind: Kind,
    pub(super) stride: usize,
    pub(super) transposed: bool,
}

/// `out = left · right`, added to what is there where `keep` says so.
#[derive(Clone, Copy, Debug)]
pub(super) struct Product {
    pub(super) sizes: [usize; 3],
    pub(super) left: Operand,
    pub(super) right: Operand,
    pub(super) out: Operand,
    pub(super) keep: bool,
}

impl Gpu {
    /// `y = x · wᵀ`: `x` is `[n, i]`, `w` is `[o, i]`; sizes are `[n, o, i]`. With `keep`, added to `y`.
    pub(super) fn apply(&self, [n, o, i]: [usize; 3], x: Matrix, w: Matrix, (y, keep): (Matrix, bool)) -> Result<()> {
        let (left, right, out) = (w.operand(true), x.operand(false), y.operand(false));
        self.multiply(&Product { sizes: [o, n, i], left, right, out, keep })
    }

    /// `to_x = to_y · w`: the way back through [`Gpu::apply`], of the same sizes. With `keep`, added.
    pub(super) fn pull(
        &self,
        [n, o, i]: [usize; 3],
        to_y: Matrix,
        w: Matrix,
        (to_x, keep): (Matrix, bool),
    ) -> Result<()> {
        let (left, right, out) = (w.operand(false), to_y.operand(false), to_x.operand(false));
        self.multiply(&Product { sizes: [i, n, o], left, right, out, keep })
    }

    /// `to_w += to_yᵀ · x`: the weight's gradient of [`Gpu::apply`], of the same sizes.
    pub(super) fn gather(&self, [n, o, i]: [usize; 3], to_y: Matrix, x: Matrix, to_w: Matrix) -> Result<()> {
        let (left, right, out) = (x.operand(false), to_y.operand(true), to_w.operand(false));
        self.multiply(&Product { sizes: [i, o, n], left, right, out, keep: true })
    }
}
