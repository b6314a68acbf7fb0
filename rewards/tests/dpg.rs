//! DPG-Bench against the published program on a table and pictures of our own.

#![expect(clippy::unwrap_used, reason = "a test's helpers may fail the test")]

use std::collections::BTreeMap;
use std::path::Path;

use grpo::BoxError;
use grpo_rewards::dpg::{Benchmark, Crop, Mode, Questions, RecordedAnswers, Settings, Vqa};
use grpo_rewards::evaluation::Report;
use image::{Rgb, RgbImage};
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    side: u32,
    answers: Vec<String>,
    csv: String,
    files: Vec<(String, u32)>,
    counts: Vec<Count>,
}

#[derive(Deserialize)]
struct Count {
    n_pictures: usize,
    official: Numbers,
    fixed: Option<Numbers>,
}

#[derive(Deserialize)]
struct Numbers {
    overall: f64,
    failed: Vec<String>,
    #[serde(rename = "L1")]
    broad: BTreeMap<String, f64>,
    #[serde(rename = "L2")]
    fine: BTreeMap<String, f64>,
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("golden/dpg.json")).unwrap()
}

/// Answers by the bytes of crop and question, as the generator does.
struct Rule(Vec<String>);

impl Vqa for Rule {
    fn answer(&self, crop: &Crop<'_>, question: &str) -> Result<String, BoxError> {
        let sum = |bytes: &[u8]| bytes.iter().map(|&byte| usize::from(byte)).sum::<usize>();
        Ok(self.0[(sum(crop.picture.as_raw()) + sum(question.as_bytes())) % self.0.len()].clone())
    }
}

fn picture(name: &str, side: u32) -> RgbImage {
    let salt: u32 = name.bytes().map(u32::from).sum();
    let channel = |x: u32, y: u32, channel: u32| ((salt + 7 * x + 13 * y + 31 * channel + x * y) % 256) as u8;
    RgbImage::from_fn(side, side, |x, y| Rgb([0, 1, 2].map(|of| channel(x, y, of))))
}

fn images(files: &[(String, u32)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, side) in files {
        picture(name, *side).save(folder.path().join(name)).unwrap();
    }
    folder
}

fn judged(golden: &Golden, folder: &Path, mode: Mode, n_pictures: usize) -> Report {
    let questions = Questions::parse(&golden.csv, mode).unwrap();
    let settings = Settings { mode, n_pictures, resolution: golden.side };
    let benchmark = Benchmark::read(folder, questions, settings).unwrap();
    let (n_images, mut n_done) = (benchmark.n_images(), 0);
    let report = benchmark.judge(&Rule(golden.answers.clone()), || n_done += 1);
    assert_eq!(n_done, n_images);
    report
}

fn assert_numbers(report: &Report, expected: &Numbers) {
    let near = |a: f64, b: f64| (a - b).abs() < 1e-9;
    assert!(near(report.overall.unwrap(), expected.overall), "{:?} is not {}", report.overall, expected.overall);
    let failed: Vec<&str> = report.failed.iter().map(|failed| failed.image.as_str()).collect();
    assert_eq!(failed, expected.failed);
    for (group, table) in [("L1 category", &expected.broad), ("L2 category", &expected.fine)] {
        let rows: BTreeMap<&str, f64> =
            report.rows.iter().filter(|row| row.group == group).map(|row| (row.name.as_str(), row.score)).collect();
        assert_eq!(rows.keys().collect::<Vec<_>>(), table.keys().collect::<Vec<_>>());
        for (name, score) in table {
            assert!(near(rows[name.as_str()], *score), "{group} {name}: {} is not {score}", rows[name.as_str()]);
        }
    }
}

#[test]
fn official_numbers_are_those_of_the_published_program() {
    let golden = golden();
    let folder = images(&golden.files);
    for count in &golden.counts {
        let report = judged(&golden, folder.path(), Mode::Official, count.n_pictures);
        assert_numbers(&report, &count.official);
    }
}

#[test]
fn fixed_numbers_are_those_of_a_second_count() {
    let golden = golden();
    let folder = images(&golden.files);
    let report = judged(&golden, folder.path(), Mode::Fixed, 4);
    assert_numbers(&report, golden.counts[0].fixed.as_ref().unwrap());
    assert_eq!(report.missing, ["absent6"]);
    let images = report.images;
    assert_eq!((images.expected, images.found, images.scored), (14, 13, 12));
    assert_eq!(report.pessimistic.unwrap(), report.overall.unwrap() * 12.0 / 14.0);
    assert_eq!(report.failed[0].reason, "item `stray` is not in the table of questions");
}

#[test]
fn a_file_that_fails_is_named_with_its_reason() {
    let golden = golden();
    let folder = images(&golden.files);
    std::fs::write(folder.path().join("12.png"), b"no picture").unwrap();
    picture("chain.png", 20).save(folder.path().join("chain.png")).unwrap();
    let report = judged(&golden, folder.path(), Mode::Fixed, 4);
    let failed: Vec<(&str, &str)> = report.failed.iter().map(|f| (f.image.as_str(), f.reason.as_str())).collect();
    assert_eq!(failed.len(), 3);
    assert!(failed[0].0 == "12.png" && failed[0].1.contains("give a PNG, JPEG or WebP file"), "{failed:?}");
    assert!(failed[1].0 == "chain.png" && failed[1].1.contains("20x20 pixels, which is no grid of 4"), "{failed:?}");
    let official = judged(&golden, folder.path(), Mode::Official, 4);
    let named = official.failed.iter().find(|failed| failed.image == "partiprompts97.png").unwrap();
    assert_eq!(named.reason, "question 3 depends on question 1, which is not there");
}

#[test]
fn bad_tables_are_refused_where_they_are_wrong() {
    let head = "item_id,proposition_id,dependency,tuple,question_natural_language\n";
    let check = |mode, rows: &str, expected: &str| {
        let error = Questions::parse(&format!("{head}{rows}"), mode).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    check(Mode::Fixed, "a,one,0,t,q\n", "data row 0: `one` is no number");
    check(Mode::Fixed, "a,1,2,t,q\n", "question 1 of item `a` depends on question 2, which is not there");
    check(Mode::Fixed, "a,1,0,t,q\na,1,0,t,q\n", "data row 1: question 1 of item `a` is there twice");
    check(
        Mode::Fixed,
        "a,1,0,t,q\nb,1,0,t,q\na,2,0,t,q\n",
        "data row 2: question 2 of item `a` is there twice or apart",
    );
    check(Mode::Official, "a,1,0,t,q\n", "the table holds no question");
    check(Mode::Fixed, "a,1,0,t\n", "data row 0: CSV error");
    let other = Questions::parse("item_id,question\na,b\n", Mode::Fixed).unwrap_err().to_string();
    assert!(other.contains("missing field `proposition_id`"), "{other}");
}

#[test]
fn an_item_that_comes_again_replaces_the_first_as_published() {
    let text = "item_id,proposition_id,dependency,tuple,question_natural_language\n\
        x,1,0,t,q\na,1,0,t,first\na,2,0,t,second\nb,1,0,t,q\na,1,0,t,third\na,1,0,t,fourth\n";
    let questions = Questions::parse(text, Mode::Official).unwrap();
    let asked: Vec<&str> = questions.item("a").unwrap().iter().map(|question| question.text.as_str()).collect();
    assert_eq!(asked, ["fourth"]);
}

#[test]
fn recorded_answers_are_found_by_file_crop_and_question() {
    let line =
        |crop, answer| format!(r#"{{"image": "a.png", "crop": {crop}, "question": "Is it?", "answer": "{answer}"}}"#);
    let answers = RecordedAnswers::parse(&format!("{}\n{}\n", line(0, "yes"), line(1, "no"))).unwrap();
    let ask = |file, index| {
        let crop = Crop { file, index, picture: RgbImage::new(1, 1) };
        answers.answer(&crop, "Is it?").map_err(|error| error.to_string())
    };
    assert_eq!((ask("a.png", 0).unwrap(), ask("a.png", 1).unwrap()), ("yes".into(), "no".into()));
    assert!(ask("b.png", 0).unwrap_err().contains("no answer for image `b.png`, crop 0, question `Is it?`"));
    let error = RecordedAnswers::parse(&format!("{}\n{}\n", line(0, "yes"), line(0, "no"))).unwrap_err().to_string();
    assert!(error.contains("line 2: `Is it?` has another answer already"), "{error}");
    let error = RecordedAnswers::parse(r#"{"image": "a.png"}"#).unwrap_err().to_string();
    assert!(error.contains("line 1: missing field `crop`"), "{error}");
}
