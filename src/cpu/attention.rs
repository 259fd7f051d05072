use std::borrow::Cow;
use std::cell::RefCell;
use std::ops::Range;

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, Par};
use rayon::prelude::*;

use super::{Inputs, Matrix, Outputs, exp, take};
use crate::kernels::catalogue::RelativeKind;
use crate::problem::{Layout, Problem, ScoreStage, Wanted, Weights};

/// Rows per task. Query rows of all heads that share keys count together.
const TILE_ROWS: usize = 128;

/// Keys per step of the online softmax: a tile of scores fits a common L2 cache.
pub(super) const TILE_KEYS: usize = 512;

/// Number of keys that one matrix product sums sequentially in f32. Longer sums lose digits: an f32 sum of n equal
/// values is off by up to n / 2 ulp.
const SUMMED_KEYS: usize = 128;

/// With fewer rows than this, starting a product costs more than computing it, so it sums twice as many keys.
const FEW_ROWS: usize = 16;

/// Number of steps whose products are summed in f32 before their sum is added in f64.
const SUMMED_TILES: usize = 4;

thread_local! {
    // Kept between calls, because fresh memory of this size costs more than the arithmetic on it.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

#[derive(Default)]
struct Scratch {
    q: Vec<f32>,
    scores: Vec<f32>,
    /// Output rows before division by their sum, over the keys that are no longer summed in f32.
    gathered: Vec<f64>,
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

    if rows > 0 {
        // Rows that share keys are adjacent: [b, kv head] first, then the rows of the group.
        let per_head = problem.group() * len_q;
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
            for first in (0..per_head).step_by(TILE_ROWS) {
                let count = TILE_ROWS.min(per_head - first);
                let slices = rest.split_off(count, dim_v, len_k);
                let (b, head_kv) = (n / heads_kv, n % heads_kv);
                tiles.push((Tile { problem, inputs, b, head_kv, first, count, k }, v, slices));
            }
        }
        tiles.into_par_iter().for_each(|(tile, v, slices)| {
            SCRATCH.with_borrow_mut(|scratch| tile.run(v, stage, scratch, slices));
        });
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

/// The parts of the results that one tile writes. Empty for results that were not requested.
struct Slices<'a> {
    out: &'a mut [f32],
    lse: &'a mut [f32],
    weights: &'a mut [f32],
    scores: &'a mut [f32],
}

impl<'a> Slices<'a> {
    /// Splits off the first `rows` rows.
    fn split_off(&mut self, rows: usize, dim_v: usize, len_k: usize) -> Slices<'a> {
        Slices {
            out: take(&mut self.out, rows * dim_v),
            lse: take(&mut self.lse, rows),
            weights: take(&mut self.weights, rows * len_k),
            scores: take(&mut self.scores, rows * len_k),
        }
    }
}

pub(super) struct Tile<'a> {
    pub problem: &'a Problem,
    pub inputs: &'a Inputs<'a>,
    pub b: usize,
    pub head_kv: usize,
    /// Rows of the group: row `r` is query `r % len_q` of the group's head `r / len_q`.
    pub first: usize,
    pub count: usize,
    pub k: &'a Matrix<'a>,
}

impl Tile<'_> {
    /// Head and query of a row.
    fn query(&self, row: usize) -> (usize, usize) {
        let r = self.first + row;
        (self.head_kv * self.problem.group() + r / self.problem.len_q, r % self.problem.len_q)
    }

    /// Collects the tile's queries, one after another.
    pub fn queries(&self, q: &mut Vec<f32>) {
        let Problem { dim_k, .. } = *self.problem;
        let step = self.inputs.q.layout.strides()[3];
        q.clear();
        for row in 0..self.count {
            let (h, i) = self.query(row);
            let at = self.inputs.q.layout.at(&[self.b, h, i, 0]);
            match step {
                _ if dim_k == 0 => {}
                1 => q.extend_from_slice(&self.inputs.q.data[at..at + dim_k]),
                _ => q.extend((0..dim_k).map(|d| self.inputs.q.data[at + d * step])),
            }
        }
    }

    /// `scale · Q·Kᵀ` for the tile's rows and a range of keys.
    pub fn products(&self, q: &[f32], keys: Range<usize>, scores: &mut Vec<f32>) {
        let Problem { dim_k, scale, .. } = *self.problem;
        scores.resize(self.count * keys.len(), 0.0);
        if dim_k == 0 {
            scores.fill(0.0);
        } else if !keys.is_empty() {
            let q = faer::MatRef::from_row_major_slice(q, self.count, dim_k);
            let s = MatMut::from_row_major_slice_mut(scores, self.count, keys.len());
            matmul(s, Accum::Replace, q, self.k.rows(keys.start, keys.end).transpose(), scale, Par::Seq);
        }
    }

    /// Online softmax (Milakov and Gimelshein 2018) over blocks of keys; the output is rescaled when a block raises the
    /// maximum (Dao 2023, section 3.1). A few blocks are summed in f32, and their results in f64, so rows of any length
    /// keep their digits.
    fn run(&self, v: &Values<'_>, stage: Option<ScoreStage>, scratch: &mut Scratch, slices: Slices<'_>) {
        let Problem { len_k, dim_v, .. } = *self.problem;
        let arch = pulp::Arch::new();
        let ruled = self.problem.maskable_keys();
        let band = self.problem.band(self.b);
        let Scratch { q, scores, gathered } = scratch;
        self.queries(q);

        // The keys that any row may see.
        let ranges: Vec<_> = (0..self.count).map(|row| band.range(self.query(row).1, ruled)).collect();
        let mut low = ranges.iter().map(|range| range.start).min().unwrap_or(0);
        let mut high = ranges.iter().map(|range| range.end).max().unwrap_or(0);
        if self.problem.extra_keys > 0 {
            (low, high) = (low.min(ruled), len_k);
        }
        if let Some(stage) = stage {
            // Separate from the scores that are summed, so that requesting scores does not change the output's bits.
            self.products(q, 0..len_k, scores);
            for (row, (line, range)) in scores.chunks_mut(len_k.max(1)).zip(&ranges).enumerate() {
                self.rules(row, range.clone(), 0, line, stage);
            }
            slices.scores.copy_from_slice(scores);
        }

        let (mut peaks, mut sums): (Vec<f32>, Vec<f64>) = (0..self.count).map(|row| self.first(row)).unzip();
        // The shift of each block's weights, for requested weights.
        let mut shifts = Vec::new();
        let blocks: Vec<_> = (low..high).step_by(TILE_KEYS).map(|at| at..high.min(at + TILE_KEYS)).collect();
        let summed_keys = if self.count < FEW_ROWS { 2 * SUMMED_KEYS } else { SUMMED_KEYS };
        // A product with one row adds to the existing values number by number, so several products form one long sum.
        let alone = self.count == 1;
        let gathers = alone && len_k > summed_keys || blocks.len() > SUMMED_TILES;
        let mut has_gathered = false;
        if gathers {
            // Overwrites the leftovers of another tile.
            gathered.resize(self.count * dim_v, 0.0);
        }
        for (n, keys) in blocks.iter().enumerate() {
            let width = keys.len();
            let starts_anew = n % SUMMED_TILES == 0;
            self.products(q, keys.clone(), scores);
            for (row, line) in scores.chunks_mut(width).enumerate() {
                self.rules(row, ranges[row].clone(), keys.start, line, ScoreStage::Masked);
                let before = peaks[row];
                peaks[row] = before.max(exp::peak(arch, line));
                // While no key is visible, every shift gives zeros; −∞ would give NaN.
                let shift = if peaks[row] == f32::NEG_INFINITY { 0.0 } else { peaks[row] };
                if peaks[row] > before && before > f32::NEG_INFINITY {
                    let factor = (f64::from(before) - f64::from(peaks[row])).exp();
                    sums[row] *= factor;
                    if !starts_anew {
                        exp::scale(arch, &mut slices.out[row * dim_v..][..dim_v], factor as f32);
                    }
                    if has_gathered {
                        exp::scale_sums(arch, &mut gathered[row * dim_v..][..dim_v], factor);
                    }
                }
                sums[row] += exp::exp_and_sum(arch, line, shift);
                if !slices.weights.is_empty() {
                    slices.weights[row * len_k + keys.start..][..width].copy_from_slice(line);
                    shifts.push(shift);
                }
            }
            if dim_v > 0 {
                let p = faer::MatRef::from_row_major_slice(scores, self.count, width);
                for start in (0..width).step_by(summed_keys) {
                    let count = summed_keys.min(width - start);
                    let o = MatMut::from_row_major_slice_mut(&mut *slices.out, self.count, dim_v);
                    let is_first = starts_anew && start == 0 || alone && gathers;
                    let accumulate = if is_first { Accum::Replace } else { Accum::Add };
                    let v_rows = v.matrix.rows(keys.start + start, keys.start + start + count);
                    matmul(o, accumulate, p.subcols(start, count), v_rows, 1.0, Par::Seq);
                    let ends_block = start + count == width;
                    if ends_block {
                        self.add_not_finite(v, scores, keys, slices.out);
                    }
                    let is_last = ends_block && ((n + 1) % SUMMED_TILES == 0 || n + 1 == blocks.len());
                    if gathers && (is_last || alone) {
                        exp::gather(arch, gathered, slices.out, !has_gathered);
                        has_gathered = true;
                    }
                }
            }
        }

        for row in 0..self.count {
            let (peak, sum) = (peaks[row], sums[row]);
            let out = &mut slices.out[row * dim_v..][..dim_v];
            if sum == 0.0 {
                // No key was visible.
                out.fill(0.0);
                continue;
            }
            slices.lse[row] = (f64::from(peak) + sum.ln()) as f32;
            match has_gathered {
                true => exp::scaled(arch, &gathered[row * dim_v..][..dim_v], 1.0 / sum, out),
                false => exp::scale(arch, out, (1.0 / sum) as f32),
            }
            if !slices.weights.is_empty() {
                let weights = &mut slices.weights[row * len_k..][..len_k];
                if sum.is_nan() {
                    // A masked key has weight 0 even in a row that is NaN.
                    let (h, i) = self.query(row);
                    let weight = |j| if self.visible(h, i, j) { f32::NAN } else { 0.0 };
                    weights.iter_mut().enumerate().for_each(|(j, to)| *to = weight(j));
                } else {
                    for (block, keys) in blocks.iter().enumerate() {
                        let shift = shifts[block * self.count + row];
                        let factor = (f64::from(shift) - f64::from(peak)).exp() / sum;
                        exp::scale(arch, &mut weights[keys.clone()], factor as f32);
                    }
                }
            }
        }
    }

    /// Maximum and sum before any key: those of the sink, if there is one.
    fn first(&self, row: usize) -> (f32, f64) {
        let sink = self.inputs.sink.map(|sink| sink.data[sink.layout.at(&[self.query(row).0])]);
        match sink {
            None | Some(f32::NEG_INFINITY) => (f32::NEG_INFINITY, 0.0),
            Some(sink) if sink.is_finite() => (sink, 1.0),
            // Like a score of NaN or +∞.
            Some(_) => (f32::NEG_INFINITY, f64::NAN),
        }
    }

    /// Applies softcap, bias and mask, up to `stage`, to a row of products with the keys from `low`; `range` are the
    /// keys that its position allows.
    pub fn rules(&self, row: usize, range: Range<usize>, low: usize, line: &mut [f32], stage: ScoreStage) {
        let (h, i) = self.query(row);
        let ruled = self.problem.maskable_keys();
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
        if let Some((table, relative)) = &self.inputs.relative {
            let at = table.layout.at(&[self.b, h, i, 0]);
            let stands = i as i64 + i64::from(self.problem.band(self.b).offset);
            for j in range.start.max(low)..range.end.min(high) {
                let distance = j as i64 - stands;
                line[j - low] += match relative.kind {
                    RelativeKind::Slope => table.data[at] * -(distance.abs() as f32),
                    RelativeKind::Table => {
                        let column = distance.clamp(i64::from(relative.low), i64::from(relative.high));
                        let step = table.layout.strides()[3];
                        relative.factor * table.data[at + (column - i64::from(relative.low)) as usize * step]
                    }
                    RelativeKind::Fours => {
                        let first = distance.clamp(i64::from(relative.low) - 3, i64::from(relative.high));
                        relative.factor * table.data[at + (i64::from(relative.high) - first) as usize * 4]
                    }
                };
            }
        }
        if !self.inputs.biases.is_empty() || !self.inputs.masks.is_empty() {
            for j in range.start.max(low)..range.end.min(high) {
                let at = [self.b, h, i, j];
                for bias in &self.inputs.biases {
                    let bias = bias.data[bias.layout.at(&at)];
                    let x = &mut line[j - low];
                    // −∞ hides the key whatever it holds; NaN − ∞ would be NaN.
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

    pub fn visible(&self, h: usize, i: usize, j: usize) -> bool {
        let at = [self.b, h, i, j];
        j >= self.problem.maskable_keys()
            || self.problem.band(self.b).range(i, self.problem.maskable_keys()).contains(&j)
                && self.inputs.masks.iter().all(|mask| mask.keeps(at))
                && self.inputs.biases.iter().all(|bias| bias.data[bias.layout.at(&at)] != f32::NEG_INFINITY)
    }

    /// Adds the terms of non-finite values, which were replaced by 0, for rows that may see them.
    fn add_not_finite(&self, v: &Values<'_>, p: &[f32], keys: &Range<usize>, out: &mut [f32]) {
        for &(j, d, value) in v.not_finite.iter().filter(|(j, ..)| keys.contains(j)) {
            for row in 0..self.count {
                let (h, i) = self.query(row);
                if self.visible(h, i, j) {
                    out[row * self.problem.dim_v + d] += p[row * keys.len() + j - keys.start] * value;
                }
            }
        }
    }
}

/// The values of one head. Since 0 · NaN is NaN, non-finite values are replaced by 0 and stored separately.
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

/// The mean over heads, summed in order in f64: `[b, i, j]`.
fn average(problem: &Problem, weights: &[f32]) -> Vec<f32> {
    let Problem { batch, heads_q, len_q, len_k, .. } = *problem;
    let square = len_q * len_k;
    let mut out = vec![0.0; batch * square];
    if out.is_empty() {
        return out;
    }
    let arch = pulp::Arch::new();
    out.par_chunks_mut(square).enumerate().for_each(|(b, out)| {
        out.par_chunks_mut(TILE_KEYS).enumerate().for_each(|(tile, out)| {
            let mut sums = [0.0; TILE_KEYS];
            let sums = &mut sums[..out.len()];
            for h in 0..heads_q {
                let head = &weights[(b * heads_q + h) * square + tile * TILE_KEYS..][..out.len()];
                exp::gather(arch, sums, head, h == 0);
            }
            exp::scaled(arch, sums, 1.0 / heads_q.max(1) as f64, out);
        });
    });
    out
}

/// Row-major `[b, h, i, d]` in the memory order of `layout`.
fn in_order(out: Vec<f32>, problem: &Problem, layout: &Layout) -> Vec<f32> {
    if layout.is_contiguous() {
        return out;
    }
    // The only other order: [b, i, h, d].
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
