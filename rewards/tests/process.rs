//! A reward in a program of one's own, against programs that misbehave in every way a program can.

#![cfg(unix)]
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test's helpers may fail the test")]

mod asked;

use std::fs;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use grpo::testing::check_reward;
use grpo::{Reward, RewardSet};
use grpo_rewards::geneval::{Detection, Detector};
use grpo_rewards::process::{ProcessConfig, ProcessDetector, ProcessLimits, ProcessReward};
use tempfile::TempDir;

use asked::{N_ROWS, batch, check_failures, rows};

/// Reads questions without the helper that is shipped, and does `kind` to the answer that holds a picture of red `bad`.
const SPOILER: &str = r#"
import json, os, sys, threading, zlib

def red(png):
    at, data = 8, b""
    while at < len(png):
        n = int.from_bytes(png[at:at + 4], "big")
        if png[at + 4:at + 8] == b"IDAT":
            data += png[at + 8:at + 8 + n]
        at += 12 + n
    return zlib.decompress(data)[1]  # the first pixel of the first line is the same under every filter

kind, bad = sys.argv[1], int(sys.argv[2])
while line := sys.stdin.buffer.readline():
    header = json.loads(line)
    reds = [red(sys.stdin.buffer.read(n)) for n in header["images"]]
    answer = {"id": header["id"], "scores": [r * 0.375 - 3 for r in reds], "model": "reds", "version": 1}
    if bad in reds:
        at = reds.index(bad)
        if kind == "null":
            answer["scores"][at] = None
        elif kind == "nan":
            answer["scores"][at] = float("nan")
        elif kind == "exception":
            answer["errors"] = ["ValueError: no face" if i == at else None for i in range(len(reds))]
        elif kind == "short":
            answer["scores"].pop()
        elif kind == "death":
            print("loading", "model is gone", sep="\n", file=sys.stderr)
            sys.exit(3)
        elif kind == "kill":
            os.kill(os.getpid(), 9)
        elif kind == "garbage":
            print("scoring now")
        elif kind == "noise":
            print("x" * 5000)
        elif kind == "cut":
            sys.stdout.write(json.dumps(answer)[:20])
            sys.exit(0)
        elif kind == "no id":
            del answer["id"]
        elif kind == "twice":
            print(json.dumps(answer))
        elif kind == "version":
            answer["version"] = 2
        elif kind in ("die once", "hang once") and not os.path.exists(sys.argv[3]):
            open(sys.argv[3], "w").close()
            if kind == "die once":
                sys.exit(1)
            threading.Event().wait()
    print(json.dumps(answer), flush=True)
"#;

fn expected(row: usize) -> f32 {
    10.0 * row as f32 * 0.375 - 3.0
}

/// A folder with a script of this text.
fn script(text: &str) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("reward.py");
    fs::write(&path, text).unwrap();
    (folder, path)
}

/// Two pictures a question; the first answer may take long on a busy machine.
fn limits() -> ProcessLimits {
    let images_per_request = NonZeroUsize::new(2).unwrap();
    ProcessLimits { images_per_request, max_answer_bytes: 4000, ..ProcessLimits::default() }
}

/// The interpreter behind `python3`, which may be a launcher that takes longer to start than the interpreter itself.
fn python() -> &'static str {
    static PYTHON: OnceLock<String> = OnceLock::new();
    PYTHON.get_or_init(|| {
        let told = Command::new("python3").args(["-S", "-c", "import sys; print(sys.executable)"]).output().unwrap();
        String::from_utf8(told.stdout).unwrap().trim().into()
    })
}

fn config(script: &Path, arguments: &[&str], limits: ProcessLimits) -> ProcessConfig {
    // Without site packages Python starts several times faster.
    let command = [python(), "-S", script.to_str().unwrap()];
    let command = command.into_iter().chain(arguments.iter().copied()).map(String::from).collect();
    ProcessConfig { name: "mine".into(), command, limits }
}

fn reward(script: &Path, arguments: &[&str], limits: ProcessLimits) -> ProcessReward {
    ProcessReward::new(config(script, arguments, limits)).unwrap()
}

/// One kind of failure at the first, a middle and the last row.
fn check_kind(kind: &str, message: &str, fails_alone: bool, limits: ProcessLimits) {
    let (_folder, script) = script(SPOILER);
    let check = |bad: usize| {
        let reward = reward(&script, &[kind, &(10 * bad).to_string()], limits);
        let failed = if fails_alone { vec![bad] } else { vec![bad / 2 * 2, bad / 2 * 2 + 1] };
        check_failures(&reward, expected, &failed, message);
    };
    std::thread::scope(|scope| [0, 2, 5].into_iter().for_each(|bad| drop(scope.spawn(move || check(bad)))));
}

#[test]
fn what_goes_wrong_with_a_sample_fails_it_alone() {
    check_kind("null", "was given no score (null)", true, limits());
    check_kind("nan", "scored NaN", true, limits());
    check_kind("exception", "ValueError: no face", true, limits());
}

#[test]
fn what_goes_wrong_with_a_question_fails_its_samples() {
    check_kind("short", "returned 1 scores for 2 images", false, limits());
    check_kind("garbage", "it starts with `scoring now`", false, limits());
    check_kind(
        "noise",
        "printed a line of more than 4000 bytes (max_answer_bytes) that starts with `xxx",
        false,
        limits(),
    );
    check_kind("no id", "answered without an id", false, limits());
}

#[test]
fn a_process_that_dies_is_replaced_once_and_its_end_told() {
    let told = "ended without an answer (exit status: 3); the last it said: model is gone; it was started again once";
    check_kind("death", told, false, limits());
    check_kind(
        "kill",
        "ended without an answer (signal: 9 (SIGKILL)) and said nothing on standard error",
        false,
        limits(),
    );
    check_kind("cut", "ended without an answer (exit status: 0)", false, limits());
}

#[test]
fn a_program_that_never_answers_is_started_twice() {
    let (_folder, script) = script("import threading\nthreading.Event().wait()");
    let mut limits = limits();
    (limits.timeout_ms, limits.start_timeout_ms) = (20, 80);
    let reward = reward(&script, &[], limits);
    let told = "did not answer within 100 ms (raise start_timeout_ms); it was started again once";
    check_failures(&reward, expected, &[0, 1, 2, 3, 4, 5], told);
}

#[test]
fn a_process_that_fails_once_costs_no_sample() {
    for kind in ["die once", "hang once"] {
        let (folder, script) = script(SPOILER);
        let mark = folder.path().join("failed");
        let mut limits = limits();
        // A new process has its time to start, so that a busy machine makes one more, and no other score.
        limits.timeout_ms = 200;
        let reward = reward(&script, &[kind, "20", mark.to_str().unwrap()], limits);
        let rows = rows(N_ROWS);
        let wanted: Vec<f32> = (0..N_ROWS).map(expected).collect();
        assert_eq!(reward.score_batch(&batch(&rows)).unwrap(), wanted);
        assert!(mark.exists(), "{kind}: it did fail");
        assert_eq!(reward.scorer().unwrap(), "model \"reds\", version 1");
    }
}

#[test]
fn an_answer_too_many_is_not_taken_for_the_next() {
    let (_folder, script) = script(SPOILER);
    let reward = reward(&script, &["twice", "0"], limits());
    let rows = rows(N_ROWS);
    let each = reward.score_each(&batch(&rows));
    // Rows 0 and 1 have their scores; the second copy comes where the answer about rows 2 and 3 is due.
    for (row, verdict) in each.iter().enumerate() {
        match verdict {
            Ok(score) => assert!(*score == expected(row) && ![2, 3].contains(&row), "row {row}"),
            Err(error) => assert!(error.to_string().contains("answered question 0 where 1 was asked"), "{error}"),
        }
    }
}

#[test]
fn another_model_is_an_error_that_names_both() {
    let (_folder, script) = script(SPOILER);
    let reward = reward(&script, &["version", "40"], limits());
    check_failures(&reward, expected, &[4, 5], r#"was model "reds", version 1, and is now model "reds", version 2"#);
}

#[test]
fn the_message_names_reward_row_and_program() {
    let (_folder, script) = script(SPOILER);
    let set = RewardSet::new().with(reward(&script, &["short", "20"], limits()), 1.0).unwrap();
    let error = set.score(&batch(&rows(4))).unwrap_err().to_string();
    assert!(
        error.starts_with(&format!("reward `mine`: row 2: `{} -S ", python()))
            && error.contains("reward.py short 20` "),
        "{error}"
    );
}

#[test]
fn several_processes_and_threads_keep_rows_in_place() {
    let (_folder, script) = script(SPOILER);
    let mut limits = limits();
    limits.workers = NonZeroUsize::new(3).unwrap();
    let reward = reward(&script, &["none", "0"], limits);
    let rows = rows(20);
    let wanted: Vec<f32> = (0..20).map(expected).collect();
    std::thread::scope(|scope| {
        let threads = [(); 2].map(|()| scope.spawn(|| reward.score_batch(&batch(&rows)).unwrap()));
        threads.into_iter().for_each(|thread| assert_eq!(thread.join().unwrap(), wanted));
    });
    assert!(reward.score_batch(&[]).unwrap().is_empty());
    check_reward(&reward, &batch(&rows)).unwrap();
}

#[test]
fn a_program_that_is_not_there_is_an_error_at_once() {
    let message = |command: &[&str]| {
        let command = command.iter().map(ToString::to_string).collect();
        let config = ProcessConfig { name: "mine".into(), command, limits: ProcessLimits::default() };
        ProcessReward::new(config).unwrap_err().to_string()
    };
    let missing = message(&["no-such-program-of-grpo", "x"]);
    assert!(missing.starts_with("reward `mine`: cannot start `no-such-program-of-grpo`: "), "{missing}");
    assert!(message(&[]).contains("needs a name and a command"));
}

/// A script that uses the helper of `rewards/python`.
fn with_helper(text: &str) -> (TempDir, PathBuf) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("python");
    script(&format!("import sys\nsys.path.insert(0, {folder:?})\nfrom grpo_scorer import *\n{text}"))
}

/// Each row's score, or how its error starts.
fn check_rows(reward: &ProcessReward, expected: &[Result<f32, &str>]) {
    let rows = rows(expected.len());
    let each = reward.score_each(&batch(&rows));
    assert_eq!(each.len(), expected.len());
    for (row, (verdict, expected)) in each.iter().zip(expected).enumerate() {
        match (verdict, expected) {
            (Ok(score), Ok(expected)) => assert_eq!(score, expected, "row {row}"),
            (Err(error), Err(expected)) => {
                assert!(error.to_string().starts_with(expected), "row {row}: {error} is not {expected}");
            }
            (verdict, expected) => panic!("row {row}: {verdict:?} is not {expected:?}"),
        }
    }
}

/// Whatever is no number, as a score or in the place of one in a list.
const ODD_SCORES: &str = r#"
class Truth:  # as numpy's and torch's are
    dtype = "torch.bool"
    def __float__(self):
        return 1.0
    def __repr__(self):
        return "yes"

def odd(row):
    return {1: None, 2: "0.5", 3: float("inf"), 4: [], 5: True, 6: b"1", 7: Truth(), 8: 10**400}.get(row, row * 3.75 - 3)
"#;

const ODD_EXPECTED: [Result<f32, &str>; 10] = [
    Ok(-3.0),
    Err("was given no score (null)"),
    Err("TypeError: scored '0.5'; return a number"),
    Err("scored Infinity"),
    Err("TypeError: float() argument must be"),
    Err("TypeError: scored True; return a number"),
    Err("TypeError: scored b'1'; return a number"),
    Err("TypeError: scored yes; return a number"),
    Err("OverflowError: int too large to convert to float"),
    Ok(30.75),
];

#[test]
fn the_helper_makes_a_function_a_reward() {
    let (_folder, script) = with_helper(&format!(
        r#"{ODD_SCORES}
def score(prompt, image, columns):
    print("a line that must not be taken for an answer")
    assert image.size == (9, 5) if hasattr(image, "size") else image.startswith(b"\x89PNG")
    assert prompt == f"prompt {{columns['row']}}"
    if columns["row"] == 10:
        raise OSError("no caf\udce9.png")  # as Python reads a file name that is no UTF-8
    if columns["row"] == 11:
        raise ValueError("x" * 10**6)
    return odd(columns["row"])

serve(score, model="mine", version="1")
"#
    ));
    let reward = reward(&script, &[], limits());
    let long = format!("ValueError: {}", "x".repeat(100));
    check_rows(&reward, &[&ODD_EXPECTED[..], &[Err("OSError: no caf?.png"), Err(&long)]].concat());
    assert_eq!(reward.scorer().unwrap(), "model \"mine\", version \"1\"");
}

#[test]
fn the_helper_takes_a_function_of_lists() {
    let (_folder, script) = with_helper(&format!(
        r#"{ODD_SCORES}
def scores(prompts, images, columns):
    assert len(prompts) == len(images) == len(columns)
    rows = [column["row"] for column in columns]
    if 10 in rows:
        raise RuntimeError("out of memory")
    return [odd(row) for row in rows] + [0.5] * (12 in rows)

serve(scores, batch=True)
"#
    ));
    let lost = [Err("RuntimeError: out of memory"); 2];
    let text: &str = &format!("`{} -S {}` returned 3 scores for 2 images", python(), script.display());
    check_rows(&reward(&script, &[], limits()), &[&ODD_EXPECTED[..], &lost, &[Err(text); 2]].concat());
}

#[test]
fn the_helper_makes_a_function_a_detector() {
    let (_folder, script) = with_helper(
        r#"
cat = {"class": "cat", "score": 0.5, "bbox": [1, 2, 3, 4], "color": "red"}
answers = iter([
    lambda: (cat for _ in range(2)), lambda: [], lambda: None, lambda: 1 / 0, lambda: [cat | {"score": float("nan")}],
    lambda: [cat | {"class": "caf\udce9"}], lambda: [{"class": "cat"}], lambda: cat, lambda: [cat | {"mask": {1}}], lambda: [cat],
])

def detect(image):
    print("a line that must not be taken for an answer")
    assert image.size == (9, 5) if hasattr(image, "size") else image.startswith(b"\x89PNG")
    return next(answers)()

serve_detector(detect, model="cats", version=2)
"#,
    );
    let detector = ProcessDetector::new(config(&script, &[], limits())).unwrap();
    assert_eq!(detector.scorer(), None);
    let image = &rows(1)[0].1;
    let cat = Detection::new("cat", 0.5, [1.0, 2.0, 3.0, 4.0]).with_color("red");
    assert_eq!(detector.detect(image).unwrap(), [cat.clone(), cat.clone()]);
    assert_eq!(detector.detect(image).unwrap(), []);
    let expected = [
        "TypeError: 'NoneType' object is not iterable",
        "ZeroDivisionError: division by zero",
        "\"NaN\"",
        "UnicodeEncodeError: ",
        "missing field `score`",
        "expected struct Found",
        "TypeError: Object of type set is not JSON serializable",
    ];
    for expected in expected {
        let error = detector.detect(image).unwrap_err().to_string();
        assert!(error.contains(expected), "{error} lacks {expected}");
    }
    assert_eq!(detector.detect(image).unwrap(), [cat]);
    assert_eq!(detector.scorer().unwrap(), "model \"cats\", version 2");
}

#[test]
fn a_detector_whose_answer_is_none_is_an_error_and_never_nothing_found() {
    let answers = [
        (r#"{"id": id, "detections": [None]}"#, "has no detections (null)"),
        (r#"{"id": id, "detections": []}"#, "returned 0 detections for 1 images"),
        (r#"{"id": id, "detections": [[], []]}"#, "returned 2 detections for 1 images"),
        (r#"{"id": id, "detections": None}"#, "answered without `detections`"),
        (r#"{"id": id, "scores": [0.5]}"#, "answered without `detections`"),
        (r#"{"id": id, "scores": [0.5], "detections": [[]]}"#, "answered with scores and detections"),
        (r#"{"id": id + 1, "detections": [[]]}"#, "answered question 1 where 0 was asked"),
        (r#"{"id": id, "detections": [[]], "errors": ["late"]}"#, "late"),
    ];
    for (answer, expected) in answers {
        let (_folder, script) = script(&format!(
            "import json, sys\nwhile line := sys.stdin.buffer.readline():\n    header = json.loads(line)\n    \
             sys.stdin.buffer.read(sum(header['images']))\n    id = header['id']\n    print(json.dumps({answer}), flush=True)\n"
        ));
        let detector = ProcessDetector::new(config(&script, &[], limits())).unwrap();
        let error = detector.detect(&rows(1)[0].1).unwrap_err().to_string();
        assert!(error.contains(expected), "{error} lacks {expected}");
    }
}

/// Whether a process runs; one that has ended and waits for its parent does not.
#[cfg(target_os = "linux")]
fn runs(process: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().is_some_and(|state| !state.is_empty() && !state.starts_with('Z'))
}

/// Starts a program of its own, writes both numbers to a file, and judges for ever where a second file is named.
#[cfg(target_os = "linux")]
const PARENT: &str = r#"
import os, subprocess, threading
child = subprocess.Popen(["sleep", "600"])
with open(sys.argv[1] + ".part", "w") as pids:
    pids.write(f"{os.getpid()} {child.pid}")
os.rename(sys.argv[1] + ".part", sys.argv[1])
serve(lambda prompt, image, columns: 1.0 if len(sys.argv) < 3 else threading.Event().wait())
"#;

/// Signals are on their way, and processes of another parent are not ours to wait for.
#[cfg(target_os = "linux")]
fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < until, "{what}: not within a minute");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[cfg(target_os = "linux")]
#[test]
fn nothing_that_was_started_outlives_the_reward() {
    let (folder, script) = with_helper(PARENT);
    let pids = folder.path().join("pids");
    let reward = reward(&script, &[pids.to_str().unwrap()], limits());
    assert_eq!(reward.score_batch(&batch(&rows(1))).unwrap(), [1.0]);
    let pids = fs::read_to_string(pids).unwrap();
    assert!(pids.split(' ').count() == 2 && pids.split(' ').all(runs), "{pids}");
    drop(reward);
    wait_until(&format!("{pids} have ended"), || !pids.split(' ').any(runs));
}

/// Killed when dropped, so that a test that fails leaves nothing.
#[cfg(target_os = "linux")]
struct Run(Child);

#[cfg(target_os = "linux")]
impl Drop for Run {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(target_os = "linux")]
#[test]
fn nothing_that_was_started_outlives_the_run() {
    if let (Ok(script), Ok(pids)) = (std::env::var("GRPO_TEST_SCRIPT"), std::env::var("GRPO_TEST_PIDS")) {
        // The run, in a process of its own.
        let reward = reward(Path::new(&script), &[&pids, "for ever"], limits());
        let scores = reward.score_batch(&batch(&rows(1)));
        panic!("it was to be killed, and has {scores:?}");
    }
    // Not INT: whoever starts the tests in the background has them ignore it, and so do their children.
    for signal in ["TERM", "KILL"] {
        let (folder, script) = with_helper(PARENT);
        let pids = folder.path().join("pids");
        let mut run = Command::new(std::env::current_exe().unwrap());
        run.args(["--exact", "nothing_that_was_started_outlives_the_run"]).stdout(Stdio::null());
        run.env("GRPO_TEST_SCRIPT", &script).env("GRPO_TEST_PIDS", &pids);
        let mut run = Run(run.spawn().unwrap());
        wait_until("the scorer has started", || pids.exists());
        let pids = fs::read_to_string(pids).unwrap();
        assert!(pids.split(' ').count() == 2 && pids.split(' ').all(runs), "{pids}");
        let kill = Command::new("/bin/sh").args(["-c", &format!("kill -s {signal} {}", run.0.id())]).status();
        assert!(kill.unwrap().success());
        assert!(!run.0.wait().unwrap().success());
        wait_until(&format!("{pids} have ended after {signal}"), || !pids.split(' ').any(runs));
    }
}
