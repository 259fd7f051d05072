//! Weights, column sums and entropies beside the fused path, recomputed from the LSE.
//!
//! The scores pass could write weights on views too, but the sums would then read a matrix back; here one
//! loop serves all three, and nothing but results and a few partial sums is held.

use std::ops::Range;

use super::super::access::Operand;
use super::super::capabilities::{AdapterClass, Capabilities};
use super::super::catalogue::{self, Inspection, Tile};
use super::super::{params, turns};
use super::call::{Call, Slices, most_groups};
use super::{
    AttentionOperands, Binding, Cost, MINUS_INFINITY, Method, NOT_A_NUMBER, Part, Plan, Planner, RelativeOperand, Slot,
    check_buffer, padded_bytes, rows_padded, strides_used, strides4, tile_within, window,
};
use crate::error::{INSTEAD_OF_INSPECTED, Result};
use crate::problem::{Dtype, Layout, MaskMeaning, Problem, checked_len};

/// Rows walked over before a sum is handed on, at least, and most pieces of a sum. Chosen by lengths alone:
/// the sums of a row are cut the same way whatever else is chosen.
const LEAST_SPLIT: usize = 512;
const MOST_SPLITS: usize = 16;
/// Rows of a longer piece would lose digits.
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

/// The plan of an inspection of `problem`: Q, K, Lse in; Weights, ColumnSums, Entropy out.
pub fn inspect(problem: &Problem, operands: &InspectOperands<'_>, adapter: &Capabilities) -> Result<Plan> {
    let mut planner = Planner { adapter, plan: Plan::default() };
    let Problem { batch, len_k, .. } = *problem;
    let (heads, rows) = (operands.heads.len(), operands.queries.len());
    let result = |wanted: bool, shape: &[usize]| wanted.then(|| rows_padded(shape)).transpose();
    planner.plan.weights = result(operands.weights, &[batch, heads, rows, len_k])?;
    planner.plan.column_sums = result(operands.column_sums, &[batch, heads, len_k])?;
    planner.plan.entropy = result(operands.entropy, &[batch, heads, rows])?;
    // Inspecting is attention without values: no output takes part.
    let as_call = AttentionOperands {
        q: operands.q,
        k: operands.k,
        v: operands.k,
        output: operands.q,
        masks: operands.masks.clone(),
        biases: operands.biases.clone(),
        relative: operands.relative,
        rotary: None,
        // The LSE has it.
        sink: None,
        lse: false,
        weights: false,
        averaged: false,
        stage: None,
        method: Method::Auto,
    };
    let call = Call::new(problem, &as_call, adapter, 4);
    call.check_relative(adapter)?;
    planner.plan.bands = call.band_table();
    let runs = runs(operands.heads);
    planner.plan.scratch = vec![16; 2];
    let mut sweeps = Vec::new();
    for (inspection, slot, what, layout, walked) in [
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
        if walked == 0 {
            // Sums of nothing.
            planner.fill(slot, (padded_bytes(&layout, Dtype::F32) / 4) as usize, 0)?;
            continue;
        }
        let most_heads = runs.iter().map(|(_, run)| run.count).max().unwrap_or(0);
        let slices = Slices { batch, heads: most_heads, rows, keys: len_k };
        let sweep = Sweep { call: &call, operands, inspection, slot, layout, slices, adapter }.cut();
        for (n, bytes) in sweep.scratch()?.into_iter().enumerate() {
            check_buffer(adapter, "working memory", bytes)?;
            planner.plan.scratch[n] = planner.plan.scratch[n].max(bytes);
        }
        sweeps.push(sweep);
    }
    for sweep in &sweeps {
        for b in Part::all(batch, sweep.slices.batch) {
            for &(first, run) in &runs {
                for n in Part::all(run.count, sweep.slices.heads) {
                    let h = Part { start: run.start + n.start, count: n.count };
                    sweep.rows(&mut planner, b, h, first + n.start)?;
                }
            }
        }
    }
    Ok(planner.plan)
}

/// Chosen heads as runs of neighbours, each with its place in the results.
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

/// One result over all that is chosen.
struct Sweep<'a> {
    call: &'a Call<'a>,
    operands: &'a InspectOperands<'a>,
    inspection: Inspection,
    slot: Slot,
    layout: Layout,
    slices: Slices,
    adapter: &'a Capabilities,
}

impl<'a> Sweep<'a> {
    fn by_key(&self) -> bool {
        self.inspection == Inspection::ColumnSums
    }

    /// What is kept in registers and what is walked over, of queries and keys.
    fn turn<T>(&self, query: T, key: T) -> (T, T) {
        if self.by_key() { (key, query) } else { (query, key) }
    }

    /// With the largest slices whose bindings fit and whose dispatches take less than a second.
    fn cut(mut self) -> Sweep<'a> {
        let adapter = self.adapter;
        let most_work = adapter.dispatch_operations();
        loop {
            let Slices { batch, heads, rows, keys } = self.slices;
            let work = 2.0 * self.call.problem.dim_k as f64 * (batch * heads) as f64 * rows as f64 * keys as f64;
            let fits = self.largest_binding() <= adapter.max_binding;
            if fits && work <= most_work {
                return self;
            }
            // What is walked over is cut where it is too large itself, whatever is kept: so are the sums.
            let (_, walked_operand) = self.turn(self.operands.q, self.operands.k);
            let whole = [1, 1, self.counts().1, self.call.problem.dim_k];
            let walked_fits = self.binding_size(&walked_operand, &whole) <= adapter.max_binding;
            let by_key = self.by_key();
            let Slices { batch, heads, rows, keys } = &mut self.slices;
            let (kept, walked) = if by_key { (keys, rows) } else { (rows, keys) };
            // Parts of four leave every result aligned.
            if *batch > 1 {
                *batch = batch.div_ceil(2);
            } else if *heads > 1 {
                *heads = heads.div_ceil(2);
            } else if *kept > 32 && walked_fits {
                *kept = kept.div_ceil(2).next_multiple_of(32);
            } else if fits && walked_fits {
                // No sum is cut for time alone.
                return self;
            } else if *walked > 64 {
                *walked = walked.div_ceil(2).next_multiple_of(64);
            } else if *kept > 4 {
                *kept = kept.div_ceil(2).next_multiple_of(4);
            } else if *walked > 4 {
                *walked = walked.div_ceil(2).next_multiple_of(4);
            } else {
                // Nothing left to cut; the step itself is refused with the numbers.
                return self;
            }
        }
    }

    /// Pieces of a sum over `len` rows, and rows per piece.
    fn splits(&self, len: usize) -> (usize, usize) {
        let longest = turns::inspect(self.chunks()).longest(self.adapter.loop_turns()).min(MOST_SPLIT);
        let rows = len.div_ceil(MOST_SPLITS).max(LEAST_SPLIT).min(longest).next_multiple_of(4);
        (len.div_ceil(rows), rows)
    }

    /// Chunks of the width.
    fn chunks(&self) -> usize {
        self.call.problem.dim_k.div_ceil(4).div_ceil(self.tile().depth4 as usize).max(1)
    }

    /// The parts of the kept and the walked axis: kept rows, walked rows.
    fn counts(&self) -> (usize, usize) {
        self.turn(self.slices.rows, self.slices.keys)
    }

    /// Whether the sums of a slice are parts of a whole, to be joined.
    fn joins(&self) -> bool {
        let (_, walked) = self.counts();
        let (_, whole) = self.turn(self.operands.queries.len(), self.call.problem.len_k);
        self.inspection != Inspection::Weights && (walked < whole || self.splits(walked).0 > 1)
    }

    /// The shape of the parts of a sum: split, batch, head, kept row.
    fn partial(&self, batch: usize, heads: usize, kept: usize, splits: usize) -> [usize; 4] {
        [splits, batch, heads, kept.next_multiple_of(4)]
    }

    /// Bytes of working memory: partial sums and folded rules.
    fn scratch(&self) -> Result<[u64; 2]> {
        let Slices { batch, heads, .. } = self.slices;
        let (kept, walked) = self.counts();
        let shape = if self.joins() { self.partial(batch, heads, kept, self.splits(walked).0) } else { [0; 4] };
        let folded = if self.call.fold_rules { self.call.folded_shape(self.slices) } else { [0; 4] };
        let bytes = |shape: [usize; 4]| Ok(((checked_len(&shape)? * 4) as u64).next_multiple_of(16).max(16));
        Ok([bytes(shape)?, bytes(folded)?])
    }

    fn binding_size(&self, layout: &Layout, counts: &[usize]) -> u64 {
        let parts: Vec<Part> = counts.iter().map(|&count| Part { start: 0, count }).collect();
        // The start of a later slice may lie anywhere within the alignment.
        window(layout, &parts, 4, self.call.align).size.saturating_add(self.call.align)
    }

    /// Bytes of the largest binding of any step.
    fn largest_binding(&self) -> u64 {
        let Slices { batch, heads, rows, keys } = self.slices;
        let (kept, _) = self.counts();
        let result = match self.inspection {
            Inspection::Weights => self.binding_size(&self.layout, &[batch, heads, rows, keys]),
            _ => self.binding_size(&self.layout, &[batch, heads, kept]),
        };
        let partial = self.scratch().map_or(u64::MAX, |[partial, _]| partial);
        let lse = self.binding_size(self.operands.lse, &[batch, heads, rows]);
        // Chosen heads may begin anywhere in a group.
        let Problem { heads_kv, dim_k, .. } = *self.call.problem;
        let heads_kv = most_groups(heads, self.call.problem.group()).min(heads_kv);
        let k = self.binding_size(&self.operands.k, &[batch, heads_kv, keys, dim_k]);
        self.call.largest_operand(self.slices).max(result).max(partial).max(lse).max(k)
    }

    /// All rows of some heads; `n` is their place in the results.
    fn rows(&self, planner: &mut Planner<'_>, b: Part, h: Part, n: usize) -> Result<()> {
        let queries = &self.operands.queries;
        let (kept_count, walked_count) = self.counts();
        let (kept_len, walked_len) = self.turn(queries.len(), self.call.problem.len_k);
        for kept in Part::all(kept_len, kept_count) {
            for walked in Part::all(walked_len, walked_count) {
                self.slice(planner, [b, h, Part { start: n, count: h.count }], kept, walked)?;
            }
        }
        Ok(())
    }

    /// One slice: batch, heads and their place in the results; parts of the chosen queries and of the keys.
    fn slice(&self, planner: &mut Planner<'_>, [b, h, n]: [Part; 3], kept: Part, walked: Part) -> Result<()> {
        let Call { problem, rules, align, .. } = *self.call;
        let InspectOperands { q, k, lse, queries, .. } = self.operands;
        let (i, j) = self.turn(kept, walked);
        let i = Part { start: queries.start + i.start, count: i.count };
        let head_kv = h.grouped(problem.group());
        let every = Part { start: 0, count: problem.dim_k };
        let q_at = window(q, &[b, h, i, every], q.element(), align);
        let k_at = window(k, &[b, head_kv, j, every], k.element(), align);
        let lse_at = window(lse, &[b, h, i], 4, align);
        let bound = self.call.bind_rules(planner, [b, h, i], j, self.slices)?;

        let (splits, split_rows) = self.splits(walked.count);
        let joins = self.joins();
        // The result, or parts of it.
        let part = Layout::contiguous(&self.partial(b.count, h.count, kept.count, splits))?;
        let result_at = match self.inspection {
            Inspection::Weights => window(&self.layout, &[b, n, kept, walked], 4, align),
            _ => window(&self.layout, &[b, n, kept], 4, align),
        };
        let result = Binding { binding: 3, slot: self.slot, offset: result_at.offset, size: result_at.size };
        let partial = Binding { binding: 3, slot: Slot::Scratch(0), offset: 0, size: planner.plan.scratch[0] };
        let mut out_strides = strides4(&self.layout);
        if joins {
            let strides = strides4(&part);
            out_strides = [strides[1], strides[2], 1, strides[0]];
        } else if self.inspection != Inspection::Weights {
            (out_strides[2], out_strides[3]) = (1, 0);
        }

        let (tile, chunks) = (self.tile(), self.chunks());
        let dim4 = problem.dim_k.div_ceil(4);
        let kept_blocks = kept.count.div_ceil((tile.workgroup * tile.rows) as usize);
        let ((kept_operand, kept_at), (walked_operand, walked_at)) = self.turn((*q, q_at), (*k, k_at));
        let (kept_slot, walked_slot) = self.turn(Slot::Q, Slot::K);
        let mut bindings = vec![
            Binding { binding: 1, slot: kept_slot, offset: kept_at.offset, size: kept_at.size },
            Binding { binding: 2, slot: walked_slot, offset: walked_at.offset, size: walked_at.size },
            if joins { partial } else { result },
            Binding { binding: 8, slot: Slot::Lse, offset: lse_at.offset, size: lse_at.size },
        ];
        bindings.extend(&bound.bindings);
        let pairs = (b.count * h.count) as f64 * kept.count as f64 * walked.count as f64;
        let cost =
            Cost { turns: turns::inspect(chunks).of(split_rows), operations: pairs * 2.0 * problem.dim_k as f64 };
        planner.push_costly(
            catalogue::inspect(
                self.inspection,
                tile,
                chunks as u32,
                [kept_operand.access(), walked_operand.access()],
                chunks * tile.depth4 as usize != dim4,
                problem.softcap.is_some(),
                rules,
            ),
            (b.count * h.count) as u64 * kept_blocks as u64 * splits as u64,
            cost,
            |workgroups| params::Inspect {
                kept_strides: strides_used(&kept_operand),
                walked_strides: strides_used(&walked_operand),
                out_strides,
                lse_strides: strides4(lse),
                band: self.call.band(),
                kept_offset: kept_at.first as u32,
                walked_offset: walked_at.first as u32,
                out_offset: if joins { 0 } else { result_at.first as u32 },
                lse_offset: lse_at.first as u32,
                batch_0: if problem.bands.len() > 1 { b.start as u32 } else { 0 },
                head_0: h.start as u32,
                head_kv_0: head_kv.start as u32,
                row_0: i.start as u32,
                key_0: j.start as u32,
                heads: h.count as u32,
                group: problem.group() as u32,
                len_q: i.count as u32,
                len_k: j.count as u32,
                ruled_keys: problem.ruled_keys() as u32,
                dim: problem.dim_k as u32,
                kept_blocks: kept_blocks as u32,
                splits: splits as u32,
                split_rows: split_rows as u32,
                workgroups,
                minus_infinity: MINUS_INFINITY,
                not_a_number: NOT_A_NUMBER,
                scale: problem.scale,
                softcap: problem.softcap.unwrap_or(1.0),
                ..(&bound).into()
            },
            bindings,
        )?;
        if !joins {
            return Ok(());
        }
        let width4 = kept.count.div_ceil(4);
        let total = (b.count * h.count * width4) as u64;
        let by_4 = |strides: [u32; 3]| [strides[0] / 4, strides[1] / 4, strides[2] / 4, 0];
        let (from, to) = (strides4(&part), strides4(&self.layout));
        // The splits stand where mean_heads has its heads, the heads where it has its rows.
        let cost = Cost { turns: turns::mean_heads().of(splits), operations: total as f64 * 8.0 * splits as f64 };
        planner.push_costly(
            catalogue::mean_heads(walked.start > 0),
            total.div_ceil(64),
            cost,
            |workgroups| params::MeanHeads {
                p_strides: by_4([from[1], from[0], from[2]]),
                a_strides: by_4([to[0], 0, to[1]]),
                p_offset4: 0,
                a_offset4: (result_at.first / 4) as u32,
                heads: splits as u32,
                len_q: h.count as u32,
                width4: width4 as u32,
                total: total as u32,
                workgroups,
                factor: 1.0,
            },
            vec![Binding { binding: 1, ..partial }, Binding { binding: 2, ..result }],
        )
    }

    /// By the lengths of the call, not of what is chosen: every choice runs the same compiled kernel.
    fn tile(&self) -> Tile {
        let (kept, _) = self.turn(self.call.problem.len_q, self.call.problem.len_k);
        // vec4s that an invocation keeps: more spill, and take seconds to compile on a software adapter.
        let most = match self.adapter.class {
            AdapterClass::Cpu => 128,
            AdapterClass::Gpu => 32,
        };
        let mut tile = tile_within(self.adapter, kept, self.call.problem.dim_k.div_ceil(4), most as usize);
        while tile.rows > 1 && tile.rows * tile.depth4 > most {
            tile.rows /= 2;
        }
        tile
    }
}
