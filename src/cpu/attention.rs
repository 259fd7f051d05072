use std::cell::RefCell;
use std::ops::Range;
use std::sync::OnceLock;

use pulp::Arch;
use rayon::prelude::*;

use super::buffers::{LINE, to_line};
use super::product::{FEW_ROWS, MOST_COLUMNS, Onto, Panels, Product, Right, dots};
use super::{Buffer, Inputs, Matrix, Outputs, View, exp, take, threads};
use crate::kernels::catalogue::RelativeKind;
use crate::problem::{Layout, Problem, ScoreStage, Wanted, Weights};

/// Rows of a tile of packed keys, a multiple of what a product computes at a time. Query rows of all heads that share keys
/// count together.
pub(super) const TILE_ROWS: usize = 48;

/// Tiles of one task, at most.
const TASK_TILES: usize = 3;

/// Keys per step of the online softmax: a tile of scores fits a small part of an L2 cache.
pub(super) const TILE_KEYS: usize = 512;

/// Distance of the rows of a tile of scores. With a power of two, they would share a few lines of the L1 cache.
pub(super) const SCORES_STRIDE: usize = TILE_KEYS + 16;

/// Number of keys that one matrix product sums sequentially in f32. Longer sums lose digits: an f32 sum of n equal
/// values is off by up to n / 2 ulp.
const SUMMED_KEYS: usize = 128;

/// Number of steps whose products are summed in f32 before their sum is added in f64.
const SUMMED_TILES: usize = 4;

thread_local! {
    // Kept between calls, because fresh memory of this size costs more than the arithmetic on it.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

#[derive(Default)]
struct Scratch {
    /// Keys and values of a head that one task packs.
    head: PackedHead,
    tile: TileScratch,
}

#[derive(Default)]
struct TileScratch {
    q: Vec<f32>,
    scores: Vec<f32>,
    /// Output rows before division by their sum.
    summed: Vec<f32>,
    /// The same over the keys that are no longer summed in f32.
    gathered: Vec<f64>,
    /// Values of one step that are packed only because some are not finite.
    clean: PackedHead,
}

/// Keys and values of one head.
struct Head<'a> {
    k: Matrix<'a>,
    v: Matrix<'a>,
}

/// Keys and values from key `first` on, packed for products. Since 0 · NaN is NaN, values that are not finite are
/// packed as 0 and kept separately.
#[derive(Default)]
struct PackedHead {
    first: usize,
    k: Panels,
    v: Panels,
    /// Key, column, value.
    not_finite: Vec<(usize, usize, f32)>,
}

impl PackedHead {
    fn pack(&mut self, head: &Head<'_>, keys: Range<usize>) {
        self.first = keys.start;
        self.k.pack_transposed(&head.k, keys.clone());
        self.pack_values(&head.v, keys);
    }

    fn pack_values(&mut self, v: &Matrix<'_>, keys: Range<usize>) {
        self.not_finite.clear();
        self.v.pack_finite(v, keys, |key, column| self.not_finite.push((key, column, v.row(key)[column])));
    }
}

/// Attention of a checked problem; `output` is the layout of the result, contiguous in some order.
pub(crate) fn attention(problem: &Problem, inputs: &Inputs<'_>, wanted: Wanted, output: &Layout) -> Outputs {
    let Problem { batch, heads_q, heads_kv, len_q, len_k, dim_k, dim_v, .. } = *problem;
    let rows = batch * heads_q * len_q;
    let mut out = Buffer::arbitrary(rows * dim_v);
    let mut lse = Buffer::filled(if wanted.lse { rows } else { 0 }, f32::NEG_INFINITY);
    let keep_weights = wanted.weights != Weights::None || wanted.scores == Some(ScoreStage::Weights);
    let mut weights = Buffer::filled(if keep_weights { rows * len_k } else { 0 }, 0.0);
    let stage = wanted.scores.filter(|&stage| stage != ScoreStage::Weights);
    let mut scores = Buffer::arbitrary(if stage.is_some() { rows * len_k } else { 0 });

    if rows > 0 {
        // Rows that share keys are adjacent: [b, kv head] first, then the rows of the group.
        let per_head = problem.group() * len_q;
        let head = |n: usize| {
            let at = [n / heads_kv, n % heads_kv];
            Head { k: inputs.k.matrix(&at), v: inputs.v.matrix(&at) }
        };
        let heads: Vec<Head<'_>> = match inputs.k.is_copied() || inputs.v.is_copied() {
            true => (0..batch * heads_kv).into_par_iter().map(head).collect(),
            false => (0..batch * heads_kv).map(head).collect(),
        };
        // Keys that several tasks share are packed by the first of them.
        let is_shared = per_head > TILE_ROWS * TASK_TILES;
        let packed: Vec<OnceLock<PackedHead>> = heads.iter().map(|_| OnceLock::new()).collect();
        let tile_rows = tile_rows(problem);
        let mut out = output_rows(&mut out, problem, output).into_iter();
        let mut rest = Slices { lse: &mut lse, weights: &mut weights, scores: &mut scores };
        let mut tasks = Vec::new();
        for n in 0..heads.len() {
            let (b, head_kv) = (n / heads_kv, n % heads_kv);
            for task in (0..per_head).step_by(tile_rows * TASK_TILES) {
                let firsts = (task..per_head.min(task + tile_rows * TASK_TILES)).step_by(tile_rows);
                let tiles: Vec<_> = firsts
                    .zip(&mut out)
                    .map(|(first, out)| {
                        let count = tile_rows.min(per_head - first);
                        (Tile { problem, inputs, b, head_kv, first, count }, rest.split_off(count, len_k), out)
                    })
                    .collect();
                tasks.push((n, task, tiles));
            }
        }
        // As many heads at a time as there are threads: none waits for another to pack its keys, which stay in its cache.
        // The last task, which sees the most keys of a causal call, is the first.
        let threads = rayon::current_num_threads();
        tasks.sort_unstable_by_key(|&(n, task, _)| (n / threads, task, n));
        let operations = (rows * len_k) as f64 * (dim_k + dim_v) as f64;
        threads::for_each(tasks, operations, |(n, _, tiles)| {
            let head = &heads[n];
            SCRATCH.with_borrow_mut(|Scratch { head: own, tile: scratch }| {
                let packed = if is_shared {
                    Some(packed[n].get_or_init(|| {
                        let mut packed = PackedHead::default();
                        packed.pack(head, 0..len_k);
                        packed
                    }))
                } else if per_head >= FEW_ROWS {
                    let seen = tiles.iter().map(|(tile, ..)| tile.seen());
                    let seen = seen.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end)).unwrap_or(0..0);
                    own.pack(head, if stage.is_some() { 0..len_k } else { seen });
                    Some(&*own)
                } else {
                    None
                };
                for (tile, slices, out) in tiles {
                    tile.run(head, packed, stage, scratch, slices, out);
                }
            });
        });
    }

    let averaged = (wanted.weights == Weights::Averaged).then(|| average(problem, &weights));
    Outputs {
        output: out,
        lse: wanted.lse.then_some(lse),
        scores: match wanted.scores {
            Some(ScoreStage::Weights) => Some(weights.clone()),
            stage => stage.map(|_| scores),
        },
        weights: averaged.or((wanted.weights == Weights::PerHead).then_some(weights)),
    }
}

/// Rows per tile. Keys that are not packed are read once per tile.
fn tile_rows(problem: &Problem) -> usize {
    if problem.group() * problem.len_q < FEW_ROWS { FEW_ROWS } else { TILE_ROWS }
}

/// `len` numbers of scratch memory from the start of a cache line on. The memory never shrinks: tiles of different heights
/// would clear it again and again. The contents are arbitrary.
pub(super) fn at_least<T: Copy + Default>(scratch: &mut Vec<T>, len: usize) -> &mut [T] {
    if scratch.len() < len + LINE {
        scratch.resize(len + LINE, T::default());
    }
    let start = to_line(scratch);
    &mut scratch[start..][..len]
}

/// The rows of the output that one tile writes.
enum OutputRows<'a> {
    Adjacent(&'a mut [f32]),
    Apart(Vec<&'a mut [f32]>),
}

impl OutputRows<'_> {
    fn row(&mut self, row: usize, dim: usize) -> &mut [f32] {
        match self {
            OutputRows::Adjacent(rows) => &mut rows[row * dim..][..dim],
            OutputRows::Apart(rows) => rows[row],
        }
    }
}

/// The output's rows, tile by tile.
fn output_rows<'a>(out: &'a mut [f32], problem: &Problem, layout: &Layout) -> Vec<OutputRows<'a>> {
    let Problem { batch, heads_q, heads_kv, len_q, dim_v, .. } = *problem;
    let (per_head, tile_rows) = (problem.group() * len_q, tile_rows(problem));
    let tiles_per_head = per_head.div_ceil(tile_rows);
    let counts =
        (0..batch * heads_kv * tiles_per_head).map(|tile| tile_rows.min(per_head - tile % tiles_per_head * tile_rows));
    if layout.is_contiguous() || dim_v == 0 {
        let mut rest = out;
        return counts.map(|count| OutputRows::Adjacent(take(&mut rest, count * dim_v))).collect();
    }
    // The only other order: [b, i, h, d].
    let mut tiles: Vec<Vec<&mut [f32]>> =
        counts.map(|count| std::iter::repeat_with(Default::default).take(count).collect()).collect();
    for (b, out) in out.chunks_exact_mut(len_q * heads_q * dim_v).enumerate() {
        for (i, out) in out.chunks_exact_mut(heads_q * dim_v).enumerate() {
            for (h, out) in out.chunks_exact_mut(dim_v).enumerate() {
                let (head_kv, row) = (h / problem.group(), h % problem.group() * len_q + i);
                tiles[(b * heads_kv + head_kv) * tiles_per_head + row / tile_rows][row % tile_rows] = out;
            }
        }
    }
    tiles.into_iter().map(OutputRows::Apart).collect()
}

/// The parts of the other results that one tile writes. Empty for results that were not requested.
struct Slices<'a> {
    lse: &'a mut [f32],
    weights: &'a mut [f32],
    scores: &'a mut [f32],
}

impl<'a> Slices<'a> {
    /// Splits off the first `rows` rows.
    fn split_off(&mut self, rows: usize, len_k: usize) -> Slices<'a> {
        Slices {
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
}

/// Keys of a head: as they are, or packed from a first key on.
#[derive(Clone, Copy)]
pub(super) enum Keys<'a> {
    Rows(&'a Matrix<'a>),
    Packed(&'a Panels, usize),
}

impl Tile<'_> {
    /// Head and query of a row.
    pub fn query(&self, row: usize) -> (usize, usize) {
        let r = self.first + row;
        (self.head_kv * self.problem.group() + r / self.problem.len_q, r % self.problem.len_q)
    }

    /// The tile's queries: as they are if their rows are of one head, else copied to `copy`.
    pub fn queries<'q>(&self, copy: &'q mut Vec<f32>) -> Matrix<'q>
    where
        Self: 'q,
    {
        let Problem { dim_k, len_q, .. } = *self.problem;
        let View { data, layout } = self.inputs.q;
        let (h, i) = self.query(0);
        if i + self.count <= len_q && !self.inputs.q.is_copied() && dim_k > 0 {
            let stride = layout.strides()[2];
            let first = layout.at(&[self.b, h, i, 0]);
            let data = &data[first..][..(self.count - 1) * stride + dim_k];
            return Matrix { data: data.into(), stride, rows: self.count, columns: dim_k };
        }
        copy.clear();
        for row in 0..self.count {
            let (h, i) = self.query(row);
            let at = layout.at(&[self.b, h, i, 0]);
            copy.extend((0..dim_k).map(|d| data[at + d * layout.strides()[3]]));
        }
        Matrix { data: (&copy[..]).into(), stride: dim_k, rows: self.count, columns: dim_k }
    }

    /// `scale · Q·Kᵀ` for the tile's rows and a range of keys, rows of `scores` being `stride` apart. If the keys are
    /// packed, the range starts at a multiple of [`MOST_COLUMNS`] from the first one.
    pub fn products(&self, q: &Matrix<'_>, k: Keys<'_>, keys: Range<usize>, scores: &mut [f32], stride: usize) {
        let Problem { scale, .. } = *self.problem;
        let arch = Arch::new();
        match k {
            Keys::Rows(k) => {
                dots(arch, q, k, keys.clone(), |row, key, sum| scores[row * stride + key - keys.start] = scale * sum);
            }
            Keys::Packed(k, first) => Product {
                left: &q.data,
                left_stride: q.stride,
                rows: self.count,
                right: k.right().columns(keys.start - first..keys.end - first),
                scale,
                onto: Onto::Nothing,
                out: scores,
                out_stride: stride,
                summed: usize::MAX,
            }
            .compute(arch),
        }
    }

    /// The keys that any row may see, from a multiple of [`MOST_COLUMNS`] on, where panels of packed keys start.
    pub fn seen(&self) -> Range<usize> {
        let ruled = self.problem.maskable_keys();
        let band = self.problem.band(self.b);
        let ranges = (0..self.count).map(|row| band.range(self.query(row).1, ruled));
        let seen = ranges.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end)).unwrap_or(0..0);
        let (mut low, mut high) = (seen.start, seen.end);
        if self.problem.extra_keys > 0 {
            (low, high) = (low.min(ruled), self.problem.len_k);
        }
        low = low / MOST_COLUMNS * MOST_COLUMNS;
        low..high.max(low)
    }

    /// Online softmax (Milakov and Gimelshein 2018) over blocks of keys; the output is rescaled when a block raises the
    /// maximum (Dao 2023, section 3.1). A few blocks are summed in f32, and their results in f64, so rows of any length
    /// keep their digits.
    fn run(
        &self,
        head: &Head<'_>,
        packed: Option<&PackedHead>,
        stage: Option<ScoreStage>,
        scratch: &mut TileScratch,
        slices: Slices<'_>,
        mut out: OutputRows<'_>,
    ) {
        let Problem { len_k, dim_v, .. } = *self.problem;
        let arch = Arch::new();
        let TileScratch { q, scores, summed, gathered, clean } = scratch;
        let q = &self.queries(q);
        let ruled = self.problem.maskable_keys();
        let band = self.problem.band(self.b);
        let ranges: Vec<_> = (0..self.count).map(|row| band.range(self.query(row).1, ruled)).collect();
        let Range { start: low, end: high } = self.seen();
        let has_rules = self.problem.softcap.is_some()
            || self.inputs.relative.is_some()
            || !self.inputs.biases.is_empty()
            || !self.inputs.masks.is_empty();
        let keys_of_head = match packed {
            Some(packed) => Keys::Packed(&packed.k, packed.first),
            None => Keys::Rows(&head.k),
        };
        if let Some(stage) = stage {
            // Separate from the scores that are summed, so that requesting scores does not change the output's bits.
            self.products(q, keys_of_head, 0..len_k, slices.scores, len_k);
            for (row, (line, range)) in slices.scores.chunks_mut(len_k.max(1)).zip(&ranges).enumerate() {
                self.rules(row, range.clone(), 0, line, stage);
            }
        }

        let (mut peaks, mut sums): (Vec<f32>, Vec<f64>) = (0..self.count).map(|row| self.first(row)).unzip();
        let mut factors = vec![1.0; self.count];
        // The shift of each block's weights, for requested weights.
        let mut shifts = Vec::new();
        let blocks: Vec<_> = (low..high).step_by(TILE_KEYS).map(|at| at..high.min(at + TILE_KEYS)).collect();
        let scores = at_least(scores, self.count * SCORES_STRIDE);
        let summed = at_least(summed, self.count * dim_v);
        if blocks.is_empty() {
            summed.fill(0.0);
        }
        let gathers = blocks.len() > SUMMED_TILES;
        let gathered = at_least(gathered, if gathers { self.count * dim_v } else { 0 });
        let mut has_gathered = false;
        for (n, keys) in blocks.iter().enumerate() {
            let width = keys.len();
            let starts_anew = n % SUMMED_TILES == 0;
            self.products(q, keys_of_head, keys.clone(), scores, SCORES_STRIDE);
            if has_rules || !ranges.iter().all(|range| range.start <= keys.start && keys.end <= range.end) {
                for (row, line) in scores.chunks_mut(SCORES_STRIDE).enumerate() {
                    self.rules(row, ranges[row].clone(), keys.start, &mut line[..width], ScoreStage::Masked);
                }
            }
            let step = exp::SoftmaxStep {
                scores,
                stride: SCORES_STRIDE,
                width,
                peaks: &mut peaks,
                sums: &mut sums,
                factors: &mut factors,
            };
            step.compute(arch);
            for row in (0..self.count).filter(|&row| factors[row] != 1.0) {
                if !starts_anew {
                    exp::scale(arch, &mut summed[row * dim_v..][..dim_v], factors[row] as f32);
                }
                if has_gathered {
                    exp::scale_sums(arch, &mut gathered[row * dim_v..][..dim_v], factors[row]);
                }
            }
            if !slices.weights.is_empty() {
                for (row, line) in scores.chunks(SCORES_STRIDE).enumerate() {
                    slices.weights[row * len_k + keys.start..][..width].copy_from_slice(&line[..width]);
                    shifts.push(exp::shift(peaks[row]));
                }
            }
            let packed = match packed {
                Some(packed) => Some(packed),
                None if keys.clone().all(|key| exp::all_finite(arch, head.v.row(key))) => None,
                None => {
                    clean.first = keys.start;
                    clean.pack_values(&head.v, keys.clone());
                    Some(&*clean)
                }
            };
            let product = Product {
                left: scores,
                left_stride: SCORES_STRIDE,
                rows: self.count,
                right: match packed {
                    Some(packed) => packed.v.right().rows(keys.start - packed.first, width),
                    None => Right::of_matrix(&head.v).rows(keys.start, width),
                },
                scale: 1.0,
                onto: if starts_anew { Onto::Nothing } else { Onto::Output },
                out: summed,
                out_stride: dim_v,
                summed: SUMMED_KEYS,
            };
            product.compute(arch);
            if let Some(packed) = packed {
                self.add_not_finite(&packed.not_finite, scores, keys, summed);
            }
            if gathers && ((n + 1) % SUMMED_TILES == 0 || n + 1 == blocks.len()) {
                exp::gather(arch, gathered, summed, !has_gathered);
                has_gathered = true;
            }
        }

        for row in 0..self.count {
            let (peak, sum) = (peaks[row], sums[row]);
            let out = out.row(row, dim_v);
            if sum == 0.0 {
                // No key was visible.
                out.fill(0.0);
                continue;
            }
            if !slices.lse.is_empty() {
                slices.lse[row] = (f64::from(peak) + sum.ln()) as f32;
            }
            match has_gathered {
                true => exp::scaled(arch, &gathered[row * dim_v..][..dim_v], 1.0 / sum, out),
                false => exp::scale_into(arch, &summed[row * dim_v..][..dim_v], (1.0 / sum) as f32, out),
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

    /// Adds the terms of values that are not finite, which were packed as 0, for rows that may see them.
    fn add_not_finite(&self, values: &[(usize, usize, f32)], p: &[f32], keys: &Range<usize>, out: &mut [f32]) {
        for &(j, d, value) in values.iter().filter(|(j, ..)| keys.contains(j)) {
            for row in 0..self.count {
                let (h, i) = self.query(row);
                if self.visible(h, i, j) {
                    out[row * self.problem.dim_v + d] += p[row * SCORES_STRIDE + j - keys.start] * value;
                }
            }
        }
    }
}

/// The mean over heads, summed in order in f64: `[b, i, j]`.
fn average(problem: &Problem, weights: &[f32]) -> Buffer {
    let Problem { batch, heads_q, len_q, len_k, .. } = *problem;
    let square = len_q * len_k;
    let mut out = Buffer::arbitrary(batch * square);
    if out.is_empty() {
        return out;
    }
    let arch = Arch::new();
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
