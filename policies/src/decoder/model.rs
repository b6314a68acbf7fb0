//! The decoder with its graph: forward over padded rows, log-probabilities of chosen tokens.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{Device, Tensor, Var};
use grpo::{Error, Params, Result, Seed};

use super::folder::on_device;
use super::lora::LoraTarget;
use super::weights::{self, Layer};
use super::{Compute, DecoderConfig, ImagePositions, LoraConfig, Snapshot};
use crate::ops::attention::Attention;
use crate::ops::head::Choice;
use crate::ops::linear::{linear, linear_bias, linear_residual};
use crate::ops::rms_norm::rms_norm;
use crate::ops::rope::{NO_IMAGE, Plane, Rope};
use crate::ops::swiglu::swiglu;

/// The name of the embedding's weights.
pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";

/// A Qwen2.5-shaped causal language model over one vocabulary.
///
/// ```
/// use grpo::Seed;
/// use grpo_policies::decoder::{Decoder, DecoderConfig};
/// let config = DecoderConfig { vocab_size: 50, num_hidden_layers: 1, ..DecoderConfig::default() };
/// let decoder = Decoder::init(config, Seed::new(1))?;
/// let hidden = decoder.forward(&[vec![1, 2, 3], vec![4]])?;
/// assert_eq!(hidden.dims(), [2, 3, 128]);
/// let at = decoder.hidden_at(&hidden, &[(0, 0), (0, 1)])?;
/// let (log_probs, entropy) = decoder.log_probs_of(&at, &[2, 3], 0..50, 1.0)?;
/// assert_eq!((log_probs.dims(), entropy.dims()), (&[2][..], &[2][..]));
/// # Ok::<(), grpo::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Decoder {
    pub(super) config: DecoderConfig,
    pub(super) tensors: BTreeMap<String, Tensor>,
    pub(super) params: Params,
    pub(super) embedding: Tensor,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: Tensor,
    pub(super) head: Tensor,
    pub(super) rope: Arc<Rope>,
    /// Whether the backward pass makes each layer again.
    pub(super) recompute: bool,
    /// What the layers' adapters are, where they have any.
    pub(super) lora: Option<LoraConfig>,
    /// What activations are computed in, on a card.
    pub(super) compute: Compute,
    /// Whether this is the base of adapters, which is compared with what candle's operations make of both.
    pub(super) below_adapters: bool,
}

impl Decoder {
    /// Fresh trainable weights on the CPU, a function of config and seed alone.
    pub fn init(config: DecoderConfig, seed: Seed) -> Result<Self> {
        config.check()?;
        let tensors = weights::draw(&config, seed)?;
        Self::from_tensors(config, tensors, true)
    }

    /// Weights by Hugging Face name, none missing, none unknown, each of its shape and finite.
    ///
    /// Computes on the device where the tensors lie. A decoder that is not `trainable` has no parameters.
    pub fn from_tensors(config: DecoderConfig, tensors: BTreeMap<String, Tensor>, trainable: bool) -> Result<Self> {
        config.check()?;
        let tensors = weights::checked(&config, tensors)?;
        if !trainable {
            return Self::assemble(config, tensors, Params::none());
        }
        let mut vars = BTreeMap::new();
        for (name, tensor) in tensors {
            vars.insert(name, Var::from_tensor(&tensor)?);
        }
        let tensors = vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
        Self::assemble(config, tensors, Params::new(vars)?)
    }

    /// The same with other weights.
    pub(super) fn with_tensors(&self, tensors: BTreeMap<String, Tensor>, params: Params) -> Result<Self> {
        let (rope, compute) = (self.rope.clone(), self.compute);
        Ok(Self { rope, compute, ..Self::assemble(self.config.clone(), tensors, params)? })
    }

    fn assemble(config: DecoderConfig, tensors: BTreeMap<String, Tensor>, params: Params) -> Result<Self> {
        let embedding = weights::find(&tensors, EMBEDDING)?;
        let head = match config.tie_word_embeddings {
            true => embedding.clone(),
            false => weights::find(&tensors, "lm_head.weight")?,
        };
        let layers = (0..config.num_hidden_layers).map(|layer| Layer::find(&tensors, layer)).collect::<Result<_>>()?;
        let rope = Rope::new(config.head_dim(), config.rope_theta, config.max_position_embeddings);
        let norm = weights::find(&tensors, "model.norm.weight")?;
        Ok(Self {
            config,
            tensors,
            params,
            embedding,
            layers,
            norm,
            head,
            rope: Arc::new(rope),
            recompute: false,
            lora: None,
            compute: Compute::default(),
            below_adapters: false,
        })
    }

    /// The same weights with the tokens of images numbered otherwise: a choice of pretraining.
    #[must_use]
    pub fn with_image_positions(mut self, image_positions: ImagePositions) -> Self {
        self.config.image_positions = image_positions;
        self
    }

    /// Images are `grid` rows and columns of tokens and begin behind the token `after_id`: the config says so from now on,
    /// and where it asks for two-dimensional positions images get them. Until this is told all positions are one line.
    #[must_use]
    pub fn with_image_grid(mut self, grid: (usize, usize), after_id: u32) -> Self {
        self.config.image_grid = Some(grid);
        let in_plane = self.config.image_positions == ImagePositions::Grid && grid.1 > 0;
        let plane = in_plane.then_some(Plane { columns: grid.1, after_id });
        if self.rope.plane() != plane {
            self.rope = Arc::new(Rope::clone(&self.rope).with_plane(plane));
        }
        self
    }

    /// The sizes.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// The trainable variables by Hugging Face name, or PEFT's where there are adapters; none where the decoder is
    /// frozen.
    pub fn params(&self) -> Params {
        self.params.clone()
    }

    /// The current weights by Hugging Face name, for saving; they follow training until they are copied.
    ///
    /// Adapters are not among them: see [`Decoder::merged_tensors`] and [`Decoder::save_adapter`].
    pub fn tensors(&self) -> BTreeMap<String, Tensor> {
        self.tensors.iter().map(|(name, tensor)| (name.clone(), tensor.detach())).collect()
    }

    /// How many numbers the weights hold together, trainable or not.
    pub fn n_elements(&self) -> usize {
        self.tensors.values().map(Tensor::elem_count).sum()
    }

    /// Where it computes.
    pub fn device(&self) -> &Device {
        self.embedding.device()
    }

    /// A copy of the weights that later training of this decoder does not change: a reference model.
    ///
    /// Below adapters nothing is trained: it is then the base itself, shared and without them.
    pub fn frozen(&self) -> Result<Self> {
        if self.lora.is_some() {
            return Ok(Self { below_adapters: true, ..self.base()? });
        }
        self.with_tensors(self.copied_tensors()?, Params::none())
    }

    /// A copy with variables of its own: a reference that is moved now and then, a second policy.
    ///
    /// Where there are adapters they are copied, and the base is shared.
    pub fn copy(&self) -> Result<Self> {
        if let Some(lora) = &self.lora {
            return self.copy_adapted(lora);
        }
        let copy = Self::from_tensors(self.config.clone(), self.copied_tensors()?, true)?;
        Ok(Self { rope: self.rope.clone(), recompute: self.recompute, compute: self.compute, ..copy })
    }

    /// The same weights on a device, with variables of their own where this decoder has any; adapters are merged.
    pub fn on_device(&self, device: &Device) -> Result<Self> {
        let tensors = if self.lora.is_some() { self.merged_tensors()? } else { self.tensors() };
        let trainable = !self.params.is_empty();
        let moved = Self::from_tensors(self.config.clone(), on_device(tensors, device)?, trainable)?;
        Ok(Self { rope: self.rope.clone(), recompute: self.recompute, compute: self.compute, ..moved })
    }

    fn copied_tensors(&self) -> Result<BTreeMap<String, Tensor>> {
        self.tensors.iter().map(|(name, tensor)| Ok((name.clone(), tensor.detach().copy()?))).collect()
    }

    /// The same weights without gradients, shared and not copied: later training shows.
    pub fn detached(&self) -> Result<Self> {
        match &self.lora {
            None => self.base(),
            Some(lora) => self.base()?.attach(lora.clone(), &self.adapters(), Params::none()),
        }
    }

    /// The weights of this moment, adapters merged in, packed for sampling from the vocabulary `slice`.
    pub fn snapshot(&self, slice: Range<usize>) -> Result<Snapshot> {
        if self.lora.is_none() {
            return Snapshot::new(self, slice);
        }
        Snapshot::new(&self.with_tensors(self.merged_tensors()?, Params::none())?, slice)
    }

    /// Hidden states after the last norm: `[B, L, H]` for rows padded on the right to the longest, `L`.
    ///
    /// Causal within each row; padding influences nothing, and what lies at padded positions means nothing.
    pub fn forward(&self, rows: &[impl AsRef<[u32]>]) -> Result<Tensor> {
        let (hidden, _) = self.forward_with(rows, |_, _| Ok(()))?;
        Ok(hidden)
    }

    /// As [`Decoder::forward`], showing each layer's projection of queries, keys and values to `see`.
    pub(super) fn forward_with(
        &self,
        rows: &[impl AsRef<[u32]>],
        mut see: impl FnMut(&Attention, &Tensor) -> Result<()>,
    ) -> Result<(Tensor, Attention)> {
        let (ids, lengths) = self.padded(rows)?;
        let attention = self.attention(lengths, rows);
        let mut x = self.embed(&ids)?.reshape((rows.len(), (), self.config.hidden_size))?;
        for layer in &self.layers {
            let qkv = self.project(layer, &x)?;
            see(&attention, &qkv)?;
            x = self.finish_layer(layer, &x, &attention.apply(&qkv)?)?;
        }
        Ok((rms_norm(&x, &self.norm, self.config.rms_norm_eps)?, attention))
    }

    /// The ids of rows padded on the right to the longest, and the rows' lengths.
    pub(super) fn padded(&self, rows: &[impl AsRef<[u32]>]) -> Result<(Vec<u32>, Vec<usize>)> {
        let lengths = self.checked_lengths(rows)?;
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let mut ids = Vec::with_capacity(rows.len() * longest);
        for row in rows {
            ids.extend_from_slice(row.as_ref());
            ids.resize(ids.len().next_multiple_of(longest), 0);
        }
        Ok((ids, lengths))
    }

    pub(super) fn attention(&self, lengths: Vec<usize>, rows: &[impl AsRef<[u32]>]) -> Attention {
        let image_starts = rows.iter().map(|row| self.rope.image_start(NO_IMAGE, row.as_ref(), 0)).collect();
        Attention {
            heads: self.config.num_attention_heads,
            kv_heads: self.config.num_key_value_heads,
            head_dim: self.config.head_dim(),
            rope: self.rope.clone(),
            lengths: lengths.into(),
            image_starts,
        }
    }

    /// Embeddings of ids that have been checked, `[n, H]`.
    pub(super) fn embed(&self, ids: &[u32]) -> Result<Tensor> {
        let ids = Tensor::from_slice(ids, ids.len(), self.device())?;
        Ok(self.embedding.index_select(&ids, 0)?)
    }

    /// Queries, keys and values of a layer, before rotation.
    pub(super) fn project(&self, layer: &Layer, x: &Tensor) -> Result<Tensor> {
        let normed = rms_norm(x, &layer.input_norm, self.config.rms_norm_eps)?;
        let (weight, bias) = (Tensor::cat(&layer.qkv, 0)?, Tensor::cat(&layer.qkv_bias, 0)?);
        let [query, key, value] = &layer.qkv;
        let parts = [(LoraTarget::Query, query), (LoraTarget::Key, key), (LoraTarget::Value, value)];
        layer.adapters.add(linear_bias(&normed, &weight, &bias)?, &normed, &parts)
    }

    /// The rest of a layer, given what its queries attended to.
    pub(super) fn finish_layer(&self, layer: &Layer, x: &Tensor, attended: &Tensor) -> Result<Tensor> {
        let adapters = &layer.adapters;
        let x = linear_residual(attended, &layer.out, x)?;
        let x = adapters.add(x, attended, &[(LoraTarget::Output, &layer.out)])?;
        let normed = rms_norm(&x, &layer.post_norm, self.config.rms_norm_eps)?;
        let [gate, up] = &layer.gate_up;
        let gate_up = linear(&normed, &Tensor::cat(&layer.gate_up, 0)?)?;
        let gate_up = adapters.add(gate_up, &normed, &[(LoraTarget::Gate, gate), (LoraTarget::Up, up)])?;
        let active = swiglu(&gate_up)?;
        adapters.add(linear_residual(&active, &layer.down, &x)?, &active, &[(LoraTarget::Down, &layer.down)])
    }

    /// The hidden states at `(row, position)` pairs, `[N, H]`: where a token's successor is chosen.
    pub fn hidden_at(&self, hidden: &Tensor, places: &[(usize, usize)]) -> Result<Tensor> {
        let (rows, length, width) = hidden.dims3()?;
        if let Some((row, position)) = places.iter().find(|(row, position)| *row >= rows || *position >= length) {
            return Err(Error::config(format!(
                "place ({row}, {position}) lies outside hidden states of {rows} rows and {length} positions"
            )));
        }
        let index: Vec<u32> = places.iter().map(|(row, position)| (row * length + position) as u32).collect();
        let index = Tensor::from_vec(index, places.len(), hidden.device())?;
        Ok(hidden.reshape((rows * length, width))?.index_select(&index, 0)?)
    }

    /// Log-probabilities of `targets` and entropies in nats of the law over the vocabulary `slice`, each `[N]`.
    ///
    /// `hidden` is `[N, H]`; targets are ids of the whole vocabulary within `slice`. Both have a gradient. Logits are
    /// made a chunk of rows at a time, and again in the backward pass.
    pub fn log_probs_of(
        &self,
        hidden: &Tensor,
        targets: &[u32],
        slice: Range<usize>,
        temperature: f32,
    ) -> Result<(Tensor, Tensor)> {
        let choice = Choice { slice, targets: targets.to_vec(), temperature };
        Ok(choice.log_probs(hidden, &self.head)?)
    }

    /// Logits of `slice` for each row of `hidden`, `[N, slice]`, with the graph; for small batches and tests.
    pub fn logits(&self, hidden: &Tensor, slice: Range<usize>) -> Result<Tensor> {
        Ok(linear(hidden, &self.head_rows(slice)?)?)
    }

    /// The rows of the head that belong to a slice of the vocabulary.
    pub(crate) fn head_rows(&self, slice: Range<usize>) -> Result<Tensor> {
        if slice.is_empty() || slice.end > self.config.vocab_size {
            return Err(Error::config(format!(
                "vocabulary slice {slice:?} of {} tokens; give a non-empty range within it",
                self.config.vocab_size
            )));
        }
        Ok(self.head.narrow(0, slice.start, slice.len())?)
    }

    pub(crate) fn layers(&self) -> &[Layer] {
        &self.layers
    }

    pub(crate) fn embedding(&self) -> &Tensor {
        &self.embedding
    }

    pub(super) fn head(&self) -> &Tensor {
        &self.head
    }

    pub(crate) fn norm(&self) -> &Tensor {
        &self.norm
    }

    pub(crate) fn rope(&self) -> &Arc<Rope> {
        &self.rope
    }

    /// Lengths of rows that are neither empty nor too long and hold known ids.
    pub(super) fn checked_lengths(&self, rows: &[impl AsRef<[u32]>]) -> Result<Vec<usize>> {
        let rows: Vec<&[u32]> = rows.iter().map(AsRef::as_ref).collect();
        self.config.check_ids(rows.iter().copied())?;
        Ok(rows.iter().map(|row| row.len()).collect())
    }
}

impl DecoderConfig {
    /// An error where there is no row, or one is empty, too long, or holds an unknown id.
    pub(super) fn check_ids<'a>(&self, rows: impl IntoIterator<Item = &'a [u32]>) -> Result<()> {
        let mut rows = rows.into_iter().enumerate().peekable();
        if rows.peek().is_none() {
            return Err(Error::config("no rows to decode; give at least one"));
        }
        for (index, row) in rows {
            let most = self.max_position_embeddings;
            if row.is_empty() || row.len() > most {
                return Err(Error::config(format!(
                    "row {index} has {} tokens; the decoder takes 1 to {most} (max_position_embeddings)",
                    row.len()
                )));
            }
            if let Some(id) = row.iter().find(|id| **id as usize >= self.vocab_size) {
                return Err(Error::config(format!(
                    "row {index} holds token {id}; the vocabulary has {} tokens",
                    self.vocab_size
                )));
            }
        }
        Ok(())
    }
}
