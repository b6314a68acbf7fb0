//! The sampling law: everything that decides which distribution a token is drawn from.

use grpo::{Error, Result};
use serde::{Deserialize, Serialize};

/// Which log-probabilities are trained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScoredAs {
    /// Those of the law itself; a law that replay cannot differentiate exactly is refused.
    #[default]
    Law,
    /// Those of the conditional model at the law's temperature, while guidance and truncation shape the samples.
    ///
    /// Ratios are then no longer those of the behaviour; the difference is logged at every step as
    /// `sampling/sampling_logp_difference`.
    Conditional,
}

/// How codes are drawn, in the order in which it applies: guidance, temperature, top-k, top-p.
///
/// Sampling is restricted to the visual ids: the log-softmax runs over the codebook alone, in sampling and replay
/// alike. (The original lets text ids through and clamps them to code 0 when decoding.)
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Law {
    /// Logits are divided by it.
    pub temperature: f32,
    /// Only the most likely `top_k` codes remain; all where absent.
    pub top_k: Option<usize>,
    /// Only the most likely codes that together reach this probability remain; 1 keeps all.
    pub top_p: f32,
    /// Scale `s` of classifier-free guidance, `u + s·(c − u)` of log-softmaxes; 1 is none.
    pub guidance: f32,
    /// The prompt of the unconditional branch `u`; the trained null row where absent.
    pub negative_prompt: Option<String>,
    /// Put before the caption, as in SimpleAR's "A photo of ".
    pub prefix: String,
    /// Which log-probabilities are trained.
    pub scored_as: ScoredAs,
}

impl Default for Law {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: None,
            top_p: 1.0,
            guidance: 1.0,
            negative_prompt: None,
            prefix: String::new(),
            scored_as: ScoredAs::Law,
        }
    }
}

impl Law {
    /// Whether guidance or truncation makes it another law than the conditional model's at its temperature.
    pub fn is_shaped(&self) -> bool {
        self.guidance != 1.0 || self.top_k.is_some() || self.top_p < 1.0
    }

    /// Refuses numbers that cannot be meant.
    pub fn check(&self) -> Result<()> {
        if !(self.temperature > 0.0 && self.temperature.is_finite()) {
            return Err(Error::config(format!(
                "temperature is {}; give a positive number, 1 in the paper",
                self.temperature
            )));
        }
        if self.top_k == Some(0) {
            return Err(Error::config("top_k is 0; give at least 1, or leave it out to keep all codes"));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(Error::config(format!("top_p is {}; give a number in (0, 1], 1 keeps all codes", self.top_p)));
        }
        if !(self.guidance >= 0.0 && self.guidance.is_finite()) {
            return Err(Error::config(format!(
                "guidance is {}; give 1 for none, 6 in SimpleAR's evaluations",
                self.guidance
            )));
        }
        Ok(())
    }

    /// Refuses to train on a law that replay cannot score exactly, unless the config asks for it.
    pub fn check_trainable(&self) -> Result<()> {
        self.check()?;
        if self.is_shaped() && self.scored_as == ScoredAs::Law {
            return Err(Error::config(format!(
                "guidance {}, top_k {:?} and top_p {} cannot be scored exactly; sample without them, or set scored_as = \"conditional\" \
                 and watch sampling/sampling_logp_difference",
                self.guidance, self.top_k, self.top_p
            )));
        }
        Ok(())
    }
}

/// A code drawn from a law, and its log-probability under it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Draw {
    pub(super) code: u32,
    pub(super) log_prob: f32,
}

/// Draws one code: `conditional` and `unconditional` are logits over the codebook, `uniform` is in `[0, 1)`.
pub(super) fn draw(law: &Law, conditional: &[f32], unconditional: Option<&[f32]>, uniform: f64) -> Draw {
    let mut scores = match unconditional {
        None => conditional.to_vec(),
        Some(unconditional) => guided(conditional, unconditional, law.guidance),
    };
    for score in &mut scores {
        *score /= law.temperature;
    }
    if law.top_k.is_some() || law.top_p < 1.0 {
        truncate(&mut scores, law.top_k, law.top_p);
    }
    let normaliser = log_sum_exp(&scores);
    let code = inverse_cdf(&scores, normaliser, uniform);
    Draw { code: code as u32, log_prob: (f64::from(scores[code]) - normaliser) as f32 }
}

/// `u + s·(c − u)` of the two log-softmaxes (SimpleAR's `CFGLogits`).
fn guided(conditional: &[f32], unconditional: &[f32], scale: f32) -> Vec<f32> {
    let (c_sum, u_sum) = (log_sum_exp(conditional) as f32, log_sum_exp(unconditional) as f32);
    let blend = |(c, u): (&f32, &f32)| {
        let (c, u) = (c - c_sum, u - u_sum);
        u + scale * (c - u)
    };
    conditional.iter().zip(unconditional).map(blend).collect()
}

/// Leaves the codes of top-k and then of top-p; ties at the border fall to the smaller code.
fn truncate(scores: &mut [f32], top_k: Option<usize>, top_p: f32) {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    let mut kept = top_k.unwrap_or(scores.len()).min(scores.len());
    if top_p < 1.0 {
        let remaining: Vec<f32> = order[..kept].iter().map(|&code| scores[code]).collect();
        let normaliser = log_sum_exp(&remaining);
        let mut mass = 0.0;
        let reaches = remaining.iter().position(|&score| {
            mass += (f64::from(score) - normaliser).exp();
            mass >= f64::from(top_p)
        });
        kept = reaches.map_or(kept, |last| last + 1);
    }
    for &code in &order[kept..] {
        scores[code] = f32::NEG_INFINITY;
    }
}

/// The logarithm of the sum of exponentials, in f64 and in the order of the codes.
fn log_sum_exp(scores: &[f32]) -> f64 {
    let top = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = scores.iter().map(|&score| f64::from(score - top).exp()).sum();
    f64::from(top) + sum.ln()
}

/// The code in whose interval of the cumulative distribution `uniform` falls.
fn inverse_cdf(scores: &[f32], normaliser: f64, uniform: f64) -> usize {
    let mut cumulative = 0.0;
    let mut last = 0;
    for (code, &score) in scores.iter().enumerate() {
        let probability = (f64::from(score) - normaliser).exp();
        if probability > 0.0 {
            cumulative += probability;
            last = code;
        }
        if uniform < cumulative {
            return code;
        }
    }
    // Rounding can leave the sum a hair below a draw close to 1.
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 4] = [1.0, 3.0, 2.0, 0.0];

    fn drawn(law: &Law, unconditional: Option<&[f32]>) -> Vec<f64> {
        let n = 20_000;
        let mut counts = vec![0.0; LOGITS.len()];
        for i in 0..n {
            let draw = draw(law, &LOGITS, unconditional, (f64::from(i) + 0.5) / f64::from(n));
            counts[draw.code as usize] += 1.0 / f64::from(n);
        }
        counts
    }

    fn check(law: &Law, unconditional: Option<&[f32]>, expected: [f64; 4]) {
        for (got, expected) in drawn(law, unconditional).iter().zip(expected) {
            assert!((got - expected).abs() < 1e-3, "{law:?}: {got} is not {expected}");
        }
    }

    /// Expected values by NumPy 2.4: softmax of the logits after each law by its definition.
    #[test]
    fn frequencies_are_the_laws() {
        check(&Law::default(), None, [0.087_144, 0.643_914, 0.236_883, 0.032_059]);
        check(&Law { temperature: 0.5, ..Law::default() }, None, [0.015_842, 0.864_955, 0.117_059, 0.002_144]);
    }

    #[test]
    fn truncation_keeps_the_likeliest() {
        let two = [0.0, 0.731_059, 0.268_941, 0.0];
        check(&Law { top_k: Some(2), ..Law::default() }, None, two);
        check(&Law { top_p: 0.7, ..Law::default() }, None, two);
        check(&Law { top_p: 0.1, ..Law::default() }, None, [0.0, 1.0, 0.0, 0.0]);
    }

    #[test]
    fn guidance_of_one_is_none_and_of_more_moves_away_from_the_unconditional() {
        let plain = drawn(&Law::default(), None);
        let flat = [0.0; 4];
        assert_eq!(plain, drawn(&Law::default(), Some(&flat)));
        // Against a flat branch, scale 2 is temperature 1/2.
        let guided = Law { guidance: 2.0, ..Law::default() };
        assert_eq!(drawn(&guided, Some(&flat)), drawn(&Law { temperature: 0.5, ..Law::default() }, None));
    }

    #[test]
    fn the_log_prob_is_of_the_law_that_drew() {
        let law = Law { top_k: Some(2), temperature: 0.5, ..Law::default() };
        let draw = draw(&law, &LOGITS, None, 0.99);
        // Codes 1 and 2 remain at 6 and 4: log(e^4 / (e^6 + e^4)).
        assert_eq!(draw.code, 2);
        assert!((draw.log_prob + 2.126_928).abs() < 1e-5, "{}", draw.log_prob);
    }

    #[test]
    fn laws_that_cannot_be_scored_are_refused_for_training() {
        let error = Law { guidance: 6.0, ..Law::default() }.check_trainable().unwrap_err().to_string();
        assert!(error.contains("guidance 6") && error.contains("scored_as = \"conditional\""), "{error}");
        assert!(Law { guidance: 6.0, scored_as: ScoredAs::Conditional, ..Law::default() }.check_trainable().is_ok());
        assert!(Law { temperature: 0.7, ..Law::default() }.check_trainable().is_ok());
    }
}
