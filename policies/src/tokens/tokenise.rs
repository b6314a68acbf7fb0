//! A corpus to a folder of tokens: decoded and cropped ahead on worker threads, encoded in batches, written shard by shard.
//!
//! What stands in the folder depends on the corpus, the settings and the visual tokenizer alone: a run that is killed at any
//! point begins again behind the last whole shard and leaves the same bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::ops::ControlFlow;
use std::path::Path;

use grpo::{Error, Result};
use image::RgbImage;
use serde_json::json;

use super::manifest::{MANIFEST, Manifest};
use super::prepare::{self, Expected, Outcome, Prepared, Ready};
use super::settings::{Settings, is_bad};
use super::shard::{self, NewRow, PictureHash, Shard};
use crate::corpus::{Corpus, Reason, Skipped};
use crate::cosmos::Cosmos;

/// The file that names every entry which was left out.
const SKIPPED: &str = "skipped.jsonl";

/// Of a corpus of fewer entries the share of bad ones is taken as if it had so many.
const ENOUGH: u64 = 1000;

/// How fast, which changes nothing of the result.
#[derive(Clone, Copy, Debug)]
pub struct Workers {
    /// Threads that decode and crop.
    pub n: usize,
    /// Images that are encoded together.
    pub batch: usize,
}

/// How far the reading is.
#[derive(Clone, Copy, Debug)]
pub struct Reading {
    /// Entries read.
    pub n_read: u64,
    /// Rows kept, in whole shards and behind them.
    pub n_rows: u64,
    /// Entries left out.
    pub n_skipped: u64,
}

/// Writes the tokens of a corpus into a folder, or goes on where a run over the same corpus broke off.
pub fn tokenise(
    (corpus, settings): (&dyn Corpus, &Settings),
    cosmos: &Cosmos,
    folder: &Path,
    workers: Workers,
    mut report: impl FnMut(&Reading),
) -> Result<Manifest> {
    settings.check()?;
    let grid = cosmos.grid(settings.height as usize, settings.width as usize)?;
    let expected = Expected { grid, n_codes: cosmos.n_codes() };
    if expected.n_codes > 1 << 16 {
        return Err(Error::config(format!(
            "the codebook has {} codes; a shard holds 16 bits a code",
            expected.n_codes
        )));
    }
    let mut writing = Writing::begin(corpus, settings, (cosmos, expected), folder, workers.batch.max(1))?;
    if writing.manifest.complete {
        return Ok(writing.manifest);
    }
    let first = writing.manifest.n_read;
    prepare::each((corpus, first), (settings, expected), workers.n, |outcome| {
        writing.take(outcome)?;
        let n_rows = writing.manifest.n_rows + (writing.rows.len() + writing.waiting.len()) as u64;
        let (n_read, n_skipped) = (writing.tally.n_read, writing.tally.skipped.values().sum());
        report(&Reading { n_read, n_rows, n_skipped });
        Ok(ControlFlow::Continue(()))
    })?;
    writing.end()
}

/// The first `n` pictures of a corpus that can be used, cropped, without their captions, and how many entries before them were
/// left out, by reason; for training a visual tokenizer.
pub fn pictures(
    (corpus, settings): (&dyn Corpus, &Settings),
    n: usize,
    n_workers: usize,
) -> Result<(Vec<RgbImage>, BTreeMap<String, u64>)> {
    settings.check()?;
    let (mut pictures, mut tally) = (Vec::new(), Tally::default());
    prepare::each((corpus, 0), (settings, Expected { grid: (0, 0), n_codes: 0 }), n_workers, |outcome| {
        match tally.count(outcome?, settings) {
            Ok(Prepared { content: Ready::Picture(picture), .. }) => pictures.push(picture),
            Ok(_) => return Err(Error::config("the corpus holds codes; give one of pictures")),
            Err(_) => tally.check(settings, false).map_err(Error::config)?,
        }
        Ok(if pictures.len() < n { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
    })?;
    tally.check(settings, true).map_err(Error::config)?;
    match pictures.is_empty() {
        false => Ok((pictures, tally.skipped)),
        true => Err(Error::config(format!("no picture of the corpus can be used: {:?}", tally.skipped))),
    }
}

/// A folder that is being written.
struct Writing<'a> {
    settings: &'a Settings,
    cosmos: &'a Cosmos,
    folder: &'a Path,
    batch: usize,
    manifest: Manifest,
    tally: Tally,
    rows: Vec<NewRow>,
    waiting: Vec<(Prepared, RgbImage)>,
}

impl<'a> Writing<'a> {
    fn begin(
        corpus: &dyn Corpus,
        settings: &'a Settings,
        (cosmos, expected): (&'a Cosmos, Expected),
        folder: &'a Path,
        batch: usize,
    ) -> Result<Self> {
        let at = |error: std::io::Error| Error::file(folder, error);
        fs::create_dir_all(folder).map_err(at)?;
        let mut manifest = Manifest::new((expected.grid, expected.n_codes), corpus.identity(), settings.decisive()?);
        manifest.tokenizer = cosmos.fingerprint()?;
        let mut seen = BTreeSet::new();
        if folder.join(MANIFEST).exists() {
            let found = Manifest::read(folder)?;
            check_same(&found, &manifest, folder)?;
            for mark in &found.shards {
                let n_codes = expected.grid.0 * expected.grid.1;
                seen.extend(Shard::open(&folder.join(&mark.file), (mark.rows, n_codes), mark.bytes)?.hashes());
            }
            manifest = found;
        }
        keep_lines(&folder.join(SKIPPED), manifest.n_skipped())?;
        let (n_read, skipped) = (manifest.n_read, manifest.skipped.clone());
        let tally = Tally { n_read, skipped, seen };
        let (rows, waiting) = (Vec::new(), Vec::new());
        Ok(Self { settings, cosmos, folder, batch, manifest, tally, rows, waiting })
    }

    fn take(&mut self, outcome: Outcome) -> Result<()> {
        match self.tally.count(outcome?, self.settings) {
            Err(skipped) => return self.skip(&skipped),
            Ok(mut prepared) => match std::mem::replace(&mut prepared.content, Ready::Codes(Vec::new())) {
                Ready::Codes(codes) => {
                    // A row stands behind those that wait for the encoder.
                    self.encode()?;
                    self.rows.push(row(prepared, codes));
                }
                Ready::Picture(picture) => self.waiting.push((prepared, picture)),
            },
        }
        let n_kept = self.rows.len() + self.waiting.len();
        if self.waiting.len() >= self.batch || n_kept >= self.settings.rows_per_shard {
            self.encode()?;
        }
        if self.rows.len() >= self.settings.rows_per_shard { self.close_shard() } else { Ok(()) }
    }

    fn skip(&mut self, skipped: &Skipped) -> Result<()> {
        let Skipped { name, reason, message } = skipped;
        let path = self.folder.join(SKIPPED);
        let line = json!({"name": name, "reason": reason.name(), "message": message});
        let file = OpenOptions::new().append(true).create(true).open(&path);
        file.and_then(|mut file| writeln!(file, "{line}")).map_err(|error| Error::file(&path, error))?;
        self.check_bad(false)
    }

    fn check_bad(&self, at_end: bool) -> Result<()> {
        let fault = |message: String| {
            let remedy = "look at this file, and where that share is right raise max_bad_share and go on with --resume";
            Error::file(self.folder.join(SKIPPED), format!("{message}; {remedy}"))
        };
        self.tally.check(self.settings, at_end).map_err(fault)
    }

    /// Makes rows of the pictures that wait.
    fn encode(&mut self) -> Result<()> {
        let (waiting, pictures): (Vec<Prepared>, Vec<RgbImage>) = self.waiting.drain(..).unzip();
        let codes = self.cosmos.encode(&pictures.iter().collect::<Vec<_>>())?;
        // The codebook has at most 2^16 codes.
        let narrow = |codes: Vec<u32>| codes.into_iter().map(|code| code as u16).collect();
        self.rows.extend(waiting.into_iter().zip(codes).map(|(prepared, codes)| row(prepared, narrow(codes))));
        Ok(())
    }

    fn close_shard(&mut self) -> Result<()> {
        let file = format!("{:05}.safetensors", self.manifest.shards.len());
        shard::write(&self.folder.join(&file), &self.rows)?;
        self.manifest.add(self.folder, file, self.rows.len())?;
        self.rows.clear();
        self.commit()
    }

    /// Writes the manifest, behind what it counts.
    fn commit(&mut self) -> Result<()> {
        let path = self.folder.join(SKIPPED);
        OpenOptions::new()
            .append(true)
            .create(true)
            .open(&path)
            .and_then(|file| file.sync_all())
            .map_err(|error| Error::file(&path, error))?;
        (self.manifest.n_read, self.manifest.skipped) = (self.tally.n_read, self.tally.skipped.clone());
        self.manifest.write(self.folder)
    }

    fn end(mut self) -> Result<Manifest> {
        self.check_bad(true)?;
        self.encode()?;
        if !self.rows.is_empty() {
            self.close_shard()?;
        }
        self.manifest.complete = true;
        self.commit()?;
        Ok(self.manifest)
    }
}

fn row(prepared: Prepared, codes: Vec<u16>) -> NewRow {
    let Prepared { name, lines, hash, .. } = prepared;
    NewRow { codes, lines, name, hash }
}

/// An error that names what differs between what a folder holds and what would be written.
fn check_same(found: &Manifest, ours: &Manifest, folder: &Path) -> Result<()> {
    let parts = |m: &Manifest| {
        let mut parts = vec![format!("grid {:?} of {} codes", m.grid, m.n_codes)];
        parts.push(format!("visual tokenizer {}", m.tokenizer));
        parts.extend(m.settings.lines().map(String::from));
        parts.push(format!("corpus {}", m.corpus));
        parts
    };
    match parts(found).iter().zip(&parts(ours)).find(|(found, ours)| found != ours) {
        None => Ok(()),
        Some((found, ours)) => Err(Error::file(
            folder,
            format!("the folder holds tokens of another run (there {found}, here {ours}); choose another --out"),
        )),
    }
}

/// Drops the lines of entries that are read again; lines that the manifest counts and that are not there are an error.
fn keep_lines(path: &Path, n: u64) -> Result<()> {
    let at = |error: std::io::Error| Error::file(path, error);
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(at(error)),
    };
    let kept: Vec<&str> = text.split_inclusive('\n').take(n as usize).collect();
    if (kept.len() as u64) < n {
        let remedy = "put the file back, or write the tokens again";
        return Err(Error::file(path, format!("it has {} lines and the manifest counts {n}; {remedy}", kept.len())));
    }
    let length: usize = kept.iter().map(|line| line.len()).sum();
    match length < text.len() {
        false => Ok(()),
        true => OpenOptions::new().write(true).open(path).and_then(|file| file.set_len(length as u64)).map_err(at),
    }
}

/// What was read, and what was left out of it.
#[derive(Default)]
struct Tally {
    /// Entries read, also behind the last whole shard.
    n_read: u64,
    skipped: BTreeMap<String, u64>,
    seen: BTreeSet<PictureHash>,
}

impl Tally {
    /// Counts an entry, which is left out where its picture was met before.
    fn count(&mut self, found: Result<Prepared, Skipped>, settings: &Settings) -> Result<Prepared, Skipped> {
        self.n_read += 1;
        let found =
            found.and_then(|prepared| match settings.filter.drop_duplicates && !self.seen.insert(prepared.hash) {
                false => Ok(prepared),
                true => {
                    let message = format!("{}: the same picture stands before it in the corpus", prepared.name);
                    Err(Skipped { name: prepared.name, reason: Reason::Duplicate, message })
                }
            });
        if let Err(skipped) = &found {
            *self.skipped.entry(skipped.reason.name().into()).or_default() += 1;
        }
        found
    }

    /// What is said where too many entries are bad. While there are more to come, three deviations beyond the share are chance.
    fn check(&self, settings: &Settings, at_end: bool) -> Result<(), String> {
        let n_bad: u64 = self.skipped.iter().filter(|(name, _)| is_bad(name)).map(|(_, n)| n).sum();
        let allowed = settings.max_bad_share * self.n_read.max(ENOUGH) as f64;
        let chance = if at_end { 0.0 } else { 3.0 * allowed.sqrt() };
        if n_bad as f64 <= allowed + chance {
            return Ok(());
        }
        Err(format!(
            "{n_bad} of {} entries could not be used, more than the share of {} that max_bad_share allows: {:?}",
            self.n_read, settings.max_bad_share, self.skipped
        ))
    }
}
