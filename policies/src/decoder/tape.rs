//! Scores of chosen tokens, and the way back from them without candle's graph.

use std::ops::Range;

use candle_core::Tensor;
use grpo::{Error, Gradients, Result};

use super::Decoder;
use super::host_tape::HostTape;
use super::recompute::LayerTape;
use crate::ops::head::Choice;
use crate::ops::is_host_f32;

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

impl Targets {
    /// An error where rows, places, ids or the law cannot be meant.
    #[cfg(feature = "cuda")]
    fn check(&self, decoder: &Decoder, rows: &[impl AsRef<[u32]>]) -> Result<()> {
        check_places(&self.places, &decoder.checked_lengths(rows)?)?;
        Ok(self.choice().check(self.places.len(), decoder.head())?)
    }

    pub(super) fn choice(&self) -> Choice {
        Choice { slice: self.slice.clone(), targets: self.ids.clone(), temperature: self.temperature }
    }
}

/// What [`Decoder::score`] gives of each target.
#[derive(Debug)]
pub struct Scores {
    /// Log-probabilities, `[N]`; with a graph where the decoder is trainable and there is no tape.
    pub log_probs: Tensor,
    /// Entropies of the law in nats, `[N]`; as the log-probabilities.
    pub entropies: Tensor,
    /// The way back, where there is no graph.
    pub tape: Option<Tape>,
}

/// What the backward pass needs: of each layer its input and what it made, or its input alone where layers are made
/// again ([`Decoder::recompute_layers`]).
///
/// It sees the weights at the time of [`Tape::backward`], which must be those of the forward pass.
pub struct Tape(Way);

pub(super) enum Way {
    /// The CPU's own operations, driven layer by layer.
    Host(Box<HostTape>),
    /// candle's graph of one layer at a time.
    Layers(Box<LayerTape>),
    /// A card's own kernels, driven layer by layer.
    #[cfg(feature = "cuda")]
    Cuda(Box<crate::cuda::CudaTape>),
}

impl std::fmt::Debug for Tape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.0 {
            Way::Host(tape) => tape.fmt(f),
            Way::Layers(tape) => tape.fmt(f),
            #[cfg(feature = "cuda")]
            Way::Cuda(tape) => tape.fmt(f),
        }
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
        match &self.0 {
            Way::Host(tape) => tape.backward(by_log_probs, by_entropies, gradients),
            Way::Layers(tape) => tape.backward(by_log_probs, by_entropies, gradients),
            #[cfg(feature = "cuda")]
            Way::Cuda(tape) => tape.backward(by_log_probs, by_entropies, gradients),
        }
    }
}

impl Decoder {
    /// Keeps each layer's input alone from now on: memory for one layer's activations, for the time of one more forward
    /// pass (activation checkpointing; Chen et al., 2016, arXiv 1604.06174, section 3).
    #[must_use]
    pub fn recompute_layers(mut self) -> Self {
        self.recompute = true;
        self
    }

    /// Whether the backward pass makes each layer again.
    pub fn recomputes_layers(&self) -> bool {
        self.recompute
    }

    /// Log-probabilities and entropies of chosen tokens of rows of any lengths.
    ///
    /// [`Decoder::forward`], [`Decoder::hidden_at`] and [`Decoder::log_probs_of`] in one, and faster: on the CPU without
    /// a graph, in less memory, and with a [`Tape`] where the decoder is trainable. With adapters or on another device
    /// there is a graph, or a tape where layers are made again. A decoder without trainable variables keeps neither.
    pub fn score(&self, rows: &[impl AsRef<[u32]>], targets: &Targets) -> Result<Scores> {
        let trained = !self.params.is_empty();
        if is_host_f32(&self.embedding) && self.lora.is_none() {
            let (log_probs, entropies, tape) = HostTape::score(self, rows, targets)?;
            return Ok(Scores { log_probs, entropies, tape: trained.then(|| Tape(Way::Host(Box::new(tape)))) });
        }
        #[cfg(feature = "cuda")]
        if self.on_card() && crate::cuda::CudaTape::serves(targets) {
            targets.check(self, rows)?;
            let (log_probs, entropies, tape) = crate::cuda::CudaTape::score(self, rows, targets)?;
            return Ok(Scores { log_probs, entropies, tape: tape.map(|tape| Tape(Way::Cuda(Box::new(tape)))) });
        }
        if self.recompute && trained {
            let (log_probs, entropies, tape) = LayerTape::score(self, rows, targets)?;
            return Ok(Scores { log_probs, entropies, tape: Some(Tape(Way::Layers(Box::new(tape)))) });
        }
        let hidden = self.hidden_at(&self.forward(rows)?, &targets.places)?;
        let (log_probs, entropies) =
            self.log_probs_of(&hidden, &targets.ids, targets.slice.clone(), targets.temperature)?;
        Ok(Scores { log_probs, entropies, tape: None })
    }
}

/// An error where a place is none of rows of these lengths.
pub(super) fn check_places(places: &[(usize, usize)], lengths: &[usize]) -> Result<()> {
    let outside = |(row, position): &&(usize, usize)| lengths.get(*row).is_none_or(|length| position >= length);
    match places.iter().find(outside) {
        None => Ok(()),
        Some((row, position)) => Err(Error::config(format!(
            "place ({row}, {position}) lies outside hidden states of {} rows and {} positions",
            lengths.len(),
            lengths.iter().max().unwrap_or(&0)
        ))),
    }
}
