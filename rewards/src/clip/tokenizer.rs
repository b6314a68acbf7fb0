//! CLIP's byte-pair tokens (Radford et al., 2021), as open_clip computes them.
//!
//! A text is first repaired as ftfy does it: mojibake, curly quotes, ligatures, control characters, composed accents.
//! Deviations, counted in rewards/tests/clip.rs:
//! 1. Rare mojibake (text that was read as Mac Roman, code page 437 or Windows-1251, or twice) is repaired differently.
//! 2. U+0345, a mark under Greek vowels, is no letter here; Python's case folding makes it one.
//! 3. A control character or a code point that is none, written as its number (`&#1;`), stays; Python leaves it out.

use grpo::{Error, Result};

use crate::onnx::caught;

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
    /// let ids = grpo_rewards::clip::Tokenizer::new().ids("a red circle")?;
    /// assert_eq!(ids[..6], [49406, 320, 736, 7117, 49407, 0]);
    /// # Ok::<(), grpo::Error>(())
    /// ```
    pub fn ids(&self, text: &str) -> Result<[i64; CONTEXT]> {
        caught(|| self.encoded(text)).map_err(|panic| {
            Error::config(format!(
                "the text `{text}` cannot be read: its parser gave up in a panic ({panic}); reword it"
            ))
        })
    }

    fn encoded(&self, text: &str) -> [i64; CONTEXT] {
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

/// Repaired, HTML entities decoded twice, white space joined, lower case.
fn clean(text: &str) -> String {
    // Lines are repaired one by one, and a longer one than this is cut, which must not happen within a character.
    let config = plsfix::TextFixerConfig { max_decode_length: i32::MAX, ..Default::default() };
    let repaired = plsfix::fix_text(&without_terminal_escapes(text), Some(&config));
    let once = htmlize::unescape(&*repaired);
    let twice = htmlize::unescape(&*once);
    let words: Vec<&str> = twice.split_whitespace().collect();
    words.join(" ").to_lowercase()
}

/// Without colours and cursor movements, of which plsfix takes the first character only.
fn without_terminal_escapes(text: &str) -> String {
    let mut pieces = text.split("\u{1b}[");
    let mut kept = pieces.next().unwrap_or_default().to_string();
    for piece in pieces {
        let rest = piece.trim_start_matches(|c: char| c.is_ascii_digit() || c == ';');
        match rest.strip_prefix(|c: char| c.is_ascii_alphabetic()) {
            Some(rest) => kept.push_str(rest),
            None => kept.extend(["\u{1b}[", piece]),
        }
    }
    kept
}
