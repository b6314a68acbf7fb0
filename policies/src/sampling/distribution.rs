//! A shaped distribution over choices: probabilities, and draws by the inverse of its cumulative function.

use std::cell::Cell;

use grpo::{Error, Result};

use super::Shaping;
use crate::ops::vector::{self, vectorised};

/// Choices whose weights are summed together, in f32; the sums of blocks are added in f64.
const BLOCK: usize = 256;

/// What remains of a law over choices once it is shaped; choices that were cut away have probability 0.
///
/// Its memory is used again by [`Distribution::shape`] and [`Distribution::shape_guided`].
#[derive(Clone, Debug, Default)]
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
    /// Becomes the shaped softmax of `logits`.
    pub(crate) fn shape(&mut self, logits: &[f32], shaping: &Shaping) {
        self.fill(Unshaped::Plain(logits), shaping);
    }

    /// Becomes the shaped softmax of `u + s·(c − u)` of two log-softmaxes (SimpleAR's `CFGLogits`), the conditional one's
    /// logits `c` and the unconditional one's `u`, with the scale `s`.
    pub(crate) fn shape_guided(&mut self, (c, u): (&[f32], &[f32]), scale: f32, shaping: &Shaping) {
        let sums = (log_sum_exp(c) as f32, log_sum_exp(u) as f32);
        self.fill(Unshaped::Guided { logits: (c, u), sums, scale }, shaping);
    }

    /// Two passes over all scores, one up to the greatest and one for the sums; truncation takes more.
    fn fill(&mut self, unshaped: Unshaped<'_>, shaping: &Shaping) {
        let n = unshaped.len();
        self.scores.resize(n, 0.0);
        self.sums.resize(n.div_ceil(BLOCK), 0.0);
        // A division can make logits equal, and the first of equal ones is the greedy choice.
        let temperature = if shaping.greedy { 1.0 } else { shaping.temperature };
        self.top = vectorised!(write(unshaped, temperature, &mut self.scores));
        if shaping.greedy {
            self.top = keep_first(&mut self.scores, self.top);
        } else if shaping.truncates() {
            truncate(&mut self.scores, self.top, shaping);
        }
        vectorised!(sum_blocks(&self.scores, self.top, &mut self.sums));
        self.normaliser = f64::from(self.top) + total(&self.sums).ln();
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

/// Where scores come from.
#[derive(Clone, Copy)]
enum Unshaped<'a> {
    Plain(&'a [f32]),
    /// Logits of both branches, and the logarithms of the sums of their exponentials.
    Guided {
        logits: (&'a [f32], &'a [f32]),
        sums: (f32, f32),
        scale: f32,
    },
}

impl Unshaped<'_> {
    fn len(&self) -> usize {
        match self {
            Self::Plain(logits) | Self::Guided { logits: (logits, _), .. } => logits.len(),
        }
    }

    /// Writes the scores from `first` on.
    #[inline(always)]
    fn write(&self, first: usize, block: &mut [f32]) {
        match *self {
            Self::Plain(logits) => block.copy_from_slice(&logits[first..][..block.len()]),
            Self::Guided { logits: (c, u), sums: (c_sum, u_sum), scale } => {
                for ((slot, c), u) in block.iter_mut().zip(&c[first..]).zip(&u[first..]) {
                    let (c, u) = (c - c_sum, u - u_sum);
                    *slot = u + scale * (c - u);
                }
            }
        }
    }
}

/// Writes scores and divides and measures each block while it is near; gives the greatest.
#[inline(always)]
fn write(unshaped: Unshaped<'_>, temperature: f32, scores: &mut [f32]) -> f32 {
    let mut top = f32::NEG_INFINITY;
    for (index, block) in scores.chunks_mut(BLOCK).enumerate() {
        unshaped.write(index * BLOCK, block);
        for score in block.iter_mut() {
            *score /= temperature;
        }
        top = greater(top, vector::max(block));
    }
    top
}

/// The sum of `e^(score − top)` of each block of scores.
#[inline(always)]
fn sum_blocks(scores: &[f32], top: f32, sums: &mut [f32]) {
    for (sum, block) in sums.iter_mut().zip(scores.chunks(BLOCK)) {
        *sum = block_sum(block, top);
    }
}

/// Leaves the first score that is the greatest, at 0, which becomes the greatest.
fn keep_first(scores: &mut [f32], top: f32) -> f32 {
    let first = scores.iter().position(|score| *score == top).unwrap_or(0);
    scores.fill(f32::NEG_INFINITY);
    scores.iter_mut().skip(first).take(1).for_each(|score| *score = 0.0);
    0.0
}

thread_local! {
    /// Choices in the order of their scores, and scores in that order, of the law that this thread is about.
    static ORDER: Cell<(Vec<u32>, Vec<f32>)> = const { Cell::new((Vec::new(), Vec::new())) };
}

/// Leaves the choices of top-k, then of top-p, then of min-p; ties at a border fall to the smaller index.
///
/// (transformers keeps every tie of top-k's last score.)
fn truncate(scores: &mut [f32], top: f32, shaping: &Shaping) {
    let kept = shaping.top_k.unwrap_or(scores.len()).min(scores.len());
    if kept < scores.len() || shaping.top_p < 1.0 {
        let (mut order, mut remaining) = ORDER.take();
        order.clear();
        order.extend(0..scores.len() as u32);
        let score = |choice: &u32| scores[*choice as usize];
        let greater_first = |a: &u32, b: &u32| score(b).total_cmp(&score(a)).then(a.cmp(b));
        if kept < order.len() {
            order.select_nth_unstable_by(kept, greater_first);
        }
        let mut reached = kept;
        if shaping.top_p < 1.0 {
            order[..kept].sort_unstable_by(greater_first);
            remaining.clear();
            remaining.extend(order[..kept].iter().map(score));
            reached = nucleus(&remaining, shaping.top_p);
        }
        order[reached..].iter().for_each(|choice| scores[*choice as usize] = f32::NEG_INFINITY);
        ORDER.set((order, remaining));
    }
    if shaping.min_p > 0.0 {
        let least = top + shaping.min_p.ln();
        scores.iter_mut().filter(|score| **score < least).for_each(|score| *score = f32::NEG_INFINITY);
    }
}

/// How many of the scores, greatest first, reach probability `top_p` together.
fn nucleus(scores: &[f32], top_p: f32) -> usize {
    let normaliser = log_sum_exp(scores);
    let mut mass = 0.0;
    let reaches = scores.iter().position(|&score| {
        mass += (f64::from(score) - normaliser).exp();
        mass >= f64::from(top_p)
    });
    reaches.map_or(scores.len(), |last| last + 1)
}

/// The logarithm of the sum of exponentials.
fn log_sum_exp(scores: &[f32]) -> f64 {
    vectorised!({
        let top = vector::max(scores);
        let mut sum = 0.0;
        for block in scores.chunks(BLOCK) {
            sum += f64::from(block_sum(block, top));
        }
        f64::from(top) + sum.ln()
    })
}

/// The sum of `e^(score − top)` of a block of scores.
#[inline(always)]
fn block_sum(scores: &[f32], top: f32) -> f32 {
    let mut weights = [0.0; BLOCK];
    let weights = &mut weights[..scores.len()];
    for (slot, score) in weights.iter_mut().zip(scores) {
        *slot = weight(*score, top);
    }
    vector::sum(weights)
}

/// The greater number; `a` where `b` is none.
#[inline(always)]
fn greater(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
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

    fn shaped(logits: &[f32], shaping: &Shaping) -> Distribution {
        // Memory of a longer law, which must not show.
        let mut law = Distribution { scores: vec![9.0; 700], sums: vec![9.0; 3], ..Distribution::default() };
        law.shape(logits, shaping);
        law
    }

    fn guided(logits: (&[f32], &[f32]), scale: f32, shaping: &Shaping) -> Distribution {
        let mut law = Distribution::default();
        law.shape_guided(logits, scale, shaping);
        law
    }

    fn frequencies(law: &Distribution) -> Vec<f64> {
        let n = 20_000;
        let mut counts = vec![0.0; LOGITS.len()];
        for i in 0..n {
            counts[law.draw((f64::from(i) + 0.5) / f64::from(n))] += 1.0 / f64::from(n);
        }
        counts
    }

    fn check(shaping: Shaping, expected: [f64; 4]) {
        let law = shaped(&LOGITS, &shaping);
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
            assert_eq!(shaped(&[1.0, 2.0, 2.0], &shaping).draw(0.999), 1);
        }
    }

    #[test]
    fn guidance_of_one_is_none_and_of_more_moves_away_from_the_unconditional() {
        let law = |scale: f32, temperature: f32| {
            let shaping = Shaping { temperature, ..PLAIN };
            frequencies(&guided((&LOGITS, &[0.0; 4]), scale, &shaping))
        };
        assert_eq!(law(1.0, 1.0), frequencies(&shaped(&LOGITS, &PLAIN)));
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
            let law = match case.guidance {
                1.0 => shaped(&case.conditional, &shaping),
                scale => guided((&case.conditional, &case.unconditional), scale, &shaping),
            };
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
        assert!(shaped(&LOGITS, &PLAIN).check().is_ok());
        for logits in [vec![f32::NAN, 1.0], vec![f32::INFINITY, 1.0]] {
            let error = shaped(&logits, &PLAIN).check().unwrap_err().to_string();
            assert!(error.contains("not finite") && error.contains("earlier checkpoint"), "{error}");
        }
    }

    #[test]
    fn the_excess_over_another_law_is_what_is_left() {
        let law = shaped(&LOGITS, &PLAIN);
        // Over the flat law only choice 1 has more, so every draw is it.
        for uniform in [0.0, 0.5, 0.999] {
            assert_eq!(law.draw_excess(&shaped(&[0.0; 4], &PLAIN), uniform), 1);
        }
        assert_eq!(law.draw_excess(&law, 0.5), law.draw(0.5));
    }
}
