//! A layer's way forward over a batch.

use candle_core::Result;

use super::arguments::Heads;
use super::batch::Batch;
use super::gpu::{Buffer, Extent, Gpu, Kind};
use super::products::Matrix;
use super::weights::{LayerWeights, Sizes, Weights};

/// Threads of a block that works on one token.
pub(super) const TOKEN_THREADS: usize = 256;
/// Threads of a block of attention: attention.cu's WARPS.
pub(super) const ATTENTION_THREADS: usize = 128;

/// What a layer makes of its input and the way back reads.
#[derive(Debug)]
pub(super) struct Made {
    /// Queries, keys and values, turned, `[tokens, (h + 2 kv) · d]`.
    pub(super) qkv: Buffer,
    /// `[tokens, h · d]`.
    pub(super) attended: Buffer,
    /// `[h, tokens]`, f32.
    pub(super) log_sums: Buffer,
    /// The residual stream between attention and the gated layer, `[tokens, H]`, f32.
    pub(super) middle: Buffer,
    /// `[tokens, 2 F]`.
    pub(super) gate_up: Buffer,
}

/// A decoder over a batch.
pub(super) struct Pass<'a> {
    pub(super) gpu: &'a Gpu,
    pub(super) weights: &'a Weights,
    pub(super) batch: &'a Batch,
}

impl Pass<'_> {
    pub(super) fn n(&self) -> usize {
        self.batch.n_tokens
    }

    pub(super) fn kind(&self) -> Kind {
        self.weights.kind
    }

    pub(super) fn sizes(&self) -> Sizes {
        self.weights.sizes
    }

    /// Rows as wide as they are apart, in the type of products.
    pub(super) fn matrix(&self, at: u64, width: usize) -> Matrix {
        Matrix::new(at, self.kind(), width)
    }

    pub(super) fn heads(&self) -> Heads {
        let sizes = self.sizes();
        let (heads, kv_heads) = (sizes.heads as i32, sizes.kv_heads as i32);
        Heads { heads, kv_heads, tokens: self.n() as i32, scale: sizes.scale() }
    }

    /// The embedded ids, `[tokens, H]`, f32.
    pub(super) fn embedded(&self) -> Result<Buffer> {
        let out = self.gpu.words(self.n() * self.sizes().hidden)?;
        let (ids, to) = (self.batch.ids.at(0), out.at(0));
        embed(self.gpu, self.weights, (ids, self.n()), to)?;
        Ok(out)
    }

    /// RMSNorm of every token, or of those that `places` names.
    pub(super) fn normed(&self, x: u64, weight: u64, places: Option<(u64, usize)>) -> Result<Buffer> {
        let n = places.map_or(self.n(), |(_, n)| n);
        let out = self.gpu.room(n * self.sizes().hidden, self.kind())?;
        rms_norm(self.gpu, self.weights, (x, weight), (places.map_or(0, |(at, _)| at), n), out.at(0))?;
        Ok(out)
    }

    /// What a layer makes of `x`, `[tokens, H]`, and its output, f32 both.
    pub(super) fn layer(&self, layer: &LayerWeights, x: &Buffer) -> Result<(Made, Buffer)> {
        let (gpu, n, sizes) = (self.gpu, self.n(), self.sizes());
        let (hidden, width, queries) = (sizes.hidden, sizes.qkv(), sizes.queries());
        let normed = self.normed(x.at(0), layer.input_norm, None)?;
        let qkv = gpu.room(n * width, self.kind())?;
        let weight = self.matrix(layer.qkv.at(0), hidden);
        gpu.apply(
            [n, width, hidden],
            self.matrix(normed.at(0), hidden),
            weight,
            (self.matrix(qkv.at(0), width), false),
        )?;
        let places = (self.batch.index.at(0), self.batch.image.at(0));
        turn(gpu, self.weights, (qkv.at(0), n), places, (layer.bias.at(0), 1.0))?;
        let (attended, log_sums) = (gpu.room(n * queries, self.kind())?, gpu.words(n * sizes.heads)?);
        let extent = Extent::new((self.batch.n_tiles, sizes.heads, 1), ATTENTION_THREADS);
        let (out, sums, from, tiles) = (attended.at(0), log_sums.at(0), qkv.at(0), self.batch.tiles.at(0));
        let name = format!("attend_{}", sizes.head_dim);
        gpu.launch_for(&name, self.kind(), extent, &[&out, &sums, &from, &tiles, &self.heads()])?;
        // The residual stream is f32, and products add to it where it lies.
        let middle = gpu.words(n * hidden)?;
        gpu.copy(x.at(0), middle.at(0), 4 * n * hidden)?;
        let stream = |buffer: &Buffer| (Matrix::new(buffer.at(0), Kind::F32, hidden), true);
        let weight = self.matrix(layer.out.at(0), queries);
        gpu.apply([n, hidden, queries], self.matrix(attended.at(0), queries), weight, stream(&middle))?;
        let normed = self.normed(middle.at(0), layer.post_norm, None)?;
        let gate_up = gpu.room(n * 2 * sizes.gated, self.kind())?;
        let (weight, to) = (self.matrix(layer.gate_up.at(0), hidden), self.matrix(gate_up.at(0), 2 * sizes.gated));
        gpu.apply([n, 2 * sizes.gated, hidden], self.matrix(normed.at(0), hidden), weight, (to, false))?;
        let active = gpu.room(n * sizes.gated, self.kind())?;
        activate(gpu, self.weights, (gate_up.at(0), n), active.at(0))?;
        let out = gpu.words(n * hidden)?;
        gpu.copy(middle.at(0), out.at(0), 4 * n * hidden)?;
        let weight = self.matrix(layer.down.at(0), sizes.gated);
        gpu.apply([n, hidden, sizes.gated], self.matrix(active.at(0), sizes.gated), weight, stream(&out))?;
        Ok((Made { qkv, attended, log_sums, middle, gate_up }, out))
    }
}

/// The embeddings of `n` ids into the residual stream.
pub(super) fn embed(gpu: &Gpu, weights: &Weights, (ids, n): (u64, usize), to: u64) -> Result<()> {
    let width = weights.sizes.hidden as i32;
    gpu.launch("embed", Extent::new((n, 1, 1), TOKEN_THREADS), &[&to, &weights.embedding, &ids, &width])
}

/// RMSNorm of `x` for `n` tokens, those at `places` or, where that is 0, the first.
pub(super) fn rms_norm(
    gpu: &Gpu,
    weights: &Weights,
    (x, weight): (u64, u64),
    (places, n): (u64, usize),
    to: u64,
) -> Result<()> {
    let (width, eps) = (weights.sizes.hidden as i32, weights.sizes.eps);
    let extent = Extent::new((n, 1, 1), TOKEN_THREADS);
    gpu.launch_for("rms_norm", weights.kind, extent, &[&to, &x, &weight, &places, &width, &eps])
}

/// Adds the bias, unless that is 0, to `n` tokens' queries, keys and values, and turns queries and keys by their places,
/// `sign` times.
pub(super) fn turn(
    gpu: &Gpu,
    weights: &Weights,
    (qkv, n): (u64, usize),
    (index, image): (u64, u64),
    (bias, sign): (u64, f32),
) -> Result<()> {
    let (sizes, tables) = (weights.sizes, &weights.tables);
    let (turned, heads) = ((sizes.heads + sizes.kv_heads) as i32, (sizes.heads + 2 * sizes.kv_heads) as i32);
    let (cos, sin, columns, half) = (tables.cos.at(0), tables.sin.at(0), tables.columns as i32, tables.half as i32);
    let extent = Extent::new((n, 1, 1), TOKEN_THREADS);
    let arguments: [&dyn super::arguments::Argument; 11] =
        [&qkv, &bias, &index, &image, &cos, &sin, &columns, &turned, &heads, &half, &sign];
    gpu.launch_for("rotate", weights.kind, extent, &arguments)
}

/// SwiGLU of `n` tokens.
pub(super) fn activate(gpu: &Gpu, weights: &Weights, (gate_up, n): (u64, usize), to: u64) -> Result<()> {
    let gated = weights.sizes.gated;
    let extent = Extent::over((n * gated).div_ceil(4));
    gpu.launch_for("swiglu", weights.kind, extent, &[&to, &gate_up, &(n as i32), &(gated as i32)])
}
