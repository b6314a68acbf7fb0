//! Captions to ids: a Hugging Face `tokenizer.json`, in front of whose end the visual ids begin.

use grpo::{Error, Result};
use serde_json::json;
use tokenizers::Tokenizer;

/// The special tokens that SimpleAR adds to its text tokenizer, in the order of their ids.
pub const SPECIAL_TOKENS: [&str; 7] = ["<|t2i|>", "<|i2t|>", "<|soi|>", "<|vtokens|>", "<|t2v|>", "<|v2t|>", "<|sov|>"];

const UNKNOWN: &str = "<|unk|>";

/// A text tokenizer that knows SimpleAR's special tokens.
pub struct TextTokenizer {
    tokenizer: Tokenizer,
    json: String,
    start: u32,
    image_start: u32,
    n_ids: u32,
}

impl TextTokenizer {
    /// Reads a `tokenizer.json`; the tokens of [`SPECIAL_TOKENS`] that SimpleAR uses must be in it.
    pub fn from_json(json: &str) -> Result<Self> {
        let tokenizer = Tokenizer::from_bytes(json.as_bytes())
            .map_err(|error| Error::config(format!("tokenizer.json: {error}; give a Hugging Face tokenizer file")))?;
        let special = |token: &str| {
            tokenizer.token_to_id(token).ok_or_else(|| {
                Error::config(format!(
                    "the tokenizer has no token `{token}`; use the one saved with a SimpleAR checkpoint"
                ))
            })
        };
        let (start, image_start) = (special("<|t2i|>")?, special("<|soi|>")?);
        let n_ids = tokenizer.get_vocab_size(true) as u32;
        Ok(Self { tokenizer, json: json.into(), start, image_start, n_ids })
    }

    /// One id a word, case folded, with the special tokens behind the words: the tokenizer of a small closed world.
    pub fn of_words<'a>(words: impl IntoIterator<Item = &'a str>) -> Result<Self> {
        let mut vocabulary = serde_json::Map::new();
        vocabulary.insert(UNKNOWN.into(), json!(0));
        for word in words {
            let id = vocabulary.len();
            vocabulary.entry(word.to_lowercase()).or_insert(json!(id));
        }
        let n_words = vocabulary.len();
        let added: Vec<_> = SPECIAL_TOKENS
            .iter()
            .enumerate()
            .map(|(at, token)| {
                json!({"id": n_words + at, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                       "normalized": false, "special": true})
            })
            .collect();
        let file = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
            "normalizer": {"type": "Lowercase"}, "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": null, "decoder": null,
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": UNKNOWN},
        });
        Self::from_json(&format!("{file:#}"))
    }

    /// The file it was read from.
    pub fn json(&self) -> &str {
        &self.json
    }

    /// How many ids the text has; the first visual id.
    pub fn n_ids(&self) -> u32 {
        self.n_ids
    }

    /// The id of `<|soi|>`, behind which an image begins.
    pub fn image_start(&self) -> u32 {
        self.image_start
    }

    /// `<|t2i|>` + caption + `<|soi|>`: what stands before the visual tokens.
    pub fn prompt(&self, caption: &str) -> Result<Vec<u32>> {
        let encoding = self
            .tokenizer
            .encode_fast(caption, false)
            .map_err(|error| Error::config(format!("caption `{caption}` cannot be tokenised: {error}")))?;
        let ids = encoding.get_ids().iter().copied();
        Ok(std::iter::once(self.start).chain(ids).chain([self.image_start]).collect())
    }

    /// `<|t2i|><|soi|>`: the row of condition dropout.
    pub fn null_prompt(&self) -> Vec<u32> {
        vec![self.start, self.image_start]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_come_before_the_special_tokens() {
        let tokenizer = TextTokenizer::of_words(["a", "red", "square", "red"]).unwrap();
        // <|unk|> 0, a 1, red 2, square 3, <|t2i|> 4, <|i2t|> 5, <|soi|> 6, … <|sov|> 10.
        assert_eq!(tokenizer.n_ids(), 11);
        assert_eq!(tokenizer.prompt("A red, round square").unwrap(), [4, 1, 2, 0, 0, 3, 6]);
        assert_eq!(tokenizer.null_prompt(), [4, 6]);
    }

    #[test]
    fn a_file_without_the_special_tokens_is_refused() {
        let json = r#"{"version":"1.0","model":{"type":"WordLevel","vocab":{"a":0},"unk_token":"a"}}"#;
        let error = TextTokenizer::from_json(json).err().unwrap().to_string();
        assert!(error.contains("no token `<|t2i|>`"), "{error}");
    }
}
