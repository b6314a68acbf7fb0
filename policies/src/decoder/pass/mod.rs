//! Forward and backward passes of whole batches on the CPU in f32, layer by layer, from slices to slices.
//!
//! 1. Rows lie one behind another without padding; all that is not attention works on blocks of [`ROW_BLOCK`] tokens,
//!    which go through half a layer on one thread while they are in its cache.
//! 2. Nothing of the graph is kept: a layer's input, projections, sums and log-sum-exps are ([`Made`]), or its input
//!    alone, and the backward pass makes the rest again. Norms and activations are always made again, for that is
//!    cheaper than reading them back.
//! 3. Weights are packed when a layer is read and forgotten after it. The gradient of each weight is one product, the
//!    parts of which are rows of the weight: how many threads there are changes no bit.

mod backward;

use candle_core::Tensor;
use grpo::Result;
use rayon::prelude::*;

use super::Decoder;
use super::weights::Layer;
use crate::ops::attention::Attention;
use crate::ops::kernel::{Left, Panels, Product};
use crate::ops::rms_norm::normalise_rows;
use crate::ops::swiglu::activate_rows;
use crate::ops::vector::vectorised;
use crate::ops::{ROW_BLOCK, host};

/// What a layer makes of its input and the backward pass reads.
#[derive(Default)]
pub(super) struct Made {
    /// Queries, keys and values before rotation, `[tokens, (h + 2 kv) · d]`.
    qkv: Vec<f32>,
    /// `[tokens, h · d]`.
    attended: Vec<f32>,
    /// Of each row's attention, `[h · n]`.
    log_sums: Vec<Vec<f32>>,
    /// The residual stream between attention and the gated layer, `[tokens, H]`.
    middle: Vec<f32>,
    /// `[tokens, 2 F]`.
    gate_up: Vec<f32>,
}

/// Memory that the layers of a pass use one after another.
#[derive(Default)]
pub(super) struct Workspace {
    qkv: [Panels; 3],
    out: Panels,
    gate_up: [Panels; 2],
    down: Panels,
    /// Activations as right operands of the weights' gradients.
    read: [Panels; 3],
    to_qkv: Vec<f32>,
    to_attended: Vec<f32>,
    to_middle: Vec<f32>,
    to_gate_up: Vec<f32>,
    active: Vec<f32>,
    normed: Vec<f32>,
}

/// A decoder without adapters over a batch of rows.
pub(super) struct Pass<'a> {
    pub(super) decoder: &'a Decoder,
    pub(super) attention: &'a Attention,
    /// Each row's first token.
    pub(super) starts: &'a [usize],
}

/// Widths of what a layer makes.
#[derive(Clone, Copy)]
struct Widths {
    hidden: usize,
    /// Of queries, keys and values.
    parts: [usize; 3],
    gated: usize,
}

impl Widths {
    fn qkv(&self) -> usize {
        self.parts.iter().sum()
    }

    /// Where queries, keys and values begin.
    fn firsts(&self) -> [usize; 3] {
        [0, self.parts[0], self.parts[0] + self.parts[1]]
    }
}

/// Packs a weight `[n, k]` for `x · Wᵀ`.
fn pack_rows(panels: &mut Panels, weight: &Tensor) -> Result<()> {
    let (n, k) = weight.dims2()?;
    panels.pack_rows(host(weight)?.values()?, n, k);
    Ok(())
}

/// Packs a weight `[n, k]` for `y · W`.
fn pack_matrix(panels: &mut Panels, weight: &Tensor) -> Result<()> {
    let (n, k) = weight.dims2()?;
    panels.pack_matrix(host(weight)?.values()?, n, k);
    Ok(())
}

fn numbers(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(host(tensor)?.values()?.to_vec())
}

/// Adds `x · right` to columns of `out`, whose rows are `stride` wide, from column `first` on.
fn multiply(x: (&[f32], usize), right: &Panels, out: &mut [f32], (first, stride): (usize, usize)) {
    let (data, width) = x;
    let rows = out.len() / stride;
    let left = Left::Rows { data, stride: width, rows };
    Product { left, right, depth: right.k(), columns: right.n(), out: &mut out[first..], out_stride: stride }.add();
}

/// Makes a buffer so long; what it holds means nothing.
fn resize(buffer: &mut Vec<f32>, len: usize) {
    buffer.resize(len, 0.0);
}

impl Pass<'_> {
    fn widths(&self) -> Widths {
        let config = self.decoder.config();
        let (d, kv) = (config.head_dim(), config.num_key_value_heads);
        Widths {
            hidden: config.hidden_size,
            parts: [config.num_attention_heads * d, kv * d, kv * d],
            gated: config.intermediate_size,
        }
    }

    fn eps(&self) -> f32 {
        self.decoder.config().rms_norm_eps as f32
    }

    /// What a layer makes of `x`, `[tokens, H]`; fills `out` likewise.
    pub(super) fn read_layer(
        &self,
        (layer, x): (&Layer, &[f32]),
        made: &mut Made,
        out: &mut [f32],
        space: &mut Workspace,
    ) -> Result<()> {
        self.project(layer, x, made, space)?;
        resize(&mut made.attended, x.len() / self.widths().hidden * self.widths().parts[0]);
        made.log_sums = self.attention.attend(&made.qkv, self.starts, &mut made.attended);
        self.finish((layer, x), made, out, space)
    }

    /// Norm and projection of queries, keys and values.
    fn project(&self, layer: &Layer, x: &[f32], made: &mut Made, space: &mut Workspace) -> Result<()> {
        let widths = self.widths();
        for (panels, weight) in space.qkv.iter_mut().zip(&layer.qkv) {
            pack_rows(panels, weight)?;
        }
        let (norm, bias) = (numbers(&layer.input_norm)?, layer.qkv_bias.each_ref().map(numbers));
        let bias: Vec<f32> = bias.into_iter().collect::<Result<Vec<_>>>()?.concat();
        let (width, firsts) = (widths.qkv(), widths.firsts());
        resize(&mut made.qkv, x.len() / widths.hidden * width);
        let blocks = made.qkv.par_chunks_mut(ROW_BLOCK * width).zip(x.par_chunks(ROW_BLOCK * widths.hidden));
        blocks.for_each(|(qkv, x)| {
            let mut normed = vec![0.0; x.len()];
            vectorised!(normalise_rows(x, &norm, self.eps(), &mut normed));
            qkv.chunks_exact_mut(width).for_each(|row| row.copy_from_slice(&bias));
            for (panels, first) in space.qkv.iter().zip(firsts) {
                multiply((&normed, widths.hidden), panels, qkv, (first, width));
            }
        });
        Ok(())
    }

    /// The rest of a layer, given what its queries attended to.
    fn finish(
        &self,
        (layer, x): (&Layer, &[f32]),
        made: &mut Made,
        out: &mut [f32],
        space: &mut Workspace,
    ) -> Result<()> {
        let Widths { hidden, parts: [queries, ..], gated } = self.widths();
        pack_rows(&mut space.out, &layer.out)?;
        for (panels, weight) in space.gate_up.iter_mut().zip(&layer.gate_up) {
            pack_rows(panels, weight)?;
        }
        pack_rows(&mut space.down, &layer.down)?;
        let norm = numbers(&layer.post_norm)?;
        resize(&mut made.middle, x.len());
        resize(&mut made.gate_up, x.len() / hidden * 2 * gated);
        let read = x.par_chunks(ROW_BLOCK * hidden).zip(made.attended.par_chunks(ROW_BLOCK * queries));
        let middle = made.middle.par_chunks_mut(ROW_BLOCK * hidden);
        let gate_up = made.gate_up.par_chunks_mut(ROW_BLOCK * 2 * gated);
        let written = middle.zip(gate_up).zip(out.par_chunks_mut(ROW_BLOCK * hidden));
        read.zip(written).for_each(|((x, attended), ((middle, gate_up), out))| {
            middle.copy_from_slice(x);
            multiply((attended, queries), &space.out, middle, (0, hidden));
            let (mut normed, mut active) = (vec![0.0; x.len()], vec![0.0; gate_up.len() / 2]);
            vectorised!(normalise_rows(middle, &norm, self.eps(), &mut normed));
            gate_up.fill(0.0);
            for (panels, first) in space.gate_up.iter().zip([0, gated]) {
                multiply((&normed, hidden), panels, gate_up, (first, 2 * gated));
            }
            vectorised!(activate_rows(gate_up, gated, &mut active));
            out.copy_from_slice(middle);
            multiply((&active, gated), &space.down, out, (0, hidden));
        });
        Ok(())
    }

    /// What the last norm makes of the tokens `at`, `[at, H]`.
    pub(super) fn normed_at(&self, x: &[f32], at: &[usize]) -> Result<Vec<f32>> {
        let hidden = self.widths().hidden;
        let weight = numbers(self.decoder.norm())?;
        let mut normed = vec![0.0; at.len() * hidden];
        let blocks = normed.par_chunks_mut(ROW_BLOCK * hidden).zip(at.par_chunks(ROW_BLOCK));
        blocks.for_each(|(normed, at)| {
            for (normed, token) in normed.chunks_exact_mut(hidden).zip(at) {
                vectorised!(normalise_rows(&x[token * hidden..][..hidden], &weight, self.eps(), normed));
            }
        });
        Ok(normed)
    }
}
