//! The projections of a layer.

use super::super::access::{Access, Operand};
use super::super::capabilities::{AdapterClass, Capabilities};
use super::super::catalogue::{self, MatvecTile, ProjectTile, RowTile};
use super::super::params::{self, View};
use super::super::turns;
use super::slice::{Part, halving, slice, window};
use super::{Binding, Cost, Plan, Planner, Slot, check_buffer, padded_bytes, rows_per_invocation};
use crate::error::{Result, shape_error};
use crate::problem::{Dtype, Layout};

/// Most rows of a batch entry for which all lanes together read W for a few rows at a time. Independent of the batch,
/// so that a row gives the same bits in every batch.
const FEW_ROWS: usize = 4;
/// vec4s of X that an invocation of a software adapter keeps.
const KEPT: u32 = 256;
/// Maximum number of rows that these vec4s belong to.
const MOST_ROWS: u32 = 8;

/// `Y = X·Wᵀ + b` with rows appended: X `[b, l, in]` (Q), W `[out, in]` (K), b `[out]` (Bias 0), extra
/// rows (Bias 1, 2, …; `None`: zeros), Y `[b, l + extra, out]` row-major (Output).
pub fn project(
    x: Operand<'_>,
    w: Operand<'_>,
    bias: Option<&Layout>,
    extra: &[Option<&Layout>],
    adapter: &Capabilities,
) -> Result<Plan> {
    let (&[batch, len, dim_in], &[dim_out, dim_w]) = (x.shape(), w.shape()) else {
        return Err(shape_error!(
            "a projection needs X [b, l, in] and W [out, in], not {:?} and {:?}",
            x.shape(),
            w.shape()
        ));
    };
    if dim_in != dim_w {
        return Err(shape_error!("X {:?} is {dim_in} wide but W {:?} takes {dim_w}", x.shape(), w.shape()));
    }
    let y = Layout::contiguous(&[batch, len + extra.len(), dim_out])?;
    check_buffer(adapter, "a projection", padded_bytes(&y, Dtype::F32))?;
    let mut planner = Planner { adapter, plan: Plan::default() };
    let fits = |layout: &Layout, counts: &[usize], element| {
        let parts: Vec<Part> = counts.iter().copied().map(Part::whole).collect();
        window(layout, &parts, element, 1).size + adapter.offset_alignment <= adapter.max_binding
    };
    let halve_outputs = [halving(0, 4, 4), halving(0, 1, 1)];
    // Outputs whose weights do not fit are sliced first.
    let ([outs], _) = slice([dim_out], &halve_outputs, 0, |&[o]| fits(&w, &[o], w.element()), |_| true);
    let all_fit = |&[b, l, o]: &[usize; 3]| fits(&x, &[b, l], x.element()) && fits(&y, &[b, l, o], 4);
    let is_short =
        |&[b, l, o]: &[usize; 3]| 2.0 * (b * l) as f64 * o as f64 * dim_in as f64 <= adapter.dispatch_operations();
    let order = [halving(0, 1, 1), halving(1, 1, 1), halving(2, 4, 4), halving(2, 1, 1)];
    let (sizes, _) = slice([batch, len, outs], &order, 4, all_fit, is_short);
    for [b, l, o] in Part::grid([batch, len, dim_out], sizes) {
        let x_at = planner.window(&x, &[b, l], x.element());
        let w_at = planner.window(&w, &[o], w.element());
        let y_at = planner.window(&y, &[b, l, o], 4);
        let mut bindings = vec![
            Binding::new("x", Slot::Q, x_at),
            Binding::new("w", Slot::K, w_at),
            Binding::new("y", Slot::Output, y_at),
        ];
        let mut params = params::Project {
            x: View::new(&x, x_at),
            y: View::new(&y, y_at),
            w: View::new(&w, w_at),
            rows: (b.count * l.count) as u32,
            len: l.count as u32,
            dim_in: dim_in as u32,
            dim_out: o.count as u32,
            ..Default::default()
        };
        if let Some(layout) = bias {
            let at = planner.window(layout, &[o], 4);
            params.bias = View::new(layout, at);
            bindings.push(Binding::new("bias", Slot::Bias(0), at));
        }
        let access = [x.access(), w.access()];
        if len <= FEW_ROWS {
            planner.few_rows(params, access, bindings)?;
        } else {
            let wide_y = dim_out.is_multiple_of(4) && o.start.is_multiple_of(4);
            if planner.takes_tiles(dim_in) {
                planner.tiled_rows(params, access, wide_y, bindings)?;
            } else {
                planner.many_rows(params, access, wide_y, bindings)?;
            }
        }
    }
    // Extra rows are copied; a row of zeros is filled.
    for (n, row) in extra.iter().enumerate() {
        for b in Part::all(batch, sizes[0]) {
            let y_at = planner.window(&y, &[b, Part { start: len + n, count: 1 }], 4);
            let total = b.count as u64 * dim_out as u64;
            let mut params = params::Copy {
                y: View::new(&y, y_at),
                shape: [b.count as u32, 1, 1, dim_out as u32],
                total: total as u32,
                ..Default::default()
            };
            let mut x = Binding::nothing("x");
            if let Some(layout) = row {
                let at = planner.window(layout, &[], 4);
                (params.x, params.columns) = (View::new(layout, at), dim_out as u32);
                x = Binding::new("x", Slot::Bias(1 + n), at);
            } else if planner.plan.scratch.is_empty() {
                planner.plan.scratch.push(16);
            }
            planner.push(catalogue::copy(Dtype::F32), total, params, vec![x, Binding::new("y", Slot::Output, y_at)])?;
        }
    }
    Ok(planner.plan)
}

impl Planner<'_> {
    /// Computes the rows that `params` specify; reads W once for as many of them as fit in registers.
    fn few_rows(&mut self, params: params::Project, [x, w]: [Access; 2], bindings: Vec<Binding>) -> Result<()> {
        let adapter = self.adapter;
        let (workgroup, most_rows, outs) = match adapter.class {
            AdapterClass::Cpu => (8, 8, 8),
            AdapterClass::Gpu => (64, 4, 4),
        };
        let workgroup = workgroup.min(1 << adapter.max_invocations.ilog2());
        let rows = params.rows.next_power_of_two().min(most_rows);
        // A subgroup sum is a workgroup sum if a subgroup is no smaller than the workgroup.
        let is_one_subgroup = workgroup == 8 && adapter.subgroup_min.is_some_and(|least| least >= workgroup);
        let tile = MatvecTile { workgroup, rows, outs, share: if is_one_subgroup { workgroup } else { 1 } };
        let (row_blocks, out_blocks) = (params.rows.div_ceil(rows), params.dim_out.div_ceil(outs));
        let cost = Cost { turns: turns::matvec(tile).of(params.dim_in as usize), operations: operations(&params) };
        self.push_costly(
            catalogue::matvec(tile, x, w, has_bias(&bindings)),
            u64::from(row_blocks) * u64::from(out_blocks),
            cost,
            |workgroups| params::Project { row_blocks, out_blocks, workgroups, ..params },
            bindings,
        )
    }

    /// Whether the product runs in workgroup memory.
    fn takes_tiles(&self, dim_in: usize) -> bool {
        let adapter = self.adapter;
        adapter.class == AdapterClass::Gpu
            && !adapter.refuses_tiled_products
            && adapter.max_invocations >= ProjectTile::WORKGROUP
            && adapter.workgroup_memory >= ProjectTile::MEMORY
            && turns::project_tiled().of(dim_in) <= adapter.loop_turns()
    }

    /// Computes the rows that `params` specify, in tiles in workgroup memory.
    fn tiled_rows(
        &mut self,
        params: params::Project,
        [x, w]: [Access; 2],
        wide_y: bool,
        bindings: Vec<Binding>,
    ) -> Result<()> {
        let row_blocks = params.rows.div_ceil(ProjectTile::ROWS);
        let out_blocks = params.dim_out.div_ceil(ProjectTile::OUTS);
        let padded = !params.dim_in.is_multiple_of(ProjectTile::DEPTH);
        let cost = Cost { turns: turns::project_tiled().of(params.dim_in as usize), operations: operations(&params) };
        self.push_costly(
            catalogue::project_tiled(x, w, wide_y, padded, has_bias(&bindings)),
            u64::from(row_blocks) * u64::from(out_blocks),
            cost,
            |workgroups| params::Project { row_blocks, out_blocks, workgroups, ..params },
            bindings,
        )
    }

    /// Computes the rows that `params` specify, a few in the registers of each invocation.
    fn many_rows(
        &mut self,
        params: params::Project,
        [x, w]: [Access; 2],
        wide_y: bool,
        bindings: Vec<Binding>,
    ) -> Result<()> {
        let (rows, dim_out) = (params.rows as usize, params.dim_out as usize);
        let dim4 = (params.dim_in as usize).div_ceil(4);
        let tile = self.project_tile(rows, dim4);
        let chunks = dim4.div_ceil(tile.depth4 as usize).max(1);
        let row_blocks = rows.div_ceil((tile.workgroup * tile.rows) as usize);
        // One dispatch covers as many outputs and as much of the width as the driver's loop limit allows.
        let most_turns = self.adapter.loop_turns();
        let most_chunks = turns::project_chunks(tile.depth4, most_turns).min(chunks);
        let longest = turns::project(most_chunks, tile.depth4).longest(most_turns);
        let out_blocks = self.pieces(row_blocks as u64, dim_out, 64).max(dim_out.div_ceil(longest));
        let outs_per_block = dim_out.div_ceil(out_blocks).next_multiple_of(4);
        let out_blocks = dim_out.div_ceil(outs_per_block);
        let padded = chunks * tile.depth4 as usize != dim4;
        for chunk in Part::all(chunks, most_chunks) {
            let cost = Cost {
                turns: turns::project(chunk.count, tile.depth4).of(outs_per_block),
                operations: operations(&params) * chunk.count as f64 / chunks as f64,
            };
            self.push_costly(
                catalogue::project(tile, x, w, wide_y, padded, has_bias(&bindings)),
                row_blocks as u64 * out_blocks as u64,
                cost,
                |workgroups| params::Project {
                    chunks: (chunk.start + chunk.count) as u32,
                    all_chunks: chunks as u32,
                    chunk_0: chunk.start as u32,
                    row_blocks: row_blocks as u32,
                    out_blocks: out_blocks as u32,
                    outs_per_block: outs_per_block as u32,
                    workgroups,
                    ..params
                },
                bindings.clone(),
            )?;
        }
        Ok(())
    }

    fn project_tile(&self, rows: usize, dim4: usize) -> RowTile {
        let RowTile { workgroup, share, .. } = self.tile(rows, dim4);
        match self.adapter.class {
            AdapterClass::Gpu => self.tile(rows, dim4),
            // The rows of X fill the L1 cache; deep chunks go through Y less often. The depth does not depend on the
            // number of rows, which grows with the batch.
            AdapterClass::Cpu => {
                let rows = rows_per_invocation(rows, workgroup, MOST_ROWS);
                let chunks = dim4.div_ceil((KEPT / MOST_ROWS) as usize).max(1);
                RowTile { workgroup, rows, share, depth4: dim4.div_ceil(chunks).max(1) as u32 }
            }
        }
    }
}

fn has_bias(bindings: &[Binding]) -> bool {
    bindings.iter().any(|one| one.slot == Slot::Bias(0))
}

/// Operations of all rows and outputs.
fn operations(params: &params::Project) -> f64 {
    2.0 * f64::from(params.rows) * f64::from(params.dim_in) * f64::from(params.dim_out)
}
