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

use std::ops::{Deref, Range};

use candle_core::{CpuStorage, DType, Device, Layout, Result, Shape, Storage, Tensor, bail};

/// Rows whose partial sums are made together; part of the definition of a reduction's order.
pub(crate) const ROW_BLOCK: usize = 64;

/// Whether the hand-written operations can take this tensor.
pub(crate) fn is_host_f32(tensor: &Tensor) -> bool {
    tensor.device().is_cpu() && tensor.dtype() == DType::F32
}

/// The numbers of a contiguous f32 operand of a custom operation.
fn operand<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => bail!("operand of shape {:?} is not contiguous; call contiguous() first", layout.shape()),
    }
}

/// A contiguous f32 tensor on the CPU, held for reading.
pub(crate) struct Host<G> {
    storage: G,
    range: Range<usize>,
}

/// Borrows the numbers of a contiguous tensor, under candle's lock for readers: a thread may come to hold it twice where
/// parts of a batch run side by side, so weights are written only when no such work is under way.
pub(crate) fn host(tensor: &Tensor) -> Result<Host<impl Deref<Target = Storage>>> {
    let (storage, layout) = tensor.storage_and_layout();
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(Host { storage, range: start..end }),
        None => bail!("tensor of shape {:?} is not contiguous; call contiguous() first", tensor.shape()),
    }
}

impl<G: Deref<Target = Storage>> Host<G> {
    /// The numbers, in row-major order.
    pub(crate) fn values(&self) -> Result<&[f32]> {
        match &*self.storage {
            Storage::Cpu(storage) => Ok(&storage.as_slice::<f32>()?[self.range.clone()]),
            _ => bail!("tensor is not on the cpu"),
        }
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
            vector::vectorised(|| {
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
    partial.iter().for_each(|part| vector::add(&mut total, part));
    total
}
