//! A whole GRPO step of a text model beside TRL's GRPOTrainer: sampling, reward, reference, update.
//!
//! `cargo bench -p grpo-experiments --bench trl -- PYTHON [--log]`; PYTHON is what benches/peers/make.sh made, and `--log`
//! writes the table into LOG.md. Both sides load the same folder, weights and tokenizer, and the same prompts of 32 words;
//! for 4 prompts groups of 8 are drawn, up to 64 tokens at temperature 1, with a frozen reference, a KL weight of 0.04 and
//! one update. TRL runs without gradient checkpointing, logging and saving.
//!
//! Samples are each side's own. An end is drawn now and then, so tokens are counted, and the ratio is that of seconds a
//! token, the median over steps side by side. Our lap is `Trainer::step`, TRL's is from its callbacks' `on_step_begin` to
//! `on_step_end`.

#![expect(clippy::print_stdout, reason = "a bench speaks to a person")]

#[path = "peer/mod.rs"]
#[expect(dead_code, reason = "shapes and floors are for other benches")]
mod peer;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use candle_core::Device;
use grpo::observe::StepReport;
use grpo::{BoxError, GroupSampler, GroupSize, Observer, Prompt, RewardSet, Seed, TrainConfig, Trainer, reward_fn};
use grpo_policies::decoder::{Decoder, DecoderConfig};
use grpo_policies::safetensors_file::Precision;
use grpo_policies::text_lm::{TextLaw, TextLm, Tokenizer};
use serde::{Deserialize, Serialize};

use peer::contender::{Contender, End, Lap, peaks, serve};
use peer::report::Table;
use peer::{THREADS, median, race, ratio, seconds, timed};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const WARM_UP: usize = 2;
const ROUNDS: usize = 6;
const VOCABULARY: usize = 8192;
const PROMPT_WORDS: usize = 32;
/// More than the steps of a race need, so that no side begins its data anew.
const N_PROMPTS: usize = 256;
const COLUMNS: [&str; 7] =
    ["case", "ours", "TRL", "tokens: ours, TRL", "ratio a token", "peak memory: ours, TRL", "TRL's over ours"];

/// What both sides are told of a step, in sizes.json.
#[derive(Serialize, Deserialize)]
struct Sizes {
    prompts_per_step: usize,
    group_size: usize,
    max_new_tokens: usize,
    kl_weight: f64,
    lr: f64,
}

const SIZES: Sizes = Sizes { prompts_per_step: 4, group_size: 8, max_new_tokens: 64, kl_weight: 0.04, lr: 1e-6 };

fn main() -> Result<()> {
    grpo_policies::keep_freed_memory();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).filter(|word| !word.starts_with("--")).collect();
    match words[..] {
        ["worker", folder] => work(Path::new(folder)),
        [python] => {
            let table = compare(python)?;
            println!("\n{table}");
            match arguments.iter().any(|argument| argument == "--log") {
                true => table.log("a step of GRPO beside TRL's GRPOTrainer", &about()),
                false => Ok(()),
            }
        }
        _ => bail!("give PYTHON, the interpreter that benches/peers/make.sh made; the file's head says more"),
    }
}

fn about() -> String {
    format!(
        "`cargo bench -p grpo-experiments --bench trl`, {THREADS} threads, medians of {ROUNDS} steps in turns behind \
         {WARM_UP}; the bench's head says what is run and what the ratio is."
    )
}

fn compare(python: &str) -> Result<Table> {
    let folder = tempfile::tempdir()?;
    write_folder(folder.path())?;
    let path = folder.path().to_str().context("the temporary folder's name is not text")?.to_string();
    let mut contenders = vec![
        Contender::start_worker(std::slice::from_ref(&path))?,
        Contender::start_peer(python, "trl_worker.py", &[path, THREADS.to_string()])?,
    ];
    // Each race begins with a round that is not counted, the one of the laps as well.
    for _ in 1..WARM_UP {
        race(&mut contenders, 0)?;
    }
    let laps = race(&mut contenders, ROUNDS)?;
    let ends = contenders.into_iter().map(Contender::end).collect::<Result<Vec<End>>>()?;
    let (ours, trl) = (&laps[0], &laps[1]);
    for (name, laps) in [("ours", ours), ("TRL", trl)] {
        let of = |what: usize| laps.iter().map(|lap| format!("{:.4}", lap.value[what])).collect::<Vec<_>>().join(", ");
        println!("{name}: tokens {}; mean rewards {}", of(0).replace(".0000", ""), of(1));
        let most = (SIZES.prompts_per_step * SIZES.group_size * SIZES.max_new_tokens) as f64;
        let full = laps.iter().all(|lap| lap.value[0] > 0.9 * most && lap.value[0] <= most);
        ensure!(full, "{name} drew other numbers of tokens than nearly {most} a step");
    }
    Ok(table(ours, trl, &ends))
}

/// One row: whole steps, and the ratio of what a token took.
fn table(ours: &[Lap], trl: &[Lap], ends: &[End]) -> Table {
    let tokens = |laps: &[Lap]| median(laps.iter().map(|lap| lap.value[0]));
    let a_token = |laps: &[Lap]| -> Vec<Lap> {
        laps.iter().map(|lap| Lap { seconds: lap.seconds / lap.value[0], value: Vec::new() }).collect()
    };
    let [peaks, lower] = peaks(&ends[0], &ends[1]);
    let mut table = Table::new(&COLUMNS);
    table.push(vec![
        "a step of GRPO".into(),
        format!("{:.3} s", seconds(ours)),
        format!("{:.3} s", seconds(trl)),
        format!("{:.0}, {:.0}", tokens(ours), tokens(trl)),
        format!("{:.2}", ratio(&a_token(ours), &a_token(trl))),
        peaks,
        lower,
    ]);
    table
}

/// The model of random weights, a tokenizer of made-up words, the prompts and the sizes.
fn write_folder(folder: &Path) -> Result<()> {
    let config = DecoderConfig {
        vocab_size: VOCABULARY,
        hidden_size: 256,
        intermediate_size: 1024,
        num_hidden_layers: 6,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        max_position_embeddings: 4096,
        rope_theta: 1e6,
        tie_word_embeddings: false,
        ..DecoderConfig::default()
    };
    // With <unk> before them and <end> behind, words fill the vocabulary: whatever is drawn is text.
    let words: Vec<String> = (0..VOCABULARY - 2).map(|word| format!("w{word}")).collect();
    let tokenizer = Tokenizer::of_words(words.iter().map(String::as_str), &["<end>"])?;
    let end = tokenizer.id_of("<end>").context("the tokenizer lacks its end")?;
    ensure!(tokenizer.n_ids() == VOCABULARY, "the tokenizer has {} ids", tokenizer.n_ids());
    let policy = TextLm::new(Decoder::init(config, Seed::new(1))?, Arc::new(tokenizer), vec![end])?;
    policy.save(folder, Precision::F32)?;
    let write = |name: &str, value: serde_json::Value| -> Result<()> {
        Ok(std::fs::write(folder.join(name), serde_json::to_vec(&value)?)?)
    };
    // TRL ends texts where the tokenizer says so, and needs a token to pad with.
    let special = serde_json::json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "pad_token": "<unk>", "unk_token": "<unk>",
    });
    write("tokenizer_config.json", special)?;
    let word = |at: usize| words[(at * 7919 + 13) % words.len()].as_str();
    let prompt =
        |prompt: usize| (0..PROMPT_WORDS).map(|at| word(prompt * PROMPT_WORDS + at)).collect::<Vec<_>>().join(" ");
    write("prompts.json", serde_json::to_value((0..N_PROMPTS).map(prompt).collect::<Vec<_>>())?)?;
    write("sizes.json", serde_json::to_value(SIZES)?)
}

/// What the last step logged and drew.
#[derive(Clone, Default)]
struct Seen(Arc<Mutex<[f64; 3]>>);

impl Seen {
    /// Tokens drawn, mean reward, and the most bytes that the process has held.
    fn last(&self) -> [f64; 3] {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Observer<TextLm> for Seen {
    fn step(&mut self, report: &StepReport<'_, TextLm>) -> Result<(), BoxError> {
        let drawn = report.groups.iter().flat_map(|group| &group.completions);
        let tokens: usize = drawn.map(|completion| completion.trace.ids.len()).sum();
        let metric = |name: &str| report.metrics.get(name).copied().ok_or_else(|| format!("no metric {name}"));
        let last = [tokens as f64, metric("reward")?, 1e9 * metric("memory/peak_gb").unwrap_or(0.0)];
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = last;
        Ok(())
    }
}

/// Our side: a trainer that takes a step a lap.
fn work(folder: &Path) -> Result<()> {
    let read = |name: &str| std::fs::read(folder.join(name)).with_context(|| name.to_string());
    let sizes: Sizes = serde_json::from_slice(&read("sizes.json")?)?;
    let prompts: Vec<String> = serde_json::from_slice(&read("prompts.json")?)?;
    let mut config = TrainConfig { n_steps: 1_000_000, ..TrainConfig::default() };
    config.rollout.prompts_per_step = sizes.prompts_per_step;
    config.rollout.group_size = GroupSize::new(sizes.group_size)?;
    (config.objective.kl_weight, config.optim.lr) = (sizes.kl_weight, sizes.lr);
    let law = TextLaw { max_new_tokens: sizes.max_new_tokens, ..TextLaw::default() };
    let policy = TextLm::load(folder, &Device::Cpu)?.with_law(law)?;
    let reference = policy.frozen()?;
    let sevens = reward_fn("sevens", |_: &Prompt, text: &String| {
        Ok(text.matches('7').count() as f32 / text.chars().count().max(1) as f32)
    });
    let rewards = RewardSet::new().with(sevens, 1.0)?;
    let rollout = GroupSampler::new(rewards, config.rollout.group_size, config.rollout.rows_per_call);
    let prompts = prompts.into_iter().map(Prompt::new).collect();
    let seen = Seen::default();
    let mut trainer = Trainer::new(config, policy, Some(reference), Box::new(rollout), prompts)?.observe(seen.clone());
    let lap = || {
        let ((), seconds) = timed(|| Ok(trainer.step()?))?;
        let [tokens, reward, _] = seen.last();
        Ok(Lap { seconds, value: vec![tokens, reward] })
    };
    // The trainer resets the kernel's mark phase by phase, and keeps the greatest.
    serve(lap, |peak_bytes| End { peak_bytes: peak_bytes.max(seen.last()[2]), notes: BTreeMap::new() })
}
