//! Advantages: how much better a sample is than its group.
//!
//! GRPO (Shao et al., 2024, arXiv 2402.03300, §4.1.2): `A_i = (r_i − mean r) / std r` within the group.
//! Like TRL (`grpo_trainer.py`, `scale_rewards`), the standard deviation is the unbiased one (n − 1) and
//! [`AdvantageConfig::eps`] is added to it; [`Scale::None`] is Dr. GRPO's (Liu et al., 2025, arXiv 2503.20783).

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

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

/// How rewards become advantages.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdvantageConfig {
    /// What the centred rewards are divided by.
    pub scale: Scale,
    /// Added to the standard deviation; 1e-4 in TRL.
    pub eps: f64,
}

impl Default for AdvantageConfig {
    fn default() -> Self {
        Self { scale: Scale::Group, eps: 1e-4 }
    }
}

/// Advantages of every group's rewards, in their order: `[P][G]` to `[P][G]`.
///
/// The mean is always the group's. A group of equal rewards has advantages of exactly 0.
///
/// ```
/// use grpo::{AdvantageConfig, advantages};
/// let a = advantages(&[vec![1.0, 3.0]], &AdvantageConfig::default())?;
/// assert!((a[0][1] - 1.0 / (2f32.sqrt() + 1e-4)).abs() < 1e-6);
/// # Ok::<(), grpo::Error>(())
/// ```
pub fn advantages(rewards: &[Vec<f32>], config: &AdvantageConfig) -> Result<Vec<Vec<f32>>> {
    if let Some(group) = rewards.iter().find(|group| group.len() < 2) {
        return Err(Error::config(format!("a group has {} rewards; an advantage needs at least 2", group.len())));
    }
    let all: Vec<f32> = rewards.iter().flatten().copied().collect();
    let batch_std = std_dev(&all);
    let of_group = |group: &Vec<f32>| {
        let centre = mean(group);
        let divisor = match config.scale {
            Scale::Group => std_dev(group) + config.eps,
            Scale::Batch => batch_std + config.eps,
            Scale::None => 1.0,
        };
        let equal = group.iter().all(|reward| reward == &group[0]);
        let advantage = |&reward: &f32| if equal { 0.0 } else { ((f64::from(reward) - centre) / divisor) as f32 };
        group.iter().map(advantage).collect()
    };
    Ok(rewards.iter().map(of_group).collect())
}

/// The mean, in f64; 0 of nothing.
pub fn mean(values: &[f32]) -> f64 {
    values.iter().map(|&x| f64::from(x)).sum::<f64>() / values.len().max(1) as f64
}

/// The unbiased standard deviation (n − 1), in f64; 0 of fewer than two values.
pub fn std_dev(values: &[f32]) -> f64 {
    if values.len() < 2 {
        return 0.0;
    }
    let centre = mean(values);
    let sum: f64 = values.iter().map(|&x| (f64::from(x) - centre).powi(2)).sum();
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
}
