//! Folders of tokens as one numbered set of rows, and the order in which training sees them.

use std::path::Path;

use grpo::{Error, Result, Seed};

use super::manifest::{MANIFEST, Manifest, ShardMark, sha256};
use super::shard::Shard;

/// An image's codes with what is said of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenRow {
    /// Visual codes in raster order.
    pub codes: Vec<u16>,
    /// The caption's lines: short and long, or one for both.
    pub lines: Vec<String>,
}

/// Rows of one or more folders, mapped into memory.
///
/// Opening checks sizes and headers; each row's checksum is checked when it is read, so damage is an error that names file
/// and row and never another picture.
#[derive(Debug)]
pub struct TokenSet {
    manifests: Vec<Manifest>,
    shards: Vec<Shard>,
    /// Rows in all shards before each one, and in all.
    ends: Vec<usize>,
}

impl TokenSet {
    /// Opens folders as `grpo tokenize --data` wrote them, one after the other; their grids and visual tokenizers must agree.
    pub fn open(folders: &[impl AsRef<Path>]) -> Result<Self> {
        let (mut manifests, mut shards, mut ends) = (Vec::<Manifest>::new(), Vec::new(), vec![0]);
        let of = |m: &Manifest| (m.grid, m.n_codes, m.tokenizer.clone());
        for folder in folders {
            let folder = folder.as_ref();
            let manifest = Manifest::read(folder)?;
            let fault = |message: String| Err(Error::file(folder.join(MANIFEST), message));
            if !manifest.complete {
                return fault(format!(
                    "{} rows and not yet the whole corpus; run grpo tokenize --resume",
                    manifest.n_rows
                ));
            }
            if let Some(first) = manifests.first().filter(|first| of(first) != of(&manifest)) {
                return fault(format!(
                    "a grid of {:?} of {} codes, and before it one of {:?} of {} codes, or another visual tokenizer: \
                     train on folders of one tokenizer and size",
                    manifest.grid, manifest.n_codes, first.grid, first.n_codes
                ));
            }
            let n_codes = manifest.grid.0 * manifest.grid.1;
            for mark in &manifest.shards {
                shards.push(Shard::open(&folder.join(&mark.file), (mark.rows, n_codes), mark.bytes)?);
                ends.push(ends.last().copied().unwrap_or(0) + mark.rows);
            }
            manifests.push(manifest);
        }
        let set = Self { manifests, shards, ends };
        match set.is_empty() {
            false => Ok(set),
            true => {
                Err(Error::config("the folders of tokens hold no row; tokenise a corpus, or look at its skipped.jsonl"))
            }
        }
    }

    /// Rows of all folders.
    pub fn len(&self) -> usize {
        self.ends.last().copied().unwrap_or(0)
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Rows and columns of codes of every image.
    pub fn grid(&self) -> (usize, usize) {
        self.manifests.first().map_or((0, 0), |manifest| manifest.grid)
    }

    /// The size of the codebook.
    pub fn n_codes(&self) -> u32 {
        self.manifests.first().map_or(0, |manifest| manifest.n_codes)
    }

    /// The fingerprint of the visual tokenizer.
    pub fn tokenizer(&self) -> &str {
        self.manifests.first().map_or("", |manifest| &manifest.tokenizer)
    }

    /// What tells one set from another, for a run that is resumed.
    pub fn identity(&self) -> String {
        let marks = self.manifests.iter().flat_map(|manifest| &manifest.shards);
        let all: String = marks.map(|mark| mark.sha256.as_str()).collect();
        format!("{} rows, crc32c {:08x}", self.len(), crc32c::crc32c(all.as_bytes()))
    }

    /// A row, proven to be what was written.
    pub fn row(&self, index: usize) -> Result<TokenRow> {
        let outside = || Error::config(format!("there is no row {index}; the tokens have {}", self.len()));
        let shard = self.ends.partition_point(|end| *end <= index).checked_sub(1).ok_or_else(outside)?;
        let within = index - self.ends.get(shard).ok_or_else(outside)?;
        let (codes, caption) = self.shards.get(shard).ok_or_else(outside)?.row(within)?;
        if let Some(code) = codes.iter().find(|code| u32::from(**code) >= self.n_codes()) {
            return Err(Error::config(format!("row {index} holds code {code}; the codebook has {}", self.n_codes())));
        }
        Ok(TokenRow { codes, lines: caption.split('\n').map(String::from).collect() })
    }

    /// Every line of every caption.
    pub fn caption_lines(&self) -> impl Iterator<Item = Result<String>> + '_ {
        (0..self.len()).flat_map(|index| match self.row(index) {
            Ok(row) => row.lines.into_iter().map(Ok).collect(),
            Err(error) => vec![Err(error)],
        })
    }

    /// Compares every file with its checksum.
    pub fn verify(folders: &[impl AsRef<Path>]) -> Result<()> {
        for folder in folders.iter().map(AsRef::as_ref) {
            Manifest::read(folder)?.shards.iter().try_for_each(|mark| verify(folder, mark))?;
        }
        Ok(())
    }
}

/// An error for a file that is not what was written.
fn verify(folder: &Path, mark: &ShardMark) -> Result<()> {
    let path = folder.join(&mark.file);
    match sha256(&path)? == mark.sha256 {
        true => Ok(()),
        false => Err(Error::file(path, "its checksum is not the manifest's; write the tokens again")),
    }
}

/// Which rows are trained on, which are held out, and in which order: a function of the seed and of (epoch, position).
#[derive(Clone, Debug)]
pub struct Order {
    trained: Vec<usize>,
    held_out: Vec<usize>,
    seed: Seed,
    /// The epoch whose order is at hand.
    epoch: Option<(u64, Vec<usize>)>,
}

impl Order {
    /// Holds `n_held_out` of `n_rows` rows out, the same ones whatever the seed of the run.
    pub fn new(n_rows: usize, n_held_out: usize, seed: Seed) -> Result<Self> {
        if n_held_out >= n_rows {
            return Err(Error::config(format!(
                "data.validation_rows is {n_held_out} and the tokens have {n_rows} rows; hold out fewer"
            )));
        }
        let (held_out, mut trained) = Self::drawn(n_rows, n_held_out);
        trained.sort_unstable();
        Ok(Self { trained, held_out, seed, epoch: None })
    }

    /// `n` of a set's rows, or all of them, that losses and pictures are taken of, and the others; the same in every run.
    pub(crate) fn drawn(n_rows: usize, n: usize) -> (Vec<usize>, Vec<usize>) {
        let mut drawn = Seed::new(0).named("validation rows").draws().permutation(n_rows);
        let rest = drawn.split_off(n.min(n_rows));
        (drawn, rest)
    }

    /// Rows that training never sees.
    pub fn held_out(&self) -> &[usize] {
        &self.held_out
    }

    /// Rows of an epoch.
    pub fn n_trained(&self) -> usize {
        self.trained.len()
    }

    /// The row at a position counted from the run's begin: every row once an epoch, each epoch in an order of its own.
    pub fn row(&mut self, position: u64) -> usize {
        let n = self.trained.len();
        let (epoch, within) = (position / n as u64, (position % n as u64) as usize);
        if self.epoch.as_ref().is_none_or(|(at_hand, _)| *at_hand != epoch) {
            self.epoch = Some((epoch, self.seed.named("order").fold(epoch).draws().permutation(n)));
        }
        let order = self.epoch.as_ref().map(|(_, order)| order);
        order.and_then(|order| self.trained.get(*order.get(within)?)).copied().unwrap_or(0)
    }
}
