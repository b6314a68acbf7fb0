//! Every reward of this crate holds to the contract of `grpo::Reward`.

#![expect(clippy::unwrap_used, reason = "a test's helpers may fail the test")]

use grpo::testing::check_reward;
use grpo::{Prompt, Reward, Seed};
use grpo_rewards::geneval::{GenEval, Metadata};
use grpo_rewards::shapes::{ShapesDetector, held_out_prompts};
use grpo_rewards::{Brightness, JpegCompressibility, Random};
use image::{Rgb, RgbImage};

fn noise(seed: u64) -> RgbImage {
    let mut draws = Seed::new(seed).draws();
    RgbImage::from_fn(64, 64, |_, _| Rgb([0; 3].map(|_: u8| draws.below(256) as u8)))
}

fn check(reward: &impl Reward<RgbImage>) {
    let prompts: Vec<Prompt> = held_out_prompts().iter().step_by(40).map(|m| Metadata::to_prompt(m).unwrap()).collect();
    let images: Vec<RgbImage> = (0..prompts.len() as u64).map(noise).collect();
    let batch: Vec<(&Prompt, &RgbImage)> = prompts.iter().zip(&images).collect();
    assert!(batch.len() >= 4);
    check_reward(reward, &batch).unwrap();
}

#[test]
fn rewards_of_pixels_hold_to_it() {
    check(&Brightness);
    check(&JpegCompressibility);
    check(&Random);
    check(&GenEval::new(ShapesDetector::new()));
}

#[cfg(feature = "onnx")]
#[test]
fn rewards_of_networks_hold_to_it() {
    use grpo_rewards::clip::ClipReward;
    use grpo_rewards::onnx::{OnnxReward, SessionOptions};
    check(&ClipReward::tiny().unwrap());
    check(&ClipReward::tiny_hps().unwrap());
    let folders = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/onnx");
    for kind in ["pair", "head", "joint"] {
        check(&OnnxReward::load(&folders.join(kind), &SessionOptions::default()).unwrap());
    }
}
