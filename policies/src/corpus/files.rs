//! Files of a corpus: found in a fixed order, named without their folders, read up to a limit.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};

use grpo::{Error, Result};

use super::entry::{Fault, Reason};

/// The most bytes of an encoded picture or an array of codes.
pub(super) const MOST_PICTURE_BYTES: u64 = 64 << 20;
/// The most bytes of a caption, a JSON object or a line of a list.
pub(super) const MOST_TEXT_BYTES: u64 = 1 << 20;

/// A file that a corpus is read from.
#[derive(Debug)]
pub(super) struct Source {
    pub path: PathBuf,
    /// Without its folder.
    pub name: String,
    pub size: u64,
}

impl Source {
    pub(super) fn of(path: &Path) -> Result<Self> {
        let metadata = fs::metadata(path).map_err(|error| Error::file(path, error))?;
        if !metadata.is_file() {
            return Err(Error::file(path, "not a file; a corpus is read from plain files"));
        }
        Ok(Self { path: path.to_owned(), name: base_name(path), size: metadata.len() })
    }

    /// The files of a folder with this extension, by name.
    pub(super) fn in_folder(folder: &Path, extension: &str) -> Result<Vec<Self>> {
        let fault = |error: io::Error| Error::file(folder, error);
        let mut paths = Vec::new();
        for entry in fs::read_dir(folder).map_err(fault)? {
            let path = entry.map_err(fault)?.path();
            if path.extension().is_some_and(|found| found == extension) {
                paths.push(path);
            }
        }
        paths.sort();
        paths.iter().map(|path| Self::of(path)).collect()
    }

    /// Names and sizes, which stay the same wherever the files lie.
    pub(super) fn identity<'a>(kind: &str, sources: impl IntoIterator<Item = &'a Self>) -> String {
        let files: Vec<String> =
            sources.into_iter().map(|source| format!("{} ({} bytes)", source.name, source.size)).collect();
        format!("{kind}: {}", files.join(", "))
    }
}

/// A path's last part.
pub(super) fn base_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// A path below `root`, which it cannot leave by its words.
pub(super) fn inside(root: &Path, relative: &str) -> Result<PathBuf, Fault> {
    let path = Path::new(relative);
    let plain = path.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    match plain && !relative.is_empty() && !relative.contains('\0') {
        true => Ok(root.join(path)),
        false => {
            let shown = shown(relative.as_bytes());
            Err(Fault::new(Reason::UnsafeName, format!("{shown} is not a path below the corpus' folder, without `..`")))
        }
    }
}

/// The bytes of a plain file of at most `limit`; a link to one is followed.
pub(super) fn read_file(path: &Path, limit: u64) -> Result<Vec<u8>, Fault> {
    let unreadable = |error: io::Error| Fault::new(Reason::UnreadableFile, error.to_string());
    // A pipe or a device would be waited for, so that its kind is asked before it is opened.
    let metadata = fs::metadata(path).map_err(unreadable)?;
    if !metadata.is_file() {
        return Err(Fault::new(Reason::NotAFile, "not a plain file"));
    }
    if metadata.len() > limit {
        return Err(too_large(metadata.len(), limit));
    }
    let mut bytes = Vec::with_capacity(metadata.len() as usize);
    File::open(path).and_then(|file| file.take(limit + 1).read_to_end(&mut bytes)).map_err(unreadable)?;
    match bytes.len() as u64 > limit {
        true => Err(too_large(bytes.len() as u64, limit)),
        false => Ok(bytes),
    }
}

pub(super) fn too_large(size: u64, limit: u64) -> Fault {
    Fault::new(Reason::TooLarge, format!("{size} bytes; at most {limit} are read"))
}

/// A name from a file that may hold anything, fit for a line of a log.
pub(super) fn shown(name: &[u8]) -> String {
    const LONGEST: usize = 120;
    let escaped: String =
        String::from_utf8_lossy(&name[..name.len().min(4 * LONGEST)]).chars().flat_map(char::escape_debug).collect();
    match escaped.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("`{}…`", &escaped[..end]),
        None => format!("`{escaped}`"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_stay_below_their_root() {
        let root = Path::new("root");
        for good in ["a.png", "a/b.png", "./a.png", "a b/é.png", "..a/b..png"] {
            assert_eq!(inside(root, good), Ok(root.join(good)));
        }
        for bad in ["../a.png", "a/../b.png", "/etc/passwd", "", "a\0b", ".."] {
            assert_eq!(inside(root, bad).unwrap_err().reason, Reason::UnsafeName, "{bad:?}");
        }
    }

    #[test]
    fn names_are_shown_on_one_short_line() {
        assert_eq!(shown(b"a\n\xFF\x1B"), "`a\\n\u{FFFD}\\u{1b}`");
        assert_eq!(shown(&[b'a'; 1 << 20]).chars().count(), 123);
    }

    #[test]
    fn only_plain_files_up_to_the_limit_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, b"12345").unwrap();
        let check = |path: &Path, limit, expected: Result<&[u8], Reason>| {
            let got = read_file(path, limit).map_err(|fault| fault.reason);
            assert_eq!(got, expected.map(<[u8]>::to_vec));
        };
        check(&path, 5, Ok(b"12345"));
        check(&path, 4, Err(Reason::TooLarge));
        check(folder.path(), 5, Err(Reason::NotAFile));
        check(&folder.path().join("absent"), 5, Err(Reason::UnreadableFile));
        #[cfg(unix)]
        {
            check(Path::new("/dev/zero"), 5, Err(Reason::NotAFile));
            let link = folder.path().join("link");
            std::os::unix::fs::symlink(&path, &link).unwrap();
            check(&link, 5, Ok(b"12345"));
        }
    }
}
