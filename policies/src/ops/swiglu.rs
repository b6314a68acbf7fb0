//! SwiGLU: `silu(gate) · up` (Shazeer, 2020, arXiv 2002.05202, eq. 6), with gate and up side by side.

use candle_core::{CpuStorage, CustomOp1, D, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::{ROW_BLOCK, host, is_host_f32, operand, stored, tensor, vector};

/// Combines `[.., 2f]`, the gate in the first half and up in the second, into `[.., f]`.
pub(crate) fn swiglu(gate_up: &Tensor) -> Result<Tensor> {
    let width = gate_up.dim(D::Minus1)?;
    if !width.is_multiple_of(2) {
        bail!("gate and up together have an odd width, {width}; give them one width");
    }
    if is_host_f32(gate_up) { gate_up.contiguous()?.apply_op1(SwiGlu) } else { composite(gate_up) }
}

pub(crate) fn composite(gate_up: &Tensor) -> Result<Tensor> {
    let half = gate_up.dim(D::Minus1)? / 2;
    let gate = gate_up.narrow(D::Minus1, 0, half)?.contiguous()?;
    let up = gate_up.narrow(D::Minus1, half, half)?.contiguous()?;
    gate.silu()? * up
}

/// The forward pass of rows whose halves are `width` wide; the sampler uses it too.
#[inline(always)]
pub(crate) fn activate_rows(gate_up: &[f32], width: usize, out: &mut [f32]) {
    for (out, row) in out.chunks_exact_mut(width).zip(gate_up.chunks_exact(2 * width)) {
        let (gate, up) = row.split_at(width);
        for ((slot, gate), up) in out.iter_mut().zip(gate).zip(up) {
            *slot = gate * vector::sigmoid(*gate) * up;
        }
    }
}

/// The backward pass of rows in place: `gate_up` becomes the gradient by it, and `active`, which holds the gradient by
/// the activation, becomes the activation.
#[inline(always)]
pub(crate) fn unactivate_rows(gate_up: &mut [f32], width: usize, active: &mut [f32]) {
    for (row, active) in gate_up.chunks_exact_mut(2 * width).zip(active.chunks_exact_mut(width)) {
        let (gate, up) = row.split_at_mut(width);
        for ((gate, up), active) in gate.iter_mut().zip(up).zip(active) {
            let sigmoid = vector::sigmoid(*gate);
            let (silu, grad) = (*gate * sigmoid, *active);
            *active = silu * *up;
            *gate = grad * *up * (sigmoid + silu * (1.0 - sigmoid));
            *up = grad * silu;
        }
    }
}

struct SwiGlu;

impl CustomOp1 for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let values = operand(storage, layout)?;
        let mut shape = layout.dims().to_vec();
        let width = shape.pop().unwrap_or(0) / 2;
        let mut out = vec![0.0; values.len() / 2];
        let block = ROW_BLOCK * width.max(1);
        out.par_chunks_mut(block).zip(values.par_chunks(2 * block)).for_each(|(out, values)| {
            vector::vectorised!(activate_rows(values, width, out));
        });
        shape.push(width);
        stored(out, shape)
    }

    fn bwd(&self, gate_up: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let (host, grad_host) = (host(gate_up)?, host(&grad)?);
        let (values, grads) = (host.values()?, grad_host.values()?);
        let width = grad.dim(D::Minus1)?;
        let block = ROW_BLOCK * width.max(1);
        let (mut out, mut active) = (values.to_vec(), grads.to_vec());
        out.par_chunks_mut(2 * block).zip(active.par_chunks_mut(block)).for_each(|(out, active)| {
            vector::vectorised!(unactivate_rows(out, width, active));
        });
        Ok(Some(tensor(out, gate_up.shape())?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check_operation, normal_var};

    #[test]
    fn forward_and_backward_agree_with_the_composite() {
        for shape in [vec![3, 8], vec![2, 70, 22]] {
            let x = normal_var(1, &shape);
            check_operation(std::slice::from_ref(&x), || swiglu(&x), || composite(&x));
        }
    }
}
