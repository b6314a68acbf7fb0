//! The sampling law of text: everything that decides which distribution a token is drawn from, and when a row ends.

use grpo::{Error, Result};
use serde::{Deserialize, Serialize};

use crate::sampling::ScoredAs;
use crate::sampling::Shaping;

/// How tokens are drawn, in the order in which it applies: temperature, top-k, top-p, min-p.
///
/// ```
/// use grpo_policies::text_lm::TextLaw;
/// assert_eq!(TextLaw::default().max_new_tokens, 256);
/// assert!(TextLaw { top_p: 0.9, ..TextLaw::default() }.check_trainable().is_err());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TextLaw {
    /// Logits are divided by it.
    pub temperature: f32,
    /// Only the most likely `top_k` tokens remain; all where absent.
    pub top_k: Option<usize>,
    /// Only the most likely tokens that together reach this probability remain; 1 keeps all.
    pub top_p: f32,
    /// Only tokens of at least this share of the likeliest one's probability remain; 0 keeps all.
    pub min_p: f32,
    /// The likeliest token is always taken.
    pub greedy: bool,
    /// A completion that has not ended by itself is cut off after so many tokens.
    pub max_new_tokens: usize,
    /// Which log-probabilities are trained.
    pub scored_as: ScoredAs,
}

impl Default for TextLaw {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: None,
            top_p: 1.0,
            min_p: 0.0,
            greedy: false,
            max_new_tokens: 256,
            scored_as: ScoredAs::Law,
        }
    }
}

impl TextLaw {
    pub(super) fn shaping(&self) -> Shaping {
        Shaping {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            greedy: self.greedy,
        }
    }

    /// Whether truncation makes it another law than the model's at its temperature.
    pub fn is_shaped(&self) -> bool {
        self.shaping().truncates()
    }

    /// Refuses numbers that cannot be meant.
    pub fn check(&self) -> Result<()> {
        self.shaping().check()?;
        match self.max_new_tokens {
            0 => Err(Error::config("max_new_tokens is 0; give at least 1, the end of the text alone is one token")),
            _ => Ok(()),
        }
    }

    /// Refuses to train on a law that replay cannot score exactly, unless the config asks for it.
    pub fn check_trainable(&self) -> Result<()> {
        self.check()?;
        if self.greedy {
            return Err(Error::config("greedy is true: every sample of a group would be the same; set it to false"));
        }
        if self.is_shaped() && self.scored_as == ScoredAs::Law {
            return Err(Error::config(format!(
                "top_k {:?}, top_p {} and min_p {} cannot be scored exactly; sample without them, or set scored_as = \
                 \"conditional\" and watch sampling/sampling_logp_difference",
                self.top_k, self.top_p, self.min_p
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn laws_that_cannot_be_meant_or_scored_are_refused() {
        let plain = TextLaw::default();
        for (law, message) in [
            (TextLaw { temperature: 0.0, ..plain }, "temperature is 0"),
            (TextLaw { max_new_tokens: 0, ..plain }, "max_new_tokens is 0"),
            (TextLaw { top_k: Some(0), ..plain }, "top_k is 0"),
            (TextLaw { top_k: Some(5), ..plain }, "top_k Some(5)"),
            (TextLaw { min_p: 0.1, ..plain }, "scored_as = \"conditional\""),
            (TextLaw { greedy: true, scored_as: ScoredAs::Conditional, ..plain }, "greedy is true"),
        ] {
            let error = law.check_trainable().unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
        let conditional = TextLaw { top_p: 0.9, scored_as: ScoredAs::Conditional, ..plain };
        assert!(conditional.check_trainable().is_ok());
        assert!(TextLaw { temperature: 0.7, ..plain }.check_trainable().is_ok());
    }

    #[test]
    fn unknown_keys_of_a_law_are_refused() {
        let law: TextLaw = serde_json::from_str(r#"{"temperature": 0.7, "scored_as": "conditional"}"#).unwrap();
        assert_eq!((law.temperature, law.scored_as), (0.7, ScoredAs::Conditional));
        assert!(serde_json::from_str::<TextLaw>(r#"{"guidance": 2}"#).is_err());
    }
}
