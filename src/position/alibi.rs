//! Attention with linear biases (Press et al. 2022, "Train Short, Test Long", section 3).

use super::relative::{Distances, by_distance, check};
use super::{check_len, check_table};
use crate::device::Device;
use crate::error::{Result, value_error};
use crate::tensor::Tensor;
#[cfg(not(target_arch = "wasm32"))]
use crate::wait::wait_for;

/// One slope per head: `2^(−8h / heads)`, with `h` from 1, if `heads` is a power of two. Otherwise the slopes of the
/// next lower power of two, followed by every second slope of twice that power (the paper's code; BLOOM, MPT).
pub fn slopes(heads: usize) -> Result<Vec<f32>> {
    exact_slopes(heads).map(|slopes| slopes.into_iter().map(|slope| slope as f32).collect())
}

fn exact_slopes(heads: usize) -> Result<Vec<f64>> {
    if heads == 0 {
        return Err(value_error!("ALiBi needs at least one head, not 0"));
    }
    check_len("heads", heads)?;
    let below = 1usize << heads.ilog2();
    let slope = |h: usize, of: usize| (-8.0 * h as f64 / of as f64).exp2();
    let first = (1..=below).map(|h| slope(h, below));
    Ok(first.chain((0..heads - below).map(|n| slope(2 * n + 1, 2 * below))).collect())
}

/// The bias `[heads, len_q, len_k]` for [`Attention::bias`](crate::Attention::bias). Query `i` is at the position of
/// key `i + offset`, and each step away from it subtracts the head's slope:
///
/// ```text
/// B[h, i, j] = −slope(h) · |i + offset − j|
/// ```
///
/// With a causal mask this is the paper's bias; without one, its symmetric form. BLOOM adds `slope · j` instead, which
/// differs by a constant per query and therefore gives the same weights.
#[cfg(not(target_arch = "wasm32"))]
pub fn bias(device: impl Into<Device>, heads: usize, len_q: usize, len_k: usize, offset: i64) -> Result<Tensor> {
    wait_for(bias_async(device, heads, len_q, len_k, offset))
}

/// Like [`bias`], without blocking.
pub async fn bias_async(
    device: impl Into<Device>,
    heads: usize,
    len_q: usize,
    len_k: usize,
    offset: i64,
) -> Result<Tensor> {
    let device = device.into();
    check(&device, [1, heads, len_q, len_k], offset)?;
    let slopes = exact_slopes(heads)?;
    let distances = Distances { len_q, len_k, offset };
    // One column for every |i + offset − j| that occurs, from the smallest.
    let (nearest, farthest) = distances.magnitudes();
    let columns = (farthest - nearest + 1) as usize;
    check_table(&device, "the ALiBi table", &[heads, columns])?;
    let values: Vec<f32> = slopes
        .iter()
        .flat_map(|slope| (nearest..=farthest).map(move |distance| (-slope * distance as f64) as f32))
        .collect();
    let table = Tensor::from_slice(&device, &[1, heads, 1, columns], &values)?;
    let columns = distances.columns(|distance| (distance.unsigned_abs() - nearest) as u32);
    by_distance(&table, &columns, [1, heads, len_q, len_k], 1.0).await?.select(0, 0)
}
