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

/// Most rows per invocation of `scores.wgsl` and `weighted_sum.wgsl`, which keep them in registers.
pub fn rows_in_registers(kind: GpuKind) -> u32 {
    match kind {
        GpuKind::Amd | GpuKind::Nvidia => 2,
        _ => 1,
    }
}
