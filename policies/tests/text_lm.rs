//! The text LM as a policy: transformers' templates, draws and log-probs; draws know no neighbours; it learns.

#![expect(clippy::unwrap_used, reason = "a test and its helpers fail by panicking")]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::Device;
use grpo::testing::check_policy;
use grpo::{
    Completion, GroupSampler, GroupSize, Policy, Prompt, Request, RewardSet, RolloutConfig, Scoring, Seed, TrainConfig,
    Trainer, reward_fn,
};
use grpo_policies::decoder::{Decoder, DecoderConfig};
use grpo_policies::safetensors_file::Precision;
use grpo_policies::text_lm::{ScoredAs, Template, TextLaw, TextLm, Tokenizer};
use serde::Deserialize;

const LETTERS: [&str; 6] = ["a", "b", "c", "d", "e", "f"];

/// A policy over six letters and an end; `spread` scales its fresh weights, whose laws are near uniform.
fn small(spread: f64, max_new_tokens: usize) -> TextLm {
    let tokenizer = Tokenizer::of_words(LETTERS, &["<end>"]).unwrap();
    let config = DecoderConfig {
        vocab_size: tokenizer.n_ids(),
        hidden_size: 32,
        intermediate_size: 48,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        max_position_embeddings: 32,
        ..DecoderConfig::default()
    };
    let mut tensors = Decoder::init(config.clone(), Seed::new(2)).unwrap().tensors();
    for tensor in tensors.values_mut().filter(|tensor| tensor.rank() == 2) {
        *tensor = (&*tensor * spread).unwrap();
    }
    let decoder = Decoder::from_tensors(config, tensors, true).unwrap();
    let end = tokenizer.id_of("<end>").unwrap();
    let law = TextLaw { max_new_tokens, ..TextLaw::default() };
    TextLm::new(decoder, Arc::new(tokenizer), vec![end]).unwrap().with_law(law).unwrap()
}

fn draw(policy: &TextLm, prompts: &[&Prompt]) -> Vec<Completion<TextLm>> {
    let requests: Vec<Request<'_>> = prompts
        .iter()
        .enumerate()
        .map(|(row, prompt)| Request { prompt, seed: Seed::new(7).fold(row as u64) })
        .collect();
    policy.sample(&requests).unwrap()
}

#[derive(Deserialize)]
struct Golden {
    rendered: Vec<Rendered>,
    template: String,
    generated_from: Vec<usize>,
    max_new_tokens: usize,
    greedy: Vec<Vec<u32>>,
    greedy_text: Vec<String>,
    temperature: f32,
    scored: Vec<Scored>,
    eos: Vec<u32>,
}

#[derive(Deserialize)]
struct Rendered {
    system: Option<String>,
    prompt: String,
    text: String,
    ids: Vec<u32>,
}

#[derive(Deserialize)]
struct Scored {
    ids: Vec<u32>,
    log_probs: Vec<f32>,
    entropies: Vec<f32>,
    text: String,
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("golden/text_lm.json")).unwrap()
}

fn golden_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/text_lm")
}

fn golden_policy() -> TextLm {
    TextLm::load(&golden_folder(), &Device::Cpu).unwrap()
}

#[test]
fn chats_are_rendered_and_tokenised_as_by_transformers() {
    let (golden, policy) = (golden(), golden_policy());
    assert_eq!(policy.ends(), golden.eos);
    assert!(golden.rendered.len() >= 14);
    for want in &golden.rendered {
        let plain = policy.template().clone();
        let template = match &want.system {
            Some(system) => plain.with_system(system).unwrap(),
            None => plain,
        };
        let Template::Chat(chat) = &template else { panic!("the folder has a chat template") };
        assert_eq!(chat.source(), golden.template);
        assert_eq!(chat.render(&want.prompt).unwrap(), want.text, "{:?}", want.prompt);
        let ids = golden_policy().with_template(template).prompt_ids(&want.prompt).unwrap();
        assert_eq!(ids, want.ids, "{:?}", want.prompt);
    }
    let error = policy.prompt_ids("forbidden fruit").unwrap_err().to_string();
    assert!(error.starts_with("chat_template.jinja, line 13: invalid operation: forbidden content"), "{error}");
}

#[test]
fn greedy_draws_are_those_of_generate() {
    let golden = golden();
    let law = TextLaw { greedy: true, max_new_tokens: golden.max_new_tokens, ..TextLaw::default() };
    let policy = golden_policy().with_law(law).unwrap();
    let prompts: Vec<Prompt> =
        golden.generated_from.iter().map(|at| Prompt::new(golden.rendered[*at].prompt.as_str())).collect();
    let drawn = draw(&policy, &prompts.iter().collect::<Vec<_>>());
    for ((drawn, ids), text) in drawn.iter().zip(&golden.greedy).zip(&golden.greedy_text) {
        assert_eq!((&drawn.trace.ids, &drawn.sample), (ids, text));
        assert_eq!(drawn.trace.finished(), golden.eos.contains(ids.last().unwrap()));
        assert!(drawn.log_probs.iter().all(|log_prob| *log_prob == 0.0));
    }
    assert_eq!(drawn.iter().filter(|drawn| drawn.trace.finished()).count(), 2);
}

#[test]
fn log_probs_of_given_completions_are_those_of_transformers() {
    let golden = golden();
    let law = TextLaw { temperature: golden.temperature, ..TextLaw::default() };
    let policy = golden_policy().with_law(law).unwrap();
    let prompts: Vec<Prompt> =
        golden.generated_from.iter().map(|at| Prompt::new(golden.rendered[*at].prompt.as_str())).collect();
    let traces: Vec<_> = prompts
        .iter()
        .zip(&golden.scored)
        .map(|(prompt, scored)| policy.trace_of(prompt, scored.ids.clone()).unwrap())
        .collect();
    let batch: Vec<_> = prompts.iter().zip(&traces).collect();
    let log_probs = policy.log_probs(&batch).unwrap();
    let (values, mask) = (log_probs.rows().unwrap(), log_probs.mask().to_vec2::<f32>().unwrap());
    let entropies = log_probs.entropy().unwrap().to_vec2::<f32>().unwrap();
    for (row, scored) in golden.scored.iter().enumerate() {
        let n = scored.ids.len();
        assert_eq!(policy.tokenizer().text(&scored.ids).unwrap(), scored.text);
        assert!(mask[row].iter().enumerate().all(|(at, mask)| (*mask == 1.0) == (at < n)), "{:?}", mask[row]);
        for at in 0..n {
            let (got, want) = (values[row][at], scored.log_probs[at]);
            assert!((got - want).abs() < 1e-4, "row {row}, token {at}: {got} is not {want}");
            let (got, want) = (entropies[row][at], scored.entropies[at]);
            assert!((got - want).abs() < 1e-4, "row {row}, token {at}: entropy {got} is not {want}");
        }
    }
    assert_eq!(golden.scored[1].ids.len(), 1, "one completion is its end alone");
}

#[test]
fn the_policy_holds_to_its_contract_under_every_law() {
    let prompts = ["a b c d", "f", "e e"].map(Prompt::new);
    let plain = *small(8.0, 6).law();
    let exact = [0.5, 1.0, 2.0].map(|temperature| TextLaw { temperature, ..plain });
    for law in exact.into_iter().chain([TextLaw { max_new_tokens: 1, ..plain }]) {
        let report = check_policy(&small(8.0, 6).with_law(law).unwrap(), &prompts).unwrap();
        assert!(report.replay_difference < Some(1e-4), "{law:?}: {report:?}");
    }
    for shaped in [TextLaw { top_k: Some(3), ..plain }, TextLaw { top_p: 0.8, min_p: 0.1, ..plain }] {
        let law = TextLaw { scored_as: ScoredAs::Conditional, ..shaped };
        let policy = small(8.0, 6).with_law(law).unwrap();
        assert_eq!(policy.scoring(), Scoring::Conditional);
        assert_eq!(check_policy(&policy, &prompts).unwrap().replay_difference, None);
    }
}

/// Rows that end leave the cache; those that remain go on as if they were alone.
#[test]
fn draws_know_neither_neighbours_nor_batch() {
    let policy = small(4.0, 12);
    let [long, short] = ["a b c d e f a b", "c"].map(Prompt::new);
    let prompts: Vec<&Prompt> = (0..24).map(|row| if row % 5 < 3 { &long } else { &short }).collect();
    let all = draw(&policy, &prompts);
    let lengths: std::collections::BTreeSet<usize> = all.iter().map(|drawn| drawn.trace.ids.len()).collect();
    assert!(lengths.len() > 4, "rows end at different times: {lengths:?}");
    let n_finished = all.iter().filter(|drawn| drawn.trace.finished()).count();
    assert!(n_finished > 2 && n_finished < 24, "{n_finished} of 24 ended");
    for (row, (prompt, drawn)) in prompts.iter().zip(&all).enumerate() {
        let request = Request { prompt, seed: Seed::new(7).fold(row as u64) };
        let alone = policy.sample(&[request]).unwrap().remove(0);
        assert_eq!(alone.trace, drawn.trace);
        assert_eq!(alone.log_probs, drawn.log_probs, "row {row}");
        assert_eq!(alone.sample, drawn.sample);
        let (last, others) = drawn.trace.ids.split_last().unwrap();
        assert!(others.iter().all(|id| !policy.ends().contains(id)));
        assert_eq!(drawn.trace.finished(), policy.ends().contains(last));
        assert!(drawn.trace.finished() || drawn.trace.ids.len() == 12);
        assert!(!drawn.sample.contains("<end>"));
    }
}

#[test]
fn a_reference_stays_when_the_policy_moves() {
    let policy = small(8.0, 6);
    let (frozen, copy) = (policy.frozen().unwrap(), policy.copy().unwrap());
    let prompt = Prompt::new("a b");
    let trace = draw(&policy, &[&prompt]).remove(0).trace;
    let score = |policy: &TextLm| policy.log_probs(&[(&prompt, &trace)]).unwrap().rows().unwrap();
    let before = score(&policy);
    for (_, var) in policy.params().iter() {
        var.set(&(var.as_tensor() * 1.5).unwrap()).unwrap();
    }
    assert_eq!((&score(&frozen), &score(&copy)), (&before, &before));
    assert_ne!(score(&policy), before);
    assert_eq!((frozen.params().len(), copy.params().len()), (0, policy.params().len()));
}

/// The share of the letter that the prompt begins with, for a text that ends.
fn share_of_the_first_letter(prompt: &Prompt, text: &str) -> f32 {
    let words: Vec<&str> = text.split_whitespace().collect();
    let hits = words.iter().filter(|word| prompt.text.starts_with(**word)).count();
    hits as f32 / words.len().max(4) as f32
}

#[test]
fn the_reward_rises_for_three_seeds() {
    for seed in 0..3 {
        let policy = small(1.0, 5);
        let reward = reward_fn("share", |prompt: &Prompt, text: &String| Ok(share_of_the_first_letter(prompt, text)));
        let mut config = TrainConfig { seed, n_steps: 40, ..TrainConfig::default() };
        config.rollout =
            RolloutConfig { prompts_per_step: 3, group_size: GroupSize::new(8).unwrap(), ..config.rollout };
        config.optim.lr = 1e-2;
        let rewards = RewardSet::new().with(reward, 1.0).unwrap();
        let rollout = GroupSampler::new(rewards, config.rollout.group_size, 64);
        let prompts = ["a", "b c", "c a b"].map(Prompt::new).to_vec();
        let judge = |policy: &TextLm| {
            let requests: Vec<&Prompt> = (0..60).map(|row| &prompts[row % 3]).collect();
            let drawn = draw(policy, &requests);
            let scores =
                drawn.iter().zip(&requests).map(|(drawn, prompt)| share_of_the_first_letter(prompt, &drawn.sample));
            scores.sum::<f32>() / 60.0
        };
        let before = judge(&policy);
        let reference = policy.frozen().unwrap();
        let mut trainer = Trainer::new(config, policy, Some(reference), Box::new(rollout), prompts.clone()).unwrap();
        trainer.run().unwrap();
        let after = judge(trainer.policy());
        assert!(before < 0.3 && after > 0.6, "seed {seed}: {before} before, {after} after");
    }
}

#[test]
fn a_saved_folder_is_the_same_policy() {
    let folder = tempfile::tempdir().unwrap();
    let law = TextLaw { max_new_tokens: 12, ..TextLaw::default() };
    let policy = golden_policy().with_law(law).unwrap();
    policy.save(folder.path(), Precision::F32).unwrap();
    let loaded = TextLm::load(folder.path(), &Device::Cpu).unwrap().with_law(law).unwrap();
    let prompt = Prompt::new("What is 2 + 3?");
    let (a, b) = (draw(&policy, &[&prompt]), draw(&loaded, &[&prompt]));
    assert_eq!((&a[0].trace, &a[0].sample), (&b[0].trace, &b[0].sample));
    assert_eq!(loaded.ends(), policy.ends());
    let config = fs::read_to_string(folder.path().join("tokenizer_config.json")).unwrap();
    assert!(config.contains("\"pad_token\": \"<|endoftext|>\""), "{config}");
}

fn copied(folder: &Path, files: &[(&str, &str)]) {
    for name in
        ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
    {
        fs::copy(golden_folder().join(name), folder.join(name)).unwrap();
    }
    for (name, text) in files {
        fs::write(folder.join(name), text).unwrap();
    }
}

#[test]
fn templates_and_ends_are_found_where_folders_have_them() {
    let rendered = |files: &[(&str, &str)]| {
        let folder = tempfile::tempdir().unwrap();
        copied(folder.path(), files);
        let policy = TextLm::load(folder.path(), &Device::Cpu).unwrap();
        let text = match policy.template() {
            Template::Chat(chat) => chat.render("hi").unwrap(),
            _ => "plain".into(),
        };
        (text, policy.ends().to_vec())
    };
    let config = "tokenizer_config.json";
    assert_eq!(rendered(&[]), ("plain".into(), vec![2, 0]));
    assert_eq!(rendered(&[(config, "{}"), ("generation_config.json", "{}")]).1, [2, 0], "those of config.json");
    assert_eq!(rendered(&[("generation_config.json", r#"{"eos_token_id": 7}"#)]).1, [7]);
    let one = r#"{"chat_template": "{{ messages[0].content }}{{ eos_token }}", "eos_token": {"content": "<e>"}}"#;
    assert_eq!(rendered(&[(config, one)]).0, "hi<e>");
    let several = r#"{"chat_template": [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]}"#;
    assert_eq!(rendered(&[(config, several)]).0, "yes");
    assert_eq!(rendered(&[(config, several), ("chat_template.jinja", "own")]).0, "own");
}

#[test]
fn folders_that_cannot_be_meant_are_refused() {
    let error = |files: &[(&str, &str)]| {
        let folder = tempfile::tempdir().unwrap();
        copied(folder.path(), files);
        TextLm::load(folder.path(), &Device::Cpu).err().unwrap().to_string()
    };
    for (name, text, message) in [
        ("generation_config.json", r#"{"eos_token_id": "x"}"#, "eos_token_id is \"x\"; give the id"),
        ("generation_config.json", r#"{"eos_token_id": 304}"#, "id 304 is to end a text; the vocabulary has 304 ids"),
        ("generation_config.json", r#"{"eos_token_id": []}"#, "no id ends a text"),
        ("generation_config.json", "[]", "give a JSON object"),
        ("tokenizer.json", "{}", "tokenizer.json"),
        ("tokenizer_config.json", r#"{"chat_template": 3}"#, "neither a template nor a list"),
        ("tokenizer_config.json", r#"{"chat_template": [{"name": "rag"}, 7]}"#, "no entry named `default`"),
        ("tokenizer_config.json", r#"{"chat_template": "\n{% if %}"}"#, "tokenizer_config.json, line 2: syntax error"),
        ("chat_template.jinja", "{{", "chat_template.jinja, line 1: syntax error"),
    ] {
        let error = error(&[(name, text)]);
        assert!(error.contains(message), "{error}");
    }
    let error = TextLm::load(Path::new("no_such_folder"), &Device::Cpu).err().unwrap().to_string();
    assert!(error.contains("there is no such folder"), "{error}");
}

#[test]
fn prompts_and_completions_that_do_not_fit_are_refused() {
    let policy = small(1.0, 6);
    let prompt = Prompt::new("a b");
    let sample = |text: &str| {
        let prompt = Prompt::new(text);
        policy.sample(&[Request { prompt: &prompt, seed: Seed::new(0) }]).err().unwrap().to_string()
    };
    assert!(sample("").contains("prompt `` has no token"));
    let long = "a ".repeat(28);
    assert!(sample(&long).contains("a prompt of 28 tokens and max_new_tokens 6 do not fit the decoder's 32 positions"));
    assert!(draw(&policy, &[&Prompt::new("a ".repeat(27))]).len() == 1, "the last token needs no place");
    let end = policy.ends()[0];
    let error = |ids: Vec<u32>| policy.trace_of(&prompt, ids).unwrap_err().to_string();
    assert!(error(vec![]).contains("a completion has no token"));
    assert!(error(vec![1, end, 2]).contains("has 3 tokens, but its token 1 ends it"));
    let trace = policy.trace_of(&prompt, vec![99]).unwrap();
    assert!(policy.log_probs(&[(&prompt, &trace)]).is_err(), "an id behind the vocabulary");
    let hot = small(1.0, 6).with_law(TextLaw { temperature: 2.0, ..TextLaw::default() }).unwrap();
    let (a, b) = (policy.trace_of(&prompt, vec![1]).unwrap(), hot.trace_of(&prompt, vec![1]).unwrap());
    let error = policy.log_probs(&[(&prompt, &a), (&prompt, &b)]).err().unwrap().to_string();
    assert!(error.contains("temperatures 1 and 2 in one batch; replay them apart"), "{error}");
    let few = Arc::new(Tokenizer::of_words(["a"], &[]).unwrap());
    assert!(TextLm::new(policy.decoder().clone(), few, vec![1]).is_ok(), "a padded embedding");
    let many = Arc::new(Tokenizer::of_words(LETTERS, &["<end>", "<more>"]).unwrap());
    let error = TextLm::new(policy.decoder().clone(), many, vec![1]).err().unwrap().to_string();
    assert!(error.contains("the tokenizer has 9 ids, the decoder's vocabulary 8"), "{error}");
}
