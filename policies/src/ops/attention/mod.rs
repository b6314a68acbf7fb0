//! Causal attention with grouped queries (Ainslie et al., 2023, arXiv 2305.13245), rotary positions included.
//!
//! 1. Queries, keys and values lie side by side as one projection makes them, `[B, L, (h + 2 kv) · d]`, so no
//!    head is ever transposed; rotation happens while a head is gathered.
//! 2. Scores are made for a block of queries at a time; only their log-sum-exp is kept for the backward pass,
//!    which makes them again (Dao et al., 2022, arXiv 2205.14135, algorithm 4).
//! 3. Rows are padded on the right. Outputs and gradients of padded positions are zero.

mod host;

use std::sync::{Arc, OnceLock};

use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, bail};

use super::rope::{Place, Rope};
use super::{host as read, is_host_f32, operand, stored, tensor};
pub(crate) use host::Attended;

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

    pub(crate) fn composite(&self, qkv: &Tensor) -> Result<Tensor> {
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
        let (qkv_host, out_host, grad_host) = (read(qkv)?, read(out)?, read(&grad)?);
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
