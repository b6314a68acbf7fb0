//! A run is a folder: everything a reader or a resumed run needs is in it.
//!
//! `{root}/{name}/{seed}/` holds `config.toml`, `rewards.json`, `meta.json`, `metrics.jsonl`, the event files, `samples/`
//! and `checkpoints/`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::checkpoint::Checkpoints;
use crate::{Error, Result, before_after, chart, write_whole};

const REWARDS: &str = "rewards.json";

/// Which rewards a run optimises and which it only watches: its `rewards.json`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunRewards {
    /// What is optimised, with its weights.
    pub optimised: BTreeMap<String, f32>,
    /// All that has a say in that, gates and joined parts among it.
    pub sources: BTreeSet<String>,
    /// What is scored on held-out prompts, in the order of the columns.
    pub held_out: Vec<String>,
    /// All that has a say in each of those, gates and joined parts among it.
    #[serde(default)]
    pub held_out_sources: BTreeMap<String, BTreeSet<String>>,
    /// Texts of held-out prompts that are trained on as well: their rises are no evidence for other prompts.
    pub trained_on: BTreeSet<String>,
}

/// The folder of one run.
#[derive(Clone, Debug)]
pub struct RunFolder {
    path: PathBuf,
}

impl RunFolder {
    /// A new folder `{root}/{name}/{seed}`; a folder that already holds a run is an error.
    pub fn create(root: &Path, name: &str, seed: u64) -> Result<Self> {
        let run = Self { path: root.join(name).join(seed.to_string()) };
        if run.metrics().exists() {
            let remedy = "pass --resume to go on with it, or choose another folder with --out";
            return Err(Error::file(&run.path, format!("the folder already holds a run; {remedy}")));
        }
        run.make()
    }

    /// The first of `{root}/{name}`, `{root}/{name}-2`, … that holds no run of this seed.
    pub fn fresh(root: &Path, name: &str, seed: u64) -> Result<Self> {
        let mut run = Self { path: root.join(name).join(seed.to_string()) };
        let mut n = 1;
        while run.metrics().exists() {
            n += 1;
            run.path = root.join(format!("{name}-{n}")).join(seed.to_string());
        }
        run.make()
    }

    /// The folder of a run that was broken off.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self> {
        let run = Self { path: path.into() };
        if !run.metrics().exists() {
            return Err(Error::file(&run.path, "the folder holds no run (no metrics.jsonl); start without --resume"));
        }
        Ok(run)
    }

    fn make(self) -> Result<Self> {
        fs::create_dir_all(&self.path).map_err(|error| Error::file(&self.path, error))?;
        Ok(self)
    }

    /// The folder itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// One JSON object a step.
    pub fn metrics(&self) -> PathBuf {
        self.path.join("metrics.jsonl")
    }

    /// Where logged samples go.
    pub fn samples(&self) -> PathBuf {
        self.path.join("samples")
    }

    /// The run's checkpoints, of which the last `keep` are kept.
    pub fn checkpoints(&self, keep: usize) -> Checkpoints {
        Checkpoints::new(self.path.join("checkpoints"), keep)
    }

    /// Draws `curves.svg` of these metrics and, where there are held-out images, `before_after.png`; returns their paths.
    pub fn draw_pictures(&self, metrics: &[&str]) -> Result<Vec<PathBuf>> {
        let curves = self.path.join("curves.svg");
        let svg = chart::chart(&chart::curves(self)?, metrics);
        fs::write(&curves, svg).map_err(|error| Error::file(&curves, error))?;
        let mut drawn = vec![curves];
        if let Ok(picture) = before_after(self, 6, None) {
            let path = self.path.join("before_after.png");
            picture.save(&path).map_err(|error| Error::file(&path, error))?;
            drawn.push(path);
        }
        Ok(drawn)
    }

    /// Writes which rewards the run optimises and which it watches.
    pub fn name_rewards(&self, rewards: &RunRewards) -> Result<()> {
        let path = self.path.join(REWARDS);
        let text = serde_json::to_string_pretty(rewards).map_err(|error| Error::file(&path, error))?;
        write_whole(&path, format!("{text}\n").as_bytes())
    }

    /// What [`RunFolder::name_rewards`] wrote.
    pub fn rewards(&self) -> Result<RunRewards> {
        let path = self.path.join(REWARDS);
        let text = fs::read(&path).map_err(|error| Error::file(&path, error))?;
        serde_json::from_slice(&text).map_err(|error| Error::file(&path, error))
    }

    /// Writes the resolved configuration and where it ran.
    pub fn describe(&self, config_toml: &str, seed: u64) -> Result<()> {
        write_whole(&self.path.join("config.toml"), config_toml.as_bytes())?;
        let path = self.path.join("meta.json");
        let mut now = meta(seed);
        // A run that was gone on with was made by several processes.
        if let Some(mut before) = fs::read(&path).ok().and_then(|text| serde_json::from_slice::<Value>(&text).ok()) {
            let mut earlier =
                before.get_mut("earlier").and_then(Value::as_array_mut).map(std::mem::take).unwrap_or_default();
            earlier.push(before);
            now["earlier"] = Value::Array(earlier);
        }
        write_whole(&path, format!("{now:#}\n").as_bytes())
    }
}

fn meta(seed: u64) -> Value {
    let commit = std::process::Command::new("git").args(["rev-parse", "HEAD"]).output().ok();
    let commit = commit.filter(|output| output.status.success());
    let commit = commit.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_string());
    json!({
        "grpo": env!("CARGO_PKG_VERSION"),
        "commit": commit,
        "command": std::env::args().collect::<Vec<_>>(),
        "seed": seed,
        "os": std::env::consts::OS,
        "arch": std::env::consts::ARCH,
        "threads": std::thread::available_parallelism().map_or(1, usize::from),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_with_a_run_is_not_overwritten() {
        let root = tempfile::tempdir().unwrap();
        let run = RunFolder::create(root.path(), "a", 0).unwrap();
        fs::write(run.metrics(), "").unwrap();
        let error = RunFolder::create(root.path(), "a", 0).unwrap_err().to_string();
        assert!(error.contains("already holds a run") && error.contains("--resume"), "{error}");
        assert!(RunFolder::create(root.path(), "a", 1).is_ok(), "another seed is another run");
        assert!(RunFolder::fresh(root.path(), "a", 0).unwrap().path().ends_with("a-2/0"));
    }
}
