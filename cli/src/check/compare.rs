//! Holding a result against what is expected. A comparison passes only on `difference <= allowed`, so
//! that a NaN fails unless a NaN is expected.

/// The worst element of a comparison.
#[derive(Clone, Debug, PartialEq)]
pub struct Worst {
    pub index: Vec<usize>,
    pub got: f64,
    pub expected: f64,
    pub difference: f64,
    pub allowed: f64,
}

/// How one output compared.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    pub output: String,
    /// What it was held against: `out` or `ref64`.
    pub against: &'static str,
    pub ok: bool,
    /// `None` when there was nothing to compare, or the shapes differ.
    pub worst: Option<Worst>,
    /// Why the elements could not be compared.
    pub reason: Option<String>,
    pub stats: Stats,
}

/// What a report tells of all elements together.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stats {
    pub count: u64,
    /// The largest difference, and how many units in the last place of f32 at the expected value it is.
    pub max_abs: f64,
    pub ulps: f64,
    /// Σ(got − expected)² / Σ expected², over what is finite.
    pub nmse: f64,
    /// NaNs where none are expected.
    pub nans: u64,
}

/// A unit in the last place of f32 at `x`.
fn ulp(x: f64) -> f64 {
    let x = (x.abs() as f32).clamp(f32::MIN_POSITIVE, f32::MAX);
    // The exponent alone, 23 places down.
    f64::from(f32::from_bits(x.to_bits() & 0x7f80_0000)) * f64::from(f32::EPSILON)
}

impl Stats {
    fn of(got: &[f64], expected: &[f64]) -> Stats {
        let mut stats = Stats { count: got.len() as u64, ..Stats::default() };
        let (mut errors, mut squares) = (0.0, 0.0);
        for (&got, &expected) in got.iter().zip(expected) {
            let off = difference(got, expected);
            stats.nans += u64::from(got.is_nan() && !expected.is_nan());
            if expected.is_finite() {
                squares += expected * expected;
            }
            if off > stats.max_abs {
                (stats.max_abs, stats.ulps) = (off, off / ulp(expected));
            }
            if off.is_finite() {
                errors += off * off;
            }
        }
        stats.nmse = if errors == 0.0 { 0.0 } else { errors / squares };
        stats
    }
}

/// Difference of two elements: 0 when both are NaN or both the same infinity, ∞ when only one of
/// them is finite.
fn difference(got: f64, expected: f64) -> f64 {
    if got == expected || got.is_nan() && expected.is_nan() {
        0.0
    } else if got.is_finite() && expected.is_finite() {
        (got - expected).abs()
    } else {
        f64::INFINITY
    }
}

/// The largest difference; a length that does not fit counts as ∞.
pub fn largest_difference(got: &[f32], expected: &[f64]) -> f64 {
    if got.len() != expected.len() {
        return f64::INFINITY;
    }
    got.iter().zip(expected).map(|(&got, &expected)| difference(got.into(), expected)).fold(0.0, f64::max)
}

/// The largest finite magnitude.
pub fn largest_finite(values: &[f64]) -> f64 {
    values.iter().filter(|x| x.is_finite()).fold(0.0, |most, x| most.max(x.abs()))
}

/// Compares element by element; `allowed` gives the tolerance from the expected value.
pub fn compare(
    output: &str,
    against: &'static str,
    (shape, got): (&[usize], &[f64]),
    (expected_shape, expected): (&[usize], &[f64]),
    allowed: impl Fn(f64) -> f64,
) -> Comparison {
    let refuse = |reason: String| Comparison {
        output: output.into(),
        against,
        ok: false,
        worst: None,
        reason: Some(reason),
        stats: Stats::default(),
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
        let (off, limit) = (difference(got, expected), allowed(expected));
        // An infinity or NaN that is expected allows nothing but itself.
        let limit = if expected.is_finite() { limit } else { 0.0 };
        let passes = off <= limit;
        ok &= passes;
        // By how much the tolerance is exceeded ranks the elements.
        let excess = if off == f64::INFINITY || limit.is_nan() { f64::INFINITY } else { off - limit };
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
    Comparison { output: output.into(), against, ok, worst, reason: None, stats: Stats::of(got, expected) }
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
    fn what_is_told_of_all_elements() {
        let stats = Stats::of(&[1.0, 2.0 + 2f64.powi(-22), f64::NAN], &[1.0, 2.0, 3.0]);
        assert_eq!((stats.count, stats.nans, stats.max_abs), (3, 1, f64::INFINITY));
        let stats = Stats::of(&[1.0, 2.5, f64::NEG_INFINITY], &[1.0, 2.0, f64::NEG_INFINITY]);
        assert_eq!((stats.max_abs, stats.ulps, stats.nmse), (0.5, 0.5 * 2f64.powi(22), 0.25 / 5.0));
        assert_eq!(Stats::of(&[0.0], &[0.0]), Stats { count: 1, ..Stats::default() });
        // Nothing is as wrong as something where nothing is expected.
        assert_eq!(Stats::of(&[1e-30], &[0.0]).nmse, f64::INFINITY);
        assert_eq!([ulp(1.0), ulp(1.99), ulp(-4.0)], [2f64.powi(-23), 2f64.powi(-23), 2f64.powi(-21)]);
    }

    #[test]
    fn a_broken_tolerance_fails() {
        assert!(!compare("x", "out", (&[1], &[1.0]), (&[1], &[1.0]), |_| f64::NAN).ok);
        // An infinite expectation makes a relative tolerance infinite; it must not let anything pass.
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
