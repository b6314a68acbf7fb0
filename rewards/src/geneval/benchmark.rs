//! A folder of images judged, and the published table of it.

use std::collections::BTreeMap;
use std::path::Path;

use grpo::{BoxError, Error, Result};
use image::RgbImage;
use serde::Serialize;

use super::folder::{PromptFolder, read_folders};
use super::judge::Verdict;
use super::metadata::{Metadata, Tag};
use super::prompts::prompts;
use crate::evaluation::{Counts, FailedImage, Report, Row, mean, sampler_settings};
use grpo::picture::open_image_upright;

/// Images of each prompt in every published number.
const IMAGES_PER_PROMPT: usize = 4;

/// One image as the benchmark sees it.
#[derive(Clone, Copy, Debug)]
pub struct Sample<'a> {
    /// The file from the folder of images, such as `00000/samples/0000.png`.
    pub name: &'a str,
    /// What it should show.
    pub metadata: &'a Metadata,
    /// The picture.
    pub image: &'a RgbImage,
}

/// The verdict on one image, in the fields of the published program's results but for `details`, the boxes it kept.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ImageVerdict {
    /// The file from the folder of images.
    pub filename: String,
    /// The task.
    pub tag: Tag,
    /// The caption.
    pub prompt: String,
    /// Whether every rule holds.
    pub correct: bool,
    /// The rules that failed.
    pub reason: String,
    /// The prompt's line of metadata as text, by which the published summary tells prompts apart.
    pub metadata: String,
}

/// A benchmark that is being run; `judge` it, or look at how much there is first.
#[derive(Clone, Debug)]
pub struct Benchmark {
    folders: Vec<PromptFolder>,
    report: Report,
}

impl Benchmark {
    /// Reads the layout of a folder of images; no image is opened yet.
    pub fn read(dir: &Path) -> Result<Self> {
        let folders = read_folders(dir)?;
        let mut report = Report::new("geneval", "official");
        report.sampler = sampler_settings(dir)?;
        Ok(Self { folders, report })
    }

    /// How many images there are to judge.
    pub fn n_images(&self) -> usize {
        self.folders.iter().map(|folder| folder.images.len()).sum()
    }

    /// Judges every image and sums up; an image that cannot be opened or judged is a failure of its own.
    pub fn judge(
        self,
        mut verdict: impl FnMut(Sample<'_>) -> Result<Verdict, BoxError>,
    ) -> Result<(Report, Vec<ImageVerdict>)> {
        let Self { folders, mut report } = self;
        let mut verdicts = Vec::new();
        let mut tasks: BTreeMap<Tag, Task> = BTreeMap::new();
        for folder in &folders {
            let judged = judge_folder(folder, &mut verdict, &mut report)?;
            let n_found = folder.images.len();
            tasks.entry(folder.metadata.tag).or_default().add_prompt(n_found, &judged);
            if n_found < IMAGES_PER_PROMPT {
                report.missing.push(format!("{}/samples: {n_found} of {IMAGES_PER_PROMPT} images", folder.name));
            }
            verdicts.extend(judged);
        }
        sum_up(&mut report, &tasks);
        report.notes.push(coverage(&folders)?);
        Ok((report, verdicts))
    }
}

fn judge_folder(
    folder: &PromptFolder,
    verdict: &mut dyn FnMut(Sample<'_>) -> Result<Verdict, BoxError>,
    report: &mut Report,
) -> Result<Vec<ImageVerdict>> {
    let metadata = &folder.metadata;
    let line = serde_json::to_string(metadata).map_err(|error| Error::config(error.to_string()))?;
    let mut judged = Vec::with_capacity(folder.images.len());
    for path in &folder.images {
        let name = folder.image_name(path);
        let image = open_image_upright(path).map_err(BoxError::from);
        match image.and_then(|image| verdict(Sample { name: &name, metadata, image: &image })) {
            Err(error) => report.failed.push(FailedImage::new(name, error)),
            Ok(Verdict { correct, reason }) => judged.push(ImageVerdict {
                filename: name,
                tag: metadata.tag,
                prompt: metadata.prompt.clone(),
                correct,
                reason,
                metadata: line.clone(),
            }),
        }
    }
    Ok(judged)
}

/// What is counted of one task.
#[derive(Clone, Debug, Default)]
struct Task {
    scores: Vec<f64>,
    n_found: usize,
    n_expected: usize,
    n_prompts: usize,
    n_prompts_right: usize,
}

impl Task {
    fn add_prompt(&mut self, n_found: usize, judged: &[ImageVerdict]) {
        self.scores.extend(judged.iter().map(|one| f64::from(u8::from(one.correct))));
        self.n_found += n_found;
        self.n_expected += n_found.max(IMAGES_PER_PROMPT);
        self.n_prompts += 1;
        self.n_prompts_right += usize::from(judged.iter().any(|one| one.correct));
    }

    fn pessimistic(&self) -> f64 {
        self.scores.iter().sum::<f64>() / self.n_expected as f64
    }
}

/// As the published summary: a task is the mean over its images, the number the mean over tasks.
fn sum_up(report: &mut Report, tasks: &BTreeMap<Tag, Task>) {
    let row = |(tag, task): (&Tag, &Task)| {
        let score = mean(&task.scores)?;
        Some(Row { pessimistic: Some(task.pessimistic()), ..Row::new(tag.name(), score, task.scores.len()) })
    };
    report.rows = tasks.iter().filter_map(row).collect();
    report.overall = mean(&report.rows.iter().map(|row| row.score).collect::<Vec<_>>());
    report.pessimistic = mean(&tasks.values().map(Task::pessimistic).collect::<Vec<_>>());
    let unjudged: Vec<&str> =
        tasks.iter().filter(|(_, task)| task.scores.is_empty()).map(|(tag, _)| tag.name()).collect();
    if !unjudged.is_empty() {
        let (n, of) = (report.rows.len(), tasks.len());
        report
            .notes
            .push(format!("no image of {} could be judged: a mean over {n} of {of} tasks", unjudged.join(", ")));
    }
    let total = |n: fn(&Task) -> usize| tasks.values().map(n).sum();
    let scored: usize = total(|task| task.scores.len());
    report.images = Counts { expected: total(|task| task.n_expected), found: total(|task| task.n_found), scored };
    let n_right: f64 = tasks.values().flat_map(|task| &task.scores).sum();
    let (n_prompts, n_prompts_right): (usize, usize) = (total(|t| t.n_prompts), total(|t| t.n_prompts_right));
    if scored > 0 {
        let (images, prompts) = (n_right / scored as f64, n_prompts_right as f64 / n_prompts as f64);
        report.notes.push(format!(
            "correct images: {:.2} %; prompts with one: {:.2} %",
            100.0 * images,
            100.0 * prompts
        ));
    }
}

fn coverage(folders: &[PromptFolder]) -> Result<String> {
    let published = prompts()?;
    let n = published.iter().filter(|prompt| folders.iter().any(|folder| folder.metadata == **prompt)).count();
    let n_own = folders.iter().filter(|folder| !published.contains(&folder.metadata)).count();
    let own = if n_own == 0 { String::new() } else { format!(", and {n_own} folders of other prompts") };
    let whole = n == published.len() && n_own == 0;
    let rest = if whole { "" } else { "; the number does not compare with one over all of them alone" };
    Ok(format!("{n} of the {} published prompts{own}{rest}", published.len()))
}
