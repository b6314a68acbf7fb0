//! Answers to scores, for one file.

use std::collections::BTreeMap;

use grpo::{BoxError, Error};
use image::RgbImage;

use super::benchmark::Settings;
use super::crops::crops;
use super::questions::{Item, Mode, Question};
use super::vqa::{Crop, Vqa};
use crate::evaluation::mean;

/// One file's score, and what it adds to the categories.
pub(super) struct FileScore {
    pub score: f64,
    /// Scores of questions, by category.
    pub categories: BTreeMap<String, Vec<f64>>,
}

/// Asks and scores; an error is the file's own.
pub(super) fn score_file(
    file: &str,
    image: &RgbImage,
    item: &Item,
    vqa: &dyn Vqa,
    settings: &Settings,
) -> Result<FileScore, BoxError> {
    let Settings { mode, n_pictures, resolution } = *settings;
    let texts: Vec<&str> = item.iter().map(|question| question.text.as_str()).collect();
    let (mut scores, mut categories) = (Vec::new(), BTreeMap::<String, Vec<f64>>::new());
    for (index, picture) in crops(image, n_pictures, resolution, mode)?.into_iter().enumerate() {
        let answers = vqa.answers(&Crop { file, index, picture }, &texts)?;
        if answers.len() != texts.len() {
            return Err(format!("{} answers to {} questions; give one to each", answers.len(), texts.len()).into());
        }
        let raw: Vec<f64> = answers.iter().map(|answer| f64::from(u8::from(answer == "yes"))).collect();
        let zeroed = zeroed(item, raw.clone())?;
        scores.push(mean(&zeroed).unwrap_or(0.0));
        let counted = match mode {
            // The published program reads them after its loop over the pictures, from a copy made before the zeros.
            Mode::Official => {
                categories.clear();
                raw
            }
            Mode::Fixed => zeroed,
        };
        for (question, score) in item.iter().zip(counted) {
            categories.entry(question.category().to_owned()).or_default().push(score);
        }
    }
    let score = mean(&scores).ok_or_else(|| Error::config("n_pictures is 0; a file holds 1 to 4 pictures"))?;
    Ok(FileScore { score, categories })
}

/// The scores after zeros have travelled from parents to children, in the order of the table.
fn zeroed(item: &[Question], mut scores: Vec<f64>) -> Result<Vec<f64>, BoxError> {
    for (at, question) in item.iter().enumerate() {
        for parent in &question.parents {
            let place = item.iter().position(|other| other.id == *parent);
            let place = place
                .ok_or_else(|| format!("question {} depends on question {parent}, which is not there", question.id))?;
            if scores[place] == 0.0 {
                scores[at] = 0.0;
                break;
            }
        }
    }
    Ok(scores)
}
