//! From boxes to straightened lines of text in reading order.

use image::RgbImage;

use super::detect::{Point, Quad, clockwise, distance};

/// Boxes whose top edges differ by less are on one line of the page.
const SAME_LINE: f32 = 10.0;
/// Boxes that are this much taller than wide hold a line that stands on its end.
const UPRIGHT: f32 = 1.5;

/// A line cut out of a picture: interleaved RGB, bytes as floats.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Line {
    pub(super) pixels: Vec<f32>,
    pub(super) width: usize,
    pub(super) height: usize,
}

/// The boxes in the picture's own pixels, those of some size, from top to bottom and from left to right.
pub(super) fn ordered(quads: Vec<Quad>, scale: Point, image: &RgbImage) -> Vec<Quad> {
    let limits = [image.width() as f32, image.height() as f32];
    let placed = |quad: Quad| {
        let corner = |corner: Point| {
            let placed = |axis: usize| (corner[axis] * scale[axis]).round_ties_even().clamp(0.0, limits[axis]);
            [placed(0).min(limits[0] - 1.0), placed(1).min(limits[1] - 1.0)]
        };
        Quad(clockwise(quad.0.map(corner)))
    };
    let large = |quad: &Quad| {
        let (width, height) = quad.size();
        width.trunc() > 3.0 && height.trunc() > 3.0
    };
    let mut quads: Vec<Quad> = quads.into_iter().map(placed).filter(large).collect();
    quads.sort_by(|a, b| a.0[0][1].total_cmp(&b.0[0][1]).then(a.0[0][0].total_cmp(&b.0[0][0])));
    // Boxes of one line that start at slightly different heights change places until the left one is first.
    for end in 1..quads.len() {
        for at in (1..=end).rev() {
            let ([left, top], [next_left, next_top]) = (quads[at - 1].0[0], quads[at].0[0]);
            if (next_top - top).abs() >= SAME_LINE || next_left >= left {
                break;
            }
            quads.swap(at - 1, at);
        }
    }
    quads
}

/// The picture inside a box, its edges made straight, by bicubic interpolation.
pub(super) fn cut(image: &RgbImage, quad: &Quad) -> Line {
    let [a, b, c, d] = quad.0;
    let width = distance(a, b).max(distance(c, d)) as usize;
    let height = distance(a, d).max(distance(b, c)) as usize;
    let (width, height) = (width.max(1), height.max(1));
    let mut pixels = Vec::with_capacity(width * height * 3);
    for y in 0..height {
        for x in 0..width {
            let (across, down) = (x as f32 / width as f32, y as f32 / height as f32);
            // Whole corners make a box nearly, not quite, a rectangle: its sides are weighed between the corners.
            let on = |axis: usize| {
                let top = a[axis] + across * (b[axis] - a[axis]);
                let bottom = d[axis] + across * (c[axis] - d[axis]);
                top + down * (bottom - top)
            };
            pixels.extend(sampled(image, [on(0), on(1)]));
        }
    }
    let line = Line { pixels, width, height };
    if line.height as f32 >= UPRIGHT * line.width as f32 { line.turned() } else { line }
}

impl Line {
    /// Turned a quarter to the left, so that what ran down runs right.
    fn turned(&self) -> Self {
        let (width, height) = (self.height, self.width);
        let mut pixels = Vec::with_capacity(self.pixels.len());
        for y in 0..height {
            for x in 0..width {
                let start = (x * self.width + self.width - 1 - y) * 3;
                pixels.extend_from_slice(&self.pixels[start..start + 3]);
            }
        }
        Self { pixels, width, height }
    }
}

/// A colour between pixels, by Keys' cubic with OpenCV's sharpness; beyond the border its last pixel goes on.
fn sampled(image: &RgbImage, [x, y]: Point) -> [f32; 3] {
    let weights = |offset: f32| {
        let cubic = |x: f32| match x.abs() {
            x if x < 1.0 => (1.25 * x - 2.25) * x * x + 1.0,
            x if x < 2.0 => -0.75 * (((x - 5.0) * x + 8.0) * x - 4.0),
            _ => 0.0,
        };
        [cubic(offset + 1.0), cubic(offset), cubic(1.0 - offset), cubic(2.0 - offset)]
    };
    let (left, top) = (x.floor(), y.floor());
    let (across, down) = (weights(x - left), weights(y - top));
    let mut color = [0.0; 3];
    for (row, weight_y) in down.into_iter().enumerate() {
        for (column, weight_x) in across.into_iter().enumerate() {
            let near = |start: f32, offset: usize, limit: u32| {
                (start as i64 + offset as i64 - 1).clamp(0, i64::from(limit) - 1) as u32
            };
            let pixel = image.get_pixel(near(left, column, image.width()), near(top, row, image.height()));
            for (sum, value) in color.iter_mut().zip(pixel.0) {
                *sum += weight_x * weight_y * f32::from(value);
            }
        }
    }
    color.map(|value| value.clamp(0.0, 255.0).round())
}
