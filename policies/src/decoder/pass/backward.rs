//! The way back of a [`Pass`]: gradients layer by layer.

use candle_core::Tensor;
use grpo::{Gradients, Result};
use rayon::prelude::*;

use super::{Made, Pass, Widths, Workspace, multiply, numbers, pack_matrix, resize};
use crate::decoder::weights::Layer;
use crate::ops::attention::Attended;
use crate::ops::kernel::{Left, Panels, Product};
use crate::ops::rms_norm::{normalise_rows, unnormalise_rows};
use crate::ops::swiglu::unactivate_rows;
use crate::ops::vector::{add, vectorised};
use crate::ops::{ROW_BLOCK, ordered_sum, sum_rows};

/// The names of a layer's parameters.
fn name(layer: usize, part: &str) -> String {
    format!("model.layers.{layer}.{part}")
}

const QKV: [&str; 3] = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"];

/// The products that make a weight's gradient, `[n, k]`: column `first` and those after of `dy`, `[tokens, stride]`,
/// times what the weight read, `[tokens, k]`.
fn outer<'a>(
    (dy, first, stride): (&'a [f32], usize, usize),
    right: &'a Panels,
    out: &'a mut [f32],
) -> impl Iterator<Item = Product<'a>> {
    let columns = right.n();
    out.chunks_mut(ROW_BLOCK * columns).enumerate().map(move |(block, out)| {
        let rows = out.len() / columns;
        let left = Left::Columns { data: &dy[first + block * ROW_BLOCK..], stride, rows };
        Product { left, right, depth: right.k(), columns, out, out_stride: columns }
    })
}

/// Zeros for a gradient of this shape.
fn zeros(like: &Tensor) -> Vec<f32> {
    vec![0.0; like.elem_count()]
}

impl Pass<'_> {
    /// The way back through a layer: `to` becomes the gradient by its input `x` where it was that by its output,
    /// `[tokens, H]`, and the gradients of its weights are added.
    pub(in crate::decoder) fn leave_layer(
        &self,
        (index, x, made): (usize, &[f32], &Made),
        to: &mut [f32],
        gradients: &mut Gradients,
        space: &mut Workspace,
    ) -> Result<()> {
        let layer = &self.decoder.layers()[index];
        let norm = self.leave_gated(layer, made, to, space)?;
        gradients.add_values(&name(index, "post_attention_layernorm.weight"), norm, self.widths().hidden)?;
        self.gated_gradients(index, made, to, (gradients, space))?;
        let attended = Attended { qkv: &made.qkv, out: &made.attended, log_sums: &made.log_sums };
        resize(&mut space.to_qkv, made.qkv.len());
        self.attention.unattend(&attended, &space.to_attended, self.starts, &mut space.to_qkv);
        to.copy_from_slice(&space.to_middle);
        let norm = self.leave_projection(layer, x, to, space)?;
        gradients.add_values(&name(index, "input_layernorm.weight"), norm, self.widths().hidden)?;
        self.projection_gradients(index, x.len() / self.widths().hidden, (gradients, space))
    }

    /// From the gradient by a layer's output to those by what its queries attended to and by the stream behind that;
    /// gives the norm's.
    fn leave_gated(&self, layer: &Layer, made: &Made, to: &[f32], space: &mut Workspace) -> Result<Vec<f32>> {
        let Widths { hidden, parts: [queries, ..], gated } = self.widths();
        pack_matrix(&mut space.down, &layer.down)?;
        pack_matrix(&mut space.out, &layer.out)?;
        for (panels, weight) in space.gate_up.iter_mut().zip(&layer.gate_up) {
            pack_matrix(panels, weight)?;
        }
        let weight = numbers(&layer.post_norm)?;
        let tokens = to.len() / hidden;
        resize(&mut space.active, tokens * gated);
        resize(&mut space.to_gate_up, tokens * 2 * gated);
        resize(&mut space.normed, to.len());
        resize(&mut space.to_middle, to.len());
        resize(&mut space.to_attended, tokens * queries);
        let read = to.par_chunks(ROW_BLOCK * hidden).zip(made.middle.par_chunks(ROW_BLOCK * hidden));
        let read = read.zip(made.gate_up.par_chunks(ROW_BLOCK * 2 * gated));
        let wide = space.active.par_chunks_mut(ROW_BLOCK * gated);
        let wide = wide.zip(space.to_gate_up.par_chunks_mut(ROW_BLOCK * 2 * gated));
        let narrow = space.normed.par_chunks_mut(ROW_BLOCK * hidden);
        let narrow = narrow.zip(space.to_middle.par_chunks_mut(ROW_BLOCK * hidden));
        let narrow = narrow.zip(space.to_attended.par_chunks_mut(ROW_BLOCK * queries));
        let (down, out, gate_up_panels) = (&space.down, &space.out, &space.gate_up);
        let parts: Vec<Vec<f32>> = read
            .zip(wide.zip(narrow))
            .map(|(((to, middle), gate_up), ((active, to_gate_up), ((normed, to_middle), to_attended)))| {
                active.fill(0.0);
                multiply((to, hidden), down, active, (0, gated));
                to_gate_up.copy_from_slice(gate_up);
                vectorised!(unactivate_rows(to_gate_up, gated, active));
                normed.fill(0.0);
                for (panels, first) in gate_up_panels.iter().zip([0, gated]) {
                    multiply((&to_gate_up[first..], 2 * gated), panels, normed, (0, hidden));
                }
                to_middle.copy_from_slice(to);
                let part = self.leave_norm(middle, &weight, normed, to_middle);
                to_attended.fill(0.0);
                multiply((to_middle, hidden), out, to_attended, (0, queries));
                part
            })
            .collect();
        Ok(ordered_sum(&parts, hidden))
    }

    /// The norm's way back over a block: adds to the gradient by `x`, gives that by the weight, and puts what the norm
    /// made in place of the gradient by that.
    fn leave_norm(&self, x: &[f32], weight: &[f32], normed: &mut [f32], to_x: &mut [f32]) -> Vec<f32> {
        let mut part = vec![0.0; weight.len()];
        vectorised!({
            unnormalise_rows(x, weight, self.eps(), normed, (to_x, &mut part));
            normalise_rows(x, weight, self.eps(), normed);
        });
        part
    }

    /// Gradients of the gated layer's weights and of the attention's last one.
    fn gated_gradients(
        &self,
        index: usize,
        made: &Made,
        to: &[f32],
        (gradients, space): (&mut Gradients, &mut Workspace),
    ) -> Result<()> {
        let Widths { hidden, parts: [queries, ..], gated } = self.widths();
        let (layer, tokens) = (&self.decoder.layers()[index], to.len() / hidden);
        let [active, normed, attended] = &mut space.read;
        active.pack_matrix(&space.active, tokens, gated);
        normed.pack_matrix(&space.normed, tokens, hidden);
        attended.pack_matrix(&made.attended, tokens, queries);
        let (mut down, mut out) = (zeros(&layer.down), zeros(&layer.out));
        let [mut gate, mut up] = layer.gate_up.each_ref().map(zeros);
        let products: Vec<Product<'_>> = outer((to, 0, hidden), active, &mut down)
            .chain(outer((&space.to_gate_up, 0, 2 * gated), normed, &mut gate))
            .chain(outer((&space.to_gate_up, gated, 2 * gated), normed, &mut up))
            .chain(outer((&space.to_middle, 0, hidden), attended, &mut out))
            .collect();
        products.into_par_iter().for_each(Product::add);
        let [gate_weight, up_weight] = &layer.gate_up;
        for (part, weight, gradient) in [
            ("mlp.down_proj.weight", &layer.down, down),
            ("mlp.gate_proj.weight", gate_weight, gate),
            ("mlp.up_proj.weight", up_weight, up),
            ("self_attn.o_proj.weight", &layer.out, out),
        ] {
            gradients.add_values(&name(index, part), gradient, weight.shape())?;
        }
        Ok(())
    }

    /// Adds to `to`, the gradient by a layer's input, what comes through queries, keys and values; gives the norm's.
    fn leave_projection(&self, layer: &Layer, x: &[f32], to: &mut [f32], space: &mut Workspace) -> Result<Vec<f32>> {
        let widths = self.widths();
        let (hidden, width) = (widths.hidden, widths.qkv());
        for (panels, weight) in space.qkv.iter_mut().zip(&layer.qkv) {
            pack_matrix(panels, weight)?;
        }
        let weight = numbers(&layer.input_norm)?;
        let blocks = x.par_chunks(ROW_BLOCK * hidden).zip(space.to_qkv.par_chunks(ROW_BLOCK * width));
        let written = to.par_chunks_mut(ROW_BLOCK * hidden).zip(space.normed.par_chunks_mut(ROW_BLOCK * hidden));
        let parts: Vec<Vec<f32>> = blocks
            .zip(written)
            .map(|((x, to_qkv), (to, normed))| {
                normed.fill(0.0);
                for (panels, first) in space.qkv.iter().zip(widths.firsts()) {
                    multiply((&to_qkv[first..], width), panels, normed, (0, hidden));
                }
                self.leave_norm(x, &weight, normed, to)
            })
            .collect();
        Ok(ordered_sum(&parts, hidden))
    }

    /// Gradients of the weights and biases of queries, keys and values.
    fn projection_gradients(
        &self,
        index: usize,
        tokens: usize,
        (gradients, space): (&mut Gradients, &mut Workspace),
    ) -> Result<()> {
        let (layer, widths) = (&self.decoder.layers()[index], self.widths());
        let [normed, ..] = &mut space.read;
        normed.pack_matrix(&space.normed, tokens, widths.hidden);
        let mut weights = layer.qkv.each_ref().map(zeros);
        let products: Vec<Product<'_>> = weights
            .iter_mut()
            .zip(widths.firsts())
            .flat_map(|(out, first)| outer((&space.to_qkv, first, widths.qkv()), normed, out))
            .collect();
        products.into_par_iter().for_each(Product::add);
        let biases = sum_rows(&space.to_qkv, widths.qkv());
        for (which, weight) in weights.into_iter().enumerate() {
            let (first, shape) = (widths.firsts()[which], layer.qkv[which].shape());
            let bias = biases[first..first + widths.parts[which]].to_vec();
            gradients.add_values(&name(index, &format!("{}.weight", QKV[which])), weight, shape)?;
            gradients.add_values(&name(index, &format!("{}.bias", QKV[which])), bias, widths.parts[which])?;
        }
        Ok(())
    }
    /// The way back through the last norm at the tokens `at`: the gradient by `x`, `[tokens, H]`, and the weight's.
    pub(in crate::decoder) fn leave_normed_at(
        &self,
        x: &[f32],
        at: &[usize],
        to: &[f32],
    ) -> Result<(Vec<f32>, Vec<f32>)> {
        let hidden = self.widths().hidden;
        let weight = numbers(self.decoder.norm())?;
        let (mut to_x, mut to_weight) = (vec![0.0; x.len()], vec![0.0; hidden]);
        for (token, to) in at.iter().zip(to.chunks_exact(hidden)) {
            let place = token * hidden..(token + 1) * hidden;
            let written = (&mut to_x[place.clone()], &mut to_weight[..]);
            vectorised!(unnormalise_rows(&x[place], &weight, self.eps(), to, written));
        }
        Ok((to_x, to_weight))
    }

    /// Adds the gradients of embedded tokens, `[tokens, H]`, to that of the embedding.
    pub(in crate::decoder) fn add_embedded(to: &[f32], ids: &[u32], to_embedding: &mut [f32]) {
        let hidden = to.len() / ids.len().max(1);
        vectorised!({
            for (id, to) in ids.iter().zip(to.chunks_exact(hidden.max(1))) {
                add(&mut to_embedding[*id as usize * hidden..][..hidden], to);
            }
        });
    }
}
