//! The passes of attention on the CPU, from slices to slices: one task for each row and key-value head.

use std::ops::Range;

use rayon::prelude::*;

use super::Attention;
use crate::ops::kernel::{Left, Onto, Panels, Product};
use crate::ops::rope::Place;
use crate::ops::softmax::{attend_block, scale_shifted, unattend};
use crate::ops::vector;

/// Queries whose scores exist at one time.
const BLOCK: usize = 64;

/// What the forward pass read and made of a batch.
pub(crate) struct Attended<'a> {
    /// `[tokens, (h + 2 kv) · d]`.
    pub(crate) qkv: &'a [f32],
    /// `[tokens, h · d]`.
    pub(crate) out: &'a [f32],
    /// Log-sum-exps of each row, `[h · n]`.
    pub(crate) log_sums: &'a [Vec<f32>],
}

impl Attention {
    /// The forward pass over rows of `qkv`, `[tokens, (h + 2 kv) · d]`, that begin at the tokens `starts`: fills `out`,
    /// `[tokens, h · d]`, at real positions, and gives the log-sum-exps of each row.
    pub(crate) fn attend(&self, qkv: &[f32], starts: &[usize], out: &mut [f32]) -> Vec<Vec<f32>> {
        let (d, group, out_width) = (self.head_dim, self.group(), self.heads * self.head_dim);
        let tasks = self.tasks().into_par_iter();
        let parts: Vec<(Vec<f32>, Vec<f32>)> =
            tasks.map(|(row, kv)| self.forward_group(self.projected(qkv, starts[row], row), kv)).collect();
        for (start, parts) in starts.iter().zip(parts.chunks_exact(self.kv_heads)) {
            let out = &mut out[start * out_width..];
            for (head, values) in parts.iter().flat_map(|(values, _)| heads(values, group)).enumerate() {
                scatter(values, out, out_width, head * d, d);
            }
        }
        let of_row = |parts: &[(Vec<f32>, Vec<f32>)]| parts.iter().flat_map(|(_, sums)| sums).copied().collect();
        parts.chunks_exact(self.kv_heads).map(of_row).collect()
    }

    /// The backward pass: fills `to_qkv`, laid out as `qkv`, at real positions, given the gradient by the output.
    pub(crate) fn unattend(&self, attended: &Attended<'_>, grad: &[f32], starts: &[usize], to_qkv: &mut [f32]) {
        let (d, group, width, out_width) = (self.head_dim, self.group(), self.width(), self.heads * self.head_dim);
        let of_task = |(row, kv): (usize, usize)| {
            let start = starts[row] * out_width;
            let row = Row {
                projected: self.projected(attended.qkv, starts[row], row),
                out: &attended.out[start..],
                grad: &grad[start..],
                log_sums: &attended.log_sums[row],
                out_width,
            };
            let mut to = self.backward_group(&row, kv);
            vector::vectorised!({
                for head in heads_mut(&mut to.q, group) {
                    self.unrotate(head, row.projected.image_start);
                }
                self.unrotate(&mut to.k, row.projected.image_start);
            });
            to
        };
        let parts: Vec<GroupGradient> = self.tasks().into_par_iter().map(of_task).collect();
        for (start, parts) in starts.iter().zip(parts.chunks_exact(self.kv_heads)) {
            let to = &mut to_qkv[start * width..];
            let queries = parts.iter().flat_map(|part| heads(&part.q, group));
            let all = queries.chain(parts.iter().map(|part| &part.k[..])).chain(parts.iter().map(|part| &part.v[..]));
            for (head, values) in all.enumerate() {
                scatter(values, to, width, head * d, d);
            }
        }
    }

    /// Rows and key-value heads: the units of work.
    fn tasks(&self) -> Vec<(usize, usize)> {
        (0..self.lengths.len()).flat_map(|row| (0..self.kv_heads).map(move |kv| (row, kv))).collect()
    }

    /// One row of a batch, whose first token is `start`.
    fn projected<'a>(&self, qkv: &'a [f32], start: usize, row: usize) -> Projected<'a> {
        let (width, n) = (self.width(), self.lengths[row]);
        Projected { qkv: &qkv[start * width..][..n * width], n, image_start: self.image_starts[row] }
    }

    #[inline(always)]
    fn rotate(&self, head: &mut [f32], image_start: usize) {
        let places = Place::of_row(image_start, head.len() / self.head_dim);
        for (line, place) in head.chunks_exact_mut(self.head_dim).zip(places) {
            self.rope.rotate(line, place);
        }
    }

    #[inline(always)]
    fn unrotate(&self, head: &mut [f32], image_start: usize) {
        let places = Place::of_row(image_start, head.len() / self.head_dim);
        for (line, place) in head.chunks_exact_mut(self.head_dim).zip(places) {
            self.rope.rotate_back(line, place);
        }
    }
}

fn heads(values: &[f32], n_heads: usize) -> impl Iterator<Item = &[f32]> {
    let size = values.len() / n_heads;
    (0..n_heads).map(move |head| &values[head * size..(head + 1) * size])
}

fn heads_mut(values: &mut [f32], n_heads: usize) -> impl Iterator<Item = &mut [f32]> {
    let size = (values.len() / n_heads).max(1);
    values.chunks_exact_mut(size)
}

/// Writes one head's `[n, d]` into lines of `width` numbers.
fn scatter(values: &[f32], out: &mut [f32], width: usize, first: usize, d: usize) {
    for (line, value) in out.chunks_exact_mut(width).zip(values.chunks_exact(d)) {
        line[first..first + d].copy_from_slice(value);
    }
}

impl Attention {
    /// One head's `[n, d]` out of a row's projection, rotated where it is a query or key.
    fn gather(&self, row: Projected<'_>, head: usize) -> Vec<f32> {
        let d = self.head_dim;
        let mut out = vec![0.0; row.n * d];
        for (out, line) in out.chunks_exact_mut(d).zip(row.qkv.chunks_exact(self.width())) {
            out.copy_from_slice(&line[head * d..][..d]);
        }
        if head < self.heads + self.kv_heads {
            vector::vectorised!(self.rotate(&mut out, row.image_start));
        }
        out
    }

    /// What the queries of one key-value head attend to: `[group · n, d]` and log-sums `[group · n]`.
    fn forward_group(&self, row: Projected<'_>, kv: usize) -> (Vec<f32>, Vec<f32>) {
        let (d, group, n) = (self.head_dim, self.group(), row.n);
        let keys = Panels::of_rows(&self.gather(row, self.heads + kv), n, d);
        let values = Panels::of_matrix(&self.gather(row, self.heads + self.kv_heads + kv), n, d);
        let mut out = vec![0.0; group * n * d];
        let mut log_sums = vec![0.0; group * n];
        let mut scores = vec![0.0; BLOCK.min(n) * n];
        for member in 0..group {
            let queries = self.gather(row, kv * group + member);
            for first in (0..n).step_by(BLOCK) {
                let end = (first + BLOCK).min(n);
                let scores = &mut scores[..(end - first) * end];
                self.scores(&queries[first * d..end * d], &keys, scores);
                let log_sums = &mut log_sums[member * n + first..member * n + end];
                vector::vectorised!(attend_block(scores, first, log_sums));
                let left = Left::Rows { data: scores, stride: end, rows: end - first };
                let out = &mut out[(member * n + first) * d..(member * n + end) * d];
                Product { left, right: &values, depth: end, columns: d, out, out_stride: d }.add();
            }
        }
        (out, log_sums)
    }

    /// Scaled scores of a block of queries, `[block, columns]`.
    fn scores(&self, queries: &[f32], keys: &Panels, scores: &mut [f32]) {
        let (d, rows) = (self.head_dim, queries.len() / self.head_dim);
        let columns = scores.len() / rows;
        let left = Left::Rows { data: queries, stride: d, rows };
        Product { left, right: keys, depth: d, columns, out: scores, out_stride: columns }.compute(Onto::Zero);
        let scale = self.scale();
        vector::vectorised!(scores.iter_mut().for_each(|score| *score *= scale));
    }

    /// Gradients of one key-value head's group: queries `[group · n, d]`, keys and values `[n, d]`.
    fn backward_group(&self, row: &Row<'_>, kv: usize) -> GroupGradient {
        let (d, n, group) = (self.head_dim, row.projected.n, self.group());
        let k = self.gather(row.projected, self.heads + kv);
        let v = self.gather(row.projected, self.heads + self.kv_heads + kv);
        let shared = Shared {
            keys: Panels::of_rows(&k, n, d),
            keys_as_is: Panels::of_matrix(&k, n, d),
            values: Panels::of_rows(&v, n, d),
        };
        let mut to = GroupGradient { q: vec![0.0; group * n * d], k: vec![0.0; n * d], v: vec![0.0; n * d] };
        for member in 0..group {
            let index = kv * group + member;
            let head = Head {
                queries: self.gather(row.projected, index),
                out: row.head(row.out, index, d),
                grad: row.head(row.grad, index, d),
                log_sums: &row.log_sums[index * n..(index + 1) * n],
                member,
            };
            for first in (0..n).step_by(BLOCK) {
                self.backward_block(&shared, &head, first..(first + BLOCK).min(n), &mut to);
            }
        }
        to
    }

    /// Adds what a block of one head's queries sends back.
    fn backward_block(&self, shared: &Shared, head: &Head<'_>, block: Range<usize>, to: &mut GroupGradient) {
        let (d, rows, end) = (self.head_dim, block.len(), block.end);
        let part = block.start * d..end * d;
        let (queries, grad) = (&head.queries[part.clone()], &head.grad[part.clone()]);
        let (mut weights, mut to_scores) = (vec![0.0; rows * end], vec![0.0; rows * end]);
        self.scores(queries, &shared.keys, &mut weights);
        let left = Left::Rows { data: grad, stride: d, rows };
        Product { left, right: &shared.values, depth: d, columns: end, out: &mut to_scores, out_stride: end }.add();
        vector::vectorised!({
            let lines = weights.chunks_exact_mut(end).zip(to_scores.chunks_exact_mut(end));
            for (position, (weights, to_scores)) in block.clone().zip(lines) {
                let place = position * d..(position + 1) * d;
                let pull = vector::dot(&head.out[place.clone()], &head.grad[place]);
                unattend(weights, to_scores, position + 1, head.log_sums[position]);
                scale_shifted(weights, to_scores, pull, self.scale());
            }
        });
        let n = head.log_sums.len();
        let to_q = &mut to.q[head.member * n * d..(head.member + 1) * n * d][part];
        let left = Left::Rows { data: &to_scores, stride: end, rows };
        Product { left, right: &shared.keys_as_is, depth: end, columns: d, out: to_q, out_stride: d }.add();
        for (seen, sent, out) in [(queries, &to_scores, &mut to.k), (grad, &weights, &mut to.v)] {
            let right = Panels::of_matrix(seen, rows, d);
            let left = Left::Columns { data: sent, stride: end, rows: end };
            Product { left, right: &right, depth: rows, columns: d, out, out_stride: d }.add();
        }
    }
}

/// Keys and values of a group, packed for the backward pass.
struct Shared {
    keys: Panels,
    keys_as_is: Panels,
    values: Panels,
}

/// One query head's numbers, `[n, d]` each.
struct Head<'a> {
    queries: Vec<f32>,
    out: Vec<f32>,
    grad: Vec<f32>,
    log_sums: &'a [f32],
    /// Its place in the group.
    member: usize,
}

/// The projection of one row of the batch, `[L, (h + 2 kv) · d]`.
#[derive(Clone, Copy)]
struct Projected<'a> {
    qkv: &'a [f32],
    /// Its real positions.
    n: usize,
    image_start: usize,
}

/// What the backward pass knows of one row of the batch.
struct Row<'a> {
    projected: Projected<'a>,
    out: &'a [f32],
    grad: &'a [f32],
    log_sums: &'a [f32],
    out_width: usize,
}

impl Row<'_> {
    /// One head's `[n, d]` out of `[L, h · d]`.
    fn head(&self, values: &[f32], head: usize, d: usize) -> Vec<f32> {
        values
            .chunks_exact(self.out_width)
            .take(self.projected.n)
            .flat_map(|line| &line[head * d..][..d])
            .copied()
            .collect()
    }
}

struct GroupGradient {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}
