//! CLIP's byte-pair tokens (Radford et al., 2021), as open_clip computes them.
//!
//! Deviation: open_clip also repairs mojibake with `ftfy`; captions here are clean UTF-8, so that step is left out.

/// How many ids a text tower takes.
pub const CONTEXT: usize = 77;

/// Text to the ids of CLIP's text tower.
pub struct Tokenizer(instant_clip_tokenizer::Tokenizer);

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tokenizer")
    }
}

impl Default for Tokenizer {
    fn default() -> Self {
        Self::new()
    }
}

impl Tokenizer {
    /// With CLIP's own vocabulary of 49408 tokens.
    pub fn new() -> Self {
        Self(instant_clip_tokenizer::Tokenizer::new())
    }

    /// Start, tokens, end, and zeros up to [`CONTEXT`]; a longer text is cut and still ends with the end token.
    ///
    /// ```
    /// let ids = grpo_rewards::clip::Tokenizer::new().ids("a red circle");
    /// assert_eq!(ids[..6], [49406, 320, 736, 7117, 49407, 0]);
    /// ```
    pub fn ids(&self, text: &str) -> [i64; CONTEXT] {
        let mut tokens = vec![self.0.start_of_text()];
        self.0.encode(&clean(text), &mut tokens);
        tokens.truncate(CONTEXT - 1);
        tokens.push(self.0.end_of_text());
        let mut ids = [0; CONTEXT];
        for (id, token) in ids.iter_mut().zip(tokens) {
            *id = i64::from(token.to_u16());
        }
        ids
    }
}

/// HTML entities decoded twice, white space joined, lower case.
fn clean(text: &str) -> String {
    let once = html_escape::decode_html_entities(text);
    let twice = html_escape::decode_html_entities(&once);
    let words: Vec<&str> = twice.split_whitespace().collect();
    words.join(" ").to_lowercase()
}
