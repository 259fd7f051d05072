//! Biases by the distance of query and key.

use super::super::access::is_wide;
use super::super::capabilities::Capabilities;
use super::super::catalogue;
use super::super::params;
use super::{Binding, Part, Plan, Planner, Slot, check_buffer, padded_bytes, strides_used, window};
use crate::error::Result;
use crate::problem::{Dtype, Layout};

/// `factor · X[b, h, i, columns[j − i + len_q − 1]]` of X `[b, h, i, column]` (Q, f32, any strides), row-major
/// `[b, h, i, j]` (Output).
pub fn relative(x: &Layout, columns: &[u32], len_k: usize, factor: f32, adapter: &Capabilities) -> Result<Plan> {
    let mut planner = Planner { adapter, plan: Plan::default() };
    let &[batch, heads, len_q, width] = x.shape() else { unreachable!("four axes") };
    let y = Layout::contiguous(&[batch, heads, len_q, len_k])?;
    check_buffer(adapter, "a bias", padded_bytes(&y, Dtype::F32))?;
    if y.is_empty() {
        return Ok(planner.plan);
    }
    planner.plan.rows = columns.to_vec();
    let (all_columns, keys) = (Part { start: 0, count: width }, Part { start: 0, count: len_k });
    let size = planner.slices([batch, heads, len_q], |[b, h, i]| {
        window(x, &[b, h, i, all_columns], 4, 1).size.max(window(&y, &[b, h, i, keys], 4, 1).size)
    });
    for b in Part::all(batch, size[0]) {
        for h in Part::all(heads, size[1]) {
            for i in Part::all(len_q, size[2]) {
                let align = adapter.offset_alignment;
                let from = window(x, &[b, h, i, all_columns], 4, align);
                let to = window(&y, &[b, h, i, keys], 4, align);
                let total = b.count as u64 * h.count as u64 * i.count as u64 * len_k.div_ceil(4) as u64;
                planner.push(
                    catalogue::relative(is_wide(&y)),
                    total.div_ceil(64),
                    |workgroups| params::Relative {
                        x_strides: strides_used(x),
                        x_offset: from.first as u32,
                        y_offset: to.first as u32,
                        heads: h.count as u32,
                        len_q: i.count as u32,
                        len_k: len_k as u32,
                        distance_0: (len_q - 1 - i.start) as u32,
                        total: total as u32,
                        workgroups,
                        factor,
                        ..Default::default()
                    },
                    vec![
                        Binding { binding: 1, slot: Slot::Q, offset: from.offset, size: from.size },
                        Binding { binding: 2, slot: Slot::Output, offset: to.offset, size: to.size },
                        Binding {
                            binding: 3,
                            slot: Slot::Rows,
                            offset: 0,
                            size: (columns.len() as u64 * 4).next_multiple_of(16),
                        },
                    ],
                )?;
            }
        }
    }
    Ok(planner.plan)
}
