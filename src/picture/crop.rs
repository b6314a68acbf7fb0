//! The centre crop of guided diffusion's training (ADM; Dhariwal and Nichol, 2021, arXiv 2105.05233), as SimpleAR's
//! `center_crop_arr` has it: halved while that is possible, resized so that the short side fits, cut out of the middle.
//!
//! Deviations:
//! 1. Only the pixels that survive are computed, at every halving; they are the same ones.
//! 2. The target need not be square. Both sides then have to be twice the wanted ones for a halving, and the resize is the
//!    smallest that covers both; for squares that is the original's rule.

use std::borrow::Cow;

use image::RgbImage;

use super::passes::Part;
use super::resize::{Axis, Filter, PassOrder, resampled};

/// The middle of the picture at `width` by `height`, bit for bit as `center_crop_arr` makes it on Pillow 12.
///
/// A smaller picture is enlarged, as the original does, and one of that very size stays as it is.
///
/// ```
/// let photo = image::RgbImage::from_pixel(1365, 1024, image::Rgb([150; 3]));
/// let square = grpo::picture::centre_crop(photo, 512, 512);
/// assert!(square.dimensions() == (512, 512) && square.pixels().all(|pixel| pixel.0 == [150; 3]));
/// ```
///
/// The original fails on empty pictures; here they are cropped to black.
pub fn centre_crop(image: RgbImage, width: u32, height: u32) -> RgbImage {
    if image.dimensions() == (width, height) {
        return image;
    }
    if image.is_empty() || width == 0 || height == 0 {
        return RgbImage::new(width, height);
    }
    let stages = stages([image.width(), image.height()].map(|side| side as usize), [width, height].map(|n| n as usize));
    let [columns, rows] = [image.width(), image.height()].map(|side| 0..side as usize);
    let (mut pixels, mut columns, mut rows) = (Cow::Borrowed(image.as_raw()), columns, rows);
    for (axes, filter) in stages {
        let part = Part::new(&pixels, columns, rows);
        pixels = Cow::Owned(resampled(&part, &axes, filter, PassOrder::Pillow12));
        [columns, rows] = [axes[0].window(), axes[1].window()];
    }
    // The last stage makes as many bytes as the picture has, so the black one is never taken.
    RgbImage::from_raw(width, height, pixels.into_owned()).unwrap_or_else(|| RgbImage::new(width, height))
}

/// What is done to `[columns, rows]`, one after another; each stage's window is what the next one reads.
fn stages(source: [usize; 2], target: [usize; 2]) -> Vec<([Axis; 2], Filter)> {
    let mut sizes = vec![source];
    let mut size = source;
    while size[0] >= 2 * target[0] && size[1] >= 2 * target[1] {
        size = size.map(|side| side / 2);
        sizes.push(size);
    }
    let scale = f64::max(target[0] as f64 / size[0] as f64, target[1] as f64 / size[1] as f64);
    // Python's `round` takes halves to even.
    let resized = size.map(|side| (side as f64 * scale).round_ties_even() as usize);
    let last = [0, 1].map(|axis| Axis {
        source: size[axis],
        resized: resized[axis],
        start: (resized[axis] - target[axis]) / 2,
        kept: target[axis],
    });
    let mut stages = vec![(last, Filter::BicubicAntialias)];
    for halved in sizes.windows(2).rev() {
        let (next, filter) = &stages[stages.len() - 1];
        let reads = next.map(|axis| axis.reads(*filter));
        let axes = [0, 1].map(|axis| Axis {
            source: halved[0][axis],
            resized: halved[1][axis],
            start: reads[axis].start,
            kept: reads[axis].len(),
        });
        stages.push((axes, Filter::BoxAntialias));
    }
    stages.reverse();
    // Pillow passes over a resize to the same size, whose window is then the last halving's.
    if resized == size && stages.len() > 1 {
        stages.pop();
    }
    stages
}
