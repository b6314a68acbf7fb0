//! The `grpo` command as a user meets it: what it makes, what it says of mistakes, and its exit code.

#![expect(clippy::unwrap_used, reason = "a test and its helpers fail by panicking")]

use std::path::{Path, PathBuf};
use std::process::Command;

struct Said {
    code: i32,
    out: String,
    err: String,
}

fn grpo(folder: &Path, args: &[&str]) -> Said {
    let output = Command::new(env!("CARGO_BIN_EXE_grpo")).args(args).current_dir(folder).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Said { code: output.status.code().unwrap_or(-1), out: text(&output.stdout), err: text(&output.stderr) }
}

fn config(name: &str) -> String {
    format!("{}/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// A mistake is one line, with each of these words in it, and exit code 2.
fn mistake(folder: &Path, args: &[&str], words: &[&str]) {
    let said = grpo(folder, args);
    assert_eq!(said.code, 2, "{args:?}: {}", said.err);
    assert!(said.err.starts_with("error: ") && !said.err.contains("panicked"), "{args:?}: {}", said.err);
    for word in words {
        assert!(said.err.contains(word), "{args:?}: no `{word}` in {}", said.err);
    }
}

const SMALL: [&str; 12] = [
    "--set",
    "rewards=[{ brightness = {} }]",
    "--set",
    "held_out.rewards=[{ brightness = {} }]",
    "--set",
    "held_out.samples_per_prompt=2",
    "--set",
    "rollout.prompts_per_step=2",
    "--set",
    "rollout.group_size=4",
    "--set",
    "n_steps=2",
];

fn train(folder: &Path, more: &[&str]) -> Said {
    let file = config("shapes_clip.toml");
    let args: Vec<&str> = ["train", &file].iter().chain(&SMALL).chain(more).copied().collect();
    grpo(folder, &args)
}

#[test]
fn every_configuration_of_the_tree_is_shown_whole() {
    let folder = tempfile::tempdir().unwrap();
    let tomls: Vec<PathBuf> = std::fs::read_dir(env!("CARGO_MANIFEST_DIR"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|ending| ending == "toml") && !path.ends_with("Cargo.toml"))
        .collect();
    assert!(tomls.len() >= 4);
    for path in tomls.iter().filter(|path| std::fs::read_to_string(path).unwrap().contains("rewards")) {
        let said = grpo(folder.path(), &["show", path.to_str().unwrap()]);
        assert_eq!(said.code, 0, "{}: {}", path.display(), said.err);
        for section in ["[rollout]", "[objective.advantage]", "[optim]", "[log]", "[law]"] {
            assert!(said.out.contains(section), "{}: no {section} in {}", path.display(), said.out);
        }
    }
}

#[test]
fn training_leaves_a_folder_that_generate_goes_on_from() {
    let folder = tempfile::tempdir().unwrap();
    let said = train(folder.path(), &["--set", "name=t"]);
    assert_eq!(said.code, 0, "{}", said.err);
    let run = folder.path().join("runs/t/0");
    for file in
        ["config.toml", "meta.json", "metrics.jsonl", "curves.svg", "before_after.png", "policy/model.safetensors"]
    {
        assert!(run.join(file).exists(), "{file} is missing: {}", said.err);
    }
    assert!(said.err.contains("tensorboard --logdir"), "{}", said.err);
    mistake_again(folder.path());

    let policy = run.join("policy");
    let args = ["generate", "--policy", policy.to_str().unwrap(), "--prompt", "a photo of a star", "-n", "2", "--json"];
    let said = grpo(folder.path(), &args);
    assert_eq!((said.code, said.out.lines().count()), (0, 2), "{}", said.err);
    assert!(folder.path().join("generated/000-01.png").exists());
}

/// The same run a second time is refused, since it would overwrite the first.
fn mistake_again(folder: &Path) {
    let said = train(folder, &["--set", "name=t"]);
    assert_eq!(said.code, 2);
    assert!(said.err.contains("already holds a run") && said.err.contains("--resume"), "{}", said.err);
}

#[test]
fn images_are_the_same_whatever_is_drawn_beside_them() {
    let folder = tempfile::tempdir().unwrap();
    for (n, out) in [("1", "one"), ("3", "three")] {
        let said = grpo(folder.path(), &["generate", "--prompt", "a photo of a red ring", "-n", n, "--out", out]);
        assert_eq!(said.code, 0, "{}", said.err);
    }
    let bytes = |path: &str| std::fs::read(folder.path().join(path)).unwrap();
    assert_eq!(bytes("one/000-00.png"), bytes("three/000-00.png"));
}

#[test]
fn the_embedded_tokenizer_lets_nine_scenes_in_ten_through() {
    let folder = tempfile::tempdir().unwrap();
    let said = grpo(folder.path(), &["eval", "tokenizer", "-n", "1", "--json"]);
    assert_eq!(said.code, 0, "{}", said.err);
    let summary: serde_json::Value = serde_json::from_str(&said.out).unwrap();
    assert_eq!(summary["images"], 180);
    assert!(summary["overall"].as_f64().unwrap() >= 0.9, "{summary}");
    mistake(folder.path(), &["eval", "tokenizer", "-n", "0"], &["0 is not in 1.."]);
}

#[test]
fn the_stages_leave_policies_that_generate_goes_on_from() {
    let folder = tempfile::tempdir().unwrap();
    let (pretrain, sft) = (config("shapes_pretrain.toml"), config("shapes_sft.toml"));
    let small = ["--set", "stage.n_steps=3", "--set", "stage.batch=2", "--set", "stage.save_every=2"];
    let run = |args: &[&str], more: &[&str]| {
        let args: Vec<&str> = args.iter().chain(&small).chain(more).copied().collect();
        let said = grpo(folder.path(), &args);
        assert_eq!(said.code, 0, "{args:?}: {}", said.err);
        said.err
    };
    let tokenizer = ["--set", "tokenizer.n_steps=1", "--set", "tokenizer.batch=1"];
    let said = run(&["pretrain", &pretrain, "--out", "pretrained"], &tokenizer);
    assert!(said.contains("parameters, 1 steps"), "{said}");
    run(&["sft", &sft, "--policy", "pretrained", "--out", "sft"], &[]);
    run(&["sft", &sft, "--policy", "pretrained", "--out", "unsaved"], &["--set", "stage.save_every=0"]);
    let weights = |policy: &str| std::fs::read(folder.path().join(policy).join("model.safetensors")).unwrap();
    assert!(weights("pretrained") != weights("sft"), "fine-tuning moved no weight");
    assert!(weights("unsaved") == weights("sft"), "what is saved at the end depends on what was saved on the way");
    let said = grpo(folder.path(), &["generate", "--policy", "sft", "--prompt", "a photo of a star"]);
    assert_eq!(said.code, 0, "{}", said.err);
    let args = ["sft", &sft, "--out", "other", "--set", "stage.batch=0"];
    mistake(folder.path(), &args, &["stage.batch is 0", "at least 1"]);
}

#[test]
fn mistakes_in_a_configuration_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = config("shapes_clip.toml");
    let with = |change: &'static str, words: &[&str]| mistake(folder.path(), &["train", &file, "--set", change], words);
    with("optim.learning_rate=1", &["learning_rate", "unknown field", "lr"]);
    with("rollout.group_size=1", &["group_size is 1; a group needs at least 2"]);
    with("rewards=[]", &["rewards is empty", "clip"]);
    with("rewards=[{ clipp = {} }]", &["unknown variant `clipp`", "clip"]);
    with("optim.lr=-1", &["optim.lr is -1", "positive"]);
    with("law.guidance=6.0", &["guidance 6", "scored_as = \"conditional\""]);
    with("rollout.prompts_per_step=100000", &["prompts_per_step is 100000", "fewer"]);
    mistake(folder.path(), &["train", "absent.toml"], &["absent.toml", "give a TOML file"]);
    mistake(folder.path(), &["train", &file, "--device", "tpu"], &["--device tpu", "cpu, cuda or cuda:N"]);
    mistake(folder.path(), &["train", &file, "--resume"], &["holds no run", "without --resume"]);
    assert!(!folder.path().join("runs").exists(), "a mistake left a folder behind");
}

#[test]
fn damaged_files_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    mistake(folder.path(), &["eval", "geneval", "--policy", &path("absent")], &["absent", "there is no such folder"]);
    std::fs::write(path("broken.png"), b"not an image").unwrap();
    mistake(
        folder.path(),
        &["score", "--reward", "brightness", "--prompt", "x", &path("broken.png")],
        &["broken.png", "PNG or JPEG"],
    );

    assert_eq!(train(folder.path(), &["--set", "name=t"]).code, 0);
    let policy = path("runs/t/0/policy");
    let weights = Path::new(&policy).join("model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    let generate = ["generate", "--policy", &policy, "--prompt", "a photo of a star"];
    mistake(folder.path(), &generate, &["model.safetensors"]);

    // A damaged checkpoint is refused: nothing goes on from half a state.
    let checkpoint = Path::new(&path("runs/t/0/checkpoints/step-2")).join("params.safetensors");
    std::fs::write(&checkpoint, b"short").unwrap();
    let said = train(folder.path(), &["--set", "name=t", "--resume"]);
    assert_eq!(said.code, 2, "{}", said.err);
    assert!(said.err.contains("params.safetensors") && said.err.contains("truncated"), "{}", said.err);
}
