//! Gradients on every device against the backward of the f64 reference.

use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;
use wgpu_attention::problem::{Layout, Problem};
use wgpu_attention::reference::{self, View};
use wgpu_attention::{Attention, Cotangents, Device, Dtype, Gradients, Result, Tensor, WantedGradients, Weights};

use crate::kit::{Call, Data, bits, devices, noise, wide};

/// Cotangents of a call, row-major; some are left out.
struct Loss {
    output: Option<Vec<f32>>,
    lse: Option<Vec<f32>>,
    /// And whether the weights are averaged.
    weights: Option<(Vec<f32>, bool)>,
}

impl Loss {
    fn random(problem: &Problem, seed: u64) -> Loss {
        let mut rng = Pcg64::seed_from_u64(seed ^ 0x6ad);
        let Problem { batch, heads_q, len_q, len_k, dim_v, .. } = *problem;
        let which = seed % 8;
        let rows = batch * heads_q * len_q;
        let averaged = rng.random_bool(0.5);
        let of_weights = if averaged { batch * len_q * len_k } else { rows * len_k };
        Loss {
            output: (which != 1).then(|| noise(&mut rng, rows * dim_v)),
            lse: (which % 2 == 1).then(|| noise(&mut rng, rows)),
            weights: (which >= 6).then(|| (noise(&mut rng, of_weights), averaged)),
        }
    }

    fn shapes(problem: &Problem) -> [Vec<usize>; 4] {
        let Problem { batch, heads_q, len_q, len_k, dim_v, .. } = *problem;
        [
            vec![batch, heads_q, len_q, dim_v],
            vec![batch, heads_q, len_q],
            vec![batch, heads_q, len_q, len_k],
            vec![batch, len_q, len_k],
        ]
    }

    fn upload(&self, device: &Device, problem: &Problem) -> Result<Cotangents> {
        let [output, lse, weights, averaged] = Loss::shapes(problem);
        let mut cotangents = Cotangents::new();
        if let Some(values) = &self.output {
            cotangents = cotangents.output(Tensor::from_slice(device, &output, values)?);
        }
        if let Some(values) = &self.lse {
            cotangents = cotangents.lse(Tensor::from_slice(device, &lse, values)?);
        }
        if let Some((values, is_averaged)) = &self.weights {
            let shape = if *is_averaged { &averaged } else { &weights };
            cotangents = cotangents.weights(Tensor::from_slice(device, shape, values)?);
        }
        Ok(cotangents)
    }

    fn truth(&self, call: &Call, data: &Data) -> reference::Gradients {
        call.with_inputs(data, |problem, inputs| {
            let layouts = Loss::shapes(problem).map(|shape| Layout::contiguous(&shape).unwrap());
            let [output, lse] = [&self.output, &self.lse].map(|values| values.as_ref().map(|values| wide(values)));
            let weights = self.weights.as_ref().map(|(values, averaged)| (wide(values), *averaged));
            let cotangents = reference::Cotangents {
                output: output.as_ref().map(|data| View { data, layout: &layouts[0] }),
                lse: lse.as_ref().map(|data| View { data, layout: &layouts[1] }),
                weights: weights
                    .as_ref()
                    .map(|(data, averaged)| View { data, layout: &layouts[if *averaged { 3 } else { 2 }] }),
            };
            let outputs = reference::attention(problem, inputs);
            reference::backward(problem, inputs, &outputs, &cotangents, WantedGradients::ALL)
        })
    }
}

/// The gradients of a call on a device.
fn run(call: &Call, data: &Data, loss: &Loss, device: &Device, wanted: Option<WantedGradients>) -> Result<Gradients> {
    let [q, k, v] = call.operands(device, data, Dtype::F32)?;
    let weights = match &loss.weights {
        None => Weights::None,
        Some((_, true)) => Weights::Averaged,
        Some((_, false)) => Weights::PerHead,
    };
    let attention = call.ruled(device, data, call.attention().lse(true).weights(weights))?;
    let attended = attention.forward(&q, &k, &v)?;
    let cotangents = loss.upload(device, &call.problem())?;
    attention.backward(&q, &k, &v, &attended, &cotangents, wanted.unwrap_or(attention.gradients()))
}

fn norm(values: &[f64]) -> f64 {
    values.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// How far a gradient is from the truth: the norm of the difference relative to that of the truth, or of `terms` if that
/// is larger: a gradient whose terms cancel has few digits in f32.
#[track_caller]
fn assert_near(what: &str, got: &[f32], expected: &[f64], terms: f64) {
    assert_eq!(got.len(), expected.len(), "{what}");
    let difference: Vec<f64> = got.iter().zip(expected).map(|(a, b)| f64::from(*a) - b).collect();
    let (error, size) = (norm(&difference), norm(expected).max(terms));
    assert!(error <= 1e-5 * size, "{what}: off by {error:.3e} of {size:.3e}");
}

#[track_caller]
fn compare(what: &str, call: &Call, data: &Data, got: &Gradients, truth: &reference::Gradients) {
    // The size of the terms of a gradient, if none cancelled: of the products with dO and V.
    let problem = call.problem();
    let rms = |values: &[f32]| norm(&wide(values)) / (values.len().max(1) as f64).sqrt();
    let rows = (problem.batch * problem.heads_q * problem.len_q) as f64;
    let of_scores = rms(&data.v).max(0.1) * (problem.dim_v as f64).sqrt() * rows.sqrt() * 0.1;
    let scale = f64::from(problem.scale).abs();
    let width = (problem.dim_k as f64).sqrt();
    let download = |x: &Option<Tensor>| x.as_ref().map(|x| x.download().unwrap());
    for (name, got, truth, terms) in [
        ("dQ", download(&got.q), &truth.q, of_scores * scale * rms(&data.k) * width),
        ("dK", download(&got.k), &truth.k, of_scores * scale * rms(&data.q) * width),
        ("dV", download(&got.v), &truth.v, 0.0),
        ("dsink", download(&got.sink), &truth.sink, of_scores),
        ("dscale", download(&got.scale), &truth.scale.map(|x| vec![x]), of_scores * width),
    ] {
        if let (Some(got), Some(truth)) = (got, truth) {
            assert_near(&format!("{name} of {what}"), &got, truth, terms);
        }
    }
    for (n, (got, truth)) in got.biases.iter().zip(truth.biases.as_ref().unwrap()).enumerate() {
        assert_near(&format!("dbias {n} of {what}"), &got.download().unwrap(), truth, of_scores);
    }
}

#[test]
fn random_calls_have_the_references_gradients() {
    for (name, device) in devices() {
        for seed in 0..60 {
            let call = Call::random(seed);
            let (data, loss) = (call.data(), Loss::random(&call.problem(), seed));
            let what = format!("call {seed} on {name}: {call:?}");
            let got = run(&call, &data, &loss, &device, None).unwrap_or_else(|error| panic!("{what}: {error}"));
            compare(&what, &call, &data, &got, &loss.truth(&call, &data));
        }
    }
}
