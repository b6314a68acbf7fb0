//! The networks, a picture's reading, and its score.

use std::path::Path;

use grpo::{BoxError, Error, Prompt, Result, Reward};
use image::RgbImage;

use super::detect::{Map, quads};
use super::lines::{cut, ordered};
use super::recognise::{HEIGHT, agreement, decoded, input};
use super::scorer::OcrScorer;
use crate::onnx::{Dim, Element, Folder, Input, Interface, Manifest, Port, Precision, Scorer, Session};
use crate::onnx::{SessionOptions, check_picture};
use grpo::picture::resize::{Axis, Filter, float_window};

/// The detector takes sides that are multiples of this.
const STEP: f32 = 32.0;
/// Pictures with a longer side are reduced to it.
const LARGE: f32 = 2000.0;
/// The longest side that is detected on, where enlarging the short side would make the long one longer.
const MAX_SIDE: f32 = 4096.0;

/// Judges a picture by how much of the prompt's text can be read in it, 0 to 1.
///
/// ```no_run
/// use grpo::{Prompt, Reward};
/// use grpo_rewards::ocr::OcrReward;
///
/// let ocr = OcrReward::load("ocr".as_ref(), &Default::default())?;
/// let prompt = Prompt::new("a shop sign that says OPEN").with("text", "OPEN");
/// let score = ocr.score(&prompt, &image::RgbImage::new(256, 256)).unwrap();
/// assert_eq!(score, 0.0);
/// # Ok::<(), grpo::Error>(())
/// ```
#[derive(Debug)]
pub struct OcrReward {
    manifest: Manifest,
    scorer: OcrScorer,
    detector: Session,
    recogniser: Session,
    characters: Vec<String>,
}

/// One line that was read.
#[derive(Clone, Debug, PartialEq)]
pub struct Reading {
    /// The line.
    pub text: String,
    /// The mean probability of its characters.
    pub probability: f32,
}

impl OcrReward {
    /// Loads a folder with `[scorer.ocr]`, as `rewards/export/fetch_ocr.py` makes it.
    pub fn load(folder: &Path, options: &SessionOptions) -> Result<Self> {
        Self::from_folder(&Folder::open(folder)?, options)
    }

    /// The networks of an opened folder.
    pub fn from_folder(folder: &Folder, options: &SessionOptions) -> Result<Self> {
        let manifest = folder.manifest().clone();
        let Scorer::Ocr(scorer) = manifest.scorer.clone() else {
            return Err(folder.fault("it holds no [scorer.ocr]; load it as OnnxReward"));
        };
        let source = folder.path_of(&scorer.characters);
        let bytes = folder.read(&scorer.characters)?;
        let text = std::str::from_utf8(&bytes).map_err(|error| Error::file(&source, error))?;
        // A line may be a blank, so nothing is trimmed.
        let characters: Vec<String> = text.lines().map(str::to_string).collect();
        if characters.is_empty() {
            return Err(Error::file(&source, "it holds no character; give one a line, in the order of the classes"));
        }
        let session = |file: &str, given: &[Dim], made: &[Dim]| {
            let port = |name, dims| Port { name, element: Element::F32, shape: Some(dims) };
            let interface = Interface {
                inputs: &[port("x", given)],
                outputs: &[port("probabilities", made)],
                precision: Precision::Fp32,
            };
            folder.session(file, &interface, options)
        };
        let channels = Dim::Is(3);
        let map = [Dim::Free, Dim::Is(1), Dim::Free, Dim::Free];
        let detector = session(&scorer.detector, &[Dim::Free, channels, Dim::Free, Dim::Free], &map)?;
        let steps = [Dim::Free, Dim::Free, Dim::Is(characters.len() + 1)];
        let recogniser = session(&scorer.recogniser, &[Dim::Free, channels, Dim::Is(HEIGHT), Dim::Free], &steps)?;
        Ok(Self { manifest, scorer, detector, recogniser, characters })
    }

    /// What the folder's `reward.toml` says.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// What can be read in a picture, from top to bottom and from left to right.
    pub fn read(&self, image: &RgbImage) -> Result<Vec<Reading>> {
        check_picture(image)?;
        let (pixels, width, height) = self.detector_input(image);
        let output = self.detector.run_one(Input::F32(&pixels, &[1, 3, height, width]))?;
        if output.values.len() != width * height {
            let expected = vec![1, 1, height, width];
            return Err(Error::Shape { what: "the detector's map", got: output.shape, expected });
        }
        output.check_finite("the text detector's map")?;
        let quads = quads(&Map { values: &output.values, width }, &self.scorer);
        let scale = [image.width() as f32 / width as f32, image.height() as f32 / height as f32];
        let mut readings = Vec::new();
        for quad in ordered(quads, scale, image) {
            let (pixels, width) = input(&cut(image, &quad));
            let output = self.recogniser.run_one(Input::F32(&pixels, &[1, 3, HEIGHT, width]))?;
            let n_classes = self.characters.len() + 1;
            if !matches!(output.shape[..], [1, _, n] if n == n_classes) {
                let expected = vec![1, 0, n_classes];
                return Err(Error::Shape { what: "the recogniser's probabilities", got: output.shape, expected });
            }
            output.check_finite("the recogniser's probabilities")?;
            let (text, probability) = decoded(&output.values, &self.characters);
            if probability >= self.scorer.text_threshold && !text.is_empty() {
                readings.push(Reading { text, probability });
            }
        }
        Ok(readings)
    }

    /// `[3, height, width]`, blue first, -1 to 1, and its sides.
    fn detector_input(&self, image: &RgbImage) -> (Vec<f32>, usize, usize) {
        let [width, height] = [image.width(), image.height()].map(|side| side as f32);
        let reduced = (LARGE / width.max(height)).min(1.0);
        let enlarged = (self.scorer.min_side as f32 / (width.min(height) * reduced)).max(1.0);
        let ratio = (reduced * enlarged).min(MAX_SIDE / width.max(height));
        let side = |side: f32| ((((side * ratio).trunc() / STEP).round_ties_even() * STEP).max(STEP)) as usize;
        let (columns, rows) = (side(width), side(height));
        let axes = [Axis::whole(image.width(), columns), Axis::whole(image.height(), rows)];
        let resized = float_window(image, axes, Filter::Bilinear);
        let channel = |channel: usize| resized.iter().skip(channel).step_by(3).map(|value| value * 2.0 - 1.0);
        ([2, 1, 0].into_iter().flat_map(channel).collect(), columns, rows)
    }
}

impl Reward<RgbImage> for OcrReward {
    fn name(&self) -> &str {
        &self.manifest.name
    }

    fn score(&self, prompt: &Prompt, image: &RgbImage) -> Result<f32, BoxError> {
        let column = &self.scorer.column;
        let wanted: String = prompt.column(column)?;
        let lines: Vec<String> = self.read(image)?.into_iter().map(|reading| reading.text).collect();
        agreement(&lines.concat(), &wanted).ok_or_else(|| {
            let message = format!("column `{column}` of prompt `{}` is empty; give the text to be shown", prompt.text);
            Error::Column(message).into()
        })
    }

    fn score_each(&self, batch: &[(&Prompt, &RgbImage)]) -> Vec<Result<f32, BoxError>> {
        batch.iter().map(|(prompt, image)| self.score(prompt, image)).collect()
    }
}
