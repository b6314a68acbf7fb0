//! The objective against TRL's own numbers: `tests/golden/trl.py` ran TRL, this reads what it gave.
//!
//! Inputs are f32 numbers, TRL ran in f64, and this library's f32 results are compared with those of TRL: every
//! combination of loss, scale and ratio level, every option, 200 cases each, gradients and logged metrics included.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test fails by panicking and prints its table"
)]

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use grpo::loss::{EntropyGate, Loss, Targets, correction_weights, entropy_gate, loss, row_weights};
use grpo::objective::{Beyond, Correction, Estimator, KlConfig, Level, LossType};
use grpo::{AdvantageConfig, Aggregation, Baseline, Combine, Objective, Scale, Scores, Surrogate, combined_advantages};
use ndarray::{Array1, Array2, ArrayView2};

const CASES: usize = 200;
const ROWS: usize = 8;
const TOKENS: usize = 6;
const TOLERANCE: f64 = 1e-6;

/// Everything TRL was given and gave, by name.
struct Golden(BTreeMap<String, Tensor>);

impl Golden {
    fn load() -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/trl.safetensors");
        Self(candle_core::safetensors::load(path, &Device::Cpu).unwrap().into_iter().collect())
    }

    /// One case of a tensor, flat.
    fn case(&self, name: &str, case: usize) -> Vec<f64> {
        let tensor = self.0.get(name).unwrap_or_else(|| panic!("trl.safetensors has no {name}"));
        assert_eq!(tensor.dim(0).unwrap(), CASES, "{name}");
        let row = tensor.narrow(0, case, 1).unwrap().flatten_all().unwrap();
        row.to_dtype(DType::F64).unwrap().to_vec1().unwrap()
    }

    fn table(&self, name: &str, case: usize) -> Array2<f32> {
        let values = self.case(name, case).into_iter().map(|x| x as f32).collect();
        Array2::from_shape_vec((ROWS, TOKENS), values).unwrap()
    }

    fn scores(&self, case: usize) -> (Vec<Vec<Scores>>, Vec<f32>) {
        let weights: Vec<f32> = self.case("in/weights", case).into_iter().map(|x| x as f32).collect();
        let values = self.case("in/rewards", case);
        let score = |row: &[f64]| Scores {
            values: row.iter().map(|x| (!x.is_nan()).then_some(*x as f32)).collect(),
            total: f32::NAN, // what advantages are made of is summed again in f64
        };
        let samples: Vec<Scores> = values.chunks(weights.len()).map(score).collect();
        (samples.chunks(ROWS / 2).map(<[Scores]>::to_vec).collect(), weights)
    }

    fn advantages(&self, case: usize, config: &AdvantageConfig) -> Vec<f32> {
        let (groups, weights) = self.scores(case);
        combined_advantages(&groups, &weights, config).unwrap().concat()
    }
}

/// One case as the loss takes it.
struct Case {
    log_probs: Array2<f32>,
    entropy: Array2<f32>,
    targets: Targets,
}

impl Case {
    fn of(golden: &Golden, case: usize, objective: &Objective) -> Self {
        let table = |name: &str| golden.table(&format!("in/{name}"), case);
        let (mask, old, sampled, entropy) = (table("mask"), table("old"), table("sampled"), table("entropy"));
        let lengths: Vec<usize> = mask.rows().into_iter().map(|row| row.sum() as usize).collect();
        let kept: Vec<f32> = entropy.iter().zip(&mask).filter(|(_, m)| **m > 0.0).map(|(h, _)| *h).collect();
        let advantages = golden.advantages(case, &objective.advantage);
        let weigh = |c: &Correction| correction_weights(old.view(), sampled.view(), mask.view(), c);
        let targets = Targets {
            reference: Some(table("reference")),
            advantages: Array2::from_shape_fn((ROWS, TOKENS), |(row, _)| advantages[row]),
            weights: Array1::from(row_weights(&lengths, objective.aggregation)),
            correction: objective.correction.as_ref().map(weigh),
            gate: entropy_gate(&kept, objective.top_entropy_share),
            mask,
            old,
            sampled,
        };
        Self { log_probs: table("log_probs"), entropy, targets }
    }

    fn loss(&self, objective: &Objective) -> Loss {
        loss(self.log_probs.view(), Some(self.entropy.view()), &self.targets, objective).unwrap()
    }

    /// The same rows as a micro-batch of the batch.
    fn part(&self, rows: std::ops::Range<usize>) -> Self {
        let rows: Vec<usize> = rows.collect();
        let cut = |table: &Array2<f32>| table.select(ndarray::Axis(0), &rows);
        let targets = self.targets.select(&rows);
        Self { log_probs: cut(&self.log_probs), entropy: cut(&self.entropy), targets }
    }
}

/// The largest difference seen for one combination.
#[derive(Default)]
struct Worst {
    cases: usize,
    loss: f64,
    gradient: f64,
    metrics: f64,
}

impl Worst {
    fn see(worst: &mut f64, what: &str, got: f64, expected: f64) {
        let difference = (got - expected).abs();
        assert!(difference <= TOLERANCE, "{what}: {got} is not {expected}");
        *worst = worst.max(difference);
    }

    fn tables(worst: &mut f64, what: &str, got: ArrayView2<'_, f32>, expected: &[f64]) {
        assert_eq!(got.len(), expected.len(), "{what}");
        got.iter().zip(expected).for_each(|(got, expected)| Self::see(worst, what, f64::from(*got), *expected));
    }

    fn line(&self, name: &str) -> String {
        let metrics = if self.metrics.is_nan() { "–".into() } else { format!("{:.1e}", self.metrics) };
        format!("| {name} | {} | {:.1e} | {:.1e} | {metrics} |", self.cases, self.loss, self.gradient)
    }
}

const HEAD: &str = "| combination | cases | loss, max difference | gradient, max difference | metrics, max difference |\n|---|---|---|---|---|";

fn scale(name: &str) -> AdvantageConfig {
    let plain = AdvantageConfig::default();
    match name {
        "group" => plain,
        "batch" => AdvantageConfig { scale: Scale::Batch, ..plain },
        "none" => AdvantageConfig { scale: Scale::None, ..plain },
        "rloo" => AdvantageConfig { scale: Scale::None, baseline: Baseline::LeaveOneOut, ..plain },
        "gdpo" => AdvantageConfig { combine: Combine::NormaliseThenSum, ..plain },
        other => panic!("no scale {other}"),
    }
}

fn level(name: &str) -> Level {
    if name == "token" { Level::Token } else { Level::Sequence }
}

/// The settings of `trl.py`.
fn objective(loss_type: &str, scale_name: &str, level_name: &str) -> Objective {
    let loss_type = match loss_type {
        "grpo" => LossType::Grpo,
        "bnpo" => LossType::Bnpo,
        "dr_grpo" => LossType::DrGrpo,
        "dapo" => LossType::Dapo,
        "cispo" => LossType::Cispo,
        "sapo" => LossType::Sapo,
        other => panic!("no loss {other}"),
    };
    let plain = Objective {
        clip_low: 0.2,
        clip_high: 0.28,
        kl_weight: 0.04,
        level: level(level_name),
        advantage: scale(scale_name),
        ..Objective::default()
    };
    let objective = plain.with_loss(loss_type, TOKENS);
    match objective.surrogate {
        Surrogate::Cispo { .. } => Objective { surrogate: Surrogate::Cispo { cap: 1.3 }, ..objective },
        _ => objective,
    }
}

fn with_option(objective: Objective, option: &str) -> Objective {
    let correction = |level, beyond| {
        let correction = Correction { level, beyond, max: 1.2, min: Some(0.8) };
        Objective { correction: Some(correction), ..objective }
    };
    let kl = KlConfig { bias_correction: true, ..KlConfig::default() };
    match option {
        "no_kl" => Objective { kl_weight: 0.0, ..objective },
        "delta" => Objective { clip_delta: Some(1.5), ..objective },
        "bias_corrected_kl" => Objective { kl, ..objective },
        "entropy_bonus" => Objective { entropy_weight: 0.1, ..objective },
        "entropy_quantile" => Objective { top_entropy_share: 0.4, ..objective },
        "entropy_quantile_and_bonus" => Objective { top_entropy_share: 0.4, entropy_weight: 0.1, ..objective },
        "off_policy_mask" => Objective { off_policy_threshold: Some(0.01), ..objective },
        "correction_token_truncate" => correction(Level::Token, Beyond::Truncate),
        "correction_token_mask" => correction(Level::Token, Beyond::Mask),
        "correction_sequence_truncate" => correction(Level::Sequence, Beyond::Truncate),
        "correction_sequence_mask" => correction(Level::Sequence, Beyond::Mask),
        "correction_max_only" => {
            let correction = Correction { level: Level::Sequence, max: 1.2, ..Correction::default() };
            Objective { correction: Some(correction), ..objective }
        }
        "everything" => {
            let parts =
                ["bias_corrected_kl", "entropy_quantile_and_bonus", "off_policy_mask", "correction_token_truncate"];
            let all = parts.into_iter().fold(objective, with_option);
            Objective { clip_delta: (all.surrogate == Surrogate::Clip).then_some(1.5), ..all }
        }
        other => panic!("no option {other}"),
    }
}

/// The page that shows these tables has a row of this name.
fn documented(name: &str) {
    let page = include_str!("../src/docs/proof.md");
    assert!(page.contains(&format!("| {name} | {CASES} |")), "{name} is not in src/docs/proof.md");
}

fn compare(golden: &Golden, name: &str, objective: &Objective) -> Worst {
    objective.check().unwrap();
    documented(name);
    let mut worst = Worst { metrics: f64::NAN, ..Worst::default() };
    for case in 0..CASES {
        let got = Case::of(golden, case, objective).loss(objective);
        worst.cases += 1;
        Worst::see(
            &mut worst.loss,
            &format!("{name}, case {case}"),
            got.value,
            golden.case(&format!("{name}/loss"), case)[0],
        );
        let gradient = format!("{name}/gradient");
        Worst::tables(&mut worst.gradient, &gradient, got.gradient.view(), &golden.case(&gradient, case));
        let by_entropy = format!("{name}/entropy_gradient");
        if golden.0.contains_key(&by_entropy) {
            let got = got.entropy_gradient.as_ref().unwrap();
            Worst::tables(&mut worst.gradient, &by_entropy, got.view(), &golden.case(&by_entropy, case));
        }
        compare_metrics(golden, name, case, &got, &mut worst);
    }
    worst
}

/// The means that TRL logs, under its names.
fn compare_metrics(golden: &Golden, name: &str, case: usize, loss: &Loss, worst: &mut Worst) {
    let parts = &loss.parts;
    let ours = [
        ("kl", parts.kl / parts.n_choices),
        ("clip_ratio/low_mean", parts.clipped_low / parts.n_ratios),
        ("clip_ratio/high_mean", parts.clipped_high / parts.n_ratios),
        ("clip_ratio/region_mean", (parts.clipped_low + parts.clipped_high) / parts.n_ratios),
        ("clip_ratio/low_min", parts.low_min),
        ("clip_ratio/high_max", parts.high_max),
        ("cispo_clip_ratio", parts.clipped_high / parts.n_ratios),
        ("policy_loss", parts.policy_loss),
        ("entropy", parts.entropy.unwrap_or(f64::NAN) / parts.n_choices),
    ];
    let option = name.split('/').nth(1).unwrap_or_default();
    let ratios = [
        ("min", parts.correction.min),
        ("mean", parts.correction.sum / parts.correction.n),
        ("max", parts.correction.max),
    ];
    let ratios = ratios.map(|(kind, got)| (format!("metric/{option}/sampling/importance_sampling_ratio/{kind}"), got));
    for (tensor, got) in ours.map(|(key, got)| (format!("{name}/metric/{key}"), got)).into_iter().chain(ratios) {
        if golden.0.contains_key(&tensor) {
            worst.metrics = worst.metrics.max(0.0);
            Worst::see(&mut worst.metrics, &format!("{tensor}, case {case}"), got, golden.case(&tensor, case)[0]);
        }
    }
}

#[test]
fn advantages_are_trls() {
    let golden = Golden::load();
    println!("| advantages | cases | max difference |\n|---|---|---|");
    for name in ["group", "batch", "none", "gdpo", "rloo"] {
        documented(name);
        let mut worst = 0.0;
        for case in 0..CASES {
            let got = golden.advantages(case, &scale(name));
            let expected = golden.case(&format!("advantage/{name}"), case);
            assert_eq!(got.len(), expected.len());
            for (got, expected) in got.iter().zip(&expected) {
                Worst::see(&mut worst, &format!("{name}, case {case}"), f64::from(*got), *expected);
            }
        }
        println!("| {name} | {CASES} | {worst:.1e} |");
    }
}

#[test]
fn every_loss_scale_and_level_is_trls() {
    let golden = Golden::load();
    println!("{HEAD}");
    for loss_type in ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"] {
        for scale in ["group", "batch", "none", "gdpo"] {
            for level in ["token", "sequence"] {
                let name = format!("loss/{loss_type}/{scale}/{level}");
                println!("{}", compare(&golden, &name, &objective(loss_type, scale, level)).line(&name));
            }
        }
    }
}

#[test]
fn every_option_is_trls() {
    let golden = Golden::load();
    let names: Vec<&str> = golden.0.keys().filter_map(|name| name.strip_suffix("/loss")).collect();
    let options: Vec<Vec<&str>> =
        names.iter().map(|name| name.split('/').collect()).filter(|parts: &Vec<&str>| parts[0] == "option").collect();
    assert!(options.len() >= 50, "{} options", options.len());
    println!("{HEAD}");
    for parts in options {
        let name = parts.join("/");
        let objective = with_option(objective(parts[2], "group", parts[3]), parts[1]);
        println!("{}", compare(&golden, &name, &objective).line(&name));
    }
}

/// The estimators, of which TRL has only k3, against torch's autograd on the formulas in `trl.py`.
#[test]
fn every_kl_estimator_is_torchs() {
    let golden = Golden::load();
    println!("{HEAD}");
    let estimators = [("k1", Estimator::K1), ("k2", Estimator::K2), ("k3", Estimator::K3)];
    for (estimator_name, estimator) in estimators {
        for (kind, level_name) in [("plain", "token"), ("bias_corrected", "token"), ("bias_corrected", "sequence")] {
            let name = format!("kl/{estimator_name}/{kind}/{level_name}");
            documented(&name);
            let kl = KlConfig { estimator, bias_correction: kind == "bias_corrected", ..KlConfig::default() };
            let base = Objective { kl_weight: 1.0, kl, level: level(level_name), ..Objective::default() };
            let objective = Objective { aggregation: Aggregation::TokenMean, ..base };
            let mut worst = Worst { metrics: f64::NAN, ..Worst::default() };
            for case in 0..CASES {
                let mut case_of = Case::of(&golden, case, &objective);
                case_of.targets.advantages.fill(0.0);
                let got = case_of.loss(&objective);
                worst.cases += 1;
                Worst::see(&mut worst.loss, &name, got.value, golden.case(&format!("{name}/loss"), case)[0]);
                let expected = golden.case(&format!("{name}/gradient"), case);
                Worst::tables(&mut worst.gradient, &name, got.gradient.view(), &expected);
            }
            println!("{}", worst.line(&name));
        }
    }
}

/// Any split has the whole batch's loss and gradient; TRL's `bnpo` alone counts the tokens of each micro-batch.
#[test]
fn a_split_batch_is_the_whole_one_also_where_trls_is_not() {
    let golden = Golden::load();
    let mut bnpo = 0f64;
    for loss_type in ["grpo", "dapo", "bnpo"] {
        let objective = objective(loss_type, "group", "token");
        let (mut loss, mut gradient) = (0.0, 0.0);
        for case in 0..CASES {
            let whole = Case::of(&golden, case, &objective);
            let parts = [whole.part(0..4).loss(&objective), whole.part(4..8).loss(&objective)];
            let sum = parts[0].value + parts[1].value;
            let name = format!("split/aligned/{loss_type}");
            let expected = golden.case(&format!("{name}/loss"), case)[0];
            if loss_type == "bnpo" {
                bnpo = bnpo.max((sum - expected).abs());
                let whole = golden.case("loss/bnpo/group/token/loss", case)[0];
                Worst::see(&mut loss, &name, sum, whole);
                continue;
            }
            Worst::see(&mut loss, &name, sum, expected);
            let both = ndarray::concatenate![ndarray::Axis(0), parts[0].gradient, parts[1].gradient];
            Worst::tables(&mut gradient, &name, both.view(), &golden.case(&format!("{name}/gradient"), case));
        }
        println!("| split in two, {loss_type} | {CASES} | {loss:.1e} | {gradient:.1e} |");
    }
    assert!(bnpo > 0.1, "TRL's bnpo was to depend on the split; it differs by {bnpo}");
    println!("TRL's bnpo on the two halves is off its own whole batch by up to {bnpo:.2}");
}

/// Two optimiser steps on the halves of what one phase sampled: DAPO's eq. 8 divides by the tokens of the step's batch.
///
/// TRL divides by the tokens of the whole phase, times `gradient_accumulation_steps / steps_per_generation` from 1.9.1 on
/// and times 1 before. Here the paper is followed: a step's normaliser is its own, whatever was sampled with it.
#[test]
fn a_step_is_normalised_by_its_own_tokens_where_trls_is_not() {
    let golden = Golden::load();
    let objective = objective("dapo", "group", "token");
    let (mut worst, mut off) = (0.0, 0f64);
    for case in 0..CASES {
        let whole = Case::of(&golden, case, &objective);
        let mut half = whole.part(0..4);
        let n_tokens = f64::from(half.targets.mask.sum());
        let lengths: Vec<usize> = half.targets.mask.rows().into_iter().map(|row| row.sum() as usize).collect();
        half.targets.weights = Array1::from(row_weights(&lengths, Aggregation::TokenMean));
        half.targets.gate = EntropyGate { floor: f32::NEG_INFINITY, n_kept: n_tokens as usize };
        let ours = half.loss(&objective).value;

        let trl = golden.case("split/misaligned/dapo/loss", case)[0];
        let divisor = f64::from(whole.targets.mask.sum()) / 2.0;
        Worst::see(&mut worst, "with TRL's divisor", ours * n_tokens / divisor, trl);
        Worst::see(&mut worst, "TRL 1.9.0", trl / 2.0, golden.case("split/misaligned_1_9_0/dapo/loss", case)[0]);
        off = off.max((ours - trl).abs());
    }
    assert!(off > 0.1, "TRL's normaliser was to be another; it is off by {off}");
    println!(
        "dapo, half a phase a step: TRL 1.16 is off eq. 8 by up to {off:.2}, and equal with its own divisor ({worst:.1e})"
    );
}
