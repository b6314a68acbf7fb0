//! What must hold before the first step: every parameter learns, and replay gives back what was sampled.

use candle_core::Tensor;

use crate::{Error, Gradients, Policy, Prompt, Request, Result, Scoring, Seed};

/// Sampled and replayed log-probs may differ by rounding; a wrong mask, temperature or position differs by far more.
const MAX_DIFFERENCE: f32 = 1e-2;

/// Refuses a policy that would train wrongly in silence.
///
/// 1. Every trainable tensor gets a gradient from the log-probs (some fused operations cut it without an error).
/// 2. Where the policy claims exact scoring, the ratio of the first samples is 1.
pub(crate) fn before_training<P: Policy>(policy: &P, prompts: &[&Prompt], seed: Seed) -> Result<()> {
    let requests: Vec<Request<'_>> =
        prompts.iter().enumerate().map(|(row, prompt)| Request { prompt, seed: seed.fold(row as u64) }).collect();
    let completions = policy.sample(&requests).map_err(|source| Error::policy("sample", source))?;
    let batch: Vec<(&Prompt, &P::Trace)> =
        prompts.iter().copied().zip(completions.iter().map(|completion| &completion.trace)).collect();
    let log_probs = policy.log_probs(&batch).map_err(|source| Error::policy("log_probs", source))?;
    let params = policy.params();
    if params.is_empty() {
        return Err(Error::SelfCheck("the policy has no trainable parameters; load it trainable".into()));
    }

    if policy.scoring() == Scoring::Exact {
        let replayed = log_probs.rows()?;
        for (completion, replayed) in completions.iter().zip(&replayed) {
            check_ratio(&completion.log_probs, replayed)?;
        }
    }

    // Weights of both signs: a gradient of equal weights can cancel, as that of a softmax's sum does.
    let (n_rows, width) = log_probs.values().dims2()?;
    let mut draws = seed.named("weights").draws();
    let weights: Vec<f32> = (0..n_rows * width).map(|_| draws.normal() as f32).collect();
    let weights = Tensor::from_vec(weights, (n_rows, width), log_probs.values().device())?;
    let mut gradients = Gradients::new();
    policy.backward(&log_probs, &weights, &mut gradients).map_err(|source| Error::policy("backward", source))?;
    let without: Vec<&str> = params.iter().map(|(name, _)| name).filter(|name| gradients.get(name).is_none()).collect();
    if !without.is_empty() {
        return Err(Error::SelfCheck(format!(
            "{} of {} trainable tensors get no gradient from the log-probs: {}; an operation of the policy cuts it, or the tensor is not used",
            without.len(),
            params.len(),
            without.join(", ")
        )));
    }
    Ok(())
}

fn check_ratio(sampled: &[f32], replayed: &[f32]) -> Result<()> {
    if replayed.len() < sampled.len() {
        let message = format!("{} choices were sampled and {} replayed", sampled.len(), replayed.len());
        return Err(Error::SelfCheck(format!("{message}; log_probs must score every choice of the trace")));
    }
    for (choice, (&then, &now)) in sampled.iter().zip(replayed).enumerate() {
        // Written so that NaN fails too.
        let agrees = (now - then).abs() <= MAX_DIFFERENCE;
        if !agrees {
            return Err(Error::SelfCheck(format!(
                "the first ratio is {:.4} at choice {choice} and must be 1: the sampled log-prob is {then}, the replayed one {now}; \
                 log_probs must replay the very law of sample (temperature, truncation, guidance, vocabulary, positions)",
                (now - then).exp()
            )));
        }
    }
    Ok(())
}
