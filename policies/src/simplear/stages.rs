//! Pretraining and supervised fine-tuning: the language-modelling loss over whole rows.
//!
//! As published (SimpleAR, §3.2 and its `preprocess_t2i`): text, special and visual ids are all trained, over the full
//! vocabulary; with probability 0.1 a row keeps neither prefix nor caption (condition dropout, which guidance needs).

use grpo::{AdamW, Error, Gradients, OptimConfig, Policy, Result, Seed};
use image::RgbImage;

use super::SimpleAr;
use crate::decoder::{Scores, Targets};

/// An image with what is said of it.
#[derive(Clone, Debug)]
pub struct TrainingImage {
    /// The caption, without a prefix.
    pub caption: String,
    /// The image, of the policy's size.
    pub image: RgbImage,
}

/// How long and how fast a stage trains.
#[derive(Clone, Debug)]
pub struct StagePlan {
    /// Optimiser steps; each takes one batch.
    pub n_steps: usize,
    /// Rate, schedule and clipping.
    pub optim: OptimConfig,
    /// Probability that a row loses its caption; 0.1 in the paper.
    pub caption_dropout: f64,
    /// Decides which rows lose their captions.
    pub seed: Seed,
}

/// What a step of a stage reports.
#[derive(Clone, Copy, Debug)]
pub struct StageStep {
    /// The step, from 0.
    pub step: usize,
    /// Mean cross-entropy in nats over all trained ids of the batch, before the update.
    pub loss: f64,
    /// The gradient's norm before clipping.
    pub grad_norm: f64,
}

impl SimpleAr {
    /// A training row: the caption's ids, or none where it is dropped, and the image's tokens.
    fn training_row(&self, caption: Option<&str>, codes: &[u32]) -> Result<Vec<u32>> {
        let mut ids = match caption {
            Some(caption) => self.prompt_ids(caption, &self.law.prefix)?,
            None => self.text.null_prompt(),
        };
        ids.extend(codes.iter().map(|code| self.text.n_ids() + code));
        Ok(ids)
    }

    /// Log-probabilities of every id after the first over the full vocabulary.
    fn row_scores(&self, rows: &[Vec<u32>]) -> Result<Scores> {
        let read: Vec<&[u32]> = rows.iter().map(|row| &row[..row.len().saturating_sub(1)]).collect();
        let places: Vec<(usize, usize)> =
            read.iter().enumerate().flat_map(|(row, ids)| (0..ids.len()).map(move |at| (row, at))).collect();
        let ids: Vec<u32> = rows.iter().flat_map(|row| row.iter().skip(1).copied()).collect();
        let slice = 0..self.decoder.config().vocab_size;
        self.decoder.score(&read, &Targets { places, ids, slice, temperature: 1.0 })
    }
}

/// Trains a stage in place: `next_batch` gives the images of each step, `on_step` sees its numbers.
pub fn train_stage(
    policy: &mut SimpleAr,
    plan: &StagePlan,
    mut next_batch: impl FnMut(usize) -> Result<Vec<TrainingImage>>,
    mut on_step: impl FnMut(&SimpleAr, StageStep) -> Result<()>,
) -> Result<()> {
    let params = policy.params();
    if params.is_empty() {
        return Err(Error::config("the policy is frozen; load it trainable"));
    }
    if !(0.0..=1.0).contains(&plan.caption_dropout) {
        return Err(Error::config(format!(
            "caption_dropout is {}; give a probability, 0.1 in the paper",
            plan.caption_dropout
        )));
    }
    let mut adamw = AdamW::new(params.clone(), plan.optim)?.on_device(crate::device_optimiser());
    for step in 0..plan.n_steps {
        let batch = next_batch(step)?;
        let images: Vec<&RgbImage> = batch.iter().map(|example| &example.image).collect();
        let codes = policy.cosmos.encode(&images)?;
        let mut draws = plan.seed.named("caption_dropout").fold(step as u64).draws();
        let rows = batch.iter().zip(&codes).map(|(example, codes)| {
            let kept = draws.uniform() >= plan.caption_dropout;
            policy.training_row(kept.then_some(example.caption.as_str()), codes)
        });
        let rows: Vec<Vec<u32>> = rows.collect::<Result<_>>()?;
        let Scores { log_probs, tape, .. } = policy.row_scores(&rows)?;
        let loss = log_probs.mean_all()?.neg()?;
        let mut gradients = Gradients::new();
        match tape {
            None => gradients.add_backward(&loss, &params)?,
            Some(tape) => {
                let share = -1.0 / log_probs.elem_count() as f64;
                tape.backward(&(log_probs.ones_like()? * share)?, None, &mut gradients)?;
            }
        }
        let grad_norm = adamw.step(&gradients, plan.optim.rate(step, plan.n_steps))?;
        on_step(policy, StageStep { step, loss: f64::from(loss.to_scalar::<f32>()?), grad_norm })?;
    }
    Ok(())
}
