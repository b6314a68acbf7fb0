//! From a picture to the numbers an image tower takes.

use grpo::{Error, Result};
use image::RgbImage;
use serde::{Deserialize, Serialize};

use grpo::picture::resize::{Axis, Filter, PassOrder, float_window, pillow_window};

/// CLIP's channel means, of values in `[0, 1]`.
const MEAN: [f32; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
/// CLIP's channel deviations, of values in `[0, 1]`.
const STD: [f32; 3] = [0.268_629_54, 0.261_302_6, 0.275_777_1];

/// How a picture is brought to the tower's square before it is judged; scores of one kind do not compare with another's.
///
/// A name stands for one published program and never changes its meaning. Deviations:
/// 1. All start from the picture's bytes in RGB. Pillow resizes palettes and transparency before it drops them.
/// 2. SimpleAR resizes what its decoder made before it is rounded to bytes: up to half a level more or less.
/// 3. HPSv2 fails on a picture whose long edge has the very size and whose short edge has not; here it is padded. It also
///    fails where the short edge would vanish; here one row or column is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Preprocess {
    /// open_clip and CLIP on Pillow up to 12, bit for bit: short edge by bicubic on bytes, middle kept.
    PilBicubic,
    /// As [`Preprocess::PilBicubic`], on Pillow from 13: another picture where it is tall and shrinks.
    #[serde(rename = "pil-bicubic-13")]
    PilBicubic13,
    /// HPSv2 on torchvision from 0.17: long edge by bicubic on floats with antialiasing, black round it.
    Hpsv2,
    /// As [`Preprocess::Hpsv2`] without antialiasing, on torchvision before 0.17: as in 2023, when it was published.
    #[serde(rename = "hpsv2-2023")]
    Hpsv2Of2023,
    /// SimpleAR's reward: both edges by bilinear on floats, without antialiasing, stretched.
    Simplear,
}

impl Preprocess {
    /// Appends the picture as `[3, size, size]`, normalised.
    pub fn append(self, image: &RgbImage, size: usize, pixels: &mut Vec<f32>) -> Result<()> {
        let (width, height) = image.dimensions();
        if width == 0 || height == 0 || size == 0 {
            let message = format!("an image of {width}x{height} cannot be judged at size {size}");
            return Err(Error::config(format!("{message}; every side must be at least 1")));
        }
        let square = match self {
            Self::PilBicubic => cropped(image, size, PassOrder::Pillow12),
            Self::PilBicubic13 => cropped(image, size, PassOrder::Pillow13),
            Self::Hpsv2 => padded(image, size, Filter::BicubicAntialias),
            Self::Hpsv2Of2023 => padded(image, size, Filter::Bicubic),
            Self::Simplear => {
                float_window(image, [Axis::whole(width, size), Axis::whole(height, size)], Filter::Bilinear)
            }
        };
        for channel in 0..3 {
            let values = square.iter().skip(channel).step_by(3);
            pixels.extend(values.map(|value| (value - MEAN[channel]) / STD[channel]));
        }
        Ok(())
    }
}

/// The middle of the picture whose short edge has `size`, `[size, size, 3]`.
fn cropped(image: &RgbImage, size: usize, order: PassOrder) -> Vec<f32> {
    let (width, height) = image.dimensions();
    let short = width.min(height);
    let axes = [Axis::centred(width, short, size), Axis::centred(height, short, size)];
    let bytes = pillow_window(image, axes, Filter::BicubicAntialias, order);
    bytes.into_iter().map(|byte| f32::from(byte) / 255.0).collect()
}

/// The picture whose long edge has `size`, in the middle of black, `[size, size, 3]`.
fn padded(image: &RgbImage, size: usize, filter: Filter) -> Vec<f32> {
    let (width, height) = image.dimensions();
    let scale = size as f64 / f64::from(width.max(height));
    // Python's `round` takes halves to even.
    let [columns, rows] =
        [width, height].map(|side| ((f64::from(side) * scale).round_ties_even() as usize).clamp(1, size));
    let resized = float_window(image, [Axis::whole(width, columns), Axis::whole(height, rows)], filter);
    let (left, top) = ((size - columns) / 2, (size - rows) / 2);
    let mut square = vec![0.0; size * size * 3];
    for (row, line) in resized.chunks_exact(columns * 3).enumerate() {
        let start = ((top + row) * size + left) * 3;
        square[start..start + line.len()].copy_from_slice(line);
    }
    square
}
