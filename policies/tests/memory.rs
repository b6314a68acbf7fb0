//! What a training pass holds at its peak, counted by the allocator.

#![expect(clippy::unwrap_used, reason = "a test and its helpers fail by panicking")]

mod counting;

use candle_core::{Device, Tensor};
use counting::counted;
use grpo::{Gradients, Seed};
use grpo_policies::decoder::{Decoder, DecoderConfig, Targets};

/// Forward and backward, and what is left is dropped.
fn pass(decoder: &Decoder, rows: &[Vec<u32>]) {
    let places: Vec<(usize, usize)> =
        rows.iter().enumerate().flat_map(|(row, ids)| (0..ids.len()).map(move |at| (row, at))).collect();
    let n = places.len();
    let ids = (0..n as u32).map(|at| at * 7 % 16_000).collect();
    let targets = Targets { places, ids, slice: 0..decoder.config().vocab_size, temperature: 1.0 };
    let scores = decoder.score(rows, &targets).unwrap();
    if let Some(tape) = scores.tape {
        let ones = Tensor::ones(n, candle_core::DType::F32, &Device::Cpu).unwrap();
        tape.backward(&ones, Some(&ones), &mut Gradients::new()).unwrap();
    }
}

/// One test, since tests that run side by side would be counted together.
#[test]
fn the_peak_is_neither_the_logits_nor_with_layers_made_again_the_activations() {
    let config = DecoderConfig {
        vocab_size: 16_384,
        hidden_size: 32,
        intermediate_size: 64,
        num_hidden_layers: 12,
        max_position_embeddings: 1_024,
        ..DecoderConfig::default()
    };
    let decoder = Decoder::init(config, Seed::new(1)).unwrap();
    let rows: Vec<Vec<u32>> = (0..2).map(|row| (0..700).map(|at| (row * 91 + at * 13) % 16_000).collect()).collect();
    let bytes = |n_numbers: usize| 4 * n_numbers;
    let logits = bytes(1_400 * 16_384);
    let (frozen, again) = (decoder.frozen().unwrap(), decoder.clone().recompute_layers());
    let [kept, made_again, reference] = [&decoder, &again, &frozen].map(|decoder| counted(|| pass(decoder, &rows)).0);
    let gradients = bytes(decoder.n_elements());
    assert!(made_again < gradients + logits / 8, "{made_again} bytes; logits would be {logits}, gradients {gradients}");
    // Of twelve layers' activations, 32 + 64 + 32 + 32 + 128 numbers a token each, eleven's are not kept.
    let layer = bytes(1_400 * (32 + 64 + 32 + 128));
    assert!(made_again + 8 * layer < kept, "{made_again} and {kept} bytes; a layer makes {layer}");
    assert!(reference < kept - gradients, "{reference} bytes of the reference, {kept} of the policy");
}
