//! The rules as a reward, over any detector.

use grpo::{BoxError, Prompt, Reward};
use image::RgbImage;

use super::judge::{Detection, Rules, Verdict};
use super::metadata::Metadata;

/// Finds objects in pictures. Required: `detect`.
///
/// ```
/// use grpo::{BoxError, Reward};
/// use grpo_rewards::geneval::{Detection, Detector, GenEval, Include, Metadata, Tag};
/// use image::RgbImage;
///
/// /// Sees a cat in every picture.
/// struct CatLover;
///
/// impl Detector for CatLover {
///     fn detect(&self, image: &RgbImage) -> Result<Vec<Detection>, BoxError> {
///         let (width, height) = image.dimensions();
///         Ok(vec![Detection::new("cat", 0.99, [0.0, 0.0, width as f32, height as f32])])
///     }
/// }
///
/// let (tag, include) = (Tag::SingleObject, vec![Include::new("cat", 1)]);
/// let metadata = Metadata { tag, include, exclude: vec![], prompt: "a photo of a cat".into() };
/// let score = GenEval::new(CatLover).score(&metadata.to_prompt()?, &RgbImage::new(8, 8))?;
/// assert_eq!(score, 1.0);
/// # Ok::<(), BoxError>(())
/// ```
pub trait Detector: Send + Sync {
    /// Every object found, in any order and with any score; the rules choose among them.
    fn detect(&self, image: &RgbImage) -> Result<Vec<Detection>, BoxError>;

    /// Fills in the colours of the objects whose colours the rules ask for.
    ///
    /// Override where a second model classifies crops (GenEval's own is CLIP): it is called with the few boxes
    /// that matter, and only for prompts that name a colour. Without it, `detect` sets the colours.
    fn classify_colors(&self, _image: &RgbImage, _objects: &mut [Detection]) -> Result<(), BoxError> {
        Ok(())
    }
}

impl<D: Detector + ?Sized> Detector for &D {
    fn detect(&self, image: &RgbImage) -> Result<Vec<Detection>, BoxError> {
        (**self).detect(image)
    }

    fn classify_colors(&self, image: &RgbImage, objects: &mut [Detection]) -> Result<(), BoxError> {
        (**self).classify_colors(image, objects)
    }
}

/// 1 where the picture is right by GenEval's rules, else 0; reads the columns of [`Metadata::to_prompt`].
#[derive(Clone, Debug)]
pub struct GenEval<D> {
    detector: D,
    rules: Rules,
}

impl<D: Detector> GenEval<D> {
    /// Judges what this detector sees, by the rules as published.
    pub fn new(detector: D) -> Self {
        Self { detector, rules: Rules::default() }
    }

    /// Sets the rules' options.
    #[must_use]
    pub fn with_rules(mut self, rules: Rules) -> Self {
        self.rules = rules;
        self
    }

    /// The verdict with its reason, where a number is not enough.
    pub fn verdict(&self, metadata: &Metadata, image: &RgbImage) -> Result<Verdict, BoxError> {
        let mut detections = self.detector.detect(image)?;
        let rows = self.rules.needing_color(metadata, &detections);
        let mut chosen: Vec<Detection> = rows.iter().map(|&row| detections[row].clone()).collect();
        if !chosen.is_empty() {
            self.detector.classify_colors(image, &mut chosen)?;
        }
        if let Some(Detection { class, .. }) = chosen.iter().find(|object| object.color.is_none()) {
            return Err(format!("a {class} has no color; record colors, or give a classifier of them").into());
        }
        for (row, object) in rows.into_iter().zip(chosen) {
            detections[row].color = object.color;
        }
        Ok(self.rules.judge(metadata, &detections))
    }
}

impl<D: Detector> Reward<RgbImage> for GenEval<D> {
    fn name(&self) -> &str {
        "geneval"
    }

    fn score(&self, prompt: &Prompt, sample: &RgbImage) -> Result<f32, BoxError> {
        let verdict = self.verdict(&Metadata::from_prompt(prompt)?, sample)?;
        Ok(if verdict.correct { 1.0 } else { 0.0 })
    }
}
