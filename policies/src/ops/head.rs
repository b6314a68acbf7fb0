//! Log-probabilities and entropies of a vocabulary slice, without ever holding the logits of a whole batch.
//!
//! Linear, log-softmax and gather run over chunks of rows; the backward pass makes each chunk's logits again.

use std::ops::Range;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor, Var, bail};
use rayon::prelude::*;

use super::{ROW_BLOCK, host, is_host_f32, operand, stored, tensor, vector};

/// Logits that exist at one time, where rows are wide; a cache's worth.
const CHUNK_LOGITS: usize = 1 << 20;
/// Limits of the rows of a chunk: fewer waste the product, more the cache.
const CHUNK_ROWS: Range<usize> = 256..4096;
/// Lines of the head whose gradient by one chunk exists at one time.
const BLOCK_LINES: usize = 8192;

/// Which rows of the vocabulary compete, which of them were chosen, and how sharply.
#[derive(Clone, Debug)]
pub(crate) struct Choice {
    /// Rows of the head that the softmax runs over.
    pub(crate) slice: Range<usize>,
    /// For each row of `hidden`, the chosen id, within `slice`.
    pub(crate) targets: Vec<u32>,
    /// The logits are divided by it.
    pub(crate) temperature: f32,
}

impl Choice {
    /// Log-probabilities and entropies in nats of each row, `[n]`, both differentiable.
    ///
    /// `hidden` is `[n, h]` and `head` `[vocabulary, h]`.
    pub(crate) fn log_probs(&self, hidden: &Tensor, head: &Tensor) -> Result<(Tensor, Tensor)> {
        self.check(hidden, head)?;
        if !is_host_f32(hidden) {
            return self.composite(hidden, head);
        }
        parts(&self.packed(hidden, head)?)
    }

    /// The same numbers without a graph, and what [`Scored::gradients`] needs instead of one.
    pub(crate) fn scored(self, hidden: &Tensor, head: &Tensor) -> Result<Scored> {
        self.check(hidden, head)?;
        let (hidden, head) = (hidden.detach(), head.detach());
        if !is_host_f32(&hidden) {
            let (log_probs, entropies) = self.composite(&hidden, &head)?;
            return Ok(Scored { choice: self, log_probs, entropies, packed: None });
        }
        let packed = self.packed(&hidden, &head)?;
        let (log_probs, entropies) = parts(&packed)?;
        Ok(Scored { choice: self, log_probs, entropies, packed: Some(packed) })
    }

    fn check(&self, hidden: &Tensor, head: &Tensor) -> Result<()> {
        let (n, width) = hidden.dims2()?;
        let (vocabulary, head_width) = head.dims2()?;
        if n != self.targets.len() || width != head_width {
            bail!("head of width {head_width} got hidden {:?} and {} targets", hidden.dims(), self.targets.len());
        }
        if self.slice.is_empty() || self.slice.end > vocabulary {
            bail!("vocabulary slice {:?} of {vocabulary} tokens; give a non-empty range within it", self.slice);
        }
        if let Some(target) = self.targets.iter().find(|target| !self.slice.contains(&(**target as usize))) {
            bail!("target {target} lies outside the vocabulary slice {:?}", self.slice);
        }
        if !(self.temperature.is_finite() && self.temperature > 0.0) {
            bail!("temperature is {}; give a positive number", self.temperature);
        }
        Ok(())
    }

    fn packed(&self, hidden: &Tensor, head: &Tensor) -> Result<Tensor> {
        hidden.contiguous()?.apply_op2(head, LogProbs { choice: self.clone() })
    }

    fn composite(&self, hidden: &Tensor, head: &Tensor) -> Result<(Tensor, Tensor)> {
        let rows = CHUNK_ROWS.end;
        let n = self.targets.len();
        let head = head.narrow(0, self.slice.start, self.slice.len())?.t()?;
        let (mut log_probs, mut entropies) = (Vec::new(), Vec::new());
        for first in (0..n).step_by(rows) {
            let count = rows.min(n - first);
            let logits = hidden.narrow(0, first, count)?.contiguous()?.matmul(&head)?.to_dtype(DType::F32)?;
            let logits = (logits / f64::from(self.temperature))?;
            let shifted = logits.broadcast_sub(&logits.max_keepdim(1)?.detach())?;
            let all = shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(1)?.log()?)?;
            let start = self.slice.start as u32;
            let targets = self.targets[first..first + count].iter().map(|target| target - start).collect();
            let targets = Tensor::from_vec(targets, (count, 1), hidden.device())?;
            log_probs.push(all.gather(&targets, 1)?.squeeze(1)?);
            entropies.push((all.exp()? * all)?.sum(1)?.neg()?);
        }
        Ok((Tensor::cat(&log_probs, 0)?, Tensor::cat(&entropies, 0)?))
    }

    fn chunk_rows(&self) -> usize {
        (CHUNK_LOGITS / self.slice.len()).clamp(CHUNK_ROWS.start, CHUNK_ROWS.end)
    }
}

/// Log-probabilities and entropies of a packed result.
fn parts(packed: &Tensor) -> Result<(Tensor, Tensor)> {
    Ok((packed.narrow(0, 0, 1)?.squeeze(0)?, packed.narrow(0, 1, 1)?.squeeze(0)?))
}

/// Log-probabilities and entropies without a graph.
pub(crate) struct Scored {
    choice: Choice,
    /// Of each target, `[n]`.
    pub(crate) log_probs: Tensor,
    /// In nats, `[n]`.
    pub(crate) entropies: Tensor,
    /// What the operation gave, `[3, n]`, where it made them.
    packed: Option<Tensor>,
}

impl Scored {
    /// Gradients by `hidden`, `[n, h]`, and, where it is trained, by `head`, `[vocabulary, h]`, given those by
    /// log-probabilities and entropies, `[n]` each.
    ///
    /// `hidden` and `head` are those the numbers were made of; the logits are made again.
    pub(crate) fn gradients(
        &self,
        hidden: &Tensor,
        head: &Tensor,
        by_log_probs: &Tensor,
        by_entropies: Option<&Tensor>,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let zeros = by_log_probs.zeros_like()?;
        let by_entropies = by_entropies.unwrap_or(&zeros);
        if let Some(packed) = &self.packed {
            let gradient = Tensor::stack(&[by_log_probs, by_entropies, &zeros], 0)?;
            return LogProbs { choice: self.choice.clone() }.gradients(hidden, head, packed, &gradient);
        }
        let hidden = Var::from_tensor(hidden)?;
        let (log_probs, entropies) = self.choice.composite(&hidden, head)?;
        let surrogate = ((log_probs * by_log_probs)?.sum_all()? + (entropies * by_entropies)?.sum_all()?)?;
        let mut store = surrogate.backward()?;
        let to_hidden = match store.remove(&hidden) {
            Some(gradient) => gradient,
            None => hidden.zeros_like()?,
        };
        Ok((to_hidden, store.remove(head)))
    }
}

/// Its result is `[3, n]`: log-probability, entropy and log-sum-exp, of which the first two have a gradient.
struct LogProbs {
    choice: Choice,
}

impl LogProbs {
    /// Scaled logits of rows `first..first + count`, `[count, slice]`.
    fn logits(&self, hidden: Operand<'_>, head: Operand<'_>, first: usize, count: usize) -> Result<Vec<f32>> {
        let (slice, width) = (&self.choice.slice, hidden.1.dims()[1]);
        let rows = hidden.1.narrow(0, first, count)?;
        let head_rows = head.1.narrow(0, slice.start, slice.len())?.transpose(0, 1)?;
        match hidden.0.matmul(head.0, (1, count, slice.len(), width), &rows, &head_rows)? {
            CpuStorage::F32(logits) => Ok(logits),
            _ => bail!("log-probs: the logits are not f32"),
        }
    }

    /// Gradients by the hidden states and, where it is trained, the head, given the operation's result and the
    /// gradient by it, `[3, n]` both.
    fn gradients(&self, h: &Tensor, w: &Tensor, res: &Tensor, grad: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
        let Choice { slice, targets, .. } = &self.choice;
        let (n, width) = h.dims2()?;
        if n == 0 {
            return Ok((h.zeros_like()?, w.track_op().then(|| w.zeros_like()).transpose()?));
        }
        let rows = RowGradient::of(res, grad)?;
        let head = w.detach().narrow(0, slice.start, slice.len())?;
        // The one buffer of the head's size: chunks are added to it in their order.
        let mut to_head = w.track_op().then(|| vec![0.0; w.elem_count()]);
        let mut to_hidden = Vec::new();
        let chunk = self.choice.chunk_rows();
        for first in (0..n).step_by(chunk) {
            let count = chunk.min(n - first);
            let hidden = h.detach().narrow(0, first, count)?;
            let logits = hidden.matmul(&head.t()?)?;
            let mut logits = host(&logits)?.values()?.to_vec();
            logits.par_chunks_mut(slice.len()).enumerate().for_each(|(row, logits)| {
                let row = first + row;
                vector::vectorised(|| self.to_logits(logits, targets[row], rows[row]));
            });
            let to_logits = tensor(logits, (count, slice.len()))?;
            to_hidden.push(to_logits.matmul(&head)?);
            if let Some(sum) = &mut to_head {
                add_product(&mut sum[slice.start * width..slice.end * width], &to_logits, &hidden)?;
            }
        }
        let to_head = to_head.map(|sum| tensor(sum, w.shape())).transpose()?;
        Ok((Tensor::cat(&to_hidden, 0)?, to_head))
    }

    /// Replaces logits by the gradient that reaches them.
    #[inline(always)]
    fn to_logits(&self, logits: &mut [f32], target: u32, row: RowGradient) {
        let sharpness = 1.0 / self.choice.temperature;
        let scale = row.by_log_prob * sharpness;
        if row.by_entropy == 0.0 {
            for logit in logits.iter_mut() {
                *logit = -scale * vector::exp(*logit * sharpness - row.log_sum);
            }
        } else {
            // d H / d logit = −p (log p + H).
            let entropy_scale = row.by_entropy * sharpness;
            for logit in logits.iter_mut() {
                let log_prob = *logit * sharpness - row.log_sum;
                *logit = -vector::exp(log_prob) * (scale + entropy_scale * (log_prob + row.entropy));
            }
        }
        logits[target as usize - self.choice.slice.start] += scale;
    }
}

/// Adds `aᵀ · b` to `sum`, a block of lines at a time: `a` is `[k, m]`, `b` `[k, n]`, `sum` `[m, n]`.
fn add_product(sum: &mut [f32], a: &Tensor, b: &Tensor) -> Result<()> {
    let (m, n) = (a.dim(1)?, b.dim(1)?);
    for first in (0..m).step_by(BLOCK_LINES) {
        let count = BLOCK_LINES.min(m - first);
        let part = a.narrow(1, first, count)?.t()?.matmul(b)?;
        let part = host(&part)?;
        let sum = &mut sum[first * n..(first + count) * n];
        sum.par_chunks_mut(ROW_BLOCK * n.max(1)).zip(part.values()?.par_chunks(ROW_BLOCK * n.max(1))).for_each(
            |(sum, part)| {
                vector::vectorised(|| vector::add(sum, part));
            },
        );
    }
    Ok(())
}

type Operand<'a> = (&'a CpuStorage, &'a Layout);

/// What the backward pass knows of a row beside its logits.
#[derive(Clone, Copy)]
struct RowGradient {
    by_log_prob: f32,
    by_entropy: f32,
    entropy: f32,
    log_sum: f32,
}

impl RowGradient {
    /// One for each row, from the operation's result and the gradient by it, `[3, n]` both.
    fn of(result: &Tensor, gradient: &Tensor) -> Result<Vec<Self>> {
        let [_, entropy, log_sum] = rows_of(result)?;
        let [by_log_prob, by_entropy, _] = rows_of(gradient)?;
        let row = |row: usize| Self {
            by_log_prob: by_log_prob[row],
            by_entropy: by_entropy[row],
            entropy: entropy[row],
            log_sum: log_sum[row],
        };
        Ok((0..entropy.len()).map(row).collect())
    }
}

fn rows_of(packed: &Tensor) -> Result<[Vec<f32>; 3]> {
    let row = |at: usize| packed.narrow(0, at, 1)?.flatten_all()?.to_vec1();
    Ok([row(0)?, row(1)?, row(2)?])
}

/// Log-probability of the target, entropy and log-sum-exp of one row; uses up the logits.
#[inline(always)]
fn row_of(logits: &mut [f32], target: usize, sharpness: f32) -> [f32; 3] {
    logits.iter_mut().for_each(|logit| *logit *= sharpness);
    let chosen = logits[target];
    let top = vector::max(logits);
    let (mut sum, mut moment) = ([0.0; 16], [0.0; 16]);
    for part in logits.chunks(16) {
        for (lane, logit) in part.iter().enumerate() {
            let shifted = logit - top;
            let weight = vector::exp(shifted);
            sum[lane] += weight;
            moment[lane] += weight * shifted;
        }
    }
    let (sum, moment) = (vector::sum(&sum), vector::sum(&moment));
    let log_sum = sum.ln();
    [chosen - top - log_sum, log_sum - moment / sum, top + log_sum]
}

impl CustomOp2 for LogProbs {
    fn name(&self) -> &'static str {
        "log-probs"
    }

    fn cpu_fwd(&self, h: &CpuStorage, h_l: &Layout, w: &CpuStorage, w_l: &Layout) -> Result<(CpuStorage, Shape)> {
        operand(h, h_l)?;
        let (n, size) = (self.choice.targets.len(), self.choice.slice.len());
        let (start, sharpness) = (self.choice.slice.start, 1.0 / self.choice.temperature);
        let mut rows = Vec::with_capacity(n);
        for (index, targets) in self.choice.targets.chunks(self.choice.chunk_rows()).enumerate() {
            let mut logits = self.logits((h, h_l), (w, w_l), index * self.choice.chunk_rows(), targets.len())?;
            let of_row = |(logits, target): (&mut [f32], &u32)| {
                vector::vectorised(|| row_of(logits, *target as usize - start, sharpness))
            };
            rows.extend(logits.par_chunks_mut(size).zip(targets).map(of_row).collect::<Vec<_>>());
        }
        let out = (0..3).flat_map(|part| rows.iter().map(move |row: &[f32; 3]| row[part])).collect();
        stored(out, (3, n))
    }

    fn bwd(&self, h: &Tensor, w: &Tensor, res: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (to_hidden, to_head) = self.gradients(h, w, res, grad)?;
        Ok((Some(to_hidden), to_head))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check_operation, distance, normal_var};

    fn choice(slice: Range<usize>, targets: &[u32]) -> Choice {
        Choice { slice, targets: targets.to_vec(), temperature: 0.7 }
    }

    #[test]
    fn forward_and_backward_agree_with_the_composite() {
        let (hidden, head) = (normal_var(1, &[4, 6]), normal_var(2, &[19, 6]));
        for slice in [0..19, 3..17, 5..6] {
            let (first, last) = (slice.start as u32, slice.end as u32 - 1);
            let choice = choice(slice, &[first, last, (first + last) / 2, last]);
            let vars = [hidden.clone(), head.clone()];
            check_operation(
                &vars,
                || Ok(choice.log_probs(&hidden, &head)?.0),
                || Ok(choice.composite(&hidden, &head)?.0),
            );
            check_operation(
                &vars,
                || Ok(choice.log_probs(&hidden, &head)?.1),
                || Ok(choice.composite(&hidden, &head)?.1),
            );
        }
    }

    #[test]
    fn chunks_do_not_show() {
        let n = 2 * CHUNK_ROWS.end + 5;
        let (hidden, head) = (normal_var(1, &[n, 3]), normal_var(2, &[300, 3]));
        let targets: Vec<u32> = (0..n).map(|row| (row % 300) as u32).collect();
        let choice = choice(0..300, &targets);
        let vars = [hidden.clone(), head.clone()];
        let run = |(log_probs, entropy): (Tensor, Tensor)| {
            let grads = log_probs.mean_all().unwrap().backward().unwrap();
            (log_probs, entropy, vars.each_ref().map(|var| grads.get(var).unwrap().clone()))
        };
        let got = run(choice.log_probs(&hidden, &head).unwrap());
        let want = run(choice.composite(&hidden, &head).unwrap());
        assert!(distance(&got.0, &want.0) < 2e-5 && distance(&got.1, &want.1) < 2e-5);
        assert!(distance(&got.2[0], &want.2[0]) < 1e-6 && distance(&got.2[1], &want.2[1]) < 1e-5);
    }

    #[test]
    fn an_empty_batch_has_no_log_probs() {
        let (hidden, head) = (normal_var(1, &[4, 6]), normal_var(2, &[19, 6]));
        let none = hidden.narrow(0, 0, 0).unwrap();
        assert_eq!(choice(0..19, &[]).log_probs(&none, &head).unwrap().0.dims(), [0]);
    }

    #[test]
    fn what_cannot_be_meant_is_an_error() {
        let (hidden, head) = (normal_var(1, &[1, 6]), normal_var(2, &[19, 6]));
        let error = |choice: Choice| choice.log_probs(&hidden, &head).unwrap_err().to_string();
        assert!(error(choice(3..20, &[4])).contains("slice 3..20 of 19"));
        assert!(error(choice(3..9, &[9])).contains("target 9 lies outside"));
        assert!(error(choice(3..9, &[4, 5])).contains("2 targets"));
        let cold = Choice { temperature: 0.0, ..choice(3..9, &[4]) };
        assert!(error(cold).contains("temperature is 0"));
    }
}
