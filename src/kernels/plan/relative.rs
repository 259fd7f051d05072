//! Biases by the distance between query and key.

use super::super::access::is_wide;
use super::super::capabilities::Capabilities;
use super::super::catalogue;
use super::super::params::{self, View};
use super::slice::Part;
use super::{Binding, Plan, Planner, Slot, check_buffer, padded_bytes};
use crate::error::Result;
use crate::problem::{Dtype, Layout};

/// `factor · X[b, h, i, columns[j − i + len_q − 1]]` for X `[b, h, i, column]` (Q, f32, any strides), row-major
/// `[b, h, i, j]` (Output).
pub fn relative(x: &Layout, columns: &[u32], len_k: usize, factor: f32, adapter: &Capabilities) -> Result<Plan> {
    let mut planner = Planner { adapter, plan: Plan::default() };
    let &[batch, heads, len_q, _] = x.shape() else { unreachable!("four axes") };
    let y = Layout::contiguous(&[batch, heads, len_q, len_k])?;
    check_buffer(adapter, "a bias", padded_bytes(&y, Dtype::F32))?;
    if y.is_empty() {
        return Ok(planner.plan);
    }
    planner.plan.rows = columns.to_vec();
    let axes = [batch, heads, len_q];
    let sizes = planner.slices_of(axes, &[(x, 4), (&y, 4)]);
    for at in Part::grid(axes, sizes) {
        let (x_at, y_at) = (planner.window(x, &at, 4), planner.window(&y, &at, 4));
        let [b, h, i] = at;
        let total = (b.count * h.count * i.count) as u64 * len_k.div_ceil(4) as u64;
        let params = params::RelativeBias {
            x: View::new(x, x_at),
            y_offset: y_at.first as u32,
            heads: h.count as u32,
            len: i.count as u32,
            len_k: len_k as u32,
            distance_0: (len_q - 1 - i.start) as u32,
            total: total as u32,
            factor,
            ..Default::default()
        };
        let bindings = vec![
            Binding::new("x", Slot::Q, x_at),
            Binding::new("y", Slot::Output, y_at),
            Binding::whole("columns", Slot::Rows, (columns.len() as u64 * 4).next_multiple_of(16)),
        ];
        planner.push(catalogue::relative(is_wide(&y)), total, params, bindings)?;
    }
    Ok(planner.plan)
}
