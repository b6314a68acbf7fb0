//! Text to ids and back: a Hugging Face `tokenizer.json`.

use grpo::{Error, Result};
use serde_json::json;

const UNKNOWN: &str = "<unk>";

/// The text tokenizer of a [`super::TextLm`].
///
/// ```
/// use grpo_policies::text_lm::Tokenizer;
/// let tokenizer = Tokenizer::of_words(["one", "and", "two"], &["<end>"])?;
/// let ids = tokenizer.ids("two and one<end>")?;
/// assert_eq!(ids, [3, 2, 1, 4]);
/// assert_eq!(tokenizer.text(&ids)?, "two and one");
/// # Ok::<(), grpo::Error>(())
/// ```
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    json: String,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    pub fn from_json(json: &str) -> Result<Self> {
        let inner = tokenizers::Tokenizer::from_bytes(json.as_bytes())
            .map_err(|error| Error::config(format!("tokenizer.json: {error}; give a Hugging Face tokenizer file")))?;
        Ok(Self { inner, json: json.into() })
    }

    /// One id a word between spaces, `<unk>` for others, and the special tokens behind the words: the tokenizer of a
    /// small closed world.
    pub fn of_words<'a>(words: impl IntoIterator<Item = &'a str>, special: &[&str]) -> Result<Self> {
        let mut vocabulary = serde_json::Map::new();
        vocabulary.insert(UNKNOWN.into(), json!(0));
        for word in words {
            let id = vocabulary.len();
            vocabulary.entry(word).or_insert(json!(id));
        }
        let n_words = vocabulary.len();
        let added = special.iter().enumerate().map(|(at, token)| {
            json!({"id": n_words + at, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        });
        let file = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added.collect::<Vec<_>>(),
            "normalizer": null, "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": UNKNOWN},
        });
        Self::from_json(&format!("{file:#}"))
    }

    /// The file it was read from.
    pub fn json(&self) -> &str {
        &self.json
    }

    /// One more than the greatest id.
    pub fn n_ids(&self) -> usize {
        self.inner.get_vocab(true).values().max().map_or(0, |id| *id as usize + 1)
    }

    /// The id of a token; `None` where it has none.
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The ids of a text as it is; names of special tokens within it become their single ids.
    pub fn ids(&self, text: &str) -> Result<Vec<u32>> {
        self.encode(text, false)
    }

    /// The ids of a text with what the tokenizer puts around one, as a token of its beginning.
    pub fn framed_ids(&self, text: &str) -> Result<Vec<u32>> {
        self.encode(text, true)
    }

    fn encode(&self, text: &str, framed: bool) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, framed).map_err(|error| {
            Error::config(format!("text `{text}` cannot be tokenised: {error}; see tokenizer.json"))
        })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of ids, without special tokens.
    pub fn text(&self, ids: &[u32]) -> Result<String> {
        self.inner
            .decode(ids, true)
            .map_err(|error| Error::config(format!("ids {ids:?} cannot be made text: {error}; see tokenizer.json")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_come_before_the_special_tokens_and_unknown_ones_are_one_id() {
        let tokenizer = Tokenizer::of_words(["a", "b", "a"], &["<s>", "<e>"]).unwrap();
        assert_eq!((tokenizer.n_ids(), tokenizer.id_of("<e>"), tokenizer.id_of("c")), (5, Some(4), None));
        assert_eq!(tokenizer.ids("<s>a zebra b<e>").unwrap(), [3, 1, 0, 2, 4]);
        // Ids behind the tokenizer's, which a padded embedding can draw, have no text.
        assert_eq!(tokenizer.text(&[3, 1, 99, 2, 4]).unwrap(), "a b");
    }

    #[test]
    fn what_is_no_tokenizer_file_is_refused() {
        let error = Tokenizer::from_json("{}").err().unwrap().to_string();
        assert!(error.starts_with("tokenizer.json: "), "{error}");
    }
}
