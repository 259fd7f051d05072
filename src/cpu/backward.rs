//! The backward: P is recomputed from the LSE, tile by tile (Dao 2023, "FlashAttention-2", algorithm 2).

use std::borrow::Cow;
use std::cell::RefCell;
use std::ops::Range;

use pulp::Arch;

use super::attention::{Keys, SCORES_STRIDE, TILE_KEYS, TILE_ROWS, Tile, at_least};
use super::product::{Onto, Panels, Product, Right};
use super::{Buffer, Inputs, Matrix, View, exp, take, threads};
use crate::kernels::catalogue::RelativeKind;
use crate::problem::{Problem, ScoreStage, WantedGradients};

/// What the backward reads besides the operands. Queries and keys are rotated already.
pub(crate) struct BackwardInputs<'a> {
    pub inputs: &'a Inputs<'a>,
    /// O `[b, hq, i, d]`
    pub output: View<'a>,
    /// `[b, hq, i]`
    pub lse: View<'a>,
    /// dO `[b, hq, i, d]`
    pub d_output: Option<View<'a>>,
    /// dLSE `[b, hq, i]`
    pub d_lse: Option<View<'a>>,
    /// dW, broadcast to `[b, hq, i, j]`, and a factor on it.
    pub d_weights: Option<(View<'a>, f32)>,
    /// The shapes of the biases before they were broadcast.
    pub bias_shapes: &'a [[usize; 4]],
    /// The column of each distance from the smallest to the largest of the bias by distance, and their number.
    pub columns: &'a [u32],
    pub column_count: usize,
}

/// The gradients that are wanted, row-major.
#[derive(Default)]
pub(crate) struct Gradients {
    /// `[b, hq, i, d]`
    pub q: Option<Buffer>,
    /// `[b, hkv, j, d]`
    pub k: Option<Buffer>,
    /// `[b, hkv, j, d]`
    pub v: Option<Buffer>,
    /// In the shapes of the biases.
    pub biases: Vec<Buffer>,
    /// `[hq]`
    pub sink: Option<Buffer>,
    /// Of a bias by distance, the sums of dX over the keys of each column: `[b, hq, i, column]`. Slopes have one column,
    /// whose pairs count with their negated distance.
    pub distance: Option<Vec<f64>>,
    pub scale: Option<f64>,
}

thread_local! {
    // Kept between calls, because fresh memory of this size costs more than the arithmetic on it.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

#[derive(Default)]
struct Scratch {
    /// Keys and values of a head, packed as columns, and keys as rows.
    keys: Panels,
    values: Panels,
    key_rows: Panels,
    /// Columns of queries and of dO of a tile, finite.
    query_columns: Vec<f32>,
    d_output_columns: Vec<f32>,
    q: Vec<f32>,
    d_output: Vec<f32>,
    p: Vec<f32>,
    ds: Vec<f32>,
    capped: Vec<f32>,
    /// dKᵀ and dVᵀ of a head.
    dk: Vec<f32>,
    dv: Vec<f32>,
}

/// What one task computes: a key/value head of a batch entry.
struct Task<'a> {
    b: usize,
    head_kv: usize,
    dq: &'a mut [f32],
    dk: &'a mut [f32],
    dv: &'a mut [f32],
    distance: &'a mut [f64],
    sums: Sums,
}

/// Sums over pairs of a task. They are added up in the order of the tasks.
#[derive(Clone, Default)]
struct Sums {
    /// For each bias its gradient over the heads of the group: `[group or 1, i or 1, j or 1]`.
    biases: Vec<Vec<f64>>,
    /// For each head of the group.
    sink: Vec<f64>,
    scale: f64,
}

/// The backward of a checked problem.
pub(crate) fn backward(problem: &Problem, call: &BackwardInputs<'_>, wanted: WantedGradients) -> Gradients {
    let Problem { batch, heads_q, heads_kv, len_q, len_k, dim_k, dim_v, .. } = *problem;
    let group = problem.group();
    let rows = batch * heads_q * len_q;
    let needs_q = wanted.q || wanted.scale;
    let zeros = |wanted: bool, len: usize| Buffer::filled(if wanted { len } else { 0 }, 0.0);
    let mut dq = zeros(needs_q, rows * dim_k);
    let mut dk = zeros(wanted.k, batch * heads_kv * len_k * dim_k);
    let mut dv = zeros(wanted.v, batch * heads_kv * len_k * dim_v);
    let needs_distance = wanted.distance || wanted.q || wanted.scale;
    let columns = if needs_distance && call.inputs.relative.is_some() { call.column_count } else { 0 };
    let mut distance = vec![0.0; rows * columns];

    let local = |shape: &[usize; 4]| [(1, group), (2, len_q), (3, len_k)].map(|(axis, len)| len.min(shape[axis]));
    let mut tasks = Vec::new();
    let (mut rest_q, mut rest_k, mut rest_v) = (&mut dq[..], &mut dk[..], &mut dv[..]);
    let mut rest_distance = &mut distance[..];
    for n in 0..batch * heads_kv {
        let of_biases = call.bias_shapes.iter().filter(|_| wanted.biases);
        let (of_distance, rest) = rest_distance.split_at_mut(group * len_q * columns);
        rest_distance = rest;
        tasks.push(Task {
            b: n / heads_kv,
            head_kv: n % heads_kv,
            dq: take(&mut rest_q, group * len_q * dim_k),
            dk: take(&mut rest_k, len_k * dim_k),
            dv: take(&mut rest_v, len_k * dim_v),
            distance: of_distance,
            sums: Sums {
                biases: of_biases.map(|shape| vec![0.0; local(shape).iter().product()]).collect(),
                sink: vec![0.0; group],
                scale: 0.0,
            },
        });
    }
    let operations = rows as f64 * len_k as f64 * (3 * dim_k + 2 * dim_v) as f64;
    threads::for_each(tasks.iter_mut().collect(), operations, |task| {
        SCRATCH.with_borrow_mut(|scratch| task.run(problem, call, wanted, columns, scratch));
    });

    // In order, so that sums have the same bits for any number of threads.
    let mut biases: Vec<Vec<f64>> = call.bias_shapes.iter().map(|shape| vec![0.0; shape.iter().product()]).collect();
    let mut sink = vec![0.0; heads_q];
    let mut scale = 0.0;
    for Task { b, head_kv, sums, .. } in &tasks {
        for ((total, part), shape) in biases.iter_mut().zip(&sums.biases).zip(call.bias_shapes) {
            let [heads, len, keys] = local(shape);
            let start = if shape[0] > 1 { b * shape[1] } else { 0 } + if shape[1] > 1 { head_kv * group } else { 0 };
            let to = &mut total[start * len * keys..][..heads * len * keys];
            to.iter_mut().zip(part).for_each(|(to, x)| *to += x);
        }
        sink[head_kv * group..][..group].iter_mut().zip(&sums.sink).for_each(|(to, x)| *to += x);
        scale += sums.scale;
    }
    drop(tasks);
    let narrow = |sums: Vec<f64>| sums.into_iter().map(|x| x as f32).collect::<Buffer>();
    Gradients {
        q: wanted.q.then_some(dq),
        k: wanted.k.then_some(dk),
        v: wanted.v.then_some(dv),
        biases: if wanted.biases { biases.into_iter().map(narrow).collect() } else { Vec::new() },
        sink: wanted.sink.then(|| narrow(sink)),
        distance: (columns > 0).then_some(distance),
        scale: wanted.scale.then_some(scale),
    }
}

impl Task<'_> {
    fn run(
        &mut self,
        problem: &Problem,
        call: &BackwardInputs<'_>,
        wanted: WantedGradients,
        columns: usize,
        scratch: &mut Scratch,
    ) {
        let Problem { len_q, len_k, dim_k, dim_v, .. } = *problem;
        let (b, head_kv) = (self.b, self.head_kv);
        let (k, v) = (call.inputs.k.matrix(&[b, head_kv]), call.inputs.v.matrix(&[b, head_kv]));
        scratch.keys.pack_transposed(&k, 0..len_k);
        scratch.key_rows.pack_finite(&k, 0..len_k, |_, _| {});
        if call.d_output.is_some() {
            scratch.values.pack_transposed(&v, 0..len_k);
        }
        let clear = |columns: &mut Vec<f32>, len| at_least(columns, len).fill(0.0);
        clear(&mut scratch.dk, if wanted.k { dim_k * len_k } else { 0 });
        clear(&mut scratch.dv, if wanted.v { dim_v * len_k } else { 0 });
        let per_head = problem.group() * len_q;
        for first in (0..per_head).step_by(TILE_ROWS) {
            let count = TILE_ROWS.min(per_head - first);
            let tile = Tile { problem, inputs: call.inputs, b, head_kv, first, count };
            self.tile(&tile, call, wanted, columns, scratch);
        }
        for (wanted, from, to, dim) in
            [(wanted.k, &mut scratch.dk, &mut self.dk, dim_k), (wanted.v, &mut scratch.dv, &mut self.dv, dim_v)]
        {
            if wanted {
                transpose(at_least(from, dim * len_k), len_k, to, dim);
            }
        }
        if problem.scale == 0.0 {
            // They were computed without the scale, which the gradient of the scale needs.
            self.dq.iter_mut().chain(self.dk.iter_mut()).for_each(|x| *x *= 0.0);
        }
    }

    fn tile(
        &mut self,
        tile: &Tile<'_>,
        call: &BackwardInputs<'_>,
        wanted: WantedGradients,
        columns: usize,
        scratch: &mut Scratch,
    ) {
        let Problem { len_q, len_k, dim_k, dim_v, scale, .. } = *tile.problem;
        let (arch, count) = (Arch::new(), tile.count);
        let Scratch { keys, values, key_rows, query_columns, d_output_columns, q, d_output, p, ds, capped, dk, dv } =
            scratch;
        let q = &tile.queries(q);
        let at_row = |row: usize| {
            let (h, i) = tile.query(row);
            [tile.b, h, i]
        };
        let query_columns = at_least(query_columns, dim_k * count);
        columns_of(q, query_columns);

        // dO and its row sums with O.
        let d_output = at_least(d_output, count * dim_v);
        let mut not_finite = Vec::new();
        let mut delta = [0.0f64; TILE_ROWS];
        for (row, delta) in delta.iter_mut().enumerate().take(count) {
            let [b, h, i] = at_row(row);
            *delta = -call.d_lse.map_or(0.0, |view| f64::from(view.data[view.layout.at(&[b, h, i])]));
            let Some(view) = call.d_output else { continue };
            let start = view.layout.at(&[b, h, i, 0]);
            let output = call.output.layout.at(&[b, h, i, 0]);
            for d in 0..dim_v {
                let x = view.data[start + d * view.layout.strides()[3]];
                let o = call.output.data[output + d * call.output.layout.strides()[3]];
                // Where a query sees nothing, O is 0, and dO may be anything.
                *delta += if o == 0.0 { 0.0 } else { f64::from(x) * f64::from(o) };
                if !x.is_finite() {
                    not_finite.push((row, d, x));
                }
                d_output[row * dim_v + d] = x;
            }
        }
        let d_output = Matrix { data: (&*d_output).into(), stride: dim_v, rows: count, columns: dim_v };
        let d_output_columns = at_least(d_output_columns, dim_v * count);
        columns_of(&d_output, d_output_columns);

        let ruled = tile.problem.maskable_keys();
        let band = tile.problem.band(tile.b);
        let ranges: Vec<_> = (0..count).map(|row| band.range(tile.query(row).1, ruled)).collect();
        let lses: Vec<f32> = (0..count).map(|row| call.lse.data[call.lse.layout.at(&at_row(row))]).collect();
        let seen = tile.seen();
        let blocks: Vec<_> = seen.clone().step_by(TILE_KEYS).map(|at| at..seen.end.min(at + TILE_KEYS)).collect();
        let p = at_least(p, count * SCORES_STRIDE);
        let ds = at_least(ds, count * SCORES_STRIDE);
        let capped = at_least(capped, if tile.problem.softcap.is_some() { count * SCORES_STRIDE } else { 0 });
        let weigh = |block: &Range<usize>, p: &mut [f32]| {
            tile.products(q, Keys::Packed(keys, 0), block.clone(), p, SCORES_STRIDE);
            for (row, line) in p.chunks_mut(SCORES_STRIDE).enumerate() {
                let line = &mut line[..block.len()];
                tile.rules(row, ranges[row].clone(), block.start, line, ScoreStage::Masked);
                exp::weights(arch, line, lses[row]);
            }
        };
        if let Some((weights, factor)) = call.d_weights {
            for block in &blocks {
                weigh(block, p);
                for (row, line) in p.chunks(SCORES_STRIDE).enumerate() {
                    let [b, h, i] = at_row(row);
                    for (j, &p) in block.clone().zip(line).filter(|&(_, &p)| p != 0.0) {
                        let x = weights.data[weights.layout.at(&[b, h, i, j])];
                        delta[row] += f64::from(p) * f64::from(factor) * f64::from(x);
                    }
                }
            }
        }
        if wanted.sink
            && let Some(sink) = call.inputs.sink
        {
            for row in 0..count {
                let [_, h, _] = at_row(row);
                let score = f64::from(sink.data[sink.layout.at(&[h])]);
                if score != f64::NEG_INFINITY {
                    let weight = (score - f64::from(lses[row])).exp();
                    self.sums.sink[(tile.first + row) / len_q] -= weight * delta[row];
                }
            }
        }

        let needs_q = wanted.q || wanted.scale;
        let needs_ds = needs_q || wanted.k || columns > 0 || !self.sums.biases.is_empty();
        let scale = if scale == 0.0 { 1.0 } else { scale };
        let dk = at_least(dk, if wanted.k { dim_k * len_k } else { 0 });
        let dv = at_least(dv, if wanted.v { dim_v * len_k } else { 0 });
        for (n, block) in blocks.iter().enumerate() {
            let width = block.len();
            let as_matrix =
                |rows| Matrix { data: Cow::Borrowed(rows), stride: SCORES_STRIDE, rows: count, columns: width };
            weigh(block, p);
            if wanted.v && call.d_output.is_some() {
                add_columns(arch, d_output_columns, &as_matrix(p), 1.0, &mut dv[block.start..], len_k);
                for &(row, d, x) in &not_finite {
                    let line = p[row * SCORES_STRIDE..][..width].iter().enumerate();
                    line.filter(|(_, p)| **p != 0.0).for_each(|(at, p)| dv[d * len_k + block.start + at] += p * x);
                }
            }
            if !needs_ds {
                continue;
            }
            match call.d_output {
                Some(_) => Product {
                    left: &d_output.data,
                    left_stride: dim_v,
                    rows: count,
                    right: values.right().columns(block.clone()),
                    scale: 1.0,
                    onto: Onto::Nothing,
                    out: ds,
                    out_stride: SCORES_STRIDE,
                    summed: usize::MAX,
                }
                .compute(arch),
                None => ds.fill(0.0),
            }
            for (row, (p, ds)) in p.chunks(SCORES_STRIDE).zip(ds.chunks_mut(SCORES_STRIDE)).enumerate() {
                let (p, ds) = (&p[..width], &mut ds[..width]);
                if let Some((weights, factor)) = call.d_weights {
                    let [b, h, i] = at_row(row);
                    let of = |j| factor * weights.data[weights.layout.at(&[b, h, i, j])];
                    ds.iter_mut().zip(block.clone()).for_each(|(ds, j)| *ds += of(j));
                }
                exp::score_gradients(arch, p, ds, delta[row] as f32);
                self.add_pairs(tile, call, columns, row, block, ds);
            }
            if let Some(cap) = tile.problem.softcap {
                tile.products(q, Keys::Packed(keys, 0), block.clone(), capped, SCORES_STRIDE);
                for (row, capped) in capped.chunks_mut(SCORES_STRIDE).enumerate() {
                    let capped = &mut capped[..width];
                    tile.rules(row, ranges[row].clone(), block.start, capped, ScoreStage::Capped);
                    let (p, ds) = (&p[row * SCORES_STRIDE..], &mut ds[row * SCORES_STRIDE..]);
                    for ((ds, p), x) in ds.iter_mut().zip(p).zip(capped) {
                        // A hidden key may have a score of NaN.
                        *ds = if *p == 0.0 { 0.0 } else { *ds * (1.0 - (*x / cap) * (*x / cap)) };
                    }
                }
            }
            if needs_q {
                Product {
                    left: ds,
                    left_stride: SCORES_STRIDE,
                    rows: count,
                    right: key_rows.right().rows(block.start, width),
                    scale,
                    onto: if n == 0 { Onto::Nothing } else { Onto::Output },
                    out: &mut self.dq[tile.first * dim_k..],
                    out_stride: dim_k,
                    summed: usize::MAX,
                }
                .compute(arch);
            }
            if wanted.k {
                add_columns(arch, query_columns, &as_matrix(ds), scale, &mut dk[block.start..], len_k);
            }
        }
        if wanted.scale && !blocks.is_empty() {
            for row in 0..count {
                let dq = &self.dq[(tile.first + row) * dim_k..][..dim_k];
                let products = dq.iter().zip(q.row(row)).map(|(a, b)| f64::from(*a) * f64::from(*b));
                self.sums.scale += products.sum::<f64>() / f64::from(scale);
            }
        }
    }

    /// Adds dX of a row and a block of keys to the gradients of biases, and of those by distance.
    fn add_pairs(
        &mut self,
        tile: &Tile<'_>,
        call: &BackwardInputs<'_>,
        columns: usize,
        row: usize,
        block: &Range<usize>,
        dx: &[f32],
    ) {
        let Problem { len_q, len_k, .. } = *tile.problem;
        let (h, i) = tile.query(row);
        let group = tile.problem.group();
        let ruled = tile.problem.maskable_keys();
        let pairs = || (block.start..block.end.min(ruled)).zip(dx).filter(|(_, dx)| **dx != 0.0);
        for (shape, sums) in call.bias_shapes.iter().zip(&mut self.sums.biases) {
            let [_, rows, keys] = [(1, group), (2, len_q), (3, len_k)].map(|(axis, len)| len.min(shape[axis]));
            let head = if shape[1] > 1 { h % group } else { 0 };
            let start = (head * rows + if shape[2] > 1 { i } else { 0 }) * keys;
            pairs().for_each(|(j, dx)| sums[start + if shape[3] > 1 { j } else { 0 }] += f64::from(*dx));
        }
        if columns > 0
            && let Some((_, relative)) = &call.inputs.relative
        {
            let stands = i as i64 + i64::from(tile.problem.band(tile.b).offset);
            let sums = &mut self.distance[(tile.first + row) * columns..][..columns];
            for (j, dx) in pairs() {
                let distance = j as i64 - stands;
                match relative.kind {
                    RelativeKind::Slope => sums[0] -= distance.unsigned_abs() as f64 * f64::from(*dx),
                    RelativeKind::Table | RelativeKind::Fours => {
                        let near = distance.clamp(i64::from(relative.low), i64::from(relative.high));
                        let column = call.columns[(near - i64::from(relative.low)) as usize];
                        sums[column as usize] += f64::from(*dx);
                    }
                }
            }
        }
    }
}

/// The columns of a matrix one after another, with 0 for what is not finite.
fn columns_of(matrix: &Matrix<'_>, columns: &mut [f32]) {
    for row in 0..matrix.rows {
        for (d, &x) in matrix.row(row).iter().enumerate() {
            columns[d * matrix.rows + row] = if x.is_finite() { x } else { 0.0 };
        }
    }
}

/// `out += scale · columns · matrix`, for the columns of another matrix with as many rows; rows of `out` are `stride` apart.
fn add_columns(arch: Arch, columns: &[f32], matrix: &Matrix<'_>, scale: f32, out: &mut [f32], stride: usize) {
    Product {
        left: columns,
        left_stride: matrix.rows,
        rows: columns.len() / matrix.rows,
        right: Right::of_matrix(matrix),
        scale,
        onto: Onto::Output,
        out,
        out_stride: stride,
        summed: usize::MAX,
    }
    .compute(arch);
}

/// Rows of `len` numbers as columns of `to`, which has rows of `width`.
fn transpose(rows: &[f32], len: usize, to: &mut [f32], width: usize) {
    if len == 0 {
        return;
    }
    for (d, row) in rows.chunks_exact(len).enumerate() {
        row.iter().enumerate().for_each(|(j, &x)| to[j * width + d] = x);
    }
}
