//! Captions to ids: a Hugging Face `tokenizer.json`, in front of whose end the visual ids begin.

use std::collections::{BTreeMap, BTreeSet};

use grpo::{Error, Result};
use serde_json::{Value, json};
use tokenizers::pre_tokenizers::whitespace::Whitespace;
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, Tokenizer};

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
        let n_ids = n_ids(&tokenizer)?;
        Ok(Self { tokenizer, json: json.into(), start, image_start, n_ids })
    }

    /// The tokenizer of a language model with [`SPECIAL_TOKENS`] behind its last id, as SimpleAR adds them.
    ///
    /// Also gives how many ids there were: the first of the new ones.
    pub fn extended(json: &str) -> Result<(Self, u32)> {
        let fault = |error: &dyn std::fmt::Display| Error::config(error.to_string());
        let tokenizer = Tokenizer::from_bytes(json.as_bytes())
            .map_err(|error| fault(&format!("{error}; give a Hugging Face tokenizer file")))?;
        if let Some(token) = SPECIAL_TOKENS.iter().find(|token| tokenizer.token_to_id(token).is_some()) {
            return Err(fault(&format!(
                "the tokenizer has the token `{token}` already; load it as a SimpleAR checkpoint, or give a language model"
            )));
        }
        let first = n_ids(&tokenizer)?;
        let mut file: Value = serde_json::from_str(json).map_err(|error| fault(&error))?;
        let Some(added) = file.get_mut("added_tokens").and_then(Value::as_array_mut) else {
            return Err(fault(&"the tokenizer has no list `added_tokens`; give a Hugging Face tokenizer file"));
        };
        added.extend(added_tokens(first));
        let extended = Self::from_json(&format!("{file:#}\n"))?;
        for (id, token) in (first..).zip(SPECIAL_TOKENS) {
            let got = extended.tokenizer.token_to_id(token);
            if got != Some(id) {
                return Err(fault(&format!("the token `{token}` got id {got:?} and not {id}; make the ids dense")));
            }
        }
        Ok((extended, first))
    }

    /// One id a word, case folded, with the special tokens behind the words: the tokenizer of a small closed world.
    pub fn of_words<'a>(words: impl IntoIterator<Item = &'a str>) -> Result<Self> {
        let mut vocabulary = serde_json::Map::new();
        vocabulary.insert(UNKNOWN.into(), json!(0));
        for word in words {
            let id = vocabulary.len();
            vocabulary.entry(word.to_lowercase()).or_insert(json!(id));
        }
        let added = added_tokens(vocabulary.len() as u32);
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

/// The words and signs that captions say at least `min_count` times, folded in case, in the order of their letters: what
/// [`TextTokenizer::of_words`] takes.
pub fn words(lines: impl IntoIterator<Item = Result<String>>, min_count: usize) -> Result<Vec<String>> {
    let mut counts = BTreeMap::<String, usize>::new();
    for line in lines {
        for word in split(&line?)? {
            *counts.entry(word).or_default() += 1;
        }
    }
    Ok(counts.into_iter().filter(|(_, count)| *count >= min_count).map(|(word, _)| word).collect())
}

/// The words of a text as the tokenizer of [`TextTokenizer::of_words`] parts them, folded in case as it folds them.
fn split(text: &str) -> Result<Vec<String>> {
    let folded: String = text.chars().flat_map(char::to_lowercase).collect();
    let mut parted = PreTokenizedString::from(folded);
    let fault = |error| Error::config(format!("caption `{text}` cannot be parted into words: {error}"));
    Whitespace {}.pre_tokenize(&mut parted).map_err(fault)?;
    let words = parted.get_splits(OffsetReferential::Normalized, OffsetType::Byte);
    Ok(words.into_iter().map(|(word, ..)| word.to_string()).collect())
}

/// The entries of [`SPECIAL_TOKENS`] in a tokenizer file, with ids from `first` on.
pub(super) fn added_tokens(first: u32) -> Vec<Value> {
    let entry = |(id, token): (u32, &str)| {
        json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    (first..).zip(SPECIAL_TOKENS).map(entry).collect()
}

/// How many ids a tokenizer has, which its highest must be the last of: visual ids begin behind both.
fn n_ids(tokenizer: &Tokenizer) -> Result<u32> {
    let vocabulary = tokenizer.get_vocab(true);
    let ids: BTreeSet<u32> = vocabulary.values().copied().collect();
    let highest = ids.last().copied().unwrap_or(0);
    if ids.len() != vocabulary.len() || ids.len() as u64 != u64::from(highest) + 1 {
        return Err(Error::config(format!(
            "the tokenizer has {} tokens with {} ids up to {highest}; give one whose ids are each used once, from 0 on",
            vocabulary.len(),
            ids.len()
        )));
    }
    Ok(ids.len() as u32)
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
    fn words_are_parted_as_the_tokenizer_parts_them() {
        let text = "Rosé wine: 3.5 Glasses, don't_spill -- ☕️!";
        let words = split(text).unwrap();
        let tokenizer = TextTokenizer::of_words(words.iter().map(String::as_str)).unwrap();
        let encoding = tokenizer.tokenizer.encode(text, false).unwrap();
        assert_eq!(encoding.get_tokens(), words);
        assert!(!encoding.get_ids().contains(&0), "{words:?}");
    }

    #[test]
    fn ids_that_leave_a_gap_are_refused() {
        let words = TextTokenizer::of_words(["a", "red"]).unwrap();
        let json = |id: u32| words.json().replace("\"red\": 2", &format!("\"red\": {id}"));
        assert_eq!(TextTokenizer::from_json(&json(2)).unwrap().n_ids(), 10);
        for (id, said) in [(1, "10 tokens with 9 ids up to 9"), (70, "10 tokens with 10 ids up to 70")] {
            let error = TextTokenizer::from_json(&json(id)).err().unwrap().to_string();
            assert!(error.contains(said) && error.contains("each used once"), "{error}");
        }
    }

    #[test]
    fn a_file_without_the_special_tokens_is_refused() {
        let json = r#"{"version":"1.0","model":{"type":"WordLevel","vocab":{"a":0},"unk_token":"a"}}"#;
        let error = TextTokenizer::from_json(json).err().unwrap().to_string();
        assert!(error.contains("no token `<|t2i|>`"), "{error}");
    }
}
