//! Scores of a batch on a card, and the way back through what their forward pass left.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::Tensor;
use grpo::{Error, Gradients, Result};

use super::back::Sums;
use super::batch::{Batch, readers};
use super::gpu::{Buffer, Extent, Gpu, Kind};
use super::head::{Asked, CHUNK_BYTES, Head, Scored};
use super::layer::{Made, Pass, TOKEN_THREADS};
use super::weights::{Sizes, Weights};
use crate::decoder::{Decoder, EMBEDDING, Targets};

const HEAD: &str = "lm_head.weight";
const NORM: &str = "model.norm.weight";

/// What the forward pass of [`CudaTape::score`] left.
pub(crate) struct CudaTape {
    gpu: Arc<Gpu>,
    decoder: Decoder,
    weights: Weights,
    batch: Batch,
    ids: Vec<u32>,
    slice_start: usize,
    head: Head,
    /// The token that each target was chosen after, the targets from the slice's first on, and how many.
    at: Buffer,
    targets: Buffer,
    n_targets: usize,
    /// What the last norm read, f32, and what the head did.
    last: Buffer,
    hidden: Buffer,
    /// `[3, n]`.
    scores: Tensor,
    /// Taken by the way back, which uses them up.
    layers: Mutex<Vec<Kept>>,
}

/// What is kept of a layer.
struct Kept {
    input: Buffer,
    /// `None` where it is made again.
    made: Option<Made>,
}

impl std::fmt::Debug for CudaTape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CudaTape over {} tokens and {} targets", self.batch.n_tokens, self.n_targets)
    }
}

impl CudaTape {
    /// Whether these targets can be scored here: there are some, and no place is asked twice, for gradients of places are
    /// added side by side.
    pub(crate) fn serves(targets: &Targets) -> bool {
        let n = targets.places.len();
        n > 0 && targets.places.iter().collect::<BTreeSet<_>>().len() == n
    }

    /// Log-probabilities and entropies, `[N]` each, and the way back where the decoder is trained.
    pub(crate) fn score(
        decoder: &Decoder,
        rows: &[impl AsRef<[u32]>],
        targets: &Targets,
    ) -> Result<(Tensor, Tensor, Option<Self>)> {
        let rows: Vec<&[u32]> = rows.iter().map(AsRef::as_ref).collect();
        let trained = !decoder.params().is_empty();
        let gpu = Gpu::of(decoder.embedding())?;
        let weights = Weights::of(&gpu, decoder)?;
        let batch = Batch::new(&gpu, &rows, decoder.rope())?;
        let pass = Pass { gpu: &gpu, weights: &weights, batch: &batch };
        let (layers, last) = forward(&pass, decoder, trained)?;
        let at: Vec<u32> =
            targets.places.iter().map(|(row, position)| (batch.starts[*row] + position) as u32).collect();
        let n_targets = at.len();
        let at = gpu.upload(&at)?;
        let hidden = pass.normed(last.at(0), weights.norm, Some((at.at(0), n_targets)))?;
        let head = Head::of(&gpu, decoder, targets.slice.clone(), 1.0 / targets.temperature)?;
        let chosen: Vec<u32> = targets.ids.iter().map(|id| id - targets.slice.start as u32).collect();
        let chosen = gpu.upload(&chosen)?;
        let scores = head.scores(&gpu, &hidden, (chosen.at(0), n_targets))?;
        let part = |at: usize| scores.narrow(0, at, 1)?.squeeze(0)?.copy();
        let (log_probs, entropies) = (part(0)?, part(1)?);
        let ids = rows.concat();
        let (slice_start, decoder, layers) = (targets.slice.start, decoder.clone(), Mutex::new(layers));
        let tape = trained.then_some(Self {
            gpu,
            decoder,
            weights,
            batch,
            ids,
            slice_start,
            head,
            at,
            targets: chosen,
            n_targets,
            last,
            hidden,
            scores,
            layers,
        });
        Ok((log_probs, entropies, tape))
    }

    /// Adds the gradient of every variable. What the forward pass kept is used up: a second call makes it again.
    pub(crate) fn backward(
        &self,
        by_log_probs: &Tensor,
        by_entropies: Option<&Tensor>,
        gradients: &mut Gradients,
    ) -> Result<()> {
        let gpu = &self.gpu;
        let sums = self.sums(gradients)?;
        let tied = self.decoder.config().tie_word_embeddings;
        let by_log_probs = by_log_probs.contiguous()?;
        let by_entropies = by_entropies.map(Tensor::contiguous).transpose()?;
        let asked = Asked {
            by_log_probs: gpu.address(&by_log_probs)?,
            by_entropies: by_entropies.as_ref().map_or(Ok(0), |tensor| gpu.address(tensor))?,
        };
        let hidden = self.weights.sizes.hidden;
        let to_head = sums.at(if tied { EMBEDDING } else { HEAD })? + (4 * self.slice_start * hidden) as u64;
        let scored =
            Scored { hidden: &self.hidden, scores: &self.scores, targets: self.targets.at(0), n: self.n_targets };
        let to_hidden = self.head.leave(gpu, scored, asked, to_head)?;
        let pass = Pass { gpu, weights: &self.weights, batch: &self.batch };
        let mut to = gpu.words(pass.n() * hidden)?;
        gpu.zero(&mut to)?;
        let places = Some((self.at.at(0), self.n_targets));
        let norm = (self.last.at(0), self.weights.norm);
        pass.unnormed(norm, places, to_hidden.at(0), (to.at(0), sums.at(NORM)?))?;
        drop(to_hidden);
        let mut layers = std::mem::take(&mut *self.layers.lock().unwrap_or_else(PoisonError::into_inner));
        if layers.is_empty() {
            layers = forward(&pass, &self.decoder, true)?.0;
        }
        for (index, weights) in self.weights.layers.iter().enumerate().rev() {
            let Some(Kept { input, made }) = layers.pop() else { continue };
            let made = match made {
                Some(made) => made,
                None => pass.layer(weights, &input)?.0,
            };
            pass.leave((index, weights), (&input, made), &to, &sums)?;
        }
        self.add_embedded(&to, &sums)
    }

    /// A tensor for each parameter's gradient, among those that there are.
    fn sums(&self, gradients: &mut Gradients) -> Result<Sums<'_>> {
        let mut tensors = BTreeMap::new();
        for (name, var) in self.decoder.params().iter() {
            tensors.insert(name.to_string(), gradients.sum_of(name, var)?);
        }
        Ok(Sums { gpu: &self.gpu, tensors })
    }

    fn add_embedded(&self, to: &Buffer, sums: &Sums<'_>) -> Result<()> {
        let (ids, first, order) = readers(&self.ids);
        let extent = Extent::new((ids.len(), 1, 1), TOKEN_THREADS);
        let gpu = &self.gpu;
        let (ids, first, order) = (gpu.upload(&ids)?, gpu.upload(&first)?, gpu.upload(&order)?);
        let (sum, to, width) = (sums.at(EMBEDDING)?, to.at(0), self.weights.sizes.hidden as i32);
        let (ids, first, order) = (ids.at(0), first.at(0), order.at(0));
        Ok(gpu.launch("embed_back", extent, &[&sum, &to, &ids, &first, &order, &width])?)
    }
}

/// What each layer read and, where it is kept, made; and what the last one gave. Nothing is kept of a decoder that is not
/// trained.
fn forward(pass: &Pass<'_>, decoder: &Decoder, trained: bool) -> Result<(Vec<Kept>, Buffer)> {
    let keeps_all = trained && !decoder.recomputes_layers();
    let mut layers = Vec::new();
    let mut x = pass.embedded()?;
    for layer in &pass.weights.layers {
        let (made, out) = pass.layer(layer, &x)?;
        let input = std::mem::replace(&mut x, out);
        if trained {
            layers.push(Kept { input, made: keeps_all.then_some(made) });
        }
    }
    Ok((layers, x))
}

/// The share of free memory that a pass may take.
const SHARE: f64 = 0.85;

/// How many rows of so many tokens a pass forward and back has memory for, beside the weights' copies and gradients.
pub(crate) fn rows_that_fit(decoder: &Decoder, tokens: usize, slice: usize) -> Result<usize> {
    let gpu = Gpu::of(decoder.embedding())?;
    let (sizes, kind) = (Sizes::of(decoder), Kind::from(decoder.compute()));
    let trained = decoder.params().n_elements();
    // A layer's projections, what was attended to, gate and up; its input, the stream behind attention, log-sum-exps.
    let made = kind.bytes() * (sizes.qkv() + sizes.queries() + 2 * sizes.gated) + 4 * (sizes.hidden + sizes.heads);
    let input = 4 * sizes.hidden;
    let kept = match (trained > 0, decoder.recomputes_layers()) {
        (false, _) => 0,
        (true, true) => input,
        (true, false) => input + made,
    };
    // What passes on the way back beside one layer's: gradients by all of it, and norms and activations made again.
    let passing = made + kind.bytes() * (2 * sizes.hidden + sizes.qkv() + sizes.queries() + sizes.gated) + 2 * input;
    let row = tokens * (kept * decoder.layers().len() + passing);
    let fixed = 4 * trained + kind.bytes() * (decoder.n_elements() + slice * sizes.hidden);
    let head = CHUNK_BYTES * (4 + kind.bytes()) / 4;
    let left = (SHARE * gpu.free_bytes()? as f64) as usize;
    let rows = left.saturating_sub(fixed + head) / row.max(1);
    match rows {
        0 => Err(Error::config(format!(
            "a pass over one row of {tokens} tokens takes {:.2} GB and the card has {:.2} GB left; take smaller images, \
             or keep one layer's activations at a time (--recompute-layers) where that is not done yet",
            (row + fixed + head) as f64 / 1e9,
            left as f64 / 1e9
        ))),
        rows => Ok(rows),
    }
}
