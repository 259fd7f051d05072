//! Every kernel and its legal variants.

use super::specialise::{Changes, specialise};
use crate::error::{Result, value_error};

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
}

impl Kernel {
    /// All kernels.
    pub const ALL: [Kernel; 11] = [
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

/// Which rules of masking a variant reads from buffers.
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
}

impl Rules {
    /// Storage buffers that the rules take.
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

/// `/wide` when every operand is read in vec4s, else the letters of those that are.
fn name_wide(name: &mut String, operands: &[(&str, bool)]) {
    if operands.iter().all(|&(_, wide)| wide) {
        name.push_str("/wide");
    } else if operands.iter().any(|&(_, wide)| wide) {
        name.push_str("/wide_");
        name.extend(operands.iter().filter(|&&(_, wide)| wide).map(|&(letter, _)| letter));
    }
}

/// A variant of `scores.wgsl`. `stage`: 0 scaled, 1 after the softcap, 2 after bias and mask.
pub fn scores(
    tile: Tile,
    wide_q: bool,
    wide_k: bool,
    padded: bool,
    softcap: bool,
    rules: Rules,
    stage: u32,
) -> Variant {
    let mut name = String::from("scores");
    let shared = [("share", "let k4 = subgroupBroadcast(mine, (c * DEPTH4 + d) % SHARE);")];
    let mut changes = share(Changes::default(), tile, &mut name, &shared);
    changes = changes.number("DEPTH4", tile.depth4).flag("PADDED", padded).flag("SOFTCAP", softcap);
    name.push_str(&format!("/depth{}{}", tile.depth4 * 4, if padded { "_padded" } else { "" }));
    if wide_q {
        changes = changes.alias("QElem", "vec4<f32>").block(
            "load_q",
            "fn load_q(at: u32, d4: u32) -> vec4<f32> {
    return select(q[at / 4u + d4], vec4<f32>(), PADDED && d4 * 4u >= params.dim);
}",
        );
    }
    if wide_k {
        changes = changes.alias("KElem", "vec4<f32>").block(
            "load_k",
            "fn load_k(at: u32, d4: u32) -> vec4<f32> {
    return select(k[at / 4u + d4], vec4<f32>(), PADDED && d4 * 4u >= params.dim);
}",
        );
    }
    name_wide(&mut name, &[("q", wide_q), ("k", wide_k)]);
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
pub fn weighted_sum(tile: Tile, wide_v: bool, wide_o: bool, accumulate: bool, rules: Rules) -> Variant {
    let mut name = String::from("weighted_sum");
    let shared = [("share", "let v4 = subgroupBroadcast(mine, (d * KEYS + c) % SHARE);")];
    let mut changes = share(Changes::default(), tile, &mut name, &shared);
    if tile.share > 1 {
        changes = changes.block("any_not_finite", "let careful = subgroupAny(any(found));");
    }
    changes = changes.number("COLS4", tile.depth4).flag("ACCUMULATE", accumulate);
    name.push_str(&format!("/columns{}", tile.depth4 * 4));
    if wide_v {
        changes = changes.alias("VElem", "vec4<f32>").block(
            "load_v",
            "fn load_v(at: u32, d4: u32) -> vec4<f32> {
    return select(v[at / 4u + d4], vec4<f32>(), d4 * 4u >= params.dim);
}",
        );
    }
    if wide_o {
        changes = changes.alias("OElem", "vec4<f32>").block(
            "store_o",
            "fn store_o(at: u32, d4: u32, value: vec4<f32>, add: bool) {
    if (d4 * 4u < params.dim) {
        if (add) {
            o[at / 4u + d4] += value;
        } else {
            o[at / 4u + d4] = value;
        }
    }
}",
        );
    }
    name_wide(&mut name, &[("v", wide_v), ("o", wide_o)]);
    if accumulate {
        name.push_str("/accumulate");
    }
    changes = rules.apply(changes, &mut name);
    Variant { kernel: Kernel::WeightedSum, changes, name }
}

/// How `flash.wgsl` is cut: every width stands in registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlashTile {
    /// Invocations per workgroup.
    pub workgroup: u32,
    /// Rows per invocation.
    pub rows: u32,
    /// Keys per step, at most 4.
    pub keys: u32,
    /// Lanes that share their loads through subgroup operations; 1 without.
    pub share: u32,
    /// vec4s of a query and a key.
    pub depth4: u32,
    /// vec4s of a value.
    pub cols4: u32,
}

/// Which operands of `flash.wgsl` are read and written in vec4s.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlashWide {
    /// Queries.
    pub q: bool,
    /// Keys.
    pub k: bool,
    /// Values.
    pub v: bool,
    /// The output.
    pub o: bool,
}

/// A variant of `flash.wgsl`.
pub fn flash(tile: FlashTile, wide: FlashWide, padded: [bool; 2], softcap: bool, lse: bool, rules: Rules) -> Variant {
    let mut name = String::from("flash");
    let shared = [
        ("share_k", "let k4 = subgroupBroadcast(mine, (c * DEPTH4 + d) % SHARE);"),
        ("share_v", "let v4 = subgroupBroadcast(mine, (d * KEYS + c) % SHARE);"),
        ("any_not_finite", "let careful = subgroupAny(any(found));"),
    ];
    let FlashTile { workgroup, rows, keys, share: lanes, depth4, cols4 } = tile;
    let mut changes = share(Changes::default(), Tile { workgroup, rows, share: lanes, depth4 }, &mut name, &shared);
    changes = changes.number("KEYS", keys).number("DEPTH4", depth4).number("COLS4", cols4);
    changes = changes.flag("PADDED_K", padded[0]).flag("PADDED_V", padded[1]);
    let mark = |padded| if padded { "_padded" } else { "" };
    name.push_str(&format!("/keys{keys}/dims{}{}x{}{}", depth4 * 4, mark(padded[0]), cols4 * 4, mark(padded[1])));
    if wide.q {
        changes = changes.alias("QElem", "vec4<f32>").block(
            "load_q",
            "fn load_q(at: u32, d4: u32) -> vec4<f32> {
    return select(q[at / 4u + d4], vec4<f32>(), PADDED_K && d4 * 4u >= params.dim_k);
}",
        );
    }
    if wide.k {
        changes = changes.alias("KElem", "vec4<f32>").block(
            "load_k",
            "fn load_k(at: u32, d4: u32) -> vec4<f32> {
    return select(k[at / 4u + d4], vec4<f32>(), PADDED_K && d4 * 4u >= params.dim_k);
}",
        );
    }
    if wide.v {
        changes = changes.alias("VElem", "vec4<f32>").block(
            "load_v",
            "fn load_v(at: u32, d4: u32) -> vec4<f32> {
    return select(v[at / 4u + d4], vec4<f32>(), PADDED_V && d4 * 4u >= params.dim_v);
}",
        );
    }
    if wide.o {
        changes = changes.alias("OElem", "vec4<f32>").block(
            "store_o",
            "fn store_o(at: u32, d4: u32, value: vec4<f32>, add: bool) {
    if (!PADDED_V || d4 * 4u < params.dim_v) {
        if (add) {
            o[at / 4u + d4] += value;
        } else {
            o[at / 4u + d4] = value;
        }
    }
}",
        );
    }
    name_wide(&mut name, &[("q", wide.q), ("k", wide.k), ("v", wide.v), ("o", wide.o)]);
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
    Variant { kernel: Kernel::Flash, changes, name }
}

/// A variant of `merge.wgsl`.
pub fn merge(lse: bool) -> Variant {
    if lse {
        return Variant { kernel: Kernel::Merge, changes: Changes::default(), name: "merge/lse".into() };
    }
    let changes = Changes::default().block("lse", "fn store_lse(at: u32, value: f32) {}");
    Variant { kernel: Kernel::Merge, changes, name: "merge".into() }
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
    [wide_kept, wide_walked]: [bool; 2],
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
    if wide_kept {
        changes = changes.alias("KeptElem", "vec4<f32>").block(
            "load_kept",
            "fn load_kept(at: u32, d4: u32) -> vec4<f32> {
    return select(kept[at / 4u + d4], vec4<f32>(), PADDED && d4 * 4u >= params.dim);
}",
        );
    }
    if wide_walked {
        changes = changes.alias("WalkedElem", "vec4<f32>").block(
            "load_walked",
            "fn load_walked(at: u32, d4: u32) -> vec4<f32> {
    return select(walked[at / 4u + d4], vec4<f32>(), PADDED && d4 * 4u >= params.dim);
}",
        );
    }
    name_wide(&mut name, &[("x", wide_kept), ("y", wide_walked)]);
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
pub fn softmax(workgroup: u32, lanes: u32, lse: bool) -> Variant {
    let mut name = format!("softmax/lanes{lanes}x{}", workgroup / lanes);
    let mut changes = Changes::default().number("WORKGROUP", workgroup).number("LANES", lanes).flag("LSE", lse);
    if lse {
        name.push_str("/lse");
    } else {
        changes = changes.block("lse", "fn store_lse(row: u32, value: f32) {}");
    }
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
pub fn project(tile: Tile, wide_x: bool, wide_w: bool, wide_y: bool, padded: bool, bias: bool) -> Variant {
    let mut name = String::from("project");
    let shared = [("share", "let w4 = subgroupBroadcast(mine, (c * DEPTH4 + d) % SHARE);")];
    let mut changes = share(Changes::default(), tile, &mut name, &shared);
    changes = changes.number("DEPTH4", tile.depth4).flag("PADDED", padded);
    name.push_str(&format!("/depth{}{}", tile.depth4 * 4, if padded { "_padded" } else { "" }));
    if wide_x {
        changes = changes.alias("XElem", "vec4<f32>").block(
            "load_x",
            "fn load_x(at: u32, d4: u32) -> vec4<f32> {
    return select(x[at / 4u + d4], vec4<f32>(), PADDED && d4 * 4u >= params.dim_in);
}",
        );
    }
    if wide_w {
        changes = changes.alias("WElem", "vec4<f32>").block(
            "load_w",
            "fn load_w(at: u32, d4: u32) -> vec4<f32> {
    return select(w[at / 4u + d4], vec4<f32>(), PADDED && d4 * 4u >= params.dim_in);
}",
        );
    }
    if wide_y {
        changes = changes.alias("YElem", "vec4<f32>").block(
            "y_vector",
            "fn load_y(at: u32, o: u32) -> vec4<f32> { return y[(at + o) / 4u]; }
fn store_y(at: u32, o: u32, value: vec4<f32>) { y[(at + o) / 4u] = value; }",
        );
    }
    name_wide(&mut name, &[("x", wide_x), ("w", wide_w), ("y", wide_y)]);
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

/// `copy.wgsl`.
pub fn copy() -> Variant {
    Variant { kernel: Kernel::Copy, changes: Changes::default(), name: "copy".into() }
}

/// Every legal variant at the tile sizes that planning chooses from, one for each combination of
/// algorithmic choices. Used to print them and to hold them against compilers without a GPU.
pub fn variants() -> Vec<Variant> {
    let mut all = Vec::new();
    let rules = [
        Rules::default(),
        Rules { banded: true, ..Rules::default() },
        Rules { masks: 1, ..Rules::default() },
        Rules { bias: true, ..Rules::default() },
        Rules { bands: true, masks: 2, bias: true, banded: true },
    ];
    for (workgroup, share, depth4) in
        [(8, 1, 16), (8, 4, 16), (8, 8, 16), (64, 1, 8), (64, 8, 8), (8, 4, 13), (8, 8, 10), (8, 4, 1)]
    {
        for rows in [1, 2, 4] {
            let tile = Tile { workgroup, rows, share, depth4 };
            let wide_choices: &[bool] = if rows == 4 { &[true, false] } else { &[true] };
            for &wide in wide_choices {
                for rules in rules {
                    if rows < 4 && rules != Rules::default() {
                        continue;
                    }
                    all.push(scores(tile, wide, wide, !wide, rules.masks == 1, rules, 2));
                    all.push(weighted_sum(tile, wide, wide, false, rules));
                }
                all.push(project(tile, wide, wide, wide, !wide, wide));
            }
            if rows == 4 {
                all.push(scores(tile, true, false, true, true, Rules::default(), 0));
                all.push(scores(tile, false, true, true, true, Rules::default(), 1));
                all.push(weighted_sum(tile, false, true, true, Rules::default()));
                all.push(weighted_sum(tile, true, false, true, Rules::default()));
                all.push(project(tile, true, false, false, true, true));
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
            let all_wide = FlashWide { q: true, k: true, v: true, o: true };
            let narrow = FlashWide { q: false, k: false, v: false, o: false };
            for (n, rules) in rules.into_iter().enumerate() {
                let wide = if n == 2 { narrow } else { all_wide };
                // Seven buffers at most, the four operands among them.
                let rules = Rules { masks: rules.masks.min(1), ..rules };
                let lse = rules.buffers() < 3;
                if rows == 4 || n == 0 {
                    all.push(flash(tile, wide, [n == 2; 2], n == 2, lse, rules));
                }
            }
            all.push(flash(
                tile,
                FlashWide { k: false, v: false, ..all_wide },
                [true, false],
                false,
                false,
                Rules::default(),
            ));
            all.push(flash(
                tile,
                FlashWide { q: false, o: false, ..all_wide },
                [true, false],
                false,
                false,
                Rules::default(),
            ));
        }
    }
    all.extend([merge(true), merge(false)]);
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
                all.push(inspect(inspection, tile, chunks, [n != 1; 2], n == 1, n == 2, rules));
            }
            all.push(inspect(inspection, tile, chunks, [true, false], true, false, Rules::default()));
            all.push(inspect(inspection, tile, chunks, [false, true], true, false, Rules::default()));
        }
    }
    for (workgroup, lanes) in [(8, 1), (64, 64), (64, 32)] {
        all.extend([softmax(workgroup, lanes, true), softmax(workgroup, lanes, false)]);
    }
    all.extend([append(false), append(true), mean_heads(false), mean_heads(true), copy()]);
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
