//! Log-probabilities and entropies of a vocabulary slice, without ever holding the logits of a whole batch.
//!
//! Linear, log-softmax and gather run over chunks of tokens; the backward pass makes each chunk's logits again.

mod host;

use std::ops::Range;

use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor, Var, bail};

use super::{host as read, is_host_f32, operand, stored, tensor};
use host::Operands;

/// Tokens whose logits exist at one time in the composite.
const COMPOSITE_ROWS: usize = 4096;

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
        self.check_operands(hidden, head)?;
        if !is_host_f32(hidden) {
            return self.composite(hidden, head);
        }
        parts(&self.packed(hidden, head)?)
    }

    /// The same numbers without a graph, and what [`Scored::gradients`] needs instead of one.
    pub(crate) fn scored(self, hidden: &Tensor, head: &Tensor) -> Result<Scored> {
        self.check_operands(hidden, head)?;
        let (hidden, head) = (hidden.detach(), head.detach());
        if !is_host_f32(&hidden) {
            let (log_probs, entropies) = self.composite(&hidden, &head)?;
            return Ok(Scored { choice: self, log_probs, entropies, packed: None });
        }
        let packed = self.packed(&hidden, &head)?;
        let (log_probs, entropies) = parts(&packed)?;
        Ok(Scored { choice: self, log_probs, entropies, packed: Some(packed) })
    }

    fn check_operands(&self, hidden: &Tensor, head: &Tensor) -> Result<()> {
        let ((n, width), (_, head_width)) = (hidden.dims2()?, head.dims2()?);
        if width != head_width {
            bail!("head of width {head_width} got hidden {:?}", hidden.dims());
        }
        self.check(n, head)
    }

    /// An error where the slice, the targets of `n` rows or the temperature cannot be meant.
    pub(crate) fn check(&self, n: usize, head: &Tensor) -> Result<()> {
        let (vocabulary, _) = head.dims2()?;
        if n != self.targets.len() {
            bail!("{n} hidden states got {} targets; give one for each", self.targets.len());
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

    pub(crate) fn composite(&self, hidden: &Tensor, head: &Tensor) -> Result<(Tensor, Tensor)> {
        let rows = COMPOSITE_ROWS;
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

    /// Targets counted from the slice's first id.
    fn rows_chosen(&self) -> Vec<u32> {
        self.targets.iter().map(|target| target - self.slice.start as u32).collect()
    }

    /// What the passes on the CPU read, `head` being the whole vocabulary's.
    fn operands<'a>(&self, hidden: &'a [f32], head: &'a [f32], width: usize, targets: &'a [u32]) -> Operands<'a> {
        let head = &head[self.slice.start * width..self.slice.end * width];
        Operands { hidden, head, width, targets, sharpness: 1.0 / self.temperature }
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
    /// Gradients by the hidden states and, where it is trained, the head, given the operation's result and the
    /// gradient by it, `[3, n]` both.
    fn gradients(&self, h: &Tensor, w: &Tensor, res: &Tensor, grad: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
        let (_, width) = h.dims2()?;
        let (hidden, head) = (read(h)?, read(w)?);
        let targets = self.choice.rows_chosen();
        let operands = self.choice.operands(hidden.values()?, head.values()?, width, &targets);
        let slice = self.choice.slice.start * width..self.choice.slice.end * width;
        let mut to_head = w.track_op().then(|| vec![0.0; w.elem_count()]);
        let of_slice = to_head.as_mut().map(|to_head| &mut to_head[slice]);
        let to_hidden = operands.gradients(&RowGradient::of(res, grad)?, of_slice);
        let to_head = to_head.map(|sum| tensor(sum, w.shape())).transpose()?;
        Ok((tensor(to_hidden, h.shape())?, to_head))
    }
}

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

impl CustomOp2 for LogProbs {
    fn name(&self) -> &'static str {
        "log-probs"
    }

    fn cpu_fwd(&self, h: &CpuStorage, h_l: &Layout, w: &CpuStorage, w_l: &Layout) -> Result<(CpuStorage, Shape)> {
        let (hidden, head) = (operand(h, h_l)?, operand(w, w_l)?);
        let (n, width) = h_l.shape().dims2()?;
        let targets = self.choice.rows_chosen();
        stored(self.choice.operands(hidden, head, width, &targets).score(), (3, n))
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
        let n = 2 * COMPOSITE_ROWS + 5;
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
