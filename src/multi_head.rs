//! Multi-head attention with its projections: PyTorch's `nn.MultiheadAttention` and Keras's
//! `MultiHeadAttention` from one layer.

use rand::{Rng, RngExt, SeedableRng};

use crate::attention::{Attended, Attention, Mask};
use crate::device::Device;
use crate::error::{Error, Result, shape_error, value_error};
use crate::gpu::{Gpu, Profile};
use crate::problem::checked_len;
use crate::record::Recording;
use crate::state_dict::{HostTensor, StateDict};
use crate::tensor::{Tensor, common_device};

/// The shape of a [`MultiHeadAttention`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MultiHeadConfig {
    /// Width of queries and of the output.
    pub embed_dim: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key/value heads; fewer than `num_heads` is grouped-query attention (Ainslie et al. 2023).
    pub heads_kv: usize,
    /// Width of a head's queries and keys.
    pub head_dim: usize,
    /// Width of a head's values.
    pub value_head_dim: usize,
    /// Width of the keys that come in.
    pub kdim: usize,
    /// Width of the values that come in.
    pub vdim: usize,
    /// Whether the projections add a bias.
    pub bias: bool,
    /// Appends a learned key and value to every sequence.
    pub add_bias_kv: bool,
    /// Appends a key and value of zeros to every sequence.
    pub add_zero_attn: bool,
    /// `[batch, len, dim]` in and out when true, PyTorch's default `[len, batch, dim]` when false.
    pub batch_first: bool,
}

impl MultiHeadConfig {
    /// `num_heads` heads of `embed_dim / num_heads`, biases on, batch first.
    pub fn new(embed_dim: usize, num_heads: usize) -> Result<MultiHeadConfig> {
        if num_heads == 0 || embed_dim == 0 || !embed_dim.is_multiple_of(num_heads) {
            return Err(value_error!("embed_dim = {embed_dim} is not a positive multiple of num_heads = {num_heads}"));
        }
        let head_dim = embed_dim / num_heads;
        Ok(MultiHeadConfig {
            embed_dim,
            num_heads,
            heads_kv: num_heads,
            head_dim,
            value_head_dim: head_dim,
            kdim: embed_dim,
            vdim: embed_dim,
            bias: true,
            add_bias_kv: false,
            add_zero_attn: false,
            batch_first: true,
        })
    }
    /// Fewer key/value heads; must divide `num_heads`.
    pub fn heads_kv(mut self, heads_kv: usize) -> Self {
        self.heads_kv = heads_kv;
        self
    }
    /// Width of the keys that come in.
    pub fn kdim(mut self, kdim: usize) -> Self {
        self.kdim = kdim;
        self
    }
    /// Width of the values that come in.
    pub fn vdim(mut self, vdim: usize) -> Self {
        self.vdim = vdim;
        self
    }
    /// Biases on or off.
    pub fn bias(mut self, bias: bool) -> Self {
        self.bias = bias;
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
    /// The order of the first two axes.
    pub fn batch_first(mut self, yes: bool) -> Self {
        self.batch_first = yes;
        self
    }
    /// Head widths that are not `embed_dim / num_heads` (Keras's `key_dim` and `value_dim`).
    pub fn head_dims(mut self, key_dim: usize, value_dim: usize) -> Self {
        self.head_dim = key_dim;
        self.value_head_dim = value_dim;
        self
    }

    fn check(&self) -> Result<()> {
        let Self { num_heads, heads_kv, .. } = *self;
        if heads_kv == 0 || !num_heads.is_multiple_of(heads_kv) {
            return Err(value_error!("num_heads = {num_heads} is not a multiple of heads_kv = {heads_kv}"));
        }
        for (name, value) in [
            ("embed_dim", self.embed_dim),
            ("num_heads", num_heads),
            ("head_dim", self.head_dim),
            ("value_head_dim", self.value_head_dim),
            ("kdim", self.kdim),
            ("vdim", self.vdim),
        ] {
            if value == 0 {
                return Err(value_error!("{name} must be at least 1"));
            }
        }
        for shape in [
            [self.q_width()?, self.embed_dim],
            [self.k_width()?, self.kdim],
            [self.v_width()?, self.vdim],
            [self.embed_dim, self.joined_width()?],
        ] {
            checked_len(&shape)?;
        }
        Ok(())
    }

    fn q_width(&self) -> Result<usize> {
        checked_len(&[self.num_heads, self.head_dim])
    }
    fn k_width(&self) -> Result<usize> {
        checked_len(&[self.heads_kv, self.head_dim])
    }
    fn v_width(&self) -> Result<usize> {
        checked_len(&[self.heads_kv, self.value_head_dim])
    }
    fn joined_width(&self) -> Result<usize> {
        checked_len(&[self.num_heads, self.value_head_dim])
    }
    fn is_packed(&self) -> bool {
        self.kdim == self.embed_dim && self.vdim == self.embed_dim
    }

    /// Learned numbers in a layer of this shape.
    pub fn parameter_count(&self) -> Result<usize> {
        self.check()?;
        let (q, k, v, joined) = (self.q_width()?, self.k_width()?, self.v_width()?, self.joined_width()?);
        let weights = q * self.embed_dim + k * self.kdim + v * self.vdim + self.embed_dim * joined;
        let biases = if self.bias { q + k + v + self.embed_dim } else { 0 };
        let rows = if self.add_bias_kv { k + v } else { 0 };
        Ok(weights + biases + rows)
    }
}

/// Parameters on the host, row-major; weights are `[out, in]`.
struct Parameters {
    w_q: Vec<f32>,
    w_k: Vec<f32>,
    w_v: Vec<f32>,
    w_o: Vec<f32>,
    b_q: Vec<f32>,
    b_k: Vec<f32>,
    b_v: Vec<f32>,
    b_o: Vec<f32>,
    bias_k: Vec<f32>,
    bias_v: Vec<f32>,
}

/// One projection's weight and bias.
#[derive(Clone, Debug)]
struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    fn upload(device: &Device, shape: [usize; 2], weight: &[f32], bias: &[f32], has_bias: bool) -> Result<Linear> {
        Ok(Linear {
            weight: Tensor::from_slice(device, &shape, weight)?,
            bias: has_bias.then(|| Tensor::from_slice(device, &shape[..1], bias)).transpose()?,
        })
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
/// (Vaswani et al. 2017, section 3.2.2). One `forward` serves self- and cross-attention.
#[derive(Clone, Debug)]
pub struct MultiHeadAttention {
    config: MultiHeadConfig,
    device: Device,
    /// W_q, W_k and W_v below one another when they read the same width.
    packed: Option<Linear>,
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    /// The learned extra key and value, `[k_width]` and `[v_width]`.
    bias_kv: Option<(Tensor, Tensor)>,
}

/// What [`MultiHeadAttention::forward`] returns.
#[derive(Clone, Debug)]
pub struct MultiHeadOutput {
    /// `[batch, len_q, embed_dim]`, or `[len_q, batch, embed_dim]` when not batch first.
    pub output: Tensor,
    /// `[batch, heads, len_q, len_k]` or, averaged, `[batch, len_q, len_k]`, when asked for. `len_k`
    /// counts the keys that `add_bias_kv` and `add_zero_attn` append.
    pub weights: Option<Tensor>,
}

/// Kernels as Keras's `MultiHeadAttention` holds them.
#[derive(Clone, Copy, Debug)]
pub struct KerasKernels<'a> {
    /// `[query_dim, heads, key_dim]`.
    pub query: &'a [f32],
    /// `[key_dim_in, heads, key_dim]`.
    pub key: &'a [f32],
    /// `[value_dim_in, heads, value_dim]`.
    pub value: &'a [f32],
    /// `[heads, value_dim, output_dim]`.
    pub output: &'a [f32],
    /// Biases `[heads, key_dim]`, `[heads, key_dim]`, `[heads, value_dim]`, `[output_dim]`.
    pub biases: Option<[&'a [f32]; 4]>,
}

impl MultiHeadAttention {
    /// A new layer, initialised from `seed` as PyTorch does: W_q, W_k, W_v Xavier-uniform (Glorot and
    /// Bengio 2010; over the packed matrix when there is one), W_o uniform in `±1/√in`, biases 0, the
    /// extra key and value Xavier-normal.
    pub fn new(device: impl Into<Device>, config: MultiHeadConfig, seed: u64) -> Result<Self> {
        config.check()?;
        let mut rng = rand_pcg::Pcg64::seed_from_u64(seed);
        let (q, k, v, joined) = (config.q_width()?, config.k_width()?, config.v_width()?, config.joined_width()?);
        let packed_rows = config.is_packed().then_some(q + k + v);
        let mut xavier = |rows: usize, columns: usize| {
            let bound = (6.0 / (packed_rows.unwrap_or(rows) + columns) as f64).sqrt() as f32;
            uniform(&mut rng, rows * columns, bound)
        };
        let w_q = xavier(q, config.embed_dim);
        let w_k = xavier(k, config.kdim);
        let w_v = xavier(v, config.vdim);
        let w_o = uniform(&mut rng, config.embed_dim * joined, 1.0 / (joined as f32).sqrt());
        // xavier_normal_ of a [1, 1, width] tensor: fan_in = fan_out = width.
        let mut row = |width: usize| normal(&mut rng, width, (1.0 / width as f64).sqrt() as f32);
        let (bias_k, bias_v) = if config.add_bias_kv { (row(k), row(v)) } else { Default::default() };
        let zeros = |n: usize| vec![0.0; n];
        let parameters = Parameters {
            w_q,
            w_k,
            w_v,
            w_o,
            b_q: zeros(q),
            b_k: zeros(k),
            b_v: zeros(v),
            b_o: zeros(config.embed_dim),
            bias_k,
            bias_v,
        };
        Self::from_parameters(device.into(), config, &parameters)
    }

    fn from_parameters(device: Device, config: MultiHeadConfig, p: &Parameters) -> Result<Self> {
        let (rows_q, rows_k, rows_v) = (config.q_width()?, config.k_width()?, config.v_width()?);
        let bias = config.bias;
        let packed = config
            .is_packed()
            .then(|| {
                let weight = [p.w_q.as_slice(), &p.w_k, &p.w_v].concat();
                let biases = [p.b_q.as_slice(), &p.b_k, &p.b_v].concat();
                Linear::upload(&device, [rows_q + rows_k + rows_v, config.embed_dim], &weight, &biases, bias)
            })
            .transpose()?;
        let (q, k, v) = match &packed {
            Some(packed) => {
                (packed.rows(0, rows_q)?, packed.rows(rows_q, rows_k)?, packed.rows(rows_q + rows_k, rows_v)?)
            }
            None => (
                Linear::upload(&device, [rows_q, config.embed_dim], &p.w_q, &p.b_q, bias)?,
                Linear::upload(&device, [rows_k, config.kdim], &p.w_k, &p.b_k, bias)?,
                Linear::upload(&device, [rows_v, config.vdim], &p.w_v, &p.b_v, bias)?,
            ),
        };
        let out = Linear::upload(&device, [config.embed_dim, config.joined_width()?], &p.w_o, &p.b_o, bias)?;
        let bias_kv = config
            .add_bias_kv
            .then(|| -> Result<_> {
                Ok((
                    Tensor::from_slice(&device, &[rows_k], &p.bias_k)?,
                    Tensor::from_slice(&device, &[rows_v], &p.bias_v)?,
                ))
            })
            .transpose()?;
        Ok(MultiHeadAttention { config, device, packed, q, k, v, out, bias_kv })
    }

    /// A layer from a PyTorch state dict: `in_proj_weight` or `q_proj_weight`, `k_proj_weight`,
    /// `v_proj_weight`; `in_proj_bias`; `bias_k`, `bias_v`; `out_proj.weight`, `out_proj.bias`, each
    /// behind `prefix` (such as `encoder.layers.0.self_attn.`). Widths and biases are read off the
    /// shapes; what a state dict does not hold (`add_zero_attn`, `batch_first`) is set afterwards.
    pub fn from_state_dict(
        device: impl Into<Device>,
        state: &StateDict,
        prefix: &str,
        num_heads: usize,
    ) -> Result<Self> {
        let get = |name: &str, rank: usize| -> Result<Option<&HostTensor>> {
            let Some(tensor) = state.get(&format!("{prefix}{name}")) else { return Ok(None) };
            if tensor.shape().len() != rank {
                return Err(shape_error!("{prefix}{name} has shape {:?}; {rank} axes are expected", tensor.shape()));
            }
            Ok(Some(tensor))
        };
        let need = |name: &str, rank: usize| -> Result<&HostTensor> {
            get(name, rank)?.ok_or_else(|| {
                Error::File(format!(
                    "no tensor {prefix}{name}; a PyTorch nn.MultiheadAttention state dict holds in_proj_weight \
                     (or q_proj_weight, k_proj_weight, v_proj_weight) and out_proj.weight; found {}",
                    state.names_or_nothing()
                ))
            })
        };
        let w_o = need("out_proj.weight", 2)?;
        let [embed_dim, joined] = [w_o.shape()[0], w_o.shape()[1]];
        let mut config = MultiHeadConfig::new(embed_dim, num_heads)?;
        let (w_q, w_k, w_v) = if let Some(packed) = get("in_proj_weight", 2)? {
            if packed.shape() != [3 * embed_dim, embed_dim] {
                return Err(shape_error!(
                    "{prefix}in_proj_weight has shape {:?}; [3 · embed_dim, embed_dim] = {:?} is expected",
                    packed.shape(),
                    [3 * embed_dim, embed_dim]
                ));
            }
            let part = |i: usize| packed.data()[i * embed_dim * embed_dim..][..embed_dim * embed_dim].to_vec();
            (part(0), part(1), part(2))
        } else {
            let (w_q, w_k, w_v) = (need("q_proj_weight", 2)?, need("k_proj_weight", 2)?, need("v_proj_weight", 2)?);
            (config.kdim, config.vdim) = (w_k.shape()[1], w_v.shape()[1]);
            let rows_k = w_k.shape()[0];
            let rule = |rule: &str| {
                shape_error!(
                    "q_proj_weight {:?}, k_proj_weight {:?}, v_proj_weight {:?}: {rule}",
                    w_q.shape(),
                    w_k.shape(),
                    w_v.shape()
                )
            };
            if w_q.shape() != [embed_dim, embed_dim] || w_v.shape()[0] != rows_k {
                return Err(rule("q_proj_weight must be square and k and v must have as many rows"));
            }
            if rows_k == 0 || !rows_k.is_multiple_of(config.head_dim) {
                return Err(rule(&format!("rows must be a multiple of the head width {}", config.head_dim)));
            }
            config.heads_kv = rows_k / config.head_dim;
            (w_q.data().to_vec(), w_k.data().to_vec(), w_v.data().to_vec())
        };
        if joined != config.joined_width()? {
            return Err(shape_error!(
                "{prefix}out_proj.weight has shape {:?}; it must be square for {num_heads} heads",
                w_o.shape()
            ));
        }
        let (q, k, v) = (config.q_width()?, config.k_width()?, config.v_width()?);
        let in_bias = get("in_proj_bias", 1)?;
        let out_bias = get("out_proj.bias", 1)?;
        config.bias = in_bias.is_some() || out_bias.is_some();
        let vector = |name: &str, tensor: Option<&HostTensor>, len: usize| -> Result<Vec<f32>> {
            let Some(tensor) = tensor else { return Ok(vec![0.0; len]) };
            if tensor.data().len() != len {
                return Err(shape_error!("{prefix}{name} has {} values; {len} are expected", tensor.data().len()));
            }
            Ok(tensor.data().to_vec())
        };
        let in_bias = vector("in_proj_bias", in_bias, q + k + v)?;
        let b_o = vector("out_proj.bias", out_bias, embed_dim)?;
        let (bias_k, bias_v) = (get("bias_k", 3)?, get("bias_v", 3)?);
        config.add_bias_kv = bias_k.is_some();
        if bias_k.is_some() != bias_v.is_some() {
            return Err(Error::File(format!("{prefix}bias_k and {prefix}bias_v must come together")));
        }
        config.check()?;
        let parameters = Parameters {
            w_q,
            w_k,
            w_v,
            w_o: w_o.data().to_vec(),
            b_q: in_bias[..q].to_vec(),
            b_k: in_bias[q..q + k].to_vec(),
            b_v: in_bias[q + k..].to_vec(),
            b_o,
            bias_k: vector("bias_k", bias_k, k)?,
            bias_v: vector("bias_v", bias_v, v)?,
        };
        Self::from_parameters(device.into(), config, &parameters)
    }

    /// The layer's parameters under PyTorch's names, packed where PyTorch packs them.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn state_dict(&self) -> Result<StateDict> {
        let mut state = StateDict::default();
        let mut put = |name: &str, shape: &[usize], tensor: &Tensor| -> Result<()> {
            state.insert(name, HostTensor::new(shape, tensor.download()?)?);
            Ok(())
        };
        // PyTorch packs only when all three are square.
        let torch_packs =
            self.config.heads_kv == self.config.num_heads && self.config.q_width()? == self.config.embed_dim;
        let mut biases = Vec::new();
        match self.packed.as_ref().filter(|_| torch_packs) {
            Some(packed) => put("in_proj_weight", packed.weight.shape(), &packed.weight)?,
            None => {
                for (name, linear) in
                    [("q_proj_weight", &self.q), ("k_proj_weight", &self.k), ("v_proj_weight", &self.v)]
                {
                    put(name, linear.weight.shape(), &linear.weight)?;
                }
            }
        }
        put("out_proj.weight", self.out.weight.shape(), &self.out.weight)?;
        if let Some(bias) = &self.out.bias {
            put("out_proj.bias", bias.shape(), bias)?;
        }
        if let Some((k, v)) = &self.bias_kv {
            put("bias_k", &[1, 1, k.shape()[0]], k)?;
            put("bias_v", &[1, 1, v.shape()[0]], v)?;
        }
        for linear in [&self.q, &self.k, &self.v] {
            if let Some(bias) = &linear.bias {
                biases.extend(bias.download()?);
            }
        }
        if self.config.bias {
            state.insert("in_proj_bias", HostTensor::new(&[biases.len()], biases)?);
        }
        Ok(state)
    }

    /// A layer from Keras-shaped kernels; `config` gives the widths (`head_dims` for Keras's `key_dim`
    /// and `value_dim`), `config.bias` must agree with `kernels.biases`.
    pub fn from_keras(device: impl Into<Device>, config: MultiHeadConfig, kernels: KerasKernels<'_>) -> Result<Self> {
        config.check()?;
        if config.add_bias_kv {
            return Err(value_error!("Keras layers have no add_bias_kv"));
        }
        if config.bias != kernels.biases.is_some() {
            return Err(value_error!(
                "config.bias is {} but biases are {}",
                config.bias,
                if kernels.biases.is_some() { "given" } else { "missing" }
            ));
        }
        let (q, k, v, joined) = (config.q_width()?, config.k_width()?, config.v_width()?, config.joined_width()?);
        // [in, heads · dim] in Keras, [heads · dim, in] here.
        let transposed = |name: &str, kernel: &[f32], rows: usize, columns: usize| -> Result<Vec<f32>> {
            if kernel.len() != rows * columns {
                return Err(shape_error!(
                    "the {name} kernel has {} values; {rows} × {columns} are expected",
                    kernel.len()
                ));
            }
            Ok((0..columns).flat_map(|c| (0..rows).map(move |r| kernel[r * columns + c])).collect())
        };
        let bias = |i: usize, len: usize| -> Result<Vec<f32>> {
            let Some(biases) = kernels.biases else { return Ok(vec![0.0; len]) };
            if biases[i].len() != len {
                return Err(shape_error!("bias {i} has {} values; {len} are expected", biases[i].len()));
            }
            Ok(biases[i].to_vec())
        };
        let parameters = Parameters {
            w_q: transposed("query", kernels.query, config.embed_dim, q)?,
            w_k: transposed("key", kernels.key, config.kdim, k)?,
            w_v: transposed("value", kernels.value, config.vdim, v)?,
            w_o: transposed("output", kernels.output, joined, config.embed_dim)?,
            b_q: bias(0, q)?,
            b_k: bias(1, k)?,
            b_v: bias(2, v)?,
            b_o: bias(3, config.embed_dim)?,
            bias_k: Vec::new(),
            bias_v: Vec::new(),
        };
        Self::from_parameters(device.into(), config, &parameters)
    }

    /// The layer's shape.
    pub fn config(&self) -> &MultiHeadConfig {
        &self.config
    }
    /// Learned numbers in the layer.
    pub fn parameter_count(&self) -> usize {
        self.config.parameter_count().expect("checked when the layer was made")
    }
    /// Appends a key and value of zeros to every sequence, or not.
    pub fn with_zero_attn(mut self, yes: bool) -> Self {
        self.config.add_zero_attn = yes;
        self
    }
    /// Which of the first two axes is the batch.
    pub fn with_batch_first(mut self, yes: bool) -> Self {
        self.config.batch_first = yes;
        self
    }

    /// Attends from `query` `[batch, len_q, embed_dim]` to `key` `[batch, len_k, kdim]` and `value`
    /// `[batch, len_k, vdim]` (the batch axis second when not batch first; `[len, dim]` without a
    /// batch). Self-attention gives one tensor three times and then projects it once.
    ///
    /// `attention` says the rest: masks (a three-axis mask `[batch · heads, len_q, len_k]` is taken as
    /// PyTorch means it), [`Attention::key_padding`], causal, which weights to return.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn forward(
        &self,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        attention: &Attention,
    ) -> Result<MultiHeadOutput> {
        pollster::block_on(self.forward_async(query, key, value, attention))
    }

    /// As [`MultiHeadAttention::forward`], without blocking.
    pub async fn forward_async(
        &self,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        attention: &Attention,
    ) -> Result<MultiHeadOutput> {
        let mut recording = Recording::new(&self.device);
        let output = self.record(&mut recording, query, key, value, attention)?;
        recording.submit().await?;
        Ok(output)
    }

    /// As [`MultiHeadAttention::forward`]; waits until the work is done and tells which kernels ran, and for how
    /// long where the adapter counts. Only such calls pay for the counting.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn forward_profiled(
        &self,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        attention: &Attention,
    ) -> Result<(MultiHeadOutput, Profile)> {
        pollster::block_on(self.forward_profiled_async(query, key, value, attention))
    }

    /// As [`MultiHeadAttention::forward_profiled`], without blocking.
    pub async fn forward_profiled_async(
        &self,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        attention: &Attention,
    ) -> Result<(MultiHeadOutput, Profile)> {
        let mut recording = Recording::new(&self.device);
        let output = self.record(&mut recording, query, key, value, attention)?;
        Ok((output, recording.submit_profiled().await?))
    }

    /// Records the layer into the caller's encoder: nothing is submitted, nothing waits. Keep the
    /// inputs and the results until the encoder is submitted.
    pub fn encode(
        &self,
        gpu: &Gpu,
        encoder: &mut wgpu::CommandEncoder,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        attention: &Attention,
    ) -> Result<MultiHeadOutput> {
        let mut recording = Recording::for_encoder(gpu);
        let output = self.record(&mut recording, query, key, value, attention)?;
        recording.encode(encoder)?;
        Ok(output)
    }

    /// `[batch, len, dim]` of an input, whatever the order it came in.
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
        let [batch, len_q] = [q_in.shape()[0], q_in.shape()[1]];
        if k_in.shape()[..2] != v_in.shape()[..2] || k_in.shape()[0] != batch {
            return Err(shape_error!(
                "query {:?}, key {:?} and value {:?} must have one batch size, key and value one length",
                query.shape(),
                key.shape(),
                value.shape()
            ));
        }
        let (rows_q, rows_k, rows_v) = (config.q_width()?, config.k_width()?, config.v_width()?);
        let extra_k: Vec<Option<&Tensor>> = self.extra_rows(|(k, _)| k);
        let extra_v: Vec<Option<&Tensor>> = self.extra_rows(|(_, v)| v);

        // One product for everything that reads the same input.
        let same = |a: &Tensor, b: &Tensor| a.is_same_view(b);
        let (q, k, v) = match &self.packed {
            Some(packed) if extra_k.is_empty() && same(&q_in, &k_in) && same(&k_in, &v_in) => {
                let all = recording.project(&q_in, &packed.weight, packed.bias.as_ref(), &[])?;
                let part = |start, len| all.narrow(2, start, len);
                (part(0, rows_q)?, part(rows_q, rows_k)?, part(rows_q + rows_k, rows_v)?)
            }
            Some(packed) if extra_k.is_empty() && same(&k_in, &v_in) => {
                let q = recording.project(&q_in, &self.q.weight, self.q.bias.as_ref(), &[])?;
                let both = packed.rows(rows_q, rows_k + rows_v)?;
                let both = recording.project(&k_in, &both.weight, both.bias.as_ref(), &[])?;
                (q, both.narrow(2, 0, rows_k)?, both.narrow(2, rows_k, rows_v)?)
            }
            _ => (
                recording.project(&q_in, &self.q.weight, self.q.bias.as_ref(), &[])?,
                recording.project(&k_in, &self.k.weight, self.k.bias.as_ref(), &extra_k)?,
                recording.project(&v_in, &self.v.weight, self.v.bias.as_ref(), &extra_v)?,
            ),
        };
        let split = |x: &Tensor, heads: usize, dim: usize| -> Result<Tensor> {
            x.reshape(&[batch, x.shape()[1], heads, dim])?.permute(&[0, 2, 1, 3])
        };
        let q = split(&q, config.num_heads, config.head_dim)?;
        let k = split(&k, config.heads_kv, config.head_dim)?;
        let v = split(&v, config.heads_kv, config.value_head_dim)?;
        let attention = attention.clone().for_layer(batch, config.num_heads, extra_k.len())?;
        let Attended { output, weights, .. } = attention.record(recording, &q, &k, &v, None)?;
        let joined = output.permute(&[0, 2, 1, 3])?.reshape(&[batch, len_q, config.joined_width()?])?;
        let output = recording.project(&joined, &self.out.weight, self.out.bias.as_ref(), &[])?;
        let output = output.with_dtype(query.dtype())?;
        let unbatched = ranks[0] == 2;
        Ok(MultiHeadOutput {
            output: match (unbatched, config.batch_first) {
                (true, _) => output.select(0, 0)?,
                (false, true) => output,
                (false, false) => output.permute(&[1, 0, 2])?,
            },
            weights: weights.map(|weights| if unbatched { weights.select(0, 0) } else { Ok(weights) }).transpose()?,
        })
    }

    fn extra_rows<'a>(&'a self, side: impl Fn(&'a (Tensor, Tensor)) -> &'a Tensor) -> Vec<Option<&'a Tensor>> {
        let learned = self.bias_kv.as_ref().map(|pair| Some(side(pair)));
        learned.into_iter().chain(self.config.add_zero_attn.then_some(None)).collect()
    }
}

impl Attention {
    /// Masks and biases as a layer's caller writes them: three axes are `[batch · heads, len_q, len_k]`.
    fn for_layer(mut self, batch: usize, heads: usize, extra_keys: usize) -> Result<Attention> {
        let fix = |tensor: &Tensor| -> Result<Tensor> {
            match *tensor.shape() {
                [both, len_q, len_k] if both == batch * heads && both > 1 => {
                    tensor.reshape(&[batch, heads, len_q, len_k])
                }
                _ => Ok(tensor.clone()),
            }
        };
        self.for_each_mask(|mask| Mask::new(fix(mask.tensor())?, mask.meaning()))?;
        self.for_each_bias(fix)?;
        Ok(self.extra_keys(extra_keys))
    }
}

fn uniform(rng: &mut impl Rng, len: usize, bound: f32) -> Vec<f32> {
    (0..len).map(|_| (rng.random::<f32>() * 2.0 - 1.0) * bound).collect()
}

/// Normal values by Box and Muller's transform.
fn normal(rng: &mut impl Rng, len: usize, deviation: f32) -> Vec<f32> {
    (0..len)
        .map(|_| {
            let (u, v) = (1.0 - rng.random::<f64>(), rng.random::<f64>());
            ((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32 * deviation
        })
        .collect()
}
