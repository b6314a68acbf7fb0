//! The two passes of a separable resampling, over rows and over columns of interleaved RGB.
//!
//! Both are loops that a compiler turns into the machine's widest vectors: over a row's bytes where columns are
//! resampled, and over four rows side by side where rows are, since neighbouring pixels of a row have other weights. The
//! runs in which a pixel is copied, or is the mean of two neighbours as in a halving by the box, need no weights at all.

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};

/// Bits after the binary point of Pillow's integer weights.
const PRECISION: u32 = 32 - 8 - 2;
/// Rows that are resampled side by side.
const ROWS: usize = 4;
/// The channels of so many pixels.
const LANES: usize = 3 * ROWS;

/// A channel of a pixel, and how a weighted mean of several is formed.
pub(super) trait Value: Copy + Default {
    /// A weight, and a sum of weighted channels.
    type Sum: Copy + PartialEq;
    /// What a sum begins with.
    const START: Self::Sum;
    /// The weight of a pixel that is copied.
    const ONE: Self::Sum;
    /// The weight of each of two pixels whose mean is taken.
    const HALF: Self::Sum;

    fn weight(exact: f64) -> Self::Sum;

    fn plus(sum: Self::Sum, value: Self, weight: Self::Sum) -> Self::Sum;

    fn of_sum(sum: Self::Sum) -> Self;

    /// What both come to with [`Value::HALF`] each.
    fn middle(self, other: Self) -> Self;
}

/// Pillow's fixed-point arithmetic: a sum is rounded and clamped to a byte.
impl Value for u8 {
    type Sum = i32;
    const START: i32 = 1 << (PRECISION - 1);
    const ONE: i32 = 1 << PRECISION;
    const HALF: i32 = 1 << (PRECISION - 1);

    fn weight(exact: f64) -> i32 {
        let scaled = exact * f64::from(1u32 << PRECISION);
        // The cast cuts towards zero, so a half away from zero rounds.
        (if exact < 0.0 { scaled - 0.5 } else { scaled + 0.5 }) as i32
    }

    #[inline(always)]
    fn plus(sum: i32, value: u8, weight: i32) -> i32 {
        sum.wrapping_add(i32::from(value).wrapping_mul(weight))
    }

    #[inline(always)]
    fn of_sum(sum: i32) -> u8 {
        (sum >> PRECISION).clamp(0, 255) as u8
    }

    #[inline(always)]
    fn middle(self, other: u8) -> u8 {
        ((u16::from(self) + u16::from(other) + 1) >> 1) as u8
    }
}

/// Torch's float arithmetic: nothing is rounded or clamped.
impl Value for f32 {
    type Sum = f32;
    const START: f32 = 0.0;
    const ONE: f32 = 1.0;
    const HALF: f32 = 0.5;

    fn weight(exact: f64) -> f32 {
        exact as f32
    }

    #[inline(always)]
    fn plus(sum: f32, value: f32, weight: f32) -> f32 {
        sum + value * weight
    }

    #[inline(always)]
    fn of_sum(sum: f32) -> f32 {
        sum
    }

    #[inline(always)]
    fn middle(self, other: f32) -> f32 {
        self * 0.5 + other * 0.5
    }
}

/// Which pixels of an axis make each pixel of a window, and their weights.
pub(super) struct Taps<V: Value> {
    /// A pixel's taps end here, and begin where those of the pixel before it end.
    ends: Vec<usize>,
    taps: Vec<(usize, V::Sum)>,
}

impl<V: Value> Taps<V> {
    /// From the exact weights of each pixel, which has at least one.
    pub(super) fn new(pixels: impl Iterator<Item = Vec<(usize, f64)>>) -> Self {
        let mut of_all = Self { ends: Vec::new(), taps: Vec::new() };
        for exact in pixels {
            let taps: Vec<_> = exact.into_iter().map(|(at, weight)| (at, V::weight(weight))).collect();
            // What weighs nothing at the ends of a kernel would hide that a pixel is copied or a mean of two.
            let weighs = |tap: &(usize, V::Sum)| tap.1 != V::weight(0.0);
            let last = taps.iter().rposition(weighs).unwrap_or(0);
            let first = taps.iter().position(weighs).unwrap_or(0);
            of_all.taps.extend(taps.into_iter().take(last + 1).skip(first));
            of_all.ends.push(of_all.taps.len());
        }
        of_all
    }

    fn of(&self, pixel: usize) -> &[(usize, V::Sum)] {
        let start = pixel.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.taps[start..self.ends[pixel]]
    }

    /// The pixels of the source from the first that is read to the last.
    pub(super) fn reads(&self) -> Range<usize> {
        self.read_by(0..self.ends.len())
    }

    fn read_by(&self, pixels: Range<usize>) -> Range<usize> {
        let start = pixels.start.checked_sub(1).map_or(0, |before| self.ends[before]);
        let end = pixels.end.checked_sub(1).map_or(0, |last| self.ends[last]);
        let places = || self.taps[start..end].iter().map(|tap| tap.0);
        places().min().unwrap_or(0)..places().max().map_or(0, |last| last + 1)
    }

    fn kind(&self, pixel: usize) -> Kind {
        match *self.of(pixel) {
            [(at, weight)] if weight == V::ONE => Kind::Copied(at),
            [(at, weight), (next, same)] if weight == V::HALF && same == weight && next == at + 1 => Kind::Middle(at),
            _ => Kind::Weighted,
        }
    }

    /// All pixels in order, in as few runs as there can be.
    fn runs(&self) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        for pixel in 0..self.ends.len() {
            let kind = self.kind(pixel);
            match runs.last_mut() {
                Some(run) if run.kind.goes_on(run.pixels.len(), kind) => run.pixels.end += 1,
                _ => runs.push(Run { pixels: pixel..pixel + 1, kind }),
            }
        }
        runs
    }
}

/// How a pixel is made, and of what the first one of a run is.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// As the pixel here.
    Copied(usize),
    /// The mean of the pixel here and the next one.
    Middle(usize),
    Weighted,
}

impl Kind {
    /// Whether this is the kind of a pixel so many behind the first of a run of this one.
    fn goes_on(self, n: usize, kind: Self) -> bool {
        kind == match self {
            Self::Copied(at) => Self::Copied(at + n),
            Self::Middle(at) => Self::Middle(at + 2 * n),
            Self::Weighted => Self::Weighted,
        }
    }
}

/// Pixels that are made in one way.
struct Run {
    pixels: Range<usize>,
    kind: Kind,
}

/// A rectangle of a picture, `[rows, columns, 3]`; both ranges count from the picture's corner.
pub(super) struct Part<'a, V> {
    values: &'a [V],
    columns: Range<usize>,
    rows: Range<usize>,
}

impl<'a, V> Part<'a, V> {
    pub(super) fn new(values: &'a [V], columns: Range<usize>, rows: Range<usize>) -> Self {
        Self { values, columns, rows }
    }

    #[inline(always)]
    fn row(&self, row: usize, columns: Range<usize>) -> &'a [V] {
        let start = (row - self.rows.start) * self.columns.len() + columns.start - self.columns.start;
        &self.values[start * 3..][..columns.len() * 3]
    }
}

/// These rows of the part resampled to the window of the taps.
pub(super) fn across<V: Value>(part: &Part<'_, V>, taps: &Taps<V>, rows: Range<usize>) -> Vec<V> {
    let width = taps.ends.len() * 3;
    let mut resized = vec![V::default(); rows.len() * width];
    if width > 0 {
        Arch::new().dispatch(Across { part, taps, runs: taps.runs(), rows, resized: &mut resized });
    }
    resized
}

/// These columns of the part resampled to the window of the taps.
pub(super) fn down<V: Value>(part: &Part<'_, V>, taps: &Taps<V>, columns: Range<usize>) -> Vec<V> {
    let mut resized = vec![V::default(); taps.ends.len() * columns.len() * 3];
    if !columns.is_empty() {
        Arch::new().dispatch(Down { part, taps, columns, resized: &mut resized });
    }
    resized
}

struct Across<'a, V: Value> {
    part: &'a Part<'a, V>,
    taps: &'a Taps<V>,
    runs: Vec<Run>,
    rows: Range<usize>,
    resized: &'a mut [V],
}

impl<V: Value> WithSimd for Across<'_, V> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { part, taps, runs, rows, resized } = self;
        let mut side_by_side = Vec::new();
        let blocks = resized.chunks_mut(taps.ends.len() * 3 * ROWS);
        for (first, block) in rows.clone().step_by(ROWS).zip(blocks) {
            // Where fewer rows are left, the last one stands in for those that are missing.
            let row = |n: usize| part.row((first + n).min(rows.end - 1), part.columns.clone()).as_chunks::<3>().0;
            let sources: [&[[V; 3]]; ROWS] = std::array::from_fn(row);
            for run in &runs {
                match run.kind {
                    Kind::Weighted => weigh(taps, run, (&sources, part.columns.start), &mut side_by_side, block),
                    _ => without_weights(run, (&sources, part.columns.start), block, taps.ends.len()),
                }
            }
        }
    }
}

/// Four rows, and which column of the picture they begin with.
type Sources<'a, V> = (&'a [&'a [[V; 3]]; ROWS], usize);

/// A run of each of four rows that needs no weights.
#[inline(always)]
fn without_weights<V: Value>(run: &Run, (sources, start): Sources<'_, V>, block: &mut [V], width: usize) {
    for (source, resized) in sources.iter().zip(block.chunks_exact_mut(width * 3)) {
        let resized = &mut resized.as_chunks_mut::<3>().0[run.pixels.clone()];
        match run.kind {
            Kind::Copied(at) => resized.copy_from_slice(&source[at - start..][..resized.len()]),
            Kind::Middle(at) => halve(source[at - start..].as_flattened(), resized),
            Kind::Weighted => {}
        }
    }
}

/// Two pixels of a row make one.
#[inline(always)]
fn halve<V: Value>(source: &[V], resized: &mut [[V; 3]]) {
    for (pixel, two) in resized.iter_mut().zip(source.chunks_exact(6)) {
        for (channel, value) in pixel.iter_mut().enumerate() {
            *value = two[channel].middle(two[channel + 3]);
        }
    }
}

/// A run of each of four rows, which are put side by side into `room`.
#[inline(always)]
fn weigh<V: Value>(
    taps: &Taps<V>,
    run: &Run,
    (sources, start): Sources<'_, V>,
    room: &mut Vec<[V; LANES]>,
    block: &mut [V],
) {
    let reads = taps.read_by(run.pixels.clone());
    let sources = sources.map(|source| &source[reads.start - start..][..reads.len()]);
    room.clear();
    room.resize(reads.len(), [V::default(); LANES]);
    for (at, lanes) in room.iter_mut().enumerate() {
        for (pixel, source) in lanes.as_chunks_mut::<3>().0.iter_mut().zip(&sources) {
            *pixel = source[at];
        }
    }
    let width = taps.ends.len() * 3;
    for pixel in run.pixels.clone() {
        let mut sums = [V::START; LANES];
        for &(at, weight) in taps.of(pixel) {
            for (sum, value) in sums.iter_mut().zip(&room[at - reads.start]) {
                *sum = V::plus(*sum, *value, weight);
            }
        }
        let means = sums.map(V::of_sum);
        for (row, mean) in block.chunks_exact_mut(width).zip(means.as_chunks::<3>().0) {
            row[pixel * 3..pixel * 3 + 3].copy_from_slice(mean);
        }
    }
}

struct Down<'a, V: Value> {
    part: &'a Part<'a, V>,
    taps: &'a Taps<V>,
    columns: Range<usize>,
    resized: &'a mut [V],
}

impl<V: Value> WithSimd for Down<'_, V> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { part, taps, columns, resized } = self;
        let width = columns.len() * 3;
        let mut sums = vec![V::START; width];
        let row = |at: usize| part.row(at, columns.clone());
        for (pixel, resized) in resized.chunks_exact_mut(width).enumerate() {
            match taps.kind(pixel) {
                Kind::Copied(at) => resized.copy_from_slice(row(at)),
                Kind::Middle(at) => middle_of([row(at), row(at + 1)], resized),
                Kind::Weighted => {
                    sums.fill(V::START);
                    taps.of(pixel).iter().for_each(|&(at, weight)| add_row(&mut sums, row(at), weight));
                    resized.iter_mut().zip(&sums).for_each(|(value, sum)| *value = V::of_sum(*sum));
                }
            }
        }
    }
}

#[inline(always)]
fn middle_of<V: Value>([upper, lower]: [&[V]; 2], resized: &mut [V]) {
    for ((value, upper), lower) in resized.iter_mut().zip(upper).zip(lower) {
        *value = upper.middle(*lower);
    }
}

#[inline(always)]
fn add_row<V: Value>(sums: &mut [V::Sum], row: &[V], weight: V::Sum) {
    for (sum, value) in sums.iter_mut().zip(row) {
        *sum = V::plus(*sum, *value, weight);
    }
}
