use rayon::prelude::*;

use super::View;

/// `X · σ(G)` of two views `[b, i, d]`, row-major.
pub(crate) fn gate(x: View<'_>, g: View<'_>) -> Vec<f32> {
    let &[_, len, dim] = x.layout.shape() else { unreachable!("three axes") };
    let steps = [x, g].map(|view| view.layout.strides()[2]);
    let mut y = vec![0.0; x.layout.len()];
    y.par_chunks_mut(dim.max(1)).enumerate().for_each(|(n, y)| {
        let [x_at, g_at] = [x, g].map(|view| view.layout.at(&[n / len, n % len, 0]));
        for (d, y) in y.iter_mut().enumerate() {
            *y = x.data[x_at + d * steps[0]] / (1.0 + (-g.data[g_at + d * steps[1]]).exp());
        }
    });
    y
}
