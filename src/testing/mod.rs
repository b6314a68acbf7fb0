//! For your own tests: a toy policy whose every probability can be computed by hand, and checks of what you implement.

mod check;

pub use check::{PolicyReport, check_policy, check_reward};

use candle_core::{D, Device, IndexOp, Tensor, Var};

use crate::{BoxError, Completion, LogProbs, Params, Policy, Prompt, Request, Result};

/// Writes words of a fixed length over the first letters of the alphabet; each position has its own softmax, `[T, V]`.
///
/// It ignores the prompt, starts uniform, and is the smallest complete [`Policy`].
pub struct ToyPolicy {
    logits: Var,
}

impl ToyPolicy {
    /// Words of `length` letters out of the first `n_letters` (at most 26).
    pub fn new(n_letters: usize, length: usize) -> Result<Self> {
        if !(2..=26).contains(&n_letters) || length == 0 {
            return Err(crate::Error::config(format!(
                "the toy has {n_letters} letters and length {length}; it takes 2 to 26 letters and a positive length"
            )));
        }
        Ok(Self {
            logits: Var::from_tensor(&Tensor::zeros((length, n_letters), candle_core::DType::F32, &Device::Cpu)?)?,
        })
    }

    /// A copy that later training of this one does not move: a reference.
    pub fn copy(&self) -> Result<Self> {
        Ok(Self { logits: Var::from_tensor(&self.logits.as_tensor().copy()?)? })
    }

    /// The log of the softmax of every position, `[T, V]`, differentiable.
    pub fn log_softmax(&self) -> Result<Tensor> {
        let logits = self.logits.as_tensor();
        Ok(logits.broadcast_sub(&logits.log_sum_exp(D::Minus1)?.unsqueeze(D::Minus1)?)?)
    }
}

impl Policy for ToyPolicy {
    type Sample = String;
    type Trace = Vec<u32>;

    fn sample(&self, requests: &[Request<'_>]) -> Result<Vec<Completion<Self>>, BoxError> {
        let log_probs: Vec<Vec<f32>> = self.log_softmax()?.to_vec2()?;
        let complete = |request: &Request<'_>| {
            let trace: Vec<u32> = log_probs
                .iter()
                .enumerate()
                .map(|(position, row)| pick(row, request.seed.fold(position as u64).uniform()))
                .collect();
            Completion {
                sample: trace.iter().map(|&id| char::from(b'a' + id as u8)).collect(),
                log_probs: trace.iter().zip(&log_probs).map(|(&id, row)| row[id as usize]).collect(),
                trace,
            }
        };
        Ok(requests.iter().map(complete).collect())
    }

    fn log_probs(&self, batch: &[(&Prompt, &Vec<u32>)]) -> Result<LogProbs, BoxError> {
        let (length, _) = self.logits.dims2()?;
        let rows = self.log_softmax()?;
        let mut values = Vec::with_capacity(batch.len());
        for (_, trace) in batch {
            let ids = Tensor::from_slice(trace, (length, 1), &Device::Cpu)?;
            values.push(rows.gather(&ids, 1)?.reshape((1, length))?);
        }
        let values = Tensor::cat(&values, 0)?;
        let mask = values.ones_like()?.detach();
        let entropy = (rows.exp()? * rows)?.sum(1)?.neg()?.reshape((1, length))?.repeat((batch.len(), 1))?;
        Ok(LogProbs::new(values, mask)?.with_entropy(entropy)?)
    }

    fn params(&self) -> Params {
        Params::new([("logits".to_string(), self.logits.clone())]).unwrap_or_default()
    }
}

fn pick(log_probs: &[f32], uniform: f64) -> u32 {
    let mut cumulative = 0.0;
    for (id, log_prob) in log_probs.iter().enumerate() {
        cumulative += f64::from(*log_prob).exp();
        if uniform < cumulative {
            return id as u32;
        }
    }
    log_probs.len().saturating_sub(1) as u32
}

/// The toy's probability of one letter at one position, for tests that watch it learn.
pub fn probability_of(policy: &ToyPolicy, position: usize, letter: usize) -> Result<f32> {
    Ok(policy.log_softmax()?.i((position, letter))?.exp()?.to_scalar()?)
}
