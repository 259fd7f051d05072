use std::ops::Range;

use rayon::prelude::*;

use super::attention::{Keys, SCORES_STRIDE, TILE_KEYS, Tile};
use super::product::{FEW_ROWS, Panels};
use super::{Buffer, Inputs, Matrix, View, exp, take, threads};
use crate::problem::{Chosen, Problem, ScoreStage};

/// Rows per product. Tiles start at multiples of it whatever is chosen.
const TILE_ROWS: usize = 32;

/// Smaller logarithms are cut off: exp gives 0.
const LEAST_LOG: f32 = -138.0;

/// Results, row-major; empty if not requested.
pub(crate) struct Inspection {
    /// `[b, heads, queries, j]`
    pub weights: Buffer,
    /// `[b, heads, j]`
    pub column_sums: Buffer,
    /// `[b, heads, queries]`
    pub entropy: Buffer,
}

/// `P = exp(S − LSE)` for the chosen rows, tile by tile; `lse` is `[b, hq, i]`.
pub(crate) fn inspect(problem: &Problem, inputs: &Inputs<'_>, lse: View<'_>, chosen: &Chosen) -> Inspection {
    let Problem { batch, heads_kv, len_q, len_k, .. } = *problem;
    let count = batch * chosen.heads.len();
    let rows = chosen.queries.len();
    let zeros = |is_wanted: bool, len: usize| Buffer::filled(if is_wanted { len } else { 0 }, 0.0);
    let mut weights = zeros(chosen.weights, count * rows * len_k);
    let mut column_sums = zeros(chosen.column_sums, count * len_k);
    let mut entropy = zeros(chosen.entropy, count * rows);
    if count * rows * len_k > 0 {
        let keys = (0..batch * heads_kv).into_par_iter().map(|n| inputs.k.matrix(&[n / heads_kv, n % heads_kv]));
        let keys: Vec<Matrix<'_>> = keys.collect();
        let mut packed = Vec::new();
        if len_q >= FEW_ROWS {
            packed.resize_with(keys.len(), Panels::default);
            let moved = (keys.len() * len_k * problem.dim_k) as f64;
            threads::for_each(packed.iter_mut().zip(&keys).collect(), moved, |(packed, keys)| {
                packed.pack_transposed(keys, 0..len_k);
            });
        }
        let sweep = Sweep { problem, inputs, lse, keys, packed };
        let heads = || (0..count).map(|n| (n / chosen.heads.len(), chosen.heads[n % chosen.heads.len()]));
        let first = chosen.queries.start / TILE_ROWS * TILE_ROWS;
        let tiles = (first..chosen.queries.end).step_by(TILE_ROWS).map(|i| i..len_q.min(i + TILE_ROWS));
        let tiles: Vec<_> = tiles.collect();
        let within = |tile: &Range<usize>| tile.start.max(chosen.queries.start)..tile.end.min(chosen.queries.end);

        if chosen.weights || chosen.entropy {
            let (mut weights, mut entropy) = (&mut weights[..], &mut entropy[..]);
            let mut tasks = Vec::new();
            for (b, h) in heads() {
                for tile in &tiles {
                    let rows = within(tile);
                    let of_tile = (take(&mut weights, rows.len() * len_k), take(&mut entropy, rows.len()));
                    tasks.push((b, h, tile.clone(), rows, of_tile));
                }
            }
            tasks.into_par_iter().for_each_init(Scratch::default, |scratch, (b, h, tile, rows, (weights, entropy))| {
                let mut exact = vec![0.0; entropy.len()];
                for keys in blocks(len_k) {
                    sweep.block(scratch, [b, h], &tile, &rows, &keys, |row, p, log_p| {
                        if !weights.is_empty() {
                            weights[row * len_k + keys.start..][..keys.len()].copy_from_slice(p);
                        }
                        if !exact.is_empty() {
                            exact[row] += entropy_of(p, log_p);
                        }
                    });
                }
                entropy.iter_mut().zip(exact).for_each(|(entropy, exact)| *entropy = exact as f32);
            });
        }
        if chosen.column_sums {
            let heads: Vec<_> = heads().zip(column_sums.chunks_mut(len_k)).collect();
            let tasks: Vec<_> = (heads.into_iter())
                .flat_map(|(at, sums)| blocks(len_k).zip(sums.chunks_mut(TILE_KEYS)).map(move |task| (at, task)))
                .collect();
            tasks.into_par_iter().for_each_init(Scratch::default, |scratch, ((b, h), (keys, sums))| {
                let mut exact = vec![0.0f64; sums.len()];
                for tile in &tiles {
                    sweep.block(scratch, [b, h], tile, &within(tile), &keys, |_, p, _| {
                        exact.iter_mut().zip(p).for_each(|(sum, &p)| *sum += f64::from(p));
                    });
                }
                sums.iter_mut().zip(exact).for_each(|(sum, exact)| *sum = exact as f32);
            });
        }
    }
    Inspection { weights, column_sums, entropy }
}

fn blocks(len_k: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len_k).step_by(TILE_KEYS).map(move |j| j..len_k.min(j + TILE_KEYS))
}

/// `−Σ P·ln P` of a block of keys, in 32 f32 sums that fit vector registers.
fn entropy_of(p: &[f32], log_p: &[f32]) -> f64 {
    const SUMS: usize = 32;
    // Rounding may raise ln P above 0 by an ulp.
    let term = |p: f32, log_p: f32| p * (-log_p.max(LEAST_LOG)).max(0.0);
    let mut sums = [0.0; SUMS];
    let (chunks, rest) = p.as_chunks::<SUMS>();
    let (log_chunks, log_rest) = log_p.as_chunks::<SUMS>();
    for (p, log_p) in chunks.iter().zip(log_chunks) {
        (0..SUMS).for_each(|n| sums[n] += term(p[n], log_p[n]));
    }
    rest.iter().zip(log_rest).zip(&mut sums).for_each(|((&p, &log_p), sum)| *sum += term(p, log_p));
    sums.into_iter().map(f64::from).sum()
}

#[derive(Default)]
struct Scratch {
    q: Vec<f32>,
    scores: Vec<f32>,
    log_p: Vec<f32>,
}

struct Sweep<'a> {
    problem: &'a Problem,
    inputs: &'a Inputs<'a>,
    lse: View<'a>,
    /// `[b, hkv]`
    keys: Vec<Matrix<'a>>,
    /// The same, packed, unless there are few queries.
    packed: Vec<Panels>,
}

impl Sweep<'_> {
    /// Calls back with the chosen `rows` of a tile of one head: the number among the chosen, `P` and `ln P` of `keys`.
    /// Skips the tile if positions hide all of it.
    fn block(
        &self,
        scratch: &mut Scratch,
        [b, h]: [usize; 2],
        tile: &Range<usize>,
        rows: &Range<usize>,
        keys: &Range<usize>,
        mut each: impl FnMut(usize, &[f32], &[f32]),
    ) {
        let arch = pulp::Arch::new();
        let ruled = self.problem.maskable_keys();
        let band = self.problem.band(b);
        let by_position = |i: usize| band.range(i, ruled);
        let sees = |i: usize| by_position(i).start < keys.end && by_position(i).end > keys.start;
        if keys.end <= ruled && !rows.clone().any(sees) {
            return;
        }
        let (head_kv, in_group) = (h / self.problem.group(), h % self.problem.group());
        let tile_of_head = Tile {
            problem: self.problem,
            inputs: self.inputs,
            b,
            head_kv,
            first: in_group * self.problem.len_q + tile.start,
            count: tile.len(),
        };
        let head = b * self.problem.heads_kv + head_kv;
        let of_head = self.packed.get(head).map_or(Keys::Rows(&self.keys[head]), |keys| Keys::Packed(keys, 0));
        let Scratch { q, scores, log_p } = scratch;
        let q = &tile_of_head.queries(q);
        scores.resize(tile.len() * SCORES_STRIDE, 0.0);
        tile_of_head.products(q, of_head, keys.clone(), scores, SCORES_STRIDE);
        for i in rows.clone() {
            let line = &mut scores[(i - tile.start) * SCORES_STRIDE..][..keys.len()];
            let lse = self.lse.data[self.lse.layout.at(&[b, h, i])];
            if lse == f32::NEG_INFINITY {
                line.fill(0.0);
            } else if lse.is_nan() {
                // A masked key has weight 0 even in a row that is NaN.
                let weight = |j| if tile_of_head.visible(h, i, j) { f32::NAN } else { 0.0 };
                line.iter_mut().zip(keys.clone()).for_each(|(to, j)| *to = weight(j));
            } else {
                tile_of_head.rules(i - tile.start, by_position(i), keys.start, line, ScoreStage::Masked);
                // exp overflows above 88; with the LSE of this row, only rounding leaves anything above 0.
                line.iter_mut().for_each(|x| *x = if *x - lse > 88.0 { 88.0 } else { *x - lse });
            }
            log_p.clear();
            log_p.extend_from_slice(line);
            if lse.is_finite() {
                exp::exp_and_sum(arch, line, 0.0);
            }
            each(i - rows.start, line, log_p);
        }
    }
}
