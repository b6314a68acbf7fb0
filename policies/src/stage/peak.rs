//! What a device can do at best, as one large matrix product shows it: the denominator of the model's FLOP utilisation.

use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use grpo::Result;

use crate::ops::linear::linear;

/// The speed of the best of a few large products, in FLOP a second: in f32 on the CPU, in bf16 on a card.
///
/// It is measured and not looked up, so it is what this machine gives at this moment, and a share of it can be a little above
/// one where the machine was busy. It takes about a second.
pub fn peak_flops(device: &Device) -> Result<f64> {
    let (side, dtype) = if device.is_cpu() { (1536, DType::F32) } else { (8192, DType::BF16) };
    let x = Tensor::ones((side, side), dtype, device)?;
    let mut best = 0f64;
    for _ in 0..6 {
        device.synchronize()?;
        let clock = Instant::now();
        drop(linear(&x, &x)?);
        device.synchronize()?;
        best = best.max(2.0 * (side as f64).powi(3) / clock.elapsed().as_secs_f64());
    }
    Ok(best)
}
