//! A language model that becomes a SimpleAR policy, against transformers' resize and SimpleAR's rule for new rows.

#![expect(clippy::unwrap_used, reason = "a test and its helpers fail by panicking")]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{Device, Tensor};
use grpo::{Policy, Prompt, Request, Seed};
use grpo_policies::cosmos::{Cosmos, CosmosConfig};
use grpo_policies::safetensors_file::{self, Precision};
use grpo_policies::simplear::{SPECIAL_TOKENS, SimpleAr};
use serde::Deserialize;
use serde_json::{Value, json};

/// What `golden/qwen2_resize.py` writes beside the folder that transformers saved.
#[derive(Deserialize)]
struct Golden {
    old: u32,
    new: u32,
    special: Vec<u32>,
    codes: u32,
    texts: Vec<String>,
    ids: Vec<Vec<u32>>,
}

fn folder(kind: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/qwen2_resize").join(kind)
}

fn golden(kind: &str) -> Golden {
    serde_json::from_str(&fs::read_to_string(folder(kind).join("ids.json")).unwrap()).unwrap()
}

/// A visual tokenizer of 25 codes.
fn cosmos() -> Arc<Cosmos> {
    let config = CosmosConfig { channels: 8, levels: vec![5, 5], embedding_dim: 2, ..CosmosConfig::shapes() };
    Arc::new(Cosmos::init(config, Seed::new(1), &Device::Cpu).unwrap())
}

fn made(from: &Path) -> Result<SimpleAr, String> {
    SimpleAr::from_language_model(from, cosmos(), (2, 3)).map_err(|error| error.to_string())
}

fn rows(tensor: &Tensor) -> Vec<Vec<f32>> {
    tensor.to_vec2().unwrap()
}

#[test]
fn new_rows_are_the_mean_of_the_old_and_old_rows_stay() {
    for kind in ["tied", "untied"] {
        let (golden, policy) = (golden(kind), made(&folder(kind)).unwrap());
        let tensors = policy.decoder().tensors();
        let want = safetensors_file::read(folder(kind).join("resized.safetensors")).unwrap();
        assert_eq!(tensors.contains_key("lm_head.weight"), kind == "untied");
        assert_eq!(policy.decoder().config().vocab_size as u32, golden.new + golden.codes);
        for (name, want) in [("model.embed_tokens.weight", &want["embed"]), ("lm_head.weight", &want["head"])] {
            let Some(got) = tensors.get(name) else { continue };
            let (got, want) = (rows(got), rows(want));
            assert_eq!(got.len(), want.len());
            let old = golden.old as usize;
            assert_eq!(got[..old], want[..old], "{kind}: the old rows of {name} are not touched");
            assert!(got[old..].iter().all(|row| row == &got[old]));
            let off = got[old].iter().zip(&want[old]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            // The oracle takes the mean in f32 and this one in f64.
            assert!(off < 1e-6, "{kind}, {name}: {off}");
        }
    }
}

#[test]
fn ids_of_hard_texts_are_those_of_the_extended_tokenizer() {
    let (golden, policy) = (golden("tied"), made(&folder("tied")).unwrap());
    assert_eq!(golden.special, (golden.old..golden.new).collect::<Vec<_>>());
    for (text, ids) in golden.texts.iter().zip(&golden.ids) {
        let want: Vec<u32> = [&[golden.old][..], ids, &[golden.old + 2]].concat();
        assert_eq!(policy.prompt_ids(text, "").unwrap(), want, "{text:?}");
    }
}

#[test]
fn what_is_made_is_a_checkpoint_that_samples_and_survives_a_folder() {
    let out = tempfile::tempdir().unwrap();
    let policy = made(&folder("untied")).unwrap();
    policy.save(out.path(), Precision::F32).unwrap();
    let again = SimpleAr::load(out.path(), Some((16, 24)), &Device::Cpu).unwrap();
    let prompt = Prompt::new("a photo of a red star");
    let draw = |policy: &SimpleAr| {
        policy.sample(&[Request { prompt: &prompt, seed: Seed::new(3) }]).unwrap().remove(0).trace.codes
    };
    assert_eq!(draw(&policy), draw(&again));
    let config = |folder: &Path| -> Value {
        serde_json::from_str(&fs::read_to_string(folder.join("config.json")).unwrap()).unwrap()
    };
    let (before, after) = (config(&folder("untied")), config(out.path()));
    for key in ["architectures", "model_type", "bos_token_id", "eos_token_id", "max_window_layers", "layer_types"] {
        assert_eq!(before[key], after[key], "{key}");
    }
    assert!(out.path().join("tokenizer_config.json").exists());
    assert!(!out.path().join("generation_config.json").exists(), "settings for text are not carried to images");
}

/// Version 4 of transformers lists the added tokens in both files of the tokenizer.
#[test]
fn the_second_list_of_added_tokens_grows_too() {
    let (copy, out) = (copy_of(&folder("tied")), tempfile::tempdir().unwrap());
    let golden = golden("tied");
    edit(&copy.path().join("tokenizer_config.json"), |settings| settings["added_tokens_decoder"] = json!({"302": {}}));
    made(copy.path()).unwrap().save(out.path(), Precision::F32).unwrap();
    let settings: Value =
        serde_json::from_str(&fs::read_to_string(out.path().join("tokenizer_config.json")).unwrap()).unwrap();
    let listed = settings["added_tokens_decoder"].as_object().unwrap();
    assert_eq!(listed.len(), 8);
    for (id, token) in golden.special.iter().zip(SPECIAL_TOKENS) {
        assert_eq!(
            (&listed[&id.to_string()]["content"], &listed[&id.to_string()]["id"]),
            (&json!(token), &Value::Null)
        );
    }
}

/// transformers applies the penalty to the conditional logits, unseen by whoever calls generate.
#[test]
fn a_repetition_penalty_is_told_and_carried() {
    let (out, copy) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    made(&folder("tied")).unwrap().save(out.path(), Precision::F32).unwrap();
    for (settings, said) in [(r#"{"repetition_penalty": 1.0}"#, None), (r#"{"repetition_penalty": 1.1}"#, Some("1.1"))]
    {
        fs::write(out.path().join("generation_config.json"), settings).unwrap();
        let policy = SimpleAr::load(out.path(), Some((16, 24)), &Device::Cpu).unwrap();
        assert_eq!(policy.warnings().len(), usize::from(said.is_some()), "{settings}");
        for warning in policy.warnings() {
            assert!(warning.contains("repetition_penalty 1.1, which the original's sampling applies"), "{warning}");
        }
        policy.frozen().unwrap().save(copy.path(), Precision::F32).unwrap();
        assert_eq!(fs::read_to_string(copy.path().join("generation_config.json")).unwrap(), settings);
    }
    fs::write(out.path().join("generation_config.json"), "{").unwrap();
    let error = SimpleAr::load(out.path(), Some((16, 24)), &Device::Cpu).err().unwrap().to_string();
    assert!(error.contains("generation_config.json: EOF") && error.contains("mend it or remove it"), "{error}");
}

fn copy_of(folder: &Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
    }
    copy
}

fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut json: Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    change(&mut json);
    fs::write(path, json.to_string()).unwrap();
}

#[test]
fn a_tokenizer_that_does_not_fit_is_refused() {
    type Breaks = Box<dyn Fn(&mut Value)>;
    let rename = |json: &mut Value| json["added_tokens"][0]["content"] = "<|soi|>".into();
    let far = |json: &mut Value| json["model"]["vocab"]["a"] = 5_000.into();
    let more = |json: &mut Value| {
        let entry = json["added_tokens"][0].clone();
        let added = json["added_tokens"].as_array_mut().unwrap();
        for n in 0..14 {
            let mut entry = entry.clone();
            entry["content"] = format!("<|more {n}|>").into();
            entry["id"] = (303 + n).into();
            added.push(entry);
        }
    };
    let cases: [(Breaks, &str); 3] = [
        (Box::new(rename), "the tokenizer has the token `<|soi|>` already; load it as a SimpleAR checkpoint"),
        (Box::new(far), "ids up to 5000; give one whose ids are each used once"),
        (Box::new(more), "the tokenizer has 317 ids and the embedding 316 rows"),
    ];
    for (breaks, said) in cases {
        let copy = copy_of(&folder("tied"));
        edit(&copy.path().join("tokenizer.json"), breaks);
        let error = made(copy.path()).err().unwrap();
        assert!(error.contains(said) && error.contains(copy.path().to_str().unwrap()), "{error}");
    }
    let out = tempfile::tempdir().unwrap();
    made(&folder("tied")).unwrap().save(out.path(), Precision::F32).unwrap();
    edit(&out.path().join("tokenizer.json"), |json| {
        let mut entry = json["added_tokens"][0].clone();
        (entry["content"], entry["id"]) = ("<|late|>".into(), 310.into());
        json["added_tokens"].as_array_mut().unwrap().push(entry);
    });
    let error = SimpleAr::load(out.path(), Some((16, 24)), &Device::Cpu).err().unwrap().to_string();
    assert!(error.contains("vocabulary has 335 ids; the tokenizer's 311 and the codebook's 25 make 336"), "{error}");
}
