//! RMSNorm: `weight · x / √(mean(x²) + eps)` (Zhang and Sennrich, 2019, arXiv 1910.07467, eq. 4), in f32.

use candle_core::{CpuStorage, CustomOp2, D, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::{ROW_BLOCK, host, is_host_f32, operand, ordered_sum, stored, tensor, vector};

/// Normalises the last dimension of `x`, `[.., h]`, with `weight` of `[h]`.
pub(crate) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let width = x.dim(D::Minus1)?;
    if weight.dims() != [width] {
        bail!("weight of an rms norm has shape {:?}; expected [{width}]", weight.dims());
    }
    if is_host_f32(x) {
        x.contiguous()?.apply_op2(weight, RmsNorm { eps: eps as f32 })
    } else {
        composite(x, weight, eps)
    }
}

pub(crate) fn composite(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let wide = x.to_dtype(DType::F32)?;
    let scale = (wide.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()?;
    wide.broadcast_mul(&scale)?.to_dtype(x.dtype())?.broadcast_mul(weight)
}

/// One row of the forward pass; the sampler uses it too.
#[inline(always)]
pub(crate) fn normalise(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let scale = vector::inverse_rms(x, eps);
    for ((slot, value), weight) in out.iter_mut().zip(x).zip(weight) {
        *slot = value * scale * weight;
    }
}

/// [`normalise`] for each row of `[rows, h]`.
#[inline(always)]
pub(crate) fn normalise_rows(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    for (out, x) in out.chunks_exact_mut(weight.len()).zip(x.chunks_exact(weight.len())) {
        normalise(x, weight, eps, out);
    }
}

struct RmsNorm {
    eps: f32,
}

/// The backward pass of a block of rows: adds to the gradient by `x` and to that by the weight.
#[inline(always)]
pub(crate) fn unnormalise_rows(x: &[f32], weight: &[f32], eps: f32, grad: &[f32], to: (&mut [f32], &mut [f32])) {
    let width = weight.len();
    let (to_x, to_weight) = to;
    let mut scaled = vec![0.0; width];
    let rows = x.chunks_exact(width).zip(grad.chunks_exact(width)).zip(to_x.chunks_exact_mut(width));
    for ((x, grad), to_x) in rows {
        let scale = vector::inverse_rms(x, eps);
        for i in 0..width {
            scaled[i] = grad[i] * weight[i];
            to_weight[i] += grad[i] * x[i] * scale;
        }
        let pull = vector::dot(&scaled, x) * scale * scale * scale / width as f32;
        for i in 0..width {
            to_x[i] += scaled[i] * scale - x[i] * pull;
        }
    }
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, x_l: &Layout, w: &CpuStorage, w_l: &Layout) -> Result<(CpuStorage, Shape)> {
        let (values, weight) = (operand(x, x_l)?, operand(w, w_l)?);
        let width = weight.len().max(1);
        let mut out = vec![0.0; values.len()];
        let blocks = out.par_chunks_mut(ROW_BLOCK * width).zip(values.par_chunks(ROW_BLOCK * width));
        blocks.for_each(|(out, x)| vector::vectorised!(normalise_rows(x, weight, self.eps, out)));
        stored(out, x_l.shape())
    }

    fn bwd(&self, x: &Tensor, w: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let (x_host, w_host, grad_host) = (host(x)?, host(w)?, host(&grad)?);
        let (values, weight, grad) = (x_host.values()?, w_host.values()?, grad_host.values()?);
        let width = weight.len().max(1);
        let mut to_x = vec![0.0; values.len()];
        let blocks = to_x.par_chunks_mut(ROW_BLOCK * width).zip(values.par_chunks(ROW_BLOCK * width));
        let partial: Vec<Vec<f32>> = blocks
            .zip(grad.par_chunks(ROW_BLOCK * width))
            .map(|((to_x, x), grad)| {
                let mut to_weight = vec![0.0; width];
                vector::vectorised!(unnormalise_rows(x, weight, self.eps, grad, (to_x, &mut to_weight)));
                to_weight
            })
            .collect();
        let to_weight = ordered_sum(&partial, weight.len());
        Ok((Some(tensor(to_x, x.shape())?), Some(tensor(to_weight, w.shape())?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check_operation, normal_var};

    #[test]
    fn forward_and_backward_agree_with_the_composite() {
        for shape in [vec![3, 8], vec![2, 70, 20], vec![1, 1, 1]] {
            let (x, w) = (normal_var(1, &shape), normal_var(2, &shape[shape.len() - 1..]));
            let vars = [x.clone(), w.clone()];
            check_operation(&vars, || rms_norm(&x, &w, 1e-2), || composite(&x, &w, 1e-2));
        }
    }

    #[test]
    fn a_wrong_weight_is_an_error() {
        let error = rms_norm(&normal_var(1, &[2, 3]), &normal_var(2, &[4]), 1e-6).unwrap_err().to_string();
        assert!(error.contains("[4]; expected [3]"), "{error}");
    }
}
