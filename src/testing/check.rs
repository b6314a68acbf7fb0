//! Conformance: what every policy and every reward must hold to, as one call in a test.

use serde_json::Value;

use crate::{Completion, Error, LogProbs, Policy, Prompt, Request, Result, Reward, Scoring, Seed, self_check};

/// f32 sums in another order differ by less; a wrong mask, position or neighbour by more.
const MAX_LOG_PROB_DIFFERENCE: f32 = 1e-3;
/// The same for scores, relative to those above 1.
const MAX_SCORE_DIFFERENCE: f32 = 1e-4;
/// Samples drawn of each prompt.
const DRAWS: u64 = 2;

/// What [`check_policy`] saw.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct PolicyReport {
    /// The largest `|log p replayed − log p sampled|`, in nats; `None` where the policy does not claim to replay its law.
    pub replay_difference: Option<f32>,
    /// Choices sampled.
    pub n_choices: usize,
    /// Trainable tensors, each of which got a gradient.
    pub n_params: usize,
}

/// Draws two samples of each prompt and holds the policy to its contract:
///
/// 1. the same request gives the same sample, whatever its neighbours, their number and their order;
/// 2. `log_probs` has one row for each trace and one unmasked value for each choice, the same alone and among others, and
///    where the policy claims [`Scoring::Exact`] those it was sampled with;
/// 3. log-probs are not positive, entropies not negative, and both finite;
/// 4. every trainable parameter gets a gradient.
///
/// The law of sampling is the policy's: call it once for each law that the policy claims. Give prompts of different
/// lengths, so that rows are padded.
///
/// ```
/// use grpo::Prompt;
/// use grpo::testing::{ToyPolicy, check_policy};
/// let report = check_policy(&ToyPolicy::new(5, 3)?, &[Prompt::new("short"), Prompt::new("a longer one")])?;
/// assert!(report.replay_difference < Some(1e-6));
/// # Ok::<(), grpo::Error>(())
/// ```
pub fn check_policy<P: Policy>(policy: &P, prompts: &[Prompt]) -> Result<PolicyReport> {
    let seed = Seed::new(0).named("check_policy");
    let requests: Vec<Request<'_>> = prompts
        .iter()
        .enumerate()
        .flat_map(|(idx, prompt)| (0..DRAWS).map(move |draw| (idx, draw, prompt)))
        .map(|(idx, draw, prompt)| Request { prompt, seed: seed.fold(idx as u64).fold(draw) })
        .collect();
    if requests.is_empty() {
        return Err(Error::config("there is no prompt to check the policy on; give at least one"));
    }
    let completions = sampled(policy, &requests)?;
    check_draws(policy, &requests, &completions)?;
    let whole: Vec<&Prompt> = requests.iter().map(|request| request.prompt).collect();
    let log_probs = self_check::replay(policy, &whole, &completions)?;
    let values = check_values(&log_probs, &completions)?;
    let mut replay_difference = None;
    for (row, completion) in completions.iter().enumerate() {
        let alone = self_check::replay(policy, &whole[row..=row], &completions[row..=row])?;
        let alone = check_values(&alone, &completions[row..=row])?;
        compare(row, "replayed alone", &alone[0], "among others", &values[row])?;
        if policy.scoring() == Scoring::Exact {
            let difference = compare(row, "sampled", &completion.log_probs, "replayed", &values[row])?;
            replay_difference = Some(difference.max(replay_difference.unwrap_or(0.0)));
        }
    }
    self_check::every_parameter_learns(policy, &log_probs, seed)?;
    let n_choices = completions.iter().map(|completion| completion.log_probs.len()).sum();
    Ok(PolicyReport { replay_difference, n_choices, n_params: policy.params().len() })
}

fn sampled<P: Policy>(policy: &P, requests: &[Request<'_>]) -> Result<Vec<Completion<P>>> {
    let completions = policy.sample(requests).map_err(|source| Error::policy("sample", source))?;
    match completions.len() == requests.len() {
        true => Ok(completions),
        false => Err(fault(format!("{} requests gave {} completions", requests.len(), completions.len()))),
    }
}

/// Each request again: alone, and with all others in the opposite order.
fn check_draws<P: Policy>(policy: &P, requests: &[Request<'_>], completions: &[Completion<P>]) -> Result<()> {
    let backwards: Vec<Request<'_>> = requests.iter().rev().copied().collect();
    let mut reversed = sampled(policy, &backwards)?;
    reversed.reverse();
    for (row, (request, completion)) in requests.iter().zip(completions).enumerate() {
        let alone = sampled(policy, std::slice::from_ref(request))?;
        let others = [("alone", alone.first()), ("in the opposite order", reversed.get(row))];
        for (how, other) in others.into_iter().filter_map(|(how, other)| Some((how, other?))) {
            if trace(other)? != trace(completion)? {
                return Err(fault(format!(
                    "request {row} drew another sample {how}; draw position t of a request from its own seed.fold(t)"
                )));
            }
            compare(row, "sampled", &completion.log_probs, how, &other.log_probs)?;
        }
    }
    Ok(())
}

fn trace<P: Policy>(completion: &Completion<P>) -> Result<Value> {
    serde_json::to_value(&completion.trace)
        .map_err(|error| fault(format!("a trace cannot be written as JSON: {error}")))
}

/// The unmasked log-probs of each row, after what must hold for each of them.
fn check_values<P: Policy>(log_probs: &LogProbs, completions: &[Completion<P>]) -> Result<Vec<Vec<f32>>> {
    let (values, mask) = (log_probs.rows()?, log_probs.mask().to_vec2::<f32>()?);
    let entropy = log_probs.entropy().map(|entropy| entropy.to_vec2::<f32>()).transpose()?;
    if values.len() != completions.len() {
        return Err(fault(format!("{} traces were replayed as {} rows", completions.len(), values.len())));
    }
    let mut rows = Vec::with_capacity(values.len());
    for (row, completion) in completions.iter().enumerate() {
        let places: Vec<usize> = (0..values[row].len()).filter(|&at| mask[row][at] > 0.0).collect();
        let n_choices = completion.log_probs.len();
        if !places.iter().copied().eq(0..n_choices) {
            let n = places.len();
            return Err(fault(format!(
                "row {row} has {n_choices} choices; its mask marks {n}, which must be the first ones"
            )));
        }
        let entropies = entropy.as_ref().map(|entropy| &entropy[row]);
        let wrong = |&&at: &&usize| {
            let log_prob_is_fine = values[row][at].is_finite() && values[row][at] <= MAX_LOG_PROB_DIFFERENCE;
            let entropy = entropies.map_or(0.0, |entropies| entropies[at]);
            !(log_prob_is_fine && entropy.is_finite() && entropy >= -MAX_LOG_PROB_DIFFERENCE)
        };
        if let Some(&at) = places.iter().find(wrong) {
            let entropy = entropies.map(|entropies| entropies[at]);
            return Err(fault(format!(
                "row {row} has log-prob {} and entropy {entropy:?} at choice {at}; the first is at most 0, the second at least",
                values[row][at]
            )));
        }
        rows.push(places.into_iter().map(|at| values[row][at]).collect());
    }
    Ok(rows)
}

/// The largest difference of two rows of log-probs.
fn compare(row: usize, a_is: &str, a: &[f32], b_is: &str, b: &[f32]) -> Result<f32> {
    let mut largest = 0f32;
    for (choice, (a, b)) in a.iter().zip(b).enumerate() {
        let difference = (a - b).abs();
        // Written so that NaN fails too.
        let agrees = difference <= MAX_LOG_PROB_DIFFERENCE;
        if !agrees {
            return Err(fault(format!("request {row}, choice {choice}: log-prob {a} {a_is}, {b} {b_is}")));
        }
        largest = largest.max(difference);
    }
    match a.len() == b.len() {
        true => Ok(largest),
        false => Err(fault(format!("request {row}: {} log-probs {a_is}, {} {b_is}", a.len(), b.len()))),
    }
}

fn fault(message: String) -> Error {
    Error::Contract { what: "policy".into(), message }
}

/// Scores a batch in several ways and holds the reward to its contract:
///
/// 1. one finite score for each sample, and none for no sample;
/// 2. a sample's score is the same alone, among others, and in the opposite order.
///
/// Rows whose prompt the reward does not apply to are left out, as a [`crate::RewardSet`] does.
///
/// ```
/// use grpo::testing::check_reward;
/// use grpo::{Prompt, reward_fn};
/// let length = reward_fn("length", |_, text: &String| Ok(text.len() as f32));
/// let (prompt, samples) = (Prompt::new("say it"), ["a".to_string(), "bcd".to_string()]);
/// check_reward(&length, &[(&prompt, &samples[0]), (&prompt, &samples[1])])?;
/// # Ok::<(), grpo::Error>(())
/// ```
pub fn check_reward<S>(reward: &(impl Reward<S> + ?Sized), batch: &[(&Prompt, &S)]) -> Result<()> {
    let name = reward.name();
    let fault = |message: String| Error::Contract { what: format!("reward `{name}`"), message };
    if name.is_empty() {
        return Err(fault("its name is empty; curves and captions need one".into()));
    }
    let applies: Vec<(&Prompt, &S)> = batch.iter().copied().filter(|(prompt, _)| reward.applies_to(prompt)).collect();
    if applies.is_empty() {
        return Err(Error::config(format!(
            "reward `{name}` applies to no prompt of the batch; give some that it judges"
        )));
    }
    let score = |rows: &[(&Prompt, &S)]| -> Result<Vec<f32>> {
        let scores = reward.score_batch(rows).map_err(|source| Error::reward(name, source))?;
        if scores.len() != rows.len() {
            return Err(fault(format!("{} samples were given {} scores", rows.len(), scores.len())));
        }
        match scores.iter().find(|score| !score.is_finite()) {
            Some(score) => Err(fault(format!("a score is {score}; give a finite one, or `false` from applies_to"))),
            None => Ok(scores),
        }
    };
    score(&[])?;
    let whole = score(&applies)?;
    let backwards: Vec<(&Prompt, &S)> = applies.iter().rev().copied().collect();
    let mut reversed = score(&backwards)?;
    reversed.reverse();
    for (row, &(prompt, sample)) in applies.iter().enumerate() {
        let single = reward.score(prompt, sample).map_err(|source| Error::reward(name, source))?;
        let alone = score(&[(prompt, sample)])?[0];
        for (how, other) in [("by `score`", single), ("alone", alone), ("in the opposite order", reversed[row])] {
            let agrees = (other - whole[row]).abs() <= MAX_SCORE_DIFFERENCE * whole[row].abs().max(1.0);
            if !agrees {
                let text = &prompt.text;
                return Err(fault(format!("row {row}, prompt `{text}`: {} in the batch, {other} {how}", whole[row])));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::testing::ToyPolicy;
    use crate::{BoxError, Params, reward_fn};

    /// A toy with one fault.
    struct Faulty {
        toy: ToyPolicy,
        unused: Var,
        fault: Fault,
    }

    #[derive(PartialEq)]
    enum Fault {
        None,
        NeighboursShow,
        BatchShows,
        LongMask,
        PositiveLogProbs,
        OtherLaw,
        UnusedParameter,
    }

    impl Policy for Faulty {
        type Sample = String;
        type Trace = Vec<u32>;

        fn sample(&self, requests: &[Request<'_>]) -> Result<Vec<Completion<Self>>, BoxError> {
            let n = requests.len() as u64;
            let moved: Vec<Request<'_>> = requests
                .iter()
                .map(|request| match self.fault {
                    Fault::NeighboursShow => Request { seed: request.seed.fold(n), ..*request },
                    _ => *request,
                })
                .collect();
            Ok(self.toy.sample(&moved)?.into_iter().map(Completion::of).collect())
        }

        fn log_probs(&self, batch: &[(&Prompt, &Vec<u32>)]) -> Result<LogProbs, BoxError> {
            let log_probs = self.toy.log_probs(batch)?;
            let (values, mask) = (log_probs.values(), log_probs.mask());
            Ok(match self.fault {
                Fault::BatchShows => LogProbs::new((values - 0.005 * batch.len() as f64)?, mask.clone())?,
                Fault::LongMask => LogProbs::new(values.clone(), (mask * 0.0)?)?,
                Fault::PositiveLogProbs => LogProbs::new((values * 0.0)?.affine(1.0, 0.009)?, mask.clone())?,
                Fault::OtherLaw => LogProbs::new((values * 1.001)?, mask.clone())?,
                _ => log_probs,
            })
        }

        fn params(&self) -> Params {
            let toy = self.toy.params();
            let unused = (self.fault == Fault::UnusedParameter).then(|| ("unused".to_string(), self.unused.clone()));
            Params::new(toy.iter().map(|(name, var)| (name.to_string(), var.clone())).chain(unused)).unwrap()
        }

        fn scoring(&self) -> Scoring {
            let exact = [Fault::None, Fault::OtherLaw, Fault::UnusedParameter].contains(&self.fault);
            if exact { Scoring::Exact } else { Scoring::Conditional }
        }
    }

    #[test]
    fn each_fault_of_a_policy_is_named() {
        let prompts = [Prompt::new("a"), Prompt::new("b")];
        let check = |fault| {
            let unused = Var::new(&[0f32], &Device::Cpu).unwrap();
            check_policy(&Faulty { toy: ToyPolicy::new(5, 3).unwrap(), unused, fault }, &prompts)
        };
        let error = |fault| check(fault).unwrap_err().to_string();
        let report = check(Fault::None).unwrap();
        assert_eq!((report.n_choices, report.n_params), (12, 1));
        assert!(error(Fault::NeighboursShow).contains("drew another sample alone"));
        assert!(error(Fault::BatchShows).contains("replayed alone"));
        assert!(error(Fault::LongMask).contains("has 3 choices; its mask marks 0"));
        assert!(error(Fault::PositiveLogProbs).contains("log-prob 0.009"));
        assert!(error(Fault::OtherLaw).contains("sampled") && error(Fault::OtherLaw).contains("replayed"));
        assert!(error(Fault::UnusedParameter).contains("1 of 2 trainable tensors get no gradient"));
    }

    /// A reward whose batch scores are spoilt by `spoil(row, n, score)`.
    struct Spoilt(fn(usize, usize, f32) -> Option<f32>);

    impl Reward<String> for Spoilt {
        fn name(&self) -> &str {
            "spoilt"
        }
        fn score(&self, _: &Prompt, text: &String) -> Result<f32, BoxError> {
            Ok(text.len() as f32)
        }
        fn score_batch(&self, batch: &[(&Prompt, &String)]) -> Result<Vec<f32>, BoxError> {
            let scores = batch.iter().enumerate();
            Ok(scores.filter_map(|(row, (_, text))| (self.0)(row, batch.len(), text.len() as f32)).collect())
        }
        fn applies_to(&self, prompt: &Prompt) -> bool {
            prompt.text != "other"
        }
    }

    #[test]
    fn each_fault_of_a_reward_is_named() {
        let (prompt, other) = (Prompt::new("a cat"), Prompt::new("other"));
        let texts = ["a".to_string(), "bcd".to_string(), "ef".to_string()];
        let batch: Vec<(&Prompt, &String)> =
            texts.iter().map(|text| (&prompt, text)).chain([(&other, &texts[0])]).collect();
        let error = |spoil| check_reward(&Spoilt(spoil), &batch).unwrap_err().to_string();
        assert!(check_reward(&Spoilt(|_, _, score| Some(score)), &batch).is_ok());
        assert!(error(|row, _, score| (row > 0).then_some(score)).contains("3 samples were given 2 scores"));
        assert!(error(|row, _, score| Some(if row == 1 { f32::NAN } else { score })).contains("a score is NaN"));
        assert!(error(|row, _, score| Some(score + row as f32)).contains("in the opposite order"));
        assert!(error(|_, n, score| Some(score / n as f32)).contains("by `score`"));
        assert!(
            check_reward(&Spoilt(|_, _, score| Some(score)), &batch[3..])
                .unwrap_err()
                .to_string()
                .contains("applies to no")
        );
        let constant = reward_fn("", |_: &Prompt, _: &String| Ok(0.0));
        assert!(check_reward(&constant, &batch).unwrap_err().to_string().contains("its name is empty"));
    }
}
