//! The CPU backend: the same calls without an adapter, threaded.

use crate::attention::{Mask, Wanted};
use crate::problem::{Layout, MaskMeaning, Problem};
use crate::tensor::{Storage, Tensor};

/// A strided view of floats.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    pub data: &'a [f32],
    pub layout: &'a Layout,
}

impl<'a> View<'a> {
    pub fn of(tensor: &'a Tensor) -> View<'a> {
        match tensor.storage() {
            Storage::Cpu(data) => View { data, layout: tensor.layout() },
            _ => unreachable!("devices and types are checked before"),
        }
    }
}

/// A strided view of a boolean mask, broadcast to `problem.mask_shape()`.
#[derive(Clone, Copy)]
pub(crate) struct MaskView<'a> {
    pub data: &'a [u8],
    pub layout: &'a Layout,
    pub meaning: MaskMeaning,
}

impl<'a> MaskView<'a> {
    pub fn of(mask: &'a Mask) -> MaskView<'a> {
        match mask.tensor().storage() {
            Storage::CpuBool(data) => MaskView { data, layout: mask.tensor().layout(), meaning: mask.meaning() },
            _ => unreachable!("devices and types are checked before"),
        }
    }
}

/// Operands with four axes each, masks and biases broadcast to `problem.mask_shape()`.
pub(crate) struct Inputs<'a> {
    pub q: View<'a>,
    pub k: View<'a>,
    pub v: View<'a>,
    pub masks: Vec<MaskView<'a>>,
    pub biases: Vec<View<'a>>,
}

/// Results: `output` laid out as asked, the rest row-major.
pub(crate) struct Outputs {
    pub output: Vec<f32>,
    /// `[b, h, i]`
    pub lse: Option<Vec<f32>>,
    /// `[b, h, i, j]` or, averaged, `[b, i, j]`
    pub weights: Option<Vec<f32>>,
    /// `[b, h, i, j]`
    pub scores: Option<Vec<f32>>,
}

/// Attention of a checked problem; `output` is the layout of the result, contiguous in some order.
pub(crate) fn attention(_problem: &Problem, _inputs: &Inputs<'_>, _wanted: Wanted, _output: &Layout) -> Outputs {
    todo!()
}

/// `X·Wᵀ + b` for X `[b, l, in]`, W `[out, in]`, then one row per entry of `extra` (`None`: zeros):
/// row-major `[b, l + extra, out]`.
pub(crate) fn project(_x: View<'_>, _w: View<'_>, _bias: Option<View<'_>>, _extra: &[Option<View<'_>>]) -> Vec<f32> {
    todo!()
}

/// Softmax over one axis of any strided view; row-major.
pub(crate) fn softmax(_x: View<'_>, _axis: usize) -> Vec<f32> {
    todo!()
}
