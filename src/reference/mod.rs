//! The reference: plain f64 loops, one readable function per shader, and the backward of each. For tests, checks and the
//! tuner's self-tests; the library never uses it to compute results. Finite differences check the backward
//! (`tests/it/gradcheck.rs`).
//!
//! Operands are strided views of f64; results are row-major.

mod backward;
mod distance;
mod gate;
mod inspect;
mod layer;
mod normalise;
mod packed;
mod position;
mod project;
mod scores;
mod softmax;
mod weighted_sum;

pub use backward::{Cotangents, Gradients, backward};
pub use distance::Distance;
pub use gate::{gate, gate_backward};
pub use inspect::{Inspected, inspect};
pub use layer::{Layer, LayerGradients, LayerInputs, LayerOutputs, Norm, Projection, layer, layer_backward};
pub use normalise::{NormGradients, normalise, normalise_backward};
pub use packed::{attention_packed, backward_packed};
pub use position::{add_positions, add_positions_backward, rotate, rotate_backward};
pub use project::{ProjectGradients, project, project_backward};
pub use scores::scores;
pub use softmax::softmax;

use crate::problem::{Dropout, Layout, MaskMeaning, Problem, Rows, ScoreStage};
use scores::Positioned;
use weighted_sum::weighted_sum;

/// A strided view.
#[derive(Clone, Copy, Debug)]
pub struct View<'a, T = f64> {
    /// The buffer.
    pub data: &'a [T],
    /// Shape and strides in it.
    pub layout: &'a Layout,
}

impl<T: Copy> View<'_, T> {
    /// The element at `index`.
    pub fn at(&self, index: &[usize]) -> T {
        self.data[self.layout.at(index)]
    }
}

/// The operands of a call: four axes each.
#[derive(Clone, Debug)]
pub struct Inputs<'a> {
    /// `[b, hq, i, d]`
    pub q: View<'a>,
    /// `[b, hkv, j, d]`
    pub k: View<'a>,
    /// `[b, hkv, j, d]`
    pub v: View<'a>,
    /// The rules that read numbers of their own.
    pub rules: Rules<'a>,
}

/// The rules of a call that are not in its [`Problem`]. Masks and biases are broadcast to [`Problem::mask_shape`].
#[derive(Clone, Debug, Default)]
pub struct Rules<'a> {
    /// Boolean masks.
    pub masks: Vec<(View<'a, bool>, MaskMeaning)>,
    /// Additive biases; −∞ masks.
    pub biases: Vec<View<'a>>,
    /// `[hq]`: one extra score per head, without a value.
    pub sink: Option<View<'a>>,
    /// The factor on `Q·Kᵀ` in f64, in place of the problem's.
    pub scale: Option<f64>,
    /// The cap in f64, in place of the problem's.
    pub softcap: Option<f64>,
    /// Rotates queries and keys before their product.
    pub rotary: Option<Rotary<'a>>,
    /// Adds a bias by distance, after the softcap.
    pub distance: Option<Distance<'a>>,
    /// Drops weights, after LSE and returned weights are computed.
    pub dropout: Option<Dropout>,
    /// What dropout counts batch entries from: a packed sequence is a call of its own, but not the first batch entry.
    pub first_batch: usize,
    /// Whether the output of a query that may attend to nothing is the mean of all values of its head, hidden ones
    /// included, not 0.
    pub mean_where_empty: bool,
}

/// Rotary positions; see [`rotate`].
#[derive(Clone, Debug)]
pub struct Rotary<'a> {
    /// `[row, pairs]`
    pub cos: View<'a>,
    /// `[row, pairs]`
    pub sin: View<'a>,
    /// Whether adjacent columns form a pair.
    pub interleaved: bool,
    /// The rows of queries and of keys.
    pub rows: [Rows; 2],
}

impl Rules<'_> {
    fn scale(&self, problem: &Problem) -> f64 {
        self.scale.unwrap_or(f64::from(problem.scale))
    }

    fn softcap(&self, problem: &Problem) -> Option<f64> {
        self.softcap.or(problem.softcap.map(f64::from))
    }

    /// What dropout multiplies the weight of a pair by: 0, or `1 / (1 − p)`.
    fn dropout_factor(&self, [b, h, i, j]: [usize; 4]) -> f64 {
        match self.dropout {
            None => 1.0,
            Some(dropout) if dropout.keeps([self.first_batch + b, h, i, j]) => dropout.factor(),
            Some(_) => 0.0,
        }
    }
}

impl<'a> Inputs<'a> {
    /// Without rules.
    pub fn new(q: View<'a>, k: View<'a>, v: View<'a>) -> Inputs<'a> {
        Inputs { q, k, v, rules: Rules::default() }
    }

    fn sink_of(&self, h: usize) -> f64 {
        self.rules.sink.map_or(f64::NEG_INFINITY, |sink| sink.at(&[h]))
    }
}

/// All results that a call can return.
#[derive(Clone, Debug, PartialEq)]
pub struct Outputs {
    /// `[b, hq, i, d]`
    pub output: Vec<f64>,
    /// `[b, hq, i]`
    pub lse: Vec<f64>,
    /// `[b, hq, i, j]`, before dropout
    pub weights: Vec<f64>,
}

/// `softmax(scale · Q·Kᵀ …) · V`.
pub fn attention(problem: &Problem, inputs: &Inputs<'_>) -> Outputs {
    let call = Positioned::new(problem, inputs);
    let (weights, lse) = weigh(problem, inputs, &call.scores(ScoreStage::Masked));
    let output = weighted_sum(&call, problem, inputs, &weights);
    Outputs { output, lse, weights }
}

fn weigh(problem: &Problem, inputs: &Inputs<'_>, s: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let Problem { batch, heads_q, len_q, .. } = *problem;
    softmax(s, batch * heads_q * len_q, |row| inputs.sink_of(row / len_q % heads_q))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problem::{Align, Positions};

    fn layout(shape: &[usize]) -> Layout {
        Layout::contiguous(shape).unwrap()
    }

    fn run(q: &[f64], k: &[f64], v: &[f64], shapes: [[usize; 4]; 3], positions: &Positions) -> Outputs {
        with_sink(q, k, v, shapes, positions, None)
    }

    fn with_sink(
        q: &[f64],
        k: &[f64],
        v: &[f64],
        shapes: [[usize; 4]; 3],
        positions: &Positions,
        sink: Option<&[f64]>,
    ) -> Outputs {
        let [qs, ks, vs] = shapes.map(|shape| layout(&shape));
        let sinks = layout(&[shapes[0][1]]);
        let problem = Problem::new(&shapes[0], &shapes[1], &shapes[2], Some(1.0), None, positions, 0).unwrap();
        let view = |data, layout| View { data, layout };
        let (q, k, v) = (view(q, &qs), view(k, &ks), view(v, &vs));
        let sink = sink.map(|sink| view(sink, &sinks));
        attention(&problem, &Inputs { q, k, v, rules: Rules { sink, ..Rules::default() } })
    }

    #[test]
    fn two_keys_by_hand() {
        // Scores ln 3 and 0: weights 3/4 and 1/4.
        let shape = [1, 1, 2, 1];
        let out = run(&[3f64.ln()], &[1.0, 0.0], &[8.0, 4.0], [[1, 1, 1, 1], shape, shape], &Positions::default());
        assert!((out.output[0] - 7.0).abs() < 1e-12);
        assert!((out.lse[0] - 4f64.ln()).abs() < 1e-12);
        assert!((out.weights[0] - 0.75).abs() < 1e-12);
    }

    #[test]
    fn a_query_that_sees_nothing_gives_zero() {
        let positions = Positions { causal: true, align: Align::Offset(-1), ..Default::default() };
        let shape = [1, 1, 2, 1];
        let nan = f64::NAN;
        let out = run(&[1.0, 1.0], &[0.5, nan], &[6.0, nan], [shape, shape, shape], &positions);
        assert_eq!(out.output, [0.0, 6.0]);
        assert_eq!(out.lse, [f64::NEG_INFINITY, 0.5]);
        assert_eq!(out.weights, [0.0, 0.0, 1.0, 0.0]);
    }

    #[test]
    fn nan_reaches_the_rows_that_see_it() {
        let positions = Positions { causal: true, ..Default::default() };
        let shape = [1, 1, 2, 1];
        let out = run(&[1.0, 1.0], &[0.0, f64::NAN], &[1.0, 2.0], [shape, shape, shape], &positions);
        assert_eq!(out.output[0], 1.0);
        assert!(out.output[1].is_nan() && out.lse[1].is_nan());
        let out = run(&[1.0, 1.0], &[0.0, 0.0], &[1.0, f64::INFINITY], [shape, shape, shape], &positions);
        assert_eq!(out.output, [1.0, f64::INFINITY]);
    }

    #[test]
    fn a_sink_takes_its_share() {
        // Score ln 3 with a sink of ln 5 or none: sums of 3 + 5 or of 3.
        let (shape, ln) = ([1, 1, 1, 1], f64::ln);
        let run =
            |sink, positions: &Positions| with_sink(&[ln(3.0)], &[1.0], &[8.0], [shape; 3], positions, Some(&[sink]));
        let plain = Positions::default();
        let out = run(ln(5.0), &plain);
        assert!((out.output[0] - 3.0).abs() < 1e-12 && (out.weights[0] - 0.375).abs() < 1e-12);
        assert!((out.lse[0] - ln(8.0)).abs() < 1e-12);
        assert_eq!(run(f64::NEG_INFINITY, &plain).output, [8.0]);
        let blind = Positions { causal: true, align: Align::Offset(-1), ..Default::default() };
        let out = run(ln(5.0), &blind);
        assert_eq!((out.output[0], out.lse[0], out.weights[0]), (0.0, ln(5.0), 0.0));
        for broken in [f64::NAN, f64::INFINITY] {
            for (positions, sees) in [(&plain, true), (&blind, false)] {
                let out = run(broken, positions);
                assert!(out.output[0].is_nan() && out.lse[0].is_nan());
                assert!(if sees { out.weights[0].is_nan() } else { out.weights[0] == 0.0 });
            }
        }
    }

    #[test]
    fn dropout_drops_weights_and_divides_the_others() {
        // Values are the unit vectors, so that the output is the weights after dropout.
        let (len, dropout) = (8, Dropout::new(0.5, 11, 0).unwrap());
        let unit: Vec<f64> = (0..len * len).map(|at| f64::from(u8::from(at / len == at % len))).collect();
        let (shape, ones) = (layout(&[1, 1, len, len]), vec![0.1; len * len]);
        let sizes = [1, 1, len, len];
        let problem = Problem::new(&sizes, &sizes, &sizes, None, None, &Positions::default(), 0).unwrap();
        let view = |data| View { data, layout: &shape };
        let mut inputs = Inputs::new(view(&ones), view(&ones), view(&unit));
        let plain = attention(&problem, &inputs);
        inputs.rules.dropout = Some(dropout);
        inputs.rules.first_batch = 3;
        let out = attention(&problem, &inputs);
        assert_eq!((&out.lse, &out.weights), (&plain.lse, &plain.weights));
        for i in 0..len {
            for j in 0..len {
                let kept = dropout.keeps([3, 0, i, j]);
                assert_eq!(out.output[i * len + j], if kept { 2.0 * plain.weights[i * len + j] } else { 0.0 });
            }
        }
        assert!(out.output.contains(&0.0) && out.output.iter().any(|&x| x > 0.0));
    }

    #[test]
    fn grouped_heads_read_their_own_key() {
        let out =
            run(&[0.0; 4], &[0.0; 2], &[1.0, 2.0], [[1, 4, 1, 1], [1, 2, 1, 1], [1, 2, 1, 1]], &Positions::default());
        assert_eq!(out.output, [1.0, 1.0, 2.0, 2.0]);
    }
}
