//! Scores with a backward pass that makes each layer again (activation checkpointing; Chen et al., 2016,
//! arXiv 1604.06174, section 3).
//!
//! The forward pass keeps what each layer read and nothing of what it made. The backward pass goes from the last layer
//! to the first: it runs a layer with its graph on a variable that holds its input, takes the gradients, and drops the
//! graph before the next. The operations are those of the plain pass, so on the CPU the gradients are the same to the
//! bit. The gradient of the embedding is one buffer, to which a tied head adds first and then every row read.

use std::ops::Range;

use candle_core::{Tensor, Var};
use grpo::{Gradients, Result};

use super::Decoder;
use super::model::EMBEDDING;
use super::weights::Layer;
use crate::ops::attention::Attention;
use crate::ops::head::{Choice, Scored};
use crate::ops::rms_norm::rms_norm;

/// Tokens chosen at places of a batch of rows, and the law they are scored by.
#[derive(Clone, Debug)]
pub struct Targets {
    /// `(row, position)` of the token that each was chosen after, `N` of them.
    pub places: Vec<(usize, usize)>,
    /// The chosen ids of the whole vocabulary, within `slice`, `N` of them.
    pub ids: Vec<u32>,
    /// The part of the vocabulary that competes.
    pub slice: Range<usize>,
    /// The logits are divided by it.
    pub temperature: f32,
}

/// What [`Decoder::score`] gives of each target.
#[derive(Debug)]
pub struct Scores {
    /// Log-probabilities, `[N]`; with a graph where there is no tape and the decoder is trainable.
    pub log_probs: Tensor,
    /// Entropies of the law in nats, `[N]`; as the log-probabilities.
    pub entropies: Tensor,
    /// The way back, where layers are recomputed.
    pub tape: Option<Tape>,
}

/// What the backward pass of recomputed layers needs: each layer's input and the decoder itself.
///
/// It sees the weights at the time of [`Tape::backward`], which must be those of the forward pass.
pub struct Tape {
    decoder: Decoder,
    attention: Attention,
    ids: Vec<u32>,
    /// What each layer read, `[B, L, H]`.
    inputs: Vec<Tensor>,
    /// What the last norm read, `[B, L, H]`.
    last: Tensor,
    places: Vec<(usize, usize)>,
    scored: Scored,
}

impl std::fmt::Debug for Tape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tape of {} layers over {:?}", self.inputs.len(), self.last.dims())
    }
}

impl Decoder {
    /// Scores with a tape from now on: memory for one layer's activations, for the time of one more forward pass.
    #[must_use]
    pub fn recompute_layers(mut self) -> Self {
        self.recompute = true;
        self
    }

    /// Whether scoring keeps a tape and no graph.
    pub fn recomputes_layers(&self) -> bool {
        self.recompute
    }

    /// Log-probabilities and entropies of chosen tokens of rows of any lengths.
    ///
    /// [`Decoder::forward`], [`Decoder::hidden_at`] and [`Decoder::log_probs_of`] in one, and the only way to score
    /// with a [`Tape`]. A decoder without trainable variables keeps neither tape nor graph.
    pub fn score(&self, rows: &[impl AsRef<[u32]>], targets: &Targets) -> Result<Scores> {
        if self.recompute && !self.params.is_empty() {
            return self.score_with_tape(rows, targets);
        }
        let hidden = self.hidden_at(&self.forward(rows)?, &targets.places)?;
        let (log_probs, entropies) =
            self.log_probs_of(&hidden, &targets.ids, targets.slice.clone(), targets.temperature)?;
        Ok(Scores { log_probs, entropies, tape: None })
    }

    fn score_with_tape(&self, rows: &[impl AsRef<[u32]>], targets: &Targets) -> Result<Scores> {
        let silent = self.detached()?;
        let (ids, lengths) = self.padded(rows)?;
        let attention = self.attention(lengths, rows);
        let mut inputs = Vec::with_capacity(silent.layers.len());
        let mut x = silent.embed(&ids)?.reshape((rows.len(), (), self.config.hidden_size))?;
        for layer in &silent.layers {
            inputs.push(x.clone());
            x = silent.layer(layer, &attention, &x)?;
        }
        let hidden = silent.normed_at(&x, &targets.places)?;
        let choice =
            Choice { slice: targets.slice.clone(), targets: targets.ids.clone(), temperature: targets.temperature };
        let scored = choice.scored(&hidden, &silent.head)?;
        let (log_probs, entropies) = (scored.log_probs.clone(), scored.entropies.clone());
        let (decoder, places) = (self.clone(), targets.places.clone());
        let tape = Tape { decoder, attention, ids, inputs, last: x, places, scored };
        Ok(Scores { log_probs, entropies, tape: Some(tape) })
    }

    fn layer(&self, layer: &Layer, attention: &Attention, x: &Tensor) -> Result<Tensor> {
        self.finish_layer(layer, x, &attention.apply(&self.project(layer, x)?)?)
    }

    fn normed_at(&self, x: &Tensor, places: &[(usize, usize)]) -> Result<Tensor> {
        self.hidden_at(&rms_norm(x, &self.norm, self.config.rms_norm_eps)?, places)
    }
}

impl Tape {
    /// Adds the gradient of every trainable variable, given those by log-probabilities and entropies, `[N]` each.
    pub fn backward(
        &self,
        by_log_probs: &Tensor,
        by_entropies: Option<&Tensor>,
        gradients: &mut Gradients,
    ) -> Result<()> {
        let decoder = &self.decoder;
        let hidden = decoder.normed_at(&self.last, &self.places)?.detach();
        let (to_hidden, to_head) = self.scored.gradients(&hidden, &decoder.head, by_log_probs, by_entropies)?;
        let mut to_x = self.pull(&self.last, &to_hidden, gradients, |x| decoder.normed_at(x, &self.places))?;
        for (layer, input) in decoder.layers.iter().zip(&self.inputs).rev() {
            to_x = self.pull(input, &to_x, gradients, |x| decoder.layer(layer, &self.attention, x))?;
        }
        self.add_embedding(&to_x, to_head, gradients)
    }

    /// The gradient by `input` of an operation, given that by its output; adds those of the variables it uses.
    fn pull(
        &self,
        input: &Tensor,
        to_output: &Tensor,
        gradients: &mut Gradients,
        operation: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let input = Var::from_tensor(input)?;
        let mut store = (operation(&input)? * to_output)?.sum_all()?.backward()?;
        for (name, var) in self.decoder.params.iter() {
            if let Some(gradient) = store.remove(var) {
                gradients.add(name, &gradient)?;
            }
        }
        match store.remove(&input) {
            // What candle keeps of a gradient's own graph would outlive the layer.
            Some(gradient) => Ok(gradient.detach()),
            None => Ok(input.zeros_like()?),
        }
    }

    fn add_embedding(&self, to_x: &Tensor, to_head: Option<Tensor>, gradients: &mut Gradients) -> Result<()> {
        let embedding = &self.decoder.embedding;
        let tied = self.decoder.config.tie_word_embeddings;
        if let (false, Some(to_head)) = (tied, &to_head) {
            gradients.add("lm_head.weight", to_head)?;
        }
        if !embedding.track_op() {
            return Ok(());
        }
        let sum = match to_head.filter(|_| tied) {
            Some(sum) => sum.contiguous()?,
            None => embedding.zeros_like()?.detach(),
        };
        let rows = to_x.reshape((self.ids.len(), self.decoder.config.hidden_size))?;
        let ids = Tensor::from_slice(&self.ids, (self.ids.len(), 1), rows.device())?;
        sum.scatter_add_set(&ids.broadcast_as(rows.shape())?.contiguous()?, &rows.contiguous()?, 0)?;
        gradients.add(EMBEDDING, &sum)
    }
}
