//! What a TOML file may say of an ablation.

use std::collections::BTreeMap;
use std::path::Path;

use grpo::LogConfig;
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
    /// Whether that is what is run.
    #[serde(skip)]
    is_quick: bool,
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
        Ok(Self {
            name: format!("{name}-quick"),
            seeds: quick.seeds.clone(),
            baseline: baseline.filter(|name| quick.arms.contains(name)),
            evaluation,
            base,
            arms: arms.into_iter().filter(|arm| quick.arms.contains(&arm.name)).collect(),
            quick: Some(quick),
            is_quick: true,
        })
    }

    /// Every arm's configuration, and the rewards that judge: those that the base watches.
    ///
    /// All arms watch the same: what the base watches, and what any arm optimises.
    pub fn runs(&self) -> Outcome<(Vec<ArmRun>, Vec<RewardSource>)> {
        let base = self.base()?;
        let judges = base.held_out.rewards.clone();
        // With every default filled in, so that what an arm changes is merged into what is there.
        let base = toml::Table::try_from(&base).map_err(anyhow::Error::from)?;
        let last = self.quick.as_ref().filter(|_| self.is_quick).map(|quick| &quick.changes);
        let mut arms = self.arms.iter().map(|arm| arm.run(&base, last)).collect::<Outcome<Vec<ArmRun>>>()?;
        let optimised: Vec<RewardSource> =
            arms.iter().flat_map(|arm| arm.file.rewards.iter().map(RewardSource::plain)).collect();
        for arm in &mut arms {
            if arm.file.rewards.is_empty() {
                return Err(Failure::user(format!(
                    "arm `{}` has no rewards; name at least one, such as rewards = [{{ clip = {{}} }}]",
                    arm.name
                )));
            }
            watch(&mut arm.file.held_out.rewards, &optimised)?;
            arm.file.check().map_err(|failure| failure.of(&format!("arm `{}`", arm.name)))?;
        }
        let watched = || arms.iter().flat_map(|arm| arm.file.held_out.rewards.iter().map(RewardSource::name));
        match self.evaluation.as_ref().filter(|name| !watched().any(|watched| watched == name.as_str())) {
            None => Ok((arms, judges)),
            Some(name) => Err(Failure::user(format!(
                "evaluation = \"{name}\" is not watched; add it to base.held_out.rewards, which has {}",
                judges.iter().map(RewardSource::name).collect::<Vec<_>>().join(", ")
            ))),
        }
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
            judges: judges.iter().map(|judge| judge.name().to_string()).collect(),
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
        let mut base = parsed("base", base)?;
        // Of many runs, pictures of a few prompts are enough, and a finished one is not gone on with.
        let log = self.base.get("log").and_then(toml::Value::as_table);
        let is_said = |key: &str| log.is_some_and(|log| log.contains_key(key));
        if !is_said("held_out_pictures") {
            base.log.held_out_pictures = Some(12);
        }
        if !is_said("keep_checkpoints") {
            base.log.keep_checkpoints = 1;
        }
        Ok(base)
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
    /// Its configuration: the base, then what the arm changes, then what a first look does.
    fn run(&self, base: &toml::Table, last: Option<&toml::Table>) -> Outcome<ArmRun> {
        if self.changes.contains_key("seed") {
            return Err(Failure::user(format!(
                "arm `{}`: every arm has the seeds of the ablation; take `seed` out",
                self.name
            )));
        }
        if self.changes.get("held_out").and_then(|held_out| held_out.get("rewards")).is_some() {
            return Err(Failure::user(format!(
                "arm `{}`: every arm is judged by the same; name held_out.rewards in [base]",
                self.name
            )));
        }
        let mut table = base.clone();
        merge(&mut table, &self.changes);
        last.into_iter().for_each(|last| merge(&mut table, last));
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

/// Whether both are choices of one kind each, and not of the same. `there` has every default filled in, so a section has more
/// keys than one.
fn is_other_kind(there: &toml::Table, change: &toml::Table) -> bool {
    there.len() == 1 && change.len() == 1 && there.keys().ne(change.keys())
}

/// What makes an arm what it is: its configuration without what is watched and recorded, and where its scorers are.
#[derive(Serialize)]
pub struct ArmSetting {
    /// The whole configuration, which is not compared as it is.
    #[serde(skip)]
    pub file: TrainFile,
    config: TrainFile,
    scorers: BTreeMap<String, String>,
}

impl ArmSetting {
    /// Of a configuration and its scorers.
    pub fn new(file: TrainFile, scorers: BTreeMap<String, String>) -> Self {
        let mut config = TrainFile { log: LogConfig::default(), ..file.clone() };
        config.held_out.rewards.clear();
        Self { file, config, scorers }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arms(text: &str, quick: bool) -> Outcome<Vec<ArmRun>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.toml");
        std::fs::write(&path, text).unwrap();
        AblationFile::read(&path, &[], quick)?.runs().map(|(arms, _)| arms)
    }

    const FILE: &str = r#"name = "a"
seeds = [0]
[base]
n_steps = 9
rewards = [{ clip = {} }]
optim = { lr = 1e-3, schedule = { cosine = { min_ratio = 0.1 } } }
[[arms]]
name = "one"
optim.lr = 5e-3
objective.advantage = { combine = "normalise_then_sum" }
[[arms]]
name = "two"
optim.schedule = "constant"
rewards = [{ brightness = { changes = [{ affine = { scale = -1.0, offset = 0.0 } }] } }]
[quick]
arms = ["one", "two"]
seeds = [0]
n_steps = 1
optim = { n_warmup = 2 }
objective.kl_weight = 0.5
"#;

    #[test]
    fn changes_are_merged_base_first_and_a_first_look_last() {
        let whole = arms(FILE, false).unwrap();
        let of = |arm: &ArmRun| (arm.file.n_steps, arm.file.optim.lr, arm.file.optim.n_warmup);
        assert_eq!(of(&whole[0]), (9, 5e-3, 0));
        assert_eq!(of(&whole[1]), (9, 1e-3, 0));
        let quick = arms(FILE, true).unwrap();
        assert_eq!(of(&quick[0]), (1, 5e-3, 2), "an arm's own change outlives a first look's");
        for (whole, quick) in whole.iter().zip(&quick) {
            assert_eq!(whole.file.objective.advantage, quick.file.objective.advantage);
            assert_eq!(whole.file.optim.schedule, quick.file.optim.schedule);
            assert_eq!(quick.file.objective.kl_weight, 0.5);
        }
        let watched = |arm: &ArmRun| arm.file.held_out.rewards.iter().map(|r| r.name().to_string()).collect::<Vec<_>>();
        assert_eq!(watched(&whole[0]), ["clip", "geneval", "brightness"]);
        assert_eq!(watched(&whole[0]), watched(&whole[1]));
        assert!(whole[1].file.held_out.rewards.iter().all(RewardSource::is_plain));
    }

    #[test]
    fn what_cannot_be_meant_is_refused_before_anything_runs() {
        let refused = |from: &str, to: &str, words: &str| {
            let error = arms(&FILE.replace(from, to), false).err().unwrap().to_string();
            assert!(error.contains(words), "{error}");
        };
        refused("seeds = [0]\n[base]", "seeds = [0]\nevaluation = \"genevall\"\n[base]", "\"genevall\" is not watched");
        refused("rewards = [{ clip = {} }]\n", "", "arm `one` has no rewards");
        refused("optim.lr = 5e-3", "seed = 3", "take `seed` out");
        refused("optim.lr = 5e-3", "held_out.rewards = [{ hps = {} }]", "every arm is judged by the same");
    }

    #[test]
    fn what_is_watched_makes_no_arm_another_one() {
        let settings = |text: &str| -> Vec<serde_json::Value> {
            let arms = arms(text, false).unwrap();
            arms.into_iter()
                .map(|arm| serde_json::to_value(ArmSetting::new(arm.file, BTreeMap::new())).unwrap())
                .collect()
        };
        let more = FILE.replace("[quick]", "[[arms]]\nname = \"three\"\nrewards = [{ hps = {} }]\n[quick]");
        assert_eq!(settings(FILE), settings(&more)[..2]);
        assert_ne!(settings(FILE)[0], settings(&FILE.replace("5e-3", "6e-3"))[0]);
    }
}
