use rayon::prelude::*;

use super::View;
use crate::problem::Layout;

/// Joins two results `[b, h, i, d]` over disjoint keys with their LSEs `[b, h, i]`; `output` is the
/// layout of the result, heads or queries innermost of the rows. The LSE is row-major.
pub(crate) fn merge(outputs: [View<'_>; 2], lses: [View<'_>; 2], output: &Layout) -> [Vec<f32>; 2] {
    let &[batch, heads, len_q, dim] = output.shape() else { unreachable!("four axes") };
    let rows = batch * heads * len_q;
    let weigh = |bhi: [usize; 3]| {
        let [a, b] = lses.map(|lse| lse.data[lse.layout.at(&bhi)]);
        if [a, b].iter().any(|x| x.is_nan() || *x == f32::INFINITY) {
            return (f32::NAN, [1.0; 2]);
        }
        let peak = a.max(b);
        if peak == f32::NEG_INFINITY {
            return (peak, [0.0; 2]);
        }
        let weights = [(a - peak).exp(), (b - peak).exp()];
        let sum = weights[0] + weights[1];
        (peak + sum.ln(), weights.map(|weight| weight / sum))
    };
    let index = |row: usize| [row / len_q / heads, row / len_q % heads, row % len_q];
    let lse = (0..rows).into_par_iter().with_min_len(1024).map(|row| weigh(index(row)).0).collect();
    let mut out = vec![0.0; rows * dim];
    let by_query = output.strides()[1] < output.strides()[2];
    out.par_chunks_exact_mut(dim.max(1)).with_min_len(1024 / dim.max(1) + 1).enumerate().for_each(|(row, to)| {
        let bhi = match by_query {
            true => [row / heads / len_q, row % heads, row / heads % len_q],
            false => index(row),
        };
        let (total, weights) = weigh(bhi);
        for ((part, lse), weight) in outputs.iter().zip(&lses).zip(weights) {
            // What saw no key weighs nothing, whatever it holds.
            if lse.data[lse.layout.at(&bhi)] == f32::NEG_INFINITY {
                continue;
            }
            let first = part.layout.at(&[bhi[0], bhi[1], bhi[2], 0]);
            let step = part.layout.strides()[3];
            for (d, to) in to.iter_mut().enumerate() {
                *to += weight * part.data[first + d * step];
            }
        }
        if total.is_nan() {
            to.fill(f32::NAN);
        }
    });
    [out, lse]
}
