//! A shaped distribution over choices: probabilities, and draws by the inverse of its cumulative function.

use grpo::{Error, Result};

use super::Shaping;
use crate::ops::vector::{self, vectorised};

/// Choices whose weights are summed together, in f32; the sums of blocks are added in f64.
const BLOCK: usize = 256;

/// What remains of a law over choices once it is shaped; choices that were cut away have probability 0.
#[derive(Clone, Debug)]
pub(crate) struct Distribution {
    /// Log-weights, negative infinity where a choice was cut away.
    scores: Vec<f32>,
    /// The greatest of them.
    top: f32,
    /// The sum of `e^(score − top)` of each block of choices.
    sums: Vec<f32>,
    /// The logarithm of the sum of the scores' exponentials.
    normaliser: f64,
}

impl Distribution {
    /// The shaped softmax of `logits`.
    pub(crate) fn new(mut logits: Vec<f32>, shaping: &Shaping) -> Self {
        if shaping.greedy {
            keep_best(&mut logits);
        }
        for score in &mut logits {
            *score /= shaping.temperature;
        }
        truncate(&mut logits, shaping);
        let (top, sums) = block_sums(&logits);
        let normaliser = f64::from(top) + total(&sums).ln();
        Self { scores: logits, top, sums, normaliser }
    }

    /// An error where logits were no numbers, so that nothing can be drawn.
    pub(crate) fn check(&self) -> Result<()> {
        match self.normaliser.is_finite() {
            true => Ok(()),
            false => Err(Error::config(
                "the policy's logits are not finite, so nothing can be drawn; take an earlier checkpoint or a \
                 temperature nearer to 1",
            )),
        }
    }

    /// The log-probability of a choice.
    pub(crate) fn log_prob(&self, choice: usize) -> f32 {
        (f64::from(self.scores[choice]) - self.normaliser) as f32
    }

    /// The probability of a choice.
    pub(crate) fn probability(&self, choice: usize) -> f64 {
        (f64::from(self.scores[choice]) - self.normaliser).exp()
    }

    /// The choice in whose interval of the cumulative distribution `uniform`, in `[0, 1)`, falls.
    pub(crate) fn draw(&self, uniform: f64) -> usize {
        let wanted = uniform * total(&self.sums);
        let (mut before, mut last) = (0.0, 0);
        for (block, sum) in self.sums.iter().enumerate().filter(|(_, sum)| **sum > 0.0) {
            last = block;
            if wanted < before + f64::from(*sum) {
                break;
            }
            before += f64::from(*sum);
        }
        let first = last * BLOCK;
        let scores = self.scores[first..].iter().take(BLOCK);
        first + inverse_cdf(scores.map(|score| f64::from(weight(*score, self.top))), wanted - before)
    }

    /// A draw from the normalised `max(0, self - other)`, what is left of this law where `other`'s draw was refused
    /// (Leviathan et al., 2023, arXiv 2211.17192, algorithm 1).
    pub(crate) fn draw_excess(&self, other: &Self, uniform: f64) -> usize {
        let excess: Vec<f64> = (0..self.scores.len())
            .map(|choice| (self.probability(choice) - other.probability(choice)).max(0.0))
            .collect();
        let sum: f64 = excess.iter().sum();
        if sum > 0.0 {
            inverse_cdf(excess.iter().map(|weight| weight / sum), uniform)
        } else {
            // Equal laws refuse no draw but by rounding.
            self.draw(uniform)
        }
    }
}

/// `u + s·(c − u)` of the two log-softmaxes (SimpleAR's `CFGLogits`), before any shaping.
pub(crate) fn guided(conditional: &[f32], unconditional: &[f32], scale: f32) -> Vec<f32> {
    let (c_sum, u_sum) = (log_sum_exp(conditional) as f32, log_sum_exp(unconditional) as f32);
    let mut blend = vec![0.0; conditional.len()];
    vectorised(|| {
        for ((slot, c), u) in blend.iter_mut().zip(conditional).zip(unconditional) {
            let (c, u) = (c - c_sum, u - u_sum);
            *slot = u + scale * (c - u);
        }
    });
    blend
}

/// Leaves the greatest score, the first of equal ones.
fn keep_best(scores: &mut [f32]) {
    let first_best = scores
        .iter()
        .enumerate()
        .fold((0, f32::NEG_INFINITY), |best, (choice, &score)| if score > best.1 { (choice, score) } else { best });
    for (choice, score) in scores.iter_mut().enumerate() {
        *score = if choice == first_best.0 { 0.0 } else { f32::NEG_INFINITY };
    }
}

/// Leaves the choices of top-k, then of top-p, then of min-p; ties at a border fall to the smaller index.
///
/// (transformers keeps every tie of top-k's last score.)
fn truncate(scores: &mut [f32], shaping: &Shaping) {
    let kept = shaping.top_k.unwrap_or(scores.len()).min(scores.len());
    if kept < scores.len() || shaping.top_p < 1.0 {
        let mut order: Vec<usize> = (0..scores.len()).collect();
        let greater_first = |a: &usize, b: &usize| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b));
        if kept < order.len() {
            order.select_nth_unstable_by(kept, greater_first);
        }
        if shaping.top_p < 1.0 {
            order[..kept].sort_unstable_by(greater_first);
        }
        let kept = if shaping.top_p < 1.0 { nucleus(scores, &order[..kept], shaping.top_p) } else { kept };
        order[kept..].iter().for_each(|&choice| scores[choice] = f32::NEG_INFINITY);
    }
    if shaping.min_p > 0.0 {
        let top = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let least = top + shaping.min_p.ln();
        scores.iter_mut().filter(|score| **score < least).for_each(|score| *score = f32::NEG_INFINITY);
    }
}

/// How many of the choices in `order`, likeliest first, reach probability `top_p` together.
fn nucleus(scores: &[f32], order: &[usize], top_p: f32) -> usize {
    let remaining: Vec<f32> = order.iter().map(|&choice| scores[choice]).collect();
    let normaliser = log_sum_exp(&remaining);
    let mut mass = 0.0;
    let reaches = remaining.iter().position(|&score| {
        mass += (f64::from(score) - normaliser).exp();
        mass >= f64::from(top_p)
    });
    reaches.map_or(order.len(), |last| last + 1)
}

/// The logarithm of the sum of exponentials.
fn log_sum_exp(scores: &[f32]) -> f64 {
    let (top, sums) = block_sums(scores);
    f64::from(top) + total(&sums).ln()
}

/// The greatest score, and the sum of `e^(score − greatest)` of each block of scores.
fn block_sums(scores: &[f32]) -> (f32, Vec<f32>) {
    let mut sums = vec![0.0; scores.len().div_ceil(BLOCK)];
    let top = vectorised(|| {
        let top = vector::max(scores);
        let mut weights = [0.0; BLOCK];
        for (sum, scores) in sums.iter_mut().zip(scores.chunks(BLOCK)) {
            let weights = &mut weights[..scores.len()];
            weights.iter_mut().zip(scores).for_each(|(slot, score)| *slot = weight(*score, top));
            *sum = vector::sum(weights);
        }
        top
    });
    (top, sums)
}

fn total(sums: &[f32]) -> f64 {
    sums.iter().map(|sum| f64::from(*sum)).sum()
}

/// `e^(score − top)`, and nothing of a score that was cut away.
#[inline(always)]
fn weight(score: f32, top: f32) -> f32 {
    if score == f32::NEG_INFINITY { 0.0 } else { vector::exp(score - top) }
}

/// The index in whose interval of the cumulative sum `uniform` falls; never one of probability 0.
fn inverse_cdf(probabilities: impl Iterator<Item = f64>, uniform: f64) -> usize {
    let mut cumulative = 0.0;
    let mut last = 0;
    for (choice, probability) in probabilities.enumerate() {
        if probability > 0.0 {
            cumulative += probability;
            last = choice;
        }
        if uniform < cumulative {
            return choice;
        }
    }
    // Rounding can leave the sum a hair below a draw close to 1.
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 4] = [1.0, 3.0, 2.0, 0.0];
    const PLAIN: Shaping = Shaping { temperature: 1.0, top_k: None, top_p: 1.0, min_p: 0.0, greedy: false };

    fn frequencies(law: &Distribution) -> Vec<f64> {
        let n = 20_000;
        let mut counts = vec![0.0; LOGITS.len()];
        for i in 0..n {
            counts[law.draw((f64::from(i) + 0.5) / f64::from(n))] += 1.0 / f64::from(n);
        }
        counts
    }

    fn check(shaping: Shaping, expected: [f64; 4]) {
        let law = Distribution::new(LOGITS.to_vec(), &shaping);
        for (choice, (got, expected)) in frequencies(&law).iter().zip(expected).enumerate() {
            assert!((got - expected).abs() < 1e-3, "{shaping:?}: {got} is not {expected}");
            assert!((law.probability(choice) - expected).abs() < 1e-6);
            assert!((f64::from(law.log_prob(choice)).exp() - expected).abs() < 1e-6);
        }
    }

    /// Expected values by NumPy 2.4: softmax of the logits after each shape by its definition.
    #[test]
    fn frequencies_are_the_laws() {
        check(PLAIN, [0.087_144_3, 0.643_914_3, 0.236_882_8, 0.032_058_6]);
        check(Shaping { temperature: 0.5, ..PLAIN }, [0.015_842_2, 0.864_954_9, 0.117_058_9, 0.002_144_0]);
    }

    #[test]
    fn truncation_keeps_the_likeliest() {
        let two = [0.0, 0.731_058_6, 0.268_941_4, 0.0];
        check(Shaping { top_k: Some(2), ..PLAIN }, two);
        check(Shaping { top_p: 0.7, ..PLAIN }, two);
        // e^-1 = 0.368 of the best remains at 0.3 and goes at 0.4.
        check(Shaping { min_p: 0.3, ..PLAIN }, two);
        for one in [
            Shaping { top_p: 0.1, ..PLAIN },
            Shaping { min_p: 0.4, ..PLAIN },
            Shaping { greedy: true, ..PLAIN },
            Shaping { top_k: Some(1), ..PLAIN },
        ] {
            check(one, [0.0, 1.0, 0.0, 0.0]);
        }
        check(Shaping { top_k: Some(9), ..PLAIN }, [0.087_144_3, 0.643_914_3, 0.236_882_8, 0.032_058_6]);
    }

    #[test]
    fn of_equal_scores_the_first_remains() {
        for shaping in [Shaping { greedy: true, ..PLAIN }, Shaping { top_k: Some(1), ..PLAIN }] {
            assert_eq!(Distribution::new(vec![1.0, 2.0, 2.0], &shaping).draw(0.999), 1);
        }
    }

    #[test]
    fn guidance_of_one_is_none_and_of_more_moves_away_from_the_unconditional() {
        let law = |scale: f32, temperature: f32| {
            let shaping = Shaping { temperature, ..PLAIN };
            frequencies(&Distribution::new(guided(&LOGITS, &[0.0; 4], scale), &shaping))
        };
        assert_eq!(law(1.0, 1.0), frequencies(&Distribution::new(LOGITS.to_vec(), &PLAIN)));
        // Against a flat branch, scale 2 is temperature 1/2.
        assert_eq!(law(2.0, 1.0), law(1.0, 0.5));
    }

    #[derive(serde::Deserialize)]
    struct Golden {
        cases: Vec<Case>,
    }

    #[derive(serde::Deserialize)]
    struct Case {
        guidance: f32,
        temperature: f32,
        top_k: Option<usize>,
        top_p: f32,
        min_p: f32,
        conditional: Vec<f32>,
        unconditional: Vec<f32>,
        log_probs: Vec<Option<f32>>,
    }

    #[test]
    fn guidance_and_shapes_are_those_of_transformers() {
        let golden: Golden = serde_json::from_str(include_str!("../../tests/golden/warpers.json")).unwrap();
        assert!(golden.cases.len() >= 28);
        for case in golden.cases {
            let Case { temperature, top_k, top_p, min_p, .. } = case;
            let shaping = Shaping { temperature, top_k, top_p, min_p, greedy: false };
            let scores = match case.guidance {
                1.0 => case.conditional,
                scale => guided(&case.conditional, &case.unconditional, scale),
            };
            let law = Distribution::new(scores, &shaping);
            for (choice, want) in case.log_probs.iter().enumerate() {
                match want {
                    None => assert_eq!(law.probability(choice), 0.0, "{shaping:?}, choice {choice}"),
                    Some(want) => assert!((law.log_prob(choice) - want).abs() < 2e-5, "{shaping:?}, choice {choice}"),
                }
            }
        }
    }

    #[test]
    fn logits_that_are_no_numbers_are_an_error() {
        assert!(Distribution::new(LOGITS.to_vec(), &PLAIN).check().is_ok());
        for logits in [vec![f32::NAN, 1.0], vec![f32::INFINITY, 1.0]] {
            let error = Distribution::new(logits, &PLAIN).check().unwrap_err().to_string();
            assert!(error.contains("not finite") && error.contains("earlier checkpoint"), "{error}");
        }
    }

    #[test]
    fn the_excess_over_another_law_is_what_is_left() {
        let law = Distribution::new(LOGITS.to_vec(), &PLAIN);
        // Over the flat law only choice 1 has more, so every draw is it.
        for uniform in [0.0, 0.5, 0.999] {
            assert_eq!(law.draw_excess(&Distribution::new(vec![0.0; 4], &PLAIN), uniform), 1);
        }
        assert_eq!(law.draw_excess(&law, 0.5), law.draw(0.5));
    }
}
