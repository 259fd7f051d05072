//! Single operations, for building your own calls and layers.

use crate::call::Attended;
use crate::device::Device;
use crate::error::{Result, shape_error, value_error};
use crate::gpu::Gpu;
use crate::lower::Recording;
use crate::problem::checked_len;
use crate::tensor::{Tensor, common_device};
use crate::wait::apart;
#[cfg(not(target_arch = "wasm32"))]
use crate::wait::wait_for;

/// Merges attention over two disjoint sets of keys, using the log-sum-exps of both (Dao et al. 2023,
/// "Flash-Decoding"; Ye et al. 2024, "Cascade inference"), as if one call had seen all keys:
///
/// ```text
/// LSE = ln(exp LSE_a + exp LSE_b)      O = exp(LSE_a − LSE) · O_a + exp(LSE_b − LSE) · O_b
/// ```
///
/// Outputs `[batch, heads, len, dim]` and LSEs `[batch, heads, len]` of any strides; leading axes may be missing as in
/// [`Attention::forward`](crate::Attention::forward). A part with LSE −∞ has weight 0 whatever its output holds. If
/// both LSEs are −∞, the output is 0 and the LSE −∞. NaN propagates, and an LSE of +∞ makes its row NaN.
///
/// # Errors
///
/// - [`Shape`](crate::Error::Shape): the outputs differ in shape, or an LSE does not have one value per row.
/// - [`Value`](crate::Error::Value): a tensor is bool.
/// - [`Device`](crate::Error::Device): the tensors are on different devices.
/// - [`TooLarge`](crate::Error::TooLarge), [`Unsupported`](crate::Error::Unsupported): the result or a kernel does not
///   fit the device.
/// - [`DeviceLost`](crate::Error::DeviceLost), [`OutOfMemory`](crate::Error::OutOfMemory),
///   [`Gpu`](crate::Error::Gpu): the driver failed.
#[cfg(not(target_arch = "wasm32"))]
pub fn merge(out_a: &Tensor, lse_a: &Tensor, out_b: &Tensor, lse_b: &Tensor) -> Result<Attended> {
    wait_for(merge_parts([out_a, lse_a, out_b, lse_b]))
}

/// Like [`merge`], without blocking.
pub async fn merge_async(out_a: &Tensor, lse_a: &Tensor, out_b: &Tensor, lse_b: &Tensor) -> Result<Attended> {
    let parts = [out_a, lse_a, out_b, lse_b].map(Tensor::clone);
    apart(async move { merge_parts(parts.each_ref()).await }).await
}

async fn merge_parts([out_a, lse_a, out_b, lse_b]: [&Tensor; 4]) -> Result<Attended> {
    let device = common_device(out_a, [("LSE a", lse_a), ("output b", out_b), ("LSE b", lse_b)])?;
    for (name, tensor) in [("output a", out_a), ("LSE a", lse_a), ("output b", out_b), ("LSE b", lse_b)] {
        tensor.expect_float(name)?;
    }
    if out_a.shape() != out_b.shape() {
        return Err(shape_error!(
            "output a {:?} and output b {:?} differ: both are [batch, heads, len, dim] of the same queries",
            out_a.shape(),
            out_b.shape()
        ));
    }
    let outputs = [out_a.as_four_axes("output a")?, out_b.as_four_axes("output b")?];
    let lse = |name: &str, tensor: &Tensor| -> Result<Tensor> {
        let rows = &out_a.shape()[..out_a.shape().len() - 1];
        if tensor.shape() != rows {
            return Err(shape_error!(
                "{name} {:?} must be {rows:?}: one value per row of the outputs {:?}",
                tensor.shape(),
                out_a.shape()
            ));
        }
        tensor.unsqueeze(rows.len())?.as_four_axes(name)?.select(3, 0)
    };
    let lses = [lse("LSE a", lse_a)?, lse("LSE b", lse_b)?];
    let merged = Recording::new(&device).submit(|to| to.merge(outputs.each_ref(), lses.each_ref()));
    let [output, lse] = merged.await?;
    Attended { output, lse: Some(lse), weights: None, scores: None }.with_axes_of(out_a.shape())
}

/// Softmax over `axis` (negative values count from the end), like `torch.softmax`. A row of −∞ gives zeros.
///
/// # Errors
///
/// - [`Value`](crate::Error::Value): `axis` is out of range, `x` is bool, or `x` has more than four axes on an adapter.
/// - [`TooLarge`](crate::Error::TooLarge), [`Unsupported`](crate::Error::Unsupported): the result or a kernel does not
///   fit the device.
/// - [`DeviceLost`](crate::Error::DeviceLost), [`OutOfMemory`](crate::Error::OutOfMemory),
///   [`Gpu`](crate::Error::Gpu): the driver failed.
#[cfg(not(target_arch = "wasm32"))]
pub fn softmax(x: &Tensor, axis: isize) -> Result<Tensor> {
    wait_for(softmax_of(x, axis))
}

/// Like [`softmax`], without blocking.
pub async fn softmax_async(x: &Tensor, axis: isize) -> Result<Tensor> {
    let x = x.clone();
    apart(async move { softmax_of(&x, axis).await }).await
}

async fn softmax_of(x: &Tensor, axis: isize) -> Result<Tensor> {
    x.expect_float("x")?;
    let rank = x.layout().rank() as isize;
    let at = if axis < 0 { axis + rank } else { axis };
    if at < 0 || at >= rank {
        return Err(value_error!(
            "softmax over axis {axis} of a tensor with {rank} axes: it must lie in {}..{rank}",
            -rank
        ));
    }
    Recording::new(&x.device()).submit(|to| to.softmax(x, at as usize)).await
}

/// `Y = X·Wᵀ + b` (`torch.nn.functional.linear`): X `[.., len, dim_in]`, W `[dim_out, dim_in]`, b `[dim_out]`, any
/// strides; axes of X before the length merge into one batch axis. The result `[.., len, dim_out]` is row-major, stored
/// as f32 and rounded to X's type on download.
///
/// # Errors
///
/// - [`Shape`](crate::Error::Shape): X, W or b do not fit together, or the leading axes of X do not merge.
/// - [`Value`](crate::Error::Value): a tensor is bool.
/// - [`Device`](crate::Error::Device): the tensors are on different devices.
/// - [`TooLarge`](crate::Error::TooLarge), [`Overflow`](crate::Error::Overflow),
///   [`Unsupported`](crate::Error::Unsupported): the result or a kernel does not fit the device.
/// - [`DeviceLost`](crate::Error::DeviceLost), [`OutOfMemory`](crate::Error::OutOfMemory),
///   [`Gpu`](crate::Error::Gpu): the driver failed.
#[cfg(not(target_arch = "wasm32"))]
pub fn project(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    wait_for(async {
        let (device, record) = projection(x, weight, bias)?;
        Recording::new(&device).submit(record).await
    })
}

/// Like [`project`], without blocking.
pub async fn project_async(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (x, weight, bias) = (x.clone(), weight.clone(), bias.cloned());
    apart(async move {
        let (device, record) = projection(&x, &weight, bias.as_ref())?;
        Recording::new(&device).submit(record).await
    })
    .await
}

/// Like [`project`], recorded into the caller's encoder under the same conditions as
/// [`Attention::encode`](crate::Attention::encode).
pub fn encode_project(
    gpu: &Gpu,
    encoder: &mut wgpu::CommandEncoder,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let (device, record) = projection(x, weight, bias)?;
    Recording::for_encoder(gpu, encoder, &device)?.encode(encoder, record)
}

impl Tensor {
    /// A row-major copy of a tensor with at most four axes. A tensor that is already row-major is returned unchanged.
    /// f16 and bf16 are copied as f32 and rounded to their type on download.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn contiguous(&self) -> Result<Tensor> {
        wait_for(self.copied())
    }

    /// Like [`Tensor::contiguous`], without blocking.
    pub async fn contiguous_async(&self) -> Result<Tensor> {
        let tensor = self.clone();
        apart(async move { tensor.copied().await }).await
    }

    async fn copied(&self) -> Result<Tensor> {
        if self.layout().is_contiguous() {
            return Ok(self.clone());
        }
        self.expect_float("x")?;
        if self.layout().rank() > 4 {
            return Err(shape_error!("contiguous copies at most four axes, not {:?}", self.shape()));
        }
        Recording::new(&self.device()).submit(|to| to.row_major(self)).await
    }
}

/// The device of a projection, and a closure that records it.
fn projection<'a>(
    x: &'a Tensor,
    weight: &'a Tensor,
    bias: Option<&'a Tensor>,
) -> Result<(Device, impl FnOnce(&mut Recording) -> Result<Tensor> + 'a)> {
    let device = common_device(x, [("the weight", weight)].into_iter().chain(bias.map(|bias| ("the bias", bias))))?;
    x.expect_float("x")?;
    weight.expect_float("the weight")?;
    let (Some((lead, &[len, dim_in])), &[dim_out, width]) = (x.shape().split_last_chunk::<2>(), weight.shape()) else {
        return Err(shape_error!(
            "x {:?} must be [.., len, dim_in] and the weight {:?} [dim_out, dim_in]",
            x.shape(),
            weight.shape()
        ));
    };
    if width != dim_in {
        return Err(shape_error!(
            "x {:?} is {dim_in} wide, but the weight {:?} reads {width}",
            x.shape(),
            weight.shape()
        ));
    }
    if let Some(bias) = bias {
        bias.expect_float("the bias")?;
        if bias.shape() != [dim_out] {
            return Err(shape_error!(
                "the bias {:?} must be [{dim_out}] for the weight {:?}",
                bias.shape(),
                weight.shape()
            ));
        }
    }
    let rows = x.reshape(&[checked_len(lead)?, len, dim_in])?;
    let shape: Vec<usize> = lead.iter().copied().chain([len, dim_out]).collect();
    Ok((device, move |to: &mut Recording| to.project(&rows, weight, bias, &[])?.reshape(&shape)))
}
