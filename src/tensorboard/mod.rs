//! TensorBoard event files: scalars, images, histograms, text, the table of hyper-parameters and a chart layout.
//!
//! TFRecord framing with masked CRC-32C around hand-encoded `tensorflow.Event` messages. The `tensorboard-rs` crate
//! (0.5.9) was tried first: its text and hparams calls panic, `add_image` transposes images that are not square,
//! and two writers in one second share a file; these hundred lines need `crc32c` and `image` alone.

use std::fs::File;
use std::io::{BufWriter, Cursor, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use image::{ImageFormat, RgbImage};

use crate::{Error, Result};

mod hparams;
mod layout;

pub use hparams::HParam;
pub use layout::{Category, Chart};

/// Writes one event file.
pub struct EventWriter {
    file: BufWriter<File>,
    path: PathBuf,
}

impl EventWriter {
    /// A new event file in `folder`, named after the time and this process.
    ///
    /// Events that an earlier file of the folder holds at `first_step` or later are hidden by TensorBoard: they are
    /// of a run that was broken off and resumed here.
    pub fn create(folder: &Path, first_step: usize) -> Result<Self> {
        let stamp = seconds();
        let taken = |n: &u32| !name(folder, stamp, *n).exists();
        let path = (0..1000).find(taken).map_or_else(|| name(folder, stamp, 0), |n| name(folder, stamp, n));
        let file = File::create(&path).map_err(|error| Error::file(&path, error))?;
        let mut writer = Self { file: BufWriter::new(file), path };
        writer.record(&event(0).text(3, "brain.Event:2"))?;
        // A new run says so too: TensorBoard takes the first start in a folder for the run's own and hides nothing.
        let start = Message::new().int(1, 1);
        writer.record(&event(first_step).message(7, &start))?;
        writer.flush()?;
        Ok(writer)
    }

    /// One point of a curve.
    pub fn scalar(&mut self, tag: &str, step: usize, value: f64) -> Result<()> {
        self.value(step, Message::new().text(1, tag).f32(2, value as f32))
    }

    /// A picture.
    pub fn image(&mut self, tag: &str, step: usize, picture: &RgbImage) -> Result<()> {
        let mut png = Cursor::new(Vec::new());
        picture.write_to(&mut png, ImageFormat::Png).map_err(|error| Error::file(&self.path, error))?;
        let encoded = Message::new()
            .int(1, u64::from(picture.height()))
            .int(2, u64::from(picture.width()))
            .int(3, 3)
            .bytes(4, png.get_ref());
        self.value(step, Message::new().text(1, tag).message(4, &encoded))
    }

    /// Text in Markdown.
    pub fn text(&mut self, tag: &str, step: usize, text: &str) -> Result<()> {
        let plugin = Message::new().text(1, "text");
        self.value(step, plugin_value(tag, &plugin, &string_tensor(text.as_bytes())))
    }

    /// The distribution of `values` over 30 bins of equal width; values that are not finite are left out.
    pub fn histogram(&mut self, tag: &str, step: usize, values: &[f32]) -> Result<()> {
        const BINS: usize = 30;
        let values: Vec<f64> = values.iter().map(|&x| f64::from(x)).filter(|x| x.is_finite()).collect();
        let low = values.iter().copied().fold(f64::INFINITY, f64::min);
        let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if values.is_empty() {
            return Ok(());
        }
        let width = ((high - low) / BINS as f64).max(1e-12);
        let mut counts = [0.0; BINS];
        for x in &values {
            counts[(((x - low) / width) as usize).min(BINS - 1)] += 1.0;
        }
        let edges: Vec<f64> = (1..=BINS).map(|bin| low + width * bin as f64).collect();
        let histogram = Message::new()
            .f64(1, low)
            .f64(2, high)
            .f64(3, values.len() as f64)
            .f64(4, values.iter().sum())
            .f64(5, values.iter().map(|x| x * x).sum())
            .bytes(6, &packed(&edges))
            .bytes(7, &packed(&counts));
        self.value(step, Message::new().text(1, tag).message(5, &histogram))
    }

    /// Hands everything written so far to the file system, so that a running TensorBoard sees it.
    pub fn flush(&mut self) -> Result<()> {
        self.file.flush().map_err(|error| Error::file(&self.path, error))
    }

    fn value(&mut self, step: usize, value: Message) -> Result<()> {
        let summary = Message::new().message(1, &value);
        self.record(&event(step).message(5, &summary))
    }

    fn record(&mut self, event: &Message) -> Result<()> {
        let length = (event.0.len() as u64).to_le_bytes();
        let parts: [&[u8]; 4] =
            [&length, &masked_crc(&length).to_le_bytes(), &event.0, &masked_crc(&event.0).to_le_bytes()];
        for part in parts {
            self.file.write_all(part).map_err(|error| Error::file(&self.path, error))?;
        }
        Ok(())
    }
}

fn name(folder: &Path, stamp: f64, n: u32) -> PathBuf {
    folder.join(format!("events.out.tfevents.{}.grpo.{}.{n}", stamp as u64, std::process::id()))
}

fn seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |elapsed| elapsed.as_secs_f64())
}

fn event(step: usize) -> Message {
    Message::new().f64(1, seconds()).int(2, step as u64)
}

/// What a plugin of TensorBoard reads: the plugin's name and content as metadata, and a tensor.
fn plugin_value(tag: &str, plugin: &Message, tensor: &Message) -> Message {
    /// `DATA_CLASS_TENSOR`: TensorBoard guesses the class for its own plugins' old files only.
    const TENSOR: u64 = 2;
    let metadata = Message::new().message(1, plugin).int(4, TENSOR);
    Message::new().text(1, tag).message(8, tensor).message(9, &metadata)
}

/// A tensor of one string.
fn string_tensor(value: &[u8]) -> Message {
    const DT_STRING: u64 = 7;
    let shape = Message::new().message(2, &Message::new().int(1, 1));
    Message::new().int(1, DT_STRING).message(2, &shape).bytes(8, value)
}

/// The CRC of the TFRecord format: rotated and offset, so that a CRC of data holding CRCs stays a good one.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xA282_EAD8)
}

fn packed(values: &[f64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// A protocol-buffer message under construction.
struct Message(Vec<u8>);

impl Message {
    fn new() -> Self {
        Self(Vec::new())
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn key(&mut self, field: u64, wire_type: u64) {
        self.varint(field << 3 | wire_type);
    }

    fn int(mut self, field: u64, value: u64) -> Self {
        self.key(field, 0);
        self.varint(value);
        self
    }

    fn f32(mut self, field: u64, value: f32) -> Self {
        self.key(field, 5);
        self.0.extend(value.to_le_bytes());
        self
    }

    fn f64(mut self, field: u64, value: f64) -> Self {
        self.key(field, 1);
        self.0.extend(value.to_le_bytes());
        self
    }

    fn bytes(mut self, field: u64, value: &[u8]) -> Self {
        self.key(field, 2);
        self.varint(value.len() as u64);
        self.0.extend(value);
        self
    }

    fn text(self, field: u64, value: &str) -> Self {
        self.bytes(field, value.as_bytes())
    }

    fn message(self, field: u64, value: &Message) -> Self {
        self.bytes(field, &value.0)
    }
}

/// The bytes that the official classes give for the message `name`: tests/golden/board.py.
#[cfg(test)]
fn golden(name: &str) -> Vec<u8> {
    let golden: serde_json::Value = serde_json::from_str(include_str!("../../tests/golden/board.json")).expect("JSON");
    let hex = golden[name].as_str().expect("a message of that name");
    (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).expect("hex")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The examples of the encoding guide: field 1 = 150, and field 2 = "testing".
    #[test]
    fn varints_and_keys_follow_the_protocol_buffer_encoding() {
        assert_eq!(Message::new().int(1, 150).0, [0x08, 0x96, 0x01]);
        assert_eq!(Message::new().text(2, "testing").0, b"\x12\x07testing");
    }

    #[test]
    fn two_writers_in_one_second_do_not_share_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let first = EventWriter::create(folder.path(), 0).unwrap();
        let second = EventWriter::create(folder.path(), 0).unwrap();
        assert_ne!(first.path, second.path);
    }

    #[test]
    fn the_first_file_of_a_folder_starts_a_session_too() {
        let folder = tempfile::tempdir().unwrap();
        for first_step in [0, 5] {
            let writer = EventWriter::create(folder.path(), first_step).unwrap();
            let session_start = Message::new().int(2, first_step as u64).message(7, &Message::new().int(1, 1));
            let bytes = std::fs::read(&writer.path).unwrap();
            let found = bytes.windows(session_start.0.len()).any(|part| part == session_start.0);
            assert!(found, "no start of a session at step {first_step}");
        }
    }
}
