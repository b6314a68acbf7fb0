//! How far a run has come, and what its checkpoints say of it beside the tensors.

use serde::{Deserialize, Serialize};

use crate::held_out::PromptMeans;
use crate::observe::Metrics;
use crate::{Error, Result, TrainConfig};

/// What a run carries from step to step beside its weights.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Progress {
    /// The run's first evaluation, which later ones are compared with.
    pub(crate) held_out_start: Option<PromptMeans>,
    /// After how many steps held-out prompts were last scored.
    pub(crate) evaluated_at: Option<usize>,
    /// Choices sampled.
    n_tokens: u64,
    /// Updates that were not finite.
    n_skipped: u64,
    /// Those of them since the last one that was.
    skips_in_row: usize,
}

impl Progress {
    /// Takes in a step.
    pub(crate) fn count(&mut self, n_choices: usize, skipped: bool) {
        self.n_tokens += n_choices as u64;
        self.n_skipped += u64::from(skipped);
        self.skips_in_row = if skipped { self.skips_in_row + 1 } else { 0 };
    }

    pub(crate) fn metrics(&self) -> Metrics {
        Metrics::from([
            ("num_tokens".to_string(), self.n_tokens as f64),
            ("skipped_updates".to_string(), self.n_skipped as f64),
        ])
    }

    /// An error where too many updates in a row were not finite.
    pub(crate) fn check_diverged(&self, limit: usize, step: usize, fault: Option<&str>) -> Result<()> {
        match fault.filter(|_| self.skips_in_row >= limit) {
            None => Ok(()),
            Some(fault) => Err(Error::Diverged(format!(
                "{} updates in a row were skipped, the last at step {step}: {fault}; look at skipped/step-{step:05} in the \
                 run's folder for log-probs and rewards out of the ordinary, lower optim.lr, or go back to a checkpoint",
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
    /// Training prompts, which decide the order of the data.
    n_prompts: usize,
    pub(crate) progress: Progress,
}

impl State {
    pub(crate) fn of(config: &TrainConfig, n_prompts: usize, progress: &Progress) -> Result<Self> {
        Ok(Self { config: config.science().to_toml()?, n_prompts, progress: progress.clone() })
    }

    /// An error that names the first setting in which two runs differ.
    pub(crate) fn check_same_run(&self, ours: &Self) -> Result<()> {
        if (&self.config, self.n_prompts) == (&ours.config, ours.n_prompts) {
            return Ok(());
        }
        let lines = |state: &Self| -> Vec<String> {
            state.config.lines().map(String::from).chain([format!("n_prompts = {}", state.n_prompts)]).collect()
        };
        let (theirs, ours) = (lines(self), lines(ours));
        let differs = theirs.iter().zip(&ours).find(|(theirs, ours)| theirs != ours);
        let line = differs.map_or("other settings".into(), |(theirs, ours)| format!("there {theirs}, here {ours}"));
        Err(Error::config(format!(
            "the checkpoint is of another run ({line}); resume with the configuration of its config.toml"
        )))
    }
}
