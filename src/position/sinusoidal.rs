//! Sinusoidal position tables.

use super::check_len;
use crate::error::{Result, value_error};
use crate::memory::check_floats;
use crate::state_dict::HostTensor;

/// Sinusoids for positions `start..start + len`, `[len, dim]` (Vaswani et al. 2017, section 3.5):
///
/// ```text
/// PE[p, 2i] = sin(p / 10000^(2i / dim))      PE[p, 2i + 1] = cos(p / 10000^(2i / dim))
/// ```
///
/// An odd `dim` ends with a sine.
pub fn sinusoidal(start: usize, len: usize, dim: usize) -> Result<HostTensor> {
    table(start, len, dim, |position, d| {
        let angle = position / 10000f64.powf((d / 2 * 2) as f64 / dim as f64);
        if d % 2 == 0 { angle.sin() } else { angle.cos() }
    })
}

/// Sinusoids in tensor2tensor's layout, `[len, dim]`: sines in the first half, cosines in the second, at
/// frequencies `10000^(−i / (dim / 2 − 1))`. An odd `dim` ends with 0.
pub fn sinusoidal_halves(start: usize, len: usize, dim: usize) -> Result<HostTensor> {
    let half = dim / 2;
    let frequency = |i: usize| 10000f64.powf(-(i as f64) / half.saturating_sub(1).max(1) as f64);
    table(start, len, dim, |position, d| match d / half.max(1) {
        _ if d >= 2 * half => 0.0,
        0 => (position * frequency(d)).sin(),
        _ => (position * frequency(d - half)).cos(),
    })
}

fn table(start: usize, len: usize, dim: usize, value: impl Fn(f64, usize) -> f64) -> Result<HostTensor> {
    check_len("the number of positions", len)?;
    check_len("the first position", start)?;
    if dim == 0 {
        return Err(value_error!("sinusoids need dim ≥ 1, not 0"));
    }
    check_floats("sinusoids", &[len, dim])?;
    let rows = start..start + len;
    let data = rows.flat_map(|p| (0..dim).map(move |d| (p, d))).map(|(p, d)| value(p as f64, d) as f32).collect();
    HostTensor::new(&[len, dim], data)
}
