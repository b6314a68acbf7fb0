//! What is written about files beside the images.

use std::fmt::Write;
use std::io::Read;
use std::path::Path;

use grpo::{Error, Result};
use sha2::{Digest, Sha256};

/// The file in a folder of images that says how they were drawn.
const SAMPLER_FILE: &str = "sampler.json";

/// The SHA-256 of a file in hexadecimal, read in pieces.
pub fn sha256(path: &Path) -> Result<String> {
    let failed = |error| Error::file(path, error);
    let mut file = std::fs::File::open(path).map_err(failed)?;
    let (mut hasher, mut piece) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut piece).map_err(failed)? {
            0 => break,
            n => hasher.update(&piece[..n]),
        }
    }
    let mut text = String::new();
    for byte in hasher.finalize() {
        write!(text, "{byte:02x}").map_err(|error| Error::file(path, error))?;
    }
    Ok(text)
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
