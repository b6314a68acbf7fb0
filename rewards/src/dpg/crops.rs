//! A file's pictures, cut from their grid.

use grpo::{Error, Result};
use image::RgbImage;
use image::imageops::{crop_imm, replace};

use super::questions::Mode;

/// The grid's columns.
const COLUMNS: u32 = 2;

/// The first `n` pictures of side `side`, row by row.
///
/// As published, cuts lie at multiples of `side`, and what they reach beyond the file is black. Fixed, the border that
/// is left over of the file's size (`columns * side` and one more border than columns) is stepped over.
pub(super) fn crops(image: &RgbImage, n: usize, side: u32, mode: Mode) -> Result<Vec<RgbImage>> {
    let border = match mode {
        Mode::Official => 0,
        Mode::Fixed => border(image, n, side)?,
    };
    let origin = |at: u32| border + at * (side + border);
    let cut = |index: u32| cut(image, origin(index % COLUMNS), origin(index / COLUMNS), side);
    Ok((0..n as u32).map(cut).collect())
}

fn cut(image: &RgbImage, x: u32, y: u32, side: u32) -> RgbImage {
    let mut picture = RgbImage::new(side, side);
    // The view ends where the file does.
    replace(&mut picture, &crop_imm(image, x, y, side, side).to_image(), 0, 0);
    picture
}

fn border(image: &RgbImage, n: usize, side: u32) -> Result<u32> {
    let (width, height) = image.dimensions();
    if n == 1 && (width, height) == (side, side) {
        return Ok(0);
    }
    let columns = if n == 1 { 1 } else { COLUMNS };
    let rows = (n as u32).div_ceil(COLUMNS);
    let border = width.saturating_sub(columns * side) / (columns + 1);
    let whole = |count: u32| count * side + (count + 1) * border;
    match (whole(columns), whole(rows)) == (width, height) {
        true => Ok(border),
        false => Err(Error::config(format!(
            "the image has {width}x{height} pixels, which is no grid of {n} pictures of side {side}; \
             give the side of one picture as the resolution"
        ))),
    }
}
