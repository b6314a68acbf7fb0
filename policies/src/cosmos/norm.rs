//! Group normalisation with one group (Wu and He, 2018) and the activation after it, as one operation.
//!
//! Statistics run over all pixels and channels of an image, so an image's result never depends on its batch.

use candle_core::{CpuStorage, CustomOp3, D, DType, Layout, Result, Shape, Tensor};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::conv::{slice, with_slice};
use crate::ops::{is_host_f32, vector};

const EPS: f64 = 1e-6;

/// What follows a normalisation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Activation {
    /// Nothing, before attention.
    Identity,
    /// x * sigmoid(x), before a convolution.
    Silu,
}

impl Activation {
    #[inline(always)]
    fn value(self, x: f32) -> f32 {
        match self {
            Self::Identity => x,
            Self::Silu => x * vector::sigmoid(x),
        }
    }

    #[inline(always)]
    fn slope(self, x: f32) -> f32 {
        match self {
            Self::Identity => 1.0,
            Self::Silu => {
                let s = vector::sigmoid(x);
                s * (1.0 + x * (1.0 - s))
            }
        }
    }
}

/// `x` `[B, H, W, C]`, `scale` and `bias` `[C]`: normalised, scaled and activated.
pub(super) fn normalize(x: &Tensor, scale: &Tensor, bias: &Tensor, activation: Activation) -> Result<Tensor> {
    if is_host_f32(x) {
        return x.contiguous()?.apply_op3(&scale.contiguous()?, &bias.contiguous()?, Normalization { activation });
    }
    let (n, ..) = x.dims4()?;
    let flat = x.reshape((n, ()))?.to_dtype(DType::F32)?;
    let centred = flat.broadcast_sub(&flat.mean_keepdim(D::Minus1)?)?;
    let deviation = (centred.sqr()?.mean_keepdim(D::Minus1)? + EPS)?.sqrt()?;
    let normal = centred.broadcast_div(&deviation)?.reshape(x.shape())?.to_dtype(x.dtype())?;
    let y = normal.broadcast_mul(scale)?.broadcast_add(bias)?;
    match activation {
        Activation::Identity => Ok(y),
        Activation::Silu => y.silu(),
    }
}

struct Normalization {
    activation: Activation,
}

/// One image's forward pass, compiled for the machine's vectors.
struct Forward<'a> {
    activation: Activation,
    x: &'a [f32],
    scale: &'a [f32],
    bias: &'a [f32],
    y: &'a mut [f32],
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let (mean, rate) = statistics(self.x);
        let c = self.scale.len();
        let bias = &self.bias[..c];
        for (x, y) in self.x.chunks_exact(c).zip(self.y.chunks_exact_mut(c)) {
            for i in 0..c {
                y[i] = self.activation.value((x[i] - mean) * rate * self.scale[i] + bias[i]);
            }
        }
    }
}

/// One image's backward pass: fills `dx` and gives the image's share of the gradients of scale and bias.
struct Backward<'a> {
    activation: Activation,
    x: &'a [f32],
    dy: &'a [f32],
    scale: &'a [f32],
    bias: &'a [f32],
    dx: &'a mut [f32],
}

impl WithSimd for Backward<'_> {
    type Output = (Vec<f32>, Vec<f32>);

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> Self::Output {
        let c = self.scale.len();
        let (mean, rate) = statistics(self.x);
        let (mut d_scale, mut d_bias) = (vec![0f32; c], vec![0f32; c]);
        let (to_scale, to_bias, bias) = (&mut d_scale[..c], &mut d_bias[..c], &self.bias[..c]);
        let rows = self.x.chunks_exact(c).zip(self.dy.chunks_exact(c));
        for ((x, dy), dx) in rows.zip(self.dx.chunks_exact_mut(c)) {
            for i in 0..c {
                let normal = (x[i] - mean) * rate;
                let before = dy[i] * self.activation.slope(normal * self.scale[i] + bias[i]);
                to_scale[i] += before * normal;
                to_bias[i] += before;
                dx[i] = before * self.scale[i]; // d loss / d normal
            }
        }
        let n = self.x.len() as f32;
        let (along_mean, along_x) = (vector::dot(&d_bias, self.scale) / n, vector::dot(&d_scale, self.scale) / n);
        for (x, dx) in self.x.iter().zip(self.dx.iter_mut()) {
            *dx = rate * (*dx - along_mean - (x - mean) * rate * along_x);
        }
        (d_scale, d_bias)
    }
}

/// Mean and reciprocal deviation of one image.
#[inline(always)]
fn statistics(x: &[f32]) -> (f32, f32) {
    let n = x.len() as f64;
    let mean = lane_sum(x, |x| x) / n;
    let variance = lane_sum(x, |x| (x - mean) * (x - mean)) / n;
    (mean as f32, (1.0 / (variance + EPS).sqrt()) as f32)
}

/// The sum of `term` over all numbers in f64, in sixteen lanes whatever the machine's vectors.
#[inline(always)]
fn lane_sum(x: &[f32], term: impl Fn(f64) -> f64) -> f64 {
    const LANES: usize = 16;
    let (blocks, rest) = x.as_chunks::<LANES>();
    let mut sums = [0f64; LANES];
    for block in blocks {
        for lane in 0..LANES {
            sums[lane] += term(f64::from(block[lane]));
        }
    }
    sums.iter().sum::<f64>() + rest.iter().map(|&x| term(f64::from(x))).sum::<f64>()
}

impl CustomOp3 for Normalization {
    fn name(&self) -> &'static str {
        "normalization"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        scale: &CpuStorage,
        scale_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, h, w, c) = x_layout.shape().dims4()?;
        let (scale, bias) = (slice(scale, scale_layout)?, slice(bias, bias_layout)?);
        let (x, activation) = (slice(x, x_layout)?, self.activation);
        let mut y = vec![0f32; x.len()];
        let image = (h * w * c).max(1);
        y.par_chunks_mut(image).zip(x.par_chunks(image)).for_each(|(y, x)| {
            Arch::new().dispatch(Forward { activation, x, scale, bias, y });
        });
        Ok((CpuStorage::F32(y), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        scale: &Tensor,
        bias: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (_, h, w, c) = x.dims4()?;
        let image = (h * w * c).max(1);
        let (scale, bias): (Vec<f32>, Vec<f32>) = (scale.to_vec1()?, bias.to_vec1()?);
        let (scale, bias, activation) = (&scale[..], &bias[..], self.activation);
        let mut dx = vec![0f32; x.elem_count()];
        let parts: Vec<(Vec<f32>, Vec<f32>)> = with_slice(x, |x| {
            with_slice(dy, |dy| {
                let images = dx.par_chunks_mut(image).zip(x.par_chunks(image)).zip(dy.par_chunks(image));
                let gradient = |((dx, x), dy)| Arch::new().dispatch(Backward { activation, x, dy, scale, bias, dx });
                Ok(images.map(gradient).collect())
            })
        })?;
        let (scales, biases): (Vec<Vec<f32>>, Vec<Vec<f32>>) = parts.into_iter().unzip();
        let sum = |parts: &[Vec<f32>]| {
            let mut sum = vec![0f32; c];
            for part in parts {
                sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
            }
            Tensor::from_vec(sum, c, x.device())
        };
        Ok((Some(Tensor::from_vec(dx, x.shape(), x.device())?), Some(sum(&scales)?), Some(sum(&biases)?)))
    }
}

#[cfg(test)]
#[expect(clippy::excessive_nesting, reason = "differences are taken element by element of each variable")]
mod tests {
    use candle_core::{Device, Var};
    use grpo::Seed;

    use super::*;

    fn random(shape: &[usize], name: &str) -> Tensor {
        let mut draws = Seed::new(4).named(name).draws();
        let values = (0..shape.iter().product()).map(|_| draws.normal() as f32 + 0.3).collect::<Vec<_>>();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    fn example() -> [Var; 3] {
        [random(&[2, 3, 4, 5], "x"), random(&[5], "scale"), random(&[5], "bias")]
            .map(|tensor| Var::from_tensor(&tensor).unwrap())
    }

    fn numbers(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// The same in candle's operations and f64.
    fn composite([x, scale, bias]: &[Var; 3], activation: Activation) -> Tensor {
        let [x, scale, bias] = [x, scale, bias].map(|var| var.to_dtype(DType::F64).unwrap());
        let flat = x.reshape((2, ())).unwrap();
        let centred = flat.broadcast_sub(&flat.mean_keepdim(1).unwrap()).unwrap();
        let variance = (centred.sqr().unwrap().mean_keepdim(1).unwrap() + EPS).unwrap();
        let normal = centred.broadcast_div(&variance.sqrt().unwrap()).unwrap().reshape(x.shape()).unwrap();
        let y = normal.broadcast_mul(&scale).unwrap().broadcast_add(&bias).unwrap();
        match activation {
            Activation::Identity => y,
            Activation::Silu => y.silu().unwrap(),
        }
    }

    #[test]
    fn value_and_gradients_equal_the_composite() {
        for activation in [Activation::Identity, Activation::Silu] {
            let vars = example();
            let probe = random(&[2, 3, 4, 5], "probe");
            let fused = normalize(&vars[0], &vars[1], &vars[2], activation).unwrap();
            let expected = composite(&vars, activation).to_dtype(DType::F32).unwrap();
            for (fused, expected) in numbers(&fused).iter().zip(numbers(&expected)) {
                assert!((fused - expected).abs() < 1e-5, "{fused} {expected}");
            }
            let gradients = |y: Tensor| (y * &probe).unwrap().sum_all().unwrap().backward().unwrap();
            let (fused, expected) = (gradients(fused), gradients(expected));
            for var in &vars {
                let pair = (numbers(fused.get(var).unwrap()), numbers(expected.get(var).unwrap()));
                for (fused, expected) in pair.0.iter().zip(pair.1) {
                    assert!((fused - expected).abs() < 1e-4, "{activation:?}: {fused} {expected}");
                }
            }
        }
    }

    #[test]
    fn gradients_equal_finite_differences() {
        let vars = example();
        let probe = random(&[2, 3, 4, 5], "probe");
        let loss = || {
            let y = normalize(&vars[0], &vars[1], &vars[2], Activation::Silu).unwrap();
            (y * &probe).unwrap().sum_all().unwrap()
        };
        let store = loss().backward().unwrap();
        for var in &vars {
            let (gradient, values) = (numbers(store.get(var).unwrap()), numbers(var));
            for index in 0..values.len() {
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
