//! SimpleAR's token folders: `N.npy` of codes in `*_codes`, `N.npy` of text in `*_labels`.
//!
//! `extract_token.py` writes both under the image's number; a label is plain text in spite of its name.

use std::fs;
use std::path::{Path, PathBuf};

use grpo::{Error, Result};

use super::caption;
use super::entry::{Caption, Content, Entry, Fault, Found, Reason};
use super::files::{MOST_PICTURE_BYTES, MOST_TEXT_BYTES, base_name, read_file};
use super::{Corpus, Entries, npy};

/// A folder of codes and one of labels.
pub(super) struct TokenFolder {
    codes: PathBuf,
    labels: PathBuf,
    /// The numbers of either folder, ascending.
    numbers: Vec<u64>,
}

impl TokenFolder {
    /// The one below `folder`, or the one whose codes `folder` is; `None` where there are no codes at all.
    pub(super) fn find(folder: &Path) -> Result<Option<Self>> {
        if stem(folder).is_some() {
            return Self::open(folder.to_owned()).map(Some);
        }
        let fault = |error: std::io::Error| Error::file(folder, error);
        let mut found = Vec::new();
        for entry in fs::read_dir(folder).map_err(fault)? {
            let path = entry.map_err(fault)?.path();
            if stem(&path).is_some() && path.is_dir() {
                found.push(path);
            }
        }
        found.sort();
        match found.len() {
            0 => Ok(None),
            1 => found.pop().map(Self::open).transpose(),
            _ => {
                let names: Vec<String> = found.iter().map(|path| base_name(path)).collect();
                Err(Error::file(folder, format!("has {}; give the path of one of them", names.join(" and "))))
            }
        }
    }

    fn open(codes: PathBuf) -> Result<Self> {
        let labels = codes.with_file_name(format!("{}_labels", stem(&codes).unwrap_or_default()));
        if !labels.is_dir() {
            let name = base_name(&labels);
            return Err(Error::file(
                codes,
                format!("there is no folder `{name}` beside it, where the captions are due"),
            ));
        }
        let mut numbers = numbers(&codes)?;
        numbers.extend(self::numbers(&labels)?);
        numbers.sort_unstable();
        numbers.dedup();
        match numbers.is_empty() {
            true => Err(Error::file(codes, "has no file N.npy; give a folder that extract_token.py has filled")),
            false => Ok(Self { codes, labels, numbers }),
        }
    }

    fn entry(&self, number: u64) -> Found {
        let file = format!("{number}.npy");
        let name = format!("{}/{file}", base_name(&self.codes));
        let (codes, labels) = (self.codes.join(&file), self.labels.join(&file));
        let part = || {
            let lacks = |path: &Path, reason| match path.exists() {
                true => Ok(()),
                false => {
                    let folder = path.parent().map(base_name).unwrap_or_default();
                    Err(Fault::new(reason, format!("there is no {file} in {folder}")))
                }
            };
            lacks(&codes, Reason::NoPicture)?;
            lacks(&labels, Reason::NoCaption)?;
            Ok((read_codes(&codes)?, read_labels(&labels).map_err(|fault| fault.within("label"))?))
        };
        match part() {
            Ok((content, caption)) => Ok(Entry { name, content, caption }),
            Err(fault) => Err(Fault::of(fault, name)),
        }
    }
}

impl Corpus for TokenFolder {
    /// A folder may have millions of files: their numbers and total sizes stand for them.
    fn identity(&self) -> String {
        let sizes = [&self.codes, &self.labels].map(|folder| {
            let size = |number: &u64| fs::metadata(folder.join(format!("{number}.npy"))).map_or(0, |file| file.len());
            format!("{} ({} bytes)", base_name(folder), self.numbers.iter().map(size).sum::<u64>())
        });
        format!("simplear_codes: {} and {}, {}.npy", sizes[0], sizes[1], runs(&self.numbers))
    }

    fn n_entries(&self) -> Option<u64> {
        Some(self.numbers.len() as u64)
    }

    fn entries(&self, first: u64) -> Result<Entries<'_>> {
        let first = usize::try_from(first).unwrap_or(usize::MAX).min(self.numbers.len());
        Ok(Box::new(self.numbers[first..].iter().map(|number| Ok(self.entry(*number)))))
    }
}

/// The codes of an array file.
pub(super) fn read_codes(path: &Path) -> std::result::Result<Content, Fault> {
    npy::codes(&read_file(path, MOST_PICTURE_BYTES)?)
}

/// The lines of a label file.
pub(super) fn read_labels(path: &Path) -> std::result::Result<Caption, Fault> {
    caption::of_labels(&read_file(path, MOST_TEXT_BYTES)?)
}

/// `512` of a path `…/512_codes`.
fn stem(path: &Path) -> Option<&str> {
    path.file_name()?.to_str()?.strip_suffix("_codes")
}

/// The numbers N of a folder's files `N.npy`.
fn numbers(folder: &Path) -> Result<Vec<u64>> {
    let fault = |error: std::io::Error| Error::file(folder, error);
    let mut numbers = Vec::new();
    for entry in fs::read_dir(folder).map_err(fault)? {
        let entry = entry.map_err(fault)?.file_name();
        let name = entry.to_string_lossy();
        let Some(number) = name.strip_suffix(".npy") else { continue };
        match number.parse::<u64>() {
            // `007` would be the same entry as `7`.
            Ok(n) if n.to_string() == number => numbers.push(n),
            _ => return Err(Error::file(folder.join(&entry), "not N.npy, as extract_token.py names its files")),
        }
    }
    Ok(numbers)
}

/// `0-11, 13, 15-99`.
fn runs(numbers: &[u64]) -> String {
    let runs = numbers.chunk_by(|a, b| b - a == 1).filter_map(|run| Some((run.first()?, run.last()?)));
    let shown = runs.map(|(a, b)| if a == b { a.to_string() } else { format!("{a}-{b}") });
    shown.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::super::entry::Reason::*;
    use super::super::tests::{Short, check, check_mutants};
    use super::super::{Columns, npy, open};
    use super::*;

    /// A folder `512_codes` and `512_labels` with these files in them.
    fn tokens(codes: &[(&str, &[u8])], labels: &[(&str, &[u8])]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (sub, files) in [("512_codes", codes), ("512_labels", labels)] {
            fs::create_dir(folder.path().join(sub)).unwrap();
            for (name, bytes) in files {
                fs::write(folder.path().join(sub).join(name), bytes).unwrap();
            }
        }
        folder
    }

    fn array() -> Vec<u8> {
        let numbers: Vec<u8> = [7i32, 63_999, 0, 1, 2, 3].iter().flat_map(|n| n.to_le_bytes()).collect();
        npy::tests::file("<i4", "(1, 1, 2, 3)", &numbers)
    }

    #[test]
    fn token_folders_in_the_order_of_their_numbers() {
        let array = array();
        let (good, label) = (&array[..], &b"short\nlong\n"[..]);
        let folder = tokens(
            &[("10.npy", good), ("9.npy", good), ("0.npy", good), ("1.npy", good), ("readme.md", b"")],
            &[("0.npy", label), ("9.npy", b"one line"), ("10.npy", label), ("2.npy", label)],
        );
        let expected: [Short; 5] = [
            Ok(("512_codes/0.npy", &["short", "long"])),
            Err(("512_codes/1.npy", NoCaption, "there is no 1.npy in 512_labels")),
            Err(("512_codes/2.npy", NoPicture, "there is no 2.npy in 512_codes")),
            Ok(("512_codes/9.npy", &["one line"])),
            Ok(("512_codes/10.npy", &["short", "long"])),
        ];
        for path in [folder.path().to_owned(), folder.path().join("512_codes")] {
            let corpus = open(&path, &Columns::default(), None).unwrap();
            let contents = check(&*corpus, &expected);
            assert_eq!(contents[0], Content::Codes { codes: vec![7, 63_999, 0, 1, 2, 3], grid: (2, 3) });
            let codes = 4 * array.len();
            let identity =
                format!("simplear_codes: 512_codes ({codes} bytes) and 512_labels (41 bytes), 0-2, 9-10.npy");
            assert_eq!(corpus.identity(), identity);
        }
    }

    #[test]
    fn damaged_codes_and_labels_are_named() {
        let array = array();
        let check = |codes: &[u8], label: &[u8], reason, part| {
            let folder = tokens(&[("0.npy", codes), ("1.npy", &array)], &[("0.npy", label), ("1.npy", b"c")]);
            let expected: [Short; 2] = [Err(("512_codes/0.npy", reason, part)), Ok(("512_codes/1.npy", &["c"]))];
            super::super::tests::check(&*open(folder.path(), &Columns::default(), None).unwrap(), &expected);
        };
        let numbers = |n: i32| npy::tests::file("<i4", "(1, 1, 1, 1)", &n.to_le_bytes());
        check(&array[..array.len() - 1], b"c", DamagedEntry, "does not make 23 bytes");
        check(&[&array[..], &[0; 4]].concat(), b"c", DamagedEntry, "does not make 28 bytes");
        let crafted = npy::tests::file("<i4", "(1, 1, 1000000, 1000000)", &[0; 24]);
        check(&crafted, b"c", DamagedEntry, "shape [1, 1, 1000000, 1000000] of `<i4` does not make 24 bytes");
        check(&numbers(-1), b"c", WrongCodes, "code -1; codes are from 0 to 65535");
        check(&numbers(65_536), b"c", WrongCodes, "code 65536");
        check(b"", b"c", DamagedEntry, "not a NumPy file");
        check(&array, b"caf\xE9", CaptionNotUtf8, "label: ");
        check(&array, b" \n", EmptyCaption, "label: the label file is empty");
        check(&array, &vec![b'a'; (1 << 20) + 1], TooLarge, "label: 1048577 bytes; at most 1048576");
    }

    #[test]
    fn mutants_cause_no_panic() {
        check_mutants("1_codes/0.npy", &array(), |folder| {
            fs::create_dir_all(folder.join("1_labels")).unwrap();
            fs::write(folder.join("1_labels/0.npy"), "caption").unwrap();
            folder.to_owned()
        });
    }
}
