//! Scenes as pixels, anti-aliased by the share of each pixel that an outline covers.

use image::{Rgb, RgbImage};

use super::geometry::Outline;
use super::scene::{Object, Scene};

/// The side of the miniature's pictures, in pixels.
pub const DEFAULT_SIDE: u32 = 64;

/// The grey that scenes are drawn on; every colour of the palette is more than 100 levels away.
pub const BACKGROUND: [u8; 3] = [150, 150, 150];

/// Draws a scene on a square of `side` pixels; later objects cover earlier ones.
///
/// Coverage is taken from the distance of the pixel's centre to the edge, exact for a straight edge along an
/// axis and within a few percent elsewhere.
pub fn render(scene: &Scene, side: u32) -> RgbImage {
    let mut image = RgbImage::from_pixel(side, side, Rgb(BACKGROUND));
    for object in &scene.objects {
        draw(object, &mut image);
    }
    image
}

fn draw(object: &Object, image: &mut RgbImage) {
    let side = image.width() as f32;
    let (x, y, radius) = (object.x * side, object.y * side, object.radius * side);
    if !(x.is_finite() && y.is_finite() && radius.is_finite() && radius > 0.0) {
        return;
    }
    let outline = Outline::of(object.class);
    // Conversion to an integer clamps, so an object beyond the frame draws what is inside it.
    let range = |center: f32| {
        let first = (center - radius - 1.0).max(0.0) as u32;
        let end = ((center + radius + 2.0).max(0.0) as u32).min(image.width());
        first..end
    };
    let (columns, rows) = (range(x), range(y));
    for row in rows {
        for column in columns.clone() {
            let (u, v) = ((column as f32 + 0.5 - x) / radius, (row as f32 + 0.5 - y) / radius);
            let coverage = (0.5 - outline.distance(u, v) * radius).clamp(0.0, 1.0);
            let pixel = &mut image.get_pixel_mut(column, row).0;
            for (level, paint) in pixel.iter_mut().zip(object.color.rgb()) {
                let mixed = f32::from(*level) + coverage * (f32::from(paint) - f32::from(*level));
                *level = mixed.round() as u8;
            }
        }
    }
}
