use super::{Inputs, visible};
use crate::problem::Problem;

/// `O = P·V` over visible keys: `[b, hq, i, d]`, row-major. The contents of masked values do not count.
pub fn weighted_sum(problem: &Problem, inputs: &Inputs<'_>, weights: &[f64]) -> Vec<f64> {
    let Problem { batch, heads_q, len_q, len_k, dim_v, .. } = *problem;
    let mut o = vec![0.0; batch * heads_q * len_q * dim_v];
    let index = (0..batch).flat_map(|b| (0..heads_q).flat_map(move |h| (0..len_q).map(move |i| [b, h, i])));
    for (row, [b, h, i]) in index.enumerate() {
        let sink = inputs.sink_of(h);
        if sink.is_nan() || sink == f64::INFINITY {
            o[row * dim_v..][..dim_v].fill(f64::NAN);
        }
        for j in 0..len_k {
            if !visible(problem, inputs, b, h, i, j) {
                continue;
            }
            for d in 0..dim_v {
                o[row * dim_v + d] += weights[row * len_k + j] * inputs.v.at(&[b, h / problem.group(), j, d]);
            }
        }
    }
    o
}
