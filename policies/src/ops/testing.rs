//! What the tests of the operations share: reproducible numbers and gradient checks.

use candle_core::{Device, Result, Tensor, Var};
use grpo::Seed;

/// Standard normal numbers.
pub(crate) fn normals(seed: u64, n: usize) -> Vec<f32> {
    let mut draws = Seed::new(seed).draws();
    (0..n).map(|_| draws.normal() as f32).collect()
}

/// A variable of standard normal numbers.
pub(crate) fn normal_var(seed: u64, shape: &[usize]) -> Var {
    let n = shape.iter().product();
    Var::from_tensor(&Tensor::from_vec(normals(seed, n), shape, &Device::Cpu).unwrap()).unwrap()
}

/// The greatest absolute difference.
pub(crate) fn distance(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims());
    let (a, b): (Vec<f32>, Vec<f32>) =
        (a.flatten_all().unwrap().to_vec1().unwrap(), b.flatten_all().unwrap().to_vec1().unwrap());
    a.iter().zip(&b).fold(0.0, |worst, (x, y)| if (x - y).abs() > worst { (x - y).abs() } else { worst })
}

/// Compares an operation with its composite, values and gradients, and its gradients with central differences.
pub(crate) fn check_operation(
    vars: &[Var],
    operation: impl Fn() -> Result<Tensor>,
    composite: impl Fn() -> Result<Tensor>,
) {
    let got = operation().unwrap();
    let want = composite().unwrap();
    assert!(distance(&got, &want) < 2e-5, "values differ by {}", distance(&got, &want));
    let weights = Tensor::from_vec(normals(99, got.elem_count()), got.shape(), &Device::Cpu).unwrap();
    let loss = |y: Tensor| (y * &weights).unwrap().sum_all().unwrap();
    let (got, want) = (loss(got).backward().unwrap(), loss(want).backward().unwrap());
    for (index, var) in vars.iter().enumerate() {
        let (got, want) = (got.get(var).expect("gradient"), want.get(var).expect("gradient"));
        assert!(distance(got, want) < 1e-4, "gradient {index} differs by {}", distance(got, want));
        check_differences(var, got, || f64::from(loss(operation().unwrap()).to_scalar::<f32>().unwrap()));
    }
}

/// Compares a gradient with central differences at a few elements.
pub(crate) fn check_differences(var: &Var, gradient: &Tensor, loss: impl Fn() -> f64) {
    const STEP: f32 = 1e-2;
    let values: Vec<f32> = var.flatten_all().unwrap().to_vec1().unwrap();
    let gradient: Vec<f32> = gradient.flatten_all().unwrap().to_vec1().unwrap();
    let at = |index: usize, delta: f32| {
        let mut moved = values.clone();
        moved[index] += delta;
        var.set(&Tensor::from_vec(moved, var.shape(), &Device::Cpu).unwrap()).unwrap();
        loss()
    };
    for index in (0..values.len()).step_by(values.len() / 7 + 1) {
        let slope = (at(index, STEP) - at(index, -STEP)) / f64::from(2.0 * STEP);
        let error = (slope - f64::from(gradient[index])).abs();
        assert!(error < 2e-2 * slope.abs().max(1.0), "element {index}: {slope} by differences, {}", gradient[index]);
    }
    at(0, 0.0);
}

/// Runs `work` with a pool of this many threads.
pub(crate) fn with_threads<R: Send>(n: usize, work: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap().install(work)
}
