//! From captioned images to a policy: tokens, pretraining, fine-tuning at another size, and what breaks on the way.

#![expect(clippy::unwrap_used, reason = "a test and its helpers fail by panicking")]

mod said;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};

use said::{Said, grpo};
use serde_json::Value;

const TOKENS: &str = "height = 64\nwidth = 64\nrows_per_shard = 40\n";

const PRETRAIN: &str = r#"name = "p"
[decoder.from_scratch]
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
max_position_embeddings = 400
[data]
batch = 8
validation_rows = 8
pictures = 2
rows = { captions = "mixed", prefixes = "published" }
[stage]
seed = 1
n_steps = 6
ema = 0.9
optim = { lr = 1e-3 }
log = { checkpoint_every = 2, validate_every = 3, pictures_every = 3 }
"#;

const SFT: &str = r#"name = "s"
[data]
batch = 4
validation_rows = 4
pictures = 1
rows = { captions = "short", caption_dropout = 0.0 }
[stage]
seed = 1
n_steps = 2
optim = { lr = 1e-4, decayed = "all_but_biases", weight_decay = 0.01 }
"#;

/// A folder with the files of settings.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in [("tokens.toml", TOKENS), ("pretrain.toml", PRETRAIN), ("sft.toml", SFT)] {
        std::fs::write(folder.path().join(name), text).unwrap();
    }
    folder
}

fn run(folder: &Path, line: &str) -> Said {
    let said = grpo(folder, &line.split_whitespace().collect::<Vec<_>>());
    assert_eq!(said.code, 0, "{line}: {}", said.err);
    said
}

/// A mistake is one line, with each of these words in it, and exit code 2.
fn mistake(folder: &Path, line: &str, words: &[&str]) {
    let said = grpo(folder, &line.split_whitespace().collect::<Vec<_>>());
    assert_eq!(said.code, 2, "{line}: {}", said.err);
    for word in words {
        assert!(said.err.contains(word) && !said.err.contains("panicked"), "{line}: no `{word}` in {}", said.err);
    }
}

fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    entries
        .map(|entry| (entry.file_name().to_string_lossy().into_owned(), std::fs::read(entry.path()).unwrap()))
        .collect()
}

#[test]
fn images_become_a_policy_that_goes_on_at_another_size() {
    let folder = folder();
    let at = folder.path();
    let said = run(at, "tokenize --shapes free -n 100 --config tokens.toml --out t64");
    assert!(said.err.contains(" rows of 100 in t64"), "{}", said.err);
    run(at, "tokenize --shapes tasks -n 24 --config tokens.toml --set height=96 --set width=128 --out t96");
    let said = run(at, "pretrain pretrain.toml --data t64");
    for words in ["rows of 8 x 8 tokens", "epochs", "validation after     6 steps", "nll_ema", "runs/p/1/policy"] {
        assert!(said.err.contains(words), "no `{words}` in {}", said.err);
    }
    let run_folder = at.join("runs/p/1");
    for file in [
        "config.toml",
        "meta.json",
        "curves.svg",
        "samples/panel_validation-000006.png",
        "policy/model.safetensors",
        "policy_ema/model.safetensors",
        "policy/cosmos/config.json",
    ] {
        assert!(run_folder.join(file).exists(), "{file} is missing: {}", said.err);
    }
    let lines = std::fs::read_to_string(run_folder.join("metrics.jsonl")).unwrap();
    let last: Value = serde_json::from_str(lines.lines().rfind(|line| line.contains("\"step\"")).unwrap()).unwrap();
    assert!(last["validation/nll"].is_f64(), "{last}");
    let step: Value = serde_json::from_str(lines.lines().find(|line| line.contains("loss/text")).unwrap()).unwrap();
    for name in ["throughput/mfu", "throughput/tokens_per_s", "data/wait_share", "learning_rate", "epoch", "num_tokens"]
    {
        assert!(step[name].is_f64(), "no {name} in {step}");
    }

    // The other size is that of the tokens; nothing else says it.
    let said = run(at, "sft sft.toml --data t96 --policy runs/p/1/policy");
    assert!(said.err.contains("rows of 12 x 16 tokens"), "{}", said.err);
    run(at, "generate --policy runs/s/1/policy --prompt circle -n 1 --out drawn");
    let drawn = image::open(at.join("drawn/000-00.png")).unwrap();
    assert_eq!((drawn.height(), drawn.width()), (96, 128));

    let said = run(at, "eval nll --policy runs/s/1/policy --data t96 --whole-rows --json");
    let nll: Value = serde_json::from_str(said.out.trim()).unwrap();
    assert!(nll["nll"].as_f64().unwrap() > 1.0 && nll["tokens"].as_u64().unwrap() > 24 * 192, "{nll}");

    mistake(at, "pretrain pretrain.toml --data t64", &["already holds a run", "--resume"]);
    mistake(at, "pretrain pretrain.toml --data t64 --data t96 --set name=q", &["grid", "one tokenizer and size"]);
    mistake(at, "pretrain pretrain.toml --data nowhere --set name=q", &["nowhere", "grpo tokenize --data"]);
    mistake(at, "sft sft.toml --data t64 --policy nowhere --set name=q", &["nowhere", "no such folder"]);
    mistake(at, "pretrain pretrain.toml --data t64 --set data.batches=3", &["batches", "expected"]);
    mistake(at, "eval nll --policy runs/p/1/policy --data t96", &["grid of (12, 16)", "(8, 8)"]);
    mistake(at, "tokenize --shapes free -n 100 --config tokens.toml --out t64", &["already holds tokens", "--resume"]);
    mistake(
        at,
        "tokenize --shapes free -n 90 --config tokens.toml --out t64 --resume",
        &["tokens of another run", "90 scenes"],
    );
    mistake(at, "tokenize --data nowhere.tar --config tokens.toml --out x", &["nowhere.tar"]);
    mistake(at, "tokenize --config tokens.toml --out x", &["give images, or a corpus"]);
}

/// Starts a command and kills it once a file is there, or lets it end; gives whether it was killed.
fn killed_at(folder: &Path, line: &str, file: &str) -> bool {
    let mut command = Command::new(env!("CARGO_BIN_EXE_grpo"));
    command.args(line.split_whitespace()).current_dir(folder).stderr(Stdio::null()).stdout(Stdio::null());
    let mut child = command.spawn().unwrap();
    loop {
        if folder.join(file).exists() {
            child.kill().ok();
            return !child.wait().unwrap().success();
        }
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success(), "{line}");
            return false;
        }
        std::thread::yield_now();
    }
}

#[test]
fn tokens_of_a_killed_process_are_those_of_one_that_was_not() {
    let folder = folder();
    let at = folder.path();
    let line = |out: &str| format!("tokenize --shapes free -n 600 --config tokens.toml --out {out}");
    run(at, &line("whole"));
    // In the middle of writing a shard, behind one, and behind its manifest.
    let moments = ["00002.safetensors.partial", "00001.safetensors", "00007.safetensors", "manifest.json"];
    for (number, moment) in moments.into_iter().enumerate() {
        let out = format!("killed-{number}");
        let was_killed = killed_at(at, &line(&out), &format!("{out}/{moment}"));
        assert!(was_killed || moment.ends_with("partial"), "it ended before {moment}");
        let resume = if at.join(&out).join("manifest.json").exists() { "--resume" } else { "" };
        run(at, &format!("{} {resume}", line(&out)));
        let resumed = files(&at.join(&out)).into_iter().filter(|(name, _)| !name.ends_with("partial")).collect();
        assert!(files(&at.join("whole")) == resumed, "killed at {moment}");
    }
    let said = run(at, &format!("{} --resume", line("whole")));
    assert!(said.err.contains("every file has its checksum"), "{}", said.err);
}

#[test]
fn a_killed_pretraining_goes_on_to_the_bit() {
    let folder = folder();
    let at = folder.path();
    run(at, "tokenize --shapes free -n 60 --config tokens.toml --out t");
    run(at, "pretrain pretrain.toml --data t --out whole");
    let weights = |out: &str| {
        let policy = at.join(out).join("p/1");
        ["policy", "policy_ema"].map(|name| std::fs::read(policy.join(name).join("model.safetensors")).unwrap())
    };
    // Before a checkpoint, behind one, and while one is written.
    for (number, moment) in
        ["metrics.jsonl", "checkpoints/step-4", "checkpoints/.step-4.partial"].into_iter().enumerate()
    {
        let out = format!("killed-{number}");
        let was_killed =
            killed_at(at, &format!("pretrain pretrain.toml --data t --out {out}"), &format!("{out}/p/1/{moment}"));
        assert!(was_killed || moment.ends_with("partial"), "it ended before {moment}");
        run(at, &format!("pretrain pretrain.toml --data t --out {out} --resume"));
        assert!(weights(&out) == weights("whole"), "killed at {moment}");
    }
}

#[test]
fn a_visual_tokenizer_is_trained_and_used() {
    let folder = folder();
    let at = folder.path();
    let text = r#"name = "v"
n_images = 20
[cosmos]
channels = 8
channels_mult = [1]
num_res_blocks = 1
patch_size = 8
z_channels = 4
embedding_dim = 4
levels = [8, 8, 5, 5]
spatial_compression = 8
temporal_compression = 8
[corpus]
height = 32
width = 32
[data]
batch = 2
validation_images = 3
[stage]
seed = 0
n_steps = 3
optim = { lr = 1e-3 }
"#;
    std::fs::write(at.join("tokenizer.toml"), text).unwrap();
    let said = run(at, "tokenizer tokenizer.toml --shapes free -n 20");
    assert!(said.err.contains("20 images") && said.err.contains("psnr"), "{}", said.err);
    assert!(at.join("runs/v/0/samples/panel_validation-000003.png").exists());
    run(
        at,
        "tokenize --shapes free -n 20 --config tokens.toml --set height=32 --set width=32 --cosmos runs/v/0/policy --out t",
    );
    run(at, "pretrain pretrain.toml --data t --cosmos runs/v/0/policy");
    mistake(at, "pretrain pretrain.toml --data t --set name=q", &["made by another visual tokenizer"]);
    mistake(at, "tokenizer tokenizer.toml --shapes free -n 3 --out q", &["3 of 3 images are held out"]);
}

/// The published configurations of the Shapes world, and the choices of the paper's tables 2 and 3.
#[test]
fn a_decoder_starts_from_what_the_configuration_says() {
    let folder = folder();
    let at = folder.path();
    let tree = env!("CARGO_MANIFEST_DIR");
    run(at, &format!("tokenize --shapes free -n 40 --config {tree}/shapes_tokens.toml --out t"));
    let small = "--set stage.n_steps=3 --set data.batch=2 --set data.validation_rows=4 --set data.pictures=1";
    let pretrain = format!("pretrain {tree}/shapes_pretrain.toml --data t {small}");
    let config = |name: &str| std::fs::read_to_string(at.join(format!("runs/{name}/0/policy/config.json"))).unwrap();
    let weights = |name: &str| std::fs::read(at.join(format!("runs/{name}/0/policy/model.safetensors"))).unwrap();
    run(at, &format!("{pretrain} --set name=line"));
    run(at, &format!("{pretrain} --set name=layers --recompute-layers"));
    assert!(weights("line") == weights("layers"), "layers made again give other numbers");
    run(at, &format!("{pretrain} --set name=grid --set decoder.from_scratch.image_positions=grid"));
    assert!(config("grid").contains("\"image_positions\": \"grid\""), "{}", config("grid"));
    assert!(weights("line") != weights("grid"), "the positions change nothing");
    run(at, &format!("sft {tree}/shapes_sft.toml --data t {small} --set name=sft"));
    run(at, "generate --policy runs/sft/0/policy --prompt star -n 1");

    let language_model = format!("{tree}/../policies/tests/golden/qwen2_resize/tied");
    let source = "--set decoder={language_model={image_positions=\"grid\"}}";
    // Its 128 positions hold a picture of 64 tokens; longer captions are cut, and none of them is drawn for.
    run(at, &format!("{pretrain} {source} --set name=llm --language-model {language_model}"));
    assert!(config("llm").contains("\"image_positions\": \"grid\""), "{}", config("llm"));
    let text = format!("--text-tokenizer {language_model}/tokenizer.json --set name=text");
    run(at, &format!("{pretrain} {text}"));
    let n_ids = |name: &str| serde_json::from_str::<Value>(&config(name)).unwrap()["vocab_size"].as_u64().unwrap();
    assert_eq!(n_ids("text"), n_ids("llm"));

    mistake(at, &format!("{pretrain} {source} --set name=x"), &["[decoder.language_model] needs --language-model"]);
    mistake(at, &format!("{pretrain} --set name=x --language-model x"), &["[decoder.from_scratch]"]);
    let spiral = "--set decoder.from_scratch.image_positions=spiral";
    mistake(at, &format!("{pretrain} {spiral}"), &["unknown variant `spiral`", "line", "grid"]);
    mistake(at, &format!("{pretrain} --set name=x --set data.batch=0"), &["batch is 0", "at least 1"]);
}

/// Golden values of transformers' Qwen2 on the committed miniature: experiments/tests/golden/nll.py.
#[test]
fn likelihoods_are_those_of_transformers() {
    let folder = tempfile::tempdir().unwrap();
    let rows = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/nll.jsonl");
    let golden: Value = serde_json::from_str(include_str!("golden/nll.json")).unwrap();
    for (flags, name) in [("", "visual"), ("--full-vocabulary", "full"), ("--whole-rows", "training")] {
        let said = run(folder.path(), &format!("eval nll --data {rows} --json {flags}"));
        let got: Value = serde_json::from_str(said.out.trim()).unwrap();
        let (got, expected) = (got["nll"].as_f64().unwrap(), golden[name].as_f64().unwrap());
        assert!((got - expected).abs() < 1e-4, "{name}: {got} is not {expected}");
    }
}
