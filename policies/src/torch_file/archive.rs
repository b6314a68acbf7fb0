//! The zip archive around a pickle and its storages.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use grpo::{Error, Result};
use zip::{CompressionMethod, ZipArchive};

use super::Checked;

const PICKLE: &str = "data.pkl";
/// The longest pickle that is read; that of a whole language model stays below one megabyte.
const MOST_PICKLE_BYTES: u64 = 8 << 20;

/// An open archive of torch.
pub(super) struct Archive {
    zip: ZipArchive<BufReader<File>>,
    /// Before the names of all entries, with its slash.
    folder: String,
    size: u64,
}

impl Archive {
    pub(super) fn open(path: &Path) -> Result<Self> {
        const REMEDY: &str = "give a file that torch.save or torch.jit.save wrote";
        let fault = |message: String| Error::file(path, format!("{message}; {REMEDY}"));
        let file = File::open(path).map_err(|error| fault(error.to_string()))?;
        let metadata = file.metadata().map_err(|error| Error::file(path, error))?;
        if !metadata.is_file() {
            return Err(fault("not a file".into()));
        }
        let mut zip = ZipArchive::new(BufReader::new(file))
            .map_err(|error| fault(format!("no zip archive, or one that is cut short ({error})")))?;
        let broken = zip.has_overlapping_entries().map_err(|error| fault(format!("damaged zip archive ({error})")))?;
        if broken || zip.has_duplicate_names() {
            return Err(fault("a zip archive whose entries overlap or come twice".into()));
        }
        let folder = zip.file_names_raw().filter_map(|name| folder_of_pickle(std::str::from_utf8(name).ok()?)).min();
        match folder.map(str::to_owned) {
            Some(folder) => Ok(Self { zip, folder, size: metadata.len() }),
            None => Err(fault(format!("a zip archive without a {PICKLE}"))),
        }
    }

    /// Bytes of the whole file.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    pub(super) fn pickle(&mut self) -> Checked<Vec<u8>> {
        if self.zip.index_for_name(&format!("{}byteorder", self.folder)).is_some() {
            let order = self.entry("byteorder", 16)?;
            if order != b"little" {
                return Err(format!(
                    "its numbers are in byte order `{}`; save it on a little-endian machine",
                    String::from_utf8_lossy(&order)
                ));
            }
        }
        self.entry(PICKLE, MOST_PICKLE_BYTES)
    }

    /// The bytes of a storage.
    pub(super) fn storage(&mut self, key: &str) -> Checked<Vec<u8>> {
        self.entry(&format!("data/{key}"), self.size)
    }

    /// The bytes of an entry, where it is stored as it is and no longer than `most`.
    fn entry(&mut self, name: &str, most: u64) -> Checked<Vec<u8>> {
        let entry = self.zip.by_name(&format!("{}{name}", self.folder));
        let entry = entry.map_err(|error| format!("`{name}`: {error}; copy the file again"))?;
        let size = entry.size();
        if entry.compression() != CompressionMethod::Stored || entry.compressed_size() != size {
            return Err(format!("`{name}` is compressed; torch stores it as it is, save the file again"));
        }
        if size > most.min(self.size) {
            return Err(format!(
                "`{name}` has {size} bytes, more than {}; is this a model's file?",
                most.min(self.size)
            ));
        }
        let mut bytes = Vec::new();
        // One byte more than there is: the checksum is compared where the entry ends.
        let read = entry.take(size + 1).read_to_end(&mut bytes);
        match read.map_err(|error| format!("`{name}`: {error}; copy the file again"))? as u64 {
            got if got == size => Ok(bytes),
            got => Err(format!("`{name}` has {got} bytes where {size} are due; copy the file again")),
        }
    }
}

/// The part of an entry's name before [`PICKLE`], where that is the archive's own.
fn folder_of_pickle(name: &str) -> Option<&str> {
    let folder = name.strip_suffix(PICKLE)?;
    (folder.is_empty() || folder.find('/') == Some(folder.len() - 1)).then_some(folder)
}
