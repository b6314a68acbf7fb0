//! Panels: a step's groups as one picture, so that reward hacking is seen and not only plotted.
//!
//! One group a row under its prompt, best reward first, each image captioned with its scores and its advantage.

use std::fs;
use std::path::{Path, PathBuf};

use font8x8::UnicodeFonts;
use image::imageops::{self, FilterType};
use image::{Rgb, RgbImage};
use serde_json::Value;

use crate::{Error, Group, Policy, Result, RunFolder, Sample};

const LETTER: u32 = 8;
pub(crate) const LINE: u32 = 10;
const GAP: u32 = 4;
/// Narrow images are enlarged so that a caption of 14 letters fits below them.
const MIN_CELL: u32 = 14 * LETTER;
/// Large images are reduced to this, so that a panel of a full-size run stays a picture one can open.
const MAX_CELL: u32 = 256;
pub(crate) const PAPER: Rgb<u8> = Rgb([255, 255, 255]);
pub(crate) const INK: Rgb<u8> = Rgb([30, 30, 30]);
const GOOD: Rgb<u8> = Rgb([0, 120, 40]);
const BAD: Rgb<u8> = Rgb([180, 30, 30]);

/// One picture with its lines of caption.
struct Cell<'a> {
    picture: &'a RgbImage,
    caption: Vec<(String, Rgb<u8>)>,
}

/// The groups as a picture; `None` where no sample is one.
///
/// `advantages` are in the groups' order, one row per group, or empty where there are none (held-out samples).
pub fn panel<P: Policy>(groups: &[Group<P>], advantages: &[Vec<f32>], names: &[String]) -> Option<RgbImage> {
    let rows: Vec<(String, Vec<Cell<'_>>)> = groups
        .iter()
        .enumerate()
        .map(|(row, group)| (group.prompt.text.clone(), cells(group, advantages.get(row), names)))
        .filter(|(_, cells)| !cells.is_empty())
        .collect();
    (!rows.is_empty()).then(|| draw(&rows))
}

fn labelled((label, picture): &(String, RgbImage)) -> Cell<'_> {
    Cell { picture, caption: vec![(label.clone(), INK)] }
}

/// Rows of pictures, each under its title and each picture over its label; `None` where there is no picture.
pub fn gallery(rows: &[(String, Vec<(String, RgbImage)>)]) -> Option<RgbImage> {
    let drawn: Vec<(String, Vec<Cell<'_>>)> =
        rows.iter().map(|(title, pictures)| (title.clone(), pictures.iter().map(labelled).collect())).collect();
    drawn.iter().any(|(_, cells)| !cells.is_empty()).then(|| draw(&drawn))
}

fn cells<'a, P: Policy>(group: &'a Group<P>, advantages: Option<&Vec<f32>>, names: &[String]) -> Vec<Cell<'a>> {
    let cell = |sample: usize| {
        let picture = group.completions.get(sample)?.sample.picture()?;
        let mut caption = Vec::new();
        if let Some(scores) = group.scores.get(sample) {
            for (name, score) in names.iter().zip(&scores.values) {
                let score = score.map_or("-".into(), |score| format!("{score:.3}"));
                caption.push((format!("{name} {score}"), INK));
            }
        }
        if let Some(&advantage) = advantages.and_then(|advantages| advantages.get(sample)) {
            let colour = if advantage >= 0.0 { GOOD } else { BAD };
            caption.push((format!("adv {advantage:+.2}"), colour));
        }
        Some(Cell { picture, caption })
    };
    group.ranking().into_iter().filter_map(cell).collect()
}

/// Sizes that all cells of a panel share.
struct Grid {
    cell_width: u32,
    picture_height: u32,
    row_height: u32,
}

impl Grid {
    fn of<'a, 'b: 'a>(cells: impl Iterator<Item = &'a Cell<'b>> + Clone) -> Self {
        let widest = cells.clone().map(|cell| cell.picture.width()).max().unwrap_or(1).max(1);
        let cell_width = if widest < MIN_CELL { widest * MIN_CELL.div_ceil(widest) } else { widest.min(MAX_CELL) };
        let picture_height = cells.clone().map(|cell| scaled_height(cell, cell_width)).max().unwrap_or(1);
        let lines = cells.map(|cell| cell.caption.len()).max().unwrap_or(0) as u32;
        Self { cell_width, picture_height, row_height: LINE + GAP + picture_height + GAP + lines * LINE + 2 * GAP }
    }

    /// One cell with its upper left corner at `(left, top)`.
    fn place(&self, canvas: &mut RgbImage, cell: &Cell<'_>, (left, top): (u32, u32)) {
        let filter = if cell.picture.width() < self.cell_width { FilterType::Nearest } else { FilterType::Triangle };
        let picture = imageops::resize(cell.picture, self.cell_width, scaled_height(cell, self.cell_width), filter);
        imageops::replace(canvas, &picture, i64::from(left), i64::from(top));
        for (line, (text, colour)) in cell.caption.iter().enumerate() {
            let text: String = text.chars().take((self.cell_width / LETTER) as usize).collect();
            write(canvas, left, top + self.picture_height + GAP + line as u32 * LINE, &text, *colour);
        }
    }
}

fn scaled_height(cell: &Cell<'_>, width: u32) -> u32 {
    let height = u64::from(cell.picture.height()) * u64::from(width) / u64::from(cell.picture.width().max(1));
    height.clamp(1, 4096) as u32
}

fn draw(rows: &[(String, Vec<Cell<'_>>)]) -> RgbImage {
    let grid = Grid::of(rows.iter().flat_map(|(_, cells)| cells));
    let columns = rows.iter().map(|(_, cells)| cells.len()).max().unwrap_or(0) as u32;
    let width = GAP + columns * (grid.cell_width + GAP);
    let mut canvas = RgbImage::from_pixel(width, rows.len() as u32 * grid.row_height + GAP, PAPER);
    for (row, (prompt, cells)) in rows.iter().enumerate() {
        let top = GAP + row as u32 * grid.row_height;
        write(&mut canvas, GAP, top, prompt, INK);
        for (column, cell) in cells.iter().enumerate() {
            let left = GAP + column as u32 * (grid.cell_width + GAP);
            grid.place(&mut canvas, cell, (left, top + LINE + GAP));
        }
    }
    canvas
}

/// Writes one line; letters without a glyph become `?`, and what does not fit is cut off.
pub(crate) fn write(canvas: &mut RgbImage, left: u32, top: u32, text: &str, colour: Rgb<u8>) {
    let fits = (canvas.width().saturating_sub(left) / LETTER) as usize;
    for (at, letter) in text.chars().take(fits).enumerate() {
        let glyph = font8x8::BASIC_FONTS.get(letter).or_else(|| font8x8::BASIC_FONTS.get('?')).unwrap_or_default();
        let dots = glyph.iter().zip(top..).flat_map(|(bits, y)| {
            (0..LETTER).filter(move |x| bits >> x & 1 == 1).map(move |x| (left + at as u32 * LETTER + x, y))
        });
        for (x, y) in dots.filter(|(_, y)| *y < canvas.height()).collect::<Vec<_>>() {
            canvas.put_pixel(x, y, colour);
        }
    }
}

/// The held-out samples of a run at its first evaluation and after `step` steps (at its last one where none is named),
/// side by side, for `n_prompts` prompts spread over the set.
///
/// Read from the run's `samples/`, so that a resumed run has its picture too; an error where there are none.
pub fn before_after(run: &RunFolder, n_prompts: usize, step: Option<usize>) -> Result<RgbImage> {
    let folder = run.samples();
    let entries = fs::read_dir(&folder).map_err(|error| Error::file(&folder, error))?;
    let steps =
        entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.strip_prefix("held_out-")?.parse::<usize>().ok());
    let steps: Vec<usize> = steps.filter(|at| step.is_none_or(|step| *at <= step)).collect();
    let (first, last) = (steps.iter().min(), steps.iter().max());
    let (Some(first), Some(last)) = (first, last.filter(|last| step.is_none_or(|step| **last == step))) else {
        return Err(Error::file(&folder, "there are no held-out samples; give the trainer prompts with hold_out"));
    };
    if first == last {
        return Err(Error::file(
            &folder,
            "there is one evaluation of the held-out prompts, and nothing to compare it with",
        ));
    }
    let [before, after] = [first, last].map(|step| folder.join(format!("held_out-{step:05}")));
    let (before, after) = (saved(&before)?, saved(&after)?);
    let every = before.len().div_ceil(n_prompts.max(1)).max(1);
    let mut rows = Vec::new();
    for (prompt, before) in before.iter().step_by(every) {
        let Some((_, after)) = after.iter().find(|(other, _)| other == prompt) else { continue };
        let pictures: Vec<RgbImage> = before.iter().chain(after).map(Saved::open).collect::<Result<_>>()?;
        let captions = before.iter().chain(after).map(|sample| sample.caption.clone());
        rows.push((prompt, pictures, captions.collect::<Vec<_>>()));
    }
    let drawn: Vec<(String, Vec<Cell<'_>>)> = rows
        .iter()
        .map(|(prompt, pictures, captions)| {
            let cells = pictures.iter().zip(captions).map(|(picture, caption)| Cell {
                picture,
                caption: caption.iter().map(|line| (line.clone(), INK)).collect(),
            });
            (format!("{prompt}   (left: before, right: after)"), cells.collect())
        })
        .collect();
    Ok(draw(&drawn))
}

/// A sample in a run's folder.
struct Saved {
    path: PathBuf,
    caption: Vec<String>,
}

impl Saved {
    fn open(&self) -> Result<RgbImage> {
        Ok(image::open(&self.path).map_err(|error| Error::file(&self.path, error))?.to_rgb8())
    }
}

/// The samples of one folder by prompt, in the order of the file.
fn saved(folder: &Path) -> Result<Vec<(String, Vec<Saved>)>> {
    let path = folder.join("samples.jsonl");
    let text = fs::read_to_string(&path).map_err(|error| Error::file(&path, error))?;
    let mut prompts: Vec<(String, Vec<Saved>)> = Vec::new();
    for line in text.lines() {
        let line: Value = serde_json::from_str(line).map_err(|error| Error::file(&path, error))?;
        let (Some(prompt), Some(file)) = (line["prompt"].as_str(), line["image"].as_str()) else { continue };
        let scores = line["rewards"].as_object().into_iter().flatten();
        let caption: Vec<String> =
            scores.filter_map(|(name, score)| score.as_f64().map(|score| format!("{name} {score:.2}"))).collect();
        let sample = Saved { path: folder.join(file), caption };
        match prompts.last_mut().filter(|(last, _)| last == prompt) {
            Some((_, samples)) => samples.push(sample),
            None => prompts.push((prompt.into(), vec![sample])),
        }
    }
    Ok(prompts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_keep_their_order_and_captions_their_place() {
        let [red, blue] = [[255, 0, 0], [0, 0, 255]].map(|c| RgbImage::from_pixel(16, 16, Rgb(c)));
        let cell = |picture| Cell { picture, caption: vec![("clip 0.300".into(), INK)] };
        let drawn = draw(&[("a red square".into(), vec![cell(&red), cell(&blue)])]);
        // 16 px are enlarged 7 times to the 112 px of 14 letters.
        assert_eq!(drawn.width(), GAP + 2 * (112 + GAP));
        let middle = GAP + LINE + GAP + 56;
        assert_eq!(drawn.get_pixel(GAP + 56, middle), &Rgb([255, 0, 0]));
        assert_eq!(drawn.get_pixel(GAP + 112 + GAP + 56, middle), &Rgb([0, 0, 255]));
        let caption_top = GAP + LINE + GAP + 112 + GAP;
        let inked = (0..80).any(|x| drawn.get_pixel(GAP + x, caption_top + 3) == &INK);
        assert!(inked, "no caption below the picture");
    }

    #[test]
    fn a_letter_without_a_glyph_is_no_panic() {
        let mut canvas = RgbImage::new(40, 10);
        write(&mut canvas, 0, 0, "日本 é this is cut off", INK);
        write(&mut canvas, 0, 7, "below the edge", INK);
    }
}
