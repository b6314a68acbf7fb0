//! How much memory training takes, phase by phase, before it takes it.
//!
//! Counts what lives at each phase's peak on the CPU in f32: weights and what belongs to each of them, caches and
//! activations by the shapes of the rows, and the largest transient copy. Small things (prompts, pictures, code) are not
//! counted.

use super::SimpleAr;
use crate::decoder::DecoderConfig;

/// Bytes of a number.
const F32: u64 = 4;
/// Tokens that the head scores together, and parts of their hidden states' gradient (see the decoder's head).
const SCORED_ROWS: u64 = 512;
const HEAD_PARTS: u64 = 32;

/// What one step works on at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Rows sampled together.
    pub rollout_rows: usize,
    /// Tokens of the longest prompt.
    pub prompt_tokens: usize,
    /// Rows of one backward pass.
    pub backward_rows: usize,
    /// Backward passes that run side by side or one after the other in a step.
    pub n_parts: usize,
    /// Backward passes that run side by side.
    pub parts_at_once: usize,
    /// Whether there is a reference.
    pub reference: bool,
}

/// Bytes that live at the peak of each phase, and those that always do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryEstimate {
    /// The policy's weights.
    pub weights: u64,
    /// The reference's, where they are not shared.
    pub reference: u64,
    /// Both moments of AdamW.
    pub optimizer: u64,
    /// The visual tokenizer's weights.
    pub tokenizer: u64,
    /// The peak while images are sampled and decoded.
    pub rollout: u64,
    /// The peak while tokens are scored under the reference.
    pub reference_pass: u64,
    /// The peak of forward, backward and optimiser.
    pub update: u64,
}

impl SimpleAr {
    /// What a step of training will hold.
    pub fn memory(&self, work: &Workload) -> MemoryEstimate {
        let config = self.decoder.config();
        let trainable = F32 * grpo::Policy::params(self).n_elements() as u64;
        let weights = F32 * (self.decoder.n_elements() as u64);
        // Under adapters the reference is the base itself.
        let shared = trainable < weights;
        let reference = if work.reference && !shared { weights } else { 0 };
        let tokenizer = F32 * self.cosmos.n_elements() as u64;
        let optimizer = 2 * trainable;
        let always = weights + reference + optimizer + tokenizer;
        let tokens = work.backward_rows as u64 * (work.prompt_tokens + self.n_tokens()) as u64;
        let slice = self.choices(self.law.vocabulary).len() as u64;
        let sizes = Sizes { config, slice };
        let at_once = (work.parts_at_once.min(work.n_parts)) as u64;
        let activations = match (shared, self.decoder.recomputes_layers()) {
            // Below adapters a layer is candle's graph: values and, on the way back, their gradients, which die as it goes.
            (true, true) => sizes.inputs(tokens) + 3 * sizes.layer(tokens),
            (true, false) => sizes.layer(tokens) * config.num_hidden_layers as u64 + 2 * sizes.layer(tokens),
            (false, true) => sizes.inputs(tokens) + sizes.kept(tokens) + sizes.workspace(tokens),
            (false, false) => sizes.kept(tokens) * config.num_hidden_layers as u64 + sizes.workspace(tokens),
        };
        let part = activations + sizes.scored(tokens);
        // Parts side by side have gradients of their own, which are added to the sum of those before.
        let gradients = trainable * if at_once > 1 { 1 + at_once } else { 1 };
        let embedding = if shared { 0 } else { sizes.embedding() };
        MemoryEstimate {
            weights,
            reference,
            optimizer,
            tokenizer,
            rollout: always + self.rollout_bytes(work, &sizes),
            reference_pass: always
                + if work.reference {
                    at_once * (sizes.kept(tokens) + sizes.workspace(tokens) + sizes.scored(tokens))
                } else {
                    0
                },
            update: always + gradients + (at_once * part).max(embedding),
        }
    }

    /// What sampling adds: packed weights, caches and laws of both branches of guidance.
    fn rollout_bytes(&self, work: &Workload, sizes: &Sizes<'_>) -> u64 {
        let config = sizes.config;
        let branches = if self.law.guidance == 1.0 { 1 } else { 2 };
        let rows = branches * work.rollout_rows as u64;
        let capacity = (work.prompt_tokens + self.n_tokens()) as u64;
        let head_dim = config.head_dim() as u64;
        let cache = F32 * 2 * (config.num_key_value_heads * config.num_hidden_layers) as u64 * head_dim * capacity;
        let body = self.decoder.n_elements() as u64 - config.vocab_size as u64 * config.hidden_size as u64;
        let packed = F32 * body + sizes.embedding() + F32 * sizes.slice * config.hidden_size as u64;
        // Logits of each branch, which threads may make in strips first, and laws: a window has one for each of its
        // tokens and for each draft.
        let window = self.window as u64;
        let laws = F32 * sizes.slice * (2 * branches * window + 2 * window - 1);
        packed + rows * cache + work.rollout_rows as u64 * laws
    }
}

/// Bytes by the shapes of a decoder.
struct Sizes<'a> {
    config: &'a DecoderConfig,
    /// Ids that compete.
    slice: u64,
}

impl Sizes<'_> {
    fn embedding(&self) -> u64 {
        F32 * self.config.vocab_size as u64 * self.config.hidden_size as u64
    }

    /// What each layer reads, and the last norm.
    fn inputs(&self, tokens: u64) -> u64 {
        F32 * tokens * self.config.hidden_size as u64 * (self.config.num_hidden_layers as u64 + 1)
    }

    /// What one layer makes of so many tokens.
    fn layer(&self, tokens: u64) -> u64 {
        let (config, heads) = (self.config, self.projected());
        // Two norms, two sums and what was attended to; the projections; gate, up and their product.
        F32 * tokens * (5 * config.hidden_size + heads + 3 * config.intermediate_size) as u64
    }

    /// What is kept of a layer that goes back by hand: its input, the projections, what was attended to, the sum behind
    /// that, gate and up.
    fn kept(&self, tokens: u64) -> u64 {
        F32 * tokens * (3 * self.config.hidden_size + self.projected() + 2 * self.config.intermediate_size) as u64
    }

    /// What all layers of a pass use one after another: a layer's weights, packed, and the gradients by what it made,
    /// with its activations, packed.
    fn workspace(&self, tokens: u64) -> u64 {
        let config = self.config;
        let weights = config.hidden_size * (config.hidden_size + self.projected() + 3 * config.intermediate_size);
        let passing = 5 * config.hidden_size + self.projected() + 4 * config.intermediate_size;
        F32 * (weights as u64 + tokens * passing as u64)
    }

    /// Numbers of a token's queries, keys and values.
    fn projected(&self) -> usize {
        (self.config.num_attention_heads + 2 * self.config.num_key_value_heads) * self.config.head_dim()
    }

    /// What the head holds beside its gradient: hidden states with theirs, and parts of a chunk's.
    fn scored(&self, tokens: u64) -> u64 {
        F32 * (2 * tokens + HEAD_PARTS * SCORED_ROWS.min(tokens)) * self.config.hidden_size as u64
    }
}
