//! Attention in three passes.

use super::super::access::Access;
use super::super::capabilities::Capabilities;
use super::super::catalogue::{self, Rules};
use super::super::{params, turns};
use super::call::{BoundRules, Call, Slices};
use super::{
    AttentionOperands, Binding, Cost, MINUS_INFINITY, Method, NOT_A_NUMBER, NOTHING, Part, Plan, Planner, Slot, Window,
    check_buffer, flash, padded_bytes, rows_padded, strides_used, strides4, window,
};
use crate::error::{Error, INSTEAD_OF_AVERAGED, INSTEAD_OF_WEIGHTS, Result};
use crate::problem::{Dtype, Layout, Problem, ScoreStage, checked_len};

/// Keys whose values are added up in one run: more lose digits, and add up their parts in the output.
const MOST_SUMMED: usize = 512;

/// The attention call `problem` over `operands`.
pub fn attention(problem: &Problem, operands: &AttentionOperands<'_>, adapter: &Capabilities) -> Result<Plan> {
    let mut planner = Planner { adapter, plan: Plan::default() };
    let Problem { batch, heads_q, len_q, len_k, .. } = *problem;
    let square = [batch, heads_q, len_q, len_k];
    if operands.weights || operands.stage == Some(ScoreStage::Weights) {
        planner.plan.weights = Some(rows_padded(&square)?);
    }
    if operands.averaged {
        planner.plan.averaged = Some(rows_padded(&[batch, len_q, len_k])?);
    }
    if operands.stage.is_some_and(|stage| stage != ScoreStage::Weights) {
        planner.plan.stage = Some(rows_padded(&square)?);
    }
    for (what, layout, instead) in [
        ("the weights", &planner.plan.weights, INSTEAD_OF_WEIGHTS),
        ("the averaged weights", &planner.plan.averaged, INSTEAD_OF_AVERAGED),
        ("the scores", &planner.plan.stage, INSTEAD_OF_AVERAGED),
    ] {
        if let Some(layout) = layout {
            check_buffer(adapter, what, padded_bytes(layout, Dtype::F32)).map_err(|error| error.or_rather(instead))?;
        }
    }
    planner.plan.output = operands.output.stored;
    if problem.is_empty() {
        if let Some(averaged) = planner.plan.averaged.clone().filter(|layout| !layout.is_empty()) {
            // The mean over no head is 0.
            planner.plan.scratch = vec![16];
            planner.fill(Slot::Averaged, (padded_bytes(&averaged, Dtype::F32) / 4) as usize, 0)?;
        }
        return Ok(planner.plan);
    }
    if len_k == 0 {
        planner.plan.scratch = vec![16];
        Call::new(problem, operands, adapter, 3).nothing_to_see(&mut planner)?;
        return Ok(planner.plan);
    }

    let fused = match operands.method {
        Method::ThreePasses => Err("they were asked for".into()),
        _ => flash::attention(problem, operands, adapter)?,
    };
    if let Err(reason) = &fused {
        planner.plan.why = format!("three passes: {reason}");
    }
    let fused = fused.ok();
    let has_output = fused.is_some();
    if let Some(rotary) = operands.rotary
        && (!has_output || operands.weights || operands.averaged || operands.stage.is_some())
    {
        return Err(Error::Unsupported {
            what: format!("turning {} pairs of columns while they are read", rotary.pairs),
            adapter: adapter.adapter.clone(),
            needs: "a call for the output alone that runs fused; else they are turned before".into(),
        });
    }
    if let Some(fused) = fused {
        if !operands.weights && !operands.averaged && operands.stage.is_none() {
            return Ok(Plan { output: operands.output.stored, ..fused });
        }
        // The output is the fused one whatever else is asked for: asking changes no bit of it.
        planner.plan.steps = fused.steps;
        planner.plan.scratch = fused.scratch;
        planner.plan.bands = fused.bands;
        planner.plan.why = fused.why + "; weights and scores beside it";
    } else {
        // Sums over slices of the keys add up in the output.
        planner.plan.output = Dtype::F32;
    }
    let passes = AttentionOperands { output: operands.output.layout.into(), ..operands.clone() };
    let call = Call { output: !has_output, ..Call::new(problem, &passes, adapter, 3) };
    call.check_relative(adapter)?;
    if planner.plan.bands.is_empty() {
        planner.plan.bands = call.band_table();
    }
    // The largest slices whose bindings all fit. Keys that do not fit whatever else is cut come first: where strides
    // spread a head over all keys, cutting the others down to single rows would win nothing.
    let mut slices = Slices { batch, heads: heads_q, rows: len_q, keys: len_k };
    let one_row = |keys| call.largest_operand(Slices { batch: 1, heads: 1, rows: 1, keys });
    while slices.keys > 4 && one_row(slices.keys) > adapter.max_binding {
        let whole = if slices.keys > 64 { 64 } else { 4 };
        slices.keys = slices.keys.div_ceil(2).next_multiple_of(whole);
    }
    let most_heads = turns::mean_heads().longest(adapter.loop_turns());
    while call.largest_binding(slices, planner.plan.weights.as_ref()) > adapter.max_binding
        || operands.averaged && slices.heads > most_heads
        || call.operations(slices) > adapter.dispatch_operations() && call.may_shrink(slices)
    {
        let Slices { batch, heads, rows, keys } = &mut slices;
        if *batch > 1 {
            *batch = batch.div_ceil(2);
        } else if *heads > 1 {
            *heads = heads.div_ceil(2);
        } else if *rows > 32 {
            *rows = rows.div_ceil(2).next_multiple_of(32);
        } else if *keys > 64 {
            *keys = keys.div_ceil(2).next_multiple_of(64);
        } else if *rows > 1 {
            *rows = rows.div_ceil(2);
        } else if *keys > 4 {
            *keys = keys.div_ceil(2).next_multiple_of(4);
        } else {
            // Nothing left to cut; the step itself is refused with the numbers.
            break;
        }
    }
    // Nothing behind a slice of the heads may share its rows: softmax walks rows one after another.
    debug_assert!(slices.batch == 1 || slices.heads == heads_q);
    debug_assert!(slices.heads == 1 || slices.rows == len_q);

    let scratch_rows = checked_len(&[slices.batch, slices.heads, slices.rows, len_k.next_multiple_of(4)])?;
    let in_place = planner.plan.weights.is_some() || !call.weighs();
    let mut scratch = vec![if in_place { 16 } else { scratch_rows as u64 * 4 }];
    if call.fold_rules {
        let [b, h, i, j] = call.folded_shape(slices);
        scratch.push(((checked_len(&[b, h, i, j])? * 4) as u64).next_multiple_of(16).max(16));
    }
    for &bytes in &scratch {
        check_buffer(adapter, "working memory", bytes)?;
    }
    // What ran before is done with its working memory.
    for (n, bytes) in scratch.into_iter().enumerate() {
        match planner.plan.scratch.get_mut(n) {
            Some(known) => *known = bytes.max(*known),
            None => planner.plan.scratch.push(bytes),
        }
    }

    for b in Part::all(batch, slices.batch) {
        for h in Part::all(heads_q, slices.heads) {
            for i in Part::all(len_q, slices.rows) {
                call.plan_slice(&mut planner, [b, h, i], slices)?;
            }
        }
    }
    Ok(planner.plan)
}

impl Call<'_> {
    /// Whether these passes compute weights.
    fn weighs(&self) -> bool {
        let AttentionOperands { weights, averaged, stage, .. } = *self.operands;
        self.output || weights || averaged || stage == Some(ScoreStage::Weights)
    }

    /// Operations of the longest of the three passes.
    fn operations(&self, Slices { batch, heads, rows, keys }: Slices) -> f64 {
        let Problem { dim_k, dim_v, .. } = *self.problem;
        (batch * heads) as f64 * rows as f64 * keys as f64 * 2.0 * dim_k.max(dim_v) as f64
    }

    /// Whether batch, heads or rows are left to cut: no sum is cut for time alone.
    fn may_shrink(&self, Slices { batch, heads, rows, .. }: Slices) -> bool {
        batch > 1 || heads > 1 || rows > 32
    }

    /// Bytes of the largest binding of any of the three passes.
    fn largest_binding(&self, slices: Slices, weights: Option<&Layout>) -> u64 {
        let Slices { batch, heads, rows, .. } = slices;
        let len_k = self.problem.len_k;
        let scores = match weights {
            Some(layout) => self.binding_size(layout, [batch, heads, rows, len_k], 4),
            None => batch as u64 * heads as u64 * rows as u64 * len_k.next_multiple_of(4) as u64 * 4,
        };
        self.largest_operand(slices).max(scores)
    }

    fn plan_slice(&self, planner: &mut Planner<'_>, at: [Part; 3], slices: Slices) -> Result<()> {
        let Call { problem, operands, .. } = *self;
        let [b, h, i] = at;
        let len_k = problem.len_k;
        let weights = planner.plan.weights.clone();
        // P of this slice: a part of the returned weights, or working memory.
        let (p_slot, p_layout, p_window) = match &weights {
            Some(layout) => (
                Slot::Weights,
                layout.clone(),
                window(layout, &[b, h, i, Part { start: 0, count: len_k }], 4, self.align),
            ),
            None => {
                let layout = rows_padded(&[b.count, h.count, i.count, len_k])?;
                let size = padded_bytes(&layout, Dtype::F32);
                (Slot::Scratch(0), layout, Window { offset: 0, size, first: 0 })
            }
        };
        let head_kv = h.grouped(problem.group());
        let asked_for = match operands.stage {
            Some(ScoreStage::Scaled) => Some(0),
            Some(ScoreStage::Capped) => Some(1),
            Some(ScoreStage::Masked) => Some(2),
            Some(ScoreStage::Weights) | None => None,
        };
        for j in Part::all(len_k, slices.keys) {
            let rules_bound = self.bind_rules(planner, at, j, slices)?;
            if let Some(stage) = asked_for {
                let layout = planner.plan.stage.clone().expect("planned with the stage");
                let part = window(&layout, &[b, h, i, Part { start: 0, count: len_k }], 4, self.align);
                let to = (Slot::Stage, &layout, part);
                self.scores(planner, [b, h, i, j], head_kv, to, &rules_bound, stage)?;
            }
            if self.weighs() {
                self.scores(planner, [b, h, i, j], head_kv, (p_slot, &p_layout, p_window), &rules_bound, 2)?;
            }
        }
        if !self.weighs() {
            return Ok(());
        }

        self.softmax(planner, at, p_slot, p_window)?;

        if let Some(averaged) = planner.plan.averaged.clone() {
            let part = window(&averaged, &[b, i, Part { start: 0, count: len_k }], 4, self.align);
            let width4 = len_k.div_ceil(4) as u32;
            let total = b.count as u64 * i.count as u64 * u64::from(width4);
            let strides = |layout: &Layout, axes: [Option<usize>; 3]| {
                let mut out = [0; 4];
                for (to, axis) in out.iter_mut().zip(axes) {
                    *to = axis.map_or(0, |axis| (layout.strides()[axis] / 4) as u32);
                }
                out
            };
            let cost = Cost { turns: turns::mean_heads().of(h.count), operations: total as f64 * 8.0 * h.count as f64 };
            planner.push_costly(
                catalogue::mean_heads(h.start > 0),
                total.div_ceil(64),
                cost,
                |workgroups| params::MeanHeads {
                    p_strides: strides(&p_layout, [Some(0), Some(1), Some(2)]),
                    a_strides: strides(&averaged, [Some(0), None, Some(1)]),
                    p_offset4: (p_window.first / 4) as u32,
                    a_offset4: (part.first / 4) as u32,
                    heads: h.count as u32,
                    len_q: i.count as u32,
                    width4,
                    total: total as u32,
                    workgroups,
                    factor: 1.0 / problem.heads_q as f32,
                },
                vec![
                    Binding { binding: 1, slot: p_slot, offset: p_window.offset, size: p_window.size },
                    Binding { binding: 2, slot: Slot::Averaged, offset: part.offset, size: part.size },
                ],
            )?;
        }

        if problem.dim_v == 0 || !self.output {
            return Ok(());
        }
        if operands.sink.is_some() {
            self.sum_of_nothing(planner, at)?;
        }
        // A sum over more keys than the driver's loops turn, or than lose no digits, adds up its parts in the output.
        let tile = planner.tile(i.count, problem.dim_v.div_ceil(4));
        let longest = turns::weighted_sum(tile).longest(planner.adapter.loop_turns());
        let longest = if len_k > 2 * MOST_SUMMED { longest.min(MOST_SUMMED) } else { longest };
        for j in Part::all(len_k, slices.keys.min(longest)) {
            // Folded rules of several key slices share one buffer: fold again what was overwritten.
            let rules_bound = self.bind_rules(planner, at, j, slices)?;
            self.weighted_sum(planner, [b, h, i, j], head_kv, (p_slot, &p_layout, p_window), &rules_bound)?;
        }
        Ok(())
    }

    /// The softmax of a slice in place, and its LSE.
    fn softmax(&self, planner: &mut Planner<'_>, [b, h, i]: [Part; 3], slot: Slot, at: Window) -> Result<()> {
        let Call { problem, operands, .. } = *self;
        let rows = b.count as u64 * h.count as u64 * i.count as u64;
        let mut bindings = vec![Binding { binding: 1, slot, offset: at.offset, size: at.size }];
        let mut lse_offset = 0;
        let lse = operands.lse && self.output;
        if lse {
            let lse = Layout::contiguous(&[problem.batch, problem.heads_q, problem.len_q])?;
            let part = window(&lse, &[b, h, i], 4, self.align);
            lse_offset = part.first as u32;
            bindings.push(Binding { binding: 2, slot: Slot::Lse, offset: part.offset, size: part.size });
        }
        let [sink_offset, sink_stride] = self.bind_sink(&mut bindings, h);
        let params = params::Softmax {
            rows: rows as u32,
            width4: problem.len_k.div_ceil(4) as u32,
            lse_offset,
            len_q: i.count as u32,
            heads: h.count as u32,
            sink_offset,
            sink_stride,
            ..Default::default()
        };
        planner.softmax_rows(params, at, [lse, operands.sink.is_some()], bindings)
    }

    fn scores(
        &self,
        planner: &mut Planner<'_>,
        [b, h, i, j]: [Part; 4],
        head_kv: Part,
        (s_slot, s_layout, s_window): (Slot, &Layout, Window),
        bound: &BoundRules,
        stage: u32,
    ) -> Result<()> {
        let Call { problem, operands, rules, .. } = *self;
        let every = |layout: &Layout| Part { start: 0, count: layout.shape()[3] };
        let q = window(&operands.q, &[b, h, i, every(&operands.q)], operands.q.element(), self.align);
        let k = window(&operands.k, &[b, head_kv, j, every(&operands.k)], operands.k.element(), self.align);
        let dim4 = problem.dim_k.div_ceil(4);
        let tile = planner.tile(i.count, dim4);
        let chunks = dim4.div_ceil(tile.depth4 as usize).max(1);
        let row_blocks = i.count.div_ceil((tile.workgroup * tile.rows) as usize) as u64;
        let heads = (b.count * h.count) as u64;
        let longest = turns::scores(chunks).longest(planner.adapter.loop_turns());
        let key_blocks = planner.pieces(row_blocks * heads, j.count, 64).max(j.count.div_ceil(longest));
        let keys_per_block = j.count.div_ceil(key_blocks).next_multiple_of(4);
        let key_blocks = j.count.div_ceil(keys_per_block);
        let mut bindings = vec![
            Binding { binding: 1, slot: Slot::Q, offset: q.offset, size: q.size },
            Binding { binding: 2, slot: Slot::K, offset: k.offset, size: k.size },
            Binding { binding: 3, slot: s_slot, offset: s_window.offset, size: s_window.size },
        ];
        bindings.extend(&bound.bindings);
        let padded = chunks * tile.depth4 as usize != dim4;
        let pairs = heads as f64 * i.count as f64 * j.count as f64;
        let cost =
            Cost { turns: turns::scores(chunks).of(keys_per_block), operations: pairs * 2.0 * problem.dim_k as f64 };
        planner.push_costly(
            catalogue::scores(
                tile,
                operands.q.access(),
                operands.k.access(),
                padded,
                problem.softcap.is_some(),
                rules,
                stage,
            ),
            row_blocks * heads * key_blocks as u64,
            cost,
            |workgroups| params::Scores {
                q_strides: strides_used(&operands.q),
                k_strides: strides_used(&operands.k),
                s_strides: strides4(s_layout),
                band: self.band(),
                q_offset: q.first as u32,
                k_offset: k.first as u32,
                s_offset: s_window.first as u32,
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
                chunks: chunks as u32,
                row_blocks: row_blocks as u32,
                key_blocks: key_blocks as u32,
                keys_per_block: keys_per_block as u32,
                workgroups,
                minus_infinity: MINUS_INFINITY,
                scale: problem.scale,
                softcap: problem.softcap.unwrap_or(1.0),
                ..bound.into()
            },
            bindings,
        )
    }

    fn weighted_sum(
        &self,
        planner: &mut Planner<'_>,
        [b, h, i, j]: [Part; 4],
        head_kv: Part,
        (p_slot, p_layout, p_window): (Slot, &Layout, Window),
        bound: &BoundRules,
    ) -> Result<()> {
        let Call { problem, operands, mut rules, .. } = *self;
        // What is added to scores hides nothing.
        rules.relative = None;
        let every = |layout: &Layout| Part { start: 0, count: layout.shape()[3] };
        let v = window(&operands.v, &[b, head_kv, j, every(&operands.v)], operands.v.element(), self.align);
        let o = window(&operands.output, &[b, h, i, every(&operands.output)], operands.output.element(), self.align);
        let dim4 = problem.dim_v.div_ceil(4);
        let tile = planner.tile(i.count, dim4);
        let column_blocks = dim4.div_ceil(tile.depth4 as usize);
        let row_blocks = i.count.div_ceil((tile.workgroup * tile.rows) as usize) as u64;
        let mut bindings = vec![
            Binding { binding: 1, slot: p_slot, offset: p_window.offset, size: p_window.size },
            Binding { binding: 2, slot: Slot::V, offset: v.offset, size: v.size },
            Binding { binding: 3, slot: Slot::Output, offset: o.offset, size: o.size },
        ];
        bindings.extend(bound.bindings.iter().filter(|one| one.slot != Slot::Relative));
        let accumulate = j.start > 0 || operands.sink.is_some();
        let pairs = (b.count * h.count) as f64 * i.count as f64 * j.count as f64;
        let cost =
            Cost { turns: turns::weighted_sum(tile).of(j.count), operations: pairs * 2.0 * problem.dim_v as f64 };
        planner.push_costly(
            catalogue::weighted_sum(tile, operands.v.access(), operands.output.access(), accumulate, rules),
            row_blocks * (b.count * h.count) as u64 * column_blocks as u64,
            cost,
            |workgroups| params::WeightedSum {
                p_strides: strides4(p_layout),
                v_strides: strides_used(&operands.v),
                o_strides: strides_used(&operands.output),
                band: self.band(),
                p_offset: p_window.first as u32,
                v_offset: v.first as u32,
                o_offset: o.first as u32,
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
                dim: problem.dim_v as u32,
                row_blocks: row_blocks as u32,
                column_blocks: column_blocks as u32,
                workgroups,
                minus_infinity: MINUS_INFINITY,
                ..bound.into()
            },
            bindings,
        )
    }

    /// No key at all: outputs 0, LSE −∞ or the sink.
    fn nothing_to_see(&self, planner: &mut Planner<'_>) -> Result<()> {
        let Call { problem, operands, .. } = *self;
        let Problem { batch, heads_q, len_q, dim_v, .. } = *problem;
        let [h, i] = [heads_q, len_q].map(|count| Part { start: 0, count });
        if operands.lse && operands.sink.is_none() {
            planner.fill(Slot::Lse, checked_len(&[batch, heads_q, len_q])?, MINUS_INFINITY)?;
        }
        for b in Part::all(batch, 1) {
            if operands.lse && operands.sink.is_some() {
                // Rows of no scores.
                let nothing = Window { offset: 0, size: 16, first: 0 };
                self.softmax(planner, [b, h, i], Slot::Scratch(0), nothing)?;
            }
            if dim_v > 0 {
                self.sum_of_nothing(planner, [b, h, i])?;
            }
        }
        Ok(())
    }

    /// The output before any key: 0, or NaN where the sink is NaN or +∞. It may be strided in any way: a weighted
    /// sum over no keys writes it.
    fn sum_of_nothing(&self, planner: &mut Planner<'_>, [b, h, i]: [Part; 3]) -> Result<()> {
        let Call { problem, operands, align, .. } = *self;
        let every = Part { start: 0, count: problem.dim_v };
        let o = window(&operands.output, &[b, h, i, every], operands.output.element(), align);
        let dim4 = problem.dim_v.div_ceil(4);
        let tile = planner.tile(i.count, dim4);
        let column_blocks = dim4.div_ceil(tile.depth4 as usize) as u64;
        let row_blocks = i.count.div_ceil((tile.workgroup * tile.rows) as usize) as u64;
        let mut bindings = vec![
            Binding { binding: 1, ..NOTHING },
            Binding { binding: 2, ..NOTHING },
            Binding { binding: 3, slot: Slot::Output, offset: o.offset, size: o.size },
        ];
        let [sink_offset, sink_stride] = self.bind_sink(&mut bindings, h);
        let rules = Rules { sink: operands.sink.is_some(), ..Rules::default() };
        planner.push(
            catalogue::weighted_sum(tile, Access::NARROW, operands.output.access(), false, rules),
            row_blocks * (b.count * h.count) as u64 * column_blocks,
            |workgroups| params::WeightedSum {
                o_strides: strides_used(&operands.output),
                o_offset: o.first as u32,
                heads: h.count as u32,
                group: 1,
                len_q: i.count as u32,
                dim: problem.dim_v as u32,
                row_blocks: row_blocks as u32,
                column_blocks: column_blocks as u32,
                workgroups,
                minus_infinity: MINUS_INFINITY,
                not_a_number: NOT_A_NUMBER,
                sink_offset,
                sink_stride,
                ..Default::default()
            },
            bindings,
        )
    }
}

impl Planner<'_> {
    /// `elements` words of a buffer set to the bits of `value`: a copy of rows without columns.
    pub(super) fn fill(&mut self, slot: Slot, elements: usize, value: u32) -> Result<()> {
        let whole = Layout::contiguous(&[elements])?;
        for part in Part::all(elements, (self.adapter.max_binding / 4) as usize) {
            let to = window(&whole, &[part], 4, self.adapter.offset_alignment);
            self.push(
                catalogue::copy(Dtype::F32),
                (part.count as u64).div_ceil(64),
                |workgroups| params::Copy {
                    shape: [1, 1, 1, 0],
                    y_offset: to.first as u32,
                    y_row_stride: part.count as u32,
                    total: part.count as u32,
                    workgroups,
                    fill: value,
                    ..Default::default()
                },
                vec![NOTHING, Binding { binding: 2, slot, offset: to.offset, size: to.size }],
            )?;
        }
        Ok(())
    }
}
