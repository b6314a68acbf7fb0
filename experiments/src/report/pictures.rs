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
    /// The picture as a data address.
    address: String,
    #[serde(skip)]
    picture: RgbImage,
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
        Ok(Self { seed: Some(seed), n_images: rows.iter().map(|row| row.cells.len()).sum(), rows })
    }

    /// As one picture; `None` where there are none.
    pub(super) fn drawn(&self) -> Option<RgbImage> {
        let cell = |cell: &Cell| (cell.arm.clone(), cell.picture.clone());
        let rows: Vec<(String, Vec<(String, RgbImage)>)> =
            self.rows.iter().map(|row| (row.prompt.clone(), row.cells.iter().map(cell).collect())).collect();
        gallery(&rows)
    }
}

fn ends(arm: Option<&super::arms::ArmRuns>, seed: u64) -> Option<(&Evaluation, &Evaluation)> {
    arm?.runs.iter().find(|run| run.seed == seed)?.ends()
}

fn rows(columns: &[(&str, &Evaluation)], n_prompts: usize, shown: &[String]) -> Result<Vec<Row>> {
    let Some((_, first)) = columns.first() else { return Ok(Vec::new()) };
    let kept = |idx: &usize| {
        let all = || columns.iter().map(|(_, evaluation)| evaluation.prompts.get(idx));
        all().all(|judged| judged.is_some_and(|judged| !judged.pictures.is_empty()))
    };
    let kept: Vec<usize> = first.prompts.keys().copied().filter(kept).collect();
    let every = kept.len().div_ceil(n_prompts.max(1)).max(1);
    let row = |idx: &usize| {
        let judged = |evaluation: &'_ Evaluation| evaluation.prompts.contains_key(idx);
        let cells = columns.iter().filter(|(_, evaluation)| judged(evaluation));
        let cells: Result<Vec<Option<Cell>>> = cells
            .map(|(arm, evaluation)| evaluation.prompts.get(idx).map_or(Ok(None), |j| cell(arm, j, shown)))
            .collect();
        let prompt = first.prompts.get(idx).map(|judged| judged.text.clone()).unwrap_or_default();
        Ok(Row { prompt, cells: cells?.into_iter().flatten().collect() })
    };
    kept.iter().step_by(every).map(row).collect()
}

fn cell(arm: &str, judged: &Judged, shown: &[String]) -> Result<Option<Cell>> {
    let Some((draw, path)) = judged.pictures.first_key_value() else { return Ok(None) };
    let picture = reduced(open(path)?);
    let scores = judged.scores.get(draw).into_iter().flatten();
    let scores = scores.filter(|(name, _)| shown.contains(name)).map(|(name, score)| (name.clone(), *score));
    Ok(Some(Cell { arm: arm.into(), scores: scores.collect(), address: address(&picture, path)?, picture }))
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
