//! Maps of what happens where in an image: one number a visual token, as a picture with its scale.

use image::{Rgb, RgbImage};

use crate::panel::{INK, LINE, PAPER, write};

/// The longer side of the map, in pixels, where its cells are not smaller than one.
const SIDE: u32 = 256;
const GAP: u32 = 4;
/// Dark to bright, even in lightness (five colours along matplotlib's viridis).
const RAMP: [[f32; 3]; 5] =
    [[68.0, 1.0, 84.0], [59.0, 82.0, 139.0], [33.0, 145.0, 140.0], [94.0, 201.0, 98.0], [253.0, 231.0, 37.0]];

/// `values` in raster order over a grid of rows and columns, under a line that names them and their range.
///
/// `None` where they are not one for each cell, or one is not finite.
pub fn heat_map(title: &str, values: &[f32], (rows, columns): (usize, usize)) -> Option<RgbImage> {
    if values.is_empty() || values.len() != rows * columns || values.iter().any(|value| !value.is_finite()) {
        return None;
    }
    let low = values.iter().copied().fold(f32::INFINITY, f32::min);
    let high = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let cell = (SIDE / rows.max(columns) as u32).max(1);
    let (width, height) = (columns as u32 * cell, rows as u32 * cell);
    let top = LINE + GAP;
    let mut canvas = RgbImage::from_pixel(width.max(SIDE), top + height, PAPER);
    write(&mut canvas, 0, 1, &format!("{title} {low:.3} to {high:.3}"), INK);
    for (x, y) in (0..height).flat_map(|y| (0..width).map(move |x| (x, y))) {
        let value = values[(y / cell) as usize * columns + (x / cell) as usize];
        let share = if high > low { (value - low) / (high - low) } else { 0.5 };
        canvas.put_pixel(x, top + y, colour(share));
    }
    Some(canvas)
}

fn colour(share: f32) -> Rgb<u8> {
    let place = share.clamp(0.0, 1.0) * (RAMP.len() - 1) as f32;
    let stop = (place as usize).min(RAMP.len() - 2);
    let part = place - stop as f32;
    let mix = |channel: usize| (RAMP[stop][channel] * (1.0 - part) + RAMP[stop + 1][channel] * part).round() as u8;
    Rgb([mix(0), mix(1), mix(2)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_keep_raster_order_and_the_range_the_ends_of_the_ramp() {
        let map = heat_map("entropy", &[0.0, 1.0, 2.0, 4.0, 3.0, 2.0], (2, 3)).unwrap();
        let cell = SIDE / 3;
        let at = |row: u32, column: u32| map.get_pixel(column * cell + 1, LINE + GAP + row * cell + 1);
        assert_eq!(at(0, 0), &Rgb([68, 1, 84]));
        assert_eq!(at(1, 0), &Rgb([253, 231, 37]));
        assert_eq!((at(0, 2), at(1, 2)), (&Rgb([33, 145, 140]), &Rgb([33, 145, 140])));
    }

    #[test]
    fn what_is_no_map_is_none() {
        assert!(heat_map("x", &[1.0], (2, 2)).is_none());
        assert!(heat_map("x", &[f32::NAN], (1, 1)).is_none());
        assert!(heat_map("x", &[2.0; 4], (2, 2)).is_some(), "a flat map is no division by zero");
    }
}
