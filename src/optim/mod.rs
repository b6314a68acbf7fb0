//! AdamW over named parameters, with gradient clipping, schedules and exact state.
//!
//! Loshchilov and Hutter (2019), arXiv 1711.05101, algorithm 2, with PyTorch's conventions: decay `1 − lr·λ` before
//! the update, bias-corrected moments, `eps` outside the square root. Deviations:
//! 1. Decay applies to what [`Decayed`] says: matrices alone (rank ≥ 2) unless the configuration says otherwise.
//! 2. Moments are f32 whatever the parameter's type.
//!
//! candle-nn's AdamW keeps its moments private, which rules out exact resume, and clips nothing.
//!
//! On the CPU an update is one pass: of each parameter it reads and writes the weight and both moments and reads the
//! gradient, 28 bytes in all, and clips on the way.

mod update;

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

use crate::{Error, Gradients, Params, Result};
use update::Moments;
pub use update::{DeviceOptimiser, StepNumbers};

/// How the learning rate moves over a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Schedule {
    /// The same rate throughout.
    #[default]
    Constant,
    /// Down a straight line to `min_ratio` of the rate at the last step.
    Linear {
        /// The last rate as a share of the first.
        min_ratio: f64,
    },
    /// Down half a cosine to `min_ratio` of the rate at the last step (SimpleAR's configuration: 0.1).
    Cosine {
        /// The last rate as a share of the first.
        min_ratio: f64,
    },
}

/// Which parameters the decoupled decay shrinks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Decayed {
    /// Matrices, and neither biases nor the weights of norms.
    #[default]
    Matrices,
    /// All but biases: Hugging Face's trainer on a model whose norms are not `nn.LayerNorm`, so SimpleAR's RMSNorm weights
    /// decay too.
    AllButBiases,
    /// Everything: PyTorch's optimiser by itself.
    All,
}

impl Decayed {
    fn includes(self, name: &str, rank: usize) -> bool {
        match self {
            Self::Matrices => rank >= 2,
            Self::AllButBiases => !name.ends_with("bias"),
            Self::All => true,
        }
    }
}

/// The optimiser's settings.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimConfig {
    /// The learning rate after warm-up.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled decay.
    pub weight_decay: f64,
    /// What decays.
    pub decayed: Decayed,
    /// The gradient is scaled down to this Euclidean norm where it is longer.
    pub max_grad_norm: f64,
    /// Steps over which the rate rises from 0.
    pub n_warmup: usize,
    /// How the rate moves after warm-up.
    pub schedule: Schedule,
}

impl Default for OptimConfig {
    fn default() -> Self {
        Self {
            lr: 1e-6,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.0,
            decayed: Decayed::Matrices,
            max_grad_norm: 1.0,
            n_warmup: 0,
            schedule: Schedule::Constant,
        }
    }
}

impl OptimConfig {
    /// Refuses values that cannot be meant.
    pub fn check(&self) -> Result<()> {
        let positive = [("lr", self.lr), ("eps", self.eps), ("max_grad_norm", self.max_grad_norm)];
        for (name, value) in positive {
            if !(value > 0.0 && value.is_finite()) {
                return Err(Error::config(format!("optim.{name} is {value}; give a positive number")));
            }
        }
        for (name, value) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            if !(0.0..1.0).contains(&value) {
                return Err(Error::config(format!("optim.{name} is {value}; give a number in [0, 1)")));
            }
        }
        if !(self.weight_decay >= 0.0 && self.weight_decay.is_finite()) {
            return Err(Error::config(format!("optim.weight_decay is {}; give 0 or more", self.weight_decay)));
        }
        Ok(())
    }

    /// The learning rate of a step (counted from 0) of a run of `n_steps`.
    pub fn rate(&self, step: usize, n_steps: usize) -> f64 {
        if step < self.n_warmup {
            return self.lr * (step + 1) as f64 / (self.n_warmup + 1) as f64;
        }
        let length = n_steps.saturating_sub(self.n_warmup + 1).max(1);
        let progress = ((step - self.n_warmup) as f64 / length as f64).min(1.0);
        let share = |min_ratio: f64, remaining: f64| min_ratio + (1.0 - min_ratio) * remaining;
        self.lr
            * match self.schedule {
                Schedule::Constant => 1.0,
                Schedule::Linear { min_ratio } => share(min_ratio, 1.0 - progress),
                Schedule::Cosine { min_ratio } => {
                    share(min_ratio, 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()))
                }
            }
    }
}

/// AdamW with its moments.
pub struct AdamW {
    config: OptimConfig,
    params: Params,
    moments: BTreeMap<String, Moments>,
    n_updates: usize,
    device: Option<Arc<dyn DeviceOptimiser>>,
}

impl AdamW {
    /// Zero moments for every parameter.
    pub fn new(params: Params, config: OptimConfig) -> Result<Self> {
        config.check()?;
        let mut moments = BTreeMap::new();
        for (name, var) in params.iter() {
            let zeros = || Tensor::zeros(var.shape(), DType::F32, var.device());
            moments.insert(name.to_string(), Moments { first: zeros()?, second: zeros()? });
        }
        Ok(Self { config, params, moments, n_updates: 0, device: None })
    }

    /// Uses a device's own code where it has any, as [`crate::Policy::device_optimiser`] gives it.
    #[must_use]
    pub fn on_device(self, device: Option<Arc<dyn DeviceOptimiser>>) -> Self {
        Self { device, ..self }
    }

    /// The settings.
    pub fn config(&self) -> &OptimConfig {
        &self.config
    }

    /// Updates taken.
    pub fn n_updates(&self) -> usize {
        self.n_updates
    }

    /// The parameters it moves.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// One update at the given rate; returns the norm of the gradient before it was clipped.
    ///
    /// A parameter without a gradient stays where it is. A gradient that is not finite is an error and moves nothing.
    pub fn step(&mut self, gradients: &Gradients, rate: f64) -> Result<f64> {
        let norm = gradients.norm_by(self.device.as_deref())?;
        if !norm.is_finite() {
            return Err(Error::NotFinite(format!(
                "the gradient norm is {norm}; nothing was updated: lower optim.lr (now {rate:e}) or look at the rewards"
            )));
        }
        self.n_updates += 1;
        let shrink = if norm > self.config.max_grad_norm { self.config.max_grad_norm / norm } else { 1.0 };
        for (name, var) in self.params.iter() {
            let (Some(gradient), Some(moments)) = (gradients.get(name), self.moments.get_mut(name)) else { continue };
            let decays = self.config.decayed.includes(name, var.rank());
            let numbers = StepNumbers::new(&self.config, rate, self.n_updates, decays).shrunk(shrink);
            numbers.apply(var, moments, &gradient.contiguous()?, self.device.as_deref())?;
        }
        Ok(norm)
    }

    /// The moments and the count of updates, by name, for a checkpoint.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut state = BTreeMap::new();
        for (name, moments) in &self.moments {
            state.insert(format!("first.{name}"), moments.first.copy()?);
            state.insert(format!("second.{name}"), moments.second.copy()?);
        }
        let count = Tensor::new(&[self.n_updates as i64], &candle_core::Device::Cpu)?;
        state.insert("n_updates".into(), count);
        Ok(state)
    }

    /// Takes over the state of [`AdamW::state`]; every moment must be there in its shape.
    pub fn restore(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        let take = |key: String, like: &Tensor| match state.get(&key) {
            Some(tensor) if tensor.dims() == like.dims() => Ok(tensor.to_device(like.device())?.copy()?),
            Some(tensor) => Err(Error::config(format!(
                "optimiser state `{key}` has shape {:?}; this policy needs {:?}",
                tensor.dims(),
                like.dims()
            ))),
            None => {
                Err(Error::config(format!("optimiser state `{key}` is missing; the checkpoint is of another policy")))
            }
        };
        for (name, moments) in &mut self.moments {
            moments.first = take(format!("first.{name}"), &moments.first)?;
            moments.second = take(format!("second.{name}"), &moments.second)?;
        }
        let count = state.get("n_updates").ok_or_else(|| Error::config("optimiser state `n_updates` is missing"))?;
        self.n_updates = count.to_vec1::<i64>()?.first().copied().unwrap_or(0).max(0) as usize;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    fn one_param(values: &[f32]) -> (Params, Var) {
        let var = Var::from_tensor(&Tensor::from_slice(values, (1, values.len()), &Device::Cpu).unwrap()).unwrap();
        (Params::new([("w".to_string(), var.clone())]).unwrap(), var)
    }

    fn gradient(values: &[f32]) -> Gradients {
        let mut gradients = Gradients::new();
        gradients.add("w", &Tensor::from_slice(values, (1, values.len()), &Device::Cpu).unwrap()).unwrap();
        gradients
    }

    /// `torch.optim.AdamW([w], lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05)`, PyTorch 2.11.0, three steps:
    /// tests/golden/adamw.py.
    #[test]
    fn three_steps_equal_pytorch() {
        let golden: serde_json::Value = serde_json::from_str(include_str!("../../tests/golden/adamw.json")).unwrap();
        let row = |key: &str, at: usize| -> Vec<f32> { serde_json::from_value(golden[key][at].clone()).unwrap() };
        let (params, var) = one_param(&row("params", 0));
        let config = OptimConfig { lr: 0.1, weight_decay: 0.05, max_grad_norm: 1e9, ..Default::default() };
        let mut adamw = AdamW::new(params, config).unwrap();
        for step in 0..3 {
            adamw.step(&gradient(&row("gradients", step)), 0.1).unwrap();
            let got: Vec<f32> = var.as_tensor().flatten_all().unwrap().to_vec1().unwrap();
            for (got, expected) in got.iter().zip(row("params", step + 1)) {
                assert!((got - expected).abs() < 2e-6, "step {step}: {got} is not {expected}");
            }
        }
    }

    #[test]
    fn decay_takes_what_the_configuration_says() {
        let check = |decayed: Decayed, moved: [bool; 3]| {
            let names = ["a.bias", "a.weight", "norm.weight"];
            let var =
                |shape: &[usize]| Var::from_tensor(&Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap()).unwrap();
            let vars = [var(&[2]), var(&[1, 2]), var(&[2])];
            let params = Params::new(names.map(String::from).into_iter().zip(vars)).unwrap();
            let config = OptimConfig { weight_decay: 0.5, decayed, ..Default::default() };
            let mut adamw = AdamW::new(params.clone(), config).unwrap();
            let mut gradients = Gradients::new();
            for (name, var) in params.iter() {
                gradients.add(name, &var.zeros_like().unwrap()).unwrap();
            }
            adamw.step(&gradients, 0.1).unwrap();
            let first = |name: &str| params.get(name).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()[0];
            assert_eq!(names.map(|name| first(name) != 1.0), moved, "{decayed:?}");
        };
        check(Decayed::Matrices, [false, true, false]);
        check(Decayed::AllButBiases, [false, true, true]);
        check(Decayed::All, [true, true, true]);
    }

    #[test]
    fn a_long_gradient_is_shortened_and_reported_whole() {
        let (params, _) = one_param(&[0.0, 0.0]);
        let mut adamw = AdamW::new(params, OptimConfig { lr: 0.1, ..Default::default() }).unwrap();
        let norm = adamw.step(&gradient(&[30.0, 40.0]), 0.1).unwrap();
        assert!((norm - 50.0).abs() < 1e-4);
        let first: Vec<f32> = adamw.moments["w"].first.flatten_all().unwrap().to_vec1().unwrap();
        assert!((first[0] - 0.06).abs() < 1e-6 && (first[1] - 0.08).abs() < 1e-6, "{first:?}");
    }

    #[test]
    fn a_gradient_that_is_not_finite_moves_nothing() {
        let (params, var) = one_param(&[1.0]);
        let mut adamw = AdamW::new(params, OptimConfig::default()).unwrap();
        let error = adamw.step(&gradient(&[f32::NAN]), 0.1).unwrap_err().to_string();
        assert!(error.contains("gradient norm is NaN"), "{error}");
        assert_eq!(var.as_tensor().flatten_all().unwrap().to_vec1::<f32>().unwrap(), [1.0]);
    }

    #[test]
    fn a_restored_optimiser_goes_on_to_the_bit() {
        let values = |var: &Var| var.as_tensor().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let (params, var) = one_param(&[0.5, -0.5]);
        let mut whole = AdamW::new(params, OptimConfig::default()).unwrap();
        whole.step(&gradient(&[0.3, -0.1]), 0.1).unwrap();
        let (params, resumed_var) = one_param(&values(&var));
        let mut resumed = AdamW::new(params, OptimConfig::default()).unwrap();
        resumed.restore(&whole.state().unwrap()).unwrap();
        for optimiser in [&mut whole, &mut resumed] {
            optimiser.step(&gradient(&[-0.2, 0.7]), 0.1).unwrap();
        }
        assert_eq!(values(&var), values(&resumed_var));
    }

    #[test]
    fn rates_warm_up_and_fall() {
        let config =
            OptimConfig { lr: 1.0, n_warmup: 1, schedule: Schedule::Cosine { min_ratio: 0.1 }, ..Default::default() };
        let rates: Vec<f64> = (0..5).map(|step| config.rate(step, 5)).collect();
        let expected = [0.5, 1.0, 0.1 + 0.9 * 0.75, 0.1 + 0.9 * 0.25, 0.1];
        for (got, expected) in rates.iter().zip(expected) {
            assert!((got - expected).abs() < 1e-12, "{rates:?}");
        }
    }
}
