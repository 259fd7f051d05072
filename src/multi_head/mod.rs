//! Multi-head attention with its projections: one layer for PyTorch's `nn.MultiheadAttention`, Keras's
//! `MultiHeadAttention` and the attention of well-known models.

mod config;
mod load;
mod names;

pub use config::{MultiHeadConfig, NormKind, NormSpan, QueryKeyNorm};
pub use load::LoadOptions;
pub use names::Names;

use rand::{Rng, RngExt, SeedableRng};

use crate::attention::Attention;
use crate::cache::{Appended, KvCache};
use crate::call::Attended;
use crate::device::Device;
use crate::error::{Result, shape_error, value_error};
use crate::gpu::{EncodeSlices, Gpu, Profile};
use crate::lower::Recording;
use crate::tensor::{Tensor, common_device};
use crate::wait::apart;
#[cfg(not(target_arch = "wasm32"))]
use crate::wait::wait_for;

/// A projection on the host, row-major; the weight is `[out, in]`.
struct Projection {
    weight: Vec<f32>,
    bias: Option<Vec<f32>>,
}

/// Parameters on the host, with the lengths given by the layer's config.
struct Parameters {
    q: Projection,
    k: Projection,
    v: Projection,
    out: Projection,
    gate: Option<Projection>,
    /// Weights and biases of the norms of queries and keys.
    norms: Option<[Projection; 2]>,
    /// The learned extra key and value.
    bias_kv: Option<[Vec<f32>; 2]>,
}

/// One projection's weight and bias.
#[derive(Clone, Debug)]
struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    /// `shape` is `[out, in]`, or `[width]` for a norm.
    fn upload(device: &Device, shape: &[usize], parameters: &Projection) -> Result<Linear> {
        let bias = parameters.bias.as_ref().map(|bias| Tensor::from_slice(device, &shape[..1], bias));
        Ok(Linear { weight: Tensor::from_slice(device, shape, &parameters.weight)?, bias: bias.transpose()? })
    }

    /// Output rows `start..start + len`.
    fn rows(&self, start: usize, len: usize) -> Result<Linear> {
        Ok(Linear {
            weight: self.weight.narrow(0, start, len)?,
            bias: self.bias.as_ref().map(|bias| bias.narrow(0, start, len)).transpose()?,
        })
    }
}

/// `Concat(head₁ … headₕ)·Wₒ + bₒ` with `headᵢ = Attention(Q·W_qᵢ, K·W_kᵢ, V·W_vᵢ)`
/// (Vaswani et al. 2017, section 3.2.2). `forward` computes both self- and cross-attention.
#[derive(Clone, Debug)]
pub struct MultiHeadAttention {
    config: MultiHeadConfig,
    device: Device,
    /// W_gate (if there is one), W_q, W_k and W_v stacked, if all read the same width.
    packed: Option<Linear>,
    gate: Option<Linear>,
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    /// The norms of queries and keys.
    norms: Option<[Linear; 2]>,
    /// The learned extra key and value, `[k_width]` and `[v_width]`.
    bias_kv: Option<(Tensor, Tensor)>,
}

/// What [`MultiHeadAttention::forward`] returns.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct MultiHeadOutput {
    /// `[batch, len_q, output_dim]`, or `[len_q, batch, output_dim]` when not batch first.
    pub output: Tensor,
    /// `[batch, heads, len_q, len_k]` or, averaged, `[batch, len_q, len_k]`, if requested. `len_k` includes the keys
    /// that `add_bias_kv` and `add_zero_attn` append.
    pub weights: Option<Tensor>,
    /// `[batch, heads, len_q]`, if requested with [`Attention::lse`].
    pub lse: Option<Tensor>,
    /// `[batch, heads, len_q, len_k]`, if requested with [`Attention::scores`].
    pub scores: Option<Tensor>,
}

/// The operands of a layer's attention, `[batch, heads, len, dim]`, and its gate `[batch, len, heads · dim]`.
struct Projected {
    gate: Option<Tensor>,
    q: Tensor,
    k: Tensor,
    v: Tensor,
}

/// The projections of a layer, as tensors on its device; see [`MultiHeadAttention::from_projections`].
#[derive(Clone, Debug)]
#[must_use]
pub struct Projections {
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
}

impl Projections {
    /// Weights `[out, in]`, as in `nn.Linear`: queries `[heads · head_dim, embed_dim]`, keys
    /// `[heads_kv · head_dim, kdim]`, values `[heads_kv · value_head_dim, vdim]`, output
    /// `[output_dim, heads · value_head_dim]`.
    pub fn new(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Projections {
        let [q, k, v, out] = [q, k, v, out].map(|weight| Linear { weight, bias: None });
        Projections { q, k, v, out }
    }
    /// Biases of queries, keys and values, each with one entry per row of its weight.
    pub fn biases(mut self, q: Tensor, k: Tensor, v: Tensor) -> Self {
        (self.q.bias, self.k.bias, self.v.bias) = (Some(q), Some(k), Some(v));
        self
    }
    /// The bias of the output, `[output_dim]`.
    pub fn out_bias(mut self, bias: Tensor) -> Self {
        self.out.bias = Some(bias);
        self
    }
}

/// Kernels in the layout of Keras's `MultiHeadAttention` and `GroupedQueryAttention`, row-major.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct KerasKernels<'a> {
    /// `[query_dim, heads, key_dim]`.
    pub query: &'a [f32],
    /// `[key_dim_in, heads_kv, key_dim]`.
    pub key: &'a [f32],
    /// `[value_dim_in, heads_kv, value_dim]`.
    pub value: &'a [f32],
    /// `[heads, value_dim, output_dim]`.
    pub output: &'a [f32],
    /// Biases `[heads, key_dim]`, `[heads_kv, key_dim]`, `[heads_kv, value_dim]`, `[output_dim]`.
    pub biases: Option<[&'a [f32]; 4]>,
    /// The kernel of `use_gate`: `[query_dim, heads, value_dim]`.
    pub gate: Option<&'a [f32]>,
    /// `[heads, value_dim]`, if there are a gate and biases.
    pub gate_bias: Option<&'a [f32]>,
}

impl<'a> KerasKernels<'a> {
    /// Without biases and without a gate.
    pub fn new(query: &'a [f32], key: &'a [f32], value: &'a [f32], output: &'a [f32]) -> KerasKernels<'a> {
        KerasKernels { query, key, value, output, ..KerasKernels::default() }
    }
    /// The biases of query, key, value and output.
    pub fn biases(mut self, biases: [&'a [f32]; 4]) -> Self {
        self.biases = Some(biases);
        self
    }
    /// The gate's kernel and, for a layer with biases, its bias.
    pub fn gate(mut self, kernel: &'a [f32], bias: Option<&'a [f32]>) -> Self {
        (self.gate, self.gate_bias) = (Some(kernel), bias);
        self
    }
}

impl MultiHeadAttention {
    /// A new layer, initialised from `seed` like PyTorch's: W_q, W_k and W_v Xavier-uniform (Glorot and Bengio 2010;
    /// over the packed matrix if there is one), W_o uniform in `±1/√in`, biases 0, the extra key and value
    /// Xavier-normal. A gate is Xavier-uniform on its own as in Keras, and the weights of norms are 1.
    ///
    /// # Errors
    ///
    /// - [`Value`](crate::Error::Value): the config breaks a rule.
    /// - [`Overflow`](crate::Error::Overflow), [`TooLarge`](crate::Error::TooLarge): the weights do not fit.
    /// - [`DeviceLost`](crate::Error::DeviceLost), [`OutOfMemory`](crate::Error::OutOfMemory),
    ///   [`Gpu`](crate::Error::Gpu): the driver failed.
    pub fn new(device: impl Into<Device>, config: MultiHeadConfig, seed: u64) -> Result<Self> {
        config.check()?;
        let mut rng = rand_pcg::Pcg64::seed_from_u64(seed);
        let (q, k, v, joined) = (config.q_width()?, config.k_width()?, config.v_width()?, config.joined_width()?);
        let packed_rows = config.is_packed().then_some(q + k + v);
        let zeros = |biased: bool, n: usize| biased.then(|| vec![0.0; n]);
        let xavier = |rng: &mut rand_pcg::Pcg64, rows: usize, columns: usize, fan_out: usize| {
            let bound = (6.0 / (fan_out + columns) as f64).sqrt() as f32;
            Projection { weight: uniform(rng, rows * columns, bound), bias: zeros(config.bias, rows) }
        };
        let mut input = |rows, columns| xavier(&mut rng, rows, columns, packed_rows.unwrap_or(rows));
        let (w_q, w_k, w_v) = (input(q, config.embed_dim), input(k, config.kdim), input(v, config.vdim));
        let out = Projection {
            weight: uniform(&mut rng, config.output_dim * joined, 1.0 / (joined as f32).sqrt()),
            bias: zeros(config.out_bias, config.output_dim),
        };
        // xavier_normal_ of a [1, 1, width] tensor: fan_in = fan_out = width.
        let mut row = |width: usize| normal(&mut rng, width, (1.0 / width as f64).sqrt() as f32);
        let bias_kv = config.add_bias_kv.then(|| [row(k), row(v)]);
        let gate = config.gate.then(|| xavier(&mut rng, joined, config.embed_dim, joined));
        let norms = match config.norm {
            None => None,
            Some(norm) => Some(
                config.norm_widths(norm.span)?.map(|n| Projection { weight: vec![1.0; n], bias: zeros(norm.bias, n) }),
            ),
        };
        let parameters = Parameters { q: w_q, k: w_k, v: w_v, out, gate, norms, bias_kv };
        Self::from_parameters(device.into(), config, &parameters)
    }

    fn from_parameters(device: Device, config: MultiHeadConfig, p: &Parameters) -> Result<Self> {
        config.check()?;
        let (rows_q, rows_k, rows_v) = (config.q_width()?, config.k_width()?, config.v_width()?);
        let joined = config.joined_width()?;
        let rows_gate = if config.gate { joined } else { 0 };
        let upload = |rows: usize, columns: usize, p: &Projection| Linear::upload(&device, &[rows, columns], p);
        let packed = config
            .is_packed()
            .then(|| {
                let parts: Vec<&Projection> = p.gate.iter().chain([&p.q, &p.k, &p.v]).collect();
                let weight = parts.iter().flat_map(|part| part.weight.iter().copied()).collect();
                let bias = parts.iter().flat_map(|part| part.bias.iter().flatten().copied()).collect();
                let all = Projection { weight, bias: config.bias.then_some(bias) };
                upload(rows_gate + rows_q + rows_k + rows_v, config.embed_dim, &all)
            })
            .transpose()?;
        let (gate, q, k, v) = match &packed {
            Some(packed) => (
                config.gate.then(|| packed.rows(0, rows_gate)).transpose()?,
                packed.rows(rows_gate, rows_q)?,
                packed.rows(rows_gate + rows_q, rows_k)?,
                packed.rows(rows_gate + rows_q + rows_k, rows_v)?,
            ),
            None => (
                p.gate.as_ref().map(|gate| upload(rows_gate, config.embed_dim, gate)).transpose()?,
                upload(rows_q, config.embed_dim, &p.q)?,
                upload(rows_k, config.kdim, &p.k)?,
                upload(rows_v, config.vdim, &p.v)?,
            ),
        };
        let out = upload(config.output_dim, joined, &p.out)?;
        let norm = |p: &Projection| Linear::upload(&device, &[p.weight.len()], p);
        let norms = p.norms.as_ref().map(|[q, k]| Ok::<_, crate::Error>([norm(q)?, norm(k)?])).transpose()?;
        let bias_kv = (p.bias_kv.as_ref())
            .map(|[key, value]| -> Result<_> {
                Ok((Tensor::from_slice(&device, &[rows_k], key)?, Tensor::from_slice(&device, &[rows_v], value)?))
            })
            .transpose()?;
        Ok(MultiHeadAttention { config, device, packed, gate, q, k, v, out, norms, bias_kv })
    }

    /// A layer from Keras-shaped kernels. `config` gives the widths ([`MultiHeadConfig::with_head_dims`] for Keras's
    /// `key_dim` and `value_dim`, `heads_kv`, `output_dim`, `gate`); its `bias`, `out_bias` and `gate` must match the
    /// given kernels.
    pub fn from_keras(device: impl Into<Device>, config: MultiHeadConfig, kernels: KerasKernels<'_>) -> Result<Self> {
        config.check()?;
        if config.add_bias_kv || config.norm.is_some() {
            return Err(value_error!("Keras layers have no add_bias_kv and no norms of queries and keys"));
        }
        let biased = kernels.biases.is_some();
        for (name, wanted, what, given) in [
            ("bias", config.bias, "biases", biased),
            ("out_bias", config.out_bias, "biases", biased),
            ("gate", config.gate, "gate", kernels.gate.is_some()),
            ("gate && config.bias", config.gate && config.bias, "gate_bias", kernels.gate_bias.is_some()),
        ] {
            if wanted != given {
                return Err(value_error!(
                    "config.{name} is {wanted}, but the kernels' {what} {} given",
                    if given { "is" } else { "is not" }
                ));
            }
        }
        let (q, k, v, joined) = (config.q_width()?, config.k_width()?, config.v_width()?, config.joined_width()?);
        // [in, heads · dim] in Keras, [heads · dim, in] here.
        let projection = |name: &str, kernel: &[f32], rows: usize, columns: usize, bias: Option<&[f32]>| {
            if kernel.len() != rows * columns {
                return Err(shape_error!(
                    "the {name} kernel has {} values; {rows} × {columns} are expected",
                    kernel.len()
                ));
            }
            if let Some(bias) = bias
                && bias.len() != columns
            {
                return Err(shape_error!("the {name} bias has {} values; {columns} are expected", bias.len()));
            }
            Ok(Projection { weight: transposed(kernel, rows, columns), bias: bias.map(<[f32]>::to_vec) })
        };
        let bias = |n: usize| kernels.biases.map(|biases| biases[n]);
        let gate = kernels.gate.map(|gate| projection("gate", gate, config.embed_dim, joined, kernels.gate_bias));
        let parameters = Parameters {
            q: projection("query", kernels.query, config.embed_dim, q, bias(0))?,
            k: projection("key", kernels.key, config.kdim, k, bias(1))?,
            v: projection("value", kernels.value, config.vdim, v, bias(2))?,
            out: projection("output", kernels.output, joined, config.output_dim, bias(3))?,
            gate: gate.transpose()?,
            norms: None,
            bias_kv: None,
        };
        Self::from_parameters(device.into(), config, &parameters)
    }

    /// A layer over weights that are already on the device, with heads of any width; nothing is copied. `config` gives
    /// the widths ([`MultiHeadConfig::with_head_dims`]); its `bias` and `out_bias` must match the given biases. Norms,
    /// a gate and `add_bias_kv` can only be read from a [`StateDict`](crate::StateDict).
    ///
    /// # Errors
    ///
    /// - [`Shape`](crate::Error::Shape): a weight or bias does not have the shape that `config` requires.
    /// - [`Value`](crate::Error::Value): `config` breaks a rule, has a norm, a gate or `add_bias_kv`, or does not match
    ///   the given biases; or a tensor is bool.
    /// - [`Device`](crate::Error::Device): the tensors are on different devices.
    /// - [`Overflow`](crate::Error::Overflow): a width does not fit in 64 bits.
    pub fn from_projections(config: MultiHeadConfig, projections: Projections) -> Result<Self> {
        config.check()?;
        if config.norm.is_some() || config.gate || config.add_bias_kv {
            return Err(value_error!("norms, a gate and add_bias_kv are read by from_state_dict only"));
        }
        let Projections { q, k, v, out } = projections;
        let joined = config.joined_width()?;
        let device = q.weight.device();
        for (name, linear, shape, biased) in [
            ("query", &q, [config.q_width()?, config.embed_dim], config.bias),
            ("key", &k, [config.k_width()?, config.kdim], config.bias),
            ("value", &v, [config.v_width()?, config.vdim], config.bias),
            ("output", &out, [config.output_dim, joined], config.out_bias),
        ] {
            if linear.weight.shape() != shape {
                return Err(shape_error!("the {name} weight {:?} must be {shape:?}", linear.weight.shape()));
            }
            if linear.bias.is_some() != biased {
                let has = if linear.bias.is_some() { "has" } else { "lacks" };
                return Err(value_error!("the {name} projection {has} a bias, but the config says {biased}"));
            }
            if let Some(bias) = linear.bias.as_ref().filter(|bias| bias.shape() != &shape[..1]) {
                return Err(shape_error!("the {name} bias {:?} must be {:?}", bias.shape(), &shape[..1]));
            }
            for tensor in [&linear.weight].into_iter().chain(&linear.bias) {
                tensor.expect_float(name)?;
                device.expect_same(&tensor.device())?;
            }
        }
        let (packed, gate, norms, bias_kv) = (None, None, None, None);
        Ok(MultiHeadAttention { config, device, packed, gate, q, k, v, out, norms, bias_kv })
    }

    /// The layer's shape.
    pub fn config(&self) -> &MultiHeadConfig {
        &self.config
    }
    /// Number of learned parameters in the layer.
    pub fn parameter_count(&self) -> usize {
        self.config.parameter_count().expect("checked when the layer was made")
    }
    /// Whether to append a key and value of zeros to every sequence; an error for a layer with norms of queries and
    /// keys.
    pub fn with_zero_attn(mut self, yes: bool) -> Result<Self> {
        self.config.add_zero_attn = yes;
        self.config.check()?;
        Ok(self)
    }
    /// Whether the batch is the first axis (else the second).
    pub fn with_batch_first(mut self, yes: bool) -> Self {
        self.config.batch_first = yes;
        self
    }

    /// Attends from `query` `[batch, len_q, embed_dim]` to `key` `[batch, len_k, kdim]` and `value`
    /// `[batch, len_k, vdim]` (the batch axis is second if not batch first; `[len, dim]` without a
    /// batch). For self-attention, pass the same tensor three times; it is then projected once.
    ///
    /// `attention` gives all other options: masks, biases, [`Attention::key_padding`], the causal rule, which weights
    /// to return. A mask or bias with three axes is always `[batch · heads, len_q, len_k]` as in PyTorch, or
    /// `[1, len_q, len_k]`. One mask per batch entry (Keras's `[batch, len_q, len_k]`) needs four axes,
    /// `[batch, 1, len_q, len_k]`, and so does one per head, `[1, heads, len_q, len_k]`.
    ///
    /// # Errors
    ///
    /// Those of [`Attention::forward`], and [`Shape`](crate::Error::Shape) if an input does not fit the layer's widths,
    /// the inputs do not fit each other, or a mask or bias with three axes has another first axis.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn forward(
        &self,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        attention: &Attention,
    ) -> Result<MultiHeadOutput> {
        wait_for(self.run(query, key, value, attention))
    }

    /// Like [`MultiHeadAttention::forward`], without blocking.
    pub async fn forward_async(
        &self,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        attention: &Attention,
    ) -> Result<MultiHeadOutput> {
        let (layer, [query, key, value]) = (self.clone(), [query, key, value].map(Tensor::clone));
        let attention = attention.clone();
        apart(async move { layer.run(&query, &key, &value, &attention).await }).await
    }

    async fn run(
        &self,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        attention: &Attention,
    ) -> Result<MultiHeadOutput> {
        Recording::new(&self.device).submit(|to| self.record(to, query, key, value, attention)).await
    }

    /// Like [`MultiHeadAttention::forward`], but waits until the work is done and reports which kernels ran, and how
    /// long they took if the adapter has timestamps. Only profiled calls pay for the measurement.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn forward_profiled(
        &self,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        attention: &Attention,
    ) -> Result<(MultiHeadOutput, Profile)> {
        wait_for(self.run_profiled(query, key, value, attention))
    }

    /// Like [`MultiHeadAttention::forward_profiled`], without blocking.
    pub async fn forward_profiled_async(
        &self,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        attention: &Attention,
    ) -> Result<(MultiHeadOutput, Profile)> {
        let (layer, [query, key, value]) = (self.clone(), [query, key, value].map(Tensor::clone));
        let attention = attention.clone();
        apart(async move { layer.run_profiled(&query, &key, &value, &attention).await }).await
    }

    async fn run_profiled(
        &self,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        attention: &Attention,
    ) -> Result<(MultiHeadOutput, Profile)> {
        Recording::new(&self.device).submit_profiled(|to| self.record(to, query, key, value, attention)).await
    }

    /// Self-attention of new tokens X `[batch, n, embed_dim]` over the cache and themselves: projects X, appends keys
    /// and values, and attends, in one submit. Causal unless `attention` says otherwise (see [`KvCache::attend`]), and
    /// rotated if the cache has a rotary ([`KvCache::with_rotary`]).
    ///
    /// # Errors
    ///
    /// Those of [`KvCache::step`], and:
    ///
    /// - [`Value`](crate::Error::Value): the layer has `add_bias_kv` or `add_zero_attn`, or its `kdim` or `vdim` is not
    ///   `embed_dim`.
    /// - [`Shape`](crate::Error::Shape): `x` does not fit the layer, or the layer's heads do not fit the cache.
    /// - [`Device`](crate::Error::Device): the layer, the cache and `x` are not on one device.
    ///
    /// ```
    /// use wgpu_attention::{Attention, Device, KvCache, KvCacheConfig, MultiHeadAttention, MultiHeadConfig, Tensor};
    ///
    /// fn main() -> wgpu_attention::Result<()> {
    ///     let device = Device::new()?;
    ///     let layer = MultiHeadAttention::new(&device, MultiHeadConfig::new(32, 4)?.heads_kv(2), 0)?;
    ///     let mut cache = KvCache::new(&device, KvCacheConfig::new(1, 2, 128, 8))?; // 2 key/value heads of width 8
    ///     let prompt = Tensor::from_slice(&device, &[1, 5, 32], &[0.1f32; 160])?;
    ///     layer.step(&mut cache, &prompt, &Attention::new())?;
    ///     let token = Tensor::from_slice(&device, &[1, 1, 32], &[0.2f32; 32])?;
    ///     let output = layer.step(&mut cache, &token, &Attention::new())?.output;
    ///     assert_eq!((output.shape(), cache.lengths()), (&[1, 1, 32][..], vec![6]));
    ///     Ok(())
    /// }
    /// ```
    #[cfg(not(target_arch = "wasm32"))]
    pub fn step(&self, cache: &mut KvCache, x: &Tensor, attention: &Attention) -> Result<MultiHeadOutput> {
        wait_for(self.run_step(cache, x, attention, None))
    }

    /// Like [`MultiHeadAttention::step`], for only the first `lengths[b]` tokens of batch entry `b`.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn step_lengths(
        &self,
        cache: &mut KvCache,
        x: &Tensor,
        attention: &Attention,
        lengths: &[usize],
    ) -> Result<MultiHeadOutput> {
        wait_for(self.run_step(cache, x, attention, Some(lengths)))
    }

    /// Like [`MultiHeadAttention::step`], without blocking; the CPU backend computes before this returns.
    pub async fn step_async(&self, cache: &mut KvCache, x: &Tensor, attention: &Attention) -> Result<MultiHeadOutput> {
        self.run_step(cache, x, attention, None).await
    }

    /// Like [`MultiHeadAttention::step_lengths`], without blocking; the CPU backend computes before this returns.
    pub async fn step_lengths_async(
        &self,
        cache: &mut KvCache,
        x: &Tensor,
        attention: &Attention,
        lengths: &[usize],
    ) -> Result<MultiHeadOutput> {
        self.run_step(cache, x, attention, Some(lengths)).await
    }

    async fn run_step(
        &self,
        cache: &mut KvCache,
        x: &Tensor,
        attention: &Attention,
        lengths: Option<&[usize]>,
    ) -> Result<MultiHeadOutput> {
        self.device.expect_same(cache.device())?;
        let recording = Recording::for_step(&self.device);
        let recorded = recording.submit(|to| self.record_step(to, cache, x, attention, lengths));
        let (appended, output) = recorded.await?;
        cache.commit(appended);
        Ok(output)
    }

    /// Records [`MultiHeadAttention::step`] (or, with lengths, [`MultiHeadAttention::step_lengths`]) into the caller's
    /// encoder, under the same conditions as [`KvCache::encode`].
    pub fn encode_step(
        &self,
        gpu: &Gpu,
        encoder: &mut wgpu::CommandEncoder,
        cache: &mut KvCache,
        x: &Tensor,
        attention: &Attention,
        lengths: Option<&[usize]>,
    ) -> Result<MultiHeadOutput> {
        self.device.expect_same(cache.device())?;
        let recording = Recording::for_encoder(gpu, encoder, &self.device)?;
        let (appended, output) = recording.encode(encoder, |to| self.record_step(to, cache, x, attention, lengths))?;
        cache.commit(appended);
        Ok(output)
    }

    /// Compiles the kernels that [`MultiHeadAttention::forward`] needs for inputs of these shapes, and runs nothing;
    /// see [`Attention::warm_up`].
    #[cfg(not(target_arch = "wasm32"))]
    pub fn warm_up(&self, query: &Tensor, key: &Tensor, value: &Tensor, attention: &Attention) -> Result<()> {
        wait_for(self.compile(query, key, value, attention))
    }

    /// Like [`MultiHeadAttention::warm_up`], without blocking.
    pub async fn warm_up_async(
        &self,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        attention: &Attention,
    ) -> Result<()> {
        let (layer, [query, key, value]) = (self.clone(), [query, key, value].map(Tensor::clone));
        let attention = attention.clone();
        apart(async move { layer.compile(&query, &key, &value, &attention).await }).await
    }

    async fn compile(&self, query: &Tensor, key: &Tensor, value: &Tensor, attention: &Attention) -> Result<()> {
        Recording::new(&self.device).warm_up(|to| self.record(to, query, key, value, attention)).await
    }

    /// Records the layer into the caller's encoder. Nothing is submitted, and nothing waits. Inputs and results may be
    /// dropped at once, as with [`Attention::encode`].
    pub fn encode(
        &self,
        gpu: &Gpu,
        encoder: &mut wgpu::CommandEncoder,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        attention: &Attention,
    ) -> Result<MultiHeadOutput> {
        let recording = Recording::for_encoder(gpu, encoder, &self.device)?;
        recording.encode(encoder, |to| self.record(to, query, key, value, attention))
    }

    /// Like [`MultiHeadAttention::encode`], in slices that each go into an encoder of their own; see
    /// [`Attention::encode_slices`].
    pub fn encode_slices(
        &self,
        gpu: &Gpu,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        attention: &Attention,
    ) -> Result<(MultiHeadOutput, EncodeSlices)> {
        let recording = Recording::for_encoders(gpu, &self.device)?;
        recording.slices(|to| self.record(to, query, key, value, attention))
    }

    /// An input as `[batch, len, dim]`, whatever its axis order.
    fn batched(&self, name: &str, x: &Tensor, width: usize) -> Result<Tensor> {
        x.expect_float(name)?;
        let x3 = match x.layout().rank() {
            2 => x.unsqueeze(0)?,
            3 if self.config.batch_first => x.clone(),
            3 => x.permute(&[1, 0, 2])?,
            _ => {
                return Err(shape_error!(
                    "{name} {:?} must have three axes ({}), or two without a batch",
                    x.shape(),
                    if self.config.batch_first { "[batch, len, dim]" } else { "[len, batch, dim]" }
                ));
            }
        };
        if x3.shape()[2] != width {
            return Err(shape_error!("{name} {:?} must be {width} wide", x.shape()));
        }
        Ok(x3)
    }

    fn record(
        &self,
        recording: &mut Recording,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        attention: &Attention,
    ) -> Result<MultiHeadOutput> {
        let config = &self.config;
        common_device(&self.q.weight, [("query", query), ("key", key), ("value", value)])?;
        let q_in = self.batched("query", query, config.embed_dim)?;
        let k_in = self.batched("key", key, config.kdim)?;
        let v_in = self.batched("value", value, config.vdim)?;
        let ranks = [query.layout().rank(), key.layout().rank(), value.layout().rank()];
        if ranks.iter().any(|&rank| rank != ranks[0]) {
            return Err(shape_error!(
                "query {:?}, key {:?} and value {:?} must all have a batch axis or all have none",
                query.shape(),
                key.shape(),
                value.shape()
            ));
        }
        let batch = q_in.shape()[0];
        if k_in.shape()[..2] != v_in.shape()[..2] || k_in.shape()[0] != batch {
            return Err(shape_error!(
                "query {:?}, key {:?} and value {:?} must have one batch size, key and value one length",
                query.shape(),
                key.shape(),
                value.shape()
            ));
        }
        let Projected { gate, q, k, v } = self.project(recording, &q_in, &k_in, &v_in)?;
        let mut attention = self.rules(attention, batch)?;
        attention.extra_keys = self.extra_rows(|(k, _)| k).len();
        let attended = attention.record(recording, &q, &k, &v, None)?;
        self.finish(recording, query, gate, attended)
    }

    /// One decoding step: [`MultiHeadAttention::record`] for self-attention over the cache and `x`.
    fn record_step(
        &self,
        recording: &mut Recording,
        cache: &mut KvCache,
        x: &Tensor,
        attention: &Attention,
        lengths: Option<&[usize]>,
    ) -> Result<(Appended, MultiHeadOutput)> {
        let config = &self.config;
        if config.add_bias_kv || config.add_zero_attn {
            return Err(value_error!("a layer with add_bias_kv or add_zero_attn cannot use a cache"));
        }
        if [config.kdim, config.vdim] != [config.embed_dim; 2] {
            return Err(value_error!(
                "a step is self-attention: kdim = {} and vdim = {} must be embed_dim = {}",
                config.kdim,
                config.vdim,
                config.embed_dim
            ));
        }
        common_device(&self.q.weight, [("x", x)])?;
        let x_in = self.batched("x", x, config.embed_dim)?;
        let Projected { gate, q, k, v } = self.project(recording, &x_in, &x_in, &x_in)?;
        let attention = self.rules(attention, x_in.shape()[0])?;
        let (appended, attended) = cache.record_step(recording, &attention, [&q, &k, &v], lengths, None)?;
        Ok((appended, self.finish(recording, x, gate, attended)?))
    }

    /// The rules of a call, applied to the heads of this layer.
    fn rules(&self, attention: &Attention, batch: usize) -> Result<Attention> {
        let mut attention = attention.clone().for_layer(batch, self.config.num_heads)?;
        attention.scale = attention.scale.or(self.config.scale);
        Ok(attention)
    }

    /// Queries, keys and values by head, and the gate, from inputs `[batch, len, width]`.
    fn project(&self, recording: &mut Recording, q_in: &Tensor, k_in: &Tensor, v_in: &Tensor) -> Result<Projected> {
        let config = &self.config;
        let batch = q_in.shape()[0];
        let (rows_q, rows_k, rows_v) = (config.q_width()?, config.k_width()?, config.v_width()?);
        let joined_width = config.joined_width()?;
        let rows_gate = if config.gate { joined_width } else { 0 };
        let extra_k: Vec<Option<&Tensor>> = self.extra_rows(|(k, _)| k);
        let extra_v: Vec<Option<&Tensor>> = self.extra_rows(|(_, v)| v);

        // One matrix product for everything that reads the same input.
        let same = |a: &Tensor, b: &Tensor| a.is_same_view(b);
        let mut one = |x: &Tensor, linear: &Linear, extra: &[Option<&Tensor>]| {
            recording.project(x, &linear.weight, linear.bias.as_ref(), extra)
        };
        let gated = |both: &Tensor| config.gate.then(|| both.narrow(2, 0, rows_gate)).transpose();
        let (gate, q, k, v) = match &self.packed {
            Some(packed) if extra_k.is_empty() && same(q_in, k_in) && same(k_in, v_in) => {
                let all = one(q_in, packed, &[])?;
                let part = |start, len| all.narrow(2, rows_gate + start, len);
                (gated(&all)?, part(0, rows_q)?, part(rows_q, rows_k)?, part(rows_q + rows_k, rows_v)?)
            }
            Some(packed) if extra_k.is_empty() && same(k_in, v_in) => {
                let first = one(q_in, &packed.rows(0, rows_gate + rows_q)?, &[])?;
                let both = one(k_in, &packed.rows(rows_gate + rows_q, rows_k + rows_v)?, &[])?;
                let q = first.narrow(2, rows_gate, rows_q)?;
                (gated(&first)?, q, both.narrow(2, 0, rows_k)?, both.narrow(2, rows_k, rows_v)?)
            }
            _ => (
                self.gate.as_ref().map(|gate| one(q_in, gate, &[])).transpose()?,
                one(q_in, &self.q, &[])?,
                one(k_in, &self.k, &extra_k)?,
                one(v_in, &self.v, &extra_v)?,
            ),
        };
        // [batch, len, heads, dim]
        let split = |x: &Tensor, heads: usize, dim: usize| x.reshape(&[batch, x.shape()[1], heads, dim]);
        let mut normalised = |x: &Tensor, which: usize, heads: usize| -> Result<Tensor> {
            let (Some(norm), Some(norms)) = (config.norm, &self.norms) else { return split(x, heads, config.head_dim) };
            let Linear { weight, bias } = &norms[which];
            let rows = match norm.span {
                NormSpan::Head => split(x, heads, config.head_dim)?,
                NormSpan::Width => x.unsqueeze(2)?,
            };
            let is_layer = norm.kind == NormKind::Layer;
            let y = recording.normalise(&rows, weight, bias.as_ref(), is_layer, norm.epsilon)?;
            split(&y.reshape(x.shape())?, heads, config.head_dim)
        };
        let heads_first = |x: Tensor| x.permute(&[0, 2, 1, 3]);
        let q = heads_first(normalised(&q, 0, config.num_heads)?)?;
        let k = heads_first(normalised(&k, 1, config.heads_kv)?)?;
        let v = heads_first(split(&v, config.heads_kv, config.value_head_dim)?)?;
        Ok(Projected { gate, q, k, v })
    }

    /// The layer's results for a `query`, from its heads' attention.
    fn finish(
        &self,
        recording: &mut Recording,
        query: &Tensor,
        gate: Option<Tensor>,
        attended: Attended,
    ) -> Result<MultiHeadOutput> {
        let config = &self.config;
        let Attended { output, weights, lse, scores } = attended;
        let [batch, _, len_q, _] = output.four_axes();
        let mut joined = output.permute(&[0, 2, 1, 3])?.reshape(&[batch, len_q, config.joined_width()?])?;
        if let Some(gate) = &gate {
            joined = recording.gate(&joined, gate)?;
        }
        let output = recording.project(&joined, &self.out.weight, self.out.bias.as_ref(), &[])?;
        let output = output.with_dtype(query.dtype())?;
        let unbatched = query.layout().rank() == 2;
        let of_batch = |result: Option<Tensor>| {
            result.map(|result| if unbatched { result.select(0, 0) } else { Ok(result) }).transpose()
        };
        Ok(MultiHeadOutput {
            output: match (unbatched, config.batch_first) {
                (true, _) => output.select(0, 0)?,
                (false, true) => output,
                (false, false) => output.permute(&[1, 0, 2])?,
            },
            weights: of_batch(weights)?,
            lse: of_batch(lse)?,
            scores: of_batch(scores)?,
        })
    }

    fn extra_rows<'a>(&'a self, side: impl Fn(&'a (Tensor, Tensor)) -> &'a Tensor) -> Vec<Option<&'a Tensor>> {
        let learned = self.bias_kv.as_ref().map(|pair| Some(side(pair)));
        learned.into_iter().chain(self.config.add_zero_attn.then_some(None)).collect()
    }
}

impl Attention {
    /// Interprets masks and biases in the form a layer takes: three axes are `[batch · heads, len_q, len_k]`.
    fn for_layer(mut self, batch: usize, heads: usize) -> Result<Attention> {
        let fix = |what: &str, tensor: &Tensor| -> Result<Tensor> {
            match *tensor.shape() {
                // Whatever three axes could mean (per batch entry, per head, both), this means the same.
                [1, _, _] => Ok(tensor.clone()),
                [both, len_q, len_k] if both == batch.saturating_mul(heads) => {
                    tensor.reshape(&[batch, heads, len_q, len_k])
                }
                [first, ..] if tensor.layout().rank() == 3 => Err(shape_error!(
                    "{what} of shape {:?} with a batch of {batch} and {heads} heads: in a layer three axes are \
                     [batch · heads, len_q, len_k] = [{}, len_q, len_k] as in PyTorch, and {first} is neither that \
                     nor 1; one per batch entry (Keras's form) is [{batch}, 1, len_q, len_k], in NumPy mask[:, None], \
                     and one per head [1, {heads}, len_q, len_k], mask[None]",
                    tensor.shape(),
                    batch.saturating_mul(heads)
                )),
                _ => Ok(tensor.clone()),
            }
        };
        for mask in &mut self.masks {
            *mask = mask.map(|tensor| fix("a mask", tensor))?;
        }
        for bias in &mut self.biases {
            *bias = fix("a bias", bias)?;
        }
        Ok(self)
    }
}

/// `[rows, columns]` transposed to `[columns, rows]`.
fn transposed(matrix: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|c| (0..rows).map(move |r| matrix[r * columns + c])).collect()
}

fn uniform(rng: &mut impl Rng, len: usize, bound: f32) -> Vec<f32> {
    (0..len).map(|_| (rng.random::<f32>() * 2.0 - 1.0) * bound).collect()
}

/// Normally distributed values by the Box–Muller transform.
fn normal(rng: &mut impl Rng, len: usize, deviation: f32) -> Vec<f32> {
    (0..len)
        .map(|_| {
            let (u, v) = (1.0 - rng.random::<f64>(), rng.random::<f64>());
            ((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32 * deviation
        })
        .collect()
}
