//! Rules that no compiler checks: who may depend on whom, how long a file may be, which metrics are documented.

#![expect(clippy::unwrap_used, reason = "a test and its helpers fail by panicking")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use grpo::objective::{Correction, KlConfig, Place};
use grpo::testing::ToyPolicy;
use grpo::{
    BoxError, Completion, FailedScores, GroupSampler, GroupSize, LogProbs, Objective, Params, Policy, Prompt, Request,
    RewardSet, RunFolder, Scoring, Surrogate, TrainConfig, Trainer, reward_fn,
};

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

/// A toy that says its samples are drawn by another law than the one it scores, and that some of them are cut off.
struct Shaped(ToyPolicy);

impl Policy for Shaped {
    type Sample = String;
    type Trace = Vec<u32>;

    fn sample(&self, requests: &[Request<'_>]) -> Result<Vec<Completion<Self>>, BoxError> {
        Ok(self.0.sample(requests)?.into_iter().map(Completion::of).collect())
    }

    fn log_probs(&self, batch: &[(&Prompt, &Vec<u32>)]) -> Result<LogProbs, BoxError> {
        self.0.log_probs(batch)
    }

    fn params(&self) -> Params {
        self.0.params()
    }

    fn finished(trace: &Vec<u32>) -> Option<bool> {
        Some(trace.first() == Some(&0))
    }

    fn scoring(&self) -> Scoring {
        Scoring::Conditional
    }
}

/// The names that a run with two rewards, one of them watched as well, logs under this objective.
fn emitted(objective: Objective) -> BTreeSet<String> {
    let folder = tempfile::tempdir().unwrap();
    let run = RunFolder::create(folder.path(), "metrics", 0).unwrap();
    let letter = |name: &'static str| {
        reward_fn(name, move |_: &Prompt, text: &String| Ok(text.matches(&name[..1]).count() as f32))
    };
    let both = || RewardSet::new().with(letter("alpha"), 1.0).unwrap().with(letter("beta"), 1.0).unwrap();
    let mut config = TrainConfig { n_steps: 2, objective, ..TrainConfig::default() };
    config.rollout.max_resamples = 1;
    config.rollout.failed_scores = FailedScores::Exclude { max_share: 0.1 };
    let rollout = GroupSampler::new(both(), config.rollout.group_size, 64);
    let toy = ToyPolicy::new(4, 3).unwrap();
    let reference = Shaped(toy.copy().unwrap());
    let prompts: Vec<Prompt> = (0..8).map(|i| Prompt::new(format!("prompt {i}"))).collect();
    let watched = RewardSet::new().with(letter("alpha"), 1.0).unwrap().with(letter("c"), 1.0).unwrap();
    let mut trainer = Trainer::new(config, Shaped(toy), Some(reference), Box::new(rollout), prompts.clone())
        .unwrap()
        .hold_out(prompts, watched, GroupSize::new(2).unwrap())
        .record_in(&run, "")
        .unwrap();
    trainer.run().unwrap();
    let pattern = |name: String| {
        let name = name.replace("correlation/alpha_beta", "correlation/{a}_{b}");
        ["alpha", "beta", "c", "kl"].iter().fold(name, |name, reward| name.replace(&format!("/{reward}/"), "/{name}/"))
    };
    grpo::chart::curves(&run).unwrap().into_keys().map(pattern).collect()
}

/// The names in the first column of the page's tables of numbers.
fn documented() -> BTreeSet<String> {
    let page = fs::read_to_string(root().join("src/docs/metrics.md")).unwrap();
    // The stages before GRPO are compared where they are: policies/tests/stages.rs.
    let numbers = page.split("## Pictures").next().unwrap();
    let rows = numbers.lines().filter_map(|line| line.strip_prefix("| `")?.split(" | ").next());
    rows.flat_map(|cell| cell.split('`').step_by(2))
        .filter(|name| !name.contains([' ', ',']))
        .map(String::from)
        .collect()
}

#[test]
fn the_page_of_metrics_has_every_name_and_no_other() {
    let plain = Objective { correction: Some(Correction::default()), ..Objective::default() };
    let cispo = Objective { surrogate: Surrogate::Cispo { cap: 2.0 }, entropy_weight: 0.1, ..Objective::default() };
    let kl = KlConfig { place: Place::Reward, ..KlConfig::default() };
    let in_reward = Objective { kl, ..Objective::default() };
    let emitted: BTreeSet<String> = [plain, cispo, in_reward].into_iter().flat_map(emitted).collect();
    let documented = documented();
    let missing: Vec<&String> = emitted.difference(&documented).collect();
    assert!(missing.is_empty(), "logged, and not in src/docs/metrics.md: {missing:?}");
    let idle: Vec<&String> = documented.difference(&emitted).collect();
    assert!(idle.is_empty(), "in src/docs/metrics.md, and logged by no run: {idle:?}");
    assert!(documented.len() > 45, "{documented:?}");
}

/// Every Markdown page of the tree.
fn pages() -> Vec<PathBuf> {
    let mut pages = vec![root().join("README.md"), root().join("CHANGELOG.md"), root().join("experiments/LOG.md")];
    pages.extend(fs::read_dir(root().join("src/docs")).unwrap().map(|entry| entry.unwrap().path()));
    pages.into_iter().filter(|path| path.extension().is_some_and(|extension| extension == "md")).collect()
}

#[test]
fn pages_link_to_what_is_there_and_leave_nothing_to_fill_in() {
    let pages = pages();
    assert!(pages.len() > 6);
    for page in pages {
        let text = fs::read_to_string(&page).unwrap();
        assert!(!text.contains("@@"), "{} has a gap to fill in", page.display());
        let targets = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        for target in targets.filter(|target| !target.starts_with("http") && !target.starts_with('#')) {
            let file = page.parent().unwrap().join(target.split('#').next().unwrap());
            assert!(file.exists(), "{} links to {target}, which is not there", page.display());
        }
    }
}
