//! Pictures that can be judged, and what becomes of a batch in which one cannot.

use grpo::{BoxError, Error, Prompt, Result};
use image::RgbImage;

/// The longest side that is judged; such a picture takes 192 MiB.
const MAX_SIDE: u32 = 8192;

/// That a picture has pixels, and not more than anybody means.
pub(crate) fn check_picture(image: &RgbImage) -> Result<()> {
    let (width, height) = image.dimensions();
    if width.min(height) >= 1 && width.max(height) <= MAX_SIDE {
        return Ok(());
    }
    let limits = format!("every side must be at least 1 and at most {MAX_SIDE}");
    Err(Error::config(format!("an image of {width}x{height} cannot be judged; {limits}")))
}

/// Scores the pictures that can be judged as one batch, and fails the others alone.
pub(crate) fn score_sound(
    batch: &[(&Prompt, &RgbImage)],
    score_batch: impl Fn(&[(&Prompt, &RgbImage)]) -> Result<Vec<f32>, BoxError>,
) -> Vec<Result<f32, BoxError>> {
    let faults = batch.iter().map(|(_, image)| check_picture(image).err());
    let faults: Vec<Option<Error>> = faults.collect();
    let sound = batch.iter().zip(&faults).filter(|(_, fault)| fault.is_none()).map(|(&row, _)| row);
    let sound: Vec<(&Prompt, &RgbImage)> = sound.collect();
    let alone = |row: &(&Prompt, &RgbImage)| {
        let scores = score_batch(std::slice::from_ref(row))?;
        scores.first().copied().ok_or_else(|| "the networks returned no score".into())
    };
    let mut scores = match score_batch(&sound) {
        Ok(scores) if scores.len() == sound.len() => scores.into_iter().map(Ok).collect(),
        // What failed together may be the fault of one: a prompt without the column that is asked for.
        _ => sound.iter().map(alone).collect::<Vec<Result<f32, BoxError>>>(),
    }
    .into_iter();
    let missing = || Err("the networks returned too few scores".into());
    let score = |fault: Option<Error>| match fault {
        Some(fault) => Err(fault.into()),
        None => scores.next().unwrap_or_else(missing),
    };
    faults.into_iter().map(score).collect()
}
