use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, Par};
use rayon::prelude::*;

use super::View;

/// Rows of one task.
const TILE_ROWS: usize = 128;

/// `X·Wᵀ + b` for X `[b, l, in]`, W `[out, in]`, then one row per entry of `extra` (`None`: zeros):
/// row-major `[b, l + extra, out]`.
pub(crate) fn project(x: View<'_>, w: View<'_>, bias: Option<View<'_>>, extra: &[Option<View<'_>>]) -> Vec<f32> {
    let [batch, len, dim_in] = [x.layout.shape()[0], x.layout.shape()[1], x.layout.shape()[2]];
    let dim_out = w.layout.shape()[0];
    let w = w.matrix(&[]);
    let bias = bias.map(|bias| bias.values());
    let rows_in_all = len + extra.len();
    let mut y = vec![0.0; batch * rows_in_all * dim_out];
    if y.is_empty() {
        return y;
    }
    y.par_chunks_mut(rows_in_all * dim_out).enumerate().for_each(|(b, y)| {
        let (projected, appended) = y.split_at_mut(len * dim_out);
        let x = x.matrix(&[b]);
        projected.par_chunks_mut(TILE_ROWS * dim_out).enumerate().for_each(|(tile, y)| {
            let rows = y.len() / dim_out;
            let start = tile * TILE_ROWS;
            if dim_in > 0 {
                let y = MatMut::from_row_major_slice_mut(&mut *y, rows, dim_out);
                let x = x.rows(start, start + rows);
                matmul(y, Accum::Replace, x, w.rows(0, dim_out).transpose(), 1.0, Par::Seq);
            }
            if let Some(bias) = &bias {
                for row in y.chunks_mut(dim_out) {
                    row.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
                }
            }
        });
        for (row, values) in appended.chunks_mut(dim_out).zip(extra) {
            if let Some(values) = values {
                row.copy_from_slice(&values.values());
            }
        }
    });
    y
}
