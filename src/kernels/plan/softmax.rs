//! The softmax of a tensor, and halves widened to f32.

use super::super::access::Operand;
use super::super::capabilities::{AdapterClass, Capabilities};
use super::super::{catalogue, params, turns};
use super::{
    Binding, Cost, MINUS_INFINITY, NOT_A_NUMBER, Part, Plan, Planner, Slot, Window, check_buffer, padded_bytes,
    rows_padded, strides4, window,
};
use crate::error::Result;
use crate::problem::{Dtype, Layout};

/// Softmax over the last axis of X (at most four axes, any strides): X (Q) is copied into rows of
/// whole vec4s (Output, [`Plan::weights`]) and weighed there.
pub fn softmax(x: Operand<'_>, adapter: &Capabilities) -> Result<Plan> {
    let mut planner = Planner { adapter, plan: Plan::default() };
    let out = rows_padded(x.shape())?;
    check_buffer(adapter, "the softmax", padded_bytes(&out, Dtype::F32))?;
    let width4 = x.shape()[3].div_ceil(4) as u32;
    planner.rows_copied(x, &out, width4 * 4, |planner, rows, to| {
        let bindings = vec![Binding { binding: 1, slot: Slot::Output, offset: to.offset, size: to.size }];
        let params = params::Softmax { rows: rows as u32, width4, ..Default::default() };
        planner.softmax_rows(params, to, [false, false], bindings)
    })?;
    planner.plan.weights = Some(out);
    Ok(planner.plan)
}

/// X (Q; four axes, any strides, any type) as row-major f32 (Output).
pub fn widen(x: Operand<'_>, adapter: &Capabilities) -> Result<Plan> {
    let mut planner = Planner { adapter, plan: Plan::default() };
    let out = Layout::contiguous(x.shape())?;
    check_buffer(adapter, "a tensor widened to f32", padded_bytes(&out, Dtype::F32))?;
    planner.rows_copied(x, &out, x.shape()[3] as u32, |_, _, _| Ok(()))?;
    Ok(planner.plan)
}

/// Elements that a lane adds up in each component of its sum, at most, as long as there are more lanes to be had: more
/// would lose digits.
const MOST_ADDED: usize = 2048;

impl Planner<'_> {
    /// The softmax of rows that lie one after another, whole vec4s each, from `at` on: `params` say how many, how wide
    /// and what belongs to the LSE and the sink, where these are there.
    pub(super) fn softmax_rows(
        &mut self,
        params: params::Softmax,
        at: Window,
        [lse, sink]: [bool; 2],
        bindings: Vec<Binding>,
    ) -> Result<()> {
        let adapter = self.adapter;
        let width = 4 * params.width4 as usize;
        let choices: &[(u32, u32)] = match adapter.class {
            AdapterClass::Cpu => &[(8, 1), (8, 8), (64, 64), (256, 256)],
            AdapterClass::Gpu if width <= 128 => &[(64, 32)],
            AdapterClass::Gpu => &[(64, 64), (256, 256)],
        };
        let enough = |lanes: u32| {
            width <= MOST_ADDED * 4 * lanes as usize && turns::softmax(lanes).of(width) <= adapter.loop_turns()
        };
        let offered = |&&(workgroup, lanes): &&(u32, u32)| {
            let memory = if lanes > 1 { catalogue::softmax_memory(workgroup) } else { 0 };
            workgroup <= adapter.max_invocations && memory <= adapter.workgroup_memory
        };
        let most = adapter.max_invocations.min(64);
        let chosen = choices.iter().filter(offered).find(|(_, lanes)| enough(*lanes));
        let chosen = chosen.or_else(|| choices.iter().rfind(offered));
        // Fewer invocations than any choice has: as many as there may be, a power of two.
        let &(workgroup, lanes) = chosen.unwrap_or(&(1 << most.ilog2(), 1 << most.ilog2()));
        let cost =
            Cost { turns: turns::softmax(lanes).of(width), operations: f64::from(params.rows) * width as f64 * 16.0 };
        self.push_costly(
            catalogue::softmax(workgroup, lanes, lse, sink),
            u64::from(params.rows).div_ceil(u64::from(workgroup / lanes)),
            cost,
            |workgroups| params::Softmax {
                row_stride4: params.width4,
                s_offset4: (at.first / 4) as u32,
                workgroups,
                minus_infinity: MINUS_INFINITY,
                not_a_number: NOT_A_NUMBER,
                ..params
            },
            bindings,
        )
    }

    /// Copies X (Q) into `out` (Output), whose rows are `width` long and end in −∞ where they are longer
    /// than those of X. `then` is told the rows of each slice and where they lie.
    fn rows_copied(
        &mut self,
        x: Operand<'_>,
        out: &Layout,
        width: u32,
        mut then: impl FnMut(&mut Self, usize, Window) -> Result<()>,
    ) -> Result<()> {
        if x.is_empty() {
            return Ok(());
        }
        let align = self.adapter.offset_alignment;
        let mut size = [x.shape()[0], x.shape()[1], x.shape()[2]];
        let every = Part { start: 0, count: x.shape()[3] };
        let parts = |at: [Part; 3]| [at[0], at[1], at[2], every];
        while let Some(axis) = (0..3).find(|&axis| size[axis] > 1) {
            let at = parts(size.map(|count| Part { start: 0, count }));
            let largest = window(&x, &at, x.element(), align).size.max(window(out, &at, 4, align).size);
            if largest + align <= self.adapter.max_binding {
                break;
            }
            size[axis] = size[axis].div_ceil(2);
        }
        for a in Part::all(x.shape()[0], size[0]) {
            for b in Part::all(x.shape()[1], size[1]) {
                for c in Part::all(x.shape()[2], size[2]) {
                    let at = parts([a, b, c]);
                    let (from, to) = (window(&x, &at, x.element(), align), window(out, &at, 4, align));
                    let rows = a.count * b.count * c.count;
                    let total = rows as u64 * u64::from(width);
                    self.push(
                        catalogue::copy(x.stored),
                        total.div_ceil(64),
                        |workgroups| params::Copy {
                            x_strides: strides4(&x),
                            shape: at.map(|part| part.count as u32),
                            x_offset: from.first as u32,
                            y_offset: to.first as u32,
                            y_row_stride: width,
                            total: total as u32,
                            workgroups,
                            fill: MINUS_INFINITY,
                            pad_0: 0,
                            pad_1: 0,
                        },
                        vec![
                            Binding { binding: 1, slot: Slot::Q, offset: from.offset, size: from.size },
                            Binding { binding: 2, slot: Slot::Output, offset: to.offset, size: to.size },
                        ],
                    )?;
                    then(self, rows, to)?;
                }
            }
        }
        Ok(())
    }
}
