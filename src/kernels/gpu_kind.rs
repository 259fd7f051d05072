//! What each kind of GPU runs by default.

use super::method::Tile;
use crate::error::{Error, value_error};

/// Whose GPU it is, as far as wgpu tells. Compilers and registers differ by maker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum GpuKind {
    /// AMD: 256 registers per lane.
    Amd,
    /// NVIDIA: 255 registers per lane.
    Nvidia,
    /// Intel: 128 registers per lane.
    Intel,
    /// Qualcomm Adreno.
    Qualcomm,
    /// Apple: 128 registers per lane.
    Apple,
    /// Any other, or unknown.
    #[default]
    Other,
}

impl GpuKind {
    /// All kinds.
    pub const ALL: [GpuKind; 6] =
        [GpuKind::Amd, GpuKind::Nvidia, GpuKind::Intel, GpuKind::Qualcomm, GpuKind::Apple, GpuKind::Other];

    /// From the PCI vendor of an adapter, or its name where there is none (Metal, browsers).
    pub fn of(vendor: u32, name: &str) -> GpuKind {
        match vendor {
            0x1002 | 0x1022 => GpuKind::Amd,
            0x10de => GpuKind::Nvidia,
            0x8086 => GpuKind::Intel,
            0x5143 => GpuKind::Qualcomm,
            0x106b => GpuKind::Apple,
            _ if name.starts_with("Apple ") => GpuKind::Apple,
            _ => GpuKind::Other,
        }
    }
}

/// `amd`, `nvidia`, `intel`, `qualcomm`, `apple` or `other`.
impl std::fmt::Display for GpuKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            GpuKind::Amd => "amd",
            GpuKind::Nvidia => "nvidia",
            GpuKind::Intel => "intel",
            GpuKind::Qualcomm => "qualcomm",
            GpuKind::Apple => "apple",
            GpuKind::Other => "other",
        })
    }
}

impl std::str::FromStr for GpuKind {
    type Err = Error;
    fn from_str(text: &str) -> Result<GpuKind, Error> {
        let is_it = |kind: &GpuKind| kind.to_string().eq_ignore_ascii_case(text);
        GpuKind::ALL.into_iter().find(is_it).ok_or_else(|| {
            let known = GpuKind::ALL.map(|kind| kind.to_string()).join(", ");
            value_error!("{text:?} is not a kind of GPU; there are {known}")
        })
    }
}

const fn tile(rows: u32, workgroup: u32, across: u32) -> Tile {
    Tile::Workgroup { workgroup, rows, across }
}

/// The tiles of the fused kernel for `rows` query rows per key/value head and values of width `dim_v`, the default first.
/// `tests/gpu/table.tsv` has a row of each tile and width: none spills registers on a GPU of this kind, but for width 512
/// on Apple and Intel, where every tile does and this one the least.
pub fn tiles(kind: GpuKind, rows: usize, dim_v: usize) -> Vec<Tile> {
    use GpuKind::{Amd, Apple, Intel, Nvidia, Other, Qualcomm};
    match (rows, dim_v, kind) {
        // Few rows: bound by memory, so every row of a key/value head is in one workgroup, and keys are read once.
        (..=4, ..) => vec![tile(1, 64, 16)],
        (..=8, ..) => vec![tile(2, 64, 16)],
        (..=16, ..=64, _) | (..=16, ..=128, Amd | Nvidia | Qualcomm | Apple) => vec![tile(4, 64, 16)],
        (..=16, ..) => vec![tile(2, 128, 16)],
        (_, ..=64, Amd | Nvidia) => vec![tile(4, 128, 8), tile(4, 64, 8), tile(8, 64, 8), tile(4, 128, 16)],
        // With 64 invocations six subgroups run on a core of Adreno, with 128 four.
        (_, ..=64, Qualcomm) => vec![tile(4, 64, 8), tile(4, 128, 8), tile(4, 128, 16)],
        // With eight across, rules spill on Apple, and everything on Intel.
        (_, ..=64, Apple | Intel | Other) => vec![tile(4, 128, 16), tile(4, 64, 16)],
        (_, ..=128, Amd | Nvidia) => vec![tile(4, 128, 16), tile(4, 128, 8), tile(4, 64, 16)],
        (_, ..=128, Qualcomm | Apple) => vec![tile(4, 128, 16), tile(4, 64, 16)],
        (_, ..=256, Amd | Nvidia | Qualcomm) => vec![tile(4, 128, 16), tile(2, 128, 16)],
        (_, _, Amd | Nvidia) => vec![tile(2, 128, 16), tile(4, 128, 16)],
        _ => vec![tile(2, 128, 16), tile(2, 64, 16)],
    }
}

/// Whether [`tiles`] names this tile for values of width `dim_v`, with any number of rows.
pub fn takes(kind: GpuKind, tile: Tile, dim_v: usize) -> bool {
    // One number of rows for each line of the table.
    [4, 8, 16, 17].into_iter().any(|rows| tiles(kind, rows, dim_v).contains(&tile))
}

/// Most rows per invocation of `scores.wgsl` and `weighted_sum.wgsl`, which keep them in registers.
pub fn rows_in_registers(kind: GpuKind) -> u32 {
    match kind {
        GpuKind::Amd | GpuKind::Nvidia => 2,
        _ => 1,
    }
}

/// What fraction of its multiply-add ceiling a GPU of this kind can reach in the fused kernel with these tiles, predicted:
/// the share of multiply-adds in the instructions of a key step, which its compiler's listing shows, or what reads of
/// workgroup memory leave, whichever is less. `None` where no listing is to be had, or the tile is not a default one.
/// No GPU has confirmed it yet. `name` is that of a variant.
pub fn predicted_share(kind: GpuKind, name: &str) -> Option<f64> {
    let tile = |tile: &str| name.strip_prefix("flash_tiled/")?.strip_prefix(tile);
    let (four_by_eight, four_by_sixteen) = (tile("rows4x128/across8/keys32/"), tile("rows4x128/across16/keys64/"));
    let two_by_sixteen = tile("rows2x128/across16/keys64/");
    let is = |rest: Option<&str>, dims: &str| rest.is_some_and(|rest| rest.starts_with(dims));
    let issue = match kind {
        GpuKind::Amd if is(four_by_eight, "dims64x64/") => 0.58,
        GpuKind::Amd if is(four_by_sixteen, "dims128x128/") => 0.57,
        GpuKind::Nvidia if is(four_by_eight, "dims64x64/") => 0.60,
        GpuKind::Nvidia if is(four_by_sixteen, "dims128x128/") => 0.56,
        GpuKind::Intel if is(four_by_sixteen, "dims64x64/") => 0.44,
        GpuKind::Intel if is(two_by_sixteen, "dims128x128/") => 0.34,
        _ => return None,
    };
    // A read of a vec4 per subgroup takes NVIDIA's workgroup memory (128 bytes per clock) as long as 16 multiply-adds. A
    // tile of 4 × 4 reads one for 8 of them in the first product, and for 8 or 10.7 in the second.
    let reads = match kind {
        GpuKind::Nvidia => 9.1 / 16.0,
        _ => 1.0,
    };
    Some(f64::min(issue, reads))
}
