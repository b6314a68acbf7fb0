//! Finds shapes in pictures that a model made: soft edges, specks and uneven colours included.
//!
//! 1. Each pixel is read as a mix of the background with one colour of the palette; the mix at an anti-aliased
//!    edge then keeps its colour, where the nearest colour would turn the edge of black into brown.
//! 2. Pixels that are mostly colour form connected regions; small ones are specks and dropped.
//! 3. A region is fitted with each class at the place and size that its moments give, refined by small steps.
//!    The best intersection over union names the class and, with the lead over the second, makes the score.
//! 4. A region of several colours is also tried in parts, one for each colour; the better reading counts.

use grpo::BoxError;
use image::RgbImage;

use super::Color;
use super::fit::{Fit, Patch, Templates};
use super::pixels::{Field, leading, regions};
use crate::geneval::{Detection, Detector};

/// Regions smaller than this share of the picture are specks: 16 of 64 x 64 pixels.
const SPECK: f32 = 16.0 / 4096.0;
/// A colour with a smaller share of a region is noise.
const MIN_SHARE: f32 = 0.15;
/// The share of its region at which a colour is beyond doubt, and at which it is worth nothing.
const PURE_SHARE: f32 = 0.8;
const MIXED_SHARE: f32 = 0.4;
/// Overlap with the fitted outline, with the score it gives; linear between.
const CALIBRATION: [(f32, f32); 4] = [(0.4, 0.0), (0.6, 0.3), (0.8, 0.92), (0.92, 1.0)];
/// The lead over the second class at which the class is beyond doubt.
const CLEAR_LEAD: f32 = 0.03;

/// Segments pictures of the shapes world, of any size, and names what it finds with class, colour and score.
///
/// Clean shapes score above 0.9, GenEval's threshold for counting; the score falls with the overlap between
/// the region and the nearest outline. Shapes of one colour that touch are one region.
#[derive(Clone, Debug)]
pub struct ShapesDetector {
    templates: Templates,
}

impl Default for ShapesDetector {
    fn default() -> Self {
        Self::new()
    }
}

/// A region read as one object.
struct Reading {
    detection: Detection,
    area: f32,
}

impl ShapesDetector {
    /// A detector of the six classes in the ten colours.
    pub fn new() -> Self {
        Self { templates: Templates::new() }
    }

    fn read_region(&self, field: &Field, pixels: &[usize]) -> Vec<Reading> {
        let shares = field.color_shares(pixels);
        let whole = self.read(field, pixels, &shares);
        if shares.iter().filter(|&&share| share >= MIN_SHARE).count() < 2 {
            return vec![whole];
        }
        let smoothed = field.smoothed_colors(pixels);
        let mut parts = Vec::new();
        for color in Color::ALL {
            let of_color: Vec<usize> =
                pixels.iter().zip(&smoothed).filter(|&(_, &found)| found == color).map(|(&pixel, _)| pixel).collect();
            for part in regions(field, &of_color).into_iter().filter(|part| !is_speck(field, part)) {
                parts.push(self.read(field, &part, &field.color_shares(&part)));
            }
        }
        let area: f32 = parts.iter().map(|part| part.area).sum();
        let together = parts.iter().map(|part| part.detection.score * part.area).sum::<f32>() / area.max(1.0);
        if together > whole.detection.score { parts } else { vec![whole] }
    }

    fn read(&self, field: &Field, pixels: &[usize], shares: &[f32; 10]) -> Reading {
        let (color, share) = leading(shares);
        let patch = Patch::around(field, pixels);
        let Fit { class, overlap, lead } = self.templates.fit(&patch);
        let purity = ((share - MIXED_SHARE) / (PURE_SHARE - MIXED_SHARE)).clamp(0.0, 1.0);
        let certainty = 0.5 + 0.5 * (lead / CLEAR_LEAD).clamp(0.0, 1.0);
        let score = calibrate(overlap) * purity * certainty;
        let detection = Detection::new(class.name(), score, field.bounds(pixels)).with_color(color.name());
        Reading { detection, area: pixels.len() as f32 }
    }
}

fn is_speck(field: &Field, pixels: &[usize]) -> bool {
    (pixels.len() as f32) < SPECK * field.len() as f32
}

fn calibrate(overlap: f32) -> f32 {
    let [first, .., last] = CALIBRATION;
    if overlap <= first.0 {
        return first.1;
    }
    let step = CALIBRATION.windows(2).find(|step| overlap <= step[1].0);
    step.map_or(last.1, |step| step[0].1 + (step[1].1 - step[0].1) * (overlap - step[0].0) / (step[1].0 - step[0].0))
}

impl Detector for ShapesDetector {
    fn detect(&self, image: &RgbImage) -> Result<Vec<Detection>, BoxError> {
        let field = Field::read(image);
        let found = regions(&field, &field.foreground());
        let objects = found.into_iter().filter(|region| !is_speck(&field, region));
        Ok(objects.flat_map(|region| self.read_region(&field, &region)).map(|reading| reading.detection).collect())
    }
}
