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

/// The gradients of [`project`], row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct ProjectGradients {
    /// `[b, l, in]`
    pub x: Vec<f64>,
    /// `[out, in]`
    pub weight: Vec<f64>,
    /// `[out]`, whether the projection has a bias or not
    pub bias: Vec<f64>,
}

/// The gradients of [`project`] by X, W and b, from that of its result `[b, l, out]`.
///
/// ```text
/// dX = dY·W     dW = Σ dYᵀ·X     db = Σ dY     sums over all rows [b, l]
/// ```
pub fn project_backward(x: View<'_>, w: View<'_>, dy: View<'_>) -> ProjectGradients {
    let (&[batch, len, dim_in], &[dim_out, _]) = (x.layout.shape(), w.layout.shape()) else {
        panic!("X has three axes and W two");
    };
    let mut all = ProjectGradients {
        x: vec![0.0; batch * len * dim_in],
        weight: vec![0.0; dim_out * dim_in],
        bias: vec![0.0; dim_out],
    };
    for b in 0..batch {
        for l in 0..len {
            for o in 0..dim_out {
                let dy = dy.at(&[b, l, o]);
                all.bias[o] += dy;
                for i in 0..dim_in {
                    all.x[(b * len + l) * dim_in + i] += dy * w.at(&[o, i]);
                    all.weight[o * dim_in + i] += dy * x.at(&[b, l, i]);
                }
            }
        }
    }
    all
}
