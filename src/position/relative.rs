//! Biases that depend on the distance between query and key.

use super::check_table;
use crate::device::Device;
use crate::error::{Result, shape_error, value_error};
use crate::lower::Recording;
use crate::problem::MAX_LEN;
use crate::tensor::Tensor;

/// All distances `j − (i + offset)` between `len_q` queries and `len_k` keys.
#[derive(Clone, Copy)]
pub(super) struct Distances {
    pub len_q: usize,
    pub len_k: usize,
    pub offset: i64,
}

/// An error if [`Distances`] or the kernel cannot handle the lengths.
pub(super) fn check(device: &Device, shape: [usize; 4], offset: i64) -> Result<()> {
    let [_, _, len_q, len_k] = shape;
    if len_q >= MAX_LEN || len_k >= MAX_LEN {
        return Err(shape_error!("len_q = {len_q} and len_k = {len_k} must be less than {MAX_LEN}"));
    }
    if offset.unsigned_abs() > MAX_LEN as u64 {
        return Err(value_error!("offset = {offset} must lie within ±{MAX_LEN}"));
    }
    check_table(device, "a bias", &shape)
}

impl Distances {
    /// From the first key relative to the last query, to the last key relative to the first query.
    fn all(self) -> std::ops::RangeInclusive<i64> {
        let first = 1 - self.len_q.max(1) as i64 - self.offset;
        first..=self.len_k.max(1) as i64 - 1 - self.offset
    }

    /// The smallest and the largest magnitude.
    pub fn magnitudes(self) -> (u64, u64) {
        let (first, last) = (*self.all().start(), *self.all().end());
        let nearest = if first <= 0 && last >= 0 { 0 } else { first.unsigned_abs().min(last.unsigned_abs()) };
        (nearest, first.unsigned_abs().max(last.unsigned_abs()))
    }

    /// The column of each distance; query `i` and key `j` have entry `j − i + len_q − 1`.
    pub fn columns(self, column: impl FnMut(i64) -> u32) -> Vec<u32> {
        if self.len_q == 0 || self.len_k == 0 {
            return Vec::new();
        }
        self.all().map(column).collect()
    }
}

/// `factor · X[b, h, i, column(j − i)]` for X that broadcasts to `[b, h, i, columns]`.
pub(super) async fn by_distance(x: &Tensor, columns: &[u32], shape: [usize; 4], factor: f32) -> Result<Tensor> {
    Recording::for_step(&x.device()).submit(|to| to.relative(x, columns, shape, factor)).await
}
