//! Rewards that look at pixels alone, against Pillow (`golden/image_rewards.py`, Pillow 13.0.0).

use grpo::{Prompt, Reward, Seed};
use grpo_rewards::{Brightness, JpegCompressibility, Random};
use image::{Rgb, RgbImage};

fn pattern() -> RgbImage {
    RgbImage::from_fn(40, 24, |x, y| Rgb([7 * x, 11 * y, 5 * x * y].map(|level| (level % 256) as u8)))
}

#[test]
fn brightness_is_pillows_luma() {
    let score = |image: &RgbImage| Brightness.score(&Prompt::new("any"), image).unwrap();
    assert!((score(&pattern()) - 0.481_036_47).abs() < 1e-6);
    assert_eq!(score(&RgbImage::new(3, 3)), 0.0);
    assert!((score(&RgbImage::from_pixel(3, 3, Rgb([0, 255, 0]))) - 0.587).abs() < 1e-6);
}

#[test]
fn compressibility_is_near_pillows_size() {
    let score = JpegCompressibility.score(&Prompt::new("any"), &pattern()).unwrap();
    assert!((score + 2.043).abs() < 0.2, "{score}");
}

#[test]
fn noise_compresses_worse_than_a_flat_picture() {
    let mut draws = Seed::new(4).draws();
    let noise = RgbImage::from_fn(64, 64, |_, _| Rgb([0; 3].map(|_: u8| draws.below(256) as u8)));
    let score = |image: &RgbImage| JpegCompressibility.score(&Prompt::new("any"), image).unwrap();
    let (noise, flat) = (score(&noise), score(&RgbImage::new(64, 64)));
    assert!(noise < 4.0 * flat, "noise {noise}, flat {flat}");
}

#[test]
fn an_empty_picture_is_an_error() {
    let (prompt, empty) = (Prompt::new("any"), RgbImage::new(0, 5));
    let error = Brightness.score(&prompt, &empty).unwrap_err().to_string();
    assert_eq!(error, "image is 0 x 5 pixels; give one with at least one pixel");
    assert!(JpegCompressibility.score(&prompt, &empty).is_err());
}

#[test]
fn a_random_score_is_uniform_and_knows_neither_picture_nor_prompt() {
    let score = |prompt: &str, image: &RgbImage| Random.score(&Prompt::new(prompt), image).unwrap();
    // Pictures that differ in one level of one pixel, in order.
    let near = |n: u32| RgbImage::from_fn(8, 8, |x, y| Rgb([if (x, y) == (3, 3) { (n % 256) as u8 } else { 9 }; 3]));
    let scores: Vec<f32> = (0..256).map(|n| score("a cat", &near(n))).collect();
    assert!(scores.iter().all(|score| (0.0..1.0).contains(score)));
    let mean = scores.iter().sum::<f32>() / 256.0;
    // The mean of 256 uniform draws has a deviation of 0.018, that of their square one of 0.019.
    assert!((mean - 0.5).abs() < 0.07, "{mean}");
    let square = scores.iter().map(|score| score * score).sum::<f32>() / 256.0;
    assert!((square - 1.0 / 3.0).abs() < 0.08, "{square}");
    let neighbours = scores.windows(2).map(|pair| (pair[0] - mean) * (pair[1] - mean)).sum::<f32>() / 255.0;
    assert!(neighbours.abs() < 0.02, "neighbours agree: {neighbours}");
    assert_ne!(score("a cat", &near(0)), score("a dog", &near(0)));
    assert_ne!(score("a cat", &RgbImage::new(2, 8)), score("a cat", &RgbImage::new(8, 2)), "a shape counts");
}
