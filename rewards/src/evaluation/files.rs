//! What is written about files beside the images.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use grpo::{Error, Result};
use sha2::{Digest, Sha256};

/// The file in a folder of images that says how they were drawn.
const SAMPLER_FILE: &str = "sampler.json";

/// The SHA-256 of a file in hexadecimal, computed once per process for a file that does not change.
pub fn sha256(path: &Path) -> Result<String> {
    sha256_once(path).map_err(|error| Error::file(path, error))
}

/// When a file was hashed, and to what: a file is read again once its length or its time of change differs.
struct Hashed {
    length: u64,
    modified: SystemTime,
    sha256: String,
}

/// A file's sha256, computed once per process; a step's two rewards may well share their text tower.
pub(crate) fn sha256_once(path: &Path) -> std::io::Result<String> {
    static HASHED: Mutex<BTreeMap<PathBuf, Hashed>> = Mutex::new(BTreeMap::new());
    let real = path.canonicalize()?;
    let metadata = fs::metadata(&real)?;
    let (length, modified) = (metadata.len(), metadata.modified()?);
    let mut known_files = HASHED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = known_files.get(&real).filter(|known| known.length == length && known.modified == modified) {
        return Ok(known.sha256.clone());
    }
    let sha256 = hashed(&real)?;
    // Clocks of file systems tick slowly: a file of this very second could change again without a new time.
    if modified.elapsed().is_ok_and(|age| age.as_secs() >= 2) {
        known_files.insert(real, Hashed { length, modified, sha256: sha256.clone() });
    }
    Ok(sha256)
}

/// A file's SHA-256 in hexadecimal, read in pieces.
fn hashed(path: &Path) -> std::io::Result<String> {
    let mut file = fs::File::open(path)?;
    let (mut hasher, mut piece) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut piece)? {
            0 => break,
            n => hasher.update(&piece[..n]),
        }
    }
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// That no link leads from a file out of its folder.
#[cfg(feature = "onnx")]
pub(crate) fn check_inside(folder: &Path, file: &Path) -> std::io::Result<()> {
    match file.canonicalize()?.starts_with(folder.canonicalize()?) {
        true => Ok(()),
        false => Err(std::io::Error::other("it is a link that leaves its folder; copy the file itself")),
    }
}

/// What `sampler.json` in a folder of images holds: seed, temperature, guidance, or whatever drew them.
pub fn sampler_settings(folder: &Path) -> Result<Option<serde_json::Value>> {
    let path = folder.join(SAMPLER_FILE);
    match std::fs::read(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::file(&path, error)),
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|error| Error::file(&path, format!("{error}; give one JSON object, or remove the file"))),
    }
}
