//! Entries to cropped pictures on worker threads, in the order of the corpus.
//!
//! A reader hands entry `n` to worker `n mod w` and the pictures are taken back in the same turns, so the order is the corpus's
//! whatever the number of workers, and no more than a few entries a worker are ever in memory.

use std::ops::ControlFlow;

use crossbeam_channel::{Receiver, Sender, bounded};
use grpo::Result;
use grpo::picture::{Fault, centre_crop, decode};
use image::RgbImage;
use sha2::{Digest, Sha256};

use super::settings::Settings;
use super::shard::PictureHash;
use crate::corpus::{Content, Corpus, Entry, Found, Reason, Skipped};

/// Entries that wait before and behind each worker.
const WAITING: usize = 8;

/// An entry that is ready for the visual tokenizer.
pub(super) struct Prepared {
    pub(super) name: String,
    pub(super) lines: Vec<String>,
    pub(super) hash: PictureHash,
    pub(super) content: Ready,
}

/// What is left to do.
pub(super) enum Ready {
    /// A picture of the wanted size.
    Picture(RgbImage),
    /// Nothing.
    Codes(Vec<u16>),
}

/// An entry that was kept or left out; the outer error ends the reading.
pub(super) type Outcome = Result<std::result::Result<Prepared, Skipped>>;

/// What the codes have to be, where they come as they are.
#[derive(Clone, Copy)]
pub(super) struct Expected {
    pub(super) grid: (usize, usize),
    pub(super) n_codes: u32,
}

/// Reads a corpus from its `first` entry on and gives each entry to `take`, in order, until that has enough.
pub(super) fn each(
    (corpus, first): (&dyn Corpus, u64),
    (settings, expected): (&Settings, Expected),
    n_workers: usize,
    mut take: impl FnMut(Outcome) -> Result<ControlFlow<()>>,
) -> Result<()> {
    let (raw, ready): (Vec<_>, Vec<_>) =
        (0..n_workers.max(1)).map(|_| (bounded::<Result<Found>>(WAITING), bounded::<Outcome>(WAITING))).unzip();
    std::thread::scope(|scope| {
        let (raw_in, raw_out): (Vec<Sender<_>>, Vec<Receiver<_>>) = raw.into_iter().unzip();
        let (ready_in, ready_out): (Vec<Sender<_>>, Vec<Receiver<_>>) = ready.into_iter().unzip();
        scope.spawn(move || read(corpus, first, &raw_in));
        for (raw, ready) in raw_out.into_iter().zip(ready_in) {
            scope.spawn(move || {
                let outcome =
                    |found: Result<Found>| found.map(|found| found.and_then(|e| prepare(e, settings, expected)));
                raw.into_iter().all(|found| ready.send(outcome(found)).is_ok())
            });
        }
        // The receivers end with this closure, and with them the threads that send to them.
        let ready_out = ready_out;
        for outcome in ready_out.iter().cycle().map_while(|worker| worker.recv().ok()) {
            if take(outcome)?.is_break() {
                break;
            }
        }
        Ok(())
    })
}

/// Hands entries out in turns; a receiver that is gone ends it.
fn read(corpus: &dyn Corpus, first: u64, workers: &[Sender<Result<Found>>]) {
    let mut turns = workers.iter().cycle();
    let mut hand_out = |found: Result<Found>| turns.next().is_some_and(|worker| worker.send(found).is_ok());
    match corpus.entries(first) {
        Err(error) => drop(hand_out(Err(error))),
        Ok(mut entries) => drop(entries.all(hand_out)),
    }
}

fn prepare(entry: Entry, settings: &Settings, expected: Expected) -> Result<Prepared, Skipped> {
    let Entry { name, content, caption } = entry;
    let skipped = |(reason, message): (Reason, String)| Skipped { name: name.clone(), reason, message };
    let lines = caption.lines;
    if lines.iter().all(|line| line.trim().is_empty()) {
        return Err(skipped((Reason::EmptyCaption, "the caption is empty".into())));
    }
    if let Some(why) = settings.filter.caption(&lines) {
        return Err(skipped(why));
    }
    let (hash, content) = match content {
        Content::Codes { codes, grid } => {
            let bytes: Vec<u8> = codes.iter().flat_map(|code| code.to_le_bytes()).collect();
            (hash(&bytes), Ready::Codes(checked(codes, grid, expected).map_err(skipped)?))
        }
        Content::Encoded(bytes) => {
            let picture = decode(&bytes, settings.transparency).map_err(|fault| skipped(reason(fault)))?;
            (hash(&bytes), cropped(picture, settings).map_err(skipped)?)
        }
        Content::Picture(picture) => (hash(picture.as_raw()), cropped(picture, settings).map_err(skipped)?),
    };
    Ok(Prepared { name, lines, hash, content })
}

fn cropped(picture: RgbImage, settings: &Settings) -> Result<Ready, (Reason, String)> {
    match settings.filter.size(picture.width(), picture.height()) {
        Some(why) => Err(why),
        None => Ok(Ready::Picture(centre_crop(picture, settings.width, settings.height))),
    }
}

fn checked(codes: Vec<u16>, grid: (usize, usize), expected: Expected) -> Result<Vec<u16>, (Reason, String)> {
    let Expected { grid: wanted, n_codes } = expected;
    if grid != wanted || codes.len() != grid.0 * grid.1 {
        let message = format!("{} codes in a grid of {grid:?}; expected {wanted:?}", codes.len());
        return Err((Reason::WrongCodes, message));
    }
    match codes.iter().find(|code| u32::from(**code) >= n_codes) {
        Some(code) => Err((Reason::WrongCodes, format!("code {code}; the codebook has {n_codes}"))),
        None => Ok(codes),
    }
}

fn hash(bytes: &[u8]) -> PictureHash {
    let mut half = PictureHash::default();
    half.copy_from_slice(&Sha256::digest(bytes)[..16]);
    half
}

fn reason(fault: Fault) -> (Reason, String) {
    match fault {
        Fault::TooLarge(message) => (Reason::TooLarge, message),
        Fault::Damaged(message) => (Reason::DamagedPicture, message),
        Fault::Unknown(message) => (Reason::UnknownPicture, message),
    }
}
