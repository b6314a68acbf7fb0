//! CLIP's preprocessing, tokens and scores against the Python programs that define them.
#![cfg(feature = "onnx")]
#![expect(clippy::unwrap_used, reason = "in a test a failure is a panic, helpers included")]

#[path = "../../tests/golden/mod.rs"]
mod golden;

use std::collections::BTreeMap;
use std::path::Path;

use golden::{checksum, noise, read};
use grpo::{Prompt, Reward};
use grpo_rewards::clip::{CONTEXT, ClipReward, Preprocess, Tokenizer};
use image::{Rgb, RgbImage};
use serde::Deserialize;

#[derive(Deserialize)]
struct Preprocessed {
    cases: Vec<PreprocessedCase>,
}

#[derive(Deserialize)]
struct PreprocessedCase {
    size: usize,
    width: u32,
    height: u32,
    /// Of the values of float modes, one in so many is stored.
    stride: usize,
    pil_bicubic: String,
    pil_bicubic_13: String,
    hpsv2: Vec<f32>,
    hpsv2_2023: Vec<f32>,
    simplear: Vec<f32>,
}

/// The preprocessed picture of a case, brought back to `[size, size, 3]` in `[0, 1]`.
fn preprocessed(preprocess: Preprocess, case: &PreprocessedCase) -> Vec<f32> {
    let mean = [0.481_454_66, 0.457_827_5, 0.408_210_73];
    let std = [0.268_629_54, 0.261_302_6, 0.275_777_1];
    let n_pixels = case.size * case.size;
    let mut pixels = Vec::new();
    preprocess.append(&noise(case.width, case.height), case.size, &mut pixels).unwrap();
    assert_eq!(pixels.len(), 3 * n_pixels);
    let value = |at: usize, channel: usize| pixels[channel * n_pixels + at] * std[channel] + mean[channel];
    (0..n_pixels).flat_map(|at| [0, 1, 2].map(|channel| value(at, channel))).collect()
}

#[test]
fn pil_modes_are_open_clips_transform_bit_for_bit() {
    for case in read::<Preprocessed>("clip_preprocess.json").cases {
        for (preprocess, expected) in
            [(Preprocess::PilBicubic, &case.pil_bicubic), (Preprocess::PilBicubic13, &case.pil_bicubic_13)]
        {
            let values = preprocessed(preprocess, &case);
            let bytes: Vec<u8> = values.iter().map(|value| (value * 255.0).round() as u8).collect();
            assert_eq!(&checksum(&bytes), expected, "{preprocess:?} {}x{}", case.width, case.height);
        }
    }
}

#[test]
fn float_modes_are_the_originals_within_a_hundredth_of_a_level() {
    for case in read::<Preprocessed>("clip_preprocess.json").cases {
        for (preprocess, expected) in [
            (Preprocess::Hpsv2, &case.hpsv2),
            (Preprocess::Hpsv2Of2023, &case.hpsv2_2023),
            (Preprocess::Simplear, &case.simplear),
        ] {
            let values = preprocessed(preprocess, &case);
            for (value, expected) in values.iter().step_by(case.stride).zip(expected) {
                let off = 255.0 * (value - expected).abs();
                assert!(off < 0.01, "{preprocess:?} {}x{}: {value} {expected}", case.width, case.height);
            }
        }
    }
}

#[test]
fn names_of_modes_are_those_of_reward_toml() {
    let names = ["pil-bicubic", "pil-bicubic-13", "hpsv2", "hpsv2-2023", "simplear"];
    let modes = names.map(|name| serde_json::from_str::<Preprocess>(&format!("\"{name}\"")).unwrap());
    assert_eq!(
        modes,
        [
            Preprocess::PilBicubic,
            Preprocess::PilBicubic13,
            Preprocess::Hpsv2,
            Preprocess::Hpsv2Of2023,
            Preprocess::Simplear
        ]
    );
}

#[test]
fn an_empty_picture_is_an_error_and_a_line_is_none() {
    let error = Preprocess::PilBicubic.append(&RgbImage::new(0, 5), 24, &mut Vec::new()).unwrap_err().to_string();
    assert!(error.contains("0x5"), "{error}");
    for preprocess in [Preprocess::PilBicubic13, Preprocess::Hpsv2, Preprocess::Hpsv2Of2023, Preprocess::Simplear] {
        let mut pixels = Vec::new();
        preprocess.append(&noise(1, 3000), 24, &mut pixels).unwrap();
        assert!(pixels.len() == 3 * 24 * 24 && pixels.iter().all(|value| value.is_finite()), "{preprocess:?}");
    }
}

#[derive(Deserialize)]
struct Tokens {
    texts: Vec<String>,
    /// The first texts' ids, without padding.
    ids: Vec<Vec<i64>>,
    checksums: Vec<String>,
}

/// Which texts have other tokens here: those with U+0345, mojibake that plsfix repairs in another way than ftfy, and
/// numbers of control characters.
const OTHER_TOKENS: [usize; 21] =
    [214, 246, 248, 249, 519, 525, 532, 589, 640, 660, 715, 745, 778, 803, 855, 870, 916, 997, 1095, 1178, 1179];

#[test]
fn tokens_are_those_of_open_clip() {
    let golden: Tokens = read("clip_tokens.json");
    assert!(golden.texts.len() >= 1000 && golden.texts.len() == golden.checksums.len());
    let tokenizer = Tokenizer::new();
    let mut wrong = Vec::new();
    for (at, (text, expected)) in golden.texts.iter().zip(&golden.checksums).enumerate() {
        let ids = tokenizer.ids(text).unwrap();
        if let Some(whole) = golden.ids.get(at) {
            let mut whole = whole.clone();
            whole.resize(CONTEXT, 0);
            assert_eq!(ids.to_vec(), whole, "{text:?}");
        }
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| (id as u16).to_le_bytes()).collect();
        if &checksum(&bytes) != expected {
            wrong.push(at);
        }
    }
    let texts: Vec<&String> = wrong.iter().map(|&at| &golden.texts[at]).collect();
    assert_eq!(wrong, OTHER_TOKENS, "{} of {} texts: {texts:#?}", wrong.len(), golden.texts.len());
}

#[derive(Deserialize)]
struct Small {
    sides: Vec<[u32; 2]>,
    prompts: Vec<String>,
    /// By mode of preprocessing, image and prompt.
    cosines: BTreeMap<String, Vec<Vec<f32>>>,
}

/// Noise in squares of 16 pixels, as `golden/clip_small.py` draws it.
fn blocks(width: u32, height: u32) -> RgbImage {
    let coarse = noise(width / 16 + 1, height / 16 + 1);
    RgbImage::from_fn(width, height, |x, y| *coarse.get_pixel(x / 16, y / 16))
}

/// The small model with this mode in its `reward.toml`.
fn small_with(precision: &str, mode: &str) -> ClipReward {
    let folder = tempfile::tempdir().unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/clip_small").join(precision);
    for name in ["image.onnx", "text.onnx"] {
        std::fs::copy(source.join(name), folder.path().join(name)).unwrap();
    }
    let text = std::fs::read_to_string(source.join("reward.toml")).unwrap();
    let exported = "preprocess = \"pil-bicubic\"";
    assert!(text.contains(exported));
    let text = text.replace(exported, &format!("preprocess = \"{mode}\""));
    std::fs::write(folder.path().join("reward.toml"), text).unwrap();
    ClipReward::load(folder.path()).unwrap()
}

#[test]
fn exported_towers_score_as_their_originals_in_every_mode() {
    let golden: Small = read("clip_small.json");
    let images: Vec<RgbImage> = golden.sides.iter().map(|[width, height]| blocks(*width, *height)).collect();
    let prompts: Vec<Prompt> = golden.prompts.iter().map(Prompt::new).collect();
    assert!(images.len() >= 20 && golden.cosines.len() == 5);
    for (precision, tolerance) in [("fp32", 1e-4), ("fp16", 2e-3)] {
        for (mode, cosines) in &golden.cosines {
            let clip = small_with(precision, mode);
            let pairs = images.iter().flat_map(|image| prompts.iter().map(move |prompt| (prompt, image)));
            let scores = clip.score_batch(&pairs.collect::<Vec<_>>()).unwrap();
            assert_eq!(scores.len(), images.len() * prompts.len());
            for (at, (score, expected)) in scores.iter().zip(cosines.iter().flatten()).enumerate() {
                let (sides, prompt) = (golden.sides[at / prompts.len()], &prompts[at % prompts.len()].text);
                let off = (score - expected).abs();
                assert!(off < tolerance, "{precision} {mode} {sides:?} {prompt:?}: {score} {expected}");
            }
        }
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
    let golden: Scored = read("clip_scores.json");
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
    let images: Vec<RgbImage> = (0..40).map(|n| noise(64, 64 + n % 3)).collect();
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

/// The error of loading a copy of the committed model whose `reward.toml` has another text.
fn error_with(from: &str, to: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/clip");
    for name in ["image.onnx", "text.onnx"] {
        std::fs::copy(models.join(name), folder.path().join(name)).unwrap();
    }
    let text = std::fs::read_to_string(models.join("reward.toml")).unwrap();
    assert!(text.contains(from), "{from}");
    std::fs::write(folder.path().join("reward.toml"), text.replace(from, to)).unwrap();
    ClipReward::load(folder.path()).unwrap_err().to_string()
}

#[test]
fn a_manifest_that_does_not_agree_with_its_files_is_named() {
    let check = |error: String, parts: &[&str]| assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    check(
        error_with("image_size = 64", "image_size = 224"),
        &["image.onnx", "[free, 3, 64, 64]", "expected [free, 3, 224, 224]"],
    );
    check(error_with("embed_dim = 128", "embed_dim = 0"), &["reward.toml", "embed_dim is 0; give 1 to 65536"]);
    check(error_with("pil-bicubic", "pillow"), &["reward.toml", "unknown variant `pillow`", "line 8"]);
    check(error_with("[scorer.clip]", "[scorer.clap]"), &["reward.toml", "unknown variant `clap`"]);
    check(error_with("logit_scale = 71.4881", "logit_scale = nan"), &["logit_scale is NaN; give a finite number"]);
    let error = ClipReward::load(Path::new("nowhere")).unwrap_err().to_string();
    check(error, &["nowhere/reward.toml", "a reward's folder holds reward.toml beside its .onnx files"]);
}

#[test]
fn only_the_picture_that_cannot_be_judged_fails() {
    let clip = ClipReward::tiny().unwrap();
    let images = [noise(64, 64), RgbImage::new(0, 5), RgbImage::new(8193, 1), noise(32, 64)];
    let prompt = Prompt::new("a photo of a red circle");
    let batch: Vec<(&Prompt, &RgbImage)> = images.iter().map(|image| (&prompt, image)).collect();
    let scores = clip.score_each(&batch);
    let text = |at: usize| scores[at].as_ref().unwrap_err().to_string();
    assert_eq!(text(1), "an image of 0x5 cannot be judged; every side must be at least 1 and at most 8192");
    assert!(text(2).contains("8193x1"), "{}", text(2));
    for at in [0, 3] {
        let alone = clip.score(&prompt, &images[at]).unwrap();
        assert!((scores[at].as_ref().unwrap() - alone).abs() < 1e-5);
    }
    assert!(clip.score_batch(&batch).is_err());
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
