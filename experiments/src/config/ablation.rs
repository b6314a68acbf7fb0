//! What a TOML file may say of an ablation.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{RewardSource, TrainFile, read};
use crate::failure::{Failure, Outcome};

/// An ablation: what all runs share, and what each arm changes of it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AblationFile {
    /// The ablation's name; its folder is `runs/{name}`.
    pub name: String,
    /// The seeds that every arm is trained under.
    pub seeds: Vec<u64>,
    /// The arm that others are compared with.
    pub baseline: Option<String>,
    /// The held-out reward that is the score one is after.
    pub evaluation: Option<String>,
    /// What every run has: a file of `grpo train` without name and seed.
    base: toml::Table,
    /// What each arm changes of it.
    arms: Vec<ArmFile>,
    /// What is left of the ablation for a first look.
    quick: Option<QuickFile>,
}

/// An arm: its name, and any keys of a run.
#[derive(Debug, Deserialize)]
struct ArmFile {
    name: String,
    #[serde(default)]
    about: String,
    #[serde(flatten)]
    changes: toml::Table,
}

/// A smaller ablation: which arms and seeds, and any keys of a run.
#[derive(Debug, Deserialize)]
struct QuickFile {
    arms: Vec<String>,
    seeds: Vec<u64>,
    #[serde(flatten)]
    changes: toml::Table,
}

/// An arm with its whole configuration.
#[derive(Clone, Debug)]
pub struct ArmRun {
    /// Its name.
    pub name: String,
    /// What is said of it.
    pub about: String,
    /// The run under a seed that is still to be set.
    pub file: TrainFile,
}

impl AblationFile {
    /// Reads a file and the changes to it; of the quick version, what the file's `quick` table leaves.
    pub fn read(path: &Path, changes: &[String], quick: bool) -> Outcome<Self> {
        let file: Self = read(path, changes)?;
        if !quick {
            return Ok(file);
        }
        let Self { name, baseline, evaluation, base, arms, quick, .. } = file;
        let Some(quick) = quick else {
            return Err(Failure::user(format!(
                "{}: there is no [quick]; add arms = [\"A\", \"B\"], seeds = [0, 1] and what a shorter run changes, such \
                 as n_steps = 20",
                path.display()
            )));
        };
        if let Some(unknown) = quick.arms.iter().find(|name| !arms.iter().any(|arm| arm.name == **name)) {
            return Err(Failure::user(format!("quick.arms: `{unknown}` is no arm; take the names of [[arms]]")));
        }
        let arms = arms.into_iter().filter(|arm| quick.arms.contains(&arm.name));
        let arms = arms.map(|mut arm| {
            merge(&mut arm.changes, &quick.changes);
            arm
        });
        Ok(Self {
            name: format!("{name}-quick"),
            seeds: quick.seeds,
            baseline: baseline.filter(|name| quick.arms.contains(name)),
            evaluation,
            base,
            arms: arms.collect(),
            quick: None,
        })
    }

    /// Every arm's configuration, and the names of the rewards that judge: those that the base watches.
    ///
    /// All arms watch the same: what the base watches, and what any arm optimises.
    pub fn runs(&self) -> Outcome<(Vec<ArmRun>, Vec<String>)> {
        let base = self.base()?;
        let judges = base.held_out.rewards.iter().map(|reward| reward.name().to_string()).collect();
        // With every default filled in, so that what an arm changes is merged into what is there.
        let base = toml::Table::try_from(&base).map_err(anyhow::Error::from)?;
        let mut arms = self.arms.iter().map(|arm| arm.run(&base)).collect::<Outcome<Vec<ArmRun>>>()?;
        let optimised: Vec<RewardSource> =
            arms.iter().flat_map(|arm| arm.file.rewards.iter().map(RewardSource::plain)).collect();
        for arm in &mut arms {
            watch(&mut arm.file.held_out.rewards, &optimised)?;
            arm.file.check().map_err(|failure| failure.of(&format!("arm `{}`", arm.name)))?;
        }
        Ok((arms, judges))
    }

    /// The ablation with every arm's whole configuration, whose seed is the first.
    pub fn resolved(&self) -> Outcome<Resolved> {
        let (arms, judges) = self.runs()?;
        let seed = self.seeds.first().copied().unwrap_or_default();
        Ok(Resolved {
            name: self.name.clone(),
            seeds: self.seeds.clone(),
            baseline: self.baseline.clone(),
            evaluation: self.evaluation.clone(),
            judges,
            arms: arms.into_iter().map(|arm| arm.file.under(seed)).collect(),
        })
    }

    fn base(&self) -> Outcome<TrainFile> {
        let mut base = self.base.clone();
        for key in ["name", "seed"] {
            if base.contains_key(key) {
                return Err(Failure::user(format!("base.{key}: an ablation has its own; take it out of [base]")));
            }
        }
        base.insert("name".into(), "base".into());
        base.insert("seed".into(), 0.into());
        base.entry("rewards").or_insert_with(|| toml::Value::Array(Vec::new()));
        parsed("base", base)
    }
}

/// An ablation as it is shown.
#[derive(Serialize)]
pub struct Resolved {
    name: String,
    seeds: Vec<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    baseline: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    evaluation: Option<String>,
    judges: Vec<String>,
    arms: Vec<TrainFile>,
}

/// Adds what is optimised to what is watched; two rewards of one name are refused.
fn watch(watched: &mut Vec<RewardSource>, optimised: &[RewardSource]) -> Outcome<()> {
    for reward in optimised {
        match watched.iter().find(|there| there.name() == reward.name()) {
            None => watched.push(reward.clone()),
            Some(there) if there.plain() == *reward => {}
            Some(_) => {
                let name = reward.name();
                return Err(Failure::user(format!(
                    "two rewards are named `{name}` and are not the same; give each its own name"
                )));
            }
        }
    }
    Ok(())
}

impl ArmFile {
    fn run(&self, base: &toml::Table) -> Outcome<ArmRun> {
        if self.changes.contains_key("seed") {
            return Err(Failure::user(format!(
                "arm `{}`: every arm has the seeds of the ablation; take `seed` out",
                self.name
            )));
        }
        let mut table = base.clone();
        merge(&mut table, &self.changes);
        table.insert("name".into(), self.name.clone().into());
        let file = parsed(&format!("arm `{}`", self.name), table)?;
        Ok(ArmRun { name: self.name.clone(), about: self.about.clone(), file })
    }
}

fn parsed(what: &str, table: toml::Table) -> Outcome<TrainFile> {
    TrainFile::deserialize(table)
        .map_err(|error| Failure::user(format!("{what}: {}", error.to_string().trim_end().replace('\n', " "))))
}

/// Puts changes into a table: inner tables are merged key by key. Where one key stands for one of several kinds (a schedule,
/// a surrogate), another kind takes its place.
fn merge(table: &mut toml::Table, changes: &toml::Table) {
    for (key, change) in changes {
        match (table.get_mut(key), change) {
            (Some(toml::Value::Table(there)), toml::Value::Table(change)) if !is_other_kind(there, change) => {
                merge(there, change);
            }
            _ => drop(table.insert(key.clone(), change.clone())),
        }
    }
}

fn is_other_kind(there: &toml::Table, change: &toml::Table) -> bool {
    there.len() == 1 && change.len() == 1 && there.keys().ne(change.keys())
}

/// What of an ablation's setting makes an arm another one.
#[derive(Serialize)]
pub struct ArmSetting<J> {
    /// The configuration.
    pub config: TrainFile,
    /// What decides its rewards, beside names.
    pub judges: J,
}
