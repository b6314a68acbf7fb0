//! Decoding and cropping of training pictures beside Pillow, on one core.
//!
//! `cargo bench -p grpo-experiments --bench pictures -- PYTHON [--log]`, where PYTHON is what benches/peers/make.sh made, or
//! any with pillow 12.0.0 in it: `python3 -m venv DIR && DIR/bin/pip install pillow==12.0.0`. `--log` writes the table into
//! LOG.md.
//!
//! The pictures are the peer's, made anew in every run from seeds: JPEG of quality 92 with 4:2:0, in size like photographs.
//! Each side decodes and crops them from memory, in a process of its own, laps in turns; the numbers are medians over
//! laps of processor time, which other programs on the machine disturb least, by the kernel's account of each side's
//! thread (`/proc/thread-self/schedstat`). `ratio` is the peer's time over ours, the median over rounds of laps side by
//! side, once with Python as it is started and once with a C library told to keep freed memory, as our allocator does:
//! without it a third of Pillow's time may be pages that the system takes back and gives again. A last contender of ours
//! decodes by way of the crate `image`, to show what calling its decoder directly is worth. The parts are by the wall clock.
//! The means of the first crop's channels agree within half a level.

#![expect(clippy::print_stdout, reason = "a bench speaks to a person")]

#[path = "peer/mod.rs"]
#[expect(dead_code, reason = "devices, shapes and peaks are for other benches")]
mod peer;

use std::collections::BTreeMap;
use std::hint::black_box;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use grpo::picture::{MAX_DECODED_BYTES, Transparency, centre_crop, decode, decode_within};
use image::{ImageFormat, RgbImage};

use peer::arguments::Arguments;
use peer::contender::{Contender, End, Lap, serve};
use peer::report::Table;
use peer::{median, race, ratio, seconds, timed};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const ROUNDS: usize = 25;
/// Of each size.
const N_PICTURES: usize = 4;
/// So many pixels are decoded in a lap.
const PIXELS: usize = 24 << 20;
/// How far the mean of a channel may be from the peer's, in levels.
const TOLERANCE: f64 = 0.5;
/// Width and height of the pictures, and the side of the crop.
const CASES: [(&str, &str); 4] =
    [("1024x1024", "512"), ("2048x2048", "512"), ("1365x1024", "512"), ("1024x1024", "1024")];
const COLUMNS: [&str; 8] = [
    "case",
    "ours, images/s",
    "Pillow, images/s: as it is, keeping memory",
    "ratio: as it is, keeping memory",
    "ours by way of `image`, images/s",
    "ours: decode, crop, ms",
    "Pillow as it is: decode, crop, ms",
    "Pillow keeping memory: decode, crop, ms",
];
/// What becomes of the memory that Pillow frees.
const MEMORY: [&str; 2] = ["plain", "kept"];

fn main() -> Result<()> {
    grpo_policies::keep_freed_memory();
    let arguments = Arguments::read()?;
    match &arguments.words[..] {
        [worker, folder, size, side, decoder] if worker == "worker" => {
            work(Path::new(folder), size, side.parse()?, decoder)
        }
        [python] => {
            let table = race_all(python)?;
            println!("\n{table}");
            let about = format!("Processor time of one thread, medians of {ROUNDS} laps in turns; Pillow 12.0.0.");
            if arguments.log { table.log("training pictures beside Pillow", &about) } else { Ok(()) }
        }
        _ => bail!("give the PYTHON that has pillow, as the file's head says"),
    }
}

fn race_all(python: &str) -> Result<Table> {
    let folder = tempfile::tempdir()?;
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/peers/pictures.py");
    let made = Command::new(python).arg(program).arg("make").arg(folder.path()).status();
    ensure!(made.with_context(|| python.to_string())?.success(), "{python} made no pictures; does it have pillow?");
    let folder = folder.path().to_str().context("the temporary folder's name is not UTF-8")?;
    let mut table = Table::new(&COLUMNS);
    for (size, side) in CASES {
        let arguments = |first: &str, last: &[&str]| -> Vec<String> {
            [&[first, folder, size, side], last].concat().iter().map(ToString::to_string).collect()
        };
        let ours = |decoder| Contender::start_worker(&arguments("", &[decoder])[1..]);
        let pillow = |memory| Contender::start_peer(python, "pictures.py", &arguments("crop", &[memory]));
        let contenders = &mut [ours("direct")?, pillow(MEMORY[0])?, pillow(MEMORY[1])?, ours("image")?];
        let laps = race(contenders, ROUNDS)?;
        for (ours, pillows) in laps[0].iter().zip(&laps[1]) {
            let far = ours.value.iter().zip(&pillows.value).take(3).any(|(a, b)| (a - b).abs() > TOLERANCE);
            ensure!(!far, "{size}: the crops' means are {:?} and Pillow's {:?}", ours.value, pillows.value);
        }
        let rate = |laps: &[Lap]| format!("{:.0}", 1.0 / seconds(laps));
        let part = |laps: &[Lap], at: usize| 1e3 * median(laps.iter().filter_map(|lap| lap.value.get(at).copied()));
        let parts = |laps: &[Lap]| format!("{:.2}, {:.2}", part(laps, 3), part(laps, 4));
        table.push(vec![
            format!("{size} to {side}x{side}"),
            rate(&laps[0]),
            format!("{}, {}", rate(&laps[1]), rate(&laps[2])),
            format!("{:.2}, {:.2}", ratio(&laps[0], &laps[1]), ratio(&laps[0], &laps[2])),
            rate(&laps[3]),
            parts(&laps[0]),
            parts(&laps[1]),
            parts(&laps[2]),
        ]);
    }
    Ok(table)
}

/// Our end: laps over the folder's pictures of this size.
fn work(folder: &Path, size: &str, side: u32, decoder: &str) -> Result<()> {
    let names = (0..N_PICTURES).map(|seed| folder.join(format!("{size}_{seed}.jpg")));
    let files = names.map(|name| Ok(std::fs::read(name)?)).collect::<Result<Vec<_>>>()?;
    let read: fn(&[u8]) -> Result<RgbImage> = match decoder {
        "image" => |file| Ok(decode_within(file, ImageFormat::Jpeg, MAX_DECODED_BYTES)?),
        _ => |file| Ok(decode(file, Transparency::Dropped)?),
    };
    let (first, _) = timed(|| read(&files[0]))?;
    let n_pictures = (PIXELS / (first.width() as usize * first.height() as usize)).max(N_PICTURES);
    let lap = || {
        let started = processor_seconds()?;
        let (mut value, mut decoding, mut cropping) = (Vec::new(), 0.0, 0.0);
        for file in files.iter().cycle().take(n_pictures) {
            let (image, seconds) = timed(|| read(file))?;
            decoding += seconds / n_pictures as f64;
            let (cropped, seconds) = timed(|| Ok(black_box(centre_crop(image, side, side))))?;
            cropping += seconds / n_pictures as f64;
            if value.is_empty() {
                value = means(&cropped);
            }
        }
        value.extend([decoding, cropping]);
        Ok(Lap { seconds: (processor_seconds()? - started) / n_pictures as f64, value })
    };
    serve(lap, |peak_bytes| End { peak_bytes, notes: BTreeMap::new() })
}

fn means(image: &RgbImage) -> Vec<f64> {
    let n_pixels = f64::from(image.width()) * f64::from(image.height());
    let sum = |channel| image.iter().skip(channel).step_by(3).map(|&value| u64::from(value)).sum::<u64>();
    (0..3).map(|channel| sum(channel) as f64 / n_pixels).collect()
}

/// What the kernel has counted of this thread's time on a processor.
fn processor_seconds() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat")?;
    let nanoseconds: f64 = text.split(' ').next().context("/proc/thread-self/schedstat is empty")?.parse()?;
    Ok(nanoseconds / 1e9)
}
