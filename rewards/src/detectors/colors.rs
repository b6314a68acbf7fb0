//! The colour of a detected object, by CLIP, as the published evaluation asks for it.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use grpo::{BoxError, Error, Result};
use image::{Rgb, RgbImage};

use crate::clip::ClipReward;
use crate::geneval::{COLORS, Detection, Detector};

/// What lies outside an object's mask is painted in this grey, `#999`.
const OUTSIDE: Rgb<u8> = Rgb([0x99; 3]);

/// The longest side of a crop, as of any picture.
const MAX_CROP: i64 = 8192;

/// Names the colour of an object: the nearest of ten texts to its crop.
///
/// Each colour is the normalised mean of three captions with the object's class, embedded by CLIP. Published numbers
/// are those of OpenAI's ViT-L/14 (`rewards/export/export_clip.py --arch ViT-L-14-quickgelu`, `pil-bicubic`), there
/// in half precision on a GPU.
#[derive(Debug)]
pub struct ClipColors {
    clip: ClipReward,
    /// One row a colour, by class.
    captions: Mutex<BTreeMap<String, Vec<Vec<f32>>>>,
}

impl ClipColors {
    /// Asks this model.
    pub fn new(clip: ClipReward) -> Self {
        Self { clip, captions: Mutex::new(BTreeMap::new()) }
    }

    /// The cosine of each object's crop to each of [`COLORS`].
    pub fn similarities(&self, image: &RgbImage, objects: &[Detection]) -> Result<Vec<[f32; 10]>> {
        let crops: Vec<RgbImage> = objects.iter().map(|object| crop(image, object)).collect::<Result<_>>()?;
        let embedded = self.clip.embed_images(&crops.iter().collect::<Vec<_>>())?;
        let mut rows = Vec::with_capacity(objects.len());
        for (object, embedding) in objects.iter().zip(embedded) {
            let (captions, embedding) = (self.captions(&object.class)?, normalised(&embedding));
            let mut row = [0.0; 10];
            for (place, caption) in row.iter_mut().zip(&captions) {
                *place = embedding.iter().zip(caption).map(|(a, b)| a * b).sum();
            }
            if let Some(value) = row.iter().find(|value| !value.is_finite()) {
                let class = &object.class;
                return Err(Error::config(format!(
                    "the colour of a {class}: a similarity is {value}; export CLIP in fp32, or compute on the CPU"
                )));
            }
            rows.push(row);
        }
        Ok(rows)
    }

    fn captions(&self, class: &str) -> Result<Vec<Vec<f32>>> {
        let mut known = self.captions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(captions) = known.get(class) {
            return Ok(captions.clone());
        }
        let mut captions = Vec::with_capacity(COLORS.len());
        for color in COLORS {
            let texts = [
                format!("a photo of a {color} {class}"),
                format!("a photo of a {color}-colored {class}"),
                format!("a photo of a {color} object"),
            ];
            let embedded = self.clip.embed_texts(&texts.each_ref().map(String::as_str))?;
            let mut mean = vec![0.0; embedded.first().map_or(0, Vec::len)];
            for text in &embedded {
                let unit = normalised(text);
                mean.iter_mut().zip(&unit).for_each(|(sum, value)| *sum += value / texts.len() as f32);
            }
            captions.push(normalised(&mean));
        }
        known.insert(class.into(), captions.clone());
        Ok(captions)
    }
}

fn normalised(values: &[f32]) -> Vec<f32> {
    let norm = values.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt();
    values.iter().map(|&value| (f64::from(value) / norm) as f32).collect()
}

/// An object as the classifier sees it: grey outside its mask, cut to its box, black where the box leaves the image.
///
/// Corners round to the nearest pixel, halves to even, as Python's `round` does for Pillow.
pub fn crop(image: &RgbImage, object: &Detection) -> Result<RgbImage> {
    let [x0, y0, x1, y1] = object.bbox.map(|corner| corner.round_ties_even() as i64);
    let (width, height) = (i64::from(image.width()), i64::from(image.height()));
    let limit = |size: i64| 0 < size && size <= (2 * width.max(height)).min(MAX_CROP);
    if !object.bbox.iter().all(|corner| corner.is_finite()) || !limit(x1 - x0) || !limit(y1 - y0) {
        return Err(Error::config(format!(
            "box {:?} of a {} has no pixel, or is larger than twice the image of {width}x{height} or {MAX_CROP} pixels",
            object.bbox, object.class
        )));
    }
    if let Some(mask) = &object.mask
        && mask.dimensions() != (width as usize, height as usize)
    {
        let (got, expected) = (mask.dimensions(), vec![height as usize, width as usize]);
        return Err(Error::Shape { what: "the mask of an object", got: vec![got.1, got.0], expected });
    }
    Ok(RgbImage::from_fn((x1 - x0) as u32, (y1 - y0) as u32, |x, y| {
        let (x, y) = (x0 + i64::from(x), y0 + i64::from(y));
        if x < 0 || y < 0 || x >= width || y >= height {
            return Rgb([0; 3]);
        }
        match object.mask.as_ref().is_none_or(|mask| mask.contains(x as usize, y as usize)) {
            true => *image.get_pixel(x as u32, y as u32),
            false => OUTSIDE,
        }
    }))
}

/// A detector whose objects get their colours from CLIP; colours that it has set itself stay.
#[derive(Debug)]
pub struct Colored<'a, D> {
    detector: D,
    colors: &'a ClipColors,
}

impl<'a, D> Colored<'a, D> {
    /// Puts a classifier beside a detector.
    pub fn new(detector: D, colors: &'a ClipColors) -> Self {
        Self { detector, colors }
    }
}

impl<D: Detector> Detector for Colored<'_, D> {
    fn detect(&self, image: &RgbImage) -> Result<Vec<Detection>, BoxError> {
        self.detector.detect(image)
    }

    fn classify_colors(&self, image: &RgbImage, objects: &mut [Detection]) -> Result<(), BoxError> {
        self.detector.classify_colors(image, objects)?;
        let unknown: Vec<usize> = (0..objects.len()).filter(|&row| objects[row].color.is_none()).collect();
        let chosen: Vec<Detection> = unknown.iter().map(|&row| objects[row].clone()).collect();
        for (row, similarities) in unknown.into_iter().zip(self.colors.similarities(image, &chosen)?) {
            // Of equal ones the first, as an argmax gives it.
            let best = similarities
                .iter()
                .enumerate()
                .fold(0, |best, (at, value)| if *value > similarities[best] { at } else { best });
            objects[row].color = Some(COLORS[best].into());
        }
        Ok(())
    }
}
