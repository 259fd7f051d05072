//! Vector loops over a row of scores. `pulp` compiles them for each SIMD level and picks at run time.

/// `exp(x)` for `x ≤ 0`, 0 below −87; within 2 ulp. Cephes `expf`, written without branches or table so
/// that loops over it become vector code. NaN stays NaN.
#[inline(always)]
fn exp(x: f32) -> f32 {
    // Adding and taking away 1.5 · 2^23 rounds to the nearest integer, which stays in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * 0.693_359_4) - n * -2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let y = p * r * r + r + 1.0;
    let power = (shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127)) << 23;
    if x < -87.0 { 0.0 } else { y * f32::from_bits(power) }
}

/// Independent partial results per loop, so that neighbours need not wait for each other.
const LANES: usize = 16;

#[inline(always)]
fn join(lanes: [f32; LANES], mut f: impl FnMut(f32, f32) -> f32) -> f32 {
    let mut width = LANES / 2;
    let mut lanes = lanes;
    while width > 0 {
        for i in 0..width {
            lanes[i] = f(lanes[i], lanes[i + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// The largest element that is not NaN; −∞ for none.
pub fn peak(arch: pulp::Arch, row: &[f32]) -> f32 {
    arch.dispatch(
        #[inline(always)]
        || {
            let greater = |a: f32, b: f32| if b > a { b } else { a };
            let mut lanes = [f32::NEG_INFINITY; LANES];
            let (chunks, rest) = row.as_chunks::<LANES>();
            for chunk in chunks {
                for i in 0..LANES {
                    lanes[i] = greater(lanes[i], chunk[i]);
                }
            }
            rest.iter().fold(join(lanes, greater), |a, &b| greater(a, b))
        },
    )
}

/// Replaces `x` by `exp(x − peak)` and returns the sum.
pub fn exp_and_sum(arch: pulp::Arch, row: &mut [f32], peak: f32) -> f32 {
    arch.dispatch(
        #[inline(always)]
        || {
            let mut lanes = [0.0; LANES];
            let (chunks, rest) = row.as_chunks_mut::<LANES>();
            for chunk in chunks {
                for i in 0..LANES {
                    chunk[i] = exp(chunk[i] - peak);
                    lanes[i] += chunk[i];
                }
            }
            for x in rest.iter_mut() {
                *x = exp(*x - peak);
            }
            join(lanes, |a, b| a + b) + rest.iter().sum::<f32>()
        },
    )
}

/// True when every element is finite.
pub fn all_finite(arch: pulp::Arch, row: &[f32]) -> bool {
    arch.dispatch(
        #[inline(always)]
        || row.iter().fold(0u32, |worst, x| worst.max(x.to_bits() & 0x7fff_ffff)) < 0x7f80_0000,
    )
}

/// `to = from · factor`.
pub fn scale_into(arch: pulp::Arch, to: &mut [f32], from: &[f32], factor: f32) {
    arch.dispatch(
        #[inline(always)]
        || to.iter_mut().zip(from).for_each(|(to, &from)| *to = from * factor),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp() {
        let mut worst = 0.0f64;
        for step in 0..870_000 {
            let x = -(step as f32) * 1e-4;
            let exact = f64::from(x).exp();
            let ulp = f64::from(exact as f32) * f64::from(f32::EPSILON);
            worst = worst.max((f64::from(exp(x)) - exact).abs() / ulp);
        }
        assert!(worst < 2.0, "{worst} ulp");
        assert_eq!((exp(0.0), exp(-88.0), exp(f32::NEG_INFINITY)), (1.0, 0.0, 0.0));
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn rows_of_every_length() {
        let arch = pulp::Arch::new();
        for len in 0..70usize {
            let row: Vec<f32> = (0..len).map(|i| (i as f32 * 0.37).sin()).collect();
            let highest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(peak(arch, &row), highest);
            let mut weights = row.clone();
            let sum = exp_and_sum(arch, &mut weights, highest.max(-1.0));
            let exact: f64 = row.iter().map(|&x| f64::from(x - highest.max(-1.0)).exp()).sum();
            assert!((f64::from(sum) - exact).abs() <= 1e-6 * exact.max(1.0), "{len}");
            assert!(all_finite(arch, &row));
            for at in 0..len {
                for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    let mut row = row.clone();
                    row[at] = bad;
                    assert!(!all_finite(arch, &row));
                }
            }
        }
    }
}
