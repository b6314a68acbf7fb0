//! `[scorer.ocr]`.

use serde::{Deserialize, Serialize};

/// Which networks read, and from when on a region counts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OcrScorer {
    /// The detector: `x` f32 `[batch, 3, H, W]` to the probability of text, `[batch, 1, H, W]`.
    pub detector: String,
    /// The recogniser: `x` f32 `[batch, 3, 48, W]` to probabilities of characters, `[batch, T, C]`, blank first.
    pub recogniser: String,
    /// The characters in the order of the classes behind the blank, one a line.
    pub characters: String,
    /// The prompt's column with the text that the picture shall show.
    pub column: String,
    /// Pictures whose short edge is shorter are enlarged to it.
    pub min_side: usize,
    /// The probability from which a pixel belongs to a region.
    pub pixel_threshold: f32,
    /// The mean probability from which a region counts.
    pub box_threshold: f32,
    /// How far a region grows: its area over its perimeter, times this.
    pub unclip_ratio: f32,
    /// The mean probability of its characters from which a line counts.
    pub text_threshold: f32,
}

impl OcrScorer {
    pub(crate) fn check(&self) -> Result<(), String> {
        if !(32..=2048).contains(&self.min_side) {
            return Err(format!("min_side is {}; give 32 to 2048", self.min_side));
        }
        let thresholds = [self.pixel_threshold, self.box_threshold, self.text_threshold];
        if !thresholds.iter().all(|threshold| (0.0..=1.0).contains(threshold)) {
            return Err(format!("the thresholds are {thresholds:?}; give 0 to 1"));
        }
        match (0.0..=10.0).contains(&self.unclip_ratio) {
            true => Ok(()),
            false => Err(format!("unclip_ratio is {}; give 0 to 10", self.unclip_ratio)),
        }
    }
}
