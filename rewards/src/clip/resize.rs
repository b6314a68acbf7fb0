//! Bicubic resizing to a centred square, in the three arithmetics that published scores were computed with.
//!
//! Only the pixels that survive the crop are computed: the passes are separable, so the result is the same and a very
//! long image costs no more memory than its own width or height.
//!
//! Sources: Pillow's `Resample.c` (versions up to 12: the horizontal pass always comes first; Pillow 13 swaps the
//! passes for tall images that shrink) and torchvision's `resize` on tensors, with and without antialiasing.

use image::RgbImage;

/// Bits after the binary point of Pillow's integer weights.
const PRECISION: u32 = 32 - 8 - 2;

/// Keys' cubic with Pillow's sharpness, which antialiased resizing uses.
const PILLOW_SHARPNESS: f64 = -0.5;
/// Keys' cubic with the sharpness of torch's plain bicubic interpolation.
const TORCH_SHARPNESS: f64 = -0.75;

/// A channel of a pixel, and how a weighted mean of several is formed.
trait Value: Copy {
    /// A weight in the arithmetic of this kind.
    type Weight: Copy;

    fn weight(exact: f64) -> Self::Weight;

    fn mean(weighted: impl Iterator<Item = (Self, Self::Weight)>) -> Self;
}

/// Pillow's fixed-point arithmetic: a sum is rounded and clamped to a byte.
impl Value for u8 {
    type Weight = i32;

    fn weight(exact: f64) -> i32 {
        let scaled = exact * f64::from(1u32 << PRECISION);
        // The cast cuts towards zero, so a half away from zero rounds.
        (if exact < 0.0 { scaled - 0.5 } else { scaled + 0.5 }) as i32
    }

    fn mean(weighted: impl Iterator<Item = (u8, i32)>) -> u8 {
        let half = 1i32 << (PRECISION - 1);
        let sum = weighted.fold(half, |sum, (value, weight)| sum.wrapping_add(i32::from(value) * weight));
        (sum >> PRECISION).clamp(0, 255) as u8
    }
}

/// Torch's float arithmetic: nothing is rounded or clamped.
impl Value for f32 {
    type Weight = f32;

    fn weight(exact: f64) -> f32 {
        exact as f32
    }

    fn mean(weighted: impl Iterator<Item = (f32, f32)>) -> f32 {
        weighted.map(|(value, weight)| value * weight).sum()
    }
}

/// Which source pixels make one output pixel, and their weights.
struct Taps<W>(Vec<(usize, W)>);

/// How one axis is resampled.
#[derive(Clone, Copy)]
pub(super) enum Filter {
    /// The kernel widens when shrinking, and is cut and renormalised at the border.
    Antialias,
    /// Four taps whatever the scale; taps beyond the border read its last pixel.
    FourTaps,
}

/// One axis of the way from the source to the cropped square.
struct Axis {
    source: usize,
    resized: usize,
    crop_start: usize,
    cropped: usize,
}

impl Axis {
    /// The short edge becomes `size`, the long one `floor(size * long / short)`, and the middle is kept.
    fn new(source: usize, short: usize, size: usize) -> Self {
        let resized = (size as u128 * source as u128 / short as u128) as usize;
        // Python's `round` takes halves to even, and so do the peers' crops.
        let crop_start = ((resized - size) as f64 / 2.0).round_ties_even() as usize;
        Self { source, resized, crop_start, cropped: size }
    }

    fn taps<V: Value>(&self, filter: Filter) -> Vec<Taps<V::Weight>> {
        let scale = self.source as f64 / self.resized as f64;
        let kept = self.crop_start..self.crop_start + self.cropped;
        let exact = |pixel| match filter {
            Filter::Antialias => antialias_taps(pixel, scale, self.source),
            Filter::FourTaps => four_taps(pixel, scale, self.source),
        };
        kept.map(|pixel| Taps(exact(pixel).0.into_iter().map(|(at, weight)| (at, V::weight(weight))).collect()))
            .collect()
    }
}

fn cubic(x: f64, sharpness: f64) -> f64 {
    let x = x.abs();
    if x < 1.0 {
        ((sharpness + 2.0) * x - (sharpness + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * sharpness
    } else {
        0.0
    }
}

fn antialias_taps(pixel: usize, scale: f64, source: usize) -> Taps<f64> {
    let stretch = scale.max(1.0);
    let centre = (pixel as f64 + 0.5) * scale;
    let first = (centre - 2.0 * stretch + 0.5).max(0.0) as usize;
    let end = ((centre + 2.0 * stretch + 0.5) as usize).min(source);
    // Pillow multiplies by the reciprocal; dividing would round differently in the last bit.
    let shrink = 1.0 / stretch;
    let weight = |x: usize| cubic((x as f64 - centre + 0.5) * shrink, PILLOW_SHARPNESS);
    let sum: f64 = (first..end).map(weight).sum();
    Taps((first..end).map(|x| (x, if sum == 0.0 { weight(x) } else { weight(x) / sum })).collect())
}

fn four_taps(pixel: usize, scale: f64, source: usize) -> Taps<f64> {
    // torch computes the position in f32; f64 would put some pixels on the other side of a boundary.
    let position = scale as f32 * (pixel as f32 + 0.5) - 0.5;
    let floor = position.floor();
    let offset = f64::from(position - floor);
    let last = source as i64 - 1;
    let tap = |k: i64| {
        let x = (floor as i64 + k).clamp(0, last) as usize;
        (x, cubic(k as f64 - offset, TORCH_SHARPNESS))
    };
    Taps((-1..=2).map(tap).collect())
}

/// Resized and cropped as Pillow does on bytes: `[size, size, 3]`, rounded and clamped after each pass.
pub(super) fn pillow(image: &RgbImage, size: usize) -> Vec<u8> {
    resize(image.as_raw(), axes(image, size), Filter::Antialias)
}

/// Resized and cropped as torchvision does on float tensors in `[0, 1]`: `[size, size, 3]`, never clamped.
pub(super) fn tensor(image: &RgbImage, size: usize, filter: Filter) -> Vec<f32> {
    let floats: Vec<f32> = image.as_raw().iter().map(|&byte| f32::from(byte) / 255.0).collect();
    resize(&floats, axes(image, size), filter)
}

fn axes(image: &RgbImage, size: usize) -> [Axis; 2] {
    let (width, height) = (image.width() as usize, image.height() as usize);
    let short = width.min(height);
    [Axis::new(width, short, size), Axis::new(height, short, size)]
}

/// Both passes over interleaved RGB, the horizontal one first.
fn resize<V: Value>(source: &[V], [columns, rows]: [Axis; 2], filter: Filter) -> Vec<V> {
    let mut narrow = Vec::with_capacity(columns.cropped * rows.source * 3);
    let column_taps = columns.taps::<V>(filter);
    for line in source.chunks_exact(columns.source * 3) {
        for taps in &column_taps {
            narrow.extend(
                (0..3).map(|channel| V::mean(taps.0.iter().map(|&(x, weight)| (line[x * 3 + channel], weight)))),
            );
        }
    }
    let width = columns.cropped * 3;
    let mut square = Vec::with_capacity(rows.cropped * width);
    for taps in rows.taps::<V>(filter) {
        square.extend((0..width).map(|at| V::mean(taps.0.iter().map(|&(y, weight)| (narrow[y * width + at], weight)))));
    }
    square
}
