//! Held-out prompts: scored with the same draws before, during and after training, each time against the first.

use std::collections::BTreeMap;
use std::time::Instant;

use crate::advantage::{mean, std_dev};
use crate::observe::Metrics;
use crate::{Group, GroupSampler, IndexedPrompt, Policy, Prompt, Result, Rollout, Seed};

/// Each reward's mean of each prompt; `None` for a prompt that the reward does not apply to.
pub(crate) type PromptMeans = BTreeMap<String, Vec<Option<f32>>>;

/// Prompts that are never trained on, scored by rewards that need not be trained on either.
pub(crate) struct HeldOut<P: Policy> {
    prompts: Vec<Prompt>,
    sampler: GroupSampler<P::Sample>,
    /// The run's first scores, which a resumed run takes from its checkpoint.
    pub(crate) start: Option<PromptMeans>,
}

/// One evaluation.
pub(crate) struct Evaluation<P: Policy> {
    pub(crate) groups: Vec<Group<P>>,
    pub(crate) metrics: Metrics,
    pub(crate) reward_names: Vec<String>,
}

impl<P: Policy> HeldOut<P> {
    pub(crate) fn new(prompts: Vec<Prompt>, sampler: GroupSampler<P::Sample>) -> Self {
        Self { prompts, sampler, start: None }
    }

    pub(crate) fn evaluate(&mut self, policy: &P) -> Result<Evaluation<P>> {
        let clock = Instant::now();
        let prompts: Vec<IndexedPrompt<'_>> = self.prompts.iter().enumerate().collect();
        let groups = self.sampler.collect(policy, &prompts, held_out_seed())?;
        let reward_names = Rollout::<P>::reward_names(&self.sampler);
        let now = prompt_means(&groups, &reward_names);
        let mut metrics = held_out_metrics(&now, self.start.as_ref());
        self.start.get_or_insert(now);
        metrics.insert("time/held_out_s".into(), clock.elapsed().as_secs_f64());
        Ok(Evaluation { groups, metrics, reward_names })
    }
}

/// The node from which held-out samples are drawn: not the run's, so that runs of other seeds are compared on the same
/// draws.
pub fn held_out_seed() -> Seed {
    Seed::new(0).named("held_out")
}

fn prompt_means<P: Policy>(groups: &[Group<P>], names: &[String]) -> PromptMeans {
    let of_reward = |column: usize| {
        let scores = groups.iter().map(|group| group.scores_of(column));
        scores.map(|scores| (!scores.is_empty()).then(|| mean(&scores) as f32)).collect()
    };
    names.iter().enumerate().map(|(column, name)| (name.clone(), of_reward(column))).collect()
}

/// Means over prompts, and their rises since `start` where there is one.
///
/// Standard errors are over prompts, since samples of one prompt are not independent; that of a rise is of the prompts'
/// own differences, which leaves out how hard each prompt is.
fn held_out_metrics(now: &PromptMeans, start: Option<&PromptMeans>) -> Metrics {
    let mut metrics = Metrics::new();
    let mut insert = |name: String, error_name: String, values: &[f32]| {
        metrics.insert(name, mean(values));
        metrics.insert(error_name, std_dev(values) / (values.len().max(1) as f64).sqrt());
    };
    for (name, now) in now {
        let means: Vec<f32> = now.iter().copied().flatten().collect();
        insert(format!("held_out/{name}/mean"), format!("held_out/{name}/sem"), &means);
        let Some(start) = start.and_then(|start| start.get(name)).filter(|start| start.len() == now.len()) else {
            continue;
        };
        let rises: Vec<f32> = now.iter().zip(start).filter_map(|(now, start)| Some((*now)? - (*start)?)).collect();
        insert(format!("held_out/{name}/rise"), format!("held_out/{name}/rise_sem"), &rises);
    }
    metrics
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rise_is_paired_by_prompt() {
        let of = |values: &[Option<f32>]| PromptMeans::from([("r".to_string(), values.to_vec())]);
        let start = of(&[Some(0.0), Some(0.5), None, Some(1.0)]);
        let now = of(&[Some(0.25), Some(0.5), Some(9.0), Some(1.5)]);
        let metrics = held_out_metrics(&now, Some(&start));
        // The differences 0.25, 0 and 0.5 have mean 0.25 and deviation 0.25.
        assert!((metrics["held_out/r/rise"] - 0.25).abs() < 1e-12);
        assert!((metrics["held_out/r/rise_sem"] - 0.25 / 3.0_f64.sqrt()).abs() < 1e-12);
        assert!((metrics["held_out/r/mean"] - 2.8125).abs() < 1e-12);
        assert_eq!(held_out_metrics(&now, None).len(), 2, "the first evaluation has no rise");
        let other = of(&[Some(1.0)]);
        assert_eq!(held_out_metrics(&now, Some(&other)).len(), 2, "other prompts have no rise");
    }
}
