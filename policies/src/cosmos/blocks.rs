//! The building blocks of encoder and decoder in their folded, two-dimensional form.
//!
//! A factorised pair of Cosmos' convolutions (space, then time) is one convolution here, under the pair's name; a
//! convolution over time alone is 1 x 1; attention over one frame's time is a 1 x 1 convolution of the values.

use candle_core::{D, DType, Result as CandleResult, Tensor};
use grpo::Result;

use super::config::Resampling;
use super::conv::{Window, convolve};
use super::norm::{Activation, normalize};

/// Where a network under construction takes its tensors from, by name and shape.
pub(super) type Source<'a> = dyn FnMut(&str, &[usize]) -> Result<Tensor> + 'a;

/// A convolution with bias.
pub(super) struct Conv {
    window: Window,
    weight: Tensor,
    bias: Tensor,
}

impl Conv {
    pub(super) fn new(source: &mut Source, name: &str, window: Window, (from, to): (usize, usize)) -> Result<Self> {
        Ok(Self {
            window,
            weight: source(&format!("{name}.weight"), &window.weight_shape(to, from))?,
            bias: source(&format!("{name}.bias"), &[to])?,
        })
    }

    /// The type of the weights, which is that of the activations.
    pub(super) fn dtype(&self) -> DType {
        self.weight.dtype()
    }

    pub(super) fn forward(&self, x: &Tensor) -> CandleResult<Tensor> {
        convolve(self.window, x, &self.weight, &self.bias)
    }
}

/// A normalisation with its scale and bias.
pub(super) struct Norm {
    weight: Tensor,
    bias: Tensor,
}

impl Norm {
    pub(super) fn new(source: &mut Source, name: &str, width: usize) -> Result<Self> {
        let weight = source(&format!("{name}.weight"), &[width])?;
        Ok(Self { weight, bias: source(&format!("{name}.bias"), &[width])? })
    }

    pub(super) fn forward(&self, x: &Tensor, activation: Activation) -> CandleResult<Tensor> {
        normalize(x, &self.weight, &self.bias, activation)
    }
}

/// Two activated convolutions beside a shortcut.
pub(super) struct ResBlock {
    norm1: Norm,
    conv1: Conv,
    norm2: Norm,
    conv2: Conv,
    nin_shortcut: Option<Conv>,
}

impl ResBlock {
    pub(super) fn new(source: &mut Source, name: &str, (from, to): (usize, usize)) -> Result<Self> {
        Ok(Self {
            norm1: Norm::new(source, &format!("{name}.norm1"), from)?,
            conv1: Conv::new(source, &format!("{name}.conv1"), Window::SAME, (from, to))?,
            norm2: Norm::new(source, &format!("{name}.norm2"), to)?,
            conv2: Conv::new(source, &format!("{name}.conv2"), Window::SAME, (to, to))?,
            nin_shortcut: match from == to {
                true => None,
                false => Some(Conv::new(source, &format!("{name}.nin_shortcut"), Window::POINT, (from, to))?),
            },
        })
    }

    pub(super) fn forward(&self, x: &Tensor) -> CandleResult<Tensor> {
        let h = self.conv1.forward(&self.norm1.forward(x, Activation::Silu)?)?;
        let h = self.conv2.forward(&self.norm2.forward(&h, Activation::Silu)?)?;
        match &self.nin_shortcut {
            None => x + h,
            Some(shortcut) => shortcut.forward(x)? + h,
        }
    }
}

/// Attention of one head over an image's pixels (`.0`), then what attention over a single frame's time leaves (`.1`).
struct Attention {
    norm: Norm,
    q: Conv,
    k: Conv,
    v: Conv,
    proj_out: Conv,
    time_norm: Norm,
    time_proj_out: Conv,
}

impl Attention {
    fn new(source: &mut Source, name: &str, width: usize) -> Result<Self> {
        let point = |source: &mut Source, part: &str| {
            Conv::new(source, &format!("{name}.{part}"), Window::POINT, (width, width))
        };
        Ok(Self {
            norm: Norm::new(source, &format!("{name}.0.norm"), width)?,
            q: point(source, "0.q")?,
            k: point(source, "0.k")?,
            v: point(source, "0.v")?,
            proj_out: point(source, "0.proj_out")?,
            time_norm: Norm::new(source, &format!("{name}.1.norm"), width)?,
            time_proj_out: point(source, "1.proj_out")?,
        })
    }

    fn forward(&self, x: &Tensor) -> CandleResult<Tensor> {
        let (n, h, w, c) = x.dims4()?;
        let normal = self.norm.forward(x, Activation::Identity)?;
        let tokens = |conv: &Conv| conv.forward(&normal)?.reshape((n, h * w, c));
        let q = (tokens(&self.q)? * (c as f64).powf(-0.5))?;
        let k = tokens(&self.k)?.transpose(1, 2)?.contiguous()?;
        let seen = softmax(&q.matmul(&k)?)?.matmul(&tokens(&self.v)?)?.reshape((n, h, w, c))?;
        let x = (x + self.proj_out.forward(&seen)?)?;
        let normal = self.time_norm.forward(&x, Activation::Identity)?;
        &x + self.time_proj_out.forward(&normal)?
    }
}

/// Softmax over the last dimension, in f32, in operations that keep the gradient.
fn softmax(x: &Tensor) -> CandleResult<Tensor> {
    let wide = x.to_dtype(DType::F32)?;
    let exp = wide.broadcast_sub(&wide.max_keepdim(D::Minus1)?.detach())?.exp()?;
    exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)?.to_dtype(x.dtype())
}

/// The middle of encoder and decoder.
pub(super) struct Mid {
    block_1: ResBlock,
    attn_1: Attention,
    block_2: ResBlock,
}

impl Mid {
    pub(super) fn new(source: &mut Source, name: &str, width: usize) -> Result<Self> {
        Ok(Self {
            block_1: ResBlock::new(source, &format!("{name}.block_1"), (width, width))?,
            attn_1: Attention::new(source, &format!("{name}.attn_1"), width)?,
            block_2: ResBlock::new(source, &format!("{name}.block_2"), (width, width))?,
        })
    }

    pub(super) fn forward(&self, x: &Tensor) -> CandleResult<Tensor> {
        self.block_2.forward(&self.attn_1.forward(&self.block_1.forward(x)?)?)
    }
}

/// A step between two levels, in either direction: `conv1` to `conv3` keep their published places.
struct Convs {
    space: Option<Conv>,
    time: Option<Conv>,
    out: Conv,
}

impl Convs {
    /// `names` are those of the convolutions over space and over time.
    fn new(
        source: &mut Source,
        name: &str,
        names: (&str, &str),
        window: Window,
        (width, step): (usize, Resampling),
    ) -> Result<Option<Self>> {
        if !step.space && !step.time {
            return Ok(None);
        }
        let mut conv = |present: bool, part: &str, window: Window| match present {
            true => Conv::new(source, &format!("{name}.{part}"), window, (width, width)).map(Some),
            false => Ok(None),
        };
        let space = conv(step.space, names.0, window)?;
        let time = conv(step.time, names.1, Window::POINT)?;
        let out = Conv::new(source, &format!("{name}.conv3"), Window::POINT, (width, width))?;
        Ok(Some(Self { space, time, out }))
    }
}

/// The hybrid downsampling: a strided convolution beside an average.
pub(super) struct Down(Convs);

impl Down {
    pub(super) fn new(source: &mut Source, name: &str, width: usize, step: Resampling) -> Result<Option<Self>> {
        Ok(Convs::new(source, name, ("conv1", "conv2"), Window::HALVING, (width, step))?.map(Self))
    }

    pub(super) fn forward(&self, x: &Tensor) -> CandleResult<Tensor> {
        let mut x = x.clone();
        if let Some(space) = &self.0.space {
            x = (space.forward(&x)? + average(&x)?)?;
        }
        if let Some(time) = &self.0.time {
            x = (time.forward(&x)? + x)?;
        }
        self.0.out.forward(&x)
    }
}

/// The hybrid upsampling: a convolution beside a repetition.
pub(super) struct Up(Convs);

impl Up {
    pub(super) fn new(source: &mut Source, name: &str, width: usize, step: Resampling) -> Result<Option<Self>> {
        Ok(Convs::new(source, name, ("conv2", "conv1"), Window::SAME, (width, step))?.map(Self))
    }

    pub(super) fn forward(&self, x: &Tensor) -> CandleResult<Tensor> {
        let mut x = x.clone();
        if let Some(time) = &self.0.time {
            x = (time.forward(&x)? + x)?;
        }
        if let Some(space) = &self.0.space {
            x = repeat(&x)?;
            x = (space.forward(&x)? + x)?;
        }
        self.0.out.forward(&x)
    }
}

/// The mean of each 2 x 2 block, `[B, H, W, C]` to `[B, H / 2, W / 2, C]`.
fn average(x: &Tensor) -> CandleResult<Tensor> {
    let (n, h, w, c) = x.dims4()?;
    let rows = x.reshape((n, h / 2, 2, w * c))?;
    let rows = (rows.narrow(2, 0, 1)? + rows.narrow(2, 1, 1)?)?.reshape((n, h / 2, w / 2, 2 * c))?;
    (rows.narrow(3, 0, c)? + rows.narrow(3, c, c)?)? * 0.25
}

/// Each pixel four times, `[B, H, W, C]` to `[B, 2 H, 2 W, C]`.
fn repeat(x: &Tensor) -> CandleResult<Tensor> {
    let (n, h, w, c) = x.dims4()?;
    let wide = Tensor::cat(&[x, x], 3)?.reshape((n, h, 2 * w * c))?;
    Tensor::cat(&[&wide, &wide], 2)?.reshape((n, 2 * h, 2 * w, c))
}

#[cfg(test)]
#[expect(clippy::excessive_nesting, reason = "differences are taken element by element of each variable")]
mod tests {
    use candle_core::{Device, Var};
    use grpo::Seed;

    use super::*;

    #[test]
    fn repetition_and_average_undo_each_other() {
        let x = Tensor::arange(0f32, 24.0, &Device::Cpu).unwrap().reshape((1, 2, 4, 3)).unwrap();
        let large = repeat(&x).unwrap();
        assert_eq!(large.dims(), [1, 4, 8, 3]);
        let corner: Vec<f32> =
            large.narrow(1, 3, 1).unwrap().narrow(2, 1, 1).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        assert_eq!(corner, [12.0, 13.0, 14.0]);
        let back: Vec<f32> = average(&large).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        assert_eq!(back, x.flatten_all().unwrap().to_vec1::<f32>().unwrap());
    }

    /// The gradients that reach an attention block's input and weights, against central differences.
    #[test]
    fn attention_gradients_equal_finite_differences() {
        let random = |shape: &[usize], name: &str| {
            let mut draws = Seed::new(5).named(name).draws();
            let values = (0..shape.iter().product()).map(|_| 0.7 * draws.normal() as f32).collect::<Vec<_>>();
            Var::from_vec(values, shape, &Device::Cpu).unwrap()
        };
        let mut vars = vec![random(&[2, 2, 3, 4], "x")];
        let attention = Attention::new(
            &mut |name: &str, shape: &[usize]| {
                vars.push(random(shape, name));
                Ok(vars.last().unwrap().as_tensor().clone())
            },
            "attn",
            4,
        )
        .unwrap();
        let probe = random(&[2, 2, 3, 4], "probe");
        let loss = || (attention.forward(&vars[0]).unwrap() * probe.as_tensor()).unwrap().sum_all().unwrap();
        let store = loss().backward().unwrap();
        for var in &vars {
            let gradient: Vec<f32> = store.get(var).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            let values: Vec<f32> = var.flatten_all().unwrap().to_vec1().unwrap();
            for index in (0..values.len()).step_by(3) {
                let at = |step: f32| {
                    let mut moved = values.clone();
                    moved[index] += step;
                    var.set(&Tensor::from_vec(moved, var.dims(), &Device::Cpu).unwrap()).unwrap();
                    loss().to_scalar::<f32>().unwrap()
                };
                let slope = (at(0.01) - at(-0.01)) / 0.02;
                at(0.0);
                assert!((slope - gradient[index]).abs() < 5e-3, "{index}: {slope} {}", gradient[index]);
            }
        }
    }
}
