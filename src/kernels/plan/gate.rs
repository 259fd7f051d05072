//! What heads attended to, times a sigmoid.

use super::super::access::{Operand, is_wide};
use super::super::capabilities::Capabilities;
use super::super::catalogue;
use super::super::params;
use super::{Binding, NOT_A_NUMBER, Part, Plan, Planner, Slot, check_buffer, padded_bytes, window};
use crate::error::Result;
use crate::problem::{Dtype, Layout};

/// `X · σ(G)` for X (Q) and G (K), both `[b, i, d]` of any strides: Y, row-major (Output, f32).
pub fn gate(x: Operand<'_>, g: Operand<'_>, adapter: &Capabilities) -> Result<Plan> {
    let mut planner = Planner { adapter, plan: Plan::default() };
    let &[batch, len, dim] = x.shape() else { unreachable!("three axes") };
    let y = Layout::contiguous(x.shape())?;
    check_buffer(adapter, "gated rows", padded_bytes(&y, Dtype::F32))?;
    if x.is_empty() {
        return Ok(planner.plan);
    }
    let strides = |of: &Layout| [0, 1, 2].map(|axis| of.strides()[axis] as u32);
    let every = Part { start: 0, count: dim };
    let size = planner.slices([batch, 1, len], |[b, _, i]| {
        let parts = [b, i, every];
        let inputs = window(&x, &parts, x.element(), 1).size.max(window(&g, &parts, g.element(), 1).size);
        inputs.max(window(&y, &parts, 4, 1).size)
    });
    for b in Part::all(batch, size[0]) {
        for i in Part::all(len, size[2]) {
            let parts = [b, i, every];
            let align = adapter.offset_alignment;
            let (from, gate) = (window(&x, &parts, x.element(), align), window(&g, &parts, g.element(), align));
            let to = window(&y, &parts, 4, align);
            let total = b.count as u64 * i.count as u64 * dim.div_ceil(4) as u64;
            planner.push(
                catalogue::gate(x.access(), g.access(), is_wide(&y)),
                total.div_ceil(64),
                |workgroups| params::Gate {
                    x_strides: strides(&x),
                    x_offset: from.first as u32,
                    g_strides: strides(&g),
                    g_offset: gate.first as u32,
                    y_offset: to.first as u32,
                    len: i.count as u32,
                    dim: dim as u32,
                    total: total as u32,
                    workgroups,
                    not_a_number: NOT_A_NUMBER,
                    ..Default::default()
                },
                vec![
                    Binding { binding: 1, slot: Slot::Q, offset: from.offset, size: from.size },
                    Binding { binding: 2, slot: Slot::Output, offset: to.offset, size: to.size },
                    Binding { binding: 3, slot: Slot::K, offset: gate.offset, size: gate.size },
                ],
            )?;
        }
    }
    Ok(planner.plan)
}
