//! A projection by itself, for layers of the caller's own.

use crate::error::{Result, shape_error};
use crate::problem::checked_len;
use crate::record::Recording;
use crate::tensor::{Tensor, common_device};

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
    let mut recording = Recording::new(&device);
    let y = recording.project(&x.reshape(&[checked_len(lead)?, len, dim_in])?, weight, bias, &[])?;
    recording.submit().await?;
    y.reshape(&lead.iter().copied().chain([len, dim_out]).collect::<Vec<_>>())
}
