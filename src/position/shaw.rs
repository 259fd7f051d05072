//! Relative keys (Shaw et al. 2018, "Self-Attention with Relative Position Representations", section 3.2).

use super::relative::{Distances, check};
use crate::error::{Result, shape_error, value_error};
use crate::gpu::Gpu;
use crate::lower::Recording;
use crate::problem::{MAX_LEN, checked_len};
use crate::tensor::{Tensor, common_device};
#[cfg(not(target_arch = "wasm32"))]
use crate::wait::wait_for;

/// One learned key per clipped distance, `[left + right + 1, dim]`, shared by all heads.
///
/// ```
/// use wgpu_attention::position::shaw::RelativeKeys;
/// use wgpu_attention::{Attention, Device, Tensor};
///
/// # fn main() -> wgpu_attention::Result<()> {
/// let device = Device::new()?;
/// let x = Tensor::from_slice(&device, &[1, 2, 3, 4], &[0.5f32; 24])?;
/// let keys = RelativeKeys::new(&Tensor::from_slice(&device, &[4, 4], &[0.1f32; 16])?, 2, 1)?;
/// let bias = keys.bias(&x, 3, 0, None)?;
/// let attended = Attention::new().bias(bias).forward(&x, &x, &x)?;
/// # assert_eq!(attended.output.shape(), [1, 2, 3, 4]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct RelativeKeys {
    table: Tensor,
    left: usize,
    right: usize,
}

impl RelativeKeys {
    /// A table with any strides, for distances from `−left` (a key before the query) to `right`. Distances beyond are
    /// clipped to these.
    pub fn new(table: &Tensor, left: usize, right: usize) -> Result<RelativeKeys> {
        table.expect_float("the relative keys")?;
        if left >= MAX_LEN || right >= MAX_LEN {
            return Err(value_error!("left = {left} and right = {right} must be less than {MAX_LEN}"));
        }
        match *table.shape() {
            [rows, _] if rows == left + right + 1 => Ok(RelativeKeys { table: table.clone(), left, right }),
            _ => Err(shape_error!(
                "the relative keys {:?} must be [left + right + 1, dim], with {} rows",
                table.shape(),
                left + right + 1
            )),
        }
    }

    pub(crate) fn table(&self) -> &Tensor {
        &self.table
    }

    /// The smallest and the largest distance with its own key.
    pub(crate) fn range(&self) -> [i32; 2] {
        [-(self.left as i32), self.right as i32]
    }

    /// The product of each query of Q `[batch, heads, len_q, dim]` with every relative key.
    pub(crate) fn products(&self, recording: &mut Recording, q: &Tensor) -> Result<Tensor> {
        if self.table.shape()[1] != q.shape()[3] {
            return Err(shape_error!(
                "the relative keys {:?} must be as wide as Q {:?}",
                self.table.shape(),
                q.shape()
            ));
        }
        project_rows(recording, q, &self.table)
    }

    /// The table's row for `distance`, the key's position minus the query's: `clip(distance, −left, right) + left`.
    pub fn row(&self, distance: i64) -> usize {
        (distance.clamp(-(self.left as i64), self.right as i64) + self.left as i64) as usize
    }

    /// What relative keys A add to the scores, `[.., heads, len_q, len_k]` for
    /// [`Attention::bias`](crate::Attention::bias):
    ///
    /// ```text
    /// B[b, h, i, j] = scale · Q[b, h, i] · A[clip(j − i − offset, −left, right) + left]
    /// ```
    ///
    /// Q is `[batch, heads, len_q, dim]` with any strides; leading axes may be missing as in
    /// [`Attention::forward`](crate::Attention::forward). Query `i` is at the position of key `i + offset`. `scale` is
    /// that of the attention, `1/√dim` by default. The product with A is computed once per row of A, not per key
    /// (section 3.3).
    #[cfg(not(target_arch = "wasm32"))]
    pub fn bias(&self, q: &Tensor, len_k: usize, offset: i64, scale: Option<f32>) -> Result<Tensor> {
        wait_for(self.bias_async(q, len_k, offset, scale))
    }

    /// Like [`RelativeKeys::bias`], without blocking.
    pub async fn bias_async(&self, q: &Tensor, len_k: usize, offset: i64, scale: Option<f32>) -> Result<Tensor> {
        let device = common_device(&self.table, [("Q", q)])?;
        Recording::for_step(&device).submit(|to| self.record(to, q, len_k, offset, scale)).await
    }

    /// Like [`RelativeKeys::bias`], recorded into the caller's encoder under the same conditions as
    /// [`Attention::encode`](crate::Attention::encode).
    pub fn encode(
        &self,
        gpu: &Gpu,
        encoder: &mut wgpu::CommandEncoder,
        q: &Tensor,
        len_k: usize,
        offset: i64,
        scale: Option<f32>,
    ) -> Result<Tensor> {
        let device = common_device(&self.table, [("Q", q)])?;
        Recording::for_encoder(gpu, encoder, &device)?.encode(encoder, |to| self.record(to, q, len_k, offset, scale))
    }

    fn record(
        &self,
        recording: &mut Recording,
        q: &Tensor,
        len_k: usize,
        offset: i64,
        scale: Option<f32>,
    ) -> Result<Tensor> {
        q.expect_float("Q")?;
        let four = q.as_four_axes("Q")?;
        let [batch, heads, len_q, dim] = four.four_axes();
        let shape = [batch, heads, len_q, len_k];
        check(&q.device(), shape, offset)?;
        let scale = scale.unwrap_or(1.0 / (dim.max(1) as f32).sqrt());
        if !scale.is_finite() {
            return Err(value_error!("scale = {scale} must be finite"));
        }
        let products = self.products(recording, &four)?;
        let columns = Distances { len_q, len_k, offset }.columns(|distance| self.row(distance) as u32);
        let bias = recording.relative(&products, &columns, shape, scale)?;
        let lead = &q.shape()[..q.shape().len() - 1];
        bias.reshape(&lead.iter().copied().chain([len_k]).collect::<Vec<_>>())
    }
}

/// `X·Wᵀ` of every row of X `[a, b, c, in]`: `[a, b, c, out]`.
fn project_rows(recording: &mut Recording, x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let [a, b, c, dim] = x.four_axes();
    let out = w.shape()[0];
    let (ab, ac) = (checked_len(&[a, b])?, checked_len(&[a, c])?);
    // In every order that a layer produces, two of the leading axes merge; anything else is copied.
    if let Ok(merged) = x.reshape(&[ab, c, dim]) {
        return recording.project(&merged, w, None, &[])?.reshape(&[a, b, c, out]);
    }
    if let Ok(merged) = x.permute(&[0, 2, 1, 3])?.reshape(&[ac, b, dim]) {
        return recording.project(&merged, w, None, &[])?.reshape(&[a, c, b, out])?.permute(&[0, 2, 1, 3]);
    }
    let copied = recording.row_major(x)?.reshape(&[ab, c, dim])?;
    recording.project(&copied, w, None, &[])?.reshape(&[a, b, c, out])
}
