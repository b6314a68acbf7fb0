//! `grpo score`: what rewards say of images.

use std::path::{Path, PathBuf};

use clap::Args;
use grpo::picture::{image_size, is_named_as_image, open_image};
use grpo::{Failed, Prompt, RewardSet};
use image::RgbImage;
use serde_json::{Map, Value, json};

use super::{at_least_one, print, progress, tell};
use crate::config::{GivenFile, RewardSource, Weighed};
use crate::failure::{Failure, Outcome};
use crate::parts::{ScorerArgs, Scorers};
use crate::prompts;

/// The images that are in memory at a time, decoded, in bytes.
const BUDGET: u64 = 256 << 20;

/// Score images with one or several rewards, each against every prompt.
#[derive(Args)]
pub struct Score {
    /// Which reward: clip, hps, brightness, compressibility, random, geneval, or the NAME of a --scorer; may be given again.
    #[arg(long, required = true)]
    reward: Vec<String>,
    #[command(flatten)]
    scorers: ScorerArgs,
    /// What the images should show; may be given again.
    #[arg(long, required_unless_present = "prompts")]
    prompt: Vec<String>,
    /// A file of prompts: a text a line, or a JSON object with a "prompt" and columns a line.
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Score the first image against the first prompt, the second against the second and so on.
    #[arg(long)]
    paired: bool,
    /// Images scored at a time; as many as fit 256 MiB, and at most 32, where absent.
    #[arg(long, value_parser = at_least_one())]
    batch: Option<usize>,
    /// PNG, JPEG or WebP files, or folders of them.
    #[arg(required = true)]
    images: Vec<PathBuf>,
    /// One JSON object a line for each image and prompt.
    #[arg(long)]
    json: bool,
}

/// One image against one prompt.
struct Row<'a> {
    path: &'a Path,
    prompt: &'a Prompt,
    /// By reward; a failure of the image is one of each.
    scores: Vec<Option<Result<f32, String>>>,
}

impl Score {
    /// Runs it.
    pub fn run(self) -> Outcome<()> {
        let scorers = self.scorers.scorers()?;
        let sources = self.reward.iter().map(|name| source(name, &scorers)).collect::<Outcome<Vec<_>>>()?;
        let named = sources.iter().flat_map(RewardSource::scorers).collect();
        scorers.check_all_asked(&named, "ask for it by --reward NAME")?;
        let mut asked: Vec<Prompt> = self.prompt.iter().map(Prompt::new).collect();
        if let Some(path) = &self.prompts {
            asked.extend(prompts::read(path)?);
        }
        let paths = image_files(&self.images)?;
        if self.paired && paths.len() != asked.len() {
            let (images, prompts) = (paths.len(), asked.len());
            return Err(Failure::user(format!(
                "--paired: {images} images and {prompts} prompts; give as many of each"
            )));
        }
        let rewards = scorers.rewards(&sources)?;
        if !self.json {
            print(&format!(
                "{}  image  prompt",
                rewards.names().map(|name| format!("{name:>15}")).collect::<String>()
            ))?;
        }
        self.score(&rewards, &paths, &asked)
    }

    fn score(&self, rewards: &RewardSet<RgbImage>, paths: &[PathBuf], prompts: &[Prompt]) -> Outcome<()> {
        let names: Vec<&str> = rewards.names().collect();
        let (bar, mut n_failed) = (progress(paths.len()), 0);
        let mut rest = paths;
        while !rest.is_empty() {
            let batch = &rest[..self.batch_len(rest)];
            let first = paths.len() - rest.len();
            for row in self.batch(rewards, batch, |image| match self.paired {
                true => &prompts[first + image..=first + image],
                false => prompts,
            })? {
                n_failed += row.scores.iter().flatten().filter(|score| score.is_err()).count();
                bar.suspend(|| self.show(&names, &row))?;
            }
            bar.inc(batch.len() as u64);
            rest = &rest[batch.len()..];
        }
        bar.finish_and_clear();
        match n_failed {
            0 => Ok(()),
            n => Err(Failure::user(format!("{n} scores are missing; each line of them says why"))),
        }
    }

    /// How many of the next images are scored together.
    fn batch_len(&self, paths: &[PathBuf]) -> usize {
        if let Some(batch) = self.batch {
            return batch.min(paths.len());
        }
        // A file whose size cannot be told fails where it is opened, and takes no memory.
        let bytes = |path: &PathBuf| image_size(path).map_or(0, |(w, h)| u64::from(w) * u64::from(h) * 3);
        let mut sum = 0;
        let fits = paths.iter().take(32).take_while(|path| {
            sum += bytes(path);
            sum <= BUDGET
        });
        fits.count().max(1)
    }

    /// Every image with its prompts; one that cannot be read or judged says why.
    fn batch<'a>(
        &self,
        rewards: &RewardSet<RgbImage>,
        paths: &'a [PathBuf],
        prompts_of: impl Fn(usize) -> &'a [Prompt],
    ) -> Outcome<Vec<Row<'a>>> {
        let images: Vec<grpo::Result<RgbImage>> = paths.iter().map(|path| open_image(path)).collect();
        let pairs: Vec<(usize, &Prompt)> =
            (0..paths.len()).flat_map(|image| prompts_of(image).iter().map(move |prompt| (image, prompt))).collect();
        let readable = pairs.iter().filter_map(|&(image, prompt)| Some((prompt, images[image].as_ref().ok()?)));
        let mut scored = rewards.score_apart(&readable.collect::<Vec<_>>())?.into_iter();
        let cell = |image: usize, score: Option<Result<f32, Failed>>| {
            let named = |Failed { reward, why }| format!("{}: reward `{reward}`: {why}", paths[image].display());
            score.map(|score| score.map_err(named))
        };
        let scores = |image: usize| match &images[image] {
            Err(error) => vec![Some(Err(error.to_string())); rewards.len()],
            Ok(_) => scored.next().unwrap_or_default().into_iter().map(|score| cell(image, score)).collect(),
        };
        let scores: Vec<Vec<Option<Result<f32, String>>>> = pairs.iter().map(|(image, _)| *image).map(scores).collect();
        let row = |((image, prompt), scores): ((usize, &'a Prompt), _)| Row { path: &paths[image], prompt, scores };
        Ok(pairs.into_iter().zip(scores).map(row).collect())
    }

    fn show(&self, names: &[&str], row: &Row<'_>) -> Outcome<()> {
        if self.json {
            let mut line = json!({"image": row.path, "prompt": row.prompt.text});
            let (mut scores, mut failed) = (Map::new(), Map::new());
            for (name, score) in names.iter().zip(&row.scores) {
                match score {
                    Some(Err(why)) => failed.insert((*name).into(), json!(why)),
                    Some(Ok(score)) => scores.insert((*name).into(), json!(score)),
                    None => scores.insert((*name).into(), Value::Null),
                };
            }
            line["rewards"] = Value::Object(scores);
            if !failed.is_empty() {
                line["failed"] = Value::Object(failed);
            }
            return print(&line.to_string());
        }
        let mut told: Vec<&String> = row.scores.iter().flatten().filter_map(|score| score.as_ref().err()).collect();
        told.dedup();
        told.into_iter().for_each(|why| tell(&format!("error: {why}")));
        let cell = |score: &Option<Result<f32, String>>| match score {
            None => format!("{:>15}", "-"),
            Some(Err(_)) => format!("{:>15}", "failed"),
            Some(Ok(score)) => format!("{score:>15.4}"),
        };
        let cells: String = row.scores.iter().map(cell).collect();
        print(&format!("{cells}  {}  {}", row.path.display(), row.prompt.text))
    }
}

/// A reward by its name alone.
fn source(name: &str, scorers: &Scorers) -> Outcome<RewardSource> {
    let plain = Weighed::default();
    Ok(match name {
        "clip" => RewardSource::Clip(plain),
        "hps" => RewardSource::Hps(plain),
        "geneval" => RewardSource::Geneval(plain),
        "brightness" => RewardSource::Brightness(plain),
        "random" => RewardSource::Random(plain),
        "compressibility" => RewardSource::Compressibility(plain),
        other if scorers.names().any(|given| given == other) => {
            RewardSource::Given(GivenFile { name: other.into(), counts: plain })
        }
        other => {
            return Err(Failure::user(format!(
                "--reward {other}: no such reward; give clip, hps, brightness, compressibility, random, geneval, or add --scorer \
                 {other}=WHERE"
            )));
        }
    })
}

/// The files, and those of folders in name order.
fn image_files(given: &[PathBuf]) -> Outcome<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in given {
        if !path.is_dir() {
            files.push(path.clone());
            continue;
        }
        let entries = std::fs::read_dir(path).map_err(|error| grpo::Error::file(path, error))?;
        let mut inside: Vec<PathBuf> = entries
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.is_file() && is_named_as_image(path))
            .collect();
        if inside.is_empty() {
            return Err(Failure::user(format!("{}: the folder holds no PNG, JPEG or WebP file", path.display())));
        }
        inside.sort();
        files.extend(inside);
    }
    Ok(files)
}
