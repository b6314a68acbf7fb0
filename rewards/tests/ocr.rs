//! The OCR reward from a folder to a score, on the networks of `golden/tiny_networks.py`.
#![cfg(feature = "onnx")]

use std::path::{Path, PathBuf};

use grpo::{Prompt, Reward};
use grpo_rewards::ocr::OcrReward;
use image::{Rgb, RgbImage};
use sha2::{Digest, Sha256};

fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/ocr_tiny")
}

/// Bars of one colour each, side by side, on black.
fn bars(colors: &[[u8; 3]]) -> RgbImage {
    let mut image = RgbImage::new(320, 128);
    for (at, color) in (0..).zip(colors) {
        for (x, y) in (0..64).flat_map(|x| (0..40).map(move |y| (x, y))) {
            image.put_pixel(32 + 64 * at + x, 40 + y, Rgb(*color));
        }
    }
    image
}

const RED: [u8; 3] = [255, 0, 0];
const GREEN: [u8; 3] = [0, 255, 0];
const BLUE: [u8; 3] = [0, 0, 255];

#[test]
fn a_line_is_found_and_read_in_its_colours_and_order() {
    let ocr = OcrReward::load(&tiny(), &Default::default()).unwrap();
    for (colors, expected) in [(&[RED, GREEN][..], "RG"), (&[BLUE, RED, GREEN, BLUE], "BRGB"), (&[GREEN], "G")] {
        let read: Vec<String> = ocr.read(&bars(colors)).unwrap().into_iter().map(|reading| reading.text).collect();
        assert_eq!(read, [expected]);
    }
    assert!(ocr.read(&RgbImage::new(320, 128)).unwrap().is_empty());
    let prompt = |text: &str| Prompt::new("bars").with("text", text);
    let score = |text: &str| ocr.score(&prompt(text), &bars(&[RED, GREEN])).unwrap();
    assert_eq!([score("rg"), score("r g"), score("RB"), score("BBBB")], [1.0, 1.0, 0.5, 0.0]);
    let (image, good, bad) = (bars(&[RED]), prompt("R"), Prompt::new("no column"));
    let each = ocr.score_each(&[(&good, &image), (&bad, &image), (&good, &image)]);
    assert_eq!(each.iter().filter_map(|score| score.as_ref().ok()).collect::<Vec<_>>(), [&1.0, &1.0]);
    assert!(each[1].as_ref().unwrap_err().to_string().contains("text"));
}

/// The tiny folder with one character less in its list.
#[test]
fn a_list_of_characters_that_is_too_short_is_an_error_and_no_other_text() {
    let folder = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(tiny()).unwrap() {
        let path = file.unwrap().path();
        std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    std::fs::write(folder.path().join("characters.txt"), "R\nG\n").unwrap();
    let manifest = std::fs::read_to_string(tiny().join("reward.toml")).unwrap();
    let digest = |bytes: &[u8]| Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let manifest = manifest.replace(&digest(b"R\nG\nB\n"), &digest(b"R\nG\n"));
    std::fs::write(folder.path().join("reward.toml"), manifest).unwrap();
    let error = OcrReward::load(folder.path(), &Default::default()).unwrap_err().to_string();
    assert!(error.contains("recogniser.onnx") && error.contains("[1, 0, 3]") || error.contains("4"), "{error}");
}
