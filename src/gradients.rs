//! Gradients by parameter name, and how they are added.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Shape, Tensor};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use crate::host::{edit, host, is_host_f32};
use crate::{DeviceOptimiser, Params, Result};

/// Accumulated gradients by parameter name, f32.
#[derive(Debug, Default)]
pub struct Gradients(BTreeMap<String, Sum>);

/// One parameter's gradient.
#[derive(Debug)]
struct Sum {
    gradient: Tensor,
    /// Whether nothing else holds its numbers, so that more can be added where they lie.
    owned: bool,
}

impl Gradients {
    /// No gradient yet for any parameter.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds to one parameter's gradient.
    pub fn add(&mut self, name: &str, gradient: &Tensor) -> Result<()> {
        let gradient = gradient.detach().to_dtype(DType::F32)?;
        self.add_sum(name, Sum { gradient, owned: false })
    }

    /// Adds numbers of the parameter's shape, on the CPU, to its gradient; they are taken over and not copied.
    pub fn add_values(&mut self, name: &str, values: Vec<f32>, shape: impl Into<Shape>) -> Result<()> {
        let gradient = Tensor::from_vec(values, shape.into(), &Device::Cpu)?;
        self.add_sum(name, Sum { gradient, owned: true })
    }

    /// The sum of one parameter's gradient for a device to add to where it lies; zeros where there is none yet.
    ///
    /// Nothing else holds its numbers, or will.
    pub fn sum_of(&mut self, name: &str, like: &Tensor) -> Result<Tensor> {
        let sum = match self.0.remove(name) {
            None => Tensor::zeros(like.shape(), DType::F32, like.device())?,
            Some(Sum { gradient, owned: true }) => gradient,
            Some(Sum { gradient, owned: false }) => gradient.copy()?,
        };
        self.0.insert(name.into(), Sum { gradient: sum.clone(), owned: true });
        Ok(sum)
    }

    /// Adds every gradient of another sum.
    pub fn add_all(&mut self, other: Self) -> Result<()> {
        other.0.into_iter().try_for_each(|(name, sum)| self.add_sum(&name, sum))
    }

    fn add_sum(&mut self, name: &str, more: Sum) -> Result<()> {
        let sum = match self.0.remove(name) {
            None => more,
            Some(sum) => sum.plus(&more)?,
        };
        self.0.insert(name.into(), sum);
        Ok(())
    }

    /// Runs candle's autograd from a scalar and adds what reached `params`.
    pub fn add_backward(&mut self, loss: &Tensor, params: &Params) -> Result<()> {
        let mut store = loss.backward()?;
        for (name, var) in params.iter() {
            if let Some(gradient) = store.remove(var) {
                self.add(name, &gradient)?;
            }
        }
        Ok(())
    }

    /// The gradient of one parameter; `None` where nothing reached it.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.0.get(name).map(|sum| &sum.gradient)
    }

    /// Names and gradients in name order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.0.iter().map(|(name, sum)| (name.as_str(), &sum.gradient))
    }

    /// The Euclidean norm over all parameters together.
    pub fn norm(&self) -> Result<f64> {
        self.norm_by(None)
    }

    /// The norm, by a device's own code where it has any.
    pub(crate) fn norm_by(&self, device: Option<&dyn DeviceOptimiser>) -> Result<f64> {
        if let Some(device) = device {
            let all: Vec<&Tensor> = self.0.values().map(|sum| &sum.gradient).collect();
            if let Some(sum) = device.sum_of_squares(&all)? {
                return Ok(sum.sqrt());
            }
        }
        let mut sum = 0.0;
        for Sum { gradient, .. } in self.0.values() {
            sum += match is_host_f32(gradient) {
                true => sum_of_squares(host(&gradient.contiguous()?)?.values()?),
                false => f64::from(gradient.sqr()?.sum_all()?.to_scalar::<f32>()?),
            };
        }
        Ok(sum.sqrt())
    }
}

/// Numbers that a thread takes at a time.
const BLOCK: usize = 1 << 14;

impl Sum {
    /// The sum of both, where this one's numbers lie if they may be changed.
    fn plus(self, more: &Self) -> Result<Self> {
        let in_place = |gradient: &Tensor| is_host_f32(gradient) && gradient.is_contiguous();
        let both = in_place(&self.gradient) && in_place(&more.gradient);
        if self.owned && both && self.gradient.dims() == more.gradient.dims() {
            add_in_place(&self.gradient, &more.gradient)?;
            return Ok(self);
        }
        Ok(Self { gradient: (self.gradient + &more.gradient)?, owned: true })
    }
}

/// `a ← a + b` of equal shapes.
fn add_in_place(a: &Tensor, b: &Tensor) -> Result<()> {
    let b = host(b)?;
    let b = b.values()?;
    Ok(edit(a, |a| {
        let blocks = a.par_chunks_mut(BLOCK).zip(b.par_chunks(BLOCK));
        blocks.for_each(|(a, b)| a.iter_mut().zip(b).for_each(|(a, b)| *a += b));
        Ok(())
    })?)
}

/// In f64, in an order that depends on the number of values alone.
fn sum_of_squares(values: &[f32]) -> f64 {
    let arch = Arch::new();
    let blocks = values.par_chunks(BLOCK).map(|block| arch.dispatch(Squares(block)));
    blocks.collect::<Vec<f64>>().iter().sum()
}

/// The sum of the squares of a block. (A closure that calls a function would not be compiled for the wide vectors.)
struct Squares<'a>(&'a [f32]);

impl WithSimd for Squares<'_> {
    type Output = f64;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> f64 {
        let mut lanes = [0.0; 32];
        let (parts, rest) = self.0.as_chunks::<32>();
        for part in parts {
            for lane in 0..32 {
                lanes[lane] += f64::from(part[lane]) * f64::from(part[lane]);
            }
        }
        lanes.iter().sum::<f64>() + rest.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>()
    }
}
