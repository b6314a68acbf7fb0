//! `grpo eval nll`: how surprising images are to a policy, given their captions.

use std::fmt;
use std::path::{Path, PathBuf};

use clap::Args;
use grpo::{Policy, Prompt, Seed};
use grpo_policies::simplear::{CaptionChoice, ImageTrace, Law, RowConfig, SimpleAr, TrainingRow, Vocabulary};
use grpo_policies::tokens::TokenSet;
use grpo_rewards::shapes::{DEFAULT_SIDE, captions, held_out_prompts, render, scene_for};
use image::RgbImage;
use serde::{Deserialize, Serialize};

use super::tokens::open_opaque;
use super::{SampledPolicyArgs, at_least_one, print, progress};
use crate::failure::{Failure, Outcome};

/// Negative log-likelihood of images' tokens under their captions, at temperature 1.
#[derive(Args)]
pub struct Nll {
    #[command(flatten)]
    policy: SampledPolicyArgs,
    /// A folder of tokens, as grpo tokenize --data writes it; or a JSON list, or one JSON object a line, with "caption" (or
    /// "prompt") and either "image_path" (or "image"; a PNG,
    /// JPEG or WebP of the policy's size, relative to this file) or "codes"; scenes of the Shapes world's held-out prompts where
    /// absent.
    #[arg(long, value_name = "PATH")]
    data: Option<PathBuf>,
    /// Which line of a folder's captions is said.
    #[arg(long, value_name = "LINE", default_value = "long", value_parser = ["short", "long"])]
    captions: String,
    /// Scenes of each held-out prompt, without --data.
    #[arg(short, default_value_t = 1, value_parser = at_least_one())]
    n: usize,
    /// Put before every caption, as in training.
    #[arg(long, value_name = "TEXT", default_value = "")]
    prefix: String,
    /// Over all ids, as the original's loss, and not over the codebook alone.
    #[arg(long)]
    full_vocabulary: bool,
    /// Over every id of a row behind its first, text and specials as well, and over all ids: the loss of training.
    #[arg(long)]
    whole_rows: bool,
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
    /// Ids that the mean is over.
    tokens: usize,
    /// Mean over tokens, in nats.
    nll: f64,
    /// Standard error of the mean over images.
    standard_error: f64,
    perplexity: f64,
    /// Of the images' tokens alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    bits_per_pixel: Option<f64>,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bits = self.bits_per_pixel.map(|bits| format!(", {bits:.4} bits a pixel")).unwrap_or_default();
        let (images, each) = (self.images, self.tokens_per_image);
        let of = match self.bits_per_pixel {
            Some(_) => format!("{images} images of {each} tokens"),
            None => format!("{} ids of {images} rows, images of {each} tokens and their texts", self.tokens),
        };
        let (nll, error) = (self.nll, self.standard_error);
        write!(f, "nll {nll:.4} ± {error:.4} nats a token (perplexity {:.2}{bits}) over {of}", self.perplexity)
    }
}

impl Nll {
    /// Runs it.
    pub fn run(self) -> Outcome<()> {
        let vocabulary = if self.full_vocabulary { Vocabulary::Full } else { Vocabulary::Visual };
        let law = Law { prefix: self.prefix.clone(), vocabulary, ..Law::default() };
        let policy = self.policy.load()?.detached()?.with_law(law)?;
        let examples = match &self.data {
            Some(path) if path.is_dir() => self.rows_of_folder(path, &policy)?,
            Some(path) => read(path, &policy)?,
            None => shapes_scenes(self.n, &policy)?,
        };
        let bar = progress(examples.len());
        let mut per_row = Vec::with_capacity(examples.len());
        for part in examples.chunks(self.batch) {
            per_row.extend(match self.whole_rows {
                true => self.whole(part, &policy)?,
                false => of_images(part, &policy)?,
            });
            bar.inc(part.len() as u64);
        }
        bar.finish_and_clear();
        let summary = summarise(&per_row, &policy, self.whole_rows);
        match self.json {
            true => print(&serde_json::to_string(&summary).map_err(|error| Failure::from(anyhow::Error::from(error)))?),
            false => print(&summary.to_string()),
        }
    }

    /// Sums over every id of each row behind its first, and how many these are.
    fn whole(&self, part: &[(Prompt, ImageTrace)], policy: &SimpleAr) -> Outcome<Vec<(f64, usize)>> {
        let row = |(prompt, trace): &(Prompt, ImageTrace)| {
            let narrow = |code: &u32| u16::try_from(*code).ok().filter(|_| *code < policy.cosmos().n_codes());
            let codes: Option<Vec<u16>> = trace.codes.iter().map(narrow).collect();
            let fault = || {
                let codebook = policy.cosmos().n_codes();
                Failure::user(format!("a code of \"{}\" is beyond the codebook of {codebook}", prompt.text))
            };
            let text = format!("{}{}", self.prefix, prompt.text);
            Ok(policy.training_row(Some(&text), &codes.ok_or_else(fault)?, usize::MAX)?)
        };
        let rows: Vec<TrainingRow> = part.iter().map(row).collect::<Outcome<_>>()?;
        let sums = policy.row_nll(&rows, rows.len())?;
        Ok(sums.iter().map(|nll| (nll.image + nll.text, nll.n_image + nll.n_text)).collect())
    }

    /// The rows of a folder of tokens under their captions.
    fn rows_of_folder(&self, folder: &Path, policy: &SimpleAr) -> Outcome<Vec<(Prompt, ImageTrace)>> {
        let tokens = TokenSet::open(&[folder])?;
        policy.check_tokens(&tokens)?;
        let captions = if self.captions == "short" { CaptionChoice::Short } else { CaptionChoice::Long };
        let said = RowConfig { captions, caption_dropout: 0.0, ..RowConfig::default() };
        let example = |index| {
            let row = tokens.row(index)?;
            let caption = said.text(&row.lines, Seed::new(0)).unwrap_or_default();
            let codes: Vec<u32> = row.codes.iter().map(|code| u32::from(*code)).collect();
            Ok((Prompt::new(caption), policy.trace_of(&codes)))
        };
        (0..tokens.len()).map(example).collect()
    }
}

/// Sums over the tokens of each image, and how many these are.
fn of_images(part: &[(Prompt, ImageTrace)], policy: &SimpleAr) -> Outcome<Vec<(f64, usize)>> {
    let batch: Vec<(&Prompt, &ImageTrace)> = part.iter().map(|(prompt, trace)| (prompt, trace)).collect();
    let rows = policy.log_probs(&batch)?.rows()?;
    Ok(rows.iter().map(|row| (-row.iter().map(|x| f64::from(*x)).sum::<f64>(), row.len())).collect())
}

/// The mean over all ids, with the error of a ratio of two means over rows.
fn summarise(per_row: &[(f64, usize)], policy: &SimpleAr, whole_rows: bool) -> Summary {
    let (rows, columns) = policy.grid();
    let n = per_row.len() as f64;
    let tokens: usize = per_row.iter().map(|(_, n_ids)| n_ids).sum();
    let nll = per_row.iter().map(|(sum, _)| sum).sum::<f64>() / tokens.max(1) as f64;
    let residual = |(sum, n_ids): &(f64, usize)| (sum - nll * *n_ids as f64).powi(2);
    let variance = per_row.iter().map(residual).sum::<f64>() / (n - 1.0).max(1.0);
    let pixels_per_token = (policy.cosmos().config().spatial_compression as f64).powi(2);
    Summary {
        images: per_row.len(),
        tokens_per_image: rows * columns,
        tokens,
        nll,
        standard_error: (variance / n).sqrt() * n / tokens.max(1) as f64,
        perplexity: nll.exp(),
        bits_per_pixel: (!whole_rows).then_some(nll / std::f64::consts::LN_2 / pixels_per_token),
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
                let image = open_opaque(&folder.join(image))?;
                encode(policy, &[image])?.swap_remove(0)
            }
            (None, None) => return Err(fault("has neither \"image_path\" nor \"codes\"; give one".into())),
        };
        Ok((Prompt::new(entry.caption), policy.trace_of(&codes)))
    };
    entries.into_iter().enumerate().map(example).collect()
}
