use super::View;

/// `(x − m) / √(s + ε) · w + b` over the last axis of X `[a, b, c, d]`, with w and b `[d]`. RMSNorm: m = 0, s = mean of
/// x². LayerNorm (if `centred`): m = mean of x, s = mean of (x − m)². Row-major.
pub fn normalise(x: View<'_>, weight: View<'_>, bias: Option<View<'_>>, centred: bool, epsilon: f64) -> Vec<f64> {
    let mut y = Vec::with_capacity(x.layout.len());
    for row in each_row(x) {
        let (unit, _) = unit_of(&row, centred, epsilon);
        for (d, unit) in unit.iter().enumerate() {
            let shift = bias.map_or(0.0, |bias| bias.at(&[d]));
            y.push(unit * weight.at(&[d]) + shift);
        }
    }
    y
}

/// The gradients of [`normalise`], row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct NormGradients {
    /// `[a, b, c, d]`
    pub x: Vec<f64>,
    /// `[d]`
    pub weight: Vec<f64>,
    /// `[d]`, whether the norm has a bias or not
    pub bias: Vec<f64>,
}

/// The gradients of [`normalise`] by X, w and b, from that of its result. With the unit row `u = (x − m) / r`,
/// `r = √(s + ε)`, and means over the row:
///
/// ```text
/// db = Σ dy     dw = Σ dy u     du = dy w
/// RMSNorm:    dx = (du − u · mean(du u)) / r
/// LayerNorm:  dx = (du − mean(du) − u · mean(du u)) / r
/// ```
pub fn normalise_backward(x: View<'_>, weight: View<'_>, centred: bool, epsilon: f64, dy: View<'_>) -> NormGradients {
    let dim = weight.layout.len();
    let mut all = NormGradients { x: Vec::with_capacity(x.layout.len()), weight: vec![0.0; dim], bias: vec![0.0; dim] };
    for (row, dy) in each_row(x).zip(each_row(dy)) {
        let (unit, root) = unit_of(&row, centred, epsilon);
        let d_unit: Vec<f64> = dy.iter().enumerate().map(|(d, dy)| dy * weight.at(&[d])).collect();
        let mean = if centred { d_unit.iter().sum::<f64>() / dim as f64 } else { 0.0 };
        let along = d_unit.iter().zip(&unit).map(|(d_unit, unit)| d_unit * unit).sum::<f64>() / dim as f64;
        for d in 0..dim {
            all.x.push((d_unit[d] - mean - unit[d] * along) / root);
            all.weight[d] += dy[d] * unit[d];
            all.bias[d] += dy[d];
        }
    }
    all
}

/// The rows of the last axis of `[a, b, c, d]`.
fn each_row<'a>(x: View<'a>) -> impl Iterator<Item = Vec<f64>> + 'a {
    let &[a_len, b_len, c_len, dim] = x.layout.shape() else { panic!("X has four axes") };
    super::scores::rows([a_len, b_len, c_len]).map(move |[a, b, c]| (0..dim).map(|d| x.at(&[a, b, c, d])).collect())
}

/// `(x − m) / √(s + ε)`, and that root.
fn unit_of(row: &[f64], centred: bool, epsilon: f64) -> (Vec<f64>, f64) {
    let dim = row.len() as f64;
    let mean = if centred { row.iter().sum::<f64>() / dim } else { 0.0 };
    let spread = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / dim;
    let root = (spread + epsilon).sqrt();
    (row.iter().map(|x| (x - mean) / root).collect(), root)
}
