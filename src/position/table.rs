//! Positions added to embeddings.

use super::{TokenPositions, check_len, check_table, sinusoidal};
use crate::device::Device;
use crate::error::{Result, shape_error};
use crate::gpu::Gpu;
use crate::lower::Recording;
use crate::problem::checked_len;
use crate::tensor::{Tensor, common_device};
#[cfg(not(target_arch = "wasm32"))]
use crate::wait::wait_for;

/// One vector per position, `[max_len, dim]`, which is added to the embedding of the token at that position: learned
/// (Gehring et al. 2017, section 3.1; BERT, GPT-2) or sinusoidal (Vaswani et al. 2017, section 3.5).
///
/// ```
/// use wgpu_attention::position::{PositionTable, TokenPositions};
/// use wgpu_attention::{Device, Tensor};
///
/// # fn main() -> wgpu_attention::Result<()> {
/// let device = Device::new()?;
/// let table = PositionTable::learned(&Tensor::from_slice(&device, &[3, 2], &[0.1f32, 0.2, 0.3, 0.4, 0.5, 0.6])?)?;
/// let x = Tensor::from_slice(&device, &[2, 2], &[0.0f32; 4])?;
/// assert_eq!(table.add(&x, &TokenPositions::From(1))?.download()?, [0.3, 0.4, 0.5, 0.6]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct PositionTable {
    table: Tensor,
}

impl PositionTable {
    /// A learned table `[max_len, dim]`, any strides.
    pub fn learned(table: &Tensor) -> Result<PositionTable> {
        table.expect_float("a position table")?;
        let &[max_len, _] = table.shape() else {
            return Err(shape_error!("a position table {:?} must be [max_len, dim]", table.shape()));
        };
        check_len("max_len", max_len)?;
        Ok(PositionTable { table: table.clone() })
    }

    /// [`sinusoidal`] for positions 0 to `max_len − 1`.
    pub fn sinusoidal(device: impl Into<Device>, max_len: usize, dim: usize) -> Result<PositionTable> {
        let device = device.into();
        check_table(&device, "a position table", &[max_len, dim])?;
        let table = sinusoidal(0, max_len, dim)?;
        Ok(PositionTable { table: Tensor::from_slice(device, table.shape(), table.data())? })
    }

    /// The table `[max_len, dim]`.
    pub fn tensor(&self) -> &Tensor {
        &self.table
    }

    /// Adds each token's row to X `[.., len, dim]` (any strides; axes before the length merge into one batch axis). The
    /// result is row-major, stored as f32 and rounded to X's type on download.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn add(&self, x: &Tensor, positions: &TokenPositions) -> Result<Tensor> {
        wait_for(self.add_async(x, positions))
    }

    /// Like [`PositionTable::add`], without blocking.
    pub async fn add_async(&self, x: &Tensor, positions: &TokenPositions) -> Result<Tensor> {
        let device = common_device(&self.table, [("x", x)])?;
        Recording::for_step(&device).submit(|to| self.record(to, x, positions)).await
    }

    /// Like [`PositionTable::add`], recorded into the caller's encoder under the same conditions as
    /// [`Attention::encode`](crate::Attention::encode).
    pub fn encode(
        &self,
        gpu: &Gpu,
        encoder: &mut wgpu::CommandEncoder,
        x: &Tensor,
        positions: &TokenPositions,
    ) -> Result<Tensor> {
        let device = common_device(&self.table, [("x", x)])?;
        Recording::for_encoder(gpu, encoder, &device)?.encode(encoder, |to| self.record(to, x, positions))
    }

    fn record(&self, recording: &mut Recording, x: &Tensor, positions: &TokenPositions) -> Result<Tensor> {
        x.expect_float("x")?;
        let &[max_len, dim] = self.table.shape() else { unreachable!("checked when made") };
        let Some((lead, &[len, width])) = x.shape().split_last_chunk::<2>() else {
            return Err(shape_error!("x {:?} must be [.., len, dim]", x.shape()));
        };
        if width != dim {
            return Err(shape_error!(
                "x {:?} is {width} wide and the position table {:?} {dim}: both must be [.., dim]",
                x.shape(),
                self.table.shape()
            ));
        }
        let batch = checked_len(lead)?;
        let rows = positions.rows(batch, len, max_len)?;
        let sum = recording.add_positions(&x.reshape(&[batch, len, dim])?, &self.table, &rows)?;
        sum.reshape(x.shape())
    }
}
