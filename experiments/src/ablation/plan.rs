//! `ablation.json`: what an ablation is, kept with its runs.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use grpo::{Error, Result, write_whole};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Ablation;

/// What an ablation is: written before its first run, and read by reports.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// The ablation's name.
    pub name: String,
    /// The arm that others are compared with.
    pub baseline: Option<String>,
    /// The held-out rewards that decide verdicts; all that are watched where there is none.
    pub judges: Vec<String>,
    /// The held-out reward that is the score one is after.
    pub evaluation: Option<String>,
    /// The seeds that every arm is trained under.
    pub seeds: Vec<u64>,
    /// What decides the numbers of all runs.
    #[serde(default)]
    pub shared: Value,
    /// The arms, in the order of the report.
    pub arms: Vec<ArmPlan>,
}

/// An arm as it stands in `ablation.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ArmPlan {
    /// Its name, which is that of its folder.
    pub name: String,
    /// What is said of it.
    pub about: String,
    /// What makes it what it is.
    pub setting: Value,
}

impl Plan {
    /// Where it stands in an ablation's folder.
    pub(crate) const FILE: &str = "ablation.json";

    /// That of an ablation; an error names what cannot be meant.
    pub(super) fn of<A: Serialize>(ablation: &Ablation<A>) -> Result<Self> {
        let arm = |arm: &super::Arm<A>| {
            let setting = serde_json::to_string(&arm.setting).and_then(|text| serde_json::from_str(&text));
            let setting = setting.map_err(|error| Error::config(format!("arm `{}`: {error}", arm.name)))?;
            Ok(ArmPlan { name: arm.name.clone(), about: arm.about.clone(), setting })
        };
        let plan = Self {
            name: ablation.name.clone(),
            baseline: ablation.baseline.clone(),
            judges: ablation.judges.clone(),
            evaluation: ablation.evaluation.clone(),
            seeds: ablation.seeds.clone(),
            shared: ablation.shared.clone(),
            arms: ablation.arms.iter().map(arm).collect::<Result<_>>()?,
        };
        plan.check()?;
        match ablation.only.iter().find(|name| !plan.arms.iter().any(|arm| arm.name == **name)) {
            None => Ok(plan),
            Some(name) => Err(Error::config(format!("`{name}` alone is to be run and is no arm; give an arm's name"))),
        }
    }

    fn check(&self) -> Result<()> {
        let refuse = |message: String| Err(Error::config(message));
        let names = || self.arms.iter().map(|arm| &arm.name);
        if let Some(name) = std::iter::once(&self.name).chain(names()).find(|name| !is_folder_name(name)) {
            return refuse(format!(
                "`{name}` is to name a folder; give letters, digits, `_`, `-`, `.` or `+`, the first no dot, and not lock or \
                 report"
            ));
        }
        if let Some(name) = twice(names().map(|name| name.to_ascii_lowercase())) {
            return refuse(format!("two arms are named `{name}`, capitals apart; give each its own name"));
        }
        if let Some(seed) = twice(&self.seeds) {
            return refuse(format!("seed {seed} is given twice; give each once"));
        }
        if self.arms.is_empty() || self.seeds.is_empty() {
            return refuse(format!("ablation `{}` has no arm or no seed; give at least one of each", self.name));
        }
        match self.baseline.as_ref().filter(|baseline| !names().any(|name| name == *baseline)) {
            None => Ok(()),
            Some(baseline) => {
                let known: Vec<&String> = names().collect();
                refuse(format!("the baseline `{baseline}` is no arm; the arms are {known:?}"))
            }
        }
    }

    /// The plan in a folder; `None` where there is none.
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(Plan::FILE);
        if !path.exists() {
            return Ok(None);
        }
        let text = fs::read(&path).map_err(|error| Error::file(&path, error))?;
        let plan: Self = serde_json::from_slice(&text).map_err(|error| Error::file(&path, error))?;
        Ok(Some(plan))
    }

    /// The plan with the arms and seeds of one that is in the folder already; an arm that was another one is refused.
    pub(super) fn joined(&self, folder: &Path) -> Result<Self> {
        let mut joined = self.clone();
        let Some(before) = Self::read(folder)? else { return Ok(joined) };
        same(folder, "the ablation", &before.shared, &self.shared)?;
        for before in before.arms {
            match self.arms.iter().find(|arm| arm.name == before.name) {
                None => joined.arms.push(before),
                Some(now) => same(folder, &format!("arm `{}`", now.name), &before.setting, &now.setting)?,
            }
        }
        let seeds = before.seeds.into_iter().chain(self.seeds.iter().copied());
        joined.seeds = seeds.collect::<BTreeSet<_>>().into_iter().collect();
        Ok(joined)
    }

    /// Writes it into the folder.
    pub(super) fn write(&self, folder: &Path) -> Result<()> {
        let path = folder.join(Plan::FILE);
        let text = serde_json::to_string_pretty(self).map_err(|error| Error::file(&path, error))?;
        write_whole(&path, format!("{text}\n").as_bytes())
    }
}

/// An error that names the first difference.
fn same(folder: &Path, what: &str, before: &Value, now: &Value) -> Result<()> {
    // Numbers are compared as they were written.
    let now = serde_json::from_str(&now.to_string()).unwrap_or_default();
    if *before == now {
        return Ok(());
    }
    let (key, before, now) = difference("", before, &now);
    let key = if key.is_empty() { "its setting".into() } else { key };
    Err(Error::file(
        folder.join(Plan::FILE),
        format!(
            "{what} was run with {key} = {before} and is now {now}; go on with the former, give it another name, or choose \
             another folder with --out"
        ),
    ))
}

/// Whether a folder of this name is one level below, on any system.
fn is_folder_name(name: &str) -> bool {
    let plain = |letter: char| letter.is_ascii_alphanumeric() || "_-.+".contains(letter);
    // What else is in the ablation's folder, on systems that tell no capitals apart too.
    let taken = ["lock", "report", Plan::FILE].iter().any(|taken| name.eq_ignore_ascii_case(taken));
    !name.is_empty() && !taken && !name.starts_with('.') && name.chars().all(plain)
}

/// Something that is there more than once.
fn twice<T: Clone + Ord>(items: impl IntoIterator<Item = T>) -> Option<T> {
    let mut seen = BTreeSet::new();
    items.into_iter().find(|item| !seen.insert(item.clone()))
}

/// The first place at which two settings differ, with what is there in each.
fn difference(place: &str, a: &Value, b: &Value) -> (String, String, String) {
    let nothing = Value::Null;
    let inner = |key: String, a: &Value, b: &Value| difference(&key, a, b);
    match (a, b) {
        (Value::Object(of_a), Value::Object(of_b)) => {
            let keys: BTreeSet<&String> = of_a.keys().chain(of_b.keys()).collect();
            let get = |of: &serde_json::Map<String, Value>, key: &String| of.get(key).cloned().unwrap_or_default();
            let differing = keys.into_iter().find(|key| of_a.get(*key) != of_b.get(*key));
            match differing {
                Some(key) => {
                    let dot = if place.is_empty() { "" } else { "." };
                    inner(format!("{place}{dot}{key}"), &get(of_a, key), &get(of_b, key))
                }
                None => (place.into(), a.to_string(), b.to_string()),
            }
        }
        (Value::Array(of_a), Value::Array(of_b)) if of_a.len() == of_b.len() => {
            let at = of_a.iter().zip(of_b).position(|(a, b)| a != b).unwrap_or(0);
            let get = |of: &[Value]| of.get(at).unwrap_or(&nothing).clone();
            inner(format!("{place}[{at}]"), &get(of_a), &get(of_b))
        }
        _ => (place.into(), a.to_string(), b.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn ablation(arms: &[(&str, f64)], seeds: &[u64]) -> Ablation<serde_json::Value> {
        let add = |ablation: Ablation<Value>, (name, weight): &(&str, f64)| {
            ablation.arm(*name, json!({"rewards": [{"clip": {"weight": weight}}]}))
        };
        arms.iter().fold(Ablation::new("a", seeds.iter().copied()), add)
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        let error = |ablation: &Ablation<Value>| Plan::of(ablation).unwrap_err().to_string();
        assert!(error(&ablation(&[], &[0])).contains("no arm or no seed"));
        assert!(error(&ablation(&[("a", 1.0)], &[])).contains("no arm or no seed"));
        assert!(error(&ablation(&[("a", 1.0), ("a", 2.0)], &[0])).contains("two arms are named `a`"));
        assert!(error(&ablation(&[("a", 1.0)], &[3, 3])).contains("seed 3 is given twice"));
        for name in ["", "a/b", "..", "a b", "Report"] {
            assert!(error(&ablation(&[(name, 1.0)], &[0])).contains("is to name a folder"), "{name}");
        }
        assert!(error(&ablation(&[("a", 1.0)], &[0]).only(vec!["b".into()])).contains("`b` alone is to be run"));
        let unknown = ablation(&[("a", 1.0)], &[0]).compared_with("clip");
        assert!(error(&unknown).contains("the baseline `clip` is no arm; the arms are [\"a\"]"));
    }

    #[test]
    fn arms_and_seeds_may_be_added_and_not_changed() {
        let folder = tempfile::tempdir().unwrap();
        let join = |arms: &[(&str, f64)], seeds: &[u64]| {
            let plan = Plan::of(&ablation(arms, seeds)).unwrap().joined(folder.path());
            plan.and_then(|plan| plan.write(folder.path())).map_err(|error| error.to_string())
        };
        join(&[("a", 0.1), ("b", 1.0)], &[0, 1]).unwrap();
        join(&[("b", 1.0), ("c", 1.0)], &[2]).unwrap();
        let plan = Plan::read(folder.path()).unwrap().unwrap();
        let names: Vec<&str> = plan.arms.iter().map(|arm| arm.name.as_str()).collect();
        assert_eq!((names, plan.seeds), (vec!["b", "c", "a"], vec![0, 1, 2]));
        join(&[("a", 0.1)], &[0]).unwrap();
        let error = join(&[("a", 0.2)], &[0]).unwrap_err();
        assert!(error.contains("arm `a` was run with rewards[0].clip.weight = 0.1 and is now 0.2"), "{error}");
    }
}
