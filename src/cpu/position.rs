use rayon::prelude::*;

use super::View;
use crate::problem::{Layout, Rows};

/// X `[b, h, i, d]` with the first `2 · pairs` columns of each row turned by the cosines and sines of its row of
/// `table` `[row, 2 · columns]`. `layout` is the result's: rows of `d` one behind another.
pub(crate) fn rotate(
    x: View<'_>,
    table: View<'_>,
    pairs: usize,
    interleaved: bool,
    rows: &Rows,
    layout: &Layout,
) -> Vec<f32> {
    let &[_, heads, len, dim] = layout.shape() else { unreachable!("four axes") };
    let mut y = vec![0.0; layout.len()];
    let (width, step) = (table.layout.shape()[1], x.layout.strides()[3]);
    y.par_chunks_mut(dim.max(1)).enumerate().for_each(|(n, y)| {
        let at = |axis: usize| n * dim / layout.strides()[axis];
        let [b, h, i] = [at(0), at(1) % heads, at(2) % len];
        let angles = &table.data[table.layout.at(&[rows.of(b, i, len), 0])..][..width];
        let start = x.layout.at(&[b, h, i, 0]);
        let x = |d: usize| x.data[start + d * step];
        for (n, (cos, sin)) in angles.iter().zip(&angles[width / 2..]).take(pairs).enumerate() {
            let (d0, d1) = if interleaved { (2 * n, 2 * n + 1) } else { (n, n + pairs) };
            y[d0] = x(d0) * cos - x(d1) * sin;
            y[d1] = x(d1) * cos + x(d0) * sin;
        }
        y.iter_mut().enumerate().skip(2 * pairs).for_each(|(d, y)| *y = x(d));
    });
    y
}

/// X `[b, i, d]` plus the rows of `table` `[row, d]`, row-major.
pub(crate) fn add_positions(x: View<'_>, table: View<'_>, rows: &Rows) -> Vec<f32> {
    let &[_, len, dim] = x.layout.shape() else { unreachable!("three axes") };
    let (x_step, table_step) = (x.layout.strides()[2], table.layout.strides()[1]);
    let mut y = vec![0.0; x.layout.len()];
    y.par_chunks_mut(dim.max(1)).enumerate().for_each(|(n, y)| {
        let [b, i] = [n / len, n % len];
        let (x_at, table_at) = (x.layout.at(&[b, i, 0]), table.layout.at(&[rows.of(b, i, len), 0]));
        for (d, y) in y.iter_mut().enumerate() {
            *y = x.data[x_at + d * x_step] + table.data[table_at + d * table_step];
        }
    });
    y
}

/// `factor · X[b, h, i, columns[j − i + len_q − 1]]`, row-major `[b, h, i, j]`.
pub(crate) fn relative(x: View<'_>, columns: &[u32], len_k: usize, factor: f32) -> Vec<f32> {
    let &[batch, heads, len_q, _] = x.layout.shape() else { unreachable!("four axes") };
    let step = x.layout.strides()[3];
    let mut bias = vec![0.0; batch * heads * len_q * len_k];
    bias.par_chunks_mut(len_k.max(1)).enumerate().for_each(|(n, bias)| {
        let [b, h, i] = [n / len_q / heads, n / len_q % heads, n % len_q];
        let at = x.layout.at(&[b, h, i, 0]);
        for (bias, &column) in bias.iter_mut().zip(&columns[len_q - 1 - i..]) {
            *bias = factor * x.data[at + column as usize * step];
        }
    });
    bias
}
