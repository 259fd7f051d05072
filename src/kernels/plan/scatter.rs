//! Writes rows into a cache.

use super::super::access::{Operand, is_wide};
use super::super::capabilities::Capabilities;
use super::super::catalogue;
use super::super::params::{self, View};
use super::slice::{IN_ORDER, Part, slice, window};
use super::{Binding, Plan, Planner, Slot};
use crate::error::Result;
use crate::problem::Place;

/// Copies rows of X `[b, h, i, d]` (Q) into Y `[b, h, rows, d]` (Output), whose rows are those of X padded to whole
/// vec4s. `places` has one entry per batch entry.
pub fn scatter(x: Operand<'_>, y: Operand<'_>, places: &[Place], adapter: &Capabilities) -> Result<Plan> {
    let mut planner = Planner { adapter, plan: Plan::default() };
    let (&[batch, heads, rows, _], &[_, _, rows_x, _]) = (y.shape(), x.shape()) else { unreachable!("four axes each") };
    let most = adapter.max_binding - adapter.offset_alignment;
    let fits = |&[b, h]: &[usize; 2]| {
        let size = |x: Operand<'_>| window(&x, &[Part::whole(b), Part::whole(h)], x.element(), 1).size;
        size(x).max(size(y)) <= most
    };
    let ([batch_size, heads_size], fit) = slice([batch, heads], &IN_ORDER[..2], 0, fits, |_| true);
    for [b, h, _] in Part::grid([batch, heads, 1], [batch_size, heads_size, 1]) {
        let places = &places[b.start..][..b.count];
        if fit {
            planner.scatter(x, y, [b, h], [Part::whole(rows_x), Part::whole(rows)], places)?;
            continue;
        }
        // One head of one batch entry: runs of rows, each from its own first row.
        let Place { from, to, count } = places[0];
        let widest = x.strides()[2].max(y.strides()[2]).max(1);
        let most = (most as usize / 4 / widest).max(2) - 1;
        let before_end = count.min(rows - to);
        for (from, to, count) in [(from, to, before_end), (from + before_end, 0, count - before_end)] {
            for part in Part::all(count, most) {
                let at = |first| Part { start: first + part.start, count: part.count };
                let place = Place { from: 0, to: 0, count: part.count };
                planner.scatter(x, y, [b, h], [at(from), at(to)], &[place])?;
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
        let x_at = self.window(&x, &[b, h, rows_x], x.element());
        let y_at = self.window(&y, &[b, h, rows], y.element());
        let len = places.iter().map(|place| place.count).max().unwrap_or(0);
        let total = b.count as u64 * h.count as u64 * len as u64 * dim.div_ceil(4) as u64;
        let place_0 = self.plan.places.len();
        self.plan.places.extend(places.iter().map(|place| [place.from as u32, place.to as u32, place.count as u32, 0]));
        let params = params::Scatter {
            x: View::new(&x, x_at),
            y: View::new(&y, y_at),
            heads: h.count as u32,
            len: len as u32,
            dim: dim as u32,
            rows: rows.count as u32,
            place_0: place_0 as u32,
            total: total as u32,
            ..Default::default()
        };
        let bindings = vec![
            Binding::new("x", Slot::Q, x_at),
            Binding::new("y", Slot::Output, y_at),
            // Set to the final size of the table below.
            Binding::whole("places", Slot::Places, 0),
        ];
        self.push(catalogue::scatter(x.access(), y.stored), total, params, bindings)
    }
}
