use std::borrow::Cow;
use std::ops::Range;

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, Par};
use rayon::prelude::*;

use super::{Inputs, Matrix, Outputs, exp};
use crate::attention::{Wanted, Weights};
use crate::problem::{Layout, Problem, ScoreStage};

/// Bytes of scores that one task holds: half of a common L2 cache.
const TILE_BYTES: usize = 256 << 10;

/// Rows per task: query rows of all heads that share keys count together.
fn tile_rows(len_k: usize) -> usize {
    (TILE_BYTES / 4 / len_k.max(1)).clamp(8, 128)
}

/// Attention of a checked problem; `output` is the layout of the result, contiguous in some order.
pub(crate) fn attention(problem: &Problem, inputs: &Inputs<'_>, wanted: Wanted, output: &Layout) -> Outputs {
    let Problem { batch, heads_q, heads_kv, len_q, len_k, dim_v, .. } = *problem;
    let rows = batch * heads_q * len_q;
    let mut out = vec![0.0; rows * dim_v];
    let mut lse = vec![f32::NEG_INFINITY; rows];
    let keep_weights = wanted.weights != Weights::None || wanted.scores == Some(ScoreStage::Weights);
    let mut weights = vec![0.0; if keep_weights { rows * len_k } else { 0 }];
    let stage = wanted.scores.filter(|&stage| stage != ScoreStage::Weights);
    let mut scores = vec![0.0; if stage.is_some() { rows * len_k } else { 0 }];

    if rows > 0 && len_k > 0 {
        // Rows that share keys lie side by side: [b, kv head] first, then the rows of the group.
        let per_head = problem.group() * len_q;
        let per_tile = tile_rows(len_k);
        let heads: Vec<(Matrix<'_>, Values<'_>)> = (0..batch * heads_kv)
            .into_par_iter()
            .map(|n| {
                let at = [n / heads_kv, n % heads_kv];
                (inputs.k.matrix(&at), Values::new(inputs.v.matrix(&at)))
            })
            .collect();
        let mut tiles = Vec::new();
        let mut rest = Slices { out: &mut out, lse: &mut lse, weights: &mut weights, scores: &mut scores };
        for (n, (k, v)) in heads.iter().enumerate() {
            for first in (0..per_head).step_by(per_tile) {
                let count = per_tile.min(per_head - first);
                let slices = rest.split_off(count, dim_v, len_k);
                let (b, head_kv) = (n / heads_kv, n % heads_kv);
                tiles.push((Tile { problem, inputs, b, head_kv, first, count, k, v, stage }, slices));
            }
        }
        tiles.into_par_iter().for_each(|(tile, slices)| tile.run(slices));
    }

    let averaged = (wanted.weights == Weights::Averaged).then(|| average(problem, &weights));
    Outputs {
        output: in_order(out, problem, output),
        lse: wanted.lse.then_some(lse),
        scores: match wanted.scores {
            Some(ScoreStage::Weights) => Some(weights.clone()),
            stage => stage.map(|_| scores),
        },
        weights: averaged.or((wanted.weights == Weights::PerHead).then_some(weights)),
    }
}

/// The parts of the results that one tile writes. Empty where nothing was asked for.
struct Slices<'a> {
    out: &'a mut [f32],
    lse: &'a mut [f32],
    weights: &'a mut [f32],
    scores: &'a mut [f32],
}

impl<'a> Slices<'a> {
    /// Takes the first `rows` rows.
    fn split_off(&mut self, rows: usize, dim_v: usize, len_k: usize) -> Slices<'a> {
        fn take<'a>(from: &mut &'a mut [f32], count: usize) -> &'a mut [f32] {
            let whole = std::mem::take(from);
            let (taken, rest) = whole.split_at_mut(count.min(whole.len()));
            *from = rest;
            taken
        }
        Slices {
            out: take(&mut self.out, rows * dim_v),
            lse: take(&mut self.lse, rows),
            weights: take(&mut self.weights, rows * len_k),
            scores: take(&mut self.scores, rows * len_k),
        }
    }
}

struct Tile<'a> {
    problem: &'a Problem,
    inputs: &'a Inputs<'a>,
    b: usize,
    head_kv: usize,
    /// Rows of the group: row `r` is query `r % len_q` of the group's head `r / len_q`.
    first: usize,
    count: usize,
    k: &'a Matrix<'a>,
    v: &'a Values<'a>,
    stage: Option<ScoreStage>,
}

impl Tile<'_> {
    /// Head and query of a row.
    fn query(&self, row: usize) -> (usize, usize) {
        let r = self.first + row;
        (self.head_kv * self.problem.group() + r / self.problem.len_q, r % self.problem.len_q)
    }

    /// `scale · Q·Kᵀ` of the tile's rows and a range of keys.
    fn products(&self, low: usize, high: usize) -> Vec<f32> {
        let Problem { dim_k, scale, .. } = *self.problem;
        let width = high - low;
        let mut s = vec![0.0f32; self.count * width];
        if dim_k > 0 && width > 0 {
            let step = self.inputs.q.layout.strides()[3];
            let mut q = Vec::with_capacity(self.count * dim_k);
            for row in 0..self.count {
                let (h, i) = self.query(row);
                let at = self.inputs.q.layout.at(&[self.b, h, i, 0]);
                q.extend((0..dim_k).map(|d| self.inputs.q.data[at + d * step]));
            }
            let q = faer::MatRef::from_row_major_slice(&q, self.count, dim_k);
            let s = MatMut::from_row_major_slice_mut(&mut s, self.count, width);
            matmul(s, Accum::Replace, q, self.k.rows(low, high).transpose(), scale, Par::Seq);
        }
        s
    }

    fn run(&self, slices: Slices<'_>) {
        let Problem { len_k, dim_v, .. } = *self.problem;
        let arch = pulp::Arch::new();
        let ruled = self.problem.ruled_keys();
        let band = self.problem.band(self.b);

        // The keys that any row may see; all of them where scores are handed out.
        let ranges: Vec<_> = (0..self.count).map(|row| band.range(self.query(row).1, ruled)).collect();
        let mut low = ranges.iter().map(|range| range.start).min().unwrap_or(0);
        let mut high = ranges.iter().map(|range| range.end).max().unwrap_or(0);
        if self.problem.extra_keys > 0 {
            (low, high) = (low.min(ruled), len_k);
        }
        if let Some(stage) = self.stage {
            // Apart from the scores that are summed, so that asking changes no bit of the output.
            let mut all = self.products(0, len_k);
            for (row, (line, range)) in all.chunks_mut(len_k).zip(&ranges).enumerate() {
                self.rules(row, range.clone(), 0, line, stage);
            }
            slices.scores.copy_from_slice(&all);
        }
        if low >= high {
            return;
        }
        let width = high - low;
        let mut s = self.products(low, high);

        let mut factors = vec![0.0; self.count];
        for (row, range) in ranges.iter().enumerate() {
            let line = &mut s[row * width..][..width];
            self.rules(row, range.clone(), low, line, ScoreStage::Masked);
            let peak = exp::peak(arch, line);
            let broken = line.iter().any(|x| x.is_nan());
            if peak == f32::NEG_INFINITY && !broken {
                line.fill(0.0);
                continue;
            }
            let hidden: Vec<usize> =
                if broken { (0..width).filter(|&j| line[j] == f32::NEG_INFINITY).collect() } else { Vec::new() };
            let sum = exp::exp_and_sum(arch, line, peak);
            slices.lse[row] = if broken { f32::NAN } else { peak + sum.ln() };
            factors[row] = 1.0 / sum;
            if !slices.weights.is_empty() {
                let to = &mut slices.weights[row * len_k + low..][..width];
                exp::scale_into(arch, to, line, factors[row]);
                // 0 · NaN: a masked key weighs 0 also in a row that is NaN.
                hidden.iter().for_each(|&j| to[j] = 0.0);
            }
        }

        if dim_v == 0 {
            return;
        }
        let p = faer::MatRef::from_row_major_slice(&s, self.count, width);
        let o = MatMut::from_row_major_slice_mut(&mut *slices.out, self.count, dim_v);
        matmul(o, Accum::Replace, p, self.v.matrix.rows(low, high), 1.0, Par::Seq);
        self.add_not_finite(&s, low, width, slices.out);
        for (o, &factor) in slices.out.chunks_mut(dim_v).zip(&factors) {
            if factor == 0.0 {
                // Nothing was visible, or the sum is infinite and every weight 0.
                o.fill(0.0);
            } else {
                o.iter_mut().for_each(|x| *x *= factor);
            }
        }
    }

    /// Softcap, bias and mask, up to `stage`, on a row of products with the keys from `low` on;
    /// `range` are the keys its position allows.
    fn rules(&self, row: usize, range: Range<usize>, low: usize, line: &mut [f32], stage: ScoreStage) {
        let (h, i) = self.query(row);
        let ruled = self.problem.ruled_keys();
        if stage == ScoreStage::Scaled {
            return;
        }
        if let Some(cap) = self.problem.softcap {
            line.iter_mut().for_each(|x| *x = cap * (*x / cap).tanh());
        }
        if stage == ScoreStage::Capped {
            return;
        }
        let high = low + line.len();
        line[..range.start.clamp(low, high) - low].fill(f32::NEG_INFINITY);
        let behind = range.end.clamp(low, high)..ruled.clamp(low, high);
        if behind.start < behind.end {
            line[behind.start - low..behind.end - low].fill(f32::NEG_INFINITY);
        }
        if !self.inputs.biases.is_empty() || !self.inputs.masks.is_empty() {
            for j in range.start.max(low)..range.end.min(high) {
                let at = [self.b, h, i, j];
                for bias in &self.inputs.biases {
                    let bias = bias.data[bias.layout.at(&at)];
                    let x = &mut line[j - low];
                    // −∞ hides the key whatever it holds: NaN − ∞ would be NaN.
                    *x = if bias == f32::NEG_INFINITY || *x == f32::NEG_INFINITY {
                        f32::NEG_INFINITY
                    } else {
                        *x + bias
                    };
                }
                if !self.inputs.masks.iter().all(|mask| mask.keeps(at)) {
                    line[j - low] = f32::NEG_INFINITY;
                }
            }
        }
    }

    fn visible(&self, h: usize, i: usize, j: usize) -> bool {
        let at = [self.b, h, i, j];
        j >= self.problem.ruled_keys()
            || self.problem.band(self.b).range(i, self.problem.ruled_keys()).contains(&j)
                && self.inputs.masks.iter().all(|mask| mask.keeps(at))
                && self.inputs.biases.iter().all(|bias| bias.data[bias.layout.at(&at)] != f32::NEG_INFINITY)
    }

    /// Adds the terms of values that are not finite, which were taken as 0, where a row may see them.
    fn add_not_finite(&self, p: &[f32], low: usize, width: usize, out: &mut [f32]) {
        for &(j, d, value) in self.v.not_finite.iter().filter(|(j, ..)| (low..low + width).contains(j)) {
            for row in 0..self.count {
                let (h, i) = self.query(row);
                if self.visible(h, i, j) {
                    out[row * self.problem.dim_v + d] += p[row * width + j - low] * value;
                }
            }
        }
    }
}

/// The values of one head: 0 · NaN is NaN, so what is not finite is set to 0 and kept apart.
struct Values<'a> {
    matrix: Matrix<'a>,
    /// Key, column, value.
    not_finite: Vec<(usize, usize, f32)>,
}

impl Values<'_> {
    fn new(mut matrix: Matrix<'_>) -> Values<'_> {
        let arch = pulp::Arch::new();
        let mut not_finite = Vec::new();
        for j in (0..matrix.rows).filter(|&j| !exp::all_finite(arch, matrix.row(j))) {
            not_finite
                .extend((matrix.row(j).iter().enumerate()).filter(|(_, x)| !x.is_finite()).map(|(d, &x)| (j, d, x)));
        }
        if !not_finite.is_empty() {
            let stride = matrix.stride;
            let mut clean = matrix.data.into_owned();
            not_finite.iter().for_each(|&(j, d, _)| clean[j * stride + d] = 0.0);
            matrix.data = Cow::Owned(clean);
        }
        Values { matrix, not_finite }
    }
}

/// The mean over heads, summed in order: `[b, i, j]`.
fn average(problem: &Problem, weights: &[f32]) -> Vec<f32> {
    let Problem { batch, heads_q, len_q, len_k, .. } = *problem;
    let square = len_q * len_k;
    let mut out = vec![0.0; batch * square];
    if out.is_empty() {
        return out;
    }
    out.par_chunks_mut(square).enumerate().for_each(|(b, out)| {
        for h in 0..heads_q {
            let head = &weights[(b * heads_q + h) * square..][..square];
            out.iter_mut().zip(head).for_each(|(sum, weight)| *sum += weight);
        }
        let factor = 1.0 / heads_q.max(1) as f32;
        out.iter_mut().for_each(|sum| *sum *= factor);
    });
    out
}

/// Row-major `[b, h, i, d]` in the memory order of `layout`.
fn in_order(out: Vec<f32>, problem: &Problem, layout: &Layout) -> Vec<f32> {
    if layout.is_contiguous() {
        return out;
    }
    // The one other order there is: [b, i, h, d].
    let Problem { heads_q, len_q, dim_v, .. } = *problem;
    let per_batch = heads_q * len_q * dim_v;
    let mut ordered = vec![0.0; out.len()];
    ordered.par_chunks_mut(per_batch).zip(out.par_chunks(per_batch)).for_each(|(to, from)| {
        for (at, row) in to.chunks_mut(dim_v).enumerate() {
            let (i, h) = (at / heads_q, at % heads_q);
            row.copy_from_slice(&from[(h * len_q + i) * dim_v..][..dim_v]);
        }
    });
    ordered
}
