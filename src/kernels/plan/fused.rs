//! Fused attention: no scores are stored.

use super::super::access::Access;
use super::super::capabilities::{AdapterClass, Capabilities};
use super::super::catalogue::{self, FlashAccess, FlashOptions, FlashRotary, FlashTile};
use super::super::method::{Method, Tile};
use super::super::params::{self, View};
use super::super::turns;
use super::call::{BoundRules, Call, Sizes};
use super::slice::{Part, halving, slice, window};
use super::{
    AttentionOperands, Binding, Cost, MINUS_INFINITY, NOT_A_NUMBER, Plan, Planner, RotaryOperand, Slot, Window,
    check_buffer,
};
use crate::error::Result;
use crate::problem::{Layout, Problem, Sequence, checked_len};

/// The widest head whose rows fit in registers; the registers of a software adapter are memory.
fn most_dim(adapter: &Capabilities) -> usize {
    match adapter.class {
        AdapterClass::Cpu => 1024,
        AdapterClass::Gpu => 512,
    }
}

/// Keys of a split; merging smaller splits does not pay off.
const LEAST_SPLIT: usize = 256;
/// Keys whose values are summed in one run. Longer rows are cut into splits of [`LONG_SPLIT`], because they would lose
/// digits.
const MOST_SPLIT: usize = 4096;
const LONG_SPLIT: usize = 512;
/// Most bytes to hold for the outputs of splits; beyond that, rows are sliced.
const MOST_PARTIAL: u64 = 32 << 20;

pub(super) struct Fused<'a> {
    call: Call<'a>,
    adapter: &'a Capabilities,
    tile: FlashTile,
    sizes: Sizes,
    /// Number of splits of the keys, each with its own output, and keys per split; for packed sequences the maximum.
    splits: usize,
    keys_per_split: usize,
    /// Most keys of a split of a long row.
    long_split: usize,
    /// The sequences of a ragged batch; empty if all batch entries have the same length.
    sequences: &'a [Sequence],
    /// Whether a block mask is computed first, of what masks and biases leave of blocks of keys.
    block_mask: bool,
    rotary: Option<FlashRotary>,
}

/// Some blocks of rows of packed sequences, by their position in the table, and the operations that they take.
#[derive(Clone, Copy)]
struct Blocks {
    part: Part,
    operations: f64,
}

impl<'a> Fused<'a> {
    /// A fused call, or the reason why it needs scores in memory or does not fit. `sequences` are packed in operands
    /// with batch 1; if empty, all batch entries have the same length.
    pub fn new(
        problem: &'a Problem,
        operands: &'a AttentionOperands<'a>,
        adapter: &'a Capabilities,
        sequences: &'a [Sequence],
    ) -> std::result::Result<Fused<'a>, String> {
        let Problem { batch, heads_q, len_q, len_k, dim_k, dim_v, .. } = *problem;
        let most = most_dim(adapter);
        if dim_k == 0 || dim_v == 0 || dim_k > most || dim_v > most {
            return Err(format!("dim_k = {dim_k} and dim_v = {dim_v} must be from 1 to {most}"));
        }
        let tile = match operands.method {
            Method::Tile(tile) => tile,
            _ if sequences.is_empty() => Tile::default_for(problem, adapter),
            _ => {
                let longest = |len: fn(&Sequence) -> usize| sequences.iter().map(len).max().unwrap_or(0);
                let (len_q, len_k) = (longest(|one| one.len_q), longest(|one| one.len_k));
                Tile::default_for(&Problem { len_q, len_k, ..problem.clone() }, adapter)
            }
        };
        tile.check(adapter).map_err(|error| error.to_string())?;
        let tile = flash_tile(tile, problem);
        let split_keys = |long_split: usize| match sequences {
            [] => key_splits(problem, adapter, tile, [len_q, len_k], long_split),
            _ => {
                let split = |one: &Sequence| key_splits(problem, adapter, tile, [one.len_q, one.len_k], long_split);
                let most = |(a, b): (usize, usize), (c, d)| (a.max(c), b.max(d));
                sequences.iter().map(split).fold((1, 0), most)
            }
        };
        let mut long_split = LONG_SPLIT;
        let (mut splits, mut keys_per_split) = split_keys(long_split);
        // Packed rows are not sliced: if the outputs of all splits are too large, there are as few splits as possible.
        let partial = |splits: usize| split_bytes(problem, splits, [batch, heads_q, len_q]);
        if !sequences.is_empty() && partial(splits) > adapter.max_binding {
            long_split = usize::MAX;
            (splits, keys_per_split) = split_keys(long_split);
        }

        let lse = operands.lse || splits > 1;
        let sink = operands.sink.is_some();
        let rotary = operands.rotary.map(|rotary| flash_rotary(rotary, tile)).transpose()?;
        let others =
            4 + u32::from(lse) + u32::from(!sequences.is_empty()) + u32::from(sink) + u32::from(rotary.is_some());
        let mut call = Call::new(problem, operands, adapter, others);
        call.rules.sink = sink;
        call.rules.banded |= sequences.iter().any(|one| one.band.hides_any_of(one.len_k));
        if others + call.rules.buffers() > adapter.max_storage_buffers {
            return Err(format!("{} storage buffers are too few", adapter.max_storage_buffers));
        }
        call.check_relative(adapter).map_err(|error| error.to_string())?;
        if rotary.is_some() && call.combine_bands {
            return Err("combined bands do not contain the positions of queries".into());
        }
        let spare = adapter.max_storage_buffers - (others + call.rules.buffers());
        let mut fused = Fused {
            block_mask: spare > 0 && hides_blocks(&call, tile),
            rotary,
            call,
            adapter,
            tile,
            sizes: [batch, heads_q, len_q, len_k],
            splits,
            keys_per_split,
            long_split,
            sequences,
        };
        if !sequences.is_empty() {
            let (bytes, most) = (fused.largest_binding_of(fused.sizes), adapter.max_binding);
            if bytes > most {
                return Err(format!("a binding of {bytes} bytes is larger than {most}"));
            }
            return Ok(fused);
        }
        let fits = |sizes: &Sizes| fused.largest_binding_of(*sizes) <= adapter.max_binding;
        let is_short = |sizes: &Sizes| {
            let pairs = sizes.iter().map(|&n| n as f64).product::<f64>();
            pairs * fused.per_pair() <= adapter.dispatch_operations() && fused.partial_bytes(*sizes) <= MOST_PARTIAL
        };
        let group = problem.group();
        let order = [halving(0, 1, 1), halving(1, group, group), halving(2, 32, 32), halving(2, 1, 1)];
        let (sizes, fit) = slice(fused.sizes, &order, 3, fits, is_short);
        if !fit {
            return Err(format!("a binding of {} bytes is too large", fused.largest_binding_of(sizes)));
        }
        fused.sizes = sizes;
        // The number of invocations, one per row and block of keys, must fit too.
        let countable = |bytes: u64| bytes / 4 * tile.tile.block_rows() as u64 <= u64::from(u32::MAX);
        fused.block_mask &= fused.mask_bytes().is_ok_and(|bytes| bytes <= adapter.max_binding && countable(bytes));
        Ok(fused)
    }

    /// Bytes of the largest binding of any step at these sizes.
    fn largest_binding_of(&self, sizes: Sizes) -> u64 {
        self.call.largest_operand(sizes).max(self.partial_bytes(sizes))
    }

    /// Bytes of the outputs of the splits of a slice.
    fn partial_bytes(&self, [batch, heads, rows, _]: Sizes) -> u64 {
        split_bytes(self.call.problem, self.splits, [batch, heads, rows])
    }

    pub fn plan(&self) -> Result<Plan> {
        let Problem { batch, heads_q, len_q, dim_v, .. } = *self.call.problem;
        let mut planner = Planner { adapter: self.adapter, plan: Plan::default() };
        planner.plan.bands = self.call.band_table();
        let [batch_size, heads, rows, _] = self.sizes;
        // Partial outputs, combined rules, partial LSE, block mask.
        let mut scratch = vec![16, self.call.combined_bytes(self.sizes)?, 16, 16];
        if self.splits > 1 {
            let rows = checked_len(&[self.splits, batch_size, heads, rows])?;
            scratch[0] = checked_len(&[rows, dim_v.next_multiple_of(4)])? as u64 * 4;
            scratch[2] = (rows as u64 * 4).next_multiple_of(16);
        }
        if self.block_mask {
            scratch[3] = self.mask_bytes()?;
        }
        for &bytes in &scratch {
            check_buffer(self.adapter, "working memory", bytes)?;
        }
        planner.plan.scratch = scratch;
        if !self.sequences.is_empty() {
            let whole = [batch, heads_q, len_q].map(Part::whole);
            for blocks in self.plan_sequences(&mut planner.plan.bands) {
                self.attend(&mut planner, whole, Some(blocks))?;
            }
            self.join(&mut planner, whole)?;
            return Ok(planner.plan);
        }
        for at in Part::grid([batch, heads_q, len_q], [batch_size, heads, rows]) {
            self.attend(&mut planner, at, None)?;
            self.join(&mut planner, at)?;
        }
        Ok(planner.plan)
    }

    /// Fills the table in which the kernel looks up its rows and keys. Returns the blocks of rows of each dispatch,
    /// counted from the start of the table.
    fn plan_sequences(&self, table: &mut Vec<[i32; 4]>) -> Vec<Blocks> {
        let Problem { heads_q, heads_kv, .. } = *self.call.problem;
        let per_block = self.tile.tile.block_rows();
        let mut dispatches = Vec::new();
        let mut blocks = Vec::new();
        let (mut first, mut work) = (0, 0.0);
        for (n, one) in self.sequences.iter().enumerate() {
            let (_, keys_per_split) = self.key_splits(one);
            table.push([one.first_query, one.len_q, one.first_key, one.len_k].map(|x| x as i32));
            table.push([one.band.keys, one.band.lo, one.band.hi, keys_per_split as i32]);
            for block in 0..(heads_q / heads_kv * one.len_q).div_ceil(per_block) {
                let more = (per_block * heads_kv * one.len_k) as f64 * self.per_pair();
                if work + more > self.adapter.dispatch_operations() && blocks.len() > first {
                    dispatches.push((first, blocks.len(), work));
                    (first, work) = (blocks.len(), 0.0);
                }
                work += more;
                blocks.push([n as i32, block as i32, 0, 0]);
            }
        }
        dispatches.push((first, blocks.len(), work));
        let sequences = table.len();
        table.extend(blocks);
        let blocks = |(first, end, operations)| Blocks {
            part: Part { start: sequences + first, count: end - first },
            operations,
        };
        dispatches.into_iter().map(blocks).collect()
    }

    /// Operations per query and key of a head.
    fn per_pair(&self) -> f64 {
        2.0 * (self.call.problem.dim_k + self.call.problem.dim_v) as f64
    }

    /// Number of splits of the keys of a packed sequence, and keys per split.
    fn key_splits(&self, one: &Sequence) -> (usize, usize) {
        key_splits(self.call.problem, self.adapter, self.tile, [one.len_q, one.len_k], self.long_split)
    }

    /// Number of blocks of rows for `len_q` queries.
    fn row_blocks(&self, len_q: usize) -> usize {
        (self.call.problem.group() * len_q).div_ceil(self.tile.tile.block_rows())
    }

    /// Number of blocks of keys per block of rows.
    fn key_blocks(&self) -> usize {
        self.call.problem.len_k.div_ceil(catalogue::MASK_BLOCK as usize)
    }

    /// Bytes of the block mask of a slice.
    fn mask_bytes(&self) -> Result<u64> {
        let [batch, heads, rows, _] = self.sizes;
        let [batch, heads] = self.masked_apart(batch, heads.div_ceil(self.call.problem.group()));
        let entries = checked_len(&[batch, heads, self.row_blocks(rows), self.key_blocks()])?;
        Ok((entries as u64 * 4).next_multiple_of(16))
    }

    /// Number of batch entries and key heads that have their own block mask: one for all if no rule distinguishes them.
    fn masked_apart(&self, batch: usize, heads_kv: usize) -> [usize; 2] {
        let differs = |axis| self.call.lists().any(|layout| layout.strides()[axis] != 0 && layout.shape()[axis] > 1);
        [if differs(0) { batch } else { 1 }, if differs(1) { heads_kv } else { 1 }]
    }

    /// Computes what the bound rules leave of blocks of keys; returns the strides of the result by batch, head and
    /// rows.
    fn plan_block_mask(&self, planner: &mut Planner<'_>, at: [Part; 3], bound: &BoundRules) -> Result<View> {
        let Call { problem, rules, .. } = self.call;
        let [b, h, i] = at;
        let group = problem.group();
        let [batch, heads] = self.masked_apart(b.count, h.grouped(group).count);
        let (row_blocks, key_blocks) = (self.row_blocks(i.count), self.key_blocks());
        let rows_per_block = self.tile.tile.block_rows();
        let entries = checked_len(&[batch, heads, row_blocks, key_blocks])?;
        let total = checked_len(&[entries, rows_per_block])?;
        planner.fill(Slot::Scratch(3), entries, 0)?;
        let mut bindings = vec![Binding::whole("blocks", Slot::Scratch(3), planner.plan.scratch[3])];
        bindings.extend(bound.bindings.iter().filter(|one| !matches!(one.slot, Slot::Bands | Slot::Relative)));
        planner.push(
            catalogue::block_mask(rules),
            total as u64,
            params::BlockMask {
                rules: self.call.rules(bound),
                slice: params::Slice { heads_kv: heads as u32, ..self.call.slice(at, Part::whole(problem.len_k)) },
                rows_per_block: rows_per_block as u32,
                row_blocks: row_blocks as u32,
                key_blocks: key_blocks as u32,
                total: total as u32,
                minus_infinity: MINUS_INFINITY,
                ..Default::default()
            },
            bindings,
        )?;
        let layout = Layout::contiguous(&[batch, heads, row_blocks, key_blocks])?;
        Ok(View::new(&layout, Window::default()))
    }

    /// Runs the fused kernel over a slice, or over some blocks of rows of the packed sequences.
    fn attend(&self, planner: &mut Planner<'_>, at: [Part; 3], blocks: Option<Blocks>) -> Result<()> {
        let Call { problem, operands, rules, align, .. } = self.call;
        let [b, h, i] = at;
        let head_kv = h.grouped(problem.group());
        let j = Part::whole(problem.len_k);
        let q_at = self.call.window(operands.q, &at);
        let [k_at, v_at] = [operands.k, operands.v].map(|x| self.call.window(x, &[b, head_kv, j]));
        let bound = self.call.bind_rules(planner, at, j, self.sizes)?;
        let block_mask = match self.block_mask {
            true => self.plan_block_mask(planner, at, &bound)?,
            false => View::default(),
        };
        let mut bindings =
            vec![Binding::new("q", Slot::Q, q_at), Binding::new("k", Slot::K, k_at), Binding::new("v", Slot::V, v_at)];
        let split = self.splits > 1;
        let rows = b.count * h.count * i.count;
        // A split writes row-major, separate from the others, with rows padded to whole vec4s.
        let row_stride = problem.dim_v.next_multiple_of(4);
        let (o, o_access, lse);
        if split {
            let part = Layout::contiguous(&[b.count, h.count, i.count, row_stride])?;
            (o, o_access) =
                (View::new(&part, Window::default()), Access { wide: row_stride == problem.dim_v, ..Access::WIDE });
            lse = View::strided([(h.count * i.count) as u32, i.count as u32, 1, rows as u32], 0);
            bindings.push(Binding::whole("o", Slot::Scratch(0), planner.plan.scratch[0]));
            bindings.push(Binding::whole("lse", Slot::Scratch(2), planner.plan.scratch[2]));
        } else {
            let o_at = self.call.window(operands.output, &at);
            (o, o_access) = (View::new(&operands.output, o_at), operands.output.access());
            let (layout, lse_at) = self.call.lse(&at)?;
            lse = View::new(&layout.unsqueeze(3)?, lse_at);
            bindings.push(Binding::new("o", Slot::Output, o_at));
            if operands.lse {
                bindings.push(Binding::new("lse", Slot::Lse, lse_at));
            }
        }
        bindings.extend(&bound.bindings);
        let [sink_offset, sink_stride] = self.call.bind_sink(&mut bindings, h);
        if let Some(rotary) = &operands.rotary {
            bindings.push(Binding::new("angles", Slot::Angles, window(rotary.table, &[], 4, align)));
        }
        if self.block_mask {
            bindings.push(Binding::whole("block_mask", Slot::Scratch(3), planner.plan.scratch[3]));
        }
        let mut slice = self.call.slice(at, j);
        let mut rule_params = self.call.rules(&bound);
        let mut row_blocks = self.row_blocks(i.count);
        let pairs = (b.count * h.count) as f64 * i.count as f64 * problem.len_k as f64;
        let mut operations = pairs * self.per_pair();
        if let Some(Blocks { part, operations: of_blocks }) = blocks {
            bindings.push(Binding::whole("bands", Slot::Bands, planner.plan.bands.len() as u64 * 16));
            (row_blocks, operations) = (part.count, of_blocks);
            slice.batch_0 = part.start as u32;
            // The band applies to every key of a packed sequence.
            rule_params.maskable_keys = i32::MAX as u32;
        }
        let access =
            FlashAccess { q: operands.q.access(), k: operands.k.access(), v: operands.v.access(), o: o_access };
        let padded = [self.tile.depth4 as usize * 4 != problem.dim_k, self.tile.cols4 as usize * 4 != problem.dim_v];
        let options = FlashOptions {
            padded,
            softcap: problem.softcap.is_some(),
            lse: operands.lse || split,
            rules,
            block_mask: self.block_mask,
            rotary: self.rotary,
            neighbours: i.count.is_multiple_of(self.tile.tile.rows() as usize),
            packed: blocks.is_some(),
        };
        planner.push_costly(
            catalogue::flash(self.tile, access, options),
            (b.count * head_kv.count * row_blocks * self.splits) as u64,
            Cost { turns: turns::flash(self.tile, self.block_mask).of(self.keys_per_split), operations },
            |workgroups| params::Flash {
                q: View::new(&operands.q, q_at),
                k: View::new(&operands.k, k_at),
                v: View::new(&operands.v, v_at),
                o,
                lse,
                block_mask,
                rules: rule_params,
                slice,
                dim_k: problem.dim_k as u32,
                dim_v: problem.dim_v as u32,
                row_blocks: row_blocks as u32,
                splits: self.splits as u32,
                keys_per_split: self.keys_per_split as u32,
                o_split_stride: (rows * row_stride) as u32,
                sink_offset,
                sink_stride,
                workgroups,
                minus_infinity: MINUS_INFINITY,
                not_a_number: NOT_A_NUMBER,
                ..Default::default()
            },
            bindings,
        )
    }

    /// Merges the splits of a slice.
    fn join(&self, planner: &mut Planner<'_>, at: [Part; 3]) -> Result<()> {
        if self.splits == 1 {
            return Ok(());
        }
        let Call { problem, operands, .. } = self.call;
        let [b, h, i] = at;
        let o_at = self.call.window(operands.output, &at);
        let (lse, lse_at) = self.call.lse(&at)?;
        let rows = b.count * h.count * i.count;
        let mut bindings = vec![
            Binding::whole("parts", Slot::Scratch(0), planner.plan.scratch[0]),
            Binding::whole("part_lse", Slot::Scratch(2), planner.plan.scratch[2]),
            Binding::new("o", Slot::Output, o_at),
        ];
        if operands.lse {
            bindings.push(Binding::new("lse", Slot::Lse, lse_at));
        }
        let params = params::Merge {
            o: View::new(&operands.output, o_at),
            lse: View::new(&lse.unsqueeze(3)?, lse_at),
            heads: h.count as u32,
            len: i.count as u32,
            rows: rows as u32,
            splits: self.splits as u32,
            dim: problem.dim_v as u32,
            row_stride: problem.dim_v.next_multiple_of(4) as u32,
            ..Default::default()
        };
        planner.merge(catalogue::merge(operands.lse, operands.output.access()), params, bindings)
    }
}

/// The tile with the row widths of this problem.
fn flash_tile(tile: Tile, problem: &Problem) -> FlashTile {
    let [depth4, cols4] = [problem.dim_k, problem.dim_v].map(|dim| dim.div_ceil(4) as u32);
    // Lanes share whole loads, so keys · cols4 vec4s must divide evenly.
    let multiple = match tile {
        Tile::Registers { keys, share, .. } => (share / keys).max(1),
        Tile::Workgroup { .. } => 1,
    };
    FlashTile { tile, depth4, cols4: cols4.next_multiple_of(multiple) }
}

/// How the kernel rotates rows, if it can; it needs whole vec4s.
fn flash_rotary(rotary: RotaryOperand<'_>, tile: FlashTile) -> std::result::Result<FlashRotary, String> {
    let (each, vec4s) = if rotary.interleaved { (2, 1) } else { (4, 2) };
    let pairs4 = (rotary.pairs / each) as u32;
    if !rotary.pairs.is_multiple_of(each) || rotary.table.offset() != 0 || vec4s * pairs4 > tile.depth4 {
        return Err(format!("{} pairs of columns to rotate are not whole vec4s", rotary.pairs));
    }
    Ok(FlashRotary { pairs4, interleaved: rotary.interleaved })
}

/// Whether a block mask may pay off: computing it reads the masks and biases once more, but less often if heads share
/// them.
fn hides_blocks(call: &Call<'_>, tile: FlashTile) -> bool {
    let shared = call.problem.heads_q > 1 && call.lists().all(|layout| layout.strides()[1] == 0);
    let few_rows = call.problem.group() * call.problem.len_q < tile.tile.workgroup() as usize;
    let masked = !call.operands.masks.is_empty() || !call.operands.biases.is_empty() && (shared || few_rows);
    masked && call.problem.maskable_keys() > catalogue::MASK_BLOCK as usize
}

/// Bytes of the outputs of splits, with rows padded to whole vec4s; 0 if there is only one split.
fn split_bytes(problem: &Problem, splits: usize, rows: [usize; 3]) -> u64 {
    let rows = rows.iter().map(|&n| n as u64).product::<u64>();
    if splits > 1 { splits as u64 * rows * problem.dim_v.next_multiple_of(4) as u64 * 4 } else { 0 }
}

/// Number of splits of the keys, and keys per split. Nothing may depend on the batch: the same row gives the same bits
/// in every batch.
fn key_splits(
    problem: &Problem,
    adapter: &Capabilities,
    tile: FlashTile,
    [len_q, len_k]: [usize; 2],
    long_split: usize,
) -> (usize, usize) {
    let row_blocks = (problem.group() * len_q).div_ceil(tile.tile.block_rows());
    let target = match adapter.class {
        AdapterClass::Cpu => 16,
        AdapterClass::Gpu => 512,
    };
    let splits = (target / (row_blocks * problem.heads_kv).max(1)).min(len_k.div_ceil(LEAST_SPLIT)).max(1);
    // A row is split the same way with and without a block mask.
    let longest = if len_k > MOST_SPLIT { long_split } else { MOST_SPLIT };
    let longest = turns::flash(tile, true).longest(adapter.loop_turns()).min(longest) / 32 * 32;
    let splits = splits.max(len_k.div_ceil(longest.max(32)));
    let keys_per_split = len_k.div_ceil(splits).next_multiple_of(32).max(32);
    (len_k.div_ceil(keys_per_split).max(1), keys_per_split)
}
