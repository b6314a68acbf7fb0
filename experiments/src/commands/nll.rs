//! `grpo eval nll`: how surprising images are to a policy, given their captions.

use std::fmt;
use std::path::{Path, PathBuf};

use clap::Args;
use grpo::picture::open_image;
use grpo::{Policy, Prompt, Seed};
use grpo_policies::simplear::{ImageTrace, Law, SimpleAr, Vocabulary};
use grpo_rewards::shapes::{DEFAULT_SIDE, captions, held_out_prompts, render, scene_for};
use image::RgbImage;
use serde::{Deserialize, Serialize};

use super::{SampledPolicyArgs, at_least_one, print, progress};
use crate::failure::{Failure, Outcome};

/// Negative log-likelihood of images' tokens under their captions, at temperature 1.
#[derive(Args)]
pub struct Nll {
    #[command(flatten)]
    policy: SampledPolicyArgs,
    /// A JSON list, or one JSON object a line, with "caption" (or "prompt") and either "image_path" (or "image"; a PNG,
    /// JPEG or WebP of the policy's size, relative to this file) or "codes"; scenes of the Shapes world's held-out prompts where
    /// absent.
    #[arg(long, value_name = "FILE")]
    data: Option<PathBuf>,
    /// Scenes of each held-out prompt, without --data.
    #[arg(short, default_value_t = 1, value_parser = at_least_one())]
    n: usize,
    /// Put before every caption, as in training.
    #[arg(long, value_name = "TEXT", default_value = "")]
    prefix: String,
    /// Over all ids, as the original's loss, and not over the codebook alone.
    #[arg(long)]
    full_vocabulary: bool,
    /// Images whose tokens are scored at a time.
    #[arg(long, default_value_t = 8, value_parser = at_least_one())]
    batch: usize,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

/// An image with what is said of it.
#[derive(Deserialize)]
struct Entry {
    #[serde(alias = "prompt")]
    caption: String,
    #[serde(default, alias = "image")]
    image_path: Option<PathBuf>,
    #[serde(default)]
    codes: Option<Vec<u32>>,
}

/// What is printed.
#[derive(Serialize)]
struct Summary {
    images: usize,
    tokens_per_image: usize,
    /// Mean over tokens, in nats.
    nll: f64,
    /// Standard error of the mean over images.
    standard_error: f64,
    perplexity: f64,
    bits_per_pixel: f64,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "nll {:.4} ± {:.4} nats a token (perplexity {:.2}, {:.4} bits a pixel) over {} images of {} tokens",
            self.nll, self.standard_error, self.perplexity, self.bits_per_pixel, self.images, self.tokens_per_image
        )
    }
}

impl Nll {
    /// Runs it.
    pub fn run(self) -> Outcome<()> {
        let vocabulary = if self.full_vocabulary { Vocabulary::Full } else { Vocabulary::Visual };
        let law = Law { prefix: self.prefix.clone(), vocabulary, ..Law::default() };
        let policy = self.policy.load()?.detached()?.with_law(law)?;
        let examples = match &self.data {
            Some(path) => read(path, &policy)?,
            None => shapes_scenes(self.n, &policy)?,
        };
        let bar = progress(examples.len());
        let mut per_image = Vec::with_capacity(examples.len());
        for part in examples.chunks(self.batch) {
            let batch: Vec<(&Prompt, &ImageTrace)> = part.iter().map(|(prompt, trace)| (prompt, trace)).collect();
            let log_probs = policy.log_probs(&batch)?.rows()?;
            per_image.extend(log_probs.iter().map(|row| -row.iter().map(|x| f64::from(*x)).sum::<f64>()));
            bar.inc(part.len() as u64);
        }
        bar.finish_and_clear();
        let summary = summarise(&per_image, &policy);
        match self.json {
            true => print(&serde_json::to_string(&summary).map_err(|error| Failure::from(anyhow::Error::from(error)))?),
            false => print(&summary.to_string()),
        }
    }
}

fn summarise(per_image: &[f64], policy: &SimpleAr) -> Summary {
    let (rows, columns) = policy.grid();
    let (tokens, n) = ((rows * columns) as f64, per_image.len() as f64);
    let mean = per_image.iter().sum::<f64>() / n;
    let variance = per_image.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    let pixels = tokens * (policy.cosmos().config().spatial_compression as f64).powi(2);
    Summary {
        images: per_image.len(),
        tokens_per_image: rows * columns,
        nll: mean / tokens,
        standard_error: (variance / n).sqrt() / tokens,
        perplexity: (mean / tokens).exp(),
        bits_per_pixel: mean / std::f64::consts::LN_2 / pixels,
    }
}

/// Captioned scenes of the held-out prompts, as the policy would have drawn them.
fn shapes_scenes(n: usize, policy: &SimpleAr) -> Outcome<Vec<(Prompt, ImageTrace)>> {
    let (mut prompts, mut images) = (Vec::new(), Vec::new());
    for (row, metadata) in held_out_prompts().iter().enumerate() {
        for draw in 0..n {
            let seed = Seed::new(9).named("nll").fold(row as u64).fold(draw as u64);
            let scene = scene_for(metadata, seed)?;
            prompts.push(Prompt::new(captions(&scene, seed.named("caption")).short));
            images.push(render(&scene, DEFAULT_SIDE));
        }
    }
    let codes = encode(policy, &images)?;
    Ok(prompts.into_iter().zip(codes.iter().map(|codes| policy.trace_of(codes))).collect())
}

fn encode(policy: &SimpleAr, images: &[RgbImage]) -> Outcome<Vec<Vec<u32>>> {
    Ok(policy.cosmos().encode(&images.iter().collect::<Vec<_>>())?)
}

fn read(path: &Path, policy: &SimpleAr) -> Outcome<Vec<(Prompt, ImageTrace)>> {
    let fault = |message: String| Failure::user(format!("{}: {message}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|error| fault(format!("{error}; give a JSON file")))?;
    let entries: Vec<Entry> = match text.trim_start().starts_with('[') {
        true => serde_json::from_str(&text).map_err(|error| fault(error.to_string()))?,
        false => {
            let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
            let entry = |(number, line): (usize, &str)| {
                serde_json::from_str(line).map_err(|error| fault(format!("line {}: {error}", number + 1)))
            };
            lines.map(entry).collect::<Outcome<_>>()?
        }
    };
    if entries.is_empty() {
        return Err(fault("holds no image; write at least one".into()));
    }
    let folder = path.parent().unwrap_or(Path::new(""));
    let example = |(index, entry): (usize, Entry)| {
        let fault = |message: String| fault(format!("entry {}: {message}", index + 1));
        let codes = match (entry.codes, entry.image_path) {
            (Some(codes), _) => codes,
            (None, Some(image)) => {
                let image = open_image(&folder.join(image))?;
                encode(policy, &[image])?.swap_remove(0)
            }
            (None, None) => return Err(fault("has neither \"image_path\" nor \"codes\"; give one".into())),
        };
        Ok((Prompt::new(entry.caption), policy.trace_of(&codes)))
    };
    entries.into_iter().enumerate().map(example).collect()
}
