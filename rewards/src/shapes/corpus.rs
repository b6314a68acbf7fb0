//! Scenes as files, for trainers in other languages.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use grpo::{Error, Result, Seed};
use serde::Serialize;

use super::negatives::negatives;
use super::prompts::example;
use super::render::render;
use crate::geneval::{Include, Tag};

/// Which combinations are said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Only what is not held out: what a policy may be told.
    Train,
    /// Everything: what a judge may know.
    All,
}

#[derive(Serialize)]
struct Line {
    caption: String,
    long: String,
    negatives: Vec<String>,
    tag: Option<Tag>,
    include: Vec<Include>,
}

/// Writes `n` examples as `images.bin` and `captions.jsonl` into a folder, which is made.
///
/// `images.bin` holds `n * side * side * 3` bytes: RGB, rows from the top, one picture after the other.
/// Line `i` of `captions.jsonl` tells picture `i`: `caption` (short), `long`, `negatives` (three short captions
/// that are false of it by one change), `tag` (null for a free scene) and `include`.
pub fn write_corpus(dir: &Path, n: usize, seed: Seed, side: u32, split: Split) -> Result<()> {
    fs::create_dir_all(dir).map_err(|error| Error::file(dir, error))?;
    let (images_path, captions_path) = (dir.join("images.bin"), dir.join("captions.jsonl"));
    let create = |path: &Path| File::create(path).map(BufWriter::new).map_err(|error| Error::file(path, error));
    let (mut images, mut captions) = (create(&images_path)?, create(&captions_path)?);
    for row in 0..n as u64 {
        let seed = seed.fold(row);
        let example = example(seed, split);
        let pixels = render(&example.scene, side).into_raw();
        images.write_all(&pixels).map_err(|error| Error::file(&images_path, error))?;
        let (tag, include) = example.metadata.map(|metadata| (metadata.tag, metadata.include)).unzip();
        let line = Line {
            negatives: negatives(&example.statement, &example.scene, &mut seed.named("negatives").draws()),
            caption: example.captions.short,
            long: example.captions.long,
            tag,
            include: include.unwrap_or_default(),
        };
        let text = serde_json::to_string(&line).map_err(|error| Error::file(&captions_path, error))?;
        writeln!(captions, "{text}").map_err(|error| Error::file(&captions_path, error))?;
    }
    images.flush().map_err(|error| Error::file(&images_path, error))?;
    captions.flush().map_err(|error| Error::file(&captions_path, error))
}
