//! Cases of transformers' positional methods.

use wgpu_attention::position::alibi::slopes;
use wgpu_attention::position::shaw::RelativeKeys;
use wgpu_attention::position::t5::{self, Buckets};
use wgpu_attention::position::{
    LongRope, Pairing, PositionTable, Rotary, RotaryConfig, RotaryScaling, TokenPositions, Yarn, sinusoidal_halves,
};
use wgpu_attention::{Align, Attention, Device, Tensor, Weights, project};

use super::case::{Case, F32_SUMS, F32_ULPS, as_flag, as_float, as_int, held};
use super::compare::{Comparison, largest_difference, largest_finite};
use super::stop::Stop;
use crate::array::{Array, Values};
use crate::error::{Error, Result, fail};

/// Compares results with a case's answers. Every answer must be requested, except for gradients.
struct Held<'a> {
    case: &'a Case,
    asked: Vec<String>,
    all: Vec<Comparison>,
}

impl<'a> Held<'a> {
    fn new(case: &'a Case) -> Held<'a> {
        Held { case, asked: Vec::new(), all: Vec::new() }
    }

    fn answer(&mut self, name: String) -> Result<Array> {
        let array = self.case.tensor(&name);
        self.asked.push(name);
        array
    }

    /// Against float64, within `allowed` times the largest value.
    fn truth(&mut self, name: &str, got: &Array, allowed: f64) -> Result<()> {
        let truth = self.answer(format!("ref64.{name}"))?;
        let limit = allowed * largest_finite(&truth.to_f64());
        self.all.push(held(name, "ref64", got, &truth, |_| limit));
        Ok(())
    }

    /// The largest error of transformers' own f32 result.
    fn own_error(&mut self, name: &str) -> Result<f64> {
        let (own, truth) = (self.answer(format!("out32.{name}"))?, self.answer(format!("ref64.{name}"))?);
        Ok(largest_difference(&own.to_f32(), &truth.to_f64()))
    }

    /// Against float64, within twice the error of transformers' f32 and `F32_ULPS`.
    fn truth_beside_own(&mut self, name: &str, got: &Array, own: f64) -> Result<()> {
        let truth = self.answer(format!("ref64.{name}"))?;
        let limit = 2.0 * own + F32_ULPS * largest_finite(&truth.to_f64());
        self.all.push(held(name, "ref64", got, &truth, |_| limit));
        Ok(())
    }

    /// Against transformers' f32.
    fn f32(&mut self, name: &str, got: &Array, allowed: impl Fn(f64) -> f64) -> Result<()> {
        let own = self.answer(format!("out32.{name}"))?;
        self.all.push(held(name, "out32", got, &own, allowed));
        Ok(())
    }

    fn finish(self) -> Result<Vec<Comparison>, Stop> {
        for name in self.case.tensor_names() {
            let is_answer = ["out.", "out32.", "ref64."].iter().any(|prefix| name.starts_with(prefix));
            if is_answer && !name.starts_with("ref64.grad_") && !self.asked.contains(&name) {
                return Err(Stop::Skip(format!("the output {name} is not known")));
            }
        }
        Ok(self.all)
    }
}

/// ALiBi slopes.
pub fn alibi_slopes(case: &Case) -> Result<Vec<Comparison>, Stop> {
    case.expect_inputs(&[])?;
    let heads = case.count("H")?;
    let got = Array::new(&[heads], Values::F32(slopes(heads)?))?;
    let mut held = Held::new(case);
    for name in ["bloom_slopes", "mpt_slopes"] {
        held.f32(name, &got, |x| F32_ULPS * x.abs())?;
    }
    held.finish()
}

/// Vaswani et al.'s sinusoids.
pub fn sinusoidal(case: &Case, device: &Device) -> Result<Vec<Comparison>, Stop> {
    case.expect_inputs(&[])?;
    let table = PositionTable::sinusoidal(device, case.count("n")?, case.count("d")?)?;
    let mut held = Held::new(case);
    let own = held.own_error("pe")?;
    held.truth_beside_own("pe", &Array::download(table.tensor())?, own)?;
    held.finish()
}

/// tensor2tensor's.
pub fn sinusoidal_t2t(case: &Case) -> Result<Vec<Comparison>, Stop> {
    case.expect_inputs(&[])?;
    let table = sinusoidal_halves(0, case.count("n")?, case.count("d")?)?;
    let mut held = Held::new(case);
    held.f32("pe", &Array::new(table.shape(), Values::F32(table.data().to_vec()))?, |_| F32_ULPS)?;
    held.finish()
}

fn buckets(case: &Case) -> Result<Buckets> {
    Ok(Buckets {
        bidirectional: case.flag("bidirectional")?,
        num_buckets: case.count("num_buckets")?,
        max_distance: case.count("max_distance")?,
    })
}

/// T5 buckets.
pub fn t5_bucket(case: &Case) -> Result<Vec<Comparison>, Stop> {
    case.expect_inputs(&["relative_position"])?;
    let (buckets, distances) = (buckets(case)?, case.input("relative_position")?);
    let mut found = Vec::new();
    for &distance in distances.ints("relative_position")? {
        found.push(buckets.bucket(distance)? as i64);
    }
    let mut held = Held::new(case);
    let expected = held.answer("out.bucket".into())?;
    let got = Array::new(distances.shape(), Values::Int(found))?;
    held.all.push(super::case::held("bucket", "out", &got, &expected, |_| 0.0));
    held.finish()
}

/// T5 biases.
pub fn t5_bias(case: &Case, device: &Device) -> Result<Vec<Comparison>, Stop> {
    case.expect_inputs(&[])?;
    let table = case.tensor("param.table")?.upload("table", device)?;
    let mut held = Held::new(case);
    let &[_, _, len_q, len_k] = held.answer("out32.bias".into())?.shape() else {
        fail!("out32.bias must have four axes");
    };
    let bias = t5::bias(&table, &buckets(case)?, len_q, len_k, as_int("offset", case.get("offset"))?.unwrap_or(0))?;
    held.f32("bias", &Array::download(&bias.unsqueeze(0)?)?, |_| 0.0)?;
    held.finish()
}

/// The frequencies of a case, as transformers rounds them.
fn rotary_config(case: &Case) -> Result<RotaryConfig, Stop> {
    let parameters = case.get("rope_parameters");
    let Some(given) = parameters.as_object() else {
        fail!("the case has no \"rope_parameters\"");
    };
    let kind = given.get("rope_type").and_then(|kind| kind.as_str()).unwrap_or("default");
    let known: &[&str] = match kind {
        "default" => &[],
        "linear" => &["factor"],
        "dynamic" => &["factor", "original_max_position_embeddings"],
        "yarn" => &[
            "factor",
            "original_max_position_embeddings",
            "beta_fast",
            "beta_slow",
            "attention_factor",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ],
        "llama3" => &["factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"],
        "longrope" => {
            &["factor", "original_max_position_embeddings", "short_factor", "long_factor", "attention_factor"]
        }
        other => return Err(Stop::Skip(format!("the rope_type {other} is not known"))),
    };
    const ALWAYS: [&str; 3] = ["rope_type", "rope_theta", "partial_rotary_factor"];
    if let Some(odd) = given.keys().map(String::as_str).find(|key| !known.contains(key) && !ALWAYS.contains(key)) {
        return Err(Stop::Skip(format!("{odd} of the rope_type {kind} is not known")));
    }
    let float = |key: &str| as_float(key, &parameters[key]);
    let need = |key: &str| -> Result<f64> {
        float(key)?.ok_or_else(|| Error::Failed(format!("the rope_type {kind} needs a \"{key}\"")))
    };
    let max_len = || case.count("max_position_embeddings");
    let original_len =
        || match as_int("original_max_position_embeddings", &parameters["original_max_position_embeddings"])? {
            Some(len) => usize::try_from(len)
                .map_err(|_| Error::Failed(format!("original_max_position_embeddings = {len} must not be negative"))),
            None => max_len(),
        };
    let stretch = || -> Result<f64> {
        Ok(match float("factor")? {
            Some(factor) => factor,
            None => max_len()? as f64 / original_len()? as f64,
        })
    };
    let list = |key: &str| -> Result<Vec<f64>> {
        let numbers = parameters[key].as_array().and_then(|all| all.iter().map(|x| x.as_f64()).collect());
        numbers.ok_or_else(|| Error::Failed(format!("the rope_type {kind} needs numbers as \"{key}\"")))
    };
    let scaling = match kind {
        "linear" => RotaryScaling::Linear { factor: need("factor")? },
        "dynamic" => RotaryScaling::DynamicNtk { factor: need("factor")?, original_len: max_len()? },
        "yarn" => {
            let yarn = Yarn::new(stretch()?, original_len()?);
            RotaryScaling::Yarn(Yarn {
                beta_fast: float("beta_fast")?.unwrap_or(yarn.beta_fast),
                beta_slow: float("beta_slow")?.unwrap_or(yarn.beta_slow),
                attention_factor: float("attention_factor")?,
                mscale: float("mscale")?,
                mscale_all_dim: float("mscale_all_dim")?,
                truncate: as_flag("truncate", &parameters["truncate"], true)?,
                ..yarn
            })
        }
        "llama3" => RotaryScaling::Llama3 {
            factor: need("factor")?,
            low_freq_factor: need("low_freq_factor")?,
            high_freq_factor: need("high_freq_factor")?,
            original_len: original_len()?,
        },
        "longrope" => RotaryScaling::LongRope(LongRope {
            short_factor: list("short_factor")?,
            long_factor: list("long_factor")?,
            original_len: original_len()?,
            factor: stretch()?,
            attention_factor: float("attention_factor")?,
        }),
        _ => RotaryScaling::None,
    };
    let share = float("partial_rotary_factor")?.unwrap_or(1.0);
    let dim = (case.count("head_dim")? as f64 * share) as usize;
    Ok(RotaryConfig::new(dim).base(need("rope_theta")?).scaling(scaling).f32_frequencies(true))
}

/// Llama's rotation with any scaling of its frequencies, and its tables.
pub fn rope_half_split(case: &Case, device: &Device) -> Result<Vec<Comparison>, Stop> {
    case.expect_inputs(&["position_ids", "q", "k"])?;
    let config = rotary_config(case)?;
    let ids = case.input("position_ids")?;
    let positions = ids.lengths("position_ids")?;
    let len = positions.iter().max().map_or(0, |last| last.saturating_add(1));
    let mut held = Held::new(case);

    let frequencies = config.frequencies(len)?;
    let got = Array::new(&[frequencies.len()], Values::F64(frequencies))?;
    let expected = held.answer("ref64.inv_freq".into())?;
    held.all.push(super::case::held("inv_freq", "ref64", &got, &expected, |x| F32_ULPS * x.abs()));
    if let Some(factor) = case.float("attention_scaling")? {
        let one = |x: f64| Array::new(&[1], Values::F64(vec![x]));
        let (got, expected) = (one(config.attention_factor()?)?, one(factor)?);
        held.all.push(super::case::held("attention_scaling", "case", &got, &expected, |x| F32_ULPS * x));
    }

    let tables = config.tables(len)?;
    let pairs = config.dim / 2;
    let mut own = 0.0;
    for (name, table) in ["cos", "sin"].into_iter().zip(&tables) {
        // transformers repeats each row for both halves.
        let rows = positions.iter().flat_map(|&p| table.data()[p * pairs..][..pairs].repeat(2)).collect();
        let shape: Vec<usize> = ids.shape().iter().copied().chain([config.dim]).collect();
        let error = held.own_error(name)?;
        held.truth_beside_own(name, &Array::new(&shape, Values::F32(rows))?, error)?;
        own += error;
    }
    let rotary = Rotary::from_tables(device, &tables[0], &tables[1], Pairing::HalfSplit)?;
    let positions = TokenPositions::Given(positions);
    for name in ["q", "k"] {
        let x = case.input(name)?;
        let rotated = rotary.rotate(&x.upload(name, device)?, &positions)?;
        let own = own * largest_finite(&x.to_f64());
        held.truth_beside_own(&format!("{name}_rot"), &Array::download(&rotated)?, own)?;
    }
    held.finish()
}

/// GPT-J's rotation.
pub fn rope_interleaved(case: &Case, device: &Device) -> Result<Vec<Comparison>, Stop> {
    case.expect_inputs(&["x", "positions"])?;
    let positions = case.input("positions")?.lengths("positions")?;
    let len = positions.iter().max().map_or(0, |last| last.saturating_add(1));
    let mut config = RotaryConfig::new(case.count("rotary_dim")?).pairing(Pairing::Interleaved);
    config.base = case.float("theta")?.unwrap_or(config.base);
    // [batch, len, heads, dim] in and out.
    let x = case.upload("x", device)?.permute(&[0, 2, 1, 3])?;
    let rotated = Rotary::new(device, &config, len)?.rotate(&x, &TokenPositions::Given(positions))?;
    let mut held = Held::new(case);
    held.truth("out", &Array::download(&rotated.permute(&[0, 2, 1, 3])?)?, F32_ULPS)?;
    held.finish()
}

/// `x · Wᵀ + b` with the case's parameters, split into heads: `[batch, heads, len, dim]`.
fn heads_of(case: &Case, x: &Tensor, name: &str, heads: usize) -> Result<Tensor> {
    let y = linear(case, x, name)?;
    let &[batch, len, width] = y.shape() else { fail!("x {:?} must be [batch, len, dim]", x.shape()) };
    if heads == 0 || !width.is_multiple_of(heads) {
        fail!("{name} gives {width} columns, which do not split into {heads} heads");
    }
    Ok(y.reshape(&[batch, len, heads, width / heads])?.permute(&[0, 2, 1, 3])?)
}

fn linear(case: &Case, x: &Tensor, name: &str) -> Result<Tensor> {
    let device = x.device();
    let weight = case.tensor(&format!("param.{name}.weight"))?.upload(name, &device)?;
    let bias_name = format!("param.{name}.bias");
    let bias = match case.tensor_names().contains(&bias_name) {
        true => Some(case.tensor(&bias_name)?.upload(name, &device)?),
        false => None,
    };
    Ok(project(x, &weight, bias.as_ref())?)
}

/// `[batch, heads, len, dim]` as `[batch, len, heads · dim]`.
fn joined(x: &Tensor) -> Result<Tensor> {
    let &[batch, heads, len, dim] = x.shape() else { fail!("{:?} must have four axes", x.shape()) };
    Ok(x.permute(&[0, 2, 1, 3])?.reshape(&[batch, len, heads * dim])?)
}

/// Llama's attention: grouped heads, rotary positions, causal, optionally with a window.
pub fn llama_attention(case: &Case, device: &Device, attention: Attention) -> Result<Vec<Comparison>, Stop> {
    case.expect_inputs(&["x"])?;
    let x = case.upload("x", device)?;
    let (heads_q, heads_kv) = (case.count("Hq")?, case.count("Hkv")?);
    let mut config = RotaryConfig::new(case.count("head_dim")?);
    config.base = case.float("rope_theta")?.unwrap_or(config.base);
    let rotary = Rotary::new(device, &config, x.shape().get(1).copied().unwrap_or(0))?;
    let rotated = |name, heads| -> Result<Tensor> {
        Ok(rotary.rotate(&heads_of(case, &x, name, heads)?, &TokenPositions::From(0))?)
    };
    let (q, k) = (rotated("q_proj", heads_q)?, rotated("k_proj", heads_kv)?);
    let v = heads_of(case, &x, "v_proj", heads_kv)?;
    let mut attention = attention.weights(Weights::PerHead);
    if case.flag("causal")? {
        attention = attention.causal(Align::TopLeft);
    }
    if !case.get("sliding_window").is_null() {
        // The window counts the query's own key.
        let Some(left) = case.count("sliding_window")?.checked_sub(1) else {
            fail!("\"sliding_window\" is 0; it counts the query's own key");
        };
        attention = attention.window(Some(left), None);
    }
    against_layer(case, attention.forward(&q, &k, &v)?, "o_proj")
}

/// Attention with the relative keys of Shaw et al.
pub fn shaw_relative_key(case: &Case, device: &Device, attention: Attention) -> Result<Vec<Comparison>, Stop> {
    case.expect_inputs(&["x"])?;
    let x = case.upload("x", device)?;
    let heads = case.count("heads")?;
    let part = |name| heads_of(case, &x, name, heads);
    let (q, k, v) = (part("linear_q")?, part("linear_k")?, part("linear_v")?);
    let table = case.tensor("param.distance_embedding.weight")?.upload("distance_embedding", device)?;
    let keys = RelativeKeys::new(&table, case.count("left_max")?, case.count("right_max")?)?;
    let attended = attention.relative_keys(keys).weights(Weights::PerHead).forward(&q, &k, &v)?;
    against_layer(case, attended, "linear_out")
}

/// Compares a layer's output and weights with float64.
fn against_layer(case: &Case, attended: wgpu_attention::Attended, output: &str) -> Result<Vec<Comparison>, Stop> {
    let out = linear(case, &joined(&attended.output)?, output)?;
    let mut held = Held::new(case);
    held.truth("out", &Array::download(&out)?, F32_SUMS)?;
    let weights = attended.weights.expect("asked for");
    held.truth("weights", &Array::download(&weights)?, F32_SUMS)?;
    held.finish()
}

/// Attention with a learned sink per head, as in gpt-oss; the output is `[batch, len, heads, dim]`.
pub fn sink_attention(case: &Case, device: &Device, attention: Attention) -> Result<Vec<Comparison>, Stop> {
    case.expect_inputs(&["q", "k", "v", "sinks", "mask"])?;
    let [q, k, v] = case.operands(device)?;
    let mut attention = attention.sink(case.upload("sinks", device)?).weights(Weights::PerHead);
    if let Some(mask) = case.optional("mask")? {
        attention = attention.bias(mask.upload("mask", device)?);
    }
    let attended = attention.forward(&q, &k, &v)?;
    let mut results = vec![("out", Array::download(&attended.output.permute(&[0, 2, 1, 3])?)?)];
    if let Some(weights) = &attended.weights {
        results.push(("weights", Array::download(weights)?));
    }
    case.against_torch(q.dtype(), "out", &results)
}
