use std::ops::Range;

use super::{Inputs, attention};
use crate::problem::Problem;

/// The results of an inspection.
#[derive(Clone, Debug, PartialEq)]
pub struct Inspected {
    /// `[b, heads, queries, j]`
    pub weights: Vec<f64>,
    /// `Σ_i P` over the chosen queries: `[b, heads, j]`
    pub column_sums: Vec<f64>,
    /// `−Σ_j P·ln P` in nats: `[b, heads, queries]`
    pub entropy: Vec<f64>,
}

/// Weights of chosen heads and queries, their sums per key and their entropies per query; row-major.
pub fn inspect(problem: &Problem, inputs: &Inputs<'_>, heads: &[usize], queries: Range<usize>) -> Inspected {
    let Problem { batch, heads_q, len_q, len_k, .. } = *problem;
    let all = attention(problem, inputs).weights;
    let (mut weights, mut column_sums, mut entropy) = (Vec::new(), Vec::new(), Vec::new());
    for b in 0..batch {
        for &h in heads {
            let mut sums = vec![0.0; len_k];
            for i in queries.clone() {
                let row = &all[((b * heads_q + h) * len_q + i) * len_k..][..len_k];
                weights.extend_from_slice(row);
                sums.iter_mut().zip(row).for_each(|(sum, p)| *sum += p);
                // P·ln P → 0 as P → 0.
                entropy.push(-row.iter().filter(|&&p| p != 0.0).map(|p| p * p.ln()).sum::<f64>() + 0.0);
            }
            column_sums.extend(sums);
        }
    }
    Inspected { weights, column_sums, entropy }
}
