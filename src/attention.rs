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

/// The output of a query that may attend to no key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum EmptyRows {
    /// 0, like the weights of such a query.
    #[default]
    Zero,
    /// The mean of the values of all keys, including hidden ones. This is what JAX's `dot_product_attention` returns:
    /// it sets masked scores to a large negative number, so a fully masked row weighs all keys equally. As in JAX, a
    /// value that is NaN or ∞ then reaches every query, whether the query sees that key or not.
    MeanOfValues,
}

/// Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1) with the options of all major
/// frameworks, applied in one fixed order:
/// `S = scale · Q·Kᵀ` → softcap → `+ bias` → mask → softmax over keys → `· V`.
///
/// A query that may attend to no key gets output 0, weights 0 and LSE −∞ (with a [sink](Attention::sink), the sink's
/// score). The contents of masked keys and values, including NaN and ∞, do not change any bit of the result.
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct Attention {
    pub(crate) scale: Option<f32>,
    pub(crate) softcap: Option<f32>,
    pub(crate) positions: Positions,
    /// Whether the caller set the causal rule and the alignment. If not, a cache sets them.
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
    /// Number of keys at the end that every query sees, whatever the masks say. Masks and biases cover only the keys
    /// before them.
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
    /// Replaces the default factor `1/√dim_k` on `Q·Kᵀ`; any finite value.
    pub fn scale(mut self, scale: f32) -> Self {
        self.scale = Some(scale);
        self
    }
    /// `S → cap · tanh(S / cap)`, before bias and mask; `cap > 0`.
    pub fn softcap(mut self, cap: f32) -> Self {
        self.softcap = Some(cap);
        self
    }
    /// Query `i` sees key `j` only if `j ≤ i + offset`. Also sets the offset of a window.
    pub fn causal(mut self, align: Align) -> Self {
        self.positions.causal = true;
        self.says_causal = true;
        self.align(align)
    }
    /// Lets queries see the keys after them. This is the default in [`Attention::forward`]; over a
    /// [`KvCache`](crate::KvCache) it switches off the cache's causal rule. If both this and [`Attention::causal`] are
    /// called, the last call wins.
    pub fn not_causal(mut self) -> Self {
        self.positions.causal = false;
        self.says_causal = true;
        self
    }
    /// Positions of queries relative to keys, for a window without a causal mask.
    pub fn align(mut self, align: Align) -> Self {
        self.positions.align = align;
        self.says_align = true;
        self
    }
    /// Query `i` sees only keys from `i + offset − left` to `i + offset + right`, inclusive; `None`
    /// leaves that side open.
    ///
    /// The query's own key does not count, so `window(3, 0)` sees four keys. Equivalents in other frameworks:
    ///
    /// | framework | here |
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
    /// Number of valid keys per batch entry; the rest are padding (JAX's `key_value_seq_lengths`).
    pub fn key_lengths(mut self, lengths: Vec<usize>) -> Self {
        self.positions.key_lengths = Some(lengths);
        self
    }
    /// Number of valid queries per batch entry, at most `len_q` each (JAX's `query_seq_lengths`). The rest are padding
    /// and attend to nothing: output 0, weights 0, LSE −∞ or the [sink](Attention::sink). Not supported by layers with
    /// `add_bias_kv` or `add_zero_attn`, nor by packed sequences.
    pub fn query_lengths(mut self, lengths: Vec<usize>) -> Self {
        self.query_lengths = Some(lengths);
        self
    }
    /// A boolean mask. May be called several times; a key must pass all masks.
    pub fn mask(mut self, mask: Mask) -> Self {
        self.masks.push(mask);
        self
    }
    /// A boolean mask over keys, `[batch, len_k]` or `[len_k]` for all batch entries: PyTorch's `key_padding_mask`.
    pub fn key_padding(mut self, mask: Mask) -> Self {
        self.key_padding.push(mask);
        self
    }
    /// A float bias over keys, `[batch, len_k]` or `[len_k]` for all batch entries, added to the scores of every query
    /// and head: PyTorch's `key_padding_mask` with floats. −∞ masks. May be called several times.
    pub fn key_padding_bias(mut self, bias: Tensor) -> Self {
        self.key_padding_biases.push(bias);
        self
    }
    /// An additive bias that broadcasts like a mask. −∞ masks. May be called several times.
    pub fn bias(mut self, bias: Tensor) -> Self {
        self.biases.push(bias);
        self
    }
    /// Rotates queries and keys by their positions (Su et al. 2021) before their product. Key `j` is at position `j`,
    /// query `i` at `i + offset`, with the offset of [`Attention::causal`] or [`Attention::align`]. The table must hold
    /// all positions. For a [`KvCache`](crate::KvCache), use
    /// [`KvCache::with_rotary`](crate::KvCache::with_rotary) instead.
    pub fn rotary(mut self, rotary: Rotary) -> Self {
        self.rotary = Some((rotary, None));
        self
    }
    /// Like [`Attention::rotary`], with explicit positions for queries and keys.
    pub fn rotary_at(mut self, rotary: Rotary, queries: TokenPositions, keys: TokenPositions) -> Self {
        self.rotary = Some((rotary, Some([queries, keys])));
        self
    }
    /// Attention with linear biases (Press et al. 2022, section 3): adds `−slope(h) · |i + offset − j|` to each score.
    /// `slopes` is `[heads_q]` on the call's device ([`position::alibi::slopes`](crate::position::alibi::slopes)); the
    /// offset is that of [`Attention::causal`] or [`Attention::align`]. The biases are not stored in memory.
    pub fn alibi(mut self, slopes: Tensor) -> Self {
        self.distance = Some(Distance::Alibi(slopes));
        self
    }
    /// T5's relative position bias (Raffel et al. 2020, section 2.1) from the learned table `[num_buckets, heads_q]`.
    /// Adds what [`position::t5::bias`](crate::position::t5::bias) computes, without storing it; the offset is that of
    /// [`Attention::causal`] or [`Attention::align`]. T5 does not scale its scores, so set [`Attention::scale`] to 1. A
    /// call has one bias by distance: the last of [`Attention::alibi`], this and [`Attention::relative_keys`] wins.
    pub fn t5_bias(mut self, table: Tensor, buckets: Buckets) -> Self {
        self.distance = Some(Distance::T5(table, buckets));
        self
    }
    /// Relative keys (Shaw et al. 2018, section 3.2): adds to each score the query's product with the relative key of
    /// that distance, scaled like every score. Adds what [`RelativeKeys::bias`] computes, without storing it, and after
    /// the softcap like every bias.
    pub fn relative_keys(mut self, keys: RelativeKeys) -> Self {
        self.distance = Some(Distance::Shaw(keys));
        self
    }
    /// A learned attention sink (gpt-oss; Xiao et al. 2024, "Efficient Streaming Language Models with Attention
    /// Sinks"): floats `[heads_q]`, one extra score for every query of a head. It takes a share of the softmax but has
    /// no value.
    ///
    /// ```text
    /// P_j = exp(S_j) / (exp(sink_h) + Σ_j exp(S_j))      LSE = ln(exp(sink_h) + Σ_j exp(S_j))
    /// ```
    ///
    /// The sink is neither scaled nor capped, and no rule masks it. A query's weights sum to less than 1. Scores before
    /// the softmax and the shape of the weights stay the same. The LSE includes the sink, so [`Attention::inspect`] and
    /// [`merge`](crate::merge) need no sink of their own; of the calls that are merged, only one may have it. A query
    /// that may attend to no key gets output 0, weights 0 and the sink as its LSE.
    ///
    /// A sink of −∞ is no sink. A sink of NaN or +∞ makes its whole head NaN: every output and LSE, and the weight of
    /// every visible key.
    pub fn sink(mut self, sink: Tensor) -> Self {
        self.sink = Some(sink);
        self
    }
    /// Sets the output of a query that may attend to no key; 0 by default. Its LSE stays −∞.
    pub fn empty_rows(mut self, empty_rows: EmptyRows) -> Self {
        self.empty_rows = empty_rows;
        self
    }
    /// Also returns the log-sum-exp of each query's scores.
    pub fn lse(mut self, yes: bool) -> Self {
        self.lse = yes;
        self
    }
    /// Also returns the attention weights.
    pub fn weights(mut self, weights: Weights) -> Self {
        self.weights = weights;
        self
    }
    /// Also returns the scores at a stage (ONNX's `qk_matmul_output`).
    pub fn scores(mut self, stage: Option<ScoreStage>) -> Self {
        self.scores = stage;
        self
    }
    /// Chooses the kernels that compute the output on an adapter; [`Method::Auto`] by default.
    pub fn method(mut self, method: Method) -> Self {
        self.method = method;
        self
    }

    /// Computes attention. Returns once the work is submitted; downloading a result waits for it.
    ///
    /// Q `[batch, heads_q, len_q, dim_k]`, K `[batch, heads_kv, len_k, dim_k]`,
    /// V `[batch, heads_kv, len_k, dim_v]`, with any strides. `[heads, len, dim]` and `[len, dim]` are batch 1; further
    /// leading axes merge into one batch axis.
    ///
    /// # Errors
    ///
    /// - [`Shape`](crate::Error::Shape): the shapes do not fit together, or a mask, a bias or a list per batch entry
    ///   does not fit them.
    /// - [`Value`](crate::Error::Value): an option is out of range, a tensor has the wrong type, or the options exclude
    ///   each other.
    /// - [`Device`](crate::Error::Device): the tensors are on different devices.
    /// - [`Method`](crate::Error::Method): the chosen [`Attention::method`] cannot compute this call.
    /// - [`Unsupported`](crate::Error::Unsupported): the call needs more than the adapter offers, such as storage
    ///   buffers.
    /// - [`TooLarge`](crate::Error::TooLarge), [`Overflow`](crate::Error::Overflow): a result or the working memory
    ///   does not fit.
    /// - [`DeviceLost`](crate::Error::DeviceLost), [`OutOfMemory`](crate::Error::OutOfMemory),
    ///   [`Gpu`](crate::Error::Gpu): the driver failed.
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

    /// Like [`Attention::forward`], but waits until the work is done and reports which kernels ran, and how long they
    /// took if the adapter has timestamps. Only profiled calls pay for the measurement.
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

    /// Compiles the kernels that [`Attention::forward`] needs for operands of these shapes, strides and types, and runs
    /// nothing. The first call then takes no longer than later ones. The operands' values are not read.
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

    /// Returns what [`Attention::forward`] would run as data: WGSL, buffers and dispatches for another WebGPU
    /// implementation. Nothing is computed. The operands are read back, so a caller's own buffers need the usage
    /// `COPY_SRC`.
    #[cfg(all(feature = "export", not(target_arch = "wasm32")))]
    pub fn export(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<crate::ExportedCall> {
        // Parameters stay on the host.
        let recording = Recording::for_step(&self.device(q, k, v)?);
        wait_for(recording.export(|to| self.record(to, q, k, v, None)))
    }

    /// Records the work into the caller's encoder. Nothing is submitted, and nothing waits. `output`, if given, is the
    /// tensor to write, `[batch, heads_q, len_q, dim_v]` with any strides.
    ///
    /// Inputs and results may be dropped at once: their buffers are not reused until the encoder's work is done or the
    /// encoder is dropped. Inputs may share one buffer. Split work that takes longer than about half a second into
    /// several submits with [`Attention::encode_slices`].
    ///
    /// # Errors
    ///
    /// Those of [`Attention::forward`], and:
    ///
    /// - [`Aliased`](crate::Error::Aliased): `output` is in a buffer that the call reads.
    /// - [`Device`](crate::Error::Device): the tensors are not on `gpu`; the CPU backend cannot encode.
    /// - [`Value`](crate::Error::Value): `output` has the wrong shape, elements that share memory, or an f16 or bf16
    ///   layout that kernels cannot write; in a browser also kernels that are not compiled yet.
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

    /// Like [`Attention::encode`], for work that may take longer than one submit should: returns it in slices, each for
    /// an encoder of its own. [`EncodeSlices::seconds`] estimates the total time.
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

    /// The device that all tensors of a call are on.
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
