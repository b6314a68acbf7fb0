//! Rewards as a user names them: `grpo score`, scorers by flag, arithmetic and failed scores in a configuration.

#![expect(clippy::unwrap_used, reason = "a test and its helpers fail by panicking")]

mod said;

use std::path::Path;

use image::{Rgb, RgbImage};
use said::{Said, grpo};
use serde_json::Value;

/// `a.png`, `b.png` and `c.png`: dark, half and light.
fn pictures() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("images")).unwrap();
    for (name, level) in [("a", 0), ("b", 102), ("c", 255)] {
        let path = folder.path().join(format!("images/{name}.png"));
        RgbImage::from_pixel(64, 64, Rgb([level; 3])).save(path).unwrap();
    }
    folder
}

/// A scorer in Python that gives half of an image's brightness, and fails on black ones and on every so many-th.
const SCRIPT: &str = "
import sys
sys.path.insert(0, sys.argv[1])
open('starts', 'a').write('started ')
every, n_seen = int((sys.argv[2:] or [0])[0]), 0
from grpo_scorer import serve
import zlib, struct
def pixels(png):
    data, at = b'', 8
    while at < len(png):
        length, = struct.unpack('>I', png[at:at + 4])
        if png[at + 4:at + 8] == b'IDAT': data += png[at + 8:at + 8 + length]
        at += length + 12
    return zlib.decompress(data)
def score(prompt, image, columns):
    global n_seen
    n_seen += 1
    if every and n_seen % every == 0: raise ValueError('tired')
    png = image if isinstance(image, bytes) else None
    if png is None:
        level = image.convert('RGB').getpixel((0, 0))[0]
    else:
        level = pixels(png)[1]
    if level == 0: raise ValueError('it is black')
    return level / 510
serve(score)
";

fn scorer(folder: &Path) -> String {
    std::fs::write(folder.join("half.py"), SCRIPT).unwrap();
    let helper = Path::new(env!("CARGO_MANIFEST_DIR")).join("../rewards/python");
    format!("half=exec:python3 half.py {}", helper.display())
}

fn lines(said: &Said) -> Vec<Value> {
    said.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn every_image_is_scored_against_every_prompt() {
    let folder = pictures();
    let rewards = ["score", "--reward", "brightness", "--reward", "clip", "--json", "images"];
    let prompts = ["--prompt", "a red star", "--prompt", "two rings"];
    let said = grpo(folder.path(), &[&rewards[..], &prompts].concat());
    assert_eq!(said.code, 0, "{}", said.err);
    let crossed = lines(&said);
    assert_eq!(crossed.len(), 6);
    let of =
        |row: &Value| (row["image"].clone(), row["prompt"].clone(), row["rewards"]["brightness"].as_f64().unwrap());
    assert_eq!(of(&crossed[3]), ("images/b.png".into(), "two rings".into(), f64::from(0.4f32)));
    // Images at a time change nothing.
    let one_by_one = grpo(folder.path(), &[&rewards[..], &prompts, &["--batch", "1"]].concat());
    let near = |a: &Value, b: &Value| {
        let clip = |row: &Value| row["rewards"]["clip"].as_f64().unwrap();
        of(a) == of(b) && (clip(a) - clip(b)).abs() < 1e-5
    };
    assert!(crossed.iter().zip(lines(&one_by_one)).all(|(a, b)| near(a, &b)));
    std::fs::write(folder.path().join("p.txt"), "a red star\ntwo rings\n{\"prompt\": \"a square\"}\n").unwrap();
    let paired = grpo(folder.path(), &[&rewards[..], &["--prompts", "p.txt", "--paired"]].concat());
    let paired = lines(&paired);
    let expected = [("images/a.png", "a red star"), ("images/b.png", "two rings"), ("images/c.png", "a square")];
    assert!(paired.len() == 3 && near(&paired[1], &crossed[3]));
    assert!(paired.iter().zip(expected).all(|(row, (i, p))| row["image"] == i && row["prompt"] == p));
    let uneven = grpo(folder.path(), &[&rewards[..], &prompts, &["--paired"]].concat());
    assert!(uneven.code == 2 && uneven.err.contains("3 images and 2 prompts"), "{}", uneven.err);
}

#[test]
fn what_cannot_be_scored_is_named_and_the_rest_is_scored() {
    let folder = pictures();
    let half = scorer(folder.path());
    std::fs::write(folder.path().join("images/d.png"), "no image").unwrap();
    let args = ["score", "--reward", "half", "--scorer", &half, "--prompt", "x", "images"];
    let said = grpo(folder.path(), &[&args[..], &["--json"]].concat());
    assert!(said.code == 2 && said.err.contains("2 scores are missing"), "{}", said.err);
    let rows = lines(&said);
    let failed = |row: &Value| row["failed"]["half"].as_str().unwrap_or_default().to_string();
    assert!(failed(&rows[0]).contains("reward `half`") && failed(&rows[0]).contains("it is black"), "{}", rows[0]);
    let half = |row: &Value| row["rewards"]["half"].as_f64().map(|score| score as f32);
    assert_eq!((half(&rows[1]), half(&rows[2])), (Some(0.2), Some(0.5)));
    assert!(failed(&rows[3]).contains("images/d.png"), "{}", rows[3]);
    let table = grpo(folder.path(), &args);
    let shown: Vec<&str> = table.out.lines().map(|line| line.split_whitespace().next().unwrap()).collect();
    assert_eq!(shown, ["half", "failed", "0.2000", "0.5000", "failed"], "{}", table.out);
    // Another reward's scores stay.
    let both = [&args[..], &["--reward", "brightness"]].concat();
    let rows = lines(&grpo(folder.path(), &[&both[..], &["--json"]].concat()));
    let cells = |row: &Value| (failed(row).is_empty(), row["rewards"]["brightness"].as_f64().map(|score| score as f32));
    assert_eq!([cells(&rows[0]), cells(&rows[1])], [(false, Some(0.0)), (true, Some(0.4))], "{}", rows[0]);
    let table = grpo(folder.path(), &both).out;
    let first: Vec<&str> = table.lines().nth(1).unwrap().split_whitespace().take(2).collect();
    assert_eq!(first, ["failed", "0.0000"], "{table}");
}

#[test]
fn a_run_is_trained_under_scorers_arithmetic_and_a_rule_for_failures() {
    let folder = pictures();
    let half = format!("{} 5", scorer(folder.path()));
    let file = format!("{}/shapes_clip.toml", env!("CARGO_MANIFEST_DIR"));
    std::fs::write(folder.path().join("p.txt"), "a red star\n{\"prompt\": \"two rings\", \"n\": 2}\n").unwrap();
    let rewards = "rewards=[{ given = { name = \"half\", counts = { weight = 2.0, changes = [{ clip = { low = 0.0, \
                   high = 0.3 } }, { affine = { scale = 10.0 } }], gate = { reward = { brightness = {} }, at_least = \
                   0.1, otherwise = -1.0 } } } }, { joined = { name = \"both\", by = \"lowest\", of = [{ clip = {} }, \
                   { hps = {} }] } }, { clip = { gate = { reward = { brightness = {} }, at_least = 2.0, otherwise = \
                   -1.0 } } }]";
    let sets = [
        rewards,
        "name=r",
        "n_steps=1",
        "rollout.prompts_per_step=2",
        "rollout.group_size=4",
        "rollout.failed_scores.exclude={ max_share = 0.5 }",
        "held_out.rewards=[{ given = { name = \"half\" } }]",
        "held_out.samples_per_prompt=2",
        "objective.advantage={ combine = \"rank_then_sum\" }",
    ];
    let sets: Vec<&str> = sets.into_iter().flat_map(|set| ["--set", set]).collect();
    let flags = ["--scorer", &half, "--prompts", "p.txt", "--held-out-prompts", "p.txt"];
    let said = grpo(folder.path(), &[&["train", &file], &sets[..], &flags].concat());
    assert_eq!(said.code, 0, "{}", said.err);
    let metrics = std::fs::read_to_string(folder.path().join("runs/r/0/metrics.jsonl")).unwrap();
    let step = metrics.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let step = step.into_iter().find(|line| line.get("reward").is_some()).unwrap();
    // Every fifth picture, 4 of which were held out before.
    assert_eq!(step["excluded/samples"], 2.0);
    assert_eq!(step["rewards/half/failed"], 2.0);
    assert_eq!(step["rewards/clip/mean"], -1.0, "its gate is closed");
    // Of every sample: clipped at 0.3, times ten.
    assert!((step["rewards/half/mean"].as_f64().unwrap() - 3.0).abs() < 0.5, "{}", step["rewards/half/mean"]);
    assert!(step["rewards/both/mean"].as_f64().unwrap() < 1.0);
    assert!(metrics.contains("held_out/half/mean"));
    let starts = std::fs::read_to_string(folder.path().join("starts")).unwrap();
    assert_eq!(starts, "started ", "trained on and held out, it is started once");
    let again = |more: &[&str], scorer: &str, words: &[&str]| {
        let flags = ["--scorer", scorer, "--prompts", "p.txt", "--held-out-prompts", "p.txt", "--resume"];
        let said = grpo(folder.path(), &[&["train", &file], &sets[..], &flags, more].concat());
        assert!(said.code == 2 && words.iter().all(|word| said.err.contains(word)), "{more:?}: {}", said.err);
    };
    let other = rewards.replace("high = 0.3", "high = 0.4");
    again(&["--set", &other], &half, &["judges.json: the run's rewards were", "0.4", "start a new run"]);
    again(&[], &half.replace(" 5", " 6"), &["the run's scorers were"]);
    let held_out = ["--set", "held_out.rewards=[{ given = { name = \"half\" } }, { hps = {} }]"];
    again(&held_out, &half, &["the run's held-out rewards were"]);
    std::fs::write(folder.path().join("p.txt"), "a red star\n{\"prompt\": \"two rings\", \"n\": 3}\n").unwrap();
    again(&[], &half, &["prompts were \"2 prompts, crc32c"]);
}

#[test]
fn mistakes_about_scorers_are_named() {
    let folder = pictures();
    let check = |args: &[&str], words: &[&str]| {
        let said = grpo(folder.path(), &[&["score", "--prompt", "x", "images"], args].concat());
        assert!(said.code == 2 && !said.err.contains("panicked"), "{args:?}: {}", said.err);
        assert!(words.iter().all(|word| said.err.contains(word)), "{args:?}: {}", said.err);
    };
    check(&["--reward", "clop"], &["--reward clop", "--scorer clop=WHERE"]);
    check(&["--reward", "clip", "--scorer", "ocr=nowhere"], &["nothing asks for the scorer `ocr`", "--reward NAME"]);
    check(&["--reward", "clip", "--scorer", "clip"], &["give NAME=WHERE"]);
    check(&["--reward", "clip", "--scorer", "clip=nowhere"], &["nowhere", "reward.toml"]);
    check(&["--reward", "x", "--scorer", "x=exec:./no-such-program"], &["no-such-program"]);
    check(&["--reward", "x", "--scorer", "x=http://example.org/score"], &["example.org", "allow_remote"]);
    check(&["--reward", "x", "--scorer", "x=a", "--scorer", "x=b"], &["scorer `x` is given twice"]);
    check(&["--reward", "clip", "--scorer", "brightness=x"], &["that reward is built in"]);
    check(&["--reward", "clip", "--provider", "cuda"], &["--provider has no say"]);
    check(&["--reward", "clip", "--provider", "tpu"], &["cpu, openvino, openvino-bf16, cuda or cuda:N"]);
    let hps = format!("clip={}/../rewards/models/hps", env!("CARGO_MANIFEST_DIR"));
    check(&["--reward", "clip", "--scorer", &hps], &["named `hps`, not `clip`"]);
    std::fs::write(folder.path().join("s.toml"), "[[scorers]]\nhttp = { name = \"x\", address = \"y\" }\n").unwrap();
    check(&["--reward", "x", "--scorers-file", "s.toml"], &["s.toml", "unknown field `address`"]);
}
