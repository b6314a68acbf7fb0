//! From a picture to the numbers a network takes.

use grpo::Result;
use image::RgbImage;
use serde::{Deserialize, Serialize};

use crate::clip::Preprocess;
use crate::onnx::{Dim, check_picture};
use grpo::picture::resize::{Axis, Filter, PassOrder, float_window, pillow_window};

/// How a picture becomes a network's input.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Picture {
    /// As a published CLIP-like program does it, its mean and deviation included: f32 `[batch, 3, size, size]`.
    Named {
        /// Which program.
        preprocess: Preprocess,
        /// The side in pixels.
        size: usize,
    },
    /// Step by step.
    Plain(PlainPicture),
}

/// Resized, then `(value - mean) / std` on each channel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlainPicture {
    /// Pixels from top to bottom.
    pub height: usize,
    /// Pixels from left to right.
    pub width: usize,
    /// How another shape is brought to this one.
    pub fit: Fit,
    /// What computes a pixel from those of the picture.
    pub filter: Resampling,
    /// The order of the dimensions.
    pub layout: Layout,
    /// The order of the channels.
    pub channels: Channels,
    /// What white is before the mean is taken off.
    pub range: Range,
    /// One number for each channel, in the order of `channels`.
    pub mean: [f32; 3],
    /// One number for each channel, in the order of `channels`.
    pub std: [f32; 3],
}

/// How a picture of another shape is brought to a network's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Fit {
    /// Both edges are resized.
    Stretch,
    /// All of the picture in the middle, its proportions kept, and grey of this byte around it.
    Letterbox {
        /// The grey, 0 to 255.
        fill: u8,
    },
    /// The short edge is resized to `short`, and the middle kept.
    Crop {
        /// The short edge before the crop; at least as long as the kept part is.
        short: usize,
    },
}

/// What computes a pixel from those of the picture; scores of one do not compare with those of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Resampling {
    /// Two taps an axis on floats: OpenCV's and torch's, which skip pixels when they shrink.
    Bilinear,
    /// Four taps an axis on floats, likewise.
    Bicubic,
    /// Pillow's on bytes, which reads every pixel.
    PilBilinear,
    /// Pillow's on bytes, likewise.
    PilBicubic,
}

/// The order of the dimensions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Layout {
    /// `[batch, channel, row, column]`.
    Nchw,
    /// `[batch, row, column, channel]`.
    Nhwc,
}

/// The order of the channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Channels {
    /// Red first.
    Rgb,
    /// Blue first, as OpenCV and Caffe have it.
    Bgr,
}

/// What white is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Range {
    /// 1.
    Unit,
    /// 255.
    Bytes,
}

impl Picture {
    pub(super) fn check(&self) -> Result<(), String> {
        let (height, width) = self.size();
        if !(1..=4096).contains(&height) || !(1..=4096).contains(&width) {
            return Err(format!("the picture is {width}x{height}; give sides of 1 to 4096"));
        }
        let Self::Plain(plain) = self else { return Ok(()) };
        if let Fit::Crop { short } = plain.fit
            && !(height.max(width)..=8192).contains(&short)
        {
            return Err(format!("short is {short}; give {} to 8192, since so much is kept", height.max(width)));
        }
        let usable = |(&mean, &std): (&f32, &f32)| mean.is_finite() && std.is_finite() && std > 0.0;
        match plain.mean.iter().zip(&plain.std).all(usable) {
            true => Ok(()),
            false => {
                Err(format!("mean is {:?} and std {:?}; give a finite mean and a std above 0", plain.mean, plain.std))
            }
        }
    }

    fn size(&self) -> (usize, usize) {
        match self {
            Self::Named { size, .. } => (*size, *size),
            Self::Plain(plain) => (plain.height, plain.width),
        }
    }

    /// How many numbers one picture has.
    pub(super) fn n_values(&self) -> usize {
        let (height, width) = self.size();
        3 * height * width
    }

    /// The shape of one picture.
    pub(super) fn shape(&self) -> [usize; 3] {
        let (height, width) = self.size();
        match self {
            Self::Plain(PlainPicture { layout: Layout::Nhwc, .. }) => [height, width, 3],
            _ => [3, height, width],
        }
    }

    /// The shape a graph must declare.
    pub(super) fn dims(&self) -> [Dim; 4] {
        let [first, second, third] = self.shape().map(Dim::Is);
        [Dim::Free, first, second, third]
    }

    /// Appends the picture in [`Picture::shape`].
    pub(super) fn append(&self, image: &RgbImage, pixels: &mut Vec<f32>) -> Result<()> {
        check_picture(image)?;
        match self {
            Self::Named { preprocess, size } => preprocess.append(image, *size, pixels),
            Self::Plain(plain) => {
                plain.append(image, pixels);
                Ok(())
            }
        }
    }
}

impl PlainPicture {
    fn append(&self, image: &RgbImage, pixels: &mut Vec<f32>) {
        let resized = self.resized(image);
        let order = match self.channels {
            Channels::Rgb => [0, 1, 2],
            Channels::Bgr => [2, 1, 0],
        };
        let white = match self.range {
            Range::Unit => 1.0,
            Range::Bytes => 255.0,
        };
        let value = |at: usize, channel: usize| {
            (resized[at * 3 + order[channel]] * white - self.mean[channel]) / self.std[channel]
        };
        let n_pixels = self.height * self.width;
        match self.layout {
            Layout::Nchw => (0..3).for_each(|channel| pixels.extend((0..n_pixels).map(|at| value(at, channel)))),
            Layout::Nhwc => (0..n_pixels).for_each(|at| pixels.extend((0..3).map(|channel| value(at, channel)))),
        }
    }

    /// `[height, width, 3]`, white at 1.
    fn resized(&self, image: &RgbImage) -> Vec<f32> {
        let (width, height) = image.dimensions();
        match self.fit {
            Fit::Stretch => {
                window(image, [Axis::whole(width, self.width), Axis::whole(height, self.height)], self.filter)
            }
            Fit::Crop { short } => {
                let source = width.min(height);
                let columns = Axis::cropped(width, source, short, self.width);
                window(image, [columns, Axis::cropped(height, source, short, self.height)], self.filter)
            }
            Fit::Letterbox { fill } => self.letterboxed(image, fill),
        }
    }

    fn letterboxed(&self, image: &RgbImage, fill: u8) -> Vec<f32> {
        let [width, height] = [image.width(), image.height()].map(f64::from);
        let scale = (self.width as f64 / width).min(self.height as f64 / height);
        let side = |side: f64, limit| ((side * scale).round_ties_even() as usize).clamp(1, limit);
        let (columns, rows) = (side(width, self.width), side(height, self.height));
        let axes = [Axis::whole(image.width(), columns), Axis::whole(image.height(), rows)];
        let inner = window(image, axes, self.filter);
        let (left, top) = ((self.width - columns) / 2, (self.height - rows) / 2);
        let mut whole = vec![f32::from(fill) / 255.0; self.height * self.width * 3];
        for (row, line) in inner.chunks_exact(columns * 3).enumerate() {
            let start = ((top + row) * self.width + left) * 3;
            whole[start..start + line.len()].copy_from_slice(line);
        }
        whole
    }
}

fn window(image: &RgbImage, axes: [Axis; 2], filter: Resampling) -> Vec<f32> {
    let filter = match filter {
        Resampling::Bilinear => return float_window(image, axes, Filter::Bilinear),
        Resampling::Bicubic => return float_window(image, axes, Filter::Bicubic),
        Resampling::PilBilinear => Filter::BilinearAntialias,
        Resampling::PilBicubic => Filter::BicubicAntialias,
    };
    let bytes = pillow_window(image, axes, filter, PassOrder::Pillow12);
    bytes.into_iter().map(|byte| f32::from(byte) / 255.0).collect()
}
