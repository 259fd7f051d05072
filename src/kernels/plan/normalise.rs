//! Norms of rows.

use super::super::access::{Operand, is_wide};
use super::super::capabilities::{AdapterClass, Capabilities};
use super::super::catalogue;
use super::super::params;
use super::{Binding, Part, Plan, Planner, Slot, check_buffer, padded_bytes, strides_used, window};
use crate::error::{Result, shape_error};
use crate::problem::{Dtype, Layout};

/// The widest row. 64 invocations read it three times in fours, 12,288 turns of each one's loops in all; Mesa's
/// software adapters end an invocation's loops after 65,535.
pub const MOST_NORMALISED: usize = 1 << 20;

/// RMSNorm, or where `centred` LayerNorm, over the last axis of X `[a, b, c, d]` (Q, any strides) with a weight `[d]`
/// (K, f32) and a bias `[d]` (Bias 0, f32): Y, row-major (Output, f32).
pub fn normalise(
    x: Operand<'_>,
    weight: &Layout,
    bias: Option<&Layout>,
    centred: bool,
    epsilon: f32,
    adapter: &Capabilities,
) -> Result<Plan> {
    let mut planner = Planner { adapter, plan: Plan::default() };
    let &[a_len, b_len, c_len, dim] = x.shape() else { unreachable!("four axes") };
    let y = Layout::contiguous(x.shape())?;
    check_buffer(adapter, "normalised rows", padded_bytes(&y, Dtype::F32))?;
    if dim > MOST_NORMALISED {
        return Err(shape_error!("rows {dim} wide cannot be normalised; {MOST_NORMALISED} is the widest"));
    }
    if x.is_empty() {
        return Ok(planner.plan);
    }
    // How a row's sum is cut depends on its width alone. A software adapter splits rows to keep its loops short.
    let (workgroup, lanes) = match (adapter.class, dim) {
        (AdapterClass::Cpu, ..=8192) => (8, 1),
        (AdapterClass::Cpu, ..=65_536) | (AdapterClass::Gpu, ..=256) => (64, 8),
        _ => (64, 64),
    };
    let align = adapter.offset_alignment;
    let every = Part { start: 0, count: dim };
    let vector = |layout: &Layout| (window(layout, &[every], 4, align), layout.strides()[0] as u32);
    let (weight_at, w_stride) = vector(weight);
    let bias_at = bias.map(vector);
    let size = planner.slices([a_len, b_len, c_len], |[a, b, c]| {
        let parts = [a, b, c, every];
        window(&x, &parts, x.element(), 1).size.max(window(&y, &parts, 4, 1).size)
    });
    for a in Part::all(a_len, size[0]) {
        for b in Part::all(b_len, size[1]) {
            for c in Part::all(c_len, size[2]) {
                let parts = [a, b, c, every];
                let (from, to) = (window(&x, &parts, x.element(), align), window(&y, &parts, 4, align));
                let rows = a.count as u64 * b.count as u64 * c.count as u64;
                let mut bindings = vec![
                    Binding { binding: 1, slot: Slot::Q, offset: from.offset, size: from.size },
                    Binding { binding: 2, slot: Slot::Output, offset: to.offset, size: to.size },
                    Binding { binding: 3, slot: Slot::K, offset: weight_at.offset, size: weight_at.size },
                ];
                if let Some((at, _)) = bias_at {
                    bindings.push(Binding { binding: 4, slot: Slot::Bias(0), offset: at.offset, size: at.size });
                }
                planner.push(
                    catalogue::normalise(workgroup, lanes, x.access(), is_wide(&y), centred, bias.is_some()),
                    rows.div_ceil(u64::from(workgroup / lanes)),
                    |workgroups| params::Normalise {
                        x_strides: strides_used(&x),
                        x_offset: from.first as u32,
                        y_offset: to.first as u32,
                        w_offset: weight_at.first as u32,
                        w_stride,
                        bias_offset: bias_at.map_or(0, |(at, _)| at.first as u32),
                        bias_stride: bias_at.map_or(0, |(_, stride)| stride),
                        heads: b.count as u32,
                        len: c.count as u32,
                        dim: dim as u32,
                        rows: rows as u32,
                        workgroups,
                        epsilon,
                    },
                    bindings,
                )?;
            }
        }
    }
    Ok(planner.plan)
}
