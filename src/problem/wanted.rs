//! What a call returns in addition to its output.

use std::ops::Range;

use super::{Layout, Problem, ScoreStage};
use crate::error::Result;

/// Which attention weights to return.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Weights {
    /// None.
    #[default]
    None,
    /// `[batch, heads_q, len_q, len_k]`.
    PerHead,
    /// The mean over heads: `[batch, len_q, len_k]`.
    Averaged,
}

/// What attention returns in addition to the output.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Wanted {
    pub lse: bool,
    pub weights: Weights,
    pub scores: Option<ScoreStage>,
}

/// Which gradients [`Attention::backward`](crate::Attention::backward) returns; only these are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WantedGradients {
    /// Of the queries.
    pub q: bool,
    /// Of the keys.
    pub k: bool,
    /// Of the values.
    pub v: bool,
    /// Of each additive bias.
    pub biases: bool,
    /// Of the sink.
    pub sink: bool,
    /// Of ALiBi's slopes, T5's table or the relative keys.
    pub distance: bool,
    /// Of the scale.
    pub scale: bool,
}

impl WantedGradients {
    /// No gradient.
    pub const NONE: WantedGradients =
        WantedGradients { q: false, k: false, v: false, biases: false, sink: false, distance: false, scale: false };
    /// Of the queries, keys and values.
    pub const QKV: WantedGradients = WantedGradients { q: true, k: true, v: true, ..WantedGradients::NONE };
    /// Every gradient, that of the scale included.
    pub const ALL: WantedGradients =
        WantedGradients { q: true, k: true, v: true, biases: true, sink: true, distance: true, scale: true };
}

/// The heads and queries of an inspection, and what it returns for them.
pub(crate) struct Chosen {
    pub heads: Vec<usize>,
    pub queries: Range<usize>,
    pub weights: bool,
    pub column_sums: bool,
    pub entropy: bool,
}

impl Chosen {
    /// Layouts of the results, row-major: weights, column sums, entropy.
    #[cfg_attr(not(feature = "cpu"), expect(dead_code, reason = "a plan lays out an adapter's results"))]
    pub fn layouts(&self, problem: &Problem) -> Result<[Option<Layout>; 3]> {
        let Problem { batch, len_k, .. } = *problem;
        let (heads, rows) = (self.heads.len(), self.queries.len());
        let layout = |wanted: bool, shape: &[usize]| wanted.then(|| Layout::contiguous(shape)).transpose();
        Ok([
            layout(self.weights, &[batch, heads, rows, len_k])?,
            layout(self.column_sums, &[batch, heads, len_k])?,
            layout(self.entropy, &[batch, heads, rows])?,
        ])
    }
}
