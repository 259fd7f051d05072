//! Compares a result with the expected one. A comparison passes only if `difference <= allowed`, so a NaN fails unless
//! a NaN is expected.

use std::hash::{DefaultHasher, Hash, Hasher};

use wgpu_attention::Dtype;
pub use wgpu_attention_conformance::{difference, largest as largest_finite};

/// The element of a comparison that exceeds its tolerance by the most, or is closest to it.
#[derive(Clone, Debug, PartialEq)]
pub struct Worst {
    pub index: Vec<usize>,
    pub got: f64,
    pub expected: f64,
    pub difference: f64,
    pub allowed: f64,
}

/// The comparison of one output.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    pub output: String,
    /// What it was compared with: `out` or `ref64`.
    pub against: &'static str,
    pub ok: bool,
    /// `None` when there was nothing to compare, or the shapes differ.
    pub worst: Option<Worst>,
    /// Why the elements could not be compared.
    pub reason: Option<String>,
    /// Unknown parts of the case that were ignored.
    pub note: Option<String>,
    pub stats: Stats,
    /// The narrow types that can hold every value.
    pub fits: Vec<Dtype>,
    /// A hash of every bit that was compared.
    pub fingerprint: u64,
}

/// Statistics over all elements, for reports.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stats {
    pub count: u64,
    /// The largest difference, and the value expected there.
    pub max_abs: f64,
    pub there: f64,
    /// Σ(got − expected)² and Σ expected² over finite elements.
    pub errors: f64,
    pub squares: f64,
    /// NaNs where none are expected.
    pub nans: u64,
}

/// The unit in the last place of a type at `x`.
pub fn ulp(x: f64, dtype: Dtype) -> f64 {
    // The exponent of the smallest normal number, and the number of fraction bits.
    let (least, places) = match dtype {
        Dtype::F16 => (-14, 10),
        Dtype::BF16 => (-126, 7),
        _ => (-126, 23),
    };
    let x = x.abs().clamp(2f64.powi(least), f64::from(f32::MAX));
    // Only the exponent.
    f64::from_bits(x.to_bits() & (0x7ff << 52)) * 2f64.powi(-places)
}

impl Stats {
    fn of(got: &[f64], expected: &[f64]) -> Stats {
        let mut stats = Stats { count: got.len() as u64, ..Stats::default() };
        for (&got, &expected) in got.iter().zip(expected) {
            let off = difference(got, expected);
            stats.nans += u64::from(got.is_nan() && !expected.is_nan());
            if expected.is_finite() {
                stats.squares += expected * expected;
            }
            if off > stats.max_abs {
                (stats.max_abs, stats.there) = (off, expected);
            }
            if off.is_finite() {
                stats.errors += off * off;
            }
        }
        stats
    }

    /// The normalised mean square error. If the mean square of the expected values is below `floor`, `floor` is used.
    pub fn nmse(&self, floor: f64) -> f64 {
        if self.errors == 0.0 { 0.0 } else { self.errors / self.squares.max(self.count as f64 * floor) }
    }
}

/// The largest difference; ∞ if the lengths differ.
pub fn largest_difference(got: &[f32], expected: &[f64]) -> f64 {
    if got.len() != expected.len() {
        return f64::INFINITY;
    }
    got.iter().zip(expected).map(|(&got, &expected)| difference(got.into(), expected)).fold(0.0, f64::max)
}

/// Compares element by element; `allowed` gives the tolerance for an expected value.
pub fn compare(
    output: &str,
    against: &'static str,
    got: (&[usize], &[f64]),
    expected: (&[usize], &[f64]),
    allowed: impl Fn(f64) -> f64,
) -> Comparison {
    compare_each(output, against, got, expected, |_, x| allowed(x))
}

/// The same with a tolerance that also depends on the index of the element.
pub fn compare_each(
    output: &str,
    against: &'static str,
    (shape, got): (&[usize], &[f64]),
    (expected_shape, expected): (&[usize], &[f64]),
    allowed: impl Fn(usize, f64) -> f64,
) -> Comparison {
    let mut hasher = DefaultHasher::new();
    got.iter().for_each(|x| x.to_bits().hash(&mut hasher));
    let fingerprint = hasher.finish();
    let holds = |dtype: &Dtype| got.iter().all(|&x| x.is_nan() || f64::from(dtype.round(x as f32)) == x);
    let fits: Vec<Dtype> = [Dtype::F16, Dtype::BF16].into_iter().filter(holds).collect();
    let refuse = |reason: String| Comparison {
        output: output.into(),
        against,
        ok: false,
        worst: None,
        reason: Some(reason),
        note: None,
        stats: Stats::default(),
        fits: Vec::new(),
        fingerprint,
    };
    if shape != expected_shape {
        return refuse(format!("the shape is {shape:?}, but {expected_shape:?} is expected"));
    }
    if got.len() != expected.len() {
        return refuse(format!("there are {} values, but {} are expected", got.len(), expected.len()));
    }
    let mut ok = true;
    let mut worst: Option<(usize, f64, f64)> = None;
    for (at, (&got, &expected)) in got.iter().zip(expected).enumerate() {
        let (off, limit) = (difference(got, expected), allowed(at, expected));
        // An expected infinity or NaN matches only itself.
        let limit = if expected.is_finite() { limit } else { 0.0 };
        // An infinite tolerance comes from a broken answer.
        ok &= limit.is_finite() && off <= limit;
        // Elements are ranked by how far they exceed the tolerance; a matching infinity or NaN ranks last.
        let excess = match (off, expected.is_finite()) {
            (0.0, false) => f64::NEG_INFINITY,
            (off, _) if off == f64::INFINITY || !limit.is_finite() => f64::INFINITY,
            (off, _) => off - limit,
        };
        if worst.is_none_or(|(_, most, _)| excess > most) {
            worst = Some((at, excess, limit));
        }
    }
    let worst = worst.map(|(at, _, allowed)| Worst {
        index: unravel(at, shape),
        got: got[at],
        expected: expected[at],
        difference: difference(got[at], expected[at]),
        allowed,
    });
    let stats = Stats::of(got, expected);
    Comparison { output: output.into(), against, ok, worst, reason: None, note: None, stats, fits, fingerprint }
}

fn unravel(mut at: usize, shape: &[usize]) -> Vec<usize> {
    let mut index = vec![0; shape.len()];
    for (place, &n) in index.iter_mut().zip(shape).rev() {
        (*place, at) = (at % n.max(1), at / n.max(1));
    }
    index
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passes(got: &[f64], expected: &[f64]) -> bool {
        compare("x", "out", (&[got.len()], got), (&[expected.len()], expected), |_| 0.1).ok
    }

    #[test]
    fn what_is_close_enough_passes() {
        assert!(passes(&[1.0, 2.05], &[1.05, 2.0]));
        assert!(passes(&[f64::NEG_INFINITY, f64::NAN], &[f64::NEG_INFINITY, f64::NAN]));
        assert!(passes(&[], &[]));
    }

    #[test]
    fn one_wrong_element_fails_and_is_found() {
        let got = [0.0, 1.0, 2.0, 3.0, 4.5, 5.0];
        let expected = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0];
        let result = compare("x", "out", (&[2, 3], &got), (&[2, 3], &expected), |_| 0.1);
        assert!(!result.ok);
        let worst = result.worst.unwrap();
        assert_eq!((worst.index, worst.difference, worst.allowed), (vec![1, 1], 0.5, 0.1));
    }

    #[test]
    fn nan_and_infinity_fail_unless_expected() {
        for odd in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            assert!(!passes(&[odd], &[1.0]), "{odd} instead of 1");
            assert!(!passes(&[1.0], &[odd]), "1 instead of {odd}");
        }
        assert!(!passes(&[f64::INFINITY], &[f64::NEG_INFINITY]));
        assert!(!passes(&[f64::NAN], &[f64::NEG_INFINITY]));
    }

    #[test]
    fn statistics_of_all_elements() {
        let stats = Stats::of(&[1.0, 2.0 + 2f64.powi(-22), f64::NAN], &[1.0, 2.0, 3.0]);
        assert_eq!((stats.count, stats.nans, stats.max_abs), (3, 1, f64::INFINITY));
        let stats = Stats::of(&[1.0, 2.5, f64::NEG_INFINITY], &[1.0, 2.0, f64::NEG_INFINITY]);
        assert_eq!((stats.max_abs, stats.there, stats.nmse(0.0)), (0.5, 2.0, 0.25 / 5.0));
        assert_eq!(Stats::of(&[0.0], &[0.0]), Stats { count: 1, ..Stats::default() });
        // A non-zero result is infinitely wrong if 0 is expected.
        assert_eq!(Stats::of(&[1e-30], &[0.0]).nmse(0.0), f64::INFINITY);
        // A logarithm near 0 may be slightly off.
        assert_eq!(Stats::of(&[1e-6, 0.0], &[0.0, 0.0]).nmse(1.0), 0.5e-12);
        assert_eq!([1.0, 1.99, -4.0].map(|x| ulp(x, Dtype::F32)), [-23, -23, -21].map(|n| 2f64.powi(n)));
        assert_eq!([1.0, 3.0, 1e-9, 0.0].map(|x| ulp(x, Dtype::F16)), [-10, -9, -24, -24].map(|n| 2f64.powi(n)));
        assert_eq!([1.0, 0.3].map(|x| ulp(x, Dtype::BF16)), [-7, -9].map(|n| 2f64.powi(n)));
    }

    #[test]
    fn the_worst_is_no_infinity_that_is_met() {
        let got = [f64::NEG_INFINITY, 1.0, 2.05];
        let worst = compare("x", "out", (&[3], &got), (&[3], &[f64::NEG_INFINITY, 1.0, 2.0]), |_| 0.1).worst.unwrap();
        assert_eq!((worst.index, worst.got), (vec![2], 2.05));
    }

    #[test]
    fn a_type_fits_that_holds_every_value() {
        let of = |got: &[f64]| compare("x", "out", (&[2], got), (&[2], &[0.0, 1.0]), |_| 9.0).fits;
        assert_eq!(of(&[0.5, f64::NAN]), [Dtype::F16, Dtype::BF16]);
        assert_eq!(of(&[1.0 + 2f64.powi(-10), f64::NEG_INFINITY]), [Dtype::F16]);
        assert_eq!(of(&[1.0 + 2f64.powi(-20), 0.0]), []);
        assert_eq!(of(&[2f64.powi(40), 0.0]), [Dtype::BF16]);
    }

    #[test]
    fn every_bit_has_its_fingerprint() {
        let of = |got: &[f64]| compare("x", "out", (&[2], got), (&[2], &[0.0, 1.0]), |_| 9.0).fingerprint;
        assert_eq!(of(&[0.0, f64::NAN]), of(&[0.0, f64::NAN]));
        assert_ne!(of(&[0.0, 1.5]), of(&[-0.0, 1.5]));
        // As far off, and as large.
        assert_ne!(of(&[0.0, 1.5]), of(&[0.0, 0.5]));
    }

    #[test]
    fn a_broken_tolerance_fails() {
        for tolerance in [f64::NAN, f64::INFINITY] {
            for got in [1.0, f64::NAN] {
                assert!(!compare("x", "out", (&[1], &[got]), (&[1], &[1.0]), |_| tolerance).ok);
            }
        }
        // An infinite expected value makes a relative tolerance infinite; that must not let every result pass.
        assert!(!compare("x", "out", (&[1], &[1.0]), (&[1], &[f64::INFINITY]), |x| 1e-3 * x.abs()).ok);
    }

    #[test]
    fn another_shape_fails_whatever_the_values() {
        assert!(!compare("x", "out", (&[1, 2], &[1.0, 2.0]), (&[2, 1], &[1.0, 2.0]), |_| 0.1).ok);
        assert!(!compare("x", "out", (&[2], &[1.0]), (&[2], &[1.0, 2.0]), |_| 0.1).ok);
        assert_eq!(largest_difference(&[1.0], &[1.0, 2.0]), f64::INFINITY);
        assert_eq!(largest_difference(&[f32::NAN], &[1.0]), f64::INFINITY);
    }
}
