//! Scores with a backward pass that makes each layer again, where a layer is candle's graph: with adapters, or on another
//! device than the CPU.
//!
//! The forward pass keeps what each layer read and nothing of what it made. The backward pass goes from the last layer
//! to the first: it runs a layer with its graph on a variable that holds its input, takes the gradients, and drops the
//! graph before the next. The operations are those of the plain pass, so on the CPU the gradients are the same to the
//! bit. The gradient of the embedding is one buffer, to which a tied head adds first and then every row read.

use candle_core::{Tensor, Var};
use grpo::{Gradients, Result};

use super::Decoder;
use super::model::EMBEDDING;
use super::tape::Targets;
use super::weights::Layer;
use crate::ops::attention::Attention;
use crate::ops::head::Scored;
use crate::ops::rms_norm::rms_norm;

/// What the backward pass of recomputed layers needs: each layer's input and the decoder itself.
///
/// It sees the weights at the time of [`Tape::backward`], which must be those of the forward pass.
pub(super) struct LayerTape {
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

impl std::fmt::Debug for LayerTape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "LayerTape of {} layers over {:?}", self.inputs.len(), self.last.dims())
    }
}

impl Decoder {
    fn layer(&self, layer: &Layer, attention: &Attention, x: &Tensor) -> Result<Tensor> {
        self.finish_layer(layer, x, &attention.apply(&self.project(layer, x)?)?)
    }

    fn normed_at(&self, x: &Tensor, places: &[(usize, usize)]) -> Result<Tensor> {
        self.hidden_at(&rms_norm(x, &self.norm, self.config.rms_norm_eps)?, places)
    }
}

impl LayerTape {
    /// Log-probabilities and entropies, `[N]` each, and the way back.
    pub(super) fn score(
        decoder: &Decoder,
        rows: &[impl AsRef<[u32]>],
        targets: &Targets,
    ) -> Result<(Tensor, Tensor, Self)> {
        let silent = decoder.detached()?;
        let (ids, lengths) = decoder.padded(rows)?;
        let attention = decoder.attention(lengths, rows);
        let mut inputs = Vec::with_capacity(silent.layers.len());
        let mut x = silent.embed(&ids)?.reshape((rows.len(), (), decoder.config.hidden_size))?;
        for layer in &silent.layers {
            inputs.push(x.clone());
            x = silent.layer(layer, &attention, &x)?;
        }
        let hidden = silent.normed_at(&x, &targets.places)?;
        let scored = targets.choice().scored(&hidden, &silent.head)?;
        let (log_probs, entropies) = (scored.log_probs.clone(), scored.entropies.clone());
        let (decoder, places) = (decoder.clone(), targets.places.clone());
        Ok((log_probs, entropies, Self { decoder, attention, ids, inputs, last: x, places, scored }))
    }

    /// Adds the gradient of every trainable variable, given those by log-probabilities and entropies, `[N]` each.
    pub(super) fn backward(
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
