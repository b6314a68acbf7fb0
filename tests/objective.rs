//! The objective against what must hold by mathematics: derivatives, expectations, splits, equalities.

#![expect(clippy::unwrap_used, reason = "a test and its helpers fail by panicking")]

use grpo::loss::{EntropyGate, Targets, correction_weights, entropy_gate, loss, row_weights};
use grpo::objective::{Beyond, Correction, Estimator, KlConfig, Level, LossType};
use grpo::testing::ToyPolicy;
use grpo::{
    AdvantageConfig, Aggregation, Baseline, Combine, Draws, Gradients, LossGradient, Objective, Policy, Prompt, Scale,
    Scores, Seed, Surrogate, advantages, combined_advantages,
};
use ndarray::{Array1, Array2, Axis, s};

/// A batch of random rows as the loss takes it.
struct Random {
    log_probs: Array2<f32>,
    entropy: Array2<f32>,
    targets: Targets,
}

fn lengths_of(mask: &Array2<f32>) -> Vec<usize> {
    mask.rows().into_iter().map(|row| row.sum() as usize).collect()
}

impl Random {
    /// `lengths` of the rows; `width` choices at most.
    fn new(seed: u64, lengths: &[usize], width: usize, objective: &Objective) -> Self {
        let mut draws = Seed::new(seed).named("objective").draws();
        let shape = (lengths.len(), width);
        let near = |centre: &Array2<f32>, by: f64, draws: &mut Draws| centre.mapv(|x| x + (by * draws.normal()) as f32);
        let log_probs = Array2::from_shape_simple_fn(shape, || -(4.0 * draws.uniform() + 0.05) as f32);
        let old = near(&log_probs, 0.3, &mut draws);
        let (sampled, reference) = (near(&old, 0.2, &mut draws), near(&log_probs, 0.5, &mut draws));
        let entropy = Array2::from_shape_simple_fn(shape, || (3.0 * draws.uniform() + 0.01) as f32);
        let of_rows: Vec<f32> = lengths.iter().map(|_| draws.normal() as f32).collect();
        let mask = Array2::from_shape_fn(shape, |(row, at)| f32::from(u8::from(at < lengths[row])));
        let kept: Vec<f32> = entropy.iter().zip(&mask).filter(|(_, m)| **m > 0.0).map(|(h, _)| *h).collect();
        let weigh = |c: &Correction| correction_weights(old.view(), sampled.view(), mask.view(), c);
        let targets = Targets {
            reference: Some(reference),
            advantages: Array2::from_shape_fn(shape, |(row, _)| of_rows[row]),
            weights: Array1::from(row_weights(lengths, objective.aggregation)),
            correction: objective.correction.as_ref().map(weigh),
            gate: entropy_gate(&kept, objective.top_entropy_share),
            mask,
            old,
            sampled,
        };
        Self { log_probs, entropy, targets }
    }

    fn loss(&self, objective: &Objective) -> grpo::loss::Loss {
        loss(self.log_probs.view(), Some(self.entropy.view()), &self.targets, objective).unwrap()
    }

    fn rows(&self, rows: &[usize]) -> Self {
        let cut = |table: &Array2<f32>| table.select(Axis(0), rows);
        let targets = self.targets.select(rows);
        Self { log_probs: cut(&self.log_probs), entropy: cut(&self.entropy), targets }
    }
}

/// Every surrogate, level, aggregation and option at least once, and most pairs of them.
fn objectives() -> Vec<Objective> {
    let types = [LossType::Grpo, LossType::Bnpo, LossType::DrGrpo, LossType::Dapo, LossType::Cispo, LossType::Sapo];
    let kl = |estimator, bias_correction| KlConfig { estimator, bias_correction, ..KlConfig::default() };
    let correction = |level, beyond| Some(Correction { level, beyond, max: 1.2, min: Some(0.8) });
    let mut found = Vec::new();
    for (at, loss_type) in types.into_iter().enumerate() {
        for level in [Level::Token, Level::Sequence] {
            let plain = Objective { level, kl_weight: 0.3, ..Objective::default() }.with_loss(loss_type, 6);
            let estimator = [Estimator::K1, Estimator::K2, Estimator::K3][at % 3];
            found.extend([
                plain,
                Objective { kl: kl(estimator, true), entropy_weight: 0.2, ..plain },
                Objective { kl: kl(estimator, false), top_entropy_share: 0.5, entropy_weight: 0.2, ..plain },
                Objective {
                    off_policy_threshold: Some(0.01),
                    correction: correction(level, Beyond::Truncate),
                    ..plain
                },
                Objective { kl_weight: 0.0, correction: correction(Level::Sequence, Beyond::Mask), ..plain },
            ]);
            if plain.surrogate == Surrogate::Clip {
                found.push(Objective { clip_delta: Some(1.5), ..plain });
            }
        }
    }
    found.iter().for_each(|objective| objective.check().unwrap());
    found
}

/// Distance of the nearest ratio to a place where the objective has a kink.
fn distance_to_kinks(random: &Random, objective: &Objective, log_probs: &Array2<f32>) -> f64 {
    let Targets { mask, old, sampled, .. } = &random.targets;
    let kinks = [1.0 - objective.clip_low, 1.0 + objective.clip_high, 1.5, 5.0].map(f64::ln);
    let mut nearest = f64::INFINITY;
    for (row, mask) in mask.rows().into_iter().enumerate() {
        let places: Vec<usize> = (0..mask.len()).filter(|&at| mask[at] > 0.0).collect();
        let mean = |table: &Array2<f32>| {
            let differences = places.iter().map(|&at| f64::from(log_probs[[row, at]] - table[[row, at]]));
            differences.sum::<f64>() / places.len().max(1) as f64
        };
        let ratios: Vec<f64> = match objective.level {
            Level::Sequence => vec![mean(old)],
            Level::Token => places.iter().map(|&at| f64::from(log_probs[[row, at]] - old[[row, at]])).collect(),
        };
        let of_ratios = ratios.iter().flat_map(|x| kinks.map(|kink| (x - kink).abs()));
        let threshold = objective.off_policy_threshold.map(|threshold| (-mean(sampled) - threshold).abs());
        nearest = of_ratios.chain(threshold).fold(nearest, f64::min);
    }
    nearest
}

#[test]
fn gradients_equal_finite_differences() {
    const BY: f32 = 3e-4;
    let mut n_checked = 0;
    for (n, objective) in objectives().iter().enumerate() {
        let random = Random::new(n as u64, &[6, 1, 0, 4, 3], 6, objective);
        if distance_to_kinks(&random, objective, &random.log_probs) < 2.0 * f64::from(BY) {
            continue;
        }
        let at_point = random.loss(objective);
        for place in random.targets.mask.indexed_iter().filter(|(_, mask)| **mask > 0.0).map(|(place, _)| place) {
            let value = |by: f32| {
                let mut moved = random.log_probs.clone();
                moved[place] += by;
                let step = f64::from(moved[place]) - f64::from(random.log_probs[place]);
                (step, loss(moved.view(), Some(random.entropy.view()), &random.targets, objective).unwrap().value)
            };
            let ((up, above), (down, below)) = (value(BY), value(-BY));
            let mut slope = (above - below) / (up - down);
            if let Surrogate::Cispo { .. } = objective.surrogate {
                slope -= slope_of_stopped_weight(&random, objective, place, BY);
            }
            let got = f64::from(at_point.gradient[place]);
            assert!((got - slope).abs() < 1e-6, "{objective:?} at {place:?}: {got} is not {slope}");
            n_checked += 1;
        }
    }
    assert!(n_checked > 600, "{n_checked} slopes checked");
}

/// What a finite difference sees of CISPO's weight, which the gradient must not: the loss with `log π` held at the point.
fn slope_of_stopped_weight(random: &Random, objective: &Objective, place: (usize, usize), by: f32) -> f64 {
    let (cap, targets) = match objective.surrogate {
        Surrogate::Cispo { cap } => (cap, &random.targets),
        _ => return 0.0,
    };
    let log_prob = |at: (usize, usize), moved: f32| {
        f64::from(if at == place { random.log_probs[at] + moved } else { random.log_probs[at] })
    };
    let value = |moved: f32| {
        let mut sum = 0.0;
        for (at, _) in targets.mask.indexed_iter().filter(|((row, _), mask)| *row == place.0 && **mask > 0.0) {
            let places = (0..targets.mask.ncols()).map(|t| (at.0, t)).filter(|t| targets.mask[*t] > 0.0);
            let log_ratios: Vec<((usize, usize), f64)> =
                places.map(|t| (t, log_prob(t, moved) - f64::from(targets.old[t]))).collect();
            let ratio = match objective.level {
                Level::Token => log_ratios.iter().find(|(t, _)| *t == at).unwrap().1.exp(),
                Level::Sequence => (log_ratios.iter().map(|(_, x)| x).sum::<f64>() / log_ratios.len() as f64).exp(),
            };
            let n = log_ratios.len() as f64;
            let off =
                log_ratios.iter().map(|(t, _)| f64::from(targets.sampled[*t]) - log_prob(*t, moved)).sum::<f64>() / n;
            let advantage = f64::from(targets.advantages[at]);
            let silenced = objective.off_policy_threshold.is_some_and(|limit| off > limit && advantage < 0.0)
                || random.entropy[at] < targets.gate.floor;
            let factor = targets.correction.as_ref().map_or(1.0, |c| f64::from(c[at])) * f64::from(u8::from(!silenced));
            sum -= targets.weights[at.0] * factor * ratio.min(cap) * advantage * f64::from(random.log_probs[at]);
        }
        sum
    };
    let at = random.log_probs[place];
    // The step that f32 really took.
    (value(by) - value(-by)) / (f64::from(at + by) - f64::from(at - by))
}

#[test]
fn every_split_of_eight_rows_has_the_whole_gradient() {
    for (n, objective) in objectives().iter().enumerate() {
        let random = Random::new(n as u64, &[6, 1, 0, 4, 6, 3, 2, 5], 6, objective);
        let whole = random.loss(objective);
        // Bit k says whether a micro-batch ends after row k: all 128 ways to cut eight rows.
        for cuts in 0..128u32 {
            let mut parts: Vec<Vec<usize>> = vec![vec![0]];
            for row in 1..8 {
                match cuts >> (row - 1) & 1 {
                    1 => parts.push(vec![row]),
                    _ => parts.last_mut().unwrap().push(row),
                }
            }
            let mut value = 0.0;
            for rows in parts {
                let part = random.rows(&rows).loss(objective);
                value += part.value;
                let expected = whole.gradient.select(Axis(0), &rows);
                let worst = (&part.gradient - &expected).mapv(f32::abs).fold(0.0, |a, b| f32::max(a, *b));
                assert!(worst <= 1e-6, "{objective:?}, cuts {cuts:b}: off by {worst}");
            }
            assert!((value - whole.value).abs() < 1e-12, "{objective:?}, cuts {cuts:b}");
        }
    }
}

/// For image tokens, whose number is fixed, the four normalisers are one: 1 / (rows × length).
#[test]
fn grpo_bnpo_dr_grpo_and_dapo_are_one_on_rows_of_fixed_length() {
    for seed in 0..50 {
        let of = |loss_type| {
            let objective = Objective::default().with_loss(loss_type, 9);
            Random::new(seed, &[9; 8], 9, &objective).loss(&objective)
        };
        let grpo = of(LossType::Grpo);
        for other in [LossType::Bnpo, LossType::DrGrpo, LossType::Dapo] {
            let other = of(other);
            assert!((grpo.value - other.value).abs() < 1e-15);
            assert_eq!(grpo.gradient, other.gradient);
        }
        let ragged = |loss_type| {
            let objective = Objective::default().with_loss(loss_type, 9);
            Random::new(seed, &[9, 3, 9, 1], 9, &objective).loss(&objective).value
        };
        assert!((ragged(LossType::Grpo) - ragged(LossType::Dapo)).abs() > 1e-6, "seed {seed}");
        assert!((ragged(LossType::DrGrpo) - ragged(LossType::Dapo)).abs() > 1e-6, "seed {seed}");
    }
}

#[test]
fn padding_has_no_say_and_no_gradient() {
    for (n, objective) in objectives().iter().enumerate() {
        let random = Random::new(n as u64, &[6, 1, 0, 4], 6, objective);
        let mut junk = random.rows(&[0, 1, 2, 3]);
        for (place, _) in random.targets.mask.indexed_iter().filter(|(_, mask)| **mask == 0.0) {
            for table in [&mut junk.log_probs, &mut junk.targets.old, &mut junk.targets.sampled] {
                table[place] = f32::NAN;
            }
            (junk.entropy[place], junk.targets.advantages[place]) = (f32::NAN, f32::INFINITY);
        }
        let (clean, junk) = (random.loss(objective), junk.loss(objective));
        assert_eq!((clean.value, clean.parts), (junk.value, junk.parts), "{objective:?}");
        assert_eq!(clean.gradient, junk.gradient, "{objective:?}");
        let padded = clean.gradient.iter().zip(&random.targets.mask).filter(|(_, mask)| **mask == 0.0);
        assert!(padded.into_iter().all(|(gradient, _)| *gradient == 0.0), "{objective:?}");
    }
}

#[test]
fn the_loss_is_linear_in_a_batch_and_odd_where_the_clip_is_idle() {
    let objective = Objective { kl_weight: 0.0, clip_low: 0.999, clip_high: 1e9, ..Objective::default() };
    let random = Random::new(3, &[4, 4, 4], 4, &objective);
    let mut flipped = random.rows(&[0, 1, 2]);
    flipped.targets.advantages.mapv_inplace(|a| -a);
    assert!((random.loss(&objective).value + flipped.loss(&objective).value).abs() < 1e-12);
    let order = random.rows(&[2, 0, 1]).loss(&objective);
    assert!((order.value - random.loss(&objective).value).abs() < 1e-12);
    assert_eq!(order.gradient.slice(s![1.., ..]), random.loss(&objective).gradient.slice(s![..2, ..]));
}

#[test]
fn advantages_keep_their_laws() {
    for seed in 0..300 {
        let mut draws = Seed::new(seed).named("advantages").draws();
        let sizes: Vec<usize> = (0..1 + draws.below(4)).map(|_| 2 + draws.below(6)).collect();
        let mut groups: Vec<Vec<f32>> = Vec::new();
        for size in sizes {
            groups.push((0..size).map(|_| (draws.below(5) as f32 - 2.0) / 4.0).collect());
        }
        for scale in [Scale::Group, Scale::Batch, Scale::None] {
            for baseline in [Baseline::GroupMean, Baseline::LeaveOneOut] {
                check_laws(&groups, &AdvantageConfig { scale, baseline, ..AdvantageConfig::default() });
            }
        }
    }
}

fn check_laws(groups: &[Vec<f32>], config: &AdvantageConfig) {
    let of = |groups: &[Vec<f32>], config: &AdvantageConfig| advantages(groups, config).unwrap();
    let got = of(groups, config);
    for (group, got) in groups.iter().zip(&got) {
        let sum: f32 = got.iter().sum();
        assert!(sum.abs() < 1e-4, "{config:?}: advantages of {group:?} sum to {sum}");
        for (a, b) in group.iter().zip(got).flat_map(|x| group.iter().zip(got).map(move |y| (x, y))) {
            assert!((a.0 < b.0) == (a.1 < b.1), "{config:?}: {group:?} is ordered otherwise than {got:?}");
        }
    }
    // A constant of its own for each group; of the batch's deviation only a common one is no merit.
    let constant = |at: usize| if config.scale == Scale::Batch { 8.0 } else { 8.0 + at as f32 };
    let shift = |(at, group): (usize, &Vec<f32>)| group.iter().map(|r| r + constant(at)).collect();
    let shifted: Vec<Vec<f32>> = groups.iter().enumerate().map(shift).collect();
    for (a, b) in got.concat().iter().zip(of(&shifted, config).concat()) {
        assert!((a - b).abs() < 1e-5, "{config:?}: a constant is no merit, and {a} became {b}");
    }
    let without_eps = AdvantageConfig { eps: 0.0, ..*config };
    let doubled: Vec<Vec<f32>> = groups.iter().map(|group| group.iter().map(|r| r * 2.0).collect()).collect();
    let factor = if config.scale == Scale::None { 2.0 } else { 1.0 };
    for (a, b) in of(groups, &without_eps).concat().iter().zip(of(&doubled, &without_eps).concat()) {
        assert!((a * factor - b).abs() < 1e-5, "{config:?}: scaled rewards give {b}, not {}", a * factor);
    }
}

/// With one reward, normalising before the sum only divides by the deviation of the whole once more.
#[test]
fn a_reward_that_does_not_apply_changes_nothing() {
    let group = |values: &[f32], other: Option<f32>| -> Vec<Scores> {
        values.iter().map(|x| Scores { values: vec![Some(*x), other], total: *x }).collect()
    };
    let values = [0.5, 0.25, 1.0];
    for combine in [Combine::SumThenNormalise, Combine::NormaliseThenSum] {
        let config = AdvantageConfig { combine, ..AdvantageConfig::default() };
        let of = |other| combined_advantages(&[group(&values, other)], &[1.0, 3.0], &config).unwrap();
        assert_eq!(of(None), of(Some(0.75)), "{combine:?}: a reward that is the same for all is no merit");
    }
}

/// On the toy every group of G words is enumerated: the expected gradient of the loss at ratio 1 is `−(1 − 1/G)·∇J` with
/// the mean of the group as the baseline, and `−∇J` where the sample itself is left out.
#[test]
fn the_expected_gradient_is_that_of_the_expected_reward() {
    let reward = |word: &[u32]| 0.3 + word.iter().map(|&id| [1.0, -0.5, 0.25][id as usize]).product::<f32>();
    for group_size in [2, 3] {
        for (baseline, factor) in [(Baseline::GroupMean, 1.0 - 1.0 / group_size as f64), (Baseline::LeaveOneOut, 1.0)] {
            let expected = gradient_of_expected_reward(&toy(), reward);
            let got = expected_gradient_of_loss(&toy(), group_size, baseline, reward);
            for (got, expected) in got.iter().zip(&expected) {
                let expected = -factor * expected;
                assert!((got - expected).abs() < 1e-5, "G = {group_size}, {baseline:?}: {got} is not {expected}");
            }
            assert!(expected.iter().any(|slope| slope.abs() > 0.02), "{expected:?}");
        }
    }
}

const LENGTH: usize = 2;

/// A toy whose letters are not equally likely.
fn toy() -> ToyPolicy {
    let toy = ToyPolicy::new(3, LENGTH).unwrap();
    let params = toy.params();
    let logits = params.get("logits").unwrap();
    let values = candle_core::Tensor::new(&[[0.3f32, -0.2, 0.5], [-0.4, 0.1, 0.0]], &candle_core::Device::Cpu).unwrap();
    logits.set(&values).unwrap();
    toy
}

fn words() -> Vec<Vec<u32>> {
    (0..9u32).map(|n| vec![n / 3, n % 3]).collect()
}

fn gradient_of(toy: &ToyPolicy, traces: &[&Vec<u32>], upstream: Vec<f32>) -> Vec<f64> {
    let prompt = Prompt::new("any");
    let batch: Vec<(&Prompt, &Vec<u32>)> = traces.iter().map(|trace| (&prompt, *trace)).collect();
    let log_probs = toy.log_probs(&batch).unwrap();
    let upstream = candle_core::Tensor::from_vec(upstream, log_probs.values().dims(), &candle_core::Device::Cpu);
    let mut gradients = Gradients::new();
    toy.backward(&log_probs, &LossGradient::new(upstream.unwrap()), &mut gradients).unwrap();
    let gradient = gradients.get("logits").unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    gradient.into_iter().map(f64::from).collect()
}

fn log_probs_of(toy: &ToyPolicy, traces: &[&Vec<u32>]) -> Array2<f32> {
    let prompt = Prompt::new("any");
    let batch: Vec<(&Prompt, &Vec<u32>)> = traces.iter().map(|trace| (&prompt, *trace)).collect();
    let rows = toy.log_probs(&batch).unwrap().rows().unwrap();
    Array2::from_shape_vec((traces.len(), LENGTH), rows.concat()).unwrap()
}

/// `∇ Σ_w p(w) r(w) = Σ_w p(w) r(w) ∇ log p(w)`, over all words.
fn gradient_of_expected_reward(toy: &ToyPolicy, reward: impl Fn(&[u32]) -> f32) -> Vec<f64> {
    let words = words();
    let traces: Vec<&Vec<u32>> = words.iter().collect();
    let log_probs = log_probs_of(toy, &traces);
    let weights = log_probs.rows().into_iter().zip(&words).map(|(row, word)| row.sum().exp() * reward(word));
    gradient_of(toy, &traces, weights.flat_map(|weight| [weight; LENGTH]).collect())
}

/// Over all groups of words, each as likely as it is.
fn expected_gradient_of_loss(
    toy: &ToyPolicy,
    group_size: usize,
    baseline: Baseline,
    reward: impl Fn(&[u32]) -> f32,
) -> Vec<f64> {
    let words = words();
    // The sum over choices of a row is its log-probability: Dr. GRPO with a length of 1.
    let objective = Objective { kl_weight: 0.0, aggregation: Aggregation::FixedLength(1), ..Objective::default() };
    let config = AdvantageConfig { scale: Scale::None, baseline, ..AdvantageConfig::default() };
    let mut expected = vec![0.0; 6];
    for group in 0..words.len().pow(group_size as u32) {
        let members: Vec<&Vec<u32>> =
            (0..group_size).map(|at| &words[group / words.len().pow(at as u32) % words.len()]).collect();
        let rewards: Vec<f32> = members.iter().map(|word| reward(word)).collect();
        let of_group = advantages(&[rewards], &config).unwrap().concat();
        let log_probs = log_probs_of(toy, &members);
        let mask = Array2::ones(log_probs.dim());
        let targets = Targets {
            old: log_probs.clone(),
            sampled: log_probs.clone(),
            reference: None,
            advantages: Array2::from_shape_fn(log_probs.dim(), |(row, _)| of_group[row]),
            weights: Array1::from(row_weights(&lengths_of(&mask), objective.aggregation)),
            correction: None,
            gate: EntropyGate { floor: f32::NEG_INFINITY, n_kept: mask.len() },
            mask,
        };
        let probability = f64::from(log_probs.sum().exp());
        let upstream = loss(log_probs.view(), None, &targets, &objective).unwrap().gradient;
        let gradient = gradient_of(toy, &members, upstream.iter().copied().collect());
        expected.iter_mut().zip(gradient).for_each(|(sum, slope)| *sum += probability * slope);
    }
    expected
}

/// A flat group beside one that varies: what is left of the mean over both is rounding, and no merit.
#[test]
fn a_flat_group_has_no_advantage_under_gdpo_whatever_its_neighbour() {
    let config = AdvantageConfig { combine: Combine::NormaliseThenSum, ..AdvantageConfig::default() };
    for seed in 0..200 {
        let mut draws = Seed::new(seed).named("flat").draws();
        let scores = |x: f32| Scores { values: vec![Some(x)], total: x };
        let varied: Vec<Scores> = (0..5).map(|_| scores(draws.uniform() as f32)).collect();
        let got = combined_advantages(&[vec![scores(0.3); 5], varied], &[0.7], &config).unwrap();
        assert_eq!(got[0], [0.0; 5], "seed {seed}");
    }
}

#[test]
fn an_entropy_that_is_no_number_is_an_error_where_it_is_used() {
    let objective = Objective { top_entropy_share: 0.5, ..Objective::default() };
    let mut random = Random::new(0, &[3, 2], 3, &objective);
    random.entropy[[1, 2]] = f32::NAN;
    assert!(loss(random.log_probs.view(), Some(random.entropy.view()), &random.targets, &objective).is_ok());
    random.entropy[[1, 1]] = f32::NAN;
    let of = |objective| loss(random.log_probs.view(), Some(random.entropy.view()), &random.targets, objective);
    assert_eq!(of(&objective).unwrap_err().to_string(), "the entropy of a choice is NaN");
    assert!(of(&Objective::default()).is_ok(), "where nothing asks for it, it is only logged");
}

/// A fault must come out as one: `min` and `max` of f64 would take the other number for NaN.
#[test]
fn what_is_no_number_makes_no_loss() {
    for objective in objectives() {
        let random = Random::new(7, &[3, 2], 3, &objective);
        let spoil = |spoil: fn(&mut Random)| {
            let mut spoilt = random.rows(&[0, 1]);
            spoil(&mut spoilt);
            let weigh = |c: &Correction| {
                let targets = &spoilt.targets;
                correction_weights(targets.old.view(), targets.sampled.view(), targets.mask.view(), c)
            };
            spoilt.targets.correction = objective.correction.as_ref().map(weigh);
            // All samples are kept, so that each choice has its say.
            let objective = Objective { off_policy_threshold: None, top_entropy_share: 1.0, ..objective };
            spoilt.targets.gate.floor = f32::NEG_INFINITY;
            spoilt.loss(&objective).value
        };
        assert!(spoil(|random| random.log_probs[[0, 1]] = f32::NAN).is_nan(), "{objective:?}");
        assert!(spoil(|random| random.targets.old[[0, 1]] = f32::NAN).is_nan(), "{objective:?}");
        assert!(spoil(|random| random.targets.advantages[[0, 1]] = f32::NAN).is_nan(), "{objective:?}");
        if objective.correction.is_some() {
            assert!(spoil(|random| random.targets.sampled[[0, 1]] = f32::NAN).is_nan(), "{objective:?}");
        }
    }
}

#[test]
fn tables_of_another_shape_are_named() {
    let objective = Objective::default();
    let mut random = Random::new(0, &[2, 2], 2, &objective);
    random.targets.old = Array2::zeros((2, 3));
    let error = loss(random.log_probs.view(), None, &random.targets, &objective).unwrap_err().to_string();
    assert_eq!(error, "the old log-probs has shape [2, 3]; expected [2, 2]");
    let needs = Objective { entropy_weight: 0.1, ..objective };
    let random = Random::new(0, &[2, 2], 2, &objective);
    let error = loss(random.log_probs.view(), None, &random.targets, &needs).unwrap_err().to_string();
    assert!(error.contains("needs the entropy of each choice"), "{error}");
    let empty = Random::new(0, &[], 0, &objective).loss(&objective);
    assert_eq!((empty.value, empty.gradient.len()), (0.0, 0));
}
