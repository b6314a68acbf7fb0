//! How light a picture is: the simplest reward there is, for first runs and tests.

use grpo::{BoxError, Prompt, Reward};
use image::RgbImage;

/// The weights of red, green and blue in luma (ITU-R BT.601), in thousandths.
const LUMA: [u64; 3] = [299, 587, 114];

/// The mean luma of the pixels as stored, from 0 (black) to 1 (white).
///
/// ```
/// use grpo::{Prompt, Reward};
/// use grpo_rewards::Brightness;
/// use image::{Rgb, RgbImage};
///
/// let white = RgbImage::from_pixel(8, 8, Rgb([255; 3]));
/// assert_eq!(Brightness.score(&Prompt::new("snow"), &white)?, 1.0);
/// # Ok::<(), grpo::BoxError>(())
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct Brightness;

impl Reward<RgbImage> for Brightness {
    fn name(&self) -> &str {
        "brightness"
    }

    fn score(&self, _prompt: &Prompt, sample: &RgbImage) -> Result<f32, BoxError> {
        let (width, height) = sample.dimensions();
        if width == 0 || height == 0 {
            return Err(format!("image is {width} x {height} pixels; give one with at least one pixel").into());
        }
        // Integers make the sum exact, whatever the size.
        let sum: u64 = sample
            .pixels()
            .map(|pixel| LUMA.iter().zip(pixel.0).map(|(w, level)| w * u64::from(level)).sum::<u64>())
            .sum();
        Ok((sum as f64 / (255_000.0 * f64::from(width) * f64::from(height))) as f32)
    }
}
