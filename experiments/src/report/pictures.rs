//! The same held-out prompts and draws side by side: before training, and after it in each arm.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::path::Path;

use base64::Engine;
use grpo::picture::open_image;
use grpo::{Error, Result, gallery};
use image::imageops::{self, FilterType};
use image::{ImageFormat, RgbImage};
use serde::Serialize;

use super::arms::Arms;
use super::compare::UNTRAINED;
use super::record::{Evaluation, Judged};

/// Larger pictures are reduced to this side in pixels, so that a page of them can still be opened.
const MAX_SIDE: u32 = 256;

/// How wide the page shows a picture, in pixels.
const SHOWN_WIDTH: u32 = 112;

/// Rows of prompts, columns of arms.
#[derive(Serialize)]
pub(super) struct Panel {
    /// The seed whose runs are shown.
    seed: Option<u64>,
    n_images: usize,
    rows: Vec<Row>,
}

#[derive(Serialize)]
struct Row {
    prompt: String,
    cells: Vec<Cell>,
}

/// One sample.
#[derive(Serialize)]
struct Cell {
    arm: String,
    /// What the judges and the evaluation gave it.
    scores: BTreeMap<String, f64>,
    /// The sample, where it is a text.
    text: Option<String>,
    /// The picture as a data address.
    address: Option<String>,
    /// Whether the page shows it larger than it is.
    is_small: bool,
    #[serde(skip)]
    picture: Option<RgbImage>,
}

impl Panel {
    /// The first draw of so many prompts, spread over those whose pictures every arm has kept, under the first seed of all.
    pub(super) fn of(arms: &Arms, n_prompts: usize) -> Result<Self> {
        let shared = |seed: &u64| arms.arms.iter().all(|arm| arm.runs.iter().any(|run| run.seed == *seed));
        let Some(seed) = arms.seeds().into_iter().find(shared) else {
            return Ok(Self { seed: None, n_images: 0, rows: Vec::new() });
        };
        let mut columns: Vec<(&str, &Evaluation)> = Vec::new();
        if let Some((start, _)) = ends(arms.untrained(), seed) {
            columns.push((UNTRAINED, start));
        }
        for arm in &arms.arms {
            columns.extend(ends(Some(arm), seed).map(|(_, end)| (arm.name.as_str(), end)));
        }
        let shown = [arms.judges.as_slice(), arms.evaluation.as_slice()].concat();
        let rows = rows(&columns, n_prompts, &shown)?;
        Ok(Self {
            seed: Some(seed),
            n_images: rows.iter().flat_map(|row| &row.cells).filter(|cell| cell.picture.is_some()).count(),
            rows,
        })
    }

    /// As one picture; `None` where there are none.
    pub(super) fn drawn(&self) -> Option<RgbImage> {
        let cell = |cell: &Cell| Some((cell.arm.clone(), cell.picture.clone()?));
        let rows: Vec<(String, Vec<(String, RgbImage)>)> =
            self.rows.iter().map(|row| (row.prompt.clone(), row.cells.iter().filter_map(cell).collect())).collect();
        gallery(&rows)
    }
}

fn ends(arm: Option<&super::arms::ArmRuns>, seed: u64) -> Option<(&Evaluation, &Evaluation)> {
    arm?.runs.iter().find(|run| run.seed == seed)?.ends()
}

/// A prompt of which every arm has kept the same draw.
struct Kept<'a> {
    prompt: String,
    draw: usize,
    /// The arms' names, and what became of the prompt in each.
    all: Vec<(&'a str, &'a Judged)>,
}

fn rows(columns: &[(&str, &Evaluation)], n_prompts: usize, shown: &[String]) -> Result<Vec<Row>> {
    let Some((_, first)) = columns.first() else { return Ok(Vec::new()) };
    // The first draw that every arm has kept of the same prompt.
    let kept = |(idx, prompt): (&usize, &Judged)| {
        let all = columns.iter().map(|(arm, evaluation)| Some((*arm, evaluation.prompts.get(idx)?)));
        let all = all.collect::<Option<Vec<_>>>().filter(|all| all.iter().all(|(_, j)| j.text == prompt.text))?;
        let draw = prompt.scores.keys().copied().find(|draw| all.iter().all(|(_, judged)| judged.is_kept(*draw)))?;
        Some(Kept { prompt: prompt.text.clone(), draw, all })
    };
    let kept: Vec<Kept<'_>> = first.prompts.iter().filter_map(kept).collect();
    let every = kept.len().div_ceil(n_prompts.max(1)).max(1);
    let row = |Kept { prompt, draw, all }: &Kept<'_>| {
        let cells = all.iter().map(|(arm, judged)| cell(arm, judged, (*draw, shown)));
        Ok(Row { prompt: prompt.clone(), cells: cells.collect::<Result<_>>()? })
    };
    kept.iter().step_by(every).map(row).collect()
}

impl Judged {
    fn is_kept(&self, draw: usize) -> bool {
        self.pictures.contains_key(&draw) || self.texts.contains_key(&draw)
    }
}

fn cell(arm: &str, judged: &Judged, (draw, shown): (usize, &[String])) -> Result<Cell> {
    let scores = judged.scores.get(&draw).into_iter().flatten();
    let scores = scores.filter(|(name, _)| shown.contains(name)).map(|(name, score)| (name.clone(), *score)).collect();
    let (arm, text) = (arm.to_string(), judged.texts.get(&draw).cloned());
    let Some(path) = judged.pictures.get(&draw) else {
        return Ok(Cell { arm, scores, text, address: None, is_small: false, picture: None });
    };
    let picture = reduced(open(path)?);
    let (address, is_small) = (Some(address(&picture, path)?), picture.width() < SHOWN_WIDTH);
    Ok(Cell { arm, scores, text, address, is_small, picture: Some(picture) })
}

fn open(path: &Path) -> Result<RgbImage> {
    open_image(path).map_err(|error| Error::file(path, error))
}

fn reduced(picture: RgbImage) -> RgbImage {
    let longest = picture.width().max(picture.height());
    if longest <= MAX_SIDE {
        return picture;
    }
    let side = |side: u32| (u64::from(side) * u64::from(MAX_SIDE) / u64::from(longest)).max(1) as u32;
    imageops::resize(&picture, side(picture.width()), side(picture.height()), FilterType::Triangle)
}

fn address(picture: &RgbImage, path: &Path) -> Result<String> {
    let mut bytes = Cursor::new(Vec::new());
    picture.write_to(&mut bytes, ImageFormat::Png).map_err(|error| Error::file(path, error))?;
    let text = base64::engine::general_purpose::STANDARD.encode(bytes.get_ref());
    Ok(format!("data:image/png;base64,{text}"))
}
