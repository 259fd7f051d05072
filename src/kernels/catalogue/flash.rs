//! Variants of the fused kernels.

use super::{Body, Changes, Kernel, MASK_BLOCK, RelativeKind, RowTile, Rules, Variant, share, sink};
use crate::kernels::access::{self, Access};
use crate::kernels::method::Tile;

/// The tile of `flash.wgsl` and `flash_tiled.wgsl`, and the number of vec4s of a row that it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlashTile {
    /// Rows and keys.
    pub tile: Tile,
    /// vec4s of a query and a key.
    pub depth4: u32,
    /// vec4s of a value.
    pub cols4: u32,
}

/// The parts that `flash_tiled.wgsl` keeps in workgroup memory; see there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TiledParts {
    /// Keys of a step.
    pub keys: u32,
    /// vec4s of a part of each row and key.
    part4: u32,
    /// Number of parts of a key.
    pub k_parts: u32,
    /// vec4s of a part of each value, per invocation.
    v_at_once: u32,
    /// Number of parts of the values: strips of columns, and parts of the keys.
    pub v_strips: u32,
    /// See `v_strips`.
    pub v_parts: u32,
    /// vec4s that hold one number per row.
    pub rows4: u32,
    /// Unused vec4s per element of the rows' part: invocations of different rows are in one subgroup.
    row_pad: u32,
    /// Bytes of workgroup memory.
    pub memory: u32,
}

impl TiledParts {
    /// The parts of a tile with `workgroup` invocations, for keys and values of so many vec4s.
    pub fn new([workgroup, rows, across]: [u32; 3], [depth4, cols4]: [u32; 2]) -> TiledParts {
        let down = workgroup / across;
        // As much as fits 16 KiB together with the weights, and as little as keeps what is unrolled out of registers.
        let part4 = if across == 16 || rows == 8 { 4 } else { 8 };
        let v_at_once = if cols4 > across { 2 } else { 1 };
        let v_parts = across * v_at_once / part4;
        let (rows4, row_pad) = (rows.div_ceil(4), u32::from(across < 16));
        let rows_part = workgroup * rows + row_pad * down * v_parts;
        let keys_part = (4 * part4 + 1) * across;
        TiledParts {
            keys: 4 * across,
            part4,
            k_parts: depth4.div_ceil(part4),
            v_at_once,
            v_strips: cols4.div_ceil(across * v_at_once),
            v_parts,
            rows4,
            row_pad,
            // Two numbers at the end.
            memory: 16 * (rows_part + keys_part + workgroup * rows4) + 8,
        }
    }
}

/// How the operands of `flash.wgsl` are read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlashAccess {
    /// Queries.
    pub q: Access,
    /// Keys.
    pub k: Access,
    /// Values.
    pub v: Access,
    /// The output.
    pub o: Access,
}

/// What a variant of `flash.wgsl` does in addition to the products.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlashOptions {
    /// Whether the registers are wider than a key, and than a value.
    pub padded: [bool; 2],
    /// Whether scores are capped.
    pub softcap: bool,
    /// Whether the LSE is written.
    pub lse: bool,
    /// The rules that hide keys.
    pub rules: Rules,
    /// Whether it reads a block mask, which says what masks leave of each block of keys.
    pub block_mask: bool,
    /// Whether sequences are packed.
    pub packed: bool,
    /// Whether queries and keys are rotated by their positions.
    pub rotary: Option<FlashRotary>,
    /// Whether the rows of an invocation are adjacent queries of one head.
    pub neighbours: bool,
}

/// How `flash.wgsl` rotates rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlashRotary {
    /// Number of vec4s of cosines per position, and equally many of sines; if interleaved, number of vec4s with two of
    /// each.
    pub pairs4: u32,
    /// Whether adjacent columns form a pair; else columns half the rotated width apart do.
    pub interleaved: bool,
}

/// Number of parts of a row to load or store per loop iteration: a few pieces of long code, and few selects.
fn at_once(count: u32) -> u32 {
    if count.is_multiple_of(2) { 2 } else { 1 }
}

/// A variant of `flash.wgsl`, or of `flash_tiled.wgsl`.
pub fn flash(flash_tile: FlashTile, access: FlashAccess, options: FlashOptions) -> Variant {
    let FlashOptions { padded, softcap, lse, rules, block_mask, packed, rotary, neighbours } = options;
    let FlashTile { tile, depth4, cols4 } = flash_tile;
    let kernel = if matches!(tile, Tile::Workgroup { .. }) { Kernel::FlashTiled } else { Kernel::Flash };
    let mut name = String::from(kernel.name());
    let shared = [
        ("share_k", "let k4 = subgroupBroadcast(loaded, d % SHARE);"),
        ("share_v", "let v4 = subgroupBroadcast(loaded, (d * KEYS + c) % SHARE);"),
        ("any_not_finite", "let any_not_finite = subgroupAny(any(has_not_finite));"),
    ];
    let (mut changes, keys, lanes) = match tile {
        Tile::Workgroup { workgroup, rows, across } => {
            name.push_str(&format!("/rows{rows}x{workgroup}/across{across}"));
            let parts = TiledParts::new([workgroup, rows, across], [depth4, cols4]);
            let changes = Changes::default()
                .number("WORKGROUP", workgroup)
                .number("ROWS", rows)
                .number("ACROSS", across)
                .number("PART4", parts.part4)
                .number("V_AT_ONCE", parts.v_at_once)
                .number("V_STRIPS", parts.v_strips)
                .number("ROW_LOADS", (rows * parts.part4).div_ceil(across))
                .number("ROWS4", parts.rows4)
                .number("ROW_PAD", parts.row_pad);
            (changes, parts.keys, None)
        }
        Tile::Registers { workgroup, rows, keys, share: lanes } => {
            let changes =
                share(Changes::default(), RowTile { workgroup, rows, share: lanes, depth4 }, &mut name, &shared)
                    .number("KEYS", keys)
                    .number("PAIRS", keys.min(4))
                    .number("GROUPS", keys.div_ceil(4))
                    .number("K_LOADS", depth4.div_ceil(lanes))
                    .number("Q_LOADS", at_once(depth4))
                    .number("O_STORES", at_once(cols4));
            (changes, keys, Some(lanes))
        }
    };
    changes = changes.number("DEPTH4", depth4).number("COLS4", cols4);
    changes = changes.flag("PADDED_K", padded[0]).flag("PADDED_V", padded[1]);
    let mark = |padded| if padded { "_padded" } else { "" };
    name.push_str(&format!("/keys{keys}/dims{}{}x{}{}", depth4 * 4, mark(padded[0]), cols4 * 4, mark(padded[1])));
    let FlashAccess { q, k, v, o } = access;
    changes = access::load(changes, &access::Q, q);
    changes = access::load(changes, &access::K, k);
    changes = access::load(changes, &access::V, v);
    changes = access::store(changes, o);
    access::name(&mut name, &[("q", q), ("k", k), ("v", v), ("o", o)]);
    changes = changes.flag("SOFTCAP", softcap);
    if softcap {
        name.push_str("/softcap");
    } else {
        changes = changes.line("tanh", "fn tanh_exact(x: vec4<f32>) -> vec4<f32> { return x; }");
    }
    if lse {
        name.push_str("/lse");
    } else {
        changes = changes.line("lse", "fn store_lse(at: u32, value: f32) {}");
    }
    changes = rules.apply(changes, &mut name);
    changes = rules.apply_relative(changes, &mut name);
    if !block_mask {
        changes = changes.line("block_mask", "fn next_key(work: Work, j: u32) -> u32 { return j; }");
    } else {
        name.push_str("/block_mask");
        changes = changes.number("BLOCK", MASK_BLOCK);
    }
    // A bias is added even if nothing is hidden.
    if !block_mask || rules.biases > 0 {
        changes = changes.line("block_is_full", "fn block_is_full(work: Work, j: u32) -> bool { return false; }");
    } else {
        changes = changes.number("BLOCKS", keys.div_ceil(MASK_BLOCK));
    }
    changes = sink(changes, rules.sink, &mut name);
    if lanes.is_some() {
        changes = match rules.relative {
            // The rows of an invocation are adjacent, so their biases by distance overlap.
            Some(RelativeKind::Fours) if neighbours => {
                name.push_str("/neighbours");
                changes.block("by_distance", Body::Or("neighbours")).number("NEAR", (tile.rows() + 3).div_ceil(4))
            }
            Some(_) => changes,
            None => changes.line("by_distance", ""),
        };
    }
    match rotary {
        None => {
            changes = changes.part("rotary", "rotary_none");
        }
        Some(FlashRotary { pairs4, interleaved: false }) => {
            name.push_str(&format!("/rotary{}", pairs4 * 8));
            changes = changes.number("PAIRS4", pairs4);
            if lanes.is_some() && 2 * pairs4 == depth4 {
                changes = changes.block("load_rows", Body::Or("halves"));
            }
            if let Some(lanes) = lanes.filter(|&lanes| pairs4.is_multiple_of(lanes)) {
                // A lane loads both halves of its pairs.
                changes = (changes.block("load_key", Body::Or("halves")).number("APART", pairs4 / lanes))
                    .line("part_k", "loaded = parts[d / SHARE];");
            }
        }
        Some(FlashRotary { pairs4, interleaved: true }) => {
            name.push_str(&format!("/rotary{}_interleaved", pairs4 * 4));
            changes = changes.part("rotary", "rotary_interleaved").number("PAIRS4", pairs4);
        }
    }
    if packed {
        name.push_str("/packed");
        changes = changes.part("bands", "bands_packed").part("sequence", "sequence_packed");
    }
    Variant { kernel, changes, name }
}
