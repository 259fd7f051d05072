use super::View;

fn sigmoid(g: f64) -> f64 {
    1.0 / (1.0 + (-g).exp())
}

/// `x · σ(g)` with `σ(g) = 1 / (1 + exp(−g))` for X and G `[b, i, d]`, row-major.
pub fn gate(x: View<'_>, g: View<'_>) -> Vec<f64> {
    x.layout.positions().zip(g.layout.positions()).map(|(x_at, g_at)| x.data[x_at] * sigmoid(g.data[g_at])).collect()
}

/// The gradients of [`gate`] by X and by G, from that of its result.
///
/// ```text
/// dx = dy · σ(g)     dg = dy · x · σ(g) · (1 − σ(g))
/// ```
pub fn gate_backward(x: View<'_>, g: View<'_>, dy: View<'_>) -> [Vec<f64>; 2] {
    let (mut dx, mut dg) = (Vec::with_capacity(dy.layout.len()), Vec::with_capacity(dy.layout.len()));
    for ((x_at, g_at), dy_at) in x.layout.positions().zip(g.layout.positions()).zip(dy.layout.positions()) {
        let (x, share, dy) = (x.data[x_at], sigmoid(g.data[g_at]), dy.data[dy_at]);
        dx.push(dy * share);
        dg.push(dy * x * share * (1.0 - share));
    }
    [dx, dg]
}
