//! Vector loops over a row of scores. `pulp` compiles them for each SIMD level and selects one at run time.

use pulp::{Arch, Simd, WithSimd};

/// The most lanes of any SIMD level.
const MOST_LANES: usize = 16;

/// `exp(x)` for `x ≤ 0`, 0 below −87; within 2 ulp. Cephes `expf`, without branches or table. NaN stays NaN.
#[inline(always)]
fn exp<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    // Adding and subtracting 1.5 · 2^23 rounds to the nearest integer, which remains in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let number = |x: f32| simd.splat_f32s(x);
    let shifted = simd.mul_add_e_f32s(x, number(std::f32::consts::LOG2_E), number(ROUND));
    let n = simd.sub_f32s(shifted, number(ROUND));
    let r = simd.mul_add_e_f32s(n, number(-0.693_359_4), x);
    let r = simd.mul_add_e_f32s(n, number(2.121_944_4e-4), r);
    let mut p = number(1.987_569_1e-4);
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5, 1.0, 1.0] {
        p = simd.mul_add_e_f32s(p, r, number(c));
    }
    // The low bits of ROUND are 0, so only n is left of `shifted` where the exponent is.
    let exponent = simd.wrapping_dyn_shl_u32s(simd.transmute_u32s_f32s(shifted), simd.splat_u32s(23));
    let y = simd.transmute_f32s_u32s(simd.add_u32s(simd.transmute_u32s_f32s(p), exponent));
    let tiny = simd.less_than_f32s(x, number(-87.0));
    simd.select_f32s(tiny, number(0.0), y)
}

/// The largest element that is not NaN; −∞ if there is none.
pub fn peak(arch: Arch, row: &[f32]) -> f32 {
    arch.dispatch(Peak(row))
}

struct Peak<'a>(&'a [f32]);
impl WithSimd for Peak<'_> {
    type Output = f32;
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f32 {
        // Not the maximum instruction: SIMD levels differ in how it handles NaN.
        let greater = |a: S::f32s, b: S::f32s| simd.select_f32s(simd.greater_than_f32s(b, a), b, a);
        let (vectors, rest) = S::as_simd_f32s(self.0);
        let (fours, ones) = vectors.as_chunks::<4>();
        let mut peaks = [simd.splat_f32s(f32::NEG_INFINITY); 4];
        for four in fours {
            for (peak, &x) in peaks.iter_mut().zip(four) {
                *peak = greater(*peak, x);
            }
        }
        for &x in ones {
            peaks[0] = greater(peaks[0], x);
        }
        let [a, b, c, d] = peaks;
        let most = simd.reduce_max_f32s(greater(greater(a, b), greater(c, d)));
        rest.iter().fold(most, |a, &b| if b > a { b } else { a })
    }
}

/// Number of elements that are summed in f32; the sums of such blocks are summed in f64.
const SUMMED: usize = 512;

/// Replaces `x` by `exp(x − shift)` and returns the sum, which keeps the digits of f32 in rows of any length.
pub fn exp_and_sum(arch: Arch, row: &mut [f32], shift: f32) -> f64 {
    row.chunks_mut(SUMMED).map(|block| f64::from(arch.dispatch(Exp(block, shift)))).sum()
}

struct Exp<'a>(&'a mut [f32], f32);
impl WithSimd for Exp<'_> {
    type Output = f32;
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f32 {
        let shift = simd.splat_f32s(self.1);
        let (vectors, rest) = S::as_mut_simd_f32s(self.0);
        let (fours, ones) = vectors.as_chunks_mut::<4>();
        let mut sums = [simd.splat_f32s(0.0); 4];
        for four in fours {
            for (sum, x) in sums.iter_mut().zip(four) {
                *x = exp(simd, simd.sub_f32s(*x, shift));
                *sum = simd.add_f32s(*sum, *x);
            }
        }
        for x in ones {
            *x = exp(simd, simd.sub_f32s(*x, shift));
            sums[0] = simd.add_f32s(sums[0], *x);
        }
        if !rest.is_empty() {
            let mut last = [f32::NEG_INFINITY; MOST_LANES];
            last[..rest.len()].copy_from_slice(rest);
            let (vectors, _) = S::as_mut_simd_f32s(&mut last);
            vectors[0] = exp(simd, simd.sub_f32s(vectors[0], shift));
            sums[1] = simd.add_f32s(sums[1], vectors[0]);
            rest.copy_from_slice(&last[..rest.len()]);
        }
        let [a, b, c, d] = sums;
        simd.reduce_sum_f32s(simd.add_f32s(simd.add_f32s(a, b), simd.add_f32s(c, d)))
    }
}

/// Rows of scores in the online softmax: `width` scores each, `stride` apart.
pub struct SoftmaxStep<'a> {
    pub scores: &'a mut [f32],
    pub stride: usize,
    pub width: usize,
    /// The largest score of each row so far.
    pub peaks: &'a mut [f32],
    /// The sum of each row's weights so far, relative to its largest score.
    pub sums: &'a mut [f64],
    /// What earlier weights of each row must be multiplied with, because its largest score has changed.
    pub factors: &'a mut [f64],
}

impl SoftmaxStep<'_> {
    /// Replaces every score by its weight relative to its row's largest score so far, and adds the weights to the sums.
    pub fn compute(self, arch: Arch) {
        arch.dispatch(self);
    }
}

impl WithSimd for SoftmaxStep<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let rows = self.scores.chunks_mut(self.stride).zip(self.peaks).zip(self.sums).zip(self.factors);
        for (((row, peak), sum), factor) in rows {
            let row = &mut row[..self.width];
            let before = *peak;
            *peak = before.max(Peak(row).with_simd(simd));
            *factor = match *peak > before && before > f32::NEG_INFINITY {
                true => (f64::from(before) - f64::from(*peak)).exp(),
                false => 1.0,
            };
            *sum *= *factor;
            for block in row.chunks_mut(SUMMED) {
                *sum += f64::from(Exp(block, shift(*peak)).with_simd(simd));
            }
        }
    }
}

/// Replaces every score `x` by its weight `exp(x − lse)`, at most 1. A score of −∞ has weight 0 whatever the LSE is.
pub fn weights(arch: Arch, row: &mut [f32], lse: f32) {
    arch.dispatch(FromLse(row, lse));
}

struct FromLse<'a>(&'a mut [f32], f32);
impl WithSimd for FromLse<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let lse = simd.splat_f32s(self.1);
        let (vectors, rest) = S::as_mut_simd_f32s(self.0);
        for x in vectors {
            *x = weight(simd, *x, lse);
        }
        if !rest.is_empty() {
            let mut last = [f32::NEG_INFINITY; MOST_LANES];
            last[..rest.len()].copy_from_slice(rest);
            let (vectors, _) = S::as_mut_simd_f32s(&mut last);
            vectors[0] = weight(simd, vectors[0], lse);
            rest.copy_from_slice(&last[..rest.len()]);
        }
    }
}

/// Not a closure, which the compiler may leave out of what it compiles for the SIMD level.
#[inline(always)]
fn weight<S: Simd>(simd: S, x: S::f32s, lse: S::f32s) -> S::f32s {
    let (zero, hidden) = (simd.splat_f32s(0.0), simd.splat_f32s(f32::NEG_INFINITY));
    let below = simd.sub_f32s(x, lse);
    // Rounding may leave a score above its LSE.
    let below = simd.select_f32s(simd.greater_than_f32s(below, zero), zero, below);
    simd.select_f32s(simd.equal_f32s(x, hidden), zero, exp(simd, below))
}

/// Replaces the gradients `dp` of weights `p` by those of the scores: `p · (dp − delta)`, 0 where the weight is 0.
pub fn score_gradients(arch: Arch, p: &[f32], dp: &mut [f32], delta: f32) {
    let one = |p: f32, dp: f32| if p == 0.0 { 0.0 } else { p * (dp - delta) };
    arch.dispatch(|| dp.iter_mut().zip(p).for_each(|(dp, &p)| *dp = one(p, *dp)));
}

/// What is subtracted from the scores of a row. While no key is visible, every shift gives zeros; −∞ would give NaN.
pub fn shift(peak: f32) -> f32 {
    if peak == f32::NEG_INFINITY { 0.0 } else { peak }
}

/// True if every element is finite.
pub fn all_finite(arch: Arch, row: &[f32]) -> bool {
    struct Finite<'a>(&'a [f32]);
    impl WithSimd for Finite<'_> {
        type Output = bool;
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> bool {
            let (vectors, rest) = S::as_simd_f32s(self.0);
            let zero = simd.splat_f32s(0.0);
            // 0 · x is NaN if x is not finite, and NaN persists in a sum.
            let sum = vectors.iter().fold(zero, |sum, &x| simd.mul_add_e_f32s(x, zero, sum));
            simd.reduce_sum_f32s(sum) == 0.0 && rest.iter().all(|x| x.is_finite())
        }
    }
    arch.dispatch(Finite(row))
}

// These simple loops are left to the compiler, which knows the level within `dispatch`.

/// `row *= factor`.
pub fn scale(arch: Arch, row: &mut [f32], factor: f32) {
    arch.dispatch(|| row.iter_mut().for_each(|x| *x *= factor));
}

/// `to = factor · row`.
pub fn scale_into(arch: Arch, row: &[f32], factor: f32, to: &mut [f32]) {
    arch.dispatch(|| to.iter_mut().zip(row).for_each(|(to, &x)| *to = factor * x));
}

/// `sums += row`, or `sums = row` if the row is the first.
pub fn gather(arch: Arch, sums: &mut [f64], row: &[f32], first: bool) {
    arch.dispatch(|| match first {
        true => sums.iter_mut().zip(row).for_each(|(sum, &x)| *sum = f64::from(x)),
        false => sums.iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(x)),
    });
}

/// `sums *= factor`.
pub fn scale_sums(arch: Arch, sums: &mut [f64], factor: f64) {
    arch.dispatch(|| sums.iter_mut().for_each(|sum| *sum *= factor));
}

/// `row = factor · sums`, rounded.
pub fn scaled(arch: Arch, sums: &[f64], factor: f64, row: &mut [f32]) {
    arch.dispatch(|| row.iter_mut().zip(sums).for_each(|(x, &sum)| *x = (factor * sum) as f32));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(x: f32) -> f32 {
        let mut row = [x];
        exp_and_sum(Arch::new(), &mut row, 0.0);
        row[0]
    }

    #[test]
    fn exp_is_within_two_ulp() {
        let mut row: Vec<f32> = (0..870_000).map(|step| -(step as f32) * 1e-4).collect();
        let exact: Vec<f64> = row.iter().map(|&x| f64::from(x).exp()).collect();
        exp_and_sum(Arch::new(), &mut row, 0.0);
        let ulps = row
            .iter()
            .zip(&exact)
            .map(|(&y, &exact)| (f64::from(y) - exact).abs() / (f64::from(exact as f32) * f64::from(f32::EPSILON)));
        let worst = ulps.fold(0.0, f64::max);
        assert!(worst < 2.0, "{worst} ulp");
        assert_eq!((one(0.0), one(-88.0), one(f32::NEG_INFINITY)), (1.0, 0.0, 0.0));
        assert!(one(f32::NAN).is_nan());
    }

    #[test]
    fn rows_of_every_length() {
        let arch = Arch::new();
        for len in 0..150usize {
            let row: Vec<f32> = (0..len).map(|i| (i as f32 * 0.37).sin()).collect();
            let highest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(peak(arch, &row), highest);
            let mut weights = row.clone();
            let sum = exp_and_sum(arch, &mut weights, highest.max(-1.0));
            let exact: f64 = row.iter().map(|&x| f64::from(x - highest.max(-1.0)).exp()).sum();
            assert!((sum - exact).abs() <= 1e-6 * exact.max(1.0), "{len}");
            let mut halves = row.clone();
            scale(arch, &mut halves, 0.5);
            assert!(halves.iter().zip(&row).all(|(half, x)| *half == x * 0.5));
            assert!(all_finite(arch, &row));
            for at in 0..len {
                for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    let mut row = row.clone();
                    row[at] = bad;
                    assert!(!all_finite(arch, &row));
                    if bad.is_nan() {
                        row[at] = f32::NEG_INFINITY;
                        let without = peak(arch, &row);
                        row[at] = bad;
                        assert_eq!(peak(arch, &row), without);
                    }
                }
            }
        }
    }
}
