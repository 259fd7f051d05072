//! The self-test that a candidate must pass before it is timed.

use half::{bf16, f16};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;

use crate::attention::Attention;
use crate::call::{Mask, Operands};
use crate::device::Device;
use crate::error::{Result, value_error};
use crate::gpu::Gpu;
use crate::kernels::Method;
use crate::lower::Recording;
use crate::position::{Distance, Rotary};
use crate::problem::{Align, Dtype, Layout, MaskMeaning, Positions, Problem, Rows};
use crate::reference::{self, View};
use crate::tensor::Tensor;

/// A small random call and its true result.
pub(super) struct Case {
    attention: Attention,
    tensors: [Tensor; 3],
    truth: reference::Outputs,
    /// Tolerance for the output, relative to its largest value.
    tolerance: f64,
}

/// Relative error allowed for sums in f32.
const TOLERANCE: f64 = 1e-5;

impl Case {
    /// As wide as `problem`, with the same types and kinds of rules, but few rows and keys, because the reference is
    /// slow.
    pub fn new(gpu: &Gpu, attention: &Attention, problem: &Problem, operands: &Operands) -> Result<Case> {
        let mut rng = Pcg64::seed_from_u64(0x7e57);
        let device = Device::Gpu(gpu.clone());
        let heads_kv = problem.heads_kv.min(2);
        let heads_q = heads_kv * problem.group().min(4);
        let (len_q, len_k) = (problem.len_q.min(24), problem.len_k.min(300));
        let shapes = [
            [1, heads_q, len_q, problem.dim_k],
            [1, heads_kv, len_k, problem.dim_k],
            [1, heads_kv, len_k, problem.dim_v],
        ];
        let mut values = Vec::with_capacity(3);
        let mut tensors = Vec::with_capacity(3);
        for (shape, like) in shapes.iter().zip([&operands.q, &operands.k, &operands.v]) {
            let (tensor, data) = random(&mut rng, &device, shape, 4.0, like)?;
            tensors.push(tensor);
            values.push(data);
        }
        let square = [1, heads_q, len_q, len_k];
        let count: usize = square.iter().product();
        let mut attention = attention.rules_alone([len_q, len_k], heads_q)?.lse(true);
        let mut masks = Vec::new();
        for like in &operands.masks {
            let keep = like.meaning() == MaskMeaning::Keep;
            let mask: Vec<bool> = (0..count).map(|_| rng.random_bool(0.9) == keep).collect();
            attention = attention.mask(Mask::new(Tensor::from_bools(&device, &square, &mask)?, like.meaning())?);
            masks.push((mask, like.meaning()));
        }
        let mut biases = Vec::new();
        for like in &operands.biases {
            let (bias, data) = random(&mut rng, &device, &square, 2.0, like)?;
            attention = attention.bias(bias);
            biases.push(data);
        }
        let mut sink = None;
        if let Some(like) = &operands.sink {
            let (tensor, data) = random(&mut rng, &device, &[heads_q], 4.0, like)?;
            attention = attention.sink(tensor);
            sink = Some(data);
        }
        let tensors: [Tensor; 3] = tensors.try_into().expect("three operands");
        let [q, k, v] = &tensors;
        let (problem, laid) = attention.operands(&mut Recording::new(&device), q, k, v)?;
        let distance = attention.distance.as_ref().map(InF64::new).transpose()?;
        let angles = attention.rotary.as_ref().map(|(rotary, _)| angles_of(rotary)).transpose()?;
        let first = usize::try_from(problem.band(0).offset);
        let truth = reference::attention(
            &problem,
            &reference::Inputs {
                q: View { data: &values[0], layout: laid.q.layout() },
                k: View { data: &values[1], layout: laid.k.layout() },
                v: View { data: &values[2], layout: laid.v.layout() },
                rules: reference::Rules {
                    masks: (masks.iter().zip(&laid.masks))
                        .map(|((data, meaning), mask)| {
                            (View { data: data.as_slice(), layout: mask.tensor().layout() }, *meaning)
                        })
                        .collect(),
                    biases: (biases.iter().zip(&laid.biases))
                        .map(|(data, bias)| View { data: data.as_slice(), layout: bias.layout() })
                        .collect(),
                    sink: (sink.iter().zip(&laid.sink))
                        .map(|(data, sink)| View { data: data.as_slice(), layout: sink.layout() })
                        .next(),
                    distance: distance.as_ref().map(InF64::distance),
                    rotary: angles.as_ref().map(|(angles, [cos, sin], interleaved)| reference::Rotary {
                        cos: View { data: angles, layout: cos },
                        sin: View { data: angles, layout: sin },
                        interleaved: *interleaved,
                        rows: [first.expect("rotary positions begin at 0"), 0].map(Rows::From),
                    }),
                    ..reference::Rules::default()
                },
            },
        );
        let half_ulp = match operands.q.dtype() {
            Dtype::F16 => 1.0 / 2048.0,
            Dtype::BF16 => 1.0 / 256.0,
            Dtype::F32 | Dtype::Bool => 0.0,
        };
        Ok(Case { attention, tensors, truth, tolerance: half_ulp + TOLERANCE })
    }

    /// Checks calls with and without the LSE, which are two kernels.
    pub fn check(&self, method: Method) -> Result<()> {
        let [q, k, v] = &self.tensors;
        for lse in [true, false] {
            let attended = self.attention.clone().lse(lse).method(method).forward(q, k, v)?;
            agree("output", &attended.output.download()?, &self.truth.output, self.tolerance)?;
            if let Some(lse) = attended.lse {
                agree("LSE", &lse.download()?, &self.truth.lse, TOLERANCE)?;
            }
        }
        Ok(())
    }
}

impl Attention {
    /// The softcap and positional rules, for one batch entry of `[len_q, len_k]` and the first `heads` heads, without
    /// masks and biases.
    fn rules_alone(&self, [len_q, len_k]: [usize; 2], heads: usize) -> Result<Attention> {
        // Rows with explicit positions are rotated by a separate kernel.
        let rotary = self.rotary.clone().filter(|(_, given)| given.is_none());
        let key_length = self.positions.key_lengths.is_some().then(|| len_k.max(2) - 1);
        // Rotary positions begin at 0, so with more queries than keys the two cannot end at the same position.
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
}

/// An error unless each value is within `tolerance` times the largest, and non-finite values match exactly.
fn agree(what: &str, actual: &[f32], expected: &[f64], tolerance: f64) -> Result<()> {
    let largest = expected.iter().filter(|x| x.is_finite()).fold(0.0f64, |most, x| most.max(x.abs())).max(1e-30);
    for (n, (&actual, &expected)) in actual.iter().zip(expected).enumerate() {
        let actual = f64::from(actual);
        // False for NaN.
        let close = actual == expected || (actual - expected).abs() <= tolerance * largest;
        if !close {
            return Err(value_error!("its self-test failed: {what} {n} is {actual} instead of {expected}"));
        }
    }
    Ok(())
}

/// Values over a range of `span` around 0 that `like`'s types represent exactly, stored like `like`.
fn random(rng: &mut Pcg64, device: &Device, shape: &[usize], span: f32, like: &Tensor) -> Result<(Tensor, Vec<f64>)> {
    let count = shape.iter().product();
    let value = |_| like.stored().round(rng.random::<f32>() * span - span / 2.0);
    let data: Vec<f32> = (0..count).map(value).collect();
    let tensor = match like.stored() {
        Dtype::F16 => Tensor::from_slice(device, shape, &data.iter().map(|&x| f16::from_f32(x)).collect::<Vec<_>>()),
        Dtype::BF16 => Tensor::from_slice(device, shape, &data.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>()),
        Dtype::F32 | Dtype::Bool => Tensor::from_slice(device, shape, &data)?.with_dtype(like.dtype()),
    };
    Ok((tensor?, data.into_iter().map(f64::from).collect()))
}

fn in_f64(tensor: &Tensor) -> Result<Vec<f64>> {
    Ok(tensor.download()?.into_iter().map(f64::from).collect())
}

/// A rotary's table, its cosines and sines in it, and whether adjacent columns form a pair.
fn angles_of(rotary: &Rotary) -> Result<(Vec<f64>, [Layout; 2], bool)> {
    let rotation = rotary.rotation();
    let width = rotation.table.shape()[1];
    let all = Layout::contiguous(rotation.table.shape())?;
    let [cos, sin] = [all.narrow(1, 0, rotation.pairs.count)?, all.narrow(1, width / 2, rotation.pairs.count)?];
    Ok((in_f64(&rotation.table)?, [cos, sin], rotation.pairs.interleaved))
}

/// A bias by distance in f64.
struct InF64 {
    table: Vec<f64>,
    layout: Layout,
    kind: Kind,
}

enum Kind {
    Alibi,
    /// The smallest distance, and the bucket of each from there to the largest.
    T5(i64, Vec<usize>),
    /// The number of keys before that of distance 0.
    Shaw(usize),
}

impl InF64 {
    fn new(distance: &Distance) -> Result<InF64> {
        let (table, kind) = match distance {
            Distance::Alibi(slopes) => (slopes, Kind::Alibi),
            Distance::T5(table, buckets) => {
                let [low, high] = buckets.range()?.map(i64::from);
                (table, Kind::T5(low, (low..=high).map(|distance| buckets.bucket(distance)).collect::<Result<_>>()?))
            }
            Distance::Shaw(keys) => (keys.table(), Kind::Shaw(keys.row(0))),
        };
        Ok(InF64 { table: in_f64(table)?, layout: Layout::contiguous(table.shape())?, kind })
    }

    fn distance(&self) -> reference::Distance<'_> {
        let table = View { data: &self.table, layout: &self.layout };
        match &self.kind {
            Kind::Alibi => reference::Distance::Alibi { slopes: table },
            Kind::T5(first, buckets) => reference::Distance::T5 { table, first: *first, buckets },
            Kind::Shaw(left) => reference::Distance::Shaw { keys: table, left: *left },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn self_tests_can_fail() {
        assert!(agree("output", &[1.0, f32::NEG_INFINITY], &[1.0, f64::NEG_INFINITY], 1e-5).is_ok());
        for wrong in [[1.001, 0.0], [f32::NAN, 0.0], [1.0, f32::NAN], [f32::INFINITY, 0.0]] {
            assert!(agree("output", &wrong, &[1.0, 0.0], 1e-5).is_err(), "{wrong:?}");
        }
        assert!(agree("LSE", &[0.0], &[f64::NEG_INFINITY], 1e-5).is_err());
    }
}
