//! What a TOML file may say: typed text, before it becomes parts.

mod ablation;
mod rewards;
mod stages;

use std::path::Path;

use grpo::{GroupSize, LogConfig, Objective, OptimConfig, RolloutConfig, TrainConfig};
use grpo_policies::decoder::LoraConfig;
use grpo_policies::simplear::Law;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::failure::{Failure, Outcome};

pub use ablation::{AblationFile, ArmRun, ArmSetting};
pub use rewards::{GateFile, GivenFile, RewardSource, Weighed};
pub use stages::{DecoderSizes, DecoderSource, PretrainFile, SftFile, TokenizerFile};

/// A GRPO run.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainFile {
    /// The run's name; its folder is `runs/{name}/{seed}`.
    pub name: String,
    /// The root of all randomness.
    pub seed: u64,
    /// Steps of the run.
    pub n_steps: usize,
    /// Which policy is trained.
    #[serde(default)]
    pub policy: PolicySource,
    /// Low-rank adapters that are trained in place of all weights; none where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraConfig>,
    /// How it is sampled.
    #[serde(default)]
    pub law: Law,
    /// Samples of a step.
    #[serde(default)]
    pub rollout: RolloutConfig,
    /// What is optimised.
    pub rewards: Vec<RewardSource>,
    /// The loss.
    #[serde(default)]
    pub objective: Objective,
    /// The optimiser.
    #[serde(default)]
    pub optim: OptimConfig,
    /// After so many updates in a row that are not finite, the run stops.
    #[serde(default = "max_skips_in_row")]
    pub max_skips_in_row: usize,
    /// What is recorded.
    #[serde(default)]
    pub log: LogConfig,
    /// What is watched on prompts that are never trained on.
    #[serde(default)]
    pub held_out: HeldOutFile,
}

impl TrainFile {
    /// Refuses what cannot be meant.
    pub fn check(&self) -> Outcome<()> {
        self.train_config().check()?;
        self.law.check_trainable()?;
        self.all_rewards().try_for_each(RewardSource::check).map_err(Failure::user)
    }

    /// The same run under another seed.
    pub fn under(&self, seed: u64) -> Self {
        Self { seed, ..self.clone() }
    }

    /// What is optimised and what is watched.
    pub fn all_rewards(&self) -> impl Iterator<Item = &RewardSource> {
        self.rewards.iter().chain(&self.held_out.rewards)
    }

    /// The numbers, as the trainer takes them.
    pub fn train_config(&self) -> TrainConfig {
        TrainConfig {
            seed: self.seed,
            n_steps: self.n_steps,
            rollout: self.rollout,
            objective: self.objective,
            optim: self.optim,
            max_skips_in_row: self.max_skips_in_row,
            log: self.log,
        }
    }
}

fn max_skips_in_row() -> usize {
    TrainConfig::default().max_skips_in_row
}

/// Which checkpoint a policy starts from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum PolicySource {
    /// The embedded miniature after supervised fine-tuning.
    #[default]
    ShapesSft,
    /// The embedded miniature after pretraining.
    ShapesPretrained,
    /// The folder of `--policy`, for images of this size in pixels.
    Folder {
        /// Rows of pixels.
        height: usize,
        /// Columns of pixels.
        width: usize,
    },
}

/// What is watched on held-out prompts.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HeldOutFile {
    /// The rewards; they need not be among those optimised.
    pub rewards: Vec<RewardSource>,
    /// Samples of each prompt; 4 in GenEval.
    pub samples_per_prompt: GroupSize,
}

impl Default for HeldOutFile {
    fn default() -> Self {
        let plain = Weighed::default();
        let samples_per_prompt = GroupSize::new(4).unwrap_or_default();
        Self { rewards: vec![RewardSource::Clip(plain.clone()), RewardSource::Geneval(plain)], samples_per_prompt }
    }
}

/// Reads a TOML file and the `key=value` changes to it; an error names the key, its place and what may stand there.
pub fn read<T: DeserializeOwned>(path: &Path, changes: &[String]) -> Outcome<T> {
    let text = std::fs::read_to_string(path).map_err(|error| {
        Failure::user(format!("{}: {error}; give a TOML file, such as experiments/shapes_clip.toml", path.display()))
    })?;
    let fault = |error: toml::de::Error| Failure::user(format!("{}: {}", path.display(), error.to_string().trim_end()));
    let parsed: T = toml::from_str(&text).map_err(fault)?;
    if changes.is_empty() {
        return Ok(parsed);
    }
    let mut table: toml::Table = toml::from_str(&text).map_err(fault)?;
    for change in changes {
        apply(&mut table, change)?;
    }
    T::deserialize(table)
        .map_err(|error| Failure::user(format!("--set {}: {}", changes.join(" --set "), error.to_string().trim_end())))
}

/// Sets `a.b.c=value`; the value is TOML, or a string where it is none.
fn apply(table: &mut toml::Table, change: &str) -> Outcome<()> {
    let Some((key, value)) = change.split_once('=') else {
        return Err(Failure::user(format!("--set {change}: give key=value, such as --set optim.lr=1e-4")));
    };
    let value = toml::from_str::<toml::Table>(&format!("v = {value}"))
        .ok()
        .and_then(|mut table| table.remove("v"))
        .unwrap_or_else(|| toml::Value::String(value.trim().into()));
    let mut parts = key.trim().split('.').peekable();
    let mut here = table;
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            here.insert(part.into(), value);
            return Ok(());
        }
        let next = here.entry(part).or_insert_with(|| toml::Value::Table(toml::Table::new()));
        here = next.as_table_mut().ok_or_else(|| Failure::user(format!("--set {change}: `{part}` is not a table")))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str, changes: &[&str]) -> Outcome<TrainFile> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.toml");
        std::fs::write(&path, text).unwrap();
        read(&path, &changes.iter().map(|change| (*change).to_string()).collect::<Vec<_>>())
    }

    const MINIMAL: &str = "name = \"a\"\nseed = 0\nn_steps = 2\nrewards = [{ clip = {} }]\n";

    fn error(text: &str, changes: &[&str]) -> String {
        parse(text, changes).err().unwrap().to_string()
    }

    #[test]
    fn a_typo_is_located_and_the_keys_are_named() {
        let error = error(&format!("{MINIMAL}[optim]\nlearning_rate = 1.0\n"), &[]);
        assert!(error.contains("line 6, column 1") && error.contains("unknown field `learning_rate`"), "{error}");
        assert!(error.contains("`lr`"), "{error}");
    }

    #[test]
    fn a_group_of_one_is_refused_with_its_place() {
        let error = error(&format!("{MINIMAL}[rollout]\ngroup_size = 1\n"), &[]);
        assert!(error.contains("line 6") && error.contains("group_size is 1; a group needs at least 2"), "{error}");
    }

    #[test]
    fn a_change_replaces_nested_values() {
        let file = parse(MINIMAL, &["optim.lr=0.5", "name=other", "rollout.group_size=3"]).unwrap();
        assert_eq!((file.optim.lr, file.name.as_str(), file.rollout.group_size.get()), (0.5, "other", 3));
        assert!(error(MINIMAL, &["optim.rate=1"]).contains("unknown field `rate`"));
        assert!(error(MINIMAL, &["optim"]).contains("give key=value"));
    }

    #[test]
    fn a_resolved_file_reads_back_as_itself() {
        let file = parse(MINIMAL, &[]).unwrap();
        let text = toml::to_string(&file).unwrap();
        assert_eq!(toml::to_string(&parse(&text, &[]).unwrap()).unwrap(), text);
    }
}
