//! Causal attention with grouped queries (Ainslie et al., 2023, arXiv 2305.13245), rotary positions included.
//!
//! 1. Queries, keys and values lie side by side as one projection makes them, `[B, L, (h + 2 kv) · d]`, so no
//!    head is ever transposed; rotation happens while a head is gathered.
//! 2. Scores are made for a block of queries at a time; only their log-sum-exp is kept for the backward pass,
//!    which makes them again (Dao et al., 2022, arXiv 2205.14135, algorithm 4).
//! 3. Rows are padded on the right. Outputs and gradients of padded positions are zero.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::kernel::{Left, Panels, Product};
use super::rope::{Place, Rope};
use super::softmax::{attend_block, scale_shifted, unattend};
use super::{host, is_host_f32, operand, stored, tensor, vector};

/// Queries whose scores exist at one time.
const BLOCK: usize = 64;

/// How heads lie in a projection and which positions are real.
#[derive(Clone, Debug)]
pub(crate) struct Attention {
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) rope: Arc<Rope>,
    /// The number of real positions of each row.
    pub(crate) lengths: Arc<[usize]>,
    /// Where each row's image begins.
    pub(crate) image_starts: Arc<[usize]>,
}

impl Attention {
    /// Attends within each row: `qkv` of `[B, L, (h + 2 kv) · d]` to `[B, L, h · d]`.
    pub(crate) fn apply(&self, qkv: &Tensor) -> Result<Tensor> {
        let (rows, length, width) = qkv.dims3()?;
        if rows != self.lengths.len() || rows != self.image_starts.len() || width != self.width() {
            bail!("attention got {:?}; expected [{}, length, {}]", qkv.dims(), self.lengths.len(), self.width());
        }
        let longest = self.lengths.iter().copied().max().unwrap_or(0);
        if longest > length || length > self.rope.positions() {
            bail!("attention over {length} positions; rows reach {longest}, tables {}", self.rope.positions());
        }
        if is_host_f32(qkv) {
            qkv.contiguous()?.apply_op1(HostAttention { plan: self.clone(), log_sums: OnceLock::new() })
        } else {
            self.composite(qkv)
        }
    }

    pub(crate) fn width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// The three parts as heads, `[B, heads, L, d]`, rotated where they are queries or keys.
    pub(crate) fn split(&self, qkv: &Tensor) -> Result<[Tensor; 3]> {
        let (rows, length, _) = qkv.dims3()?;
        let part = |first: usize, heads: usize| {
            qkv.narrow(2, first * self.head_dim, heads * self.head_dim)?
                .reshape((rows, length, heads, self.head_dim))?
                .transpose(1, 2)?
                .contiguous()
        };
        let places = self.image_starts.iter().flat_map(|start| Place::of_row(*start, length));
        let (cos, sin) = self.rope.tables(places, qkv.device())?;
        let shape = (rows, 1, length, self.head_dim / 2);
        let (cos, sin) = (cos.reshape(shape)?, sin.reshape(shape)?);
        let q = self.rope.composite_with(&part(0, self.heads)?, &cos, &sin)?;
        let k = self.rope.composite_with(&part(self.heads, self.kv_heads)?, &cos, &sin)?;
        Ok([q, k, part(self.heads + self.kv_heads, self.kv_heads)?])
    }

    fn composite(&self, qkv: &Tensor) -> Result<Tensor> {
        let (rows, length, _) = qkv.dims3()?;
        let [q, k, v] = self.split(qkv)?;
        let shape = (rows, self.kv_heads, self.group() * length, self.head_dim);
        let scores = (q.reshape(shape)?.matmul(&k.t()?.contiguous()?)? * f64::from(self.scale()))?;
        let scores = scores.reshape((rows, self.heads, length, length))?.to_dtype(DType::F32)?;
        let causal: Vec<f32> = (0..length * length)
            .map(|index| if index % length <= index / length { 0.0 } else { f32::NEG_INFINITY })
            .collect();
        let scores = scores.broadcast_add(&Tensor::from_vec(causal, (length, length), qkv.device())?)?;
        let top = scores.max_keepdim(3)?.detach();
        let weights = scores.broadcast_sub(&top)?.exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(3)?)?.to_dtype(qkv.dtype())?;
        let weights = weights.reshape((rows, self.kv_heads, self.group() * length, length))?;
        let out = weights.matmul(&v)?.reshape((rows, self.heads, length, self.head_dim))?;
        let out = out.transpose(1, 2)?.reshape((rows, length, self.heads * self.head_dim))?;
        out.broadcast_mul(&self.real_positions(length, qkv)?)
    }

    /// 1 at real positions and 0 at padded ones, `[B, L, 1]`.
    fn real_positions(&self, length: usize, like: &Tensor) -> Result<Tensor> {
        let mask: Vec<f32> = self
            .lengths
            .iter()
            .flat_map(|real| (0..length).map(move |position| f32::from(u8::from(position < *real))))
            .collect();
        Tensor::from_vec(mask, (self.lengths.len(), length, 1), like.device())?.to_dtype(like.dtype())
    }

    /// One head's `[n, d]` out of a row's projection, rotated where it is a query or key.
    fn gather(&self, row: Projected<'_>, head: usize) -> Vec<f32> {
        let d = self.head_dim;
        let mut out = vec![0.0; row.n * d];
        for (out, line) in out.chunks_exact_mut(d).zip(row.qkv.chunks_exact(self.width())) {
            out.copy_from_slice(&line[head * d..][..d]);
        }
        if head < self.heads + self.kv_heads {
            vector::vectorised(|| self.rotate(&mut out, row.image_start));
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
                vector::vectorised(|| attend_block(scores, first, log_sums));
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
        scores.fill(0.0);
        let left = Left::Rows { data: queries, stride: d, rows };
        Product { left, right: keys, depth: d, columns, out: scores, out_stride: columns }.add();
        let scale = self.scale();
        vector::vectorised(|| scores.iter_mut().for_each(|score| *score *= scale));
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
        vector::vectorised(|| {
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

struct HostAttention {
    plan: Attention,
    /// Log-sum-exps of each row, `[h · n]`, left by the forward pass.
    log_sums: OnceLock<Vec<Vec<f32>>>,
}

impl HostAttention {
    fn log_sums(&self) -> Result<&Vec<Vec<f32>>> {
        match self.log_sums.get() {
            Some(log_sums) => Ok(log_sums),
            None => bail!("attention: backward before forward"),
        }
    }
}

impl CustomOp1 for HostAttention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, length, _) = layout.shape().dims3()?;
        let out_width = self.plan.heads * self.plan.head_dim;
        let mut out = vec![0.0; rows * length * out_width];
        let log_sums = self.plan.attend(operand(storage, layout)?, &starts(rows, length), &mut out);
        // A second forward pass of the same operation would give the same numbers.
        let _ = self.log_sums.set(log_sums);
        stored(out, (rows, length, out_width))
    }

    fn bwd(&self, qkv: &Tensor, out: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let (qkv_host, out_host, grad_host) = (host(qkv)?, host(out)?, host(&grad)?);
        let (rows, length, _) = qkv.dims3()?;
        let qkv_values = qkv_host.values()?;
        let attended = Attended { qkv: qkv_values, out: out_host.values()?, log_sums: self.log_sums()? };
        let mut to_qkv = vec![0.0; qkv_values.len()];
        self.plan.unattend(&attended, grad_host.values()?, &starts(rows, length), &mut to_qkv);
        Ok(Some(tensor(to_qkv, qkv.shape())?))
    }
}

/// Where rows of one length begin.
fn starts(rows: usize, length: usize) -> Vec<usize> {
    (0..rows).map(|row| row * length).collect()
}

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
            vector::vectorised(|| {
                heads_mut(&mut to.q, group).for_each(|head| self.unrotate(head, row.projected.image_start));
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
        head.chunks_exact_mut(self.head_dim).zip(places).for_each(|(line, place)| self.rope.rotate(line, place));
    }

    #[inline(always)]
    fn unrotate(&self, head: &mut [f32], image_start: usize) {
        let places = Place::of_row(image_start, head.len() / self.head_dim);
        head.chunks_exact_mut(self.head_dim).zip(places).for_each(|(line, place)| self.rope.rotate_back(line, place));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::rope::{NO_IMAGE, Plane};
    use crate::ops::testing::{check_operation, distance, normal_var, with_threads};

    fn plan(heads: usize, kv_heads: usize, head_dim: usize, lengths: &[usize]) -> Attention {
        let rope = Arc::new(Rope::new(head_dim, 1e4, 200));
        let image_starts = vec![NO_IMAGE; lengths.len()].into();
        Attention { heads, kv_heads, head_dim, rope, lengths: lengths.into(), image_starts }
    }

    #[test]
    fn forward_and_backward_agree_with_the_composite() {
        for (heads, kv_heads, d, lengths) in
            [(4, 2, 4, vec![5, 1, 3]), (2, 2, 2, vec![4]), (3, 1, 8, vec![70, 130]), (1, 1, 2, vec![1])]
        {
            let plan = plan(heads, kv_heads, d, &lengths);
            let longest = *lengths.iter().max().unwrap();
            let qkv = normal_var(1, &[lengths.len(), longest, plan.width()]);
            check_operation(std::slice::from_ref(&qkv), || plan.apply(&qkv), || plan.composite(&qkv));
            let rope = Arc::new(Rope::new(d, 1e4, 200).with_plane(Some(Plane { columns: 2, after_id: 0 })));
            let image_starts = (0..lengths.len()).map(|row| 1 + row).collect();
            let plan = Attention { rope, image_starts, ..plan };
            check_operation(std::slice::from_ref(&qkv), || plan.apply(&qkv), || plan.composite(&qkv));
        }
    }

    #[test]
    fn a_row_does_not_see_its_padding_or_its_neighbours() {
        let both = plan(4, 2, 8, &[9, 5]);
        let qkv = normal_var(1, &[2, 9, both.width()]);
        let alone = qkv.narrow(0, 1, 1).unwrap().narrow(1, 0, 5).unwrap();
        let want = plan(4, 2, 8, &[5]).apply(&alone).unwrap();
        let got = both.apply(&qkv).unwrap().narrow(0, 1, 1).unwrap();
        assert_eq!(distance(&got.narrow(1, 0, 5).unwrap(), &want), 0.0);
        assert_eq!(got.narrow(1, 5, 4).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap(), 0.0);
    }

    #[test]
    fn one_thread_gives_the_bits_of_four() {
        let plan = plan(4, 2, 8, &[90, 31, 77]);
        let qkv = normal_var(1, &[3, 90, plan.width()]);
        let run = |threads| {
            with_threads(threads, || {
                let out = plan.apply(&qkv).unwrap();
                let grads = out.sqr().unwrap().sum_all().unwrap().backward().unwrap();
                (out, grads.get(&qkv).unwrap().clone())
            })
        };
        let (one, four) = (run(1), run(4));
        assert_eq!(distance(&one.0, &four.0), 0.0);
        assert_eq!(distance(&one.1, &four.1), 0.0);
    }

    #[test]
    fn a_wrong_shape_is_an_error() {
        let plan = plan(4, 2, 8, &[9, 5]);
        assert!(plan.apply(&normal_var(1, &[2, 9, 7])).is_err());
        assert!(plan.apply(&normal_var(1, &[2, 8, plan.width()])).is_err());
        assert!(plan.apply(&normal_var(1, &[2, 300, plan.width()])).is_err());
    }
}
