//! GenEval on folders of images: the published prompts, the layout, what is missing and what fails.

#![expect(clippy::unwrap_used, reason = "a test's helpers may fail the test")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use grpo::picture::{open_image, open_image_upright};
use grpo_rewards::evaluation::Report;
use grpo_rewards::geneval::{
    Benchmark, COLORS, GenEval, ImageVerdict, RecordedDetections, Tag, object_names, prompts, read_folders,
};
use grpo_rewards::shapes::{Color, DEFAULT_SIDE, ShapesDetector, held_out_prompts, render, scene_for};
use image::RgbImage;

#[test]
fn the_published_prompts_are_all_there() {
    let published = prompts().unwrap();
    let mut counts = BTreeMap::<Tag, usize>::new();
    published.iter().for_each(|prompt| *counts.entry(prompt.tag).or_default() += 1);
    assert_eq!(Tag::ALL.map(|tag| counts[&tag]), [80, 99, 80, 94, 100, 100]);
    let names: BTreeSet<&str> = object_names().collect();
    assert_eq!((object_names().count(), names.len()), (80, 80));
    for prompt in &published {
        let classes = prompt.include.iter().chain(&prompt.exclude).map(|include| include.class.as_str());
        assert!(classes.into_iter().all(|class| names.contains(class)), "{prompt:?}");
        prompt.to_prompt().unwrap();
    }
    let lines = include_str!("../data/geneval/evaluation_metadata.jsonl").lines();
    for (line, prompt) in lines.zip(&published) {
        let same: serde_json::Value = serde_json::from_str(line).unwrap();
        assert_eq!(serde_json::to_value(prompt).unwrap(), same);
    }
}

#[test]
fn the_shapes_worlds_colours_are_the_ones_that_reasons_count() {
    assert_eq!(Color::ALL.map(Color::name), COLORS);
}

/// A folder for each line, with so many copies of a picture.
fn layout(lines: &[(&str, usize)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (row, (line, n_images)) in lines.iter().enumerate() {
        let prompt = folder.path().join(format!("{row:05}"));
        std::fs::create_dir_all(prompt.join("samples")).unwrap();
        std::fs::write(prompt.join("metadata.jsonl"), line).unwrap();
        for image in 0..*n_images {
            RgbImage::new(4, 4).save(prompt.join(format!("samples/{image:05}.png"))).unwrap();
        }
    }
    folder
}

const CAT: &str =
    r#"{"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"}"#;
const DOGS: &str = r#"{"tag": "counting", "include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}], "prompt": "a photo of two dogs"}"#;

fn judged(folder: &Path, detections: &str) -> (Report, Vec<ImageVerdict>) {
    let recorded = RecordedDetections::parse(detections).unwrap();
    let benchmark = Benchmark::read(folder).unwrap();
    benchmark.judge(|sample| GenEval::new(recorded.of(sample.name)?).verdict(sample.metadata, sample.image)).unwrap()
}

#[test]
fn what_is_missing_or_fails_is_named_and_counts_as_wrong_beside_the_score() {
    let folder = layout(&[(CAT, 4), (DOGS, 2)]);
    let root = folder.path();
    std::fs::write(root.join("00000/samples/00003.png"), b"\x89PNG cut").unwrap();
    std::fs::write(root.join("00001/samples/grid.png"), b"not one of the images").unwrap();
    std::fs::create_dir(root.join("notes")).unwrap();
    let found = r#"[{"class": "cat", "score": 0.95, "bbox": [0, 0, 2, 2]}]"#;
    let lines =
        [("00000/samples/00000.png", found), ("00000/samples/00001.png", found), ("00000/samples/00002.png", "[]")];
    let lines: String =
        lines.iter().map(|(image, found)| format!("{{\"image\": \"{image}\", \"detections\": {found}}}\n")).collect();
    let (report, verdicts) = judged(root, &lines);
    let counts = report.images;
    assert_eq!((counts.expected, counts.found, counts.scored), (8, 6, 3));
    assert_eq!(report.missing, ["00001/samples: 2 of 4 images"]);
    let failed: Vec<&str> = report.failed.iter().map(|failed| failed.image.as_str()).collect();
    assert_eq!(failed, ["00000/samples/00003.png", "00001/samples/00000.png", "00001/samples/00001.png"]);
    assert!(report.failed[1].reason.contains("no detections for image `00001/samples/00000.png`"));
    assert_eq!(report.rows.len(), 1);
    let row = &report.rows[0];
    assert_eq!((row.name.as_str(), row.score, row.pessimistic, row.n), ("single_object", 2.0 / 3.0, Some(0.5), 3));
    assert_eq!((report.overall, report.pessimistic), (Some(2.0 / 3.0), Some(0.25)));
    assert_eq!(verdicts[2].reason, "expected cat>=1, found 0");
    assert_eq!(report.notes[0], "no image of counting could be judged: a mean over 1 of 2 tasks");
    let coverage = "1 of the 553 published prompts, and 1 folders of other prompts; the number does not compare";
    assert!(report.notes[2].starts_with(coverage), "{:?}", report.notes);
    let page = report.to_markdown();
    for line in [
        "Overall: **0.6667**",
        "| 8 | 6 | 3 | 1 | 3 |",
        "- `00000/samples/00003.png`: ",
        "| single_object | 0.6667 | 0.5000 | 3 |",
    ] {
        assert!(page.contains(line), "{line} is not in {page}");
    }
}

#[test]
fn tasks_weigh_alike_whatever_their_number_of_images() {
    let folder = layout(&[(CAT, 4), (CAT, 6), (DOGS, 4)]);
    let dog = r#"{"class": "dog", "score": 0.95, "bbox": [0, 0, 2, 2]}"#;
    let all = (0..3).flat_map(|prompt| (0..6).map(move |image| (prompt, image)));
    let line = |(prompt, image)| {
        format!("{{\"image\": \"{prompt:05}/samples/{image:05}.png\", \"detections\": [{dog}, {dog}]}}\n")
    };
    let (report, _) = judged(folder.path(), &all.map(line).collect::<String>());
    assert_eq!((report.overall, report.pessimistic), (Some(0.5), Some(0.5)));
    assert_eq!((report.images.expected, report.images.scored, report.missing.len()), (14, 14, 0));
}

#[test]
fn any_detector_judges_a_folder() {
    let metadata = held_out_prompts().swap_remove(20);
    let folder = layout(&[(&serde_json::to_string(&metadata).unwrap(), 0)]);
    let picture = render(&scene_for(&metadata, grpo::Seed::new(0)).unwrap(), DEFAULT_SIDE);
    picture.save(folder.path().join("00000/samples/0.png")).unwrap();
    std::fs::write(folder.path().join("sampler.json"), r#"{"seed": 7}"#).unwrap();
    let judge = GenEval::new(ShapesDetector::new());
    let benchmark = Benchmark::read(folder.path()).unwrap();
    assert_eq!(benchmark.n_images(), 1);
    let (report, _) = benchmark.judge(|sample| judge.verdict(sample.metadata, sample.image)).unwrap();
    assert_eq!((report.overall, report.pessimistic), (Some(1.0), Some(0.25)));
    assert_eq!(report.sampler, Some(serde_json::json!({"seed": 7})));
}

#[test]
fn bad_layouts_are_refused() {
    let check = |folder: &Path, expected: &str| {
        let error = read_folders(folder).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    check(tempfile::tempdir().unwrap().path(), "no folder in it is named by digits");
    check(layout(&[("{}", 0)]).path(), "metadata.jsonl: missing field `tag`");
    let forward =
        r#"{"tag": "position", "include": [{"class": "cat", "count": 1, "position": ["above", 0]}], "prompt": "a"}"#;
    check(layout(&[(forward, 0)]).path(), "entry 0 of column `include`");
    let misspelt = r#"{"tag": "colors", "include": [{"class": "car", "count": 1, "colour": "red"}], "prompt": "a"}"#;
    check(layout(&[(misspelt, 0)]).path(), "unknown field `colour`");
    check(layout(&[(&CAT.replace("\"prompt\"", "\"exlude\": [], \"prompt\""), 0)]).path(), "unknown field `exlude`");
    let bare = tempfile::tempdir().unwrap();
    std::fs::create_dir(bare.path().join("00000")).unwrap();
    check(bare.path(), "metadata.jsonl: ");
}

#[test]
fn bad_detections_are_refused_where_they_are_wrong() {
    let check = |found: &str, expected: &str| {
        let line = format!(r#"{{"image": "a.png", "detections": [{found}]}}"#);
        let error = RecordedDetections::parse(&line).unwrap_err().to_string();
        assert!(error.contains("line 1: ") && error.contains(expected), "{error}");
    };
    check(r#"{"class": "cat", "score": 1.5, "bbox": [0, 0, 1, 1]}"#, "image `a.png`: score 1.5 of a cat");
    check(r#"{"class": "cat", "score": 0.5, "bbox": [2, 0, 1, 1]}"#, "bbox [2.0, 0.0, 1.0, 1.0] of a cat");
    check(r#"{"class": "cat", "score": 0.5, "bbox": [2, 0, 1]}"#, "invalid length 3");
    check(r#"{"class": "cat", "score": 0.5, "box": [2, 0, 1, 1]}"#, "unknown field `box`");
    let twice = "{\"image\": \"a.png\", \"detections\": []}\n".repeat(2);
    let error = RecordedDetections::parse(&twice).unwrap_err().to_string();
    assert!(error.contains("line 2: image `a.png` has a line already"), "{error}");
}

/// A PNG whose header asks for more than is decoded, and a JPEG that is stored on its side.
#[test]
fn images_are_opened_within_limits_and_turned_where_asked() {
    let folder = tempfile::tempdir().unwrap();
    let wide = folder.path().join("wide.png");
    RgbImage::new(8193, 1).save(&wide).unwrap();
    let error = open_image(&wide).unwrap_err().to_string();
    assert!(error.contains("8193x1 pixels") && error.contains("8192 pixels a side and 256 MiB"), "{error}");
    let missing = open_image(&folder.path().join("none.png")).unwrap_err().to_string();
    assert!(missing.contains("none.png: "), "{missing}");
    let jpeg = folder.path().join("side.jpg");
    RgbImage::new(6, 4).save(&jpeg).unwrap();
    let stored = std::fs::read(&jpeg).unwrap();
    // An APP1 segment with one EXIF entry: orientation 6, a quarter turn.
    let exif = b"\xff\xe1\x00\x22Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0";
    std::fs::write(&jpeg, [&stored[..2], exif, &stored[2..]].concat()).unwrap();
    assert_eq!(open_image(&jpeg).unwrap().dimensions(), (6, 4));
    assert_eq!(open_image_upright(&jpeg).unwrap().dimensions(), (4, 6));
}
