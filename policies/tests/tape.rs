//! The way back by hand against candle's graph through the same operations, and against itself with layers made again.

#![expect(clippy::unwrap_used, reason = "a test and its helpers fail by panicking")]

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use grpo::{Gradients, Seed};
use grpo_policies::decoder::{Decoder, DecoderConfig, LoraConfig, LoraTarget, Targets};
use rayon::prelude::*;

fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn decoder(tied: bool) -> Decoder {
    let config = DecoderConfig {
        vocab_size: 90,
        hidden_size: 32,
        intermediate_size: 56,
        num_hidden_layers: 3,
        max_position_embeddings: 64,
        tie_word_embeddings: tied,
        ..DecoderConfig::default()
    };
    let mut tensors = Decoder::init(config.clone(), Seed::new(5)).unwrap().tensors();
    // Fresh weights are so small that every layer is nearly the identity.
    for tensor in tensors.values_mut().filter(|tensor| tensor.rank() == 2) {
        *tensor = (&*tensor * 6.0).unwrap();
    }
    Decoder::from_tensors(config, tensors, true).unwrap()
}

/// Rows of four lengths and targets after some of their tokens, different for each `batch`.
fn batch(batch: u32) -> (Vec<Vec<u32>>, Targets) {
    let row = |row: u32| (0..3 + 5 * row).map(|at| (batch * 13 + row * 31 + at * 17 + at * at) % 90).collect();
    let rows: Vec<Vec<u32>> = (0..4).map(row).collect();
    let places: Vec<(usize, usize)> =
        rows.iter().enumerate().flat_map(|(row, ids)| (row % 2..ids.len()).map(move |at| (row, at))).collect();
    let ids = (0..places.len() as u32).map(|at| 20 + (batch + 7 * at) % 60).collect();
    (rows, Targets { places, ids, slice: 20..80, temperature: 0.7 })
}

fn weights(n: usize, seed: u64) -> Tensor {
    let mut draws = Seed::new(seed).draws();
    Tensor::from_vec((0..n).map(|_| draws.normal() as f32).collect::<Vec<_>>(), n, &Device::Cpu).unwrap()
}

/// Log-probabilities, entropies and gradients by name, with or without a gradient by the entropies.
fn pass(decoder: &Decoder, number: u32, bonus: bool) -> (Vec<f32>, Vec<f32>, BTreeMap<String, Vec<f32>>) {
    let (rows, targets) = batch(number);
    let scores = decoder.score(&rows, &targets).unwrap();
    let n = targets.ids.len();
    let (by_log_probs, by_entropies) = (weights(n, 1), bonus.then(|| weights(n, 2)));
    let mut gradients = Gradients::new();
    match &scores.tape {
        Some(tape) => tape.backward(&by_log_probs, by_entropies.as_ref(), &mut gradients).unwrap(),
        None => {
            let mut loss = (&scores.log_probs * &by_log_probs).unwrap().sum_all().unwrap();
            if let Some(by_entropies) = by_entropies {
                loss = (loss + (&scores.entropies * by_entropies).unwrap().sum_all().unwrap()).unwrap();
            }
            gradients.add_backward(&loss, &decoder.params()).unwrap();
        }
    }
    let by_name = gradients.iter().map(|(name, gradient)| (name.to_owned(), numbers(gradient))).collect();
    (numbers(&scores.log_probs), numbers(&scores.entropies), by_name)
}

fn check_same(plain: &Decoder) {
    let recomputed = plain.clone().recompute_layers();
    for bonus in [false, true] {
        let (want, got) = (pass(plain, 1, bonus), pass(&recomputed, 1, bonus));
        let (rows, targets) = batch(1);
        assert!(recomputed.score(&rows, &targets).unwrap().tape.is_some());
        assert!(got.0 == want.0 && got.1 == want.1, "the numbers themselves differ");
        let names: Vec<String> = plain.params().iter().map(|(name, _)| name.to_owned()).collect();
        assert_eq!(want.2.keys().cloned().collect::<Vec<_>>(), names);
        assert_eq!(got.2.keys().cloned().collect::<Vec<_>>(), names);
        for (name, want) in &want.2 {
            assert!(want.iter().any(|x| *x != 0.0), "{name}: a gradient of zero proves nothing");
            assert!(got.2[name] == *want, "{name} differs, bonus {bonus}");
        }
    }
}

#[test]
fn layers_made_again_give_the_same_gradients_to_the_bit() {
    for tied in [true, false] {
        check_same(&decoder(tied));
    }
}

/// As [`pass`], through candle's graph.
fn pass_of_graph(decoder: &Decoder, number: u32) -> (Vec<f32>, Vec<f32>, BTreeMap<String, Vec<f32>>) {
    let (rows, Targets { places, ids, slice, temperature }) = batch(number);
    let hidden = decoder.hidden_at(&decoder.forward(&rows).unwrap(), &places).unwrap();
    let (log_probs, entropies) = decoder.log_probs_of(&hidden, &ids, slice, temperature).unwrap();
    let n = ids.len();
    let parts = [&log_probs * weights(n, 1), &entropies * weights(n, 2)].map(|part| part.unwrap().sum_all().unwrap());
    let mut gradients = Gradients::new();
    gradients.add_backward(&(&parts[0] + &parts[1]).unwrap(), &decoder.params()).unwrap();
    let by_name = gradients.iter().map(|(name, gradient)| (name.to_owned(), numbers(gradient))).collect();
    (numbers(&log_probs), numbers(&entropies), by_name)
}

#[test]
fn numbers_and_gradients_are_those_of_the_graph() {
    let close = |a: &[f32], b: &[f32]| {
        let scale = b.iter().fold(1e-3f32, |most, x| most.max(x.abs()));
        a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 2e-5 * scale)
    };
    for tied in [true, false] {
        let decoder = decoder(tied);
        let (got, want) = (pass(&decoder, 1, true), pass_of_graph(&decoder, 1));
        assert!(close(&got.0, &want.0) && close(&got.1, &want.1));
        assert!(got.2.keys().eq(want.2.keys()));
        for (name, want) in &want.2 {
            assert!(close(&got.2[name], want), "{name} differs");
        }
    }
}

#[test]
fn adapters_get_the_same_gradients_and_the_base_none() {
    use LoraTarget::{Down, Key, Query, Up, Value};
    for targets in [LoraTarget::ALL.into(), [Query, Value].into(), [Key, Up, Down].into()] {
        let config = LoraConfig { rank: 3, alpha: 5.0, targets };
        let adapted = decoder(true).with_lora(config, Seed::new(6)).unwrap();
        for (name, var) in adapted.params().iter().filter(|(name, _)| name.contains("lora_B")) {
            let values = weights(var.elem_count(), Seed::new(7).named(name).draws().bits());
            var.set(&values.reshape(var.shape()).unwrap()).unwrap();
        }
        check_same(&adapted);
    }
}

#[test]
fn several_batches_at_once_are_each_as_alone() {
    let decoder = decoder(true).recompute_layers();
    let alone: Vec<_> = (0..6).map(|number| pass(&decoder, number, true)).collect();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(4).build().unwrap();
    let together: Vec<_> = pool.install(|| (0..6).into_par_iter().map(|number| pass(&decoder, number, true)).collect());
    assert!(alone == together);
}

#[test]
fn a_tape_keeps_no_graph_and_a_frozen_decoder_no_tape() {
    let (rows, targets) = batch(0);
    let decoder = decoder(true);
    for decoder in [decoder.clone(), decoder.clone().recompute_layers()] {
        let scores = decoder.score(&rows, &targets).unwrap();
        assert!(scores.tape.is_some() && !scores.log_probs.track_op() && !scores.entropies.track_op());
    }
    let frozen = decoder.frozen().unwrap().recompute_layers().score(&rows, &targets).unwrap();
    assert!(frozen.tape.is_none() && !frozen.log_probs.track_op());
    let copy = decoder.recompute_layers().copy().unwrap();
    assert!(copy.score(&rows, &targets).unwrap().tape.is_some(), "a copy recomputes too");
}
