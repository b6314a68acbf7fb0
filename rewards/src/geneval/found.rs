//! A detection as JSON, in files of recorded detections and in the answers of remote detectors.

use serde::Deserialize;

use super::judge::Detection;
use super::mask::Mask;

/// `{"class": "bench", "score": 0.93, "bbox": [10.5, 20, 300, 240]}`, with `color` and `mask` where they are known.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Found {
    class: String,
    score: f32,
    bbox: [f32; 4],
    color: Option<String>,
    mask: Option<Runs>,
}

/// COCO's run lengths, not compressed; see [`Mask::from_runs`].
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Runs {
    /// Rows and columns of the picture.
    size: [usize; 2],
    counts: Vec<usize>,
}

impl Found {
    pub(crate) fn check(self) -> Result<Detection, String> {
        let Self { class, score, bbox, color, mask } = self;
        if !(0.0..=1.0).contains(&score) {
            return Err(format!("score {score} of a {class}; give a number from 0 to 1"));
        }
        if !bbox.iter().all(|corner| corner.is_finite()) || bbox[0] > bbox[2] || bbox[1] > bbox[3] {
            return Err(format!("bbox {bbox:?} of a {class}; give [x0, y0, x1, y1] with x0 <= x1 and y0 <= y1"));
        }
        let mask = mask.map(|Runs { size: [height, width], counts }| Mask::from_runs(width, height, &counts));
        let mask = mask.transpose().map_err(|error| format!("mask of a {class}: {error}"))?;
        Ok(Detection { color, mask, ..Detection::new(class, score, bbox) })
    }
}
