//! Resizing in the arithmetics that published scores were computed with: Pillow's on bytes, torch's on floats.
//!
//! No crate is bit-exact with Pillow: the order of the passes and the 8-bit picture between them matter as much as the
//! kernel. Only the pixels that survive a crop are computed, from those that they read: the passes are separable, so the
//! result is the same and a very long image costs no more memory than its own width or height.
//!
//! Sources: Pillow's `Resample.c` (12.0 and 13.0) and torch's `interpolate`, with and without antialiasing.

use std::ops::{Range, RangeInclusive};

use image::RgbImage;

use super::passes::{Part, Taps, Value, across, down};

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
/// use grpo::picture::resize::{PassOrder, pillow_bicubic};
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
pub fn pillow_window(image: &RgbImage, axes: [Axis; 2], filter: Filter, order: PassOrder) -> Vec<u8> {
    resampled(&whole(image, image.as_raw()), &axes, filter, order)
}

/// The window that `[columns, rows]` describe of the picture resized as torch does a tensor in `[0, 1]`,
/// `[rows, columns, 3]`; nothing is rounded or clamped, and every side is at least 1.
pub fn float_window(image: &RgbImage, axes: [Axis; 2], filter: Filter) -> Vec<f32> {
    let floats: Vec<f32> = image.as_raw().iter().map(|&byte| f32::from(byte) / 255.0).collect();
    resampled(&whole(image, &floats), &axes, filter, PassOrder::Pillow12)
}

fn whole<'a, V>(image: &RgbImage, values: &'a [V]) -> Part<'a, V> {
    let (width, height) = image.dimensions();
    Part::new(values, 0..width as usize, 0..height as usize)
}

/// The window that `[columns, rows]` describe of a picture of which at least the part is there that it reads.
pub(super) fn resampled<V: Value>(
    part: &Part<'_, V>,
    [columns, rows]: &[Axis; 2],
    filter: Filter,
    order: PassOrder,
) -> Vec<V> {
    let (by_column, by_row) = (columns.taps::<V>(filter), rows.taps::<V>(filter));
    let loss = |axis: &Axis| axis.source as i128 - axis.resized as i128;
    let columns_first = order == PassOrder::Pillow13 && loss(rows) > 0 && loss(rows) > 2 * loss(columns);
    if columns_first {
        let low = down(part, &by_row, by_column.reads());
        across(&Part::new(&low, by_column.reads(), rows.window()), &by_column, rows.window())
    } else {
        let narrow = across(part, &by_column, by_row.reads());
        down(&Part::new(&narrow, columns.window(), by_row.reads()), &by_row, columns.window())
    }
}

/// How one axis is resampled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// The kernel widens when shrinking, and is cut and renormalised at the border.
    BicubicAntialias,
    /// As [`Filter::BicubicAntialias`], with the triangle for a kernel.
    BilinearAntialias,
    /// Pillow's BOX: the plain mean of the pixels whose centres lie within the output pixel.
    BoxAntialias,
    /// Four taps whatever the scale; taps beyond the border read its last pixel.
    Bicubic,
    /// Two taps whatever the scale; taps beyond the border read its last pixel.
    Bilinear,
}

/// One axis of the way from the source to a window of the resized picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Axis {
    pub(super) source: usize,
    pub(super) resized: usize,
    pub(super) start: usize,
    pub(super) kept: usize,
}

impl Axis {
    /// Everything is kept.
    pub fn whole(source: u32, resized: usize) -> Self {
        Self { source: source as usize, resized, start: 0, kept: resized }
    }

    /// The short edge becomes `size`, this one `floor(size * source / short)`, and the middle is kept.
    pub fn centred(source: u32, short: u32, size: usize) -> Self {
        Self::cropped(source, short, size, size)
    }

    /// As [`Axis::centred`], of which the middle `kept` are kept; at most `size`.
    pub fn cropped(source: u32, short: u32, size: usize, kept: usize) -> Self {
        let resized = (size as u128 * u128::from(source) / u128::from(short)) as usize;
        // Python's `round` takes halves to even, and so do the peers' crops.
        let start = ((resized - kept) as f64 / 2.0).round_ties_even() as usize;
        Self { source: source as usize, resized, start, kept }
    }

    /// The pixels of the resized axis that are kept.
    pub(super) fn window(&self) -> Range<usize> {
        self.start..self.start + self.kept
    }

    /// The pixels of the source that the window is made of.
    pub(super) fn reads(&self, filter: Filter) -> Range<usize> {
        self.taps::<u8>(filter).reads()
    }

    fn taps<V: Value>(&self, filter: Filter) -> Taps<V> {
        let scale = self.source as f64 / self.resized as f64;
        let antialias =
            |pixel, radius, kernel: fn(f64) -> f64| antialias_taps(pixel, (scale, self.source), radius, kernel);
        let exact = |pixel| match filter {
            Filter::BicubicAntialias => antialias(pixel, 2.0, |x| cubic(x, PILLOW_SHARPNESS)),
            Filter::BilinearAntialias => antialias(pixel, 1.0, |x| (1.0 - x.abs()).max(0.0)),
            Filter::BoxAntialias => antialias(pixel, 0.5, |x| if x > -0.5 && x <= 0.5 { 1.0 } else { 0.0 }),
            Filter::Bicubic => fixed_taps(pixel, scale, self.source, -1..=2, |x| cubic(x, TORCH_SHARPNESS)),
            Filter::Bilinear => fixed_taps(pixel, scale, self.source, 0..=1, |x| 1.0 - x.abs()),
        };
        Taps::new(self.window().map(exact))
    }
}

/// Which source pixels make one output pixel, and their weights.
type Weights = Vec<(usize, f64)>;

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
fn antialias_taps(pixel: usize, (scale, source): (f64, usize), radius: f64, kernel: fn(f64) -> f64) -> Weights {
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
    offsets: RangeInclusive<i64>,
    weight: impl Fn(f64) -> f64,
) -> Weights {
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
