//! CLIP and HPSv2 at their published size: the same pixels, embeddings and scores as the original programs, and the time.
//!
//! - `cargo bench -p grpo-experiments --bench clip -- check CHECK MODEL` compares every mode of preprocessing with what
//!   rewards/export/check_full_size.py wrote to CHECK; a cosine that differs by more than 1e-4 (2e-3 for fp16) fails.
//! - `cargo bench -p grpo-experiments --bench clip -- speed CHECK MODEL PYTHON [openvino]` times the image tower, in turns
//!   with torch in f32 and bf16 and with the tower's matrix products alone, at batches of 1 and 8 and with two threads. For
//!   OpenVINO, ORT_DYLIB_PATH names the library of its package.
//!
//! MODEL is a folder that rewards/export/export_clip.py made of the same weights.

#![expect(clippy::print_stdout, reason = "a bench speaks to a person")]

#[expect(dead_code, reason = "its laps are of two sizes and judged here")]
#[path = "peer/mod.rs"]
mod peer;

use std::num::NonZeroUsize;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use grpo_rewards::clip::{ClipReward, Preprocess};
use grpo_rewards::onnx::{OpenVino, OpenVinoPrecision, Precision, Provider, SessionOptions};
use image::RgbImage;
use serde::Deserialize;
use serde::de::IntoDeserializer;
use serde::de::value::StrDeserializer;

use peer::contender::Contender;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The largest difference of a preprocessed value, which is a level of 1/255 times a hundredth, over the deviation.
const PIXEL_TOLERANCE: f32 = 2e-4;
const THREADS: NonZeroUsize = NonZeroUsize::new(peer::THREADS).unwrap();
const ROUNDS: usize = 5;

/// `check.json`.
#[derive(Deserialize)]
struct Check {
    n: usize,
    size: usize,
    embed_dim: usize,
    modes: Vec<String>,
    prompts: Vec<String>,
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["check", check, model] => compare(Path::new(check), Path::new(model)),
        ["speed", check, model, python] => race(Path::new(check), Path::new(model), python, Provider::Cpu),
        ["speed", check, model, python, "openvino"] => {
            let provider = Provider::Openvino(OpenVino { precision: OpenVinoPrecision::Bf16 });
            race(Path::new(check), Path::new(model), python, provider)
        }
        _ => bail!("give `check CHECK MODEL` or `speed CHECK MODEL PYTHON [openvino]`; the file's head says more"),
    }
}

fn read_check(folder: &Path) -> Result<(Check, Vec<RgbImage>)> {
    let text = std::fs::read(folder.join("check.json")).context("run rewards/export/check_full_size.py first")?;
    let check: Check = serde_json::from_slice(&text)?;
    let open = |at| Ok(image::open(folder.join(format!("{at:03}.png")))?.to_rgb8());
    let images = (0..check.n).map(open).collect::<Result<_>>()?;
    Ok((check, images))
}

/// Rows of `width` numbers; a last one that was cut short is left out.
fn read_rows(path: &Path, width: usize) -> Result<Vec<Vec<f32>>> {
    let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
    let values: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    Ok(values.chunks_exact(width).map(<[f32]>::to_vec).collect())
}

/// MODEL with another mode of preprocessing; its other files are linked, not copied.
fn with_mode(model: &Path, mode: &str, beside: &Path) -> Result<ClipReward> {
    let folder = tempfile::tempdir_in(beside)?;
    for entry in std::fs::read_dir(model)? {
        let path = entry?.path();
        let target = folder.path().join(path.file_name().context("a file of the model has no name")?);
        if path.ends_with("reward.toml") {
            let mut manifest: toml::Table = std::fs::read_to_string(&path)?.parse()?;
            let clip = manifest["scorer"]["clip"].as_table_mut().context("no [scorer.clip]")?;
            clip.insert("preprocess".into(), mode.into());
            std::fs::write(&target, toml::to_string(&manifest)?)?;
        } else {
            std::fs::hard_link(&path, &target).or_else(|_| std::fs::copy(&path, &target).map(drop))?;
        }
    }
    Ok(ClipReward::load_with(folder.path(), &SessionOptions::with_threads(THREADS))?)
}

/// The largest absolute difference between two lists of rows.
fn largest(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    let pairs = a.iter().flatten().zip(b.iter().flatten());
    pairs
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, |largest, off| if off.is_nan() { f32::INFINITY } else { off.max(largest) })
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

/// The cosine of every image with every text.
fn cosines(images: &[Vec<f32>], texts: &[Vec<f32>]) -> Vec<Vec<f32>> {
    let cosine = |a: &[f32], b: &[f32]| (dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()) as f32;
    images.iter().map(|image| texts.iter().map(|text| cosine(image, text)).collect()).collect()
}

fn compare(folder: &Path, model: &Path) -> Result<()> {
    let (check, images) = read_check(folder)?;
    let exact_texts = read_rows(&folder.join("texts.f32"), check.embed_dim)?;
    let originals = |mode: &String| read_rows(&folder.join(format!("{mode}.f32")), check.embed_dim);
    let originals: Vec<Vec<Vec<f32>>> = check.modes.iter().map(originals).collect::<Result<_>>()?;
    let scores: Vec<Vec<Vec<f32>>> = originals.iter().map(|images| cosines(images, &exact_texts)).collect();
    println!(
        "{:<15} {:>7} {:>9} {:>9} {:>9} {:>9} {:>9}",
        "mode", "images", "pixels", "image", "text", "cosine", "others"
    );
    let prompts: Vec<&str> = check.prompts.iter().map(String::as_str).collect();
    let mut texts = Vec::new();
    for (at, mode) in check.modes.iter().enumerate() {
        let pixels = pixel_difference(folder, &check, &images, mode)?;
        let clip = with_mode(model, mode, folder)?;
        let tolerance = if clip.scorer().precision == Precision::Fp16 { 2e-3 } else { 1e-4 };
        let n = originals[at].len();
        if texts.is_empty() {
            // No mode of preprocessing concerns them.
            texts = clip.embed_texts(&prompts)?;
        }
        let embedded = clip.embed_images(&images.iter().take(n).collect::<Vec<_>>())?;
        let off = largest(&cosines(&embedded, &texts), &scores[at]);
        // How far the nearest other mode's scores are: a test that cannot tell them apart would prove nothing.
        let others = scores.iter().enumerate().filter(|(other, _)| *other != at);
        let others = others.map(|(_, other)| largest(other, &scores[at])).fold(f32::INFINITY, f32::min);
        let (image, text) = (largest(&embedded, &originals[at]), largest(&texts, &exact_texts));
        println!("{mode:<15} {n:>7} {pixels:>9.1e} {image:>9.1e} {text:>9.1e} {off:>9.1e} {others:>9.1e}");
        ensure!(texts.len() == exact_texts.len() && !embedded.is_empty(), "{mode}: nothing to compare with");
        ensure!(off < tolerance, "{mode}: a cosine differs by {off}; at most {tolerance}");
        ensure!(pixels < PIXEL_TOLERANCE, "{mode}: a pixel differs by {pixels}; at most {PIXEL_TOLERANCE}");
    }
    Ok(())
}

fn pixel_difference(folder: &Path, check: &Check, images: &[RgbImage], mode: &str) -> Result<f32> {
    let name: StrDeserializer<'_, serde::de::value::Error> = mode.into_deserializer();
    let preprocess = Preprocess::deserialize(name)?;
    let expected = read_rows(&folder.join(format!("{mode}.pixels")), 3 * check.size * check.size)?;
    ensure!(expected.len() == images.len(), "{mode}: {} pictures of {}", expected.len(), images.len());
    let mut worst = 0.0f32;
    for (image, expected) in images.iter().zip(expected) {
        let mut pixels = Vec::new();
        preprocess.append(image, check.size, &mut pixels)?;
        worst = worst.max(largest(&[pixels], &[expected]));
    }
    Ok(worst)
}

/// Torch's parts in the race, as `torch_tower.py` calls them; products alone are what no tower on these cores beats.
const TORCH: [&str; 4] = ["fp32", "products-fp32", "bf16", "products-bf16"];

/// What a contender says of one batch: seconds, the processor's seconds, largest difference, largest 1 - cosine.
type Lap = [f64; 4];

fn race(folder: &Path, model: &Path, python: &str, provider: Provider) -> Result<()> {
    let (check, images) = read_check(folder)?;
    let exact = read_rows(&folder.join("pil-bicubic.f32"), check.embed_dim)?;
    ensure!(exact.len() >= 8, "{} pictures were embedded; 8 are needed", exact.len());
    let mut ours = SessionOptions::with_threads(THREADS);
    (ours.provider, ours.images_per_run) = (provider, NonZeroUsize::new(8));
    let clip = ClipReward::load_with(model, &ours)?;
    let torch = TORCH.map(|what| start_torch(python, folder, what));
    let mut torch = torch.into_iter().collect::<Result<Vec<_>>>()?;
    println!("{:<22} {:>5} {:>9} {:>9} {:>9} {:>9}", "seconds an image", "batch", "wall", "cpu", "max abs", "1 - cos");
    for batch in [1, 8] {
        let mut laps = vec![Vec::new(); 1 + TORCH.len()];
        for _ in 0..=ROUNDS {
            laps[0].push(lap(&clip, &images[..batch], &exact)?);
            for (torch, laps) in torch.iter_mut().zip(&mut laps[1..]) {
                laps.push(torch.ask(&batch.to_string())?);
            }
        }
        for (name, laps) in ["onnx runtime"].iter().chain(&TORCH).zip(&mut laps) {
            // The first one may compile for its batch.
            let laps = &mut laps[1..];
            let median = |which: usize, laps: &mut [Lap]| {
                laps.sort_by(|a, b| a[which].total_cmp(&b[which]));
                laps[laps.len() / 2][which]
            };
            let [wall, cpu] = [0, 1].map(|which| median(which, laps) / batch as f64);
            print!("{name:<22} {batch:>5} {wall:>9.3} {cpu:>9.3}");
            let [_, _, off, angle] = laps[0];
            match name.starts_with("products") {
                true => println!(),
                false => println!(" {off:>9.1e} {angle:>9.1e}"),
            }
        }
    }
    println!("load {}", std::fs::read_to_string("/proc/loadavg").unwrap_or_default().trim());
    Ok(())
}

/// `rewards/export/torch_tower.py` in a process of its own, which is asked with the batch's size.
fn start_torch(python: &str, folder: &Path, precision: &str) -> Result<Contender> {
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("../rewards/export/torch_tower.py");
    let mut command = Command::new(python);
    Contender::start("torch_tower.py", command.arg(program).arg(folder).args([precision, &THREADS.to_string()]))
}

fn lap(clip: &ClipReward, images: &[RgbImage], exact: &[Vec<f32>]) -> Result<Lap> {
    let images: Vec<&RgbImage> = images.iter().collect();
    let (start, cpu) = (Instant::now(), cpu_seconds());
    let embedded = clip.embed_images(&images)?;
    let (seconds, cpu) = (start.elapsed().as_secs_f64(), cpu_seconds() - cpu);
    let angle = embedded.iter().zip(exact).map(|(a, b)| 1.0 - dot(a, b)).fold(0.0, f64::max);
    Ok([seconds, cpu, f64::from(largest(&embedded, &exact[..embedded.len()])), angle])
}

/// The processor's time that this process has taken, in ticks of a hundredth; 0 where there is no such file.
fn cpu_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // Fields count from behind the program's name, which may hold spaces.
    let fields = text.rsplit(") ").next().unwrap_or_default().split(' ').skip(11).take(2);
    fields.filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / 100.0
}
