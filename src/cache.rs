//! Keys and values that are kept between decoding steps.

mod rules;

use self::rules::Held;
use crate::attention::Attention;
use crate::call::Attended;
use crate::device::Device;
use crate::error::{Result, shape_error, value_error};
use crate::gpu::Gpu;
use crate::lower::Recording;
use crate::position::{Rotary, TokenPositions};
use crate::problem::{Dtype, Layout, MAX_LEN, Place, checked_len, expect_per_batch};
use crate::tensor::{Tensor, common_device};
#[cfg(not(target_arch = "wasm32"))]
use crate::wait::wait_for;

/// The shape of a [`KvCache`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
#[non_exhaustive]
pub struct KvCacheConfig {
    /// Independent sequences.
    pub batch: usize,
    /// Key/value heads.
    pub heads_kv: usize,
    /// Number of keys that a sequence can hold at once.
    pub capacity: usize,
    /// Width of a key.
    pub dim_k: usize,
    /// Width of a value.
    pub dim_v: usize,
    /// Number of keys before its own that a query sees, like the left side of [`Attention::window`]; must be less than
    /// the capacity. With a window a sequence may be arbitrarily long: when the capacity is used up, all but the newest
    /// `window + (capacity − window) / 2` keys are dropped. Twice the window is a good capacity.
    pub window: Option<usize>,
    /// Storage type of keys and values: f32, or f16 or bf16, to which they are rounded when they are appended.
    pub dtype: Dtype,
}

impl KvCacheConfig {
    /// Keys and values `dim` wide, no window, f32.
    pub fn new(batch: usize, heads_kv: usize, capacity: usize, dim: usize) -> KvCacheConfig {
        KvCacheConfig { batch, heads_kv, capacity, dim_k: dim, dim_v: dim, window: None, dtype: Dtype::F32 }
    }
    /// Sets the width of the values, if it differs from that of the keys.
    pub fn dim_v(mut self, dim_v: usize) -> Self {
        self.dim_v = dim_v;
        self
    }
    /// Sets [`KvCacheConfig::window`].
    pub fn window(mut self, window: Option<usize>) -> Self {
        self.window = window;
        self
    }
    /// Sets the storage type of keys and values.
    pub fn dtype(mut self, dtype: Dtype) -> Self {
        self.dtype = dtype;
        self
    }

    fn check(&self) -> Result<()> {
        let Self { capacity, window, dtype, .. } = *self;
        if capacity > MAX_LEN {
            return Err(shape_error!("capacity = {capacity} is more than {MAX_LEN} keys"));
        }
        if let Some(window) = window.filter(|&window| window >= capacity) {
            return Err(value_error!(
                "capacity = {capacity} must be more than window = {window}: a query needs its own key beside the window"
            ));
        }
        if dtype == Dtype::Bool {
            return Err(value_error!("a key/value cache holds f32, f16 or bf16, not {dtype}"));
        }
        Ok(())
    }

    /// Rows of keys (0) or values (1), each padded to whole vec4s.
    fn rows(&self, which: usize) -> Result<Layout> {
        let dim = [self.dim_k, self.dim_v][which];
        checked_len(&[dim, 4])?;
        Layout::contiguous(&[self.batch, self.heads_kv, self.capacity, dim.next_multiple_of(4)])
    }

    fn allocate(&self, device: &Device) -> Result<[Tensor; 2]> {
        let one = |what: &str, which: usize| Tensor::blank(device, what, self.rows(which)?, self.dtype);
        Ok([one("the key cache", 0)?, one("the value cache", 1)?])
    }
}

/// How [`KvCache::write`] handles rows beyond the capacity: the modes of ONNX's TensorScatter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum ScatterMode {
    /// They are an error.
    #[default]
    Linear,
    /// They wrap around to row 0.
    Circular,
}

/// The keys that one sequence holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Sequence {
    /// The position of the key in row 0.
    first: usize,
    /// Rows in use.
    len: usize,
}

/// Keys and values of past tokens, kept on the device and appended in place, for incremental decoding
/// (Shazeer 2019, "Fast Transformer Decoding", section 2.4).
///
/// K `[batch, heads_kv, capacity, dim_k]` and V `[batch, heads_kv, capacity, dim_v]` are allocated once. The sequences
/// of a batch may have different lengths. Queries are causal unless their [`Attention`] says otherwise
/// ([`KvCache::attend`]): the newest token of a sequence sees all its keys, or its window. A step of a length that was
/// seen before allocates nothing.
///
/// ```
/// use wgpu_attention::{Attention, Device, KvCache, KvCacheConfig, Tensor};
///
/// # fn main() -> wgpu_attention::Result<()> {
/// let device = Device::new()?;
/// let mut cache = KvCache::new(&device, KvCacheConfig::new(1, 2, 128, 16))?; // 2 heads, 128 tokens
/// let token = |x: f32| Tensor::from_slice(&device, &[1, 2, 1, 16], &[x; 32]);
/// for x in [0.1, 0.2, 0.3] {
///     let attended = cache.step(&Attention::new(), &token(x)?, &token(x)?, &token(x)?)?;
///     assert_eq!(attended.output.shape(), [1, 2, 1, 16]);
/// }
/// cache.rollback(1)?; // the last token was not accepted
/// assert_eq!(cache.positions(), [2]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct KvCache {
    config: KvCacheConfig,
    device: Device,
    /// Keys and values, rows padded.
    rows: [Tensor; 2],
    sequences: Vec<Sequence>,
    /// A write wrapped around the end, so rows are no longer in order of position.
    is_ring: bool,
    rotary: Option<Rotary>,
}

/// The state after an append. It takes effect once the work is submitted. Until then no held row is overwritten, so a
/// call that fails or is cancelled changes nothing.
pub(crate) struct Appended {
    sequences: Vec<Sequence>,
    /// New buffers, if old keys were dropped.
    moved: Option<[Tensor; 2]>,
    /// Number of new tokens at the end of each sequence.
    counts: Vec<usize>,
}

impl KvCache {
    /// An empty cache.
    ///
    /// # Errors
    ///
    /// - [`Shape`](crate::Error::Shape): the capacity is more than 2²⁹ keys.
    /// - [`Value`](crate::Error::Value): the window is not less than the capacity, or the storage type is bool.
    /// - [`TooLarge`](crate::Error::TooLarge), [`Overflow`](crate::Error::Overflow): the cache does not fit.
    /// - [`DeviceLost`](crate::Error::DeviceLost), [`OutOfMemory`](crate::Error::OutOfMemory),
    ///   [`Gpu`](crate::Error::Gpu): the driver failed.
    pub fn new(device: impl Into<Device>, config: KvCacheConfig) -> Result<KvCache> {
        let device = device.into();
        config.check()?;
        Ok(KvCache {
            rows: config.allocate(&device)?,
            sequences: vec![Sequence::default(); config.batch],
            config,
            device,
            is_ring: false,
            rotary: None,
        })
    }

    /// The shape that the cache was created with.
    pub fn config(&self) -> &KvCacheConfig {
        &self.config
    }
    /// The device that the cache is on.
    pub fn device(&self) -> &Device {
        &self.device
    }
    /// Number of keys held, per batch entry.
    pub fn lengths(&self) -> Vec<usize> {
        self.sequences.iter().map(|sequence| sequence.len).collect()
    }
    /// The position of the next token, per batch entry: the number of tokens so far, including those that a window
    /// dropped.
    pub fn positions(&self) -> Vec<usize> {
        self.sequences.iter().map(|sequence| sequence.first + sequence.len).collect()
    }
    /// The keys held, `[batch, heads_kv, longest, dim_k]`. Shorter sequences have arbitrary data after their end.
    ///
    /// This is a view. On an adapter, later writes to the same rows (after a rollback) show through. On the CPU backend
    /// the view keeps its contents: while it exists, the next append copies the cache.
    pub fn keys(&self) -> Result<Tensor> {
        view(&self.rows[0], &self.sequences, self.config.dim_k)
    }
    /// The values held, `[batch, heads_kv, longest, dim_v]`: a view like [`KvCache::keys`].
    pub fn values(&self) -> Result<Tensor> {
        view(&self.rows[1], &self.sequences, self.config.dim_v)
    }

    /// Rotates every key by its position when it is appended or written, and every query when it attends (Su et al.
    /// 2021). Positions continue from call to call and count keys that a window dropped. [`KvCache::keys`] returns
    /// rotated keys. The cache must be empty.
    pub fn with_rotary(mut self, rotary: Rotary) -> Result<KvCache> {
        self.device.expect_same(&rotary.rotation().table.device())?;
        if let Some((b, sequence)) = self.sequences.iter().enumerate().find(|(_, sequence)| sequence.len > 0) {
            return Err(value_error!(
                "batch entry {b} holds {} keys that were not rotated; give the rotary to an empty cache",
                sequence.len
            ));
        }
        if rotary.dim() > self.config.dim_k {
            return Err(shape_error!(
                "the rotary dimension {} is more than dim_k = {} of the cache",
                rotary.dim(),
                self.config.dim_k
            ));
        }
        self.rotary = Some(rotary);
        Ok(self)
    }

    /// X with its first `counts[b]` tokens, which start at position `starts[b]`, rotated if the cache has a rotary.
    fn rotated(&self, recording: &mut Recording, x: &Tensor, starts: &[usize], counts: &[usize]) -> Result<Tensor> {
        let Some(rotary) = &self.rotary else { return Ok(x.clone()) };
        let len = x.as_four_axes("x")?.shape()[2];
        // Unused tokens at the end get the position of the last used one.
        let places = |(&start, &count): (&usize, &usize)| {
            let last = (start + count).saturating_sub(1);
            (0..len).map(move |i| (start + i).min(last))
        };
        let positions = starts.iter().zip(counts).flat_map(places).collect();
        rotary.record(recording, x, &TokenPositions::Given(positions))
    }

    /// Empties the cache.
    pub fn clear(&mut self) {
        self.sequences.fill(Sequence::default());
        self.is_ring = false;
    }

    /// Removes the last `tokens` tokens of every sequence. With a window, the keys that the next query needs must still
    /// be held, so after old keys were dropped, not every token can be removed.
    pub fn rollback(&mut self, tokens: usize) -> Result<()> {
        self.rollback_lengths(&vec![tokens; self.config.batch])
    }

    /// Like [`KvCache::rollback`], with a number of tokens per batch entry. On an error nothing is removed.
    pub fn rollback_lengths(&mut self, tokens: &[usize]) -> Result<()> {
        self.expect_order("a rollback")?;
        expect_per_batch("the list of tokens to take back", tokens.len(), self.config.batch)?;
        for (b, (&tokens, sequence)) in tokens.iter().zip(&self.sequences).enumerate() {
            let Sequence { first, len } = *sequence;
            let needed = if first == 0 { 0 } else { self.config.window.unwrap_or(0) };
            let most = len.saturating_sub(needed);
            if tokens > most {
                let reason = match first {
                    0 => format!("it holds {len}"),
                    _ => format!(
                        "it holds positions {first} to {}, and the next query needs {needed} keys before it",
                        first + len - 1
                    ),
                };
                return Err(value_error!("batch entry {b} cannot roll back {tokens} tokens, at most {most}: {reason}"));
            }
        }
        for (&tokens, sequence) in tokens.iter().zip(&mut self.sequences) {
            sequence.len -= tokens;
        }
        Ok(())
    }

    /// Appends K `[batch, heads_kv, n, dim_k]` and V `[batch, heads_kv, n, dim_v]`, any strides. An error changes
    /// nothing.
    ///
    /// # Errors
    ///
    /// - [`Shape`](crate::Error::Shape): K or V does not fit the cache or each other.
    /// - [`Value`](crate::Error::Value): the tokens do not fit the capacity, a circular [`KvCache::write`] wrapped
    ///   around, the rotary table ends before a position, or K or V is bool or a view of the cache itself.
    /// - [`Device`](crate::Error::Device): K or V is on another device.
    /// - [`DeviceLost`](crate::Error::DeviceLost), [`OutOfMemory`](crate::Error::OutOfMemory),
    ///   [`Gpu`](crate::Error::Gpu): the driver failed.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<()> {
        wait_for(self.run_append(k, v, None))
    }

    /// Like [`KvCache::append`], but appends only the first `lengths[b]` of the `n` tokens of batch entry `b`.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn append_lengths(&mut self, k: &Tensor, v: &Tensor, lengths: &[usize]) -> Result<()> {
        wait_for(self.run_append(k, v, Some(lengths)))
    }

    /// Like [`KvCache::append`], without blocking; the CPU backend copies before this returns.
    pub async fn append_async(&mut self, k: &Tensor, v: &Tensor) -> Result<()> {
        self.run_append(k, v, None).await
    }

    /// Like [`KvCache::append_lengths`], without blocking; the CPU backend copies before this returns.
    pub async fn append_lengths_async(&mut self, k: &Tensor, v: &Tensor, lengths: &[usize]) -> Result<()> {
        self.run_append(k, v, Some(lengths)).await
    }

    async fn run_append(&mut self, k: &Tensor, v: &Tensor, lengths: Option<&[usize]>) -> Result<()> {
        let appended = Recording::for_step(&self.device).submit(|to| self.record_append(to, k, v, lengths)).await?;
        self.commit(appended);
        Ok(())
    }

    /// Attention of Q `[batch, heads_q, len_q, dim_k]`, the last `len_q` positions of every sequence, over the keys and
    /// values held.
    ///
    /// Query `i` is at position `positions()[b] − len_q + i`. By default it sees the keys up to its own. This causal
    /// rule is the cache's; `attention` can replace it:
    ///
    /// | `attention` has | queries see |
    /// |---|---|
    /// | none of these | the keys up to their own position |
    /// | a [mask](Attention::mask) | what the mask keeps; with [`Attention::causal`] no more than that too |
    /// | [`Attention::not_causal`] | every key held, as for image tokens in a prefix or keys of an encoder |
    /// | [`Attention::causal`] | keys up to the position that its [`Align`](crate::Align) gives them, counted in keys held; `Align::BottomRight` is the cache's own rule |
    /// | [`Attention::align`], or a window with a right side | no causal rule, as in [`Attention::forward`] |
    ///
    /// Several queries with a [bias](Attention::bias) and none of these are an error, because a bias may be a mask:
    /// call `causal` or `not_causal`. Key padding and key lengths (at most as many as keys are held) hide keys and do
    /// not change the rule. The cache's window, that of `attention`, positional biases and the cache's rotary always
    /// use the positions of the queries. An `align` that gives queries other positions is refused if a rotary rotates
    /// them, or once the window has dropped keys.
    ///
    /// Everything else works as in [`Attention::forward`] over [`KvCache::keys`] and [`KvCache::values`]; masks and
    /// biases are as wide as those are long. If no rule depends on position, there may be more queries than keys.
    ///
    /// # Errors
    ///
    /// Those of [`Attention::forward`], and [`Value`](crate::Error::Value) if `attention` has a rotary of its own, a
    /// rule needs positions that are no longer held or that a circular [`KvCache::write`] put out of order, or the
    /// causal rule is ambiguous as described above.
    ///
    /// ```
    /// use wgpu_attention::{Attention, Device, KvCache, KvCacheConfig, Tensor};
    ///
    /// # fn main() -> wgpu_attention::Result<()> {
    /// let device = Device::new()?;
    /// let mut cache = KvCache::new(&device, KvCacheConfig::new(1, 2, 128, 16))?;
    /// let patches = Tensor::from_slice(&device, &[1, 2, 9, 16], &[0.1f32; 288])?; // of an image: they see each other
    /// cache.step(&Attention::new().not_causal(), &patches, &patches, &patches)?;
    /// let token = Tensor::from_slice(&device, &[1, 2, 1, 16], &[0.1f32; 32])?;
    /// cache.step(&Attention::new(), &token, &token, &token)?; // the text behind it is causal again
    /// # Ok(())
    /// # }
    /// ```
    #[cfg(not(target_arch = "wasm32"))]
    pub fn attend(&self, attention: &Attention, q: &Tensor) -> Result<Attended> {
        wait_for(self.run_attend(attention, q, None))
    }

    /// Like [`KvCache::attend`], but only the first `lengths[b]` queries of batch entry `b` count, and they are its
    /// last positions. The results of the others are meaningless.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn attend_lengths(&self, attention: &Attention, q: &Tensor, lengths: &[usize]) -> Result<Attended> {
        wait_for(self.run_attend(attention, q, Some(lengths)))
    }

    /// Like [`KvCache::attend`], without blocking; the CPU backend computes before this returns.
    pub async fn attend_async(&self, attention: &Attention, q: &Tensor) -> Result<Attended> {
        self.run_attend(attention, q, None).await
    }

    /// Like [`KvCache::attend_lengths`], without blocking; the CPU backend computes before this returns.
    pub async fn attend_lengths_async(&self, attention: &Attention, q: &Tensor, lengths: &[usize]) -> Result<Attended> {
        self.run_attend(attention, q, Some(lengths)).await
    }

    async fn run_attend(&self, attention: &Attention, q: &Tensor, lengths: Option<&[usize]>) -> Result<Attended> {
        let counts = self.counts(lengths, "Q", q)?;
        let held = Appended { sequences: self.sequences.clone(), moved: None, counts };
        let recording = Recording::for_step(&self.device);
        recording.submit(|to| self.record_attend(to, attention, q, &held, None)).await
    }

    /// [`KvCache::append`] and [`KvCache::attend`] in one submit, for Q, K and V of the same new tokens. Causal unless
    /// `attention` says what queries see; see [`KvCache::attend`].
    ///
    /// # Errors
    ///
    /// Those of [`KvCache::append`] and [`KvCache::attend`], and [`Shape`](crate::Error::Shape) if Q and K have
    /// different lengths. An error changes nothing.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn step(&mut self, attention: &Attention, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Attended> {
        wait_for(self.run_step(attention, [q, k, v], None))
    }

    /// Like [`KvCache::step`], for only the first `lengths[b]` tokens of batch entry `b`.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn step_lengths(
        &mut self,
        attention: &Attention,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        lengths: &[usize],
    ) -> Result<Attended> {
        wait_for(self.run_step(attention, [q, k, v], Some(lengths)))
    }

    /// Like [`KvCache::step`], without blocking; the CPU backend computes before this returns.
    pub async fn step_async(&mut self, attention: &Attention, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Attended> {
        self.run_step(attention, [q, k, v], None).await
    }

    /// Like [`KvCache::step_lengths`], without blocking; the CPU backend computes before this returns.
    pub async fn step_lengths_async(
        &mut self,
        attention: &Attention,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        lengths: &[usize],
    ) -> Result<Attended> {
        self.run_step(attention, [q, k, v], Some(lengths)).await
    }

    async fn run_step(
        &mut self,
        attention: &Attention,
        operands: [&Tensor; 3],
        lengths: Option<&[usize]>,
    ) -> Result<Attended> {
        let recording = Recording::for_step(&self.device);
        let step = recording.submit(|to| self.record_step(to, attention, operands, lengths, None));
        let (appended, attended) = step.await?;
        self.commit(appended);
        Ok(attended)
    }

    /// Records [`KvCache::step`] (or, with lengths, [`KvCache::step_lengths`]) into the caller's encoder. Nothing is
    /// submitted, and nothing waits. `output`, if given, is the tensor to write.
    ///
    /// The cache counts the tokens as appended at once. Submit the encoder before any cache call that submits its own
    /// work. Operands, results and the cache may be dropped before that.
    #[allow(clippy::too_many_arguments, reason = "Attention::encode and the lengths")]
    pub fn encode(
        &mut self,
        gpu: &Gpu,
        encoder: &mut wgpu::CommandEncoder,
        attention: &Attention,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        lengths: Option<&[usize]>,
        output: Option<&Tensor>,
    ) -> Result<Attended> {
        let recording = Recording::for_encoder(gpu, encoder, &self.device)?;
        let record = |to: &mut Recording| self.record_step(to, attention, [q, k, v], lengths, output);
        let (appended, attended) = recording.encode(encoder, record)?;
        self.commit(appended);
        Ok(attended)
    }

    /// Overwrites held rows, or writes directly after them (ONNX's TensorScatter): token `i` of batch entry `b` goes to
    /// row `starts[b] + i`. A sequence then ends at its last written row, or keeps its length if that is longer.
    ///
    /// After a [`ScatterMode::Circular`] write wrapped around the end, rows are no longer in order of position.
    /// [`KvCache::attend`] then works only if no rule needs that order (with the caller's own masks, or
    /// [`Attention::not_causal`]). [`KvCache::clear`] resets the cache.
    ///
    /// # Errors
    ///
    /// - [`Value`](crate::Error::Value): the cache has a window, `starts` leaves a gap, the tokens do not fit the
    ///   capacity, a circular write would wrap around in a cache with a rotary, the rotary table ends before a
    ///   position, or K or V is bool or a view of the cache itself.
    /// - [`Shape`](crate::Error::Shape): K, V or `starts` does not fit the cache.
    /// - [`Device`](crate::Error::Device): K or V is on another device.
    /// - [`DeviceLost`](crate::Error::DeviceLost), [`OutOfMemory`](crate::Error::OutOfMemory),
    ///   [`Gpu`](crate::Error::Gpu): the driver failed.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn write(&mut self, starts: &[usize], k: &Tensor, v: &Tensor, mode: ScatterMode) -> Result<()> {
        wait_for(self.write_async(starts, k, v, mode))
    }

    /// Like [`KvCache::write`], without blocking.
    pub async fn write_async(&mut self, starts: &[usize], k: &Tensor, v: &Tensor, mode: ScatterMode) -> Result<()> {
        let capacity = self.config.capacity;
        if self.config.window.is_some() {
            return Err(value_error!(
                "a cache with a window moves its rows itself: append, or make one without a window"
            ));
        }
        let [k, v] = self.operands(k, v)?;
        expect_per_batch("the list of first rows", starts.len(), self.config.batch)?;
        let count = k.shape()[2];
        let mut places = Vec::with_capacity(starts.len());
        let mut sequences = self.sequences.clone();
        let mut is_ring = self.is_ring;
        for (b, (&to, sequence)) in starts.iter().zip(&mut sequences).enumerate() {
            if to > sequence.len {
                return Err(value_error!(
                    "starts[{b}] = {to} leaves a gap: batch entry {b} holds {} keys, and at most that may come before",
                    sequence.len
                ));
            }
            let behind = (to + count).saturating_sub(capacity);
            let most = if mode == ScatterMode::Linear { capacity - to } else { capacity };
            if count > most {
                return Err(value_error!(
                    "cache overflow: {count} tokens from row {to} on of batch entry {b} do not fit capacity = {capacity}"
                ));
            }
            is_ring |= behind > 0;
            // Row `capacity` is row 0.
            places.push(Place { from: 0, to: if to == capacity { 0 } else { to }, count });
            sequence.len = sequence.len.max((to + count).min(capacity));
        }
        if is_ring && self.rotary.is_some() {
            return Err(value_error!(
                "a circular write around the end of a cache with rotary positions: row 0 has one position already"
            ));
        }
        let recording = Recording::for_step(&self.device);
        let record = |to: &mut Recording| {
            let k = self.rotated(to, &k, starts, &vec![count; starts.len()])?;
            [&k, &v].into_iter().zip(&mut self.rows).try_for_each(|(source, rows)| to.scatter(source, rows, &places))
        };
        recording.submit(record).await?;
        (self.sequences, self.is_ring) = (sequences, is_ring);
        Ok(())
    }

    /// Makes an append take effect.
    pub(crate) fn commit(&mut self, appended: Appended) {
        self.sequences = appended.sequences;
        if let Some(moved) = appended.moved {
            self.rows = moved;
        }
    }

    fn expect_order(&self, what: &str) -> Result<()> {
        match self.is_ring {
            false => Ok(()),
            true => Err(value_error!(
                "a circular write wrapped around the end, so rows are no longer in order of position, which {what} \
                 needs; clear the cache, or attend with a mask of your own or not_causal()"
            )),
        }
    }

    /// Number of tokens per batch entry of an operand `[.., n, dim]`.
    fn counts(&self, lengths: Option<&[usize]>, name: &str, operand: &Tensor) -> Result<Vec<usize>> {
        let n = operand.as_four_axes(name)?.shape()[2];
        let Some(lengths) = lengths else { return Ok(vec![n; self.config.batch]) };
        expect_per_batch("the list of lengths", lengths.len(), self.config.batch)?;
        match lengths.iter().enumerate().find(|&(_, &len)| len > n) {
            Some((b, len)) => Err(shape_error!("lengths[{b}] = {len} is more than the {n} tokens of {name}")),
            None => Ok(lengths.to_vec()),
        }
    }

    /// K and V with four axes that fit the cache.
    fn operands(&self, k: &Tensor, v: &Tensor) -> Result<[Tensor; 2]> {
        self.device.expect_same(&common_device(k, [("V", v)])?)?;
        let KvCacheConfig { batch, heads_kv, dim_k, dim_v, .. } = self.config;
        let four = |name: &str, tensor: &Tensor, dim: usize| -> Result<Tensor> {
            tensor.expect_float(name)?;
            let four = tensor.as_four_axes(name)?;
            match *four.shape() {
                [b, h, _, d] if [b, h, d] == [batch, heads_kv, dim] => Ok(four),
                _ => Err(shape_error!(
                    "{name} {:?} does not fit the cache: [batch, heads_kv, n, dim] = [{batch}, {heads_kv}, n, {dim}] \
                     is needed",
                    tensor.shape()
                )),
            }
        };
        let (k, v) = (four("K", k, dim_k)?, four("V", v, dim_v)?);
        if k.shape()[2] != v.shape()[2] {
            return Err(shape_error!("K {:?} and V {:?} have different lengths", k.shape(), v.shape()));
        }
        Ok([k, v])
    }

    fn record_append(
        &mut self,
        recording: &mut Recording,
        k: &Tensor,
        v: &Tensor,
        lengths: Option<&[usize]>,
    ) -> Result<Appended> {
        self.expect_order("an append")?;
        let [k, v] = self.operands(k, v)?;
        let counts = self.counts(lengths, "K", &k)?;
        let operands = [self.rotated(recording, &k, &self.positions(), &counts)?, v];
        let capacity = self.config.capacity;
        let mut sequences = self.sequences.clone();
        let mut kept = Vec::with_capacity(counts.len());
        for (b, (&count, sequence)) in counts.iter().zip(&mut sequences).enumerate() {
            let len = sequence.len;
            let mut drop = 0;
            if count > capacity - len {
                let Some(window) = self.config.window else {
                    return Err(value_error!(
                        "cache overflow: batch entry {b} holds {len} keys, {count} more do not fit capacity = {capacity}"
                    ));
                };
                if count > capacity - window {
                    return Err(value_error!(
                        "cache overflow: {count} tokens at once beside window = {window} do not fit capacity = \
                         {capacity}; append at most {}",
                        capacity - window
                    ));
                }
                let keep = (window + (capacity - window) / 2).min(capacity - count);
                drop = len.saturating_sub(keep);
            }
            *sequence = Sequence { first: sequence.first + drop, len: len - drop };
            kept.push(Place { from: drop, to: 0, count: len - drop });
        }
        let mut moved = None;
        if kept.iter().any(|place| place.from > 0) {
            // Into new buffers: within one buffer the ranges may overlap, and a failing call must change nothing.
            let mut other = self.config.allocate(&self.device)?;
            for (from, to) in self.rows.iter().zip(&mut other) {
                recording.scatter(from, to, &kept)?;
            }
            moved = Some(other);
        }
        let places: Vec<Place> =
            counts.iter().zip(&sequences).map(|(&count, at)| Place { from: 0, to: at.len, count }).collect();
        for (source, rows) in operands.iter().zip(moved.as_mut().unwrap_or(&mut self.rows)) {
            recording.scatter(source, rows, &places)?;
        }
        for (count, sequence) in counts.iter().zip(&mut sequences) {
            sequence.len += count;
        }
        Ok(Appended { sequences, moved, counts })
    }

    pub(crate) fn record_step(
        &mut self,
        recording: &mut Recording,
        attention: &Attention,
        [q, k, v]: [&Tensor; 3],
        lengths: Option<&[usize]>,
        output: Option<&Tensor>,
    ) -> Result<(Appended, Attended)> {
        if q.as_four_axes("Q")?.shape()[2] != k.as_four_axes("K")?.shape()[2] {
            return Err(shape_error!(
                "Q {:?} and K {:?} of a step have different lengths; call append and attend separately",
                q.shape(),
                k.shape()
            ));
        }
        let appended = self.record_append(recording, k, v, lengths)?;
        let attended = self.record_attend(recording, attention, q, &appended, output)?;
        Ok((appended, attended))
    }

    /// Attends with Q, whose first `counts[b]` queries are the last positions of each sequence.
    fn record_attend(
        &self,
        recording: &mut Recording,
        attention: &Attention,
        q: &Tensor,
        held: &Appended,
        output: Option<&Tensor>,
    ) -> Result<Attended> {
        let Appended { sequences, moved, counts } = held;
        if attention.rotary.is_some() {
            return Err(value_error!(
                "a cache rotates keys when they are appended: give it the rotary (KvCache::with_rotary), not Attention"
            ));
        }
        let (needs_places, says_places) = attention.needs_places(counts, self.config.window)?;
        if needs_places {
            self.expect_order("attention by position")?;
        }
        if needs_places && !says_places || self.rotary.is_some() {
            self.expect_places(attention, sequences, counts)?;
        }
        let [k, v] = moved.as_ref().unwrap_or(&self.rows);
        let (k, v) = (view(k, sequences, self.config.dim_k)?, view(v, sequences, self.config.dim_v)?);
        self.device.expect_same(&attention.device(q, &k, &v)?)?;
        let held = Held { sequences, counts, window: self.config.window, rotates: self.rotary.is_some() };
        let attention = attention.behind(&held)?;
        // Only a cache with a rotary uses them, and it has checked them.
        let starts: Vec<usize> =
            sequences.iter().zip(counts).map(|(at, &count)| (at.first + at.len).saturating_sub(count)).collect();
        let q = &self.rotated(recording, q, &starts, counts)?;
        attention.record(recording, q, &k, &v, output)
    }

    /// An error unless the last `counts[b]` positions and the window before each are held.
    fn expect_places(&self, attention: &Attention, sequences: &[Sequence], counts: &[usize]) -> Result<()> {
        let window = attention.positions.window_left.into_iter().chain(self.config.window).min();
        for (b, (&count, sequence)) in counts.iter().zip(sequences).enumerate() {
            let Sequence { first, len } = *sequence;
            // Keys are dropped only by a window.
            let needed = count + if first == 0 { 0 } else { window.unwrap_or(0) };
            if needed > len {
                return Err(value_error!(
                    "the last {count} positions of batch entry {b} need {needed} keys, but it holds {len}{}; queries that \
                     are no tokens of the cache, as those of cross-attention, take not_causal() and no window",
                    if first == 0 { String::new() } else { format!(" (positions from {first} on)") }
                ));
            }
        }
        Ok(())
    }
}

/// The rows in use of all sequences, without their padding.
fn view(rows: &Tensor, sequences: &[Sequence], dim: usize) -> Result<Tensor> {
    let longest = sequences.iter().map(|sequence| sequence.len).max().unwrap_or(0);
    rows.narrow(2, 0, longest)?.narrow(3, 0, dim)
}
