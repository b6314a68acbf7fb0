//! The `grpo` command as a user meets it: what it makes, what it says of mistakes, and its exit code.

#![expect(clippy::unwrap_used, reason = "a test and its helpers fail by panicking")]

mod said;

use std::path::{Path, PathBuf};

use said::{Said, grpo};

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
    assert!(tomls.len() >= 12);
    for path in &tomls {
        let said = grpo(folder.path(), &["show", path.to_str().unwrap()]);
        assert_eq!(said.code, 0, "{}: {}", path.display(), said.err);
        let sections: &[&str] = match path.file_stem().unwrap().to_str().unwrap() {
            name if name.ends_with("_tokenizer") => &["[corpus.filter]", "[stage.optim]", "[stage.log]"],
            name if name.ends_with("_tokens") => &["[filter]", "[columns]", "max_bad_share"],
            name if name.ends_with("_pretrain") => &["[decoder", "[data.rows]", "[data.law]", "[stage.optim]"],
            name if name.ends_with("_sft") => &["[data.rows]", "[data.law]", "[stage.optim]"],
            _ => &["[rollout]", "[objective.advantage]", "[optim]", "[log]", "[law]"],
        };
        for section in sections {
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

/// A dry run tells the shapes and what memory each phase takes, and leaves nothing; a run tells what it took.
#[test]
fn memory_is_told_before_and_after() {
    let folder = tempfile::tempdir().unwrap();
    let said = train(folder.path(), &["--dry-run"]);
    assert_eq!(said.code, 0, "{}", said.err);
    for words in
        ["4 layers of 128", "1600 codes", "64 x 64 px = 8 x 8 = 64 tokens", "2 prompts of at most", "512 tokens drawn"]
    {
        assert!(said.out.contains(words), "no `{words}` in {}", said.out);
    }
    assert!(said.out.contains("peaks       rollout 0.") && !folder.path().join("runs").exists(), "{}", said.out);
    let plain = train(folder.path(), &["--set", "name=plain"]);
    let again = train(folder.path(), &["--set", "name=again", "--recompute-layers"]);
    assert!(plain.code == 0 && again.code == 0, "{}{}", plain.err, again.err);
    assert!(plain.err.contains("peak memory  rollout ") && plain.err.contains(", update "), "{}", plain.err);
    let weights =
        |name: &str| std::fs::read(folder.path().join(format!("runs/{name}/0/policy/model.safetensors"))).unwrap();
    assert!(weights("plain") == weights("again"), "layers made again give other numbers");
}

/// Adapters train in place of the weights and are kept in PEFT's format beside the merged policy.
#[test]
fn adapters_are_a_choice_of_the_configuration() {
    let folder = tempfile::tempdir().unwrap();
    let lora = "lora={ rank = 4, alpha = 8.0, targets = [\"q_proj\", \"v_proj\"] }";
    let said = train(folder.path(), &["--set", "name=t", "--set", lora]);
    assert_eq!(said.code, 0, "{}", said.err);
    for file in ["adapter/adapter_config.json", "adapter/adapter_model.safetensors", "policy/model.safetensors"] {
        assert!(folder.path().join("runs/t/0").join(file).exists(), "{file} is missing: {}", said.err);
    }
    let file = config("shapes_clip.toml");
    let wrong = "lora={ rank = 4, alpha = 8.0, targets = [\"w_proj\"] }";
    mistake(folder.path(), &["train", &file, "--set", wrong], &["unknown variant `w_proj`", "q_proj"]);
    let wrong = "lora={ rank = 4000, alpha = 8.0, targets = [\"q_proj\"] }";
    mistake(folder.path(), &["train", &file, "--set", wrong], &["rank is 4000"]);
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

/// Tokens that `generate` keeps are the picture: decoded again they give it, and encoded again nearly all of them.
#[test]
fn tokens_go_to_pixels_and_back() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(
        folder.path().join("prompts.jsonl"),
        "a photo of a red ring\n{\"tag\": \"x\", \"prompt\": \"a photo of a star\"}\n",
    )
    .unwrap();
    let args = ["generate", "--prompts", "prompts.jsonl", "-n", "3", "--grids", "--save-tokens", "--batch", "4"];
    let said = grpo(folder.path(), &args);
    assert_eq!(said.code, 0, "{}", said.err);
    assert!(said.err.contains("6 images in generated"), "{}", said.err);
    let tokens = std::fs::read_to_string(folder.path().join("generated/tokens.jsonl")).unwrap();
    let lines: Vec<serde_json::Value> = tokens.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((lines.len(), &lines[5]["prompt"]), (6, &"a photo of a star".into()));
    let sheet = image::open(folder.path().join("generated/001.png")).unwrap();
    assert_eq!((sheet.width(), sheet.height()), (128, 128));

    let said = grpo(folder.path(), &["detokenize", "generated/tokens.jsonl", "--out", "back"]);
    assert_eq!(said.code, 0, "{}", said.err);
    let bytes = |path: &str| std::fs::read(folder.path().join(path)).unwrap();
    assert_eq!(bytes("back/00004.png"), bytes("generated/001-01.png"));
    let said = grpo(folder.path(), &["tokenize", "back/00004.png"]);
    let again: serde_json::Value = serde_json::from_str(&said.out).unwrap();
    assert_eq!(again["grid"], serde_json::json!([8, 8]));
    let codes = |line: &serde_json::Value| line["codes"].as_array().unwrap().clone();
    let same = codes(&again).iter().zip(codes(&lines[4])).filter(|(a, b)| **a == *b).count();
    assert!(same >= 48, "{same} of 64 codes survive");

    std::fs::write(folder.path().join("bad.jsonl"), "{\"grid\": [8, 8], \"codes\": [1, 2]}\n").unwrap();
    mistake(folder.path(), &["detokenize", "bad.jsonl"], &["bad.jsonl: line 1", "2 codes", "8 x 8"]);
    std::fs::write(folder.path().join("bad.jsonl"), "{\"grid\": [1, 1], \"codes\": [99999]}\n").unwrap();
    mistake(folder.path(), &["detokenize", "bad.jsonl"], &["bad.jsonl: line 1", "code 99999"]);
    image::RgbImage::new(30, 64).save(folder.path().join("odd.png")).unwrap();
    mistake(folder.path(), &["tokenize", "odd.png"], &["odd.png", "30 columns", "multiples of 8"]);
    std::fs::write(folder.path().join("prompts.jsonl"), "{\"text\": 1}\n").unwrap();
    mistake(folder.path(), &["generate", "--prompts", "prompts.jsonl"], &["line 1", "\"prompt\""]);
}

/// Speculative decoding says how many passes it took; the other laws reach the command.
#[test]
fn a_window_takes_fewer_passes() {
    let folder = tempfile::tempdir().unwrap();
    let args = ["generate", "--prompt", "a photo of a star", "-n", "2", "--window", "16", "--json", "--min-p", "0.01"];
    let said = grpo(folder.path(), &args);
    assert_eq!(said.code, 0, "{}", said.err);
    assert!(said.err.contains("passes of the decoder for 64 tokens"), "{}", said.err);
    let line: serde_json::Value = serde_json::from_str(said.out.lines().next().unwrap()).unwrap();
    assert!(line["passes"].as_u64().unwrap() < 40, "{line}");
    let said = grpo(folder.path(), &["generate", "--prompt", "a star", "-n", "1", "--published", "--greedy"]);
    assert_eq!(said.code, 0, "{}", said.err);
    for (flag, value, words) in [
        ("--window", "0", &["--window", "full"][..]),
        ("--temperature", "0", &["temperature is 0"]),
        ("--size", "12q", &["HEIGHTxWIDTH"]),
        ("-n", "0", &["0 is not in 1.."]),
    ] {
        let mut args = vec!["generate", "--prompt", "x", flag, value];
        args.extend((flag == "--size").then_some(["--policy", "p"]).into_iter().flatten());
        mistake(folder.path(), &args, words);
    }
}

#[test]
fn likelihoods_are_printed_with_their_error() {
    let folder = tempfile::tempdir().unwrap();
    let run = |more: &[&str]| {
        let args: Vec<&str> = ["eval", "nll", "--json"].iter().chain(more).copied().collect();
        let said = grpo(folder.path(), &args);
        assert_eq!(said.code, 0, "{}", said.err);
        serde_json::from_str::<serde_json::Value>(&said.out).unwrap()
    };
    let (visual, full) = (run(&[]), run(&["--full-vocabulary"]));
    let nll = |summary: &serde_json::Value| summary["nll"].as_f64().unwrap();
    assert_eq!((&visual["images"], &visual["tokens_per_image"]), (&180.into(), &64.into()));
    // A uniform law over 1,600 codes costs 7.38 nats; text ids take a little of the mass.
    assert!(
        nll(&visual) < 4.0 && nll(&full) >= nll(&visual) - 1e-6 && nll(&full) < nll(&visual) + 0.1,
        "{visual} {full}"
    );
    let said = grpo(folder.path(), &["generate", "--prompt", "a photo of a star", "-n", "2", "--save-tokens"]);
    assert_eq!(said.code, 0);
    let of_file = run(&["--data", "generated/tokens.jsonl"]);
    assert_eq!(of_file["images"], 2);
    std::fs::write(folder.path().join("bad.json"), "[{\"caption\": \"x\"}]").unwrap();
    mistake(folder.path(), &["eval", "nll", "--data", "bad.json"], &["bad.json: entry 1", "image_path"]);
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
fn a_language_model_becomes_a_checkpoint_that_generate_goes_on_from() {
    let folder = tempfile::tempdir().unwrap();
    let model = config("../policies/tests/golden/qwen2_resize/untied");
    let cosmos = config("../policies/models/shapes/cosmos");
    let import = ["import", "qwen", "--from", &model, "--cosmos", &cosmos, "--out", "made", "--size", "64", "--bf16"];
    mistake(folder.path(), &["import", "qwen", "--from", "absent", "--cosmos", &cosmos, "--out", "made"], &["absent/"]);
    let said = grpo(folder.path(), &import);
    assert_eq!(said.code, 0, "{}", said.err);
    // 303 ids of text, 7 special tokens, 1,600 codes.
    assert!(said.err.contains("made: 1910 ids, the last 1600 of them codes"), "{}", said.err);
    mistake(folder.path(), &import, &["made already holds a model", "--out"]);

    std::fs::write(folder.path().join("made/generation_config.json"), r#"{"repetition_penalty": 1.1}"#).unwrap();
    let said = grpo(folder.path(), &["generate", "--policy", "made", "--prompt", "a photo of a star", "-n", "1"]);
    assert_eq!(said.code, 0, "{}", said.err);
    assert!(said.err.contains("warning: generation_config.json has repetition_penalty 1.1"), "{}", said.err);
    assert!(folder.path().join("generated/000-00.png").exists());
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
        &["broken.png", "PNG, JPEG or WebP"],
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

#[test]
fn a_published_tokenizer_is_imported_from_whatever_it_is_published_as() {
    let folder = tempfile::tempdir().unwrap();
    let published = format!("{}/../policies/tests/golden/cosmos_nvidia", env!("CARGO_MANIFEST_DIR"));
    let [encoder, decoder, model] =
        ["encoder.jit", "decoder.jit", "model.pt"].map(|name| format!("{published}/{name}"));
    let weights = |out: &str| std::fs::read(folder.path().join(out).join("model.safetensors")).unwrap();
    let import = |from: &[&str], out: &str| {
        let args: Vec<&str> = ["import", "cosmos", "--out", out].iter().chain(from).copied().collect();
        let said = grpo(folder.path(), &args);
        assert_eq!((said.code, said.out.as_str()), (0, ""), "{}", said.err);
        assert!(said.err.contains("read 322 tensors, 399078 parameters") && said.err.contains(out), "{}", said.err);
        weights(out)
    };
    let whole = import(&[&published], "folder");
    assert!(import(&["--encoder", &encoder, "--decoder", &decoder], "parts") == whole);
    assert!(import(&["--model", &model], "model") == whole);
    let half = import(&["--model", &model, "--bf16"], "bf16");
    assert!(half.len() < whole.len() * 2 / 3, "{} {}", half.len(), whole.len());

    let wrong = |from: &[&str], words: &[&str]| {
        let args: Vec<&str> = ["import", "cosmos", "--out", "other"].iter().chain(from).copied().collect();
        mistake(folder.path(), &args, words);
    };
    wrong(&[], &["give one of", "--model"]);
    wrong(&["--encoder", &encoder], &["--encoder and --decoder"]);
    wrong(&[&published, "--model", &model], &["give one of"]);
    wrong(&["."], &["holds neither encoder.jit"]);
    wrong(&["--model", "absent.pt"], &["absent.pt", "torch.save"]);
    wrong(&["--model", &encoder], &["tensor `post_quant_conv.conv3d.weight`", "missing"]);
    std::fs::write(folder.path().join("cut.pt"), &std::fs::read(&model).unwrap()[..1000]).unwrap();
    wrong(&["--model", "cut.pt"], &["cut.pt", "cut short"]);
    mistake(folder.path(), &["import", "cosmos", &published, "--out", "parts"], &["already holds a config.json"]);
    assert!(!folder.path().join("other").exists(), "a mistake left a folder behind");
}
