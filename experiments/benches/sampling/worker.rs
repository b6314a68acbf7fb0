//! A process that draws tokens, or measures the machine.

use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use candle_core::{Device, Tensor};
use grpo::{Prompt, Request, Seed};
use grpo_policies::cosmos::{Cosmos, CosmosConfig};
use grpo_policies::decoder::{Cache, Decoder, DecoderConfig, Snapshot};
use grpo_policies::simplear::{Law, SPECIAL_TOKENS, SimpleAr, TextTokenizer};

use super::{Case, PROMPT};
use crate::peer::arguments::device;
use crate::peer::contender::Lap;
use crate::peer::{THREADS, machine, shapes, timed};

const GUIDANCE: f32 = 6.0;
/// Tokens of a pass that fills the cache, few enough for threads to share its products.
const RUN: usize = 96;

/// `DEVICE reading`, `DEVICE products` or `DEVICE draw SHAPE TOKENS STEPS BATCH,GUIDED...`.
pub fn run(arguments: &[String]) -> Result<()> {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        [place, "draw", shape, n_tokens, steps, ref cases @ ..] => {
            let (n_tokens, steps) = (n_tokens.parse()?, steps.parse()?);
            let case = |word: &&str| -> Result<Case> {
                let (batch, guided) = word.split_once(',').context("a case is BATCH,GUIDED")?;
                Ok(Case { batch: batch.parse()?, guided: guided.parse()?, n_tokens, steps })
            };
            let cases = cases.iter().map(case).collect::<Result<Vec<_>>>()?;
            draw(&Parts::new(shape, &device(place)?)?, (n_tokens, steps), &cases)
        }
        [place, mode] => match machine::run(mode, &[], &device(place)?, THREADS) {
            Some(done) => done,
            None => bail!("no mode `{mode}`"),
        },
        _ => bail!("worker DEVICE reading|products|draw …"),
    }
}

/// Text ids of a shape's vocabulary; the others are codes.
pub fn text_ids(config: &DecoderConfig) -> usize {
    config.vocab_size - levels(config).iter().product::<u32>() as usize
}

/// Levels of the codebook: 64,000 codes where there is room for them.
fn levels(config: &DecoderConfig) -> Vec<u32> {
    if config.vocab_size > 64_000 { vec![8, 8, 8, 5, 5, 5] } else { vec![8, 8, 8, 15] }
}

/// What policies of any grid and law share.
struct Parts {
    decoder: Decoder,
    cosmos: Arc<Cosmos>,
    text: Arc<TextTokenizer>,
    snapshot: Snapshot,
    /// What all images show.
    caption: String,
}

impl Parts {
    fn new(shape: &str, device: &Device) -> Result<Self> {
        let config = shapes::config(shape)?;
        let (n_text, levels) = (text_ids(&config), levels(&config));
        let fresh = Decoder::init(config.clone(), Seed::new(1))?.tensors().into_iter();
        let tensors = fresh.map(|(name, tensor)| Ok((name, tensor.to_device(device)?))).collect::<Result<_>>()?;
        let decoder = Decoder::from_tensors(config.clone(), tensors, false)?;
        // No picture is decoded: of the visual tokenizer the codebook alone matters.
        let small = CosmosConfig { channels: 8, embedding_dim: levels.len(), levels, ..CosmosConfig::shapes() };
        let cosmos = Arc::new(Cosmos::init(small, Seed::new(2), device)?);
        // One id is of the unknown.
        let words: Vec<String> = (0..n_text - SPECIAL_TOKENS.len() - 1).map(|word| format!("w{word}")).collect();
        let text = Arc::new(TextTokenizer::of_words(words.iter().map(String::as_str))?);
        let snapshot = decoder.snapshot(n_text..config.vocab_size)?;
        // Two tokens stand around the caption.
        let caption = words[..PROMPT - 2].join(" ");
        Ok(Self { decoder, cosmos, text, snapshot, caption })
    }

    /// A policy of this grid; its unconditional branch has a prompt of its own where `negative` is none.
    fn policy(&self, grid: (usize, usize), guided: bool, negative: Option<String>) -> Result<SimpleAr> {
        let policy = SimpleAr::new(self.decoder.clone(), self.cosmos.clone(), self.text.clone(), grid)?;
        let guidance = if guided { GUIDANCE } else { 1.0 };
        Ok(policy.with_law(Law { guidance, negative_prompt: negative, ..Law::default() })?)
    }

    /// The cache of one row, with room for `n_tokens` behind the prompt, and its last hidden state, at each depth.
    fn read(&self, n_tokens: usize, depths: &[usize]) -> Result<Vec<(Cache, Tensor)>> {
        let prompt = self.text.prompt(&self.caption)?;
        ensure!(prompt.len() == PROMPT, "the prompt has {} tokens and not {PROMPT}", prompt.len());
        let (mut cache, mut hidden) = self.snapshot.prefill(&[prompt], PROMPT + n_tokens)?;
        let first = self.snapshot.slice().start;
        let n_codes = self.snapshot.slice().len();
        let mut read = Vec::new();
        for depth in depths {
            while cache.lengths()[0] < *depth {
                let length = cache.lengths()[0];
                let code = |at: usize| (first + (at * 7919 + 13) % n_codes) as u32;
                let run: Vec<u32> = (length..(length + RUN).min(*depth)).map(code).collect();
                hidden = self.snapshot.extend(&mut cache, &[&run])?.narrow(0, run.len() - 1, 1)?;
            }
            read.push((cache.clone(), hidden.clone()));
        }
        Ok(read)
    }

    /// An error unless rows that begin behind the prompt give the codes that images of the same law have.
    fn check(&self) -> Result<()> {
        let (grid, seeds) = ((2, 3), [Seed::new(3), Seed::new(4), Seed::new(5)]);
        let prompt = Prompt::new(self.caption.clone());
        for guided in [false, true] {
            let policy = self.policy(grid, guided, Some(self.caption.clone()))?;
            let requests: Vec<Request<'_>> =
                seeds.iter().map(|seed| Request { prompt: &prompt, seed: *seed }).collect();
            let whole: Vec<_> = policy.draw(&requests)?.into_iter().map(|drawn| drawn.trace.codes).collect();
            let read = self.read(grid.0 * grid.1, &[PROMPT])?;
            let (cache, hidden) = read.first().context("nothing was read")?;
            let parts = policy.midway(&self.snapshot, (cache, hidden), seeds.to_vec())?.draw(grid.0 * grid.1)?;
            ensure!(parts == whole, "codes {parts:?} are drawn and {whole:?} due");
        }
        Ok(())
    }
}

/// Laps of all cases; the values are seconds of a step, of each case at each depth.
fn draw(parts: &Parts, (n_tokens, steps): (usize, usize), cases: &[Case]) -> Result<()> {
    parts.check()?;
    let depths = Case::depths(n_tokens, steps);
    let read = parts.read(n_tokens, &depths)?;
    let side = n_tokens.isqrt();
    let policies = [parts.policy((side, side), false, None)?, parts.policy((side, side), true, None)?];
    machine::serve_laps(|| {
        let mut value = Vec::new();
        for case in cases {
            let seeds: Vec<Seed> = (0..case.batch as u64).map(Seed::new).collect();
            for (cache, hidden) in &read {
                let policy = &policies[usize::from(case.guided)];
                let mut rows = policy.midway(&parts.snapshot, (cache, hidden), seeds.clone())?;
                let (_, first) = timed(|| Ok(rows.draw(1)?))?;
                let (_, all) = timed(|| Ok(rows.draw(1 + steps)?))?;
                value.push((all - first) / steps as f64);
            }
        }
        Ok(Lap { seconds: value.iter().sum(), value })
    })
}
