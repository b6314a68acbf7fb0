//! A causal language model as a policy: text in, text out.
//!
//! A row is the prompt, rendered by a [`Template`], and then the tokens drawn, over the whole vocabulary, up to one that
//! ends the text or to `max_new_tokens`. The end is a choice as any other: its log-probability is trained, as in TRL.
//!
//! ```
//! use std::sync::Arc;
//! use grpo::{Policy, Prompt, Request, Seed};
//! use grpo_policies::decoder::{Decoder, DecoderConfig};
//! use grpo_policies::text_lm::{TextLaw, TextLm, Tokenizer};
//! let tokenizer = Tokenizer::of_words(["one", "two", "three"], &["<end>"])?;
//! let config = DecoderConfig { vocab_size: 5, hidden_size: 32, num_hidden_layers: 1, ..DecoderConfig::default() };
//! let decoder = Decoder::init(config, Seed::new(1))?;
//! let end = tokenizer.id_of("<end>").into_iter().collect();
//! let policy = TextLm::new(decoder, Arc::new(tokenizer), end)?
//!     .with_law(TextLaw { max_new_tokens: 8, ..TextLaw::default() })?;
//! let prompt = Prompt::new("one two");
//! let drawn = policy.sample(&[Request { prompt: &prompt, seed: Seed::new(2) }])?;
//! let replayed = policy.log_probs(&[(&prompt, &drawn[0].trace)])?.rows()?;
//! assert_eq!(replayed[0].len(), drawn[0].trace.ids.len());
//! assert!((replayed[0][0] - drawn[0].log_probs[0]).abs() < 1e-4);
//! # Ok::<(), grpo::BoxError>(())
//! ```

mod files;
mod law;
mod sampling;
mod template;
mod tokenizer;

use std::sync::Arc;

use candle_core::{DType, Tensor};
use grpo::{
    BoxError, Completion, Error, Gradients, LogProbs, LossGradient, Params, Policy, Prompt, Request, Result, Scoring,
};
use serde::Serialize;

pub use crate::sampling::ScoredAs;
pub use law::TextLaw;
pub use template::{ChatTemplate, Template};
pub use tokenizer::Tokenizer;

use crate::decoder::{Decoder, Tape, Targets};
use files::Kept;

/// The text policy: any Qwen2.5-shaped language model.
pub struct TextLm {
    decoder: Decoder,
    tokenizer: Arc<Tokenizer>,
    ends: Arc<[u32]>,
    template: Template,
    law: TextLaw,
    kept: Arc<Kept>,
}

/// The tokens of a completion, what they follow and the law they were drawn by.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TextTrace {
    /// The ids that stood before them: the prompt as its template and the tokenizer made it.
    pub prompt: Vec<u32>,
    /// The ids drawn, with the one that ends the text where it was drawn.
    pub ids: Vec<u32>,
    /// The law of the draw; replay scores at its temperature.
    pub law: TextLaw,
    finished: bool,
}

impl TextTrace {
    /// Whether the text ended by itself rather than at `max_new_tokens`.
    pub fn finished(&self) -> bool {
        self.finished
    }
}

impl TextLm {
    /// A policy of its parts; each id of `ends` ends a text. Prompts are [`Template::Plain`].
    pub fn new(decoder: Decoder, tokenizer: Arc<Tokenizer>, ends: Vec<u32>) -> Result<Self> {
        let (vocabulary, known) = (decoder.config().vocab_size, tokenizer.n_ids());
        // Checkpoints often round the embedding up, so that it has more ids than the tokenizer.
        if known > vocabulary {
            return Err(Error::config(format!(
                "the tokenizer has {known} ids, the decoder's vocabulary {vocabulary}: take both of one checkpoint"
            )));
        }
        if ends.is_empty() {
            return Err(Error::config("no id ends a text; give the id of the tokenizer's end, its eos_token_id"));
        }
        if let Some(end) = ends.iter().find(|end| **end as usize >= vocabulary) {
            return Err(Error::config(format!(
                "id {end} is to end a text; the vocabulary has {vocabulary} ids, give one of them as eos_token_id"
            )));
        }
        Ok(Self {
            decoder,
            tokenizer,
            ends: ends.into(),
            template: Template::Plain,
            law: TextLaw::default(),
            kept: Arc::default(),
        })
    }

    /// Samples by this law from now on.
    pub fn with_law(self, law: TextLaw) -> Result<Self> {
        law.check()?;
        Ok(Self { law, ..self })
    }

    /// Renders prompts by this template from now on.
    #[must_use]
    pub fn with_template(self, template: Template) -> Self {
        Self { template, ..self }
    }

    /// A copy without trainable variables, which later training does not move: the reference of the KL term.
    pub fn frozen(&self) -> Result<Self> {
        Ok(self.around(self.decoder.frozen()?))
    }

    /// A copy with trainable variables of its own: a reference that is moved towards the policy.
    pub fn copy(&self) -> Result<Self> {
        Ok(self.around(self.decoder.copy()?))
    }

    fn around(&self, decoder: Decoder) -> Self {
        Self {
            decoder,
            tokenizer: self.tokenizer.clone(),
            ends: self.ends.clone(),
            template: self.template.clone(),
            law: self.law,
            kept: self.kept.clone(),
        }
    }

    /// The law of sampling.
    pub fn law(&self) -> &TextLaw {
        &self.law
    }

    /// How prompts are rendered.
    pub fn template(&self) -> &Template {
        &self.template
    }

    /// The decoder.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The ids that end a text.
    pub fn ends(&self) -> &[u32] {
        &self.ends
    }

    /// The ids that a prompt's text becomes; never none.
    pub fn prompt_ids(&self, prompt: &str) -> Result<Vec<u32>> {
        let ids = match &self.template {
            Template::Plain => self.tokenizer.framed_ids(prompt)?,
            Template::Chat(chat) => self.tokenizer.ids(&chat.render(prompt)?)?,
        };
        match ids.is_empty() {
            true => {
                Err(Error::config(format!("prompt `{prompt}` has no token; give one that has, or a chat template")))
            }
            false => Ok(ids),
        }
    }

    /// The trace of a completion that was not drawn here, for scoring a given one; `ids` with the id that ends it.
    pub fn trace_of(&self, prompt: &Prompt, ids: Vec<u32>) -> Result<TextTrace> {
        if ids.is_empty() {
            return Err(Error::config("a completion has no token; give at least the id that ends it"));
        }
        let end = ids.iter().position(|id| self.ends.contains(id));
        if let Some(at) = end.filter(|at| at + 1 < ids.len()) {
            return Err(Error::config(format!(
                "a completion has {} tokens, but its token {at} ends it; cut it off there",
                ids.len()
            )));
        }
        Ok(TextTrace { prompt: self.prompt_ids(&prompt.text)?, ids, law: self.law, finished: end.is_some() })
    }

    /// Where the choices of each trace lie in its row, and the row of the prompt and all tokens but the last.
    fn rows(batch: &[(&Prompt, &TextTrace)]) -> Result<Rows> {
        let mut rows = Rows::default();
        for (row, (_, trace)) in batch.iter().enumerate() {
            let (Some((_, read)), false) = (trace.ids.split_last(), trace.prompt.is_empty()) else {
                return Err(Error::config(format!(
                    "trace {row} has {} prompt tokens and {} choices; it needs one of each",
                    trace.prompt.len(),
                    trace.ids.len()
                )));
            };
            let start = trace.prompt.len() - 1;
            rows.places.extend((start..start + trace.ids.len()).map(|position| (row, position)));
            rows.targets.extend(&trace.ids);
            rows.ids.push([&trace.prompt[..], read].concat());
            rows.longest = rows.longest.max(trace.ids.len());
        }
        Ok(rows)
    }
}

/// A batch of traces as the decoder reads it.
#[derive(Default)]
struct Rows {
    ids: Vec<Vec<u32>>,
    places: Vec<(usize, usize)>,
    targets: Vec<u32>,
    longest: usize,
}

/// Lays `values`, `[N]`, the choices of one trace after another, into rows of zeros, `[B, T]`.
fn padded(values: &Tensor, lengths: &[usize], longest: usize) -> Result<Tensor> {
    let padding = values.dim(0)? as u32;
    let mut index = Vec::with_capacity(lengths.len() * longest);
    let mut next = 0;
    for &length in lengths {
        index.extend(next..next + length as u32);
        next += length as u32;
        index.resize(index.len() + longest - length, padding);
    }
    let zero = Tensor::zeros(1, values.dtype(), values.device())?;
    let index = Tensor::from_vec(index, lengths.len() * longest, values.device())?;
    Ok(Tensor::cat(&[values, &zero], 0)?.index_select(&index, 0)?.reshape((lengths.len(), longest))?)
}

/// The choices of one trace after another, `[N]`, out of rows `[B, T]`.
fn unpadded(rows: &Tensor, lengths: &[usize]) -> Result<Tensor> {
    let width = rows.dim(1)?;
    let places = lengths.iter().enumerate().flat_map(|(row, length)| row * width..row * width + length);
    let index: Vec<u32> = places.map(|place| place as u32).collect();
    Ok(rows.flatten_all()?.index_select(&Tensor::from_slice(&index, index.len(), rows.device())?, 0)?)
}

/// The way back from a batch's log-probs, and how many choices each row has.
struct TextTape {
    tape: Tape,
    lengths: Vec<usize>,
}

impl Policy for TextLm {
    type Sample = String;
    type Trace = TextTrace;

    fn sample(&self, requests: &[Request<'_>]) -> Result<Vec<Completion<Self>>, BoxError> {
        if requests.is_empty() {
            return Ok(Vec::new());
        }
        let mut completions = Vec::with_capacity(requests.len());
        for drawn in self.draw(requests)? {
            let sample = self.tokenizer.text(&drawn.ids)?;
            let finished = drawn.ids.last().is_some_and(|id| self.ends.contains(id));
            let trace = TextTrace { prompt: drawn.prompt, ids: drawn.ids, law: self.law, finished };
            completions.push(Completion { sample, trace, log_probs: drawn.log_probs });
        }
        Ok(completions)
    }

    fn log_probs(&self, batch: &[(&Prompt, &TextTrace)]) -> Result<LogProbs, BoxError> {
        let Some((_, first)) = batch.first() else { return Err("an empty batch has no log-probs".into()) };
        let temperature = first.law.temperature;
        if let Some((_, other)) = batch.iter().find(|(_, trace)| trace.law.temperature != temperature) {
            return Err(Box::new(Error::config(format!(
                "traces of temperatures {temperature} and {} in one batch; replay them apart",
                other.law.temperature
            ))));
        }
        let rows = Self::rows(batch)?;
        let n_choices = rows.targets.len();
        let slice = 0..self.decoder.config().vocab_size;
        let targets = Targets { places: rows.places, ids: rows.targets, slice, temperature };
        let scores = self.decoder.score(&rows.ids, &targets)?;
        let lengths: Vec<usize> = batch.iter().map(|(_, trace)| trace.ids.len()).collect();
        let ones = Tensor::ones(n_choices, DType::F32, self.decoder.device())?;
        let lay = |values: &Tensor| padded(values, &lengths, rows.longest);
        let log_probs = LogProbs::new(lay(&scores.log_probs)?, lay(&ones)?)?.with_entropy(lay(&scores.entropies)?)?;
        Ok(match scores.tape {
            Some(tape) => log_probs.with_tape(Arc::new(TextTape { tape, lengths })),
            None => log_probs,
        })
    }

    fn backward(
        &self,
        log_probs: &LogProbs,
        gradient: &LossGradient,
        gradients: &mut Gradients,
    ) -> Result<(), BoxError> {
        let Some(TextTape { tape, lengths }) = log_probs.tape().and_then(|tape| tape.downcast_ref()) else {
            return Ok(gradients.add_backward(&log_probs.surrogate(gradient)?, &self.params())?);
        };
        let by_entropies = gradient.entropy.as_ref().map(|entropy| unpadded(entropy, lengths)).transpose()?;
        Ok(tape.backward(&unpadded(&gradient.log_probs, lengths)?, by_entropies.as_ref(), gradients)?)
    }

    fn device_optimiser(&self) -> Option<Arc<dyn grpo::DeviceOptimiser>> {
        crate::device_optimiser()
    }

    fn replay_tolerance(&self) -> f32 {
        self.decoder.replay_tolerance()
    }

    fn params(&self) -> Params {
        self.decoder.params()
    }

    fn finished(trace: &TextTrace) -> Option<bool> {
        Some(trace.finished())
    }

    fn scoring(&self) -> Scoring {
        if self.law.is_shaped() { Scoring::Conditional } else { Scoring::Exact }
    }
}
