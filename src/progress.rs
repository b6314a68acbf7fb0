//! How far a run has come, and what its checkpoints say of it beside the tensors.

use serde::{Deserialize, Serialize};

use crate::held_out::PromptMeans;
use crate::observe::Metrics;
use crate::{Error, Prompt, Result, TrainConfig};

/// What a run carries from step to step beside its weights.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Progress {
    /// The run's first evaluation, which later ones are compared with.
    pub(crate) held_out_start: Option<PromptMeans>,
    /// After how many steps held-out prompts were last scored.
    pub(crate) evaluated_at: Option<usize>,
    /// Choices sampled.
    n_choices: u64,
    /// Updates that were not finite.
    n_skipped: u64,
    /// Those of them since the last one that was.
    skips_in_row: usize,
}

impl Progress {
    /// Takes in a step.
    pub(crate) fn count(&mut self, n_choices: usize, skipped: bool, n_taken: usize) {
        self.n_choices += n_choices as u64;
        self.n_skipped += u64::from(skipped);
        self.skips_in_row = match (skipped, n_taken) {
            (true, 0) => self.skips_in_row + 1,
            (skipped, _) => usize::from(skipped),
        };
    }

    pub(crate) fn metrics(&self) -> Metrics {
        Metrics::from([
            ("num_choices".to_string(), self.n_choices as f64),
            ("skipped_updates".to_string(), self.n_skipped as f64),
        ])
    }

    /// An error where too many updates in a row were not finite.
    pub(crate) fn check_diverged(&self, limit: usize, step: usize, fault: Option<&str>) -> Result<()> {
        match fault.filter(|_| self.skips_in_row >= limit) {
            None => Ok(()),
            Some(fault) => Err(Error::Diverged(format!(
                "{} updates in a row were skipped, the last at step {step}: {fault}; look at skipped/step-{step:05} in the \
                 run's folder for log-probs and rewards out of the ordinary, then start a new run with a lower optim.lr",
                self.skips_in_row
            ))),
        }
    }
}

/// What a checkpoint says beside the tensors.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct State {
    /// The settings that a resumption must share, as TOML text, because text is compared exactly.
    config: String,
    /// The rewards' names and weights.
    rewards: Vec<(String, f32)>,
    /// Training prompts, which decide the order of the data.
    n_prompts: usize,
    /// Of their texts in order.
    prompts_crc32c: u32,
    pub(crate) progress: Progress,
}

impl State {
    pub(crate) fn of(
        config: &TrainConfig,
        rewards: Vec<(String, f32)>,
        prompts: &[Prompt],
        progress: &Progress,
    ) -> Result<Self> {
        let append = |crc: u32, prompt: &Prompt| crc32c::crc32c_append(crc, format!("{}\0", prompt.text).as_bytes());
        let prompts_crc32c = prompts.iter().fold(0, append);
        let config = config.science().to_toml()?;
        Ok(Self { config, rewards, n_prompts: prompts.len(), prompts_crc32c, progress: progress.clone() })
    }

    /// What two states of one run share, a line each.
    fn identity(&self) -> Vec<String> {
        let rewards = self.rewards.iter().map(|(name, weight)| format!("reward {name} of weight {weight}"));
        let n_rewards = format!("{} rewards", self.rewards.len());
        let prompts =
            [format!("n_prompts = {}", self.n_prompts), format!("texts of prompts {:08x}", self.prompts_crc32c)];
        self.config.lines().map(String::from).chain(rewards).chain([n_rewards]).chain(prompts).collect()
    }

    /// An error that names the first setting in which two runs differ.
    pub(crate) fn check_same_run(&self, ours: &Self) -> Result<()> {
        let (theirs, ours) = (self.identity(), ours.identity());
        let Some((theirs, ours)) = theirs.iter().zip(&ours).find(|(theirs, ours)| theirs != ours) else {
            return Ok(());
        };
        let line = format!("there {theirs}, here {ours}");
        Err(Error::config(format!(
            "the checkpoint is of another run ({line}); resume with the configuration of its config.toml"
        )))
    }
}
