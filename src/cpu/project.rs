use super::product::{FEW_ROWS, Onto, Panels, Product, dots};
use super::{Buffer, View, threads};
use crate::problem::Layout;

/// Rows of one task.
const TILE_ROWS: usize = 128;

/// Outputs of one task if there are few rows.
const TILE_OUTPUTS: usize = 64;

/// `X·Wᵀ + b` for X `[b, l, in]`, W `[out, in]`, then one row per entry of `extra` (`None`: zeros):
/// row-major `[b, l + extra, out]`. The second argument is a buffer and the layout of W in it.
pub(crate) fn project(
    x: View<'_>,
    (numbers, layout): (&Buffer, &Layout),
    bias: Option<View<'_>>,
    extra: &[Option<View<'_>>],
) -> Buffer {
    let w = View { data: numbers, layout };
    let [batch, len, dim_in] = [x.layout.shape()[0], x.layout.shape()[1], x.layout.shape()[2]];
    let dim_out = w.layout.shape()[0];
    let w = w.matrix(&[]);
    let bias = bias.map(|bias| bias.values());
    let rows_in_all = len + extra.len();
    let mut y = Buffer::arbitrary(batch * rows_in_all * dim_out);
    if y.is_empty() {
        return y;
    }
    let inputs: Vec<_> = (0..batch).map(|b| x.matrix(&[b])).collect();
    let mut projected = Vec::with_capacity(batch);
    for y in y.chunks_exact_mut(rows_in_all * dim_out) {
        let (of_inputs, appended) = y.split_at_mut(len * dim_out);
        for (row, values) in appended.chunks_exact_mut(dim_out).zip(extra) {
            match values {
                Some(values) => row.copy_from_slice(&values.values()),
                None => row.fill(0.0),
            }
        }
        projected.push(of_inputs);
    }
    let arch = pulp::Arch::new();
    let operations = (batch * len) as f64 * (dim_in * dim_out) as f64;
    if len < FEW_ROWS {
        // A task reads its rows of W once for the whole batch.
        let mut tasks: Vec<Vec<&mut [f32]>> = (0..dim_out.div_ceil(TILE_OUTPUTS)).map(|_| Vec::new()).collect();
        for row in projected.into_iter().flat_map(|y| y.chunks_exact_mut(dim_out)) {
            row.chunks_mut(TILE_OUTPUTS).zip(&mut tasks).for_each(|(part, task)| task.push(part));
        }
        threads::for_each(tasks.into_iter().enumerate().collect(), operations, |(n, mut y)| {
            let first = n * TILE_OUTPUTS;
            let outputs = first..dim_out.min(first + TILE_OUTPUTS);
            for output in outputs.clone().step_by(4) {
                let few = output..outputs.end.min(output + 4);
                for (x, y) in inputs.iter().zip(y.chunks_mut(len)) {
                    dots(arch, x, &w, few.clone(), |row, output, sum| {
                        y[row][output - first] = sum + bias.as_ref().map_or(0.0, |bias| bias[output]);
                    });
                }
            }
        });
        return y;
    }
    let panels = numbers.packed(layout, || Panels::transposed(&w));
    let mut tasks = Vec::new();
    for (x, y) in inputs.iter().zip(projected) {
        tasks.extend(y.chunks_mut(TILE_ROWS * dim_out).enumerate().map(|(tile, y)| (x, tile * TILE_ROWS, y)));
    }
    threads::for_each(tasks, operations, |(x, first, y)| {
        let product = Product {
            left: &x.data[first * x.stride..],
            left_stride: x.stride,
            rows: y.len() / dim_out,
            right: panels.right(),
            scale: 1.0,
            onto: bias.as_deref().map_or(Onto::Nothing, Onto::Row),
            out: y,
            out_stride: dim_out,
            summed: usize::MAX,
        };
        product.compute(arch);
    });
    y
}
