//! One file of tokens: safetensors, so that any language reads it, mapped into memory, so that any row is at hand.
//!
//! | tensor | type, shape | what |
//! |---|---|---|
//! | `codes` | U16 `[n, h·w]` | visual codes in raster order |
//! | `captions` | U8 `[bytes]` | captions, one after the other, UTF-8; lines of one caption are parted by `\n` |
//! | `caption_ends` | U64 `[n]` | where each caption ends |
//! | `names` | U8 `[bytes]` | where each row came from |
//! | `name_ends` | U64 `[n]` | where each name ends |
//! | `hashes` | U8 `[n, 16]` | the first half of the SHA-256 of the picture as it was stored |
//! | `checks` | U32 `[n]` | CRC-32C of a row's codes (little-endian) and then its caption |

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use grpo::{Error, Result, write_whole};
use memmap2::Mmap;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

/// The hash of a picture as it was stored.
pub type PictureHash = [u8; 16];

/// A row that is to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewRow {
    /// Visual codes in raster order.
    pub codes: Vec<u16>,
    /// The caption's lines: short and long, or one for both.
    pub lines: Vec<String>,
    /// Where it came from.
    pub name: String,
    /// Of the picture as it was stored.
    pub hash: PictureHash,
}

/// Writes a shard under a temporary name, synced, and renames it; nothing else has that name before it is whole.
pub(super) fn write(path: &Path, rows: &[NewRow]) -> Result<()> {
    let fault = |error: &dyn std::fmt::Display| Error::file(path, format!("{error}; what was written before is kept"));
    let n_codes = rows.first().map_or(0, |row| row.codes.len());
    let (mut codes, mut checks, mut hashes) = (Vec::new(), Vec::new(), Vec::new());
    let (mut captions, mut names) = (Texts::default(), Texts::default());
    for row in rows {
        let (bytes, caption) = (code_bytes(&row.codes), row.lines.join("\n"));
        checks.extend(check(&bytes, caption.as_bytes()).to_le_bytes());
        codes.extend(bytes);
        hashes.extend(row.hash);
        captions.push(&caption);
        names.push(&row.name);
    }
    let n = rows.len();
    let tensors = [
        ("codes", Dtype::U16, vec![n, n_codes], &codes),
        ("captions", Dtype::U8, vec![captions.bytes.len()], &captions.bytes),
        ("caption_ends", Dtype::U64, vec![n], &captions.ends),
        ("names", Dtype::U8, vec![names.bytes.len()], &names.bytes),
        ("name_ends", Dtype::U64, vec![n], &names.ends),
        ("hashes", Dtype::U8, vec![n, 16], &hashes),
        ("checks", Dtype::U32, vec![n], &checks),
    ];
    let views: Vec<(&str, TensorView<'_>)> = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| Ok((*name, TensorView::new(*dtype, shape.clone(), bytes)?)))
        .collect::<Result<_, safetensors::SafeTensorError>>()
        .map_err(|error| fault(&error))?;
    let bytes = safetensors::serialize(views, None).map_err(|error| fault(&error))?;
    write_whole(path, &bytes)
}

fn code_bytes(codes: &[u16]) -> Vec<u8> {
    codes.iter().flat_map(|code| code.to_le_bytes()).collect()
}

fn check(codes: &[u8], caption: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(codes), caption)
}

/// Texts one after the other, and where each ends.
#[derive(Default)]
struct Texts {
    bytes: Vec<u8>,
    ends: Vec<u8>,
}

impl Texts {
    fn push(&mut self, text: &str) {
        self.bytes.extend(text.as_bytes());
        self.ends.extend((self.bytes.len() as u64).to_le_bytes());
    }
}

/// A shard that is open for reading.
#[derive(Debug)]
pub(super) struct Shard {
    path: PathBuf,
    map: Mmap,
    n_rows: usize,
    n_codes: usize,
    codes: Range<usize>,
    captions: Range<usize>,
    caption_ends: Range<usize>,
    hashes: Range<usize>,
    checks: Range<usize>,
}

impl Shard {
    /// Opens a shard of `n_rows` rows of `n_codes` codes each and `bytes` bytes.
    pub(super) fn open(path: &Path, (n_rows, n_codes): (usize, usize), bytes: u64) -> Result<Self> {
        let fault = |message: String| Error::file(path, format!("{message}; write the tokens again"));
        let file = File::open(path).map_err(|error| fault(error.to_string()))?;
        let size = file.metadata().map_err(|error| fault(error.to_string()))?.len();
        if size != bytes {
            return Err(fault(format!("the file has {size} bytes; the manifest says {bytes}: it is not whole")));
        }
        let map = map(&file).map_err(|error| fault(error.to_string()))?;
        let (header, metadata) = SafeTensors::read_metadata(&map).map_err(|error| fault(error.to_string()))?;
        let part = |name: &str, dtype: Dtype, shape: Option<&[usize]>| -> Result<Range<usize>> {
            let Some(info) = metadata.info(name) else { return Err(fault(format!("it has no tensor `{name}`"))) };
            if info.dtype != dtype || shape.is_some_and(|shape| info.shape != shape) {
                return Err(fault(format!(
                    "tensor `{name}` is {:?} {:?}; expected {dtype:?} {shape:?}",
                    info.dtype, info.shape
                )));
            }
            let (first, end) = info.data_offsets;
            Ok(8 + header + first..8 + header + end)
        };
        Ok(Self {
            codes: part("codes", Dtype::U16, Some(&[n_rows, n_codes]))?,
            captions: part("captions", Dtype::U8, None)?,
            caption_ends: part("caption_ends", Dtype::U64, Some(&[n_rows]))?,
            hashes: part("hashes", Dtype::U8, Some(&[n_rows, 16]))?,
            checks: part("checks", Dtype::U32, Some(&[n_rows]))?,
            path: path.into(),
            n_rows,
            n_codes,
            map,
        })
    }

    /// The codes and the caption of a row, proven to be what was written.
    pub(super) fn row(&self, row: usize) -> Result<(Vec<u16>, &str)> {
        let damaged = || {
            let message = format!("row {row} is damaged: its checksum is not what was written");
            Error::file(&self.path, format!("{message}; write the tokens again"))
        };
        let bytes = self.part(&self.codes, row * 2 * self.n_codes, 2 * self.n_codes).ok_or_else(damaged)?;
        let end = self.number(&self.caption_ends, row).ok_or_else(damaged)?;
        let first = if row == 0 { 0 } else { self.number(&self.caption_ends, row - 1).ok_or_else(damaged)? };
        let length = end.checked_sub(first).ok_or_else(damaged)?;
        let caption = self.part(&self.captions, first, length).ok_or_else(damaged)?;
        let expected = self.part(&self.checks, 4 * row, 4).ok_or_else(damaged)?;
        if expected != check(bytes, caption).to_le_bytes() {
            return Err(damaged());
        }
        let codes = bytes.as_chunks::<2>().0.iter().map(|pair| u16::from_le_bytes(*pair)).collect();
        Ok((codes, std::str::from_utf8(caption).map_err(|_| damaged())?))
    }

    /// The hashes of all its pictures.
    pub(super) fn hashes(&self) -> impl Iterator<Item = PictureHash> + '_ {
        (0..self.n_rows).filter_map(|row| self.part(&self.hashes, 16 * row, 16)?.try_into().ok())
    }

    fn part(&self, tensor: &Range<usize>, first: usize, length: usize) -> Option<&[u8]> {
        self.map.get(tensor.clone())?.get(first..first.checked_add(length)?)
    }

    fn number(&self, tensor: &Range<usize>, at: usize) -> Option<usize> {
        let bytes = self.part(tensor, 8 * at, 8)?.try_into().ok()?;
        usize::try_from(u64::from_le_bytes(bytes)).ok()
    }
}

#[expect(unsafe_code, reason = "a map of a file is unsafe by nature")]
fn map(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: shards are written under another name and renamed when whole, and nothing here changes them afterwards. Whoever
    // cuts a file short while a run reads it kills the run, as with every mapped file; changed bytes fail a row's checksum.
    unsafe { Mmap::map(file) }
}
