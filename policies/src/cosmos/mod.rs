//! The visual tokenizer: images to a grid of codes and back.
//!
//! An autoencoder with finite scalar quantization of the type of NVIDIA's Cosmos DV8x16x16 (arXiv 2501.03575), the
//! tokenizer of SimpleAR. Cosmos is a network for video; of a single frame its causal three-dimensional form computes
//! exactly what the two-dimensional network here computes, with these weights folded together:
//! 1. a spatial and the temporal convolution after it are one 3 x 3 convolution (the temporal weight summed over time);
//! 2. attention over time is `x + proj_out(norm(x))`, with `v` and `proj_out` multiplied together;
//! 3. temporal down- and upsampling are `x + conv(x)` with a 1 x 1 convolution;
//! 4. the Haar bands that are high in time are pruned from `encoder.conv_in` and folded into `decoder.conv_out`.
//!
//! Tensors keep the published names without their `.0`, `.1` and `.conv3d` endings: `encoder.down.0.block.0.conv1.weight`
//! `[O, I, 3, 3]`, 1 x 1 convolutions as matrices `[O, I]`, norms `[C]`. Activations are `[B, H, W, C]`,
//! f32 unless [`Cosmos::to_dtype`] says otherwise.

mod blocks;
mod config;
mod conv;
mod fsq;
mod haar;
mod import;
mod model;
mod norm;
mod pixels;
mod train;
mod weights;

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use grpo::{Error, Params, Result, Seed};
use image::RgbImage;
use rayon::prelude::*;
use sha2::{Digest, Sha256};

pub use config::CosmosConfig;
pub use import::{CosmosFiles, PublishedCosmos};
pub use train::{Reconstruction, ReconstructionPlan};

use crate::safetensors_file::{self, Precision};
use fsq::Fsq;
use model::{Decoder, Encoder};

const CONFIG_FILE: &str = "config.json";
const WEIGHTS_FILE: &str = "model.safetensors";

/// Images pass through the network in pieces of about this many pixels, which bounds memory at every batch size.
const PIXELS_AT_ONCE: usize = 1 << 15;

/// Pieces run side by side as long as they have about this many pixels together: one image of 1024 x 1024.
const PIXELS_TOGETHER: usize = 1 << 20;

/// A visual tokenizer with its weights.
///
/// ```
/// use grpo::Seed;
/// use grpo_policies::cosmos::{Cosmos, CosmosConfig};
/// use image::RgbImage;
///
/// let tokenizer = Cosmos::init(CosmosConfig::shapes(), Seed::new(0), &candle_core::Device::Cpu)?;
/// let image = RgbImage::new(64, 48);
/// let codes = tokenizer.encode(&[&image])?;
/// assert_eq!(codes[0].len(), 8 * 6);
/// let decoded = tokenizer.decode(&codes, tokenizer.grid(48, 64)?)?;
/// assert_eq!(decoded[0].dimensions(), (64, 48));
/// # Ok::<(), grpo::Error>(())
/// ```
pub struct Cosmos {
    config: CosmosConfig,
    device: Device,
    tensors: BTreeMap<String, Tensor>,
    params: Params,
    encoder: Encoder,
    decoder: Decoder,
    fsq: Fsq,
}

impl Cosmos {
    /// A frozen tokenizer from its tensors, which must be exactly those that the configuration asks for.
    pub fn new(config: CosmosConfig, mut tensors: BTreeMap<String, Tensor>, device: &Device) -> Result<Self> {
        config.validate()?;
        let mut taken = BTreeMap::new();
        let (encoder, decoder) = build(&config, &mut |name: &str, shape: &[usize]| {
            let tensor = weights::take(&mut tensors, name, shape)?.to_device(device)?;
            taken.insert(name.to_string(), tensor.clone());
            Ok(tensor)
        })?;
        weights::refuse_rest(&tensors)?;
        Ok(Self::assemble(config, device, (taken, Params::none()), (encoder, decoder)))
    }

    /// A fresh, trainable tokenizer.
    pub fn init(config: CosmosConfig, seed: Seed, device: &Device) -> Result<Self> {
        config.validate()?;
        let mut vars = Vec::new();
        let (encoder, decoder) = build(&config, &mut |name: &str, shape: &[usize]| {
            let var = weights::fresh(name, shape, seed, device)?;
            vars.push((name.to_string(), var.clone()));
            Ok(var.as_tensor().clone())
        })?;
        let tensors = vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
        Ok(Self::assemble(config, device, (tensors, Params::new(vars)?), (encoder, decoder)))
    }

    fn assemble(
        config: CosmosConfig,
        device: &Device,
        (tensors, params): (BTreeMap<String, Tensor>, Params),
        (encoder, decoder): (Encoder, Decoder),
    ) -> Self {
        let fsq = Fsq::new(&config.levels);
        Self { config, device: device.clone(), tensors, params, encoder, decoder, fsq }
    }

    /// A frozen tokenizer from the bytes of a safetensors file.
    pub fn from_bytes(config: CosmosConfig, bytes: &[u8], device: &Device) -> Result<Self> {
        Self::new(config, safetensors_file::read_bytes(WEIGHTS_FILE, bytes)?, device)
    }

    /// A frozen tokenizer from a folder of `config.json` and `model.safetensors`.
    pub fn load(folder: impl AsRef<Path>, device: &Device) -> Result<Self> {
        let (config_path, weights_path) = (folder.as_ref().join(CONFIG_FILE), folder.as_ref().join(WEIGHTS_FILE));
        let text = std::fs::read(&config_path).map_err(|error| Error::file(&config_path, error))?;
        let config: CosmosConfig =
            serde_json::from_slice(&text).map_err(|error| Error::checkpoint(&config_path, error.to_string()))?;
        Self::new(config, safetensors_file::read(&weights_path)?, device).map_err(|error| match error {
            Error::Config(message) => Error::checkpoint(&weights_path, message),
            other => other,
        })
    }

    /// Writes what [`Cosmos::load`] reads.
    pub fn save(&self, folder: impl AsRef<Path>, precision: Precision) -> Result<()> {
        let (config_path, weights_path) = (folder.as_ref().join(CONFIG_FILE), folder.as_ref().join(WEIGHTS_FILE));
        let config = serde_json::to_string_pretty(&self.config).map_err(|error| Error::file(&config_path, error))?;
        std::fs::create_dir_all(folder.as_ref()).map_err(|error| Error::file(folder.as_ref(), error))?;
        std::fs::write(&config_path, config + "\n").map_err(|error| Error::file(&config_path, error))?;
        safetensors_file::write(&weights_path, &self.tensors, precision)
    }

    /// What tells this tokenizer from every other: the SHA-256 of its configuration and of its weights as bf16, so that a
    /// tokenizer that was saved in either precision keeps its fingerprint.
    pub fn fingerprint(&self) -> Result<String> {
        let mut hasher = Sha256::new();
        let config = serde_json::to_vec(&self.config).map_err(|error| Error::config(error.to_string()))?;
        hasher.update(config);
        for (name, tensor) in &self.tensors {
            hasher.update(name);
            for piece in safetensors_file::pieces(tensor)? {
                let bytes = Precision::Bf16.bytes(&piece?);
                let fault = |value| Error::config(format!("tensor `{name}` holds {value}; load the tokenizer again"));
                hasher.update(bytes.map_err(fault)?);
            }
        }
        Ok(crate::hex(&hasher.finalize()))
    }

    /// A frozen copy that computes in another type: bf16 for half the time and memory on a GPU, where a latent near the
    /// border of its cell may get its neighbour's code.
    ///
    /// Pixels, wavelets, statistics of norms, attention weights and the quantizer stay f32. On a CPU only f32 is fast.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        let on_cpu = self.device.is_cpu();
        if !matches!(dtype, DType::F16 | DType::BF16 | DType::F32 | DType::F64) || (on_cpu && dtype == DType::BF16) {
            let (dtype, place) = (dtype.as_str(), if on_cpu { "a CPU" } else { "a GPU" });
            return Err(Error::config(format!("the tokenizer cannot compute in {dtype} on {place}; keep f32 there")));
        }
        let mut cast = BTreeMap::new();
        for (name, tensor) in &self.tensors {
            cast.insert(name.clone(), tensor.detach().to_dtype(dtype)?);
        }
        let parts = build(&self.config, &mut |name: &str, shape: &[usize]| {
            let missing = || Error::config(format!("tensor `{name}` of shape {shape:?} is missing; load it again"));
            cast.get(name).cloned().ok_or_else(missing)
        })?;
        Ok(Self::assemble(self.config.clone(), &self.device, (cast, Params::none()), parts))
    }

    /// Widths, depths and codebook.
    pub fn config(&self) -> &CosmosConfig {
        &self.config
    }

    /// Where the weights lie.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The trainable variables; none of a tokenizer that was loaded.
    pub fn params(&self) -> Params {
        self.params.clone()
    }

    /// How many numbers the weights hold together.
    pub fn n_elements(&self) -> usize {
        self.tensors.values().map(Tensor::elem_count).sum()
    }

    /// How many different codes there are.
    pub fn n_codes(&self) -> u32 {
        self.fsq.n_codes()
    }

    /// Rows and columns of codes of an image of this many rows and columns of pixels.
    pub fn grid(&self, height: usize, width: usize) -> Result<(usize, usize)> {
        let side = self.config.spatial_compression;
        if height == 0 || width == 0 || !height.is_multiple_of(side) || !width.is_multiple_of(side) {
            return Err(Error::config(format!(
                "an image of {height} rows and {width} columns does not divide into codes of {side} x {side} pixels; \
                 resize it to multiples of {side}"
            )));
        }
        Ok((height / side, width / side))
    }

    /// The codes of each image, row by row; images of one size.
    pub fn encode(&self, images: &[&RgbImage]) -> Result<Vec<Vec<u32>>> {
        let Some(first) = images.first() else {
            return Ok(Vec::new());
        };
        let (width, height) = first.dimensions();
        self.grid(height as usize, width as usize)?;
        self.in_pieces(images, height as usize * width as usize, |images| {
            self.quantize(&self.latents(&pixels::to_tensor(images, &self.device)?)?)
        })
    }

    /// The image of each grid of codes; `grid` is rows and columns, codes row by row.
    pub fn decode(&self, codes: &[Vec<u32>], grid: (usize, usize)) -> Result<Vec<RgbImage>> {
        // Here, so that an error counts images over the whole batch.
        self.check_codes(codes, grid)?;
        let (rows, columns) = grid;
        let pixels = rows.saturating_mul(columns).saturating_mul(self.config.spatial_compression.pow(2));
        self.in_pieces(codes, pixels, |codes| pixels::to_images(&self.reconstruct(&self.values(codes, grid)?)?))
    }

    /// Works through a batch whose items have this many pixels: on a CPU the pieces run side by side.
    fn in_pieces<T: Sync, R: Send>(
        &self,
        batch: &[T],
        pixels: usize,
        work: impl Fn(&[T]) -> Result<Vec<R>> + Send + Sync,
    ) -> Result<Vec<R>> {
        let size = (PIXELS_AT_ONCE / pixels.max(1)).max(1);
        let beside = match self.device.is_cpu() {
            true => (PIXELS_TOGETHER / size.saturating_mul(pixels).max(1)).max(1),
            false => 1,
        };
        let mut results = Vec::with_capacity(batch.len());
        for pieces in batch.chunks(size.saturating_mul(beside)) {
            let pieces: Vec<Vec<R>> = pieces.par_chunks(size).map(&work).collect::<Result<_>>()?;
            results.extend(pieces.into_iter().flatten());
        }
        Ok(results)
    }

    /// Latents `[B, h, w, D]`, before quantization, of pixels `[B, H, W, 3]` in `[-1, 1]`.
    pub fn latents(&self, pixels: &Tensor) -> Result<Tensor> {
        let (_, height, width, channels) = pixels.dims4()?;
        self.grid(height, width)?;
        match channels {
            3 => Ok(self.encoder.forward(pixels)?),
            _ => Err(shape("pixels", pixels, 3)),
        }
    }

    /// The codes of latents `[B, h, w, D]`, row by row.
    pub fn quantize(&self, latents: &Tensor) -> Result<Vec<Vec<u32>>> {
        let dims = self.config.embedding_dim;
        let (n, rows, columns, channels) = latents.dims4()?;
        if channels != dims {
            return Err(shape("latents", latents, dims));
        }
        let latents: Vec<Vec<f32>> = latents.reshape((n, rows * columns * dims))?.to_vec2()?;
        Ok(latents.iter().map(|image| image.chunks_exact(dims).map(|z| self.fsq.code(z)).collect()).collect())
    }

    /// The vectors that codes stand for, `[B, h, w, D]`; `grid` is rows and columns.
    pub fn values(&self, codes: &[Vec<u32>], grid: (usize, usize)) -> Result<Tensor> {
        self.check_codes(codes, grid)?;
        let mut values = Vec::new();
        codes.iter().flatten().for_each(|&code| self.fsq.push_values(code, &mut values));
        Ok(Tensor::from_vec(values, (codes.len(), grid.0, grid.1, self.config.embedding_dim), &self.device)?)
    }

    fn check_codes(&self, codes: &[Vec<u32>], (rows, columns): (usize, usize)) -> Result<()> {
        for (image, codes) in codes.iter().enumerate() {
            if Some(codes.len()) != rows.checked_mul(columns) || codes.is_empty() {
                return Err(Error::config(format!(
                    "image {image} has {} codes; a grid of {rows} x {columns} needs as many as it has cells, and at \
                     least one",
                    codes.len()
                )));
            }
            if let Some(code) = codes.iter().find(|&&code| code >= self.n_codes()) {
                return Err(Error::config(format!(
                    "image {image} holds code {code}; codes run from 0 to {}",
                    self.n_codes() - 1
                )));
            }
        }
        Ok(())
    }

    /// Pixels `[B, H, W, 3]`, not clamped, of quantized values `[B, h, w, D]`.
    pub fn reconstruct(&self, values: &Tensor) -> Result<Tensor> {
        match values.dims4()?.3 == self.config.embedding_dim {
            true => Ok(self.decoder.forward(values)?),
            false => Err(shape("quantized values", values, self.config.embedding_dim)),
        }
    }
}

fn build(config: &CosmosConfig, source: &mut blocks::Source) -> Result<(Encoder, Decoder)> {
    Ok((Encoder::new(config, source)?, Decoder::new(config, source)?))
}

/// The error of a tensor whose last dimension should be `channels`.
fn shape(what: &'static str, tensor: &Tensor, channels: usize) -> Error {
    let got = tensor.dims().to_vec();
    let mut expected = got.clone();
    if let Some(last) = expected.last_mut() {
        *last = channels;
    }
    Error::Shape { what, got, expected }
}
