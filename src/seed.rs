//! Randomness as a tree: one seed, folded by (run, step, prompt, draw, position).
//!
//! A draw depends on its path alone, so results never depend on batch size, thread or device count.
//! The mixing function is SplitMix64's finaliser (Steele, Lea and Flood, 2014, "Fast splittable
//! pseudorandom number generators").

use serde::{Deserialize, Serialize};

const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// A node of the tree of randomness.
///
/// ```
/// use grpo::Seed;
/// let run = Seed::new(7);
/// assert_eq!(run.fold(3).fold(1), run.fold(3).fold(1));
/// assert_ne!(run.fold(3).fold(1), run.fold(1).fold(3));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Seed(u64);

impl Seed {
    /// The root of a run.
    pub fn new(seed: u64) -> Self {
        Self(mix(seed.wrapping_add(GOLDEN)))
    }

    /// The child with this number.
    #[must_use]
    pub fn fold(self, n: u64) -> Self {
        Self(mix(self.0 ^ mix(n.wrapping_mul(GOLDEN).wrapping_add(GOLDEN))))
    }

    /// The child with this name; used for the branches of a run ("data", "rollout", "held_out").
    #[must_use]
    pub fn named(self, name: &str) -> Self {
        // FNV-1a: a fixed, documented hash; the standard library's may change between releases.
        let hash = name
            .bytes()
            .fold(0xCBF2_9CE4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3));
        self.fold(hash)
    }

    /// One number in `[0, 1)`, with 53 random bits.
    pub fn uniform(self) -> f64 {
        self.draws().uniform()
    }

    /// A stream of draws below this node.
    pub fn draws(self) -> Draws {
        Draws(self.0)
    }
}

/// A sequence of draws from one [`Seed`]: SplitMix64.
#[derive(Clone, Debug)]
pub struct Draws(u64);

impl Draws {
    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GOLDEN);
        mix(self.0)
    }

    /// A number in `[0, 1)`.
    pub fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// An integer in `0..n`; 0 for an empty range. The bias of the multiply-shift is below `n / 2^64`.
    pub fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.bits()) * n as u128) >> 64) as usize
    }

    /// A standard normal number (Box and Muller, 1958).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// A uniformly chosen element; `None` of an empty slice.
    pub fn choose<'a, T>(&mut self, items: &'a [T]) -> Option<&'a T> {
        items.get(self.below(items.len()))
    }

    /// A uniformly random order of `0..n` (Fisher and Yates).
    pub fn permutation(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for last in (1..n).rev() {
            order.swap(last, self.below(last + 1));
        }
        order
    }
}

fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    bits ^ (bits >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// First outputs of SplitMix64 from state 0, as published with the reference implementation.
    #[test]
    fn stream_is_splitmix64() {
        let mut draws = Draws(0);
        let first = [draws.bits(), draws.bits(), draws.bits()];
        assert_eq!(first, [0xE220_A839_7B1D_CDAF, 0x6E78_9E6A_A1B9_65F4, 0x06C4_5D18_8009_454F]);
    }

    #[test]
    fn uniform_has_the_moments_of_a_uniform() {
        let n = 20_000;
        let draws: Vec<f64> = (0..n).map(|i| Seed::new(1).fold(i).uniform()).collect();
        let mean = draws.iter().sum::<f64>() / n as f64;
        let var = draws.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n as f64;
        assert!((mean - 0.5).abs() < 0.01, "mean {mean}");
        assert!((var - 1.0 / 12.0).abs() < 0.002, "variance {var}");
    }

    #[test]
    fn normal_has_unit_variance() {
        let mut draws = Seed::new(2).draws();
        let n = 20_000;
        let sum: f64 = (0..n).map(|_| draws.normal().powi(2)).sum();
        assert!((sum / f64::from(n) - 1.0).abs() < 0.05);
    }

    #[test]
    fn permutation_holds_every_index_once() {
        let mut order = Seed::new(3).draws().permutation(100);
        assert_ne!(order, (0..100).collect::<Vec<_>>());
        order.sort_unstable();
        assert_eq!(order, (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn branches_differ() {
        let run = Seed::new(0);
        assert_ne!(run.named("data"), run.named("rollout"));
        assert_ne!(run.fold(0), run);
    }
}
