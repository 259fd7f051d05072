//! One call: its operands, its rules as tensors, and its results.

use crate::error::{Result, value_error};
use crate::kernels::catalogue::RelativeKind;
use crate::kernels::plan::{DistanceColumns, Pairs, RelativeOperand, RotaryOperand};
use crate::kernels::{KeyRules, TuningKey};
use crate::problem::{Dtype, Layout, MaskMeaning, Problem, Rows, Sequence, WantedGradients, in_order_of};
use crate::tensor::Tensor;

/// A boolean mask and the meaning of its true entries: [`Mask::keep_where`] or [`Mask::hide_where`].
///
/// It broadcasts to `[batch, heads_q, len_q, len_k]`: missing leading axes and axes of length 1 repeat.
#[derive(Clone, Debug)]
#[must_use]
pub struct Mask {
    tensor: Tensor,
    meaning: MaskMeaning,
}

impl Mask {
    /// True keeps the key, as in PyTorch's `scaled_dot_product_attention`, JAX, Keras and ONNX.
    pub fn keep_where(tensor: Tensor) -> Result<Mask> {
        Mask::new(tensor, MaskMeaning::Keep)
    }
    /// True hides the key, as in PyTorch's `MultiheadAttention` and burn.
    pub fn hide_where(tensor: Tensor) -> Result<Mask> {
        Mask::new(tensor, MaskMeaning::Hide)
    }
    /// A mask with the given meaning; an error unless `tensor` is boolean.
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
    /// The mask over another view of the tensor, with the same meaning.
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
    /// `[batch, heads_q, len_q]`: the natural logarithm of the softmax denominator, including the sink. For a query
    /// that may attend to no key it is −∞, or the sink.
    pub lse: Option<Tensor>,
    /// The weights requested with [`Attention::weights`](crate::Attention::weights).
    pub weights: Option<Tensor>,
    /// `[batch, heads_q, len_q, len_k]`, as requested with [`Attention::scores`](crate::Attention::scores).
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

/// What [`Attention::inspect`](crate::Attention::inspect) returns. The leading axes are those of the query; the heads
/// axis is as long as the list of chosen heads. For a query `[len, dim]` the results have no heads axis.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Inspected {
    /// `[batch, heads, queries, len_k]`: `P = exp(S − LSE)`, in the type of the query.
    pub weights: Option<Tensor>,
    /// `[batch, heads, len_k]`: the attention that each key gets from the chosen queries, `Σ_i P`, in f32.
    pub column_sums: Option<Tensor>,
    /// `[batch, heads, queries]`: how widely a query's attention is spread, `−Σ_j P·ln P` in nats, in f32. From 0 (all
    /// on one key) to `ln len_k` (all keys equal).
    pub entropy: Option<Tensor>,
}

/// The gradients of a loss by the results of a call: [`Attention::backward`](crate::Attention::backward) reads them. A
/// result without one does not enter the loss.
///
/// ```
/// # use wgpu_attention::{Cotangents, Tensor};
/// # fn of(d_output: Tensor, d_lse: Tensor) -> Cotangents {
/// Cotangents::of_output(d_output).lse(d_lse)
/// # }
/// ```
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct Cotangents {
    pub(crate) output: Option<Tensor>,
    pub(crate) lse: Option<Tensor>,
    pub(crate) weights: Option<Tensor>,
}

impl Cotangents {
    /// None yet; give at least one.
    pub fn new() -> Cotangents {
        Cotangents::default()
    }
    /// dO, in the shape of the output.
    pub fn of_output(gradient: Tensor) -> Cotangents {
        Cotangents::new().output(gradient)
    }
    /// dO, in the shape of the output.
    pub fn output(mut self, gradient: Tensor) -> Self {
        self.output = Some(gradient);
        self
    }
    /// dLSE `[batch, heads_q, len_q]`, in the shape of the LSE.
    pub fn lse(mut self, gradient: Tensor) -> Self {
        self.lse = Some(gradient);
        self
    }
    /// The gradient of the returned weights: per head `[batch, heads_q, len_q, len_k]`, or averaged
    /// `[batch, len_q, len_k]`.
    pub fn weights(mut self, gradient: Tensor) -> Self {
        self.weights = Some(gradient);
        self
    }

    pub(crate) fn named(&self) -> impl Iterator<Item = (&'static str, &Tensor)> {
        let Cotangents { output, lse, weights } = self;
        [("dO", output), ("dLSE", lse), ("dW", weights)]
            .into_iter()
            .filter_map(|(name, tensor)| Some((name, tensor.as_ref()?)))
    }
}

/// What [`Attention::backward`](crate::Attention::backward) returns: the gradients that were asked for, each in the shape of
/// its operand, row-major and stored in f32.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Gradients {
    /// Of the queries.
    pub q: Option<Tensor>,
    /// Of the keys, summed over the query heads that share them.
    pub k: Option<Tensor>,
    /// Of the values, summed over the query heads that share them.
    pub v: Option<Tensor>,
    /// Of each additive bias, key padding biases last, summed over the axes that it was broadcast along.
    pub biases: Vec<Tensor>,
    /// Of the sink: `[heads_q]`.
    pub sink: Option<Tensor>,
    /// Of ALiBi's slopes, T5's table or the relative keys.
    pub distance: Option<Tensor>,
    /// Of the scale: `[1]`.
    pub scale: Option<Tensor>,
}

/// A backward call over operands with four axes each.
#[derive(Clone, Debug)]
pub(crate) struct BackwardCall {
    /// Queries and keys are not rotated yet.
    pub operands: Operands,
    /// O `[b, hq, i, d]`
    pub output: Tensor,
    /// `[b, hq, i]`
    pub lse: Tensor,
    /// dO `[b, hq, i, d]`
    pub d_output: Option<Tensor>,
    /// dLSE `[b, hq, i]`
    pub d_lse: Option<Tensor>,
    /// dW, broadcast to `[b, hq, i, j]`, and a factor on it.
    pub d_weights: Option<(Tensor, f32)>,
    pub wanted: WantedGradients,
    /// The shapes of the biases before they were broadcast, with four axes each.
    pub bias_shapes: Vec<[usize; 4]>,
    pub distance: Option<DistanceGradient>,
}

/// How the gradient of a bias by distance is computed.
#[derive(Clone, Debug)]
pub(crate) struct DistanceGradient {
    pub columns: DistanceColumns,
    /// `[columns, d]`: the bias of a column is the product of the query with its key, times the scale.
    pub keys: Option<Tensor>,
}

/// The operands of one call, with four axes each. Masks and biases are broadcast.
#[derive(Clone, Debug)]
pub(crate) struct Operands {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    /// Broadcast to `[batch, heads_q, len_q, maskable_keys]`.
    pub masks: Vec<Mask>,
    /// Broadcast to the same shape.
    pub biases: Vec<Tensor>,
    pub relative: Option<Relative>,
    /// Rotates queries and keys by these rows of its table. The queries of a batch entry start at its band's offset,
    /// keys at 0.
    pub rotary: Option<(Rotation, [Rows; 2])>,
    /// `[heads_q]`
    pub sink: Option<Tensor>,
    /// Packed sequences: operands are `[1, heads, total, dim]`, without masks, biases, relative and rotary.
    pub sequences: Option<Vec<Sequence>>,
}

impl Operands {
    /// Calls with the same key share a tuning result.
    pub fn tuning_key(&self, problem: &Problem) -> TuningKey {
        let rules = KeyRules {
            masks: !self.masks.is_empty(),
            biases: !self.biases.is_empty(),
            relative: self.relative.as_ref().map(|relative| relative.kind),
            rotary: self.rotary.as_ref().map(|(rotation, _)| rotation.pairs.interleaved),
            sink: self.sink.is_some(),
            ..KeyRules::default()
        };
        TuningKey::of(problem, [&self.q, &self.k, &self.v].map(Tensor::stored), rules)
    }

    /// All tensors with their names for messages.
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

    /// The operands with queries and keys rotated by `rotate`, if there is a rotary.
    pub fn rotated(&self, mut rotate: impl FnMut(&Tensor, &Rotation, &Rows) -> Result<Tensor>) -> Result<Operands> {
        let mut operands = self.clone();
        if let Some((rotation, [rows_q, rows_k])) = operands.rotary.take() {
            operands.q = rotate(&self.q, &rotation, &rows_q)?;
            operands.k = rotate(&self.k, &rotation, &rows_k)?;
        }
        Ok(operands)
    }
}

/// A bias by distance; see [`RelativeOperand`].
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

/// Rotates rows by their positions.
#[derive(Clone, Debug)]
pub(crate) struct Rotation {
    /// `[positions, 2 · columns]`: cosines and sines, each row of either padded to whole vec4s.
    pub table: Tensor,
    pub pairs: Pairs,
    /// The table as the fused kernel reads it. If interleaved and in whole vec4s: alternately two cosines and two
    /// sines.
    pub fused: Tensor,
}

impl Rotation {
    /// The operand for planning.
    pub fn operand<'a>(&'a self, [queries, keys]: &'a [Rows; 2]) -> RotaryOperand<'a> {
        RotaryOperand {
            table: self.fused.layout(),
            rotations: self.table.layout(),
            rows: [queries, keys],
            pairs: self.pairs.count,
            interleaved: self.pairs.interleaved,
        }
    }

    /// The rotation by the negated angles, for the separate kernel.
    pub fn back(&self) -> Rotation {
        Rotation { pairs: Pairs { back: true, ..self.pairs }, ..self.clone() }
    }
}

/// The output's layout `[b, h, s, d]`, in the query's memory order.
pub(crate) fn output_layout(problem: &Problem, q: &Layout) -> Result<Layout> {
    in_order_of(q, [problem.batch, problem.heads_q, problem.len_q, problem.dim_v])
}
