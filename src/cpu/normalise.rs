use rayon::prelude::*;

use super::View;

/// RMSNorm, or where `centred` LayerNorm, over the last axis of X `[a, b, c, d]` with `weight` and `bias` `[d]`,
/// row-major. Sums are f64: rows are short.
pub(crate) fn normalise(
    x: View<'_>,
    weight: View<'_>,
    bias: Option<View<'_>>,
    centred: bool,
    epsilon: f32,
) -> Vec<f32> {
    let &[_, b_len, c_len, dim] = x.layout.shape() else { unreachable!("four axes") };
    let step = x.layout.strides()[3];
    let (weight, bias) = (weight.values(), bias.map_or(vec![0.0; dim], |bias| bias.values()));
    let mut y = vec![0.0; x.layout.len()];
    y.par_chunks_mut(dim.max(1)).enumerate().for_each(|(n, y)| {
        let start = x.layout.at(&[n / c_len / b_len, n / c_len % b_len, n % c_len, 0]);
        let row = |d: usize| f64::from(x.data[start + d * step]);
        let mean = if centred { (0..dim).map(row).sum::<f64>() / dim as f64 } else { 0.0 };
        let spread = (0..dim).map(|d| (row(d) - mean).powi(2)).sum::<f64>() / dim as f64;
        let factor = 1.0 / (spread + f64::from(epsilon)).sqrt();
        for (d, y) in y.iter_mut().enumerate() {
            *y = ((row(d) - mean) * factor * f64::from(weight[d]) + f64::from(bias[d])) as f32;
        }
    });
    y
}
