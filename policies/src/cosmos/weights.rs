//! Tensors by name, taken from a file or fresh: strict, because a wrong file must not become a wrong picture.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Shape, Tensor, Var};
use grpo::{Error, Result, Seed};

/// Takes the tensor of this name and shape out of `tensors`.
pub(super) fn take(tensors: &mut BTreeMap<String, Tensor>, name: &str, shape: &[usize]) -> Result<Tensor> {
    let Some(tensor) = tensors.remove(name) else {
        return Err(Error::config(format!(
            "tensor `{name}` of shape {shape:?} is missing; is this another model's file?"
        )));
    };
    if tensor.dims() != shape {
        return Err(Error::config(format!(
            "tensor `{name}` has shape {:?}; the configuration asks for {shape:?}",
            tensor.dims()
        )));
    }
    let tensor = tensor.to_dtype(DType::F32)?;
    let magnitude = tensor.abs()?.sum_all()?.to_scalar::<f32>()?;
    match magnitude.is_finite() {
        true => Ok(tensor),
        false => Err(Error::config(format!("tensor `{name}` holds numbers that are not finite; the file is damaged"))),
    }
}

/// Refuses what nobody took.
pub(super) fn refuse_rest(tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    match tensors.first_key_value() {
        None => Ok(()),
        Some((name, tensor)) => Err(Error::config(format!(
            "tensor `{name}` of shape {:?} and {} others belong to no part of the model; is this another model's file?",
            tensor.dims(),
            tensors.len() - 1
        ))),
    }
}

/// Weights that write into a residual stream or into the picture begin this much smaller, so that a fresh network is
/// nearly linear and its first pictures are grey.
const QUIET: f64 = 0.1;

/// A fresh variable: scales 1, biases 0, weights normal with variance 1 / inputs (LeCun et al., 1998), some [`QUIET`].
pub(super) fn fresh(name: &str, shape: &[usize], seed: Seed, device: &Device) -> Result<Var> {
    let shape = Shape::from(shape);
    let values: Vec<f32> = match shape.rank() {
        0 | 1 => vec![if name.ends_with(".weight") { 1.0 } else { 0.0 }; shape.elem_count()],
        _ => {
            let inputs = shape.dims()[1..].iter().product::<usize>().max(1) as f64;
            let quiet =
                [".conv2.weight", "proj_out.weight", "decoder.conv_out.weight"].iter().any(|end| name.ends_with(end));
            let scale = if quiet { QUIET } else { 1.0 } / inputs.sqrt();
            let mut draws = seed.named(name).draws();
            (0..shape.elem_count()).map(|_| (draws.normal() * scale) as f32).collect()
        }
    };
    Ok(Var::from_vec(values, shape, device)?)
}
