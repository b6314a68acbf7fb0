//! From a prompt's text to ids, mask and types.

use serde::{Deserialize, Serialize};

use grpo::{Error, Result};
use tokenizers::TruncationParams;

use crate::clip;
use crate::onnx::Folder;
use crate::onnx::guard::guarded;

/// Which tokens a network was trained on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Tokens {
    /// CLIP's: 77 ids, zeros behind the end.
    Clip,
    /// Those of a `tokenizer.json` of the Hugging Face library, with the special tokens it adds itself.
    File {
        /// The file, listed in `[files]`.
        file: String,
        /// How many ids a text is cut or padded to.
        length: usize,
        /// The id behind the end, whose mask and type are 0.
        pad_id: u32,
    },
}

/// A text as a network takes it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Tokenised {
    pub(super) ids: Vec<i64>,
    pub(super) mask: Vec<i64>,
    pub(super) types: Vec<i64>,
}

/// A tokenizer that is ready.
#[derive(Debug)]
pub(super) enum Tokenizer {
    Clip(clip::Tokenizer),
    File { inner: Box<tokenizers::Tokenizer>, source: std::path::PathBuf, length: usize, pad_id: u32 },
}

impl Tokens {
    pub(super) fn check(&self) -> Result<(), String> {
        match self {
            Self::File { length, .. } if !(4..=4096).contains(length) => {
                Err(format!("tokens have length {length}; give 4 to 4096"))
            }
            _ => Ok(()),
        }
    }

    /// How many ids a text has.
    pub(super) fn length(&self) -> usize {
        match self {
            Self::Clip => clip::CONTEXT,
            Self::File { length, .. } => *length,
        }
    }

    pub(super) fn open(&self, folder: &Folder) -> Result<Tokenizer> {
        let (file, length, pad_id) = match self {
            Self::Clip => return Ok(Tokenizer::Clip(clip::Tokenizer::new())),
            Self::File { file, length, pad_id } => (file, *length, *pad_id),
        };
        let source = folder.path_of(file);
        let bytes = folder.read(file)?;
        let fault = |error: tokenizers::Error| Error::file(&source, format!("not a tokenizer: {error}"));
        let inner = guarded(&source, || {
            let mut inner = tokenizers::Tokenizer::from_bytes(&bytes).map_err(fault)?;
            inner.with_padding(None);
            let truncation = TruncationParams { max_length: length, ..TruncationParams::default() };
            inner.with_truncation(Some(truncation)).map_err(fault)?;
            Ok(Box::new(inner))
        })?;
        Ok(Tokenizer::File { inner, source, length, pad_id })
    }
}

impl Tokenizer {
    pub(super) fn tokenise(&self, text: &str) -> Result<Tokenised> {
        let (inner, source, length, pad_id) = match self {
            Self::Clip(clip) => {
                let ids = clip.ids(text)?.to_vec();
                // The end token has the highest id, and only zeros follow the first one.
                let end = ids.iter().enumerate().max_by_key(|&(at, id)| (id, std::cmp::Reverse(at)));
                let n_tokens = end.map_or(0, |(at, _)| at + 1);
                let mask = (0..ids.len()).map(|at| i64::from(at < n_tokens)).collect();
                return Ok(Tokenised { types: vec![0; ids.len()], ids, mask });
            }
            Self::File { inner, source, length, pad_id } => (inner, source, *length, *pad_id),
        };
        let encoding = guarded(source, || {
            inner.encode(text, true).map_err(|error| Error::file(source, format!("`{text}`: {error}")))
        })?;
        let padded = |values: &[u32], pad: u32| {
            let values = values.iter().copied().chain(std::iter::repeat(pad)).take(length);
            values.map(i64::from).collect()
        };
        Ok(Tokenised {
            ids: padded(encoding.get_ids(), pad_id),
            mask: padded(encoding.get_attention_mask(), 0),
            types: padded(encoding.get_type_ids(), 0),
        })
    }
}
