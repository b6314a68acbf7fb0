//! A process that runs an operation, in our way or in stock, or measures the machine.

use anyhow::{Context, Result, bail};
use candle_core::{Device, Tensor, Var};
use grpo::{AdamW, Gradients, OptimConfig, Params, Seed};
use grpo_policies::for_benches::Operation;

use super::case::Case;
use crate::peer::arguments::device;
use crate::peer::contender::Lap;
use crate::peer::{THREADS, machine, shapes, timed};

/// Numbers that stand for a tensor: the root of its mean square, and elements from all over it.
pub const FINGERPRINT: usize = 17;
/// Seconds of a pass in a lap, at the least.
const LAP_S: f64 = 0.1;
const MOST_RUNS: f64 = 100.0;
/// Weights whose update shows the memory's speed.
const MEMORY: usize = usize::MAX;

/// `DEVICE memory|reading|products` or `DEVICE ours|stock SHAPE OPERATION`.
pub fn run(arguments: &[String]) -> Result<()> {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        [place, side, shape, operation] => {
            let (device, ours) = (device(place)?, side == "ours");
            let case = Case::new(operation, &shapes::config(shape)?)?;
            let operands = operands(&case, &device)?;
            match (&case.operation, operands.first()) {
                (Some(operation), _) => graph(operation, &operands, ours),
                (None, Some(var)) if operation == "norm" => norm(var, ours),
                (None, Some(var)) => adamw(var, ours),
                (None, None) => bail!("{operation} has no operands"),
            }
        }
        [place, mode] => {
            let sizes = if mode == "memory" { vec![MEMORY] } else { Vec::new() };
            machine::run(mode, &sizes, &device(place)?, THREADS).with_context(|| format!("no mode `{mode}`"))?
        }
        _ => bail!("worker DEVICE memory|reading|products, or DEVICE ours|stock SHAPE OPERATION"),
    }
}

/// Normal numbers, each operand of its own seed.
fn operands(case: &Case, device: &Device) -> Result<Vec<Var>> {
    let operand = |(seed, shape): (u64, &Vec<usize>)| {
        let mut draws = Seed::new(seed).draws();
        let n = shape.iter().product();
        // Of a weight's size, so that logits and scores are those of a network.
        let scale = if seed == 0 { 1.0 } else { 0.05 };
        let values: Vec<f32> = (0..n).map(|_| scale * draws.normal() as f32).collect();
        Ok(Var::from_tensor(&Tensor::from_vec(values, shape.as_slice(), device)?)?)
    };
    (0..).zip(&case.operands).map(operand).collect()
}

/// Both passes of an operation, and its result and gradients.
fn graph(operation: &Operation, vars: &[Var], ours: bool) -> Result<()> {
    let operands: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let forward = || if ours { operation.fused(&operands) } else { operation.composite(&operands) };
    let device = operands.first().context("no operand")?.device();
    machine::serve_laps(|| {
        let (result, forward_s) = repeated(device, || Ok(forward()?))?;
        let (gradients, both_s) = repeated(device, || Ok(forward()?.backward()?))?;
        let mut value = vec![forward_s, both_s];
        value.extend(fingerprint(&result)?);
        for var in vars {
            value.extend(fingerprint(gradients.get(var).context("an operand has no gradient")?)?);
        }
        Ok(Lap { seconds: forward_s + both_s, value })
    })
}

/// A result, and the seconds of one run: the mean of so many as fill [`LAP_S`], behind one that is not counted.
fn repeated<T>(device: &Device, work: impl Fn() -> Result<T>) -> Result<(T, f64)> {
    let run = || {
        let result = work()?;
        device.synchronize()?;
        Ok(result)
    };
    let (result, first_s) = timed(run)?;
    let n = (LAP_S / first_s).clamp(1.0, MOST_RUNS) as usize;
    // Each result goes before there is another.
    let ((), seconds) = timed(|| (0..n).try_for_each(|_| run().map(drop)))?;
    Ok((result, seconds / n as f64))
}

/// What a tensor is told by.
fn fingerprint(tensor: &Tensor) -> Result<Vec<f64>> {
    let values: Vec<f32> = tensor.flatten_all()?.to_vec1()?;
    let squares: f64 = values.iter().map(|value| f64::from(*value).powi(2)).sum();
    let spread = (0..FINGERPRINT - 1).map(|at| f64::from(values[at * (values.len() - 1) / (FINGERPRINT - 2)]));
    Ok(std::iter::once((squares / values.len() as f64).sqrt()).chain(spread).collect())
}

fn gradients_of(var: &Var) -> Result<Gradients> {
    let mut gradients = Gradients::new();
    gradients.add("w", &(var.as_tensor() * 0.1)?)?;
    Ok(gradients)
}

/// The norm of a gradient.
fn norm(var: &Var, ours: bool) -> Result<()> {
    let gradients = gradients_of(var)?;
    let gradient = gradients.get("w").context("no gradient")?;
    machine::serve_laps(|| {
        let (norm, seconds) = timed(|| if ours { Ok(gradients.norm()?) } else { stock_norm(gradient) })?;
        Ok(Lap { seconds, value: vec![seconds, norm] })
    })
}

fn stock_norm(gradient: &Tensor) -> Result<f64> {
    Ok(f64::from(gradient.sqr()?.sum_all()?.to_scalar::<f32>()?).sqrt())
}

/// A step of AdamW, the gradient's norm included.
fn adamw(var: &Var, ours: bool) -> Result<()> {
    // Nothing is clipped: the stock one cannot.
    let config = OptimConfig { max_grad_norm: f64::MAX, lr: 1e-3, ..OptimConfig::default() };
    let gradients = gradients_of(var)?;
    let gradient = gradients.get("w").context("no gradient")?;
    let mut optimizer = AdamW::new(Params::new([("w".to_string(), var.clone())])?, config)?;
    let mut stock = StockAdamW { config, first: var.zeros_like()?, second: var.zeros_like()?, n: 0 };
    machine::serve_laps(|| {
        let (_, seconds) = timed(|| {
            let norm = if ours { optimizer.step(&gradients, config.lr)? } else { stock.step(var, gradient)? };
            var.device().synchronize()?;
            Ok(norm)
        })?;
        Ok(Lap { seconds, value: std::iter::once(seconds).chain(fingerprint(var)?).collect() })
    })
}

/// The arithmetic of candle-nn 0.11's AdamW, operation by operation, which is no dependency of ours.
struct StockAdamW {
    config: OptimConfig,
    first: Tensor,
    second: Tensor,
    n: i32,
}

impl StockAdamW {
    fn step(&mut self, var: &Var, gradient: &Tensor) -> Result<f64> {
        let norm = stock_norm(gradient)?;
        let OptimConfig { lr, beta1, beta2, eps, weight_decay, .. } = self.config;
        self.n += 1;
        self.first = ((&self.first * beta1)? + (gradient * (1.0 - beta1))?)?.detach();
        self.second = ((&self.second * beta2)? + (gradient.sqr()? * (1.0 - beta2))?)?.detach();
        let first = (&self.first * (1.0 / (1.0 - beta1.powi(self.n))))?;
        let second = (&self.second * (1.0 / (1.0 - beta2.powi(self.n))))?;
        let kept = (var.as_tensor() * (1.0 - lr * weight_decay))?;
        let step = (first / (second.sqrt()? + eps)?)?;
        var.set(&(kept - (step * lr)?)?)?;
        Ok(norm)
    }
}
