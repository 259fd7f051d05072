//! Rotary position embedding (Su et al. 2021, "RoFormer", section 3.4).

use super::{TokenPositions, check_len, check_table, first_position};
use crate::call::Rotation;
use crate::device::Device;
use crate::error::{Result, shape_error, value_error};
use crate::gpu::Gpu;
use crate::kernels::plan::Pairs;
use crate::lower::Recording;
use crate::memory::check_floats;
use crate::problem::{Problem, Rows, checked_len};
use crate::state_dict::HostTensor;
use crate::tensor::{Tensor, common_device};
#[cfg(not(target_arch = "wasm32"))]
use crate::wait::wait_for;

/// Which of a head's first `dim` columns form a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Pairing {
    /// `i` and `i + dim / 2`: GPT-NeoX, Llama, transformers' `rotate_half`.
    #[default]
    HalfSplit,
    /// `2i` and `2i + 1`: the paper, GPT-J; ONNX's `interleaved`.
    Interleaved,
}

/// How frequencies change for sequences longer than those in training, as in transformers' `modeling_rope_utils`.
#[derive(Clone, Debug, PartialEq, Default)]
#[non_exhaustive]
pub enum RotaryScaling {
    /// No change.
    #[default]
    None,
    /// Position interpolation (Chen et al. 2023): divides all frequencies by `factor`.
    Linear {
        /// How many times longer sequences are.
        factor: f64,
    },
    /// NTK-aware scaling that grows with the sequence: beyond `original_len` the base becomes
    /// `base · (factor · len / original_len − (factor − 1))^(dim / (dim − 2))`.
    DynamicNtk {
        /// How fast the base grows.
        factor: f64,
        /// Number of positions in training (transformers: `max_position_embeddings`).
        original_len: usize,
    },
    /// YaRN; see [`Yarn`].
    Yarn(Yarn),
    /// Llama 3.1: divides the frequencies of long wavelengths by `factor` and keeps those of short ones, with a ramp
    /// between.
    Llama3 {
        /// How many times longer sequences are.
        factor: f64,
        /// Frequencies with wavelengths above `original_len / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Frequencies with wavelengths below `original_len / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Number of positions in training.
        original_len: usize,
    },
    /// LongRoPE; see [`LongRope`].
    LongRope(LongRope),
}

/// Peng et al. 2023, "YaRN", section 3: frequencies that make many rotations within the training length are kept, those
/// that make few are divided by `factor`, with a ramp between.
#[derive(Clone, Debug, PartialEq)]
pub struct Yarn {
    /// How many times longer sequences are.
    pub factor: f64,
    /// Number of positions in training.
    pub original_len: usize,
    /// Frequencies with at least this many rotations are kept.
    pub beta_fast: f64,
    /// Frequencies with at most this many rotations are divided.
    pub beta_slow: f64,
    /// Factor on sines and cosines. `None`: the ratio of `0.1 · mscale · ln factor + 1` to the same expression with
    /// `mscale_all_dim`; if these are not both set, `0.1 · ln factor + 1`. For a `factor` up to 1 it is 1.
    pub attention_factor: Option<f64>,
    /// As set by DeepSeek's models; used only together with `mscale_all_dim`.
    pub mscale: Option<f64>,
    /// As set by DeepSeek's models; used only together with `mscale`.
    pub mscale_all_dim: Option<f64>,
    /// Whether the ramp's ends are rounded to whole pairs.
    pub truncate: bool,
}

impl Yarn {
    /// The paper's values.
    pub fn new(factor: f64, original_len: usize) -> Yarn {
        Yarn {
            factor,
            original_len,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: None,
            mscale: None,
            mscale_all_dim: None,
            truncate: true,
        }
    }
}

/// Ding et al. 2024, "LongRoPE": each frequency is divided by its own factor.
#[derive(Clone, Debug, PartialEq)]
pub struct LongRope {
    /// One factor per pair, for sequences up to `original_len`.
    pub short_factor: Vec<f64>,
    /// One factor per pair, for longer sequences.
    pub long_factor: Vec<f64>,
    /// Number of positions in training.
    pub original_len: usize,
    /// How many times longer sequences are: `max_position_embeddings / original_max_position_embeddings`.
    pub factor: f64,
    /// Factor on sines and cosines. `None`: `√(1 + ln factor / ln original_len)`, or 1 for a factor up to 1.
    pub attention_factor: Option<f64>,
}

/// The frequencies and pairs of a [`Rotary`].
#[derive(Clone, Debug, PartialEq)]
#[must_use]
#[non_exhaustive]
pub struct RotaryConfig {
    /// Number of columns that are rotated, even. A head's columns from `dim` on are unchanged.
    pub dim: usize,
    /// Pair `i` is rotated by the angle `position · base^(−2i / dim)`.
    pub base: f64,
    /// Which columns form a pair.
    pub pairing: Pairing,
    /// Scaling for long sequences.
    pub scaling: RotaryScaling,
    /// Whether frequencies are rounded as in f32 arithmetic.
    pub f32_frequencies: bool,
}

impl RotaryConfig {
    /// Base 10,000, [`Pairing::HalfSplit`], no scaling, exact frequencies.
    pub fn new(dim: usize) -> RotaryConfig {
        RotaryConfig {
            dim,
            base: 10_000.0,
            pairing: Pairing::HalfSplit,
            scaling: RotaryScaling::None,
            f32_frequencies: false,
        }
    }
    /// Sets the base of the frequencies (transformers: `rope_theta`).
    pub fn base(mut self, base: f64) -> Self {
        self.base = base;
        self
    }
    /// Sets which columns form a pair.
    pub fn pairing(mut self, pairing: Pairing) -> Self {
        self.pairing = pairing;
        self
    }
    /// Sets the scaling for long sequences.
    pub fn scaling(mut self, scaling: RotaryScaling) -> Self {
        self.scaling = scaling;
        self
    }
    /// Whether to round frequencies to f32 after every step, as transformers computes them. The last bit of a frequency
    /// rotates a pair by up to 0.01 at position 100,000, and models trained that way expect it. The angle, sines and
    /// cosines stay exact.
    pub fn f32_frequencies(mut self, yes: bool) -> Self {
        self.f32_frequencies = yes;
        self
    }

    fn check(&self) -> Result<()> {
        let RotaryConfig { dim, base, .. } = *self;
        if dim == 0 || dim % 2 != 0 {
            return Err(value_error!(
                "the rotary dimension {dim} must be even and positive: columns are rotated in pairs"
            ));
        }
        let positive = |name: &str, value: f64| match value > 0.0 && value.is_finite() {
            true => Ok(()),
            false => Err(value_error!("{name} = {value} must be positive and finite")),
        };
        let all_positive = |values: &[(&str, Option<f64>)]| {
            values.iter().try_for_each(|&(name, value)| value.map_or(Ok(()), |value| positive(name, value)))
        };
        let trained = |len: usize, least: usize| match len >= least {
            true => Ok(()),
            false => Err(value_error!("original_len = {len} must be at least {least}")),
        };
        positive("base", base)?;
        match &self.scaling {
            RotaryScaling::None => Ok(()),
            RotaryScaling::Linear { factor } => positive("factor", *factor),
            RotaryScaling::DynamicNtk { factor, original_len } => {
                positive("factor", *factor)?;
                trained(*original_len, 1)
            }
            RotaryScaling::Yarn(yarn) => {
                all_positive(&[
                    ("factor", Some(yarn.factor)),
                    ("beta_fast", Some(yarn.beta_fast)),
                    ("beta_slow", Some(yarn.beta_slow)),
                    ("attention_factor", yarn.attention_factor),
                    ("mscale", yarn.mscale),
                    ("mscale_all_dim", yarn.mscale_all_dim),
                ])?;
                trained(yarn.original_len, 1)?;
                match base > 1.0 {
                    true => Ok(()),
                    false => Err(value_error!("base = {base} must be more than 1 for YaRN")),
                }
            }
            RotaryScaling::Llama3 { factor, low_freq_factor: low, high_freq_factor: high, original_len } => {
                let factors = [("factor", factor), ("low_freq_factor", low), ("high_freq_factor", high)];
                all_positive(&factors.map(|(name, value)| (name, Some(*value))))?;
                trained(*original_len, 1)?;
                match high > low {
                    true => Ok(()),
                    false => Err(value_error!("high_freq_factor = {high} must be more than low_freq_factor = {low}")),
                }
            }
            RotaryScaling::LongRope(long) => {
                all_positive(&[("factor", Some(long.factor)), ("attention_factor", long.attention_factor)])?;
                trained(long.original_len, 2)?;
                for (name, factors) in [("short_factor", &long.short_factor), ("long_factor", &long.long_factor)] {
                    if factors.len() != dim / 2 {
                        return Err(shape_error!(
                            "{name} has {} entries; one per pair is needed, {} for a rotary dimension of {dim}",
                            factors.len(),
                            dim / 2
                        ));
                    }
                    factors.iter().try_for_each(|&factor| positive(name, factor))?;
                }
                Ok(())
            }
        }
    }

    /// The rotation of each pair per position in radians, `[dim / 2]`, for a sequence of `len` positions in total (only
    /// dynamic NTK and LongRoPE depend on `len`).
    pub fn frequencies(&self, len: usize) -> Result<Vec<f64>> {
        self.check()?;
        // The same steps as transformers, each rounded if f32 is requested.
        let r = |x: f64| if self.f32_frequencies { f64::from(x as f32) } else { x };
        let (dim, pairs) = (self.dim, self.dim / 2);
        let powers =
            |base: f64| -> Vec<f64> { (0..pairs).map(|i| r(r(base).powf(r(2.0 * i as f64 / dim as f64)))).collect() };
        let plain = |base: f64| -> Vec<f64> { powers(base).into_iter().map(|power| r(1.0 / power)).collect() };
        let frequencies: Vec<f64> = match &self.scaling {
            RotaryScaling::None => plain(self.base),
            RotaryScaling::Linear { factor } => plain(self.base).into_iter().map(|f| r(f / r(*factor))).collect(),
            RotaryScaling::DynamicNtk { factor, original_len } => {
                let growth = len.max(*original_len) as f64 / *original_len as f64;
                plain(self.base * (factor * growth - (factor - 1.0)).powf(dim as f64 / (dim as f64 - 2.0)))
            }
            RotaryScaling::Yarn(yarn) => {
                // The pair that makes this many rotations within the training length.
                let pair_of = |turns: f64| {
                    dim as f64 * (yarn.original_len as f64 / (turns * std::f64::consts::TAU)).ln()
                        / (2.0 * self.base.ln())
                };
                let (mut low, mut high) = (pair_of(yarn.beta_fast), pair_of(yarn.beta_slow));
                if yarn.truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.0), high.min(dim as f64 - 1.0));
                if low == high {
                    high += 0.001;
                }
                let ramp = |i: usize| r(r(i as f64 - low) / r(high - low)).clamp(0.0, 1.0);
                let mix = |(i, power): (usize, f64)| {
                    let kept = r(1.0 - ramp(i));
                    let divided = r(1.0 / r(r(yarn.factor) * power));
                    r(r(divided * r(1.0 - kept)) + r(r(1.0 / power) * kept))
                };
                powers(self.base).into_iter().enumerate().map(mix).collect()
            }
            RotaryScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_len } => {
                let trained = *original_len as f64;
                let (factor, low, high) = (r(*factor), *low_freq_factor, *high_freq_factor);
                let scale = |f: f64| {
                    let wavelength = r(r(1.0 / f) * r(std::f64::consts::TAU));
                    if wavelength > trained / low {
                        return r(f / factor);
                    }
                    if wavelength < trained / high {
                        return f;
                    }
                    let smooth = r(r(r(r(1.0 / wavelength) * trained) - r(low)) / r(high - low));
                    r(r(r(r(1.0 - smooth) * f) / factor) + r(smooth * f))
                };
                plain(self.base).into_iter().map(scale).collect()
            }
            RotaryScaling::LongRope(long) => {
                let factors = if len > long.original_len { &long.long_factor } else { &long.short_factor };
                powers(self.base).into_iter().zip(factors).map(|(power, &f)| r(1.0 / r(r(f) * power))).collect()
            }
        };
        match frequencies.iter().find(|f| !f.is_finite()) {
            None => Ok(frequencies),
            Some(f) => Err(value_error!("base = {} gives a frequency of {f}; all must be finite", self.base)),
        }
    }

    /// The factor on sines and cosines: 1 except for YaRN and LongRoPE.
    pub fn attention_factor(&self) -> Result<f64> {
        self.check()?;
        Ok(match &self.scaling {
            RotaryScaling::Yarn(yarn) => {
                let scale = |mscale: f64| if yarn.factor <= 1.0 { 1.0 } else { 0.1 * mscale * yarn.factor.ln() + 1.0 };
                yarn.attention_factor.unwrap_or(match (yarn.mscale, yarn.mscale_all_dim) {
                    (Some(one), Some(all)) => scale(one) / scale(all),
                    _ => scale(1.0),
                })
            }
            RotaryScaling::LongRope(long) => long.attention_factor.unwrap_or(match long.factor > 1.0 {
                true => (1.0 + long.factor.ln() / (long.original_len as f64).ln()).sqrt(),
                false => 1.0,
            }),
            _ => 1.0,
        })
    }

    /// Cosines and sines for positions 0 to `len − 1`, each `[len, dim / 2]`, multiplied by the attention factor.
    pub fn tables(&self, len: usize) -> Result<[HostTensor; 2]> {
        check_len("the number of positions", len)?;
        self.check()?;
        check_floats("cosines and sines", &[2, len, self.dim / 2])?;
        let (frequencies, factor) = (self.frequencies(len)?, self.attention_factor()?);
        let shape = [len, frequencies.len()];
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for position in 0..len {
            for frequency in &frequencies {
                let (s, c) = (position as f64 * frequency).sin_cos();
                cos.push((c * factor) as f32);
                sin.push((s * factor) as f32);
            }
        }
        Ok([HostTensor::new(&shape, cos)?, HostTensor::new(&shape, sin)?])
    }
}

/// Rotates queries and keys by their positions, so that their products depend only on distances:
///
/// ```text
/// y₀ = x₀ · cos − x₁ · sin      y₁ = x₁ · cos + x₀ · sin
/// ```
///
/// for each pair of columns, with the sine and cosine of `position · frequency`.
///
/// ```
/// use wgpu_attention::position::{Rotary, RotaryConfig, TokenPositions};
/// use wgpu_attention::{Align, Attention, Device, Tensor};
///
/// # fn main() -> wgpu_attention::Result<()> {
/// let device = Device::new()?;
/// let rotary = Rotary::new(&device, &RotaryConfig::new(8).base(500_000.0), 128)?; // positions 0 to 127
/// let x = Tensor::from_slice(&device, &[1, 2, 3, 8], &[0.5f32; 48])?;
/// let rotated = rotary.rotate(&x, &TokenPositions::From(0))?;
/// let attended = Attention::new().causal(Align::TopLeft).forward(&rotated, &rotated, &x)?;
/// # assert_eq!(attended.output.shape(), [1, 2, 3, 8]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Rotary {
    rotation: Rotation,
}

impl Rotary {
    /// A table for positions 0 to `len − 1`. Dynamic NTK and LongRoPE scale for a total sequence length of `len`:
    /// create a new table when the sequence has grown.
    pub fn new(device: impl Into<Device>, config: &RotaryConfig, len: usize) -> Result<Rotary> {
        let device = device.into();
        config.check()?;
        check_len("the number of positions", len)?;
        check_table(&device, "the rotary table", &[len, 2, config.dim / 2 + 3])?;
        let [cos, sin] = config.tables(len)?;
        Rotary::from_tables(device, &cos, &sin, config.pairing)
    }

    /// A table from the caller's own cosines and sines, each `[positions, pairs]` (ONNX's `cos_cache` and `sin_cache`).
    pub fn from_tables(
        device: impl Into<Device>,
        cos: &HostTensor,
        sin: &HostTensor,
        pairing: Pairing,
    ) -> Result<Rotary> {
        let device = device.into();
        let &[rows, pairs] = cos.shape() else {
            return Err(shape_error!("the cosines {:?} must be [positions, pairs]", cos.shape()));
        };
        if sin.shape() != cos.shape() {
            return Err(shape_error!("the cosines {:?} and sines {:?} differ in shape", cos.shape(), sin.shape()));
        }
        if pairs == 0 {
            return Err(shape_error!("the cosines {:?} must have at least one pair per position", cos.shape()));
        }
        check_len("the number of positions", rows)?;
        let shape = [rows, 2 * pairs.next_multiple_of(4)];
        check_table(&device, "the rotary table", &shape)?;
        let mut table = vec![0.0; checked_len(&shape)?];
        for (row, (cos, sin)) in table.chunks_mut(shape[1]).zip(cos.data().chunks(pairs).zip(sin.data().chunks(pairs)))
        {
            row[..pairs].copy_from_slice(cos);
            row[shape[1] / 2..][..pairs].copy_from_slice(sin);
        }
        let interleaved = pairing == Pairing::Interleaved;
        let in_turn = (interleaved && pairs.is_multiple_of(2)).then(|| {
            let fours =
                cos.data().chunks(2).zip(sin.data().chunks(2)).flat_map(|(cos, sin)| [cos[0], cos[1], sin[0], sin[1]]);
            Tensor::from_slice(&device, &[rows, 2 * pairs], &fours.collect::<Vec<f32>>())
        });
        let in_turn = in_turn.transpose()?;
        let table = Tensor::from_slice(device, &shape, &table)?;
        let fused = in_turn.unwrap_or_else(|| table.clone());
        Ok(Rotary { rotation: Rotation { table, pairs: Pairs { count: pairs, interleaved, back: false }, fused } })
    }

    /// Number of positions in the table.
    pub fn positions(&self) -> usize {
        self.rotation.table.shape()[0]
    }
    /// Number of columns that are rotated.
    pub fn dim(&self) -> usize {
        2 * self.rotation.pairs.count
    }
    /// Which columns form a pair.
    pub fn pairing(&self) -> Pairing {
        if self.rotation.pairs.interleaved { Pairing::Interleaved } else { Pairing::HalfSplit }
    }

    pub(crate) fn rotation(&self) -> &Rotation {
        &self.rotation
    }

    /// The table rows for queries and keys: as given, or starting at each band's offset for queries and at 0 for keys.
    pub(crate) fn rows(&self, given: Option<&[TokenPositions; 2]>, problem: &Problem) -> Result<[Rows; 2]> {
        if problem.extra_keys > 0 {
            return Err(value_error!(
                "rotary positions cannot be combined with add_bias_kv or add_zero_attn: {} keys have no position",
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
        let positions = self.positions();
        Ok([
            queries.rows(problem.batch, problem.len_q, positions)?,
            keys.rows(problem.batch, problem.len_k, positions)?,
        ])
    }

    /// Rotates X `[batch, heads, len, dim]` (any strides; leading axes may be missing as in
    /// [`Attention::forward`](crate::Attention::forward)). The result is in X's memory order, stored as f32 and rounded
    /// to X's type on download.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn rotate(&self, x: &Tensor, positions: &TokenPositions) -> Result<Tensor> {
        wait_for(self.rotate_async(x, positions))
    }

    /// Like [`Rotary::rotate`], without blocking.
    pub async fn rotate_async(&self, x: &Tensor, positions: &TokenPositions) -> Result<Tensor> {
        let device = common_device(&self.rotation.table, [("x", x)])?;
        Recording::for_step(&device).submit(|to| self.record(to, x, positions)).await
    }

    /// Like [`Rotary::rotate`], recorded into the caller's encoder under the same conditions as
    /// [`Attention::encode`](crate::Attention::encode).
    pub fn encode(
        &self,
        gpu: &Gpu,
        encoder: &mut wgpu::CommandEncoder,
        x: &Tensor,
        positions: &TokenPositions,
    ) -> Result<Tensor> {
        let device = common_device(&self.rotation.table, [("x", x)])?;
        Recording::for_encoder(gpu, encoder, &device)?.encode(encoder, |to| self.record(to, x, positions))
    }

    /// An error if rows of `dim` columns are narrower than the rotation.
    pub(crate) fn check_width(&self, name: &str, shape: &[usize], dim: usize) -> Result<()> {
        if self.dim() > dim {
            return Err(shape_error!("the rotary dimension {} is more than the width of {name} {shape:?}", self.dim()));
        }
        Ok(())
    }

    pub(crate) fn record(&self, recording: &mut Recording, x: &Tensor, positions: &TokenPositions) -> Result<Tensor> {
        x.expect_float("x")?;
        let four = x.as_four_axes("x")?;
        let [batch, _, len, dim] = four.four_axes();
        self.check_width("x", x.shape(), dim)?;
        let rows = positions.rows(batch, len, self.positions())?;
        recording.rotate(&four, &self.rotation, &rows)?.reshape(x.shape())
    }
}
