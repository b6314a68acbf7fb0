//! Encoder and decoder: from pixels to latents and from quantized values to pixels.

use candle_core::{DType, Result as CandleResult, Tensor};
use grpo::Result;

use super::blocks::{Conv, Down, Mid, Norm, ResBlock, Source, Up};
use super::config::CosmosConfig;
use super::conv::Window;
use super::haar;
use super::norm::Activation;

/// Pixels `[B, H, W, 3]` in `[-1, 1]` to latents `[B, h, w, D]`, both f32 whatever is between.
pub(super) struct Encoder {
    patch_size: usize,
    conv_in: Conv,
    levels: Vec<(Vec<ResBlock>, Option<Down>)>,
    mid: Mid,
    norm_out: Norm,
    conv_out: Conv,
    quant_conv: Conv,
}

impl Encoder {
    pub(super) fn new(config: &CosmosConfig, source: &mut Source) -> Result<Self> {
        let (widths, steps) = (config.widths(), config.downs());
        let conv_in = Conv::new(source, "encoder.conv_in", Window::SAME, (config.patch_channels(), config.channels))?;
        let mut width = config.channels;
        let mut levels = Vec::new();
        for (level, &to) in widths.iter().enumerate() {
            let name = format!("encoder.down.{level}");
            let mut blocks = Vec::new();
            for block in 0..config.num_res_blocks {
                blocks.push(ResBlock::new(source, &format!("{name}.block.{block}"), (width, to))?);
                width = to;
            }
            let down = match steps.get(level) {
                Some(&step) => Down::new(source, &format!("{name}.downsample"), width, step)?,
                None => None,
            };
            levels.push((blocks, down));
        }
        let z = config.z_channels;
        Ok(Self {
            patch_size: config.patch_size,
            conv_in,
            levels,
            mid: Mid::new(source, "encoder.mid", width)?,
            norm_out: Norm::new(source, "encoder.norm_out", width)?,
            conv_out: Conv::new(source, "encoder.conv_out", Window::SAME, (width, z))?,
            quant_conv: Conv::new(source, "quant_conv", Window::POINT, (z, config.embedding_dim))?,
        })
    }

    pub(super) fn forward(&self, pixels: &Tensor) -> CandleResult<Tensor> {
        let patches = haar::patch(pixels, self.patch_size)?.to_dtype(self.conv_in.dtype())?;
        let mut x = self.conv_in.forward(&patches)?;
        for (blocks, down) in &self.levels {
            for block in blocks {
                x = block.forward(&x)?;
            }
            if let Some(down) = down {
                x = down.forward(&x)?;
            }
        }
        let x = self.norm_out.forward(&self.mid.forward(&x)?, Activation::Silu)?;
        self.quant_conv.forward(&self.conv_out.forward(&x)?)?.to_dtype(DType::F32)
    }
}

/// Quantized values `[B, h, w, D]` to pixels `[B, H, W, 3]`, not clamped, both f32 whatever is between.
pub(super) struct Decoder {
    patch_size: usize,
    post_quant_conv: Conv,
    conv_in: Conv,
    mid: Mid,
    levels: Vec<(Vec<ResBlock>, Option<Up>)>,
    norm_out: Norm,
    conv_out: Conv,
}

impl Decoder {
    pub(super) fn new(config: &CosmosConfig, source: &mut Source) -> Result<Self> {
        let (widths, steps, z) = (config.widths(), config.ups(), config.z_channels);
        let mut width = widths.last().copied().unwrap_or(config.channels);
        let post_quant_conv = Conv::new(source, "post_quant_conv", Window::POINT, (config.embedding_dim, z))?;
        let conv_in = Conv::new(source, "decoder.conv_in", Window::SAME, (z, width))?;
        let mid = Mid::new(source, "decoder.mid", width)?;
        let mut levels = Vec::new();
        // Levels keep the encoder's numbers, so the coarsest comes first here.
        for (from_coarsest, (level, &to)) in widths.iter().enumerate().rev().enumerate() {
            let name = format!("decoder.up.{level}");
            let mut blocks = Vec::new();
            for block in 0..=config.num_res_blocks {
                blocks.push(ResBlock::new(source, &format!("{name}.block.{block}"), (width, to))?);
                width = to;
            }
            let up = match steps.get(from_coarsest) {
                Some(&step) => Up::new(source, &format!("{name}.upsample"), width, step)?,
                None => None,
            };
            levels.push((blocks, up));
        }
        Ok(Self {
            patch_size: config.patch_size,
            post_quant_conv,
            conv_in,
            mid,
            levels,
            norm_out: Norm::new(source, "decoder.norm_out", width)?,
            conv_out: Conv::new(source, "decoder.conv_out", Window::SAME, (width, config.patch_channels()))?,
        })
    }

    pub(super) fn forward(&self, values: &Tensor) -> CandleResult<Tensor> {
        let values = values.to_dtype(self.conv_in.dtype())?;
        let x = self.conv_in.forward(&self.post_quant_conv.forward(&values)?)?;
        let mut x = self.mid.forward(&x)?;
        for (blocks, up) in &self.levels {
            for block in blocks {
                x = block.forward(&x)?;
            }
            if let Some(up) = up {
                x = up.forward(&x)?;
            }
        }
        let x = self.norm_out.forward(&x, Activation::Silu)?;
        haar::unpatch(&self.conv_out.forward(&x)?.to_dtype(DType::F32)?, self.patch_size)
    }
}
