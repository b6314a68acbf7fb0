//! The numbers of a step; names, units, formulas and meanings are in `src/docs/metrics.md`.

use crate::advantage::{mean, std_dev};
use crate::observe::Metrics;
use crate::{Group, Policy};

/// What the rewards gave a step's groups.
pub(crate) fn reward_metrics<P: Policy>(groups: &[Group<P>], names: &[String]) -> Metrics {
    let rewards: Vec<Vec<f32>> = groups.iter().map(Group::rewards).collect();
    let all: Vec<f32> = rewards.iter().flatten().copied().collect();
    let deviations: Vec<f64> = rewards.iter().map(|group| std_dev(group)).collect();
    let n_groups = groups.len().max(1) as f64;
    let n_flat = rewards.iter().filter(|group| group.iter().all(|reward| Some(reward) == group.first())).count();
    let lengths: Vec<f32> = groups
        .iter()
        .flat_map(|group| group.completions.iter().map(|completion| completion.log_probs.len() as f32))
        .collect();
    let mut metrics = Metrics::from([
        ("reward".to_string(), mean(&all)),
        ("reward_std".to_string(), std_dev(&all)),
        ("reward_group_std".to_string(), deviations.iter().sum::<f64>() / n_groups),
        ("frac_reward_zero_std".to_string(), n_flat as f64 / n_groups),
        ("completions/mean_length".to_string(), mean(&lengths)),
    ]);
    for (column, name) in names.iter().enumerate() {
        let scores: Vec<f32> = groups.iter().flat_map(|group| group.scores_of(column)).collect();
        metrics.insert(format!("rewards/{name}/mean"), mean(&scores));
        metrics.insert(format!("rewards/{name}/std"), std_dev(&scores));
    }
    metrics
}

/// The most memory this process has held, in GB; `None` where the system does not tell.
pub(crate) fn memory_peak_gb() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kilobytes: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024.0 / 1e9)
}
