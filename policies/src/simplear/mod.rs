//! SimpleAR (Wang et al., 2025, arXiv 2504.11455): a plain decoder that writes an image as discrete tokens.
//!
//! A row is `<|t2i|>` + prefix + caption + `<|soi|>` + `h·w` visual tokens in raster order; visual ids lie behind the
//! text ids; there is no end token, the grid decides the length. Deviations from the published code, each because
//! there it is a fault: sampling is restricted to visual ids; captions reach rewards unmangled; rows are told apart
//! by index and not by text.

mod files;
mod initialise;
mod law;
mod memory;
mod sampling;
mod speculative;
mod stages;
mod text;

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use candle_core::Tensor;
use grpo::{
    BoxError, Completion, Error, Gradients, LogProbs, LossGradient, Params, Policy, Prompt, Request, Result, Scoring,
    Seed,
};
use image::RgbImage;
use serde::Serialize;

pub use crate::sampling::ScoredAs;
pub use files::{Stage, shapes_cosmos};
pub use law::{Law, Vocabulary};
pub use memory::{MemoryEstimate, Workload};
pub use sampling::Drawn;
#[cfg(feature = "benches")]
#[doc(hidden)]
pub use sampling::midway::Midway;
pub use stages::{
    BatchPlan, CaptionChoice, CaptionedTokens, LossOver, PUBLISHED_PREFIXES, Prefixes, RowConfig, RowNll, TrainingRow,
};
pub use text::{SPECIAL_TOKENS, TextTokenizer, words};

use crate::cosmos::Cosmos;
use crate::decoder::folder::Companions;
use crate::decoder::{Compute, Decoder, ImagePositions, LoraConfig, Tape, Targets};

/// Rows and columns of visual tokens.
pub type Grid = (usize, usize);

/// The flagship policy: text in, image out.
pub struct SimpleAr {
    decoder: Decoder,
    cosmos: Arc<Cosmos>,
    text: Arc<TextTokenizer>,
    law: Arc<Law>,
    grid: Grid,
    /// Places decided in one pass of the decoder.
    window: usize,
    companions: Arc<Companions>,
    warnings: Arc<Vec<String>>,
}

/// The visual tokens of an image and the law they were drawn by.
#[derive(Clone, Debug, Serialize)]
pub struct ImageTrace {
    /// Codes in raster order, each below the size of the codebook: what the picture was decoded from.
    pub codes: Vec<u32>,
    /// Under [`Vocabulary::Full`], the positions where an id was drawn that is no code, and the id; the code there is 0.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub strays: Vec<(u32, u32)>,
    /// Which ids competed.
    pub vocabulary: Vocabulary,
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
                 take decoder, tokenizer and visual tokenizer of one checkpoint, or make one with grpo import",
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
        let decoder = decoder.with_image_grid(grid, text.image_start());
        let (law, companions, warnings) = Default::default();
        Ok(Self { decoder, cosmos, text, law, grid, window: 1, companions, warnings })
    }

    /// The same weights for images of another size: what fine-tuning at a higher resolution starts from.
    pub fn with_grid(self, grid: Grid) -> Result<Self> {
        let Self { decoder, cosmos, text, law, companions, warnings, .. } = self;
        Ok(Self { law, companions, warnings, ..Self::new(decoder, cosmos, text, grid)? })
    }

    /// Samples by this law from now on.
    pub fn with_law(mut self, law: Law) -> Result<Self> {
        law.check()?;
        self.law = Arc::new(law);
        Ok(self)
    }

    /// The same weights with the tokens of images numbered otherwise: a choice of pretraining (the paper's table 3).
    #[must_use]
    pub fn with_image_positions(mut self, positions: ImagePositions) -> Self {
        let decoder = self.decoder.with_image_positions(positions);
        self.decoder = decoder.with_image_grid(self.grid, self.text.image_start());
        self
    }

    /// Decides up to `window` places in one pass of the decoder from now on, by speculative Jacobi decoding; 1, the
    /// default, draws token by token, and more than the grid is the whole grid.
    ///
    /// The law stays the same and the draws of a seed become others. Fewer passes pay where a pass costs the same for
    /// one token and for `window`: at small batches on a GPU, seldom on a CPU.
    pub fn with_window(mut self, window: usize) -> Result<Self> {
        if window == 0 {
            return Err(Error::config("window is 0; give 1 to draw token by token, 16 or 32 to speculate"));
        }
        self.window = window.min(self.n_tokens());
        Ok(self)
    }

    /// Trains with one layer's activations in memory at a time, for the time of one more forward pass: see [`Tape`].
    #[must_use]
    pub fn recompute_layers(mut self) -> Self {
        self.decoder = self.decoder.recompute_layers();
        self
    }

    /// Computes in this type from now on, where it has a choice: see [`Compute`].
    #[must_use]
    pub fn with_compute(self, compute: Compute) -> Self {
        Self { decoder: self.decoder.with_compute(compute), ..self }
    }

    /// Trains low-rank adapters and nothing else: see [`Decoder::with_lora`]. [`SimpleAr::frozen`] is then the policy
    /// without them, at no cost in memory.
    pub fn with_lora(self, lora: LoraConfig, seed: Seed) -> Result<Self> {
        Ok(Self { decoder: self.decoder.with_lora(lora, seed)?, ..self })
    }

    /// Reads trainable adapters from a folder in PEFT's format.
    pub fn load_adapter(self, folder: &Path) -> Result<Self> {
        Ok(Self { decoder: self.decoder.load_adapter(folder)?, ..self })
    }

    /// Writes the adapters in PEFT's format; [`SimpleAr::save`] writes the whole with the adapters merged in.
    pub fn save_adapter(&self, folder: &Path) -> Result<()> {
        self.decoder.save_adapter(folder)
    }

    /// A copy without trainable variables, which later training does not move: the reference of the KL term.
    pub fn frozen(&self) -> Result<Self> {
        Ok(Self { decoder: self.decoder.frozen()?, ..self.shallow() })
    }

    /// A copy with trainable variables of its own: a reference that is moved towards the policy.
    pub fn copy(&self) -> Result<Self> {
        Ok(Self { decoder: self.decoder.copy()?, ..self.shallow() })
    }

    /// The same weights without gradients, shared and not copied: for looking at a policy, not for training it.
    pub fn detached(&self) -> Result<Self> {
        Ok(Self { decoder: self.decoder.detached()?, ..self.shallow() })
    }

    /// The same policy with its decoder on a device: pictures are still decoded where the visual tokenizer lies.
    pub fn with_decoder_on(&self, device: &candle_core::Device) -> Result<Self> {
        Ok(Self { decoder: self.decoder.on_device(device)?, ..self.shallow() })
    }

    fn shallow(&self) -> Self {
        Self {
            decoder: self.decoder.clone(),
            cosmos: self.cosmos.clone(),
            text: self.text.clone(),
            law: self.law.clone(),
            grid: self.grid,
            window: self.window,
            companions: self.companions.clone(),
            warnings: self.warnings.clone(),
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

    /// The images of codes.
    pub fn decode(&self, codes: &[Vec<u32>]) -> Result<Vec<RgbImage>> {
        self.cosmos.decode(codes, self.grid)
    }

    /// The trace of an image that was not drawn, such as an encoded photograph, as if this policy's law had drawn it.
    pub fn trace_of(&self, codes: &[u32]) -> ImageTrace {
        let offset = self.text.n_ids();
        self.trace(&codes.iter().map(|code| offset.saturating_add(*code)).collect::<Vec<_>>())
    }

    /// What was drawn as a trace: ids below the first visual one are strays, and code 0 in the picture.
    fn trace(&self, ids: &[u32]) -> ImageTrace {
        let offset = self.text.n_ids();
        let strays = ids.iter().zip(0..).filter(|(id, _)| **id < offset).map(|(id, at)| (at, *id));
        ImageTrace {
            codes: ids.iter().map(|id| id.saturating_sub(offset)).collect(),
            strays: strays.collect(),
            vocabulary: self.law.vocabulary,
            temperature: self.law.temperature,
            prefix: self.law.prefix.clone(),
        }
    }

    /// The ids of a trace, checked.
    fn trace_ids(&self, trace: &ImageTrace) -> Result<Vec<u32>> {
        let (offset, n_codes) = (self.text.n_ids(), self.cosmos.n_codes());
        if trace.codes.len() != self.n_tokens() {
            return Err(Error::config(format!(
                "a trace has {} codes; the grid of {} x {} needs {}",
                trace.codes.len(),
                self.grid.0,
                self.grid.1,
                self.n_tokens()
            )));
        }
        if let Some(code) = trace.codes.iter().find(|&&code| code >= n_codes) {
            return Err(Error::config(format!("a trace holds code {code}; the codebook has {n_codes}")));
        }
        let mut ids: Vec<u32> = trace.codes.iter().map(|code| offset + code).collect();
        for &(position, id) in &trace.strays {
            let place = ids.get_mut(position as usize).filter(|_| id < offset);
            let Some(place) = place.filter(|_| trace.vocabulary == Vocabulary::Full) else {
                return Err(Error::config(format!(
                    "a trace has stray id {id} at position {position}; strays are text ids within the grid, drawn from \
                     the full vocabulary"
                )));
            };
            *place = id;
        }
        Ok(ids)
    }
}

impl Policy for SimpleAr {
    type Sample = RgbImage;
    type Trace = ImageTrace;

    fn sample(&self, requests: &[Request<'_>]) -> Result<Vec<Completion<Self>>, BoxError> {
        let drawn = self.draw(requests)?;
        let codes: Vec<Vec<u32>> = drawn.iter().map(|drawn| drawn.trace.codes.clone()).collect();
        let complete =
            |(drawn, sample): (Drawn, RgbImage)| Completion { sample, trace: drawn.trace, log_probs: drawn.log_probs };
        Ok(drawn.into_iter().zip(self.decode(&codes)?).map(complete).collect())
    }

    fn log_probs(&self, batch: &[(&Prompt, &ImageTrace)]) -> Result<LogProbs, BoxError> {
        let Some((_, first)) = batch.first() else { return Err("an empty batch has no log-probs".into()) };
        let (temperature, vocabulary, n_tokens) = (first.temperature, first.vocabulary, self.n_tokens());
        if let Some((_, other)) =
            batch.iter().find(|(_, trace)| trace.temperature != temperature || trace.vocabulary != vocabulary)
        {
            return Err(Box::new(Error::config(format!(
                "traces of temperatures {temperature} and {}, over {vocabulary:?} and {:?} ids, in one batch; replay \
                 them apart",
                other.temperature, other.vocabulary
            ))));
        }
        let mut rows = Vec::with_capacity(batch.len());
        let mut places = Vec::with_capacity(batch.len() * n_tokens);
        let mut chosen = Vec::with_capacity(batch.len() * n_tokens);
        for (row, (prompt, trace)) in batch.iter().enumerate() {
            let drawn = self.trace_ids(trace)?;
            let mut ids = self.prompt_ids(&prompt.text, &trace.prefix)?;
            places.extend((0..n_tokens).map(|token| (row, ids.len() - 1 + token)));
            // The last token is chosen and never read.
            ids.extend(&drawn[..n_tokens - 1]);
            chosen.extend(drawn);
            rows.push(ids);
        }
        let targets = Targets { places, ids: chosen, slice: self.choices(vocabulary), temperature };
        let scores = self.decoder.score(&rows, &targets)?;
        let shape = (batch.len(), n_tokens);
        let log_probs = scores.log_probs.reshape(shape)?;
        let mask = log_probs.ones_like()?.detach();
        let log_probs = LogProbs::new(log_probs, mask)?.with_entropy(scores.entropies.reshape(shape)?)?;
        Ok(match scores.tape {
            Some(tape) => log_probs.with_tape(Arc::new(tape)),
            None => log_probs,
        })
    }

    fn backward(
        &self,
        log_probs: &LogProbs,
        gradient: &LossGradient,
        gradients: &mut Gradients,
    ) -> Result<(), BoxError> {
        let Some(tape) = log_probs.tape().and_then(|tape| tape.downcast_ref::<Tape>()) else {
            return Ok(gradients.add_backward(&log_probs.surrogate(gradient)?, &self.params())?);
        };
        let by_entropies = gradient.entropy.as_ref().map(Tensor::flatten_all).transpose()?;
        Ok(tape.backward(&gradient.log_probs.flatten_all()?, by_entropies.as_ref(), gradients)?)
    }

    fn params(&self) -> Params {
        self.decoder.params()
    }

    fn grid(&self) -> Option<Grid> {
        Some(self.grid)
    }

    fn device_optimiser(&self) -> Option<Arc<dyn grpo::DeviceOptimiser>> {
        crate::device_optimiser()
    }

    #[cfg(feature = "cuda")]
    fn rows_that_fit(&self, batch: &[(&Prompt, &ImageTrace)]) -> Result<usize, BoxError> {
        let Some((_, first)) = batch.first().filter(|_| self.decoder.on_card()) else { return Ok(batch.len()) };
        let mut longest = 0;
        for (prompt, trace) in batch {
            longest = longest.max(self.prompt_ids(&prompt.text, &trace.prefix)?.len());
        }
        let slice = self.choices(first.vocabulary).len();
        Ok(crate::cuda::rows_that_fit(&self.decoder, longest + self.n_tokens() - 1, slice)?)
    }

    fn replay_tolerance(&self) -> f32 {
        self.decoder.replay_tolerance()
    }

    fn scoring(&self) -> Scoring {
        if self.law.is_shaped() { Scoring::Conditional } else { Scoring::Exact }
    }
}
