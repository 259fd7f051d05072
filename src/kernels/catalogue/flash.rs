//! Variants of the fused kernels.

use super::{CLASS_TILE, Changes, Kernel, RelativeKind, Rules, Tile, Variant, share, sink};
use crate::kernels::access::{self, Access};

/// Rows per invocation of `flash_tiled.wgsl`.
pub const TILED_ROWS: u32 = 4;
/// Keys per step of it; no cut of `flash.wgsl` has as many.
pub const TILED_KEYS: u32 = 32;
/// Invocations that share a row of it.
pub const TILED_ACROSS: u32 = 8;

/// Bytes of workgroup memory of `flash_tiled.wgsl`: four vec4s and four numbers per invocation, the part of the
/// keys, one flag.
pub const fn tiled_memory(workgroup: u32) -> u32 {
    workgroup.saturating_mul(TILED_ROWS * 20).saturating_add(TILED_KEYS * TILED_ACROSS * 16 + 4)
}

/// How `flash.wgsl` and `flash_tiled.wgsl` are cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlashTile {
    /// Invocations per workgroup.
    pub workgroup: u32,
    /// Rows per invocation.
    pub rows: u32,
    /// Keys per step, at most 8; [`TILED_KEYS`]: through workgroup memory.
    pub keys: u32,
    /// Lanes that share their loads through subgroup operations; 1 without.
    pub share: u32,
    /// vec4s of a query and a key.
    pub depth4: u32,
    /// vec4s of a value.
    pub cols4: u32,
}

impl FlashTile {
    /// Whether tiles stand in workgroup memory.
    pub fn is_tiled(&self) -> bool {
        self.keys == TILED_KEYS
    }
    /// Rows per workgroup.
    pub fn block_rows(&self) -> usize {
        let across = if self.is_tiled() { TILED_ACROSS } else { 1 };
        (self.workgroup * self.rows / across) as usize
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

/// What a variant of `flash.wgsl` does beside the products.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlashOptions {
    /// Whether the registers hold more than the width of a key, of a value.
    pub padded: [bool; 2],
    /// Whether scores are capped.
    pub softcap: bool,
    /// Whether the LSE is written.
    pub lse: bool,
    /// What hides keys.
    pub rules: Rules,
    /// Whether tiles of keys were classed by what masks leave of them.
    pub tiles: bool,
    /// Whether sequences of any lengths lie one behind another.
    pub packed: bool,
    /// Whether queries and keys are turned by their positions.
    pub rotary: Option<FlashRotary>,
    /// Whether the rows of an invocation are neighbouring queries of one head.
    pub runs: bool,
}

/// How `flash.wgsl` turns rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlashRotary {
    /// vec4s of cosines, as many of sines, per position; interleaved, vec4s of two of each.
    pub pairs4: u32,
    /// Whether neighbouring columns turn together; else those half of the turned ones apart.
    pub interleaved: bool,
}

/// The rows of Q, halves turned together.
const QUERY_HALVES_TURNED: &str = "for (var d = 0u; d < PAIRS4; d++) {
    // @unroll
    for (var r = 0u; r < ROWS; r++) {
        let at = u32(i32(query[r] + params.row_0) + band.w) * 2u * PAIRS4 + d;
        let cosine = angles[at];
        let sine = angles[at + PAIRS4];
        let low = load_q(q_base[r], d);
        let high = load_q(q_base[r], d + PAIRS4);
        let turned_low = low * cosine - high * sine;
        let turned_high = high * cosine + low * sine;
        // @unroll
        for (var e = 0u; e < PAIRS4; e++) {
            q_tile[r * DEPTH4 + e] = select(q_tile[r * DEPTH4 + e], turned_low, d == e);
            q_tile[r * DEPTH4 + PAIRS4 + e] = select(q_tile[r * DEPTH4 + PAIRS4 + e], turned_high, d == e);
        }
    }
}";

/// Parts of a row that are loaded or stored between two turns of a loop: few pieces of long code, and few selects.
fn at_once(count: u32) -> u32 {
    if count.is_multiple_of(2) { 2 } else { 1 }
}

/// A key's vec4s of a lane, those `apart` loads from each other turned together.
fn halves_turned(apart: u32) -> String {
    format!(
        "var brought = array<vec4<f32>, K_LOADS>();
// @unroll
for (var n = 0u; n < K_LOADS; n++) {{
    brought[n] = load_k(key, k_part[n]);
}}
// @unroll
for (var n = 0u; n < {apart}u; n++) {{
    let at = position * 2u * PAIRS4 + k_part[n];
    let cosine = angles[at];
    let sine = angles[at + PAIRS4];
    let low = brought[n];
    let high = brought[n + {apart}u];
    brought[n] = low * cosine - high * sine;
    brought[n + {apart}u] = high * cosine + low * sine;
}}"
    )
}

/// What the distances of `rows` neighbouring queries add to 4 · `groups` keys: `rows + 3` values for each four.
fn relative_runs(rows: u32, groups: u32) -> String {
    let mut text = String::new();
    for g in 0..groups {
        text.push_str(&format!("{{ let first = away(query[{}u], j + {}u, band);\n", rows - 1, 4 * g));
        for n in 0..(rows + 3).div_ceil(4) {
            text.push_str(&format!("let x{n} = relative_at(relative_from[0u], first + vec4<i32>({}));\n", 4 * n));
        }
        let value = |at: u32| format!("x{}[{}]", at / 4, at % 4);
        for r in 0..rows {
            let [a, b, c, d] = [0, 1, 2, 3].map(|e| value(rows - 1 - r + e));
            text.push_str(&format!("more[{}u] = vec4<f32>({a}, {b}, {c}, {d});\n", r * groups + g));
        }
        text.push_str("}\n");
    }
    text
}

/// A variant of `flash.wgsl`, or of `flash_tiled.wgsl`.
pub fn flash(tile: FlashTile, access: FlashAccess, options: FlashOptions) -> Variant {
    let FlashOptions { padded, softcap, lse, rules, tiles, packed, rotary, runs } = options;
    let kernel = if tile.is_tiled() { Kernel::FlashTiled } else { Kernel::Flash };
    let mut name = String::from(kernel.name());
    let shared = [
        ("share_k", "let k4 = subgroupBroadcast(mine, d % SHARE);"),
        ("share_v", "let v4 = subgroupBroadcast(mine, (d * KEYS + c) % SHARE);"),
        ("any_not_finite", "let careful = subgroupAny(any(found));"),
    ];
    let FlashTile { workgroup, rows, keys, share: lanes, depth4, cols4 } = tile;
    let mut changes = if tile.is_tiled() {
        name.push_str(&format!("/rows{rows}x{workgroup}"));
        Changes::default()
            .number("WORKGROUP", workgroup)
            .number("BLOCK_ROWS", tile.block_rows() as u32)
            .number("KEY_LOADS", TILED_KEYS * TILED_ACROSS / workgroup)
            .number("K_PARTS", depth4.div_ceil(TILED_ACROSS))
            .number("V_PARTS", cols4.div_ceil(TILED_ACROSS))
    } else {
        share(Changes::default(), Tile { workgroup, rows, share: lanes, depth4 }, &mut name, &shared)
            .number("KEYS", keys)
            .number("GROUPS", keys.div_ceil(4))
            .number("K_LOADS", depth4.div_ceil(lanes))
            .number("Q_LOADS", at_once(depth4))
            .number("O_STORES", at_once(cols4))
    };
    changes = changes.number("DEPTH4", depth4).number("COLS4", cols4);
    changes = changes.flag("PADDED_K", padded[0]).flag("PADDED_V", padded[1]);
    let mark = |padded| if padded { "_padded" } else { "" };
    name.push_str(&format!("/keys{keys}/dims{}{}x{}{}", depth4 * 4, mark(padded[0]), cols4 * 4, mark(padded[1])));
    let FlashAccess { q, k, v, o } = access;
    changes = access::load(changes, &access::Q, "params.dim_k", "PADDED_K", q);
    changes = access::load(changes, &access::K, "params.dim_k", "PADDED_K", k);
    changes = access::load(changes, &access::V, "params.dim_v", "PADDED_V", v);
    changes = access::store(changes, "params.dim_v", "!PADDED_V", o);
    access::name(&mut name, &[("q", q), ("k", k), ("v", v), ("o", o)]);
    changes = changes.flag("SOFTCAP", softcap);
    if softcap {
        name.push_str("/softcap");
    } else {
        changes = changes.block("tanh", "fn tanh_exact(x: vec4<f32>) -> vec4<f32> { return x; }");
    }
    if lse {
        name.push_str("/lse");
    } else {
        changes = changes.block("lse", "fn store_lse(at: u32, value: f32) {}");
    }
    changes = rules.apply(changes, &mut name).flag("LISTED", rules.masks > 0 || rules.bias);
    changes = rules.apply_relative(changes, &mut name);
    if !tiles {
        changes = changes.block("tiles", "fn next_key(row: u32, j: u32, end: u32) -> u32 { return j; }");
    } else {
        name.push_str("/tiles");
        changes = changes.number("TILE", CLASS_TILE);
    }
    // A bias is added where nothing is hidden too.
    if !tiles || rules.bias {
        changes = changes.block("all_seen", "fn all_seen(row: u32, j: u32) -> bool { return false; }");
    }
    changes = sink(changes, rules.sink, &mut name);
    if !tile.is_tiled() {
        changes = match rules.relative {
            // The rows of an invocation are neighbours: what their distances add overlaps.
            Some(RelativeKind::Fours) if runs => {
                name.push_str("/runs");
                changes.block("relative_step", relative_runs(rows, keys.div_ceil(4)))
            }
            Some(_) => changes,
            None => changes.block("relative_step", ""),
        };
    }
    match rotary {
        None => {
            changes = changes.block(
                "turn",
                "fn turned_q(at: u32, d4: u32, position: u32) -> vec4<f32> { return load_q(at, d4); }
fn turned_k(at: u32, d4: u32, position: u32) -> vec4<f32> { return load_k(at, d4); }",
            );
        }
        Some(FlashRotary { pairs4, interleaved: false }) => {
            name.push_str(&format!("/rotary{}", pairs4 * 8));
            changes = changes.number("PAIRS4", pairs4);
            if !tile.is_tiled() && 2 * pairs4 == depth4 {
                changes = changes.block("bring_q", QUERY_HALVES_TURNED);
            }
            if !tile.is_tiled() && pairs4.is_multiple_of(lanes) {
                // A lane loads both halves of its pairs.
                changes = changes
                    .block("bring_k", halves_turned(pairs4 / lanes))
                    .block("part_k", "mine = brought[d / SHARE];");
            }
        }
        Some(FlashRotary { pairs4, interleaved: true }) => {
            name.push_str(&format!("/rotary{}_interleaved", pairs4 * 4));
            changes = changes.block(
                "turn",
                format!(
                    "@group(0) @binding(13) var<storage, read> angles: array<vec4<f32>>;
fn turned(x: vec4<f32>, d4: u32, position: u32) -> vec4<f32> {{
    let angle = angles[position * {pairs4}u + min(d4, {pairs4}u - 1u)];
    let y = x * angle.xxyy + x.yxwz * vec4<f32>(-angle.z, angle.z, -angle.w, angle.w);
    return select(y, x, vec4<bool>(d4 >= {pairs4}u));
}}
fn turned_q(at: u32, d4: u32, position: u32) -> vec4<f32> {{ return turned(load_q(at, d4), d4, position); }}
fn turned_k(at: u32, d4: u32, position: u32) -> vec4<f32> {{ return turned(load_k(at, d4), d4, position); }}"
                ),
            );
        }
    }
    if packed {
        // Two entries per sequence (where its rows and keys lie, its band and keys per split), then for every
        // block of rows the sequence and the block in it.
        name.push_str("/packed");
        changes = changes
            .block(
                "bands",
                "@group(0) @binding(4) var<storage, read> bands: array<vec4<i32>>;
fn band_of(s: u32) -> vec4<i32> { return bands[2u * s + 1u]; }",
            )
            .block(
                "sequence",
                "fn sequence_of(block: u32, b: u32) -> Sequence {
    let at = vec4<u32>(bands[params.batch_0 + block]);
    let place = vec4<u32>(bands[2u * at.x]);
    return Sequence(at.x, 0u, at.y, place.x, place.y, place.z, place.w, u32(band_of(at.x).w));
}",
            );
    }
    Variant { kernel, changes, name }
}
