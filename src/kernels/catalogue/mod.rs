//! Every kernel and its legal variants.

mod flash;

pub use flash::{FlashAccess, FlashOptions, FlashRotary, FlashTile, TiledParts, flash};

use super::access::{self, Access};
use super::gpu_kind::{self, GpuKind};
use super::method::Tile;
use super::params::{self, Fields, Member};
use super::specialise::{Body, Changes, as_it_stands, specialise};
use crate::error::{Result, value_error};
use crate::problem::Dtype;

macro_rules! kernels {
    ($(#[doc = $doc:literal] $kernel:ident($params:ident) => $file:literal,)*) => {
        /// A shader file.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Kernel {
            $(#[doc = $doc] $kernel,)*
        }

        impl Kernel {
            /// All kernels.
            pub const ALL: &[Kernel] = &[$(Kernel::$kernel),*];

            /// The file's name without its ending.
            pub fn name(self) -> &'static str {
                match self {
                    $(Kernel::$kernel => $file,)*
                }
            }

            /// The file's text; its parts are only named.
            fn file(self) -> &'static str {
                match self {
                    $(Kernel::$kernel => include_str!(concat!("../../../shaders/", $file, ".wgsl")),)*
                }
            }

            /// The fields of the uniform block that planning fills.
            pub fn params(self) -> Fields {
                let mut fields = Fields::new();
                match self {
                    $(Kernel::$kernel => params::$params::list("", 0, &mut fields),)*
                }
                fields
            }
        }
    };
}

kernels! {
    /// `S = scale · Q·Kᵀ`, softcap, bias, mask.
    Scores(Scores) => "scores",
    /// `P = softmax(S)`, LSE.
    Softmax(Softmax) => "softmax",
    /// `O = P·V`.
    WeightedSum(WeightedSum) => "weighted_sum",
    /// All three in one, without storing the scores.
    Flash(Flash) => "flash",
    /// Like [`Kernel::Flash`], through tiles in workgroup memory.
    FlashTiled(Flash) => "flash_tiled",
    /// Merges the outputs of splits of the keys by their LSE.
    Merge(Merge) => "merge",
    /// Weights, column sums and entropies recomputed from the LSE.
    Inspect(Inspect) => "inspect",
    /// `Y = X·Wᵀ + b`.
    Project(Project) => "project",
    /// Like [`Kernel::Project`], through tiles in workgroup memory.
    ProjectTiled(Project) => "project_tiled",
    /// Like [`Kernel::Project`], for few rows of X.
    Matvec(Project) => "matvec",
    /// Averages weights over heads.
    MeanHeads(MeanHeads) => "mean_heads",
    /// Combines masks, biases and bands into one bias.
    CombineBiases(CombineBiases) => "combine_biases",
    /// Copies a view with any strides to another.
    Copy(Copy) => "copy",
    /// Multiply-adds in registers, to measure an adapter.
    Probe(Probe) => "probe",
    /// Writes rows into a cache of keys or values.
    Scatter(Scatter) => "scatter",
    /// Computes what masks leave of each block of keys.
    BlockMask(BlockMask) => "block_mask",
    /// Rotates pairs of columns by their positions.
    Rotate(Rotate) => "rotate",
    /// Adds a table's rows to tokens, or applies a gate.
    Tokens(Tokens) => "tokens",
    /// Biases by the distance between query and key.
    Relative(RelativeBias) => "relative",
    /// RMSNorm and LayerNorm of rows.
    Normalise(Normalise) => "normalise",
    /// Sums of products over rows, for the backward.
    RowDots(RowDots) => "row_dots",
    /// Weights and the gradients of scores.
    ScoreGradients(ScoreGradients) => "score_gradients",
    /// `Y = Pᵀ·X`: gradients of keys and values.
    TransposedSum(TransposedSum) => "transposed_sum",
    /// Sums one axis.
    SumAxis(SumAxis) => "sum_axis",
    /// Sums of the gradients of scores over pairs that share a distance.
    DistanceSums(DistanceSums) => "distance_sums",
    /// What each query adds to the gradient of a sink.
    SinkGradients(SinkGradients) => "sink_gradients",
}

impl Kernel {
    /// The file's text with its parts, unchanged.
    pub fn source(self) -> Result<String> {
        as_it_stands(self.name(), self.file())
    }
}

/// A kernel with its changes: the key of a compiled pipeline.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Variant {
    /// The file.
    pub kernel: Kernel,
    /// What differs from the file.
    pub changes: Changes,
    /// A readable name: `scores/subgroup8/wide`.
    pub name: String,
}

impl Variant {
    /// The WGSL text of the variant.
    pub fn source(&self) -> Result<String> {
        specialise(self.kernel.name(), self.kernel.file(), &self.changes)
    }

    /// The same kernel with wide loads in 64-bit words, for devices with `wgpu::Features::SHADER_INT64`, because
    /// software adapters load word by word. WebGPU and its compilers do not support them.
    pub fn loading_64_bits(&self) -> Variant {
        Variant { changes: access::in_words_of_64_bits(&self.changes), ..self.clone() }
    }

    /// True if the text uses subgroup operations.
    pub fn uses_subgroups(&self) -> bool {
        self.number("SHARE", 1) > 1
    }

    /// Invocations per workgroup.
    pub fn workgroup_size(&self) -> u32 {
        self.number("WORKGROUP", 64)
    }

    /// A number in the text; `as_it_stands` if it is not changed.
    fn number(&self, name: &str, as_it_stands: u32) -> u32 {
        let changed = self.changes.consts.get(name);
        changed.and_then(|text| text.trim_end_matches('u').parse().ok()).unwrap_or(as_it_stands)
    }

    /// Invocations, rows and invocations per row of `flash_tiled.wgsl`, and vec4s of a key and a value.
    fn tile_in_memory(&self) -> ([u32; 3], [u32; 2]) {
        let [rows, across, depth4, cols4] =
            [("ROWS", 4), ("ACROSS", 8), ("DEPTH4", 16), ("COLS4", 16)].map(|(name, or)| self.number(name, or));
        ([self.workgroup_size(), rows, across], [depth4, cols4])
    }

    /// The tile of a variant of `flash_tiled.wgsl`.
    pub fn tile(&self) -> Option<Tile> {
        let ([workgroup, rows, across], _) = self.tile_in_memory();
        (self.kernel == Kernel::FlashTiled).then_some(Tile::Workgroup { workgroup, rows, across })
    }

    /// Whether planning or tuning may choose the variant on a GPU of this kind.
    pub fn is_given_to(&self, kind: GpuKind) -> bool {
        match self.kernel {
            // GPUs have `flash_tiled.wgsl`, and `project_tiled.wgsl`.
            Kernel::Flash | Kernel::Project => false,
            Kernel::FlashTiled => {
                let (_, [_, cols4]) = self.tile_in_memory();
                self.tile().is_some_and(|tile| gpu_kind::takes(kind, tile, 4 * cols4 as usize))
            }
            Kernel::Scores | Kernel::WeightedSum | Kernel::Inspect
                if self.number("ROWS", 1) > gpu_kind::rows_in_registers(kind) =>
            {
                false
            }
            // The workgroup of software adapters.
            _ => self.workgroup_size() != 8,
        }
    }

    /// Bytes of workgroup memory the variant declares.
    pub fn workgroup_memory(&self) -> u32 {
        let workgroup = self.workgroup_size();
        match self.kernel {
            Kernel::Softmax if !self.changes.blocks.contains_key("join_sum") => softmax_memory(workgroup),
            Kernel::FlashTiled => {
                let (numbers, widths) = self.tile_in_memory();
                TiledParts::new(numbers, widths).memory
            }
            Kernel::ProjectTiled => ProjectTile::MEMORY,
            // One f32 per product, after lanes have summed theirs.
            Kernel::Matvec => 4 * workgroup / self.number("SHARE", 1) * self.number("ROWS", 1) * self.number("OUTS", 4),
            Kernel::Normalise if !self.changes.blocks.contains_key("join_sum") => 4 * workgroup,
            _ => 0,
        }
    }
}

/// How lanes share the work on one tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowTile {
    /// Invocations per workgroup.
    pub workgroup: u32,
    /// Rows per invocation.
    pub rows: u32,
    /// Number of lanes that share their loads through subgroup operations; 1 without.
    pub share: u32,
    /// Number of vec4s of depth (or columns) kept in registers.
    pub depth4: u32,
}

/// Which masking rules, and whether a sink, a variant reads from buffers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// A band per batch entry instead of one in the parameters.
    pub bands: bool,
    /// Number of boolean masks, 0 to 2.
    pub masks: u32,
    /// Number of additive biases, 0 to 2.
    pub biases: u32,
    /// Whether any band hides anything.
    pub banded: bool,
    /// A bias by the distance between key and query.
    pub relative: Option<RelativeKind>,
    /// A sink per head.
    pub sink: bool,
}

/// How the table of a bias by distance is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RelativeKind {
    /// One slope, multiplied by the negated distance.
    Slope,
    /// A value for each distance.
    Table,
    /// For each first distance, from `high` down to `low − 3`, the values of four distances: one load for four keys.
    Fours,
}

impl Rules {
    /// Number of storage buffers that the masking rules take.
    pub fn buffers(&self) -> u32 {
        u32::from(self.bands) + self.masks + self.biases + u32::from(self.relative.is_some())
    }

    fn apply(&self, mut changes: Changes, name: &mut String) -> Changes {
        if self.bands {
            name.push_str("/bands");
        } else {
            changes = changes.line("bands", "fn band_of(b: u32) -> vec4<i32> { return params.rules.band; }");
            if self.banded {
                name.push_str("/band");
            }
        }
        self.apply_lists(changes, name).flag("BANDED", self.banded || self.bands)
    }

    /// Sets what is added by distance.
    fn apply_relative(&self, changes: Changes, name: &mut String) -> Changes {
        let changes = changes.flag("RELATIVE", self.relative.is_some());
        match self.relative {
            None => changes.part("relative", "relative_none"),
            Some(RelativeKind::Slope) => {
                name.push_str("/alibi");
                changes.part("relative", "relative_slope")
            }
            Some(RelativeKind::Table) => {
                name.push_str("/relative");
                changes
            }
            Some(RelativeKind::Fours) => {
                name.push_str("/relative4");
                changes.part("relative", "relative_fours")
            }
        }
    }

    /// Sets masks and biases only.
    fn apply_lists(&self, mut changes: Changes, name: &mut String) -> Changes {
        if self.masks < 1 {
            changes = changes.line("mask_a", "fn passes_a(b: u32, h: u32, i: u32, j: u32) -> bool { return true; }");
        }
        if self.masks < 2 {
            changes = changes.line("mask_b", "fn passes_b(b: u32, h: u32, i: u32, j: u32) -> bool { return true; }");
        }
        changes = changes.flag("MASKED", self.masks > 0 || self.biases > 0);
        changes = changes.flag("TWO_BIASES", self.biases > 1);
        match self.masks {
            0 => {}
            1 => name.push_str("/mask"),
            _ => name.push_str("/masks"),
        }
        if self.biases < 1 {
            changes = changes.line("bias_a", "fn added_a(b: u32, h: u32, i: u32, j: u32) -> f32 { return 0.0; }");
        }
        if self.biases < 2 {
            changes = changes.line("bias_b", "fn added_b(b: u32, h: u32, i: u32, j: u32) -> f32 { return 0.0; }");
        }
        match self.biases {
            0 => {}
            1 => name.push_str("/bias"),
            _ => name.push_str("/biases"),
        }
        changes
    }
}

/// Sets whether there is a sink per head, for kernels that support one.
fn sink(changes: Changes, given: bool, name: &mut String) -> Changes {
    if given {
        name.push_str("/sink");
        return changes.flag("SINK", true);
    }
    changes.flag("SINK", false).line("sink", "fn sink_of(h: u32) -> f32 { return 0.0; }")
}

const LANE_BUILTIN: &str = "    @builtin(subgroup_invocation_id) subgroup_lane: u32,";
const LANE: &str = "    let lane = subgroup_lane % SHARE;";

fn share(changes: Changes, tile: RowTile, name: &mut String, blocks: &[(&'static str, &'static str)]) -> Changes {
    let changes = changes.number("WORKGROUP", tile.workgroup).number("ROWS", tile.rows).number("SHARE", tile.share);
    name.push_str(&format!("/rows{}x{}", tile.rows, tile.workgroup));
    if tile.share == 1 {
        return changes;
    }
    name.push_str(&format!("/subgroup{}", tile.share));
    let changes = changes.line("lane_builtin", LANE_BUILTIN).line("lane", LANE);
    blocks.iter().fold(changes, |changes, &(name, statement)| changes.line(name, statement))
}

/// A variant of `scores.wgsl`. `stage`: 0 scaled, 1 after the softcap, 2 after bias and mask.
pub fn scores(tile: RowTile, [q, k]: [Access; 2], padded: bool, softcap: bool, rules: Rules, stage: u32) -> Variant {
    // Rules come last.
    let (softcap, rules) = (softcap && stage > 0, if stage < 2 { Rules::default() } else { rules });
    let mut name = String::from("scores");
    let shared = [("share", "let k4 = subgroupBroadcast(loaded, (c * DEPTH4 + d) % SHARE);")];
    let mut changes = share(Changes::default(), tile, &mut name, &shared);
    changes = changes.number("DEPTH4", tile.depth4).flag("PADDED", padded).flag("SOFTCAP", softcap);
    name.push_str(&format!("/depth{}{}", tile.depth4 * 4, if padded { "_padded" } else { "" }));
    changes = access::load(changes, &access::Q, q);
    changes = access::load(changes, &access::K, k);
    access::name(&mut name, &[("q", q), ("k", k)]);
    if softcap {
        name.push_str("/softcap");
    } else {
        changes = changes.line("tanh", "fn tanh_exact(x: vec4<f32>) -> vec4<f32> { return x; }");
    }
    changes = rules.apply(changes, &mut name);
    changes = rules.apply_relative(changes, &mut name);
    if stage < 2 {
        name.push_str(&format!("/stage{stage}"));
    }
    Variant { kernel: Kernel::Scores, changes, name }
}

/// A variant of `weighted_sum.wgsl`; `tile.depth4` counts columns.
pub fn weighted_sum(tile: RowTile, v: Access, o: Access, accumulate: bool, rules: Rules) -> Variant {
    let mut name = String::from("weighted_sum");
    let shared = [("share", "let v4 = subgroupBroadcast(loaded, (d * KEYS + c) % SHARE);")];
    let mut changes = share(Changes::default(), tile, &mut name, &shared);
    if tile.share > 1 {
        changes = changes.line("any_not_finite", "let any_not_finite = subgroupAny(any(has_not_finite));");
    }
    changes = changes.number("COLS4", tile.depth4).flag("ACCUMULATE", accumulate);
    name.push_str(&format!("/columns{}", tile.depth4 * 4));
    changes = access::load(changes, &access::V, v);
    changes = access::store(changes, o);
    access::name(&mut name, &[("v", v), ("o", o)]);
    if accumulate {
        name.push_str("/accumulate");
    }
    changes = sink(rules.apply(changes, &mut name), rules.sink, &mut name);
    Variant { kernel: Kernel::WeightedSum, changes, name }
}

/// Keys of a block of `block_mask.wgsl`.
pub const MASK_BLOCK: u32 = 32;

/// A variant of `block_mask.wgsl`: masks and biases only.
pub fn block_mask(rules: Rules) -> Variant {
    let mut name = String::from("block_mask");
    let lists = Rules { masks: rules.masks, biases: rules.biases, ..Rules::default() };
    let changes = lists.apply(Changes::default(), &mut name).number("BLOCK", MASK_BLOCK);
    Variant { kernel: Kernel::BlockMask, changes, name }
}

/// A variant of `merge.wgsl`.
pub fn merge(lse: bool, o: Access) -> Variant {
    let mut name = String::from("merge");
    let mut changes = access::store(Changes::default(), o);
    access::name(&mut name, &[("o", o)]);
    if lse {
        name.push_str("/lse");
    } else {
        changes = changes.line("lse", "fn store_lse(at: u32, value: f32) {}");
    }
    Variant { kernel: Kernel::Merge, changes, name }
}

/// `merge.wgsl` over two separate results with any strides.
pub fn merge_pair() -> Variant {
    let changes = Changes::default().part("splits", "pair");
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

/// A variant of `inspect.wgsl` that reads a head in `chunks` of the tile's depth. The outer operand is the keys for
/// column sums, the queries for the others.
pub fn inspect(
    inspection: Inspection,
    tile: RowTile,
    chunks: u32,
    [outer, inner]: [Access; 2],
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
    let shared = [("share", "let y4 = subgroupBroadcast(loaded, (c * DEPTH4 + d) % SHARE);")];
    let mut changes = share(Changes::default(), tile, &mut name, &shared).number("RESULT", result);
    if tile.share > 1 {
        changes = changes.block("share_lse", Body::Or("shared"));
    }
    changes = changes.number("DEPTH4", tile.depth4).number("CHUNKS", chunks).flag("PADDED", padded);
    name.push_str(&format!("/depth{}x{chunks}{}", tile.depth4 * 4, if padded { "_padded" } else { "" }));
    changes = access::load(changes, &access::OUTER, outer);
    changes = access::load(changes, &access::INNER, inner);
    access::name(&mut name, &[("x", outer), ("y", inner)]);
    if inspection == Inspection::Weights {
        changes = (changes.alias("OElem", "vec4<f32>"))
            .line("store_weights", "fn store_weights(at: u32, weights: vec4<f32>) { o[at / 4u] = weights; }");
    }
    changes = changes.flag("SOFTCAP", softcap);
    if softcap {
        name.push_str("/softcap");
    } else {
        changes = changes.line("tanh", "fn tanh_exact(x: vec4<f32>) -> vec4<f32> { return x; }");
    }
    changes = rules.apply(changes, &mut name);
    changes = rules.apply_relative(changes, &mut name);
    Variant { kernel: Kernel::Inspect, changes, name }
}

/// A variant of `softmax.wgsl`: `lanes` invocations per row.
pub fn softmax(workgroup: u32, lanes: u32, lse: bool, with_sink: bool) -> Variant {
    let mut name = format!("softmax/lanes{lanes}x{}", workgroup / lanes);
    let mut changes = Changes::default().number("WORKGROUP", workgroup).number("LANES", lanes);
    if lse {
        name.push_str("/lse");
    } else {
        changes = changes.line("lse", "fn store_lse(at: u32, value: f32) {}");
    }
    changes = sink(changes, with_sink, &mut name);
    if lanes == 1 {
        changes = (changes.line("join_sum", "fn join_sum(local: u32, x: f32) -> f32 { return x; }"))
            .line("join_largest", "fn join_largest(local: u32, x: f32) -> f32 { return x; }");
    }
    Variant { kernel: Kernel::Softmax, changes, name }
}

/// Bytes of workgroup memory of `softmax.wgsl` if lanes share a row: one f32 per invocation.
pub const fn softmax_memory(workgroup: u32) -> u32 {
    4 * workgroup
}

/// A variant of `project.wgsl`.
pub fn project(tile: RowTile, x: Access, w: Access, wide_y: bool, padded: bool, bias: bool) -> Variant {
    let mut name = String::from("project");
    let shared = [("share", "let w4 = subgroupBroadcast(loaded, d % SHARE);")];
    let mut changes = share(Changes::default(), tile, &mut name, &shared);
    // A few loads at a time; the number must divide the depth.
    let loads = [4, 2, 1].into_iter().find(|n| tile.depth4.is_multiple_of(*n)).unwrap_or(1);
    changes = changes.number("DEPTH4", tile.depth4).number("LOADS", loads).number("GROUPS", tile.depth4 / loads);
    changes = changes.flag("PADDED", padded);
    name.push_str(&format!("/depth{}{}", tile.depth4 * 4, if padded { "_padded" } else { "" }));
    if wide_y {
        changes = changes
            .line("load_four", "fn load_four(at: u32, first: u32) -> vec4<f32> { return y[(at + first) / 4u]; }");
    }
    projection(Kernel::Project, changes, name, [x, w], wide_y, bias)
}

/// What the variants of both products have in common: their operands, and whether there is a bias.
fn projection(
    kernel: Kernel,
    changes: Changes,
    mut name: String,
    [x, w]: [Access; 2],
    wide_y: bool,
    bias: bool,
) -> Variant {
    let mut changes = access::load(changes, &access::X, x);
    changes = access::load(changes, &access::W, w);
    if wide_y {
        changes = stored_in_fours(changes);
    }
    access::name(&mut name, &[("x", x), ("w", w), ("y", Access { wide: wide_y, ..Access::NARROW })]);
    if !bias {
        changes = changes.line("add_bias", "fn bias_of(o: u32) -> f32 { return 0.0; }");
    } else {
        name.push_str("/bias");
    }
    Variant { kernel, changes, name }
}

/// The tile of `project_tiled.wgsl`.
pub struct ProjectTile;

impl ProjectTile {
    /// Invocations per workgroup.
    pub const WORKGROUP: u32 = 128;
    /// Rows per workgroup.
    pub const ROWS: u32 = 64;
    /// Outputs per workgroup.
    pub const OUTS: u32 = 64;
    /// Columns that it sums at a time.
    pub const DEPTH: u32 = 16;
    /// Bytes of workgroup memory: 16 vec4s for each four rows and each four outputs, and what keeps them in different
    /// banks.
    pub const MEMORY: u32 = 16 * (8 * 33 + 16 * 17);
}

/// A variant of `project_tiled.wgsl`.
pub fn project_tiled(x: Access, w: Access, wide_y: bool, padded: bool, bias: bool) -> Variant {
    let name = format!("project_tiled/rows8x{}{}", ProjectTile::WORKGROUP, if padded { "/padded" } else { "" });
    let changes = Changes::default().number("WORKGROUP", ProjectTile::WORKGROUP).flag("PADDED", padded);
    projection(Kernel::ProjectTiled, changes, name, [x, w], wide_y, bias)
}

/// The tile of `matvec.wgsl`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MatvecTile {
    /// Invocations per workgroup, adjacent along the width.
    pub workgroup: u32,
    /// Number of rows of X, and of W, that each reads.
    pub rows: u32,
    /// See `rows`.
    pub outs: u32,
    /// Number of lanes that sum through subgroup operations: all of a workgroup, or 1.
    pub share: u32,
}

/// A variant of `matvec.wgsl`.
pub fn matvec(tile: MatvecTile, x: Access, w: Access, bias: bool) -> Variant {
    let MatvecTile { workgroup, rows, outs, share } = tile;
    let mut name = format!("matvec/rows{rows}x{workgroup}/outs{outs}");
    let mut changes = Changes::default().number("WORKGROUP", workgroup).number("ROWS", rows).number("OUTS", outs);
    if share > 1 {
        name.push_str(&format!("/subgroup{share}"));
        let body = "fn sum_of_lanes(x: f32) -> f32 { return subgroupAdd(x); }";
        changes = changes.number("SHARE", share).line("share", body);
    }
    // No vec4 beyond the width is read.
    changes = access::load(changes.flag("PADDED", false), &access::X, x);
    changes = access::load(changes, &access::W, w);
    access::name(&mut name, &[("x", x), ("w", w)]);
    if bias {
        name.push_str("/bias");
    } else {
        changes = changes.line("add_bias", "fn bias_of(o: u32) -> f32 { return 0.0; }");
    }
    Variant { kernel: Kernel::Matvec, changes, name }
}

/// A variant of `normalise.wgsl`: LayerNorm if `centred`, else RMSNorm; `lanes` invocations per row.
pub fn normalise(workgroup: u32, lanes: u32, x: Access, wide_y: bool, centred: bool, bias: bool) -> Variant {
    let mut name = format!("normalise/{}/lanes{lanes}x{}", if centred { "layer" } else { "rms" }, workgroup / lanes);
    let changes = Changes::default().number("WORKGROUP", workgroup).number("LANES", lanes).flag("CENTRED", centred);
    let mut changes = access::load(changes, &access::X, x);
    if wide_y {
        changes = stored_in_fours(changes);
    }
    access::name(&mut name, &[("x", x), ("y", Access { wide: wide_y, ..Access::NARROW })]);
    if bias {
        name.push_str("/bias");
    } else {
        changes = changes.line("shift", "fn shift_of(d4: u32) -> vec4<f32> { return vec4<f32>(); }");
    }
    if lanes == 1 {
        changes = changes.line("join_sum", "fn join_sum(local: u32, x: f32) -> f32 { return x; }");
    }
    Variant { kernel: Kernel::Normalise, changes, name }
}

/// A variant of `mean_heads.wgsl`.
pub fn mean_heads(accumulate: bool) -> Variant {
    let name = if accumulate { "mean_heads/accumulate" } else { "mean_heads" };
    let changes = Changes::default().flag("ACCUMULATE", accumulate);
    Variant { kernel: Kernel::MeanHeads, changes, name: name.into() }
}

/// What `combine_biases.wgsl` reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BiasSource {
    /// An additive bias.
    Bias,
    /// A boolean mask.
    Mask,
    /// A band per batch entry.
    Bands,
}

/// A variant of `combine_biases.wgsl`.
pub fn combine_biases(source: BiasSource, accumulate: bool) -> Variant {
    let (number, word) = match source {
        BiasSource::Bias => (0, "bias"),
        BiasSource::Mask => (1, "mask"),
        BiasSource::Bands => (2, "bands"),
    };
    let changes = Changes::default().number("SOURCE", number).flag("ACCUMULATE", accumulate);
    let name = format!("combine_biases/{word}{}", if accumulate { "/accumulate" } else { "" });
    Variant { kernel: Kernel::CombineBiases, changes, name }
}

/// `copy.wgsl` from a buffer that holds `stored`.
pub fn copy(stored: Dtype) -> Variant {
    let mut name = String::from("copy");
    access::name(&mut name, &[("x", Access { wide: false, stored })]);
    Variant {
        kernel: Kernel::Copy,
        changes: access::load(Changes::default(), &access::X, Access { wide: false, stored }),
        name,
    }
}

/// Floating-point operations of one invocation of `probe.wgsl` in one round: chains times links times two, because a
/// multiply-add counts as two.
pub const PROBE_OPERATIONS: u32 = 9 * 32 * 2;

/// A variant of `probe.wgsl`.
pub fn probe(workgroup: u32) -> Variant {
    let changes = Changes::default().number("WORKGROUP", workgroup);
    Variant { kernel: Kernel::Probe, changes, name: format!("probe/{workgroup}") }
}

/// A variant of `scatter.wgsl` into a cache that holds `stored`.
pub fn scatter(x: Access, stored: Dtype) -> Variant {
    let mut name = String::from("scatter");
    let changes = access::load(Changes::default(), &access::X, x);
    let y = Access { wide: true, stored };
    access::name(&mut name, &[("x", x), ("y", y)]);
    Variant { kernel: Kernel::Scatter, changes: access::store_fours(changes, y), name }
}

/// Without a list of `rows`, token `i` reads row `row_0 + i`.
fn rows_listed(changes: Changes, listed: bool, name: &mut String) -> Changes {
    if listed {
        name.push_str("/rows");
        return changes;
    }
    changes.line("row_of", "fn row_of(b: u32, i: u32) -> u32 { return params.row_0 + i; }")
}

/// Stores whole fours of `y`.
fn stored_in_fours(changes: Changes) -> Changes {
    changes.alias("YElem", "vec4<f32>").line(
        "store_four",
        "fn store_four(at: u32, first: u32, end: u32, value: vec4<f32>) { y[(at + first) / 4u] = value; }",
    )
}

/// A variant of `rotate.wgsl`; wide if X, Y and the pairs are in fours.
pub fn rotate(x: Access, interleaved: bool, listed: bool) -> Variant {
    let mut name = String::from(if interleaved { "rotate/interleaved" } else { "rotate/half_split" });
    access::name(&mut name, &[("x", x)]);
    let changes = Changes::default().flag("INTERLEAVED", interleaved);
    let mut changes = access::load(changes, &access::X, x);
    if x.wide {
        changes = (changes.alias("YElem", "vec4<f32>").alias("AngleElem", "vec4<f32>"))
            .part("rotate_unit", "rotate_unit_wide");
    }
    Variant { kernel: Kernel::Rotate, changes: rows_listed(changes, listed, &mut name), name }
}

/// A variant of `tokens.wgsl`: adds rows to tokens, or gates them.
pub fn tokens(gate: bool, x: Access, z: Access, wide_y: bool, listed: bool) -> Variant {
    let mut name = String::from(if gate { "tokens/gate" } else { "tokens/add" });
    let changes = access::load(Changes::default(), &access::X, x);
    let mut changes = access::load(changes, &access::Z, z);
    if gate {
        changes = changes.line("combined", "    let combined = x4 * sigmoid(z4);");
    }
    if wide_y {
        changes = stored_in_fours(changes);
    }
    access::name(&mut name, &[("x", x), ("z", z), ("y", Access { wide: wide_y, ..Access::NARROW })]);
    Variant { kernel: Kernel::Tokens, changes: rows_listed(changes, listed, &mut name), name }
}

/// A variant of `relative.wgsl`.
pub fn relative(wide_y: bool) -> Variant {
    let (changes, name) =
        if wide_y { (stored_in_fours(Changes::default()), "relative/wide") } else { (Changes::default(), "relative") };
    Variant { kernel: Kernel::Relative, changes, name: name.into() }
}

/// A variant of `row_dots.wgsl`.
pub fn row_dots(a: Access, b: Access, d_lse: bool, accumulate: bool) -> Variant {
    let mut name = String::from("row_dots");
    let changes = Changes::default().flag("ACCUMULATE", accumulate);
    let mut changes = access::load(access::load(changes, &access::A, a), &access::B, b);
    access::name(&mut name, &[("a", a), ("b", b)]);
    if d_lse {
        name.push_str("/lse");
    } else {
        changes = changes.line("d_lse", "fn d_lse_of(axes: vec3<u32>) -> f32 { return 0.0; }");
    }
    if accumulate {
        name.push_str("/accumulate");
    }
    Variant { kernel: Kernel::RowDots, changes, name }
}

/// What a variant of `score_gradients.wgsl` computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScoreGradient {
    /// Whether it computes weights from scores; else they are given.
    pub from_scores: bool,
    /// Whether it computes gradients.
    pub gradients: bool,
    /// Whether scores were capped.
    pub softcap: bool,
    /// Whether the weights have gradients of their own.
    pub d_weights: bool,
    /// Whether it also writes the gradients of the scores after everything, as biases need them.
    pub keeps_dx: bool,
}

/// A variant of `score_gradients.wgsl`.
pub fn score_gradients(what: ScoreGradient) -> Variant {
    let mut name = String::from("score_gradients");
    let mut changes = Changes::default()
        .flag("FROM_SCORES", what.from_scores)
        .flag("GRADIENTS", what.gradients)
        .flag("SOFTCAP", what.softcap);
    for (given, word, block, body) in [
        (!what.gradients, "weights", "", ""),
        (!what.from_scores, "of_weights", "", ""),
        (what.softcap, "softcap", "capped", "fn capped_of(at: u32) -> vec4<f32> { return vec4<f32>(); }"),
        (
            what.d_weights,
            "d_weights",
            "d_weights",
            "fn d_weights_of(axes: vec3<u32>, j: u32) -> vec4<f32> { return vec4<f32>(); }",
        ),
        (what.keeps_dx, "dx", "keep_dx", "fn keep_dx(at: u32, dx: vec4<f32>) {}"),
    ] {
        if given {
            name.push('/');
            name.push_str(word);
        } else if !block.is_empty() {
            changes = changes.line(block, body);
        }
    }
    Variant { kernel: Kernel::ScoreGradients, changes, name }
}

/// The tile of `transposed_sum.wgsl`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TransposedTile {
    /// Invocations per workgroup, each with four keys.
    pub workgroup: u32,
    /// vec4s of columns.
    pub cols4: u32,
    /// Lanes that share their loads.
    pub share: u32,
}

/// A variant of `transposed_sum.wgsl`.
pub fn transposed_sum(tile: TransposedTile, x: Access, accumulate: bool) -> Variant {
    let TransposedTile { workgroup, cols4, share } = tile;
    let mut name = format!("transposed_sum/keys4x{workgroup}");
    let mut changes = Changes::default().number("WORKGROUP", workgroup).number("COLS4", cols4).number("SHARE", share);
    if share > 1 {
        name.push_str(&format!("/subgroup{share}"));
        changes = (changes.line("lane_builtin", LANE_BUILTIN).line("lane", LANE))
            .line("share", "let x4 = subgroupBroadcast(loaded, (e * QUERIES + n) % SHARE);")
            .line("any_not_finite", "let any_not_finite = subgroupAny(any(has_not_finite));");
    }
    name.push_str(&format!("/columns{}", 4 * cols4));
    changes = access::load(changes.flag("ACCUMULATE", accumulate), &access::X, x);
    access::name(&mut name, &[("x", x)]);
    if accumulate {
        name.push_str("/accumulate");
    }
    Variant { kernel: Kernel::TransposedSum, changes, name }
}

/// A variant of `sum_axis.wgsl`.
pub fn sum_axis(accumulate: bool) -> Variant {
    let name = if accumulate { "sum_axis/accumulate" } else { "sum_axis" };
    Variant { kernel: Kernel::SumAxis, changes: Changes::default().flag("ACCUMULATE", accumulate), name: name.into() }
}

/// A variant of `distance_sums.wgsl`: `slopes` weighs pairs by their negated distance.
pub fn distance_sums(slopes: bool) -> Variant {
    let name = if slopes { "distance_sums/slopes" } else { "distance_sums" };
    let changes = Changes::default().flag("SLOPES", slopes);
    Variant { kernel: Kernel::DistanceSums, changes, name: name.into() }
}

/// `sink_gradients.wgsl`.
pub fn sink_gradients() -> Variant {
    Variant { kernel: Kernel::SinkGradients, changes: Changes::default(), name: "sink_gradients".into() }
}

/// Every legal variant at the tile sizes that planning chooses from, one for each combination of algorithmic choices.
/// Used to print them and to check them with compilers without a GPU.
pub fn variants() -> Vec<Variant> {
    let mut all = Vec::new();
    let [wide, narrow] = [Access::WIDE, Access::NARROW];
    let halves = |stored| [true, false].map(|wide| Access { wide, stored });
    let rules = [
        Rules::default(),
        Rules { banded: true, ..Rules::default() },
        Rules { masks: 1, ..Rules::default() },
        Rules { biases: 1, ..Rules::default() },
        Rules { bands: true, masks: 2, biases: 2, banded: true, ..Rules::default() },
        Rules { relative: Some(RelativeKind::Slope), ..Rules::default() },
        Rules { relative: Some(RelativeKind::Table), banded: true, ..Rules::default() },
        Rules { relative: Some(RelativeKind::Fours), ..Rules::default() },
    ];
    let with_sink = Rules { sink: true, ..Rules::default() };
    let all_wide = FlashAccess { q: wide, k: wide, v: wide, o: wide };
    let mut mixed =
        vec![FlashAccess { k: narrow, v: narrow, ..all_wide }, FlashAccess { q: narrow, o: narrow, ..all_wide }];
    for stored in [Dtype::F16, Dtype::BF16] {
        let [wide, narrow] = halves(stored);
        mixed.push(FlashAccess { q: wide, k: wide, v: wide, o: wide });
        mixed.push(FlashAccess { q: narrow, k: narrow, v: narrow, o: Access::NARROW });
    }
    for (workgroup, share, depth4) in
        [(8, 1, 16), (8, 4, 16), (8, 8, 16), (64, 1, 8), (8, 4, 13), (8, 8, 10), (8, 4, 1)]
    {
        // GPUs take no more than two.
        let most = if workgroup == 8 { 4 } else { 2 };
        for rows in [1, 2, 4].into_iter().filter(|&rows| rows <= most) {
            let tile = RowTile { workgroup, rows, share, depth4 };
            let wide_choices: &[bool] = if rows == most { &[true, false] } else { &[true] };
            for &is_wide in wide_choices {
                let access = if is_wide { Access::WIDE } else { Access::NARROW };
                for rules in rules {
                    if rows < most && rules != Rules::default() {
                        continue;
                    }
                    all.push(scores(tile, [access; 2], !is_wide, rules.masks == 1, rules, 2));
                    all.push(weighted_sum(tile, access, access, false, rules));
                }
                if workgroup == 8 {
                    all.push(project(tile, access, access, is_wide, !is_wide, is_wide));
                }
            }
            if rows == most {
                let (f16, bf16) = (halves(Dtype::F16), halves(Dtype::BF16));
                let plain = Rules::default();
                all.push(scores(tile, [wide, narrow], true, true, plain, 0));
                all.push(scores(tile, [narrow, wide], true, true, plain, 1));
                all.push(scores(tile, [f16[0], bf16[1]], true, false, plain, 2));
                all.push(scores(tile, [bf16[0], f16[1]], true, false, plain, 2));
                all.push(weighted_sum(tile, narrow, wide, true, plain));
                all.push(weighted_sum(tile, wide, narrow, true, plain));
                all.extend([wide, narrow].map(|o| weighted_sum(tile, narrow, o, false, with_sink)));
                all.push(weighted_sum(tile, f16[0], narrow, false, plain));
                if workgroup == 8 {
                    all.push(project(tile, wide, narrow, false, true, true));
                    all.push(project(tile, f16[0], bf16[0], true, false, true));
                }
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
            let tile = FlashTile { tile: Tile::Registers { workgroup, rows, keys, share }, depth4, cols4 };
            all.extend(fused_variants(tile, if rows == 4 { &rules } else { &rules[..1] }, &mixed));
        }
    }
    // All rules for the tiles of many rows and those of few.
    for (tile, depth4, cols4, most) in [
        (Tile::IN_MEMORY[0], 16, 16, rules.len()),
        (Tile::IN_MEMORY[1], 5, 12, 1),
        (Tile::IN_MEMORY[2], 16, 16, 1),
        (Tile::IN_MEMORY[3], 16, 16, rules.len()),
        (Tile::IN_MEMORY[3], 32, 32, 3),
        (Tile::IN_MEMORY[4], 128, 128, 1),
        (Tile::IN_MEMORY[5], 5, 33, 1),
        (Tile::IN_MEMORY[6], 1, 3, 1),
        (Tile::IN_MEMORY[7], 32, 32, rules.len()),
    ] {
        let mixed = if most == rules.len() { &mixed } else { &mixed[..1] };
        all.extend(fused_variants(FlashTile { tile, depth4, cols4 }, &rules[..most], mixed));
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
        (64, 1, 1, 8, 2),
        (64, 2, 1, 4, 1),
        (64, 1, 1, 7, 3),
    ] {
        let tile = RowTile { workgroup, rows, share, depth4 };
        for inspection in [Inspection::Weights, Inspection::ColumnSums, Inspection::Entropy] {
            for (n, rules) in rules.into_iter().enumerate() {
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
    for (workgroup, lanes) in [(8, 1), (8, 8), (64, 64), (64, 32), (256, 256)] {
        for with_sink in [false, true] {
            all.extend([true, false].map(|lse| softmax(workgroup, lanes, lse, with_sink)));
        }
    }
    for (workgroup, rows, outs, share) in
        [(8, 1, 8, 1), (8, 8, 8, 1), (8, 1, 8, 8), (8, 8, 8, 8), (64, 1, 4, 1), (64, 4, 4, 1)]
    {
        let tile = MatvecTile { workgroup, rows, outs, share };
        all.extend([matvec(tile, wide, wide, true), matvec(tile, narrow, narrow, false)]);
        all.extend([Dtype::F16, Dtype::BF16].map(|stored| matvec(tile, wide, halves(stored)[0], true)));
    }
    for (x, w) in [(wide, wide), (narrow, narrow), (wide, narrow)] {
        all.extend([true, false].map(|wide_y| project_tiled(x, w, wide_y, !wide_y, wide_y)));
    }
    all.extend(
        [Dtype::F16, Dtype::BF16].map(|stored| project_tiled(halves(stored)[0], halves(stored)[0], true, false, true)),
    );
    all.extend([mean_heads(false), mean_heads(true)]);
    all.extend([Dtype::F32, Dtype::F16, Dtype::BF16].map(copy));
    all.extend([probe(8), probe(64)]);
    all.extend(rules.into_iter().filter(|rules| rules.masks > 0 || rules.biases > 0).map(block_mask));
    for source in [BiasSource::Bias, BiasSource::Mask, BiasSource::Bands] {
        all.extend([combine_biases(source, false), combine_biases(source, true)]);
    }
    for stored in [Dtype::F32, Dtype::F16, Dtype::BF16] {
        for x in halves(stored) {
            for listed in [false, true] {
                all.extend([rotate(x, false, listed), rotate(x, true, listed)]);
                all.extend([tokens(false, x, wide, x.wide, listed), tokens(false, narrow, x, false, listed)]);
            }
        }
    }
    all.extend([relative(true), relative(false)]);
    for stored in [Dtype::F32, Dtype::F16, Dtype::BF16] {
        for x in halves(stored) {
            for (workgroup, lanes) in [(8, 1), (64, 8), (64, 64)] {
                all.extend([false, true].map(|centred| normalise(workgroup, lanes, x, x.wide, centred, centred)));
            }
            all.push(normalise(64, 64, x, x.wide, true, false));
            all.extend([tokens(true, x, wide, x.wide, false), tokens(true, narrow, x, false, false)]);
        }
    }
    for stored in [Dtype::F32, Dtype::F16, Dtype::BF16] {
        for x in halves(stored) {
            all.extend([row_dots(x, wide, true, false), row_dots(narrow, x, false, true)]);
            for (workgroup, cols4, share) in [(8, 16, 8), (8, 13, 4), (8, 1, 1), (64, 4, 1)] {
                let tile = TransposedTile { workgroup, cols4, share };
                all.push(transposed_sum(tile, x, x.wide));
            }
        }
    }
    for flags in 0..32 {
        let [from_scores, gradients, softcap, d_weights, keeps_dx] = [0, 1, 2, 3, 4].map(|bit| flags >> bit & 1 == 1);
        if gradients || (from_scores && !softcap && !d_weights && !keeps_dx) {
            all.push(score_gradients(ScoreGradient { from_scores, gradients, softcap, d_weights, keeps_dx }));
        }
    }
    all.extend([sum_axis(false), sum_axis(true), sink_gradients(), distance_sums(false), distance_sums(true)]);
    let mut seen = std::collections::BTreeSet::new();
    all.retain(|variant| seen.insert(variant.name.clone()));
    all
}

/// Variants of a fused kernel with each of `rules`, and with what it does besides, once each.
fn fused_variants(tile: FlashTile, rules: &[Rules], mixed: &[FlashAccess]) -> Vec<Variant> {
    let mut all = Vec::new();
    let [wide, narrow] = [Access::WIDE, Access::NARROW];
    let all_wide = FlashAccess { q: wide, k: wide, v: wide, o: wide };
    let all_narrow = FlashAccess { q: narrow, k: narrow, v: narrow, o: narrow };
    let plain = FlashOptions::default();
    let with_sink = Rules { sink: true, ..Rules::default() };
    for (n, &rules) in rules.iter().enumerate() {
        let access = if n == 2 { all_narrow } else { all_wide };
        let options = FlashOptions { padded: [n == 2; 2], softcap: n == 2, lse: true, rules, ..plain };
        all.push(flash(tile, access, options));
        if rules.masks > 0 || rules.biases > 0 {
            all.push(flash(tile, access, FlashOptions { block_mask: true, ..options }));
        }
    }
    for banded in [false, true] {
        let rules = Rules { banded, ..Rules::default() };
        all.push(flash(tile, all_wide, FlashOptions { lse: banded, rules, packed: true, ..plain }));
    }
    for interleaved in [false, true] {
        let rotary = Some(FlashRotary { pairs4: tile.depth4.div_ceil(2), interleaved });
        let banded = Rules { banded: interleaved, ..Rules::default() };
        all.push(flash(tile, all_wide, FlashOptions { rotary, rules: banded, ..plain }));
    }
    let by_distance = Rules { relative: Some(RelativeKind::Fours), ..Rules::default() };
    all.push(flash(tile, all_wide, FlashOptions { rules: by_distance, neighbours: true, ..plain }));
    all.push(flash(tile, all_wide, FlashOptions { rules: with_sink, ..plain }));
    let masked = Rules { masks: 1, ..with_sink };
    let options = FlashOptions { padded: [true; 2], softcap: true, lse: true, rules: masked, ..plain };
    all.push(flash(tile, all_narrow, options));
    all.push(flash(tile, all_wide, FlashOptions { lse: true, rules: with_sink, packed: true, ..plain }));
    for &access in mixed {
        all.push(flash(tile, access, FlashOptions { padded: [true, false], ..plain }));
    }
    all
}

/// The names of [`variants`], and of the shader files themselves.
pub fn variant_names() -> Vec<String> {
    let files = Kernel::ALL.iter().map(|kernel| format!("{}.wgsl", kernel.name()));
    files.chain(variants().into_iter().map(|variant| variant.name)).collect()
}

/// The WGSL of a variant as it runs, or of an unchanged file (`scores.wgsl`).
pub fn variant_source(name: &str) -> Result<String> {
    if let Some(kernel) = Kernel::ALL.iter().find(|kernel| name.strip_suffix(".wgsl") == Some(kernel.name())) {
        return kernel.source();
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
