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

/// The gradient by X of [`rotate`], from that of its result: rotated back by the same angles. (The tables may also hold a
/// factor, by which both are multiplied.)
///
/// ```text
/// dx₀ = dy₀·cos + dy₁·sin     dx₁ = dy₁·cos − dy₀·sin
/// ```
pub fn rotate_backward(dy: View<'_>, cos: View<'_>, sin: View<'_>, interleaved: bool, rows: &Rows) -> Vec<f64> {
    let negative: Vec<f64> = sin.data.iter().map(|sin| -sin).collect();
    rotate(dy, cos, View { data: &negative, layout: sin.layout }, interleaved, rows)
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

/// The gradient of the `table` `[row, d]` of [`add_positions`], from that of its result `[b, i, d]`: for each row the sum
/// over the tokens that read it. The gradient by X is that of the result.
pub fn add_positions_backward(dy: View<'_>, table: View<'_>, rows: &Rows) -> Vec<f64> {
    let &[batch, len, dim] = dy.layout.shape() else { panic!("X has three axes") };
    let mut d_table = vec![0.0; table.layout.len()];
    for b in 0..batch {
        for i in 0..len {
            for d in 0..dim {
                d_table[rows.of(b, i, len) * dim + d] += dy.at(&[b, i, d]);
            }
        }
    }
    d_table
}
