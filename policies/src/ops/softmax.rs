//! The softmax of a line of attention scores, forward and backward, for loops under [`vector::vectorised!`].

use super::vector;

/// Turns the first `real` scores into weights that sum to one and the rest to zero; gives the log-sum-exp.
#[inline(always)]
pub(super) fn attend(scores: &mut [f32], real: usize) -> f32 {
    let (top, sum) = vector::exp_shifted(scores, real);
    let scale = 1.0 / sum;
    scores[..real].iter_mut().for_each(|score| *score *= scale);
    top + sum.ln()
}

/// [`attend`] for the lines of a block whose first query is at position `first`.
#[inline(always)]
pub(super) fn attend_block(scores: &mut [f32], first: usize, log_sums: &mut [f32]) {
    let columns = first + log_sums.len();
    for (index, (scores, log_sum)) in scores.chunks_exact_mut(columns).zip(log_sums).enumerate() {
        *log_sum = attend(scores, first + index + 1);
    }
}

/// Turns scores into weights by their known log-sum-exp.
#[inline(always)]
pub(super) fn unattend(scores: &mut [f32], to_scores: &mut [f32], real: usize, log_sum: f32) {
    let seen = vector::whole(real, scores.len());
    for score in &mut scores[..seen] {
        *score = vector::exp(*score - log_sum);
    }
    scores[real..].fill(0.0);
    to_scores[real..].fill(0.0);
}

/// The softmax's backward: `weight · (grad - pull) · scale` in place of `grad`.
#[inline(always)]
pub(super) fn scale_shifted(weights: &[f32], grads: &mut [f32], pull: f32, scale: f32) {
    for (grad, weight) in grads.iter_mut().zip(weights) {
        *grad = weight * (*grad - pull) * scale;
    }
}
