//! How small a picture is as a JPEG: the reward of DDPO's first experiment.
//!
//! Paper: Black et al., 2023, "Training Diffusion Models with Reinforcement Learning", section 5.1.
//! Deviation: the encoder is the `image` crate's, whose sizes differ by some percent from Pillow's.

use grpo::{BoxError, Prompt, Reward};
use image::RgbImage;
use image::codecs::jpeg::JpegEncoder;

/// The published quality.
const QUALITY: u8 = 95;

/// Minus the size in kilobytes (of 1000 bytes) as a JPEG of quality 95.
///
/// ```
/// use grpo::{Prompt, Reward};
/// use grpo_rewards::JpegCompressibility;
/// use image::RgbImage;
///
/// let flat = JpegCompressibility.score(&Prompt::new("night"), &RgbImage::new(64, 64))?;
/// assert!((-2.0..0.0).contains(&flat));
/// # Ok::<(), grpo::BoxError>(())
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct JpegCompressibility;

impl Reward<RgbImage> for JpegCompressibility {
    fn name(&self) -> &str {
        "jpeg_compressibility"
    }

    fn score(&self, _prompt: &Prompt, sample: &RgbImage) -> Result<f32, BoxError> {
        let mut bytes = Vec::new();
        JpegEncoder::new_with_quality(&mut bytes, QUALITY).encode_image(sample)?;
        Ok(-(bytes.len() as f32) / 1000.0)
    }
}
