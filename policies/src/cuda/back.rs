//! A layer's way back over a batch: gradients are added where they lie, f32.

use std::collections::BTreeMap;

use candle_core::{Result, Tensor};

use super::gpu::{Buffer, Extent, Gpu, Kind};
use super::layer::{ATTENTION_THREADS, Made, Pass, TOKEN_THREADS, turn};
use super::products::Matrix;
use super::weights::LayerWeights;

/// Rows whose part of a sum over all rows is made by one block: at least so many, and at most so many parts, which a
/// thread adds one after another.
const PART_ROWS: usize = 16;
const PARTS: usize = 256;

/// Rows of a part, and how many parts there are.
fn parts(rows: usize) -> (usize, usize) {
    let per_block = rows.div_ceil(PARTS).max(PART_ROWS);
    (per_block, rows.div_ceil(per_block))
}

const QKV: [&str; 3] = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"];

/// Where the gradients of a decoder's weights lie, by name.
pub(super) struct Sums<'a> {
    pub(super) gpu: &'a Gpu,
    pub(super) tensors: BTreeMap<String, Tensor>,
}

impl Sums<'_> {
    pub(super) fn at(&self, name: &str) -> Result<u64> {
        match self.tensors.get(name) {
            Some(tensor) => self.gpu.address(tensor),
            None => candle_core::bail!("no gradient is kept of `{name}`"),
        }
    }

    fn of_layer(&self, layer: usize, part: &str) -> Result<u64> {
        self.at(&format!("model.layers.{layer}.{part}"))
    }
}

impl Pass<'_> {
    /// The way back through RMSNorm: adds to `to_x`, and the weight's gradient to `to_weight`. As [`Pass::normed`].
    pub(super) fn unnormed(
        &self,
        (x, weight): (u64, u64),
        places: Option<(u64, usize)>,
        to: u64,
        (to_x, to_weight): (u64, u64),
    ) -> Result<()> {
        let (places, n) = places.unwrap_or((0, self.n()));
        let hidden = self.sizes().hidden;
        let (per_block, blocks) = parts(n);
        let parts = self.gpu.words(blocks * hidden)?;
        let extent = Extent { shared_bytes: 4 * hidden, ..Extent::new((blocks, 1, 1), TOKEN_THREADS) };
        let (at, rows, width, eps) = (parts.at(0), n as i32, hidden as i32, self.sizes().eps);
        let per_block = per_block as i32;
        let arguments: [&dyn super::arguments::Argument; 10] =
            [&to_x, &at, &to, &x, &weight, &places, &rows, &per_block, &width, &eps];
        self.gpu.launch_for("rms_norm_back", self.kind(), extent, &arguments)?;
        self.add_parts(to_weight, at, blocks, (hidden, hidden))
    }

    /// Adds the sum of so many parts, which lie `stride` apart.
    fn add_parts(&self, sum: u64, parts: u64, n: usize, (width, stride): (usize, usize)) -> Result<()> {
        let arguments: [&dyn super::arguments::Argument; 5] =
            [&sum, &parts, &(n as i32), &(width as i32), &(stride as i32)];
        self.gpu.launch("add_rows", Extent::over(width), &arguments)
    }

    /// f32 rows in the type of products.
    fn narrowed(&self, x: u64, n: usize) -> Result<Buffer> {
        let out = self.gpu.room(n, self.kind())?;
        self.gpu.launch_for("cast", self.kind(), Extent::over(n.div_ceil(4)), &[&out.at(0), &x, &n])?;
        Ok(out)
    }

    /// The way back through a layer: `to`, f32, becomes the gradient by its input `x` where it was that by its output, and
    /// the gradients of its weights are added. `made` is used up.
    pub(super) fn leave(
        &self,
        (index, layer): (usize, &LayerWeights),
        (x, made): (&Buffer, Made),
        to: &Buffer,
        sums: &Sums<'_>,
    ) -> Result<()> {
        let (n, hidden) = (self.n(), self.sizes().hidden);
        self.leave_gated((index, layer), &made, to, sums)?;
        // What the queries attended to.
        let (queries, kind) = (self.sizes().queries(), self.kind());
        let narrow = self.narrowed(to.at(0), n * hidden)?;
        let to_attended = self.gpu.room(n * queries, kind)?;
        let (down, weight) = (self.matrix(narrow.at(0), hidden), self.matrix(layer.out.at(0), queries));
        let sizes = [n, hidden, queries];
        self.gpu.pull(sizes, down, weight, (self.matrix(to_attended.at(0), queries), false))?;
        let sum = Matrix::new(sums.of_layer(index, "self_attn.o_proj.weight")?, Kind::F32, queries);
        self.gpu.gather(sizes, down, self.matrix(made.attended.at(0), queries), sum)?;
        drop(narrow);
        let to_qkv = self.unattended(&made, &to_attended)?;
        drop((made, to_attended));
        self.leave_projection((index, layer), x, (&to_qkv, to), sums)
    }

    /// From the gradient by a layer's output to that by the residual stream behind attention, in place.
    fn leave_gated(
        &self,
        (index, layer): (usize, &LayerWeights),
        made: &Made,
        to: &Buffer,
        sums: &Sums<'_>,
    ) -> Result<()> {
        let (gpu, n, kind) = (self.gpu, self.n(), self.kind());
        let (hidden, gated) = (self.sizes().hidden, self.sizes().gated);
        let f32_sum = |part: &str, width: usize| {
            Ok::<_, candle_core::Error>(Matrix::new(sums.of_layer(index, part)?, Kind::F32, width))
        };
        let narrow = self.narrowed(to.at(0), n * hidden)?;
        let to_out = self.matrix(narrow.at(0), hidden);
        let active = gpu.room(n * gated, kind)?;
        let of_active = self.matrix(active.at(0), gated);
        gpu.pull([n, hidden, gated], to_out, self.matrix(layer.down.at(0), gated), (of_active, false))?;
        // From here on gate_up is the gradient by it and active the activation.
        let extent = Extent::over((n * gated).div_ceil(4));
        let (at, both) = (active.at(0), made.gate_up.at(0));
        gpu.launch_for("swiglu_back", kind, extent, &[&at, &both, &(n as i32), &(gated as i32)])?;
        gpu.gather([n, hidden, gated], to_out, of_active, f32_sum("mlp.down_proj.weight", gated)?)?;
        drop((narrow, active));
        let normed = self.normed(made.middle.at(0), layer.post_norm, None)?;
        for (part, first) in [("mlp.gate_proj.weight", 0), ("mlp.up_proj.weight", gated)] {
            let to_part = self.matrix(both + (first * kind.bytes()) as u64, 2 * gated);
            gpu.gather([n, gated, hidden], to_part, self.matrix(normed.at(0), hidden), f32_sum(part, hidden)?)?;
        }
        let to_normed = gpu.room(n * hidden, kind)?;
        let (weight, to_both) = (self.matrix(layer.gate_up.at(0), hidden), self.matrix(both, 2 * gated));
        gpu.pull([n, 2 * gated, hidden], to_both, weight, (self.matrix(to_normed.at(0), hidden), false))?;
        let to_weight = sums.of_layer(index, "post_attention_layernorm.weight")?;
        self.unnormed((made.middle.at(0), layer.post_norm), None, to_normed.at(0), (to.at(0), to_weight))
    }

    /// The gradient by queries, keys and values before they were turned.
    fn unattended(&self, made: &Made, to_attended: &Buffer) -> Result<Buffer> {
        let (gpu, n, sizes, kind) = (self.gpu, self.n(), self.sizes(), self.kind());
        let along = gpu.words(n * sizes.heads)?;
        let (dots, out, to) = (along.at(0), made.attended.at(0), to_attended.at(0));
        let warps = TOKEN_THREADS / 32;
        let extent = Extent::new(((n * sizes.heads).div_ceil(warps), 1, 1), TOKEN_THREADS);
        let (heads, d) = (sizes.heads as i32, sizes.head_dim as i32);
        gpu.launch_for("attended_along", kind, extent, &[&dots, &out, &to, &heads, &(n as i32), &d])?;
        let to_qkv = gpu.room(n * sizes.qkv(), kind)?;
        let (at, qkv, log_sums, tiles) = (to_qkv.at(0), made.qkv.at(0), made.log_sums.at(0), self.batch.tiles.at(0));
        let of_heads = self.heads();
        let arguments: [&dyn super::arguments::Argument; 7] = [&at, &to, &qkv, &log_sums, &dots, &tiles, &of_heads];
        for (which, n_heads) in [("queries", sizes.heads), ("keys", sizes.kv_heads)] {
            let extent = Extent::new((self.batch.n_tiles, n_heads, 1), ATTENTION_THREADS);
            gpu.launch_for(&format!("attend_back_{which}_{}", sizes.head_dim), kind, extent, &arguments)?;
        }
        turn(gpu, self.weights, (at, n), (self.batch.index.at(0), self.batch.image.at(0)), (0, -1.0))?;
        Ok(to_qkv)
    }

    /// Adds to `to`, the gradient by a layer's input, what comes through queries, keys and values.
    fn leave_projection(
        &self,
        (index, layer): (usize, &LayerWeights),
        x: &Buffer,
        (to_qkv, to): (&Buffer, &Buffer),
        sums: &Sums<'_>,
    ) -> Result<()> {
        let (gpu, n, kind, sizes) = (self.gpu, self.n(), self.kind(), self.sizes());
        let (hidden, width) = (sizes.hidden, sizes.qkv());
        let normed = self.normed(x.at(0), layer.input_norm, None)?;
        let (per_block, blocks) = parts(n);
        let parts = gpu.words(blocks * width)?;
        let extent = Extent::new((width.div_ceil(TOKEN_THREADS), blocks, 1), TOKEN_THREADS);
        let (at, from) = (parts.at(0), to_qkv.at(0));
        gpu.launch_for("sum_blocks", kind, extent, &[&at, &from, &(n as i32), &(per_block as i32), &(width as i32)])?;
        let mut first = 0;
        for (part, heads) in QKV.iter().zip([sizes.heads, sizes.kv_heads, sizes.kv_heads]) {
            let of_part = heads * sizes.head_dim;
            let to_part = self.matrix(to_qkv.at(first * kind.bytes()), width);
            let sum = Matrix::new(sums.of_layer(index, &format!("{part}.weight"))?, Kind::F32, hidden);
            gpu.gather([n, of_part, hidden], to_part, self.matrix(normed.at(0), hidden), sum)?;
            let bias = sums.of_layer(index, &format!("{part}.bias"))?;
            self.add_parts(bias, parts.at(4 * first), blocks, (of_part, width))?;
            first += of_part;
        }
        let to_normed = gpu.room(n * hidden, kind)?;
        let (weight, from) = (self.matrix(layer.qkv.at(0), hidden), self.matrix(from, width));
        gpu.pull([n, width, hidden], from, weight, (self.matrix(to_normed.at(0), hidden), false))?;
        let to_weight = sums.of_layer(index, "input_layernorm.weight")?;
        self.unnormed((x.at(0), layer.input_norm), None, to_normed.at(0), (to.at(0), to_weight))
    }
}
