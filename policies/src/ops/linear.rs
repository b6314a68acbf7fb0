//! `x · Wᵀ + addend`, the addend being a bias or the residual stream.
//!
//! candle's own batched product gives wrong numbers for a strided left operand with a broadcast right one
//! (0.11.1), so rows are made contiguous and multiplied as one matrix. Operands that nothing trains, such as the
//! weights below an adapter, cost no product in the backward pass.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, D, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::{host, is_host_f32, operand, stored, sum_rows, tensor, vector};

/// `x · Wᵀ` for `x` of `[.., k]` and `weight` of `[n, k]`: `[.., n]`.
pub(crate) fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    with_rows(x, weight, |rows| if is_host_f32(x) { rows.apply_op2(weight, Linear) } else { rows.matmul(&weight.t()?) })
}

/// `x · Wᵀ + bias` with `bias` of `[n]`.
pub(crate) fn linear_bias(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    with_rows(x, weight, |rows| {
        if is_host_f32(x) {
            rows.apply_op3(weight, &bias.contiguous()?, LinearAdd)
        } else {
            rows.matmul(&weight.t()?)?.broadcast_add(bias)
        }
    })
}

/// `residual + x · Wᵀ` with `residual` of `[.., n]`.
pub(crate) fn linear_residual(x: &Tensor, weight: &Tensor, residual: &Tensor) -> Result<Tensor> {
    with_rows(x, weight, |rows| {
        let residual = residual.contiguous()?.reshape(((), residual.dim(D::Minus1)?))?;
        if is_host_f32(x) {
            rows.apply_op3(weight, &residual, LinearAdd)
        } else {
            rows.matmul(&weight.t()?)? + residual
        }
    })
}

fn with_rows(x: &Tensor, weight: &Tensor, product: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    let (n, k) = weight.dims2()?;
    let mut shape = x.dims().to_vec();
    match shape.last_mut() {
        Some(last) if *last == k => *last = n,
        _ => bail!("input of a linear layer has shape {:?}; expected [.., {k}]", x.dims()),
    }
    product(&x.contiguous()?.reshape(((), k))?)?.reshape(shape)
}

struct Linear;

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, x_l: &Layout, w: &CpuStorage, w_l: &Layout) -> Result<(CpuStorage, Shape)> {
        multiply((x, x_l), (w, w_l))
    }

    fn bwd(&self, x: &Tensor, w: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        gradients(x, w, &grad.contiguous()?)
    }
}

/// `x · Wᵀ + addend`, the addend being `[n]` or `[rows, n]`.
struct LinearAdd;

impl CustomOp3 for LinearAdd {
    fn name(&self) -> &'static str {
        "linear-add"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_l: &Layout,
        w: &CpuStorage,
        w_l: &Layout,
        addend: &CpuStorage,
        addend_l: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (product, shape) = multiply((x, x_l), (w, w_l))?;
        let addend = operand(addend, addend_l)?;
        let n = shape.dim(D::Minus1)?;
        let CpuStorage::F32(mut out) = product else { bail!("linear: the product is not f32") };
        if addend.len() != n && addend.len() != out.len() {
            bail!("addend of a linear layer has {} numbers; expected {n} or {}", addend.len(), out.len());
        }
        let block = super::ROW_BLOCK * n.max(1);
        out.par_chunks_mut(block).enumerate().for_each(|(index, rows)| {
            let addend = if addend.len() == n { addend } else { &addend[index * block..] };
            vector::vectorised!(add_to_block(rows, addend, n));
        });
        stored(out, shape)
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        addend: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let to_addend = match (addend.track_op(), addend.rank()) {
            (false, _) => None,
            (true, 1) => Some(tensor(sum_rows(host(&grad)?.values()?, addend.elem_count()), addend.shape())?),
            (true, _) => Some(grad.clone()),
        };
        let (to_x, to_weight) = gradients(x, w, &grad)?;
        Ok((to_x, to_weight, to_addend))
    }
}

/// Gradients by the input and the weight of a product, each where something below it is trained.
fn gradients(x: &Tensor, w: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
    let to_x = x.track_op().then(|| grad.matmul(w)).transpose()?;
    Ok((to_x, w.track_op().then(|| grad.t()?.matmul(x)).transpose()?))
}

/// Adds line to line, or the one line there is to all.
#[inline(always)]
fn add_to_block(rows: &mut [f32], addend: &[f32], n: usize) {
    if addend.len() == n {
        rows.chunks_exact_mut(n).for_each(|row| vector::add(row, addend));
    } else {
        vector::add(rows, addend);
    }
}

fn multiply(x: (&CpuStorage, &Layout), w: (&CpuStorage, &Layout)) -> Result<(CpuStorage, Shape)> {
    let (rows, k) = x.1.shape().dims2()?;
    let n = w.1.shape().dims2()?.0;
    let product = x.0.matmul(w.0, (1, rows, n, k), x.1, &w.1.transpose(0, 1)?)?;
    Ok((product, Shape::from((rows, n))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check_operation, distance, normal_var};

    #[test]
    fn forward_and_backward_agree_with_the_composite() {
        let (x, w) = (normal_var(1, &[2, 3, 5]), normal_var(2, &[4, 5]));
        let (bias, residual) = (normal_var(3, &[4]), normal_var(4, &[2, 3, 4]));
        let plain = || x.flatten(0, 1)?.matmul(&w.t()?)?.reshape((2, 3, 4));
        check_operation(&[x.clone(), w.clone()], || linear(&x, &w), plain);
        let vars = [x.clone(), w.clone(), bias.clone()];
        check_operation(&vars, || linear_bias(&x, &w, &bias), || plain()?.broadcast_add(&bias));
        let vars = [x.clone(), w.clone(), residual.clone()];
        check_operation(&vars, || linear_residual(&x, &w, &residual), || plain()? + residual.as_tensor());
    }

    #[test]
    fn a_strided_input_is_multiplied_rightly() {
        let (x, w) = (normal_var(1, &[2, 4, 3]), normal_var(2, &[6, 4]));
        let strided = x.transpose(1, 2).unwrap();
        let right = linear(&strided.contiguous().unwrap(), &w).unwrap();
        assert!(distance(&linear(&strided, &w).unwrap(), &right) < 1e-6);
    }

    #[test]
    fn a_wrong_width_is_an_error() {
        let error = linear(&normal_var(1, &[2, 3]), &normal_var(2, &[6, 4])).unwrap_err().to_string();
        assert!(error.contains("[2, 3]; expected [.., 4]"), "{error}");
    }
}
