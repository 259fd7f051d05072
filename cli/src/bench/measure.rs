//! Timing one shape on one device.

use std::time::{Duration, Instant};

use wgpu_attention::position::shaw::RelativeKeys;
use wgpu_attention::position::t5::{self, Buckets};
use wgpu_attention::position::{Pairing, Rotary, RotaryConfig, alibi};
use wgpu_attention::problem::Problem;
use wgpu_attention::{
    Align, Attended, Attention, Cotangents, Device, Gpu, Mask, Method, MultiHeadAttention, MultiHeadConfig, Profile,
    Tensor, WantedGradients, Weights, project,
};

use super::shape::{Extra, Pass, Shape, Work};
use crate::error::{Result, fail};

/// How much to measure.
#[derive(Clone, Copy, Debug)]
pub enum Effort {
    /// This number of calls.
    Calls(usize),
    /// Calls for this many seconds, but at least `LEAST_CALLS`.
    Seconds(f64),
}

const LEAST_CALLS: usize = 3;
const MOST_CALLS: usize = 1000;

/// Times in milliseconds; each call is waited for.
#[derive(Clone, Debug, PartialEq)]
pub struct Times {
    pub first: f64,
    pub best: f64,
    pub median: f64,
    /// By the adapter's own clock.
    pub gpu: Option<f64>,
    /// On the CPU backend: the share of the threads' time in which they do not compute.
    pub idle: Option<f64>,
    /// The number of timed calls.
    pub count: usize,
    /// The kernels that ran.
    pub kernels: Vec<String>,
}

/// Queries, keys and values of a shape.
pub fn operands(shape: &Shape, device: &Device) -> Result<[Tensor; 3]> {
    let Problem { batch, heads_q, heads_kv, len_q, len_k, dim_k, dim_v, .. } = shape.problem;
    Ok([
        noise(device, &[batch, heads_q, len_q, dim_k], 1)?,
        noise(device, &[batch, heads_kv, len_k, dim_k], 2)?,
        noise(device, &[batch, heads_kv, len_k, dim_v], 3)?,
    ])
}

/// A call with its operands on the device.
enum Prepared {
    Attention {
        attention: Attention,
        operands: Box<[Tensor; 3]>,
    },
    /// With the results of a forward, unless that is timed, too.
    Gradients {
        attention: Attention,
        operands: Box<[Tensor; 3]>,
        cotangents: Cotangents,
        attended: Option<Box<Attended>>,
    },
    Layer {
        attention: Attention,
        layer: Box<MultiHeadAttention>,
        x: Tensor,
    },
    Projection {
        x: Tensor,
        weight: Tensor,
    },
}

impl Prepared {
    fn new(shape: &Shape, device: &Device, method: Method, weights: Weights) -> Result<Prepared> {
        let Problem { batch, heads_q, len_q, .. } = shape.problem;
        let mut attention = Attention::new().method(method).weights(weights);
        if shape.causal {
            attention = attention.causal(Align::BottomRight);
        }
        if let Some(extra) = shape.extra {
            attention = with_extra(attention, shape, extra, device)?;
        }
        Ok(match shape.work {
            Work::Attention if shape.pass != Pass::Forward => {
                let attention = attention.lse(true);
                let operands = Box::new(operands(shape, device)?);
                let [q, k, v] = &*operands;
                let attended = match shape.pass {
                    Pass::Backward => Some(Box::new(attention.forward(q, k, v)?)),
                    _ => None,
                };
                let gradient = noise(device, &[batch, heads_q, len_q, shape.problem.dim_v], 7)?;
                Prepared::Gradients { attention, operands, cotangents: Cotangents::of_output(gradient), attended }
            }
            Work::Attention => Prepared::Attention { attention, operands: Box::new(operands(shape, device)?) },
            Work::Layer => {
                let config = MultiHeadConfig::new(shape.width(), heads_q)?;
                let layer = Box::new(MultiHeadAttention::new(device, config, 1)?);
                let x = noise(device, &[batch, len_q, shape.width()], 4)?;
                Prepared::Layer { attention, layer, x }
            }
            Work::Projection => {
                let width = shape.width();
                let x = noise(device, &[batch, len_q, width], 4)?;
                Prepared::Projection { x, weight: noise(device, &[width, width], 5)? }
            }
        })
    }

    fn forward(&self) -> Result<()> {
        match self {
            Prepared::Attention { attention, operands } => {
                let [q, k, v] = &**operands;
                attention.forward(q, k, v)?;
            }
            Prepared::Gradients { attention, operands, cotangents, attended } => {
                let [q, k, v] = &**operands;
                let now = if attended.is_none() { Some(attention.forward(q, k, v)?) } else { None };
                let attended = now.as_ref().or(attended.as_deref()).expect("one of both");
                attention.backward(q, k, v, attended, cotangents, WantedGradients::QKV)?;
            }
            Prepared::Layer { attention, layer, x } => {
                layer.forward(x, x, x, attention)?;
            }
            Prepared::Projection { x, weight } => {
                project(x, weight, None)?;
            }
        }
        Ok(())
    }

    fn profile(&self) -> Result<Profile> {
        Ok(match self {
            Prepared::Attention { attention, operands } => {
                let [q, k, v] = &**operands;
                attention.forward_profiled(q, k, v)?.1
            }
            Prepared::Gradients { attention, operands, cotangents, attended } => {
                let [q, k, v] = &**operands;
                let (now, forward) = match attended {
                    None => Some(attention.forward_profiled(q, k, v)?).unzip(),
                    Some(_) => (None, None),
                };
                let attended = now.as_ref().or(attended.as_deref()).expect("one of both");
                let wanted = WantedGradients::QKV;
                let mut profile = attention.backward_profiled(q, k, v, attended, cotangents, wanted)?.1;
                if let Some(forward) = forward {
                    let add = |a: Option<Duration>, b: Option<Duration>| Some(a? + b?);
                    profile.gpu_time = add(profile.gpu_time, forward.gpu_time);
                    profile.cpu_time = add(profile.cpu_time, forward.cpu_time);
                    profile.kernels = [forward.kernels, profile.kernels].concat();
                }
                profile
            }
            Prepared::Layer { attention, layer, x } => layer.forward_profiled(x, x, x, attention)?.1,
            // Projections are not profiled; only their kernels are listed.
            Prepared::Projection { x, .. } => {
                let device = x.device();
                let ran = device.gpu().map(|gpu| gpu.trace(|| self.forward()));
                let trace = ran.map(|(done, trace)| done.map(|()| trace)).transpose()?.unwrap_or_default();
                let mut kernels: Vec<String> = trace.into_iter().map(|one| one.variant.name).collect();
                kernels.dedup();
                let mut profile = Profile::default();
                profile.kernels = kernels;
                profile
            }
        })
    }

    /// Records a call and returns its results, which must live until the submit.
    fn encode(&self, gpu: &Gpu, encoder: &mut wgpu_attention::wgpu::CommandEncoder) -> Result<[Option<Tensor>; 2]> {
        Ok(match self {
            Prepared::Attention { attention, operands } => {
                let [q, k, v] = &**operands;
                let attended = attention.encode(gpu, encoder, q, k, v, None)?;
                [Some(attended.output), attended.weights]
            }
            Prepared::Layer { attention, layer, x } => {
                let output = layer.encode(gpu, encoder, x, x, x, attention)?;
                [Some(output.output), output.weights]
            }
            Prepared::Projection { .. } | Prepared::Gradients { .. } => fail!("it cannot be recorded into an encoder"),
        })
    }

    /// Milliseconds for all calls, until the last one ends.
    fn time(&self, device: &Device, calls: usize) -> Result<f64> {
        let start = Instant::now();
        match device.gpu() {
            Some(gpu) if calls > 1 => {
                let mut encoder = gpu.device().create_command_encoder(&Default::default());
                let mut results = Vec::with_capacity(calls);
                for _ in 0..calls {
                    results.push(self.encode(gpu, &mut encoder)?);
                }
                gpu.queue().submit([encoder.finish()]);
                gpu.wait()?;
            }
            Some(gpu) => {
                self.forward()?;
                gpu.wait()?;
            }
            None => (0..calls).try_for_each(|_| self.forward())?,
        }
        Ok(start.elapsed().as_secs_f64() * 1e3)
    }
}

/// Adds positions or a mask to a call, computed inside the kernels or stored beforehand.
fn with_extra(attention: Attention, shape: &Shape, extra: Extra, device: &Device) -> Result<Attention> {
    let Problem { heads_q, len_q, len_k, dim_k, .. } = shape.problem;
    let offset = shape.problem.band(0).offset;
    let Ok(start) = usize::try_from(offset) else { fail!("{} has queries before position 0", shape.name) };
    Ok(match extra {
        Extra::Rotary { interleaved } => {
            let pairing = if interleaved { Pairing::Interleaved } else { Pairing::HalfSplit };
            let config = RotaryConfig::new(dim_k).pairing(pairing);
            let rotary = Rotary::new(device, &config, len_k.max(start + len_q))?;
            match shape.stored {
                true => attention.rotary_at(rotary, start.into(), 0.into()),
                false => attention.rotary(rotary),
            }
        }
        Extra::Alibi if shape.stored => attention.bias(alibi::bias(device, heads_q, len_q, len_k, offset.into())?),
        Extra::Alibi => attention.alibi(Tensor::from_slice(device, &[heads_q], &alibi::slopes(heads_q)?)?),
        Extra::T5 => {
            let (table, buckets) = (noise(device, &[32, heads_q], 5)?, Buckets::new(!shape.causal));
            match shape.stored {
                true => attention.bias(t5::bias(&table, &buckets, len_q, len_k, offset.into())?),
                false => attention.t5_bias(table, buckets),
            }
        }
        Extra::Shaw => {
            let keys = RelativeKeys::new(&noise(device, &[33, dim_k], 6)?, 16, 16)?;
            match shape.stored {
                true => {
                    let q = noise(device, &[shape.problem.batch, heads_q, len_q, dim_k], 1)?;
                    attention.bias(keys.bias(&q, len_k, offset.into(), None)?)
                }
                false => attention.relative_keys(keys),
            }
        }
        Extra::Mask => {
            let seen = |at: usize| at % len_k <= at / len_k + start;
            let keep: Vec<bool> = (0..len_q * len_k).map(seen).collect();
            attention.mask(Mask::keep_where(Tensor::from_bools(device, &[len_q, len_k], &keep)?)?)
        }
    })
}

/// Uniform numbers between −1 and 1, the same in every run.
fn noise(device: &Device, shape: &[usize], seed: u32) -> Result<Tensor> {
    let mut state = seed;
    let data: Vec<f32> = (0..shape.iter().product())
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect();
    Ok(Tensor::from_slice(device, shape, &data)?)
}

/// Rejects a shape that does not fit into the memory of this machine or of the device, before anything is allocated.
pub fn check_memory(shape: &Shape, device: &Device, weights: bool) -> Result<()> {
    let needed = shape.held(weights);
    for (whose, memory) in [("this machine", Device::Cpu.memory()), ("the adapter", device.memory())] {
        if let Some(memory) = memory.filter(|&memory| needed > memory as f64) {
            fail!("the tensors of {} take {needed:.0} bytes, but {whose} has {memory}", shape.name);
        }
    }
    Ok(())
}

pub fn measure(shape: &Shape, device: &Device, method: Method, weights: Weights, effort: Effort) -> Result<Times> {
    check_memory(shape, device, weights != Weights::None)?;
    let prepared = Prepared::new(shape, device, method, weights)?;
    let first = prepared.time(device, shape.calls)?;
    // A second warm-up call fills pools and caches and ramps up the clocks.
    prepared.time(device, shape.calls)?;
    let started = Instant::now();
    let mut times = Vec::new();
    loop {
        let done = match effort {
            Effort::Calls(calls) => times.len() >= calls,
            Effort::Seconds(seconds) => {
                times.len() >= MOST_CALLS
                    || times.len() >= LEAST_CALLS && started.elapsed() >= Duration::from_secs_f64(seconds)
            }
        };
        if done {
            break;
        }
        times.push(prepared.time(device, shape.calls)?);
    }
    let count = times.len();

    // Profile in separate calls, so that reading the adapter's clock does not affect the times above.
    let profile = prepared.profile()?;
    let mut gpu_times: Vec<Duration> = Vec::new();
    if shape.calls == 1 && profile.gpu_time.is_some() {
        for _ in 0..count.min(10) {
            gpu_times.extend(prepared.profile()?.gpu_time);
        }
    }
    let mut gpu_times: Vec<f64> = gpu_times.into_iter().map(|time| time.as_secs_f64() * 1e3).collect();
    let mut idle_shares = Vec::new();
    if shape.calls == 1 && profile.cpu_time.is_some() {
        for _ in 0..count.min(100) {
            let start = Instant::now();
            let computed = prepared.profile()?.cpu_time;
            let wall = start.elapsed().as_secs_f64();
            idle_shares.extend(computed.map(|computed| (1.0 - computed.as_secs_f64() / wall).clamp(0.0, 1.0)));
        }
    }
    let best = times.iter().copied().fold(f64::INFINITY, f64::min);
    let median = median(&mut times).expect("at least one call");
    let (gpu, idle) = (self::median(&mut gpu_times), self::median(&mut idle_shares));
    Ok(Times { first, best, median, gpu, idle, count, kernels: profile.kernels })
}

/// The middle value, or the mean of the two in the middle.
fn median(times: &mut [f64]) -> Option<f64> {
    times.sort_by(f64::total_cmp);
    let middle = times.len() / 2;
    match times.len() {
        0 => None,
        n if n % 2 == 1 => Some(times[middle]),
        _ => Some((times[middle - 1] + times[middle]) / 2.0),
    }
}

#[cfg(test)]
mod tests {
    use super::median;

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median(&mut []), None);
        assert_eq!(median(&mut [3.0, 1.0, 9.0]), Some(3.0));
        assert_eq!(median(&mut [4.0, 1.0, 2.0, 9.0]), Some(3.0));
    }
}
