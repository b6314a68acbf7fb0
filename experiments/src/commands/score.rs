//! `grpo score`: what a reward says of images.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use grpo::Prompt;
use serde_json::json;

use super::{open_image, print};
use crate::config::{RewardSource, Weight};
use crate::failure::Outcome;
use crate::parts;

/// Score images against a prompt with one or several rewards.
#[derive(Args)]
pub struct Score {
    /// Which reward; may be given again.
    #[arg(long, required = true, value_enum)]
    reward: Vec<RewardName>,
    /// What the images should show.
    #[arg(long)]
    prompt: String,
    /// PNG or JPEG files.
    #[arg(required = true)]
    images: Vec<PathBuf>,
    /// One JSON object a line for each image.
    #[arg(long)]
    json: bool,
}

/// The rewards that need nothing but a prompt and an image.
#[derive(Clone, Copy, ValueEnum)]
enum RewardName {
    Clip,
    Hps,
    Brightness,
    Compressibility,
}

impl RewardName {
    fn source(self) -> RewardSource {
        let weight = Weight::default();
        match self {
            Self::Clip => RewardSource::Clip(weight),
            Self::Hps => RewardSource::Hps(weight),
            Self::Brightness => RewardSource::Brightness(weight),
            Self::Compressibility => RewardSource::Compressibility(weight),
        }
    }
}

impl Score {
    /// Runs it.
    pub fn run(self) -> Outcome<()> {
        let sources: Vec<RewardSource> = self.reward.iter().map(|name| name.source()).collect();
        let rewards = parts::rewards(&sources)?;
        let names: Vec<&str> = rewards.names().collect();
        let prompt = Prompt::new(&self.prompt);
        if !self.json {
            print(&format!("{}  image", names.iter().map(|name| format!("{name:>15}")).collect::<String>()))?;
        }
        for path in &self.images {
            let image = open_image(path)?;
            let scores = rewards.score(&[(&prompt, &image)])?;
            let values = scores.into_iter().flat_map(|scores| scores.values);
            let named: Vec<(&str, Option<f32>)> = names.iter().copied().zip(values).collect();
            match self.json {
                true => {
                    let by_name: serde_json::Map<_, _> =
                        named.iter().map(|(name, value)| ((*name).to_string(), json!(value))).collect();
                    print(&json!({"image": path, "prompt": self.prompt, "rewards": by_name}).to_string())?;
                }
                false => {
                    let cells: String =
                        named.iter().map(|(_, value)| format!("{:>15.4}", value.unwrap_or(f32::NAN))).collect();
                    print(&format!("{cells}  {}", path.display()))?;
                }
            }
        }
        Ok(())
    }
}
