//! The imported tokenizer at its published size: the same codes and pixels as NVIDIA's modules, and its time and memory.
//!
//! `cargo bench -p grpo-experiments --bench cosmos -- FOLDER`, where FOLDER is what policies/tests/cosmos_full_size.py
//! made; seconds are compared with those that the script measured of torch with as many threads. A code or a pixel that
//! differs fails.

#![expect(clippy::print_stdout, reason = "a bench speaks to a person")]

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use candle_core::Device;
use grpo_policies::cosmos::Cosmos;
use image::RgbImage;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The largest error of a pixel in `[-1, 1]`; a byte is 8e-3.
const TOLERANCE: f32 = 1e-4;

/// A case of the script.
#[derive(serde::Deserialize)]
struct Case {
    side: u32,
    codes: Vec<u32>,
    encode_s: f64,
    decode_s: f64,
}

fn main() -> Result<()> {
    grpo_policies::keep_freed_memory();
    let folder = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    let folder = folder.context("give the folder that policies/tests/cosmos_full_size.py made")?;
    let folder = Path::new(&folder);
    let tokenizer = Cosmos::load(folder.join("tokenizer"), &Device::Cpu)?;
    println!("{:>5} {:>11} {:>11} {:>9}  peak", "px", "grpo", "torch", "speed");
    let mut paths: Vec<_> = std::fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
    paths.sort_by_key(|path| path.metadata().map_or(0, |metadata| metadata.len()));
    ensure!(!paths.is_empty(), "{} holds no case; run policies/tests/cosmos_full_size.py", folder.display());
    for path in paths {
        check(&tokenizer, folder, &serde_json::from_slice(&std::fs::read(&path)?)?)?;
    }
    Ok(())
}

fn check(tokenizer: &Cosmos, folder: &Path, case: &Case) -> Result<()> {
    let side = case.side;
    let bytes = std::fs::read(folder.join(format!("{side}.rgb")))?;
    let image = RgbImage::from_raw(side, side, bytes).with_context(|| format!("{side}.rgb is too short"))?;
    let codes = timed(side, "encode", case.encode_s, || Ok(tokenizer.encode(&[&image])?))?;
    let wrong = codes[0].iter().zip(&case.codes).filter(|(got, expected)| got != expected).count();
    ensure!(codes[0].len() == case.codes.len() && wrong == 0, "{wrong} of {} codes differ", case.codes.len());
    let grid = tokenizer.grid(side as usize, side as usize)?;
    let values = tokenizer.values(&codes, grid)?;
    let pixels = timed(side, "decode", case.decode_s, || Ok(tokenizer.reconstruct(&values)?))?;
    let expected = std::fs::read(folder.join(format!("{side}.f32")))?;
    let expected = expected.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
    let got: Vec<f32> = pixels.flatten_all()?.to_vec1()?;
    ensure!(got.len() == expected.len(), "{} pixels where {} are due", got.len(), expected.len());
    let error = got.iter().zip(expected).map(|(got, expected)| (got - expected).abs()).fold(0.0, f32::max);
    println!("{side:>5} {} codes are torch's; largest error of a pixel {error:.1e}", case.codes.len());
    ensure!(error < TOLERANCE, "the largest error of a pixel is {error}; at most {TOLERANCE}");
    Ok(())
}

/// The faster of two runs, and the memory that both touched.
fn timed<T>(side: u32, what: &str, torch_s: f64, run: impl Fn() -> Result<T>) -> Result<T> {
    // Where there is such a file, this lets the high-water mark begin anew.
    drop(std::fs::write("/proc/self/clear_refs", "5"));
    let mut seconds = f64::INFINITY;
    let mut result = None;
    for _ in 0..2 {
        let start = Instant::now();
        result = Some(run()?);
        seconds = seconds.min(start.elapsed().as_secs_f64());
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).map_or("unknown", str::trim);
    println!("{side:>5} {what} {seconds:>6.2} s {torch_s:>9.2} s {:>7.2} x  {peak}", torch_s / seconds);
    result.context("nothing was run")
}
