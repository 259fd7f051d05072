//! Compares results with the truth row by row. A row is the last axis, and each row has its own bound, because a bound
//! relative to the largest value of all rows would accept any error in a small row.

use wgpu_attention::{Dtype, Tensor};

use crate::run::Got;

/// A comparable result: values whose last axis is `width` long.
pub trait Rows {
    /// Row-major.
    fn values(&self) -> Vec<f32>;
    fn width(&self) -> usize;
    /// The type that values are rounded to.
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }
}

impl Rows for Tensor {
    fn values(&self) -> Vec<f32> {
        self.download().unwrap_or_else(|error| panic!("a result of shape {:?}: {error}", self.shape()))
    }
    fn width(&self) -> usize {
        self.shape().last().copied().unwrap_or(1)
    }
    fn dtype(&self) -> Dtype {
        Tensor::dtype(self)
    }
}

impl Rows for Got {
    fn values(&self) -> Vec<f32> {
        self.values.clone()
    }
    fn width(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }
    fn dtype(&self) -> Dtype {
        self.dtype
    }
}

/// Values and the width of their rows.
impl<V: AsRef<[f32]>> Rows for (V, usize) {
    fn values(&self) -> Vec<f32> {
        self.0.as_ref().to_vec()
    }
    fn width(&self) -> usize {
        self.1
    }
}

/// Half a unit in the last place of the type that values are rounded to, relative to the values; 0 for f32.
pub fn rounding(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F16 => 1.0 / 2048.0,
        Dtype::BF16 => 1.0 / 256.0,
        _ => 0.0,
    }
}

/// Half the spacing of the numbers around `x`; 0 for f32, whose rounding is part of any tolerance.
pub fn half_ulp(x: f64, dtype: Dtype) -> f64 {
    // The exponent of the smallest normal number: below it numbers are evenly spaced.
    let least = if dtype == Dtype::F16 { -14 } else { -126 };
    let x = x.abs().max(2f64.powi(least));
    // Only the exponent.
    f64::from_bits(x.to_bits() & (0x7ff << 52)) * rounding(dtype)
}

/// The largest finite magnitude.
pub fn largest(values: &[f64]) -> f64 {
    values.iter().filter(|x| x.is_finite()).fold(0.0, |most, x| most.max(x.abs()))
}

/// The error of `got`: 0 if both are NaN or the same infinity, ∞ if only one of them is finite.
pub fn difference(got: f64, expected: f64) -> f64 {
    if got == expected || got.is_nan() && expected.is_nan() {
        0.0
    } else if got.is_finite() && expected.is_finite() {
        (got - expected).abs()
    } else {
        f64::INFINITY
    }
}

/// The largest difference of one row, relative to its largest expected value, and its index. NaN and ∞ must match
/// exactly.
pub fn worst(row: &[f32], expected: &[f64]) -> (f64, usize) {
    worst_of(&(row, row.len()), expected, |_, row| largest(row))
}

/// The largest difference, in units of the scale of its row, and its index. `scale` takes the index of a row and its
/// expected values. Half a unit in the last place of a half type is not counted.
pub fn worst_of(got: &impl Rows, expected: &[f64], scale: impl Fn(usize, &[f64]) -> f64) -> (f64, usize) {
    let (values, width, dtype) = (got.values(), got.width().max(1), got.dtype());
    assert_eq!(values.len(), expected.len(), "lengths differ");
    let mut worst = (0.0, 0);
    for (n, (row, expected)) in values.chunks(width).zip(expected.chunks(width)).enumerate() {
        // A row that is not finite has no small differences.
        let scale = Some(scale(n, expected)).filter(|scale| scale.is_finite()).unwrap_or(0.0).max(1e-30);
        for (at, (&x, &e)) in row.iter().zip(expected).enumerate() {
            let off = difference(x.into(), e);
            // A value that is slightly larger before rounding may have a larger rounding error.
            let rounded = if off.is_finite() { half_ulp(e.abs().max(f64::from(x.abs())), dtype) } else { 0.0 };
            let off = (off - rounded).max(0.0) / scale;
            if off > worst.0 {
                worst = (off, n * width + at);
            }
        }
    }
    worst
}

/// Panics with the worst element unless all errors are within `tolerance` times the largest expected value of their
/// row, plus half a unit in the last place if results are rounded to a half type.
#[track_caller]
pub fn assert_close(what: &str, got: &impl Rows, expected: &[f64], tolerance: f64) {
    assert_close_to(what, got, expected, |_, row| largest(row), tolerance);
}

/// The same for logarithms, each judged separately. One near 0 is not judged relative to its size, because it is no
/// more precise than one near 1.
#[track_caller]
pub fn assert_logs_close(what: &str, got: &impl Rows, expected: &[f64], tolerance: f64) {
    assert_close_to(what, &(got.values(), 1), expected, |_, one| largest(one).max(1.0), tolerance);
}

/// The same with a given scale for each row, for rows whose values are sums of larger ones that cancel.
#[track_caller]
pub fn assert_close_to(
    what: &str,
    got: &impl Rows,
    expected: &[f64],
    scale: impl Fn(usize, &[f64]) -> f64,
    tolerance: f64,
) {
    let (off, at) = worst_of(got, expected, &scale);
    if off <= tolerance {
        return;
    }
    let (values, width) = (got.values(), got.width().max(1));
    let row = &expected[at / width * width..][..width];
    panic!(
        "{what}: off by {off:.3e} of the scale of its row, {:.3e}, {tolerance:.1e} allowed; [{at}] is {} and should be {} \
         (row {} of {width} values)",
        scale(at / width, row),
        values[at],
        expected[at],
        at / width,
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passes(got: &[f32], width: usize, expected: &[f64]) -> bool {
        std::panic::catch_unwind(|| assert_close("x", &(got, width), expected, 1e-6)).is_ok()
    }

    #[test]
    fn the_comparer_can_fail() {
        assert_eq!(worst(&[1.0, 2.0], &[1.0, 2.0]).0, 0.0);
        assert!(worst(&[1.0, 2.1], &[1.0, 2.0]).0 > 0.04);
        assert_eq!(worst(&[f32::NAN, 2.0], &[1.0, 2.0]), (f64::INFINITY, 0));
        assert_eq!(worst(&[1.0, 2.0], &[1.0, f64::NAN]), (f64::INFINITY, 1));
        assert_eq!(worst(&[1.0, f32::INFINITY], &[1.0, f64::NEG_INFINITY]), (f64::INFINITY, 1));
        assert_eq!(worst(&[f32::NAN, f32::NEG_INFINITY], &[f64::NAN, f64::NEG_INFINITY]).0, 0.0);
        assert!(passes(&[1.0, 2.0], 2, &[1.0, 2.0]) && !passes(&[1.0, 2.1], 2, &[1.0, 2.0]));
        assert!(!passes(&[1.0, f32::NAN], 2, &[1.0, 2.0]) && !passes(&[0.0], 1, &[f64::NEG_INFINITY]));
    }

    #[test]
    fn a_small_row_beside_a_large_one_has_a_bound() {
        let expected = [1e4, 2e4, 1.0, 2.0];
        // Within 1e-6 of the large row, far from the small one.
        assert!(!passes(&[1e4, 2e4, 1.0, 2.01], 2, &expected));
        assert!(passes(&[1e4, 2e4 + 0.01, 1.0, 2.0 + 1e-6], 2, &expected));
        assert_eq!(worst_of(&([1e4, 2e4, 1.0, 3.0], 2), &expected, |_, row| largest(row)), (0.5, 3));
        // If 0 is expected, nothing else is close; in a row that is not finite, nothing is.
        assert!(!passes(&[1.0, 1e-20], 1, &[1.0, 0.0]));
        assert!(!passes(&[f32::INFINITY, 2.1], 2, &[f64::INFINITY, 2.0]));
        assert!(worst_of(&([2.1], 1), &[2.0], |_, _| f64::INFINITY).0 > 1e20);
    }

    #[test]
    fn halves_may_be_off_by_half_of_their_last_place() {
        struct Half(f32, Dtype);
        impl Rows for Half {
            fn values(&self) -> Vec<f32> {
                vec![self.0, 1000.0]
            }
            fn width(&self) -> usize {
                2
            }
            fn dtype(&self) -> Dtype {
                self.1
            }
        }
        let off = |got, dtype, expected| worst_of(&Half(got, dtype), &[expected, 1000.0], |_, row| largest(row)).0;
        // The rounding of the element itself, not of the largest in its row.
        assert!(off(1.0, Dtype::F16, 1.0 + 2f64.powi(-11)) == 0.0);
        assert!(off(1.0, Dtype::F16, 1.0 + 2f64.powi(-10)) > 4e-7);
        assert!(off(1.0, Dtype::BF16, 1.0 + 2f64.powi(-8)) == 0.0);
        assert!(off(1.0, Dtype::BF16, 1.0 + 2f64.powi(-7)) > 3e-6);
        // Below 2^-14 f16 numbers are evenly spaced.
        assert_eq!([1.0, 3.0, 1e-9, 0.0].map(|x| half_ulp(x, Dtype::F16)), [-11, -10, -25, -25].map(|n| 2f64.powi(n)));
        assert_eq!([1.0, 0.3].map(|x| half_ulp(x, Dtype::BF16)), [-8, -10].map(|n| 2f64.powi(n)));
        assert_eq!(half_ulp(1.0, Dtype::F32), 0.0);
    }

    #[test]
    fn a_logarithm_near_zero_is_no_small_thing() {
        let passes = |got: f32, expected: f64| {
            std::panic::catch_unwind(|| assert_logs_close("x", &([got, 9.0], 2), &[expected, 9.0], 1e-6)).is_ok()
        };
        // Each is judged separately, whatever its neighbours are.
        assert!(passes(9e-7, 0.0) && !passes(2e-6, 0.0));
        assert!(passes(1e3, 1e3 + 9e-4) && !passes(1e3, 1e3 + 2e-3));
    }
}
