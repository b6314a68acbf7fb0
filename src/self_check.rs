//! What must hold before the first step: every parameter learns, and replay gives back what was sampled.

use candle_core::Tensor;

use crate::{
    Completion, Error, Gradients, LogProbs, LossGradient, Objective, Policy, Prompt, Request, Result, Scoring, Seed,
};

/// Refuses an objective that policy and reference cannot serve: a reference that is not there or cannot be moved, a
/// correction where sampler and scorer are one.
pub(crate) fn parts<P: Policy>(objective: &Objective, policy: &P, reference: Option<&P>) -> Result<()> {
    if objective.correction.is_some() && policy.scoring() == Scoring::Exact {
        return Err(Error::config(
            "objective.correction weighs the scorer's law over the sampler's, which this policy says are one; leave it out",
        ));
    }
    let Some(reference) = reference else {
        return match objective.needs_reference() {
            false => Ok(()),
            true => {
                Err(Error::config("objective.kl_weight is positive but there is no reference; give one or set it to 0"))
            }
        };
    };
    let (ours, theirs) = (policy.params(), reference.params());
    let same =
        ours.iter().map(|(name, var)| (name, var.dims())).eq(theirs.iter().map(|(name, var)| (name, var.dims())));
    match objective.reference_sync {
        Some(_) if !same => Err(Error::config(
            "objective.reference_sync moves the reference, whose parameters are not the policy's; give a trainable copy of \
             the policy and not a frozen one",
        )),
        _ => Ok(()),
    }
}

/// Refuses a policy that would train wrongly in silence.
///
/// 1. Every trainable tensor gets a gradient from the log-probs (some fused operations cut it without an error).
/// 2. Where the policy claims exact scoring, the ratio of the first samples is 1.
/// 3. Where the objective needs the entropy it is there and finite, and where it has a bonus it has a gradient.
pub(crate) fn before_training<P: Policy>(
    policy: &P,
    prompts: &[&Prompt],
    seed: Seed,
    objective: &Objective,
) -> Result<()> {
    let requests: Vec<Request<'_>> =
        prompts.iter().enumerate().map(|(row, prompt)| Request { prompt, seed: seed.fold(row as u64) }).collect();
    let completions = policy.sample(&requests).map_err(|source| Error::policy("sample", source))?;
    let log_probs = replay(policy, prompts, &completions)?;
    every_parameter_learns(policy, &log_probs, seed)?;
    if objective.needs_entropy() {
        check_entropy(policy, &log_probs, objective)?;
    }
    Ok(())
}

/// The log-probs of completions, equal to those they were sampled with where the policy claims so.
pub(crate) fn replay<P: Policy>(policy: &P, prompts: &[&Prompt], completions: &[Completion<P>]) -> Result<LogProbs> {
    let batch: Vec<(&Prompt, &P::Trace)> =
        prompts.iter().copied().zip(completions.iter().map(|completion| &completion.trace)).collect();
    let log_probs = policy.log_probs(&batch).map_err(|source| Error::policy("log_probs", source))?;
    if policy.scoring() == Scoring::Exact {
        let replayed = log_probs.rows()?;
        if replayed.len() != completions.len() {
            let message = format!("{} traces were replayed as {} rows", completions.len(), replayed.len());
            return Err(Error::SelfCheck(format!("{message}; log_probs must give one row for each trace, in order")));
        }
        for (completion, replayed) in completions.iter().zip(&replayed) {
            check_ratio(&completion.log_probs, replayed, policy.replay_tolerance())?;
        }
    }
    Ok(log_probs)
}

/// Refuses a policy with a parameter that the log-probs do not reach.
pub(crate) fn every_parameter_learns<P: Policy>(policy: &P, log_probs: &LogProbs, seed: Seed) -> Result<()> {
    let params = policy.params();
    if params.is_empty() {
        return Err(Error::SelfCheck("the policy has no trainable parameters; load it trainable".into()));
    }
    // Weights of both signs: a gradient of equal weights can cancel, as that of a softmax's sum does.
    let (n_rows, width) = log_probs.values().dims2()?;
    let mut draws = seed.named("weights").draws();
    let weights: Vec<f32> = (0..n_rows * width).map(|_| draws.normal() as f32).collect();
    let weights = Tensor::from_vec(weights, (n_rows, width), log_probs.values().device())?;
    let gradients = backward(policy, log_probs, &LossGradient::new(weights))?;
    let without: Vec<&str> = params.iter().map(|(name, _)| name).filter(|name| gradients.get(name).is_none()).collect();
    if without.is_empty() {
        return Ok(());
    }
    Err(Error::SelfCheck(format!(
        "{} of {} trainable tensors get no gradient from the log-probs: {}; an operation of the policy cuts it, or the tensor is not used",
        without.len(),
        params.len(),
        without.join(", ")
    )))
}

fn check_entropy<P: Policy>(policy: &P, log_probs: &LogProbs, objective: &Objective) -> Result<()> {
    let Some(entropy) = log_probs.entropy() else {
        return Err(Error::SelfCheck(
            "entropy_weight or top_entropy_share needs the entropy of each choice, which the policy does not give; add it \
             with LogProbs::with_entropy"
                .into(),
        ));
    };
    let values = (entropy.detach() * log_probs.mask())?.flatten_all()?.to_vec1::<f32>()?;
    if let Some(value) = values.iter().find(|value| !value.is_finite()) {
        return Err(Error::SelfCheck(format!(
            "the entropy of a choice is {value}; where p is 0, p·log p is 0 and not NaN"
        )));
    }
    if objective.entropy_weight == 0.0 {
        return Ok(());
    }
    // Growing weights: those that are equal would cancel at a law that is uniform.
    let n = entropy.elem_count();
    let weights: Vec<f32> = (0..n).map(|at| (at + 1) as f32 / n as f32).collect();
    let weights = Tensor::from_vec(weights, entropy.dims(), entropy.device())?;
    let gradient = LossGradient::new(log_probs.values().zeros_like()?.detach()).with_entropy(weights);
    let gradients = backward(policy, log_probs, &gradient)?;
    // A tensor of zeros may stand where nothing came through. At a law that is uniform by symmetry the gradient is 0 as
    // well, so only a policy whose entropy has no graph at all is refused.
    match entropy.track_op() || gradients.norm()? > 0.0 {
        true => Ok(()),
        false => Err(Error::SelfCheck("no parameter gets a gradient from the entropy; give it with its graph".into())),
    }
}

fn backward<P: Policy>(policy: &P, log_probs: &LogProbs, gradient: &LossGradient) -> Result<Gradients> {
    let mut gradients = Gradients::new();
    policy.backward(log_probs, gradient, &mut gradients).map_err(|source| Error::policy("backward", source))?;
    Ok(gradients)
}

/// Choices of which the mean difference says something that the largest does not.
const LEAST_FOR_MEAN: usize = 16;

/// Sampled and replayed log-probs may differ by rounding; a wrong mask, temperature or position differs by far more.
fn check_ratio(sampled: &[f32], replayed: &[f32], tolerance: f32) -> Result<()> {
    if replayed.len() < sampled.len() {
        let message = format!("{} choices were sampled and {} replayed", sampled.len(), replayed.len());
        return Err(Error::SelfCheck(format!("{message}; log_probs must score every choice of the trace")));
    }
    let mut sum = 0.0;
    for (choice, (&then, &now)) in sampled.iter().zip(replayed).enumerate() {
        sum += (now - then).abs();
        // Written so that NaN fails too.
        let agrees = (now - then).abs() <= tolerance;
        if !agrees {
            return Err(Error::SelfCheck(format!(
                "the first ratio is {:.4} at choice {choice} and must be 1: the sampled log-prob is {then}, the replayed one {now}; \
                 log_probs must replay the very law of sample (temperature, truncation, guidance, vocabulary, positions)",
                (now - then).exp()
            )));
        }
    }
    let mean = sum / sampled.len().max(1) as f32;
    if sampled.len() >= LEAST_FOR_MEAN && mean > tolerance / 10.0 {
        return Err(Error::SelfCheck(format!(
            "sampled and replayed log-probs differ by {mean:.4} in the mean over {} choices, which is more than rounding; \
             log_probs must replay the very law of sample (temperature, truncation, guidance, vocabulary, positions)",
            sampled.len()
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::check_ratio;

    #[test]
    fn a_law_that_is_a_little_off_shows_in_the_mean() {
        let check =
            |n: usize, off: f32| check_ratio(&vec![-1.0; n], &vec![off - 1.0; n], 1e-2).map_err(|e| e.to_string());
        assert!(check(16, 0.005).unwrap_err().contains("differ by 0.0050 in the mean over 16 choices"));
        assert!(check(16, 0.0005).is_ok() && check(15, 0.005).is_ok());
        assert!(check(1, 0.02).unwrap_err().contains("the first ratio is 1.0202"));
    }
}
