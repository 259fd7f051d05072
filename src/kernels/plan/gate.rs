//! What heads attended to, times a sigmoid.

use super::super::access::{Operand, is_wide};
use super::super::capabilities::Capabilities;
use super::super::catalogue;
use super::super::params::{self, View};
use super::slice::Part;
use super::{Binding, NOT_A_NUMBER, Plan, Planner, Slot, check_buffer, padded_bytes};
use crate::error::Result;
use crate::problem::{Dtype, Layout};

/// `X · σ(G)` for X (Q) and G (K), both `[b, i, d]` of any strides: Y, row-major (Output, f32).
pub fn gate(x: Operand<'_>, g: Operand<'_>, adapter: &Capabilities) -> Result<Plan> {
    let mut planner = Planner { adapter, plan: Plan::default() };
    let &[batch, len, dim] = x.shape() else { unreachable!("three axes") };
    // One head.
    let [x_layout, g_layout] = [x.unsqueeze(1)?, g.unsqueeze(1)?];
    let y = Layout::contiguous(x_layout.shape())?;
    check_buffer(adapter, "gated rows", padded_bytes(&y, Dtype::F32))?;
    if x.is_empty() {
        return Ok(planner.plan);
    }
    let variant = catalogue::gate(x.access(), g.access(), is_wide(&y));
    let axes = [batch, 1, len];
    let sizes = planner.slices_of(axes, &[(&x_layout, x.element()), (&g_layout, g.element()), (&y, 4)]);
    for at in Part::grid(axes, sizes) {
        let x_at = planner.window(&x_layout, &at, x.element());
        let g_at = planner.window(&g_layout, &at, g.element());
        let y_at = planner.window(&y, &at, 4);
        let [b, _, i] = at;
        let total = b.count as u64 * i.count as u64 * dim.div_ceil(4) as u64;
        let params = params::Gate {
            x: View::new(&x_layout, x_at),
            g: View::new(&g_layout, g_at),
            y_offset: y_at.first as u32,
            heads: 1,
            len: i.count as u32,
            dim: dim as u32,
            total: total as u32,
            not_a_number: NOT_A_NUMBER,
            ..Default::default()
        };
        let bindings = vec![
            Binding::new("x", Slot::Q, x_at),
            Binding::new("y", Slot::Output, y_at),
            Binding::new("g", Slot::K, g_at),
        ];
        planner.push(variant.clone(), total, params, bindings)?;
    }
    Ok(planner.plan)
}
