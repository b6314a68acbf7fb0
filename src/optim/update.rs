//! One update of AdamW.

use candle_core::{DType, Tensor, Var};
use pulp::Arch;
use rayon::prelude::*;

use super::OptimConfig;
use crate::Result;
use crate::host::{edit, host, is_host_f32};

/// Parameters that a thread takes at a time.
const BLOCK: usize = 1 << 16;

/// The moving averages of a parameter's gradient and of its square.
pub(super) struct Moments {
    pub(super) first: Tensor,
    pub(super) second: Tensor,
}

/// The numbers of one update of a parameter `p` with its moments `m` and `v` by a gradient `g`:
///
/// `g ← g · shrink`, `m ← beta1 · m + (1 − beta1) · g`, `v ← beta2 · v + (1 − beta2) · g²`,
/// `p ← keep · p − scale · m / (√v / root_correction + eps)`.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct StepNumbers {
    /// What the gradient is multiplied by first, so that it is no longer than `max_grad_norm`.
    pub shrink: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// What decay leaves of the parameter.
    pub keep: f32,
    /// The rate over the first moment's bias.
    pub scale: f32,
    /// The root of the second moment's bias.
    pub root_correction: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
}

/// An optimiser's work where a device has code of its own for it; the rest is done by candle's operations.
pub trait DeviceOptimiser: Send + Sync {
    /// Moves a parameter and its two moments in place, all of one shape; `false` where they are not this device's.
    fn update(&self, param: &Tensor, gradient: &Tensor, moments: [&Tensor; 2], numbers: &StepNumbers) -> Result<bool>;

    /// The sum of the squares of all numbers; `None` where not all of them are this device's.
    fn sum_of_squares(&self, gradients: &[&Tensor]) -> Result<Option<f64>>;
}

impl StepNumbers {
    pub(super) fn new(config: &OptimConfig, rate: f64, n_updates: usize, decays: bool) -> Self {
        let n = n_updates.min(i32::MAX as usize) as i32;
        Self {
            shrink: 1.0,
            beta1: config.beta1 as f32,
            beta2: config.beta2 as f32,
            keep: if decays { (1.0 - rate * config.weight_decay) as f32 } else { 1.0 },
            scale: (rate / (1.0 - config.beta1.powi(n))) as f32,
            root_correction: (1.0 - config.beta2.powi(n)).sqrt() as f32,
            eps: config.eps as f32,
        }
    }

    /// The same for a gradient that is too long.
    pub(super) fn shrunk(self, shrink: f64) -> Self {
        Self { shrink: shrink as f32, ..self }
    }

    /// Moves a parameter and its moments; the gradient is contiguous and f32.
    pub(super) fn apply(
        &self,
        var: &Var,
        moments: &mut Moments,
        gradient: &Tensor,
        device: Option<&dyn DeviceOptimiser>,
    ) -> Result<()> {
        if let Some(device) = device
            && device.update(var, gradient, [&moments.first, &moments.second], self)?
        {
            return Ok(());
        }
        if is_host_f32(var) && is_host_f32(gradient) {
            let gradient = host(gradient)?;
            let gradient = gradient.values()?;
            let (first, second) = (&moments.first, &moments.second);
            edit(first, |first| edit(second, |second| edit(var, |param| self.pass(param, first, second, gradient))))?;
            return Ok(());
        }
        let gradient = &(gradient * f64::from(self.shrink))?;
        let blend = |old: &Tensor, new: &Tensor, decay: f32| -> Result<Tensor> {
            Ok(((old * f64::from(decay))? + (new * f64::from(1.0 - decay))?)?)
        };
        moments.first = blend(&moments.first, gradient, self.beta1)?;
        moments.second = blend(&moments.second, &gradient.sqr()?, self.beta2)?;
        let root = ((moments.second.sqrt()? / f64::from(self.root_correction))? + f64::from(self.eps))?;
        let step = ((&moments.first / root)? * f64::from(self.scale))?;
        let kept = (var.as_tensor().detach().to_dtype(DType::F32)? * f64::from(self.keep))?;
        Ok(var.set(&(kept - step)?.to_dtype(var.dtype())?)?)
    }

    /// All of it in one pass over a parameter.
    fn pass(
        &self,
        param: &mut [f32],
        first: &mut [f32],
        second: &mut [f32],
        gradient: &[f32],
    ) -> candle_core::Result<()> {
        let moments = first.par_chunks_mut(BLOCK).zip(second.par_chunks_mut(BLOCK));
        let blocks = param.par_chunks_mut(BLOCK).zip(gradient.par_chunks(BLOCK)).zip(moments);
        // Roots and quotients of four numbers at a time would take longer than the memory.
        let arch = Arch::new();
        blocks.for_each(|((param, gradient), (first, second))| {
            arch.dispatch(|| self.pass_block(param, first, second, gradient));
        });
        Ok(())
    }

    #[inline(always)]
    fn pass_block(&self, param: &mut [f32], first: &mut [f32], second: &mut [f32], gradient: &[f32]) {
        for (((p, g), m), v) in param.iter_mut().zip(gradient).zip(first).zip(second) {
            let g = g * self.shrink;
            *m = self.beta1 * *m + (1.0 - self.beta1) * g;
            *v = self.beta2 * *v + (1.0 - self.beta2) * (g * g);
            *p = self.keep * *p - self.scale * *m / (v.sqrt() / self.root_correction + self.eps);
        }
    }
}
