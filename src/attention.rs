//! Scaled dot-product attention: the call a user makes.

use crate::device::Device;
use crate::error::{Error, Result, shape_error, value_error};
use crate::gpu::{EncodeSlices, Gpu, Profile};
use crate::kernels::Method;
use crate::kernels::catalogue::RelativeKind;
use crate::kernels::plan::RelativeOperand;
use crate::position::shaw::RelativeKeys;
use crate::position::t5::{self, Buckets};
use crate::position::{Rotary, TokenPositions};
use crate::problem::{Align, Dtype, Layout, MaskMeaning, Positions, Problem, Rows, ScoreStage, as_four_axes};
use crate::record::Recording;
use crate::tensor::{Tensor, common_device};

/// Which attention weights to return.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Weights {
    /// None.
    #[default]
    None,
    /// `[batch, heads_q, len_q, len_k]`.
    PerHead,
    /// The mean over heads: `[batch, len_q, len_k]`.
    Averaged,
}

/// A boolean mask and what its true entries mean.
///
/// It broadcasts to `[batch, heads_q, len_q, len_k]`: missing leading axes and axes of length 1 repeat.
#[derive(Clone, Debug)]
pub struct Mask {
    tensor: Tensor,
    meaning: MaskMeaning,
}

impl Mask {
    /// True keeps the key: PyTorch's `scaled_dot_product_attention`, JAX, Keras, ONNX.
    pub fn keep(tensor: Tensor) -> Result<Mask> {
        Mask::new(tensor, MaskMeaning::Keep)
    }
    /// True drops the key: PyTorch's `MultiheadAttention`, burn.
    pub fn drop(tensor: Tensor) -> Result<Mask> {
        Mask::new(tensor, MaskMeaning::Drop)
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
}

/// What a query gets that may attend to no key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum EmptyRows {
    /// 0, as the weights of such a query are.
    #[default]
    Zero,
    /// The mean of the values of all keys, hidden ones too: JAX's `dot_product_attention`, whose masked scores are a large
    /// negative number, so that a row of nothing else weighs all keys alike. As there, a value that is NaN or ∞ then
    /// reaches every query, seen or not.
    MeanOfValues,
}

/// Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1) with the options of every
/// framework, composed in one fixed order:
/// `S = scale · Q·Kᵀ` → softcap → `+ bias` → mask → softmax over keys → `· V`.
///
/// A query that may attend to nothing gets output 0, weights 0 and LSE −∞ (with a [sink](Attention::sink), that
/// sink). What a masked key or value holds, NaN and ∞ included, changes no bit of the result.
#[derive(Clone, Debug, Default)]
pub struct Attention {
    scale: Option<f32>,
    softcap: Option<f32>,
    positions: Positions,
    /// Whether the caller says if the rule is causal, and where queries stand: a cache says both otherwise.
    says_causal: bool,
    says_align: bool,
    query_lengths: Option<Vec<usize>>,
    masks: Vec<Mask>,
    key_padding: Vec<Mask>,
    biases: Vec<Tensor>,
    key_padding_biases: Vec<Tensor>,
    sink: Option<Tensor>,
    lse: bool,
    weights: Weights,
    scores: Option<ScoreStage>,
    method: Method,
    extra_keys: usize,
    distance: Option<Distance>,
    rotary: Option<(Rotary, Option<[TokenPositions; 2]>)>,
    empty_rows: EmptyRows,
}

/// What the distance of key and query adds to a score.
#[derive(Clone, Debug)]
pub(crate) enum Distance {
    Alibi(Tensor),
    T5(Tensor, Buckets),
    Shaw(RelativeKeys),
}

/// What [`Attention::forward`] and [`merge`] return.
#[derive(Clone, Debug)]
pub struct Attended {
    /// `[batch, heads_q, len_q, dim_v]`, in the memory order of the query.
    pub output: Tensor,
    /// `[batch, heads_q, len_q]`: the natural logarithm of the softmax denominator, a sink included; −∞ or the
    /// sink for a query that may attend to nothing.
    pub lse: Option<Tensor>,
    /// As asked for by [`Attention::weights`].
    pub weights: Option<Tensor>,
    /// `[batch, heads_q, len_q, len_k]`, as asked for by [`Attention::scores`].
    pub scores: Option<Tensor>,
}

/// What a cache holds while queries attend to it: one entry per sequence.
pub(crate) struct Held<'a> {
    /// Keys held.
    pub lengths: &'a [usize],
    /// The positions of the first of them.
    pub firsts: &'a [usize],
    /// Queries, the last positions.
    pub counts: &'a [usize],
    /// Keys before its own that a query of the cache sees.
    pub window: Option<usize>,
    /// Whether the cache turns queries by their positions.
    pub turns: bool,
}

/// The operands of one call, with four axes each and masks and biases broadcast.
#[derive(Clone, Debug)]
pub(crate) struct Operands {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    /// Broadcast to `[batch, heads_q, len_q, ruled_keys]`.
    pub masks: Vec<Mask>,
    /// Broadcast likewise.
    pub biases: Vec<Tensor>,
    pub relative: Option<Relative>,
    /// Turns queries and keys, which stand in these rows of its table; the queries of a batch entry from its band's
    /// offset on, keys from 0 on.
    pub rotary: Option<(Rotary, [Rows; 2])>,
    /// `[heads_q]`
    pub sink: Option<Tensor>,
}

/// A bias by distance: see [`RelativeOperand`].
#[derive(Clone, Debug)]
pub(crate) struct Relative {
    /// Broadcast to `[batch, heads_q, len_q, column]`.
    pub table: Tensor,
    kind: RelativeKind,
    low: i32,
    high: i32,
    factor: f32,
}

impl Relative {
    pub fn operand(&self) -> RelativeOperand<'_> {
        let Relative { ref table, kind, low, high, factor } = *self;
        RelativeOperand { layout: table.layout(), kind, low, high, factor }
    }
}

/// What to hand back beside the output.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Wanted {
    pub lse: bool,
    pub weights: Weights,
    pub scores: Option<ScoreStage>,
    pub method: Method,
}

impl Attention {
    /// No mask, scale `1/√dim_k`.
    pub fn new() -> Attention {
        Attention::default()
    }
    /// The factor on `Q·Kᵀ` instead of `1/√dim_k`; any finite value.
    pub fn scale(mut self, scale: f32) -> Self {
        self.scale = Some(scale);
        self
    }
    /// `S → cap · tanh(S / cap)`, before bias and mask; `cap > 0`.
    pub fn softcap(mut self, cap: f32) -> Self {
        self.softcap = Some(cap);
        self
    }
    /// Query `i` sees key `j` only when `j ≤ i + offset`. Sets the offset for a window too.
    pub fn causal(mut self, align: Align) -> Self {
        self.positions.causal = true;
        self.says_causal = true;
        self.align(align)
    }
    /// Queries see what comes after them too. [`Attention::forward`] does so anyway; over a [`KvCache`](crate::KvCache)
    /// this turns its causal rule off. Of this and [`Attention::causal`] the last counts.
    pub fn not_causal(mut self) -> Self {
        self.positions.causal = false;
        self.says_causal = true;
        self
    }
    /// Where queries stand among keys, for a window without a causal mask.
    pub fn align(mut self, align: Align) -> Self {
        self.positions.align = align;
        self.says_align = true;
        self
    }
    /// Keys within `left` and `right` of the query's own position `i + offset`, inclusive; `None`
    /// leaves that side open.
    ///
    /// The query's own key does not count, so `window(3, 0)` sees four keys. In other frameworks' words:
    ///
    /// | there | here |
    /// |---|---|
    /// | transformers' `sliding_window = W` of a decoder: W keys, the query's own included | `window(Some(W − 1), None)`, causal |
    /// | transformers' `sliding_window = W` of an encoder: `abs(i − j) ≤ W` | `window(Some(W), Some(W))` |
    /// | Keras's `sliding_window = W`: `abs(i − j) < W` | `window(Some(W − 1), Some(W − 1))` |
    /// | FlashAttention's `window_size = (L, R)`, −1 leaves a side open | `window(Some(L), Some(R))` with [`Align::BottomRight`] |
    /// | JAX's `local_window_size = (L, R)` | `window(Some(L), Some(R))` |
    /// | ONNX's `left_window_size`, `right_window_size`, −1 leaves a side open | the same numbers |
    pub fn window(mut self, left: Option<usize>, right: Option<usize>) -> Self {
        self.positions.window_left = left;
        self.positions.window_right = right;
        self
    }
    /// Valid keys per batch entry; the rest is padding (JAX's `key_value_seq_lengths`).
    pub fn key_lengths(mut self, lengths: Vec<usize>) -> Self {
        self.positions.key_lengths = Some(lengths);
        self
    }
    /// Valid queries per batch entry, JAX's `query_seq_lengths`: those behind are padding and may attend to nothing
    /// (output 0, weights 0, LSE −∞ or the [sink](Attention::sink)). At most `len_q` each. Layers with `add_bias_kv` or
    /// `add_zero_attn` refuse it, packed sequences too.
    pub fn query_lengths(mut self, lengths: Vec<usize>) -> Self {
        self.query_lengths = Some(lengths);
        self
    }
    /// A boolean mask; may be given several times, a key must pass all.
    pub fn mask(mut self, mask: Mask) -> Self {
        self.masks.push(mask);
        self
    }
    /// A boolean mask over keys, `[batch, len_k]` (or `[len_k]` for all): PyTorch's `key_padding_mask`.
    pub fn key_padding(mut self, mask: Mask) -> Self {
        self.key_padding.push(mask);
        self
    }
    /// A bias over keys, floats `[batch, len_k]` (or `[len_k]` for all), added to the score of every query and head:
    /// PyTorch's `key_padding_mask` of floats. −∞ masks. May be given several times.
    pub fn key_padding_bias(mut self, bias: Tensor) -> Self {
        self.key_padding_biases.push(bias);
        self
    }
    /// An additive bias that broadcasts like a mask; −∞ masks. May be given several times.
    pub fn bias(mut self, bias: Tensor) -> Self {
        self.biases.push(bias);
        self
    }
    /// Turns queries and keys by their positions (Su et al. 2021) before their product: key `j` stands at `j`, query
    /// `i` at `i + offset`, where [`Attention::causal`] or [`Attention::align`] puts it. All positions must be in the
    /// table. A [`KvCache`](crate::KvCache) takes its own: [`KvCache::with_rotary`](crate::KvCache::with_rotary).
    pub fn rotary(mut self, rotary: Rotary) -> Self {
        self.rotary = Some((rotary, None));
        self
    }
    /// As [`Attention::rotary`], with the positions of queries and keys given.
    pub fn rotary_at(mut self, rotary: Rotary, queries: TokenPositions, keys: TokenPositions) -> Self {
        self.rotary = Some((rotary, Some([queries, keys])));
        self
    }
    /// Attention with linear biases (Press et al. 2022, section 3): `−slope(h) · |i + offset − j|` is added to
    /// each score, `slopes` `[heads_q]` on the call's device
    /// ([`position::alibi::slopes`](crate::position::alibi::slopes)). Queries stand where [`Attention::causal`]
    /// or [`Attention::align`] puts them. Nothing of the size of the scores is stored.
    pub fn alibi(mut self, slopes: Tensor) -> Self {
        self.distance = Some(Distance::Alibi(slopes));
        self
    }
    /// T5's relative position bias (Raffel et al. 2020, section 2.1) from the learned table `[num_buckets,
    /// heads_q]`, as [`position::t5::bias`](crate::position::t5::bias) without storing it. Queries stand where
    /// [`Attention::causal`] or [`Attention::align`] puts them. T5 does not scale its scores: [`Attention::scale`]
    /// is 1 there. The last of [`Attention::alibi`], this and [`Attention::relative_keys`] counts.
    pub fn t5_bias(mut self, table: Tensor, buckets: Buckets) -> Self {
        self.distance = Some(Distance::T5(table, buckets));
        self
    }
    /// Relative keys (Shaw et al. 2018, section 3.2): the query's product with the key of its distance, scaled
    /// like every score, is added to each, as [`RelativeKeys::bias`] without storing it; behind the softcap, as
    /// every bias.
    pub fn relative_keys(mut self, keys: RelativeKeys) -> Self {
        self.distance = Some(Distance::Shaw(keys));
        self
    }
    /// A learned attention sink (gpt-oss; Xiao et al. 2024, "Efficient Streaming Language Models with Attention
    /// Sinks"): floats `[heads_q]`, one more score for every query of a head, which takes its share of the
    /// softmax and has no value.
    ///
    /// ```text
    /// P_j = exp(S_j) / (exp(sink_h) + Σ_j exp(S_j))      LSE = ln(exp(sink_h) + Σ_j exp(S_j))
    /// ```
    ///
    /// It is neither scaled nor capped, and no rule masks it. Weights of a query sum to less than 1; scores before
    /// the softmax and the shape of the weights are as without it. The LSE has it in, so that
    /// [`Attention::inspect`] and [`merge`] need not know of it (of calls that are merged, one may have it). A
    /// query that may attend to no key gets output 0, weights 0 and the sink as LSE.
    ///
    /// A sink of −∞ is none. One that is NaN or +∞ makes its head NaN: every output and LSE, and the weight of
    /// every key that is seen.
    pub fn sink(mut self, sink: Tensor) -> Self {
        self.sink = Some(sink);
        self
    }
    /// What a query gets that may attend to no key; 0 unless given. Its LSE stays −∞.
    pub fn empty_rows(mut self, empty_rows: EmptyRows) -> Self {
        self.empty_rows = empty_rows;
        self
    }
    /// Returns the log-sum-exp of each query's scores.
    pub fn lse(mut self, yes: bool) -> Self {
        self.lse = yes;
        self
    }
    /// Returns the attention weights.
    pub fn weights(mut self, weights: Weights) -> Self {
        self.weights = weights;
        self
    }
    /// Returns the scores at a stage (ONNX's `qk_matmul_output`).
    pub fn scores(mut self, stage: Option<ScoreStage>) -> Self {
        self.scores = stage;
        self
    }
    /// Which kernels compute the output on an adapter; [`Method::Auto`] unless given.
    pub fn method(mut self, method: Method) -> Self {
        self.method = method;
        self
    }
    /// The last `count` keys are seen by every query, whatever the masks say; masks and biases are
    /// then as wide as the keys before them.
    pub(crate) fn extra_keys(mut self, count: usize) -> Self {
        self.extra_keys = count;
        self
    }

    /// With this scale, where none is given.
    pub(crate) fn or_scale(mut self, scale: Option<f32>) -> Self {
        self.scale = self.scale.or(scale);
        self
    }

    /// The same rules for `counts[b]` queries at the end of what each sequence of a cache holds.
    pub(crate) fn behind(&self, held: &Held<'_>) -> Result<Attention> {
        let mut attention = self.clone();
        attention.positions = Positions {
            align: Align::PerBatch(self.cache_offsets(held)?),
            causal: self.causal_in_cache(held.counts)?,
            window_left: self.positions.window_left.into_iter().chain(held.window).min(),
            window_right: self.positions.window_right,
            key_lengths: Some(self.cache_lengths(held)?),
        };
        Ok(attention)
    }
    /// Whether queries over a cache are causal: by default they are, unless the caller says what they see.
    fn causal_in_cache(&self, counts: &[usize]) -> Result<bool> {
        if self.says_causal || self.says_align || !self.masks.is_empty() {
            return Ok(self.positions.causal);
        }
        if self.positions.window_right.is_some() {
            return Ok(false);
        }
        // A single query at the end of its sequence sees all of it either way.
        match counts.iter().enumerate().find(|&(_, &count)| count > 1) {
            Some((b, count)) if !self.biases.is_empty() => Err(value_error!(
                "{count} queries of batch entry {b} come with a bias, which may be a mask (-inf hides) or not, so it is \
                 open whether the cache is to hide what comes after each: say causal(Align::BottomRight) for causal, or \
                 not_causal() where the bias hides what must be hidden"
            )),
            _ => Ok(true),
        }
    }
    /// Where the first query of each sequence stands among the keys held.
    fn cache_offsets(&self, held: &Held<'_>) -> Result<Vec<i64>> {
        let ends: Vec<i64> =
            held.lengths.iter().zip(held.counts).map(|(&len, &count)| len as i64 - count as i64).collect();
        let given = match &self.positions.align {
            _ if !self.says_align => return Ok(ends),
            Align::BottomRight => return Ok(ends),
            Align::TopLeft => vec![0; ends.len()],
            Align::Offset(offset) => vec![*offset; ends.len()],
            Align::PerBatch(offsets) if offsets.len() == ends.len() => offsets.clone(),
            Align::PerBatch(offsets) => {
                return Err(shape_error!(
                    "the list of offsets has {} entries for a batch of {}; one per batch entry is needed",
                    offsets.len(),
                    ends.len()
                ));
            }
        };
        for (b, (offset, end)) in given.iter().zip(&ends).enumerate().filter(|(_, (offset, end))| offset != end) {
            let why = match held.firsts[b] {
                _ if held.turns => "by which the cache's rotary turns it".to_string(),
                0 => continue,
                first => format!("counted from position {first} on, since the window dropped the keys before"),
            };
            return Err(value_error!(
                "query 0 of batch entry {b} stands at key {end} of the cache, {why}, but the attention's align says \
                 {offset}; leave it to the cache: Align::BottomRight"
            ));
        }
        Ok(given)
    }
    /// The keys that count of each sequence: those held, or as many of them as the caller says.
    fn cache_lengths(&self, held: &Held<'_>) -> Result<Vec<usize>> {
        let Some(given) = &self.positions.key_lengths else { return Ok(held.lengths.to_vec()) };
        if given.len() != held.lengths.len() {
            return Err(shape_error!(
                "key_lengths has {} entries for a batch of {}; one per batch entry is needed",
                given.len(),
                held.lengths.len()
            ));
        }
        for (b, (&given, &len)) in given.iter().zip(held.lengths).enumerate() {
            if given > len {
                return Err(value_error!(
                    "key_lengths[{b}] = {given} is more than the {len} keys that batch entry {b} of the cache holds; the \
                     cache counts them itself: leave key_lengths out"
                ));
            }
            if given < len && held.firsts[b] > 0 {
                return Err(value_error!(
                    "key_lengths[{b}] = {given} counts from the first key of a sequence, but the window dropped {} keys of \
                     batch entry {b}; leave key_lengths out",
                    held.firsts[b]
                ));
            }
        }
        Ok(given.clone())
    }
    /// Whether it matters where queries stand among a cache's keys, beside rotary positions; and whether the caller says
    /// where that is.
    pub(crate) fn needs_places(&self, counts: &[usize], window: Option<usize>) -> Result<(bool, bool)> {
        let Positions { window_left, window_right, .. } = self.positions;
        let needs = window_left.or(window_right).or(window).is_some()
            || self.distance.is_some()
            || self.causal_in_cache(counts)?;
        Ok((needs, self.says_align && self.positions.align != Align::BottomRight))
    }
    /// The softcap and positional rules for one batch entry of `[len_q, len_k]` and the first `heads` heads, without masks
    /// and biases.
    #[cfg(not(target_arch = "wasm32"))]
    pub(crate) fn rules_alone(&self, [len_q, len_k]: [usize; 2], heads: usize) -> Result<Attention> {
        // Rows whose positions are listed are rotated by a kernel of their own.
        let rotary = self.rotary.clone().filter(|(_, given)| given.is_none());
        let key_length = self.positions.key_lengths.is_some().then(|| len_k.max(2) - 1);
        // Rotary positions begin at 0, so that not more queries than keys can end where the keys do.
        let top_left =
            self.positions.align == Align::TopLeft || rotary.is_some() && len_q > key_length.unwrap_or(len_k);
        let positions = Positions {
            align: if top_left { Align::TopLeft } else { Align::BottomRight },
            key_lengths: key_length.map(|len| vec![len]),
            ..self.positions.clone()
        };
        let distance = match &self.distance {
            Some(Distance::Alibi(slopes)) => Some(Distance::Alibi(slopes.narrow(0, 0, heads)?)),
            Some(Distance::T5(table, buckets)) => Some(Distance::T5(table.narrow(1, 0, heads)?, *buckets)),
            other => other.clone(),
        };
        Ok(Attention { softcap: self.softcap, scale: self.scale, positions, distance, rotary, ..Default::default() })
    }
    #[cfg(not(target_arch = "wasm32"))]
    pub(crate) fn distance(&self) -> Option<&Distance> {
        self.distance.as_ref()
    }
    /// The rotary positions of queries and keys.
    #[cfg(not(target_arch = "wasm32"))]
    pub(crate) fn rotary_table(&self) -> Option<&Rotary> {
        self.rotary.as_ref().map(|(rotary, _)| rotary)
    }
    /// Whether the caller gives rotary positions.
    pub(crate) fn turns(&self) -> bool {
        self.rotary.is_some()
    }
    /// Keys before a query's own that it sees.
    pub(crate) fn window_left(&self) -> Option<usize> {
        self.positions.window_left
    }

    /// Replaces every mask by what `change` makes of it.
    pub(crate) fn for_each_mask(&mut self, change: impl Fn(&Mask) -> Result<Mask>) -> Result<()> {
        for mask in &mut self.masks {
            *mask = change(mask)?;
        }
        Ok(())
    }
    /// Replaces every bias likewise.
    pub(crate) fn for_each_bias(&mut self, change: impl Fn(&Tensor) -> Result<Tensor>) -> Result<()> {
        for bias in &mut self.biases {
            *bias = change(bias)?;
        }
        Ok(())
    }

    /// Computes attention; returns when the work is submitted (the results are ready when downloaded).
    ///
    /// Q `[batch, heads_q, len_q, dim_k]`, K `[batch, heads_kv, len_k, dim_k]`,
    /// V `[batch, heads_kv, len_k, dim_v]` with any strides; `[heads, len, dim]` and `[len, dim]` are
    /// taken as batch 1, further leading axes as one batch.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn forward(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Attended> {
        pollster::block_on(self.forward_async(q, k, v))
    }

    /// As [`Attention::forward`], without blocking.
    pub async fn forward_async(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Attended> {
        let mut recording = Recording::new(&self.device(q, k, v)?);
        let attended = self.record(&mut recording, q, k, v, None)?;
        recording.submit().await?;
        Ok(attended)
    }

    /// As [`Attention::forward`]; waits until the work is done and tells which kernels ran, and for how
    /// long where the adapter counts. Only such calls pay for the counting.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn forward_profiled(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<(Attended, Profile)> {
        pollster::block_on(self.forward_profiled_async(q, k, v))
    }

    /// As [`Attention::forward_profiled`], without blocking.
    pub async fn forward_profiled_async(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<(Attended, Profile)> {
        let mut recording = Recording::new(&self.device(q, k, v)?);
        let output = self.record(&mut recording, q, k, v, None)?;
        Ok((output, recording.submit_profiled().await?))
    }

    /// What [`Attention::forward`] would run, as data: WGSL, buffers and dispatches for another implementation of
    /// WebGPU. Nothing is computed; the operands are read back, so a caller's own buffers need the usage `COPY_SRC`.
    #[cfg(all(feature = "export", not(target_arch = "wasm32")))]
    pub fn export(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<crate::ExportedCall> {
        // Parameters stay on the host.
        let mut recording = Recording::for_step(&self.device(q, k, v)?);
        let attended = self.record(&mut recording, q, k, v, None)?;
        pollster::block_on(recording.export(&attended))
    }

    /// Records the work into the caller's encoder: nothing is submitted, nothing waits. `output`, if
    /// given, is the tensor to write, `[batch, heads_q, len_q, dim_v]` with any strides.
    ///
    /// Keep the inputs and the returned tensors until the encoder is submitted: a dropped tensor's
    /// buffer may be used again. Work of more than half a second or so belongs into several submits:
    /// [`Attention::encode_slices`].
    pub fn encode(
        &self,
        gpu: &Gpu,
        encoder: &mut wgpu::CommandEncoder,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        output: Option<&Tensor>,
    ) -> Result<Attended> {
        let mut recording = Recording::for_encoder(gpu);
        common_device_is(recording.device(), self.device(q, k, v)?)?;
        let attended = self.record(&mut recording, q, k, v, output)?;
        recording.encode(encoder)?;
        Ok(attended)
    }

    /// As [`Attention::encode`], cut into slices for encoders of their own, since the work may take longer than one
    /// submit should; [`EncodeSlices::seconds`] tells about how long.
    pub fn encode_slices(
        &self,
        gpu: &Gpu,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        output: Option<&Tensor>,
    ) -> Result<(Attended, EncodeSlices)> {
        let mut recording = Recording::for_encoder(gpu);
        common_device_is(recording.device(), self.device(q, k, v)?)?;
        let attended = self.record(&mut recording, q, k, v, output)?;
        Ok((attended, recording.slices()?))
    }

    /// Attention over sequences of any lengths that lie one behind another ("varlen"), in one dispatch:
    /// Q `[total_q, heads_q, dim_k]`, K `[total_k, heads_kv, dim_k]`, V `[total_k, heads_kv, dim_v]`, any
    /// strides. Sequence `n` is rows `cu_seqlens_q[n]..cu_seqlens_q[n + 1]` of Q and the same of
    /// `cu_seqlens_k` of K and V, as in FlashAttention's `flash_attn_varlen_func`; both begin with 0, do not
    /// fall, and end with the number of rows. Output `[total_q, heads_q, dim_v]`, LSE `[heads_q, total_q]`.
    ///
    /// Causal, window, offsets (one for all or one per sequence), scale and softcap work as in
    /// [`Attention::forward`], counted within each sequence, and give the same bits as a call over that
    /// sequence alone with the same [`Method::Cut`]; so does a sink. Masks, biases, weights and scores are refused.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn forward_packed(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        cu_seqlens_q: &[usize],
        cu_seqlens_k: &[usize],
    ) -> Result<Attended> {
        pollster::block_on(self.forward_packed_async(q, k, v, cu_seqlens_q, cu_seqlens_k))
    }

    /// As [`Attention::forward_packed`], without blocking.
    pub async fn forward_packed_async(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        cu_seqlens_q: &[usize],
        cu_seqlens_k: &[usize],
    ) -> Result<Attended> {
        let mut recording = Recording::new(&self.device(q, k, v)?);
        let attended = self.record_packed(&mut recording, [q, k, v], cu_seqlens_q, cu_seqlens_k)?;
        recording.submit().await?;
        Ok(attended)
    }

    fn record_packed(
        &self,
        recording: &mut Recording,
        operands: [&Tensor; 3],
        cu_seqlens_q: &[usize],
        cu_seqlens_k: &[usize],
    ) -> Result<Attended> {
        for (what, given) in [
            ("a mask", !self.masks.is_empty()),
            ("a key padding mask", !self.key_padding.is_empty() || !self.key_padding_biases.is_empty()),
            ("a bias", !self.biases.is_empty()),
            ("query_lengths", self.query_lengths.is_some()),
            ("a bias by distance", self.distance.is_some()),
            ("returned weights", self.weights != Weights::None),
            ("returned scores", self.scores.is_some()),
            ("EmptyRows::MeanOfValues", self.empty_rows != EmptyRows::Zero),
        ] {
            if given {
                return Err(value_error!("packed sequences do not go with {what}; run the sequences apart for it"));
            }
        }
        if self.method == Method::ThreePasses {
            let reason = "packed sequences run fused only".into();
            return Err(Error::Method { method: self.method, reason });
        }
        let mut four = Vec::with_capacity(3);
        for (name, tensor) in ["Q", "K", "V"].into_iter().zip(operands) {
            tensor.expect_float(name)?;
            if tensor.layout().rank() != 3 {
                return Err(shape_error!("packed {name} {:?} must be [total, heads, dim]", tensor.shape()));
            }
            four.push(tensor.permute(&[1, 0, 2])?.unsqueeze(0)?);
        }
        let [q, k, v]: [Tensor; 3] = four.try_into().expect("three operands");
        let plain = Positions::default();
        let problem = Problem::new(q.shape(), k.shape(), v.shape(), self.scale, self.softcap, &plain, 0)?;
        let sink = self.checked_sink(&problem)?;
        let sequences = self.positions.sequences(cu_seqlens_q, cu_seqlens_k, problem.len_q, problem.len_k)?;
        let [q, k] = match &self.rotary {
            None => [q, k],
            Some((rotary, given)) => {
                let [queries, keys] = match given {
                    Some(given) => given.clone(),
                    None => {
                        let (mut queries, mut keys) = (Vec::new(), Vec::new());
                        for (n, one) in sequences.iter().enumerate().filter(|(_, one)| one.len_q > 0) {
                            let start = first_position(n, one.band.offset)?;
                            queries.extend(start..start + one.len_q);
                        }
                        sequences.iter().for_each(|one| keys.extend(0..one.len_k));
                        [TokenPositions::Given(queries), TokenPositions::Given(keys)]
                    }
                };
                [rotary.record(recording, &q, &queries)?, rotary.record(recording, &k, &keys)?]
            }
        };
        let operands = Operands { q, k, v, masks: Vec::new(), biases: Vec::new(), relative: None, rotary: None, sink };
        let wanted = Wanted { lse: self.lse, method: self.method, ..Wanted::default() };
        let attended = recording.packed(&problem, &operands, &sequences, wanted)?;
        Ok(Attended {
            output: attended.output.select(0, 0)?.permute(&[1, 0, 2])?,
            lse: attended.lse.map(|lse| lse.select(0, 0)).transpose()?,
            ..attended
        })
    }

    /// The device of all tensors of a call.
    pub(crate) fn device(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Device> {
        let masks = self.masks.iter().chain(&self.key_padding).map(|mask| ("a mask", &mask.tensor));
        let biases = self.biases.iter().chain(&self.key_padding_biases).map(|bias| ("a bias", bias));
        let distance = self.distance.iter().map(|distance| match distance {
            Distance::Alibi(slopes) => ("the slopes", slopes),
            Distance::T5(table, _) => ("the table of biases", table),
            Distance::Shaw(keys) => ("the relative keys", keys.table()),
        });
        let sink = self.sink.iter().map(|sink| ("the sink", sink));
        let rotary = self.rotary.iter().map(|(rotary, _)| ("the rotary table", rotary.rotation().table));
        let others = masks.chain(biases).chain(distance).chain(sink).chain(rotary);
        common_device(q, [("K", k), ("V", v)].into_iter().chain(others))
    }

    fn checked_sink(&self, problem: &Problem) -> Result<Option<Tensor>> {
        let Some(sink) = &self.sink else { return Ok(None) };
        sink.expect_float("the sink")?;
        if sink.shape() != [problem.heads_q] {
            return Err(shape_error!(
                "a sink of shape {:?} must be [heads_q] = [{}]: one score per query head",
                sink.shape(),
                problem.heads_q
            ));
        }
        Ok(Some(sink.clone()))
    }

    /// Adds this call to a recording on the tensors' device.
    pub(crate) fn record(
        &self,
        recording: &mut Recording,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        output: Option<&Tensor>,
    ) -> Result<Attended> {
        let fuse = matches!(recording, Recording::Gpu(_))
            && self.weights == Weights::None
            && self.scores.is_none()
            && self.method != Method::ThreePasses;
        let (problem, operands) = self.operands(recording, q, k, v, fuse)?;
        let output =
            output.map(|output| Ok(output.with_layout(as_four_axes("output", output.layout())?))).transpose()?;
        let wanted = Wanted { lse: self.lse, weights: self.weights, scores: self.scores, method: self.method };
        if self.empty_rows == EmptyRows::MeanOfValues {
            self.expect_mean_alone(output.as_ref())?;
            let attended = recording.attention(&problem, &operands, Wanted { lse: true, ..wanted }, None)?;
            let attended = mean_where_empty(recording, &problem, &operands.v, attended)?;
            return restore_axes(Attended { lse: attended.lse.filter(|_| self.lse), ..attended }, q.shape());
        }
        let attended = recording.attention(&problem, &operands, wanted, output.as_ref())?;
        restore_axes(attended, q.shape())
    }

    /// What the mean of values for rows without keys does not go with.
    fn expect_mean_alone(&self, output: Option<&Tensor>) -> Result<()> {
        for (what, given) in [
            ("returned weights", self.weights != Weights::None),
            ("returned scores", self.scores.is_some()),
            ("a sink, which every query sees", self.sink.is_some()),
            ("query_lengths, behind which queries see nothing on purpose", self.query_lengths.is_some()),
            ("an output tensor of the caller's", output.is_some()),
        ] {
            if given {
                return Err(value_error!("EmptyRows::MeanOfValues does not go with {what}"));
            }
        }
        Ok(())
    }

    /// The checked problem, and the operands as backends take them; `fuse`: rows may be turned while they are read.
    pub(crate) fn operands(
        &self,
        recording: &mut Recording,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        fuse: bool,
    ) -> Result<(Problem, Operands)> {
        for (name, tensor) in [("Q", q), ("K", k), ("V", v)] {
            tensor.expect_float(name)?;
        }
        let four = |name: &str, tensor: &Tensor| -> Result<Tensor> {
            Ok(tensor.with_layout(as_four_axes(name, tensor.layout())?))
        };
        let (q4, k4, v4) = (four("Q", q)?, four("K", k)?, four("V", v)?);
        let problem = Problem::new(
            q4.shape(),
            k4.shape(),
            v4.shape(),
            self.scale,
            self.softcap,
            &self.positions,
            self.extra_keys,
        )?;
        let broadcast = |what: &str, tensor: &Tensor| -> Result<Tensor> {
            let layout = tensor.layout().broadcast_to(&problem.mask_shape()).map_err(|_| {
                shape_error!(
                    "{what} of shape {:?} does not broadcast to [batch, heads_q, len_q, len_k] = {:?}: \
                     from the right, each axis must be equal or 1{}",
                    tensor.shape(),
                    problem.mask_shape(),
                    missing_axes(tensor.shape(), problem.mask_shape())
                )
            })?;
            Ok(tensor.with_layout(layout))
        };
        let queries = self.query_mask(recording, &problem)?;
        let padding = |mask: &Mask| {
            Ok(Mask { tensor: over_keys("a key padding mask", &mask.tensor, &problem)?, meaning: mask.meaning })
        };
        let masks = (self.masks.iter().cloned().map(Ok))
            .chain(self.key_padding.iter().map(padding))
            .chain(queries.map(Ok))
            .map(|mask| {
                let mask = mask?;
                Ok(Mask { tensor: broadcast("a mask", &mask.tensor)?, meaning: mask.meaning })
            })
            .collect::<Result<Vec<_>>>()?;
        let biases = (self.biases.iter().cloned().map(Ok))
            .chain(self.key_padding_biases.iter().map(|bias| over_keys("a key padding bias", bias, &problem)))
            .map(|bias| {
                let bias = bias?;
                bias.expect_float("a bias")?;
                broadcast("a bias", &bias)
            })
            .collect::<Result<Vec<_>>>()?;
        let sink = self.checked_sink(&problem)?;
        let relative = self.relative(recording, &problem, &q4)?;
        let (q4, k4, rotary) = match &self.rotary {
            None => (q4, k4, None),
            Some((rotary, given)) => {
                let rows = rotary_rows(rotary, given.as_ref(), &problem)?;
                rotary.check_width("Q", q.shape(), problem.dim_k)?;
                if fuse && given.is_none() {
                    (q4, k4, Some((rotary.clone(), rows)))
                } else {
                    let mut turn = |x: &Tensor, rows: &Rows| recording.rotate(x, rotary.rotation(), rows);
                    (turn(&q4, &rows[0])?, turn(&k4, &rows[1])?, None)
                }
            }
        };
        Ok((problem, Operands { q: q4, k: k4, v: v4, masks, biases, relative, rotary, sink }))
    }

    /// The rule of [`Attention::query_lengths`]: `[batch, 1, len_q, 1]`.
    fn query_mask(&self, recording: &Recording, problem: &Problem) -> Result<Option<Mask>> {
        let Some(lengths) = &self.query_lengths else { return Ok(None) };
        let Problem { batch, len_q, extra_keys, .. } = *problem;
        if lengths.len() != batch {
            return Err(shape_error!(
                "query_lengths has {} entries for a batch of {batch}; one per batch entry is needed",
                lengths.len()
            ));
        }
        if let Some((b, len)) = lengths.iter().enumerate().find(|&(_, &len)| len > len_q) {
            return Err(shape_error!("query_lengths[{b}] = {len} is more than len_q = {len_q}"));
        }
        if extra_keys > 0 {
            return Err(value_error!(
                "query_lengths does not go with add_bias_kv or add_zero_attn: every query sees those {extra_keys} keys; \
                 leave it out and pass over the outputs behind each length"
            ));
        }
        if lengths.iter().all(|&len| len == len_q) {
            return Ok(None);
        }
        let valid: Vec<bool> = lengths.iter().flat_map(|&len| (0..len_q).map(move |i| i < len)).collect();
        Mask::keep(recording.bools(&[batch, 1, len_q, 1], &valid)?).map(Some)
    }

    fn relative(&self, recording: &mut Recording, problem: &Problem, q: &Tensor) -> Result<Option<Relative>> {
        let Some(distance) = &self.distance else { return Ok(None) };
        let heads = problem.heads_q;
        let (table, kind, low, high, factor) = match distance {
            Distance::Alibi(slopes) => {
                slopes.expect_float("the slopes")?;
                if slopes.shape() != [heads] {
                    return Err(shape_error!(
                        "the slopes {:?} must be [heads_q] = [{heads}]: one per query head",
                        slopes.shape()
                    ));
                }
                (slopes.unsqueeze(1)?.unsqueeze(2)?.unsqueeze(0)?, RelativeKind::Slope, 0, 0, 1.0)
            }
            Distance::T5(table, buckets) => {
                let [low, high] = buckets.range()?;
                (t5::by_distance(recording, table, buckets, heads)?, RelativeKind::Fours, low, high, 1.0)
            }
            Distance::Shaw(keys) => {
                let [low, high] = keys.range();
                (keys.products(recording, q)?, RelativeKind::Table, low, high, problem.scale)
            }
        };
        let table = match recording {
            Recording::Gpu(gpu) => gpu.widened(&table)?,
            #[cfg(feature = "cpu")]
            Recording::Cpu => table,
        };
        let shape = [problem.batch, heads, problem.len_q, table.shape()[3]];
        let layout = table.layout().broadcast_to(&shape)?;
        Ok(Some(Relative { table: table.with_layout(layout), kind, low, high, factor }))
    }
}

/// The end of a message about a mask or bias that does not broadcast: the axes that it lacks, where its own are those of
/// a mask all the same.
fn missing_axes(shape: &[usize], [batch, heads, len_q, len_k]: [usize; 4]) -> String {
    match *shape {
        [b, k] if [b, k] == [batch, len_k] => format!(
            "; [batch, len_k] must be [{batch}, 1, 1, {len_k}], in Python x[:, None, None, :], or be given as key padding"
        ),
        [b, q, k] if [b, q, k] == [batch, len_q, len_k] => {
            format!("; [batch, len_q, len_k] must be [{batch}, 1, {len_q}, {len_k}], in Python x[:, None]")
        }
        [h, k] if [h, k] == [heads, len_k] => {
            format!("; [heads, len_k] must be [{heads}, 1, {len_k}], in Python x[:, None]")
        }
        [both, q, k] if both == batch.saturating_mul(heads) && [q, k] == [len_q, len_k] => {
            format!("; [batch · heads, len_q, len_k] must be [{batch}, {heads}, {len_q}, {len_k}], by a reshape")
        }
        _ => String::new(),
    }
}

/// What speaks of keys alone, `[batch, len_k]` or `[len_k]`, with axes for heads and queries.
fn over_keys(what: &str, tensor: &Tensor, problem: &Problem) -> Result<Tensor> {
    let [batch, .., len_k] = problem.mask_shape();
    match *tensor.shape() {
        [len] if len == len_k => Ok(tensor.clone()),
        [entries, len] if len == len_k && (entries == batch || entries == 1) => tensor.unsqueeze(1)?.unsqueeze(1),
        _ => Err(shape_error!(
            "{what} of shape {:?} must be [batch, len_k] = [{batch}, {len_k}], or [{len_k}] for all; one that tells \
             queries or heads apart is a mask or a bias, not key padding",
            tensor.shape()
        )),
    }
}

/// The output with the mean of all values where the LSE is −∞: joined to a result over the same values at equal scores,
/// whose LSE is the least finite number, so that it weighs nothing beside any other.
fn mean_where_empty(recording: &mut Recording, problem: &Problem, v: &Tensor, attended: Attended) -> Result<Attended> {
    let Problem { batch, heads_q, heads_kv, len_q, len_k, dim_v, .. } = *problem;
    let Some(lse) = attended.lse else { unreachable!("asked for") };
    if problem.is_empty() || len_k == 0 || dim_v == 0 {
        return Ok(Attended { lse: Some(lse), ..attended });
    }
    let [one_query, keys] = [[batch, heads_q, 1, 4], [batch, heads_kv, len_k, 4]];
    let alike = Problem::new(&one_query, &keys, v.shape(), None, None, &Positions::default(), 0)?;
    let operands = Operands {
        q: recording.number(0.0, &one_query)?,
        k: recording.number(0.0, &keys)?,
        v: v.clone(),
        masks: Vec::new(),
        biases: Vec::new(),
        relative: None,
        rotary: None,
        sink: None,
    };
    let mean = recording.attention(&alike, &operands, Wanted::default(), None)?.output;
    let mean = mean.with_layout(mean.layout().broadcast_to(&[batch, heads_q, len_q, dim_v])?);
    let least = recording.number(f32::MIN, &[batch, heads_q, len_q])?;
    let layout = in_order_of(attended.output.layout(), [batch, heads_q, len_q, dim_v])?;
    let [output, _] = recording.merge([&attended.output, &mean], [&lse, &least], layout)?;
    Ok(Attended { output, lse: Some(lse), ..attended })
}

/// The rows of a rotary's table for queries and keys: given, or from each band's offset and from 0 on.
fn rotary_rows(rotary: &Rotary, given: Option<&[TokenPositions; 2]>, problem: &Problem) -> Result<[Rows; 2]> {
    if problem.extra_keys > 0 {
        return Err(value_error!(
            "rotary positions do not go with add_bias_kv or add_zero_attn: {} keys stand nowhere",
            problem.extra_keys
        ));
    }
    let [queries, keys] = match given {
        Some(given) => given.clone(),
        None => {
            let starts = (problem.bands.iter().enumerate())
                .map(|(b, band)| first_position(b, band.offset))
                .collect::<Result<Vec<_>>>()?;
            let queries = match *starts {
                [start] => TokenPositions::From(start),
                _ => TokenPositions::FromEach(starts),
            };
            [queries, TokenPositions::From(0)]
        }
    };
    let positions = rotary.positions();
    Ok([queries.rows(problem.batch, problem.len_q, positions)?, keys.rows(problem.batch, problem.len_k, positions)?])
}

fn first_position(b: usize, offset: i32) -> Result<usize> {
    usize::try_from(offset).map_err(|_| {
        value_error!("query 0 of batch entry {b} stands at position {offset}; rotary positions begin at 0")
    })
}

pub(crate) fn common_device_is(expected: &Device, device: Device) -> Result<()> {
    if expected.same_as(&device) {
        return Ok(());
    }
    Err(Error::Device(format!("the tensors live on {} but the call runs on {}", device.name(), expected.name())))
}

/// Gives the results the leading axes that the query had.
fn restore_axes(attended: Attended, q: &[usize]) -> Result<Attended> {
    if q.len() == 4 {
        return Ok(attended);
    }
    let lead = &q[..q.len().saturating_sub(2)];
    let fix = |tensor: Tensor, has_heads: bool| -> Result<Tensor> {
        let tail = if has_heads { &tensor.shape()[2..] } else { &tensor.shape()[1..] };
        let lead = if has_heads { lead } else { &lead[..lead.len().saturating_sub(1)] };
        let shape: Vec<usize> = lead.iter().chain(tail).copied().collect();
        tensor.reshape(&shape)
    };
    let averaged = attended.weights.as_ref().is_some_and(|weights| weights.layout().rank() == 3);
    Ok(Attended {
        output: fix(attended.output, true)?,
        lse: attended.lse.map(|lse| fix(lse, true)).transpose()?,
        weights: attended.weights.map(|weights| fix(weights, !averaged)).transpose()?,
        scores: attended.scores.map(|scores| fix(scores, true)).transpose()?,
    })
}

/// The output's layout `[b, h, s, d]` in the memory order of the query.
pub(crate) fn output_layout(problem: &Problem, q: &Layout) -> Result<Layout> {
    in_order_of(q, [problem.batch, problem.heads_q, problem.len_q, problem.dim_v])
}

/// A layout of `shape` with the heads inside the sequence (`[b, s, h, d]`) when `like` has them so, else
/// row-major.
pub(crate) fn in_order_of(like: &Layout, [batch, heads, len, dim]: [usize; 4]) -> Result<Layout> {
    let strides = like.strides();
    if heads > 1 && len > 1 && strides[1] < strides[2] {
        Layout::contiguous(&[batch, len, heads, dim])?.permute(&[0, 2, 1, 3])
    } else {
        Layout::contiguous(&[batch, heads, len, dim])
    }
}

/// Joins attention over two disjoint sets of keys by the log-sum-exps of both (Dao et al. 2023,
/// "Flash-Decoding"; Ye et al. 2024, "Cascade inference"), as if one call had seen all keys:
///
/// ```text
/// LSE = ln(exp LSE_a + exp LSE_b)      O = exp(LSE_a − LSE) · O_a + exp(LSE_b − LSE) · O_b
/// ```
///
/// Outputs `[batch, heads, len, dim]` and LSEs `[batch, heads, len]` of any strides; missing leading axes
/// count as in [`Attention::forward`]. A part with LSE −∞ weighs 0 whatever its output holds; where both
/// are −∞ the output is 0 and the LSE −∞. NaN goes through, and an LSE of +∞ makes its row NaN.
#[cfg(not(target_arch = "wasm32"))]
pub fn merge(out_a: &Tensor, lse_a: &Tensor, out_b: &Tensor, lse_b: &Tensor) -> Result<Attended> {
    pollster::block_on(merge_async(out_a, lse_a, out_b, lse_b))
}

/// As [`merge`], without blocking.
pub async fn merge_async(out_a: &Tensor, lse_a: &Tensor, out_b: &Tensor, lse_b: &Tensor) -> Result<Attended> {
    let device = common_device(out_a, [("LSE a", lse_a), ("output b", out_b), ("LSE b", lse_b)])?;
    for (name, tensor) in [("output a", out_a), ("LSE a", lse_a), ("output b", out_b), ("LSE b", lse_b)] {
        tensor.expect_float(name)?;
    }
    if out_a.shape() != out_b.shape() {
        return Err(shape_error!(
            "output a {:?} and output b {:?} differ: both are [batch, heads, len, dim] of the same queries",
            out_a.shape(),
            out_b.shape()
        ));
    }
    let four = |name: &str, tensor: &Tensor| Ok::<_, Error>(tensor.with_layout(as_four_axes(name, tensor.layout())?));
    let outputs = [four("output a", out_a)?, four("output b", out_b)?];
    let lse = |name: &str, tensor: &Tensor| -> Result<Tensor> {
        let rows = &out_a.shape()[..out_a.shape().len() - 1];
        if tensor.shape() != rows {
            return Err(shape_error!(
                "{name} {:?} must be {rows:?}: one value per row of the outputs {:?}",
                tensor.shape(),
                out_a.shape()
            ));
        }
        four(name, &tensor.unsqueeze(rows.len())?)?.select(3, 0)
    };
    let lses = [lse("LSE a", lse_a)?, lse("LSE b", lse_b)?];
    let &[b, h, i, d] = outputs[0].shape() else { unreachable!("four axes") };
    let layout = in_order_of(outputs[0].layout(), [b, h, i, d])?;
    let mut recording = Recording::new(&device);
    let [output, lse] = recording.merge([&outputs[0], &outputs[1]], [&lses[0], &lses[1]], layout)?;
    recording.submit().await?;
    restore_axes(Attended { output, lse: Some(lse), weights: None, scores: None }, out_a.shape())
}

/// Softmax over `axis` (negative counts from the end), as `torch.softmax`. A row of −∞ gives zeros.
#[cfg(not(target_arch = "wasm32"))]
pub fn softmax(x: &Tensor, axis: isize) -> Result<Tensor> {
    pollster::block_on(softmax_async(x, axis))
}

/// As [`softmax`], without blocking.
pub async fn softmax_async(x: &Tensor, axis: isize) -> Result<Tensor> {
    x.expect_float("x")?;
    let rank = x.layout().rank() as isize;
    let at = if axis < 0 { axis + rank } else { axis };
    if at < 0 || at >= rank {
        return Err(value_error!(
            "softmax over axis {axis} of a tensor with {rank} axes: it must lie in {}..{rank}",
            -rank
        ));
    }
    let mut recording = Recording::new(&x.device());
    let out = recording.softmax(x, at as usize)?;
    recording.submit().await?;
    Ok(out)
}
