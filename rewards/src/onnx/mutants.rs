//! A thousand damaged copies of each file that is read here: an error that names the file, or a file that means the same.

use std::fs;
use std::path::Path;

use grpo::{Result, Seed};

use super::graph::external_files;
use super::{Folder, Manifest};
use crate::evaluation::sha256;

/// One of five kinds of damage: a cut, flipped bits, an overwritten piece, a piece left out, a piece twice.
fn mutant(bytes: &[u8], seed: Seed) -> Vec<u8> {
    let mut draws = seed.draws();
    let mut mutant = bytes.to_vec();
    let from = draws.below(bytes.len());
    let to = (from + 1 + draws.below(40)).min(bytes.len());
    match draws.below(5) {
        0 => mutant.truncate(from),
        1 => (0..=draws.below(8)).for_each(|_| mutant[draws.below(bytes.len())] ^= 1 << draws.below(8)),
        2 => mutant[from..to].fill(0xFF),
        3 => drop(mutant.drain(from..to)),
        _ => drop(mutant.splice(from..from, bytes[from..to].iter().copied())),
    }
    mutant
}

/// How many of a thousand mutants are refused, each by an error that begins with `path`.
fn n_refused(path: &Path, whole: &[u8], read: impl Fn(&[u8]) -> Result<()>) -> usize {
    let prefix = format!("{}: ", path.display());
    let refused = (0..1000).filter(|&n| match read(&mutant(whole, Seed::new(7).fold(n))) {
        Ok(()) => false,
        Err(error) => {
            assert!(error.to_string().starts_with(&prefix), "mutant {n}: {error}");
            true
        }
    });
    refused.count()
}

#[test]
fn a_thousand_damaged_graphs() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    for (file, least) in [("tests/golden/onnx/ports.onnx", 500), ("tests/golden/onnx/external.onnx", 500)] {
        let path = folder.join(file);
        let n_refused = n_refused(&path, &fs::read(&path).unwrap(), |bytes| external_files(&path, bytes).map(drop));
        assert!((least..1000).contains(&n_refused), "{file}: {n_refused} of 1000 refused");
    }
}

#[test]
fn a_thousand_damaged_manifests() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/clip/reward.toml");
    let n_refused = n_refused(&path, &fs::read(&path).unwrap(), |bytes| {
        Manifest::parse(&path, &String::from_utf8_lossy(bytes)).map(drop)
    });
    // Three fifths of the file are provenance, where another number is no damage that could be seen.
    assert!((400..1000).contains(&n_refused), "{n_refused} of 1000 refused");
}

#[test]
fn a_thousand_damaged_networks_never_reach_onnx_runtime() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/onnx/ports.onnx");
    let whole = fs::read(golden).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ports.onnx");
    fs::write(&path, &whole).unwrap();
    let clip = include_str!("../../models/clip/reward.toml");
    let (head, _) = clip.split_once("[files]").unwrap();
    let listed = format!("{head}[files]\n\"ports.onnx\" = \"{}\"\n", sha256(&path).unwrap());
    fs::write(folder.path().join("reward.toml"), listed).unwrap();
    let n_refused = n_refused(&path, &whole, |bytes| {
        fs::write(&path, bytes).unwrap();
        Folder::open(folder.path()).map(drop)
    });
    // A run of bytes that are 0xFF or equal already may be replaced by itself.
    assert!(n_refused > 990, "{n_refused} of 1000 refused");
}
