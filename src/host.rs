//! The numbers of f32 tensors on the CPU, read and written where they lie.
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use grpo::host::{edit, host};
//! let x = Tensor::new(&[1f32, 2.0], &Device::Cpu)?;
//! edit(&x, |values| Ok(values[0] = 5.0))?;
//! assert_eq!(host(&x)?.values()?, [5.0, 2.0]);
//! # Ok::<(), candle_core::Error>(())
//! ```

use std::cell::RefCell;
use std::ops::{Deref, Range};

use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Result, Storage, Tensor, bail};

/// Whether a tensor is of f32 on the CPU.
pub fn is_host_f32(tensor: &Tensor) -> bool {
    tensor.device().is_cpu() && tensor.dtype() == DType::F32
}

/// A contiguous f32 tensor on the CPU, held for reading.
#[derive(Debug)]
pub struct Host<G> {
    storage: G,
    range: Range<usize>,
}

/// Borrows the numbers of a contiguous tensor, under candle's lock for readers: a thread may come to hold it twice where
/// parts of a batch run side by side, so weights are written only when no such work is under way.
pub fn host(tensor: &Tensor) -> Result<Host<impl Deref<Target = Storage>>> {
    let (storage, layout) = tensor.storage_and_layout();
    Ok(Host { storage, range: range(layout)? })
}

impl<G: Deref<Target = Storage>> Host<G> {
    /// The numbers, in row-major order.
    pub fn values(&self) -> Result<&[f32]> {
        match &*self.storage {
            Storage::Cpu(storage) => Ok(&storage.as_slice::<f32>()?[self.range.clone()]),
            _ => bail!("tensor is not on the cpu"),
        }
    }
}

fn range(layout: &Layout) -> Result<Range<usize>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(start..end),
        None => bail!("tensor of shape {:?} is not contiguous; call contiguous() first", layout.shape()),
    }
}

/// Edits the numbers of a contiguous tensor, under candle's lock for writers.
pub fn edit(tensor: &Tensor, edit: impl FnOnce(&mut [f32]) -> Result<()>) -> Result<()> {
    tensor.inplace_op1(&Edit(RefCell::new(Some(edit))))
}

/// An edit that is still to be made.
struct Edit<F>(RefCell<Option<F>>);

impl<F: FnOnce(&mut [f32]) -> Result<()>> InplaceOp1 for Edit<F> {
    fn name(&self) -> &'static str {
        "edit"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let range = range(layout)?;
        let CpuStorage::F32(values) = storage else { bail!("tensor is not of f32") };
        match (self.0.take(), values.get_mut(range)) {
            (Some(edit), Some(values)) => edit(values),
            _ => bail!("tensor is shorter than its layout"),
        }
    }
}
