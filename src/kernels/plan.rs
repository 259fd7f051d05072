//! From a call to its steps: which variants run, over which parts of which buffers. Plain data,
//! printable, testable on made-up adapters.
//!
//! Work that is larger than a limit is cut into slices: first along the batch, then heads, then query
//! rows, then keys, so that every binding and every dispatch fits.

use bytemuck::Pod;

use super::capabilities::{AdapterClass, Capabilities};
use super::catalogue::{self, FoldSource, Rules, Tile, Variant};
use super::params;
use crate::error::{Error, Result, shape_error};
use crate::problem::{Band, Layout, MaskMeaning, NO_BOUND, Problem, ScoreStage, checked_len};

/// A buffer of a plan. The caller of a plan says which real buffer stands behind each.
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
    /// The n-th additive bias; for a projection, bias 0 and then the extra rows.
    Bias(usize),
    /// The band table, one `vec4<i32>` per batch entry.
    Bands,
    /// The result.
    Output,
    /// Log-sum-exp.
    Lse,
    /// Weights per head.
    Weights,
    /// Weights averaged over heads.
    Averaged,
    /// Scores at the stage asked for.
    Stage,
    /// Working memory, sizes in [`Plan::scratch`].
    Scratch(usize),
}

/// A part of a buffer bound to a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Binding {
    /// The `@binding` number.
    pub binding: u32,
    /// The buffer.
    pub slot: Slot,
    /// First byte, a multiple of the adapter's offset alignment.
    pub offset: u64,
    /// Bytes, a multiple of 16; a smaller buffer's end bounds it.
    pub size: u64,
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
    /// Workgroups in x and y.
    pub workgroups: [u32; 2],
}

/// The steps of a call and the memory they need.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// In order.
    pub steps: Vec<Step>,
    /// Bytes of each working buffer.
    pub scratch: Vec<u64>,
    /// Where per-head weights lie: rows padded to whole vec4s.
    pub weights: Option<Layout>,
    /// Where averaged weights lie, likewise.
    pub averaged: Option<Layout>,
    /// Where the scores of a stage lie, likewise.
    pub stage: Option<Layout>,
    /// The band table, when bands differ within the batch.
    pub bands: Vec<[i32; 4]>,
}

/// The operands of an attention call: four axes each, masks and biases broadcast to
/// [`Problem::mask_shape`].
#[derive(Clone, Debug)]
pub struct AttentionOperands<'a> {
    /// `[b, hq, i, d]`
    pub q: &'a Layout,
    /// `[b, hkv, j, d]`
    pub k: &'a Layout,
    /// `[b, hkv, j, d]`
    pub v: &'a Layout,
    /// `[b, hq, i, d]`
    pub output: &'a Layout,
    /// Boolean masks.
    pub masks: Vec<(&'a Layout, MaskMeaning)>,
    /// Additive biases.
    pub biases: Vec<&'a Layout>,
    /// Whether to write the LSE.
    pub lse: bool,
    /// Whether to keep the weights per head.
    pub weights: bool,
    /// Whether to average the weights over heads.
    pub averaged: bool,
    /// Scores to write out. [`ScoreStage::Weights`] is `weights`.
    pub stage: Option<ScoreStage>,
}

const MINUS_INFINITY: u32 = 0xff80_0000;
const NOT_A_NUMBER: u32 = 0x7fc0_0000;
/// A binding that is never read.
const NOTHING: Binding = Binding { binding: 1, slot: Slot::Scratch(0), offset: 0, size: 16 };

/// `count` entries of an axis from `start` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    start: usize,
    count: usize,
}

impl Part {
    /// `total` cut into parts of at most `size`.
    fn all(total: usize, size: usize) -> impl Iterator<Item = Part> {
        let size = size.max(1);
        (0..total.div_ceil(size)).map(move |n| Part { start: n * size, count: size.min(total - n * size) })
    }

    /// The part of another axis that `each` of these entries share one of.
    fn grouped(self, each: usize) -> Part {
        let start = self.start / each;
        Part { start, count: (self.start + self.count).div_ceil(each) - start }
    }

    /// Cut off at `end`.
    fn within(self, end: usize) -> Part {
        let start = self.start.min(end);
        Part { start, count: (self.start + self.count).min(end) - start }
    }
}

/// A part of a strided operand as a binding: bytes, and where element 0 of the part lies in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Window {
    offset: u64,
    size: u64,
    first: u64,
}

fn window(layout: &Layout, parts: &[Part], element: u64, alignment: u64) -> Window {
    let mut start = layout.offset() as u64;
    let mut extent = 1u64;
    for (part, &stride) in parts.iter().zip(layout.strides()) {
        start += part.start as u64 * stride as u64;
        extent += part.count.saturating_sub(1) as u64 * stride as u64;
    }
    let offset = start * element / alignment * alignment;
    let first = start - offset / element;
    Window { offset, size: ((first + extent) * element).next_multiple_of(16), first }
}

/// True when rows may be read four elements at a time.
fn is_wide(layout: &Layout) -> bool {
    let (&dim, lead) = layout.shape().split_last().expect("four axes");
    let (&step, strides) = layout.strides().split_last().expect("four axes");
    let used = lead.iter().zip(strides).filter(|&(&n, _)| n > 1);
    dim.is_multiple_of(4)
        && dim > 0
        && step == 1
        && layout.offset().is_multiple_of(4)
        && used.into_iter().all(|(_, s)| s.is_multiple_of(4))
}

fn strides4(layout: &Layout) -> [u32; 4] {
    let mut out = [0; 4];
    for (to, (&stride, &n)) in out.iter_mut().zip(layout.strides().iter().zip(layout.shape())) {
        // The stride of an axis of length 1 is never used, and may be anything.
        *to = if n > 1 { stride as u32 } else { 0 };
    }
    out
}

fn rows_padded(shape: &[usize]) -> Result<Layout> {
    let (&width, lead) = shape.split_last().expect("a last axis");
    let mut padded = shape.to_vec();
    padded[lead.len()] = width.next_multiple_of(4);
    Layout::contiguous(&padded)?.narrow(lead.len(), 0, width)
}

/// Bytes of the buffer behind a tensor of rows padded to whole vec4s.
pub fn padded_bytes(layout: &Layout) -> u64 {
    (layout.end() as u64 * 4).next_multiple_of(16)
}

struct Planner<'a> {
    adapter: &'a Capabilities,
    plan: Plan,
}

impl Planner<'_> {
    fn push<P: Pod>(
        &mut self,
        variant: Variant,
        workgroups: u64,
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
        if bindings.len() as u32 > adapter.max_storage_buffers {
            return Err(too_many(
                variant.name.clone(),
                format!("{} storage buffers, {} are offered", bindings.len(), adapter.max_storage_buffers),
            ));
        }
        if variant.workgroup_memory() > adapter.workgroup_memory {
            return Err(too_many(
                variant.name.clone(),
                format!(
                    "{} bytes of workgroup memory, {} are offered",
                    variant.workgroup_memory(),
                    adapter.workgroup_memory
                ),
            ));
        }
        for binding in &bindings {
            if binding.size > adapter.max_binding {
                return Err(too_many(
                    format!("{}: a binding of {} bytes that cannot be split further", variant.name, binding.size),
                    format!("at most {} bytes per binding", adapter.max_binding),
                ));
            }
        }
        if workgroups > 0 {
            let params = bytemuck::bytes_of(&params(workgroups as u32)).to_vec();
            self.plan.steps.push(Step { variant, params, bindings, workgroups: [x as u32, y as u32] });
        }
        Ok(())
    }

    fn tile(&self, rows: usize, depth4: usize) -> Tile {
        let adapter = self.adapter;
        let (workgroup, most_depth) = match adapter.class {
            // One SIMD vector of lanes, many registers.
            AdapterClass::Cpu => (8, 16),
            AdapterClass::Gpu => (64, 8),
        };
        let workgroup = workgroup.min(adapter.max_invocations);
        let chunks = depth4.div_ceil(most_depth).max(1);
        let depth4 = depth4.div_ceil(chunks).max(1) as u32;
        let share = match adapter.subgroup_min {
            // Lanes share whole loads: 4 · depth4 vec4s must divide evenly.
            Some(8..) if depth4.is_multiple_of(2) && workgroup >= 8 => 8,
            Some(4..) if workgroup >= 4 => 4,
            _ => 1,
        };
        // More rows per invocation reuse each load more often, and take as much longer to compile: a
        // small call is done before that pays.
        let rows = match rows as u64 {
            n if n >= 8 * u64::from(workgroup) => 4,
            n if n > u64::from(workgroup) => 2,
            _ => 1,
        };
        Tile { workgroup, rows, share, depth4 }
    }

    /// Pieces to cut one axis of the work into, so that all cores find work.
    fn pieces(&self, workgroups: u64, axis: usize, least: usize) -> usize {
        let target = match self.adapter.class {
            AdapterClass::Cpu => 64,
            AdapterClass::Gpu => 2048,
        };
        let wanted = target / workgroups.max(1);
        (wanted.max(1) as usize).min(axis.div_ceil(least)).max(1)
    }
}

/// Sizes of the slices along batch, heads, query rows and keys.
#[derive(Clone, Copy, Debug)]
struct Slices {
    batch: usize,
    heads: usize,
    rows: usize,
    keys: usize,
}

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
    for (what, layout) in [
        ("the weights", &planner.plan.weights),
        ("the averaged weights", &planner.plan.averaged),
        ("the scores", &planner.plan.stage),
    ] {
        if let Some(layout) = layout {
            check_buffer(adapter, what, padded_bytes(layout))?;
        }
    }
    if problem.is_empty() {
        if let Some(averaged) = planner.plan.averaged.clone().filter(|layout| !layout.is_empty()) {
            // The mean over no head is 0.
            planner.plan.scratch = vec![16];
            planner.fill(Slot::Averaged, (padded_bytes(&averaged) / 4) as usize, 0)?;
        }
        return Ok(planner.plan);
    }
    if len_k == 0 {
        planner.plan.scratch = vec![16];
        planner.nothing_to_see(problem, operands)?;
        return Ok(planner.plan);
    }

    // Which rules are read where they lie, and which are folded into one bias first.
    let mut rules = Rules {
        bands: problem.bands.len() > 1,
        masks: operands.masks.len() as u32,
        bias: !operands.biases.is_empty(),
        banded: !problem.is_unbanded(),
    };
    let mut fold_rules = false;
    let mut fold_bands = false;
    if rules.masks > 2 || operands.biases.len() > 1 || 3 + rules.buffers() > adapter.max_storage_buffers {
        fold_rules = true;
        (rules.masks, rules.bias) = (0, true);
        if 3 + rules.buffers() > adapter.max_storage_buffers {
            fold_bands = true;
            (rules.bands, rules.banded) = (false, false);
        }
    }
    if rules.bands {
        planner.plan.bands = problem.bands.iter().map(|band| [band.keys, band.lo, band.hi, 0]).collect();
    }
    let call = Call { problem, operands, rules, fold_rules, fold_bands, align: adapter.offset_alignment };
    if fold_bands {
        planner.plan.bands = problem.bands.iter().map(|band| [band.keys, band.lo, band.hi, 0]).collect();
    }

    // The largest slices whose bindings all fit.
    let mut slices = Slices { batch, heads: heads_q, rows: len_q, keys: len_k };
    while call.largest_binding(slices, planner.plan.weights.as_ref()) > adapter.max_binding {
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
    let mut scratch = vec![if planner.plan.weights.is_some() { 16 } else { scratch_rows as u64 * 4 }];
    if fold_rules {
        let [b, h, i, j] = call.folded_shape(slices);
        scratch.push(((checked_len(&[b, h, i, j])? * 4) as u64).next_multiple_of(16).max(16));
    }
    for &bytes in &scratch {
        check_buffer(adapter, "working memory", bytes)?;
    }
    planner.plan.scratch = scratch;

    for b in Part::all(batch, slices.batch) {
        for h in Part::all(heads_q, slices.heads) {
            for i in Part::all(len_q, slices.rows) {
                call.plan_slice(&mut planner, [b, h, i], slices)?;
            }
        }
    }
    Ok(planner.plan)
}

fn check_buffer(adapter: &Capabilities, what: &str, needed: u64) -> Result<()> {
    let too_large = |limit_name, limit| Error::TooLarge {
        what: what.into(),
        needed,
        limit_name,
        limit,
        adapter: adapter.adapter.clone(),
    };
    if needed > adapter.max_buffer {
        return Err(too_large("the largest buffer", adapter.max_buffer));
    }
    match adapter.memory {
        Some(memory) if needed > memory => Err(too_large("the memory", memory)),
        _ => Ok(()),
    }
}

struct Call<'a> {
    problem: &'a Problem,
    operands: &'a AttentionOperands<'a>,
    rules: Rules,
    fold_rules: bool,
    fold_bands: bool,
    align: u64,
}

impl Call<'_> {
    /// The axes along which any folded rule differs, as long as in the slice.
    fn folded_shape(&self, slices: Slices) -> [usize; 4] {
        let full = [slices.batch, slices.heads, slices.rows, slices.keys.min(self.problem.ruled_keys())];
        let sources = self.operands.masks.iter().map(|(layout, _)| *layout).chain(self.operands.biases.iter().copied());
        let mut shape = [1; 4];
        for layout in sources {
            for axis in 0..4 {
                if layout.strides()[axis] != 0 && layout.shape()[axis] > 1 {
                    shape[axis] = full[axis];
                }
            }
        }
        if self.fold_bands {
            (shape[2], shape[3]) = (full[2], full[3]);
            if self.problem.bands.len() > 1 {
                shape[0] = full[0];
            }
        }
        shape
    }

    /// Bytes of the largest binding of any step at these slice sizes.
    fn largest_binding(&self, slices: Slices, weights: Option<&Layout>) -> u64 {
        let Slices { batch, heads, rows, keys } = slices;
        let part = |count| Part { start: 0, count };
        // Worst case over all slices: a head slice may straddle one more key/value head.
        let heads_kv = (heads.div_ceil(self.problem.group())
            + usize::from(!heads.is_multiple_of(self.problem.group())))
        .min(self.problem.heads_kv);
        // The start of a later slice may lie anywhere within the alignment.
        let slack = self.align;
        let size = |layout: &Layout, counts: [usize; 4], element: u64| {
            window(layout, &counts.map(part), element, self.align).size.saturating_add(slack)
        };
        let whole = usize::MAX >> 32;
        let dims = |layout: &Layout| layout.shape()[3].min(whole);
        let operands = self.operands;
        let padded = self.problem.len_k.next_multiple_of(4) as u64;
        let scratch = match weights {
            Some(layout) => size(layout, [batch, heads, rows, self.problem.len_k], 4),
            None => batch as u64 * heads as u64 * rows as u64 * padded * 4,
        };
        let ruled = keys.min(self.problem.ruled_keys());
        let masks = operands.masks.iter().map(|(layout, _)| size(layout, [batch, heads, rows, ruled], 1));
        let biases = operands.biases.iter().map(|layout| size(layout, [batch, heads, rows, ruled], 4));
        let folded =
            if self.fold_rules { self.folded_shape(slices).iter().map(|&n| n as u64).product::<u64>() * 4 } else { 0 };
        [
            size(operands.q, [batch, heads, rows, dims(operands.q)], 4),
            size(operands.k, [batch, heads_kv, keys, dims(operands.k)], 4),
            size(operands.v, [batch, heads_kv, keys, dims(operands.v)], 4),
            size(operands.output, [batch, heads, rows, dims(operands.output)], 4),
            scratch,
            folded,
        ]
        .into_iter()
        .chain(masks)
        .chain(biases)
        .max()
        .unwrap_or(0)
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
                let size = padded_bytes(&layout);
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
            self.scores(planner, [b, h, i, j], head_kv, (p_slot, &p_layout, p_window), &rules_bound, 2)?;
        }

        let rows = b.count as u64 * h.count as u64 * i.count as u64;
        let (workgroup, lanes) = match planner.adapter.class {
            AdapterClass::Cpu => (8, 1),
            AdapterClass::Gpu if len_k <= 128 => (64, 32),
            AdapterClass::Gpu => (64, 64),
        };
        let workgroup = workgroup.min(planner.adapter.max_invocations);
        let lanes = lanes.min(workgroup);
        let row_stride4 = len_k.div_ceil(4) as u32;
        let mut bindings = vec![Binding { binding: 1, slot: p_slot, offset: p_window.offset, size: p_window.size }];
        let mut lse_offset = 0;
        if operands.lse {
            let lse = Layout::contiguous(&[problem.batch, problem.heads_q, problem.len_q])?;
            let part = window(&lse, &[b, h, i], 4, self.align);
            lse_offset = part.first as u32;
            bindings.push(Binding { binding: 2, slot: Slot::Lse, offset: part.offset, size: part.size });
        }
        planner.push(
            catalogue::softmax(workgroup, lanes, operands.lse),
            rows.div_ceil(u64::from(workgroup / lanes)),
            |workgroups| params::Softmax {
                rows: rows as u32,
                width4: row_stride4,
                row_stride4,
                s_offset4: (p_window.first / 4) as u32,
                lse_offset,
                workgroups,
                minus_infinity: MINUS_INFINITY,
                not_a_number: NOT_A_NUMBER,
            },
            bindings,
        )?;

        if let Some(averaged) = planner.plan.averaged.clone() {
            let part = window(&averaged, &[b, i, Part { start: 0, count: len_k }], 4, self.align);
            let total = b.count as u64 * i.count as u64 * u64::from(row_stride4);
            let strides = |layout: &Layout, axes: [Option<usize>; 3]| {
                let mut out = [0; 4];
                for (to, axis) in out.iter_mut().zip(axes) {
                    *to = axis.map_or(0, |axis| (layout.strides()[axis] / 4) as u32);
                }
                out
            };
            planner.push(
                catalogue::mean_heads(h.start > 0),
                total.div_ceil(64),
                |workgroups| params::MeanHeads {
                    p_strides: strides(&p_layout, [Some(0), Some(1), Some(2)]),
                    a_strides: strides(&averaged, [Some(0), None, Some(1)]),
                    p_offset4: (p_window.first / 4) as u32,
                    a_offset4: (part.first / 4) as u32,
                    heads: h.count as u32,
                    len_q: i.count as u32,
                    width4: row_stride4,
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

        if problem.dim_v == 0 {
            return Ok(());
        }
        for j in Part::all(len_k, slices.keys) {
            // Folded rules of several key slices share one buffer: fold again what was overwritten.
            let rules_bound = self.bind_rules(planner, at, j, slices)?;
            self.weighted_sum(planner, [b, h, i, j], head_kv, (p_slot, &p_layout, p_window), &rules_bound)?;
        }
        Ok(())
    }

    fn band(&self) -> [i32; 4] {
        let band = if self.fold_bands || self.problem.bands.len() > 1 {
            Band { keys: NO_BOUND, lo: -NO_BOUND, hi: NO_BOUND }
        } else {
            self.problem.bands[0]
        };
        [band.keys, band.lo, band.hi, 0]
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
        let q = window(operands.q, &[b, h, i, every(operands.q)], 4, self.align);
        let k = window(operands.k, &[b, head_kv, j, every(operands.k)], 4, self.align);
        let dim4 = problem.dim_k.div_ceil(4);
        let tile = planner.tile(i.count, dim4);
        let chunks = dim4.div_ceil(tile.depth4 as usize).max(1);
        let row_blocks = i.count.div_ceil((tile.workgroup * tile.rows) as usize) as u64;
        let heads = (b.count * h.count) as u64;
        let key_blocks = planner.pieces(row_blocks * heads, j.count, 64);
        let keys_per_block = j.count.div_ceil(key_blocks).next_multiple_of(4);
        let key_blocks = j.count.div_ceil(keys_per_block);
        let mut bindings = vec![
            Binding { binding: 1, slot: Slot::Q, offset: q.offset, size: q.size },
            Binding { binding: 2, slot: Slot::K, offset: k.offset, size: k.size },
            Binding { binding: 3, slot: s_slot, offset: s_window.offset, size: s_window.size },
        ];
        bindings.extend(&bound.bindings);
        let padded = chunks * tile.depth4 as usize != dim4;
        planner.push(
            catalogue::scores(
                tile,
                is_wide(operands.q),
                is_wide(operands.k),
                padded,
                problem.softcap.is_some(),
                rules,
                stage,
            ),
            row_blocks * heads * key_blocks as u64,
            |workgroups| params::Scores {
                q_strides: strides_used(operands.q),
                k_strides: strides_used(operands.k),
                s_strides: strides4(s_layout),
                mask_a_strides: bound.masks[0].strides,
                mask_b_strides: bound.masks[1].strides,
                bias_strides: bound.bias.strides,
                band: self.band(),
                q_offset: q.first as u32,
                k_offset: k.first as u32,
                s_offset: s_window.first as u32,
                mask_a_offset: bound.masks[0].first,
                mask_b_offset: bound.masks[1].first,
                bias_offset: bound.bias.first,
                mask_a_keeps: bound.masks[0].keeps,
                mask_b_keeps: bound.masks[1].keeps,
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
                pad: 0,
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
        let Call { problem, operands, rules, .. } = *self;
        let every = |layout: &Layout| Part { start: 0, count: layout.shape()[3] };
        let v = window(operands.v, &[b, head_kv, j, every(operands.v)], 4, self.align);
        let o = window(operands.output, &[b, h, i, every(operands.output)], 4, self.align);
        let dim4 = problem.dim_v.div_ceil(4);
        let tile = planner.tile(i.count, dim4);
        let column_blocks = dim4.div_ceil(tile.depth4 as usize);
        let row_blocks = i.count.div_ceil((tile.workgroup * tile.rows) as usize) as u64;
        let mut bindings = vec![
            Binding { binding: 1, slot: p_slot, offset: p_window.offset, size: p_window.size },
            Binding { binding: 2, slot: Slot::V, offset: v.offset, size: v.size },
            Binding { binding: 3, slot: Slot::Output, offset: o.offset, size: o.size },
        ];
        bindings.extend(&bound.bindings);
        planner.push(
            catalogue::weighted_sum(tile, is_wide(operands.v), is_wide(operands.output), j.start > 0, rules),
            row_blocks * (b.count * h.count) as u64 * column_blocks as u64,
            |workgroups| params::WeightedSum {
                p_strides: strides4(p_layout),
                v_strides: strides_used(operands.v),
                o_strides: strides_used(operands.output),
                mask_a_strides: bound.masks[0].strides,
                mask_b_strides: bound.masks[1].strides,
                bias_strides: bound.bias.strides,
                band: self.band(),
                p_offset: p_window.first as u32,
                v_offset: v.first as u32,
                o_offset: o.first as u32,
                mask_a_offset: bound.masks[0].first,
                mask_b_offset: bound.masks[1].first,
                bias_offset: bound.bias.first,
                mask_a_keeps: bound.masks[0].keeps,
                mask_b_keeps: bound.masks[1].keeps,
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
                pad: 0,
            },
            bindings,
        )
    }

    /// Binds the rules for a slice, after folding them if they must be.
    fn bind_rules(
        &self,
        planner: &mut Planner<'_>,
        [b, h, i]: [Part; 3],
        j: Part,
        slices: Slices,
    ) -> Result<BoundRules> {
        let Call { problem, operands, rules, .. } = *self;
        let mut bound = BoundRules::default();
        if rules.bands {
            let size = (problem.batch * 16) as u64;
            bound.bindings.push(Binding { binding: 4, slot: Slot::Bands, offset: 0, size });
        }
        let parts = [b, h, i, j.within(problem.ruled_keys())];
        if self.fold_rules {
            let folded = self.fold(planner, parts, slices)?;
            let size = planner.plan.scratch[1];
            bound.bindings.push(Binding { binding: 7, slot: Slot::Scratch(1), offset: 0, size });
            bound.bias = BoundRule { strides: folded, ..Default::default() };
            return Ok(bound);
        }
        for (n, &(layout, meaning)) in operands.masks.iter().enumerate() {
            let part = window(layout, &parts, 1, self.align);
            bound.bindings.push(Binding {
                binding: 5 + n as u32,
                slot: Slot::Mask(n),
                offset: part.offset,
                size: part.size,
            });
            bound.masks[n] = BoundRule {
                strides: strides4(layout),
                first: part.first as u32,
                keeps: u32::from(meaning == MaskMeaning::Keep),
            };
        }
        if let Some(&layout) = operands.biases.first() {
            let part = window(layout, &parts, 4, self.align);
            bound.bindings.push(Binding { binding: 7, slot: Slot::Bias(0), offset: part.offset, size: part.size });
            bound.bias = BoundRule { strides: strides4(layout), first: part.first as u32, keeps: 0 };
        }
        Ok(bound)
    }

    /// Folds every rule of a slice into Scratch(1); returns its strides.
    fn fold(&self, planner: &mut Planner<'_>, parts: [Part; 4], slices: Slices) -> Result<[u32; 4]> {
        let Call { problem, operands, .. } = *self;
        let limits = self.folded_shape(slices);
        let mut shape = [1; 4];
        for axis in 0..4 {
            shape[axis] = if limits[axis] > 1 { parts[axis].count.max(1) } else { 1 };
        }
        let folded = Layout::contiguous(&shape)?;
        let total = folded.len() as u64;
        let bands = self.fold_bands.then(|| {
            let per_batch = usize::from(problem.bands.len() > 1);
            Layout::strided(&problem.mask_shape(), &[per_batch, 0, 0, 0], 0, problem.bands.len())
        });
        let bands = bands.transpose()?;
        let sources = (operands.biases.iter().enumerate())
            .map(|(n, &layout)| (FoldSource::Bias, Slot::Bias(n), layout, 4, 0))
            .chain(operands.masks.iter().enumerate().map(|(n, &(layout, meaning))| {
                (FoldSource::Mask, Slot::Mask(n), layout, 1, u32::from(meaning == MaskMeaning::Keep))
            }))
            .chain(bands.iter().map(|layout| (FoldSource::Bands, Slot::Bands, layout, 16, 0)));
        for (n, (source, slot, layout, element, keeps)) in sources.enumerate() {
            let part = window(layout, &parts, element, self.align);
            planner.push(
                catalogue::fold(source, n > 0),
                total.div_ceil(64),
                |workgroups| params::Fold {
                    source_strides: strides4(layout),
                    shape: shape.map(|n| n as u32),
                    source_offset: part.first as u32,
                    keeps,
                    total: total as u32,
                    workgroups,
                    minus_infinity: MINUS_INFINITY,
                    row_0: parts[2].start as u32,
                    key_0: parts[3].start as u32,
                    pad: 0,
                },
                vec![
                    Binding { binding: 1, slot, offset: part.offset, size: part.size },
                    Binding { binding: 2, slot: Slot::Scratch(1), offset: 0, size: planner.plan.scratch[1] },
                ],
            )?;
        }
        Ok(strides4(&folded))
    }
}

/// Strides for an operand whose last axis is walked in fours, beyond its end too.
fn strides_used(layout: &Layout) -> [u32; 4] {
    let mut out = strides4(layout);
    out[3] = layout.strides()[3] as u32;
    out
}

#[derive(Clone, Copy, Debug, Default)]
struct BoundRule {
    strides: [u32; 4],
    first: u32,
    keeps: u32,
}

#[derive(Clone, Debug, Default)]
struct BoundRules {
    bindings: Vec<Binding>,
    masks: [BoundRule; 2],
    bias: BoundRule,
}

impl Planner<'_> {
    /// No key at all: outputs 0, LSE −∞.
    fn nothing_to_see(&mut self, problem: &Problem, operands: &AttentionOperands<'_>) -> Result<()> {
        if operands.lse {
            let rows = checked_len(&[problem.batch, problem.heads_q, problem.len_q])?;
            self.fill(Slot::Lse, rows, MINUS_INFINITY)?;
        }
        if problem.dim_v == 0 {
            return Ok(());
        }
        // The output may be strided in any way: a weighted sum over no keys writes its zeros.
        let rules = Rules::default();
        for b in Part::all(problem.batch, 1) {
            let h = Part { start: 0, count: problem.heads_q };
            let i = Part { start: 0, count: problem.len_q };
            let o = window(
                operands.output,
                &[b, h, i, Part { start: 0, count: problem.dim_v }],
                4,
                self.adapter.offset_alignment,
            );
            let tile = self.tile(i.count, problem.dim_v.div_ceil(4));
            let column_blocks = problem.dim_v.div_ceil(4).div_ceil(tile.depth4 as usize) as u64;
            let row_blocks = i.count.div_ceil((tile.workgroup * tile.rows) as usize) as u64;
            self.push(
                catalogue::weighted_sum(tile, false, is_wide(operands.output), false, rules),
                row_blocks * h.count as u64 * column_blocks,
                |workgroups| params::WeightedSum {
                    o_strides: strides_used(operands.output),
                    o_offset: o.first as u32,
                    heads: h.count as u32,
                    group: 1,
                    len_q: i.count as u32,
                    dim: problem.dim_v as u32,
                    row_blocks: row_blocks as u32,
                    column_blocks: column_blocks as u32,
                    workgroups,
                    ..Default::default()
                },
                vec![
                    Binding { binding: 1, ..NOTHING },
                    Binding { binding: 2, ..NOTHING },
                    Binding { binding: 3, slot: Slot::Output, offset: o.offset, size: o.size },
                ],
            )?;
        }
        Ok(())
    }

    /// `elements` words of a buffer set to the bits of `value`: a copy of rows without columns.
    fn fill(&mut self, slot: Slot, elements: usize, value: u32) -> Result<()> {
        let whole = Layout::contiguous(&[elements])?;
        for part in Part::all(elements, (self.adapter.max_binding / 4) as usize) {
            let to = window(&whole, &[part], 4, self.adapter.offset_alignment);
            self.push(
                catalogue::copy(),
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

/// `Y = X·Wᵀ + b` with rows appended: X `[b, l, in]` (Q), W `[out, in]` (K), b `[out]` (Bias 0), extra
/// rows (Bias 1, 2, …; `None`: zeros), Y `[b, l + extra, out]` row-major (Output).
pub fn project(
    x: &Layout,
    w: &Layout,
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
    check_buffer(adapter, "a projection", padded_bytes(&y))?;
    let mut planner = Planner { adapter, plan: Plan::default() };
    let align = adapter.offset_alignment;
    let mut size = [batch, len, dim_out];
    let every_in = Part { start: 0, count: dim_in };
    loop {
        let [b, l, o] = size.map(|count| Part { start: 0, count });
        let largest = window(x, &[b, l, every_in], 4, align)
            .size
            .max(window(w, &[o, every_in], 4, align).size)
            .max(window(&y, &[b, l, o], 4, align).size)
            + align;
        if largest <= adapter.max_binding || size == [1, 1, 1] || batch * len * dim_out == 0 {
            break;
        }
        let w_too_large = window(w, &[o, every_in], 4, align).size + align > adapter.max_binding;
        let axis = if w_too_large && size[2] > 1 { 2 } else { (0..3).find(|&axis| size[axis] > 1).unwrap_or(2) };
        size[axis] = size[axis].div_ceil(2);
        if axis == 2 && size[2] > 4 {
            size[2] = size[2].next_multiple_of(4);
        }
    }
    for b in Part::all(batch, size[0]) {
        for l in Part::all(len, size[1]) {
            for o in Part::all(dim_out, size[2]) {
                let x_at = window(x, &[b, l, every_in], 4, align);
                let w_at = window(w, &[o, every_in], 4, align);
                let y_at = window(&y, &[b, l, o], 4, align);
                let rows = b.count * l.count;
                let dim4 = dim_in.div_ceil(4);
                let tile = planner.tile(rows, dim4);
                let chunks = dim4.div_ceil(tile.depth4 as usize).max(1);
                let row_blocks = rows.div_ceil((tile.workgroup * tile.rows) as usize);
                let out_blocks = planner.pieces(row_blocks as u64, o.count, 64);
                let outs_per_block = o.count.div_ceil(out_blocks).next_multiple_of(4);
                let out_blocks = o.count.div_ceil(outs_per_block);
                let mut bindings = vec![
                    Binding { binding: 1, slot: Slot::Q, offset: x_at.offset, size: x_at.size },
                    Binding { binding: 2, slot: Slot::K, offset: w_at.offset, size: w_at.size },
                    Binding { binding: 3, slot: Slot::Output, offset: y_at.offset, size: y_at.size },
                ];
                let mut bias_at = (0, 0);
                if let Some(layout) = bias {
                    let at = window(layout, &[o], 4, align);
                    bias_at = (at.first as u32, layout.strides()[0] as u32);
                    bindings.push(Binding { binding: 4, slot: Slot::Bias(0), offset: at.offset, size: at.size });
                }
                let wide_y = dim_out.is_multiple_of(4) && o.start.is_multiple_of(4);
                let stride = |layout: &Layout, axis: usize| layout.strides()[axis] as u32;
                planner.push(
                    catalogue::project(
                        tile,
                        is_wide(x),
                        is_wide(w),
                        wide_y,
                        chunks * tile.depth4 as usize != dim4,
                        bias.is_some(),
                    ),
                    row_blocks as u64 * out_blocks as u64,
                    |workgroups| params::Project {
                        x_strides: [stride(x, 0), stride(x, 1), stride(x, 2), 0],
                        w_strides: [stride(w, 0), stride(w, 1), 0, 0],
                        y_strides: [stride(&y, 0), stride(&y, 1), 1, 0],
                        x_offset: x_at.first as u32,
                        w_offset: w_at.first as u32,
                        y_offset: y_at.first as u32,
                        bias_offset: bias_at.0,
                        bias_stride: bias_at.1,
                        rows: rows as u32,
                        len: l.count as u32,
                        dim_in: dim_in as u32,
                        dim_out: o.count as u32,
                        chunks: chunks as u32,
                        row_blocks: row_blocks as u32,
                        out_blocks: out_blocks as u32,
                        outs_per_block: outs_per_block as u32,
                        workgroups,
                        pad_0: 0,
                        pad_1: 0,
                    },
                    bindings,
                )?;
            }
        }
    }
    for (n, row) in extra.iter().enumerate() {
        for b in Part::all(batch, size[0]) {
            let at = window(&y, &[b, Part { start: len + n, count: 1 }, Part { start: 0, count: dim_out }], 4, align);
            let mut bindings = vec![Binding { binding: 1, slot: Slot::Output, offset: at.offset, size: at.size }];
            let mut row_at = (0, 0);
            if let Some(layout) = row {
                let at = window(layout, &[Part { start: 0, count: dim_out }], 4, align);
                row_at = (at.first as u32, layout.strides()[0] as u32);
                bindings.push(Binding { binding: 2, slot: Slot::Bias(1 + n), offset: at.offset, size: at.size });
            }
            planner.push(
                catalogue::append(row.is_none()),
                (b.count as u64 * dim_out as u64).div_ceil(64),
                |workgroups| params::Append {
                    y_offset: at.first as u32,
                    y_batch_stride: y.strides()[0] as u32,
                    row_offset: row_at.0,
                    row_stride: row_at.1,
                    width: dim_out as u32,
                    batch: b.count as u32,
                    workgroups,
                    pad: 0,
                },
                bindings,
            )?;
        }
    }
    Ok(planner.plan)
}

/// Softmax over the last axis of X (at most four axes, any strides): X (Q) is copied into rows of
/// whole vec4s (Output, [`Plan::weights`]) and weighed there.
pub fn softmax(x: &Layout, adapter: &Capabilities) -> Result<Plan> {
    let mut planner = Planner { adapter, plan: Plan::default() };
    let out = rows_padded(x.shape())?;
    check_buffer(adapter, "the softmax", padded_bytes(&out))?;
    planner.plan.weights = Some(out.clone());
    if x.is_empty() {
        return Ok(planner.plan);
    }
    let align = adapter.offset_alignment;
    let mut size = [x.shape()[0], x.shape()[1], x.shape()[2]];
    let every = Part { start: 0, count: x.shape()[3] };
    let parts = |at: [Part; 3]| [at[0], at[1], at[2], every];
    while let Some(axis) = (0..3).find(|&axis| size[axis] > 1) {
        let at = parts(size.map(|count| Part { start: 0, count }));
        if window(x, &at, 4, align).size.max(window(&out, &at, 4, align).size) + align <= adapter.max_binding {
            break;
        }
        size[axis] = size[axis].div_ceil(2);
    }
    let width4 = x.shape()[3].div_ceil(4);
    for a in Part::all(x.shape()[0], size[0]) {
        for b in Part::all(x.shape()[1], size[1]) {
            for c in Part::all(x.shape()[2], size[2]) {
                let at = parts([a, b, c]);
                let (from, to) = (window(x, &at, 4, align), window(&out, &at, 4, align));
                let rows = a.count * b.count * c.count;
                let total = (rows * width4 * 4) as u64;
                planner.push(
                    catalogue::copy(),
                    total.div_ceil(64),
                    |workgroups| params::Copy {
                        x_strides: strides4(x),
                        shape: at.map(|part| part.count as u32),
                        x_offset: from.first as u32,
                        y_offset: to.first as u32,
                        y_row_stride: width4 as u32 * 4,
                        total: total as u32,
                        workgroups,
                        fill: MINUS_INFINITY,
                        pad_0: 0,
                        pad_1: 0,
                    },
                    vec![
                        Binding { binding: 1, slot: Slot::Q, offset: from.offset, size: from.size },
                        Binding { binding: 2, slot: Slot::Output, offset: to.offset, size: to.size },
                    ],
                )?;
                let (workgroup, lanes) = if adapter.class == AdapterClass::Cpu { (8, 1) } else { (64, 64) };
                planner.push(
                    catalogue::softmax(workgroup, lanes, false),
                    (rows as u64).div_ceil(u64::from(workgroup / lanes)),
                    |workgroups| params::Softmax {
                        rows: rows as u32,
                        width4: width4 as u32,
                        row_stride4: width4 as u32,
                        s_offset4: (to.first / 4) as u32,
                        lse_offset: 0,
                        workgroups,
                        minus_infinity: MINUS_INFINITY,
                        not_a_number: NOT_A_NUMBER,
                    },
                    vec![Binding { binding: 1, slot: Slot::Output, offset: to.offset, size: to.size }],
                )?;
            }
        }
    }
    Ok(planner.plan)
}
