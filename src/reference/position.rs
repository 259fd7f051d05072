use super::View;
use crate::problem::Rows;

/// X `[b, h, i, d]` with each pair of its first columns rotated: `x₀·cos − x₁·sin` and `x₁·cos + x₀·sin`, with cosines
/// and sines `[row, pairs]`. Pairs are adjacent columns if `interleaved`, else half of those columns apart.
pub fn rotate(x: View<'_>, cos: View<'_>, sin: View<'_>, interleaved: bool, rows: &Rows) -> Vec<f64> {
    let (&[batch, heads, len, dim], &[_, pairs]) = (x.layout.shape(), cos.layout.shape()) else {
        panic!("X has four axes and the cosines two");
    };
    let mut y = Vec::with_capacity(batch * heads * len * dim);
    for b in 0..batch {
        for h in 0..heads {
            for i in 0..len {
                let row = rows.of(b, i, len);
                for d in 0..dim {
                    let (pair, is_second) = if interleaved { (d / 2, d % 2 == 1) } else { (d % pairs, d >= pairs) };
                    if d >= 2 * pairs {
                        y.push(x.at(&[b, h, i, d]));
                        continue;
                    }
                    let (d0, d1) = if interleaved { (2 * pair, 2 * pair + 1) } else { (pair, pair + pairs) };
                    let (x0, x1) = (x.at(&[b, h, i, d0]), x.at(&[b, h, i, d1]));
                    let (cos, sin) = (cos.at(&[row, pair]), sin.at(&[row, pair]));
                    y.push(if is_second { x1 * cos + x0 * sin } else { x0 * cos - x1 * sin });
                }
            }
        }
    }
    y
}

/// X `[b, i, d]` plus the rows of `table` `[row, d]`.
pub fn add_positions(x: View<'_>, table: View<'_>, rows: &Rows) -> Vec<f64> {
    let &[batch, len, dim] = x.layout.shape() else { panic!("X has three axes") };
    let mut y = Vec::with_capacity(batch * len * dim);
    for b in 0..batch {
        for i in 0..len {
            for d in 0..dim {
                y.push(x.at(&[b, i, d]) + table.at(&[rows.of(b, i, len), d]));
            }
        }
    }
    y
}

/// `factor · X[b, h, i, column(j − i)]` for X `[b, h, i, column]`: `[b, h, i, j]`.
pub fn relative(x: View<'_>, column: impl Fn(i64) -> usize, len_k: usize, factor: f64) -> Vec<f64> {
    let &[batch, heads, len_q, _] = x.layout.shape() else { panic!("X has four axes") };
    let mut bias = Vec::with_capacity(batch * heads * len_q * len_k);
    for b in 0..batch {
        for h in 0..heads {
            for i in 0..len_q {
                for j in 0..len_k {
                    bias.push(factor * x.at(&[b, h, i, column(j as i64 - i as i64)]));
                }
            }
        }
    }
    bias
}
