//! Operations that work row by row.

use rayon::prelude::*;

use super::{Buffer, View, threads};
use crate::kernels::plan::Pairs;
use crate::problem::{Layout, Place, Rows};

/// Rows of one task.
const TASK_ROWS: usize = 64;

/// What an element costs, in multiply-adds of a product.
const COST: f64 = 16.0;

/// `len` elements in rows of `width`; `row` writes each row, given its number.
fn by_row(len: usize, width: usize, row: impl Fn(usize, &mut [f32]) + Sync) -> Buffer {
    let (mut y, width) = (Buffer::arbitrary(len), width.max(1));
    let tasks = y.chunks_mut(TASK_ROWS * width).enumerate().collect();
    threads::for_each(tasks, COST * len as f64, |(task, rows): (usize, &mut [f32])| {
        rows.chunks_mut(width).enumerate().for_each(|(n, y)| row(task * TASK_ROWS + n, y));
    });
    y
}

/// X `[b, h, i, d]` with the paired columns of each row rotated by the cosines and sines of its row of
/// `table` `[row, 2 · columns]`. `layout` is the result's: contiguous rows of `d`.
pub(crate) fn rotate(
    x: View<'_>,
    table: View<'_>,
    Pairs { count: pairs, interleaved, back }: Pairs,
    rows: &Rows,
    layout: &Layout,
) -> Buffer {
    let &[_, heads, len, dim] = layout.shape() else { unreachable!("four axes") };
    let (width, step) = (table.layout.shape()[1], x.layout.strides()[3]);
    by_row(layout.len(), dim, |n, y| {
        let at = |axis: usize| n * dim / layout.strides()[axis];
        let [b, h, i] = [at(0), at(1) % heads, at(2) % len];
        let angles = &table.data[table.layout.at(&[rows.of(b, i, len), 0])..][..width];
        let start = x.layout.at(&[b, h, i, 0]);
        let x = |d: usize| x.data[start + d * step];
        for (n, (cos, sin)) in angles.iter().zip(&angles[width / 2..]).take(pairs).enumerate() {
            let (d0, d1) = if interleaved { (2 * n, 2 * n + 1) } else { (n, n + pairs) };
            let sin = if back { -sin } else { *sin };
            y[d0] = x(d0) * cos - x(d1) * sin;
            y[d1] = x(d1) * cos + x(d0) * sin;
        }
        y.iter_mut().enumerate().skip(2 * pairs).for_each(|(d, y)| *y = x(d));
    })
}

/// X `[b, i, d]` plus the rows of `table` `[row, d]`, row-major.
pub(crate) fn add_positions(x: View<'_>, table: View<'_>, rows: &Rows) -> Buffer {
    let &[_, len, dim] = x.layout.shape() else { unreachable!("three axes") };
    let (x_step, table_step) = (x.layout.strides()[2], table.layout.strides()[1]);
    by_row(x.layout.len(), dim, |n, y| {
        let [b, i] = [n / len, n % len];
        let (x_at, table_at) = (x.layout.at(&[b, i, 0]), table.layout.at(&[rows.of(b, i, len), 0]));
        for (d, y) in y.iter_mut().enumerate() {
            *y = x.data[x_at + d * x_step] + table.data[table_at + d * table_step];
        }
    })
}

/// `factor · X[b, h, i, columns[j − i + len_q − 1]]`, row-major `[b, h, i, j]`.
pub(crate) fn relative(x: View<'_>, columns: &[u32], len_k: usize, factor: f32) -> Buffer {
    let &[batch, heads, len_q, _] = x.layout.shape() else { unreachable!("four axes") };
    let step = x.layout.strides()[3];
    by_row(batch * heads * len_q * len_k, len_k, |n, bias| {
        let [b, h, i] = [n / len_q / heads, n / len_q % heads, n % len_q];
        let at = x.layout.at(&[b, h, i, 0]);
        for (bias, &column) in bias.iter_mut().zip(&columns[len_q - 1 - i..]) {
            *bias = factor * x.data[at + column as usize * step];
        }
    })
}

/// RMSNorm, or LayerNorm if `centred`, over the last axis of X `[a, b, c, d]` with `weight` and `bias` `[d]`,
/// row-major. Sums are in f64; rows are short.
pub(crate) fn normalise(x: View<'_>, weight: View<'_>, bias: Option<View<'_>>, centred: bool, epsilon: f32) -> Buffer {
    let &[_, b_len, c_len, dim] = x.layout.shape() else { unreachable!("four axes") };
    let step = x.layout.strides()[3];
    let (weight, bias) = (weight.values(), bias.map_or(vec![0.0; dim], |bias| bias.values()));
    by_row(x.layout.len(), dim, |n, y| {
        let start = x.layout.at(&[n / c_len / b_len, n / c_len % b_len, n % c_len, 0]);
        let row = |d: usize| f64::from(x.data[start + d * step]);
        let mean = if centred { (0..dim).map(row).sum::<f64>() / dim as f64 } else { 0.0 };
        let spread = (0..dim).map(|d| (row(d) - mean).powi(2)).sum::<f64>() / dim as f64;
        let factor = 1.0 / (spread + f64::from(epsilon)).sqrt();
        for (d, y) in y.iter_mut().enumerate() {
            *y = ((row(d) - mean) * factor * f64::from(weight[d]) + f64::from(bias[d])) as f32;
        }
    })
}

/// `X · σ(G)` of two views `[b, i, d]`, row-major.
pub(crate) fn gate(x: View<'_>, g: View<'_>) -> Buffer {
    let &[_, len, dim] = x.layout.shape() else { unreachable!("three axes") };
    let steps = [x, g].map(|view| view.layout.strides()[2]);
    by_row(x.layout.len(), dim, |n, y| {
        let [x_at, g_at] = [x, g].map(|view| view.layout.at(&[n / len, n % len, 0]));
        for (d, y) in y.iter_mut().enumerate() {
            *y = x.data[x_at + d * steps[0]] / (1.0 + (-g.data[g_at + d * steps[1]]).exp());
        }
    })
}

/// Copies rows of X `[b, h, i, d]`, rounded, into Y `[b, h, rows, d]`, whose last axis is contiguous and may
/// be longer.
pub(crate) fn scatter(x: View<'_>, y: &mut [f32], layout: &Layout, places: &[Place], round: impl Fn(f32) -> f32) {
    let (&[_, heads, rows, _], dim) = (layout.shape(), x.layout.shape()[3]) else { unreachable!("four axes") };
    let step = x.layout.strides()[3];
    for (b, place) in places.iter().enumerate() {
        for h in 0..heads {
            for i in 0..if dim == 0 { 0 } else { place.count } {
                let from = x.layout.at(&[b, h, place.from + i, 0]);
                let to = layout.at(&[b, h, (place.to + i) % rows, 0]);
                let to = &mut y[to..][..dim];
                to.iter_mut().enumerate().for_each(|(d, to)| *to = round(x.data[from + d * step]));
            }
        }
    }
}

/// Merges two results `[b, h, i, d]` over disjoint keys, using their LSEs `[b, h, i]`. `output` is the layout of the
/// result, with heads or queries innermost among the rows. The LSE is row-major.
pub(crate) fn merge(outputs: [View<'_>; 2], lses: [View<'_>; 2], output: &Layout) -> [Buffer; 2] {
    let &[batch, heads, len_q, dim] = output.shape() else { unreachable!("four axes") };
    let rows = batch * heads * len_q;
    let weigh = |bhi: [usize; 3]| {
        let [a, b] = lses.map(|lse| lse.data[lse.layout.at(&bhi)]);
        if [a, b].iter().any(|x| x.is_nan() || *x == f32::INFINITY) {
            return (f32::NAN, [1.0; 2]);
        }
        let peak = a.max(b);
        if peak == f32::NEG_INFINITY {
            return (peak, [0.0; 2]);
        }
        let weights = [(a - peak).exp(), (b - peak).exp()];
        let sum = weights[0] + weights[1];
        (peak + sum.ln(), weights.map(|weight| weight / sum))
    };
    let index = |row: usize| [row / len_q / heads, row / len_q % heads, row % len_q];
    let lse: Vec<f32> = (0..rows).into_par_iter().with_min_len(1024).map(|row| weigh(index(row)).0).collect();
    let mut out = Buffer::filled(rows * dim, 0.0);
    let by_query = output.strides()[1] < output.strides()[2];
    out.par_chunks_exact_mut(dim.max(1)).with_min_len(1024 / dim.max(1) + 1).enumerate().for_each(|(row, to)| {
        let bhi = match by_query {
            true => [row / heads / len_q, row % heads, row / heads % len_q],
            false => index(row),
        };
        let (total, weights) = weigh(bhi);
        for ((part, lse), weight) in outputs.iter().zip(&lses).zip(weights) {
            // A part that saw no key has weight 0, whatever it holds.
            if lse.data[lse.layout.at(&bhi)] == f32::NEG_INFINITY {
                continue;
            }
            let first = part.layout.at(&[bhi[0], bhi[1], bhi[2], 0]);
            let step = part.layout.strides()[3];
            for (d, to) in to.iter_mut().enumerate() {
                *to += weight * part.data[first + d * step];
            }
        }
        if total.is_nan() {
            to.fill(f32::NAN);
        }
    });
    [out, lse.into()]
}
