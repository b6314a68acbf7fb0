//! Training a tokenizer from images alone.
//!
//! The published recipe adds a perceptual loss from a pretrained VGG and an adversary (Cosmos, arXiv 2501.03575,
//! section 3.4); neither is here. What is:
//! 1. the mean absolute error, which keeps edges sharp, plus the mean squared error times [`SQUARED_WEIGHT`], which
//!    weighs the few pixels of shapes that are plainly wrong above the many that are nearly right: the median of a
//!    pixel that is mostly background is background, so the absolute error alone learns shapes late;
//! 2. the mean size of the latents times [`RATE_WEIGHT`], a price on what a code says beyond the middle one: without it
//!    the codes of a plain ground tell of objects far away, which the picture does not need and a policy has to predict;
//! 3. gradients pass the quantizer's rounding straight through (van den Oord et al., 2017); FSQ has no learned codebook, hence no commitment loss.

use std::path::Path;

use candle_core::Tensor;
use grpo::observe::Metrics;
use grpo::{Error, Gradients, Params, Result, Seed, gallery};
use image::RgbImage;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{Cosmos, pixels};
use crate::safetensors_file::Precision;
use crate::stage::{Learned, Learner};

/// Weight of the squared error beside the absolute error.
const SQUARED_WEIGHT: f64 = 4.0;

/// Weight of the latents' mean absolute value, before the quantizer's squashing; weights around it are compared in
/// `experiments/LOG.md`.
const RATE_WEIGHT: f64 = 0.05;

/// Images of a batch whose gradients are computed together; part of the definition of the sum's order.
const SHARE: usize = 2;

impl Cosmos {
    /// The reconstruction loss of images of one size, differentiable: see the module's head for its terms.
    pub fn train_loss(&self, images: &[&RgbImage]) -> Result<Tensor> {
        if images.is_empty() {
            return Err(Error::config("a batch of no images has no loss; give at least one"));
        }
        let pixels = pixels::to_tensor(images, self.device())?;
        let latents = self.latents(&pixels)?;
        let error = (self.reconstruct(&self.fsq.straight_through(&latents)?)? - pixels)?;
        let rate = (latents.abs()?.mean_all()? * RATE_WEIGHT)?;
        Ok(((error.abs()?.mean_all()? + (error.sqr()?.mean_all()? * SQUARED_WEIGHT)?)? + rate)?)
    }

    /// Loss and gradients of a batch. Its shares run side by side, which keeps threads busy where a single operation
    /// on small images could not; what they give is added in order.
    fn batch_gradients(&self, images: &[RgbImage]) -> Result<(f64, Gradients)> {
        let params = self.params();
        let share = |share: &[RgbImage]| {
            let images_of_share: Vec<&RgbImage> = share.iter().collect();
            let loss = (self.train_loss(&images_of_share)? * (share.len() as f64 / images.len() as f64))?;
            let mut gradients = Gradients::new();
            gradients.add_backward(&loss, &params)?;
            Ok((f64::from(loss.to_scalar::<f32>()?), gradients))
        };
        let shares: Vec<(f64, Gradients)> = images.par_chunks(SHARE).map(share).collect::<Result<_>>()?;
        let (mut loss, mut sum) = (0.0, Gradients::new());
        for (share_loss, gradients) in shares {
            loss += share_loss;
            sum.add_all(gradients)?;
        }
        Ok((loss, sum))
    }
}

/// What a step of tokenizer training sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReconstructionPlan {
    /// Images a step.
    pub batch: usize,
    /// Images that are held out, spread over all and the same whatever the seed.
    #[serde(default = "held_out")]
    pub validation_images: usize,
}

fn held_out() -> usize {
    32
}

/// Held-out images that are shown beside what is made of them.
const SHOWN: usize = 8;

/// Images of one size, learned by a tokenizer.
pub struct Reconstruction {
    cosmos: Cosmos,
    plan: ReconstructionPlan,
    images: Vec<RgbImage>,
    held_out: Vec<RgbImage>,
    seed: Seed,
}

impl Reconstruction {
    /// A tokenizer that learns `images`, of one size, each step a batch drawn from all but those held out.
    pub fn new(cosmos: Cosmos, plan: ReconstructionPlan, mut images: Vec<RgbImage>, seed: Seed) -> Result<Self> {
        if plan.batch == 0 || images.len() <= plan.validation_images {
            return Err(Error::config(format!(
                "batch is {} and {} of {} images are held out; train on at least one image a step",
                plan.batch,
                plan.validation_images,
                images.len()
            )));
        }
        if cosmos.params().is_empty() {
            return Err(Error::config("the tokenizer was loaded frozen; make a trainable one with Cosmos::init"));
        }
        let order = Seed::new(0).named("validation images").draws().permutation(images.len());
        let mut chosen: Vec<usize> = order.into_iter().take(plan.validation_images).collect();
        // From the last to the first, so that taking one out leaves the places of the others.
        chosen.sort_unstable_by(|a, b| b.cmp(a));
        let held_out = chosen.into_iter().map(|at| images.swap_remove(at)).collect();
        Ok(Self { cosmos, plan, images, held_out, seed })
    }

    /// The tokenizer.
    pub fn cosmos(&self) -> &Cosmos {
        &self.cosmos
    }
}

impl Learner for Reconstruction {
    fn params(&self) -> Params {
        self.cosmos.params()
    }

    fn learn(&mut self, step: usize, gradients: &mut Gradients) -> Result<Learned> {
        let mut draws = self.seed.named("batch").fold(step as u64).draws();
        let drawn = (0..self.plan.batch).filter_map(|_| draws.choose(&self.images).cloned());
        let (loss, sum) = self.cosmos.batch_gradients(&drawn.collect::<Vec<_>>())?;
        gradients.add_all(sum)?;
        Ok(Learned { loss, n_images: self.plan.batch, ..Learned::default() })
    }

    fn validate(&mut self) -> Result<Metrics> {
        let Some(made) = self.round_trip(&self.held_out)? else { return Ok(Metrics::new()) };
        let (mut absolute, mut squared, mut n) = (0.0, 0.0, 0usize);
        for (made, image) in made.iter().zip(&self.held_out) {
            for (a, b) in made.iter().zip(image.iter()) {
                let difference = (f64::from(*a) - f64::from(*b)) / 255.0;
                (absolute, squared, n) = (absolute + difference.abs(), squared + difference * difference, n + 1);
            }
        }
        let n = n.max(1) as f64;
        Ok(Metrics::from([
            ("validation/absolute_error".to_string(), absolute / n),
            ("validation/psnr".into(), -10.0 * (squared / n).max(1e-10).log10()),
        ]))
    }

    fn pictures(&mut self) -> Result<Vec<(String, RgbImage)>> {
        let shown = &self.held_out[..SHOWN.min(self.held_out.len())];
        let Some(made) = self.round_trip(shown)? else { return Ok(Vec::new()) };
        let labelled = |label: &str, images: &[RgbImage]| -> Vec<(String, RgbImage)> {
            images.iter().map(|image| (label.to_string(), image.clone())).collect()
        };
        let rows = [
            ("held-out images".to_string(), labelled("as it is", shown)),
            ("their codes".into(), labelled("decoded", &made)),
        ];
        Ok(gallery(&rows).map(|picture| ("panel/validation".to_string(), picture)).into_iter().collect())
    }

    fn save(&self, folder: &Path) -> Result<()> {
        self.cosmos.save(folder, Precision::Bf16)
    }

    fn identity(&self) -> Result<String> {
        let bytes = self.images.iter().fold(0, |crc, image| crc32c::crc32c_append(crc, image.as_raw()));
        let config = serde_json::to_string(&self.cosmos.config).map_err(|error| Error::config(error.to_string()))?;
        let n = self.images.len();
        Ok(format!("{:?}\n{config}\n{n} images, crc32c {bytes:08x}\nseed: {:?}\n", self.plan, self.seed))
    }
}

impl Reconstruction {
    /// Images through codes and back; `None` of no images.
    fn round_trip(&self, images: &[RgbImage]) -> Result<Option<Vec<RgbImage>>> {
        let Some(first) = images.first() else { return Ok(None) };
        let grid = self.cosmos.grid(first.height() as usize, first.width() as usize)?;
        let codes = self.cosmos.encode(&images.iter().collect::<Vec<_>>())?;
        self.cosmos.decode(&codes, grid).map(Some)
    }
}
