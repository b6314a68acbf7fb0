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

fn composite(gate_up: &Tensor) -> Result<Tensor> {
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

#[inline(always)]
fn gradient(gate_up: &[f32], grad: &[f32], out: &mut [f32]) {
    let (gate, up) = gate_up.split_at(grad.len());
    let (to_gate, to_up) = out.split_at_mut(grad.len());
    let (to_gate, to_up) = (&mut to_gate[..gate.len()], &mut to_up[..gate.len()]);
    for (i, grad) in grad.iter().enumerate() {
        let sigmoid = vector::sigmoid(gate[i]);
        let silu = gate[i] * sigmoid;
        to_up[i] = grad * silu;
        to_gate[i] = grad * up[i] * (sigmoid + silu * (1.0 - sigmoid));
    }
}

#[inline(always)]
fn gradient_rows(gate_up: &[f32], grad: &[f32], width: usize, out: &mut [f32]) {
    let rows = out.chunks_exact_mut(2 * width).zip(gate_up.chunks_exact(2 * width));
    for ((out, row), grad) in rows.zip(grad.chunks_exact(width)) {
        gradient(row, grad, out);
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
            vector::vectorised(|| activate_rows(values, width, out));
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
        let mut out = vec![0.0; values.len()];
        let blocks = out.par_chunks_mut(2 * block).zip(values.par_chunks(2 * block)).zip(grads.par_chunks(block));
        blocks.for_each(|((out, values), grads)| {
            vector::vectorised(|| gradient_rows(values, grads, width, out));
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
