//! `grpo ablate` and `grpo report` as a user meets them: killed and started again, and told of mistakes.

#![expect(clippy::unwrap_used, reason = "a test and its helpers fail by panicking")]

mod said;

use std::path::Path;
use std::process::{Command, Stdio};

use grpo::Seed;
use said::{Said, grpo};

const ABLATION: &str = r#"name = "small"
seeds = [0, 1]
baseline = "dark"
[base]
n_steps = 4
rollout = { prompts_per_step = 2, group_size = 2 }
optim = { lr = 1e-3 }
log = { held_out_every = 2, checkpoint_every = 1, samples_every = 4 }
held_out = { rewards = [{ geneval = {} }, { compressibility = {} }], samples_per_prompt = 2 }
[[arms]]
name = "dark"
about = "As dark as can be."
rewards = [{ brightness = { weight = -1.0 } }]
[[arms]]
name = "random"
rewards = [{ random = {} }]
objective.kl_weight = 0.0
[quick]
arms = ["random", "dark"]
seeds = [7]
n_steps = 1
"#;

/// A folder with the ablation's file and few held-out prompts.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    std::fs::write(at.join("small.toml"), ABLATION).unwrap();
    // GenEval's columns: what is asked for is one circle, or one square.
    let line = |class: &str, tag: &str| {
        format!(
            "{{\"prompt\": \"one {class}\", \"tag\": \"{tag}\", \"include\": [{{\"class\": \"{class}\", \"count\": 1}}]}}\n"
        )
    };
    let held_out: String = ["circle", "square", "star"].iter().map(|class| line(class, "single_object")).collect();
    std::fs::write(at.join("held_out.jsonl"), held_out).unwrap();
    folder
}

const LINE: &str = "ablate small.toml --held-out-prompts held_out.jsonl";

fn run(folder: &Path, line: &str) -> Said {
    let said = grpo(folder, &line.split_whitespace().collect::<Vec<_>>());
    assert_eq!(said.code, 0, "{line}: {}", said.err);
    said
}

/// Files in a folder and those below it.
fn files(folder: &Path) -> usize {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.map(|path| if path.is_dir() { files(&path) } else { 1 }).sum()
}

/// Everything in the report but its pictures of curves, which hold the same numbers.
fn report(folder: &Path) -> Vec<String> {
    run(folder, "report runs/small --without-times --out report");
    ["report.html", "report.md", "report.json"]
        .map(|name| std::fs::read_to_string(folder.join("report").join(name)).unwrap())
        .into()
}

#[test]
fn an_ablation_killed_at_random_moments_ends_with_the_same_report() {
    let [whole, broken] = [folder(), folder()];
    run(whole.path(), LINE);
    // Whenever so many files are there, which is any moment: while samples, a checkpoint or the plan are written.
    let n_files = files(&whole.path().join("runs"));
    let mut draws = Seed::new(8).draws();
    let mut moments: Vec<usize> = (0..6).map(|_| 1 + draws.below(n_files * 9 / 10)).collect();
    moments.sort_unstable();
    for moment in moments {
        let mut command = Command::new(env!("CARGO_BIN_EXE_grpo"));
        command.args(LINE.split_whitespace()).current_dir(broken.path()).stderr(Stdio::null()).stdout(Stdio::null());
        let mut child = command.spawn().unwrap();
        while files(&broken.path().join("runs")) < moment && child.try_wait().unwrap().is_none() {
            std::thread::yield_now();
        }
        child.kill().ok();
        assert!(!child.wait().unwrap().success(), "it was over before {moment} of {n_files} files");
    }
    let said = run(broken.path(), LINE);
    assert!(said.err.contains("4 runs of 2 arms (dark, random), 16 steps"), "{}", said.err);
    let (whole, broken) = (report(whole.path()), report(broken.path()));
    assert!(whole == broken, "{}\n\n{}", whole[1], broken[1]);
    for part in
        ["dark/0", "## Rewards on held-out prompts", "difference from dark", "| no RL |", "its own -1 × brightness"]
    {
        assert!(whole[1].contains(part), "no `{part}` in {}", whole[1]);
    }
}

#[test]
fn arms_are_changes_of_one_base_and_watch_the_same() {
    let folder = folder();
    run(folder.path(), &format!("{LINE} --set seeds=[3] --set base.n_steps=1 --at-once 2"));
    let config = |arm: &str| -> toml::Table {
        let path = folder.path().join(format!("runs/small/{arm}/3/config.toml"));
        toml::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
    };
    let (dark, random) = (config("dark"), config("random"));
    assert_eq!(dark["held_out"], random["held_out"]);
    let watched = random["held_out"]["rewards"].as_array().unwrap();
    let names: Vec<&String> = watched.iter().flat_map(|reward| reward.as_table().unwrap().keys()).collect();
    assert_eq!(names, ["geneval", "compressibility", "brightness", "random"]);
    assert_eq!(random["objective"]["kl_weight"].as_float(), Some(0.0));
    assert_eq!(random["objective"]["advantage"], dark["objective"]["advantage"], "the rest of a section stays");
    assert_eq!((dark["name"].as_str(), dark["seed"].as_integer()), (Some("dark"), Some(3)));
    // The report judges by what the base watches.
    // A further arm with a reward of its own changes no other, and one arm may be run without the baseline.
    let more = ABLATION.replace("[quick]", "[[arms]]\nname = \"small-files\"\nrewards = [{ clip = {} }]\n[quick]");
    std::fs::write(folder.path().join("small.toml"), more).unwrap();
    let said = run(folder.path(), &format!("{LINE} --set seeds=[3] --set base.n_steps=1 --arm small-files"));
    assert!(said.err.contains("1 runs of 1 arms (small-files)") && said.err.contains("dark  "), "{}", said.err);
    let said = run(folder.path(), "report runs/small/dark runs/small/random --judge geneval --json --out r");
    let facts: serde_json::Value = serde_json::from_str(&said.out).unwrap();
    assert_eq!((&facts["judges"][0], &facts["baseline"]), (&"geneval".into(), &"dark".into()));
    let text = std::fs::read_to_string(folder.path().join("runs/small/report/report.md")).unwrap();
    assert!(text.contains("Judges: geneval, jpeg_compressibility;"), "{text}");
    assert!(folder.path().join("runs/small/random/3/policy/model.safetensors").exists());
}

#[test]
fn a_quick_ablation_is_one_of_its_own() {
    let folder = folder();
    let said = run(folder.path(), &format!("{LINE} --quick"));
    assert!(said.err.contains("small-quick: 2 runs of 2 arms"), "{}", said.err);
    assert!(folder.path().join("runs/small-quick/dark/7/finished").exists());
    assert!(!folder.path().join("runs/small").exists());
    let said = run(folder.path(), &format!("{LINE} --dry-run --arm dark"));
    assert!(
        said.err.contains("2 runs of 1 arms (dark), 8 steps") && said.err.contains("nothing was run"),
        "{}",
        said.err
    );
    assert!(!folder.path().join("runs/small").exists());
}

#[test]
fn the_published_ablation_is_shown_and_could_be_run() {
    let folder = tempfile::tempdir().unwrap();
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/reward_ablation/ablation.toml");
    let said = run(folder.path(), &format!("show {file}"));
    let shown: toml::Table = toml::from_str(&said.out).unwrap();
    let names: Vec<&str> = shown["arms"].as_array().unwrap().iter().map(|arm| arm["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["clip", "hps", "both-summed", "both-normalised", "random", "brightness"]);
    assert_eq!(shown["arms"][3]["objective"]["advantage"]["combine"].as_str(), Some("normalise_then_sum"));
    let said = run(folder.path(), &format!("ablate {file} --dry-run"));
    assert!(said.err.contains("30 runs of 6 arms"), "{}", said.err);
    let said = run(folder.path(), &format!("ablate {file} --dry-run --quick"));
    assert!(said.err.contains("4 runs of 2 arms (clip, brightness)"), "{}", said.err);
}

#[test]
fn mistakes_are_named_with_their_remedy() {
    let folder = folder();
    let check = |line: &str, words: &[&str]| {
        let said = grpo(folder.path(), &line.split_whitespace().collect::<Vec<_>>());
        assert_eq!(said.code, 2, "{line}: {}", said.err);
        assert!(said.err.contains("error: ") && !said.err.contains("panicked"), "{line}: {}", said.err);
        for word in words {
            assert!(said.err.contains(word), "{line}: no `{word}` in {}", said.err);
        }
    };
    check(&format!("{LINE} --arm bright"), &["--arm bright: the arms are dark, random"]);
    check(&format!("{LINE} --set baseline=bright"), &["the baseline `bright` is no arm"]);
    check(&format!("{LINE} --set base.seed=1"), &["base.seed", "take it out of [base]"]);
    check(&format!("{LINE} --set base.optim.rate=1"), &["base: unknown field `rate`"]);
    check(&format!("{LINE} --set seeds=[1,1]"), &["seed 1 is given twice"]);
    check("report nowhere", &["nowhere", "no run in it"]);
    std::fs::write(folder.path().join("small.toml"), ABLATION.replace("[quick]", "[quack]")).unwrap();
    check(&format!("{LINE} --quick"), &["unknown field `quack`"]);
    std::fs::write(folder.path().join("small.toml"), ABLATION.replace("kl_weight", "weight_of_kl")).unwrap();
    check(LINE, &["arm `random`: unknown field `weight_of_kl`"]);
}
