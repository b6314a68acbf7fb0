//! SimpleAR as a policy: replay equals sampling, draws know no neighbours, every parameter learns.

#![expect(clippy::unwrap_used, reason = "a test and its helpers fail by panicking")]

use std::sync::Arc;

use candle_core::{Device, Tensor, Var};
use grpo::objective::ReferenceSync;
use grpo::testing::check_policy;
use grpo::{
    Completion, Gradients, GroupSampler, GroupSize, LossGradient, Policy, Prompt, Request, RewardSet, RolloutConfig,
    Scoring, Seed, TrainConfig, Trainer, reward_fn,
};
use grpo_policies::cosmos::{Cosmos, CosmosConfig};
use grpo_policies::decoder::{Decoder, DecoderConfig, ImagePositions, LoraConfig, LoraTarget};
use grpo_policies::safetensors_file::Precision;
use grpo_policies::simplear::{Law, ScoredAs, SimpleAr, Stage, TextTokenizer, Vocabulary};
use image::RgbImage;

const WORDS: [&str; 6] = ["a", "photo", "of", "red", "blue", "star"];

fn small(levels: &[u32]) -> SimpleAr {
    small_with(levels, ImagePositions::Line)
}

fn small_with(levels: &[u32], image_positions: ImagePositions) -> SimpleAr {
    let config =
        CosmosConfig { channels: 8, levels: levels.to_vec(), embedding_dim: levels.len(), ..CosmosConfig::shapes() };
    let cosmos = Cosmos::init(config, Seed::new(1), &Device::Cpu).unwrap();
    let text = TextTokenizer::of_words(WORDS).unwrap();
    let config = DecoderConfig {
        vocab_size: text.n_ids() as usize + cosmos.n_codes() as usize,
        hidden_size: 32,
        intermediate_size: 48,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        max_position_embeddings: 64,
        image_positions,
        ..DecoderConfig::default()
    };
    let mut tensors = Decoder::init(config.clone(), Seed::new(2)).unwrap().tensors();
    // Fresh weights are near uniform; larger ones make laws differ enough to be told apart.
    for tensor in tensors.values_mut().filter(|tensor| tensor.rank() == 2) {
        *tensor = (&*tensor * 8.0).unwrap();
    }
    let decoder = Decoder::from_tensors(config, tensors, true).unwrap();
    SimpleAr::new(decoder, Arc::new(cosmos), Arc::new(text), (3, 4)).unwrap()
}

fn draw(policy: &SimpleAr, prompts: &[&Prompt]) -> Vec<Completion<SimpleAr>> {
    let request = |(row, prompt): (usize, &&'_ Prompt)| (row as u64, (*prompt).clone());
    let owned: Vec<(u64, Prompt)> = prompts.iter().enumerate().map(request).collect();
    let requests: Vec<Request<'_>> =
        owned.iter().map(|(row, prompt)| Request { prompt, seed: Seed::new(7).fold(*row) }).collect();
    policy.sample(&requests).unwrap()
}

fn replay(policy: &SimpleAr, prompts: &[&Prompt], drawn: &[Completion<SimpleAr>]) -> Vec<Vec<f32>> {
    let batch: Vec<_> = prompts.iter().copied().zip(drawn.iter().map(|completion| &completion.trace)).collect();
    policy.log_probs(&batch).unwrap().rows().unwrap()
}

/// The largest difference between sampled and replayed log-probs under a law.
fn difference(law: Law) -> f32 {
    let policy = small(&[5, 5]).with_law(law).unwrap();
    let [long, short] = ["a photo of a red star", "star"].map(Prompt::new);
    let prompts = [&long, &long, &short];
    let drawn = draw(&policy, &prompts);
    let replayed = replay(&policy, &prompts, &drawn);
    let pairs = drawn.iter().zip(&replayed).flat_map(|(drawn, row)| drawn.log_probs.iter().zip(row));
    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn the_policy_holds_to_its_contract_under_every_law() {
    let prompts = ["a photo of a red star", "star", "a blue star"].map(Prompt::new);
    let exact = [0.5, 1.0, 2.0].map(|temperature| Law { temperature, ..Law::default() });
    let prefixed = Law { prefix: "a photo of ".into(), ..Law::default() };
    let full = Law { vocabulary: Vocabulary::Full, temperature: 1.5, ..Law::default() };
    for law in exact.into_iter().chain([prefixed, full]) {
        let report = check_policy(&small(&[5, 5]).with_law(law.clone()).unwrap(), &prompts).unwrap();
        assert!(report.replay_difference < Some(1e-4), "{law:?}: {report:?}");
    }
    check_policy(&small(&[5, 5]).recompute_layers(), &prompts).unwrap();
    for shaped in [Law { guidance: 2.0, ..Law::default() }, Law { top_k: Some(3), ..Law::default() }] {
        let law = Law { scored_as: ScoredAs::Conditional, ..shaped };
        let report = check_policy(&small(&[5, 5]).with_law(law).unwrap(), &prompts).unwrap();
        assert_eq!(report.replay_difference, None);
    }
}

#[test]
fn a_shaped_law_says_that_it_is_scored_otherwise() {
    let shaped = [
        Law { guidance: 3.0, ..Law::default() },
        Law { top_k: Some(3), ..Law::default() },
        Law { top_p: 0.5, ..Law::default() },
        Law { min_p: 0.5, ..Law::default() },
    ];
    for law in shaped {
        let law = Law { scored_as: ScoredAs::Conditional, ..law };
        assert_eq!(small(&[5, 5]).with_law(law.clone()).unwrap().scoring(), Scoring::Conditional);
        let got = difference(law.clone());
        assert!(got > 1e-2, "{law:?}: the difference that is to be logged is only {got}");
    }
    assert_eq!(small(&[5, 5]).scoring(), Scoring::Exact);
}

/// Over all ids, some that are drawn are no codes: they are code 0 in the picture and themselves in replay.
#[test]
fn the_full_vocabulary_lets_text_ids_through_and_scores_them() {
    let law = Law { vocabulary: Vocabulary::Full, ..Law::default() };
    let policy = small(&[5, 5]).with_law(law.clone()).unwrap();
    let prompt = Prompt::new("a red star");
    let drawn = draw(&policy, &[&prompt; 8]);
    let n_strays: usize = drawn.iter().map(|completion| completion.trace.strays.len()).sum();
    assert!(n_strays > 0 && n_strays < 8 * 12, "{n_strays} of 96 ids are text");
    for completion in &drawn {
        for &(position, id) in &completion.trace.strays {
            assert_eq!(completion.trace.codes[position as usize], 0);
            assert!(id < 14, "{id} is a code");
        }
    }
    assert!(difference(law) < 1e-4);
    let mut wrong = drawn[0].trace.clone();
    wrong.strays = vec![(0, 14)];
    let error = policy.log_probs(&[(&prompt, &wrong)]).err().unwrap().to_string();
    assert!(error.contains("stray id 14 at position 0"), "{error}");
    let visual = small(&[5, 5]);
    let other = draw(&visual, &[&prompt]).remove(0).trace;
    let error = visual.log_probs(&[(&prompt, &other), (&prompt, &drawn[0].trace)]).err().unwrap().to_string();
    assert!(error.contains("replay them apart"), "{error}");
}

/// Positions by line and column: sampling equals replay, references keep them, a folder keeps them, and the width of the
/// grid matters.
#[test]
fn two_dimensional_positions_hold_to_the_contract() {
    let prompts = ["a photo of a red star", "star", "a blue star"].map(Prompt::new);
    let policy = small_with(&[5, 5], ImagePositions::Grid);
    assert!(check_policy(&policy, &prompts).unwrap().replay_difference < Some(1e-4));
    let faster = small_with(&[5, 5], ImagePositions::Grid).with_window(5).unwrap();
    assert!(check_policy(&faster, &prompts).unwrap().replay_difference < Some(1e-4));

    let drawn = draw(&policy, &[&prompts[0]]);
    let of = |policy: &SimpleAr| replay(policy, &[&prompts[0]], &drawn);
    let folder = tempfile::tempdir().unwrap();
    policy.save(folder.path(), Precision::F32).unwrap();
    let loaded = SimpleAr::load(folder.path(), Some((24, 32)), &Device::Cpu).unwrap();
    for other in [policy.frozen().unwrap(), policy.copy().unwrap(), loaded] {
        assert_eq!(of(&other), of(&policy));
    }
    let lora = LoraConfig { rank: 2, alpha: 4.0, targets: [LoraTarget::Query].into() };
    let adapted = small_with(&[5, 5], ImagePositions::Grid).with_lora(lora, Seed::new(4)).unwrap();
    assert!(check_policy(&adapted, &prompts).unwrap().replay_difference < Some(1e-4));
    for other in [adapted.frozen().unwrap(), adapted.copy().unwrap(), adapted.detached().unwrap()] {
        assert_eq!(of(&other), of(&policy), "adapters that are zero change nothing");
    }
    let line = of(&small(&[5, 5]));
    assert_eq!(of(&small_with(&[5, 5], ImagePositions::Grid).with_image_positions(ImagePositions::Line)), line);
    let wider = SimpleAr::load(folder.path(), Some((32, 24)), &Device::Cpu).unwrap();
    let near = |a: &[Vec<f32>], b: &[Vec<f32>], at: usize| (a[0][at] - b[0][at]).abs() < 1e-4;
    // The first line of the image stands at s, s + 1, ... by column but at s by line, so all but its first token differ.
    assert!(near(&line, &of(&policy), 0) && !near(&line, &of(&policy), 3));
    assert!(near(&of(&wider), &of(&policy), 2) && !near(&of(&wider), &of(&policy), 5));
}

#[test]
fn greedy_draws_are_all_the_likeliest() {
    let policy = small(&[5, 5]).with_law(Law { greedy: true, ..Law::default() }).unwrap();
    let prompt = Prompt::new("a red star");
    let drawn = draw(&policy, &[&prompt; 3]);
    assert!(drawn.iter().all(|other| other.trace.codes == drawn[0].trace.codes));
    assert!(drawn[0].log_probs.iter().all(|log_prob| *log_prob == 0.0));
    // The conditional law, cut to its best code, is the greedy one.
    let best = small(&[5, 5]).with_law(Law { top_k: Some(1), ..Law::default() }).unwrap();
    assert_eq!(draw(&best, &[&prompt])[0].trace.codes, drawn[0].trace.codes);
}

#[test]
fn draws_know_neither_neighbours_nor_batch() {
    for guidance in [1.0, 2.0] {
        let law = Law { guidance, scored_as: ScoredAs::Conditional, ..Law::default() };
        let policy = small(&[5, 5]).with_law(law).unwrap();
        let [red, blue] = ["a red star", "a photo of a blue star"].map(Prompt::new);
        let all = draw(&policy, &[&red, &blue, &red, &red]);
        let fewer = draw(&policy, &[&red, &blue]);
        for (a, b) in all.iter().zip(&fewer) {
            assert_eq!(a.trace.codes, b.trace.codes);
            assert_eq!(a.log_probs, b.log_probs);
            assert_eq!(a.sample, b.sample);
        }
        assert_ne!(all[0].trace.codes, all[2].trace.codes, "other seeds are other draws");
    }
}

#[test]
fn every_parameter_gets_a_gradient_and_the_reference_none() {
    let policy = small(&[5, 5]);
    let prompt = Prompt::new("a red star");
    let drawn = draw(&policy, &[&prompt]);
    let log_probs = policy.log_probs(&[(&prompt, &drawn[0].trace)]).unwrap();
    let mut gradients = Gradients::new();
    let weights = Tensor::arange(0f32, 12.0, &Device::Cpu).unwrap().reshape((1, 12)).unwrap();
    policy.backward(&log_probs, &LossGradient::new(weights), &mut gradients).unwrap();
    for (name, _) in policy.params().iter() {
        let gradient = gradients.get(name).unwrap_or_else(|| panic!("{name} has no gradient"));
        let size = gradient.abs().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(size > 0.0 && size.is_finite(), "{name}: {size}");
    }
    assert!(policy.frozen().unwrap().params().is_empty());
}

/// The bonus raises the entropy, and a reference that is moved half-way each step stays close by.
#[test]
fn an_entropy_bonus_and_a_moving_reference_reach_every_weight() {
    let policy = small(&[5, 5]);
    let start = policy.copy().unwrap();
    let reference = policy.copy().unwrap();
    let flat = reward_fn("flat", |_: &Prompt, _: &RgbImage| Ok(0.0));
    let rollout = GroupSampler::new(RewardSet::new().with(flat, 1.0).unwrap(), GroupSize::new(2).unwrap(), 8);
    let mut config = TrainConfig { n_steps: 2, ..TrainConfig::default() };
    (config.rollout.prompts_per_step, config.rollout.group_size) = (2, GroupSize::new(2).unwrap());
    config.optim.lr = 1e-2;
    config.objective.entropy_weight = 1.0;
    config.objective.reference_sync = Some(ReferenceSync { every: 2, share: 1.0 });
    let prompts = vec![Prompt::new("a red star"), Prompt::new("star")];
    let frozen = policy.frozen().unwrap();
    let refused = Trainer::new(config, policy.copy().unwrap(), Some(frozen), Box::new(rollout), prompts.clone());
    assert!(refused.err().unwrap().to_string().contains("give a trainable copy"));

    let flat = reward_fn("flat", |_: &Prompt, _: &RgbImage| Ok(0.0));
    let rollout = GroupSampler::new(RewardSet::new().with(flat, 1.0).unwrap(), GroupSize::new(2).unwrap(), 8);
    let moved = reference.params();
    let mut trainer = Trainer::new(config, policy, Some(reference), Box::new(rollout), prompts.clone()).unwrap();
    let entropy = |policy: &SimpleAr| {
        let drawn = draw(policy, &[&prompts[0]]);
        let log_probs = policy.log_probs(&[(&prompts[0], &drawn[0].trace)]).unwrap();
        log_probs.entropy().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap()
    };
    let before = entropy(&start);
    trainer.run().unwrap();
    let after = entropy(trainer.policy());
    assert!(after > before, "{after} is not above {before}");
    let values = |var: &candle_core::Var| var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    for (name, var) in trainer.policy().params().iter() {
        assert_eq!(values(var), values(moved.get(name).unwrap()), "{name} of the reference");
    }
    let changed = start.params().iter().filter(|(name, var)| values(var) != values(moved.get(name).unwrap())).count();
    assert!(changed > 0, "a copy does not follow the policy");
}

#[test]
fn neither_parts_computed_at_once_nor_recomputed_layers_change_a_bit() {
    let trained = |parts_at_once: usize, recompute: bool| {
        let policy = small(&[5, 5]);
        let policy = if recompute { policy.recompute_layers() } else { policy };
        let reference = policy.frozen().unwrap();
        let red = reward_fn("red", |_: &Prompt, image: &RgbImage| Ok(image.pixels().map(|p| f32::from(p[0])).sum()));
        let rollout = GroupSampler::new(RewardSet::new().with(red, 1.0).unwrap(), GroupSize::new(4).unwrap(), 8);
        let mut config = TrainConfig { n_steps: 2, ..TrainConfig::default() };
        config.rollout = RolloutConfig {
            prompts_per_step: 2,
            group_size: GroupSize::new(4).unwrap(),
            rows_per_backward: 3,
            parts_at_once,
            ..config.rollout
        };
        config.optim.lr = 1e-2;
        config.objective.entropy_weight = 0.1;
        let prompts = ["a red star", "a photo of a blue star"].map(Prompt::new).to_vec();
        let mut trainer = Trainer::new(config, policy, Some(reference), Box::new(rollout), prompts).unwrap();
        trainer.run().unwrap();
        let bits = |var: &Var| var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        trainer.policy().params().iter().map(|(name, var)| (name.to_string(), bits(var))).collect::<Vec<_>>()
    };
    let plain = trained(1, false);
    for (parts_at_once, recompute) in [(3, false), (1, true), (3, true)] {
        assert_eq!(trained(parts_at_once, recompute), plain, "{parts_at_once} at once, recomputed: {recompute}");
    }
}

#[test]
fn training_adapters_moves_them_alone_and_the_reference_is_the_base() {
    let lora = LoraConfig { rank: 2, alpha: 4.0, targets: LoraTarget::ALL.into() };
    let policy = small(&[5, 5]).recompute_layers().with_lora(lora, Seed::new(5)).unwrap();
    let prompts = ["a red star", "star"].map(Prompt::new);
    let report = check_policy(&policy, &prompts).unwrap();
    assert_eq!(report.n_params, 2 * 2 * 7);

    let values = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let base: Vec<Vec<f32>> = small(&[5, 5]).decoder().tensors().values().map(values).collect();
    let before: Vec<Vec<f32>> = policy.params().iter().map(|(_, var)| values(var)).collect();
    let drawn = draw(&policy, &[&prompts[0]]);
    let untrained = replay(&small(&[5, 5]), &[&prompts[0]], &drawn);
    let reference = policy.frozen().unwrap();
    let red = reward_fn("red", |_: &Prompt, image: &RgbImage| Ok(image.pixels().map(|p| f32::from(p[0])).sum()));
    let rollout = GroupSampler::new(RewardSet::new().with(red, 1.0).unwrap(), GroupSize::new(4).unwrap(), 8);
    let mut config = TrainConfig { n_steps: 3, ..TrainConfig::default() };
    (config.rollout.prompts_per_step, config.rollout.group_size) = (2, GroupSize::new(4).unwrap());
    config.optim.lr = 1e-2;
    config.objective.kl_weight = 0.1;
    let mut trainer = Trainer::new(config, policy, Some(reference), Box::new(rollout), prompts.to_vec()).unwrap();
    trainer.run().unwrap();

    let trained = trainer.policy();
    for ((name, var), before) in trained.params().iter().zip(&before) {
        assert!(name.contains(".lora_") && values(var) != *before, "{name} has not moved");
    }
    assert_eq!(trained.decoder().tensors().values().map(values).collect::<Vec<_>>(), base);
    assert_eq!(replay(&trained.frozen().unwrap(), &[&prompts[0]], &drawn), untrained);
    assert_ne!(replay(trained, &[&prompts[0]], &drawn), untrained);

    let folder = tempfile::tempdir().unwrap();
    trained.save_adapter(folder.path()).unwrap();
    let loaded = small(&[5, 5]).load_adapter(folder.path()).unwrap();
    assert_eq!(replay(&loaded, &[&prompts[0]], &drawn), replay(trained, &[&prompts[0]], &drawn));
    trained.save(folder.path(), Precision::F32).unwrap();
    let merged = SimpleAr::load(folder.path(), Some((24, 32)), &Device::Cpu).unwrap();
    let (got, want) = (replay(&merged, &[&prompts[0]], &drawn), replay(trained, &[&prompts[0]], &drawn));
    assert!(got[0].iter().zip(&want[0]).all(|(got, want)| (got - want).abs() < 1e-4), "{got:?} {want:?}");
}

#[test]
fn a_reference_stays_when_the_policy_moves() {
    let policy = small(&[5, 5]);
    let reference = policy.frozen().unwrap();
    let prompt = Prompt::new("a red star");
    let drawn = draw(&policy, &[&prompt]);
    let before = replay(&reference, &[&prompt], &drawn);
    for (_, var) in policy.params().iter() {
        var.set(&(var.as_tensor() * 1.5).unwrap()).unwrap();
    }
    assert_eq!(before, replay(&reference, &[&prompt], &drawn));
    assert_ne!(before, replay(&policy, &[&prompt], &drawn));
}

#[test]
fn a_saved_checkpoint_samples_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let policy = small(&[5, 5]);
    policy.save(folder.path(), Precision::F32).unwrap();
    let loaded = SimpleAr::load(folder.path(), Some((24, 32)), &Device::Cpu).unwrap();
    let prompt = Prompt::new("a photo of a blue star");
    let (a, b) = (draw(&policy, &[&prompt]), draw(&loaded, &[&prompt]));
    assert_eq!(a[0].trace.codes, b[0].trace.codes);
    assert_eq!(a[0].sample, b[0].sample);
    // The folder knows the size, unless it was made elsewhere.
    assert_eq!(SimpleAr::load(folder.path(), None, &Device::Cpu).unwrap().grid(), (3, 4));
    let path = folder.path().join("config.json");
    let json = std::fs::read_to_string(&path).unwrap().replace("image_grid", "other_grid");
    std::fs::write(&path, json).unwrap();
    let error = SimpleAr::load(folder.path(), None, &Device::Cpu).err().unwrap().to_string();
    assert!(error.contains("no image_grid") && error.contains("--size 512"), "{error}");
}

#[test]
fn the_embedded_stages_write_with_the_shapes_tokenizer() {
    for stage in [Stage::Pretrained, Stage::Sft] {
        let policy = SimpleAr::shapes(stage, &Device::Cpu).unwrap();
        assert_eq!(policy.cosmos().config(), &CosmosConfig::shapes());
    }
}

#[test]
fn parts_that_do_not_belong_together_are_refused() {
    let policy = small(&[5, 5]);
    let text = Arc::new(TextTokenizer::of_words(["star"]).unwrap());
    let config = CosmosConfig { channels: 8, levels: vec![5, 5], embedding_dim: 2, ..CosmosConfig::shapes() };
    let cosmos = Arc::new(Cosmos::init(config, Seed::new(1), &Device::Cpu).unwrap());
    let error = SimpleAr::new(policy.decoder().clone(), cosmos, text, (3, 4)).err().unwrap().to_string();
    assert!(
        error.starts_with("the decoder's vocabulary has 39 ids; the tokenizer's 9 and the codebook's 25 make 34"),
        "{error}"
    );
}

#[test]
fn traces_that_do_not_fit_are_refused() {
    let policy = small(&[5, 5]);
    let prompt = Prompt::new("a red star");
    let good = draw(&policy, &[&prompt]).remove(0).trace;
    let error = |codes: Vec<u32>| {
        let trace = grpo_policies::simplear::ImageTrace { codes, ..good.clone() };
        policy.log_probs(&[(&prompt, &trace)]).err().unwrap().to_string()
    };
    assert!(error(vec![0; 5]).contains("a trace has 5 codes; the grid of 3 x 4 needs 12"));
    assert!(error(vec![25; 12]).contains("a trace holds code 25; the codebook has 25"));
}
