//! Weights, column sums and entropies for the fused path, recomputed from the LSE.
//!
//! The scores pass could also write weights on views, but the sums would then read a matrix back. Here one loop
//! computes all three, and only results and a few partial sums are stored.

use std::ops::Range;

use super::super::access::Operand;
use super::super::capabilities::{AdapterClass, Capabilities};
use super::super::catalogue::{self, Inspection, RowTile};
use super::super::method::Method;
use super::super::params::{self, View};
use super::super::turns;
use super::call::{Call, Sizes, most_groups};
use super::slice::{Part, halving, slice, window};
use super::{
    AttentionOperands, Binding, Cost, MINUS_INFINITY, NOT_A_NUMBER, Plan, Planner, RelativeOperand, Slot, Window,
    check_buffer, padded_bytes, rows_padded, tile_within,
};
use crate::error::{INSTEAD_OF_INSPECTED, Result};
use crate::problem::{Dtype, Layout, MaskMeaning, Problem, checked_len};

/// Minimum inner rows of a piece of a sum, and maximum pieces of a sum. Both depend only on lengths, so the sums of a
/// row are split the same way whatever else is chosen.
const LEAST_SPLIT: usize = 512;
const MOST_SPLITS: usize = 16;
/// A longer piece would lose digits.
const MOST_SPLIT: usize = 1024;

/// The operands of an inspection: four axes each, masks and biases broadcast to [`Problem::mask_shape`].
#[derive(Clone, Debug)]
pub struct InspectOperands<'a> {
    /// `[b, hq, i, d]`
    pub q: Operand<'a>,
    /// `[b, hkv, j, d]`
    pub k: Operand<'a>,
    /// `[b, hq, i]`
    pub lse: &'a Layout,
    /// Boolean masks.
    pub masks: Vec<(&'a Layout, MaskMeaning)>,
    /// Additive biases.
    pub biases: Vec<&'a Layout>,
    /// A bias by distance.
    pub relative: Option<RelativeOperand<'a>>,
    /// Query heads, in the order of the results.
    pub heads: &'a [usize],
    /// Queries.
    pub queries: Range<usize>,
    /// Whether to return the weights `[b, heads, queries, j]`.
    pub weights: bool,
    /// Whether to return their sums over the chosen queries, `[b, heads, j]`.
    pub column_sums: bool,
    /// Whether to return their entropies over keys, `[b, heads, queries]`.
    pub entropy: bool,
}

/// The plan of an inspection of `problem`. Inputs: Q, K, Lse; results: Weights, ColumnSums, Entropy.
pub fn inspect(problem: &Problem, operands: &InspectOperands<'_>, adapter: &Capabilities) -> Result<Plan> {
    let mut planner = Planner { adapter, plan: Plan::default() };
    let Problem { batch, len_k, .. } = *problem;
    let (heads, rows) = (operands.heads.len(), operands.queries.len());
    let result = |wanted: bool, shape: &[usize]| wanted.then(|| rows_padded(shape)).transpose();
    planner.plan.weights = result(operands.weights, &[batch, heads, rows, len_k])?;
    planner.plan.column_sums = result(operands.column_sums, &[batch, heads, len_k])?;
    planner.plan.entropy = result(operands.entropy, &[batch, heads, rows])?;
    // An inspection is attention without values and without an output.
    let as_call = AttentionOperands {
        q: operands.q,
        k: operands.k,
        v: operands.k,
        output: operands.q,
        masks: operands.masks.clone(),
        biases: operands.biases.clone(),
        relative: operands.relative,
        rotary: None,
        // The LSE includes it.
        sink: None,
        lse: false,
        weights: false,
        averaged: false,
        stage: None,
        method: Method::Auto,
        tuned: None,
    };
    let call = Call::new(problem, &as_call, adapter, 4);
    call.check_relative(adapter)?;
    planner.plan.bands = call.band_table();
    let runs = runs(operands.heads);
    planner.plan.scratch = vec![16; 2];
    let mut sweeps = Vec::new();
    for (inspection, slot, what, layout, inner) in [
        (Inspection::Weights, Slot::Weights, "the weights", planner.plan.weights.clone(), len_k),
        (Inspection::ColumnSums, Slot::ColumnSums, "the column sums", planner.plan.column_sums.clone(), rows),
        (Inspection::Entropy, Slot::Entropy, "the entropies", planner.plan.entropy.clone(), len_k),
    ] {
        let Some(layout) = layout else { continue };
        check_buffer(adapter, what, padded_bytes(&layout, Dtype::F32))
            .map_err(|error| error.or_rather(INSTEAD_OF_INSPECTED))?;
        if layout.is_empty() {
            continue;
        }
        if inner == 0 {
            // Sums over nothing.
            planner.fill(slot, (padded_bytes(&layout, Dtype::F32) / 4) as usize, 0)?;
            continue;
        }
        let most_heads = runs.iter().map(|(_, run)| run.count).max().unwrap_or(0);
        let sizes = [batch, most_heads, rows, len_k];
        let sweep = Sweep { call: &call, operands, inspection, slot, layout, sizes, adapter }.sliced();
        for (n, bytes) in sweep.scratch(sweep.sizes)?.into_iter().enumerate() {
            check_buffer(adapter, "working memory", bytes)?;
            planner.plan.scratch[n] = planner.plan.scratch[n].max(bytes);
        }
        sweeps.push(sweep);
    }
    for sweep in &sweeps {
        let [batch_size, heads, ..] = sweep.sizes;
        for b in Part::all(batch, batch_size) {
            for &(first, run) in &runs {
                for n in Part::all(run.count, heads) {
                    let h = Part { start: run.start + n.start, count: n.count };
                    sweep.rows(&mut planner, b, h, first + n.start)?;
                }
            }
        }
    }
    Ok(planner.plan)
}

/// Chosen heads as runs of consecutive heads, each with its position in the results.
fn runs(heads: &[usize]) -> Vec<(usize, Part)> {
    let mut runs: Vec<(usize, Part)> = Vec::new();
    for (n, &head) in heads.iter().enumerate() {
        match runs.last_mut() {
            Some((_, run)) if run.start + run.count == head => run.count += 1,
            _ => runs.push((n, Part { start: head, count: 1 })),
        }
    }
    runs
}

/// One result over everything that is chosen.
struct Sweep<'a> {
    call: &'a Call<'a>,
    operands: &'a InspectOperands<'a>,
    inspection: Inspection,
    slot: Slot,
    layout: Layout,
    sizes: Sizes,
    adapter: &'a Capabilities,
}

impl<'a> Sweep<'a> {
    fn by_key(&self) -> bool {
        self.inspection == Inspection::ColumnSums
    }

    /// Orders the values for queries and keys as outer and inner.
    fn outer_inner<T>(&self, query: T, key: T) -> (T, T) {
        if self.by_key() { (key, query) } else { (query, key) }
    }

    /// Uses the largest slices whose bindings fit and whose dispatches take less than a second.
    fn sliced(mut self) -> Sweep<'a> {
        let adapter = self.adapter;
        let dim = self.call.problem.dim_k;
        let (outer, inner) = self.outer_inner(2, 3);
        // If inner rows do not fit whatever is outer, they are sliced first, as in the sums.
        let (_, inner_operand) = self.outer_inner(self.operands.q, self.operands.k);
        let inner_fits =
            |&[rows]: &[usize; 1]| self.call.binding_size(&inner_operand, &[1, 1, rows], 4) <= adapter.max_binding;
        let order = [halving(0, 64, 64), halving(0, 4, 4)];
        [self.sizes[inner]] = slice([self.sizes[inner]], &order, 0, inner_fits, |_| true).0;

        let fits = |sizes: &Sizes| self.largest_binding(*sizes) <= adapter.max_binding;
        let is_short = |sizes: &Sizes| {
            2.0 * dim as f64 * sizes.iter().map(|&n| n as f64).product::<f64>() <= adapter.dispatch_operations()
        };
        // Parts of four keep every result aligned. No sum is cut only for time. If nothing is left to slice, the step
        // itself reports an error with the numbers.
        let order = [
            halving(0, 1, 1),
            halving(1, 1, 1),
            halving(outer, 32, 32),
            halving(inner, 64, 64),
            halving(outer, 4, 4),
            halving(inner, 4, 4),
        ];
        self.sizes = slice(self.sizes, &order, 3, fits, is_short).0;
        self
    }

    /// Number of pieces of a sum over `len` rows, and rows per piece.
    fn splits(&self, len: usize) -> (usize, usize) {
        let longest = turns::inspect(self.chunks()).longest(self.adapter.loop_turns()).min(MOST_SPLIT);
        let rows = len.div_ceil(MOST_SPLITS).max(LEAST_SPLIT).min(longest).next_multiple_of(4);
        (len.div_ceil(rows), rows)
    }

    /// Number of chunks of the width.
    fn chunks(&self) -> usize {
        self.call.problem.dim_k.div_ceil(4).div_ceil(self.tile().depth4 as usize).max(1)
    }

    /// Number of outer and inner rows of a slice.
    fn counts(&self, [_, _, rows, keys]: Sizes) -> (usize, usize) {
        self.outer_inner(rows, keys)
    }

    /// Whether the sums of a slice are partial and have to be joined.
    fn joins(&self, inner: usize) -> bool {
        let (_, whole) = self.outer_inner(self.operands.queries.len(), self.call.problem.len_k);
        self.inspection != Inspection::Weights && (inner < whole || self.splits(inner).0 > 1)
    }

    /// The shape of partial sums: split, batch, head, outer row.
    fn partial(&self, batch: usize, heads: usize, outer: usize, splits: usize) -> [usize; 4] {
        [splits, batch, heads, outer.next_multiple_of(4)]
    }

    /// Bytes of working memory: partial sums and combined rules.
    fn scratch(&self, sizes: Sizes) -> Result<[u64; 2]> {
        let (outer, inner) = self.counts(sizes);
        let shape =
            if self.joins(inner) { self.partial(sizes[0], sizes[1], outer, self.splits(inner).0) } else { [0; 4] };
        let partial = ((checked_len(&shape)? * 4) as u64).next_multiple_of(16).max(16);
        Ok([partial, self.call.combined_bytes(sizes)?])
    }

    /// Bytes of the largest binding of any step.
    fn largest_binding(&self, sizes: Sizes) -> u64 {
        let [batch, heads, rows, keys] = sizes;
        let (outer, _) = self.counts(sizes);
        let result = match self.inspection {
            Inspection::Weights => self.call.binding_size(&self.layout, &[batch, heads, rows, keys], 4),
            _ => self.call.binding_size(&self.layout, &[batch, heads, outer], 4),
        };
        let partial = self.scratch(sizes).map_or(u64::MAX, |[partial, _]| partial);
        let lse = self.call.binding_size(self.operands.lse, &[batch, heads, rows], 4);
        // Chosen heads may start anywhere in a group.
        let heads_kv = most_groups(heads, self.call.problem.group()).min(self.call.problem.heads_kv);
        let k = self.call.binding_size(&self.operands.k, &[batch, heads_kv, keys], 4);
        self.call.largest_operand(sizes).max(result).max(partial).max(lse).max(k)
    }

    /// All rows of some heads; `n` is their position in the results.
    fn rows(&self, planner: &mut Planner<'_>, b: Part, h: Part, n: usize) -> Result<()> {
        let (outer_count, inner_count) = self.counts(self.sizes);
        let (outer_len, inner_len) = self.outer_inner(self.operands.queries.len(), self.call.problem.len_k);
        for outer in Part::all(outer_len, outer_count) {
            for inner in Part::all(inner_len, inner_count) {
                self.slice(planner, [b, h, Part { start: n, count: h.count }], outer, inner)?;
            }
        }
        Ok(())
    }

    /// One slice: batch, heads and their position in the results; parts of the chosen queries and of the keys.
    fn slice(&self, planner: &mut Planner<'_>, [b, h, n]: [Part; 3], outer: Part, inner: Part) -> Result<()> {
        let Call { problem, rules, align, .. } = *self.call;
        let InspectOperands { q, k, lse, queries, .. } = self.operands;
        let (i, j) = self.outer_inner(outer, inner);
        let i = Part { start: queries.start + i.start, count: i.count };
        let at = [b, h, i];
        let q_at = self.call.window(*q, &at);
        let k_at = self.call.window(*k, &[b, h.grouped(problem.group()), j]);
        let lse_at = window(lse, &at, 4, align);
        let bound = self.call.bind_rules(planner, at, j, self.sizes)?;

        let (splits, split_rows) = self.splits(inner.count);
        let joins = self.joins(self.counts(self.sizes).1);
        // The result, or partial sums.
        let part = Layout::contiguous(&self.partial(b.count, h.count, outer.count, splits))?;
        let result_at = match self.inspection {
            Inspection::Weights => window(&self.layout, &[b, n, outer, inner], 4, align),
            _ => window(&self.layout, &[b, n, outer], 4, align),
        };
        let result = Binding::new("o", self.slot, result_at);
        let partial = Binding::whole("o", Slot::Scratch(0), planner.plan.scratch[0]);
        let from = View::new(&part, Window::default()).strides;
        let [to_batch, to_head, to_row] = [0, 1, 2].map(|axis| self.layout.strides()[axis] as u32);
        let o = match self.inspection {
            Inspection::Weights => View::strided([to_batch, to_head, to_row, 1], result_at.first),
            _ if joins => View::strided([from[1], from[2], 1, from[0]], 0),
            _ => View::strided([to_batch, to_head, 1, 0], result_at.first),
        };

        let (tile, chunks) = (self.tile(), self.chunks());
        let dim4 = problem.dim_k.div_ceil(4);
        let outer_blocks = outer.count.div_ceil((tile.workgroup * tile.rows) as usize);
        let ((outer_operand, outer_at), (inner_operand, inner_at)) = self.outer_inner((*q, q_at), (*k, k_at));
        let (outer_slot, inner_slot) = self.outer_inner(Slot::Q, Slot::K);
        let mut bindings = vec![
            Binding::new("outer", outer_slot, outer_at),
            Binding::new("inner", inner_slot, inner_at),
            if joins { partial } else { result },
            Binding::new("lse", Slot::Lse, lse_at),
        ];
        bindings.extend(&bound.bindings);
        let pairs = (b.count * h.count) as f64 * outer.count as f64 * inner.count as f64;
        let cost =
            Cost { turns: turns::inspect(chunks).of(split_rows), operations: pairs * 2.0 * problem.dim_k as f64 };
        planner.push_costly(
            catalogue::inspect(
                self.inspection,
                tile,
                chunks as u32,
                [outer_operand.access(), inner_operand.access()],
                chunks * tile.depth4 as usize != dim4,
                problem.softcap.is_some(),
                rules,
            ),
            (b.count * h.count) as u64 * outer_blocks as u64 * splits as u64,
            cost,
            |workgroups| params::Inspect {
                outer: View::new(&outer_operand, outer_at),
                inner: View::new(&inner_operand, inner_at),
                o,
                lse: View::new(&lse.unsqueeze(3).expect("three axes"), lse_at),
                rules: self.call.rules(&bound),
                slice: self.call.slice(at, j),
                dim: problem.dim_k as u32,
                outer_blocks: outer_blocks as u32,
                splits: splits as u32,
                split_rows: split_rows as u32,
                workgroups,
                minus_infinity: MINUS_INFINITY,
                not_a_number: NOT_A_NUMBER,
                ..Default::default()
            },
            bindings,
        )?;
        if !joins {
            return Ok(());
        }
        let width4 = outer.count.div_ceil(4);
        // The splits take the place of the heads in mean_heads, and the heads that of the rows.
        let params = params::MeanHeads {
            p: View::strided([from[1] / 4, from[0] / 4, from[2] / 4, 1], 0),
            a: View::strided([to_batch / 4, 0, to_head / 4, 1], result_at.first / 4),
            heads: splits as u32,
            len_q: h.count as u32,
            width4: width4 as u32,
            total: (b.count * h.count * width4) as u32,
            factor: 1.0,
            ..Default::default()
        };
        planner.mean_heads(params, inner.start > 0, Binding { name: "p", ..partial }, Binding { name: "a", ..result })
    }

    /// Depends on the lengths of the call, not on what is chosen, so every choice runs the same compiled kernel.
    fn tile(&self) -> RowTile {
        let (outer, _) = self.outer_inner(self.call.problem.len_q, self.call.problem.len_k);
        // Number of vec4s that an invocation keeps. More would spill, and take seconds to compile on a software
        // adapter.
        let most = match self.adapter.class {
            AdapterClass::Cpu => 128,
            AdapterClass::Gpu => 8,
        };
        let mut tile = tile_within(self.adapter, outer, self.call.problem.dim_k.div_ceil(4), most as usize);
        while tile.rows > 1 && tile.rows * tile.depth4 > most {
            tile.rows /= 2;
        }
        tile
    }
}
