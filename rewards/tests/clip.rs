//! CLIP's preprocessing, tokens and scores against the Python programs that define them.
#![cfg(feature = "onnx")]
#![expect(clippy::unwrap_used, reason = "in a test a failure is a panic, helpers included")]

use std::path::Path;

use grpo::{Prompt, Reward};
use grpo_rewards::clip::{CONTEXT, ClipReward, Preprocess, Tokenizer};
use image::{Rgb, RgbImage};
use serde::Deserialize;

/// Reads a file that stands beside the program that made it.
fn golden<T: for<'de> Deserialize<'de>>(file: &str) -> T {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(file);
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// The formula of `golden/clip_preprocess.py`.
fn patterned(width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| {
        let base = 3 * x * x + 5 * y * y + 7 * x * y;
        Rgb([0, 40, 80].map(|shift| ((base + shift) % 256) as u8))
    })
}

#[derive(Deserialize)]
struct Resized {
    size: usize,
    cases: Vec<ResizedCase>,
}

#[derive(Deserialize)]
struct ResizedCase {
    width: u32,
    height: u32,
    pil_u8: String,
    tensor_antialias_every_11th: Vec<f32>,
    tensor_no_antialias_every_11th: Vec<f32>,
}

/// The preprocessed picture, brought back to `[size, size, 3]` in `[0, 1]`.
fn resized(preprocess: Preprocess, image: &RgbImage, size: usize) -> Vec<f32> {
    let mean = [0.481_454_66, 0.457_827_5, 0.408_210_73];
    let std = [0.268_629_54, 0.261_302_6, 0.275_777_1];
    let mut pixels = Vec::new();
    preprocess.append(image, size, &mut pixels).unwrap();
    assert_eq!(pixels.len(), 3 * size * size);
    let value = |at: usize, channel: usize| pixels[channel * size * size + at] * std[channel] + mean[channel];
    (0..size * size).flat_map(|at| [0, 1, 2].map(|channel| value(at, channel))).collect()
}

#[test]
fn pil_u8_is_pillow_bit_for_bit() {
    let golden: Resized = golden("clip_preprocess.json");
    for case in golden.cases {
        let values = resized(Preprocess::PilU8, &patterned(case.width, case.height), golden.size);
        let hex: String = values.iter().map(|value| format!("{:02x}", (value * 255.0).round() as u8)).collect();
        assert_eq!(hex, case.pil_u8, "{}x{}", case.width, case.height);
    }
}

#[test]
fn tensor_modes_are_torchvision_within_a_hundredth_of_a_level() {
    let golden: Resized = golden("clip_preprocess.json");
    for case in golden.cases {
        let image = patterned(case.width, case.height);
        for (preprocess, expected) in [
            (Preprocess::TensorAntialias, &case.tensor_antialias_every_11th),
            (Preprocess::TensorNoAntialias, &case.tensor_no_antialias_every_11th),
        ] {
            let values = resized(preprocess, &image, golden.size);
            for (value, expected) in values.iter().step_by(11).zip(expected) {
                let off = 255.0 * (value - expected).abs();
                assert!(off < 0.01, "{preprocess:?} {}x{}: {value} {expected}", case.width, case.height);
            }
        }
    }
}

#[test]
fn an_empty_picture_is_an_error() {
    let error = Preprocess::PilU8.append(&RgbImage::new(0, 5), 24, &mut Vec::new()).unwrap_err().to_string();
    assert!(error.contains("0x5"), "{error}");
}

#[derive(Deserialize)]
struct Tokens {
    cases: Vec<TokensCase>,
}

#[derive(Deserialize)]
struct TokensCase {
    text: String,
    ids: Vec<i64>,
}

#[test]
fn tokens_are_those_of_open_clip() {
    let golden: Tokens = golden("clip_tokens.json");
    assert!(golden.cases.len() >= 58);
    let tokenizer = Tokenizer::new();
    for TokensCase { text, mut ids } in golden.cases {
        ids.resize(CONTEXT, 0);
        assert_eq!(tokenizer.ids(&text).to_vec(), ids, "{text:?}");
    }
}

#[derive(Deserialize)]
struct Scored {
    prompts: Vec<String>,
    images: Vec<Picture>,
    models: Vec<ScoredModel>,
}

/// Rectangles on grey, as `golden/clip_scores.py` draws them.
#[derive(Deserialize)]
struct Picture {
    width: u32,
    height: u32,
    rectangles: Vec<([u32; 4], [u8; 3])>,
}

#[derive(Deserialize)]
struct ScoredModel {
    folder: String,
    scores: Vec<Vec<f32>>,
}

fn drawn(picture: &Picture) -> RgbImage {
    let mut image = RgbImage::from_pixel(picture.width, picture.height, Rgb([150; 3]));
    for ([left, top, right, bottom], color) in &picture.rectangles {
        for y in *top..*bottom {
            for x in *left..*right {
                image.put_pixel(x, y, Rgb(*color));
            }
        }
    }
    image
}

#[test]
fn scores_are_those_of_the_python_runtime() {
    let golden: Scored = golden("clip_scores.json");
    let images: Vec<RgbImage> = golden.images.iter().map(drawn).collect();
    let prompts: Vec<Prompt> = golden.prompts.iter().map(Prompt::new).collect();
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("models");
    for model in golden.models {
        let embedded = if model.folder == "clip" { ClipReward::tiny() } else { ClipReward::tiny_hps() }.unwrap();
        let loaded = ClipReward::load(&models.join(&model.folder)).unwrap();
        assert_eq!(Reward::name(&embedded), model.folder);
        for (prompt, expected) in prompts.iter().zip(model.scores) {
            let batch: Vec<(&Prompt, &RgbImage)> = images.iter().map(|image| (prompt, image)).collect();
            let scores = embedded.score_batch(&batch).unwrap();
            assert_eq!(scores, loaded.score_batch(&batch).unwrap(), "embedded and loaded models differ");
            for (score, expected) in scores.iter().zip(&expected) {
                assert!((score - expected).abs() < 2e-5, "{}: {score} {expected}", prompt.text);
            }
        }
    }
}

#[test]
fn scores_do_not_depend_on_count_or_order() {
    let clip = ClipReward::tiny().unwrap();
    let images: Vec<RgbImage> = (0..40).map(|n| patterned(64, 64 + n % 3)).collect();
    let prompts = ["a photo of a red circle", "a photo of two stars"].map(Prompt::new);
    let batch: Vec<(&Prompt, &RgbImage)> =
        images.iter().enumerate().map(|(n, image)| (&prompts[n % 2], image)).collect();
    let together = clip.score_batch(&batch).unwrap();
    let reversed: Vec<_> = batch.iter().rev().copied().collect();
    let mut backwards = clip.score_batch(&reversed).unwrap();
    backwards.reverse();
    for ((&(prompt, image), together), backwards) in batch.iter().zip(together).zip(backwards) {
        let alone = clip.score(prompt, image).unwrap();
        assert!((alone - together).abs() < 1e-5 && (alone - backwards).abs() < 1e-5, "{alone} {together} {backwards}");
    }
    assert!(clip.score_batch(&[]).unwrap().is_empty());
}

/// A copy of the committed model with one file replaced; the error of loading it.
fn error_with(file: &str, contents: &[u8]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/clip");
    for name in ["image.onnx", "text.onnx", "clip.json"] {
        std::fs::copy(models.join(name), folder.path().join(name)).unwrap();
    }
    std::fs::write(folder.path().join(file), contents).unwrap();
    ClipReward::load(folder.path()).unwrap_err().to_string()
}

fn sidecar_with(from: &str, to: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/clip/clip.json");
    let text = std::fs::read_to_string(path).unwrap();
    assert!(text.contains(from), "{from}");
    text.replace(from, to).into_bytes()
}

#[test]
fn files_that_do_not_agree_are_named() {
    let check = |error: String, parts: &[&str]| assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    check(error_with("image.onnx", b"junk"), &["image.onnx", "not a model that onnx runtime can read"]);
    check(
        error_with("clip.json", &sidecar_with("\"image_size\": 64", "\"image_size\": 224")),
        &["image.onnx", "[free, 3, 64, 64]", "expected [free, 3, 224, 224]"],
    );
    check(
        error_with("clip.json", &sidecar_with("\"embed_dim\": 128", "\"embed_dim\": 0")),
        &["clip.json", "embed_dim"],
    );
    check(error_with("clip.json", &sidecar_with("pil_u8", "pillow")), &["clip.json", "unknown variant `pillow`"]);
    check(error_with("clip.json", &sidecar_with("\"context\": 77", "\"context\": 64")), &["context is 64"]);
    let error = ClipReward::load(Path::new("nowhere")).unwrap_err().to_string();
    check(error, &["clip.json", "a model folder holds image.onnx, text.onnx and clip.json"]);
}

#[test]
fn a_right_picture_beats_wrong_ones() {
    let clip = ClipReward::tiny().unwrap();
    let square = |color, left: u32| {
        RgbImage::from_fn(64, 64, |x, y| {
            if (left..left + 22).contains(&x) && (20..42).contains(&y) { Rgb(color) } else { Rgb([150; 3]) }
        })
    };
    let (red, blue) = (square([220, 25, 30], 20), square([25, 70, 225], 20));
    let prompt = Prompt::new("a photo of a red square");
    assert!(clip.score(&prompt, &red).unwrap() > clip.score(&prompt, &blue).unwrap() + 0.1);
}
