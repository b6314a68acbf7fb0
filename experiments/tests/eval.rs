//! `grpo eval` on folders of images: numbers, files, and what it says of mistakes.

#![expect(clippy::unwrap_used, reason = "a test and its helpers fail by panicking")]

mod said;

use std::path::Path;

use image::{Rgb, RgbImage};
use said::{Said, grpo};
use serde_json::Value;

fn eval(folder: &Path, args: &[&str]) -> Said {
    grpo(folder, &[&["eval"], args].concat())
}

/// A mistake is one line, with each of these words in it, and exit code 2.
fn mistake(folder: &Path, args: &[&str], words: &[&str]) {
    let said = eval(folder, args);
    assert_eq!(said.code, 2, "{args:?}: {}", said.err);
    for word in words {
        assert!(said.err.contains(word), "{args:?}: no `{word}` in {}", said.err);
    }
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// Two prompts with four images each, of which one is no image; the detections of all but one.
fn geneval_layout(root: &Path) {
    let cat = r#"{"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"}"#;
    let red = r#"{"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}], "prompt": "a photo of a red cat"}"#;
    let mut lines = String::new();
    for (row, line) in [cat, red].into_iter().enumerate() {
        let prompt = root.join(format!("images/{row:05}"));
        std::fs::create_dir_all(prompt.join("samples")).unwrap();
        std::fs::write(prompt.join("metadata.jsonl"), line).unwrap();
        for image in 0..4 {
            RgbImage::new(8, 8).save(prompt.join(format!("samples/{image}.png"))).unwrap();
            let color = if image < 2 { "red" } else { "blue" };
            let found = format!(r#"{{"class": "cat", "score": 0.8, "bbox": [0, 0, 5, 5], "color": "{color}"}}"#);
            lines += &format!("{{\"image\": \"{row:05}/samples/{image}.png\", \"detections\": [{found}]}}\n");
        }
    }
    std::fs::write(root.join("images/00000/samples/3.png"), b"cut").unwrap();
    std::fs::write(root.join("found.jsonl"), lines).unwrap();
    std::fs::write(root.join("images/sampler.json"), r#"{"seed": 3, "guidance": 6.0}"#).unwrap();
}

#[test]
fn geneval_judges_a_folder_by_recorded_detections() {
    let folder = tempfile::tempdir().unwrap();
    geneval_layout(folder.path());
    let args = ["geneval", "--images", "images", "--detections", "found.jsonl"];
    let files = ["--json", "r.json", "--report", "r.md", "--results", "v.jsonl"];
    let said = eval(folder.path(), &[&args[..], &files].concat());
    assert_eq!(said.code, 0, "{}", said.err);
    assert!(said.out.contains("single_object") && said.out.contains("0.7500"), "{}", said.out);
    assert!(said.err.contains("1 images failed, 0 entries are missing"), "{}", said.err);
    let report = json(&folder.path().join("r.json"));
    assert_eq!((&report["overall"], &report["pessimistic"]), (&0.75.into(), &0.625.into()));
    assert_eq!(report["failed"][0]["image"], "00000/samples/3.png");
    assert_eq!(report["sampler"]["guidance"], 6.0);
    assert_eq!(report["models"]["detections/found.jsonl"].as_str().unwrap().len(), 64);
    let page = std::fs::read_to_string(folder.path().join("r.md")).unwrap();
    assert!(page.contains("Overall: **0.7500**") && page.contains("`00000/samples/3.png`"), "{page}");
    let verdicts = std::fs::read_to_string(folder.path().join("v.jsonl")).unwrap();
    let last: Value = serde_json::from_str(verdicts.lines().last().unwrap()).unwrap();
    assert_eq!(last["reason"], "expected red cat>=1, found 0 red; and 1 blue");
    let said = eval(folder.path(), &[&args[..], &["--json"]].concat());
    assert_eq!(serde_json::from_str::<Value>(&said.out).unwrap(), report);
}

/// A program of Python's standard library that sees a red cat wherever a picture holds a byte.
#[cfg(unix)]
#[test]
fn geneval_asks_a_program_for_detections() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    geneval_layout(root);
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("../rewards/python");
    let program = format!(
        "import sys; sys.path.insert(0, {python:?})\nfrom grpo_scorer import serve_detector\n\
         cat = {{'class': 'cat', 'score': 0.8, 'bbox': [0, 0, 5, 5], 'color': 'red', 'mask': {{'size': [8, 8], 'counts': [64]}}}}\n\
         seen = []\ndef detect(image):\n    seen.append(1)\n    if len(seen) == 2: raise ValueError('no cat at all')\n    \
         return [cat] if len(seen) > 3 else []\nserve_detector(detect, model='cats', version=1)\n"
    );
    std::fs::write(root.join("cats.py"), program).unwrap();
    let args = ["geneval", "--images", "images", "--detector", "remote=exec:python3 cats.py", "--json"];
    let said = eval(root, &args);
    assert_eq!(said.code, 0, "{}", said.err);
    let report: Value = serde_json::from_str(&said.out).unwrap();
    assert_eq!(report["images"], serde_json::json!({"expected": 8, "found": 8, "scored": 6}));
    assert_eq!((&report["rows"][0]["score"], &report["rows"][1]["score"]), (&0.0.into(), &1.0.into()));
    assert!(report["failed"][0]["reason"].as_str().unwrap().contains("ValueError: no cat at all"), "{report}");
    let notes = report["notes"].to_string();
    assert!(notes.contains("detected by exec:python3 cats.py (model \\\"cats\\\", version 1)"), "{notes}");
    let folder = ["geneval", "--images", "images", "--detector", "remote=images"];
    mistake(root, &folder, &["give http://127.0.0.1:PORT/PATH or exec:PROGRAM"]);
}

#[test]
fn generated_images_lie_as_geneval_looks_for_them() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    geneval_layout(root);
    let lines: String = ["00000", "00001"]
        .map(|row| std::fs::read_to_string(root.join(format!("images/{row}/metadata.jsonl"))).unwrap() + "\n")
        .concat();
    std::fs::write(root.join("p.jsonl"), &lines).unwrap();
    let args = ["generate", "--layout", "geneval", "-n", "2", "--out", "drawn", "--prompts"];
    let said = grpo(root, &[&args[..], &["p.jsonl"]].concat());
    assert_eq!(said.code, 0, "{}", said.err);
    let found: String = (0..2)
        .flat_map(|row| {
            (0..2).map(move |draw| format!("{{\"image\": \"{row:05}/samples/{draw:04}.png\", \"detections\": []}}\n"))
        })
        .collect();
    std::fs::write(root.join("none.jsonl"), found).unwrap();
    let said = eval(root, &["geneval", "--images", "drawn", "--detections", "none.jsonl", "--json"]);
    assert_eq!(said.code, 0, "{}", said.err);
    let report: Value = serde_json::from_str(&said.out).unwrap();
    assert_eq!(report["images"], serde_json::json!({"expected": 8, "found": 4, "scored": 4}));
    assert_eq!(report["sampler"]["images_of_each_prompt"], 2);
    std::fs::write(root.join("p.jsonl"), "a cat\n").unwrap();
    let said = grpo(root, &[&args[..], &["p.jsonl"]].concat());
    assert!(said.code == 2 && said.err.contains("has no column `tag`"), "{}", said.err);
}

#[test]
fn geneval_says_what_a_folder_needs() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    geneval_layout(root);
    mistake(root, &["geneval", "--images", "images"], &["--images needs --detections FILE"]);
    mistake(root, &["geneval", "--detections", "found.jsonl"], &["--images"]);
    mistake(root, &["geneval", "--images", "images", "--detector", "centernet"], &["give NAME=WHERE"]);
    mistake(root, &["geneval", "--images", "images", "--detector", "centernet=none"], &["SHA256SUMS"]);
    let both = ["geneval", "--images", "images", "--detections", "found.jsonl", "--detector", "centernet=x"];
    mistake(root, &both, &["cannot be used with"]);
    mistake(root, &["geneval", "--images", "found.jsonl", "--detections", "found.jsonl"], &["found.jsonl: "]);
    let recorded = ["geneval", "--images", "images", "--detections", "found.jsonl"];
    mistake(root, &[&recorded[..], &["-n", "2"]].concat(), &["cannot be used with"]);
    mistake(root, &[&recorded[..], &["--guidance", "2"]].concat(), &["cannot be used with"]);
    mistake(root, &[&recorded[..], &["--provider", "cuda"]].concat(), &["--provider has no say"]);
    mistake(root, &["geneval", "--report", "r.md", "-n", "2"], &["--report is for --images DIR"]);
    std::fs::write(root.join("found.jsonl"), "").unwrap();
    let args = ["geneval", "--images", "images", "--detections", "found.jsonl"];
    mistake(root, &args, &["none of 8 images could be judged", "no detections for image"]);
}

#[test]
fn dpg_counts_as_published_and_without_faults() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let rows = [
        "first,1,0,entity - whole (a),Is there a?",
        "bench,1,0,entity - whole (b),\"Is there a bench, or not?\"",
        "bench,2,1,attribute - color (b),Is it red?",
    ];
    let head = "item_id,proposition_id,dependency,tuple,question_natural_language";
    std::fs::write(root.join("t.csv"), format!("{head}\n{}\n", rows.join("\n"))).unwrap();
    std::fs::create_dir(root.join("images")).unwrap();
    for item in ["first", "bench"] {
        RgbImage::from_pixel(16, 16, Rgb([9; 3])).save(root.join(format!("images/{item}.png"))).unwrap();
    }
    let mut lines = String::new();
    for crop in 0..4 {
        let mut add = |image: &str, question: &str, answer: &str| {
            let line = serde_json::json!({"image": image, "crop": crop, "question": question, "answer": answer});
            lines += &format!("{line}\n");
        };
        add("first.png", "Is there a?", "yes");
        add("bench.png", "Is there a bench, or not?", if crop == 0 { "no" } else { "yes" });
        add("bench.png", "Is it red?", "yes");
    }
    std::fs::write(root.join("a.jsonl"), lines).unwrap();
    let args = ["dpg", "--images", "images", "--csv", "t.csv", "--answers", "a.jsonl", "--resolution", "8", "--json"];
    let run = |more: &[&str]| {
        let said = eval(root, &[&args[..], more].concat());
        assert_eq!(said.code, 0, "{}", said.err);
        serde_json::from_str::<Value>(&said.out).unwrap()
    };
    let official = run(&[]);
    assert_eq!((&official["mode"], &official["overall"]), (&"official".into(), &75.0.into()));
    assert_eq!(official["failed"][0]["image"], "first.png");
    let fixed = run(&["--mode", "fixed"]);
    assert_eq!((&fixed["mode"], &fixed["overall"]), (&"fixed".into(), &87.5.into()));
    assert_eq!(fixed["models"].as_object().unwrap().len(), 2);
    mistake(root, &[&args[..9], &["--pictures", "5"]].concat(), &["5 pictures", "1 to 4"]);
}

#[test]
fn hps_scores_styles_with_a_model_of_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    for file in ["images/anime", "prompts"] {
        std::fs::create_dir_all(root.join(file)).unwrap();
    }
    std::fs::write(root.join("prompts/anime.json"), r#"["a red circle", "a blue square", "a star"]"#).unwrap();
    for row in 0..2 {
        RgbImage::from_pixel(64, 64, Rgb([90; 3])).save(root.join(format!("images/anime/{row:05}.jpg"))).unwrap();
    }
    let model = format!("{}/../rewards/models/hps", env!("CARGO_MANIFEST_DIR"));
    let args = ["hps", "--images", "images", "--prompts", "prompts", "--reward", &model];
    let said = eval(root, &[&args[..], &["--json", "r.json"]].concat());
    assert_eq!(said.code, 0, "{}", said.err);
    let report = json(&root.join("r.json"));
    assert_eq!(report["missing"][0], "anime/00002.jpg");
    assert_eq!((&report["rows"][0]["n"], &report["rows"][0]["std"]), (&2.into(), &0.0.into()));
    assert!(report["models"]["reward/image.onnx"].is_string(), "{report}");
    mistake(root, &["hps", "--images", "images", "--prompts", "images", "--reward", &model], &["anime.json"]);
}
