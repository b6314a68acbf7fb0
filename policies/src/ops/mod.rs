//! The decoder's operations with hand-written backward passes on the CPU in f32.
//!
//! Each operation is one file: an entry function that checks shapes, the operation itself for the CPU, and
//! a composite of candle's differentiable operations, which serves other devices and types and is the oracle
//! of the tests. Several of candle's own fused operations cut gradients in silence, so none of them is used.
//! Every reduction runs in an order that depends on shapes alone, never on the number of threads.

pub(crate) mod attention;
pub(crate) mod head;
pub(crate) mod kernel;
pub(crate) mod linear;
pub(crate) mod rms_norm;
pub(crate) mod rope;
mod softmax;
pub(crate) mod swiglu;
#[cfg(test)]
pub(crate) mod testing;
pub(crate) mod vector;

use candle_core::{CpuStorage, Device, Layout, Result, Shape, Tensor, bail};
pub(crate) use grpo::host::{host, is_host_f32};

/// Rows whose partial sums are made together; part of the definition of a reduction's order.
pub(crate) const ROW_BLOCK: usize = 64;

/// The numbers of a contiguous f32 operand of a custom operation.
fn operand<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => bail!("operand of shape {:?} is not contiguous; call contiguous() first", layout.shape()),
    }
}

/// What a custom operation returns for new numbers.
fn stored(values: Vec<f32>, shape: impl Into<Shape>) -> Result<(CpuStorage, Shape)> {
    Ok((CpuStorage::F32(values), shape.into()))
}

/// A tensor on the CPU that takes over the numbers.
pub(crate) fn tensor(values: Vec<f32>, shape: impl Into<Shape>) -> Result<Tensor> {
    Tensor::from_vec(values, shape.into(), &Device::Cpu)
}

/// The sum over rows of `[rows, width]`, in blocks that are added in order.
pub(crate) fn sum_rows(values: &[f32], width: usize) -> Vec<f32> {
    use rayon::prelude::*;
    let partial: Vec<Vec<f32>> = values
        .par_chunks(ROW_BLOCK * width.max(1))
        .map(|block| {
            vector::vectorised!({
                let mut sum = vec![0.0; width];
                block.chunks_exact(width).for_each(|row| vector::add(&mut sum, row));
                sum
            })
        })
        .collect();
    ordered_sum(&partial, width)
}

/// The sum of the blocks' parts, in their order.
pub(crate) fn ordered_sum(partial: &[Vec<f32>], width: usize) -> Vec<f32> {
    let mut total = vec![0.0; width];
    vector::vectorised!(partial.iter().for_each(|part| vector::add(&mut total, part)));
    total
}
