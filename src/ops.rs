//! Operations by themselves, for calls and layers of the caller's own.

use crate::call::Attended;
use crate::error::{Result, shape_error, value_error};
use crate::lower::Recording;
use crate::problem::checked_len;
use crate::tensor::{Tensor, common_device};

/// Joins attention over two disjoint sets of keys by the log-sum-exps of both (Dao et al. 2023,
/// "Flash-Decoding"; Ye et al. 2024, "Cascade inference"), as if one call had seen all keys:
///
/// ```text
/// LSE = ln(exp LSE_a + exp LSE_b)      O = exp(LSE_a − LSE) · O_a + exp(LSE_b − LSE) · O_b
/// ```
///
/// Outputs `[batch, heads, len, dim]` and LSEs `[batch, heads, len]` of any strides; missing leading axes
/// count as in [`Attention::forward`](crate::Attention::forward). A part with LSE −∞ weighs 0 whatever its output holds; where both
/// are −∞ the output is 0 and the LSE −∞. NaN goes through, and an LSE of +∞ makes its row NaN.
#[cfg(not(target_arch = "wasm32"))]
pub fn merge(out_a: &Tensor, lse_a: &Tensor, out_b: &Tensor, lse_b: &Tensor) -> Result<Attended> {
    pollster::block_on(merge_async(out_a, lse_a, out_b, lse_b))
}

/// As [`merge`], without blocking.
pub async fn merge_async(out_a: &Tensor, lse_a: &Tensor, out_b: &Tensor, lse_b: &Tensor) -> Result<Attended> {
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

/// Softmax over `axis` (negative counts from the end), as `torch.softmax`. A row of −∞ gives zeros.
#[cfg(not(target_arch = "wasm32"))]
pub fn softmax(x: &Tensor, axis: isize) -> Result<Tensor> {
    pollster::block_on(softmax_async(x, axis))
}

/// As [`softmax`], without blocking.
pub async fn softmax_async(x: &Tensor, axis: isize) -> Result<Tensor> {
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
/// strides; axes of X before the length count as one batch. The result `[.., len, dim_out]` is row-major, held as
/// f32 and rounded to X's type on download.
#[cfg(not(target_arch = "wasm32"))]
pub fn project(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    pollster::block_on(project_async(x, weight, bias))
}

/// As [`project`], without blocking.
pub async fn project_async(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
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
    let y = Recording::new(&device).submit(|to| to.project(&rows, weight, bias, &[])).await?;
    y.reshape(&lead.iter().copied().chain([len, dim_out]).collect::<Vec<_>>())
}
