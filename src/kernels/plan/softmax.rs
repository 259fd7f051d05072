//! The softmax of a tensor, and f16 and bf16 widened to f32.

use super::super::access::Operand;
use super::super::capabilities::{AdapterClass, Capabilities};
use super::super::params::{self, View};
use super::super::{catalogue, turns};
use super::slice::Part;
use super::{
    Binding, Cost, MINUS_INFINITY, NOT_A_NUMBER, Plan, Planner, Slot, Window, check_buffer, padded_bytes, rows_padded,
};
use crate::error::Result;
use crate::problem::{Dtype, Layout};

/// Softmax over the last axis of X (at most four axes, any strides): copies X (Q) into rows of whole vec4s (Output,
/// [`Plan::weights`]) and computes the weights there.
pub fn softmax(x: Operand<'_>, adapter: &Capabilities) -> Result<Plan> {
    let mut planner = Planner { adapter, plan: Plan::default() };
    let out = rows_padded(x.shape())?;
    check_buffer(adapter, "the softmax", padded_bytes(&out, Dtype::F32))?;
    let width4 = x.shape()[3].div_ceil(4) as u32;
    planner.rows_copied(x, &out, width4 * 4, |planner, rows, to| {
        let bindings = vec![Binding::new("s", Slot::Output, to)];
        let params = params::Softmax { rows: rows as u32, width4, ..Default::default() };
        planner.softmax_rows(params, to, [false, false], bindings)
    })?;
    planner.plan.weights = Some(out);
    Ok(planner.plan)
}

/// Copies X (Q; four axes, any strides, any type) to row-major f32 (Output).
pub fn widen(x: Operand<'_>, adapter: &Capabilities) -> Result<Plan> {
    let mut planner = Planner { adapter, plan: Plan::default() };
    let out = Layout::contiguous(x.shape())?;
    check_buffer(adapter, "a tensor widened to f32", padded_bytes(&out, Dtype::F32))?;
    planner.rows_copied(x, &out, x.shape()[3] as u32, |_, _, _| Ok(()))?;
    Ok(planner.plan)
}

/// Most elements that a lane sums in each component, while more lanes are available; more would lose digits.
const MOST_ADDED: usize = 2048;

impl Planner<'_> {
    /// The softmax of consecutive rows of whole vec4s, starting at `at`. `params` give the number and width of rows and
    /// the fields of the LSE and the sink, if there are any.
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
        // Fewer invocations than any choice: as many as allowed, a power of two.
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

    /// Copies X (Q) into `out` (Output), whose rows are `width` long and end in −∞ if they are longer than those of X.
    /// Calls `then` with the rows of each slice and their window.
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
        let &[a_len, b_len, c_len, dim] = x.shape() else { unreachable!("four axes") };
        let axes = [a_len, b_len, c_len];
        let sizes = self.slices_of(axes, &[(&x, x.element()), (out, 4)]);
        for at in Part::grid(axes, sizes) {
            let (x_at, y_at) = (self.window(&x, &at, x.element()), self.window(out, &at, 4));
            let [a, b, c] = at.map(|part| part.count);
            let total = (a * b * c) as u64 * u64::from(width);
            let params = params::Copy {
                x: View::new(&x, x_at),
                y: View::new(out, y_at),
                shape: [a as u32, b as u32, c as u32, width],
                columns: dim as u32,
                total: total as u32,
                fill: MINUS_INFINITY,
                ..Default::default()
            };
            let bindings = vec![Binding::new("x", Slot::Q, x_at), Binding::new("y", Slot::Output, y_at)];
            self.push(catalogue::copy(x.stored), total, params, bindings)?;
            then(self, a * b * c, y_at)?;
        }
        Ok(())
    }
}
