//! Rows written into a cache.

use super::super::access::{Operand, is_wide};
use super::super::capabilities::Capabilities;
use super::super::catalogue;
use super::super::params;
use super::{Binding, Part, Plan, Planner, Slot, strides_used, window};
use crate::error::Result;
use crate::problem::Place;

/// Copies rows of X `[b, h, i, d]` (Q) into Y `[b, h, rows, d]` (Output), whose rows are those of X padded to
/// whole vec4s; one place per batch entry.
pub fn scatter(x: Operand<'_>, y: Operand<'_>, places: &[Place], adapter: &Capabilities) -> Result<Plan> {
    let mut planner = Planner { adapter, plan: Plan::default() };
    let (&[batch, heads, rows, width], &[_, _, rows_x, dim]) = (y.shape(), x.shape()) else {
        unreachable!("four axes each");
    };
    let every = |count| Part { start: 0, count };
    let fits = |b: Part, h: Part| {
        let largest = |x: Operand<'_>, rows, dim| window(&x, &[b, h, every(rows), every(dim)], x.element(), 1).size;
        largest(x, rows_x, dim).max(largest(y, rows, width)) + adapter.offset_alignment <= adapter.max_binding
    };
    let mut size = [batch, heads];
    while !fits(every(size[0]), every(size[1])) && size != [1, 1] {
        let axis = usize::from(size[0] == 1);
        size[axis] = size[axis].div_ceil(2);
    }
    for b in Part::all(batch, size[0]) {
        for h in Part::all(heads, size[1]) {
            let places = &places[b.start..][..b.count];
            if fits(b, h) {
                planner.scatter(x, y, [b, h], [every(rows_x), every(rows)], places)?;
                continue;
            }
            // One head of one batch entry: runs of rows, each from its own first row.
            let Place { from, to, count } = places[0];
            let widest = x.strides()[2].max(y.strides()[2]).max(1);
            let most = ((adapter.max_binding - adapter.offset_alignment) as usize / 4 / widest).max(2) - 1;
            let before_end = count.min(rows - to);
            for (from, to, count) in [(from, to, before_end), (from + before_end, 0, count - before_end)] {
                for part in Part::all(count, most) {
                    let at = |first| Part { start: first + part.start, count: part.count };
                    planner.scatter(
                        x,
                        y,
                        [b, h],
                        [at(from), at(to)],
                        &[Place { from: 0, to: 0, count: part.count }],
                    )?;
                }
            }
        }
    }
    // Every step reads the whole table.
    let size = planner.plan.places.len() as u64 * 16;
    for binding in planner.plan.steps.iter_mut().flat_map(|step| &mut step.bindings) {
        if binding.slot == Slot::Places {
            binding.size = size;
        }
    }
    Ok(planner.plan)
}

impl Planner<'_> {
    fn scatter(
        &mut self,
        x: Operand<'_>,
        y: Operand<'_>,
        [b, h]: [Part; 2],
        [rows_x, rows]: [Part; 2],
        places: &[Place],
    ) -> Result<()> {
        let (dim, width) = (x.shape()[3], y.shape()[3]);
        debug_assert!(width == dim.next_multiple_of(4) && is_wide(&y) | y.is_empty());
        let every = |count| Part { start: 0, count };
        let align = self.adapter.offset_alignment;
        let from = window(&x, &[b, h, rows_x, every(dim)], x.element(), align);
        let to = window(&y, &[b, h, rows, every(width)], y.element(), align);
        let len = places.iter().map(|place| place.count).max().unwrap_or(0);
        let total = b.count as u64 * h.count as u64 * len as u64 * dim.div_ceil(4) as u64;
        let place_0 = self.plan.places.len();
        self.plan.places.extend(places.iter().map(|place| [place.from as u32, place.to as u32, place.count as u32, 0]));
        self.push(
            catalogue::scatter(x.access(), y.stored),
            total.div_ceil(64),
            |workgroups| params::Scatter {
                x_strides: strides_used(&x),
                y_strides: strides_used(&y),
                x_offset: from.first as u32,
                y_offset: to.first as u32,
                heads: h.count as u32,
                len: len as u32,
                dim: dim as u32,
                rows: rows.count as u32,
                place_0: place_0 as u32,
                total: total as u32,
                workgroups,
                ..Default::default()
            },
            vec![
                Binding { binding: 1, slot: Slot::Q, offset: from.offset, size: from.size },
                Binding { binding: 2, slot: Slot::Output, offset: to.offset, size: to.size },
                // As long as the table in the end.
                Binding { binding: 3, slot: Slot::Places, offset: 0, size: 0 },
            ],
        )
    }
}
