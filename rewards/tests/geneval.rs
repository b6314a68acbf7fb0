//! GenEval's rules against the published program, and the reward over detectors of several kinds.

#![expect(clippy::unwrap_used, reason = "a test's helpers may fail the test")]

use std::sync::atomic::{AtomicUsize, Ordering};

use grpo::{BoxError, Prompt, Reward};
use grpo_rewards::geneval::{
    Detection, Detector, GenEval, Include, Metadata, Relation, Rules, Summary, Tag, judge, overlap, relations,
};
use image::RgbImage;
use serde::Deserialize;

/// What the published program's own functions gave; see `golden/geneval_original.py`.
#[derive(Deserialize)]
struct Golden {
    classes: Vec<String>,
    colors: Vec<String>,
    cases: Vec<Case>,
    relations: Vec<([f32; 4], [f32; 4], Vec<usize>)>,
    summary: Summed,
}

/// The metadata, boxes, `max_overlap`, verdict and reason.
#[derive(Deserialize)]
struct Case(Metadata, Vec<Found>, Option<f64>, bool, String);

/// A class, score, corners and colour.
#[derive(Deserialize)]
struct Found(usize, f32, f32, f32, f32, f32, usize);

#[derive(Deserialize)]
struct Summed {
    rows: Vec<Judged>,
    printed: String,
}

#[derive(Deserialize)]
struct Judged {
    tag: Tag,
    metadata: String,
    correct: bool,
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("golden/geneval_original.json")).unwrap()
}

/// The published program writes two relations in an order that changes from run to run.
fn ordered(reason: &str) -> Vec<String> {
    let order = |line: &str| match line.split_once(" target, found ") {
        Some((expected, found)) => {
            let mut names: Vec<&str> = found.trim_end_matches(" target").split(" and ").collect();
            names.sort_unstable();
            format!("{expected} target, found {names:?} target")
        }
        None => line.to_owned(),
    };
    reason.split('\n').map(order).collect()
}

#[test]
fn verdicts_and_reasons_are_those_of_the_published_program() {
    let Golden { classes, colors, cases, .. } = golden();
    assert!(cases.len() >= 1000);
    for (row, Case(metadata, boxes, max_overlap, correct, reason)) in cases.into_iter().enumerate() {
        let found = boxes.into_iter().map(|Found(class, score, x0, y0, x1, y1, color)| {
            Detection::new(&classes[class], score, [x0, y0, x1, y1]).with_color(&colors[color])
        });
        let verdict = Rules { max_overlap }.judge(&metadata, &found.collect::<Vec<_>>());
        assert_eq!(ordered(&verdict.reason), ordered(&reason), "case {row}: {metadata:?}");
        assert_eq!(verdict.correct, correct, "case {row}");
    }
}

#[test]
fn relations_are_those_of_the_published_program() {
    for (a, b, expected) in golden().relations {
        let found: Vec<usize> = relations(a, b).into_iter().map(|relation| relation as usize).collect();
        assert_eq!(found, expected, "{a:?} and {b:?}");
    }
}

#[test]
fn a_summary_prints_the_numbers_of_the_published_program() {
    let Summed { rows, printed } = golden().summary;
    let (mut prompts, mut scores) = (Vec::<Prompt>::new(), Vec::<Vec<f32>>::new());
    for row in rows {
        if prompts.last().is_none_or(|last| last.text != row.metadata) {
            prompts.push(Prompt::new(&row.metadata).with("tag", row.tag.name()));
            scores.push(vec![]);
        }
        scores.last_mut().unwrap().push(f32::from(u8::from(row.correct)));
    }
    let summary = Summary::of(&prompts, &scores).unwrap();
    let lines = [
        format!("Total images: {}", summary.images),
        format!("Total prompts: {}", summary.prompts),
        format!("% correct images: {:.2}%", 100.0 * summary.image_accuracy),
        format!("% correct prompts: {:.2}%", 100.0 * summary.any_correct),
        format!("Overall score (avg. over tasks): {:.5}", summary.overall),
    ];
    let tasks = summary.accuracy.iter().map(|(tag, accuracy)| format!("{tag:<16} = {:.2}% (", 100.0 * accuracy));
    for line in lines.into_iter().chain(tasks) {
        assert!(printed.contains(&line), "{line} is not in {printed}");
    }
}

#[test]
fn boxes_that_overlap_as_much_as_allowed_are_dropped() {
    let cats = [[0.0, 0.0, 2.0, 0.0], [1.0, 0.0, 3.0, 0.0]].map(|bbox| Detection::new("cat", 0.95, bbox));
    assert_eq!(overlap(cats[0].bbox, cats[1].bbox), 0.5);
    let two = metadata(Tag::Counting, vec![include("cat", 2)]);
    for (max_overlap, correct) in [(None, true), (Some(0.5), false), (Some(0.51), true), (Some(1.0), true)] {
        assert_eq!(Rules { max_overlap }.judge(&two, &cats).correct, correct, "{max_overlap:?}");
    }
    let twins = [cats[0].clone(), cats[0].clone()];
    assert!(Rules { max_overlap: Some(1.0) }.judge(&two, &twins).correct);
}

#[test]
fn equal_scores_are_read_backwards() {
    let boxes = ["red", "blue"].map(|color| Detection::new("cat", 0.9, [0.0, 0.0, 1.0, 1.0]).with_color(color));
    let asked = |color: &str| Include { color: Some(color.into()), ..include("cat", 1) };
    assert!(judge(&metadata(Tag::Colors, vec![asked("blue")]), &boxes).correct);
    assert!(!judge(&metadata(Tag::Colors, vec![asked("red")]), &boxes).correct);
}

fn include(class: &str, count: usize) -> Include {
    Include::new(class, count)
}

fn metadata(tag: Tag, include: Vec<Include>) -> Metadata {
    Metadata { tag, include, exclude: vec![], prompt: "a photo".into() }
}

fn cats(count: usize, score: f32) -> Vec<Detection> {
    (0..count).map(|n| Detection::new("cat", score, [n as f32, 0.0, n as f32 + 1.0, 1.0])).collect()
}

#[test]
fn thresholds_are_strict_and_counting_is_stricter() {
    let check = |tag, score, expected| {
        let verdict = judge(&metadata(tag, vec![include("cat", 1)]), &cats(1, score));
        assert_eq!(verdict.correct, expected, "{tag} at {score}");
    };
    check(Tag::SingleObject, 0.3, false);
    check(Tag::SingleObject, 0.31, true);
    check(Tag::Counting, 0.9, false);
    check(Tag::Counting, 0.91, true);
    check(Tag::SingleObject, f32::NAN, false);
}

#[test]
fn at_most_sixteen_boxes_of_a_class_are_seen() {
    let sixteen = metadata(Tag::Counting, vec![include("cat", 16)]);
    assert!(judge(&sixteen, &cats(20, 0.99)).correct);
    let seventeen = metadata(Tag::Counting, vec![include("cat", 17)]);
    assert_eq!(judge(&seventeen, &cats(20, 0.99)).reason, "expected cat>=17, found 16");
}

#[test]
fn reasons_name_every_rule_that_failed() {
    let near = [0.0, 0.0, 1.0, 1.0];
    let colored = Include { color: Some("red".into()), ..include("cat", 1) };
    let placed = Include { position: Some((Relation::LeftOf, 0)), ..include("dog", 1) };
    let mut asked = metadata(Tag::Position, vec![colored, placed]);
    let cat = || Detection::new("cat", 0.9, near).with_color("blue");
    let dog = || Detection::new("dog", 0.9, [9.0, 0.0, 10.0, 1.0]);
    assert_eq!(
        judge(&asked, &[cat(), dog()]).reason,
        "expected red cat>=1, found 0 red; and 1 blue\nno target for dog to be left of"
    );
    asked.include[0].color = None;
    asked.exclude = vec![include("dog", 1)];
    assert_eq!(
        judge(&asked, &[cat(), dog()]).reason,
        "expected dog left of target, found right of target\nexpected dog<1, found 1"
    );
}

/// Sees four cats and asks a second model for colours, as the full-size evaluation does.
#[derive(Default)]
struct TwoModels {
    asked: AtomicUsize,
}

impl Detector for &TwoModels {
    fn detect(&self, _: &RgbImage) -> Result<Vec<Detection>, BoxError> {
        Ok([0.2, 0.5, 0.8, 0.7].map(|score| Detection::new("cat", score, [0.0; 4])).into())
    }

    fn classify_colors(&self, _: &RgbImage, objects: &mut [Detection]) -> Result<(), BoxError> {
        self.asked.fetch_add(objects.len(), Ordering::Relaxed);
        objects
            .iter_mut()
            .for_each(|object| object.color = Some(if object.score > 0.75 { "red" } else { "blue" }.into()));
        Ok(())
    }
}

#[test]
fn colours_are_classified_only_where_the_rules_ask() {
    let check = |color: Option<&str>, count, expected_score, expected_asked| {
        let models = TwoModels::default();
        let asked = Include { color: color.map(str::to_owned), ..include("cat", count) };
        let prompt = metadata(Tag::Colors, vec![asked]).to_prompt().unwrap();
        let score = GenEval::new(&models).score(&prompt, &RgbImage::new(4, 4)).unwrap();
        assert_eq!((score, models.asked.load(Ordering::Relaxed)), (expected_score, expected_asked), "{prompt:?}");
    };
    check(None, 3, 1.0, 0);
    check(Some("red"), 1, 1.0, 1);
    check(Some("blue"), 1, 0.0, 1);
    check(Some("red"), 2, 0.0, 2);
}

#[test]
fn published_lines_are_read_and_written_unchanged() {
    let lines = [
        r#"{"tag":"single_object","include":[{"class":"bench","count":1}],"prompt":"a photo of a bench"}"#,
        r#"{"tag":"color_attr","include":[{"class":"wine glass","count":1,"color":"purple"},{"class":"apple","count":1,"color":"black"}],"prompt":"a photo of a purple wine glass and a black apple"}"#,
        r#"{"tag":"position","include":[{"class":"teddy bear","count":1},{"class":"dog","count":1,"position":["right of",0]}],"prompt":"a photo of a dog right of a teddy bear"}"#,
        r#"{"tag":"counting","include":[{"class":"clock","count":4}],"exclude":[{"class":"clock","count":5}],"prompt":"a photo of four clocks"}"#,
    ];
    for line in lines {
        let metadata: Metadata = serde_json::from_str(line).unwrap();
        assert_eq!(serde_json::to_string(&metadata).unwrap(), line);
        let prompt = metadata.to_prompt().unwrap();
        assert_eq!(prompt.columns.keys().collect::<Vec<_>>(), ["exclude", "include", "tag"]);
        assert_eq!(Metadata::from_prompt(&prompt).unwrap(), metadata);
    }
}

#[test]
fn bad_columns_are_named() {
    let check = |prompt: &Prompt, expected: &str| {
        let error = Metadata::from_prompt(prompt).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    let prompt = Prompt::new("a cat").with("tag", "colors");
    check(&Prompt::new("a cat"), "has no column `tag`");
    check(&prompt, "has no column `include`");
    check(&Prompt::new("a cat").with("tag", "colour"), "`colour`");
    let forward = serde_json::json!([{"class": "cat", "count": 1, "position": ["above", 0]}]);
    check(
        &prompt.with("include", forward),
        "entry 0 of column `include` of prompt `a cat` stands in relation to entry 0",
    );
}

#[test]
fn a_summary_weighs_tasks_equally() {
    let prompt = |tag| metadata(tag, vec![include("cat", 1)]).to_prompt().unwrap();
    let prompts = [prompt(Tag::Colors), prompt(Tag::Colors), prompt(Tag::Counting)];
    let summary = Summary::of(&prompts, &[vec![1.0, 1.0], vec![0.0, 0.0], vec![0.0, 1.0, 0.0, 0.0]]).unwrap();
    assert_eq!(summary.accuracy.into_iter().collect::<Vec<_>>(), [(Tag::Counting, 0.25), (Tag::Colors, 0.5)]);
    assert_eq!((summary.overall, summary.image_accuracy, summary.any_correct), (0.375, 0.375, 2.0 / 3.0));
    let error = |scores: &[Vec<f32>]| Summary::of(&prompts, scores).unwrap_err().to_string();
    assert_eq!(error(&[]), "3 prompts with 0 rows of scores; give one row for each prompt");
    assert!(error(&[vec![], vec![], vec![]]).starts_with("prompt `a photo` has no scores"));
}

#[test]
fn a_summary_prints_as_a_table() {
    let prompt = metadata(Tag::Colors, vec![include("cat", 1)]).to_prompt().unwrap();
    let summary = Summary::of(&[prompt], &[vec![1.0, 0.0]]).unwrap();
    let expected = "colors          50.00 %\noverall         50.00 %\nany correct    100.00 %  (1 prompts, 2 pictures)";
    assert_eq!(summary.to_string(), expected);
    assert!(serde_json::to_string(&summary).unwrap().starts_with(r#"{"accuracy":{"colors":0.5},"overall":0.5"#));
}
