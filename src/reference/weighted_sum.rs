use super::Inputs;
use super::scores::{Positioned, rows};
use crate::problem::Problem;

/// `O = P·V` over visible keys: `[b, hq, i, d]`, row-major. The contents of masked values do not count. Dropout, if any,
/// drops weights, whose values then do not count either, and divides the others by `1 − p`.
pub(super) fn weighted_sum(call: &Positioned<'_>, problem: &Problem, inputs: &Inputs<'_>, weights: &[f64]) -> Vec<f64> {
    let Problem { batch, heads_q, len_q, len_k, dim_v, .. } = *problem;
    let mut o = vec![0.0; batch * heads_q * len_q * dim_v];
    for (row, [b, h, i]) in rows([batch, heads_q, len_q]).enumerate() {
        let o = &mut o[row * dim_v..][..dim_v];
        let sink = inputs.sink_of(h);
        if sink.is_nan() || sink == f64::INFINITY {
            o.fill(f64::NAN);
        }
        let value = |j: usize, d: usize| inputs.v.at(&[b, h / problem.group(), j, d]);
        let sees = |j: usize| call.visible([b, h, i, j]);
        if inputs.rules.mean_where_empty && !(0..len_k).any(sees) {
            for (d, o) in o.iter_mut().enumerate() {
                *o = (0..len_k).map(|j| value(j, d)).sum::<f64>() / len_k.max(1) as f64;
            }
        }
        for j in (0..len_k).filter(|&j| sees(j)) {
            let factor = inputs.rules.dropout_factor([b, h, i, j]);
            if factor == 0.0 {
                continue;
            }
            for (d, o) in o.iter_mut().enumerate() {
                *o += factor * weights[row * len_k + j] * value(j, d);
            }
        }
    }
    o
}
