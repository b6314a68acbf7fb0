//! The decoder against Hugging Face's, and against itself: cached and not, alone and in company.

#![expect(clippy::unwrap_used, reason = "a test and its helpers fail by panicking")]

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{Device, Tensor};
use grpo::Seed;
use grpo_policies::decoder::{Decoder, DecoderConfig, repeat_rows};
use grpo_policies::safetensors_file;
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    rows: Vec<Vec<u32>>,
    slice: (usize, usize),
    temperature: f32,
    logits: Vec<Vec<f32>>,
    places: Vec<(usize, usize)>,
    targets: Vec<u32>,
    weights: Vec<f32>,
    log_probs: Vec<f32>,
    entropies: Vec<f32>,
    gradients: BTreeMap<String, Vec<f32>>,
    greedy: Vec<Vec<u32>>,
}

fn folder() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn golden() -> (Golden, Decoder) {
    let read = |name: &str| std::fs::read_to_string(folder().join(name)).unwrap();
    let config = DecoderConfig::from_json(&read("decoder_config.json")).unwrap();
    let tensors = safetensors_file::read(folder().join("decoder.safetensors")).unwrap();
    (serde_json::from_str(&read("decoder.json")).unwrap(), Decoder::from_tensors(config, tensors, true).unwrap())
}

fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// The greatest absolute difference.
fn distance(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    got.iter().zip(want).map(|(got, want)| (got - want).abs()).fold(0.0, f32::max)
}

fn tiny() -> Decoder {
    let config = DecoderConfig { vocab_size: 150, num_hidden_layers: 2, ..DecoderConfig::default() };
    let decoder = Decoder::init(config, Seed::new(5)).unwrap();
    // Fresh weights are so small that every law is nearly uniform; wider ones make differences visible.
    for (_, var) in decoder.params().iter() {
        var.set(&(var.as_tensor() * 3.0).unwrap()).unwrap();
    }
    decoder
}

fn prompt(index: u32, length: u32) -> Vec<u32> {
    (0..length).map(|position| (index * 31 + position * 17 + position * position) % 150).collect()
}

#[test]
fn logits_and_log_probs_are_those_of_hugging_face() {
    let (golden, decoder) = golden();
    let hidden = decoder.forward(&golden.rows).unwrap();
    let logits = decoder.logits(&hidden, 0..97).unwrap();
    for (row, want) in golden.logits.iter().enumerate() {
        let got = logits.get(row).unwrap().narrow(0, 0, golden.rows[row].len()).unwrap();
        let scale = want.iter().fold(1f32, |most, x| most.max(x.abs()));
        assert!(distance(&numbers(&got), want) < 1e-5 * scale, "row {row}: {}", distance(&numbers(&got), want));
    }
    let at = decoder.hidden_at(&hidden, &golden.places).unwrap();
    let slice = golden.slice.0..golden.slice.1;
    let (log_probs, entropies) = decoder.log_probs_of(&at, &golden.targets, slice, golden.temperature).unwrap();
    let (log_probs, entropies) = (numbers(&log_probs), numbers(&entropies));
    // Log-probs reach −17 here: an error of 2e-5 is one in the seventh digit, f32's own.
    assert!(distance(&log_probs, &golden.log_probs) < 2e-5, "{}", distance(&log_probs, &golden.log_probs));
    assert!(distance(&entropies, &golden.entropies) < 2e-5, "{}", distance(&entropies, &golden.entropies));
}

#[test]
fn every_gradient_is_that_of_hugging_face() {
    let (golden, decoder) = golden();
    let hidden = decoder.forward(&golden.rows).unwrap();
    let at = decoder.hidden_at(&hidden, &golden.places).unwrap();
    let slice = golden.slice.0..golden.slice.1;
    let (log_probs, _) = decoder.log_probs_of(&at, &golden.targets, slice, golden.temperature).unwrap();
    let weights = Tensor::from_slice(&golden.weights, golden.weights.len(), &Device::Cpu).unwrap();
    let grads = (log_probs * weights).unwrap().sum_all().unwrap().backward().unwrap();
    assert_eq!(decoder.params().len(), golden.gradients.len());
    for (name, var) in decoder.params().iter() {
        let got = numbers(grads.get(var).unwrap_or_else(|| panic!("{name} has no gradient")));
        let want = &golden.gradients[name];
        let scale = want.iter().fold(0f32, |most, x| most.max(x.abs()));
        assert!(scale > 0.0, "{name}: a gradient of zero proves nothing");
        assert!(distance(&got, want) < 1e-4 * scale, "{name}: {} of {scale}", distance(&got, want));
    }
}

/// The embedding's gradient is the sum of those of an untied embedding and head.
#[test]
fn a_tied_embedding_learns_from_both_uses() {
    let tied = tiny();
    let mut tensors = tied.tensors();
    tensors.insert("lm_head.weight".into(), tensors["model.embed_tokens.weight"].clone());
    let config = DecoderConfig { tie_word_embeddings: false, ..tied.config().clone() };
    let untied = Decoder::from_tensors(config, tensors, true).unwrap();
    let gradients = |decoder: &Decoder| {
        let hidden = decoder.forward(&[vec![1, 2, 3]]).unwrap();
        let at = decoder.hidden_at(&hidden, &[(0, 0), (0, 1)]).unwrap();
        let (log_probs, _) = decoder.log_probs_of(&at, &[120, 130], 100..150, 1.0).unwrap();
        let grads = log_probs.sum_all().unwrap().backward().unwrap();
        let mut of = BTreeMap::new();
        for (name, var) in decoder.params().iter() {
            of.insert(name.to_owned(), numbers(grads.get(var).unwrap()));
        }
        of
    };
    let (one, two) = (gradients(&tied), gradients(&untied));
    assert!(two["model.embed_tokens.weight"].iter().any(|x| *x != 0.0));
    assert!(two["lm_head.weight"].iter().any(|x| *x != 0.0));
    let sum: Vec<f32> =
        two["model.embed_tokens.weight"].iter().zip(&two["lm_head.weight"]).map(|(a, b)| a + b).collect();
    assert!(distance(&one["model.embed_tokens.weight"], &sum) < 1e-6);
}

#[test]
fn greedy_decoding_is_that_of_hugging_face() {
    let (golden, decoder) = golden();
    let snapshot = decoder.snapshot(golden.slice.0..golden.slice.1).unwrap();
    let (mut cache, mut hidden) = snapshot.prefill(&golden.rows, 40).unwrap();
    let mut tokens = vec![Vec::new(); golden.rows.len()];
    for _ in 0..24 {
        let best = snapshot.logits(&hidden).unwrap().argmax(1).unwrap().to_vec1::<u32>().unwrap();
        let ids: Vec<u32> = best.iter().map(|index| index + golden.slice.0 as u32).collect();
        ids.iter().zip(&mut tokens).for_each(|(id, row)| row.push(*id));
        hidden = snapshot.decode_step(&mut cache, &ids).unwrap();
    }
    assert_eq!(tokens, golden.greedy);
}

#[test]
fn cached_decoding_agrees_with_the_forward_pass() {
    let decoder = tiny();
    let rows: Vec<Vec<u32>> = (0..5).map(|row| prompt(row, 30 + row)).collect();
    let hidden = decoder.detached().unwrap().forward(&rows).unwrap();
    let snapshot = decoder.snapshot(0..150).unwrap();
    let prompts: Vec<&[u32]> = rows.iter().enumerate().map(|(row, ids)| &ids[..4 + 3 * row]).collect();
    let (mut cache, mut last) = snapshot.prefill(&prompts, 40).unwrap();
    for _ in 0..14 {
        let lengths = cache.lengths();
        let places: Vec<(usize, usize)> = lengths.iter().enumerate().map(|(row, n)| (row, n - 1)).collect();
        let want = decoder.hidden_at(&hidden, &places).unwrap();
        assert!(distance(&numbers(&last), &numbers(&want)) < 1e-4, "{}", distance(&numbers(&last), &numbers(&want)));
        let ids: Vec<u32> = lengths.iter().zip(&rows).map(|(n, row)| row[*n]).collect();
        last = snapshot.decode_step(&mut cache, &ids).unwrap();
    }
}

/// Decodes 20 tokens after each prompt, each draw being a fixed function of the logits; all logits as bits.
fn decode(decoder: &Decoder, prompts: &[Vec<u32>], repeats: &[usize]) -> Vec<Vec<u32>> {
    let snapshot = decoder.snapshot(0..150).unwrap();
    let (cache, hidden) = snapshot.prefill(prompts, 60).unwrap();
    let (mut cache, mut hidden) = (cache.expand(repeats).unwrap(), repeat_rows(&hidden, repeats).unwrap());
    let mut bits = vec![Vec::new(); cache.rows()];
    for _ in 0..20 {
        let logits = snapshot.logits(&hidden).unwrap();
        for (row, bits) in logits.to_vec2::<f32>().unwrap().iter().zip(&mut bits) {
            bits.extend(row.iter().map(|x| x.to_bits()));
        }
        let ids = logits.argmax(1).unwrap().to_vec1::<u32>().unwrap();
        hidden = snapshot.decode_step(&mut cache, &ids).unwrap();
    }
    bits
}

#[test]
fn a_row_has_the_same_bits_alone_and_in_any_company() {
    let decoder = tiny();
    let prompts: Vec<Vec<u32>> = (0..37).map(|row| prompt(row, 1 + row % 11)).collect();
    let together = decode(&decoder, &prompts, &[1; 37]);
    for row in [0, 7, 8, 20, 36] {
        let alone = decode(&decoder, &prompts[row..=row], &[1]);
        assert_eq!(alone[0], together[row], "row {row}");
    }
    let group = decode(&decoder, &prompts[3..5], &[16, 3]);
    assert!(group[..16].iter().all(|row| *row == together[3]) && group[16..].iter().all(|row| *row == together[4]));
}

#[test]
fn threads_do_not_show() {
    let decoder = tiny();
    let prompts: Vec<Vec<u32>> = (0..20).map(|row| prompt(row, 1 + row % 7)).collect();
    let run = |threads: usize| {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
            let hidden = decoder.forward(&prompts).unwrap();
            let places: Vec<(usize, usize)> = (0..20).map(|row| (row, 0)).collect();
            let at = decoder.hidden_at(&hidden, &places).unwrap();
            let (log_probs, _) = decoder.log_probs_of(&at, &[9; 20], 5..150, 1.0).unwrap();
            let grads = log_probs.sum_all().unwrap().backward().unwrap();
            let grads: Vec<Vec<f32>> =
                decoder.params().iter().map(|(_, var)| numbers(grads.get(var).unwrap())).collect();
            (decode(&decoder, &prompts, &[2; 20]), numbers(&log_probs), grads)
        })
    };
    assert!(run(1) == run(4));
}

#[test]
fn a_frozen_copy_stays_and_a_detached_view_follows() {
    let decoder = tiny();
    let (frozen, detached) = (decoder.frozen().unwrap(), decoder.detached().unwrap());
    let hidden = |decoder: &Decoder| numbers(&decoder.forward(&[vec![1, 2, 3]]).unwrap());
    let before = hidden(&decoder);
    let var = decoder.params().get("model.layers.0.mlp.up_proj.weight").unwrap().clone();
    var.set(&(var.as_tensor() * 2.0).unwrap()).unwrap();
    let after = hidden(&decoder);
    assert!(distance(&before, &after) > 1e-3);
    assert_eq!(hidden(&frozen), before);
    assert_eq!(hidden(&detached), after);
    assert!(frozen.params().is_empty() && detached.params().is_empty());
    let loss = detached.forward(&[vec![1]]).unwrap().sum_all().unwrap();
    assert!(loss.backward().unwrap().get(var.as_tensor()).is_none());
}

#[test]
fn padding_and_neighbours_change_nothing() {
    let decoder = tiny();
    let rows = [prompt(1, 3), prompt(2, 80), prompt(3, 1)];
    let together = decoder.forward(&rows).unwrap();
    for (index, row) in rows.iter().enumerate() {
        let alone = decoder.forward(std::slice::from_ref(row)).unwrap();
        let got = together.get(index).unwrap().narrow(0, 0, row.len()).unwrap();
        assert!(distance(&numbers(&got), &numbers(&alone)) < 1e-5);
    }
}

#[test]
fn initial_weights_are_a_function_of_the_seed() {
    let config = DecoderConfig { vocab_size: 50, num_hidden_layers: 1, ..DecoderConfig::default() };
    let draw = |seed| Decoder::init(config.clone(), Seed::new(seed)).unwrap().tensors();
    let (one, same, other) = (draw(1), draw(1), draw(2));
    let name = "model.layers.0.mlp.down_proj.weight";
    assert_eq!(numbers(&one[name]), numbers(&same[name]));
    assert_ne!(numbers(&one[name]), numbers(&other[name]));
    let values = numbers(&one[name]);
    let spread = (values.iter().map(|x| x * x).sum::<f32>() / values.len() as f32).sqrt();
    assert!((spread - 0.02).abs() < 5e-4, "{spread}");
}

#[test]
fn weights_survive_a_file() {
    let decoder = tiny();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    safetensors_file::write(&path, &decoder.tensors(), safetensors_file::Precision::F32).unwrap();
    std::fs::write(folder.path().join("config.json"), serde_json::to_string(decoder.config()).unwrap()).unwrap();
    let back = Decoder::load(folder.path(), &Device::Cpu, false).unwrap();
    let hidden = |decoder: &Decoder| numbers(&decoder.forward(&[vec![1, 2, 3]]).unwrap());
    assert_eq!(hidden(&back), hidden(&decoder));
}

#[test]
fn weights_that_do_not_fit_are_named() {
    let decoder = tiny();
    let error = |change: &dyn Fn(&mut BTreeMap<String, Tensor>)| {
        let mut tensors = decoder.tensors();
        change(&mut tensors);
        Decoder::from_tensors(decoder.config().clone(), tensors, false).unwrap_err().to_string()
    };
    let wrong = Tensor::new(&[f32::NAN; 128], &Device::Cpu).unwrap();
    assert_eq!(
        error(&|tensors| drop(tensors.remove("model.norm.weight"))),
        "weights lack tensor `model.norm.weight` of shape [128]; give it"
    );
    assert_eq!(
        error(&|tensors| drop(tensors.insert("model.embed_tokens.weight".into(), wrong.clone()))),
        "tensor `model.embed_tokens.weight` has shape [128]; the config expects [150, 128]"
    );
    assert!(
        error(&|tensors| drop(tensors.insert("model.norm.weight".into(), wrong.clone())))
            .contains("tensor `model.norm.weight` holds NaN")
    );
    assert!(
        error(&|tensors| drop(tensors.insert("model.norm.bias".into(), wrong.clone())))
            .contains("weights hold tensor `model.norm.bias` of shape [128], which the config does not know")
    );
    assert!(
        error(&|tensors| drop(tensors.insert("lm_head.weight".into(), wrong.clone())))
            .contains("differs from the embedding")
    );
    let mut copied = decoder.tensors();
    copied.insert("lm_head.weight".into(), copied["model.embed_tokens.weight"].clone());
    Decoder::from_tensors(decoder.config().clone(), copied, false).unwrap();
}

#[test]
fn rows_that_cannot_be_read_are_errors() {
    let decoder = tiny();
    let none: [Vec<u32>; 0] = [];
    let error = |rows: &[Vec<u32>]| decoder.forward(rows).unwrap_err().to_string();
    assert!(error(&none).contains("no rows"));
    assert_eq!(error(&[vec![1], vec![]]), "row 1 has 0 tokens; the decoder takes 1 to 512 (max_position_embeddings)");
    assert!(error(&[vec![1; 513]]).contains("row 0 has 513 tokens"));
    assert_eq!(error(&[vec![150]]), "row 0 holds token 150; the vocabulary has 150 tokens");
    let hidden = decoder.forward(&[vec![1, 2]]).unwrap();
    assert!(decoder.hidden_at(&hidden, &[(0, 2)]).is_err());
    let snapshot = decoder.snapshot(100..150).unwrap();
    assert!(decoder.snapshot(100..151).is_err());
    assert!(snapshot.prefill(&[vec![1, 2]], 1).unwrap_err().to_string().contains("capacity is 1"));
    let (mut cache, hidden) = snapshot.prefill(&[vec![1, 2]], 3).unwrap();
    assert!(snapshot.decode_step(&mut cache, &[1, 2]).is_err());
    assert!(cache.expand(&[1, 2]).is_err() && cache.expand(&[0]).is_err());
    assert!(snapshot.logits(&hidden.narrow(1, 0, 5).unwrap()).is_err());
    snapshot.decode_step(&mut cache, &[5]).unwrap();
    let full = snapshot.decode_step(&mut cache, &[5]).unwrap_err().to_string();
    assert_eq!(full, "row 0 of the cache has room for 0 more tokens, not for 1; prefill with a greater capacity");
}
