//! Rewards that `reward.toml` describes alone, against the Python programs of `golden/onnx_networks.py`.
#![cfg(feature = "onnx")]
#![expect(clippy::unwrap_used, reason = "in a test a failure is a panic, helpers included")]

use std::collections::BTreeMap;
use std::fs;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use grpo::{Prompt, Reward};
use grpo_rewards::onnx::{OnnxReward, SessionOptions};
use image::{Rgb, RgbImage};
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    pictures: Vec<(u32, u32)>,
    prompts: Vec<BTreeMap<String, serde_json::Value>>,
    scores: Scores,
}

/// By kind: one row a prompt, one column a picture.
type Scores = BTreeMap<String, Vec<Vec<f32>>>;

fn folder(kind: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/onnx").join(kind)
}

fn golden() -> (Vec<RgbImage>, Vec<Prompt>, Scores) {
    let text = fs::read_to_string(folder("../onnx_networks.json")).unwrap();
    let Golden { pictures, prompts, scores } = serde_json::from_str(&text).unwrap();
    let prompts = prompts.into_iter().map(|mut columns| {
        let text = columns.remove("text").unwrap();
        Prompt { text: text.as_str().unwrap().into(), columns }
    });
    (pictures.into_iter().map(|(width, height)| patterned(width, height)).collect(), prompts.collect(), scores)
}

/// The formula of `golden/onnx_networks.py`.
fn patterned(width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| {
        let base = 3 * x * x + 5 * y * y + 7 * x * y;
        Rgb([0, 40, 80].map(|shift| ((base + shift) % 256) as u8))
    })
}

#[test]
fn every_kind_scores_as_its_python_program_does() {
    let (images, prompts, scores) = golden();
    assert_eq!(scores.keys().collect::<Vec<_>>(), ["classes", "head", "joint", "pair"]);
    // Three in a run of four pictures a prompt, so that a run holds two prompts.
    let options = SessionOptions { images_per_run: NonZeroUsize::new(3), ..SessionOptions::default() };
    for (kind, expected) in scores {
        let reward = OnnxReward::load(&folder(&kind), &options).unwrap();
        assert_eq!(reward.name(), kind);
        let rows = prompts.iter().flat_map(|prompt| images.iter().map(move |image| (prompt, image)));
        let batch: Vec<(&Prompt, &RgbImage)> = rows.collect();
        let scores = reward.score_batch(&batch).unwrap();
        for (at, (score, expected)) in scores.iter().zip(expected.concat()).enumerate() {
            let close = 2e-5 * expected.abs().max(1.0);
            assert!((score - expected).abs() < close, "{kind}, row {at}: {score} {expected}");
        }
        let alone = reward.score(batch[7].0, batch[7].1).unwrap();
        assert!((alone - scores[7]).abs() < 1e-4, "{kind}: {alone} {}", scores[7]);
        assert!(reward.score_batch(&[]).unwrap().is_empty());
    }
}

#[test]
fn the_miniature_is_a_reward_like_any_other() {
    let clip = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/clip");
    let reward = OnnxReward::load(&clip, &SessionOptions::default()).unwrap();
    let (prompt, image) = (Prompt::new("a red circle"), patterned(64, 64));
    let direct = grpo_rewards::clip::ClipReward::tiny().unwrap();
    assert_eq!(reward.score(&prompt, &image).unwrap(), direct.score(&prompt, &image).unwrap());
}

#[test]
fn a_sample_that_cannot_be_judged_fails_alone() {
    let reward = OnnxReward::load(&folder("classes"), &SessionOptions::default()).unwrap();
    let [good, wrong, twice, missing] = [("class", "crane"), ("class", "dog"), ("class", "heron"), ("klass", "crane")]
        .map(|(column, label)| Prompt::new("a bird").with(column, label));
    let beyond = Prompt::new("a bird").with("class", 5);
    let (image, empty) = (patterned(20, 12), RgbImage::new(0, 0));
    let rows = [(&good, &image), (&good, &empty), (&wrong, &image), (&twice, &image), (&missing, &image)];
    let batch: Vec<(&Prompt, &RgbImage)> = rows.into_iter().chain([(&beyond, &image), (&good, &image)]).collect();
    let scores = reward.score_each(&batch);
    let error = |at: usize| scores[at].as_ref().unwrap_err().to_string();
    assert!(scores[0].is_ok() && scores[6].is_ok());
    assert!(error(1).contains("an image of 0x0 cannot be judged"), "{}", error(1));
    assert!(error(2).contains("column `class` of prompt `a bird` is `dog`; give a label of"), "{}", error(2));
    assert!(error(3).ends_with("is `heron`, the label of classes [3, 4]; give the number of one"), "{}", error(3));
    assert!(error(4).contains("no column `class`"), "{}", error(4));
    assert!(error(5).contains("is 5; give a label, or a number below 5"), "{}", error(5));
}

/// A copy of a folder whose `reward.toml` has another text.
fn changed(kind: &str, from: &str, to: &str) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for file in fs::read_dir(folder(kind)).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), copy.path().join(file.file_name())).unwrap();
    }
    let path = copy.path().join("reward.toml");
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.contains(from), "{from}");
    fs::write(&path, text.replacen(from, to, 1)).unwrap();
    copy
}

#[test]
fn a_readout_may_be_any_number_of_a_row() {
    let (images, prompts, _) = golden();
    let softmax =
        r#"{ softmax = { value = "logits", class = { prompt = { column = "class", labels = "labels.txt" } } } }"#;
    let with = |score: &str| {
        let copy = changed("classes", softmax, score);
        OnnxReward::load(copy.path(), &SessionOptions::default()).unwrap().score(&prompts[0], &images[0])
    };
    let logits: Vec<f32> = (0..5)
        .map(|index| with(&format!("{{ column = {{ value = \"logits\", index = {index} }} }}")).unwrap())
        .collect();
    let sum: f32 = logits.iter().map(|logit| logit.exp()).sum();
    let third = with(r#"{ softmax = { value = "logits", class = { index = 3 } } }"#).unwrap();
    assert!((third - logits[3].exp() / sum).abs() < 1e-6);
    let beyond = with(r#"{ column = { value = "logits", index = 5 } }"#).unwrap_err().to_string();
    assert_eq!(beyond, "a row of `logits` has 5 numbers; column 5 is read; count from 0");
    let scalar = with(r#"{ scalar = "logits" }"#).unwrap_err().to_string();
    assert!(scalar.contains("a row of `logits` has 5 numbers; a scalar has 1"), "{scalar}");
}

#[test]
fn a_description_that_makes_no_score_is_refused_when_it_is_loaded() {
    for (kind, from, to, expected) in [
        (
            "head",
            r#"normalised = "embedding""#,
            r#"value = "embeding""#,
            r#"input `x` of `head.onnx` reads `embeding`"#,
        ),
        ("head", r#"rating = "rating" }"#, r#"rating = "embedding" }"#, "`embedding` is made twice"),
        (
            "head",
            r#"scalar = "rating""#,
            r#"scalar = "score""#,
            r#"the score reads `score`; the stages before it make"#,
        ),
        ("pair", r#"cosine = ["image", "text"]"#, r#"cosine = ["text", "text"]"#, "does not depend on the picture"),
        ("pair", "tokens = \"clip\"\n", "", "the prompt's tokens are read but not described"),
        ("pair", r#"input_ids = "ids""#, r#"input_ids = "mask", more = "ids""#, r#"expected `more`"#),
        ("pair", "size = 8", "size = 9", "expected [free, 3, 9, 9]"),
        ("joint", "std = 2.0", "std = 0.0", "std is 0; give more than 0"),
        ("joint", "length = 12", "length = 2", "tokens have length 2; give 4 to 4096"),
        ("joint", "length = 12", "length = 13", "input `ids` has shape [free, 12]; expected [free, 13]"),
        ("joint", r#"types = "types""#, r#"types = "kinds""#, "unknown variant `kinds`"),
        ("classes", "width = 10", "width = 8", "input `image` has shape [free, 8, 10, 3]; expected [free, 8, 8, 3]"),
        ("classes", "std = [1.0, 1.0, 1.0]", "std = [1.0, -1.0, 1.0]", "a finite mean and a std above 0"),
        ("classes", "labels = \"labels.txt\"", "labels = \"names.txt\"", "`names.txt` is read, but [files] lists"),
    ] {
        let copy = changed(kind, from, to);
        let loaded = OnnxReward::load(copy.path(), &SessionOptions::default());
        let error = loaded.map(drop).unwrap_err().to_string();
        assert!(error.contains(expected), "{kind}, {to}: {error}");
    }
}

#[test]
fn a_tokenizer_that_is_none_is_an_error_that_names_the_file() {
    for text in ["{}", "[1, 2", "{\"decoder\": {\"type\": \"?\"}}"] {
        let copy = changed("joint", "name", "name");
        let path = copy.path().join("tokenizer.json");
        let sha256 = |bytes: &[u8]| {
            use sha2::Digest;
            sha2::Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect::<String>()
        };
        let manifest = fs::read_to_string(copy.path().join("reward.toml")).unwrap();
        let manifest = manifest.replace(&sha256(&fs::read(&path).unwrap()), &sha256(text.as_bytes()));
        fs::write(copy.path().join("reward.toml"), manifest).unwrap();
        fs::write(&path, text).unwrap();
        let error = OnnxReward::load(copy.path(), &SessionOptions::default()).map(drop).unwrap_err().to_string();
        assert!(error.starts_with(&format!("{}: ", path.display())), "{error}");
    }
}
