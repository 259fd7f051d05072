use super::View;

/// `(x − m) / √(s + ε) · w + b` over the last axis of X `[a, b, c, d]`, with w and b `[d]`. RMSNorm: m = 0, s = mean of
/// x². LayerNorm (if `centred`): m = mean of x, s = mean of (x − m)². Row-major.
pub fn normalise(x: View<'_>, weight: View<'_>, bias: Option<View<'_>>, centred: bool, epsilon: f64) -> Vec<f64> {
    let &[a_len, b_len, c_len, dim] = x.layout.shape() else { panic!("X has four axes") };
    let mut y = Vec::with_capacity(a_len * b_len * c_len * dim);
    for a in 0..a_len {
        for b in 0..b_len {
            for c in 0..c_len {
                let row: Vec<f64> = (0..dim).map(|d| x.at(&[a, b, c, d])).collect();
                let mean = if centred { row.iter().sum::<f64>() / dim as f64 } else { 0.0 };
                let spread = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / dim as f64;
                for (d, x) in row.iter().enumerate() {
                    let shift = bias.map_or(0.0, |bias| bias.at(&[d]));
                    y.push((x - mean) / (spread + epsilon).sqrt() * weight.at(&[d]) + shift);
                }
            }
        }
    }
    y
}
