//! Plans the steps of a call: which variants run, over which parts of which buffers. Plans are plain data, can be
//! printed, and can be tested on made-up adapters.
//!
//! Work that exceeds a limit is sliced (`slice.rs`), so that every binding and every dispatch fits.

mod attention;
mod backward;
mod call;
mod fused;
mod inspect;
mod merge;
mod normalise;
#[cfg(not(target_arch = "wasm32"))]
mod probe;
mod project;
mod relative;
mod rows;
mod scatter;
mod slice;
mod softmax;
mod unfused;

pub use attention::{attention, packed};
pub use backward::{
    DistanceColumns, RowDots, SUMMED_QUERIES, ScoreGradients, distance_sums, most_transposed, padded, row_dots,
    score_gradients, scores, sink_gradients, sum_axis, transposed_sum, weighted_sum, zeros,
};
pub use inspect::{InspectOperands, inspect};
pub use merge::merge;
pub use normalise::{MOST_NORMALISED, normalise};

#[cfg(not(target_arch = "wasm32"))]
pub use probe::probe;
pub use project::project;
pub use relative::relative;
pub use rows::{Pairs, add_positions, gate, rotate};
pub use scatter::scatter;
pub use softmax::{softmax, widen};

use bytemuck::Pod;

use super::access::Operand;
use super::capabilities::{AdapterClass, Capabilities};
use super::catalogue::{RelativeKind, RowTile, Variant};
use super::gpu_kind;
use super::method::Method;
use super::turns;
use crate::error::{Error, Result};
use crate::problem::{Dtype, Layout, MaskMeaning, Rows, ScoreStage};
use slice::{Part, window};

/// A buffer of a plan. The caller assigns a real buffer to each slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Slot {
    /// Queries, or the input of a projection or copy.
    Q,
    /// Keys, or the weight of a projection.
    K,
    /// Values.
    V,
    /// The n-th boolean mask.
    Mask(usize),
    /// The table of a bias by distance.
    Relative,
    /// The cosines and sines of positions as the fused kernels read them.
    Angles,
    /// The cosines and sines of positions as `rotate.wgsl` reads them.
    Rotations,
    /// The n-th additive bias; for a projection, bias 0 and then the extra rows.
    Bias(usize),
    /// One extra score per head.
    Sink,
    /// The band table, one `vec4<i32>` per batch entry.
    Bands,
    /// The table of [`Plan::places`].
    Places,
    /// The table of [`Plan::rows`].
    Rows,
    /// The result.
    Output,
    /// Log-sum-exp.
    Lse,
    /// Sums of weights over queries.
    ColumnSums,
    /// Entropies of the weights of a query.
    Entropy,
    /// Weights per head.
    Weights,
    /// Weights averaged over heads.
    Averaged,
    /// Scores at the requested stage.
    Stage,
    /// Working memory, sizes in [`Plan::scratch`].
    Scratch(usize),
}

/// A part of a buffer bound to a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Binding {
    /// The variable in the kernel.
    pub name: &'static str,
    /// The slot of the buffer.
    pub slot: Slot,
    /// First byte, a multiple of the adapter's offset alignment.
    pub offset: u64,
    /// Size in bytes, a multiple of 16; limited by the end of a smaller buffer.
    pub size: u64,
}

impl Binding {
    fn new(name: &'static str, slot: Slot, at: Window) -> Binding {
        Binding { name, slot, offset: at.offset, size: at.size }
    }

    /// A whole buffer from its start.
    fn whole(name: &'static str, slot: Slot, size: u64) -> Binding {
        Binding { name, slot, offset: 0, size }
    }

    /// A binding that is never read.
    fn nothing(name: &'static str) -> Binding {
        Binding::whole(name, Slot::Scratch(0), 16)
    }
}

/// One dispatch.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// The kernel.
    pub variant: Variant,
    /// The uniform block.
    pub params: Vec<u8>,
    /// The storage buffers.
    pub bindings: Vec<Binding>,
    /// Number of workgroups in x and y.
    pub workgroups: [u32; 2],
    /// What it costs.
    pub cost: Cost,
}

/// Upper bounds on what a step costs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cost {
    /// Iterations of the loops of one invocation; see [`turns`].
    pub turns: u64,
    /// Floating-point operations of all invocations.
    pub operations: f64,
}

/// The steps of a call and the memory they need.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// The steps, in order.
    pub steps: Vec<Step>,
    /// Bytes of each working buffer.
    pub scratch: Vec<u64>,
    /// The layout of per-head weights: rows padded to whole vec4s.
    pub weights: Option<Layout>,
    /// The layout of averaged weights, padded the same way.
    pub averaged: Option<Layout>,
    /// The layout of column sums, padded the same way.
    pub column_sums: Option<Layout>,
    /// The layout of entropies, padded the same way.
    pub entropy: Option<Layout>,
    /// The layout of the scores of a stage, padded the same way.
    pub stage: Option<Layout>,
    /// The stored type of the output: as requested, or f32 if the kernels cannot store that.
    pub output: Dtype,
    /// The band table, if bands differ within the batch.
    pub bands: Vec<[i32; 4]>,
    /// The rows that a scatter copies: from, to, count.
    pub places: Vec<[u32; 4]>,
    /// The table row that each token reads, or the column of each distance.
    pub rows: Vec<u32>,
    /// Why attention runs on these kernels, in words; empty if there is only one way.
    pub why: String,
}

/// The operands of an attention call: four axes each, masks and biases broadcast to
/// [`Problem::mask_shape`](crate::problem::Problem::mask_shape).
#[derive(Clone, Debug)]
pub struct AttentionOperands<'a> {
    /// `[b, hq, i, d]`
    pub q: Operand<'a>,
    /// `[b, hkv, j, d]`
    pub k: Operand<'a>,
    /// `[b, hkv, j, d]`
    pub v: Operand<'a>,
    /// `[b, hq, i, d]`, with the stored type that the caller prefers; see [`Plan::output`].
    pub output: Operand<'a>,
    /// Boolean masks.
    pub masks: Vec<(&'a Layout, MaskMeaning)>,
    /// Additive biases.
    pub biases: Vec<&'a Layout>,
    /// A bias by distance.
    pub relative: Option<RelativeOperand<'a>>,
    /// Positions that queries and keys are rotated by: while they are read if the fused kernel can do that, else
    /// before.
    pub rotary: Option<RotaryOperand<'a>>,
    /// `[hq]`: one extra score per head.
    pub sink: Option<&'a Layout>,
    /// Whether to write the LSE.
    pub lse: bool,
    /// Whether to keep the weights per head.
    pub weights: bool,
    /// Whether to average the weights over heads.
    pub averaged: bool,
    /// Scores to write out. [`ScoreStage::Weights`] is `weights`.
    pub stage: Option<ScoreStage>,
    /// Which kernels to use.
    pub method: Method,
    /// The tuning result for such calls, used if `method` is [`Method::Auto`].
    pub tuned: Option<Method>,
}

/// The table of [`Rotary`](crate::position::Rotary): query `i` is at position `i` plus its band's offset, key `j` at
/// `j`.
#[derive(Clone, Copy, Debug)]
pub struct RotaryOperand<'a> {
    /// `[positions, 2 · pairs]`, row-major, with the pairs in whole fours: cosines, then sines. If interleaved:
    /// alternately two cosines and two sines.
    pub table: &'a Layout,
    /// The table for `rotate.wgsl`: `[positions, 2 · pairs]`, any strides: cosines, then sines.
    pub rotations: &'a Layout,
    /// The table rows that queries and keys read.
    pub rows: [&'a Rows; 2],
    /// Number of column pairs that are rotated.
    pub pairs: usize,
    /// Whether adjacent columns form a pair.
    pub interleaved: bool,
}

/// A bias by the distance between key and query, read from a small table.
#[derive(Clone, Copy, Debug)]
pub struct RelativeOperand<'a> {
    /// Broadcast to `[b, hq, i, column]`: one column for each distance from `low` to `high`, or one slope.
    pub layout: &'a Layout,
    /// How the table is read.
    pub kind: RelativeKind,
    /// The smallest distance, key minus query, with its own column.
    pub low: i32,
    /// The largest.
    pub high: i32,
    /// Factor on the values of the table.
    pub factor: f32,
}

const MINUS_INFINITY: u32 = 0xff80_0000;
const NOT_A_NUMBER: u32 = 0x7fc0_0000;

/// A part of a strided operand as a binding, in bytes, and the position of the part's element 0 in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Window {
    pub offset: u64,
    pub size: u64,
    pub first: u64,
}

fn rows_padded(shape: &[usize]) -> Result<Layout> {
    let (&width, lead) = shape.split_last().expect("a last axis");
    let mut padded = shape.to_vec();
    padded[lead.len()] = width.next_multiple_of(4);
    Layout::contiguous(&padded)?.narrow(lead.len(), 0, width)
}

/// Bytes of the buffer of a tensor that is stored as `stored`, rounded up to a whole vec4.
pub fn padded_bytes(layout: &Layout, stored: Dtype) -> u64 {
    (layout.end() as u64 * stored.stored_size()).next_multiple_of(16)
}

struct Planner<'a> {
    adapter: &'a Capabilities,
    plan: Plan,
}

impl Planner<'_> {
    /// Adds a step of `total` invocations that are memory-bound and loop over no length.
    fn push<P: Pod>(&mut self, variant: Variant, total: u64, params: P, bindings: Vec<Binding>) -> Result<()> {
        let workgroup = u64::from(variant.workgroup_size());
        let cost = Cost { turns: turns::FEW, operations: 16.0 * total as f64 };
        self.push_costly(variant, total.div_ceil(workgroup), cost, |_| params, bindings)
    }

    /// Slices of the first three axes of some operands, each with its bytes per element, whose bindings fit.
    fn slices_of(&self, sizes: [usize; 3], operands: &[(&Layout, u64)]) -> [usize; 3] {
        slice::slices_of(sizes, operands, self.adapter.offset_alignment, self.adapter.max_binding)
    }

    /// A part of an operand; see [`slice::window`].
    fn window(&self, layout: &Layout, parts: &[Part], element: u64) -> Window {
        window(layout, parts, element, self.adapter.offset_alignment)
    }

    /// Adds a step, or refuses it with the numbers.
    fn push_costly<P: Pod>(
        &mut self,
        variant: Variant,
        workgroups: u64,
        cost: Cost,
        params: impl FnOnce(u32) -> P,
        bindings: Vec<Binding>,
    ) -> Result<()> {
        let adapter = self.adapter;
        let most = u64::from(adapter.max_workgroups);
        let y = workgroups.div_ceil(most);
        let x = workgroups.div_ceil(y.max(1));
        let too_many =
            |what: String, needs: String| Error::Unsupported { what, adapter: adapter.adapter.clone(), needs };
        if y > most || workgroups > u64::from(u32::MAX) {
            return Err(too_many(format!("{} with {workgroups} workgroups", variant.name), "fewer workgroups".into()));
        }
        let offers = |offered: u32, needed: u32, of: fn(u32) -> String| match needed <= offered {
            true => Ok(()),
            false => Err(too_many(variant.name.clone(), format!("{}, {offered} are offered", of(needed)))),
        };
        offers(adapter.max_storage_buffers, bindings.len() as u32, |n| format!("{n} storage buffers"))?;
        offers(adapter.max_invocations, variant.workgroup_size(), |n| format!("workgroups of {n} invocations"))?;
        offers(adapter.workgroup_memory, variant.workgroup_memory(), |n| format!("{n} bytes of workgroup memory"))?;
        for binding in &bindings {
            if binding.size > adapter.max_binding {
                return Err(too_many(
                    format!("{}: a binding of {} bytes that cannot be split further", variant.name, binding.size),
                    format!("at most {} bytes per binding", adapter.max_binding),
                ));
            }
        }
        if cost.turns > adapter.loop_turns() {
            return Err(too_many(
                format!("{}: loops of {} iterations that cannot be split further", variant.name, cost.turns),
                format!("at most {} iterations, after which its driver stops loops", adapter.loop_turns()),
            ));
        }
        if workgroups > 0 {
            let params = bytemuck::bytes_of(&params(workgroups as u32)).to_vec();
            self.plan.steps.push(Step { variant, params, bindings, workgroups: [x as u32, y as u32], cost });
        }
        Ok(())
    }

    fn tile(&self, rows: usize, depth4: usize) -> RowTile {
        let most_depth = match self.adapter.class {
            // Registers are plentiful.
            AdapterClass::Cpu => 16,
            AdapterClass::Gpu => 8,
        };
        tile_within(self.adapter, rows, depth4, most_depth)
    }

    /// Number of pieces to cut one axis of the work into, so that all cores have work.
    fn pieces(&self, workgroups: u64, axis: usize, least: usize) -> usize {
        let target = match self.adapter.class {
            AdapterClass::Cpu => 64,
            AdapterClass::Gpu => 2048,
        };
        let wanted = target / workgroups.max(1);
        (wanted.max(1) as usize).min(axis.div_ceil(least)).max(1)
    }
}

/// The tile of a product of `rows` rows, with at most `most_depth` vec4s of depth in registers.
fn tile_within(adapter: &Capabilities, rows: usize, depth4: usize, most_depth: usize) -> RowTile {
    let workgroup = match adapter.class {
        // One SIMD vector.
        AdapterClass::Cpu => 8,
        AdapterClass::Gpu => 64,
    };
    let workgroup = workgroup.min(adapter.max_invocations);
    let chunks = depth4.div_ceil(most_depth).max(1);
    let mut depth4 = depth4.div_ceil(chunks).max(1) as u32;
    if chunks > 1 {
        // Lanes share whole loads of even chunks.
        depth4 = depth4.next_multiple_of(2);
    }
    let share = match adapter.subgroup_min {
        // On Adreno, broadcasts spill hundreds of registers; on others they save little.
        _ if adapter.class == AdapterClass::Gpu => 1,
        // Lanes share whole loads, so 4 · depth4 vec4s must divide evenly.
        Some(8..) if depth4.is_multiple_of(2) && workgroup >= 8 => 8,
        Some(4..) if workgroup >= 4 => 4,
        _ => 1,
    };
    let most_rows = match adapter.class {
        AdapterClass::Cpu => 4,
        AdapterClass::Gpu => gpu_kind::rows_in_registers(adapter.kind),
    };
    let rows = rows_per_invocation(rows, workgroup, most_rows);
    RowTile { workgroup, rows, share, depth4 }
}

/// The number of rows that an invocation takes out of `rows`, at most `most`. More rows reuse each load more often, but
/// take correspondingly longer to compile; a small call finishes before that pays off.
pub(super) fn rows_per_invocation(rows: usize, workgroup: u32, most: u32) -> u32 {
    let wanted = match rows as u64 / u64::from(workgroup) {
        16.. => 8,
        8.. => 4,
        _ if rows > workgroup as usize => 2,
        _ => 1,
    };
    [8, 4, 2, 1].into_iter().find(|&n| n <= most.min(wanted)).unwrap_or(1)
}

pub(crate) fn check_buffer(adapter: &Capabilities, what: &str, needed: u64) -> Result<()> {
    let too_large = |limit_name, limit| Error::TooLarge {
        what: what.into(),
        needed,
        limit_name,
        limit,
        adapter: adapter.adapter.clone(),
        way_out: "",
    };
    if needed > adapter.max_buffer {
        return Err(too_large("the largest buffer", adapter.max_buffer));
    }
    match adapter.memory {
        Some(memory) if needed > memory => Err(too_large("the memory", memory)),
        _ => Ok(()),
    }
}
