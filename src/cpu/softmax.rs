use super::{View, exp};
use crate::problem::Layout;

/// Softmax over one axis of any strided view, row-major. A row of −∞ gives zeros.
pub(crate) fn softmax(x: View<'_>, axis: usize) -> Vec<f32> {
    let arch = pulp::Arch::new();
    let mut out = x.values();
    let shape = x.layout.shape();
    let Ok(dense) = Layout::contiguous(shape) else { return out };
    if out.is_empty() {
        return out;
    }
    // Every position with index 0 along the axis starts a row.
    let starts = dense.narrow(axis, 0, 1).expect("the axis is not empty");
    let step = dense.strides()[axis];
    let mut row = vec![0.0; shape[axis]];
    for start in starts.positions() {
        for (j, x) in row.iter_mut().enumerate() {
            *x = out[start + j * step];
        }
        let peak = exp::peak(arch, &row);
        // A row of −∞ becomes zeros, which any shift except −∞ gives.
        let sum = exp::exp_and_sum(arch, &mut row, if peak == f32::NEG_INFINITY { 0.0 } else { peak });
        let factor = if sum == 0.0 { 0.0 } else { (1.0 / sum) as f32 };
        for (j, x) in row.iter().enumerate() {
            out[start + j * step] = x * factor;
        }
    }
    out
}
