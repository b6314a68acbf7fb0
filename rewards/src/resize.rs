//! Resizing in the arithmetics that published scores were computed with: Pillow's on bytes, torch's on floats.
//!
//! No crate is bit-exact with Pillow: the order of the passes and the 8-bit picture between them matter as much as the
//! kernel. Only the pixels that survive a crop are computed: the passes are separable, so the result is the same and a
//! very long image costs no more memory than its own width or height.
//!
//! Sources: Pillow's `Resample.c` (12.0 and 13.0) and torch's `interpolate`, with and without antialiasing.

use image::RgbImage;

/// Bits after the binary point of Pillow's integer weights.
const PRECISION: u32 = 32 - 8 - 2;

/// Keys' cubic with Pillow's sharpness, which antialiased resizing uses.
const PILLOW_SHARPNESS: f64 = -0.5;
/// Keys' cubic with the sharpness of torch's plain bicubic interpolation.
const TORCH_SHARPNESS: f64 = -0.75;

/// Whose order of the two passes; bytes are rounded between them, so it shows in the picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PassOrder {
    /// Rows first, always: Pillow up to 12.
    Pillow12,
    /// Columns first where the height shrinks by more than twice what the width does: Pillow from 13.
    Pillow13,
}

/// `image` at `width` by `height`, bit for bit as Pillow's `Image.resize((width, height), BICUBIC)` makes it.
///
/// ```
/// use grpo_rewards::resize::{PassOrder, pillow_bicubic};
///
/// let grey = image::RgbImage::from_pixel(640, 480, image::Rgb([150; 3]));
/// let small = pillow_bicubic(&grey, 224, 224, PassOrder::Pillow12);
/// assert!(small.dimensions() == (224, 224) && small.pixels().all(|pixel| pixel.0 == [150; 3]));
/// ```
///
/// Pillow refuses empty pictures; here an empty source is resized to black.
pub fn pillow_bicubic(image: &RgbImage, width: u32, height: u32, order: PassOrder) -> RgbImage {
    if image.is_empty() {
        return RgbImage::new(width, height);
    }
    let axes = [Axis::whole(image.width(), width as usize), Axis::whole(image.height(), height as usize)];
    let bytes = pillow_window(image, axes, Filter::BicubicAntialias, order);
    // The passes make as many bytes as the picture has, so the black one is never taken.
    RgbImage::from_raw(width, height, bytes).unwrap_or_else(|| RgbImage::new(width, height))
}

/// The window that `[columns, rows]` describe of the picture resized as Pillow does, with one of the antialiasing filters,
/// `[rows, columns, 3]`; every side is at least 1.
pub(crate) fn pillow_window(image: &RgbImage, [columns, rows]: [Axis; 2], filter: Filter, order: PassOrder) -> Vec<u8> {
    let loss = |axis: &Axis| axis.source as i128 - axis.resized as i128;
    let columns_first = order == PassOrder::Pillow13 && loss(&rows) > 0 && loss(&rows) > 2 * loss(&columns);
    if columns_first {
        let low = down(image.as_raw(), columns.source, &rows, filter);
        across(&low, &columns, filter)
    } else {
        let narrow = across(image.as_raw(), &columns, filter);
        down(&narrow, columns.kept, &rows, filter)
    }
}

/// The window that `[columns, rows]` describe of the picture resized as torch does a tensor in `[0, 1]`,
/// `[rows, columns, 3]`; nothing is rounded or clamped, and every side is at least 1.
pub(crate) fn float_window(image: &RgbImage, [columns, rows]: [Axis; 2], filter: Filter) -> Vec<f32> {
    let floats: Vec<f32> = image.as_raw().iter().map(|&byte| f32::from(byte) / 255.0).collect();
    let narrow = across(&floats, &columns, filter);
    down(&narrow, columns.kept, &rows, filter)
}

/// How one axis is resampled.
#[derive(Clone, Copy)]
pub(crate) enum Filter {
    /// The kernel widens when shrinking, and is cut and renormalised at the border.
    BicubicAntialias,
    /// As [`Filter::BicubicAntialias`], with the triangle for a kernel.
    BilinearAntialias,
    /// Four taps whatever the scale; taps beyond the border read its last pixel.
    Bicubic,
    /// Two taps whatever the scale; taps beyond the border read its last pixel.
    Bilinear,
}

/// One axis of the way from the source to a window of the resized picture.
pub(crate) struct Axis {
    source: usize,
    resized: usize,
    start: usize,
    kept: usize,
}

impl Axis {
    /// Everything is kept.
    pub(crate) fn whole(source: u32, resized: usize) -> Self {
        Self { source: source as usize, resized, start: 0, kept: resized }
    }

    /// The short edge becomes `size`, this one `floor(size * source / short)`, and the middle is kept.
    pub(crate) fn centred(source: u32, short: u32, size: usize) -> Self {
        Self::cropped(source, short, size, size)
    }

    /// As [`Axis::centred`], of which the middle `kept` are kept; at most `size`.
    pub(crate) fn cropped(source: u32, short: u32, size: usize, kept: usize) -> Self {
        let resized = (size as u128 * u128::from(source) / u128::from(short)) as usize;
        // Python's `round` takes halves to even, and so do the peers' crops.
        let start = ((resized - kept) as f64 / 2.0).round_ties_even() as usize;
        Self { source: source as usize, resized, start, kept }
    }

    fn taps<V: Value>(&self, filter: Filter) -> Vec<Taps<V::Weight>> {
        let scale = self.source as f64 / self.resized as f64;
        let exact = |pixel| match filter {
            Filter::BicubicAntialias => antialias_taps(pixel, scale, self.source, 2.0, |x| cubic(x, PILLOW_SHARPNESS)),
            Filter::BilinearAntialias => antialias_taps(pixel, scale, self.source, 1.0, |x| (1.0 - x.abs()).max(0.0)),
            Filter::Bicubic => fixed_taps(pixel, scale, self.source, -1..=2, |x| cubic(x, TORCH_SHARPNESS)),
            Filter::Bilinear => fixed_taps(pixel, scale, self.source, 0..=1, |x| 1.0 - x.abs()),
        };
        let window = self.start..self.start + self.kept;
        window.map(|pixel| exact(pixel).into_iter().map(|(at, weight)| (at, V::weight(weight))).collect()).collect()
    }
}

/// Which source pixels make one output pixel, and their weights.
type Taps<W> = Vec<(usize, W)>;

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

/// The taps of a kernel that reaches `radius` pixels of the smaller picture.
fn antialias_taps(pixel: usize, scale: f64, source: usize, radius: f64, kernel: impl Fn(f64) -> f64) -> Taps<f64> {
    let stretch = scale.max(1.0);
    let centre = (pixel as f64 + 0.5) * scale;
    let first = (centre - radius * stretch + 0.5).max(0.0) as usize;
    let end = ((centre + radius * stretch + 0.5) as usize).min(source);
    // Pillow multiplies by the reciprocal; dividing would round differently in the last bit.
    let shrink = 1.0 / stretch;
    let weight = |x: usize| kernel((x as f64 - centre + 0.5) * shrink);
    let sum: f64 = (first..end).map(weight).sum();
    (first..end).map(|x| (x, if sum == 0.0 { weight(x) } else { weight(x) / sum })).collect()
}

/// The taps at `offsets` from the pixel below the position, weighed by their distance from the position.
fn fixed_taps(
    pixel: usize,
    scale: f64,
    source: usize,
    offsets: std::ops::RangeInclusive<i64>,
    weight: impl Fn(f64) -> f64,
) -> Taps<f64> {
    // torch computes the position in f32; f64 would put some pixels on the other side of a boundary.
    let position = scale as f32 * (pixel as f32 + 0.5) - 0.5;
    let floor = position.floor();
    let last = source as i64 - 1;
    let tap = |offset: i64| {
        let at = (floor as i64 + offset).clamp(0, last) as usize;
        (at, weight(offset as f64 - f64::from(position - floor)))
    };
    offsets.map(tap).collect()
}

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

/// Every row of interleaved RGB resampled to the axis's window.
fn across<V: Value>(source: &[V], axis: &Axis, filter: Filter) -> Vec<V> {
    let taps = axis.taps::<V>(filter);
    let rows = source.chunks_exact(axis.source * 3);
    let mut resized = Vec::with_capacity(rows.len() * axis.kept * 3);
    for row in rows {
        for taps in &taps {
            let mean = |channel| V::mean(taps.iter().map(|&(x, weight)| (row[x * 3 + channel], weight)));
            resized.extend((0..3).map(mean));
        }
    }
    resized
}

/// Every column of interleaved RGB of this width resampled to the axis's window.
fn down<V: Value>(source: &[V], width: usize, axis: &Axis, filter: Filter) -> Vec<V> {
    let width = width * 3;
    let mut resized = Vec::with_capacity(axis.kept * width);
    for taps in axis.taps::<V>(filter) {
        let mean = |at| V::mean(taps.iter().map(|&(y, weight)| (source[y * width + at], weight)));
        resized.extend((0..width).map(mean));
    }
    resized
}
