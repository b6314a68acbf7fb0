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
//! replaces it. Files are not trusted: sizes of archives' entries, arrays and pictures are limited before memory is taken, names in
//! archives, tables and token folders cannot leave the corpus (the user's own list may name any path), links
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

#[cfg(test)]
mod tests {
    use std::fs;

    use grpo::Seed;

    use super::*;

    /// An entry in short: its name with the lines of its caption, or with the reason and a part of the message.
    pub(super) type Short<'a> = std::result::Result<(&'a str, &'a [&'a str]), (&'a str, Reason, &'a str)>;

    /// Reads a corpus from every entry on and compares it with what is expected.
    pub(super) fn check(corpus: &dyn Corpus, expected: &[Short]) -> Vec<Content> {
        let read = |first| corpus.entries(first).unwrap().map(Result::unwrap).collect::<Vec<Found>>();
        let all = read(0);
        for (number, (found, short)) in all.iter().zip(expected).enumerate() {
            match (found, short) {
                (Ok(entry), Ok((name, lines))) => {
                    assert_eq!((&entry.name[..], &entry.caption.lines[..]), (*name, &lines.map_owned()[..]));
                }
                (Err(skipped), Err((name, reason, part))) => {
                    assert_eq!((&skipped.name[..], skipped.reason), (*name, *reason), "{skipped:?}");
                    assert!(skipped.message.starts_with(&format!("{name}: ")), "{skipped:?}");
                    assert!(skipped.message.contains(part), "{skipped:?} does not say {part:?}");
                }
                _ => panic!("entry {number} is {found:?}; expected {short:?}"),
            }
        }
        assert_eq!(all.len(), expected.len(), "{all:?}");
        assert!(corpus.n_entries().is_none_or(|n| n == all.len() as u64));
        for first in 0..all.len() + 2 {
            assert!(read(first as u64) == all[first.min(all.len())..], "from entry {first} on");
        }
        assert!(read(u64::MAX).is_empty());
        all.into_iter().flatten().map(|entry| entry.content).collect()
    }

    trait Owned {
        fn map_owned(&self) -> Vec<String>;
    }

    impl Owned for &[&str] {
        fn map_owned(&self) -> Vec<String> {
            self.iter().map(|line| (*line).to_owned()).collect()
        }
    }

    fn open_plain(path: &Path) -> Result<Box<dyn Corpus>> {
        open(path, &Columns::default(), None)
    }

    #[test]
    fn what_is_no_corpus_is_refused_with_advice() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in ["text.txt", "a.tar", "plain", "b.json"] {
            fs::write(at(name), b"{}").unwrap();
        }
        for name in
            ["empty", "two/256_codes", "two/512_codes", "alone/512_codes", "hollow/512_codes", "hollow/512_labels"]
        {
            fs::create_dir_all(at(name)).unwrap();
        }
        let check = |name: &str, parts: &[&str]| {
            let message = open_plain(&at(name)).map(|_| ()).unwrap_err().to_string();
            for part in parts {
                assert!(message.contains(part), "{message:?} does not say {part:?}");
            }
        };
        check("absent", &["absent", "give a .tar file or a folder of them"]);
        check("text.txt", &["text.txt", "no corpus", "`*_codes` and `*_labels`"]);
        check("plain", &["plain", "no corpus"]);
        check("empty", &["empty", "a folder without a corpus", ".json or .jsonl list"]);
        check("b.json", &["b.json", "expected a list of objects", "name a file of JSON lines .jsonl"]);
        check("two", &["256_codes and 512_codes", "give the path of one of them"]);
        check("alone", &["no folder `512_labels`"]);
        check("hollow", &["has no file N.npy"]);
        fs::write(at("hollow/512_codes/007.npy"), b"").unwrap();
        check("hollow", &["007.npy", "not N.npy"]);
        if cfg!(not(feature = "parquet")) {
            fs::write(at("c.parquet"), b"").unwrap();
            check("c.parquet", &["c.parquet", "build with --features parquet"]);
        }
        assert!(open_plain(&at("a.tar")).is_ok());
    }

    #[test]
    fn identity_is_that_of_the_files_wherever_they_lie() {
        let identities = [(); 2].map(|()| {
            let folder = tempfile::tempdir().unwrap();
            for name in ["00001.tar", "00000.tar", "00000.parquet", "note.txt"] {
                fs::write(folder.path().join(name), name).unwrap();
            }
            open_plain(folder.path()).unwrap().identity()
        });
        assert_eq!(identities[0], "web_dataset: 00000.tar (9 bytes), 00001.tar (9 bytes)");
        assert_eq!(identities[0], identities[1]);
    }

    #[test]
    fn columns_have_defaults_and_no_other_keys() {
        let columns: Columns = serde_json::from_str(r#"{"caption": "text"}"#).unwrap();
        assert_eq!(columns, Columns { caption: "text".into(), ..Columns::default() });
        assert!(serde_json::from_str::<Columns>(r#"{"captions": "text"}"#).is_err());
    }

    /// A file with a few bits flipped, cut short, or with a piece of it doubled or left out.
    fn mutant(bytes: &[u8], seed: Seed) -> Vec<u8> {
        let mut draws = seed.draws();
        let mut bytes = bytes.to_vec();
        let (a, b) = (draws.below(bytes.len()), draws.below(bytes.len()));
        let piece = a.min(b)..a.max(b);
        match draws.below(4) {
            0 => bytes.truncate(a),
            1 => drop(bytes.splice(a..a, bytes[piece].to_vec()).collect::<Vec<u8>>()),
            2 => drop(bytes.drain(piece)),
            _ => (0..1 + draws.below(8)).for_each(|_| {
                let place = draws.below(bytes.len());
                bytes[place] ^= 1 << draws.below(8);
            }),
        }
        bytes
    }

    /// Reads 300 mutants of a file to the end, each from two places, and never panics.
    pub(super) fn check_mutants(name: &str, bytes: &[u8], corpus: impl Fn(&Path) -> std::path::PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join(name);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        for number in 0..300 {
            fs::write(&file, mutant(bytes, Seed::new(number).named(name))).unwrap();
            let Ok(corpus) = open_plain(&corpus(folder.path())) else { continue };
            let read = |first| {
                let found = corpus.entries(first).map(|entries| entries.take(1000).map(|found| found.ok()).collect());
                found.unwrap_or_else(|_| Vec::<Option<Found>>::new())
            };
            let all = read(0);
            if all.len() < 1000 {
                assert!(read(1) == all[all.len().min(1)..], "mutant {number}");
            }
        }
    }
}
