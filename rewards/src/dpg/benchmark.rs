//! A folder of images judged by their questions.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use grpo::{BoxError, Error, Result};

use super::questions::{Mode, Questions};
use super::score::{FileScore, score_file};
use super::vqa::Vqa;
use crate::evaluation::{Counts, FailedImage, Report, Row, mean, sampler_settings};
use grpo::picture::{is_named_as_image, open_image};

/// The pictures in a file of every published number.
const MAX_PICTURES: usize = 4;

/// The longest side of a picture in pixels.
const MAX_SIDE: u32 = 8192;

/// How the images were made, and which way of counting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The way of counting.
    pub mode: Mode,
    /// Pictures in a file, 1 to 4; 4 in every published number.
    pub n_pictures: usize,
    /// The side of one picture in pixels.
    pub resolution: u32,
}

/// A benchmark that is being run; `judge` it, or look at how much there is first.
#[derive(Clone, Debug)]
pub struct Benchmark {
    files: Vec<PathBuf>,
    questions: Questions,
    settings: Settings,
    report: Report,
}

impl Benchmark {
    /// Lists a folder's PNG, JPEG and WebP files, `ITEM.png` with the pictures of each prompt; no image is opened yet.
    pub fn read(dir: &Path, questions: Questions, settings: Settings) -> Result<Self> {
        let Settings { mode, n_pictures, resolution } = settings;
        if !(1..=MAX_PICTURES).contains(&n_pictures) || !(1..=MAX_SIDE).contains(&resolution) {
            return Err(Error::config(format!(
                "{n_pictures} pictures of side {resolution} in a file; give 1 to {MAX_PICTURES} of 1 to {MAX_SIDE} pixels"
            )));
        }
        let files = image_files(dir)?;
        let mut report = Report::new("dpg", mode.name());
        report.sampler = sampler_settings(dir)?;
        Ok(Self { files, questions, settings, report })
    }

    /// How many files there are to judge.
    pub fn n_images(&self) -> usize {
        self.files.len()
    }

    /// Asks every question of every file and sums up; `done` is called after each file.
    ///
    /// A file that cannot be opened, belongs to no item or has no answer is a failure of its own. In the pessimistic
    /// number it scores 0, as does a missing one.
    pub fn judge(self, vqa: &dyn Vqa, mut done: impl FnMut()) -> Report {
        let Self { files, questions, settings, mut report } = self;
        let (mut judged, mut seen) = (Vec::new(), BTreeSet::new());
        for path in &files {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            // As published: the id is the name up to its first dot.
            let id = name.split('.').next().unwrap_or_default();
            seen.insert(id.to_owned());
            match judge_file(path, &name, (id, &questions), vqa, &settings) {
                Err(error) => report.failed.push(FailedImage::new(name, error)),
                Ok(file) => judged.push(file),
            }
            done();
        }
        let scores: Vec<f64> = judged.iter().map(|file| 100.0 * file.score).collect();
        let mut categories = BTreeMap::<String, Vec<f64>>::new();
        for (category, found) in judged.into_iter().flat_map(|file| file.categories) {
            categories.entry(category).or_default().extend(found);
        }
        report.missing = questions.ids().filter(|id| !seen.contains(*id)).map(str::to_owned).collect();
        let expected = files.len() + report.missing.len();
        report.images = Counts { expected, found: files.len(), scored: scores.len() };
        report.overall = mean(&scores);
        report.pessimistic = mean(&scores).map(|score| score * scores.len() as f64 / expected as f64);
        report.rows = category_rows(&categories);
        if settings.mode == Mode::Official {
            report
                .notes
                .push("the table's first row is not asked; categories are of each file's last picture alone".into());
        }
        report
    }
}

fn judge_file(
    path: &Path,
    name: &str,
    (id, questions): (&str, &Questions),
    vqa: &dyn Vqa,
    settings: &Settings,
) -> Result<FileScore, BoxError> {
    let item = questions.item(id).ok_or_else(|| format!("item `{id}` is not in the table of questions"))?;
    score_file(name, &open_image(path)?, item, vqa, settings)
}

fn category_rows(categories: &BTreeMap<String, Vec<f64>>) -> Vec<Row> {
    let mut broad: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for (category, scores) in categories {
        let name = category.split('-').next().unwrap_or_default().trim();
        broad.entry(name).or_default().extend(scores);
    }
    let row = |group: &str, name: &str, scores: &[f64]| {
        let row = Row::new(name, 100.0 * mean(scores)?, scores.len());
        Some(Row { group: group.into(), ..row })
    };
    let broad = broad.iter().filter_map(|(name, scores)| row("L1 category", name, scores));
    let fine = categories.iter().filter_map(|(name, scores)| row("L2 category", name, scores));
    broad.chain(fine).collect()
}

fn image_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let failed = |error| Error::file(dir, error);
    let paths: std::io::Result<Vec<PathBuf>> =
        std::fs::read_dir(dir).map_err(failed)?.map(|entry| Ok(entry?.path())).collect();
    let mut paths = paths.map_err(failed)?;
    paths.retain(|path| path.is_file() && is_named_as_image(path));
    paths.sort();
    match paths.is_empty() {
        true => Err(Error::file(dir, "no PNG, JPEG or WebP file in it; give one file for each item, named by its id")),
        false => Ok(paths),
    }
}
