//! Low-rank adapters against PEFT's, and what they leave alone.

#![expect(clippy::unwrap_used, reason = "a test and its helpers fail by panicking")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use grpo::{Gradients, Seed};
use grpo_policies::decoder::{Decoder, DecoderConfig, LoraConfig, LoraTarget, Targets};
use grpo_policies::safetensors_file;
use serde::Deserialize;

/// The part of decoder.json that lora.py uses too.
#[derive(Deserialize)]
struct Rows {
    rows: Vec<Vec<u32>>,
    slice: (usize, usize),
    temperature: f32,
    places: Vec<(usize, usize)>,
    targets: Vec<u32>,
    weights: Vec<f32>,
}

#[derive(Deserialize)]
struct Golden {
    cases: BTreeMap<String, Case>,
}

#[derive(Deserialize)]
struct Case {
    logits: Vec<Vec<f32>>,
    loss: f32,
    gradients: BTreeMap<String, Vec<f32>>,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn read<T: for<'de> Deserialize<'de>>(name: &str) -> T {
    serde_json::from_str(&std::fs::read_to_string(folder().join(name)).unwrap()).unwrap()
}

fn base() -> Decoder {
    let config = std::fs::read_to_string(folder().join("decoder_config.json")).unwrap();
    let tensors = safetensors_file::read(folder().join("decoder.safetensors")).unwrap();
    Decoder::from_tensors(DecoderConfig::from_json(&config).unwrap(), tensors, true).unwrap()
}

fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// The greatest absolute difference.
fn distance(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    got.iter().zip(want).map(|(got, want)| (got - want).abs()).fold(0.0, f32::max)
}

fn scale(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |most, x| most.max(x.abs()))
}

/// Logits of every real position of each row.
fn logits(decoder: &Decoder) -> Vec<Vec<f32>> {
    let rows: Rows = read("decoder.json");
    let logits = decoder.logits(&decoder.forward(&rows.rows).unwrap(), 0..97).unwrap();
    let of_row = |(row, ids): (usize, &Vec<u32>)| numbers(&logits.get(row).unwrap().narrow(0, 0, ids.len()).unwrap());
    rows.rows.iter().enumerate().map(of_row).collect()
}

fn lora(rank: usize, targets: impl IntoIterator<Item = LoraTarget>) -> LoraConfig {
    LoraConfig { rank, alpha: 5.0, targets: targets.into_iter().collect() }
}

/// An adapted decoder whose `B` is not zero any more.
fn adapted(config: LoraConfig) -> Decoder {
    let decoder = base().with_lora(config, Seed::new(3)).unwrap();
    for (name, var) in decoder.params().iter() {
        let mut draws = Seed::new(4).named(name).draws();
        let values: Vec<f32> = (0..var.elem_count()).map(|_| 0.3 * draws.normal() as f32).collect();
        var.set(&Tensor::from_vec(values, var.shape(), &Device::Cpu).unwrap()).unwrap();
    }
    decoder
}

#[test]
fn logits_and_gradients_are_those_of_peft() {
    let golden: Golden = read("lora.json");
    let rows: Rows = read("decoder.json");
    let targets = Targets {
        places: rows.places,
        ids: rows.targets,
        slice: rows.slice.0..rows.slice.1,
        temperature: rows.temperature,
    };
    let weights = Tensor::from_vec(rows.weights, targets.ids.len(), &Device::Cpu).unwrap();
    for (name, case) in &golden.cases {
        let decoder = base().load_adapter(folder().join(name)).unwrap();
        for (got, want) in logits(&decoder).iter().zip(&case.logits) {
            assert!(distance(got, want) < 2e-5 * scale(want), "{name}: {} of {}", distance(got, want), scale(want));
        }
        let scores = decoder.score(&rows.rows, &targets).unwrap();
        let loss = (scores.log_probs * &weights).unwrap().sum_all().unwrap();
        assert!((loss.to_scalar::<f32>().unwrap() - case.loss).abs() < 2e-5 * case.loss.abs().max(10.0), "{name}");
        let mut gradients = Gradients::new();
        gradients.add_backward(&loss, &decoder.params()).unwrap();
        let names: Vec<&str> = gradients.iter().map(|(name, _)| name).collect();
        assert_eq!(names, case.gradients.keys().map(String::as_str).collect::<Vec<_>>());
        for (tensor, want) in &case.gradients {
            let got = numbers(gradients.get(tensor).unwrap());
            let size = scale(want);
            assert!(size > 0.0, "{tensor}: a gradient of zero proves nothing");
            assert!(distance(&got, want) < 2e-4 * size, "{tensor}: {} of {size}", distance(&got, want));
        }
    }
}

#[test]
fn fresh_adapters_add_nothing_and_are_all_that_is_trained() {
    let plain = base();
    let decoder = base().with_lora(lora(3, LoraTarget::ALL), Seed::new(1)).unwrap();
    assert_eq!(logits(&decoder), logits(&plain));
    assert_eq!(decoder.params().len(), 2 * 2 * 7);
    for (name, var) in decoder.params().iter() {
        let values = numbers(var);
        if name.ends_with("lora_B.weight") {
            assert!(values.iter().all(|x| *x == 0.0), "{name}");
            continue;
        }
        // PEFT's first A: uniform within 1 / √in, whose deviation is that bound over √3.
        let (rank, width) = var.dims2().unwrap();
        let bound = 1.0 / (width as f32).sqrt();
        let spread = (values.iter().map(|x| x * x).sum::<f32>() / values.len() as f32).sqrt();
        assert_eq!(rank, 3);
        assert!(scale(&values) <= bound && (spread * 3f32.sqrt() / bound - 1.0).abs() < 0.25, "{name}: {spread}");
    }
    let other = base().with_lora(lora(3, LoraTarget::ALL), Seed::new(2)).unwrap();
    let name = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight";
    assert_ne!(numbers(decoder.params().get(name).unwrap()), numbers(other.params().get(name).unwrap()));
}

#[test]
fn frozen_is_the_base_and_a_copy_stands_alone() {
    let decoder = adapted(lora(2, [LoraTarget::Key, LoraTarget::Gate]));
    let (frozen, copy, detached) = (decoder.frozen().unwrap(), decoder.copy().unwrap(), decoder.detached().unwrap());
    let before = logits(&decoder);
    assert!(frozen.params().is_empty() && frozen.lora().is_none() && detached.params().is_empty());
    assert_eq!(logits(&frozen), logits(&base()));
    assert!(logits(&copy) == before && logits(&detached) == before);
    assert!(distance(&before[0], &logits(&frozen)[0]) > 1e-2);
    let name = "base_model.model.model.layers.0.mlp.gate_proj.lora_B.weight";
    let var = decoder.params().get(name).unwrap().clone();
    var.set(&(var.as_tensor() * 3.0).unwrap()).unwrap();
    assert!(logits(&decoder) != before && logits(&detached) == logits(&decoder));
    assert!(logits(&copy) == before && logits(&frozen) == logits(&base()));
    assert_eq!(copy.params().len(), decoder.params().len());
}

#[test]
fn merged_weights_compute_the_same_and_so_does_the_sampler() {
    let decoder = adapted(lora(4, LoraTarget::ALL));
    let merged = decoder.merge().unwrap();
    assert_eq!(merged.params().len(), base().params().len());
    let want = logits(&decoder);
    for (got, want) in logits(&merged).iter().zip(&want) {
        assert!(distance(got, want) < 2e-5 * scale(want), "{} of {}", distance(got, want), scale(want));
    }
    let rows: Rows = read("decoder.json");
    let snapshot = decoder.snapshot(0..97).unwrap();
    let (_, hidden) = snapshot.prefill(&rows.rows, 20).unwrap();
    let sampled = snapshot.logits(&hidden).unwrap().to_vec2::<f32>().unwrap();
    for (got, want) in sampled.iter().zip(&want) {
        let want = &want[want.len() - 97..];
        assert!(distance(got, want) < 2e-5 * scale(want), "{} of {}", distance(got, want), scale(want));
    }
}

/// Leaves the folder where `lora.py FOLDER` lets PEFT load it and compare.
#[test]
fn what_is_saved_is_read_back() {
    let decoder = adapted(lora(3, [LoraTarget::Query, LoraTarget::Output, LoraTarget::Up, LoraTarget::Down]));
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("lora");
    decoder.save_adapter(&folder).unwrap();
    std::fs::write(folder.join("logits.json"), serde_json::to_string(&logits(&decoder)).unwrap()).unwrap();
    let back = base().load_adapter(&folder).unwrap();
    assert_eq!(back.lora(), decoder.lora());
    assert_eq!(logits(&back), logits(&decoder));
}

/// What is done to the tensors of a file.
type Change<'a> = &'a dyn Fn(&mut BTreeMap<String, Tensor>);

#[test]
fn adapters_that_do_not_fit_are_named() {
    let name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight";
    let error = |config: &dyn Fn(String) -> String, change: Change<'_>| {
        let target = tempfile::tempdir().unwrap();
        let json = std::fs::read_to_string(folder().join("lora_two/adapter_config.json")).unwrap();
        std::fs::write(target.path().join("adapter_config.json"), config(json)).unwrap();
        let mut tensors = safetensors_file::read(folder().join("lora_two/adapter_model.safetensors")).unwrap();
        change(&mut tensors);
        let path = target.path().join("adapter_model.safetensors");
        safetensors_file::write(path, &tensors, safetensors_file::Precision::F32).unwrap();
        base().load_adapter(target.path()).unwrap_err().to_string()
    };
    let wrong = Tensor::zeros((16, 2), candle_core::DType::F32, &Device::Cpu).unwrap();
    let weights: [(Change<'_>, &str); 3] = [
        (&|tensors| drop(tensors.remove(name)), "v_proj.lora_B.weight` of shape [16, 3]; give it"),
        (&|tensors| drop(tensors.insert(name.into(), wrong.clone())), "has shape [16, 2]; the config expects [16, 3]"),
        (
            &|tensors| drop(tensors.insert(name.replace('v', "k"), wrong.clone())),
            "k_proj.lora_B.weight` of shape [16, 2], which the config does not know",
        ),
    ];
    for (change, message) in weights {
        let error = error(&|json| json, change);
        assert!(error.contains("adapter_model.safetensors: ") && error.contains(message), "{error}");
    }
    for (from, to, message) in [
        ("\"r\": 3", "\"r\": 0", "lora: rank is 0; give 1 to 32"),
        ("\"r\": 3", "\"r\": 18446744073709551615", "rank is 18446744073709551615; give 1 to 32"),
        ("\"lora_alpha\": 8", "\"lora_alpha\": -1", "alpha is -1"),
        ("\"v_proj\"", "\"w_proj\"", "unknown variant `w_proj`"),
        ("\"LORA\"", "\"IA3\"", "peft_type is `IA3`"),
        ("\"use_rslora\": false", "\"use_rslora\": true", "use_rslora is true; only adapters without it"),
        ("\"rank_pattern\": {}", "\"rank_pattern\": {\"q_proj\": 1}", "rank_pattern is {\"q_proj\":1}"),
        ("\"bias\": \"none\"", "\"bias\": \"all\"", "bias is \"all\""),
        ("{", "[", "expected"),
    ] {
        let error = error(&|json| json.replacen(from, to, 1), &|_| ());
        assert!(error.contains("adapter_config.json: ") && error.contains(message), "{error}");
    }
    let decoder = adapted(lora(2, [LoraTarget::Up]));
    assert!(decoder.with_lora(lora(2, LoraTarget::ALL), Seed::new(1)).unwrap_err().to_string().contains("merge it"));
    assert!(base().save_adapter("nowhere").unwrap_err().to_string().contains("no adapter to save"));
    assert!(base().with_lora(lora(2, []), Seed::new(1)).unwrap_err().to_string().contains("targets is empty"));
    assert!(base().load_adapter("no/such/folder").unwrap_err().to_string().contains("no/such/folder"));
}
