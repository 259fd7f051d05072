//! Two results over disjoint keys joined.

use super::super::capabilities::Capabilities;
use super::super::catalogue;
use super::super::params;
use super::{Binding, MINUS_INFINITY, NOT_A_NUMBER, Part, Plan, Planner, Slot, check_buffer, strides4, window};
use crate::error::Result;
use crate::problem::Layout;

/// Joins outputs `[b, h, i, d]` (Q, K) with their log-sum-exps `[b, h, i]` (Bias 0, Bias 1) into an
/// output (Output) and a row-major LSE (Lse).
pub fn merge(outputs: [&Layout; 2], lses: [&Layout; 2], output: &Layout, adapter: &Capabilities) -> Result<Plan> {
    let mut planner = Planner { adapter, plan: Plan::default() };
    let &[batch, heads, len_q, dim] = output.shape() else { unreachable!("four axes") };
    let lse = Layout::contiguous(&[batch, heads, len_q])?;
    check_buffer(adapter, "the merged output", output.end() as u64 * 4)?;
    let align = adapter.offset_alignment;
    let mut size = [batch, heads, len_q];
    let every = Part { start: 0, count: dim };
    while let Some(axis) = (0..3).find(|&axis| size[axis] > 1) {
        let [b, h, i] = size.map(|count| Part { start: 0, count });
        let largest = [outputs[0], outputs[1], output].map(|layout| window(layout, &[b, h, i, every], 4, 1).size);
        let largest_lse = lses.map(|layout| window(layout, &[b, h, i], 4, 1).size);
        if largest.into_iter().chain(largest_lse).max().unwrap_or(0) + align <= adapter.max_binding {
            break;
        }
        size[axis] = size[axis].div_ceil(2);
    }
    for b in Part::all(batch, size[0]) {
        for h in Part::all(heads, size[1]) {
            for i in Part::all(len_q, size[2]) {
                let [a_at, b_at, o_at] =
                    [outputs[0], outputs[1], output].map(|layout| window(layout, &[b, h, i, every], 4, align));
                let [a_lse, b_lse, lse_at] =
                    [lses[0], lses[1], &lse].map(|layout| window(layout, &[b, h, i], 4, align));
                let rows = b.count * h.count * i.count;
                let total = rows as u64 * dim.div_ceil(4).max(1) as u64;
                let lse_strides = |layout: &Layout| {
                    let mut out = [0; 3];
                    out.iter_mut().zip(layout.strides()).for_each(|(to, &stride)| *to = stride as u32);
                    out
                };
                let bind =
                    |binding, slot, at: super::Window| Binding { binding, slot, offset: at.offset, size: at.size };
                planner.push(
                    catalogue::merge_pair(),
                    total.div_ceil(64),
                    |workgroups| params::Merge {
                        o_strides: strides4(output),
                        lse_strides: lse_strides(&lse),
                        lse_offset: lse_at.first as u32,
                        o_offset: o_at.first as u32,
                        heads: h.count as u32,
                        len_q: i.count as u32,
                        rows: rows as u32,
                        splits: 2,
                        dim: dim as u32,
                        total: total as u32,
                        workgroups,
                        minus_infinity: MINUS_INFINITY,
                        not_a_number: NOT_A_NUMBER,
                        a_offset: a_at.first as u32,
                        b_offset: b_at.first as u32,
                        a_strides: strides4(outputs[0]),
                        b_strides: strides4(outputs[1]),
                        a_lse_strides: lse_strides(lses[0]),
                        a_lse_offset: a_lse.first as u32,
                        b_lse_strides: lse_strides(lses[1]),
                        b_lse_offset: b_lse.first as u32,
                        ..Default::default()
                    },
                    vec![
                        bind(1, Slot::Q, a_at),
                        bind(2, Slot::Bias(0), a_lse),
                        bind(5, Slot::K, b_at),
                        bind(6, Slot::Bias(1), b_lse),
                        bind(3, Slot::Output, o_at),
                        bind(4, Slot::Lse, lse_at),
                    ],
                )?;
            }
        }
    }
    Ok(planner.plan)
}
