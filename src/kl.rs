//! How far the policy is from its reference, per choice.

use candle_core::Tensor;

use crate::Result;

/// The k3 estimator of `KL(policy ‖ reference)`: `exp(Δ) − Δ − 1` with `Δ = log π_ref − log π`, `[B, T]` in nats.
///
/// Unbiased under samples of the policy, never negative (Schulman, 2020, "Approximating KL Divergence"; GRPO eq. 4).
/// Differentiable in `log_probs`.
pub fn k3(log_probs: &Tensor, reference: &Tensor) -> Result<Tensor> {
    let delta = (reference - log_probs)?;
    Ok(((delta.exp()? - &delta)? - 1.0)?)
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    /// Values of `math.exp(d) - d - 1` from CPython 3.11.
    #[test]
    fn k3_equals_the_formula() {
        let log_probs = Tensor::new(&[[-1.0f32, -2.0, -0.5]], &Device::Cpu).unwrap();
        let reference = Tensor::new(&[[-1.0f32, -1.5, -1.5]], &Device::Cpu).unwrap();
        let kl: Vec<Vec<f32>> = k3(&log_probs, &reference).unwrap().to_vec2().unwrap();
        for (got, expected) in kl[0].iter().zip([0.0, 0.148_721_27, 0.367_879_44]) {
            assert!((got - expected).abs() < 1e-6, "{got} is not {expected}");
        }
    }

    /// `d k3 / d log π = 1 − exp(Δ)`.
    #[test]
    fn k3_pulls_towards_the_reference() {
        let log_probs = Var::new(&[[-1.0f32, -2.0]], &Device::Cpu).unwrap();
        let reference = Tensor::new(&[[-2.0f32, -1.0]], &Device::Cpu).unwrap();
        let kl = k3(log_probs.as_tensor(), &reference).unwrap().sum_all().unwrap();
        let gradient: Vec<Vec<f32>> = kl.backward().unwrap().get(&log_probs).unwrap().to_vec2().unwrap();
        assert!((gradient[0][0] - (1.0 - (-1.0f32).exp())).abs() < 1e-6);
        assert!((gradient[0][1] - (1.0 - 1.0f32.exp())).abs() < 1e-6);
    }
}
