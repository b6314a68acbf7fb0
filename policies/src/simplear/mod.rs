//! SimpleAR (Wang et al., 2025, arXiv 2504.11455): a plain decoder that writes an image as discrete tokens.
//!
//! A row is `<|t2i|>` + prefix + caption + `<|soi|>` + `h·w` visual tokens in raster order; visual ids lie behind the
//! text ids; there is no end token, the grid decides the length. Deviations from the published code, each because
//! there it is a fault: sampling is restricted to visual ids; captions reach rewards unmangled; rows are told apart
//! by index and not by text.

mod files;
mod law;
mod stages;
mod text;

use std::ops::Range;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use grpo::{BoxError, Completion, Error, LogProbs, Params, Policy, Prompt, Request, Result, Scoring};
use image::RgbImage;
use rayon::prelude::*;
use serde::Serialize;

pub use files::Stage;
pub use law::{Law, ScoredAs};
pub use stages::{StagePlan, StageStep, TrainingImage, train_stage};
pub use text::{SPECIAL_TOKENS, TextTokenizer};

use crate::cosmos::Cosmos;
use crate::decoder::{Decoder, Snapshot, repeat_rows};
use law::{Draw, draw};

/// Rows and columns of visual tokens.
pub type Grid = (usize, usize);

/// The flagship policy: text in, image out.
pub struct SimpleAr {
    decoder: Decoder,
    cosmos: Arc<Cosmos>,
    text: Arc<TextTokenizer>,
    law: Arc<Law>,
    grid: Grid,
}

/// The visual tokens of an image and the law they were drawn by.
#[derive(Clone, Debug, Serialize)]
pub struct ImageTrace {
    /// Codes in raster order, each below the size of the codebook.
    pub codes: Vec<u32>,
    /// The temperature at which replay scores them.
    pub temperature: f32,
    /// What stood before the caption.
    pub prefix: String,
}

impl SimpleAr {
    /// A policy of its parts; the decoder's vocabulary must be the text's ids and then the codebook.
    pub fn new(decoder: Decoder, cosmos: Arc<Cosmos>, text: Arc<TextTokenizer>, grid: Grid) -> Result<Self> {
        let expected = text.n_ids() as usize + cosmos.n_codes() as usize;
        let got = decoder.config().vocab_size;
        if got != expected {
            return Err(Error::config(format!(
                "the decoder's vocabulary has {got} ids; the tokenizer's {} and the codebook's {} make {expected}: \
                 take decoder, tokenizer and visual tokenizer of one checkpoint",
                text.n_ids(),
                cosmos.n_codes()
            )));
        }
        let longest = decoder.config().max_position_embeddings;
        if grid.0 * grid.1 == 0 || grid.0 * grid.1 >= longest {
            return Err(Error::config(format!(
                "a grid of {} x {} does not fit the decoder's {longest} positions; choose another image size",
                grid.0, grid.1
            )));
        }
        Ok(Self { decoder, cosmos, text, law: Arc::new(Law::default()), grid })
    }

    /// Samples by this law from now on.
    pub fn with_law(mut self, law: Law) -> Result<Self> {
        law.check()?;
        self.law = Arc::new(law);
        Ok(self)
    }

    /// A copy without trainable variables, which later training does not move: the reference of the KL term.
    pub fn frozen(&self) -> Result<Self> {
        Ok(Self { decoder: self.decoder.frozen()?, ..self.shallow() })
    }

    /// A copy with trainable variables of its own: a reference that is moved towards the policy.
    pub fn copy(&self) -> Result<Self> {
        Ok(Self { decoder: self.decoder.copy()?, ..self.shallow() })
    }

    fn shallow(&self) -> Self {
        Self {
            decoder: self.decoder.clone(),
            cosmos: self.cosmos.clone(),
            text: self.text.clone(),
            law: self.law.clone(),
            grid: self.grid,
        }
    }

    /// The law of sampling.
    pub fn law(&self) -> &Law {
        &self.law
    }

    /// Rows and columns of visual tokens.
    pub fn grid(&self) -> Grid {
        self.grid
    }

    /// The decoder.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// The visual tokenizer.
    pub fn cosmos(&self) -> &Cosmos {
        &self.cosmos
    }

    fn n_tokens(&self) -> usize {
        self.grid.0 * self.grid.1
    }

    fn visual_ids(&self) -> Range<usize> {
        self.text.n_ids() as usize..self.decoder.config().vocab_size
    }

    /// The row of ids that stands before the visual tokens of a caption.
    pub fn prompt_ids(&self, caption: &str, prefix: &str) -> Result<Vec<u32>> {
        if prefix.is_empty() { self.text.prompt(caption) } else { self.text.prompt(&format!("{prefix}{caption}")) }
    }

    fn negative_ids(&self) -> Result<Vec<u32>> {
        match &self.law.negative_prompt {
            Some(negative) => self.text.prompt(negative),
            None => Ok(self.text.null_prompt()),
        }
    }

    /// Codes and log-probs of every request, in order.
    fn draw_codes(&self, requests: &[Request<'_>]) -> Result<Vec<Vec<Draw>>> {
        let snapshot = self.decoder.snapshot(self.visual_ids())?;
        let (prompts, repeats) = self.distinct_prompts(requests)?;
        let mut conditional = Branch::read(&snapshot, &prompts, &repeats, self.n_tokens())?;
        let mut unconditional = match self.law.guidance == 1.0 {
            true => None,
            false => Some(Branch::read(&snapshot, &[self.negative_ids()?], &[requests.len()], self.n_tokens())?),
        };
        let mut drawn: Vec<Vec<Draw>> = vec![Vec::with_capacity(self.n_tokens()); requests.len()];
        for position in 0..self.n_tokens() {
            let c = conditional.logits()?;
            let u = unconditional.as_ref().map(Branch::logits).transpose()?;
            drawn.par_iter_mut().enumerate().for_each(|(row, drawn)| {
                let uniform = requests[row].seed.fold(position as u64).uniform();
                drawn.push(draw(&self.law, &c[row], u.as_ref().map(|u| u[row].as_slice()), uniform));
            });
            if position + 1 < self.n_tokens() {
                let offset = self.text.n_ids();
                let ids: Vec<u32> = drawn.iter().filter_map(|row| row.last()).map(|draw| offset + draw.code).collect();
                conditional.advance(&ids)?;
                unconditional.as_mut().map(|branch| branch.advance(&ids)).transpose()?;
            }
        }
        Ok(drawn)
    }

    /// Each run of requests for one caption is read once; how often it is repeated.
    fn distinct_prompts(&self, requests: &[Request<'_>]) -> Result<(Vec<Vec<u32>>, Vec<usize>)> {
        let (mut prompts, mut repeats): (Vec<Vec<u32>>, Vec<usize>) = (Vec::new(), Vec::new());
        for run in requests.chunk_by(|a, b| a.prompt.text == b.prompt.text) {
            prompts.push(self.prompt_ids(&run[0].prompt.text, &self.law.prefix)?);
            repeats.push(run.len());
        }
        Ok((prompts, repeats))
    }

    /// The images of codes.
    pub fn decode(&self, codes: &[Vec<u32>]) -> Result<Vec<RgbImage>> {
        self.cosmos.decode(codes, self.grid)
    }

    fn check_trace(&self, trace: &ImageTrace, temperature: f32) -> Result<()> {
        if trace.codes.len() != self.n_tokens() {
            return Err(Error::config(format!(
                "a trace has {} codes; the grid of {} x {} needs {}",
                trace.codes.len(),
                self.grid.0,
                self.grid.1,
                self.n_tokens()
            )));
        }
        if let Some(code) = trace.codes.iter().find(|&&code| code >= self.cosmos.n_codes()) {
            let n_codes = self.cosmos.n_codes();
            return Err(Error::config(format!("a trace holds code {code}; the codebook has {n_codes}")));
        }
        if trace.temperature != temperature {
            return Err(Error::config(format!(
                "traces of temperatures {temperature} and {} in one batch; replay them apart",
                trace.temperature
            )));
        }
        Ok(())
    }
}

/// One decoding branch of guidance: a cache and the hidden states after its last token.
struct Branch<'a> {
    snapshot: &'a Snapshot,
    cache: crate::decoder::Cache,
    hidden: Tensor,
}

impl<'a> Branch<'a> {
    fn read(snapshot: &'a Snapshot, prompts: &[Vec<u32>], repeats: &[usize], n_tokens: usize) -> Result<Self> {
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
        let (cache, hidden) = snapshot.prefill(prompts, longest + n_tokens)?;
        Ok(Self { snapshot, cache: cache.expand(repeats)?, hidden: repeat_rows(&hidden, repeats)? })
    }

    fn logits(&self) -> Result<Vec<Vec<f32>>> {
        Ok(self.snapshot.logits(&self.hidden)?.to_device(&Device::Cpu)?.to_vec2()?)
    }

    fn advance(&mut self, ids: &[u32]) -> Result<()> {
        self.hidden = self.snapshot.decode_step(&mut self.cache, ids)?;
        Ok(())
    }
}

impl Policy for SimpleAr {
    type Sample = RgbImage;
    type Trace = ImageTrace;

    fn sample(&self, requests: &[Request<'_>]) -> Result<Vec<Completion<Self>>, BoxError> {
        if requests.is_empty() {
            return Ok(Vec::new());
        }
        let drawn = self.draw_codes(requests)?;
        let codes: Vec<Vec<u32>> = drawn.iter().map(|row| row.iter().map(|draw| draw.code).collect()).collect();
        let images = self.decode(&codes)?;
        let complete = |((codes, drawn), sample): ((Vec<u32>, Vec<Draw>), RgbImage)| Completion {
            sample,
            trace: ImageTrace { codes, temperature: self.law.temperature, prefix: self.law.prefix.clone() },
            log_probs: drawn.iter().map(|draw| draw.log_prob).collect(),
        };
        Ok(codes.into_iter().zip(drawn).zip(images).map(complete).collect())
    }

    fn log_probs(&self, batch: &[(&Prompt, &ImageTrace)]) -> Result<LogProbs, BoxError> {
        let Some((_, first)) = batch.first() else { return Err("an empty batch has no log-probs".into()) };
        let (temperature, n_tokens, offset) = (first.temperature, self.n_tokens(), self.text.n_ids());
        let mut rows = Vec::with_capacity(batch.len());
        let mut places = Vec::with_capacity(batch.len() * n_tokens);
        let mut targets = Vec::with_capacity(batch.len() * n_tokens);
        for (row, (prompt, trace)) in batch.iter().enumerate() {
            self.check_trace(trace, temperature)?;
            let mut ids = self.prompt_ids(&prompt.text, &trace.prefix)?;
            places.extend((0..n_tokens).map(|token| (row, ids.len() - 1 + token)));
            targets.extend(trace.codes.iter().map(|code| offset + code));
            // The last token is chosen and never read.
            ids.extend(trace.codes[..n_tokens - 1].iter().map(|code| offset + code));
            rows.push(ids);
        }
        let hidden = self.decoder.forward(&rows)?;
        let hidden = self.decoder.hidden_at(&hidden, &places)?;
        let (log_probs, entropy) = self.decoder.log_probs_of(&hidden, &targets, self.visual_ids(), temperature)?;
        let shape = (batch.len(), n_tokens);
        let log_probs = log_probs.reshape(shape)?;
        let mask = log_probs.ones_like()?.detach();
        Ok(LogProbs::new(log_probs, mask)?.with_entropy(entropy.reshape(shape)?)?)
    }

    fn params(&self) -> Params {
        self.decoder.params()
    }

    fn grid(&self) -> Option<Grid> {
        Some(self.grid)
    }

    fn scoring(&self) -> Scoring {
        if self.law.is_shaped() { Scoring::Conditional } else { Scoring::Exact }
    }
}
