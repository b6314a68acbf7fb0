//! Mask2Former as the published evaluation runs it: mmdet 2's test pipeline, the network, mmdet's instances.
//!
//! Paper: Cheng et al., 2022, "Masked-attention Mask Transformer for Universal Image Segmentation". The network is any
//! ONNX file from `images` `[1, 3, H, W]` to `cls_logits` `[1, Q, classes + 1]` and `mask_logits` `[1, Q, h, w]`, as
//! mmdeploy exports them; what surrounds it stands here:
//!
//! 1. The picture is resized by OpenCV's bilinear rule to fit 1333 x 800 (long and short side, either way up), padded
//!    with grey 128 at the right and bottom to multiples of 32, and normalised with ImageNet's mean and deviation.
//! 2. Class scores are a softmax whose last class, no object, is dropped; the 100 best of queries x classes stay.
//! 3. Masks are brought to the padded size, cut to the picture, and brought to the picture's own size, bilinearly as
//!    logits. A mask is where its logit is above 0; a score is the class's times the mask's mean probability inside;
//!    a box is the mask's bounds.
//!
//! One deviation: instances whose class score is 0.05 or less are left out, which no rule would look at.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::Path;

use grpo::{BoxError, Error, Result};
use image::RgbImage;

use super::bilinear;
use super::model_folder::verified_model;
use crate::geneval::{Detection, Detector, Mask, object_names};
use crate::onnx::{Dim, Element, Input, Interface, Output, Port, Precision, Session, SessionOptions};

const LONG_SIDE: f64 = 1333.0;
const SHORT_SIDE: f64 = 800.0;
/// Sides of the input are multiples of it.
const DIVISOR: usize = 32;
/// What is padded with, before normalising.
const PADDING: f32 = 128.0;
/// ImageNet's channel means, of bytes.
const MEAN: [f32; 3] = [123.675, 116.28, 103.53];
/// ImageNet's channel deviations, of bytes.
const STD: [f32; 3] = [58.395, 57.12, 57.375];
/// Queries x classes that are instances.
const MAX_INSTANCES: usize = 100;
/// Class scores up to this are left out.
const MIN_SCORE: f32 = 0.05;

/// Finds the 80 classes of COCO, with masks.
#[derive(Debug)]
pub struct Mask2Former {
    session: Session,
    classes: Vec<&'static str>,
}

impl Mask2Former {
    /// Loads a folder with `model.onnx` and `SHA256SUMS`.
    pub fn load(folder: &Path, options: &SessionOptions) -> Result<Self> {
        let classes: Vec<&str> = object_names().collect();
        let images = [Dim::Any, Dim::Is(3), Dim::Free, Dim::Free];
        let logits = [Dim::Any, Dim::Any, Dim::Any];
        let masks = [Dim::Any, Dim::Any, Dim::Any, Dim::Any];
        let interface = Interface {
            inputs: &[Port { name: "images", element: Element::F32, shape: Some(&images) }],
            outputs: &[
                Port { name: "cls_logits", element: Element::F32, shape: Some(&logits) },
                Port { name: "mask_logits", element: Element::F32, shape: Some(&masks) },
            ],
            precision: Precision::Fp32,
        };
        Ok(Self { session: Session::from_file(&verified_model(folder)?, &interface, options)?, classes })
    }
}

impl Detector for Mask2Former {
    fn detect(&self, image: &RgbImage) -> Result<Vec<Detection>, BoxError> {
        let (pixels, sizes) = network_input(image)?;
        let [height, width] = sizes.padded;
        let outputs = self.session.run(&[("images", Input::F32(&pixels, &[1, 3, height, width]))])?;
        let read =
            |name: &str| outputs.get(name).ok_or_else(|| Error::config(format!("the network returned no `{name}`")));
        let queries = Queries::new(read("cls_logits")?, read("mask_logits")?, self.classes.len())?;
        Ok(instances(&queries, &sizes, &self.classes)?)
    }
}

/// The sizes of a picture on its way, each as rows and columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Sizes {
    /// Of the picture itself.
    pub original: [usize; 2],
    /// Resized.
    pub resized: [usize; 2],
    /// Resized and padded.
    pub padded: [usize; 2],
}

/// The picture as the network takes it, `[3, height, width]`.
pub fn network_input(image: &RgbImage) -> Result<(Vec<f32>, Sizes)> {
    let original = [image.height() as usize, image.width() as usize];
    let (short, long) = (original[0].min(original[1]) as f64, original[0].max(original[1]) as f64);
    let scale = (LONG_SIDE / long).min(SHORT_SIDE / short);
    let resized = original.map(|side| (side as f64 * scale + 0.5) as usize);
    if resized.contains(&0) || !scale.is_finite() {
        let [height, width] = original;
        return Err(Error::config(format!("an image of {width}x{height} is too narrow to be searched")));
    }
    let padded = resized.map(|side| side.next_multiple_of(DIVISOR));
    let picture = bilinear::opencv(image, resized);
    let mut pixels = Vec::with_capacity(3 * padded[0] * padded[1]);
    for channel in 0..3 {
        let normal = |value: f32| (value - MEAN[channel]) / STD[channel];
        for y in 0..padded[0] {
            let row = (0..padded[1]).map(|x| match y < resized[0] && x < resized[1] {
                true => normal(f32::from(picture.get_pixel(x as u32, y as u32).0[channel])),
                false => normal(PADDING),
            });
            pixels.extend(row);
        }
    }
    Ok((pixels, Sizes { original, resized, padded }))
}

/// What the network says of one picture, its sizes checked.
#[derive(Clone, Copy, Debug)]
pub struct Queries<'a> {
    /// `[queries, classes + 1]`
    classes: &'a [f32],
    /// `[queries, height, width]`
    masks: &'a [f32],
    n_classes: usize,
    mask_size: [usize; 2],
}

impl<'a> Queries<'a> {
    /// Checks `cls_logits` `[1, Q, n_classes + 1]` against `mask_logits` `[1, Q, h, w]`, and that all are finite.
    pub fn new(classes: &'a Output, masks: &'a Output, n_classes: usize) -> Result<Self> {
        let n_queries = classes.shape.get(1).copied().unwrap_or(0);
        if classes.shape != [1, n_queries, n_classes + 1] {
            let expected = vec![1, n_queries, n_classes + 1];
            return Err(Error::Shape { what: "cls_logits", got: classes.shape.clone(), expected });
        }
        let &[1, n_masks, height, width] = &masks.shape[..] else {
            return Err(Error::Shape {
                what: "mask_logits",
                got: masks.shape.clone(),
                expected: vec![1, n_queries, 0, 0],
            });
        };
        if n_masks != n_queries || height == 0 || width == 0 {
            let expected = vec![1, n_queries, height.max(1), width.max(1)];
            return Err(Error::Shape { what: "mask_logits", got: masks.shape.clone(), expected });
        }
        classes.check_finite("the network's `cls_logits`")?;
        masks.check_finite("the network's `mask_logits`")?;
        Ok(Self { classes: &classes.values, masks: &masks.values, n_classes, mask_size: [height, width] })
    }

    /// The best pairs of query and class with their scores, best first.
    fn best(&self) -> Vec<(usize, usize, f32)> {
        let softmax = |(query, logits): (usize, &[f32])| {
            let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let parts: Vec<f32> = logits.iter().map(|logit| (logit - largest).exp()).collect();
            let sum: f32 = parts.iter().sum();
            parts
                .into_iter()
                .take(self.n_classes)
                .enumerate()
                .map(move |(class, part)| (query, class, part / sum))
                .collect::<Vec<_>>()
        };
        let mut pairs: Vec<(usize, usize, f32)> =
            self.classes.chunks(self.n_classes + 1).enumerate().flat_map(softmax).collect();
        pairs.sort_by(|a, b| b.2.total_cmp(&a.2));
        pairs.truncate(MAX_INSTANCES);
        pairs.retain(|&(.., score)| score > MIN_SCORE);
        pairs
    }

    /// A query's mask as logits at the picture's own size.
    fn mask(&self, query: usize, sizes: &Sizes) -> Vec<f32> {
        let [height, width] = self.mask_size;
        let source = &self.masks[query * height * width..][..height * width];
        let padded = bilinear::plane(source, self.mask_size, sizes.padded);
        let rows = padded.chunks(sizes.padded[1]).take(sizes.resized[0]);
        let cut: Vec<f32> = rows.flat_map(|row| row[..sizes.resized[1]].iter().copied()).collect();
        bilinear::plane(&cut, sizes.resized, sizes.original)
    }
}

/// Objects from the network's outputs, by the rules in the head of this file.
pub fn instances(queries: &Queries<'_>, sizes: &Sizes, classes: &[&str]) -> Result<Vec<Detection>> {
    let mut masks: BTreeMap<usize, (Mask, f32)> = BTreeMap::new();
    let mut found = Vec::new();
    for (query, class, score) in queries.best() {
        let (mask, certainty) = match masks.entry(query) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => place.insert(segmented(&queries.mask(query, sizes), sizes.original[1])?),
        };
        if let Some(class) = classes.get(class) {
            found.push(Detection::new(*class, score * *certainty, mask.bounds()).with_mask(mask.clone()));
        }
    }
    Ok(found)
}

/// Where the logits are above 0, and their mean probability there.
fn segmented(logits: &[f32], width: usize) -> Result<(Mask, f32)> {
    let inside: Vec<bool> = logits.iter().map(|&logit| logit > 0.0).collect();
    let probability = |logit: f32| 1.0 / (1.0 + f64::from(-logit).exp());
    let sum: f64 = logits.iter().filter(|&&logit| logit > 0.0).map(|&logit| probability(logit)).sum();
    let n = inside.iter().filter(|&&inside| inside).count() as f64;
    // The small number is the published guard against an empty mask.
    Ok((Mask::new(width, inside)?, (sum / (n + 1e-6)) as f32))
}
