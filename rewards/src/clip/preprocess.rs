//! From a picture to the numbers an image tower takes.

use grpo::{Error, Result};
use image::RgbImage;
use serde::{Deserialize, Serialize};

use super::resize::{self, Filter};

/// CLIP's channel means, of values in `[0, 1]`.
const MEAN: [f32; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
/// CLIP's channel deviations, of values in `[0, 1]`.
const STD: [f32; 3] = [0.268_629_54, 0.261_302_6, 0.275_777_1];

/// How a picture is resized before it is judged; scores of one kind do not compare with those of another.
///
/// All three bring the short edge to the tower's size by bicubic interpolation, crop the centre and normalise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Preprocess {
    /// On bytes, with rounding and antialiasing: open_clip and CLIP (Pillow up to 12, bit for bit).
    #[serde(rename = "pil-bicubic")]
    PilU8,
    /// On floats that may leave `[0, 1]`, with antialiasing: HPSv2 on torchvision 0.17 and later.
    #[serde(rename = "hpsv2")]
    TensorAntialias,
    /// On floats that may leave `[0, 1]`, four taps at any scale: HPSv2 on torchvision before 0.17.
    #[serde(rename = "hpsv2-2023")]
    TensorNoAntialias,
}

impl Preprocess {
    /// Appends the picture as `[3, size, size]`, normalised.
    pub fn append(self, image: &RgbImage, size: usize, pixels: &mut Vec<f32>) -> Result<()> {
        if image.width() == 0 || image.height() == 0 || size == 0 {
            let message = format!("an image of {}x{} cannot be judged at size {size}", image.width(), image.height());
            return Err(Error::config(format!("{message}; every side must be at least 1")));
        }
        let resized: Vec<f32> = match self {
            Self::PilU8 => resize::pillow(image, size).into_iter().map(|byte| f32::from(byte) / 255.0).collect(),
            Self::TensorAntialias => resize::tensor(image, size, Filter::Antialias),
            Self::TensorNoAntialias => resize::tensor(image, size, Filter::FourTaps),
        };
        for channel in 0..3 {
            let values = resized.iter().skip(channel).step_by(3);
            pixels.extend(values.map(|value| (value - MEAN[channel]) / STD[channel]));
        }
        Ok(())
    }
}
