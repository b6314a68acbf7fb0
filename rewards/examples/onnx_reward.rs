//! The score of pictures by any folder with a `reward.toml`:
//!
//! `cargo run -p grpo-rewards --example onnx_reward -- FOLDER "the prompt" [column=value]… PICTURE…`
#![expect(clippy::print_stdout, reason = "a program's output")]

use std::path::Path;

use grpo::{BoxError, Prompt, Reward};
use grpo_rewards::onnx::{OnnxReward, SessionOptions};
use image::RgbImage;

fn main() -> Result<(), BoxError> {
    let mut arguments = std::env::args().skip(1);
    let usage = "give FOLDER, the prompt, any column=value, and pictures";
    let folder = arguments.next().ok_or(usage)?;
    let mut prompt = Prompt::new(arguments.next().ok_or(usage)?);
    let mut pictures = Vec::new();
    for argument in arguments {
        match argument.split_once('=') {
            Some((column, value)) => prompt = prompt.with(column, value),
            None => pictures.push((image::open(&argument)?.into_rgb8(), argument)),
        }
    }
    let reward = OnnxReward::load(Path::new(&folder), &SessionOptions::default())?;
    let batch: Vec<(&Prompt, &RgbImage)> = pictures.iter().map(|(image, _)| (&prompt, image)).collect();
    for (score, (_, path)) in reward.score_each(&batch).into_iter().zip(&pictures) {
        match score {
            Ok(score) => println!("{} {score:.6} {path}", reward.name()),
            Err(error) => println!("{} failed: {error}: {path}", reward.name()),
        }
    }
    Ok(())
}
