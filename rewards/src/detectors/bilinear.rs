//! Bilinear resizing in the three arithmetics that the detectors were published with.

use image::RgbImage;

/// The two source places of a target place on one axis, and the weight of the second.
struct Tap {
    places: [usize; 2],
    weight: f32,
}

impl Tap {
    fn new(position: f32, source: usize) -> Self {
        let low = (position.max(0.0) as usize).min(source - 1);
        Self { places: [low, (low + 1).min(source - 1)], weight: (position.max(0.0) - low as f32).min(1.0) }
    }

    fn mix(&self, of: impl Fn(usize) -> f32) -> f32 {
        let [low, high] = self.places;
        (1.0 - self.weight) * of(low) + self.weight * of(high)
    }
}

/// Torch's `interpolate(mode="bilinear", align_corners=False)` of one plane, `[height, width]`.
pub(super) fn plane(source: &[f32], [height, width]: [usize; 2], [to_height, to_width]: [usize; 2]) -> Vec<f32> {
    let taps = |source: usize, target: usize| -> Vec<Tap> {
        let scale = source as f32 / target as f32;
        (0..target).map(|at| Tap::new((at as f32 + 0.5) * scale - 0.5, source)).collect()
    };
    let (rows, columns) = (taps(height, to_height), taps(width, to_width));
    let mut target = Vec::with_capacity(to_height * to_width);
    for row in &rows {
        target.extend(columns.iter().map(|column| row.mix(|y| column.mix(|x| source[y * width + x]))));
    }
    target
}

/// TensorFlow's `resize_bilinear` without half-pixel centres, to `[3, side, side]` in `[0, 255]`.
pub(super) fn tensorflow(image: &RgbImage, side: usize) -> Vec<f32> {
    let (width, height) = (image.width() as usize, image.height() as usize);
    let taps = |source: usize| -> Vec<Tap> {
        let scale = source as f32 / side as f32;
        (0..side).map(|at| Tap::new(at as f32 * scale, source)).collect()
    };
    let (rows, columns, bytes) = (taps(height), taps(width), image.as_raw());
    let mut target = Vec::with_capacity(3 * side * side);
    for channel in 0..3 {
        let byte = |x: usize, y: usize| f32::from(bytes[(y * width + x) * 3 + channel]);
        for row in &rows {
            target.extend(columns.iter().map(|column| row.mix(|y| column.mix(|x| byte(x, y)))));
        }
    }
    target
}

/// Bits after the binary point of OpenCV's integer weights.
const PRECISION: i32 = 11;

/// OpenCV's `resize` with `INTER_LINEAR` on bytes, which mmcv resizes with.
pub(super) fn opencv(image: &RgbImage, [to_height, to_width]: [usize; 2]) -> RgbImage {
    let (width, height) = (image.width() as usize, image.height() as usize);
    if (width, height) == (to_width, to_height) {
        return image.clone();
    }
    let (columns, rows) = (FixedTap::columns(width, to_width), FixedTap::rows(height, to_height));
    let bytes = image.as_raw();
    let line = |y: usize| -> Vec<i32> {
        let byte = |x: usize, channel: usize| i32::from(bytes[(y * width + x) * 3 + channel]);
        let pixel = |tap: &FixedTap| {
            [0, 1, 2].map(|c| byte(tap.places[0], c) * tap.weights[0] + byte(tap.places[1], c) * tap.weights[1])
        };
        columns.iter().flat_map(pixel).collect()
    };
    let mut target = Vec::with_capacity(to_height * to_width * 3);
    for FixedTap { places, weights } in rows {
        let [low, high] = places.map(line);
        // The shifts in this order are OpenCV's, and so is the rounding that they make.
        let mix = |(&low, &high): (&i32, &i32)| {
            let sum = ((weights[0] * (low >> 4)) >> 16) + ((weights[1] * (high >> 4)) >> 16);
            ((sum + 2) >> 2).clamp(0, 255) as u8
        };
        target.extend(low.iter().zip(&high).map(mix));
    }
    RgbImage::from_raw(to_width as u32, to_height as u32, target).unwrap_or_default()
}

struct FixedTap {
    places: [usize; 2],
    weights: [i32; 2],
}

impl FixedTap {
    /// Beyond the border the last column has all the weight.
    fn columns(source: usize, target: usize) -> Vec<Self> {
        let clamped = |(floor, weight): (i64, f32)| match floor {
            ..0 => Self::new([0, 0], 0.0),
            floor if floor >= source as i64 - 1 => Self::new([source - 1; 2], 0.0),
            floor => Self::new([floor as usize, floor as usize + 1], weight),
        };
        positions(source, target).map(clamped).collect()
    }

    /// Beyond the border the last row is read twice, and both products are cut to whole numbers.
    fn rows(source: usize, target: usize) -> Vec<Self> {
        let within = |row: i64| row.clamp(0, source as i64 - 1) as usize;
        positions(source, target).map(|(floor, weight)| Self::new([within(floor), within(floor + 1)], weight)).collect()
    }

    fn new(places: [usize; 2], weight: f32) -> Self {
        let unit = (1 << PRECISION) as f32;
        Self { places, weights: [1.0 - weight, weight].map(|weight| (weight * unit).round_ties_even() as i32) }
    }
}

/// The source place before each target place, and how far behind it the target lies.
fn positions(source: usize, target: usize) -> impl Iterator<Item = (i64, f32)> {
    let scale = source as f64 / target as f64;
    (0..target).map(move |at| {
        let position = ((at as f64 + 0.5) * scale - 0.5) as f32;
        (position.floor() as i64, position - position.floor())
    })
}

#[cfg(test)]
mod tests {
    use image::Rgb;
    use serde::Deserialize;

    use super::*;

    #[derive(Deserialize)]
    struct Golden {
        pictures: Vec<Picture>,
    }

    #[derive(Deserialize)]
    struct Picture {
        size: [u32; 2],
        sums: [f64; 3],
        /// Every 4999th value, channels last.
        values: Vec<f32>,
    }

    #[test]
    fn pictures_reach_centernet_as_tensorflow_js_brings_them() {
        const SIDE: usize = 512;
        let golden: Golden = serde_json::from_str(include_str!("../../tests/golden/centernet_input.json")).unwrap();
        assert_eq!(golden.pictures.len(), 3);
        for Picture { size: [height, width], sums, values } in golden.pictures {
            let value =
                |x: u32, y: u32, c: u32| ((x * x + 3 * x * y / 7 + 11 * y + 85 * c + (x * y) % 251) % 256) as u8;
            let image = RgbImage::from_fn(width, height, |x, y| Rgb([0, 1, 2].map(|c| value(x, y, c))));
            let resized = tensorflow(&image, SIDE);
            for (plane, sum) in resized.chunks(SIDE * SIDE).zip(sums) {
                let total: f64 = plane.iter().map(|&value| f64::from(value)).sum();
                assert!((total - sum).abs() < 1e-6 * sum, "{width} x {height}: {total} is not {sum}");
            }
            for (at, expected) in (0..).step_by(4999).zip(values) {
                let found = resized[at % 3 * SIDE * SIDE + at / 3];
                assert!((found - expected).abs() < 1e-3, "{width} x {height}, value {at}: {found} is not {expected}");
            }
        }
    }
}
