//! Every kernel and its legal variants.

use super::access::{self, Access};
use super::specialise::{Changes, specialise};
use crate::error::{Result, value_error};
use crate::problem::Dtype;

/// A shader file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kernel {
    /// `S = scale · Q·Kᵀ`, softcap, bias, mask.
    Scores,
    /// `P = softmax(S)`, LSE.
    Softmax,
    /// `O = P·V`.
    WeightedSum,
    /// All three in one, without the scores in memory.
    Flash,
    /// Outputs of splits of the keys joined by their LSE.
    Merge,
    /// Weights, column sums and entropies recomputed from the LSE.
    Inspect,
    /// `Y = X·Wᵀ + b`.
    Project,
    /// Extra keys behind a projection.
    Append,
    /// Weights averaged over heads.
    MeanHeads,
    /// Masks, biases and bands as one bias.
    Fold,
    /// A strided view made row-major.
    Copy,
    /// Multiply-adds in registers, to measure an adapter.
    Probe,
    /// Rows written into a cache of keys or values.
    Scatter,
}

impl Kernel {
    /// All kernels.
    pub const ALL: [Kernel; 13] = [
        Kernel::Scores,
        Kernel::Softmax,
        Kernel::WeightedSum,
        Kernel::Flash,
        Kernel::Merge,
        Kernel::Inspect,
        Kernel::Project,
        Kernel::Append,
        Kernel::MeanHeads,
        Kernel::Fold,
        Kernel::Copy,
        Kernel::Probe,
        Kernel::Scatter,
    ];

    /// The file's name without its ending.
    pub fn name(self) -> &'static str {
        match self {
            Kernel::Scores => "scores",
            Kernel::Softmax => "softmax",
            Kernel::WeightedSum => "weighted_sum",
            Kernel::Flash => "flash",
            Kernel::Merge => "merge",
            Kernel::Inspect => "inspect",
            Kernel::Project => "project",
            Kernel::Append => "append",
            Kernel::MeanHeads => "mean_heads",
            Kernel::Fold => "fold",
            Kernel::Copy => "copy",
            Kernel::Probe => "probe",
            Kernel::Scatter => "scatter",
        }
    }

    /// The file's text.
    pub fn source(self) -> &'static str {
        match self {
            Kernel::Scores => include_str!("../../shaders/scores.wgsl"),
            Kernel::Softmax => include_str!("../../shaders/softmax.wgsl"),
            Kernel::WeightedSum => include_str!("../../shaders/weighted_sum.wgsl"),
            Kernel::Flash => include_str!("../../shaders/flash.wgsl"),
            Kernel::Merge => include_str!("../../shaders/merge.wgsl"),
            Kernel::Inspect => include_str!("../../shaders/inspect.wgsl"),
            Kernel::Project => include_str!("../../shaders/project.wgsl"),
            Kernel::Append => include_str!("../../shaders/append.wgsl"),
            Kernel::MeanHeads => include_str!("../../shaders/mean_heads.wgsl"),
            Kernel::Fold => include_str!("../../shaders/fold.wgsl"),
            Kernel::Copy => include_str!("../../shaders/copy.wgsl"),
            Kernel::Probe => include_str!("../../shaders/probe.wgsl"),
            Kernel::Scatter => include_str!("../../shaders/scatter.wgsl"),
        }
    }
}

/// A kernel with its changes: the key of a compiled pipeline.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Variant {
    /// The file.
    pub kernel: Kernel,
    /// What differs from it.
    pub changes: Changes,
    /// How a person tells it from others: `scores/subgroup8/wide`.
    pub name: String,
}

impl Variant {
    /// The WGSL text as it runs.
    pub fn source(&self) -> Result<String> {
        specialise(self.kernel.name(), self.kernel.source(), &self.changes)
    }

    /// True when the text uses subgroup operations.
    pub fn uses_subgroups(&self) -> bool {
        self.changes.blocks.contains_key("lane_builtin")
    }

    /// Bytes of workgroup memory the variant declares.
    pub fn workgroup_memory(&self) -> u32 {
        match self.kernel {
            // One f32 and one u32 per invocation.
            Kernel::Softmax if !self.changes.blocks.contains_key("join") => {
                8 * self.changes.consts.get("WORKGROUP").map_or(64, |w| w.trim_end_matches('u').parse().unwrap_or(64))
            }
            _ => 0,
        }
    }
}

/// How lanes work together on one tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    /// Invocations per workgroup.
    pub workgroup: u32,
    /// Rows per invocation.
    pub rows: u32,
    /// Lanes that share their loads through subgroup operations; 1 without.
    pub share: u32,
    /// vec4s of depth (or columns) kept in registers.
    pub depth4: u32,
}

/// Which rules of masking, and whether a sink, a variant reads from buffers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// A band per batch entry instead of one in the parameters.
    pub bands: bool,
    /// Boolean masks, 0 to 2.
    pub masks: u32,
    /// An additive bias.
    pub bias: bool,
    /// Whether any band hides anything.
    pub banded: bool,
    /// A sink per head.
    pub sink: bool,
}

impl Rules {
    /// Storage buffers that the rules of masking take.
    pub fn buffers(&self) -> u32 {
        u32::from(self.bands) + self.masks + u32::from(self.bias)
    }

    fn apply(&self, mut changes: Changes, name: &mut String) -> Changes {
        if self.bands {
            name.push_str("/bands");
        } else {
            changes = changes.block("bands", "fn band_of(b: u32) -> vec4<i32> { return params.band; }");
            if self.banded {
                name.push_str("/band");
            }
        }
        if self.masks < 1 {
            changes = changes.block("mask_a", "fn passes_a(b: u32, h: u32, i: u32, j: u32) -> bool { return true; }");
        }
        if self.masks < 2 {
            changes = changes.block("mask_b", "fn passes_b(b: u32, h: u32, i: u32, j: u32) -> bool { return true; }");
        }
        match self.masks {
            0 => {}
            1 => name.push_str("/mask"),
            _ => name.push_str("/masks"),
        }
        if self.bias {
            name.push_str("/bias");
        } else {
            changes = changes.block("bias", "fn bias_at(b: u32, h: u32, i: u32, j: u32) -> f32 { return 0.0; }");
        }
        changes.flag("BANDED", self.banded || self.bands)
    }
}

/// With a sink per head or without, for kernels that know of it.
fn sink(changes: Changes, given: bool, name: &mut String) -> Changes {
    if given {
        name.push_str("/sink");
        return changes.flag("SINK", true);
    }
    changes.flag("SINK", false).block("sink", "fn sink_of(h: u32) -> f32 { return 0.0; }")
}

const LANE_BUILTIN: &str = "    @builtin(subgroup_invocation_id) subgroup_lane: u32,";
const LANE: &str = "    let lane = subgroup_lane % SHARE;";

fn share(changes: Changes, tile: Tile, name: &mut String, blocks: &[(&'static str, &'static str)]) -> Changes {
    let changes = changes.number("WORKGROUP", tile.workgroup).number("ROWS", tile.rows).number("SHARE", tile.share);
    name.push_str(&format!("/rows{}x{}", tile.rows, tile.workgroup));
    if tile.share == 1 {
        return changes;
    }
    name.push_str(&format!("/subgroup{}", tile.share));
    let changes = changes.block("lane_builtin", LANE_BUILTIN).block("lane", LANE);
    blocks.iter().fold(changes, |changes, &(name, statement)| changes.block(name, statement))
}

/// A variant of `scores.wgsl`. `stage`: 0 scaled, 1 after the softcap, 2 after bias and mask.
pub fn scores(tile: Tile, q: Access, k: Access, padded: bool, softcap: bool, rules: Rules, stage: u32) -> Variant {
    let mut name = String::from("scores");
    let shared = [("share", "let k4 = subgroupBroadcast(mine, (c * DEPTH4 + d) % SHARE);")];
    let mut changes = share(Changes::default(), tile, &mut name, &shared);
    changes = changes.number("DEPTH4", tile.depth4).flag("PADDED", padded).flag("SOFTCAP", softcap);
    name.push_str(&format!("/depth{}{}", tile.depth4 * 4, if padded { "_padded" } else { "" }));
    changes = access::load(changes, &access::Q, "params.dim", "PADDED", q);
    changes = access::load(changes, &access::K, "params.dim", "PADDED", k);
    access::name(&mut name, &[("q", q), ("k", k)]);
    if softcap {
        name.push_str("/softcap");
    } else {
        changes = changes.block("tanh", "fn tanh_exact(x: vec4<f32>) -> vec4<f32> { return x; }");
    }
    changes = rules.apply(changes, &mut name).number("STAGE", stage);
    if stage < 2 {
        name.push_str(&format!("/stage{stage}"));
    }
    Variant { kernel: Kernel::Scores, changes, name }
}

/// A variant of `weighted_sum.wgsl`; `tile.depth4` counts columns.
pub fn weighted_sum(tile: Tile, v: Access, o: Access, accumulate: bool, rules: Rules) -> Variant {
    let mut name = String::from("weighted_sum");
    let shared = [("share", "let v4 = subgroupBroadcast(mine, (d * KEYS + c) % SHARE);")];
    let mut changes = share(Changes::default(), tile, &mut name, &shared);
    if tile.share > 1 {
        changes = changes.block("any_not_finite", "let careful = subgroupAny(any(found));");
    }
    changes = changes.number("COLS4", tile.depth4).flag("ACCUMULATE", accumulate);
    name.push_str(&format!("/columns{}", tile.depth4 * 4));
    changes = access::load(changes, &access::V, "params.dim", "true", v);
    changes = access::store(changes, "params.dim", "false", o);
    access::name(&mut name, &[("v", v), ("o", o)]);
    if accumulate {
        name.push_str("/accumulate");
    }
    changes = sink(rules.apply(changes, &mut name), rules.sink, &mut name);
    Variant { kernel: Kernel::WeightedSum, changes, name }
}

/// How `flash.wgsl` is cut: every width stands in registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlashTile {
    /// Invocations per workgroup.
    pub workgroup: u32,
    /// Rows per invocation.
    pub rows: u32,
    /// Keys per step, at most 8.
    pub keys: u32,
    /// Lanes that share their loads through subgroup operations; 1 without.
    pub share: u32,
    /// vec4s of a query and a key.
    pub depth4: u32,
    /// vec4s of a value.
    pub cols4: u32,
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

/// A variant of `flash.wgsl`; `packed`: sequences of any lengths one behind another.
pub fn flash(
    tile: FlashTile,
    access: FlashAccess,
    padded: [bool; 2],
    softcap: bool,
    lse: bool,
    rules: Rules,
    packed: bool,
) -> Variant {
    let mut name = String::from("flash");
    let shared = [
        ("share_k", "let k4 = subgroupBroadcast(mine, d % SHARE);"),
        ("share_v", "let v4 = subgroupBroadcast(mine, (d * KEYS + c) % SHARE);"),
        ("any_not_finite", "let careful = subgroupAny(any(found));"),
    ];
    let FlashTile { workgroup, rows, keys, share: lanes, depth4, cols4 } = tile;
    let mut changes = share(Changes::default(), Tile { workgroup, rows, share: lanes, depth4 }, &mut name, &shared);
    changes = changes.number("KEYS", keys).number("GROUPS", keys.div_ceil(4)).number("DEPTH4", depth4);
    changes = changes.number("COLS4", cols4).number("K_LOADS", depth4.div_ceil(lanes));
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
    changes = sink(changes, rules.sink, &mut name);
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
    Variant { kernel: Kernel::Flash, changes, name }
}

/// A variant of `merge.wgsl`.
pub fn merge(lse: bool, o: Access) -> Variant {
    let mut name = String::from("merge");
    let mut changes = access::store(Changes::default(), "params.dim", "false", o);
    access::name(&mut name, &[("o", o)]);
    if lse {
        name.push_str("/lse");
    } else {
        changes = changes.block("lse", "fn store_lse(at: u32, value: f32) {}");
    }
    Variant { kernel: Kernel::Merge, changes, name }
}

/// `merge.wgsl` over two results that lie apart, at any strides.
pub fn merge_pair() -> Variant {
    let changes = Changes::default().block(
        "parts",
        "@group(0) @binding(1) var<storage, read> out_a: array<f32>;
@group(0) @binding(2) var<storage, read> lse_a: array<f32>;
@group(0) @binding(5) var<storage, read> out_b: array<f32>;
@group(0) @binding(6) var<storage, read> lse_b: array<f32>;
fn lse_of(s: u32, row: u32, bhi: vec3<u32>) -> f32 {
    if (s == 0u) {
        return lse_a[params.a_lse_offset + dot(params.a_lse_strides, bhi)];
    }
    return lse_b[params.b_lse_offset + dot(params.b_lse_strides, bhi)];
}
fn part_of(s: u32, row: u32, bhi: vec3<u32>, column: u32) -> vec4<f32> {
    if (s == 0u) {
        let step = params.a_strides.w;
        let at = params.a_offset + dot(params.a_strides.xyz, bhi) + column * step;
        return vec4<f32>(out_a[at], out_a[at + step], out_a[at + 2u * step], out_a[at + 3u * step]);
    }
    let step = params.b_strides.w;
    let at = params.b_offset + dot(params.b_strides.xyz, bhi) + column * step;
    return vec4<f32>(out_b[at], out_b[at + step], out_b[at + 2u * step], out_b[at + 3u * step]);
}",
    );
    Variant { kernel: Kernel::Merge, changes, name: "merge/pair".into() }
}

/// What a variant of `inspect.wgsl` computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inspection {
    /// `P`
    Weights,
    /// `Σ_i P`
    ColumnSums,
    /// `−Σ_j P·ln P`
    Entropy,
}

/// A variant of `inspect.wgsl`; a head is read in `chunks` of the tile's depth. Column sums keep the keys
/// in registers and walk over the queries, the others keep the queries.
pub fn inspect(
    inspection: Inspection,
    tile: Tile,
    chunks: u32,
    [kept, walked]: [Access; 2],
    padded: bool,
    softcap: bool,
    rules: Rules,
) -> Variant {
    let (result, word) = match inspection {
        Inspection::Weights => (0, "weights"),
        Inspection::ColumnSums => (1, "column_sums"),
        Inspection::Entropy => (2, "entropy"),
    };
    let mut name = format!("inspect/{word}");
    let shared = [
        ("share", "let y4 = subgroupBroadcast(mine, (c * DEPTH4 + d) % SHARE);"),
        (
            "share_lse",
            "let one = lse_of(b, h, min(at + lane % 4u, params.len_q - 1u));
step_lse = vec4<f32>(
    subgroupBroadcast(one, 0u), subgroupBroadcast(one, 1u), subgroupBroadcast(one, 2u), subgroupBroadcast(one, 3u),
);",
        ),
    ];
    let mut changes = share(Changes::default(), tile, &mut name, &shared).number("RESULT", result);
    changes = changes.number("DEPTH4", tile.depth4).number("CHUNKS", chunks).flag("PADDED", padded);
    name.push_str(&format!("/depth{}x{chunks}{}", tile.depth4 * 4, if padded { "_padded" } else { "" }));
    changes = access::load(changes, &access::KEPT, "params.dim", "PADDED", kept);
    changes = access::load(changes, &access::WALKED, "params.dim", "PADDED", walked);
    access::name(&mut name, &[("x", kept), ("y", walked)]);
    if inspection == Inspection::Weights {
        changes = changes.alias("OElem", "vec4<f32>").block(
            "store",
            "fn store_weights(at: u32, weights: vec4<f32>) { o[at / 4u] = weights; }
fn store_sum(at: u32, sum: f32) {}",
        );
    }
    changes = changes.flag("SOFTCAP", softcap);
    if softcap {
        name.push_str("/softcap");
    } else {
        changes = changes.block("tanh", "fn tanh_exact(x: vec4<f32>) -> vec4<f32> { return x; }");
    }
    changes = rules.apply(changes, &mut name);
    Variant { kernel: Kernel::Inspect, changes, name }
}

/// A variant of `softmax.wgsl`: `lanes` invocations per row.
pub fn softmax(workgroup: u32, lanes: u32, lse: bool, with_sink: bool) -> Variant {
    let mut name = format!("softmax/lanes{lanes}x{}", workgroup / lanes);
    let mut changes = Changes::default().number("WORKGROUP", workgroup).number("LANES", lanes).flag("LSE", lse);
    if lse {
        name.push_str("/lse");
    } else {
        changes = changes.block("lse", "fn store_lse(row: u32, value: f32) {}");
    }
    changes = sink(changes, with_sink, &mut name);
    if lanes == 1 {
        changes = changes.block(
            "join",
            "fn join_max(local: u32, x: f32) -> f32 { return x; }
fn join_sum(local: u32, x: f32) -> f32 { return x; }
fn join_nan(local: u32, x: bool) -> bool { return x; }",
        );
    }
    Variant { kernel: Kernel::Softmax, changes, name }
}

/// A variant of `project.wgsl`.
pub fn project(tile: Tile, x: Access, w: Access, wide_y: bool, padded: bool, bias: bool) -> Variant {
    let mut name = String::from("project");
    let shared = [("share", "let w4 = subgroupBroadcast(mine, d % SHARE);")];
    let mut changes = share(Changes::default(), tile, &mut name, &shared);
    // A few loads at a time, as many as divide the depth.
    let loads = [4, 2, 1].into_iter().find(|n| tile.depth4.is_multiple_of(*n)).unwrap_or(1);
    changes = changes.number("DEPTH4", tile.depth4).number("LOADS", loads).number("GROUPS", tile.depth4 / loads);
    changes = changes.flag("PADDED", padded);
    name.push_str(&format!("/depth{}{}", tile.depth4 * 4, if padded { "_padded" } else { "" }));
    changes = access::load(changes, &access::X, "params.dim_in", "PADDED", x);
    changes = access::load(changes, &access::W, "params.dim_in", "PADDED", w);
    if wide_y {
        changes = changes.alias("YElem", "vec4<f32>").block(
            "y_vector",
            "fn load_y(at: u32, o: u32) -> vec4<f32> { return y[(at + o) / 4u]; }
fn store_y(at: u32, o: u32, value: vec4<f32>) { y[(at + o) / 4u] = value; }",
        );
    }
    access::name(&mut name, &[("x", x), ("w", w), ("y", Access { wide: wide_y, ..Access::NARROW })]);
    if !bias {
        changes = changes.block("bias", "fn bias_of(o: u32) -> vec4<f32> { return vec4<f32>(); }");
    } else {
        name.push_str("/bias");
    }
    Variant { kernel: Kernel::Project, changes, name }
}

/// A variant of `append.wgsl`: a learned row, or zeros.
pub fn append(zeros: bool) -> Variant {
    if !zeros {
        return Variant { kernel: Kernel::Append, changes: Changes::default(), name: "append".into() };
    }
    let changes = Changes::default().block("row", "fn value_of(d: u32) -> f32 { return 0.0; }");
    Variant { kernel: Kernel::Append, changes, name: "append/zeros".into() }
}

/// A variant of `mean_heads.wgsl`.
pub fn mean_heads(accumulate: bool) -> Variant {
    let name = if accumulate { "mean_heads/accumulate" } else { "mean_heads" };
    let changes = Changes::default().flag("ACCUMULATE", accumulate);
    Variant { kernel: Kernel::MeanHeads, changes, name: name.into() }
}

/// What `fold.wgsl` reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FoldSource {
    /// An additive bias.
    Bias,
    /// A boolean mask.
    Mask,
    /// A band per batch entry.
    Bands,
}

/// A variant of `fold.wgsl`.
pub fn fold(source: FoldSource, accumulate: bool) -> Variant {
    let (number, word) = match source {
        FoldSource::Bias => (0, "bias"),
        FoldSource::Mask => (1, "mask"),
        FoldSource::Bands => (2, "bands"),
    };
    let changes = Changes::default().number("SOURCE", number).flag("ACCUMULATE", accumulate);
    let name = format!("fold/{word}{}", if accumulate { "/accumulate" } else { "" });
    Variant { kernel: Kernel::Fold, changes, name }
}

/// `copy.wgsl` from a buffer that holds `stored`.
pub fn copy(stored: Dtype) -> Variant {
    let mut name = String::from("copy");
    access::name(&mut name, &[("x", Access { wide: false, stored })]);
    Variant { kernel: Kernel::Copy, changes: access::element(Changes::default(), stored), name }
}

/// Floating-point operations of one invocation of `probe.wgsl` in one round: chains, links, and two for a
/// multiply-add.
pub const PROBE_OPERATIONS: u32 = 9 * 32 * 2;

/// A variant of `probe.wgsl`.
pub fn probe(workgroup: u32) -> Variant {
    let changes = Changes::default().number("WORKGROUP", workgroup);
    Variant { kernel: Kernel::Probe, changes, name: format!("probe/{workgroup}") }
}

/// A variant of `scatter.wgsl` into a cache that holds `stored`.
pub fn scatter(x: Access, stored: Dtype) -> Variant {
    let mut name = String::from("scatter");
    let changes = access::load(Changes::default(), &access::ROWS, "params.dim", "false", x);
    let y = Access { wide: true, stored };
    access::name(&mut name, &[("x", x), ("y", y)]);
    Variant { kernel: Kernel::Scatter, changes: access::store_fours(changes, y), name }
}

/// Every legal variant at the tile sizes that planning chooses from, one for each combination of
/// algorithmic choices. Used to print them and to hold them against compilers without a GPU.
pub fn variants() -> Vec<Variant> {
    let mut all = Vec::new();
    let [wide, narrow] = [Access::WIDE, Access::NARROW];
    let halves = |stored| [true, false].map(|wide| Access { wide, stored });
    let rules = [
        Rules::default(),
        Rules { banded: true, ..Rules::default() },
        Rules { masks: 1, ..Rules::default() },
        Rules { bias: true, ..Rules::default() },
        Rules { bands: true, masks: 2, bias: true, banded: true, sink: false },
    ];
    let with_sink = Rules { sink: true, ..Rules::default() };
    for (workgroup, share, depth4) in
        [(8, 1, 16), (8, 4, 16), (8, 8, 16), (64, 1, 8), (64, 8, 8), (8, 4, 13), (8, 8, 10), (8, 4, 1)]
    {
        for rows in [1, 2, 4] {
            let tile = Tile { workgroup, rows, share, depth4 };
            let wide_choices: &[bool] = if rows == 4 { &[true, false] } else { &[true] };
            for &is_wide in wide_choices {
                let access = if is_wide { Access::WIDE } else { Access::NARROW };
                for rules in rules {
                    if rows < 4 && rules != Rules::default() {
                        continue;
                    }
                    all.push(scores(tile, access, access, !is_wide, rules.masks == 1, rules, 2));
                    all.push(weighted_sum(tile, access, access, false, rules));
                }
                all.push(project(tile, access, access, is_wide, !is_wide, is_wide));
            }
            if rows == 4 {
                let (f16, bf16) = (halves(Dtype::F16), halves(Dtype::BF16));
                let plain = Rules::default();
                all.push(scores(tile, wide, narrow, true, true, plain, 0));
                all.push(scores(tile, narrow, wide, true, true, plain, 1));
                all.push(scores(tile, f16[0], bf16[1], true, false, plain, 2));
                all.push(scores(tile, bf16[0], f16[1], true, false, plain, 2));
                all.push(weighted_sum(tile, narrow, wide, true, plain));
                all.push(weighted_sum(tile, wide, narrow, true, plain));
                all.extend([wide, narrow].map(|o| weighted_sum(tile, narrow, o, false, with_sink)));
                all.push(weighted_sum(tile, f16[0], narrow, false, plain));
                all.push(project(tile, wide, narrow, false, true, true));
                all.push(project(tile, f16[0], bf16[0], true, false, true));
            }
        }
    }
    for (workgroup, share, depth4, cols4, keys) in [
        (8, 1, 16, 16, 4),
        (8, 4, 16, 16, 4),
        (8, 8, 16, 16, 4),
        (64, 1, 16, 16, 4),
        (64, 8, 16, 16, 4),
        (8, 8, 32, 16, 2),
        (8, 8, 128, 128, 1),
        (8, 4, 1, 3, 4),
    ] {
        for rows in [1, 4] {
            let tile = FlashTile { workgroup, rows, keys, share, depth4, cols4 };
            let all_wide = FlashAccess { q: wide, k: wide, v: wide, o: wide };
            let all_narrow = FlashAccess { q: narrow, k: narrow, v: narrow, o: narrow };
            for (n, rules) in rules.into_iter().enumerate() {
                let access = if n == 2 { all_narrow } else { all_wide };
                // Seven buffers at most, the four operands among them.
                let rules = Rules { masks: rules.masks.min(1), ..rules };
                let lse = rules.buffers() < 3;
                if rows == 4 || n == 0 {
                    all.push(flash(tile, access, [n == 2; 2], n == 2, lse, rules, false));
                }
            }
            let mut mixed = vec![
                FlashAccess { k: narrow, v: narrow, ..all_wide },
                FlashAccess { q: narrow, o: narrow, ..all_wide },
            ];
            for stored in [Dtype::F16, Dtype::BF16] {
                let [wide, narrow] = halves(stored);
                mixed.push(FlashAccess { q: wide, k: wide, v: wide, o: wide });
                mixed.push(FlashAccess { q: narrow, k: narrow, v: narrow, o: Access::NARROW });
            }
            for banded in [false, true] {
                let rules = Rules { banded, ..Rules::default() };
                all.push(flash(tile, all_wide, [false; 2], false, banded, rules, true));
            }
            // Seven buffers with the LSE and a mask.
            all.push(flash(tile, all_wide, [false; 2], false, false, with_sink, false));
            all.push(flash(tile, all_narrow, [true; 2], true, true, Rules { masks: 1, ..with_sink }, false));
            all.push(flash(tile, all_wide, [false; 2], false, true, with_sink, true));
            for access in mixed {
                all.push(flash(tile, access, [true, false], false, false, Rules::default(), false));
            }
        }
    }
    all.extend([merge(true, wide), merge(true, narrow), merge(false, narrow), merge_pair()]);
    all.extend([Dtype::F16, Dtype::BF16].map(|stored| merge(false, Access { wide: true, stored })));
    for stored in [Dtype::F32, Dtype::F16, Dtype::BF16] {
        all.extend([true, false].map(|wide| scatter(Access { wide, stored }, Dtype::F32)));
        all.extend([true, false].map(|wide| scatter(Access { wide, ..Access::WIDE }, stored)));
    }
    for (workgroup, rows, share, depth4, chunks) in [
        (8, 4, 1, 16, 1),
        (8, 4, 8, 16, 1),
        (8, 1, 4, 1, 1),
        (8, 1, 8, 66, 2),
        (64, 2, 1, 16, 1),
        (64, 2, 8, 16, 1),
        (64, 1, 4, 27, 3),
    ] {
        let tile = Tile { workgroup, rows, share, depth4 };
        for inspection in [Inspection::Weights, Inspection::ColumnSums, Inspection::Entropy] {
            for (n, rules) in rules.into_iter().enumerate() {
                // Seven buffers at most, the four operands among them.
                let rules = Rules { masks: rules.masks.min(1), ..rules };
                let access = if n == 1 { narrow } else { wide };
                all.push(inspect(inspection, tile, chunks, [access; 2], n == 1, n == 2, rules));
            }
            all.push(inspect(inspection, tile, chunks, [wide, narrow], true, false, Rules::default()));
            all.push(inspect(inspection, tile, chunks, [narrow, wide], true, false, Rules::default()));
            let (f16, bf16) = (halves(Dtype::F16), halves(Dtype::BF16));
            all.push(inspect(inspection, tile, chunks, [f16[0], bf16[1]], true, false, Rules::default()));
            all.push(inspect(inspection, tile, chunks, [bf16[0], f16[1]], true, false, Rules::default()));
        }
    }
    for (workgroup, lanes) in [(8, 1), (64, 64), (64, 32)] {
        for with_sink in [false, true] {
            all.extend([true, false].map(|lse| softmax(workgroup, lanes, lse, with_sink)));
        }
    }
    all.extend([append(false), append(true), mean_heads(false), mean_heads(true)]);
    all.extend([Dtype::F32, Dtype::F16, Dtype::BF16].map(copy));
    all.extend([probe(8), probe(64)]);
    for source in [FoldSource::Bias, FoldSource::Mask, FoldSource::Bands] {
        all.extend([fold(source, false), fold(source, true)]);
    }
    let mut seen = std::collections::BTreeSet::new();
    all.retain(|variant| seen.insert(variant.name.clone()));
    all
}

/// The names of [`variants`], and of the shader files themselves.
pub fn variant_names() -> Vec<String> {
    let files = Kernel::ALL.iter().map(|kernel| format!("{}.wgsl", kernel.name()));
    files.chain(variants().into_iter().map(|variant| variant.name)).collect()
}

/// The WGSL of a variant as it runs, or of a file as it stands (`scores.wgsl`).
pub fn variant_source(name: &str) -> Result<String> {
    if let Some(kernel) = Kernel::ALL.iter().find(|kernel| name.strip_suffix(".wgsl") == Some(kernel.name())) {
        return Ok(kernel.source().to_string());
    }
    let mut all = variants();
    match all.iter().position(|variant| variant.name == name) {
        Some(at) => all.swap_remove(at).source(),
        None => {
            let near: Vec<String> = variant_names().into_iter().filter(|known| known.contains(name)).take(8).collect();
            Err(value_error!(
                "no kernel variant is called {name}; {}",
                if near.is_empty() {
                    "`attn shader` without a name lists them".into()
                } else {
                    format!("did you mean {}?", near.join(", "))
                }
            ))
        }
    }
}
