//! Relative keys (Shaw et al. 2018, "Self-Attention with Relative Position Representations", section 3.2).

use super::relative::{Distances, check};
use crate::error::{Result, shape_error, value_error};
use crate::problem::{MAX_LEN, as_four_axes, checked_len};
use crate::record::Recording;
use crate::tensor::{Tensor, common_device};

/// How far distances are told apart: `clip(distance, −left, right)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clip {
    /// Keys before the query.
    pub left: usize,
    /// Keys behind it.
    pub right: usize,
}

impl Clip {
    /// The table's row of `distance`, the key's position minus the query's: `clip(distance, −left, right) + left`.
    pub fn row(&self, distance: i64) -> usize {
        let (left, right) = (self.left.min(MAX_LEN) as i64, self.right.min(MAX_LEN) as i64);
        (distance.clamp(-left, right) + left) as usize
    }

    fn rows(&self) -> Result<usize> {
        if self.left > MAX_LEN || self.right > MAX_LEN {
            return Err(value_error!("left = {} and right = {} must be at most {MAX_LEN}", self.left, self.right));
        }
        Ok(self.left + self.right + 1)
    }
}

/// The bias `[.., heads, len_q, len_k]` that relative keys add to the scores, for
/// [`Attention::bias`](crate::Attention::bias):
///
/// ```text
/// B[b, h, i, j] = scale · Q[b, h, i] · A[clip(j − i − offset, −left, right) + left]
/// ```
///
/// Q `[batch, heads, len_q, dim]`, any strides, missing leading axes as in
/// [`Attention::forward`](crate::Attention::forward); A `[left + right + 1, dim]`, shared by all heads. Query `i`
/// stands at key `i + offset`; `scale` is that of the attention, `1/√dim` unless given. The product with A is
/// taken once per row of it, not per key (section 3.3).
#[cfg(not(target_arch = "wasm32"))]
pub fn shaw(q: &Tensor, table: &Tensor, clip: Clip, len_k: usize, offset: i64, scale: Option<f32>) -> Result<Tensor> {
    pollster::block_on(shaw_async(q, table, clip, len_k, offset, scale))
}

/// As [`shaw`], without blocking.
pub async fn shaw_async(
    q: &Tensor,
    table: &Tensor,
    clip: Clip,
    len_k: usize,
    offset: i64,
    scale: Option<f32>,
) -> Result<Tensor> {
    q.expect_float("Q")?;
    table.expect_float("the relative keys")?;
    let device = common_device(q, [("the relative keys", table)])?;
    let four = q.with_layout(as_four_axes("Q", q.layout())?);
    let &[batch, heads, len_q, dim] = four.shape() else { unreachable!("four axes") };
    let rows = clip.rows()?;
    if table.shape() != [rows, dim] {
        return Err(shape_error!(
            "the relative keys {:?} must be [left + right + 1, dim] = {:?} for Q {:?}",
            table.shape(),
            [rows, dim],
            q.shape()
        ));
    }
    check(&device, [batch, heads, len_q, len_k], offset)?;
    let scale = scale.unwrap_or(1.0 / (dim.max(1) as f32).sqrt());
    if !scale.is_finite() {
        return Err(value_error!("scale = {scale} must be finite"));
    }
    let mut recording = Recording::new(&device);
    let products = project_rows(&mut recording, &four, table)?;
    let columns = Distances { len_q, len_k, offset }.columns(|distance| clip.row(distance) as u32);
    let bias = recording.relative(&products, &columns, [batch, heads, len_q, len_k], scale)?;
    recording.submit().await?;
    let lead = &q.shape()[..q.shape().len() - 1];
    bias.reshape(&lead.iter().copied().chain([len_k]).collect::<Vec<_>>())
}

/// `X·Wᵀ` of every row of X `[a, b, c, in]`: `[a, b, c, out]`.
fn project_rows(recording: &mut Recording, x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let &[a, b, c, dim] = x.shape() else { unreachable!("four axes") };
    let out = w.shape()[0];
    let (ab, ac) = (checked_len(&[a, b])?, checked_len(&[a, c])?);
    // Two of the leading axes merge in every order that a layer makes; anything else is copied.
    if let Ok(merged) = x.reshape(&[ab, c, dim]) {
        return recording.project(&merged, w, None, &[])?.reshape(&[a, b, c, out]);
    }
    if let Ok(merged) = x.permute(&[0, 2, 1, 3])?.reshape(&[ac, b, dim]) {
        return recording.project(&merged, w, None, &[])?.reshape(&[a, c, b, out])?.permute(&[0, 2, 1, 3]);
    }
    let copied = recording.row_major(x)?.reshape(&[ab, c, dim])?;
    recording.project(&copied, w, None, &[])?.reshape(&[a, b, c, out])
}
