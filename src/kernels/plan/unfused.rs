//! Attention in three passes.

use super::super::access::Access;
use super::super::capabilities::Capabilities;
use super::super::catalogue::{self, Rules};
use super::super::params::{self, View};
use super::super::turns;
use super::call::{BoundRules, Call, Sizes};
use super::slice::{Part, halving, slice};
use super::{
    AttentionOperands, Binding, Cost, MINUS_INFINITY, NOT_A_NUMBER, Plan, Planner, Slot, Window, check_buffer,
    padded_bytes, rows_padded,
};
use crate::error::Result;
use crate::problem::{Dtype, Layout, Problem, ScoreStage, checked_len};

/// Keys whose values are summed in one run. Longer sums lose digits, so their parts accumulate in the output.
const MOST_SUMMED: usize = 512;

/// Adds the passes of a call after what `planner` has: with the output and its LSE, or in addition to them.
pub(super) fn passes(
    planner: &mut Planner<'_>,
    problem: &Problem,
    operands: &AttentionOperands<'_>,
    output: bool,
) -> Result<()> {
    let adapter = planner.adapter;
    let Problem { batch, heads_q, len_q, len_k, .. } = *problem;
    let operands = AttentionOperands { output: operands.output.layout.into(), ..operands.clone() };
    let call = Call { output, ..Call::new(problem, &operands, adapter, 3) };
    call.check_relative(adapter)?;
    if planner.plan.bands.is_empty() {
        planner.plan.bands = call.band_table();
    }
    let sizes = call.sliced(&planner.plan, adapter);
    // No rows may follow a slice of the heads within its rows, because softmax takes consecutive rows.
    debug_assert!(sizes[0] == 1 || sizes[1] == heads_q);
    debug_assert!(sizes[1] == 1 || sizes[2] == len_q);

    let scratch_rows = checked_len(&[sizes[0], sizes[1], sizes[2], len_k.next_multiple_of(4)])?;
    let in_place = planner.plan.weights.is_some() || !call.weighs();
    let mut scratch = vec![if in_place { 16 } else { scratch_rows as u64 * 4 }];
    if call.combine {
        scratch.push(call.combined_bytes(sizes)?);
    }
    for &bytes in &scratch {
        check_buffer(adapter, "working memory", bytes)?;
    }
    // What ran before no longer needs its working memory.
    for (n, bytes) in scratch.into_iter().enumerate() {
        match planner.plan.scratch.get_mut(n) {
            Some(known) => *known = bytes.max(*known),
            None => planner.plan.scratch.push(bytes),
        }
    }
    for at in Part::grid([batch, heads_q, len_q], [sizes[0], sizes[1], sizes[2]]) {
        call.plan_slice(planner, at, sizes)?;
    }
    Ok(())
}

/// Adds `O = P·V` for weights that exist (Weights, in the layout of [`Plan::weights`]).
pub(super) fn sum_values(planner: &mut Planner<'_>, problem: &Problem, operands: &AttentionOperands<'_>) -> Result<()> {
    let adapter = planner.adapter;
    let Problem { batch, heads_q, len_q, .. } = *problem;
    let call = Call::new(problem, operands, adapter, 3);
    planner.plan.bands = call.band_table();
    let sizes = call.sliced(&planner.plan, adapter);
    planner.plan.scratch = vec![16, call.combined_bytes(sizes)?];
    check_buffer(adapter, "working memory", planner.plan.scratch[1])?;
    let weights = planner.plan.weights.clone().expect("the caller has weights");
    for at in Part::grid([batch, heads_q, len_q], [sizes[0], sizes[1], sizes[2]]) {
        let window = planner.window(&weights, &at, 4);
        call.values(planner, at, sizes, (Slot::Weights, &weights, window))?;
    }
    Ok(())
}

impl Call<'_> {
    /// Whether these passes compute weights.
    fn weighs(&self) -> bool {
        let AttentionOperands { weights, averaged, stage, .. } = *self.operands;
        self.output || weights || averaged || stage == Some(ScoreStage::Weights)
    }

    /// The largest slices whose bindings all fit.
    fn sliced(&self, plan: &Plan, adapter: &Capabilities) -> Sizes {
        let Problem { batch, heads_q, len_q, len_k, dim_k, dim_v, .. } = *self.problem;
        // If keys do not fit whatever else is sliced, slice them first: where strides spread a head over all keys,
        // slicing the other axes down to single rows would gain nothing.
        let one_row = |&[keys]: &[usize; 1]| self.largest_operand([1, 1, 1, keys]) <= adapter.max_binding;
        let ([keys], _) = slice([len_k], &[halving(0, 64, 64), halving(0, 4, 4)], 0, one_row, |_| true);
        let most_heads = turns::mean_heads().longest(adapter.loop_turns());
        let fits = |sizes: &Sizes| {
            let [batch, heads, rows, _] = *sizes;
            let scores = match &plan.weights {
                Some(layout) => self.binding_size(layout, &[batch, heads, rows], 4),
                None => batch as u64 * heads as u64 * rows as u64 * len_k.next_multiple_of(4) as u64 * 4,
            };
            self.largest_operand(*sizes).max(scores) <= adapter.max_binding
                && (heads <= most_heads || !self.operands.averaged)
        };
        // The time of the longest of the three passes.
        let is_short = |&[batch, heads, rows, keys]: &Sizes| {
            let pairs = (batch * heads) as f64 * rows as f64 * keys as f64;
            pairs * 2.0 * dim_k.max(dim_v) as f64 <= adapter.dispatch_operations()
        };
        let order = [
            halving(0, 1, 1),
            halving(1, 1, 1),
            halving(2, 32, 32),
            halving(3, 64, 64),
            halving(2, 1, 1),
            halving(3, 4, 4),
        ];
        // No sum is cut only for time. If nothing is left to slice, the step itself reports an error with the numbers.
        slice([batch, heads_q, len_q, keys], &order, 3, fits, is_short).0
    }

    fn plan_slice(&self, planner: &mut Planner<'_>, at: [Part; 3], sizes: Sizes) -> Result<()> {
        let Call { problem, operands, .. } = *self;
        let [b, h, i] = at;
        let len_k = problem.len_k;
        // P of this slice: a part of the returned weights, or working memory.
        let (p_slot, p_layout, p_at) = match planner.plan.weights.clone() {
            Some(layout) => {
                let at = planner.window(&layout, &at, 4);
                (Slot::Weights, layout, at)
            }
            None => {
                let layout = rows_padded(&[b.count, h.count, i.count, len_k])?;
                let size = padded_bytes(&layout, Dtype::F32);
                (Slot::Scratch(0), layout, Window { offset: 0, size, first: 0 })
            }
        };
        let asked_for = match operands.stage {
            Some(ScoreStage::Scaled) => Some(0),
            Some(ScoreStage::Capped) => Some(1),
            Some(ScoreStage::Masked) => Some(2),
            Some(ScoreStage::Weights) | None => None,
        };
        for j in Part::all(len_k, sizes[3]) {
            let bound = self.bind_rules(planner, at, j, sizes)?;
            if let Some(stage) = asked_for {
                let layout = planner.plan.stage.clone().expect("planned with the stage");
                let to = planner.window(&layout, &at, 4);
                self.scores(planner, at, j, (Slot::Stage, &layout, to), &bound, stage)?;
            }
            if self.weighs() {
                self.scores(planner, at, j, (p_slot, &p_layout, p_at), &bound, 2)?;
            }
        }
        if !self.weighs() {
            return Ok(());
        }

        self.softmax(planner, at, p_slot, p_at)?;

        if let Some(averaged) = planner.plan.averaged.clone() {
            let to = planner.window(&averaged, &[b, i], 4);
            let width4 = len_k.div_ceil(4) as u32;
            let total = b.count as u64 * i.count as u64 * u64::from(width4);
            let by_4 = |layout: &Layout, at| {
                let view = View::new(layout, at);
                View { strides: view.strides.map(|stride| stride / 4), offset: view.offset / 4, ..view }
            };
            let params = params::MeanHeads {
                p: by_4(&p_layout, p_at),
                a: by_4(&averaged, to),
                heads: h.count as u32,
                len_q: i.count as u32,
                width4,
                total: total as u32,
                factor: 1.0 / problem.heads_q as f32,
                ..Default::default()
            };
            planner.mean_heads(
                params,
                h.start > 0,
                Binding::new("p", p_slot, p_at),
                Binding::new("a", Slot::Averaged, to),
            )?;
        }

        if problem.dim_v == 0 || !self.output {
            return Ok(());
        }
        if operands.sink.is_some() {
            self.sum_of_nothing(planner, at)?;
        }
        self.values(planner, at, sizes, (p_slot, &p_layout, p_at))
    }

    /// Adds the weighted sum of a slice.
    fn values(&self, planner: &mut Planner<'_>, at: [Part; 3], sizes: Sizes, p: (Slot, &Layout, Window)) -> Result<()> {
        let Problem { len_k, dim_v, .. } = *self.problem;
        // A sum over more keys than the driver's loop limit or the precision allows accumulates its parts in the
        // output.
        let tile = planner.tile(at[2].count, dim_v.div_ceil(4));
        let longest = turns::weighted_sum(tile).longest(planner.adapter.loop_turns());
        let longest = if len_k > 2 * MOST_SUMMED { longest.min(MOST_SUMMED) } else { longest };
        for j in Part::all(len_k, sizes[3].min(longest)) {
            // Combined rules of several key slices share one buffer, so combine again what was overwritten.
            let bound = self.bind_rules(planner, at, j, sizes)?;
            self.weighted_sum(planner, at, j, p, &bound)?;
        }
        Ok(())
    }

    /// Computes the softmax of a slice in place, and its LSE.
    fn softmax(&self, planner: &mut Planner<'_>, [b, h, i]: [Part; 3], slot: Slot, at: Window) -> Result<()> {
        let mut bindings = vec![Binding::new("s", slot, at)];
        let mut lse_offset = 0;
        let lse = self.operands.lse && self.output;
        if lse {
            let (_, at) = self.lse(&[b, h, i])?;
            lse_offset = at.first as u32;
            bindings.push(Binding::new("lse", Slot::Lse, at));
        }
        let [sink_offset, sink_stride] = self.bind_sink(&mut bindings, h);
        let params = params::Softmax {
            rows: (b.count * h.count * i.count) as u32,
            width4: self.problem.len_k.div_ceil(4) as u32,
            lse_offset,
            len_q: i.count as u32,
            heads: h.count as u32,
            sink_offset,
            sink_stride,
            ..Default::default()
        };
        planner.softmax_rows(params, at, [lse, self.operands.sink.is_some()], bindings)
    }

    fn scores(
        &self,
        planner: &mut Planner<'_>,
        at: [Part; 3],
        j: Part,
        (s_slot, s_layout, s_at): (Slot, &Layout, Window),
        bound: &BoundRules,
        stage: u32,
    ) -> Result<()> {
        let Call { problem, operands, rules, .. } = *self;
        let [b, h, i] = at;
        let q_at = self.window(operands.q, &at);
        let k_at = self.window(operands.k, &[b, h.grouped(problem.group()), j]);
        let dim4 = problem.dim_k.div_ceil(4);
        let tile = planner.tile(i.count, dim4);
        let chunks = dim4.div_ceil(tile.depth4 as usize).max(1);
        let row_blocks = i.count.div_ceil((tile.workgroup * tile.rows) as usize) as u64;
        let heads = (b.count * h.count) as u64;
        let longest = turns::scores(chunks).longest(planner.adapter.loop_turns());
        let key_blocks = planner.pieces(row_blocks * heads, j.count, 64).max(j.count.div_ceil(longest));
        let keys_per_block = j.count.div_ceil(key_blocks).next_multiple_of(4);
        let key_blocks = j.count.div_ceil(keys_per_block);
        let mut bindings =
            vec![Binding::new("q", Slot::Q, q_at), Binding::new("k", Slot::K, k_at), Binding::new("s", s_slot, s_at)];
        if stage == 2 {
            bindings.extend(&bound.bindings);
        }
        let padded = chunks * tile.depth4 as usize != dim4;
        let pairs = heads as f64 * i.count as f64 * j.count as f64;
        let cost =
            Cost { turns: turns::scores(chunks).of(keys_per_block), operations: pairs * 2.0 * problem.dim_k as f64 };
        let access = [operands.q.access(), operands.k.access()];
        planner.push_costly(
            catalogue::scores(tile, access, padded, problem.softcap.is_some(), rules, stage),
            row_blocks * heads * key_blocks as u64,
            cost,
            |workgroups| params::Scores {
                q: View::new(&operands.q, q_at),
                k: View::new(&operands.k, k_at),
                s: View::new(s_layout, s_at),
                rules: self.rules(bound),
                slice: self.slice(at, j),
                dim: problem.dim_k as u32,
                chunks: chunks as u32,
                row_blocks: row_blocks as u32,
                key_blocks: key_blocks as u32,
                keys_per_block: keys_per_block as u32,
                workgroups,
                minus_infinity: MINUS_INFINITY,
                ..Default::default()
            },
            bindings,
        )
    }

    fn weighted_sum(
        &self,
        planner: &mut Planner<'_>,
        at: [Part; 3],
        j: Part,
        (p_slot, p_layout, p_at): (Slot, &Layout, Window),
        bound: &BoundRules,
    ) -> Result<()> {
        let Call { problem, operands, mut rules, .. } = *self;
        // Biases do not hide keys.
        rules.relative = None;
        let [b, h, _] = at;
        let v_at = self.window(operands.v, &[b, h.grouped(problem.group()), j]);
        let mut bindings = vec![Binding::new("p", p_slot, p_at), Binding::new("v", Slot::V, v_at)];
        bindings.extend(bound.bindings.iter().filter(|one| one.slot != Slot::Relative));
        let params = params::WeightedSum {
            p: View::new(p_layout, p_at),
            v: View::new(&operands.v, v_at),
            rules: self.rules(bound),
            slice: self.slice(at, j),
            ..Default::default()
        };
        let accumulate = j.start > 0 || operands.sink.is_some();
        self.sum(planner, at, params, operands.v.access(), accumulate, rules, bindings)
    }

    /// Adds a weighted sum into the output, as `params` specify.
    #[allow(clippy::too_many_arguments)]
    fn sum(
        &self,
        planner: &mut Planner<'_>,
        at: [Part; 3],
        params: params::WeightedSum,
        v: Access,
        accumulate: bool,
        rules: Rules,
        mut bindings: Vec<Binding>,
    ) -> Result<()> {
        let Call { problem, operands, .. } = *self;
        let [b, h, i] = at;
        let o_at = self.window(operands.output, &at);
        bindings.push(Binding::new("o", Slot::Output, o_at));
        let dim4 = problem.dim_v.div_ceil(4);
        let tile = planner.tile(i.count, dim4);
        let column_blocks = dim4.div_ceil(tile.depth4 as usize);
        let row_blocks = i.count.div_ceil((tile.workgroup * tile.rows) as usize);
        let keys = params.slice.len_k as usize;
        let pairs = (b.count * h.count) as f64 * i.count as f64 * keys.max(1) as f64;
        let cost = Cost { turns: turns::weighted_sum(tile).of(keys), operations: pairs * 2.0 * problem.dim_v as f64 };
        planner.push_costly(
            catalogue::weighted_sum(tile, v, operands.output.access(), accumulate, rules),
            (row_blocks * b.count * h.count * column_blocks) as u64,
            cost,
            |workgroups| params::WeightedSum {
                o: View::new(&operands.output, o_at),
                dim: problem.dim_v as u32,
                row_blocks: row_blocks as u32,
                column_blocks: column_blocks as u32,
                workgroups,
                minus_infinity: MINUS_INFINITY,
                not_a_number: NOT_A_NUMBER,
                ..params
            },
            bindings,
        )
    }

    /// Without any key: outputs 0, LSE −∞ or the sink.
    pub(super) fn nothing_to_see(&self, planner: &mut Planner<'_>) -> Result<()> {
        let Call { problem, operands, .. } = *self;
        let Problem { batch, heads_q, len_q, dim_v, .. } = *problem;
        let [h, i] = [heads_q, len_q].map(|count| Part { start: 0, count });
        if operands.lse && operands.sink.is_none() {
            planner.fill(Slot::Lse, checked_len(&[batch, heads_q, len_q])?, MINUS_INFINITY)?;
        }
        for b in Part::all(batch, 1) {
            if operands.lse && operands.sink.is_some() {
                // Rows without scores.
                let nothing = Window { offset: 0, size: 16, first: 0 };
                self.softmax(planner, [b, h, i], Slot::Scratch(0), nothing)?;
            }
            if dim_v > 0 {
                self.sum_of_nothing(planner, [b, h, i])?;
            }
        }
        Ok(())
    }

    /// The output before any key: 0, or NaN if the sink is NaN or +∞. Its strides are arbitrary, so a weighted sum over
    /// no keys writes it.
    fn sum_of_nothing(&self, planner: &mut Planner<'_>, at: [Part; 3]) -> Result<()> {
        let mut bindings = vec![Binding::nothing("p"), Binding::nothing("v")];
        let [sink_offset, sink_stride] = self.bind_sink(&mut bindings, at[1]);
        let slice = self.slice(at, Part::whole(0));
        let params = params::WeightedSum { slice, sink_offset, sink_stride, ..Default::default() };
        let rules = Rules { sink: self.operands.sink.is_some(), ..Rules::default() };
        self.sum(planner, at, params, Access::NARROW, false, rules, bindings)
    }
}

impl Planner<'_> {
    /// Sets `elements` words of a buffer to the bits of `value`: a copy of rows without columns.
    pub(super) fn fill(&mut self, slot: Slot, elements: usize, value: u32) -> Result<()> {
        let whole = Layout::contiguous(&[elements])?;
        for part in Part::all(elements, (self.adapter.max_binding / 4) as usize) {
            let to = self.window(&whole, &[part], 4);
            let params = params::Copy {
                y: View::new(&whole, to),
                shape: [1, 1, 1, part.count as u32],
                total: part.count as u32,
                fill: value,
                ..Default::default()
            };
            let bindings = vec![Binding::nothing("x"), Binding::new("y", slot, to)];
            self.push(catalogue::copy(Dtype::F32), part.count as u64, params, bindings)?;
        }
        Ok(())
    }

    /// Means, or sums if `factor` is 1, over the heads of P into A.
    pub(super) fn mean_heads(
        &mut self,
        params: params::MeanHeads,
        accumulate: bool,
        p: Binding,
        a: Binding,
    ) -> Result<()> {
        let heads = params.heads as usize;
        let total = u64::from(params.total);
        let cost = Cost { turns: turns::mean_heads().of(heads), operations: total as f64 * 8.0 * heads as f64 };
        self.push_costly(catalogue::mean_heads(accumulate), total.div_ceil(64), cost, |_| params, vec![p, a])
    }
}
