//! The methods that compute a call, and the tiles of the fused kernels.

use super::capabilities::{AdapterClass, Capabilities};
use super::catalogue::TiledParts;
use super::gpu_kind;
use super::plan::rows_per_invocation;
use crate::error::{Error, Result, value_error};
use crate::problem::Problem;

/// Number of vec4s of a key and a value from which an invocation takes fewer keys per step, so that the WGSL compiles
/// sooner.
const WIDE4: usize = 192;
/// Number of vec4s of Q and O that an invocation of a software adapter keeps; they fill its L1 cache.
const KEPT: u32 = 256;
/// Most bytes of scores per batch entry for which three passes compete with the fused kernel: tuning must not turn a
/// call that stores no scores into one that fills the memory.
const MOST_SCORES: usize = 64 << 20;

/// The kernels that compute a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Method {
    /// The result of `Attention::tune`; without one, the fused kernel if possible. Requested weights and scores are
    /// computed separately.
    #[default]
    Auto,
    /// Scores, softmax and weighted sum, one after another.
    ThreePasses,
    /// One kernel that stores no scores; an error if it cannot compute the call.
    Fused,
    /// The fused kernel with this tile.
    Tile(Tile),
}

/// The tile that a workgroup of the fused kernel works on at a time, independent of the widths. The fastest tile
/// differs by adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Tile {
    /// Keeps rows of Q and O in the registers of an invocation (`flash.wgsl`).
    Registers {
        /// Invocations per workgroup.
        workgroup: u32,
        /// Query rows per invocation: 1, 2, 4 or 8.
        rows: u32,
        /// Keys per step: 1, 2, 4 or 8.
        keys: u32,
        /// Number of lanes that share their loads through subgroup operations; 1: each lane loads for itself.
        share: u32,
    },
    /// Keeps parts of a block of rows and of `4 · across` keys in workgroup memory (`flash_tiled.wgsl`).
    Workgroup {
        /// Invocations per workgroup: 64 or 128.
        workgroup: u32,
        /// Query rows per invocation: 1, 2, 4 or 8.
        rows: u32,
        /// Invocations that share these rows, each with four keys per step: 8 or 16.
        across: u32,
    },
}

impl Tile {
    /// Every tile in workgroup memory.
    pub const IN_MEMORY: [Tile; 8] = [
        Tile::Workgroup { workgroup: 128, rows: 4, across: 8 },
        Tile::Workgroup { workgroup: 64, rows: 4, across: 8 },
        Tile::Workgroup { workgroup: 64, rows: 8, across: 8 },
        Tile::Workgroup { workgroup: 128, rows: 4, across: 16 },
        Tile::Workgroup { workgroup: 128, rows: 2, across: 16 },
        Tile::Workgroup { workgroup: 64, rows: 4, across: 16 },
        Tile::Workgroup { workgroup: 64, rows: 2, across: 16 },
        Tile::Workgroup { workgroup: 64, rows: 1, across: 16 },
    ];

    /// Invocations per workgroup.
    pub fn workgroup(self) -> u32 {
        match self {
            Tile::Registers { workgroup, .. } | Tile::Workgroup { workgroup, .. } => workgroup,
        }
    }

    /// Rows per invocation.
    pub fn rows(self) -> u32 {
        match self {
            Tile::Registers { rows, .. } | Tile::Workgroup { rows, .. } => rows,
        }
    }

    /// Rows per workgroup.
    pub fn block_rows(self) -> usize {
        match self {
            Tile::Registers { workgroup, rows, .. } => (workgroup * rows) as usize,
            Tile::Workgroup { workgroup, rows, across } => (workgroup / across * rows) as usize,
        }
    }

    /// Number of invocations of a workgroup, and of lanes that share their loads, unless another tile is chosen.
    fn lanes(adapter: &Capabilities) -> (u32, u32) {
        let workgroup: u32 = match adapter.class {
            AdapterClass::Cpu => 8,
            AdapterClass::Gpu => 64,
        };
        let workgroup = workgroup.min(adapter.max_invocations);
        let share = match adapter.subgroup_min {
            Some(8..) if workgroup >= 8 => 8,
            Some(4..) if workgroup >= 4 => 4,
            _ => 1,
        };
        (workgroup, share)
    }

    /// The tile that runs unless another is chosen.
    pub(crate) fn default_for(problem: &Problem, adapter: &Capabilities) -> Tile {
        if adapter.class == AdapterClass::Gpu
            && let Some(tile) = Tile::of_gpu(problem, adapter).next()
        {
            return tile;
        }
        let (workgroup, share) = Tile::lanes(adapter);
        let rows = rows_per_invocation(problem.group() * problem.len_q, workgroup, most_rows(problem, adapter));
        let keys = match adapter.class {
            // If every lane of a software adapter loads for itself, loads dominate the time.
            AdapterClass::Cpu if share == 1 => 1,
            AdapterClass::Cpu if problem.dim_k.div_ceil(4) + problem.dim_v.div_ceil(4) >= WIDE4 => 2,
            _ => 4,
        };
        Tile::Registers { workgroup, rows, keys, share }
    }

    /// The tiles in workgroup memory for this kind of GPU, the default first, but for those that its driver refused.
    fn of_gpu(problem: &Problem, adapter: &Capabilities) -> impl Iterator<Item = Tile> {
        let tiles = gpu_kind::tiles(adapter.kind, problem.group() * problem.len_q, problem.dim_v);
        tiles.into_iter().filter(|tile| tile.check(adapter).is_ok() && !adapter.refused_tiles.contains(tile))
    }

    /// At most `most` tiles worth trying for a call, the default first.
    pub fn candidates(problem: &Problem, adapter: &Capabilities, most: usize) -> Vec<Tile> {
        let default = Tile::default_for(problem, adapter);
        // On a GPU, tiles in registers spill or leave invocations idle.
        let Tile::Registers { workgroup, rows, keys, share } = default else {
            return Tile::of_gpu(problem, adapter).take(most.max(1)).collect();
        };
        let (workgroups, keys_per_step): (&[u32], &[u32]) = match adapter.class {
            AdapterClass::Cpu => (&[8], &[4, 8, 1]),
            AdapterClass::Gpu => (&[64, 128, 32], &[4, 8]),
        };
        // Four numbers of the default, to compare others with.
        let first = [workgroup, rows, keys, share];
        let mut all = vec![default];
        let most_rows = most_rows(problem, adapter).max(4);
        let mut others = Vec::new();
        for &workgroup in workgroups {
            for &keys in keys_per_step {
                for rows in [8, 4, 2, 1].into_iter().filter(|&rows| rows <= most_rows) {
                    for share in [first[3], 1] {
                        let tile = Tile::Registers { workgroup, rows, keys, share };
                        let numbers = [workgroup, rows, keys, share];
                        let differ = numbers.iter().zip(first).filter(|&(&one, other)| one != other).count();
                        if differ < first.len() && tile.check(adapter).is_ok() {
                            others.push((differ, tile));
                        }
                    }
                }
            }
        }
        // Tiles that differ in one number come first.
        others.sort_by_key(|&(differ, _)| differ);
        for (_, tile) in others {
            if !all.contains(&tile) {
                all.push(tile);
            }
        }
        all.truncate(most.max(1));
        all
    }

    pub(crate) fn check(&self, adapter: &Capabilities) -> Result<()> {
        let rule = |rule: String| Err(value_error!("the tile {self} cannot run on {}: {rule}", adapter.adapter));
        let (workgroup, rows, keys, share) = match *self {
            Tile::Registers { workgroup, rows, keys, share } => (workgroup, rows, keys, share),
            Tile::Workgroup { workgroup, rows, across } => {
                // At the width that needs the most.
                let needed = TiledParts::new([workgroup, rows, across], [128, 128]).memory;
                return if !Tile::IN_MEMORY.contains(self) {
                    rule(format!(
                        "tiles in workgroup memory are {}",
                        Tile::IN_MEMORY.map(|tile| tile.to_string()).join(", ")
                    ))
                } else if workgroup > adapter.max_invocations {
                    rule(format!("a workgroup has at most {} invocations", adapter.max_invocations))
                } else if needed > adapter.workgroup_memory {
                    rule(format!("it takes {needed} bytes of workgroup memory of {}", adapter.workgroup_memory))
                } else {
                    Ok(())
                };
            }
        };
        if ![1, 2, 4, 8].contains(&rows) || ![1, 2, 4, 8].contains(&keys) {
            return rule("rows and keys must be 1, 2, 4 or 8".into());
        }
        if ![1, 4, 8].contains(&share) || share > 1 && adapter.subgroup_min.is_none_or(|least| least < share) {
            let least = adapter.subgroup_min.map_or("none".into(), |least| least.to_string());
            return rule(format!(
                "1, 4 or 8 lanes can share loads, at most the smallest subgroup size, which is {least}"
            ));
        }
        let most = adapter.max_invocations.min(256);
        if workgroup == 0 || !workgroup.is_multiple_of(share) || workgroup > most {
            return rule(format!("a workgroup must be a multiple of the lanes that share loads, at most {most}"));
        }
        Ok(())
    }
}

/// `rows8x8/keys8/subgroup8`: rows per invocation, invocations, keys, lanes that share loads; `rows4x128/across8`: in
/// workgroup memory, rows per invocation, invocations, and how many of them share rows.
impl std::fmt::Display for Tile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match *self {
            Tile::Registers { workgroup, rows, keys, share } => {
                write!(f, "rows{rows}x{workgroup}/keys{keys}")?;
                if share > 1 { write!(f, "/subgroup{share}") } else { Ok(()) }
            }
            Tile::Workgroup { workgroup, rows, across } => write!(f, "rows{rows}x{workgroup}/across{across}"),
        }
    }
}

impl std::str::FromStr for Tile {
    type Err = Error;
    fn from_str(text: &str) -> Result<Tile> {
        let parse = || {
            let (rows, rest) = text.strip_prefix("rows")?.split_once('x')?;
            if let Some((workgroup, across)) = rest.split_once("/across") {
                let [workgroup, rows, across] = [workgroup, rows, across].map(|n| n.parse().ok());
                return Some(Tile::Workgroup { workgroup: workgroup?, rows: rows?, across: across? });
            }
            let (workgroup, rest) = rest.split_once("/keys")?;
            let (keys, share) = rest.split_once("/subgroup").unwrap_or((rest, "1"));
            let [rows, workgroup, keys, share] = [rows, workgroup, keys, share].map(|n| n.parse().ok());
            Some(Tile::Registers { workgroup: workgroup?, rows: rows?, keys: keys?, share: share? })
        };
        parse().ok_or_else(|| {
            value_error!(
                "{text:?} is not a tile of the fused kernel; try rows8x8/keys8/subgroup8, rows4x64/keys4 or rows4x128/across8"
            )
        })
    }
}

impl Method {
    /// One of each kind of method on an adapter: the three passes, the fused kernel's default tile, and tiles with
    /// every number of rows and with small and large workgroups, with and without subgroups, and in workgroup memory.
    /// For tests and checks: a fixed list, not the fastest.
    pub fn every(adapter: &Capabilities) -> Vec<Method> {
        let (workgroup, share) = Tile::lanes(adapter);
        let other = if workgroup == 64 { 32 } else { 64 };
        let mut all = vec![Method::ThreePasses, Method::Fused];
        let tiles = [
            (workgroup, 8, 8, share),
            (workgroup, 4, 4, share),
            (workgroup, 2, 1, share),
            (workgroup, 1, 4, share),
            (other, 1, 4, share),
            (workgroup, 4, 4, 1),
            (workgroup, 1, 8, 1),
        ];
        let tiles = tiles.map(|(workgroup, rows, keys, share)| Tile::Registers { workgroup, rows, keys, share });
        let in_memory = [0, 2, 3, 4, 7].map(|n| Tile::IN_MEMORY[n]);
        for tile in tiles.into_iter().chain(in_memory) {
            if tile.check(adapter).is_ok() && !all.contains(&Method::Tile(tile)) {
                all.push(Method::Tile(tile));
            }
        }
        all
    }
}

/// `auto`, `three passes`, `fused` or a [`Tile`].
impl std::fmt::Display for Method {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Method::Auto => f.write_str("auto"),
            Method::ThreePasses => f.write_str("three passes"),
            Method::Fused => f.write_str("fused"),
            Method::Tile(tile) => tile.fmt(f),
        }
    }
}

impl std::str::FromStr for Method {
    type Err = Error;
    fn from_str(text: &str) -> Result<Method> {
        Ok(match text {
            "auto" => Method::Auto,
            "three passes" | "three-passes" => Method::ThreePasses,
            "fused" => Method::Fused,
            tile => Method::Tile(tile.parse().map_err(|_| {
                value_error!(
                    "{text:?} is not a method; use auto, three-passes, fused or a tile of the fused kernel, such as \
                     rows8x8/keys8/subgroup8, rows4x64/keys4 or rows4x128/across8"
                )
            })?),
        })
    }
}

/// The most rows that an invocation can keep.
fn most_rows(problem: &Problem, adapter: &Capabilities) -> u32 {
    match adapter.class {
        AdapterClass::Cpu => (KEPT / (problem.dim_k.div_ceil(4) + problem.dim_v.div_ceil(4)) as u32).max(1),
        // Registers are few.
        AdapterClass::Gpu => 1,
    }
}

/// Whether three passes may replace the fused kernel. Independent of the batch.
pub(crate) fn three_passes_compete(problem: &Problem) -> bool {
    let bytes = [problem.heads_q, problem.len_q, problem.len_k, 4].into_iter().try_fold(1, usize::checked_mul);
    bytes.is_some_and(|bytes| bytes <= MOST_SCORES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problem::Positions;

    #[test]
    fn texts_are_read_as_written() {
        for method in
            ["auto", "three passes", "fused", "rows8x8/keys8/subgroup8", "rows4x64/keys4", "rows4x128/across8"]
        {
            assert_eq!(method.parse::<Method>().unwrap().to_string(), method);
        }
        assert_eq!("three-passes".parse::<Method>().unwrap(), Method::ThreePasses);
        let message = "fast".parse::<Method>().unwrap_err().to_string();
        assert!(message.contains("\"fast\"") && message.contains("three-passes"), "{message}");
    }

    #[test]
    fn three_passes_compete_where_scores_are_few() {
        let of = |batch, len| {
            let shape = [batch, 8, len, 64];
            Problem::new(&shape, &shape, &shape, None, None, &Positions::default(), 0).unwrap()
        };
        assert!(three_passes_compete(&of(1, 1024)) && three_passes_compete(&of(1000, 1024)));
        assert!(!three_passes_compete(&of(1, 2048)));
    }
}
