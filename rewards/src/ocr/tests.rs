//! The steps around the networks against rapidocr-onnxruntime's own, by `tests/golden/ocr.py`.

use image::{Rgb, RgbImage};
use serde::Deserialize;

use super::OcrScorer;
use super::detect::{Map, Quad, quads};
use super::lines::{cut, ordered};
use super::recognise::{agreement, decoded, input};

#[derive(Deserialize)]
struct Golden {
    maps: Vec<GoldenMap>,
    lines: Vec<GoldenLine>,
    readings: Vec<GoldenReading>,
}

#[derive(Deserialize)]
struct GoldenMap {
    width: usize,
    values: String,
    boxes: Vec<[[f32; 2]; 4]>,
}

#[derive(Deserialize)]
struct GoldenLine {
    quad: [[f32; 2]; 4],
    size: [usize; 2],
    line_every_7th: Vec<f32>,
    input_width: usize,
    input_every_101st: Vec<f32>,
}

#[derive(Deserialize)]
struct GoldenReading {
    characters: Vec<String>,
    values: Vec<f32>,
    text: String,
    mean: f32,
}

fn golden() -> Golden {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/ocr.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn scorer() -> OcrScorer {
    OcrScorer {
        detector: String::new(),
        recogniser: String::new(),
        characters: String::new(),
        column: "text".into(),
        min_side: 736,
        pixel_threshold: 0.3,
        box_threshold: 0.5,
        unclip_ratio: 1.6,
        text_threshold: 0.5,
    }
}

/// The largest difference between a corner of one and the same corner of the other.
fn off(a: &[[f32; 2]; 4], b: &[[f32; 2]; 4]) -> f32 {
    let corners = a.iter().zip(b).flat_map(|(a, b)| [a[0] - b[0], a[1] - b[1]]);
    corners.map(f32::abs).fold(0.0, f32::max)
}

#[test]
fn boxes_are_those_of_the_package() {
    for (n, map) in golden().maps.into_iter().enumerate() {
        let bytes = (0..map.values.len()).step_by(2).map(|at| u8::from_str_radix(&map.values[at..at + 2], 16).unwrap());
        let values: Vec<f32> = bytes.map(|byte| f32::from(byte) / 255.0).collect();
        let height = values.len() / map.width;
        let inside = |[x, y]: [f32; 2]| [x.clamp(0.0, map.width as f32), y.clamp(0.0, height as f32)];
        let found = quads(&Map { values: &values, width: map.width }, &scorer());
        let found: Vec<[[f32; 2]; 4]> = found.into_iter().map(|quad| quad.0.map(inside)).collect();
        assert_eq!(found.len(), map.boxes.len(), "map {n}: {found:?}");
        for expected in map.boxes {
            // The package cuts corners to whole pixels before and after they grow.
            let nearest = found.iter().map(|quad| off(quad, &expected)).fold(f32::INFINITY, f32::min);
            assert!(nearest < 2.1, "map {n}: {expected:?} is {nearest} pixels off in {found:?}");
        }
    }
}

#[test]
fn lines_are_cut_and_prepared_as_the_package_does() {
    let wave = |x: f64, scale: f64, middle: f64| (x.sin() * scale + middle).round_ties_even() as u8;
    let picture = RgbImage::from_fn(64, 48, |x, y| {
        let (x, y) = (f64::from(x), f64::from(y));
        let green = ((y / 7.0).cos() * 90.0 + 120.0).round_ties_even() as u8;
        Rgb([wave(x / 5.0, 100.0, 128.0), green, wave((x + y) / 9.0, 110.0, 128.0)])
    });
    for line in golden().lines {
        let found = cut(&picture, &Quad(line.quad));
        assert_eq!([found.width, found.height], line.size);
        let worst = found.pixels.iter().step_by(7).zip(&line.line_every_7th).map(|(a, b)| (a - b).abs());
        let worst = worst.fold(0.0, f32::max);
        assert!(worst <= 4.0, "a pixel is {worst} levels off");
        let (pixels, width) = input(&found);
        assert_eq!(width, line.input_width);
        let worst = pixels.iter().step_by(101).zip(&line.input_every_101st).map(|(a, b)| (a - b).abs());
        let worst = 127.5 * worst.fold(0.0, f32::max);
        assert!(worst <= 4.0, "a number of the input is {worst} levels off");
    }
}

#[test]
fn characters_are_those_of_the_package() {
    for reading in golden().readings {
        let (text, mean) = decoded(&reading.values, &reading.characters);
        assert_eq!(text, reading.text);
        assert!((mean - reading.mean).abs() < 1e-6, "{mean} {}", reading.mean);
    }
}

#[test]
fn lines_are_read_from_top_to_bottom_and_from_left_to_right() {
    let at = |x: f32, y: f32| Quad([[x, y], [x + 20.0, y], [x + 20.0, y + 12.0], [x, y + 12.0]]);
    let image = RgbImage::new(200, 100);
    let found = ordered(vec![at(10.0, 40.0), at(60.0, 2.0), at(5.0, 8.0), at(90.0, 0.0)], [1.0, 1.0], &image);
    let starts: Vec<[f32; 2]> = found.iter().map(|quad| quad.0[0]).collect();
    assert_eq!(starts, [[5.0, 8.0], [60.0, 2.0], [90.0, 0.0], [10.0, 40.0]]);
    assert!(ordered(vec![at(0.0, 0.0)], [0.1, 0.1], &image).is_empty(), "what shrinks to nothing is left out");
}

#[test]
fn agreement_is_one_less_the_share_of_edits() {
    for (read, wanted, expected) in [
        ("Hello World", "hello world", 1.0),
        ("well, hello there", "HELLO", 1.0),
        ("helo", "hello", 0.8),
        ("hxllo", "hello", 0.8),
        ("", "open", 0.0),
        ("something else altogether", "open", 0.0),
        ("pone", "open", 0.25),
        ("kitten", "sitting", 4.0 / 7.0),
        ("ÉCOLE", "école", 1.0),
    ] {
        let found = agreement(read, wanted).unwrap();
        assert!((found - expected).abs() < 1e-6, "{read}, {wanted}: {found}");
    }
    assert_eq!(agreement("text", " \t"), None);
}
