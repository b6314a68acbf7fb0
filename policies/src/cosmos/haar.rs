//! Haar patches: the two-dimensional remainder of Cosmos' wavelet patcher when there is a single frame.
//!
//! With one frame the bands that are high in time are exactly zero, so a level keeps four of eight bands and the
//! encoder's first convolution is pruned to them; the decoder's last convolution has the inverse's subtraction of
//! the time bands folded in. Both directions are then plain 2 x 2 sums and differences.

use candle_core::{Result, Tensor};

/// `[B, H, W, C]` to `[B, H / p, W / p, C * p * p]`: log2(p) levels, the average band first.
pub(super) fn patch(pixels: &Tensor, patch_size: usize) -> Result<Tensor> {
    (0..patch_size.ilog2()).try_fold(pixels.clone(), |x, _| split(&x))
}

/// The inverse of [`patch`]: `[B, h, w, C * p * p]` to `[B, h * p, w * p, C]`.
pub(super) fn unpatch(bands: &Tensor, patch_size: usize) -> Result<Tensor> {
    (0..patch_size.ilog2()).try_fold(bands.clone(), |x, _| merge(&x))
}

/// One level down. Bands in order: average, high in width, high in height, high in both.
fn split(x: &Tensor) -> Result<Tensor> {
    let (n, h, w, c) = x.dims4()?;
    let blocks = x.reshape((n, h / 2, 2, w / 2, 2, c))?;
    let corner = |dy: usize, dx: usize| blocks.narrow(2, dy, 1)?.narrow(4, dx, 1)?.reshape((n, h / 2, w / 2, c));
    let (a, b, c, d) = (corner(0, 0)?, corner(0, 1)?, corner(1, 0)?, corner(1, 1)?);
    let [above, below, above_high, below_high] = [(&a + &b)?, (&c + &d)?, (a - b)?, (c - d)?];
    let bands = [(&above + &below)?, (&above_high + &below_high)?, (above - below)?, (above_high - below_high)?];
    Tensor::cat(&bands, 3)? * 0.25
}

/// One level up.
fn merge(x: &Tensor) -> Result<Tensor> {
    let (n, h, w, c) = x.dims4()?;
    let c = c / 4;
    let band = |index: usize| x.narrow(3, index * c, c);
    let (low, wide, tall, both) = (band(0)?, band(1)?, band(2)?, band(3)?);
    let [above, below, above_high, below_high] = [(&low + &tall)?, (low - tall)?, (&wide + &both)?, (wide - both)?];
    let row = |low: &Tensor, high: &Tensor| Tensor::stack(&[(low + high)?, (low - high)?], 3); // [n, h, w, 2, c]
    Tensor::stack(&[row(&above, &above_high)?, row(&below, &below_high)?], 2)?.reshape((n, 2 * h, 2 * w, c))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn one_block_gives_the_published_sums() {
        let (a, b, c, d) = (8.0f32, 4.0, 2.0, 1.0);
        let x = Tensor::from_vec(vec![a, b, c, d], (1, 2, 2, 1), &Device::Cpu).unwrap();
        let bands: Vec<f32> = patch(&x, 2).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        let expected = [a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d].map(|sum| sum / 4.0);
        assert_eq!(bands, expected);
    }

    #[test]
    fn unpatch_undoes_patch() {
        let values: Vec<f32> = (0..2 * 8 * 16 * 3).map(|i| ((i * 37) % 101) as f32 / 50.0 - 1.0).collect();
        let x = Tensor::from_vec(values, (2, 8, 16, 3), &Device::Cpu).unwrap();
        for patch_size in [2, 4, 8] {
            let bands = patch(&x, patch_size).unwrap();
            assert_eq!(bands.dims(), [2, 8 / patch_size, 16 / patch_size, 3 * patch_size * patch_size]);
            let back = unpatch(&bands, patch_size).unwrap();
            let error = (back - &x).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(error < 1e-6, "patch size {patch_size}: {error}");
        }
    }
}
