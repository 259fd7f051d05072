//! The softmax of a tensor, and halves widened to f32.

use super::super::access::Operand;
use super::super::capabilities::{AdapterClass, Capabilities};
use super::super::catalogue;
use super::super::params;
use super::{
    Binding, MINUS_INFINITY, NOT_A_NUMBER, Part, Plan, Planner, Slot, Window, check_buffer, padded_bytes, rows_padded,
    strides4, window,
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
    let (workgroup, lanes) = if adapter.class == AdapterClass::Cpu { (8, 1) } else { (64, 64) };
    planner.rows_copied(x, &out, width4 * 4, |planner, rows, to| {
        planner.push(
            catalogue::softmax(workgroup, lanes, false, false),
            (rows as u64).div_ceil(u64::from(workgroup / lanes)),
            |workgroups| params::Softmax {
                rows: rows as u32,
                width4,
                row_stride4: width4,
                s_offset4: (to.first / 4) as u32,
                workgroups,
                minus_infinity: MINUS_INFINITY,
                not_a_number: NOT_A_NUMBER,
                ..Default::default()
            },
            vec![Binding { binding: 1, slot: Slot::Output, offset: to.offset, size: to.size }],
        )
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

impl Planner<'_> {
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
