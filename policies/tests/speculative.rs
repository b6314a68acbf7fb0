//! Speculative Jacobi decoding draws from the law of plain decoding, in fewer passes.

#![expect(clippy::unwrap_used, reason = "a test and its helpers fail by panicking")]

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::Device;
use grpo::testing::check_policy;
use grpo::{Prompt, Request, Seed};
use grpo_policies::cosmos::{Cosmos, CosmosConfig};
use grpo_policies::decoder::{Decoder, DecoderConfig};
use grpo_policies::simplear::{Drawn, Law, SimpleAr, Stage, TextTokenizer};

const N_SEQUENCES: usize = 10_000;

/// Four codes on a grid of 2 x 2: 256 images, which can be counted.
fn toy() -> SimpleAr {
    let config = CosmosConfig { channels: 8, levels: vec![2, 2], embedding_dim: 2, ..CosmosConfig::shapes() };
    let cosmos = Cosmos::init(config, Seed::new(1), &Device::Cpu).unwrap();
    let text = TextTokenizer::of_words(["a", "red", "star"]).unwrap();
    let config = DecoderConfig {
        vocab_size: text.n_ids() as usize + cosmos.n_codes() as usize,
        hidden_size: 16,
        intermediate_size: 24,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        max_position_embeddings: 32,
        ..DecoderConfig::default()
    };
    let mut tensors = Decoder::init(config.clone(), Seed::new(3)).unwrap().tensors();
    // Laws that differ strongly from place to place and with what was drawn before.
    for tensor in tensors.values_mut().filter(|tensor| tensor.rank() == 2) {
        *tensor = (&*tensor * 20.0).unwrap();
    }
    let decoder = Decoder::from_tensors(config, tensors, true).unwrap();
    SimpleAr::new(decoder, Arc::new(cosmos), Arc::new(text), (2, 2)).unwrap()
}

fn draw(policy: &SimpleAr, n: usize, seed: u64) -> Vec<Drawn> {
    let prompt = Prompt::new("a red star");
    let requests: Vec<Request<'_>> =
        (0..n).map(|row| Request { prompt: &prompt, seed: Seed::new(seed).fold(row as u64) }).collect();
    policy.draw(&requests).unwrap()
}

/// Every image's probability, by plain draws: the few that forty thousand draws miss weigh next to nothing.
fn probabilities(policy: &SimpleAr) -> BTreeMap<Vec<u32>, f64> {
    let mut of = BTreeMap::new();
    for drawn in draw(policy, 4 * N_SEQUENCES, 100) {
        of.insert(drawn.trace.codes, drawn.log_probs.iter().map(|x| f64::from(*x)).sum::<f64>().exp());
    }
    of
}

/// Pearson's statistic of drawn images against their probabilities, in deviations of its own law: above 4 is no accident.
///
/// Images expected less than five times are counted together.
fn surprise(drawn: &[Drawn], probabilities: &BTreeMap<Vec<u32>, f64>) -> f64 {
    let n = drawn.len() as f64;
    let mut counts: BTreeMap<&[u32], f64> = BTreeMap::new();
    drawn.iter().for_each(|drawn| *counts.entry(&drawn.trace.codes).or_default() += 1.0);
    let (mut statistic, mut bins) = (0.0, 0.0);
    let (mut rare, mut rare_expected) = (n, n);
    for (codes, probability) in probabilities.iter().filter(|(_, probability)| **probability * n >= 5.0) {
        let (got, expected) = (counts.get(codes.as_slice()).copied().unwrap_or(0.0), probability * n);
        statistic += (got - expected).powi(2) / expected;
        bins += 1.0;
        (rare, rare_expected) = (rare - got, rare_expected - expected);
    }
    if rare_expected >= 5.0 {
        statistic += (rare - rare_expected).powi(2) / rare_expected;
        bins += 1.0;
    }
    assert!(bins > 20.0, "{bins} bins say little");
    (statistic - (bins - 1.0)) / (2.0 * (bins - 1.0)).sqrt()
}

#[test]
fn ten_thousand_images_follow_the_plain_law() {
    for (name, law) in [
        ("plain", Law::default()),
        ("guided", Law { guidance: 2.5, negative_prompt: Some("star".into()), ..Law::default() }),
        ("cut", Law { top_k: Some(3), temperature: 1.3, ..Law::default() }),
    ] {
        let policy = toy().with_law(law.clone()).unwrap();
        let probabilities = probabilities(&policy);
        assert!((probabilities.values().sum::<f64>() - 1.0).abs() < 5e-3);
        for window in [2, 3, 4] {
            let drawn = draw(&toy().with_law(law.clone()).unwrap().with_window(window).unwrap(), N_SEQUENCES, 7);
            let got = surprise(&drawn, &probabilities);
            assert!(got < 4.0, "{name}, window {window}: {got}");
            let passes: usize = drawn.iter().map(|drawn| drawn.n_passes).sum();
            assert!(passes < 4 * N_SEQUENCES, "{name}, window {window}: {passes} passes");
            // What is recorded is the plain law's own probability.
            for drawn in &drawn[..50] {
                let sum: f64 = drawn.log_probs.iter().map(|x| f64::from(*x)).sum();
                assert!((sum.exp() - probabilities[&drawn.trace.codes]).abs() < 1e-5);
            }
        }
        // The statistic sees a law that is a little off.
        let other = Law { temperature: law.temperature * 1.1, ..law };
        assert!(surprise(&draw(&toy().with_law(other).unwrap(), N_SEQUENCES, 7), &probabilities) > 8.0, "{name}");
    }
}

#[test]
fn rows_know_no_neighbours_and_the_contract_holds() {
    for guidance in [1.0, 2.0] {
        let law = Law { guidance, scored_as: grpo_policies::simplear::ScoredAs::Conditional, ..Law::default() };
        let policy = toy().with_law(law).unwrap().with_window(3).unwrap();
        let (many, few) = (draw(&policy, 9, 5), draw(&policy, 4, 5));
        for (a, b) in many.iter().zip(&few) {
            assert_eq!((&a.trace.codes, &a.log_probs, a.n_passes), (&b.trace.codes, &b.log_probs, b.n_passes));
        }
    }
    let prompts = ["a red star", "star"].map(Prompt::new);
    let report = check_policy(&toy().with_window(4).unwrap(), &prompts).unwrap();
    assert!(report.replay_difference < Some(1e-4), "{report:?}");
}

#[test]
fn a_window_of_one_is_plain_decoding_and_of_none_a_mistake() {
    let plain = draw(&toy(), 5, 1);
    let one = draw(&toy().with_window(1).unwrap(), 5, 1);
    assert!(plain.iter().zip(&one).all(|(a, b)| a.trace.codes == b.trace.codes && a.n_passes == 4));
    assert!(toy().with_window(0).err().unwrap().to_string().contains("window is 0"));
    let greedy = Law { greedy: true, ..Law::default() };
    let fast = draw(&toy().with_law(greedy.clone()).unwrap().with_window(4).unwrap(), 1, 1);
    assert_eq!(fast[0].trace.codes, draw(&toy().with_law(greedy).unwrap(), 1, 1)[0].trace.codes);
}

#[test]
fn the_miniature_takes_at_most_two_thirds_of_the_passes_at_window_16() {
    let policy = SimpleAr::shapes(Stage::Sft, &Device::Cpu).unwrap();
    let prompts = ["a photo of a red star", "a photo of two blue squares"].map(Prompt::new);
    let requests: Vec<Request<'_>> =
        (0..16u64).map(|row| Request { prompt: &prompts[row as usize % 2], seed: Seed::new(3).fold(row) }).collect();
    let n_tokens = policy.grid().0 * policy.grid().1;
    let drawn = policy.with_window(16).unwrap().draw(&requests).unwrap();
    let mean = drawn.iter().map(|drawn| drawn.n_passes as f64).sum::<f64>() / drawn.len() as f64;
    assert!(mean <= 0.65 * n_tokens as f64, "{mean} passes for {n_tokens} tokens");
}
