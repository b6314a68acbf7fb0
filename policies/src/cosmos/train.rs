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

use candle_core::Tensor;
use grpo::{AdamW, Error, Gradients, OptimConfig, Result};
use image::RgbImage;
use rayon::prelude::*;

use super::{Cosmos, pixels};

/// Weight of the squared error beside the absolute error.
const SQUARED_WEIGHT: f64 = 4.0;

/// Weight of the latents' mean absolute value, before the quantizer's squashing; weights around it are compared in
/// `experiments/LOG.md`.
const RATE_WEIGHT: f64 = 0.05;

/// Images of a batch whose gradients are computed together; part of the definition of the sum's order.
const SHARE: usize = 2;

/// How long and how fast a tokenizer is trained.
#[derive(Clone, Debug)]
pub struct TrainPlan {
    /// Optimiser steps; each takes one batch.
    pub n_steps: usize,
    /// Rate, schedule and clipping.
    pub optim: OptimConfig,
}

/// What a step of tokenizer training reports.
#[derive(Clone, Copy, Debug)]
pub struct TrainStep {
    /// The step, from 0.
    pub step: usize,
    /// The loss of the step's batch before its update.
    pub loss: f64,
    /// The gradient's norm before clipping.
    pub grad_norm: f64,
}

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

/// Trains in place: `next_batch` gives the images of each step, `on_step` sees its numbers.
pub fn train(
    cosmos: &mut Cosmos,
    plan: &TrainPlan,
    mut next_batch: impl FnMut(usize) -> Result<Vec<RgbImage>>,
    mut on_step: impl FnMut(TrainStep) -> Result<()>,
) -> Result<()> {
    let params = cosmos.params();
    if params.is_empty() {
        return Err(Error::config("the tokenizer was loaded frozen; make a trainable one with Cosmos::init"));
    }
    let mut adamw = AdamW::new(params.clone(), plan.optim)?.on_device(crate::device_optimiser());
    for step in 0..plan.n_steps {
        let (loss, gradients) = cosmos.batch_gradients(&next_batch(step)?)?;
        let grad_norm = adamw.step(&gradients, plan.optim.rate(step, plan.n_steps))?;
        on_step(TrainStep { step, loss, grad_norm })?;
    }
    Ok(())
}
