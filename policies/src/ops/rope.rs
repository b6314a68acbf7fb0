//! Rotary position embedding in the rotate-half form (Su et al., 2021, arXiv 2104.09864, eq. 34).
//!
//! Angles are computed in f64 and kept in f32: in bf16 only 769 of the first 4,096 positions would differ.

use candle_core::{D, Device, Result, Tensor, bail};

/// Cosines and sines of every position and frequency, `[positions, head_dim / 2]`.
#[derive(Clone, Debug)]
pub(crate) struct Rope {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
}

impl Rope {
    /// Tables for `positions` positions of heads of `head_dim` numbers.
    pub(crate) fn new(head_dim: usize, theta: f64, positions: usize) -> Self {
        let half = head_dim / 2;
        let angle = |index: usize| {
            let (position, frequency) = (index / half, index % half);
            position as f64 * theta.powf(-2.0 * frequency as f64 / head_dim as f64)
        };
        Self {
            cos: (0..positions * half).map(|index| angle(index).cos() as f32).collect(),
            sin: (0..positions * half).map(|index| angle(index).sin() as f32).collect(),
            half,
        }
    }

    /// How many positions the tables hold.
    pub(crate) fn positions(&self) -> usize {
        self.cos.len().checked_div(self.half).unwrap_or(0)
    }

    /// Rotates one head at `position` in place.
    #[inline(always)]
    pub(crate) fn rotate(&self, head: &mut [f32], position: usize) {
        self.turn(head, position, 1.0);
    }

    /// Undoes [`Rope::rotate`]; a rotation's transpose is its inverse, so this is also its backward pass.
    #[inline(always)]
    pub(crate) fn rotate_back(&self, head: &mut [f32], position: usize) {
        self.turn(head, position, -1.0);
    }

    #[inline(always)]
    fn turn(&self, head: &mut [f32], position: usize, sign: f32) {
        let table = position * self.half..(position + 1) * self.half;
        let (cos, sin) = (&self.cos[table.clone()], &self.sin[table]);
        let (low, high) = head.split_at_mut(self.half);
        for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
            let (x, y, sin) = (*low, *high, sign * sin);
            *low = x * cos - y * sin;
            *high = y * cos + x * sin;
        }
    }

    /// Rotates `x`, `[.., length, head_dim]`, at positions `0..length`, by differentiable operations.
    pub(crate) fn composite(&self, x: &Tensor) -> Result<Tensor> {
        let length = x.dim(D::Minus2)?;
        let (cos, sin) = self.tables(length, x.device())?;
        self.composite_with(x, &cos, &sin)
    }

    /// Rotates `x`, `[.., head_dim]`, by cosines and sines that broadcast to `[.., head_dim / 2]`.
    pub(crate) fn composite_with(&self, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
        let (cos, sin) = (cos.to_dtype(x.dtype())?, sin.to_dtype(x.dtype())?);
        let low = x.narrow(D::Minus1, 0, self.half)?.contiguous()?;
        let high = x.narrow(D::Minus1, self.half, self.half)?.contiguous()?;
        let turned_low = (low.broadcast_mul(&cos)? - high.broadcast_mul(&sin)?)?;
        let turned_high = (high.broadcast_mul(&cos)? + low.broadcast_mul(&sin)?)?;
        Tensor::cat(&[turned_low, turned_high], D::Minus1)
    }

    /// The first `length` rows of the tables as tensors.
    pub(crate) fn tables(&self, length: usize, device: &Device) -> Result<(Tensor, Tensor)> {
        if length > self.positions() {
            bail!("{length} positions asked of rotary tables that hold {}", self.positions());
        }
        let n = length * self.half;
        let shape = (length, self.half);
        Ok((Tensor::from_slice(&self.cos[..n], shape, device)?, Tensor::from_slice(&self.sin[..n], shape, device)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{distance, normals};

    #[test]
    fn slices_and_composite_agree_and_back_is_the_inverse() {
        let rope = Rope::new(8, 1e4, 12);
        let values = normals(1, 12 * 8);
        let mut turned = values.clone();
        for (position, head) in turned.chunks_mut(8).enumerate() {
            rope.rotate(head, position);
        }
        let x = Tensor::from_vec(values.clone(), (12, 8), &Device::Cpu).unwrap();
        let got = Tensor::from_vec(turned.clone(), (12, 8), &Device::Cpu).unwrap();
        assert!(distance(&got, &rope.composite(&x).unwrap()) < 1e-6);
        for (position, head) in turned.chunks_mut(8).enumerate() {
            rope.rotate_back(head, position);
        }
        assert!(turned.iter().zip(&values).all(|(a, b)| (a - b).abs() < 1e-6));
        assert_eq!(turned[..8], values[..8], "position 0 is not turned");
    }

    #[test]
    fn more_positions_than_the_tables_hold_is_an_error() {
        let x = Tensor::zeros((3, 4), candle_core::DType::F32, &Device::Cpu).unwrap();
        assert!(Rope::new(4, 1e4, 2).composite(&x).is_err());
    }
}
