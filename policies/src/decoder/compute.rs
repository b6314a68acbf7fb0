//! What a decoder computes in.

use super::Decoder;

/// The type of numbers that activations and products have; weights, statistics and gradients are f32 in both.
///
/// It counts where the decoder runs on kernels of its own, which is on CUDA without adapters. The CPU computes in f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compute {
    /// Every number has 32 bits: many times slower on a card, for checking.
    F32,
    /// bf16 on tensor cores, from weights of f32.
    #[default]
    Bf16,
}

impl Decoder {
    /// Computes in this type from now on, where it has a choice: see [`Compute`].
    #[must_use]
    pub fn with_compute(self, compute: Compute) -> Self {
        Self { compute, ..self }
    }

    /// What activations are computed in on a card.
    pub fn compute(&self) -> Compute {
        self.compute
    }

    /// How far log-probs that are replayed may be from sampled ones: in bf16 a product's sums are rounded to three digits,
    /// in another order where a row is decoded token by token.
    pub(crate) fn replay_tolerance(&self) -> f32 {
        if self.compute == Compute::Bf16 && self.on_card() { 0.5 } else { 1e-2 }
    }

    /// Whether the kernels of [`crate::cuda`] serve this decoder.
    pub(crate) fn on_card(&self) -> bool {
        #[cfg(feature = "cuda")]
        let on_card = crate::cuda::serves(self);
        #[cfg(not(feature = "cuda"))]
        let on_card = false;
        on_card && !self.below_adapters
    }
}
