//! A language model of fresh weights learns to say what it is asked for, three times, and to stop.
//!
//! ```text
//! cargo run --release --example grpo_text -- 1   # the seed, 0 where none is given
//! ```

#![expect(clippy::print_stdout, reason = "an example speaks to a person")]

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use grpo::{
    BoxError, GroupSampler, GroupSize, Policy, Prompt, Request, Reward, RewardSet, RunFolder, Seed, TrainConfig,
    Trainer,
};
use grpo_policies::decoder::{Decoder, DecoderConfig};
use grpo_policies::text_lm::{TextLaw, TextLm, Tokenizer};

const WORDS: [&str; 7] = ["say", "red", "green", "blue", "circle", "square", "star"];

/// 1 for the word that was asked for three times and nothing else; less the fewer of them and the more of others.
struct Echo;

impl Reward<String> for Echo {
    fn name(&self) -> &str {
        "echo"
    }
    fn score(&self, prompt: &Prompt, text: &String) -> Result<f32, BoxError> {
        let asked: String = prompt.column("word")?;
        let words: Vec<&str> = text.split_whitespace().collect();
        let n_right = words.iter().filter(|word| **word == asked).count();
        Ok(n_right.min(3) as f32 / words.len().max(3) as f32)
    }
}

fn show(policy: &TextLm, prompts: &[Prompt]) -> Result<()> {
    for prompt in prompts {
        let drawn = policy.sample(&[Request { prompt, seed: Seed::new(7) }]).map_err(anyhow::Error::from_boxed)?;
        drawn.iter().for_each(|drawn| println!("{} {}", prompt.text, drawn.sample));
    }
    Ok(())
}

fn main() -> Result<()> {
    let seed = std::env::args().nth(1).map_or(Ok(0), |seed| seed.parse()).context("the seed is a number")?;
    let mut config = TrainConfig { seed, n_steps: 300, ..Default::default() };
    (config.rollout.prompts_per_step, config.rollout.group_size) = (6, GroupSize::new(16)?);
    (config.optim.lr, config.optim.n_warmup) = (5e-3, 5);
    config.objective.kl_weight = 0.0;

    let tokenizer = Tokenizer::of_words(WORDS, &["<end>"])?;
    let end = tokenizer.id_of("<end>").into_iter().collect();
    let sizes = DecoderConfig { hidden_size: 32, intermediate_size: 48, ..DecoderConfig::default() };
    let sizes = DecoderConfig { vocab_size: tokenizer.n_ids(), num_hidden_layers: 2, ..sizes };
    let decoder = Decoder::init(sizes, Seed::new(seed).named("weights"))?;
    let law = TextLaw { max_new_tokens: 6, ..TextLaw::default() };
    let policy = TextLm::new(decoder, Arc::new(tokenizer), end)?.with_law(law)?;

    let prompt = |word: &&str| Prompt::new(format!("say {word}")).with("word", *word);
    let prompts: Vec<Prompt> = WORDS[1..].iter().map(prompt).collect();
    show(&policy, &prompts)?;

    let rewards = RewardSet::new().with(Echo, 1.0)?;
    let rollout = GroupSampler::new(rewards, config.rollout.group_size, config.rollout.rows_per_call);
    let rollout = rollout.on_failed(config.rollout.failed_scores);
    let run = RunFolder::fresh(Path::new("runs"), "grpo_text", seed)?;
    let trainer = Trainer::new(config, policy, None, Box::new(rollout), prompts.clone())?;
    let mut trainer = trainer.record_in(&run, &config.to_toml()?)?;
    trainer.run()?;
    show(trainer.policy(), &prompts)?;
    run.draw_pictures(&["reward", "completions/clipped_ratio", "entropy", "completions/mean_length"])?;
    println!("curves and samples: {}", run.path().display());
    Ok(())
}
