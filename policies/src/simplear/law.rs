//! The sampling law: everything that decides which distribution a token is drawn from.

use grpo::{Error, Result};
use serde::{Deserialize, Serialize};

use crate::sampling::{ScoredAs, Shaping};

/// Which ids compete for a place in the image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Vocabulary {
    /// The codebook alone, in sampling and replay alike.
    #[default]
    Visual,
    /// All ids, as in the original: one that is no code stands in the row as it is and is code 0 in the picture.
    Full,
}

/// How codes are drawn, in the order in which it applies: guidance, temperature, top-k, top-p, min-p.
///
/// ```
/// use grpo_policies::simplear::Law;
/// let law = Law::published();
/// assert_eq!((law.guidance, law.top_k), (6.0, None));
/// assert!(law.check_trainable().is_err(), "guidance is for looking at images, not for training on them");
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Law {
    /// Logits are divided by it.
    pub temperature: f32,
    /// Only the most likely `top_k` codes remain; all where absent.
    pub top_k: Option<usize>,
    /// Only the most likely codes that together reach this probability remain; 1 keeps all.
    pub top_p: f32,
    /// Only codes of at least this share of the likeliest one's probability remain; 0 keeps all.
    pub min_p: f32,
    /// The likeliest code is always taken.
    pub greedy: bool,
    /// Which ids compete.
    pub vocabulary: Vocabulary,
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
            min_p: 0.0,
            greedy: false,
            vocabulary: Vocabulary::Visual,
            guidance: 1.0,
            negative_prompt: None,
            prefix: String::new(),
            scored_as: ScoredAs::Law,
        }
    }
}

/// What the original's `generate.py` has its images move away from.
const PUBLISHED_NEGATIVE: &str = "An image of aerial view, overexposed, low quality, deformation, a poor composition, \
     bad hands, bad teeth, bad eyes, bad limbs, distortion";

impl Law {
    /// That of the original's `generate.py`, but for its top-k of 64,000, which keeps the whole codebook: guidance of 6
    /// against a negative prompt, temperature 1, and a prefix that the policy was fine-tuned with.
    pub fn published() -> Self {
        Self {
            guidance: 6.0,
            negative_prompt: Some(PUBLISHED_NEGATIVE.into()),
            prefix: "A highly realistic image of ".into(),
            ..Self::default()
        }
    }

    pub(super) fn shaping(&self) -> Shaping {
        Shaping {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            greedy: self.greedy,
        }
    }

    /// Whether guidance or truncation makes it another law than the conditional model's at its temperature.
    pub fn is_shaped(&self) -> bool {
        self.guidance != 1.0 || self.shaping().truncates()
    }

    /// Refuses numbers that cannot be meant.
    pub fn check(&self) -> Result<()> {
        self.shaping().check()?;
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
        if self.greedy {
            return Err(Error::config("greedy is true: every sample of a group would be the same; set it to false"));
        }
        if self.is_shaped() && self.scored_as == ScoredAs::Law {
            return Err(Error::config(format!(
                "guidance {}, top_k {:?}, top_p {} and min_p {} cannot be scored exactly; sample without them, or set \
                 scored_as = \"conditional\" and watch sampling/sampling_logp_difference",
                self.guidance, self.top_k, self.top_p, self.min_p
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn laws_that_cannot_be_scored_are_refused_for_training() {
        let error = Law { guidance: 6.0, ..Law::default() }.check_trainable().unwrap_err().to_string();
        assert!(error.contains("guidance 6") && error.contains("scored_as = \"conditional\""), "{error}");
        assert!(Law { guidance: 6.0, scored_as: ScoredAs::Conditional, ..Law::default() }.check_trainable().is_ok());
        assert!(Law { temperature: 0.7, ..Law::default() }.check_trainable().is_ok());
        let greedy = Law { greedy: true, scored_as: ScoredAs::Conditional, ..Law::default() };
        assert!(greedy.check_trainable().unwrap_err().to_string().contains("greedy is true"));
    }

    #[test]
    fn numbers_that_cannot_be_meant_are_refused() {
        for (law, message) in [
            (Law { temperature: 0.0, ..Law::default() }, "temperature is 0"),
            (Law { top_k: Some(0), ..Law::default() }, "top_k is 0"),
            (Law { top_p: 0.0, ..Law::default() }, "top_p is 0"),
            (Law { min_p: 1.5, ..Law::default() }, "min_p is 1.5"),
            (Law { guidance: f32::NAN, ..Law::default() }, "guidance is NaN"),
        ] {
            let error = law.check().unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }
}
