//! Rules that no compiler checks: who may depend on whom, how long a file may be, which metrics are documented.

#![expect(clippy::unwrap_used, reason = "a test and its helpers fail by panicking")]

use std::fs;
use std::path::{Path, PathBuf};

use grpo::testing::ToyPolicy;
use grpo::{GroupSampler, GroupSize, Prompt, RewardSet, RunFolder, TrainConfig, Trainer, reward_fn};

const LONGEST_FILE: usize = 400;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn dependencies(package: &str) -> Vec<String> {
    let text = fs::read_to_string(root().join(package).join("Cargo.toml")).unwrap();
    let manifest: toml::Table = toml::from_str(&text).unwrap();
    let tables = ["dependencies", "dev-dependencies", "build-dependencies"];
    let names = tables.iter().filter_map(|table| manifest.get(*table)?.as_table());
    names.flat_map(|table| table.keys().cloned()).collect()
}

#[test]
fn dependencies_point_down() {
    let none_of = |package: &str, forbidden: &[&str]| {
        let found: Vec<String> =
            dependencies(package).into_iter().filter(|name| forbidden.contains(&name.as_str())).collect();
        assert!(found.is_empty(), "{package} depends on {found:?}");
    };
    none_of(".", &["grpo-policies", "grpo-rewards", "ort", "clap", "tokio", "tokenizers"]);
    none_of("policies", &["grpo-rewards", "ort", "clap", "tokio"]);
    none_of("rewards", &["grpo-policies", "candle-core", "clap"]);
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            sources(&path, found);
        } else if name.ends_with(".rs") {
            found.push(path);
        }
    }
}

#[test]
fn files_hold_one_idea() {
    let mut found = Vec::new();
    for package in ["src", "policies/src", "rewards/src", "experiments/src", "examples"] {
        sources(&root().join(package), &mut found);
    }
    assert!(found.len() > 50);
    for path in found {
        let text = fs::read_to_string(&path).unwrap();
        let n_lines = text.lines().take_while(|line| *line != "mod tests {").count();
        assert!(
            n_lines <= LONGEST_FILE,
            "{} has {n_lines} lines before its tests; at most {LONGEST_FILE}",
            path.display()
        );
    }
}

#[test]
fn every_metric_a_run_logs_is_documented() {
    let folder = tempfile::tempdir().unwrap();
    let run = RunFolder::create(folder.path(), "metrics", 0).unwrap();
    let length = || reward_fn("length", |_: &Prompt, text: &String| Ok(text.matches('a').count() as f32));
    let config = TrainConfig { n_steps: 2, ..TrainConfig::default() };
    let rewards = RewardSet::new().with(length(), 1.0).unwrap();
    let rollout = GroupSampler::new(rewards, config.rollout.group_size, 64);
    let policy = ToyPolicy::new(4, 3).unwrap();
    let reference = policy.copy().unwrap();
    let prompts: Vec<Prompt> = (0..8).map(|i| Prompt::new(format!("prompt {i}"))).collect();
    let held_out = RewardSet::new().with(length(), 1.0).unwrap();
    let mut trainer = Trainer::new(config, policy, Some(reference), Box::new(rollout), prompts.clone())
        .unwrap()
        .hold_out(prompts, held_out, GroupSize::new(2).unwrap())
        .record_in(&run, "")
        .unwrap();
    trainer.run().unwrap();

    let documented = fs::read_to_string(root().join("src/docs/metrics.md")).unwrap();
    let names: Vec<String> = grpo::chart::curves(&run).unwrap().into_keys().collect();
    assert!(names.len() > 20, "{names:?}");
    for name in names {
        let pattern = name.replace("/length/", "/{name}/");
        assert!(documented.contains(&format!("`{pattern}`")), "metric `{name}` is not in src/docs/metrics.md");
    }
}
