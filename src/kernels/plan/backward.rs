//! The steps of the backward. The matrix products are those of the unfused forward, over a slice of the call whose scores
//! fit in memory: `lower/backward.rs` slices queries, so that memory grows linearly with the length.

use super::super::access::Operand;
use super::super::capabilities::{AdapterClass, Capabilities};
use super::super::catalogue::{self, ScoreGradient, TransposedTile};
use super::super::params::{self, View};
use super::super::turns;
pub use super::super::turns::SUMMED_QUERIES;
use super::attention::results;
use super::slice::{Part, halving, slice};
use super::{
    AttentionOperands, Binding, Cost, MINUS_INFINITY, NOT_A_NUMBER, Plan, Planner, Slot, padded_bytes, rows_padded,
    unfused,
};
use crate::error::Result;
use crate::problem::{Dtype, Layout, Problem};

/// Scores at the stage of `operands` (Stage, rows padded to fours), and nothing else.
pub fn scores(problem: &Problem, operands: &AttentionOperands<'_>, adapter: &Capabilities) -> Result<Plan> {
    let mut planner = Planner { adapter, plan: results(problem, operands, adapter)? };
    unfused::passes(&mut planner, problem, operands, false)?;
    Ok(planner.plan)
}

/// `O = P·V` for P `[b, h, i, j]` (Weights, rows padded to fours), V (V) and O (Output, f32). Hidden keys have weight 0.
pub fn weighted_sum(problem: &Problem, operands: &AttentionOperands<'_>, adapter: &Capabilities) -> Result<Plan> {
    let Problem { batch, heads_q, len_q, len_k, .. } = *problem;
    let weights = rows_padded(&[batch, heads_q, len_q, len_k])?;
    let mut planner = Planner { adapter, plan: Plan { weights: Some(weights), ..Plan::default() } };
    unfused::sum_values(&mut planner, problem, operands)?;
    Ok(planner.plan)
}

/// The operands of [`row_dots`], with any strides.
#[derive(Clone, Debug)]
pub struct RowDots<'a> {
    /// `[b, h, i, n]` (Q)
    pub a: Operand<'a>,
    /// `[b, h, i, n]` (K); not read where A is 0.
    pub b: Operand<'a>,
    /// `[b, h, i]` (Lse), f32, subtracted.
    pub d_lse: Option<&'a Layout>,
    /// `[b, h, i]` (Output), f32.
    pub d: &'a Layout,
    /// Factor on the sums.
    pub factor: f32,
    /// Whether the sums are added to D.
    pub accumulate: bool,
}

/// `D = factor · Σ_n A·B − dLSE`.
pub fn row_dots(operands: &RowDots<'_>, adapter: &Capabilities) -> Result<Plan> {
    let mut planner = Planner { adapter, plan: Plan::default() };
    let RowDots { a, b, d_lse, d, factor, accumulate } = *operands;
    let &[batch, heads, len, dim] = a.shape() else { unreachable!("four axes") };
    let mut read = vec![(a.layout, a.element()), (b.layout, b.element()), (d, 4)];
    read.extend(d_lse.map(|layout| (layout, 4)));
    let sizes = planner.slices_of([batch, heads, len], &read);
    for at in Part::grid([batch, heads, len], sizes) {
        let windows = [planner.window(&a, &at, a.element()), planner.window(&b, &at, b.element())];
        let d_at = planner.window(d, &at, 4);
        let rows = at.iter().map(|part| part.count).product::<usize>();
        let mut params = params::RowDots {
            a: View::new(&a, windows[0]),
            b: View::new(&b, windows[1]),
            d: row_view(d, d_at.first),
            heads: at[1].count as u32,
            len: at[2].count as u32,
            dim: dim as u32,
            total: rows as u32,
            factor,
            ..Default::default()
        };
        let mut bindings = vec![
            Binding::new("a", Slot::Q, windows[0]),
            Binding::new("b", Slot::K, windows[1]),
            Binding::new("d", Slot::Output, d_at),
        ];
        if let Some(layout) = d_lse {
            let at = planner.window(layout, &at, 4);
            params.d_lse = row_view(layout, at.first);
            bindings.push(Binding::new("d_lse", Slot::Lse, at));
        }
        let cost = Cost { turns: turns::row_dots().of(dim), operations: 2.0 * rows as f64 * dim as f64 };
        let variant = catalogue::row_dots(a.access(), b.access(), d_lse.is_some(), accumulate);
        planner.push_costly(variant, (rows as u64).div_ceil(64), cost, |_| params, bindings)?;
    }
    Ok(planner.plan)
}

/// A view of one number per row `[b, h, i]`.
fn row_view(layout: &Layout, first: u64) -> View {
    let strides = layout.strides();
    View::strided([strides[0] as u32, strides[1] as u32, strides[2] as u32, 0], first)
}

/// The operands of [`score_gradients`].
#[derive(Clone, Debug)]
pub struct ScoreGradients<'a> {
    /// `[b, h, i, j]`, the shape of X and P (Weights) and of dP and dS (Output), whose rows are padded to fours; and of the
    /// capped scores (Stage) and dX (V), if there are any.
    pub shape: [usize; 4],
    /// `[b, h, i]` (Lse)
    pub lse: &'a Layout,
    /// `[b, h, i]` (Q)
    pub d: &'a Layout,
    /// dW `[b, h, i, j]` (K), and a factor on it.
    pub d_weights: Option<(&'a Layout, f32)>,
    /// The cap of the scores.
    pub softcap: Option<f32>,
    /// The factor on dS.
    pub scale: f32,
    /// Whether P is computed from X; else it is given.
    pub from_scores: bool,
    /// Whether dS is computed.
    pub gradients: bool,
    /// Whether dX is kept.
    pub keeps_dx: bool,
}

/// `P = exp(X − LSE)`, `dX = P ∘ (dP + dW − D)`, `dS = scale · dX ∘ (1 − (capped / cap)²)`.
pub fn score_gradients(operands: &ScoreGradients<'_>, adapter: &Capabilities) -> Result<Plan> {
    let mut planner = Planner { adapter, plan: Plan { scratch: vec![16], ..Plan::default() } };
    let ScoreGradients { shape, lse, d, d_weights, softcap, scale, from_scores, gradients, keeps_dx } = *operands;
    let [batch, heads, len, keys] = shape;
    let axes = [batch, heads, len].map(Part::whole);
    let [lse_at, d_at] = [lse, d].map(|layout| planner.window(layout, &axes, 4));
    let bytes = padded_bytes(&rows_padded(&shape)?, Dtype::F32);
    let width4 = keys.div_ceil(4);
    let total = (batch * heads * len * width4) as u64;
    let mut params = params::ScoreGradients {
        lse: row_view(lse, lse_at.first),
        d: row_view(d, d_at.first),
        heads: heads as u32,
        len: len as u32,
        width4: width4 as u32,
        keys: keys as u32,
        total: total as u32,
        scale,
        softcap: softcap.unwrap_or(1.0),
        minus_infinity: MINUS_INFINITY,
        not_a_number: NOT_A_NUMBER,
        ..Default::default()
    };
    let mut bindings = vec![
        Binding::whole("p", Slot::Weights, bytes),
        Binding::whole("dp", Slot::Output, bytes),
        Binding::new("lse", Slot::Lse, lse_at),
        Binding::new("d", Slot::Q, d_at),
    ];
    let softcap = softcap.is_some() && gradients;
    let d_weights = d_weights.filter(|_| gradients);
    if softcap {
        bindings.push(Binding::whole("capped", Slot::Stage, bytes));
    }
    if let Some((layout, factor)) = d_weights {
        let at = planner.window(layout, &axes, 4);
        (params.d_weights, params.d_weights_factor) = (View::new(layout, at), factor);
        bindings.push(Binding::new("d_weights", Slot::K, at));
    }
    let keeps_dx = keeps_dx && gradients;
    if keeps_dx {
        bindings.push(Binding::whole("dx_of_biases", Slot::V, bytes));
    }
    let what = ScoreGradient { from_scores, gradients, softcap, d_weights: d_weights.is_some(), keeps_dx };
    planner.push(catalogue::score_gradients(what), total, params, bindings)?;
    Ok(planner.plan)
}

/// `Y = Pᵀ·X`, summed over the heads of a group: P `[b, hq, i, j]` (Weights, rows padded to fours), X `[b, hq, i, d]` (Q),
/// Y `[b, hkv, j, d]` (Output, f32) with rows one after another.
pub fn transposed_sum(x: Operand<'_>, y: &Layout, accumulate: bool, adapter: &Capabilities) -> Result<Plan> {
    let mut planner = Planner { adapter, plan: Plan::default() };
    let (&[batch, heads_q, len_q, dim], &[_, heads_kv, len_k, _]) = (x.shape(), y.shape()) else {
        unreachable!("four axes")
    };
    let group = heads_q / heads_kv.max(1);
    let p = rows_padded(&[batch, heads_q, len_q, len_k])?;
    let tile = transposed_tile(adapter, dim.div_ceil(4));
    let variant = catalogue::transposed_sum(tile, x.access(), accumulate);
    let whole = Part::whole;
    let windows = |planner: &Planner<'_>, b: Part, h: Part| {
        let heads = Part { start: h.start * group, count: h.count * group };
        [
            planner.window(&p, &[b, heads, whole(len_q)], 4),
            planner.window(&x, &[b, heads, whole(len_q)], x.element()),
            planner.window(y, &[b, h, whole(len_k)], 4),
        ]
    };
    let operations =
        |[batch, heads]: [usize; 2]| 2.0 * (batch * heads * group) as f64 * len_q as f64 * len_k as f64 * dim as f64;
    let fits = |&[batch, heads]: &[usize; 2]| {
        let [p, x, y] = windows(&planner, whole(batch), whole(heads));
        [p, x, y].iter().all(|at| at.size + adapter.offset_alignment <= adapter.max_binding)
    };
    let is_short = |sizes: &[usize; 2]| operations(*sizes) <= adapter.dispatch_operations();
    let sizes = slice([batch, heads_kv], &[halving(0, 1, 1), halving(1, 1, 1)], 2, fits, is_short).0;
    let key_blocks = len_k.div_ceil(4 * tile.workgroup as usize);
    let column_blocks = dim.div_ceil(4 * tile.cols4 as usize);
    for [b, h, _] in Part::grid([batch, heads_kv, 1], [sizes[0], sizes[1], 1]) {
        let [p_at, x_at, y_at] = windows(&planner, b, h);
        let bindings = vec![
            Binding::new("p", Slot::Weights, p_at),
            Binding::new("x", Slot::Q, x_at),
            Binding::new("y", Slot::Output, y_at),
        ];
        let workgroups = (b.count * h.count * key_blocks * column_blocks) as u64;
        let cost = Cost { turns: turns::transposed_sum(group).of(len_q), operations: operations([b.count, h.count]) };
        planner.push_costly(
            variant.clone(),
            workgroups,
            cost,
            |workgroups| params::TransposedSum {
                p: View::new(&p, p_at),
                x: View::new(&x, x_at),
                y_offset: y_at.first as u32,
                y_head_stride: y.strides()[1] as u32,
                y_batch_stride: y.strides()[0] as u32,
                heads_kv: h.count as u32,
                group: group as u32,
                len_q: len_q as u32,
                len_k: len_k as u32,
                dim: dim as u32,
                key_blocks: key_blocks as u32,
                column_blocks: column_blocks as u32,
                workgroups,
                ..Default::default()
            },
            bindings,
        )?;
    }
    Ok(planner.plan)
}

fn transposed_tile(adapter: &Capabilities, cols4: usize) -> TransposedTile {
    let (workgroup, most) = match adapter.class {
        AdapterClass::Cpu => (8, 16),
        // Sixteen vec4s of sums.
        AdapterClass::Gpu => (64, 4),
    };
    let workgroup = workgroup.min(adapter.max_invocations);
    let blocks = cols4.div_ceil(most).max(1);
    let cols4 = cols4.div_ceil(blocks).max(1) as u32;
    // Lanes share whole loads: four queries by an even number of columns, or any.
    let share = match adapter.subgroup_min {
        _ if adapter.class == AdapterClass::Gpu => 1,
        Some(8..) if cols4.is_multiple_of(2) && workgroup >= 8 => 8,
        Some(4..) if workgroup >= 4 => 4,
        _ => 1,
    };
    TransposedTile { workgroup, cols4, share }
}

/// `Y = factor · Σ X` over one axis: X `[a, b, c, d]` (Q), Y (Output) of the same shape but 1 along that axis; both f32 with
/// any strides. Without an axis, `Y = factor · X`. Adds to Y if `accumulate`.
pub fn sum_axis(
    x: &Layout,
    axis: Option<usize>,
    y: &Layout,
    factor: f32,
    accumulate: bool,
    adapter: &Capabilities,
) -> Result<Plan> {
    let mut planner = Planner { adapter, plan: Plan::default() };
    let [x_at, y_at] = [x, y].map(|layout| planner.window(layout, &[], 4));
    let total = y.len() as u64;
    let (count, step) = axis.map_or((1, 0), |axis| (x.shape()[axis], x.strides()[axis]));
    let params = params::SumAxis {
        x: View::new(x, x_at),
        y: View::new(y, y_at),
        shape: std::array::from_fn(|axis| y.shape()[axis] as u32),
        count: count as u32,
        step: step as u32,
        total: total as u32,
        factor,
        ..Default::default()
    };
    let bindings = vec![Binding::new("x", Slot::Q, x_at), Binding::new("y", Slot::Output, y_at)];
    let cost = Cost { turns: turns::sum_axis().of(count), operations: total as f64 * count as f64 };
    planner.push_costly(catalogue::sum_axis(accumulate), total.div_ceil(64), cost, |_| params, bindings)?;
    Ok(planner.plan)
}

/// `E = −exp(sink − LSE) · D` (Output, row-major) for LSE (Lse) and D (Q) `[b, h, i]`, and a sink `[h]` (Sink).
pub fn sink_gradients(lse: &Layout, d: &Layout, sink: &Layout, adapter: &Capabilities) -> Result<Plan> {
    let mut planner = Planner { adapter, plan: Plan::default() };
    let &[batch, heads, len] = d.shape() else { unreachable!("three axes") };
    let y = Layout::contiguous(&[batch, heads, len])?;
    let sizes = planner.slices_of([batch, heads, len], &[(lse, 4), (d, 4), (&y, 4)]);
    for at in Part::grid([batch, heads, len], sizes) {
        let [lse_at, d_at, y_at] = [lse, d, &y].map(|layout| planner.window(layout, &at, 4));
        let sink_at = planner.window(sink, &at[1..2], 4);
        let total = at.iter().map(|part| part.count).product::<usize>() as u64;
        let params = params::SinkGradients {
            lse: row_view(lse, lse_at.first),
            d: row_view(d, d_at.first),
            y_offset: y_at.first as u32,
            heads: at[1].count as u32,
            len: at[2].count as u32,
            sink_offset: sink_at.first as u32,
            sink_stride: sink.strides()[0] as u32,
            total: total as u32,
            minus_infinity: MINUS_INFINITY,
            ..Default::default()
        };
        let bindings = vec![
            Binding::new("lse", Slot::Lse, lse_at),
            Binding::new("d", Slot::Q, d_at),
            Binding::new("y", Slot::Output, y_at),
            Binding::new("sink", Slot::Sink, sink_at),
        ];
        planner.push(catalogue::sink_gradients(), total, params, bindings)?;
    }
    Ok(planner.plan)
}

/// How [`distance_sums`] sorts distances, key minus query, into columns.
#[derive(Clone, Debug, PartialEq)]
pub struct DistanceColumns {
    /// The smallest distance; those below count as it.
    pub low: i32,
    /// The largest one.
    pub high: i32,
    /// The column of each distance from `low` to `high`; empty for one column that weighs each pair by its negated
    /// distance.
    pub columns: Vec<u32>,
    /// Number of columns.
    pub count: usize,
}

/// `Y[b, h, i, c] = factor · Σ_j X[b, h, i, j]` over the keys whose distance has column c: X (Q) and Y (Output), f32 with any
/// strides. Query 0 of batch entry b is at `offsets[b]`, or all at `offsets[0]`.
pub fn distance_sums(
    x: &Layout,
    y: &Layout,
    columns: &DistanceColumns,
    offsets: &[i32],
    factor: f32,
    adapter: &Capabilities,
) -> Result<Plan> {
    let mut planner = Planner { adapter, plan: Plan::default() };
    let &[batch, heads, len, keys] = x.shape() else { unreachable!("four axes") };
    let [x_at, y_at] = [x, y].map(|layout| planner.window(layout, &[], 4));
    planner.plan.rows = columns.columns.iter().copied().chain(offsets.iter().map(|&offset| offset as u32)).collect();
    let total = (batch * heads * len * columns.count) as u64;
    let params = params::DistanceSums {
        x: View::new(x, x_at),
        y: View::new(y, y_at),
        heads: heads as u32,
        len: len as u32,
        keys: keys as u32,
        columns: columns.count as u32,
        low: columns.low,
        high: columns.high,
        offsets: columns.columns.len() as u32,
        offset_stride: u32::from(offsets.len() > 1),
        total: total as u32,
        factor,
        ..Default::default()
    };
    let table = (planner.plan.rows.len() as u64 * 4).next_multiple_of(16);
    let bindings = vec![
        Binding::new("x", Slot::Q, x_at),
        Binding::new("y", Slot::Output, y_at),
        Binding::whole("columns", Slot::Rows, table),
    ];
    let cost = Cost { turns: turns::sum_axis().of(keys), operations: total as f64 * keys as f64 };
    let variant = catalogue::distance_sums(columns.columns.is_empty());
    planner.push_costly(variant, total.div_ceil(64), cost, |_| params, bindings)?;
    Ok(planner.plan)
}

/// Sets every word of a buffer of `elements` (Output) to 0.
pub fn zeros(elements: usize, adapter: &Capabilities) -> Result<Plan> {
    let mut planner = Planner { adapter, plan: Plan { scratch: vec![16], ..Plan::default() } };
    planner.fill(Slot::Output, elements, 0)?;
    Ok(planner.plan)
}

/// Queries of [`SUMMED_QUERIES`] that a driver's limit on loops allows [`transposed_sum`] for `group` query heads.
pub fn most_transposed(group: usize, adapter: &Capabilities) -> usize {
    turns::transposed_sum(group).longest(adapter.loop_turns())
}

/// The layout `shape` with rows padded to fours.
pub fn padded(shape: &[usize]) -> Result<Layout> {
    rows_padded(shape)
}
