//! The operations beside the compositions of candle's that they stand in for, for the benches of `experiments`.
//!
//! Behind the feature `benches`, which no other crate asks for: the operations stay out of the crate's interface.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{Result, Tensor, bail};

use crate::ops::attention::Attention;
use crate::ops::head::Choice;
use crate::ops::linear::linear_bias;
use crate::ops::rms_norm::{self, rms_norm};
use crate::ops::rope::{NO_IMAGE, Rope};
use crate::ops::swiglu::{self, swiglu};

/// An operation with the numbers that it has beside its operands.
pub struct Operation(Kind);

enum Kind {
    RmsNorm,
    SwiGlu,
    Linear,
    Attention(Attention),
    LogProbs(Choice),
}

const EPS: f64 = 1e-6;

impl Operation {
    /// RMSNorm of `x`, `[.., h]`, by a weight, `[h]`.
    pub fn rms_norm() -> Self {
        Self(Kind::RmsNorm)
    }

    /// SwiGLU of gate and up side by side, `[.., 2f]`.
    pub fn swiglu() -> Self {
        Self(Kind::SwiGlu)
    }

    /// `x · Wᵀ + bias` of `[n, k]`, `[m, k]` and `[m]`.
    pub fn linear() -> Self {
        Self(Kind::Linear)
    }

    /// Rotary positions and causal attention, of queries, keys and values side by side, `[B, L, (h + 2 kv) · d]`, in full
    /// rows of one length.
    pub fn attention((heads, kv_heads, head_dim): (usize, usize, usize), (rows, length): (usize, usize)) -> Self {
        let rope = Arc::new(Rope::new(head_dim, 1e6, length));
        let (lengths, image_starts) = (vec![length; rows].into(), vec![NO_IMAGE; rows].into());
        Self(Kind::Attention(Attention { heads, kv_heads, head_dim, rope, lengths, image_starts }))
    }

    /// Head, log-softmax over a slice of the vocabulary and gather of targets within it, of hidden states, `[n, h]`, and
    /// the head, `[vocabulary, h]`.
    pub fn log_probs(slice: Range<usize>, targets: Vec<u32>) -> Self {
        Self(Kind::LogProbs(Choice { slice, targets, temperature: 1.0 }))
    }

    /// The operation as the decoder runs it in a graph: on the CPU in f32 our own, forward and backward.
    pub fn fused(&self, operands: &[Tensor]) -> Result<Tensor> {
        match (&self.0, operands) {
            (Kind::RmsNorm, [x, weight]) => rms_norm(x, weight, EPS),
            (Kind::SwiGlu, [gate_up]) => swiglu(gate_up),
            (Kind::Linear, [x, weight, bias]) => linear_bias(x, weight, bias),
            (Kind::Attention(plan), [qkv]) => plan.apply(qkv),
            (Kind::LogProbs(choice), [hidden, head]) => Ok(choice.log_probs(hidden, head)?.0),
            _ => bail!("{} operands; see what the operation is of", operands.len()),
        }
    }

    /// The same out of candle's differentiable operations: the oracle of the tests.
    pub fn composite(&self, operands: &[Tensor]) -> Result<Tensor> {
        match (&self.0, operands) {
            (Kind::RmsNorm, [x, weight]) => rms_norm::composite(x, weight, EPS),
            (Kind::SwiGlu, [gate_up]) => swiglu::composite(gate_up),
            (Kind::Linear, [x, weight, bias]) => x.matmul(&weight.t()?)?.broadcast_add(bias),
            (Kind::Attention(plan), [qkv]) => plan.composite(qkv),
            (Kind::LogProbs(choice), [hidden, head]) => Ok(choice.composite(hidden, head)?.0),
            _ => bail!("{} operands; see what the operation is of", operands.len()),
        }
    }
}
