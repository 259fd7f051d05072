//! Scaled dot-product attention: the call a user makes.

mod operands;

use crate::call::{Attended, Mask};
use crate::device::Device;
use crate::error::Result;
use crate::gpu::{EncodeSlices, Gpu, Profile};
use crate::kernels::Method;
use crate::lower::Recording;
use crate::position::shaw::RelativeKeys;
use crate::position::t5::Buckets;
use crate::position::{Distance, Rotary, TokenPositions};
use crate::problem::{Align, Positions, ScoreStage, Weights};
use crate::tensor::{Tensor, common_device};
use crate::wait::apart;
#[cfg(not(target_arch = "wasm32"))]
use crate::wait::wait_for;

/// What a query gets that may attend to no key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
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
#[must_use]
pub struct Attention {
    pub(crate) scale: Option<f32>,
    pub(crate) softcap: Option<f32>,
    pub(crate) positions: Positions,
    /// Whether the caller says if the rule is causal, and where queries stand: a cache says both otherwise.
    pub(crate) says_causal: bool,
    pub(crate) says_align: bool,
    pub(crate) query_lengths: Option<Vec<usize>>,
    pub(crate) masks: Vec<Mask>,
    pub(crate) key_padding: Vec<Mask>,
    pub(crate) biases: Vec<Tensor>,
    pub(crate) key_padding_biases: Vec<Tensor>,
    pub(crate) sink: Option<Tensor>,
    pub(crate) lse: bool,
    pub(crate) weights: Weights,
    pub(crate) scores: Option<ScoreStage>,
    pub(crate) method: Method,
    /// So many keys at the end are seen by every query, whatever the masks say; masks and biases are then as wide as the
    /// keys before them.
    pub(crate) extra_keys: usize,
    pub(crate) distance: Option<Distance>,
    pub(crate) rotary: Option<(Rotary, Option<[TokenPositions; 2]>)>,
    pub(crate) empty_rows: EmptyRows,
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
    /// Like [`Attention::rotary`], with the positions of queries and keys given.
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
    /// [`Attention::inspect`] and [`merge`](crate::merge) need not know of it (of calls that are merged, one may have it). A
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

    /// Computes attention; returns when the work is submitted (the results are ready when downloaded).
    ///
    /// Q `[batch, heads_q, len_q, dim_k]`, K `[batch, heads_kv, len_k, dim_k]`,
    /// V `[batch, heads_kv, len_k, dim_v]` with any strides; `[heads, len, dim]` and `[len, dim]` are
    /// taken as batch 1, further leading axes as one batch.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn forward(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Attended> {
        wait_for(self.run(q, k, v))
    }

    /// Like [`Attention::forward`], without blocking.
    pub async fn forward_async(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Attended> {
        let (attention, q, k, v) = (self.clone(), q.clone(), k.clone(), v.clone());
        apart(async move { attention.run(&q, &k, &v).await }).await
    }

    async fn run(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Attended> {
        Recording::new(&self.device(q, k, v)?).submit(|to| self.record(to, q, k, v, None)).await
    }

    /// Like [`Attention::forward`]; waits until the work is done and tells which kernels ran, and for how
    /// long where the adapter counts. Only such calls pay for the counting.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn forward_profiled(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<(Attended, Profile)> {
        wait_for(self.run_profiled(q, k, v))
    }

    /// Like [`Attention::forward_profiled`], without blocking.
    pub async fn forward_profiled_async(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<(Attended, Profile)> {
        let (attention, q, k, v) = (self.clone(), q.clone(), k.clone(), v.clone());
        apart(async move { attention.run_profiled(&q, &k, &v).await }).await
    }

    async fn run_profiled(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<(Attended, Profile)> {
        Recording::new(&self.device(q, k, v)?).submit_profiled(|to| self.record(to, q, k, v, None)).await
    }

    /// Compiles the kernels of [`Attention::forward`] over operands of these shapes, strides and types, and runs
    /// nothing: the first call then takes no longer than the next. Their values are not read.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn warm_up(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<()> {
        wait_for(self.compile(q, k, v))
    }

    /// Like [`Attention::warm_up`], without blocking.
    pub async fn warm_up_async(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<()> {
        let (attention, q, k, v) = (self.clone(), q.clone(), k.clone(), v.clone());
        apart(async move { attention.compile(&q, &k, &v).await }).await
    }

    async fn compile(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<()> {
        Recording::new(&self.device(q, k, v)?).warm_up(|to| self.record(to, q, k, v, None)).await
    }

    /// What [`Attention::forward`] would run, as data: WGSL, buffers and dispatches for another implementation of
    /// WebGPU. Nothing is computed; the operands are read back, so a caller's own buffers need the usage `COPY_SRC`.
    #[cfg(all(feature = "export", not(target_arch = "wasm32")))]
    pub fn export(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<crate::ExportedCall> {
        // Parameters stay on the host.
        let recording = Recording::for_step(&self.device(q, k, v)?);
        wait_for(recording.export(|to| self.record(to, q, k, v, None)))
    }

    /// Records the work into the caller's encoder: nothing is submitted, nothing waits. `output`, if
    /// given, is the tensor to write, `[batch, heads_q, len_q, dim_v]` with any strides.
    ///
    /// Inputs and results may be dropped at once: their buffers are not reused before the encoder's work is done, or
    /// the encoder is dropped. An `output` in a buffer that the call reads is [`Error::Aliased`](crate::Error::Aliased);
    /// inputs may be parts of one buffer. Split work of more than half a second or so into several submits with
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
        let recording = Recording::for_encoder(gpu, encoder, &self.device(q, k, v)?)?;
        recording.encode(encoder, |to| self.record(to, q, k, v, output))
    }

    /// Like [`Attention::encode`], cut into slices for encoders of their own, since the work may take longer than one
    /// submit should; [`EncodeSlices::seconds`] tells about how long.
    pub fn encode_slices(
        &self,
        gpu: &Gpu,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        output: Option<&Tensor>,
    ) -> Result<(Attended, EncodeSlices)> {
        Recording::for_encoders(gpu, &self.device(q, k, v)?)?.slices(|to| self.record(to, q, k, v, output))
    }

    /// The device of all tensors of a call.
    pub(crate) fn device(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Device> {
        let masks = self.masks.iter().chain(&self.key_padding).map(|mask| ("a mask", mask.tensor()));
        let biases = self.biases.iter().chain(&self.key_padding_biases).map(|bias| ("a bias", bias));
        let distance = self.distance.iter().map(Distance::named_tensor);
        let sink = self.sink.iter().map(|sink| ("the sink", sink));
        let rotary = self.rotary.iter().map(|(rotary, _)| ("the rotary table", &rotary.rotation().table));
        let others = masks.chain(biases).chain(distance).chain(sink).chain(rotary);
        common_device(q, [("K", k), ("V", v)].into_iter().chain(others))
    }
}
