//! The expected results of an attention call, and the magnitude of the numbers that each row is summed from.

use std::ops::Deref;

use wgpu_attention::problem::{Layout, Problem};
use wgpu_attention::reference::{self, Inputs, Outputs, View};
use wgpu_attention::{Attended, Tensor};

use crate::compare::{assert_close, assert_close_to, assert_logs_close, largest};

/// The truth for a call.
#[derive(Clone, Debug)]
pub struct Truth {
    pub outputs: Outputs,
    /// For each query, `[b, h, i]`: the largest magnitudes of the value vectors, averaged with the query's weights. A
    /// row of the output is no larger, and far smaller if values cancel, which costs digits in any implementation.
    pub values: Vec<f64>,
    /// For each query: the largest product of the norms of the query and a key, scaled. No score is larger before
    /// biases.
    pub scores: Vec<f64>,
}

impl Deref for Truth {
    type Target = Outputs;
    fn deref(&self) -> &Outputs {
        &self.outputs
    }
}

/// Reduces each vector `[b, h, i]` of a view to one number.
fn of_vectors(x: View<'_>, one: impl Fn(&mut dyn Iterator<Item = f64>) -> f64) -> Vec<f64> {
    let &[batch, heads, len, dim] = x.layout.shape() else { panic!("four axes") };
    let rows = Layout::contiguous(&[batch, heads, len]).expect("no larger than X");
    let index = |row: usize| [row / (heads * len), row / len % heads, row % len];
    (0..rows.len())
        .map(|row| {
            let [b, h, i] = index(row);
            one(&mut (0..dim).map(|d| x.at(&[b, h, i, d])))
        })
        .collect()
}

impl Truth {
    pub fn new(problem: &Problem, inputs: &Inputs<'_>) -> Truth {
        let outputs = reference::attention(problem, inputs);
        let Problem { heads_q, heads_kv, len_q, len_k, .. } = *problem;
        let length = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
        let (q, k) = (of_vectors(inputs.q, length), of_vectors(inputs.k, length));
        let v = of_vectors(inputs.v, |x| largest(&x.collect::<Vec<_>>()));
        let (mut values, mut scores) = (Vec::with_capacity(q.len()), Vec::with_capacity(q.len()));
        for (row, &q) in q.iter().enumerate() {
            let (b, h) = (row / (heads_q * len_q), row / len_q % heads_q);
            let first = (b * heads_kv + h / problem.group()) * len_k;
            let weights = outputs.weights[row * len_k..][..len_k].iter();
            values.push(weights.zip(&v[first..]).filter(|(weight, _)| **weight > 0.0).map(|(p, v)| p * v).sum());
            scores.push(f64::from(problem.scale).abs() * q * largest(&k[first..][..len_k]));
        }
        Truth { outputs, values, scores }
    }

    /// Panics unless every result is within `tolerance` times the scale of its own row.
    #[track_caller]
    pub fn hold(&self, what: &str, attended: &Attended, tolerance: f64) {
        self.hold_output(&format!("output of {what}"), &attended.output, tolerance);
        if let Some(lse) = &attended.lse {
            assert_logs_close(&format!("LSE of {what}"), lse, &self.lse, tolerance);
        }
        // Averaged weights are compared separately.
        if let Some(weights) = attended.weights.as_ref().filter(|weights| weights.shape().len() != 3) {
            assert_close(&format!("weights of {what}"), weights, &self.weights, tolerance);
        }
    }

    #[track_caller]
    pub fn hold_output(&self, what: &str, output: &Tensor, tolerance: f64) {
        assert_close_to(what, output, &self.output, |row, _| self.values[row], tolerance);
    }

    /// The scores of a stage, for visible and hidden pairs.
    #[track_caller]
    pub fn hold_scores(&self, what: &str, scores: &Tensor, expected: &[f64], tolerance: f64) {
        assert_close_to(what, scores, expected, |row, scores| self.scores[row].max(largest(scores)), tolerance);
    }

    /// Weights averaged over heads, `[b, i, j]` with `square` pairs of a query and a key.
    pub fn averaged(&self, [batch, heads]: [usize; 2], square: usize) -> Vec<f64> {
        (0..batch * square)
            .map(|at| {
                let of = |h| self.weights[(at / square * heads + h) * square + at % square];
                (0..heads).map(of).sum::<f64>() / heads.max(1) as f64
            })
            .collect()
    }
}
