//! Row functions on slices: exponentials, sums and the softmax, vectorised by the compiler.
//!
//! Sums run over sixteen fixed lanes that are added in a fixed tree, so they do not depend on the machine's
//! vector width. The functions are meant to be inlined into a loop under [`vectorised!`]; none uses a fused
//! multiply-add, which is a call into the library wherever that inlining does not happen.

/// Lanes of a sum.
const LANES: usize = 16;

/// An expression compiled for the widest vectors of this machine.
///
/// Only what is inlined is compiled for them, and the compiler leaves alone what is long. Of the expression itself the
/// macro sees to that; every function that it calls has to be `#[inline(always)]`, and a closure of more than a line is
/// better a loop.
macro_rules! vectorised {
    ($work:expr) => {{
        let once = $crate::ops::vector::Once;
        pulp::Arch::new().dispatch(
            #[inline(always)]
            || {
                let _moved = once;
                $work
            },
        )
    }};
}
pub(crate) use vectorised;

/// A closure that moves it can be called only once. Others would be called through a function that the compiler makes
/// for calling them as if they could, which no attribute inlines.
pub(crate) struct Once;

/// `eˣ` within two units in the last place; 1.2e-38 below -87.3, where the true value is no normal number.
///
/// Argument reduction by Cody and Waite (1980) and the Taylor polynomial of degree 7 on `|r| <= ln 2 / 2`.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    /// Adding it rounds to an integer in the low bits of the mantissa.
    const MAGIC: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.3, 88.3);
    let shifted = x * std::f32::consts::LOG2_E + MAGIC;
    let n = shifted - MAGIC;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    let mut poly = 1.0 / 5040.0;
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        poly = r * poly + coefficient;
    }
    let exponent = shifted.to_bits().wrapping_sub(MAGIC.to_bits()).wrapping_add(127);
    poly * f32::from_bits(exponent << 23)
}

/// `1 / (1 + e⁻ˣ)`.
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The sum of `term` over pairs of elements, in lanes.
#[inline(always)]
fn lane_sum(a: &[f32], b: &[f32], term: impl Fn(f32, f32, f32) -> f32) -> f32 {
    let n = a.len().min(b.len());
    let (a_lanes, a_rest) = a[..n].as_chunks::<LANES>();
    let (b_lanes, b_rest) = b[..n].as_chunks::<LANES>();
    let mut sums = [0.0; LANES];
    for (x, y) in a_lanes.iter().zip(b_lanes) {
        for lane in 0..LANES {
            sums[lane] = term(sums[lane], x[lane], y[lane]);
        }
    }
    for (lane, (x, y)) in a_rest.iter().zip(b_rest).enumerate() {
        sums[lane] = term(sums[lane], *x, *y);
    }
    tree(sums, |x, y| x + y)
}

#[inline(always)]
fn tree(mut lanes: [f32; LANES], join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] = join(lanes[lane], lanes[lane + half]);
        }
        half /= 2;
    }
    lanes[0]
}

/// The sum of products.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    lane_sum(a, b, |sum, x, y| sum + x * y)
}

/// The sum.
#[inline(always)]
pub(crate) fn sum(a: &[f32]) -> f32 {
    lane_sum(a, a, |sum, x, _| sum + x)
}

/// The greatest element; negative infinity of nothing.
#[inline(always)]
pub(crate) fn max(a: &[f32]) -> f32 {
    let (lanes, rest) = a.as_chunks::<LANES>();
    let mut best = [f32::NEG_INFINITY; LANES];
    for x in lanes {
        for lane in 0..LANES {
            best[lane] = if x[lane] > best[lane] { x[lane] } else { best[lane] };
        }
    }
    for (lane, x) in rest.iter().enumerate() {
        best[lane] = if *x > best[lane] { *x } else { best[lane] };
    }
    tree(best, |x, y| if x > y { x } else { y })
}

/// Numbers that are worked on where the first `real` of `n` count: whole vectors, for the last few would take longer alone.
#[inline(always)]
pub(crate) fn whole(real: usize, n: usize) -> usize {
    real.next_multiple_of(LANES).min(n)
}

/// Replaces the first `real` scores by `e^(score - max)` and the others by zero; gives the maximum and the sum.
#[inline(always)]
pub(crate) fn exp_shifted(scores: &mut [f32], real: usize) -> (f32, f32) {
    scores[real..].fill(f32::NEG_INFINITY);
    let seen = whole(real, scores.len());
    let top = max(&scores[..seen]);
    for score in &mut scores[..seen] {
        *score = exp(*score - top);
    }
    scores[real..].fill(0.0);
    (top, sum(&scores[..seen]))
}

/// `out += Σ weight · line`, the lines of `matrix` lying `stride` apart; each element adds in line order.
#[inline(always)]
pub(crate) fn add_weighted(out: &mut [f32], weights: &[f32], matrix: &[f32], stride: usize) {
    /// Lines taken together, so that `out` is loaded and stored once for all of them.
    const TOGETHER: usize = 4;
    let n = out.len();
    let (fours, rest) = weights.as_chunks::<TOGETHER>();
    for (index, [w0, w1, w2, w3]) in fours.iter().enumerate() {
        let line = |offset: usize| &matrix[(index * TOGETHER + offset) * stride..][..n];
        let (m0, m1, m2, m3) = (line(0), line(1), line(2), line(3));
        for i in 0..n {
            out[i] = out[i] + w0 * m0[i] + w1 * m1[i] + w2 * m2[i] + w3 * m3[i];
        }
    }
    for (index, weight) in rest.iter().enumerate() {
        let line = &matrix[(fours.len() * TOGETHER + index) * stride..][..n];
        for i in 0..n {
            out[i] += weight * line[i];
        }
    }
}

/// `out += x`.
#[inline(always)]
pub(crate) fn add(out: &mut [f32], x: &[f32]) {
    for (slot, value) in out.iter_mut().zip(x) {
        *slot += *value;
    }
}

/// `1 / √(mean of squares + eps)`.
#[inline(always)]
pub(crate) fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::normals;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        for i in 0..200_000 {
            let x = -87.0 + i as f32 * (175.0 / 200_000.0);
            let (got, want) = (exp(x), f64::from(x).exp());
            assert!(((f64::from(got) - want) / want).abs() < 2.4e-7, "exp({x}) = {got}, not {want}");
        }
        assert!(exp(f32::NEG_INFINITY) < 2e-38 && exp(0.0) == 1.0);
    }

    #[test]
    fn sums_and_maxima_cover_every_element() {
        for n in [0, 1, 15, 16, 17, 100] {
            let x = normals(5, n);
            let (total, squares): (f64, f64) =
                x.iter().map(|v| f64::from(*v)).fold((0.0, 0.0), |(s, q), v| (s + v, q + v * v));
            assert!((f64::from(sum(&x)) - total).abs() < 1e-4);
            assert!((f64::from(dot(&x, &x)) - squares).abs() < 1e-4);
            assert_eq!(max(&x), x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        }
    }
}
