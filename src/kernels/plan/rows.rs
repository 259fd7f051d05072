//! Operations on the rows of tokens: rotation, adding rows of a table, and gates.

use super::super::access::{Access, Operand, is_wide};
use super::super::capabilities::Capabilities;
use super::super::catalogue;
use super::super::params::{self, View};
use super::slice::Part;
use super::{Binding, NOT_A_NUMBER, Plan, Planner, Slot, Window, check_buffer, padded_bytes};
use crate::error::Result;
use crate::problem::{Dtype, Layout, Rows};

/// The columns of a row that are rotated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pairs {
    /// Number of pairs.
    pub count: usize,
    /// Whether adjacent columns form a pair; else columns `count` apart do.
    pub interleaved: bool,
    /// Whether they are rotated back, by the negated angles.
    pub back: bool,
}

/// Rotates X `[b, h, i, d]` (Q) into Y (Output, f32) by the cosines and sines of `table` `[row, 2 · columns]` (K).
pub fn rotate(
    x: Operand<'_>,
    y: &Layout,
    table: &Layout,
    pairs: Pairs,
    rows: &Rows,
    adapter: &Capabilities,
) -> Result<Plan> {
    let mut planner = Planner { adapter, plan: Plan::default() };
    planner.rotate(x, y, table, [Slot::Q, Slot::Output, Slot::K], pairs, rows)?;
    Ok(planner.plan)
}

impl Planner<'_> {
    /// Rotates X into Y by the cosines and sines of `table`; `slots` are their slots.
    pub(super) fn rotate(
        &mut self,
        x: Operand<'_>,
        y: &Layout,
        table: &Layout,
        slots: [Slot; 3],
        Pairs { count: pairs, interleaved, back }: Pairs,
        rows: &Rows,
    ) -> Result<()> {
        check_buffer(self.adapter, "rotated rows", padded_bytes(y, Dtype::F32))?;
        let &[batch, heads, len, dim] = x.shape() else { unreachable!("four axes") };
        if x.is_empty() {
            return Ok(());
        }
        let wide = is_wide(&x) && is_wide(y) && is_wide(table) && pairs.is_multiple_of(4);
        let units = if wide { pairs / 4 + (dim - 2 * pairs).div_ceil(8) } else { dim.div_ceil(2) };
        let table = self.table(table.into(), rows, len);
        let variant = catalogue::rotate(Access { wide, stored: x.stored }, interleaved, table.listed);
        let axes = [batch, heads, len];
        let sizes = self.slices_of(axes, &[(&x, x.element()), (y, 4)]);
        for at in Part::grid(axes, sizes) {
            let (x_at, y_at) = (self.window(&x, &at, x.element()), self.window(y, &at, 4));
            let [b, h, i] = at;
            let total = (b.count * h.count * i.count * units) as u64;
            let (row_0, rows_batch_stride) = table.rows_at(rows, b, i, len);
            let params = params::Rotate {
                x: View::new(&x, x_at),
                y: View::new(y, y_at),
                angles_offset: table.at.first as u32,
                row_stride: table.width as u32,
                pairs: pairs as u32,
                dim: dim as u32,
                units: units as u32,
                heads: h.count as u32,
                len: i.count as u32,
                row_0,
                rows_batch_stride,
                total: total as u32,
                sine_factor: if back { -1.0 } else { 1.0 },
                ..Default::default()
            };
            self.push(variant.clone(), total, params, table.bindings("angles", slots, x_at, y_at))?;
        }
        Ok(())
    }
}

/// Adds rows of `table` `[row, d]` (K) to X `[b, i, d]` (Q), both with any strides, into Y, row-major (Output, f32).
pub fn add_positions(x: Operand<'_>, table: Operand<'_>, rows: &Rows, adapter: &Capabilities) -> Result<Plan> {
    tokens(x, table, Some(rows), "embeddings", adapter)
}

/// `X · σ(G)` for X (Q) and G (K), both `[b, i, d]` with any strides, into Y, row-major (Output, f32).
pub fn gate(x: Operand<'_>, g: Operand<'_>, adapter: &Capabilities) -> Result<Plan> {
    tokens(x, g, None, "gated rows", adapter)
}

/// X `[b, i, d]` and Z: `rows` of a table `[row, d]` to add, or a gate `[b, i, d]`.
fn tokens(x: Operand<'_>, z: Operand<'_>, rows: Option<&Rows>, what: &str, adapter: &Capabilities) -> Result<Plan> {
    let mut planner = Planner { adapter, plan: Plan::default() };
    let &[batch, len, dim] = x.shape() else { unreachable!("three axes") };
    // One head.
    let x_layout = x.unsqueeze(1)?;
    let y = Layout::contiguous(x_layout.shape())?;
    check_buffer(adapter, what, padded_bytes(&y, Dtype::F32))?;
    if x.is_empty() {
        return Ok(planner.plan);
    }
    let z_layout = if rows.is_some() { z.layout.clone() } else { z.unsqueeze(1)? };
    let table = rows.map(|rows| planner.table(z, rows, len));
    let listed = table.as_ref().is_some_and(|table| table.listed);
    let variant = catalogue::tokens(rows.is_none(), x.access(), z.access(), is_wide(&y), listed);
    let axes = [batch, 1, len];
    let mut operands = vec![(&x_layout, x.element()), (&y, 4)];
    operands.extend(rows.is_none().then_some((&z_layout, z.element())));
    let sizes = planner.slices_of(axes, &operands);
    for at in Part::grid(axes, sizes) {
        let (x_at, y_at) = (planner.window(&x_layout, &at, x.element()), planner.window(&y, &at, 4));
        let [b, _, i] = at;
        let total = b.count as u64 * i.count as u64 * dim.div_ceil(4) as u64;
        let mut params = params::Tokens {
            x: View::new(&x_layout, x_at),
            y_offset: y_at.first as u32,
            heads: 1,
            len: i.count as u32,
            dim: dim as u32,
            total: total as u32,
            not_a_number: NOT_A_NUMBER,
            ..Default::default()
        };
        let bindings = match (&table, rows) {
            (Some(table), Some(rows)) => {
                (params.row_0, params.rows_batch_stride) = table.rows_at(rows, b, i, len);
                params.z = View::new(&z_layout, table.at);
                table.bindings("z", [Slot::Q, Slot::Output, Slot::K], x_at, y_at)
            }
            _ => {
                let z_at = planner.window(&z_layout, &at, z.element());
                params.z = View::new(&z_layout, z_at);
                vec![
                    Binding::new("x", Slot::Q, x_at),
                    Binding::new("y", Slot::Output, y_at),
                    Binding::new("z", Slot::K, z_at),
                ]
            }
        };
        planner.push(variant.clone(), total, params, bindings)?;
    }
    Ok(planner.plan)
}

/// The rows of a table that a call reads.
struct Table {
    at: Window,
    width: usize,
    first: usize,
    /// Whether a kernel reads [`Plan::rows`], from which entry, and how many bytes of it.
    listed: bool,
    first_listed: usize,
    list_bytes: u64,
}

impl Table {
    /// The kernel's `row_0` and `rows_batch_stride` for a slice.
    fn rows_at(&self, rows: &Rows, b: Part, i: Part, len: usize) -> (u32, u32) {
        match rows {
            Rows::From(start) => ((start - self.first + i.start) as u32, 0),
            Rows::Each { per_batch: true, .. } => ((self.first_listed + b.start * len + i.start) as u32, len as u32),
            Rows::Each { .. } => ((self.first_listed + i.start) as u32, 0),
        }
    }

    fn bindings(&self, table: &'static str, [of_x, of_y, of_table]: [Slot; 3], x: Window, y: Window) -> Vec<Binding> {
        let mut bindings =
            vec![Binding::new("x", of_x, x), Binding::new("y", of_y, y), Binding::new(table, of_table, self.at)];
        if self.listed {
            bindings.push(Binding::whole("rows", Slot::Rows, self.list_bytes));
        }
        bindings
    }
}

impl Planner<'_> {
    fn table(&mut self, table: Operand<'_>, rows: &Rows, len: usize) -> Table {
        let used = rows.range(len);
        let first_listed = self.plan.rows.len();
        let listed = matches!(rows, Rows::Each { .. });
        if let Rows::Each { rows, .. } = rows {
            self.plan.rows.extend(rows.iter().map(|row| row - used.start as u32));
        }
        let list_bytes = (self.plan.rows.len() as u64 * 4).next_multiple_of(16);
        Table {
            at: self.window(&table, &[Part { start: used.start, count: used.len() }], table.element()),
            width: table.shape()[1],
            first: used.start,
            listed,
            first_listed,
            list_bytes,
        }
    }
}
