//! The number of loop iterations ("turns") of kernels.
//!
//! Mesa's software drivers silently stop every loop of an invocation once all its loops together have done 65,535
//! iterations (`lp_bld_limits.h`), so planning counts them. Every kernel that loops over a length has an upper bound
//! here for all loops of one invocation together; the check that ends a loop counts as one iteration. If
//! [`Capabilities::max_loop_turns`](super::Capabilities::max_loop_turns) would be exceeded, work is split or sliced.
//!
//! Mesa's limit is [`MESA_LOOP_TURNS`].
//!
//! An unrolled loop ([`specialise`](super::specialise())) has no iterations.

use super::catalogue::{FlashTile, MatvecTile, ProjectTile, RowTile, TiledParts};
use super::method::Tile;

/// The iterations that Mesa's software drivers (lavapipe, llvmpipe) allow an invocation: 65,535, less a margin.
pub const MESA_LOOP_TURNS: u32 = 65_000;

/// Number of keys that a fused kernel or a weighted sum checks together for values that are not finite: `SPAN`.
const SPAN: u64 = 32;
/// Number of values of a column that it checks in one iteration.
const AT_ONCE: u64 = 4;

/// The iterations of an invocation that loops over a length: `before`, plus `each` for every `step` of the length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turns {
    before: u64,
    each: u64,
    step: u64,
}

impl Turns {
    /// The iterations over a length.
    pub fn of(self, len: usize) -> u64 {
        self.before + (len as u64).div_ceil(self.step) * self.each
    }

    /// The longest length, a multiple of the step, that takes at most `most` iterations; at least one step.
    pub fn longest(self, most: u64) -> usize {
        let steps = (most.saturating_sub(self.before) / self.each).max(1);
        usize::try_from(steps.saturating_mul(self.step)).unwrap_or(usize::MAX)
    }

    /// The iterations of a kernel that then loops over the same length again.
    fn and(self, other: Turns) -> Turns {
        // A multiple of both steps.
        let step = self.step.max(other.step);
        debug_assert!(step.is_multiple_of(self.step) && step.is_multiple_of(other.step));
        let scaled = |one: Turns| one.each * (step / one.step);
        Turns { before: self.before + other.before, each: scaled(self) + scaled(other), step }
    }
}

/// A loop of `turns` iterations, and the check that ends it.
const fn counted(turns: u64) -> u64 {
    turns + 1
}

/// Iterations at the end for values that are not finite, per key; `columns` is the number of vec4s of a value that an
/// invocation handles.
fn not_finite(columns: u64) -> Turns {
    Turns { before: 1, each: 1 + counted(SPAN) + counted(columns * (1 + counted(SPAN / AT_ONCE))), step: SPAN }
}

/// Iterations of `flash.wgsl` and `flash_tiled.wgsl`, by keys of a split; `block_mask`: whether a block mask is read.
pub fn flash(flash: FlashTile, block_mask: bool) -> Turns {
    let [depth4, cols4] = [flash.depth4, flash.cols4].map(u64::from);
    // Finding the next block: a check per step, and one iteration per skipped block, whose own steps are saved.
    let next = 1 + u64::from(block_mask);
    let (main, columns) = match flash.tile {
        Tile::Registers { keys, .. } => {
            // Loads parts of Q and stores parts of O; with rotary positions the loop is shorter.
            let before = counted(depth4) + counted(cols4) + 2 * next;
            let keys = u64::from(keys);
            (Turns { before, each: next + counted(keys), step: keys }, cols4)
        }
        Tile::Workgroup { workgroup, rows, across } => {
            let parts = TiledParts::new([workgroup, rows, across], [flash.depth4, flash.cols4]);
            let [k_parts, v_parts, v_strips] = [parts.k_parts, parts.v_parts, parts.v_strips].map(u64::from);
            let across = u64::from(across);
            let each = next + counted(k_parts) + v_strips * counted(v_parts);
            // Joins the sums and signs of a row.
            let before = 2 * next + 2 * u64::from(parts.rows4) * counted(across);
            (Turns { before, each, step: u64::from(parts.keys) }, cols4.div_ceil(across))
        }
    };
    main.and(not_finite(columns))
}

/// Iterations of `scores.wgsl`, by keys of a block; `chunks` of the width.
pub fn scores(chunks: usize) -> Turns {
    let chunks = chunks as u64;
    Turns { before: counted(2 * chunks), each: chunks, step: 4 }
}

/// Iterations of `weighted_sum.wgsl`, by keys of a slice.
pub fn weighted_sum(tile: RowTile) -> Turns {
    Turns { before: 1, each: 1, step: 4 }.and(not_finite(u64::from(tile.depth4)))
}

/// Iterations of `project_tiled.wgsl`, by the width.
pub fn project_tiled() -> Turns {
    Turns { before: 1, each: 1, step: u64::from(ProjectTile::DEPTH) }
}

/// Iterations of `softmax.wgsl`, by elements of a row.
pub fn softmax(lanes: u32) -> Turns {
    // Maximum, flag and sum over the lanes; maximum, sum and weights of the row.
    let join = u64::from(lanes.ilog2());
    Turns { before: 3 * counted(join) + 3, each: 3, step: 4 * u64::from(lanes) }
}

/// Iterations of `normalise.wgsl`, by elements of a row: it makes as many passes over them as a softmax.
pub fn normalise(lanes: u32) -> Turns {
    softmax(lanes)
}

/// Iterations of `inspect.wgsl`, by rows of a split; `chunks` of the width.
pub fn inspect(chunks: usize) -> Turns {
    Turns { before: 1, each: 1 + counted(chunks as u64), step: 4 }
}

/// Iterations of `project.wgsl`, by outputs of a block; `chunks` of the input width, each of `depth4` vec4s.
pub fn project(chunks: usize, depth4: u32) -> Turns {
    let chunks = chunks as u64;
    Turns { before: counted(chunks * (2 + counted(u64::from(depth4)))), each: chunks * (1 + counted(4)), step: 4 }
}

/// Iterations of `matvec.wgsl`, by the input width.
pub fn matvec(tile: MatvecTile) -> Turns {
    let MatvecTile { workgroup, rows, outs, share } = tile;
    let each_lane = u64::from((rows * outs).div_ceil(workgroup));
    let before = 1 + counted(each_lane * (1 + counted(u64::from(workgroup / share))));
    Turns { before, each: 1, step: 4 * u64::from(workgroup) }
}

/// Maximum number of chunks of a width, of `depth4` vec4s each, for which four outputs stay within `most` iterations.
pub fn project_chunks(depth4: u32, most: u64) -> usize {
    let per_chunk = project(1, depth4).of(4) - project(0, depth4).of(4);
    Turns { before: project(0, depth4).of(4), each: per_chunk, step: 1 }.longest(most)
}

/// Iterations of `merge.wgsl`, by splits.
pub fn merge() -> Turns {
    // The largest LSE, then the sum: two nested loops, of which the outer one is short.
    Turns { before: 4, each: 4, step: 1 }
}

/// Iterations of `mean_heads.wgsl`, by heads.
pub fn mean_heads() -> Turns {
    Turns { before: 1, each: 1, step: 1 }
}

/// Iterations of `row_dots.wgsl`, by the width: blocks of 32 vec4s.
pub fn row_dots() -> Turns {
    Turns { before: 1, each: 34, step: 128 }
}

/// Queries of a block of `transposed_sum.wgsl`.
pub const SUMMED_QUERIES: usize = 256;

/// Iterations of `transposed_sum.wgsl`, by queries, for `group` query heads: once more for values that are not finite.
pub fn transposed_sum(group: usize) -> Turns {
    let (group, block) = (group as u64, SUMMED_QUERIES as u64);
    Turns { before: 2 + counted(group) + group, each: 1 + counted(group * counted(block)) + group * block, step: block }
}

/// Iterations of `sum_axis.wgsl`, by the length of the axis: blocks of 64 numbers.
pub fn sum_axis() -> Turns {
    Turns { before: 1, each: 66, step: 64 }
}

/// Iterations of `probe.wgsl`, by rounds.
pub fn probe() -> Turns {
    Turns { before: 1, each: 1, step: 1 }
}

/// Iterations of a kernel without a loop over any length; the longest loop is that of `block_mask.wgsl` over its 32
/// keys.
pub const FEW: u64 = 64;
