//! AdamW in one pass and the gradient's norm, on a card.

use candle_core::{DType, Tensor};
use grpo::{DeviceOptimiser, Result, StepNumbers};

use super::arguments::StepOfAdamW;
use super::gpu::{Extent, Gpu};

/// Numbers of a block of optimise.cu's sum_squares: SQUARED.
const SQUARED: usize = 1 << 14;

/// The optimiser's work where parameters lie on a card.
#[derive(Debug)]
pub(crate) struct CudaOptimiser;

/// Whether the kernels take a tensor.
fn serves(tensor: &Tensor) -> bool {
    tensor.device().is_cuda() && tensor.dtype() == DType::F32 && tensor.is_contiguous()
}

impl DeviceOptimiser for CudaOptimiser {
    fn update(
        &self,
        param: &Tensor,
        gradient: &Tensor,
        [first, second]: [&Tensor; 2],
        numbers: &StepNumbers,
    ) -> Result<bool> {
        if ![param, gradient, first, second].into_iter().all(serves) {
            return Ok(false);
        }
        let gpu = Gpu::of(param)?;
        let [param, first, second, gradient] =
            [param, first, second, gradient].map(|tensor| gpu.address(tensor).map(|at| (at, tensor.elem_count())));
        let ((param, n), (first, _), (second, _), (gradient, _)) = (param?, first?, second?, gradient?);
        // The kernel reads four numbers at a time, where they lie at their own size.
        if [param, first, second, gradient].iter().any(|at| at % 16 != 0) {
            return Ok(false);
        }
        let step = StepOfAdamW([
            numbers.shrink,
            numbers.beta1,
            numbers.beta2,
            numbers.keep,
            numbers.scale,
            numbers.root_correction,
            numbers.eps,
        ]);
        gpu.launch("adamw", Extent::over(n.div_ceil(4)), &[&param, &first, &second, &gradient, &step, &n])?;
        Ok(true)
    }

    fn sum_of_squares(&self, gradients: &[&Tensor]) -> Result<Option<f64>> {
        let Some(one) = gradients.first().filter(|_| gradients.iter().copied().all(serves)) else { return Ok(None) };
        let gpu = Gpu::of(one)?;
        let blocks = |tensor: &Tensor| tensor.elem_count().div_ceil(SQUARED);
        let n_blocks = gradients.iter().map(|tensor| blocks(tensor)).sum();
        let parts = gpu.words(2 * n_blocks)?;
        let mut first = 0;
        for tensor in gradients {
            let (to, from, n) = (parts.at(8 * first), gpu.address(tensor)?, tensor.elem_count());
            gpu.launch("sum_squares", Extent::new((blocks(tensor), 1, 1), 256), &[&to, &from, &n])?;
            first += blocks(tensor);
        }
        Ok(Some(gpu.download::<f64>(&parts, n_blocks)?.iter().sum()))
    }
}
