use super::View;

/// `Y = X·Wᵀ + b` for X `[b, l, in]`, W `[out, in]`, b `[out]`: `[b, l, out]`, row-major.
pub fn project(x: View<'_>, w: View<'_>, bias: Option<View<'_>>) -> Vec<f64> {
    let (&[batch, len, dim_in], &[dim_out, _]) = (x.layout.shape(), w.layout.shape()) else {
        panic!("X has three axes and W two");
    };
    let mut y = Vec::with_capacity(batch * len * dim_out);
    for b in 0..batch {
        for l in 0..len {
            for o in 0..dim_out {
                let sum: f64 = (0..dim_in).map(|i| x.at(&[b, l, i]) * w.at(&[o, i])).sum();
                y.push(sum + bias.map_or(0.0, |bias| bias.at(&[o])));
            }
        }
    }
    y
}
