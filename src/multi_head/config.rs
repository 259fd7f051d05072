//! The configuration of a layer: widths, heads and what it adds to plain attention.

use crate::error::{Result, value_error};
use crate::problem::checked_len;

/// The shape of a [`MultiHeadAttention`](crate::MultiHeadAttention).
#[derive(Clone, Debug, PartialEq)]
#[must_use]
#[non_exhaustive]
pub struct MultiHeadConfig {
    /// Width of the query input.
    pub embed_dim: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key/value heads; fewer than `num_heads` means grouped-query attention (Ainslie et al. 2023).
    pub heads_kv: usize,
    /// Width of a head's queries and keys.
    pub head_dim: usize,
    /// Width of a head's values.
    pub value_head_dim: usize,
    /// Width of the key input.
    pub kdim: usize,
    /// Width of the value input.
    pub vdim: usize,
    /// Width of the output (Keras's `output_shape`); `embed_dim` by default.
    pub output_dim: usize,
    /// Whether the projections of queries, keys, values and the gate add a bias.
    pub bias: bool,
    /// Whether the output projection adds a bias.
    pub out_bias: bool,
    /// Multiplies the heads' results by `sigmoid(query·W_gᵀ + b_g)` before the output projection (Keras's `use_gate`;
    /// Qiu et al. 2025).
    pub gate: bool,
    /// Normalises queries and keys after their projections.
    pub norm: Option<QueryKeyNorm>,
    /// Factor on `Q·Kᵀ` if a call's [`Attention`](crate::Attention) sets none. `None`: `1/√head_dim`.
    pub scale: Option<f32>,
    /// Appends a learned key and value to every sequence.
    pub add_bias_kv: bool,
    /// Appends a key and value of zeros to every sequence.
    pub add_zero_attn: bool,
    /// If true, inputs and output are `[batch, len, dim]`; if false, PyTorch's default `[len, batch, dim]`.
    pub batch_first: bool,
}

/// A norm of queries and keys, each with a learned weight: `(x − m) / √(s + ε) · w + b`.
#[derive(Clone, Copy, Debug, PartialEq)]
#[must_use]
#[non_exhaustive]
pub struct QueryKeyNorm {
    /// Which norm.
    pub kind: NormKind,
    /// What is normalised together.
    pub span: NormSpan,
    /// The value added under the root; finite, not negative.
    pub epsilon: f32,
    /// Whether a learned bias is added.
    pub bias: bool,
}

/// Which norm a [`QueryKeyNorm`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NormKind {
    /// `x / √(mean of x² + ε) · w` (Zhang and Sennrich 2019): Qwen 3, Gemma 3, OLMo 2.
    Rms,
    /// `(x − mean) / √(variance + ε) · w + b` (Ba et al. 2016): timm, Phi.
    Layer,
}

/// What a [`QueryKeyNorm`] normalises together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NormSpan {
    /// Each head separately; all heads share one weight `[head_dim]`.
    Head,
    /// All heads of a token; the weight is as wide as the projection (OLMo 2).
    Width,
}

impl QueryKeyNorm {
    /// A norm without a bias.
    pub const fn new(kind: NormKind, span: NormSpan, epsilon: f32) -> QueryKeyNorm {
        QueryKeyNorm { kind, span, epsilon, bias: false }
    }
    /// Whether a learned bias is added.
    pub const fn bias(mut self, bias: bool) -> Self {
        self.bias = bias;
        self
    }
}

impl MultiHeadConfig {
    /// `num_heads` heads of `embed_dim / num_heads`, biases on, batch first: PyTorch's `nn.MultiheadAttention`.
    pub fn new(embed_dim: usize, num_heads: usize) -> Result<MultiHeadConfig> {
        if num_heads == 0 || embed_dim == 0 || !embed_dim.is_multiple_of(num_heads) {
            return Err(value_error!(
                "embed_dim = {embed_dim} is not a positive multiple of num_heads = {num_heads}; \
                 MultiHeadConfig::with_head_dims takes heads of any width, as Keras does"
            ));
        }
        let head_dim = embed_dim / num_heads;
        MultiHeadConfig::with_head_dims(embed_dim, num_heads, head_dim, head_dim)
    }

    /// `num_heads` heads with queries and keys of width `key_dim` and values of width `value_dim`, independent of
    /// `embed_dim`: Keras's `MultiHeadAttention(num_heads, key_dim, value_dim)`. Biases on, batch first.
    pub fn with_head_dims(
        embed_dim: usize,
        num_heads: usize,
        key_dim: usize,
        value_dim: usize,
    ) -> Result<MultiHeadConfig> {
        let config = MultiHeadConfig {
            embed_dim,
            num_heads,
            heads_kv: num_heads,
            head_dim: key_dim,
            value_head_dim: value_dim,
            kdim: embed_dim,
            vdim: embed_dim,
            output_dim: embed_dim,
            bias: true,
            out_bias: true,
            gate: false,
            norm: None,
            scale: None,
            add_bias_kv: false,
            add_zero_attn: false,
            batch_first: true,
        };
        config.check()?;
        Ok(config)
    }

    /// Sets the number of key/value heads; must divide `num_heads`.
    pub fn heads_kv(mut self, heads_kv: usize) -> Self {
        self.heads_kv = heads_kv;
        self
    }
    /// Sets the width of the key input.
    pub fn kdim(mut self, kdim: usize) -> Self {
        self.kdim = kdim;
        self
    }
    /// Sets the width of the value input.
    pub fn vdim(mut self, vdim: usize) -> Self {
        self.vdim = vdim;
        self
    }
    /// Sets the width of the output.
    pub fn output_dim(mut self, output_dim: usize) -> Self {
        self.output_dim = output_dim;
        self
    }
    /// Switches all biases on or off.
    pub fn bias(mut self, bias: bool) -> Self {
        self.bias = bias;
        self.out_bias = bias;
        self
    }
    /// Switches only the bias of the output projection on or off.
    pub fn out_bias(mut self, bias: bool) -> Self {
        self.out_bias = bias;
        self
    }
    /// Switches the gate on the heads' results on or off.
    pub fn gate(mut self, gate: bool) -> Self {
        self.gate = gate;
        self
    }
    /// Sets the norms of queries and keys.
    pub fn norm(mut self, norm: Option<QueryKeyNorm>) -> Self {
        self.norm = norm;
        self
    }
    /// Sets the factor on `Q·Kᵀ` for calls that set none.
    pub fn scale(mut self, scale: Option<f32>) -> Self {
        self.scale = scale;
        self
    }
    /// Appends a learned key and value.
    pub fn add_bias_kv(mut self, yes: bool) -> Self {
        self.add_bias_kv = yes;
        self
    }
    /// Appends a zero key and value.
    pub fn add_zero_attn(mut self, yes: bool) -> Self {
        self.add_zero_attn = yes;
        self
    }
    /// Sets the order of the first two axes.
    pub fn batch_first(mut self, yes: bool) -> Self {
        self.batch_first = yes;
        self
    }
    /// Sets head widths other than `embed_dim / num_heads` (Keras's `key_dim` and `value_dim`).
    pub fn head_dims(mut self, key_dim: usize, value_dim: usize) -> Self {
        self.head_dim = key_dim;
        self.value_head_dim = value_dim;
        self
    }

    pub(super) fn check(&self) -> Result<()> {
        let Self { num_heads, heads_kv, .. } = *self;
        for (name, value) in [
            ("embed_dim", self.embed_dim),
            ("num_heads", num_heads),
            ("heads_kv", heads_kv),
            ("head_dim", self.head_dim),
            ("value_head_dim", self.value_head_dim),
            ("kdim", self.kdim),
            ("vdim", self.vdim),
            ("output_dim", self.output_dim),
        ] {
            if value == 0 {
                return Err(value_error!("{name} must be at least 1"));
            }
        }
        if !num_heads.is_multiple_of(heads_kv) {
            return Err(value_error!("num_heads = {num_heads} is not a multiple of heads_kv = {heads_kv}"));
        }
        let joined = self.joined_width()?;
        for shape in [
            [self.q_width()?, self.embed_dim],
            [self.k_width()?, self.kdim],
            [self.v_width()?, self.vdim],
            [joined, self.embed_dim],
            [self.output_dim, joined],
        ] {
            checked_len(&shape)?;
        }
        if let Some(scale) = self.scale
            && !scale.is_finite()
        {
            return Err(value_error!("scale = {scale} must be finite"));
        }
        if let Some(QueryKeyNorm { epsilon, .. }) = self.norm {
            if !(epsilon.is_finite() && epsilon >= 0.0) {
                return Err(value_error!("the norm's epsilon = {epsilon} must be finite and not negative"));
            }
            if self.add_bias_kv || self.add_zero_attn {
                return Err(value_error!(
                    "norms of queries and keys cannot be combined with add_bias_kv or add_zero_attn: no framework \
                     defines whether the appended keys are normalised"
                ));
            }
        }
        Ok(())
    }

    pub(super) fn q_width(&self) -> Result<usize> {
        checked_len(&[self.num_heads, self.head_dim])
    }
    pub(super) fn k_width(&self) -> Result<usize> {
        checked_len(&[self.heads_kv, self.head_dim])
    }
    pub(super) fn v_width(&self) -> Result<usize> {
        checked_len(&[self.heads_kv, self.value_head_dim])
    }
    /// Width of the concatenated heads' results.
    pub(super) fn joined_width(&self) -> Result<usize> {
        checked_len(&[self.num_heads, self.value_head_dim])
    }
    /// Widths of the weights of the norms of queries and keys.
    pub(super) fn norm_widths(&self, span: NormSpan) -> Result<[usize; 2]> {
        match span {
            NormSpan::Head => Ok([self.head_dim; 2]),
            NormSpan::Width => Ok([self.q_width()?, self.k_width()?]),
        }
    }
    /// Query heads that share a key/value head.
    pub(super) fn group(&self) -> usize {
        self.num_heads / self.heads_kv.max(1)
    }
    /// Whether all input projections read the same width.
    pub(super) fn is_packed(&self) -> bool {
        self.kdim == self.embed_dim && self.vdim == self.embed_dim
    }

    /// Number of learned parameters in a layer of this shape.
    pub fn parameter_count(&self) -> Result<usize> {
        self.check()?;
        let (q, k, v, joined) = (self.q_width()?, self.k_width()?, self.v_width()?, self.joined_width()?);
        let gate = if self.gate { joined } else { 0 };
        let weights = (q + gate) * self.embed_dim + k * self.kdim + v * self.vdim + self.output_dim * joined;
        let biases = if self.bias { q + k + v + gate } else { 0 } + if self.out_bias { self.output_dim } else { 0 };
        let rows = if self.add_bias_kv { k + v } else { 0 };
        let norms = match self.norm {
            Some(norm) => self.norm_widths(norm.span)?.iter().sum::<usize>() * if norm.bias { 2 } else { 1 },
            None => 0,
        };
        Ok(weights + biases + rows + norms)
    }
}
