//! Detections from a file, for detectors that run elsewhere.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use grpo::{BoxError, Error, Result};
use image::RgbImage;
use serde::Deserialize;

use super::found::Found;
use super::judge::Detection;
use super::reward::Detector;

/// What a detector found in many images, read from JSON lines.
///
/// A line holds an image's name from the folder of images and everything that was found in it, with the colour where
/// a classifier has looked at the box, and the `mask` where the detector segments (COCO's `{"size", "counts"}` with counts
/// as a list); an image in which nothing was found has an empty list. Every image has one line.
///
/// ```
/// use grpo_rewards::geneval::RecordedDetections;
///
/// let line = r#"{"image": "00000/samples/0000.png", "detections":
///     [{"class": "bench", "score": 0.93, "bbox": [10.5, 20.0, 300.0, 240.0], "color": "red"}]}"#;
/// let detections = RecordedDetections::parse(&line.replace('\n', ""))?;
/// assert!(detections.of("00000/samples/0000.png").is_ok());
/// assert!(detections.of("00000/samples/0001.png").is_err());
/// # Ok::<(), grpo::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct RecordedDetections {
    source: PathBuf,
    by_image: BTreeMap<String, Vec<Detection>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    image: String,
    detections: Vec<Found>,
}

impl RecordedDetections {
    /// Reads and checks a file.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|error| Error::file(path, error))?;
        Self::parse_from(path, &text)
    }

    /// Reads and checks lines.
    pub fn parse(text: &str) -> Result<Self> {
        Self::parse_from(Path::new("detections"), text)
    }

    fn parse_from(source: &Path, text: &str) -> Result<Self> {
        let mut by_image = BTreeMap::new();
        for (row, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let bad = |message: String| Error::file(source, format!("line {}: {message}", row + 1));
            let line: Line = serde_json::from_str(line).map_err(|error| bad(error.to_string()))?;
            let found: Result<Vec<Detection>, String> = line.detections.into_iter().map(Found::check).collect();
            let found = found.map_err(|message| bad(format!("image `{}`: {message}", line.image)))?;
            if by_image.insert(line.image.clone(), found).is_some() {
                return Err(bad(format!("image `{}` has a line already; give each image one", line.image)));
            }
        }
        Ok(Self { source: source.into(), by_image })
    }

    /// What was found in one image, as a detector of that image.
    pub fn of(&self, image: &str) -> Result<Recorded<'_>> {
        let found = self.by_image.get(image);
        found.map(|found| Recorded(found)).ok_or_else(|| {
            let remedy = "record them, with an empty list where nothing was found";
            Error::file(&self.source, format!("no detections for image `{image}`; {remedy}"))
        })
    }

    /// How many images have a line.
    pub fn len(&self) -> usize {
        self.by_image.len()
    }

    /// Whether no image has one.
    pub fn is_empty(&self) -> bool {
        self.by_image.is_empty()
    }
}

/// One image's recorded detections; the picture it is given is not looked at.
#[derive(Clone, Copy, Debug)]
pub struct Recorded<'a>(&'a [Detection]);

impl Detector for Recorded<'_> {
    fn detect(&self, _image: &RgbImage) -> Result<Vec<Detection>, BoxError> {
        Ok(self.0.to_vec())
    }
}
