//! One call: its operands, its rules as tensors, and what comes back.

use crate::error::{Result, value_error};
use crate::kernels::catalogue::RelativeKind;
use crate::kernels::plan::{RelativeOperand, RotaryOperand};
use crate::kernels::{KeyRules, TuningKey};
use crate::problem::{Dtype, Layout, MaskMeaning, Problem, Rows, Sequence, in_order_of};
use crate::tensor::Tensor;

/// A boolean mask and what its true entries mean: [`Mask::keep_where`] or [`Mask::hide_where`].
///
/// It broadcasts to `[batch, heads_q, len_q, len_k]`: missing leading axes and axes of length 1 repeat.
#[derive(Clone, Debug)]
#[must_use]
pub struct Mask {
    tensor: Tensor,
    meaning: MaskMeaning,
}

impl Mask {
    /// True keeps the key: PyTorch's `scaled_dot_product_attention`, JAX, Keras, ONNX.
    pub fn keep_where(tensor: Tensor) -> Result<Mask> {
        Mask::new(tensor, MaskMeaning::Keep)
    }
    /// True hides the key: PyTorch's `MultiheadAttention`, burn.
    pub fn hide_where(tensor: Tensor) -> Result<Mask> {
        Mask::new(tensor, MaskMeaning::Hide)
    }
    /// The meaning as a value.
    pub fn new(tensor: Tensor, meaning: MaskMeaning) -> Result<Mask> {
        if tensor.dtype() != Dtype::Bool {
            return Err(value_error!(
                "a mask needs a bool tensor, not {}; an additive mask of floats is a bias",
                tensor.dtype()
            ));
        }
        Ok(Mask { tensor, meaning })
    }
    /// The boolean tensor.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }
    /// What true means.
    pub fn meaning(&self) -> MaskMeaning {
        self.meaning
    }
    /// The same meaning of another view of the tensor.
    pub(crate) fn map(&self, change: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Mask> {
        Ok(Mask { tensor: change(&self.tensor)?, meaning: self.meaning })
    }
}

/// What [`Attention::forward`](crate::Attention::forward) and [`merge`](crate::merge) return.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Attended {
    /// `[batch, heads_q, len_q, dim_v]`, in the memory order of the query.
    pub output: Tensor,
    /// `[batch, heads_q, len_q]`: the natural logarithm of the softmax denominator, a sink included; −∞ or the
    /// sink for a query that may attend to nothing.
    pub lse: Option<Tensor>,
    /// As asked for by [`Attention::weights`](crate::Attention::weights).
    pub weights: Option<Tensor>,
    /// `[batch, heads_q, len_q, len_k]`, as asked for by [`Attention::scores`](crate::Attention::scores).
    pub scores: Option<Tensor>,
}

impl Attended {
    /// With the leading axes of a query of shape `q`.
    pub(crate) fn with_axes_of(self, q: &[usize]) -> Result<Attended> {
        if q.len() == 4 {
            return Ok(self);
        }
        let lead = &q[..q.len().saturating_sub(2)];
        let fix = |tensor: Tensor, has_heads: bool| -> Result<Tensor> {
            let tail = if has_heads { &tensor.shape()[2..] } else { &tensor.shape()[1..] };
            let lead = if has_heads { lead } else { &lead[..lead.len().saturating_sub(1)] };
            let shape: Vec<usize> = lead.iter().chain(tail).copied().collect();
            tensor.reshape(&shape)
        };
        let averaged = self.weights.as_ref().is_some_and(|weights| weights.layout().rank() == 3);
        Ok(Attended {
            output: fix(self.output, true)?,
            lse: self.lse.map(|lse| fix(lse, true)).transpose()?,
            weights: self.weights.map(|weights| fix(weights, !averaged)).transpose()?,
            scores: self.scores.map(|scores| fix(scores, true)).transpose()?,
        })
    }
}

/// What [`Attention::inspect`](crate::Attention::inspect) returns. The leading axes are those of the query, the heads
/// axis as long as the list of chosen heads; a query `[len, dim]` gives results without a heads axis.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Inspected {
    /// `[batch, heads, queries, len_k]`: `P = exp(S − LSE)`, in the type of the query.
    pub weights: Option<Tensor>,
    /// `[batch, heads, len_k]`: how much attention a key gets from the chosen queries, `Σ_i P`, in f32.
    pub column_sums: Option<Tensor>,
    /// `[batch, heads, queries]`: how widely a query's attention is spread, `−Σ_j P·ln P` in nats (from 0, all
    /// on one key, to `ln len_k`, all alike), in f32.
    pub entropy: Option<Tensor>,
}

/// The operands of one call, with four axes each and masks and biases broadcast.
#[derive(Clone, Debug)]
pub(crate) struct Operands {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    /// Broadcast to `[batch, heads_q, len_q, maskable_keys]`.
    pub masks: Vec<Mask>,
    /// Broadcast likewise.
    pub biases: Vec<Tensor>,
    pub relative: Option<Relative>,
    /// Turns queries and keys, which stand in these rows of its table; the queries of a batch entry from its band's
    /// offset on, keys from 0 on.
    pub rotary: Option<(Rotation, [Rows; 2])>,
    /// `[heads_q]`
    pub sink: Option<Tensor>,
    /// Of packed sequences: operands are `[1, heads, total, dim]`, without masks, biases, relative and rotary.
    pub sequences: Option<Vec<Sequence>>,
}

impl Operands {
    /// What the call must have in common with others to share what tuning found.
    pub fn tuning_key(&self, problem: &Problem) -> TuningKey {
        let rules = KeyRules {
            masks: !self.masks.is_empty(),
            biases: !self.biases.is_empty(),
            relative: self.relative.as_ref().map(|relative| relative.kind),
            rotary: self.rotary.as_ref().map(|(rotation, _)| rotation.interleaved),
            sink: self.sink.is_some(),
            ..KeyRules::default()
        };
        TuningKey::of(problem, [&self.q, &self.k, &self.v].map(Tensor::stored), rules)
    }

    /// Without rules.
    /// All tensors with their names in messages.
    pub fn named(&self) -> impl Iterator<Item = (&'static str, &Tensor)> {
        let Operands { q, k, v, masks, biases, relative, rotary, sink, .. } = self;
        let masks = masks.iter().map(|mask| ("a mask", mask.tensor()));
        let biases = biases.iter().map(|bias| ("a bias", bias));
        let relative = relative.iter().map(|relative| ("the table of a bias by distance", &relative.table));
        let rotary = rotary.iter().map(|(rotation, _)| ("the rotary table", &rotation.table));
        let sink = sink.iter().map(|sink| ("the sink", sink));
        [("Q", q), ("K", k), ("V", v)].into_iter().chain(masks).chain(biases).chain(relative).chain(rotary).chain(sink)
    }

    pub fn new(q: Tensor, k: Tensor, v: Tensor) -> Operands {
        let (masks, biases) = (Vec::new(), Vec::new());
        Operands { q, k, v, masks, biases, relative: None, rotary: None, sink: None, sequences: None }
    }

    /// With queries and keys as `rotate` makes them, where they are to be.
    pub fn rotated(&self, mut rotate: impl FnMut(&Tensor, &Rotation, &Rows) -> Result<Tensor>) -> Result<Operands> {
        let mut operands = self.clone();
        if let Some((rotation, [rows_q, rows_k])) = operands.rotary.take() {
            operands.q = rotate(&self.q, &rotation, &rows_q)?;
            operands.k = rotate(&self.k, &rotation, &rows_k)?;
        }
        Ok(operands)
    }
}

/// A bias by distance: see [`RelativeOperand`].
#[derive(Clone, Debug)]
pub(crate) struct Relative {
    /// Broadcast to `[batch, heads_q, len_q, column]`.
    pub table: Tensor,
    pub kind: RelativeKind,
    pub low: i32,
    pub high: i32,
    pub factor: f32,
}

impl Relative {
    pub fn operand(&self) -> RelativeOperand<'_> {
        let Relative { ref table, kind, low, high, factor } = *self;
        RelativeOperand { layout: table.layout(), kind, low, high, factor }
    }
}

/// What rotates rows by their positions.
#[derive(Clone, Debug)]
pub(crate) struct Rotation {
    /// `[positions, 2 · columns]`: cosines and sines, each row of either padded to whole vec4s.
    pub table: Tensor,
    /// Pairs of columns that are rotated.
    pub pairs: usize,
    /// Whether neighbouring columns are a pair.
    pub interleaved: bool,
    /// The table as the fused kernel reads it. Interleaved, in whole vec4s: two cosines and two sines in turn.
    pub fused: Tensor,
}

impl Rotation {
    /// As planning sees it.
    pub fn operand<'a>(&'a self, [queries, keys]: &'a [Rows; 2]) -> RotaryOperand<'a> {
        RotaryOperand {
            table: self.fused.layout(),
            rotations: self.table.layout(),
            rows: [queries, keys],
            pairs: self.pairs,
            interleaved: self.interleaved,
        }
    }
}

/// The output's layout `[b, h, s, d]` in the memory order of the query.
pub(crate) fn output_layout(problem: &Problem, q: &Layout) -> Result<Layout> {
    in_order_of(q, [problem.batch, problem.heads_q, problem.len_q, problem.dim_v])
}
