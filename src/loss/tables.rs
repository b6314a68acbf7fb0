//! What a batch fixes before it is split: weights of rows, the entropy's floor, the sampler's correction.

use ndarray::{Array2, ArrayView2, Zip};

use super::EntropyGate;
use super::surrogate::within;
use crate::objective::{Aggregation, Beyond, Correction, Level};

/// The weight of each row's choices in the loss, `[B]`, given how many choices each row of the whole batch has.
///
/// ```
/// use grpo::{Aggregation, loss::row_weights};
/// assert_eq!(row_weights(&[1, 3], Aggregation::SequenceMean), [0.5, 0.5 / 3.0]);
/// assert_eq!(row_weights(&[1, 3], Aggregation::TokenMean), [0.25, 0.25]);
/// ```
pub fn row_weights(lengths: &[usize], aggregation: Aggregation) -> Vec<f64> {
    let n_choices = lengths.iter().sum::<usize>().max(1) as f64;
    let n_rows = lengths.len().max(1) as f64;
    let weight = |&length: &usize| match aggregation {
        Aggregation::SequenceMean => 1.0 / (n_rows * length.max(1) as f64),
        Aggregation::TokenMean => 1.0 / n_choices,
        Aggregation::FixedLength(longest) => 1.0 / (n_rows * longest.max(1) as f64),
    };
    lengths.iter().map(weight).collect()
}

/// The gate that keeps the `share` of the batch's choices whose entropy is highest.
///
/// `entropies` are those of all choices of the batch, without padding. The floor is their quantile at `1 − share`,
/// between neighbours on a straight line and in f32, as `torch.quantile` computes it; choices on the floor are kept.
pub fn entropy_gate(entropies: &[f32], share: f64) -> EntropyGate {
    let mut sorted = entropies.to_vec();
    sorted.sort_by(f32::total_cmp);
    if share >= 1.0 || sorted.is_empty() {
        return EntropyGate { floor: f32::NEG_INFINITY, n_kept: sorted.len() };
    }
    let rank = (1.0 - share.max(0.0)) as f32 * (sorted.len() - 1) as f32;
    let (below, above) = (sorted[rank.floor() as usize], sorted[rank.ceil() as usize]);
    let (part, step) = (rank.fract(), above - below);
    let floor = if part < 0.5 { below + part * step } else { above - (1.0 - part) * step };
    EntropyGate { floor, n_kept: sorted.iter().filter(|entropy| **entropy >= floor).count() }
}

/// The weight of each choice that corrects for a sampler of another law, `[B, T]`: `exp(log π_old − log π_sampled)`,
/// bounded.
///
/// Under [`Level::Sequence`] the choices of a row share the exponential of the sum. Padding has no say.
pub fn correction_weights(
    old: ArrayView2<'_, f32>,
    sampled: ArrayView2<'_, f32>,
    mask: ArrayView2<'_, f32>,
    correction: &Correction,
) -> Array2<f32> {
    let mut log_ratios = Array2::<f64>::zeros(old.dim());
    Zip::from(&mut log_ratios).and(old).and(sampled).and(mask).for_each(|log_ratio, &old, &sampled, &mask| {
        *log_ratio = if mask > 0.0 { f64::from(old) - f64::from(sampled) } else { 0.0 };
    });
    if correction.level == Level::Sequence {
        for mut row in log_ratios.rows_mut() {
            let sum = row.sum();
            row.fill(sum);
        }
    }
    log_ratios.mapv(|log_ratio| bounded(log_ratio.exp(), correction) as f32)
}

fn bounded(ratio: f64, correction: &Correction) -> f64 {
    let min = correction.min.unwrap_or(0.0);
    match correction.beyond {
        Beyond::Truncate => within(min, correction.max, ratio),
        Beyond::Mask if ratio < min || ratio > correction.max => 0.0,
        Beyond::Mask => ratio,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_of_ragged_rows_follow_the_aggregation() {
        assert_eq!(row_weights(&[1, 3, 0], Aggregation::SequenceMean), [1.0 / 3.0, 1.0 / 9.0, 1.0 / 3.0]);
        assert_eq!(row_weights(&[1, 3, 0], Aggregation::TokenMean), [0.25; 3]);
        assert_eq!(row_weights(&[1, 3, 0], Aggregation::FixedLength(5)), [1.0 / 15.0; 3]);
    }

    #[test]
    fn a_gate_keeps_the_share_of_highest_entropy() {
        let gate = entropy_gate(&[0.1, 0.5, 0.2, 0.4, 0.3], 0.4);
        assert!(gate.floor > 0.3 && gate.floor < 0.4 && gate.n_kept == 2, "{gate:?}");
        assert_eq!(entropy_gate(&[0.1, 0.5], 1.0).n_kept, 2);
        assert_eq!(entropy_gate(&[], 0.5).n_kept, 0);
        assert_eq!(entropy_gate(&[0.7; 4], 0.25).n_kept, 4, "equal entropies are all on the floor");
    }
}
