//! Hugging Face folders: read and scored as `transformers` does, written so that it reads them, refused by name.

#![expect(clippy::unwrap_used, reason = "a test and its helpers fail by panicking")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use grpo_policies::decoder::Decoder;
use grpo_policies::safetensors_file::{self, Precision};
use serde::Deserialize;

/// What `golden/qwen2.py` writes beside the folder that transformers saved.
#[derive(Deserialize)]
struct Golden {
    rows: Vec<Vec<u32>>,
    weights: Vec<f32>,
    largest_gradients: BTreeMap<String, f32>,
    prompts: Vec<Vec<u32>>,
    negative: Vec<u32>,
    guidance: f32,
    plain: Vec<Vec<u32>>,
    guided: Vec<Vec<u32>>,
}

/// One column of the vocabulary in so many is kept at each position, another share at the next.
const SHARE: usize = 10;
const KINDS: [&str; 2] = ["tied", "untied"];

fn folder(kind: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/qwen2").join(kind)
}

fn golden(kind: &str) -> (Golden, BTreeMap<String, Tensor>, Decoder) {
    let folder = folder(kind);
    let golden = serde_json::from_str(&fs::read_to_string(folder.join("golden.json")).unwrap()).unwrap();
    let values = safetensors_file::read(folder.join("golden.safetensors")).unwrap();
    (golden, values, Decoder::load(folder, &Device::Cpu, true).unwrap())
}

fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// The greatest absolute difference.
fn distance(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    got.iter().zip(want).map(|(got, want)| (got - want).abs()).fold(0.0, f32::max)
}

fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - top).exp()).sum();
    logits.iter().map(|logit| (f64::from(logit - top) - sum.ln()) as f32).collect()
}

/// Every position but each row's last, and the token that comes next.
fn places(rows: &[Vec<u32>]) -> (Vec<(usize, usize)>, Vec<u32>) {
    let of_row = |(row, ids): (usize, &Vec<u32>)| (1..ids.len()).map(|p| ((row, p - 1), ids[p])).collect::<Vec<_>>();
    rows.iter().enumerate().flat_map(of_row).unzip()
}

#[test]
fn log_probs_of_the_whole_vocabulary_are_those_of_transformers() {
    for kind in KINDS {
        let (golden, values, decoder) = golden(kind);
        let (places, nexts) = places(&golden.rows);
        assert!(places.len() > 1_000);
        let n_ids = decoder.config().vocab_size;
        let hidden = decoder.detached().unwrap().forward(&golden.rows).unwrap();
        let at = decoder.hidden_at(&hidden, &places).unwrap();
        let logits = decoder.logits(&at, 0..n_ids).unwrap().to_vec2::<f32>().unwrap();
        let want = values["log_probs"].to_vec2::<f32>().unwrap();
        let mut worst = 0f32;
        for (position, (logits, want)) in logits.iter().zip(&want).enumerate() {
            let first = (SHARE - position % SHARE) % SHARE;
            let got: Vec<f32> = log_softmax(logits).into_iter().skip(first).step_by(SHARE).collect();
            worst = worst.max(distance(&got, &want[..got.len()]));
        }
        let (log_probs, _) = decoder.log_probs_of(&at, &nexts, 0..n_ids, 1.0).unwrap();
        let next = distance(&numbers(&log_probs), &numbers(&values["next"]));
        assert!(worst < 1e-4 && next < 1e-4, "{kind}: {worst}, {next}");
    }
}

#[test]
fn gradients_of_every_tensor_are_those_of_transformers() {
    for kind in KINDS {
        let (golden, values, decoder) = golden(kind);
        let (places, nexts) = places(&golden.rows);
        let hidden = decoder.forward(&golden.rows).unwrap();
        let at = decoder.hidden_at(&hidden, &places).unwrap();
        let (log_probs, _) = decoder.log_probs_of(&at, &nexts, 0..decoder.config().vocab_size, 1.0).unwrap();
        let weights = Tensor::from_slice(&golden.weights, golden.weights.len(), &Device::Cpu).unwrap();
        let grads = (log_probs * weights).unwrap().sum_all().unwrap().backward().unwrap();
        assert_eq!(decoder.params().len(), golden.largest_gradients.len());
        for (name, var) in decoder.params().iter() {
            let largest = golden.largest_gradients[name];
            assert!(largest > 0.0, "{name}: a gradient of zero proves nothing");
            let got = numbers(&(grads.get(var).unwrap() / f64::from(largest)).unwrap());
            let off = distance(&got, &numbers(&values[&format!("gradient/{name}")]));
            assert!(off < 1e-3, "{kind}, {name}: {off} of its largest");
        }
    }
}

/// The most likely token after each step: of one branch, or of `u + s·(c − u)` of two.
fn greedy(decoder: &Decoder, prompt: &[u32], guide: Option<(&[u32], f32)>, n: usize) -> Vec<u32> {
    let snapshot = decoder.snapshot(0..decoder.config().vocab_size).unwrap();
    let read = |prompt: &[u32]| snapshot.prefill(&[prompt], prompt.len() + n).unwrap();
    let mut branches: Vec<_> = std::iter::once(prompt).chain(guide.map(|(negative, _)| negative)).map(read).collect();
    let mut tokens = Vec::new();
    for _ in 0..n {
        let laws: Vec<Vec<f32>> =
            branches.iter().map(|(_, hidden)| log_softmax(&numbers(&snapshot.logits(hidden).unwrap()))).collect();
        let scale = guide.map_or(1.0, |(_, scale)| scale);
        let (c, u) = (&laws[0], laws.last().unwrap());
        let scores: Vec<f32> = c.iter().zip(u).map(|(c, u)| u + scale * (c - u)).collect();
        let best = (0..scores.len()).max_by(|a, b| scores[*a].total_cmp(&scores[*b])).unwrap() as u32;
        tokens.push(best);
        for (cache, hidden) in &mut branches {
            *hidden = snapshot.decode_step(cache, &[best]).unwrap();
        }
    }
    tokens
}

#[test]
fn greedy_tokens_are_those_of_transformers_generate() {
    for kind in KINDS {
        let (golden, _, decoder) = golden(kind);
        for (at, prompt) in golden.prompts.iter().enumerate() {
            let plain = greedy(&decoder, prompt, None, 256);
            assert_eq!(plain, golden.plain[at], "{kind}, prompt {at}");
            let guided = greedy(&decoder, prompt, Some((&golden.negative, golden.guidance)), 256);
            assert_eq!(guided, golden.guided[at], "{kind}, prompt {at}, guided");
        }
    }
}

#[test]
fn what_is_saved_is_read_back_in_each_precision() {
    for kind in KINDS {
        let decoder = Decoder::load(folder(kind), &Device::Cpu, false).unwrap();
        for (precision, tolerance) in [(Precision::F32, 0.0), (Precision::Bf16, 0.0), (Precision::F16, 1e-3)] {
            let out = tempfile::tempdir().unwrap();
            decoder.save(out.path(), precision).unwrap();
            let again = Decoder::load(out.path(), &Device::Cpu, false).unwrap();
            for (name, tensor) in again.tensors() {
                let off = distance(&numbers(&tensor), &numbers(&decoder.tensors()[&name]));
                // The weights were made as bfloat16, whose 8 digits a half holds but where it is subnormal.
                assert!(off <= tolerance, "{kind}, {precision:?}, {name}: {off}");
            }
            let read = |folder: &Path| -> BTreeMap<String, serde_json::Value> {
                serde_json::from_str(&fs::read_to_string(folder.join("config.json")).unwrap()).unwrap()
            };
            let (before, after) = (read(&folder(kind)), read(out.path()));
            for (key, value) in before.iter().filter(|(key, _)| *key != "dtype") {
                assert_eq!(after.get(key), Some(value), "{kind}: {key}");
            }
        }
    }
}

fn copy_of(kind: &str) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(folder(kind)).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
    }
    copy
}

const INDEX: &str = "model.safetensors.index.json";

/// Exchanges text in a file of the folder; a text that is not there is a mistake of the test.
fn exchange(folder: &Path, file: &str, from: &str, to: &str) {
    let text = fs::read_to_string(folder.join(file)).unwrap();
    assert!(text.contains(from), "{file} has no {from}");
    fs::write(folder.join(file), text.replace(from, to)).unwrap();
}

fn cut(folder: &Path, file: &str) {
    let bytes = fs::read(folder.join(file)).unwrap();
    fs::write(folder.join(file), &bytes[..bytes.len() - 9]).unwrap();
}

/// Writes a shard again without a tensor, or with one more.
fn rewrite(folder: &Path, file: &str, change: impl FnOnce(&mut BTreeMap<String, Tensor>)) {
    let path = folder.join(file);
    let mut tensors = safetensors_file::read(&path).unwrap();
    change(&mut tensors);
    safetensors_file::write(path, &tensors, Precision::Bf16).unwrap();
}

type Breaks<'a> = &'a dyn Fn(&Path);

/// Each break of a folder that was good before it is an error with these words.
fn refused(cases: &[(Breaks<'_>, &[&str])]) {
    for (breaks, words) in cases {
        let copy = copy_of("untied");
        Decoder::load(copy.path(), &Device::Cpu, false).unwrap();
        breaks(copy.path());
        let error = Decoder::load(copy.path(), &Device::Cpu, false).unwrap_err().to_string();
        for word in *words {
            assert!(error.contains(word), "no `{word}` in: {error}");
        }
    }
}

const FIRST: &str = "model-00001-of-00004.safetensors";
const SECOND: &str = "model-00002-of-00004.safetensors";
const THIRD: &str = "model-00003-of-00004.safetensors";
/// A tensor of the third shard.
const NORM: &str = "model.norm.weight";

#[test]
fn shards_that_do_not_fit_their_index_are_refused_by_name() {
    let place = |shard: &str| format!("\"{NORM}\": \"{shard}\"");
    let moved = |to: &'static str| move |folder: &Path| exchange(folder, INDEX, &place(THIRD), &place(to));
    let twice = |folder: &Path| exchange(folder, INDEX, &place(THIRD), &format!("{0}, {0}", place(THIRD)));
    let lost = |folder: &Path| rewrite(folder, THIRD, |tensors| drop(tensors.remove(NORM)));
    let gained = |folder: &Path| {
        let more = Tensor::new(&[1f32], &Device::Cpu).unwrap();
        rewrite(folder, FIRST, |tensors| drop(tensors.insert("model.more.weight".into(), more)));
    };
    let index = |text: &'static str| move |folder: &Path| fs::write(folder.join(INDEX), text).unwrap();
    refused(&[
        (&|folder| fs::remove_file(folder.join(SECOND)).unwrap(), &[SECOND, "missing; fetch it too"]),
        (&|folder| cut(folder, SECOND), &[SECOND, "copy it again"]),
        (&moved(FIRST), &[THIRD, "holds tensor `model.norm.weight`, which model.safetensors.index.json has in", FIRST]),
        (&moved("../model.safetensors"), &[INDEX, "`model.norm.weight` lies in `../model.safetensors`", "beside"]),
        (&moved("/w.safetensors"), &[INDEX, "lies in `/w.safetensors`"]),
        (&moved("..\\\\w.safetensors"), &[INDEX, "lies in `..\\w.safetensors`"]),
        (&moved("weights.bin"), &["lies in `weights.bin`; give the name of a .safetensors file"]),
        (&twice, &[INDEX, "tensor `model.norm.weight` comes twice"]),
        (&lost, &[INDEX, "has tensor `model.norm.weight` in", THIRD, "which lacks it"]),
        (&gained, &[FIRST, "holds tensor `model.more.weight`, which model.safetensors.index.json does not name"]),
        (&index(r#"{"weight_map": {}}"#), &[INDEX, "names no tensor"]),
        (&index("[]"), &[INDEX]),
        (
            &|folder| fs::remove_file(folder.join(INDEX)).unwrap(),
            &["has neither model.safetensors nor", "save_pretrained"],
        ),
    ]);
}

#[test]
fn weights_that_do_not_fit_their_config_are_refused_by_name() {
    let config = |from: &'static str, to: &'static str| move |folder: &Path| exchange(folder, "config.json", from, to);
    refused(&[
        (
            &config("\"vocab_size\": 403", "\"vocab_size\": 404"),
            &[INDEX, "tensor `model.embed_tokens.weight` has shape [403, 64]; the config expects [404, 64]"],
        ),
        (
            &config("\"num_hidden_layers\": 3", "\"num_hidden_layers\": 4"),
            &["weights lack tensor `model.layers.3.input_layernorm.weight` of shape [64]"],
        ),
        (
            &config("\"num_hidden_layers\": 3", "\"num_hidden_layers\": 2"),
            &["weights hold tensor `model.layers.2.", "which the config does not know"],
        ),
        (&config("embeddings\": false", "embeddings\": true"), &["`lm_head.weight` that differs from the embedding"]),
        (&|folder| fs::write(folder.join("config.json"), "{").unwrap(), &["config.json: ", "EOF"]),
    ]);
}
