use super::View;

/// `x · σ(g)` with `σ(g) = 1 / (1 + exp(−g))` for X and G `[b, i, d]`, row-major.
pub fn gate(x: View<'_>, g: View<'_>) -> Vec<f64> {
    let sigmoid = |g: f64| 1.0 / (1.0 + (-g).exp());
    x.layout.positions().zip(g.layout.positions()).map(|(x_at, g_at)| x.data[x_at] * sigmoid(g.data[g_at])).collect()
}
