//! Ablations as a library: what is run, what is left alone, and what the report finds; with the toy policy, whose words have
//! three letters out of five.

#![expect(clippy::unwrap_used, reason = "a test and its helpers fail by panicking")]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use grpo::testing::ToyPolicy;
use grpo::{
    BoxError, Change, Changed, GroupSampler, GroupSize, Mixed, Prompt, Reward, RewardSet, Seed, TrainConfig, Trainer,
    held_out_seed, reward_fn,
};
use grpo_experiments::report::{Kind, OPTIMISED, Options, Pairing};
use grpo_experiments::{Ablation, Cell, Report};

/// The share of a letter in a word, for each prompt a little less or more.
fn letter(letter: char) -> impl Reward<String> {
    reward_fn(format!("letter_{letter}"), move |prompt: &Prompt, text: &String| {
        let share = text.matches(letter).count() as f32 / text.len() as f32;
        Ok(share + 0.01 * prompt.text.len() as f32)
    })
}

/// A number that depends on the word and says nothing of it.
fn chance() -> impl Reward<String> {
    reward_fn("chance", |prompt: &Prompt, text: &String| {
        Ok(Seed::new(0).named(&prompt.text).named(text).uniform() as f32)
    })
}

/// What an arm of these tests optimises.
#[derive(Clone, Copy, serde::Serialize)]
enum Optimises {
    A,
    B,
    Chance,
    Fails,
}

impl Optimises {
    fn rewards(self) -> grpo::Result<RewardSet<String>> {
        let fails = reward_fn("fails", |_: &Prompt, _: &String| Err::<f32, BoxError>("out of order".into()));
        match self {
            Self::A => RewardSet::new().with(letter('a'), 1.0),
            Self::B => RewardSet::new().with(letter('b'), 1.0),
            Self::Chance => RewardSet::new().with(chance(), 1.0),
            Self::Fails => RewardSet::new().with(fails, 1.0),
        }
    }
}

fn prompts(name: &str, n: usize) -> Vec<Prompt> {
    (0..n).map(|i| Prompt::new(format!("{name} {}", "x".repeat(i))).with("tag", ["even", "odd"][i % 2])).collect()
}

fn make(cell: &Cell<'_, Optimises>, rate: f32) -> Result<(Trainer<ToyPolicy>, String), BoxError> {
    let mut config = TrainConfig { seed: cell.seed, n_steps: 24, ..Default::default() };
    config.rollout.prompts_per_step = 4;
    config.optim.lr = f64::from(rate);
    config.objective.kl_weight = 0.0;
    config.log.held_out_every = 8;
    config.log.checkpoint_every = 3;
    let rollout = GroupSampler::new(cell.arm.setting.rewards()?, config.rollout.group_size, 64);
    let watched = RewardSet::new().with(letter('a'), 1.0)?.with(letter('b'), 1.0)?.with(chance(), 1.0)?;
    let policy = ToyPolicy::new(5, 3)?;
    let trainer = Trainer::new(config, policy, None, Box::new(rollout), prompts("train", 8))?.hold_out_from(
        prompts("test", 20),
        watched,
        GroupSize::new(8)?,
        held_out_seed().fold(cell.seed),
    );
    Ok((trainer, config.to_toml()?))
}

fn ablation(arms: &[(&str, Optimises)]) -> Ablation<Optimises> {
    let empty = Ablation::new("toy", [0, 1, 2]).judged_by(["letter_a", "letter_b"]).evaluated_by("letter_b");
    arms.iter().fold(empty, |ablation, (name, optimises)| ablation.arm(*name, *optimises))
}

const ARMS: [(&str, Optimises); 3] = [("a", Optimises::A), ("b", Optimises::B), ("chance", Optimises::Chance)];

/// Runs it; gives how many runs were made.
fn run(root: &Path, ablation: &Ablation<Optimises>) -> usize {
    let made = AtomicUsize::new(0);
    let count = |cell: &Cell<'_, Optimises>| {
        made.fetch_add(1, Ordering::Relaxed);
        make(cell, 0.1)
    };
    ablation.run(root, count, |_, _, _| Ok(())).unwrap().check().unwrap();
    made.into_inner()
}

fn report(root: &Path) -> Report {
    Report::of(&[root.join("toy")], &Options { times: false, ..Options::default() }).unwrap()
}

/// The report with the folder of the runs taken out of it.
fn text(root: &Path) -> String {
    let facts = serde_json::to_string(report(root).facts()).unwrap();
    facts.replace(&root.display().to_string(), "ROOT")
}

#[test]
fn a_report_tells_a_better_policy_from_a_hacked_reward_and_both_from_chance() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(run(folder.path(), &ablation(&ARMS).compared_with("a")), 9);
    let report = report(folder.path());
    let facts = report.facts();
    assert_eq!(facts.pairing, Pairing::Shared, "all runs of a seed begin with the same samples");
    let names: Vec<&str> = facts.arms.iter().map(|arm| arm.name.as_str()).collect();
    assert_eq!(names, ["no RL", "a", "b", "chance"]);
    let kind = |name: &str| facts.arm(name).unwrap().verdict.as_ref().unwrap().kind;
    // A word has few letters: more of one is less of the other.
    assert_eq!((kind("a"), kind("b"), kind("chance")), (Kind::Hacked, Kind::Hacked, Kind::NoEffect));
    let effect = |arm: &str, reward: &str| facts.arm(arm).unwrap().effects[reward];
    assert!(effect("a", "letter_a").optimised && !effect("a", "letter_b").optimised);
    let (rise, against) = (effect("a", "letter_a").rise.unwrap(), effect("b", "letter_a").against.unwrap());
    assert!(rise.low > 0.0 && rise.mean < 0.8 && against.high < 0.0, "{rise:?} {against:?}");
    assert!(effect("a", "letter_a").against.is_none(), "the baseline is not compared with itself");
    // The start against the baseline is the baseline's rise, turned round.
    let start = effect("no RL", "letter_a");
    assert!(start.rise.is_none() && (start.against.unwrap().mean + rise.mean).abs() < 1e-12);
    assert!((start.end - effect("a", "letter_a").start).abs() < 1e-12);
    let groups: Vec<&str> = facts.arm("b").unwrap().groups.iter().map(|group| group.name.as_str()).collect();
    assert_eq!(groups, ["even", "odd"]);
    let means: f64 = facts.arm("b").unwrap().groups.iter().map(|group| group.effect.rise.unwrap().mean / 2.0).sum();
    assert!((means - effect("b", "letter_b").rise.unwrap().mean).abs() < 1e-12, "kinds of equal size");
    let training = &facts.arm("b").unwrap().training;
    assert_eq!(training.held_out["letter_b"].iter().map(|point| point.step).collect::<Vec<_>>(), [0, 8, 16, 24]);
    assert!(training.with_evaluation.unwrap().mean > 0.999, "it optimises the evaluation");
    assert_eq!(training.n_samples, 3 * 24 * 4 * 8);
    assert_eq!(training.shares["letter_b"].mean, 1.0);
}

#[test]
fn finished_runs_are_left_alone_and_several_at_a_time_are_the_same() {
    let [turns, threads] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    assert_eq!(run(turns.path(), &ablation(&ARMS)), 9);
    assert_eq!(run(threads.path(), &ablation(&ARMS).at_once(3)), 9);
    assert_eq!(text(turns.path()), text(threads.path()));
    let before = text(turns.path());
    assert_eq!(run(turns.path(), &ablation(&ARMS)), 0, "all were finished");
    assert_eq!(text(turns.path()), before);
    // A run without its mark is gone on with: here, after its last step.
    std::fs::remove_file(turns.path().join("toy/b/1/finished")).unwrap();
    assert_eq!(run(turns.path(), &ablation(&ARMS)), 1);
    assert_eq!(text(turns.path()), before);
}

#[test]
fn an_arm_that_has_changed_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    run(folder.path(), &ablation(&ARMS[..1]));
    let error = ablation(&[("a", Optimises::B)])
        .run(folder.path(), |cell: &Cell<'_, Optimises>| make(cell, 0.1), |_, _, _| Ok(()))
        .unwrap_err()
        .to_string();
    assert!(error.contains("arm `a` was run with its setting = \"A\" and is now \"B\""), "{error}");
}

#[test]
fn a_run_that_fails_stops_no_other_and_is_gone_on_with() {
    let folder = tempfile::tempdir().unwrap();
    let arms = [("a", Optimises::A), ("fails", Optimises::Fails)];
    let made = |cell: &Cell<'_, Optimises>| make(cell, 0.1);
    let finished = ablation(&arms).run(folder.path(), made, |_, _, _| Ok(())).unwrap();
    assert_eq!(finished.failed.len(), 3);
    let error = finished.check().unwrap_err().to_string();
    for part in ["3 runs failed (fails/0, fails/1, fails/2)", "out of order", "run the same command again"] {
        assert!(error.contains(part), "no `{part}` in {error}");
    }
    let report = report(folder.path());
    let facts = report.facts();
    let left_out: Vec<&str> = facts.left_out.iter().map(|left| left.run.as_str()).collect();
    assert_eq!(left_out, ["fails/0", "fails/1", "fails/2"]);
    assert!(facts.left_out[0].why.contains("its last evaluation is after step 0 of 24"), "{:?}", facts.left_out);
    assert!(facts.arm("a").is_some() && facts.arm("fails").is_none());
    let lines = report.verdicts();
    assert_eq!(lines.len(), 1, "{lines:?}");
}

#[test]
fn a_written_report_has_all_its_files() {
    let folder = tempfile::tempdir().unwrap();
    run(folder.path(), &ablation(&ARMS[..2]));
    let out = folder.path().join("report");
    let report = report(folder.path());
    report.write(&out).unwrap();
    let read = |name: &str| std::fs::read_to_string(out.join(name)).unwrap();
    let (html, markdown) = (read("report.html"), read("report.md"));
    let figures: Vec<&str> = markdown.split("](figures/").skip(1).filter_map(|rest| rest.split(')').next()).collect();
    assert!(figures.len() >= 10, "{figures:?}");
    for figure in &figures {
        assert!(out.join("figures").join(figure).exists(), "{figure} is missing");
    }
    assert_eq!(html.matches("<svg").count(), figures.len());
    assert!(html.contains(&format!("data-charts=\"{}\"", figures.len())));
    for outside in ["http://", "https://", "<script", "<link"] {
        assert!(!html.replace("http://www.w3.org/2000/svg", "").contains(outside), "the page needs {outside}");
    }
    assert!(markdown.contains("| prompt | no RL | a | b |"), "the texts stand side by side: {markdown}");
    let facts: serde_json::Value = serde_json::from_str(&read("report.json")).unwrap();
    assert_eq!(facts["arms"].as_array().unwrap().len(), 3);
    // The same runs give the same bytes.
    report.write(&folder.path().join("again")).unwrap();
    for name in ["report.html", "report.md", "report.json"] {
        assert!(read(name) == std::fs::read_to_string(folder.path().join("again").join(name)).unwrap(), "{name}");
    }
}

#[test]
fn what_cannot_be_compared_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let error = |folders: &[&Path], options: &Options| {
        let folders: Vec<_> = folders.iter().map(|path| path.to_path_buf()).collect();
        Report::of(&folders, options).err().unwrap().to_string()
    };
    let usual = Options::default();
    assert!(error(&[folder.path()], &usual).contains("there is no run in it"));
    assert!(error(&[&folder.path().join("nowhere")], &usual).contains("there is no run in it"));
    run(folder.path(), &ablation(&ARMS[..1]));
    let whole = folder.path().join("toy");
    let with = |set: fn(&mut Options)| {
        let mut options = Options::default();
        set(&mut options);
        error(&[&whole], &options)
    };
    assert!(with(|options| options.baseline = Some("x".into())).contains("--baseline x: there are a"));
    assert!(with(|options| options.evaluation = Some("x".into())).contains("there are letter_a, letter_b, chance"));
    assert!(error(&[&whole, &whole.join("a")], &usual).contains("has seed 0"));
    // A run that is damaged is left out, and the others are compared.
    let samples = whole.join("a/1/samples/held_out-00024/samples.jsonl");
    std::fs::write(&samples, "{\"prompt\": 3}\n").unwrap();
    let report = Report::of(&[&whole], &usual).unwrap();
    let left = &report.facts().left_out[0];
    assert!(left.run == "a/1" && left.why.contains("samples.jsonl: line 1"), "{left:?}");
    assert_eq!(report.facts().arm("a").unwrap().seeds, [0, 2]);
}

#[test]
fn runs_are_what_they_are_whoever_names_them() {
    let folder = tempfile::tempdir().unwrap();
    run(folder.path(), &ablation(&ARMS[..2]).compared_with("a"));
    // A further arm and seed, later: the arms that are there stay where they are.
    let more = ablation(&ARMS).compared_with("a").only(vec!["chance".into()]);
    assert_eq!(run(folder.path(), &more), 3);
    let whole = folder.path().join("toy");
    let facts = |folders: &[&Path]| Report::of(folders, &Options::default()).unwrap().facts().clone();
    let all = facts(&[&whole]);
    assert_eq!(all.arms.iter().map(|arm| arm.name.as_str()).collect::<Vec<_>>(), ["no RL", "a", "b", "chance"]);
    let named = facts(&[&whole.join("a"), &whole.join("b")]);
    assert_eq!((&named.judges, &named.baseline), (&all.judges, &all.baseline), "the plan is found above");
    assert_eq!(named.arm("b").unwrap().verdict, all.arm("b").unwrap().verdict);
    let apart = facts(&[&whole.join("a/0"), &whole.join("b/1")]);
    assert_eq!(apart.pairing, Pairing::Unknown);
    assert!(apart.arm("b").unwrap().effects["letter_a"].against.is_none(), "no seed in common");
    assert_eq!(apart.left_out, [], "what was not asked for is not missed");
    std::fs::remove_dir_all(whole.join("b/0")).unwrap();
    let left = facts(&[&whole]).left_out;
    assert!(left.iter().any(|left| left.run == "b/0" && left.why == "it has not begun"), "{left:?}");
    // A run that is put into another arm's folder.
    std::fs::rename(whole.join("b/1"), whole.join("a/7")).unwrap();
    let left = facts(&[&whole]).left_out;
    assert!(
        left.iter().any(|left| left.run == "a/7" && left.why.contains("rewards are not those of seed 0")),
        "{left:?}"
    );
}

/// Runs one arm whose reward is changed, with these held-out rewards; gives what is said of it.
fn changed(watched: impl Fn(&Arc<RewardSet<String>>) -> RewardSet<String> + Sync) -> Option<Kind> {
    let folder = tempfile::tempdir().unwrap();
    let make = |cell: &Cell<'_, &str>| {
        let mut config = TrainConfig { seed: cell.seed, n_steps: 12, ..Default::default() };
        config.rollout.prompts_per_step = 4;
        config.optim.lr = 0.1;
        config.objective.kl_weight = 0.0;
        let turned = Changed::new(letter('a'), vec![Change::Affine { scale: -1.0, offset: 0.0 }])?;
        let rewards = Arc::new(RewardSet::new().with(turned, 1.0)?);
        let rollout = GroupSampler::new(Arc::clone(&rewards), config.rollout.group_size, 64);
        let trainer = Trainer::new(config, ToyPolicy::new(5, 3)?, None, Box::new(rollout), prompts("train", 8))?
            .hold_out_from(prompts("test", 20), watched(&rewards), GroupSize::new(8)?, held_out_seed());
        Ok((trainer, config.to_toml()?))
    };
    let ablation = Ablation::new("toy", [0, 1, 2]).arm("turned", "letter a, turned round");
    ablation.run(folder.path(), make, |_, _, _| Ok(())).unwrap().check().unwrap();
    report(folder.path()).facts().arm("turned").unwrap().verdict.as_ref().map(|verdict| verdict.kind)
}

#[test]
fn a_verdict_rests_on_what_is_optimised_and_not_on_what_is_like_it() {
    let plain = |_: &Arc<RewardSet<String>>| RewardSet::new().with(letter('a'), 1.0).unwrap();
    assert_eq!(changed(plain), None, "the reward is watched without its changes");
    let mixed = |mix: &Arc<RewardSet<String>>| plain(mix).with(Mixed::new(OPTIMISED, Arc::clone(mix)), 1.0).unwrap();
    assert_eq!(changed(mixed), Some(Kind::NotJudged), "it rose, and the only judge has a say in it");
}
