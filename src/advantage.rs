//! Advantages: how much better a sample is than its group.
//!
//! GRPO (Shao et al., 2024, arXiv 2402.03300, §4.1.2): `A_i = (r_i − mean r) / std r` within the group.
//! Like TRL (`grpo_trainer.py`, `scale_rewards`), the standard deviation is the unbiased one (n − 1) and
//! [`AdvantageConfig::eps`] is added to it; [`Scale::None`] is Dr. GRPO's (Liu et al., 2025, arXiv 2503.20783).
//! Several rewards are summed first, or normalised first ([`Combine`]; GDPO, Liu et al., 2026, arXiv 2601.05242).
//! [`Baseline::LeaveOneOut`] is RLOO's (Ahmadian et al., 2024, arXiv 2402.14740).
//!
//! Deviations from TRL:
//! 1. A setting that would have no say (a scale under GDPO) is refused and not ignored.
//! 2. A group whose rewards are all equal has advantages of exactly 0 and not of a rounding error.
//! 3. [`Combine::RankThenSum`] is not in TRL: ranks before normalisation, as in any rank-based fitness (Wierstra et al.,
//!    2014, "Natural Evolution Strategies", fitness shaping), here within a group.

use serde::{Deserialize, Serialize};

use crate::{Error, Result, Scores};

/// What the centred rewards of a group are divided by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scale {
    /// The standard deviation of the group's rewards (GRPO).
    #[default]
    Group,
    /// The standard deviation of all rewards of the step.
    Batch,
    /// Nothing: only the mean is taken off (Dr. GRPO).
    None,
}

/// What is taken off a sample's reward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Baseline {
    /// The mean of the group; the expected gradient is `(1 − 1/G)` of the true one.
    #[default]
    GroupMean,
    /// The mean of the group's other samples (RLOO): `G / (G − 1)` times the above, and unbiased.
    LeaveOneOut,
}

/// How several rewards become one advantage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Combine {
    /// The weighted sum is normalised: the reward that varies most decides (TRL's `sum_then_normalize`).
    #[default]
    SumThenNormalise,
    /// Each reward is normalised in its group, then the weighted sum over the step (GDPO; TRL's `normalize_then_sum`).
    NormaliseThenSum,
    /// As above, of the scores' ranks in their group in place of the scores: only their order counts, and a score far out
    /// no more than the next best. Equal scores share the mean of their ranks.
    RankThenSum,
}

/// How rewards become advantages.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdvantageConfig {
    /// What the centred rewards are divided by.
    pub scale: Scale,
    /// What is taken off.
    pub baseline: Baseline,
    /// How several rewards become one.
    pub combine: Combine,
    /// Added to the standard deviation; 1e-4 in TRL.
    pub eps: f64,
    /// Advantages beyond `±clip` are cut to it; absent: none is (flow-GRPO and DanceGRPO take 5).
    pub clip: Option<f64>,
}

impl Default for AdvantageConfig {
    fn default() -> Self {
        Self {
            scale: Scale::Group,
            baseline: Baseline::GroupMean,
            combine: Combine::SumThenNormalise,
            eps: 1e-4,
            clip: None,
        }
    }
}

impl AdvantageConfig {
    /// Refuses values that cannot be meant.
    pub fn check(&self) -> Result<()> {
        if !(self.eps >= 0.0 && self.eps.is_finite()) {
            return Err(Error::config(format!("advantage.eps is {}; give 0 or a small positive number", self.eps)));
        }
        if let Some(clip) = self.clip.filter(|clip| !(*clip > 0.0 && clip.is_finite())) {
            return Err(Error::config(format!("advantage.clip is {clip}; give a positive number or leave it out")));
        }
        let plain = self.scale == Scale::Group && self.baseline == Baseline::GroupMean;
        if self.combine != Combine::SumThenNormalise && !plain {
            let name = if self.combine == Combine::RankThenSum { "rank_then_sum" } else { "normalise_then_sum" };
            return Err(Error::config(format!(
                "advantage.scale and advantage.baseline have no say under {name}, which normalises each \
                 reward in its group and the sum over the step; leave them out"
            )));
        }
        Ok(())
    }
}

/// Advantages of every group's rewards, in their order: `[P][G]` to `[P][G]`.
///
/// The mean is always the group's. A group of equal rewards has advantages of exactly 0.
/// [`AdvantageConfig::combine`] has no say here, where there is one reward: see [`combined_advantages`].
///
/// ```
/// use grpo::{AdvantageConfig, advantages};
/// let a = advantages(&[vec![1.0, 3.0]], &AdvantageConfig::default())?;
/// assert!((a[0][1] - 1.0 / (2f32.sqrt() + 1e-4)).abs() < 1e-6);
/// # Ok::<(), grpo::Error>(())
/// ```
pub fn advantages(rewards: &[Vec<f32>], config: &AdvantageConfig) -> Result<Vec<Vec<f32>>> {
    let in_f64 = |group: &Vec<f32>| group.iter().map(|&reward| f64::from(reward)).collect();
    normalised(&rewards.iter().map(in_f64).collect::<Vec<_>>(), config)
}

fn normalised(rewards: &[Vec<f64>], config: &AdvantageConfig) -> Result<Vec<Vec<f32>>> {
    config.check()?;
    check_sizes(rewards.iter().map(Vec::len))?;
    let of_group = |(group, divisor): (&Vec<f64>, f64)| {
        let centre = mean_of(group);
        let leave_out = match config.baseline {
            Baseline::GroupMean => 1.0,
            Baseline::LeaveOneOut => group.len() as f64 / (group.len() - 1) as f64,
        };
        let advantage = |&reward: &f64| clipped((reward - centre) * leave_out / divisor, config);
        if is_flat(group) { vec![0.0; group.len()] } else { group.iter().map(advantage).collect() }
    };
    Ok(rewards.iter().zip(divisors(rewards, config)).map(of_group).collect())
}

/// Advantages of samples that several rewards have scored: `[P][G]` scores of K rewards to `[P][G]`.
///
/// `weights` are the K rewards' weights. A reward that does not apply to a prompt is left out of that prompt's sum.
pub fn combined_advantages(groups: &[Vec<Scores>], weights: &[f32], config: &AdvantageConfig) -> Result<Vec<Vec<f32>>> {
    config.check()?;
    check_sizes(groups.iter().map(Vec::len))?;
    if let Some(scores) = groups.iter().flatten().find(|scores| scores.values.len() != weights.len()) {
        return Err(Error::Shape {
            what: "a sample's scores",
            got: vec![scores.values.len()],
            expected: vec![weights.len()],
        });
    }
    match config.combine {
        Combine::SumThenNormalise => {
            // Summed again from the scores: their f32 total would lose digits that a small deviation brings out.
            normalised(&groups.iter().map(|group| sums(group, weights)).collect::<Vec<_>>(), config)
        }
        Combine::NormaliseThenSum | Combine::RankThenSum => {
            let sum = |parts: &Vec<f64>| parts.iter().sum::<f64>();
            let parts = normalised_parts(groups, weights, config);
            let sums: Vec<Vec<f64>> = parts.iter().map(|group| group.iter().map(sum).collect()).collect();
            let all = sums.concat();
            let (centre, divisor) = (mean_of(&all), std_dev_of(&all) + config.eps);
            let advantage = |sum: &f64| if is_flat(&all) { 0.0 } else { clipped((sum - centre) / divisor, config) };
            let of_group = |sums: &Vec<f64>| match sums.iter().all(|sum| *sum == 0.0) {
                true => vec![0.0; sums.len()],
                false => sums.iter().map(advantage).collect(),
            };
            Ok(sums.iter().map(of_group).collect())
        }
    }
}

/// How much of the advantages' variance each reward brings, `[K]`; the shares add up to 1.
///
/// With `A = Σ_k c_k`, where `c_k` is what reward k contributes to an advantage before it is clipped, the share is
/// `cov(c_k, A) / var(A)` over the samples of the step. A reward that works against the sum has a negative one.
/// `None` where all advantages are 0.
pub(crate) fn advantage_shares(groups: &[Vec<Scores>], weights: &[f32], config: &AdvantageConfig) -> Option<Vec<f64>> {
    let parts = match config.combine {
        Combine::SumThenNormalise => centred_parts(groups, weights, config),
        Combine::NormaliseThenSum | Combine::RankThenSum => normalised_parts(groups, weights, config),
    };
    let samples: Vec<&Vec<f64>> = parts.iter().flatten().collect();
    let sums: Vec<f64> = samples.iter().map(|parts| parts.iter().sum()).collect();
    let energy: f64 = sums.iter().map(|sum| sum * sum).sum();
    let share = |k: usize| samples.iter().zip(&sums).map(|(parts, sum)| parts[k] * sum).sum::<f64>() / energy;
    (energy > 0.0).then(|| (0..weights.len()).map(share).collect())
}

fn check_sizes(mut sizes: impl Iterator<Item = usize>) -> Result<()> {
    match sizes.find(|size| *size < 2) {
        None => Ok(()),
        Some(size) => Err(Error::config(format!("a group has {size} rewards; an advantage needs at least 2"))),
    }
}

/// What each group's centred rewards are divided by.
fn divisors(rewards: &[Vec<f64>], config: &AdvantageConfig) -> Vec<f64> {
    let of_batch = std_dev_of(&rewards.concat()) + config.eps;
    let divisor = |group: &Vec<f64>| match config.scale {
        Scale::Group => std_dev_of(group) + config.eps,
        Scale::Batch => of_batch,
        Scale::None => 1.0,
    };
    rewards.iter().map(divisor).collect()
}

fn clipped(advantage: f64, config: &AdvantageConfig) -> f32 {
    config.clip.map_or(advantage, |clip| advantage.clamp(-clip, clip)) as f32
}

/// The weighted sum of the rewards that apply to each sample.
fn sums(group: &[Scores], weights: &[f32]) -> Vec<f64> {
    let sum = |scores: &Scores| {
        let parts = scores.values.iter().zip(weights);
        parts.filter_map(|(value, weight)| Some(f64::from((*value)?) * f64::from(*weight))).sum()
    };
    group.iter().map(sum).collect()
}

/// Whether all rewards of a group are equal, so that it teaches nothing.
pub(crate) fn is_flat<T: PartialEq>(group: &[T]) -> bool {
    group.iter().all(|reward| Some(reward) == group.first())
}

/// What each reward adds to a sample's advantage under sum-then-normalise, `[P][G][K]`.
fn centred_parts(groups: &[Vec<Scores>], weights: &[f32], config: &AdvantageConfig) -> Vec<Vec<Vec<f64>>> {
    let sums: Vec<Vec<f64>> = groups.iter().map(|group| sums(group, weights)).collect();
    let of_group = |((group, sums), divisor): ((&Vec<Scores>, &Vec<f64>), f64)| match is_flat(sums) {
        true => vec![vec![0.0; weights.len()]; group.len()],
        false => parts_of(group, weights, |_| divisor),
    };
    groups.iter().zip(&sums).zip(divisors(&sums, config)).map(of_group).collect()
}

/// What each reward adds to a sample's sum under normalise-then-sum, of scores or of ranks, `[P][G][K]`.
fn normalised_parts(groups: &[Vec<Scores>], weights: &[f32], config: &AdvantageConfig) -> Vec<Vec<Vec<f64>>> {
    let parts = |group: &[Scores]| parts_of(group, weights, |scores| std_dev(scores) + config.eps);
    match config.combine {
        Combine::RankThenSum => groups.iter().map(|group| parts(&ranked(group))).collect(),
        _ => groups.iter().map(|group| parts(group)).collect(),
    }
}

/// The group with every score replaced by its rank among its reward's scores, from 0; equal scores share their mean rank.
fn ranked(group: &[Scores]) -> Vec<Scores> {
    let mut ranks = group.to_vec();
    for k in 0..group.first().map_or(0, |scores| scores.values.len()) {
        let all: Vec<f32> = group.iter().filter_map(|scores| scores.values[k]).collect();
        let rank = |score: f32| {
            let below = all.iter().filter(|other| **other < score).count();
            let equal = all.iter().filter(|other| **other == score).count();
            below as f32 + (equal as f32 - 1.0) / 2.0
        };
        ranks.iter_mut().for_each(|scores| scores.values[k] = scores.values[k].map(rank));
    }
    ranks
}

/// `w_k (r_ik − mean_k) / divisor_k` for the samples of a group, `[G][K]`; 0 where a reward is flat or does not apply.
fn parts_of(group: &[Scores], weights: &[f32], divisor: impl Fn(&[f32]) -> f64) -> Vec<Vec<f64>> {
    let mut parts = vec![vec![0.0; weights.len()]; group.len()];
    for (k, &weight) in weights.iter().enumerate() {
        let scores: Vec<f32> = group.iter().filter_map(|scores| scores.values[k]).collect();
        if is_flat(&scores) {
            continue;
        }
        let (centre, divisor) = (mean(&scores), divisor(&scores));
        for (part, scores) in parts.iter_mut().zip(group) {
            part[k] = scores.values[k].map_or(0.0, |score| f64::from(weight) * (f64::from(score) - centre) / divisor);
        }
    }
    parts
}

/// The mean, in f64; 0 of nothing.
pub fn mean(values: &[f32]) -> f64 {
    values.iter().map(|&x| f64::from(x)).sum::<f64>() / values.len().max(1) as f64
}

/// The unbiased standard deviation (n − 1), in f64; 0 of fewer than two values.
pub fn std_dev(values: &[f32]) -> f64 {
    std_dev_of(&values.iter().map(|&x| f64::from(x)).collect::<Vec<_>>())
}

fn mean_of(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

fn std_dev_of(values: &[f64]) -> f64 {
    if values.len() < 2 {
        return 0.0;
    }
    let centre = mean_of(values);
    let sum: f64 = values.iter().map(|x| (x - centre).powi(2)).sum();
    (sum / (values.len() - 1) as f64).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(scale: Scale, rewards: &[Vec<f32>], expected: &[Vec<f32>]) {
        let got = advantages(rewards, &AdvantageConfig { scale, ..Default::default() }).unwrap();
        for (got, expected) in got.iter().flatten().zip(expected.iter().flatten()) {
            assert!((got - expected).abs() < 1e-6, "{scale:?}: {got} is not {expected}");
        }
    }

    #[test]
    fn the_deviation_is_unbiased_and_the_eps_added() {
        // mean 2, squares 1 + 0 + 1, n − 1 = 2: a deviation of exactly 1.
        let a = 1.0 / 1.0001;
        check(Scale::Group, &[vec![1.0, 2.0, 3.0]], &[vec![-a, 0.0, a]]);
        check(Scale::None, &[vec![1.0, 2.0, 3.0]], &[vec![-1.0, 0.0, 1.0]]);
    }

    #[test]
    fn batch_scale_shares_the_deviation_and_keeps_the_group_mean() {
        // 0, 2, 10, 12: mean 6, squares 36 + 16 + 16 + 36 = 104, over 3.
        let a = (1.0 / ((104.0f64 / 3.0).sqrt() + 1e-4)) as f32;
        check(Scale::Batch, &[vec![0.0, 2.0], vec![10.0, 12.0]], &[vec![-a, a], vec![-a, a]]);
    }

    #[test]
    fn equal_rewards_have_no_advantage_under_any_scale() {
        for scale in [Scale::Group, Scale::Batch, Scale::None] {
            check(scale, &[vec![0.1; 3], vec![0.1, 0.2, 0.7]][..1], &[vec![0.0; 3]]);
        }
    }

    #[test]
    fn a_group_of_one_is_refused() {
        let error = advantages(&[vec![1.0]], &AdvantageConfig::default()).unwrap_err().to_string();
        assert_eq!(error, "a group has 1 rewards; an advantage needs at least 2");
    }

    #[test]
    fn leaving_one_out_takes_off_the_mean_of_the_others() {
        let config = AdvantageConfig { scale: Scale::None, baseline: Baseline::LeaveOneOut, ..Default::default() };
        let got = advantages(&[vec![1.0, 2.0, 6.0]], &config).unwrap();
        assert_eq!(got, [[1.0 - 4.0, 2.0 - 3.5, 6.0 - 1.5]]);
    }

    #[test]
    fn advantages_are_clipped_on_both_sides() {
        let config = AdvantageConfig { scale: Scale::None, clip: Some(1.5), ..Default::default() };
        assert_eq!(advantages(&[vec![0.0, 3.0, 6.0, 3.0]], &config).unwrap(), [[-1.5, 0.0, 1.5, 0.0]]);
    }

    fn scores(rows: &[[Option<f32>; 2]], weights: [f32; 2]) -> Vec<Scores> {
        let total = |row: &[Option<f32>; 2]| row.iter().zip(weights).map(|(x, w)| x.unwrap_or(0.0) * w).sum();
        rows.iter().map(|row| Scores { values: row.to_vec(), total: total(row) }).collect()
    }

    /// One reward varies a hundred times more: summed first it decides alone, normalised first both count alike.
    #[test]
    fn shares_say_which_reward_decides() {
        let rows = [[Some(0.0), Some(0.0)], [Some(100.0), Some(0.0)], [Some(0.0), Some(1.0)], [Some(100.0), Some(1.0)]];
        let groups = [scores(&rows, [1.0, 1.0])];
        let shares = |combine| {
            advantage_shares(&groups, &[1.0, 1.0], &AdvantageConfig { combine, ..Default::default() }).unwrap()
        };
        let summed = shares(Combine::SumThenNormalise);
        assert!((summed[0] - 1e4 / (1e4 + 1.0)).abs() < 1e-9 && (summed[0] + summed[1] - 1.0).abs() < 1e-12);
        let normalised = shares(Combine::NormaliseThenSum);
        assert!((normalised[0] - 0.5).abs() < 1e-4 && (normalised[0] + normalised[1] - 1.0).abs() < 1e-12);
        let flat = [scores(&[[Some(1.0), None]; 3], [1.0, 1.0])];
        assert!(advantage_shares(&flat, &[1.0, 1.0], &AdvantageConfig::default()).is_none());
    }

    /// Ranks by hand, and what TRL's `normalize_then_sum` makes of them, since that is what the scores then are.
    #[test]
    fn ranks_count_order_alone() {
        let config = AdvantageConfig { combine: Combine::RankThenSum, ..Default::default() };
        let column = |values: [f32; 4]| scores(&values.map(|value| [Some(value), None]), [1.0, 1.0]);
        let of = |values| combined_advantages(&[column(values)], &[1.0, 1.0], &config).unwrap();
        let ranks = AdvantageConfig { combine: Combine::NormaliseThenSum, ..Default::default() };
        let expected = combined_advantages(&[column([3.0, 0.5, 0.5, 2.0])], &[1.0, 1.0], &ranks).unwrap();
        assert_eq!(of([1e6, 1.0, 1.0, 2.0]), expected);
        assert_eq!(of([2.25, -1.0, -1.0, 2.0]), expected, "how far out a score is does not count");
        assert_eq!(of([4.0; 4]), [[0.0; 4]]);
    }

    #[test]
    fn a_setting_that_would_have_no_say_is_refused() {
        let config = AdvantageConfig { scale: Scale::Batch, combine: Combine::NormaliseThenSum, ..Default::default() };
        let error = combined_advantages(&[], &[], &config).unwrap_err().to_string();
        assert!(error.contains("have no say under normalise_then_sum"), "{error}");
        let nothing = AdvantageConfig { clip: Some(0.0), ..Default::default() };
        assert!(advantages(&[], &nothing).unwrap_err().to_string().starts_with("advantage.clip is 0"));
    }
}
