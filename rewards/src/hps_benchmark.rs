//! The HPSv2 benchmark: the mean score of a folder of images, by style.
//!
//! Paper: Wu et al., 2023, "Human Preference Score v2". Images lie as `DIR/anime/00000.jpg`, one for each prompt of
//! `PROMPTS/anime.json`, a list of texts; 800 in each of four styles. A style's number is the mean of the means of
//! blocks of 80 images, its spread their population standard deviation; the average is over all images. As in the
//! published program, blocks are cut from the images that are there, so a missing one shifts the blocks after it; the
//! report names it. Scores are 100 times the reward, a cosine.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use grpo::{BoxError, Error, Prompt, Result, Reward};
use image::RgbImage;

use crate::evaluation::{Counts, FailedImage, Report, Row, mean, sampler_settings};
use grpo::picture::open_image;

/// Images whose mean is one value of the spread.
const BLOCK: usize = 80;
/// Images that are scored at a time.
const BATCH: usize = 16;
/// The reward's unit in the published tables.
const SCALE: f64 = 100.0;

/// A benchmark that is being run; `judge` it, or look at how much there is first.
#[derive(Clone, Debug)]
pub struct Benchmark {
    styles: Vec<Style>,
    report: Report,
}

#[derive(Clone, Debug)]
struct Style {
    name: String,
    /// Images that are there, with what they should show.
    images: Vec<(PathBuf, Prompt)>,
}

impl Benchmark {
    /// Lists the styles' folders and reads their prompts; no image is opened yet.
    pub fn read(dir: &Path, prompts: &Path) -> Result<Self> {
        let failed = |error| Error::file(dir, error);
        let names: std::io::Result<Vec<PathBuf>> =
            std::fs::read_dir(dir).map_err(failed)?.map(|entry| Ok(entry?.path())).collect();
        let mut folders = names.map_err(failed)?;
        folders.retain(|path| path.is_dir());
        if folders.is_empty() {
            return Err(Error::file(dir, "no folder in it; expected one for each style, such as DIR/anime/00000.jpg"));
        }
        // A style with prompts and without a folder is missing as a whole.
        folders.extend(styles_with_prompts(prompts)?.into_iter().map(|style| dir.join(style)));
        folders.sort();
        folders.dedup();
        let mut report = Report::new("hps", "official");
        report.sampler = sampler_settings(dir)?;
        let mut styles = Vec::with_capacity(folders.len());
        for folder in folders {
            styles.push(Style::read(&folder, prompts, &mut report)?);
        }
        report.images.found = styles.iter().map(|style| style.images.len()).sum();
        Ok(Self { styles, report })
    }

    /// How many images there are to judge.
    pub fn n_images(&self) -> usize {
        self.report.images.found
    }

    /// Scores every image and sums up; `done` is called with the number of images after each batch.
    pub fn judge(self, reward: &dyn Reward<RgbImage>, mut done: impl FnMut(usize)) -> Report {
        let Self { styles, mut report } = self;
        let mut all = Vec::new();
        for style in &styles {
            let mut scores = Vec::with_capacity(style.images.len());
            for batch in style.images.chunks(BATCH) {
                let judged = batch.iter().zip(score_batch(batch, reward));
                judged.for_each(|((path, _), score)| match score {
                    Ok(score) => scores.push(score),
                    Err(error) => report.failed.push(FailedImage::new(style.image_name(path), error)),
                });
                done(batch.len());
            }
            report.rows.extend(row(&style.name, &scores));
            all.extend(scores);
        }
        report.images.scored = all.len();
        report.overall = mean(&all);
        report
    }
}

impl Style {
    fn read(folder: &Path, prompts: &Path, report: &mut Report) -> Result<Self> {
        let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let file = prompts.join(format!("{name}.json"));
        let remedy = "give the prompts of each style as a list of texts";
        let text = std::fs::read_to_string(&file).map_err(|error| Error::file(&file, format!("{error}; {remedy}")))?;
        let prompts: Vec<String> =
            serde_json::from_str(&text).map_err(|error| Error::file(&file, format!("{error}; {remedy}")))?;
        let Counts { expected, .. } = &mut report.images;
        *expected += prompts.len();
        let mut images = Vec::with_capacity(prompts.len());
        for (row, prompt) in prompts.into_iter().enumerate() {
            let paths = ["jpg", "png"].map(|ending| folder.join(format!("{row:05}.{ending}")));
            match paths.into_iter().find(|path| path.is_file()) {
                Some(path) => images.push((path, Prompt::new(prompt))),
                None => report.missing.push(format!("{name}/{row:05}.jpg")),
            }
        }
        Ok(Self { name, images })
    }

    fn image_name(&self, path: &Path) -> String {
        format!("{}/{}", self.name, path.file_name().unwrap_or_default().to_string_lossy())
    }
}

/// The names of `PROMPTS/*.json`.
fn styles_with_prompts(prompts: &Path) -> Result<Vec<OsString>> {
    let failed = |error| Error::file(prompts, error);
    let mut styles = Vec::new();
    for entry in std::fs::read_dir(prompts).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.extension().is_some_and(|ending| ending == "json") {
            styles.extend(path.file_stem().map(OsStr::to_os_string));
        }
    }
    Ok(styles)
}

fn score_batch(batch: &[(PathBuf, Prompt)], reward: &dyn Reward<RgbImage>) -> Vec<Result<f64, BoxError>> {
    let opened: Vec<Result<RgbImage>> = batch.iter().map(|(path, _)| open_image(path)).collect();
    let pairs = batch.iter().zip(&opened);
    let readable: Vec<(&Prompt, &RgbImage)> =
        pairs.filter_map(|((_, prompt), image)| Some((prompt, image.as_ref().ok()?))).collect();
    let mut scores = reward.score_each(&readable).into_iter();
    let mut next = || match scores.next() {
        Some(Ok(score)) if !score.is_finite() => Err(format!("the reward gave {score}").into()),
        Some(score) => score.map(|score| SCALE * f64::from(score)),
        None => Err("the reward gave too few scores".into()),
    };
    opened.into_iter().map(|image| image.map_err(BoxError::from).and_then(|_| next())).collect()
}

fn row(name: &str, scores: &[f64]) -> Option<Row> {
    let blocks: Vec<f64> = scores.chunks(BLOCK).filter_map(mean).collect();
    let score = mean(&blocks)?;
    let squares: Vec<f64> = blocks.iter().map(|block| (block - score).powi(2)).collect();
    Some(Row { std: mean(&squares).map(f64::sqrt), ..Row::new(name, score, scores.len()) })
}
