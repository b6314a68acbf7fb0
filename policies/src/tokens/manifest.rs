//! `manifest.json`: what a folder of tokens holds and how it came to be; rewritten after every shard, so it is the commit mark.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use grpo::{Error, Result, write_whole};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::hex;

/// The file's name.
pub const MANIFEST: &str = "manifest.json";

const FORMAT: &str = "grpo-tokens-1";

/// What a folder of tokens holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The version of the format.
    format: String,
    /// Rows and columns of codes of every image.
    pub grid: (usize, usize),
    /// The size of the codebook.
    pub n_codes: u32,
    /// The visual tokenizer that the codes are of ([`crate::cosmos::Cosmos::fingerprint`]).
    pub tokenizer: String,
    /// What was read.
    pub corpus: String,
    /// How it was read, as TOML.
    pub settings: String,
    /// Whether the corpus was read to its end.
    pub complete: bool,
    /// Entries that were read for the shards below.
    pub n_read: u64,
    /// Rows in all shards.
    pub n_rows: u64,
    /// Entries that were left out, by reason.
    pub skipped: BTreeMap<String, u64>,
    /// The files in their order.
    pub shards: Vec<ShardMark>,
}

/// A shard as the manifest knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardMark {
    /// The file's name.
    pub file: String,
    /// Images in it.
    pub rows: usize,
    /// Its size.
    pub bytes: u64,
    /// Its checksum.
    pub sha256: String,
}

impl Manifest {
    /// A folder that holds nothing yet.
    pub(super) fn new((grid, n_codes): ((usize, usize), u32), corpus: String, settings: String) -> Self {
        Self {
            format: FORMAT.into(),
            grid,
            n_codes,
            tokenizer: String::new(),
            corpus,
            settings,
            complete: false,
            n_read: 0,
            n_rows: 0,
            skipped: BTreeMap::new(),
            shards: Vec::new(),
        }
    }

    /// Reads a folder's manifest.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(MANIFEST);
        let text = fs::read(&path).map_err(|error| {
            Error::file(&path, format!("{error}; give a folder of tokens, as `grpo tokenize --data` writes it"))
        })?;
        let manifest: Self = serde_json::from_slice(&text)
            .map_err(|error| Error::file(&path, format!("{error}; write the tokens again")))?;
        let total: u64 = manifest.shards.iter().map(|shard| shard.rows as u64).sum();
        let fault = |message: String| Err(Error::file(&path, format!("{message}; write the tokens again")));
        if manifest.format != FORMAT {
            return fault(format!("the format is `{}`; this version reads `{FORMAT}`", manifest.format));
        }
        if total != manifest.n_rows || manifest.grid.0.checked_mul(manifest.grid.1).is_none_or(|n| n == 0) {
            return fault(format!("{} rows in shards of {total}, grid {:?}", manifest.n_rows, manifest.grid));
        }
        if let Some(shard) = manifest.shards.iter().find(|shard| !is_plain(&shard.file)) {
            return fault(format!("a shard is called `{}`", shard.file));
        }
        Ok(manifest)
    }

    /// Writes it so that the old one stays until the new one is whole.
    pub(super) fn write(&self, folder: &Path) -> Result<()> {
        let path = folder.join(MANIFEST);
        let text = serde_json::to_string_pretty(self).map_err(|error| Error::file(&path, error))?;
        write_whole(&path, format!("{text}\n").as_bytes())
    }

    /// Takes in a shard that was just written.
    pub(super) fn add(&mut self, folder: &Path, file: String, rows: usize) -> Result<()> {
        let path = folder.join(&file);
        let bytes = fs::metadata(&path).map_err(|error| Error::file(&path, error))?.len();
        self.shards.push(ShardMark { sha256: sha256(&path)?, file, rows, bytes });
        self.n_rows += rows as u64;
        Ok(())
    }

    /// Entries that were left out.
    pub fn n_skipped(&self) -> u64 {
        self.skipped.values().sum()
    }
}

/// A file's name, and no way out of the folder.
fn is_plain(name: &str) -> bool {
    !name.is_empty() && !name.starts_with('.') && name.chars().all(|c| c.is_ascii_alphanumeric() || ".-_".contains(c))
}

/// The checksum of a file.
pub(super) fn sha256(path: &Path) -> Result<String> {
    let at = |error: std::io::Error| Error::file(path, error);
    let mut file = File::open(path).map_err(at)?;
    let (mut hasher, mut buffer) = (Sha256::new(), vec![0u8; 1 << 20]);
    loop {
        match file.read(&mut buffer).map_err(at)? {
            0 => return Ok(hex(&hasher.finalize())),
            n => hasher.update(&buffer[..n]),
        }
    }
}
