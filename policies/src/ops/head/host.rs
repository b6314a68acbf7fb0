//! The head on the CPU: linear, softmax and gather in one pass over the vocabulary, forward and backward.
//!
//! 1. Logits lie with the vocabulary down and tokens across, so a block of the head's rows is the left operand as it lies
//!    in memory, and only the tokens' hidden states are packed. A block's logits are used up before the next is made
//!    (the online softmax of Milakov and Gimelshein, 2018, arXiv 1805.02867, algorithm 3): nothing as wide as the
//!    vocabulary ever exists.
//! 2. The vocabulary is shared out among threads in groups whose size depends on the vocabulary alone, and their sums are
//!    joined in order: the numbers do not depend on the number of threads.
//! 3. The backward pass makes each block's logits again, turns them into gradients in place, adds their product with the
//!    hidden states to the head's gradient where that lies, and their product with the head to its group's part of the
//!    hidden states' gradient.

use std::cell::Cell;

use rayon::prelude::*;

use super::RowGradient;
use crate::ops::kernel::{Left, Onto, Panels, Product};
use crate::ops::vector::{self, add, vectorised};

/// Rows of the head whose logits exist at one time in a thread.
const BLOCK: usize = 64;
/// Tokens that are scored together.
pub(super) const CHUNK: usize = 512;
/// Groups into which a large vocabulary is cut.
const GROUPS: usize = 32;

thread_local! {
    /// Logits of a block, `[BLOCK, tokens]`.
    static LOGITS: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    /// Rows of the head, packed for the product with their gradient.
    static HEAD: Cell<Panels> = Cell::new(Panels::default());
}

/// The numbers that the head's passes read: `hidden`, `[n, width]`, and its rows of the slice, `[vocabulary, width]`.
#[derive(Clone, Copy)]
pub(super) struct Operands<'a> {
    pub(super) hidden: &'a [f32],
    pub(super) head: &'a [f32],
    pub(super) width: usize,
    /// The chosen rows of the slice, `[n]`.
    pub(super) targets: &'a [u32],
    /// One over the temperature.
    pub(super) sharpness: f32,
}

impl<'a> Operands<'a> {
    /// Log-probabilities of the targets, entropies and log-sum-exps, `[3, n]`.
    pub(super) fn score(&self) -> Vec<f32> {
        let mut rows = Vec::with_capacity(self.targets.len());
        let mut panels = Panels::default();
        for chunk in self.chunks() {
            panels.pack_rows(chunk.hidden, chunk.targets.len(), self.width);
            let groups = self.head.par_chunks(self.group_rows() * self.width).enumerate();
            let sums: Vec<Sums> =
                groups.map(|(group, head)| chunk.sums_of(head, group * self.group_rows(), &panels)).collect();
            rows.extend((0..chunk.targets.len()).map(|token| joined(&sums, token)));
        }
        (0..3).flat_map(|part| rows.iter().map(move |row: &[f32; 3]| row[part])).collect()
    }

    /// Gradients by the hidden states, `[n, width]`, given what each token's numbers are asked for; adds those by the
    /// head, `[vocabulary, width]`, where it is trained.
    pub(super) fn gradients(&self, rows: &[RowGradient], mut to_head: Option<&mut [f32]>) -> Vec<f32> {
        let mut to_hidden = vec![0.0; self.hidden.len()];
        let size = self.group_rows() * self.width;
        let (mut lines, mut matrix) = (Panels::default(), Panels::default());
        let chunks = self.chunks().zip(rows.chunks(CHUNK)).zip(to_hidden.chunks_mut(CHUNK * self.width.max(1)));
        for ((chunk, rows), to_hidden) in chunks {
            lines.pack_rows(chunk.hidden, chunk.targets.len(), self.width);
            matrix.pack_matrix(chunk.hidden, chunk.targets.len(), self.width);
            let part = |group: usize, head: &[f32], to_head: Option<&mut [f32]>| {
                let seen = Seen { lines: &lines, matrix: &matrix, rows, first: group * self.group_rows() };
                chunk.gradient_of(head, &seen, to_head)
            };
            let groups = self.head.par_chunks(size).enumerate();
            let parts: Vec<Vec<f32>> = match &mut to_head {
                None => groups.map(|(group, head)| part(group, head, None)).collect(),
                Some(to_head) => {
                    let groups = groups.zip(to_head.par_chunks_mut(size));
                    groups.map(|((group, head), to_head)| part(group, head, Some(to_head))).collect()
                }
            };
            vectorised!(parts.iter().for_each(|part| add(to_hidden, part)));
        }
        to_hidden
    }

    fn chunks(&self) -> impl Iterator<Item = Self> + use<'a> {
        let whole = *self;
        let hidden = whole.hidden.chunks(CHUNK * whole.width.max(1));
        hidden.zip(whole.targets.chunks(CHUNK)).map(move |(hidden, targets)| Self { hidden, targets, ..whole })
    }

    /// Rows of the head in a group.
    fn group_rows(&self) -> usize {
        let vocabulary = self.head.len() / self.width.max(1);
        vocabulary.div_ceil(GROUPS).next_multiple_of(BLOCK).max(BLOCK)
    }

    /// Scaled logits of a block of the head's rows, `[rows, tokens]`.
    fn logits(&self, head: &[f32], panels: &Panels, logits: &mut Vec<f32>) {
        let (rows, tokens) = (head.len() / self.width, self.targets.len());
        logits.resize(rows * tokens, 0.0);
        let left = Left::Rows { data: head, stride: self.width, rows };
        let product =
            Product { left, right: panels, depth: self.width, columns: tokens, out: logits, out_stride: tokens };
        product.compute(Onto::Zero);
    }

    /// The sums over a group of the head's rows, the first of which is row `first` of the slice.
    fn sums_of(&self, head: &[f32], first: usize, panels: &Panels) -> Sums {
        let mut sums = Sums::new(self.targets.len());
        let mut logits = LOGITS.take();
        for (block, head) in head.chunks(BLOCK * self.width).enumerate() {
            self.logits(head, panels, &mut logits);
            let first = first + block * BLOCK;
            vectorised!(sums.add_block(&mut logits, self.sharpness));
            sums.note_targets(&logits, first, self.targets);
        }
        LOGITS.set(logits);
        sums
    }

    /// A group's part of the gradient by the hidden states, `[tokens, width]`; adds to that by its rows of the head.
    fn gradient_of(&self, head: &[f32], seen: &Seen<'_>, mut to_head: Option<&mut [f32]>) -> Vec<f32> {
        let (width, tokens) = (self.width, self.targets.len());
        let mut to_hidden = vec![0.0; tokens * width];
        let (mut logits, mut packed) = (LOGITS.take(), HEAD.take());
        for (block, head) in head.chunks(BLOCK * width).enumerate() {
            self.logits(head, seen.lines, &mut logits);
            let rows = head.len() / width;
            vectorised!(to_logits(&mut logits, seen.rows, self.sharpness));
            let lines = lines_of(self.targets, seen.first + block * BLOCK, rows);
            lines.for_each(|(token, line)| {
                logits[line * tokens + token] += seen.rows[token].by_log_prob * self.sharpness;
            });
            if let Some(to_head) = &mut to_head {
                let out = &mut to_head[block * BLOCK * width..][..rows * width];
                let left = Left::Rows { data: &logits, stride: tokens, rows };
                Product { left, right: seen.matrix, depth: tokens, columns: width, out, out_stride: width }.add();
            }
            packed.pack_matrix(head, rows, width);
            let left = Left::Columns { data: &logits, stride: tokens, rows: tokens };
            let out = &mut to_hidden[..];
            Product { left, right: &packed, depth: rows, columns: width, out, out_stride: width }.add();
        }
        LOGITS.set(logits);
        HEAD.set(packed);
        to_hidden
    }
}

/// The tokens whose targets are among `rows` rows of the slice from `first` on, and which of these it is.
fn lines_of(targets: &[u32], first: usize, rows: usize) -> impl Iterator<Item = (usize, usize)> {
    let lines = targets.iter().map(move |target| (*target as usize).wrapping_sub(first));
    lines.enumerate().filter(move |(_, line)| *line < rows)
}

/// What a group of the head's rows sees in the backward pass.
struct Seen<'a> {
    /// The hidden states, packed for logits.
    lines: &'a Panels,
    /// The same, packed for the head's gradient.
    matrix: &'a Panels,
    rows: &'a [RowGradient],
    /// The group's first row of the slice.
    first: usize,
}

/// Replaces logits, `[rows, tokens]`, by the gradients that reach them but for the targets' own share.
#[inline(always)]
fn to_logits(logits: &mut [f32], rows: &[RowGradient], sharpness: f32) {
    let with_entropy = rows.iter().any(|row| row.by_entropy != 0.0);
    for line in logits.chunks_exact_mut(rows.len()) {
        match with_entropy {
            false => plain_line(line, rows, sharpness),
            true => entropic_line(line, rows, sharpness),
        }
    }
}

#[inline(always)]
fn plain_line(line: &mut [f32], rows: &[RowGradient], sharpness: f32) {
    for (logit, row) in line.iter_mut().zip(rows) {
        *logit = -row.by_log_prob * sharpness * vector::exp(*logit * sharpness - row.log_sum);
    }
}

/// `d H / d logit = −p (log p + H)`.
#[inline(always)]
fn entropic_line(line: &mut [f32], rows: &[RowGradient], sharpness: f32) {
    for (logit, row) in line.iter_mut().zip(rows) {
        let log_prob = *logit * sharpness - row.log_sum;
        let pull = row.by_log_prob + row.by_entropy * (log_prob + row.entropy);
        *logit = -vector::exp(log_prob) * sharpness * pull;
    }
}

/// Running sums of the softmax of each token over some rows of the head.
struct Sums {
    top: Vec<f32>,
    /// `Σ e^(logit − top)`.
    sum: Vec<f32>,
    /// `Σ e^(logit − top) · (logit − top)`.
    moment: Vec<f32>,
    /// The target's logit, where it is among the rows.
    chosen: Vec<f32>,
}

impl Sums {
    fn new(tokens: usize) -> Self {
        let zeros = || vec![0.0; tokens];
        Self { top: vec![f32::NEG_INFINITY; tokens], sum: zeros(), moment: zeros(), chosen: zeros() }
    }

    /// Scales a block of logits, `[rows, tokens]`, and adds it.
    #[inline(always)]
    fn add_block(&mut self, logits: &mut [f32], sharpness: f32) {
        let tokens = self.top.len();
        let old = self.top.clone();
        for line in logits.chunks_exact_mut(tokens) {
            scale_and_rise(line, sharpness, &mut self.top);
        }
        for (((old, top), sum), moment) in old.iter().zip(&self.top).zip(&mut self.sum).zip(&mut self.moment) {
            // At first there is nothing to move, and no number to move it by.
            let shift = if *old == f32::NEG_INFINITY { 0.0 } else { old - top };
            let scale = vector::exp(shift);
            *moment = (*moment + *sum * shift) * scale;
            *sum *= scale;
        }
        for line in logits.chunks_exact(tokens) {
            let sums = self.sum.iter_mut().zip(&mut self.moment);
            for ((logit, top), (sum, moment)) in line.iter().zip(&self.top).zip(sums) {
                let shifted = logit - top;
                let weight = vector::exp(shifted);
                *sum += weight;
                *moment += weight * shifted;
            }
        }
    }

    /// Keeps the logits of targets among a block's rows, the first of which is row `first` of the slice.
    fn note_targets(&mut self, logits: &[f32], first: usize, targets: &[u32]) {
        let tokens = targets.len();
        for (token, line) in lines_of(targets, first, logits.len() / tokens.max(1)) {
            self.chosen[token] = logits[line * tokens + token];
        }
    }
}

/// Scales a line of logits and raises each token's greatest one to it.
#[inline(always)]
fn scale_and_rise(line: &mut [f32], sharpness: f32, tops: &mut [f32]) {
    for (top, logit) in tops.iter_mut().zip(line) {
        *logit *= sharpness;
        *top = if *logit > *top { *logit } else { *top };
    }
}

/// A token's log-probability, entropy and log-sum-exp from the sums of all groups.
fn joined(groups: &[Sums], token: usize) -> [f32; 3] {
    let top = groups.iter().map(|sums| sums.top[token]).fold(f32::NEG_INFINITY, f32::max);
    let (mut sum, mut moment, mut chosen) = (0.0, 0.0, 0.0);
    for group in groups {
        let shift = f64::from(group.top[token] - top);
        let (scale, of_group) = (shift.exp(), f64::from(group.sum[token]));
        sum += scale * of_group;
        moment += scale * (f64::from(group.moment[token]) + of_group * shift);
        chosen += f64::from(group.chosen[token]);
    }
    let log_sum = sum.ln();
    let top = f64::from(top);
    [(chosen - top - log_sum) as f32, (log_sum - moment / sum) as f32, (top + log_sum) as f32]
}
