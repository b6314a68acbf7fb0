//! Image-text corpora: the entries of WebDataset archives, Parquet files, JSON lists and SimpleAR's token folders.
//!
//! | file | what |
//! |---|---|
//! | `web_dataset.rs`, `sample.rs`, `archive.rs` | `.tar` files of img2dataset, grouped into samples |
//! | `list.rs` | `.json` and `.jsonl` lists of pictures, or of codes (`meta.json`) |
//! | `codes.rs`, `npy.rs` | folders `*_codes` and `*_labels` of SimpleAR's `extract_token.py` |
//! | `parquet.rs` | data sets of Hugging Face, with the feature `parquet` |
//!
//! An entry comes as it stands: pictures are not decoded, captions not tokenised, nothing is shuffled. The order is
//! that of the sorted file names and of the entries in each. What cannot be read is [`Skipped`] and says why; nothing
//! replaces it. Files are not trusted: sizes are limited before memory is taken, names cannot leave the corpus, links
//! and devices inside archives are never followed.
//!
//! Deviations from SimpleAR's loaders (`t2i_data.py`, `t2token_data.py`):
//! 1. An entry that cannot be read is named and left out; there the next one, in the end entry 0, is taken for it.
//! 2. The lists in `.yaml` and the brace patterns over file names are not read.

mod archive;
mod caption;
mod codes;
mod entry;
mod files;
mod list;
mod npy;
#[cfg(feature = "parquet")]
mod parquet;
mod sample;
mod web_dataset;

use std::path::Path;

use grpo::{Error, Result};
use serde::{Deserialize, Serialize};

#[cfg(test)]
pub(crate) use caption::label_lines;
pub(crate) use caption::strip;
pub use entry::{Caption, Content, Entry, Found, Reason, Skipped};

use codes::TokenFolder;
use files::Source;
use list::List;
use web_dataset::WebDataset;

/// What may be given as a corpus.
const KINDS: &str = "give a .tar file or a folder of them, a .parquet file or a folder of them, a .json or .jsonl list, \
                     or a folder with `*_codes` and `*_labels`";

/// The entries from some number on; an error ends them.
pub type Entries<'a> = Box<dyn Iterator<Item = Result<Found>> + Send + 'a>;

/// Where entries come from.
pub trait Corpus: Send + Sync {
    /// What the corpus is, for a manifest: kind and file names with sizes, without folders.
    ///
    /// Two runs over the same files get the same text, wherever these lie.
    fn identity(&self) -> String;

    /// How many entries there are, with those that will be skipped, where that is known without reading everything.
    fn n_entries(&self) -> Option<u64>;

    /// The entries from the `first` on, always in the same order.
    ///
    /// Entries are counted with the skipped ones. An `Err` ends the reading (a file that cannot be opened or whose
    /// format is unknown), an `Ok(Err(skipped))` does not. At most a few entries are in memory.
    fn entries(&self, first: u64) -> Result<Entries<'_>>;
}

/// Names of fields: in the objects of lists and archives, and of Parquet's columns.
///
/// Lists may say `image_path` for the image and `prompt` for the caption as well.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Columns {
    /// The picture or its path.
    pub image: String,
    /// The only caption, or the short one.
    pub caption: String,
    /// The long caption, where there is one.
    pub long_caption: String,
}

impl Default for Columns {
    fn default() -> Self {
        Self { image: "image".into(), caption: "caption".into(), long_caption: "long_caption".into() }
    }
}

/// Opens what a path is: `.tar` or `.parquet` files or a folder of them, a `.json` or `.jsonl` list, or a folder with
/// SimpleAR's `*_codes` and `*_labels`.
///
/// `images` is the root of relative image paths; without it they are relative to the folder of the file that names
/// them. In a folder with archives and Parquet files the archives are read, as img2dataset lays the Parquet files
/// beside them. A path that is nothing of these is an error that says what may be given.
pub fn open(path: &Path, columns: &Columns, images: Option<&Path>) -> Result<Box<dyn Corpus>> {
    let metadata = std::fs::metadata(path).map_err(|error| Error::file(path, format!("{error}; {KINDS}")))?;
    if metadata.is_dir() {
        return open_folder(path, columns, images);
    }
    let source = Source::of(path)?;
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("tar") => Ok(Box::new(WebDataset { archives: vec![source], columns: columns.clone() })),
        Some("parquet") => open_parquet(vec![source], columns, images),
        Some("json") => Ok(Box::new(List::open(source, columns, images)?)),
        Some("jsonl") => Ok(Box::new(List::lines(source, columns, images))),
        _ => Err(Error::file(path, format!("no corpus; {KINDS}"))),
    }
}

fn open_folder(folder: &Path, columns: &Columns, images: Option<&Path>) -> Result<Box<dyn Corpus>> {
    if let Some(tokens) = TokenFolder::find(folder)? {
        return Ok(Box::new(tokens));
    }
    let archives = Source::in_folder(folder, "tar")?;
    if !archives.is_empty() {
        return Ok(Box::new(WebDataset { archives, columns: columns.clone() }));
    }
    let tables = Source::in_folder(folder, "parquet")?;
    match tables.is_empty() {
        true => Err(Error::file(folder, format!("a folder without a corpus; {KINDS}"))),
        false => open_parquet(tables, columns, images),
    }
}

#[cfg(feature = "parquet")]
fn open_parquet(tables: Vec<Source>, columns: &Columns, images: Option<&Path>) -> Result<Box<dyn Corpus>> {
    Ok(Box::new(parquet::Tables::open(tables, columns, images)?))
}

#[cfg(not(feature = "parquet"))]
fn open_parquet(tables: Vec<Source>, _: &Columns, _: Option<&Path>) -> Result<Box<dyn Corpus>> {
    let path = tables.first().map(|table| table.path.clone()).unwrap_or_default();
    Err(Error::file(path, "a Parquet file, which this program was built without; build with --features parquet"))
}
