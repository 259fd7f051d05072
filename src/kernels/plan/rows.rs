//! What tokens get by their position: pairs of columns turned, rows of a table added.

use super::super::access::{Access, Operand, is_wide};
use super::super::capabilities::Capabilities;
use super::super::catalogue;
use super::super::params;
use super::{Binding, Part, Plan, Planner, Slot, Window, check_buffer, padded_bytes, strides_used, window};
use crate::error::Result;
use crate::problem::{Dtype, Layout, Rows};

/// Turns X `[b, h, i, d]` (Q) into Y (Output, f32) by the cosines and sines of `table` `[row, 2 · columns]` (K),
/// `pairs` of them, neighbours where interleaved.
pub fn rotate(
    x: Operand<'_>,
    y: &Layout,
    table: &Layout,
    (pairs, interleaved): (usize, bool),
    rows: &Rows,
    adapter: &Capabilities,
) -> Result<Plan> {
    let mut planner = Planner { adapter, plan: Plan::default() };
    check_buffer(adapter, "rotated rows", padded_bytes(y, Dtype::F32))?;
    let &[batch, heads, len, dim] = x.shape() else { unreachable!("four axes") };
    if x.is_empty() {
        return Ok(planner.plan);
    }
    let wide = is_wide(&x) && is_wide(y) && is_wide(table) && pairs.is_multiple_of(4);
    let access = Access { wide, stored: x.stored };
    let units = if wide { pairs / 4 + (dim - 2 * pairs).div_ceil(8) } else { dim.div_ceil(2) };
    let table = planner.table(table.into(), rows, len)?;
    let every = Part { start: 0, count: dim };
    let size = planner.slices([batch, heads, len], |[b, h, i]| {
        let parts = [b, h, i, every];
        window(&x, &parts, x.element(), 1).size.max(window(y, &parts, 4, 1).size)
    });
    for b in Part::all(batch, size[0]) {
        for h in Part::all(heads, size[1]) {
            for i in Part::all(len, size[2]) {
                let parts = [b, h, i, every];
                let align = adapter.offset_alignment;
                let (from, to) = (window(&x, &parts, x.element(), align), window(y, &parts, 4, align));
                let total = b.count as u64 * h.count as u64 * i.count as u64 * units as u64;
                let (row_0, rows_batch_stride) = table.rows_at(rows, b, i, len);
                planner.push(
                    catalogue::rotate(access, interleaved, table.listed),
                    total.div_ceil(64),
                    |workgroups| params::Rotate {
                        x_strides: strides_used(&x),
                        y_strides: strides_used(y),
                        x_offset: from.first as u32,
                        y_offset: to.first as u32,
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
                        workgroups,
                        ..Default::default()
                    },
                    table.bindings(from, to),
                )?;
            }
        }
    }
    Ok(planner.plan)
}

/// Adds rows of `table` `[row, d]` (K) to X `[b, i, d]` (Q), both of any strides: Y, row-major (Output, f32).
pub fn add_positions(x: Operand<'_>, table: Operand<'_>, rows: &Rows, adapter: &Capabilities) -> Result<Plan> {
    let mut planner = Planner { adapter, plan: Plan::default() };
    let y = Layout::contiguous(x.shape())?;
    check_buffer(adapter, "embeddings", padded_bytes(&y, Dtype::F32))?;
    let &[batch, len, dim] = x.shape() else { unreachable!("three axes") };
    if x.is_empty() {
        return Ok(planner.plan);
    }
    let strides = [table.strides()[0] as u32, table.strides()[1] as u32];
    let variant = |listed| catalogue::add_positions(x.access(), table.access(), is_wide(&y), listed);
    let table = planner.table(table, rows, len)?;
    let every = Part { start: 0, count: dim };
    let size = planner.slices([batch, 1, len], |[b, _, i]| {
        let parts = [b, i, every];
        window(&x, &parts, x.element(), 1).size.max(window(&y, &parts, 4, 1).size)
    });
    for b in Part::all(batch, size[0]) {
        for i in Part::all(len, size[2]) {
            let parts = [b, i, every];
            let align = adapter.offset_alignment;
            let (from, to) = (window(&x, &parts, x.element(), align), window(&y, &parts, 4, align));
            let total = b.count as u64 * i.count as u64 * dim.div_ceil(4) as u64;
            let (row_0, rows_batch_stride) = table.rows_at(rows, b, i, len);
            planner.push(
                variant(table.listed),
                total.div_ceil(64),
                |workgroups| params::AddPositions {
                    x_strides: [0, 1, 2].map(|axis| x.strides()[axis] as u32),
                    x_offset: from.first as u32,
                    table_strides: strides,
                    table_offset: table.at.first as u32,
                    y_offset: to.first as u32,
                    len: i.count as u32,
                    dim: dim as u32,
                    row_0,
                    rows_batch_stride,
                    total: total as u32,
                    workgroups,
                    ..Default::default()
                },
                table.bindings(from, to),
            )?;
        }
    }
    Ok(planner.plan)
}

/// The rows of a table that a call reads.
struct Table {
    at: Window,
    width: usize,
    first: usize,
    /// Whether a kernel reads [`Plan::rows`], and how many bytes.
    listed: bool,
    list_bytes: u64,
}

impl Table {
    /// The kernel's `row_0` and `rows_batch_stride` for a slice.
    fn rows_at(&self, rows: &Rows, b: Part, i: Part, len: usize) -> (u32, u32) {
        match rows {
            Rows::From(start) => ((start - self.first + i.start) as u32, 0),
            Rows::Each { per_batch: true, .. } => ((b.start * len + i.start) as u32, len as u32),
            Rows::Each { .. } => (i.start as u32, 0),
        }
    }

    fn bindings(&self, from: Window, to: Window) -> Vec<Binding> {
        let mut bindings = vec![
            Binding { binding: 1, slot: Slot::Q, offset: from.offset, size: from.size },
            Binding { binding: 2, slot: Slot::Output, offset: to.offset, size: to.size },
            Binding { binding: 3, slot: Slot::K, offset: self.at.offset, size: self.at.size },
        ];
        if self.listed {
            bindings.push(Binding { binding: 4, slot: Slot::Rows, offset: 0, size: self.list_bytes });
        }
        bindings
    }
}

impl Planner<'_> {
    fn table(&mut self, table: Operand<'_>, rows: &Rows, len: usize) -> Result<Table> {
        let used = rows.range(len);
        let width = table.shape()[1];
        let parts = [Part { start: used.start, count: used.len() }, Part { start: 0, count: width }];
        if let Rows::Each { rows, .. } = rows {
            self.plan.rows = rows.iter().map(|row| row - used.start as u32).collect();
        }
        let list_bytes = (self.plan.rows.len() as u64 * 4).next_multiple_of(16);
        Ok(Table {
            at: window(&table, &parts, table.element(), self.adapter.offset_alignment),
            width,
            first: used.start,
            listed: list_bytes > 0,
            list_bytes,
        })
    }

    /// How many of each of three axes a step may take so that its bindings, as `largest` says, fit. An axis is cut
    /// only where those before it are cut to one: a slice of a row-major result is one run.
    pub(super) fn slices(&self, mut size: [usize; 3], largest: impl Fn([Part; 3]) -> u64) -> [usize; 3] {
        while let Some(axis) = (0..3).find(|&axis| size[axis] > 1) {
            let bytes = largest(size.map(|count| Part { start: 0, count }));
            if bytes + self.adapter.offset_alignment <= self.adapter.max_binding {
                break;
            }
            size[axis] = size[axis].div_ceil(2);
        }
        size
    }
}
