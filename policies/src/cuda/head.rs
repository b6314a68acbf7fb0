//! Log-probabilities and entropies, a chunk of tokens' logits at a time, and the way back, which makes them again.

use std::ops::Range;

use candle_core::{Result, Tensor};

use super::gpu::{Buffer, Extent, Gpu, Kind};
use super::products::Matrix;
use super::weights::side_by_side;
use crate::decoder::Decoder;

/// Bytes of logits that exist at one time, at most and unless a single token has more.
pub(super) const CHUNK_BYTES: usize = 512 << 20;
/// Threads of a block that works on a token's logits.
const ROW_THREADS: usize = 256;

/// The rows of the head that compete, in the type of products, and how sharply.
#[derive(Debug)]
pub(super) struct Head {
    weight: Buffer,
    kind: Kind,
    pub(super) width: usize,
    hidden: usize,
    sharpness: f32,
}

/// What [`Head::scores`] read and gave of `n` targets.
#[derive(Clone, Copy)]
pub(super) struct Scored<'a> {
    pub(super) hidden: &'a Buffer,
    pub(super) scores: &'a Tensor,
    pub(super) targets: u64,
    pub(super) n: usize,
}

/// What the loss asks of each token.
#[derive(Clone, Copy)]
pub(super) struct Asked {
    pub(super) by_log_probs: u64,
    /// 0 where there is none.
    pub(super) by_entropies: u64,
}

impl Head {
    /// The head of a decoder over a slice of its vocabulary, whose logits are multiplied by `sharpness`.
    pub(super) fn of(gpu: &Gpu, decoder: &Decoder, slice: Range<usize>, sharpness: f32) -> grpo::Result<Self> {
        let (kind, width, hidden) = (Kind::from(decoder.compute()), slice.len(), decoder.config().hidden_size);
        let weight = side_by_side(gpu, &[decoder.head_rows(slice)?], kind)?;
        Ok(Self { weight, kind, width, hidden, sharpness })
    }

    /// Logits of some rows of hidden states, f32.
    pub(super) fn logits(&self, gpu: &Gpu, hidden: u64, rows: usize, to: u64) -> Result<()> {
        let x = Matrix::new(hidden, self.kind, self.hidden);
        let weight = Matrix::new(self.weight.at(0), self.kind, self.hidden);
        gpu.apply([rows, self.width, self.hidden], x, weight, (Matrix::new(to, Kind::F32, self.width), false))
    }

    fn chunks(&self, n: usize) -> (usize, impl Iterator<Item = Range<usize>>) {
        let rows = (CHUNK_BYTES / (4 * self.width)).clamp(1, n.max(1));
        (rows, (0..n).step_by(rows).map(move |first| first..n.min(first + rows)))
    }

    fn row(&self, hidden: &Buffer, row: usize) -> u64 {
        hidden.at(row * self.hidden * self.kind.bytes())
    }

    /// `[3, n]`: log-probability of each target, entropy, log-sum-exp.
    pub(super) fn scores(&self, gpu: &Gpu, hidden: &Buffer, (targets, n): (u64, usize)) -> Result<Tensor> {
        let result = gpu.tensor((3, n))?;
        let to = gpu.address(&result)?;
        let (rows, chunks) = self.chunks(n);
        let logits = gpu.words(rows * self.width)?;
        for chunk in chunks {
            self.logits(gpu, self.row(hidden, chunk.start), chunk.len(), logits.at(0))?;
            let (from, width, first, n) = (logits.at(0), self.width as i32, chunk.start as i32, n as i32);
            let extent = Extent::new((chunk.len(), 1, 1), ROW_THREADS);
            let sharpness = self.sharpness;
            gpu.launch("score_rows", extent, &[&to, &from, &targets, &sharpness, &width, &first, &n])?;
        }
        Ok(result)
    }

    /// The gradient by the hidden states, `[n, H]`; adds that of the rows of the head at `to_weight`, f32.
    pub(super) fn leave(&self, gpu: &Gpu, scored: Scored<'_>, asked: Asked, to_weight: u64) -> Result<Buffer> {
        let Scored { hidden, scores, targets, n } = scored;
        let to_hidden = gpu.room(n * self.hidden, self.kind)?;
        let (rows, chunks) = self.chunks(n);
        let (logits, gradient) = (gpu.words(rows * self.width)?, gpu.room(rows * self.width, self.kind)?);
        let result = gpu.address(scores)?;
        for chunk in chunks {
            self.logits(gpu, self.row(hidden, chunk.start), chunk.len(), logits.at(0))?;
            let (to, from, width) = (gradient.at(0), logits.at(0), self.width as i32);
            let (sharpness, first, n) = (self.sharpness, chunk.start as i32, n as i32);
            let arguments: [&dyn super::arguments::Argument; 10] = [
                &to,
                &from,
                &result,
                &asked.by_log_probs,
                &asked.by_entropies,
                &targets,
                &sharpness,
                &width,
                &first,
                &n,
            ];
            gpu.launch_for("unscore_rows", self.kind, Extent::new((chunk.len(), 1, 1), ROW_THREADS), &arguments)?;
            let sizes = [chunk.len(), self.width, self.hidden];
            let to_logits = Matrix::new(to, self.kind, self.width);
            let matrix = |at: u64| Matrix::new(at, self.kind, self.hidden);
            let weight = matrix(self.weight.at(0));
            gpu.pull(sizes, to_logits, weight, (matrix(self.row(&to_hidden, chunk.start)), false))?;
            let sum = Matrix::new(to_weight, Kind::F32, self.hidden);
            gpu.gather(sizes, to_logits, matrix(self.row(hidden, chunk.start)), sum)?;
        }
        Ok(to_hidden)
    }
}
