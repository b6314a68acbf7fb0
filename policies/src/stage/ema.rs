//! A moving average of the weights beside them (Polyak and Juditsky, 1992): `a ← d·a + (1 − d)·w` after every update.

use candle_core::{DType, Var};
use grpo::{Params, Result};

/// An average of parameters, in f32.
pub(super) struct Average {
    decay: f64,
    params: Params,
}

impl Average {
    /// An average that begins at the parameters as they are.
    pub(super) fn of(params: &Params, decay: f64) -> Result<Self> {
        let mut vars = Vec::new();
        for (name, var) in params.iter() {
            vars.push((name.to_string(), Var::from_tensor(&var.as_tensor().detach().to_dtype(DType::F32)?.copy()?)?));
        }
        Ok(Self { decay, params: Params::new(vars)? })
    }

    /// The average, for a checkpoint.
    pub(super) fn params(&self) -> &Params {
        &self.params
    }

    /// Moves towards the parameters.
    pub(super) fn follow(&mut self, params: &Params) -> Result<()> {
        for (name, var) in params.iter() {
            let Some(average) = self.params.get(name) else { continue };
            let new = var.as_tensor().detach().to_dtype(DType::F32)?;
            average.set(&((average.as_tensor() * self.decay)? + (new * (1.0 - self.decay))?)?)?;
        }
        Ok(())
    }

    /// Puts the average into the parameters and the parameters here; a second time puts both back.
    pub(super) fn exchange(&mut self, params: &Params) -> Result<()> {
        for (name, var) in params.iter() {
            let Some(average) = self.params.get(name) else { continue };
            let kept = var.as_tensor().detach().copy()?;
            var.set(&average.as_tensor().to_dtype(var.dtype())?.copy()?)?;
            average.set(&kept.to_dtype(DType::F32)?)?;
        }
        Ok(())
    }
}
