//! What the machine itself gives, measured beside a contender: the floors are made of it.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};

use super::contender::{End, Lap, serve};
use super::timed;

/// Rows and columns of the product that shows the multiply-adds' speed: three matrices of 1 MB, which caches hold.
const PRODUCT: usize = 512;
const PRODUCTS: usize = 256;
/// The same on a GPU, which smaller ones do not fill.
const GPU_PRODUCT: usize = 8192;
const GPU_PRODUCTS: usize = 8;
/// The longest of the four arrays that show the memory's speed: 256 MB, which no cache holds.
const LONGEST: usize = 1 << 26;
/// Numbers that are only read: 1 GB.
const READ: usize = 1 << 28;
/// Numbers that a thread takes at a time, and those of a line.
const PART: usize = 1 << 20;
const LINE: usize = 1 << 10;

/// A mode of a worker that measures the machine; `None` where it is none.
pub fn run(mode: &str, sizes: &[usize], device: &Device, threads: usize) -> Option<Result<()>> {
    match (mode, sizes) {
        ("products", []) => Some(products(device)),
        ("memory", [n]) if device.is_cpu() => Some(memory((*n).min(LONGEST), threads)),
        ("memory", [n]) => Some(memory_on((*n).min(LONGEST), device)),
        ("reading", []) if device.is_cpu() => Some(reading(threads)),
        ("reading", []) => Some(reading_on(device)),
        _ => None,
    }
}

/// Laps that give one number and leave nothing else to say.
pub fn serve_laps(lap: impl FnMut() -> Result<Lap>) -> Result<()> {
    serve(lap, |peak_bytes| End { peak_bytes, notes: BTreeMap::new() })
}

/// The machine's multiply-adds: candle's matrix product, which is the crate's own, over and over on what caches hold.
///
/// The value is floating-point operations a second, two to a multiply-add.
fn products(device: &Device) -> Result<()> {
    let (side, n) = if device.is_cpu() { (PRODUCT, PRODUCTS) } else { (GPU_PRODUCT, GPU_PRODUCTS) };
    let matrix = || Tensor::full(0.5f32, (side, side), device);
    let (a, b) = (matrix()?, matrix()?);
    serve_laps(|| {
        let ((), seconds) = timed(|| {
            (0..n).try_for_each(|_| a.matmul(&b).map(|product| drop(black_box(product))))?;
            Ok(device.synchronize()?)
        })?;
        Ok(Lap { seconds, value: vec![2.0 * (n * side.pow(3)) as f64 / seconds] })
    })
}

/// The machine's memory: four arrays read and three of them written, as AdamW does, with next to no arithmetic.
///
/// The value is bytes a second, 28 to an element.
fn memory(n: usize, threads: usize) -> Result<()> {
    let mut written = [1.0f32, 2.0, 3.0].map(|value| vec![value; n]);
    let read = vec![1e-3f32; n];
    serve_laps(|| {
        let [p, m, v] = written.each_mut().map(|array| array.chunks_mut(PART));
        let parts = p.zip(m).zip(v).zip(read.chunks(PART));
        let add = |(((p, m), v), g): (((&mut [f32], _), _), &[f32])| stream([p, m, v], g);
        let seconds = on_threads(threads, parts, add);
        Ok(Lap { seconds, value: vec![28.0 * n as f64 / seconds] })
    })
}

/// The seconds of work on all parts. Threads take one after another, so that one which must wait for its core delays no
/// other.
fn on_threads<T>(threads: usize, parts: impl Iterator<Item = T> + Send, work: impl Fn(T) + Sync) -> f64 {
    let parts = Mutex::new(parts);
    let next = || parts.lock().unwrap_or_else(PoisonError::into_inner).next();
    let take_all = || {
        while let Some(part) = next() {
            work(part);
        }
    };
    let clock = Instant::now();
    std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(take_all))));
    clock.elapsed().as_secs_f64()
}

/// A GPU's: two arrays read and one written, 12 bytes to an element.
fn memory_on(n: usize, device: &Device) -> Result<()> {
    let ones = || Tensor::ones(n, DType::F32, device);
    let (a, b) = (ones()?, ones()?);
    serve_laps(|| {
        let ((), seconds) = timed(|| {
            drop(black_box((&a + &b)?));
            Ok(device.synchronize()?)
        })?;
        Ok(Lap { seconds, value: vec![12.0 * n as f64 / seconds] })
    })
}

fn stream([p, m, v]: [&mut [f32]; 3], g: &[f32]) {
    for (((p, m), v), g) in p.iter_mut().zip(m).zip(v).zip(g) {
        (*p, *m, *v) = (*p + *m, *m + *g, *v + *g);
    }
}

/// The machine's memory where nothing is written, as in decoding. The value is bytes a second.
fn reading(threads: usize) -> Result<()> {
    let array = vec![1u32; READ];
    serve_laps(|| {
        let seconds = on_threads(threads, array.chunks(PART), |part| {
            black_box(sum(part));
        });
        Ok(Lap { seconds, value: vec![4.0 * READ as f64 / seconds] })
    })
}

/// Of integers, whose sum may be made in any order: the compiler makes it side by side. Four lines are read at a time, a
/// tenth faster than one.
fn sum(part: &[u32]) -> u32 {
    let (left, right) = part.split_at(part.len() / 2);
    let ((a, b), (c, d)) = (left.split_at(left.len() / 2), right.split_at(right.len() / 2));
    let lines = a.chunks(LINE).zip(b.chunks(LINE)).zip(c.chunks(LINE)).zip(d.chunks(LINE));
    let of_line = |line: &[u32]| line.iter().fold(0u32, |sum, n| sum.wrapping_add(*n));
    lines.flat_map(|(((a, b), c), d)| [a, b, c, d].map(of_line)).fold(0, u32::wrapping_add)
}

fn reading_on(device: &Device) -> Result<()> {
    let array = Tensor::ones(READ, DType::F32, device)?;
    serve_laps(|| {
        let (_, seconds) = timed(|| Ok(array.sum_all()?.to_scalar::<f32>()?))?;
        Ok(Lap { seconds, value: vec![4.0 * READ as f64 / seconds] })
    })
}
