//! The kernels on a card against the CPU's operations: scores, gradients, updates, draws.
//!
//! They run on a GPU or on the simulator of tests/simulator, as src/docs/cuda.md shows; without either they fail. In f32 both sides differ by the order of sums alone, in bf16 by its three digits.

#![cfg(feature = "cuda")]
#![expect(clippy::unwrap_used, reason = "a test and its helpers fail by panicking")]

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::{Device, Tensor};
use grpo::{AdamW, Gradients, OptimConfig, Policy, Prompt, Request, Seed};
use grpo_policies::cosmos::{Cosmos, CosmosConfig};
use grpo_policies::cuda;
use grpo_policies::decoder::{Compute, Decoder, DecoderConfig, ImagePositions, Targets};
use grpo_policies::simplear::{Drawn, Law, ScoredAs, SimpleAr, Stage, TextTokenizer, Vocabulary};

/// One test at a time: a stream that is captured takes the work of others into its graph.
fn card() -> (Device, MutexGuard<'static, ()>) {
    static TURN: Mutex<()> = Mutex::new(());
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    (cuda::device(0).unwrap(), turn)
}

fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor.to_device(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// The largest difference, over the largest number that is expected.
fn off(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let largest = want.iter().fold(1e-6f32, |most, x| most.max(x.abs()));
    got.iter().zip(want).map(|(a, b)| if (a - b).is_nan() { f32::NAN } else { (a - b).abs() }).fold(0.0, f32::max)
        / largest
}

#[derive(Clone, Copy)]
struct Case {
    head_dim: usize,
    heads: usize,
    kv_heads: usize,
    tied: bool,
    plane: bool,
}

const CASES: [Case; 4] = [
    Case { head_dim: 32, heads: 4, kv_heads: 2, tied: true, plane: false },
    Case { head_dim: 64, heads: 3, kv_heads: 1, tied: false, plane: true },
    Case { head_dim: 128, heads: 2, kv_heads: 2, tied: false, plane: false },
    Case { head_dim: 32, heads: 14, kv_heads: 1, tied: false, plane: true },
];

fn decoder(case: Case) -> Decoder {
    let config = DecoderConfig {
        vocab_size: 90,
        hidden_size: case.head_dim * case.heads,
        intermediate_size: 56,
        num_hidden_layers: 2,
        num_attention_heads: case.heads,
        num_key_value_heads: case.kv_heads,
        max_position_embeddings: 200,
        tie_word_embeddings: case.tied,
        image_positions: if case.plane { ImagePositions::Grid } else { ImagePositions::Line },
        ..DecoderConfig::default()
    };
    let mut tensors = Decoder::init(config.clone(), Seed::new(5)).unwrap().tensors();
    // Fresh weights are so small that every layer is nearly the identity, and fresh biases and norms are all equal.
    for (name, tensor) in &mut tensors {
        let mut draws = Seed::new(9).named(name).draws();
        let spread: Vec<f32> = (0..tensor.elem_count()).map(|_| 0.2 * draws.normal() as f32).collect();
        let spread = Tensor::from_vec(spread, tensor.shape(), &Device::Cpu).unwrap();
        *tensor = if tensor.rank() == 2 { (&*tensor * 4.0).unwrap() } else { (&*tensor + spread).unwrap() };
    }
    Decoder::from_tensors(config, tensors, true).unwrap().with_image_grid((5, 7), 11)
}

/// Rows that end within a tile of attention, at its end and behind it, and targets after some of their tokens.
fn batch(lengths: &[usize]) -> (Vec<Vec<u32>>, Targets) {
    let row = |row: usize, length: usize| (0..length).map(|at| ((row * 31 + at * 17 + at * at) % 90) as u32).collect();
    let rows: Vec<Vec<u32>> = lengths.iter().enumerate().map(|(at, length)| row(at, *length)).collect();
    let places: Vec<(usize, usize)> =
        rows.iter().enumerate().flat_map(|(row, ids)| (row % 2..ids.len()).map(move |at| (row, at))).collect();
    let ids = (0..places.len() as u32).map(|at| 20 + 7 * at % 60).collect();
    (rows, Targets { places, ids, slice: 20..80, temperature: 0.7 })
}

fn weights(n: usize, seed: u64, device: &Device) -> Tensor {
    let mut draws = Seed::new(seed).draws();
    let values: Vec<f32> = (0..n).map(|_| draws.normal() as f32).collect();
    Tensor::from_vec(values, n, &Device::Cpu).unwrap().to_device(device).unwrap()
}

/// Log-probabilities, entropies and gradients by name.
fn pass(decoder: &Decoder, lengths: &[usize], bonus: bool) -> (Vec<f32>, Vec<f32>, BTreeMap<String, Vec<f32>>) {
    let (rows, targets) = batch(lengths);
    let scores = decoder.score(&rows, &targets).unwrap();
    let n = targets.ids.len();
    let by_log_probs = weights(n, 1, decoder.device());
    let by_entropies = bonus.then(|| weights(n, 2, decoder.device()));
    let mut gradients = Gradients::new();
    let tape = scores.tape.as_ref().unwrap();
    tape.backward(&by_log_probs, by_entropies.as_ref(), &mut gradients).unwrap();
    let by_name = gradients.iter().map(|(name, gradient)| (name.to_owned(), numbers(gradient))).collect();
    (numbers(&scores.log_probs), numbers(&scores.entropies), by_name)
}

fn check(case: Case, lengths: &[usize], compute: Compute, tolerance: [f32; 2]) {
    let (device, _turn) = card();
    let host = decoder(case);
    let on_card = host.on_device(&device).unwrap().with_compute(compute);
    for bonus in [false, true] {
        let (got, want) = (pass(&on_card, lengths, bonus), pass(&host, lengths, bonus));
        let (log_probs, entropies) = (off(&got.0, &want.0), off(&got.1, &want.1));
        assert!(log_probs <= tolerance[0] && entropies <= tolerance[0], "{compute:?}: {log_probs}, {entropies}");
        assert!(got.2.keys().eq(want.2.keys()));
        for (name, want) in &want.2 {
            assert!(want.iter().any(|x| *x != 0.0), "{name}: a gradient of zero proves nothing");
            let off = off(&got.2[name], want);
            assert!(off <= tolerance[1], "{name}, {compute:?}, head_dim {}, bonus {bonus}: {off}", case.head_dim);
        }
        let again = pass(&on_card.clone().recompute_layers(), lengths, bonus);
        assert!(again == got, "layers made again differ");
    }
}

#[test]
fn scores_and_gradients_are_the_hosts() {
    check(CASES[0], &[3, 64, 17, 130], Compute::F32, [2e-5, 1e-4]);
    for case in &CASES[1..] {
        check(*case, &[2, 65], Compute::F32, [2e-5, 1e-4]);
    }
}

#[test]
fn in_bf16_they_differ_by_its_digits() {
    for case in CASES {
        // Keys' biases move every score of a query alike but for the turning: their gradients are small differences.
        check(case, &[5, 40], Compute::Bf16, [3e-2, 0.12]);
    }
}

#[test]
fn a_frozen_decoder_keeps_nothing_and_scores_the_same() {
    let (device, _turn) = card();
    let on_card = decoder(CASES[0]).on_device(&device).unwrap();
    let (rows, targets) = batch(&[3, 20]);
    let (trained, frozen) = (on_card.score(&rows, &targets).unwrap(), on_card.frozen().unwrap());
    let scores = frozen.score(&rows, &targets).unwrap();
    assert!(scores.tape.is_none() && numbers(&scores.log_probs) == numbers(&trained.log_probs));
}

#[test]
fn what_cannot_be_meant_is_an_error_on_a_card_too() {
    let (device, _turn) = card();
    let on_card = decoder(CASES[0]).on_device(&device).unwrap();
    let error = |change: &dyn Fn(&mut Vec<Vec<u32>>, &mut Targets)| {
        let (mut rows, mut targets) = batch(&[3, 20]);
        change(&mut rows, &mut targets);
        on_card.score(&rows, &targets).unwrap_err().to_string()
    };
    assert!(error(&|rows, _| rows[0][0] = 90).contains("token 90"));
    assert!(error(&|_, targets| targets.places[0] = (0, 3)).contains("place (0, 3)"));
    assert!(error(&|_, targets| targets.ids[0] = 80).contains("target 80"));
    assert!(error(&|_, targets| targets.temperature = 0.0).contains("temperature is 0"));
}

#[test]
fn an_update_is_the_hosts() {
    let (device, _turn) = card();
    let host = decoder(CASES[1]);
    let on_card = host.on_device(&device).unwrap().with_compute(Compute::F32);
    let config = OptimConfig { lr: 1e-2, weight_decay: 0.1, max_grad_norm: 0.5, ..OptimConfig::default() };
    let policy = SimpleAr::shapes(Stage::Sft, &Device::Cpu).unwrap();
    let [(host_norm, host), (card_norm, on_card)] = [host, on_card].map(|decoder| {
        let mut optimiser = AdamW::new(decoder.params(), config).unwrap().on_device(policy.device_optimiser());
        let mut norms = Vec::new();
        for step in 0..3 {
            let (rows, targets) = batch(&[4, 9 + step]);
            let scores = decoder.score(&rows, &targets).unwrap();
            let mut gradients = Gradients::new();
            // Twice, so that gradients are added to gradients.
            for seed in [1, 2] {
                let by_log_probs = weights(targets.ids.len(), seed, decoder.device());
                scores.tape.as_ref().unwrap().backward(&by_log_probs, None, &mut gradients).unwrap();
            }
            norms.push(optimiser.step(&gradients, config.lr).unwrap());
        }
        (norms, decoder)
    });
    for (host, card) in host_norm.iter().zip(&card_norm) {
        assert!(*host > config.max_grad_norm && (host - card).abs() < 1e-4 * host, "{host} and {card}");
    }
    for ((name, host), (_, card)) in host.params().iter().zip(on_card.params().iter()) {
        let off = off(&numbers(card), &numbers(host));
        assert!(off < 2e-3, "{name}: {off}");
    }
}

/// What requests for three prompts, of two rows, one and two, give under a law.
fn drawn(policy: &SimpleAr, law: &Law, rows: &[usize]) -> Vec<Drawn> {
    let prompts = ["a photo of a red star", "a photo of two blue circles", "a photo of a star"].map(Prompt::new);
    let owners = [0, 0, 1, 2, 2];
    let request = |row: &usize| Request { prompt: &prompts[owners[*row]], seed: Seed::new(7).fold(*row as u64) };
    let requests: Vec<Request<'_>> = rows.iter().map(request).collect();
    policy.detached().unwrap().with_law(law.clone()).unwrap().draw(&requests).unwrap()
}

fn laws() -> Vec<Law> {
    let shaped = Law { scored_as: ScoredAs::Conditional, ..Law::default() };
    vec![
        Law::default(),
        Law { temperature: 0.7, vocabulary: Vocabulary::Full, ..Law::default() },
        Law { guidance: 3.0, ..shaped.clone() },
        Law { guidance: 2.0, top_k: Some(20), top_p: 0.9, min_p: 0.01, temperature: 1.3, ..shaped.clone() },
        Law { top_p: 0.6, ..shaped.clone() },
        Law { top_k: Some(1), ..shaped.clone() },
        Law { greedy: true, guidance: 4.0, ..shaped },
    ]
}

#[test]
fn draws_are_the_hosts() {
    let (device, _turn) = card();
    let host = SimpleAr::shapes(Stage::Sft, &Device::Cpu).unwrap();
    let on_card = host.with_decoder_on(&device).unwrap().with_compute(Compute::F32);
    for law in laws() {
        let (got, want) = (drawn(&on_card, &law, &[0, 1, 2, 3, 4]), drawn(&host, &law, &[0, 1, 2, 3, 4]));
        for (row, (got, want)) in got.iter().zip(&want).enumerate() {
            assert_eq!(got.trace.codes, want.trace.codes, "row {row} under {law:?}");
            assert!(off(&got.log_probs, &want.log_probs) < 1e-4, "row {row} under {law:?}");
        }
    }
}

#[test]
fn draws_know_no_neighbours() {
    let (device, _turn) = card();
    // In bf16 a product's algorithm may change with its rows, and with it a draw that lies at a border.
    let policy = SimpleAr::shapes(Stage::Sft, &Device::Cpu).unwrap();
    let policy = policy.with_decoder_on(&device).unwrap().with_compute(Compute::F32);
    let together = drawn(&policy, &laws()[2], &[0, 1, 2, 3, 4]);
    let apart = [[0, 1], [2, 3]].iter().flat_map(|rows| drawn(&policy, &laws()[2], rows)).collect::<Vec<_>>();
    for (together, apart) in together.iter().zip(&apart) {
        assert_eq!(together.trace.codes, apart.trace.codes);
    }
}

/// A policy whose prompts are so long that a row's keys are read in parts, with heads of this many numbers.
fn long_rows(head_dim: usize, heads: usize, kv_heads: usize) -> SimpleAr {
    let config = CosmosConfig { channels: 8, levels: vec![5, 5], embedding_dim: 2, ..CosmosConfig::shapes() };
    let cosmos = Cosmos::init(config, Seed::new(1), &Device::Cpu).unwrap();
    let text = TextTokenizer::of_words(["a", "red", "star"]).unwrap();
    let config = DecoderConfig {
        vocab_size: text.n_ids() as usize + cosmos.n_codes() as usize,
        hidden_size: head_dim * heads,
        intermediate_size: 48,
        num_hidden_layers: 1,
        num_attention_heads: heads,
        num_key_value_heads: kv_heads,
        max_position_embeddings: 320,
        ..DecoderConfig::default()
    };
    let mut tensors = Decoder::init(config.clone(), Seed::new(2)).unwrap().tensors();
    for tensor in tensors.values_mut().filter(|tensor| tensor.rank() == 2) {
        *tensor = (&*tensor * 6.0).unwrap();
    }
    let decoder = Decoder::from_tensors(config, tensors, true).unwrap();
    SimpleAr::new(decoder, cosmos.into(), text.into(), (2, 3)).unwrap()
}

#[test]
fn rows_longer_than_a_part_are_drawn_as_the_host_draws_them() {
    let (device, _turn) = card();
    let prompt = Prompt::new("a red star ".repeat(85));
    // The 0.5B shape's heads, and the widest, for which a block of f32 has half of the warps.
    for (head_dim, heads, kv_heads) in [(64, 14, 2), (128, 2, 1)] {
        let host = long_rows(head_dim, heads, kv_heads);
        let draw = |policy: &SimpleAr| {
            let requests: Vec<Request<'_>> =
                (0..2).map(|row| Request { prompt: &prompt, seed: Seed::new(3).fold(row) }).collect();
            policy.draw(&requests).unwrap()
        };
        let on_card = host.with_decoder_on(&device).unwrap();
        let (got, want) = (draw(&on_card.detached().unwrap().with_compute(Compute::F32)), draw(&host));
        for (got, want) in got.iter().zip(&want) {
            assert_eq!(got.trace.codes, want.trace.codes, "head_dim {head_dim}");
            assert!(off(&got.log_probs, &want.log_probs) < 1e-4, "head_dim {head_dim}");
        }
        let drawn = draw(&on_card);
        let batch: Vec<_> = drawn.iter().map(|drawn| (&prompt, &drawn.trace)).collect();
        let replayed = numbers(host.log_probs(&batch).unwrap().values());
        let sampled: Vec<f32> = drawn.iter().flat_map(|drawn| drawn.log_probs.clone()).collect();
        assert!(off(&sampled, &replayed) < 3e-2, "head_dim {head_dim}: {}", off(&sampled, &replayed));
    }
}

#[test]
fn logits_that_are_no_numbers_are_an_error_on_a_card_too() {
    let (device, _turn) = card();
    let policy = long_rows(32, 2, 1).with_decoder_on(&device).unwrap();
    let norm = policy.params().get("model.norm.weight").unwrap().clone();
    norm.set(&Tensor::from_vec(vec![f32::NAN; 64], 64, &Device::Cpu).unwrap().to_device(&device).unwrap()).unwrap();
    let prompt = Prompt::new("a star");
    let error = policy.draw(&[Request { prompt: &prompt, seed: Seed::new(1) }]).unwrap_err().to_string();
    assert!(error.contains("logits are not finite"), "{error}");
}

#[test]
fn replay_equals_sampling_within_what_is_rounded() {
    let (device, _turn) = card();
    let policy = SimpleAr::shapes(Stage::Sft, &Device::Cpu).unwrap().with_decoder_on(&device).unwrap();
    let prompt = Prompt::new("a photo of a red star");
    for (compute, mean) in [(Compute::F32, 1e-5), (Compute::Bf16, 2e-2)] {
        let policy = policy.detached().unwrap().with_compute(compute);
        let requests: Vec<Request<'_>> =
            (0..3).map(|row| Request { prompt: &prompt, seed: Seed::new(3).fold(row) }).collect();
        let drawn = policy.draw(&requests).unwrap();
        let batch: Vec<_> = drawn.iter().map(|drawn| (&prompt, &drawn.trace)).collect();
        let replayed = numbers(policy.log_probs(&batch).unwrap().values());
        let sampled: Vec<f32> = drawn.iter().flat_map(|drawn| drawn.log_probs.clone()).collect();
        let differences: Vec<f32> = sampled.iter().zip(&replayed).map(|(a, b)| (a - b).abs()).collect();
        assert!(differences.iter().all(|x| *x <= policy.replay_tolerance()), "{compute:?}: {differences:?}");
        let sum: f32 = differences.iter().sum();
        assert!(sum <= mean * differences.len() as f32, "{compute:?}: {sum}");
    }
}
