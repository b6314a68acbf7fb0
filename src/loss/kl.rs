//! How far the policy is from its reference, per choice (Schulman, 2020, "Approximating KL Divergence").

use crate::objective::Estimator;

impl Estimator {
    /// The estimate of `KL(policy ‖ reference)` in nats and its derivative by the policy's log-prob of the choice.
    pub fn at(self, log_prob: f64, reference: f64) -> (f64, f64) {
        let delta = reference - log_prob;
        match self {
            Self::K1 => (-delta, 1.0),
            Self::K2 => (0.5 * delta * delta, -delta),
            // `exp_m1` keeps the digits that `exp(Δ) − 1` loses near the reference.
            Self::K3 => (delta.exp_m1() - delta, -delta.exp_m1()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `math.exp(d) - d - 1` from CPython 3.11.
    #[test]
    fn estimators_equal_their_formulas() {
        let check = |estimator: Estimator, reference: f64, expected: f64| {
            let (value, _) = estimator.at(-1.0, reference);
            assert!((value - expected).abs() < 1e-12, "{estimator:?}: {value} is not {expected}");
        };
        check(Estimator::K1, -1.5, 0.5);
        check(Estimator::K2, -1.5, 0.125);
        check(Estimator::K3, -1.0, 0.0);
        check(Estimator::K3, -0.5, 0.148_721_270_700_128_2);
        check(Estimator::K3, -2.0, 0.367_879_441_171_442_33);
    }

    #[test]
    fn slopes_equal_finite_differences() {
        for estimator in [Estimator::K1, Estimator::K2, Estimator::K3] {
            for reference in [-3.0, -1.0, -0.2] {
                let (_, slope) = estimator.at(-1.0, reference);
                let by = 1e-5;
                let rise = (estimator.at(-1.0 + by, reference).0 - estimator.at(-1.0 - by, reference).0) / (2.0 * by);
                assert!((slope - rise).abs() < 1e-9, "{estimator:?} at {reference}: {slope} is not {rise}");
            }
        }
    }
}
