//! The HPSv2 benchmark against the published program's arithmetic.

#![expect(clippy::unwrap_used, reason = "a test's helpers may fail the test")]

use std::collections::BTreeMap;
use std::path::Path;

use grpo::{Prompt, reward_fn};
use grpo_rewards::evaluation::Report;
use grpo_rewards::hps_benchmark::Benchmark;
use image::{Rgb, RgbImage};
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    styles: BTreeMap<String, (usize, Vec<usize>)>,
    printed: BTreeMap<String, Vec<f64>>,
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("golden/hps_benchmark.json")).unwrap()
}

/// Images and prompts of the golden styles.
fn layout(golden: &Golden) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let (images, prompts) = (folder.path().join("images"), folder.path().join("prompts"));
    std::fs::create_dir(&prompts).unwrap();
    for (style, (n, missing)) in &golden.styles {
        std::fs::create_dir_all(images.join(style)).unwrap();
        let texts: Vec<String> = (0..*n).map(|row| format!("{style} {row}")).collect();
        std::fs::write(prompts.join(format!("{style}.json")), serde_json::to_string(&texts).unwrap()).unwrap();
        for row in (0..*n).filter(|row| !missing.contains(row)) {
            let picture = RgbImage::from_pixel(1, 1, Rgb([row as u8; 3]));
            picture.save(images.join(style).join(format!("{row:05}.png"))).unwrap();
        }
    }
    folder
}

fn judged(folder: &Path) -> Report {
    // The cosine of the generator, from the prompt; the picture proves that it is this prompt's.
    let reward = reward_fn("hps", |prompt: &Prompt, image: &RgbImage| {
        let (style, row) = prompt.text.split_once(' ').ok_or("a prompt of this test")?;
        let row: usize = row.parse()?;
        assert_eq!(usize::from(image.get_pixel(0, 0).0[0]), row);
        Ok(((row * 37 + style.len() * 11) % 101 + row) as f32 / 800.0)
    });
    let benchmark = Benchmark::read(&folder.join("images"), &folder.join("prompts")).unwrap();
    let (n_images, mut n_done) = (benchmark.n_images(), 0);
    let report = benchmark.judge(&reward, |n| n_done += n);
    assert_eq!(n_done, n_images);
    report
}

#[test]
fn numbers_are_those_of_the_published_program() {
    let golden = golden();
    let report = judged(layout(&golden).path());
    let near = |a: f64, b: f64| (a - b).abs() < 1e-5;
    assert_eq!(report.rows.len(), 3);
    for row in &report.rows {
        let [score, std] = golden.printed[&row.name][..] else { unreachable!() };
        assert!(near(row.score, score) && near(row.std.unwrap(), std), "{row:?} is not {score} {std}");
    }
    assert!(near(report.overall.unwrap(), golden.printed["Average"][0]));
    assert_eq!(report.missing, ["paintings/00003.jpg", "paintings/00050.jpg", "paintings/00099.jpg"]);
    let images = report.images;
    assert_eq!((images.expected, images.found, images.scored), (460, 457, 457));
}

#[test]
fn an_image_that_cannot_be_read_is_named_and_its_batch_goes_on() {
    let golden = golden();
    let folder = layout(&golden);
    std::fs::write(folder.path().join("images/photo/00007.png"), b"\x89PNG\r\n\x1a\n cut").unwrap();
    let report = judged(folder.path());
    assert_eq!(report.failed.len(), 1);
    assert_eq!(report.failed[0].image, "photo/00007.png");
    assert_eq!(report.images.scored, 456);
}

#[test]
fn a_style_without_a_folder_is_missing_as_a_whole() {
    let golden = golden();
    let folder = layout(&golden);
    std::fs::write(folder.path().join("prompts/concept-art.json"), r#"["a", "b"]"#).unwrap();
    let report = judged(folder.path());
    assert_eq!(report.missing[..2], ["concept-art/00000.jpg", "concept-art/00001.jpg"]);
    assert_eq!((report.images.expected, report.images.scored, report.rows.len()), (462, 457, 3));
}

#[test]
fn a_score_that_is_no_number_is_a_failure() {
    let golden = golden();
    let folder = layout(&golden);
    let benchmark = Benchmark::read(&folder.path().join("images"), &folder.path().join("prompts")).unwrap();
    let reward = reward_fn("hps", |_: &Prompt, _: &RgbImage| Ok(f32::NAN));
    let report = benchmark.judge(&reward, |_| ());
    assert_eq!((report.overall, report.rows.len(), report.failed.len()), (None, 0, 457));
    assert_eq!(report.failed[0].reason, "the reward gave NaN");
}

#[test]
fn a_style_needs_its_prompts() {
    let folder = tempfile::tempdir().unwrap();
    let error = |folder: &Path| Benchmark::read(folder, folder).unwrap_err().to_string();
    assert!(error(folder.path()).contains("no folder in it"));
    std::fs::create_dir(folder.path().join("anime")).unwrap();
    assert!(error(folder.path()).contains("anime.json: "));
}
