//! Gradients on every device against the backward of the f64 reference.

use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;
use wgpu_attention::position::{Pairing, Rotary, RotaryConfig, TokenPositions};
use wgpu_attention::problem::{Align, Layout, MaskMeaning, Positions, Problem, Rows};
use wgpu_attention::reference::{self, Inputs, View};
use wgpu_attention::{
    Attended, Attention, Cotangents, Device, Dtype, EmptyRows, Gradients, Mask, Result, Tensor, WantedGradients,
    Weights,
};

use wgpu_attention_conformance::{Stored, golden_names};

use crate::distance::{Distance, distances};
use crate::kit::{Call, Data, Wide, as_gpus, bits, devices, largest, noise, wide};
use crate::rotary::written_out;

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

    fn truth(&self, problem: &Problem, inputs: &Inputs<'_>) -> reference::Gradients {
        let layouts = Loss::shapes(problem).map(|shape| Layout::contiguous(&shape).unwrap());
        let [output, lse] = [&self.output, &self.lse].map(|values| values.as_ref().map(|values| wide(values)));
        let weights = self.weights.as_ref().map(|(values, averaged)| (wide(values), *averaged));
        let cotangents = reference::Cotangents {
            output: output.as_ref().map(|data| View { data, layout: &layouts[0] }),
            lse: lse.as_ref().map(|data| View { data, layout: &layouts[1] }),
            weights: (weights.as_ref())
                .map(|(data, averaged)| View { data, layout: &layouts[if *averaged { 3 } else { 2 }] }),
        };
        let outputs = reference::attention(problem, inputs);
        reference::backward(problem, inputs, &outputs, &cotangents, WantedGradients::ALL)
    }

    /// The call with the results that the loss reads.
    fn ask(&self, attention: Attention) -> Attention {
        attention.lse(true).weights(match &self.weights {
            None => Weights::None,
            Some((_, true)) => Weights::Averaged,
            Some((_, false)) => Weights::PerHead,
        })
    }
}

/// The gradients of a call on a device: all that it has, or those that are wanted.
fn gradients(
    device: &Device,
    attention: &Attention,
    [q, k, v]: &[Tensor; 3],
    (loss, problem): (&Loss, &Problem),
    wanted: Option<WantedGradients>,
) -> Result<Gradients> {
    let attention = loss.ask(attention.clone());
    let attended = attention.forward(q, k, v)?;
    let cotangents = loss.upload(device, problem)?;
    attention.backward(q, k, v, &attended, &cotangents, wanted.unwrap_or(attention.gradients()))
}

/// All gradients of a random call.
fn run(call: &Call, data: &Data, loss: &Loss, device: &Device) -> Result<Gradients> {
    let attention = call.ruled(device, data, call.attention())?;
    let operands = call.operands(device, data, Dtype::F32)?;
    gradients(device, &attention, &operands, (loss, &call.problem()), None)
}

/// The values of every gradient.
fn values(gradients: &Gradients) -> Vec<(String, Vec<f32>)> {
    let Gradients { q, k, v, biases, sink, distance, scale, .. } = gradients;
    let named = [("q", q), ("k", k), ("v", v), ("sink", sink), ("distance", distance), ("scale", scale)];
    let named = named.into_iter().filter_map(|(name, x)| Some((name.to_string(), x.as_ref()?)));
    let biases = biases.iter().enumerate().map(|(n, x)| (format!("bias {n}"), x));
    named.chain(biases).map(|(name, x)| (name, x.download().unwrap())).collect()
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
        ("the gradient by distance", download(&got.distance), &truth.distance, of_scores * scale.max(1.0) * width),
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
    for (name, device) in devices().into_iter().chain(as_gpus()) {
        for seed in 0..60 {
            let call = Call::random(seed);
            let (data, loss) = (call.data(), Loss::random(&call.problem(), seed));
            let what = format!("call {seed} on {name}: {call:?}");
            let got = run(&call, &data, &loss, &device).unwrap_or_else(|error| panic!("{what}: {error}"));
            let truth = call.with_inputs(&data, |problem, inputs| loss.truth(problem, inputs));
            compare(&what, &call, &data, &got, &truth);
        }
    }
}

/// Calls whose positions matter: distances are clipped, offsets differ within a batch, heads share keys.
fn positioned() -> [Call; 3] {
    let causal = Positions { causal: true, align: Align::BottomRight, ..Positions::default() };
    let each = Positions { causal: true, align: Align::PerBatch(vec![30, 11]), ..Positions::default() };
    [
        Call { positions: causal, softcap: Some(3.0), ..Call::plain([2, 4, 40, 16], [2, 2, 70, 16], [2, 2, 70, 12]) },
        Call { positions: each, ..Call::plain([2, 4, 9, 16], [2, 2, 40, 16], [2, 2, 40, 16]) },
        Call { scale: Some(0.0), ..Call::plain([1, 2, 5, 16], [1, 1, 7, 16], [1, 1, 7, 3]) },
    ]
}

#[test]
fn biases_by_distance_have_gradients() {
    for (name, device) in devices() {
        for (c, call) in positioned().iter().enumerate() {
            let (data, problem) = (call.data(), call.problem());
            for (r, (rule, distance)) in distances(call.q[1], call.q[3]).into_iter().enumerate() {
                let what = format!("{rule} on {name}: {call:?}");
                let loss = Loss::random(&problem, (8 * c + 2 * r) as u64);
                let attention = distance.asked(call.attention(), &device, call.q[1], call.q[3]);
                let operands = call.operands(&device, &data, Dtype::F32).unwrap();
                let got = gradients(&device, &attention, &operands, (&loss, &problem), None)
                    .unwrap_or_else(|error| panic!("{what}: {error}"));
                let shape = got.distance.as_ref().unwrap().shape().to_vec();
                let expected = match &distance {
                    Distance::Alibi(_) => vec![call.q[1]],
                    Distance::T5(_, buckets) => vec![buckets.num_buckets, call.q[1]],
                    Distance::Shaw(_, [left, right]) => vec![left + right + 1, call.q[3]],
                };
                assert_eq!(shape, expected, "{what}");
                let truth = distance.with_inputs(call, &data, |problem, inputs| loss.truth(problem, inputs));
                compare(&what, call, &data, &got, &truth);
            }
        }
    }
}

#[test]
fn rotated_calls_have_gradients_of_what_was_not_rotated() {
    for (name, device) in devices() {
        for (pairing, dim) in [(Pairing::HalfSplit, 16), (Pairing::Interleaved, 16), (Pairing::HalfSplit, 6)] {
            let config = RotaryConfig::new(dim).pairing(pairing);
            let rotary = Rotary::new(&device, &config, 80).unwrap();
            for (c, call) in positioned()[..2].iter().enumerate() {
                let (data, problem) = (call.data(), call.problem());
                let loss = Loss::random(&problem, 2 * c as u64);
                let what = format!("{config:?} on {name}: {call:?}");
                let starts = match &call.positions.align {
                    Align::PerBatch(offsets) => offsets.iter().map(|&offset| offset as usize).collect(),
                    _ => vec![call.k[2] - call.q[2]; call.q[0]],
                };
                let (frequencies, factor) = written_out(&config, 80);
                let table = |of: fn(f64) -> f64| -> Vec<f64> {
                    (0..80).flat_map(|row| frequencies.iter().map(move |f| factor * of(f64::from(row) * f))).collect()
                };
                let (cos, sin) = (table(f64::cos), table(f64::sin));
                let layout = Layout::contiguous(&[80, dim / 2]).unwrap();
                let of_queries = starts.iter().flat_map(|&start| (start..start + call.q[2]).map(|row| row as u32));
                let rows = [Rows::Each { rows: of_queries.collect(), per_batch: true }, Rows::From(0)];
                let truth = call.with_inputs(&data, |problem, inputs| {
                    let mut inputs = inputs.clone();
                    inputs.rules.rotary = Some(reference::Rotary {
                        cos: View { data: &cos, layout: &layout },
                        sin: View { data: &sin, layout: &layout },
                        interleaved: pairing == Pairing::Interleaved,
                        rows: rows.clone(),
                    });
                    loss.truth(problem, &inputs)
                });
                let operands = call.operands(&device, &data, Dtype::F32).unwrap();
                let given = [TokenPositions::FromEach(starts.clone()), TokenPositions::From(0)];
                let [queries, keys] = given;
                for attention in
                    [call.attention().rotary(rotary.clone()), call.attention().rotary_at(rotary.clone(), queries, keys)]
                {
                    let got = gradients(&device, &attention, &operands, (&loss, &problem), None)
                        .unwrap_or_else(|error| panic!("{what}: {error}"));
                    compare(&what, call, &data, &got, &truth);
                }
            }
        }
    }
}

#[test]
fn half_precision_operands_have_gradients_of_their_values() {
    for (name, device) in devices() {
        for stored in [Dtype::F16, Dtype::BF16] {
            for seed in [3, 8, 14, 21] {
                let call = Call::random(seed);
                let data = call.data().rounded(stored, stored);
                let (problem, loss) = (call.problem(), Loss::random(&call.problem(), seed));
                let what = format!("{stored} call {seed} on {name}: {call:?}");
                let attention = call.ruled_as(&device, &data, call.attention(), stored).unwrap();
                let operands = call.operands(&device, &data, stored).unwrap();
                let got = gradients(&device, &attention, &operands, (&loss, &problem), None)
                    .unwrap_or_else(|error| panic!("{what}: {error}"));
                let truth = call.with_inputs(&data, |problem, inputs| loss.truth(problem, inputs));
                // The gradients of operands are rounded to their type.
                let digits = if stored == Dtype::F16 { 1e-3 } else { 8e-3 };
                for (part, got, truth) in [("dQ", &got.q, &truth.q), ("dK", &got.k, &truth.k), ("dV", &got.v, &truth.v)]
                {
                    let (got, truth) = (wide(&got.as_ref().unwrap().download().unwrap()), truth.as_ref().unwrap());
                    let difference: Vec<f64> = got.iter().zip(truth).map(|(a, b)| a - b).collect();
                    let most = digits * norm(truth).max(0.1);
                    assert!(norm(&difference) <= most, "{part} of {what}: {} > {most}", norm(&difference));
                }
            }
        }
    }
}

/// Row-major data of `[b, h, i, d]` with the rows for which `spoilt` holds replaced by NaN.
fn spoil(shape: [usize; 4], data: &[f32], spoilt: impl Fn([usize; 3]) -> bool) -> Vec<f32> {
    let [_, heads, len, dim] = shape;
    let row = |n: usize| [n / heads / len, n / len % heads, n % len];
    let of = |(n, x): (usize, &f32)| if spoilt(row(n / dim)) { f32::NAN } else { *x };
    data.iter().enumerate().map(of).collect()
}

#[test]
fn what_is_hidden_changes_no_bit() {
    // Keys from 30 and 20 on are padding; queries before 3 see nothing.
    let (batch, lengths) = (2, [30, 20]);
    let positions = Positions {
        causal: true,
        align: Align::Offset(-3),
        key_lengths: Some(lengths.to_vec()),
        ..Positions::default()
    };
    let call = Call { positions, ..Call::plain([batch, 4, 37, 12], [batch, 2, 45, 12], [batch, 2, 45, 8]) };
    let data = call.data();
    let hidden = |[b, _, j]: [usize; 3]| j >= lengths[b];
    let spoilt = Data { k: spoil(call.k, &data.k, hidden), v: spoil(call.v, &data.v, hidden), ..data.clone() };
    let blind = |[_, _, i]: [usize; 3]| i < 3;
    let loss = Loss::random(&call.problem(), 7);
    let output = loss.output.as_ref().map(|values| spoil([batch, 4, 37, 8], values, blind));
    for (name, device) in devices() {
        let whole = values(&run(&call, &data, &loss, &device).unwrap());
        let without = Loss { output: output.clone(), lse: loss.lse.clone(), weights: loss.weights.clone() };
        let got = values(&run(&call, &spoilt, &without, &device).unwrap());
        for ((part, whole), (_, got)) in whole.iter().zip(&got) {
            assert!(whole.iter().all(|x| x.is_finite()), "{part} on {name}");
            assert_eq!(bits(whole), bits(got), "{part} on {name}");
        }
        // A NaN that is seen reaches what depends on it, and nothing else.
        let seen = |[b, h, j]: [usize; 3]| [b, h, j] == [1, 1, 5];
        let spoilt = Data { k: spoil(call.k, &data.k, seen), ..data.clone() };
        let got = values(&run(&call, &spoilt, &loss, &device).unwrap());
        for ((part, whole), (_, got)) in whole.iter().zip(&got).take(3) {
            assert!(got.iter().any(|x| x.is_nan()), "{part} on {name}");
            // The first batch entry, and the first head of the second.
            let untouched = whole.len() * 3 / 4;
            assert_eq!(bits(&whole[..untouched]), bits(&got[..untouched]), "{part} on {name}");
        }
    }
}

#[test]
fn the_bits_do_not_depend_on_what_else_is_computed() {
    for (name, device) in devices() {
        for seed in [5, 12, 30] {
            let call = Call { masks: vec![], biases: vec![], ..Call::random(seed) };
            let (data, problem) = (call.data(), call.problem());
            let loss = Loss { output: Loss::random(&problem, 0).output, lse: None, weights: None };
            let attention = call.ruled(&device, &data, call.attention()).unwrap();
            let operands = call.operands(&device, &data, Dtype::F32).unwrap();
            let all = values(&gradients(&device, &attention, &operands, (&loss, &problem), None).unwrap());
            for again in 0..3 {
                let got = values(&gradients(&device, &attention, &operands, (&loss, &problem), None).unwrap());
                assert!(
                    all.iter().zip(&got).all(|(a, b)| bits(&a.1) == bits(&b.1)),
                    "run {again} of {call:?} on {name}"
                );
            }
            let alone = |wanted| {
                let got = gradients(&device, &attention, &operands, (&loss, &problem), Some(wanted)).unwrap();
                let got = values(&got);
                assert_eq!(got.len(), 1);
                got.into_iter().next().unwrap()
            };
            let none = WantedGradients::NONE;
            for wanted in [
                WantedGradients { q: true, ..none },
                WantedGradients { k: true, ..none },
                WantedGradients { v: true, ..none },
                WantedGradients { scale: true, ..none },
            ] {
                let (part, got) = alone(wanted);
                let (_, whole) = all.iter().find(|(name, _)| *name == part).unwrap();
                assert_eq!(bits(&got), bits(whole), "{part} alone on {name}: {call:?}");
            }
        }
    }
}

#[test]
fn a_batch_entry_has_the_same_bits_alone() {
    // More queries than are summed at a time.
    let call = Call::plain([3, 2, 600, 20], [3, 1, 70, 20], [3, 1, 70, 20]);
    let (data, problem) = (call.data(), call.problem());
    let loss = Loss { output: Loss::random(&problem, 0).output, lse: None, weights: None };
    let one = Call { q: [1, 2, 600, 20], k: [1, 1, 70, 20], v: [1, 1, 70, 20], ..call.clone() };
    for (name, device) in devices() {
        let whole = values(&run(&call, &data, &loss, &device).unwrap());
        let part = |values: &[f32]| values[values.len() / 3..values.len() * 2 / 3].to_vec();
        let of_one = Data { q: part(&data.q), k: part(&data.k), v: part(&data.v), ..data.clone() };
        let loss = Loss { output: loss.output.as_deref().map(part), lse: None, weights: None };
        let alone = values(&run(&one, &of_one, &loss, &device).unwrap());
        for ((name_of, whole), (_, alone)) in whole.iter().zip(&alone).take(3) {
            assert_eq!(bits(&part(whole)), bits(alone), "{name_of} on {name}");
        }
    }
}

#[test]
fn tensors_without_leading_axes_have_gradients_of_their_shapes() {
    let device = Device::Cpu;
    let x = |shape: &[usize]| {
        let len = shape.iter().product();
        Tensor::from_slice(&device, shape, &noise(&mut Pcg64::seed_from_u64(1), len)).unwrap()
    };
    for shape in [vec![5, 4], vec![2, 5, 4], vec![1, 2, 5, 4]] {
        let (q, bias) = (x(&shape), x(&[5, 5]));
        let attention = Attention::new().lse(true).bias(bias);
        let attended = attention.forward(&q, &q, &q).unwrap();
        let cotangents = Cotangents::of_output(x(&shape)).lse(x(&shape[..shape.len() - 1]));
        let got = attention.backward(&q, &q, &q, &attended, &cotangents, attention.gradients()).unwrap();
        for gradient in [&got.q, &got.k, &got.v] {
            assert_eq!(gradient.as_ref().unwrap().shape(), shape);
        }
        assert_eq!(got.biases[0].shape(), [5, 5]);
        assert_eq!(got.scale.unwrap().shape(), [1]);
        assert!(got.sink.is_none() && got.distance.is_none());
    }
}

#[test]
fn wrong_calls_are_refused_with_the_rule() {
    for (name, device) in devices() {
        let x = |shape: &[usize]| Tensor::from_slice(&device, shape, &vec![0.5f32; shape.iter().product()]).unwrap();
        let q = x(&[1, 2, 3, 4]);
        let attention = Attention::new().lse(true);
        let attended = attention.forward(&q, &q, &q).unwrap();
        let refused = |attention: &Attention, attended: &Attended, cotangents: Cotangents, wanted: WantedGradients| {
            attention.backward(&q, &q, &q, attended, &cotangents, wanted).unwrap_err().to_string()
        };
        let good = || Cotangents::of_output(x(&[1, 2, 3, 4]));
        let qkv = WantedGradients::QKV;
        let without_lse = Attention::new().forward(&q, &q, &q).unwrap();
        let mean = attention.clone().empty_rows(EmptyRows::MeanOfValues);
        for (error, rule) in [
            (refused(&attention, &without_lse, good(), qkv), "Attention::lse(true)"),
            (refused(&attention, &attended, Cotangents::new(), qkv), "at least one cotangent"),
            (refused(&attention, &attended, Cotangents::of_output(x(&[1, 2, 3, 5])), qkv), "must be [1, 2, 3, 4]"),
            (refused(&attention, &attended, good().lse(x(&[1, 2, 4])), qkv), "must be [1, 2, 3]"),
            (
                refused(&attention, &attended, good().weights(x(&[1, 2, 3, 5])), qkv),
                "[batch, len_q, len_k] = [1, 3, 3]",
            ),
            (refused(&attention, &attended, good(), WantedGradients::ALL), "the gradient of a bias is asked for"),
            (refused(&mean, &attended, good(), qkv), "MeanOfValues"),
        ] {
            assert!(error.contains(rule), "{name}: {error}");
        }
        // A query that sees nothing, and a mask that hides a key from all.
        let mask = Mask::new(Tensor::from_bools(&device, &[1, 3], &[true, false, true]).unwrap(), MaskMeaning::Keep);
        let attention = attention.mask(mask.unwrap());
        let attended = attention.forward(&q, &q, &q).unwrap();
        let got = attention.backward(&q, &q, &q, &attended, &good(), qkv).unwrap();
        let dv = got.v.unwrap().download().unwrap();
        assert!(dv[4..8].iter().all(|x| *x == 0.0), "{name}: {dv:?}");
    }
}

/// A stored call of `scaled_dot_product_attention`, or one with sinks, on a device: its gradients by the names in the case.
fn stored(case: &Stored, device: &Device) -> Vec<(&'static str, Tensor)> {
    let upload = |x: &Wide| {
        let values: Vec<f32> = x.row_major().iter().map(|&x| x as f32).collect();
        Tensor::from_slice(device, x.shape(), &values).unwrap()
    };
    let [q, k, v] = ["in.q", "in.k", "in.v"].map(|name| upload(case.need(name)));
    // Leading axes are one batch axis.
    let merged = |x: &Tensor| {
        let (lead, tail) = x.shape().split_at(x.shape().len() - 3);
        x.reshape(&[&[lead.iter().product()], tail].concat()).unwrap()
    };
    let [q, k, v] = [&q, &k, &v].map(merged);
    let mut attention = Attention::new().lse(true);
    if case.flag("is_causal_top_left") {
        attention = attention.causal(Align::TopLeft);
    }
    if let Some(scale) = case.get("scale").as_f64() {
        attention = attention.scale(scale as f32);
    }
    if let Some(cap) = case.get("softcap").as_f64() {
        attention = attention.softcap(cap as f32);
    }
    let mask = if case.tensor("in.sinks").is_some() { "in.mask" } else { "in.attn_mask" };
    let mut has_bias = false;
    match (case.tensor(mask), case.bools(mask)) {
        (Some(mask), Some(bools)) => {
            let mask = Tensor::from_bools(device, mask.shape(), &bools).unwrap();
            attention = attention.mask(Mask::keep_where(mask).unwrap());
        }
        (Some(mask), None) => {
            attention = attention.bias(upload(mask));
            has_bias = true;
        }
        (None, _) => {}
    }
    let mut output = upload(case.need("cot.out"));
    if let Some(sinks) = case.tensor("in.sinks") {
        attention = attention.sink(upload(sinks));
        output = output.permute(&[0, 2, 1, 3]).unwrap();
    }
    let attended = attention.forward(&q, &k, &v).unwrap_or_else(|error| panic!("{}: {error}", case.name));
    let cotangents = Cotangents::of_output(merged(&output));
    let got = attention.backward(&q, &k, &v, &attended, &cotangents, attention.gradients()).unwrap();
    let mut named = vec![("grad_q", got.q.unwrap()), ("grad_k", got.k.unwrap()), ("grad_v", got.v.unwrap())];
    named.extend(got.sink.map(|sink| ("grad_sinks", sink)));
    named.extend(got.biases.into_iter().next().filter(|_| has_bias).map(|bias| ("grad_mask", bias)));
    named
}

/// Within twice the error of PyTorch's own gradients in the case's type, plus a few ulp of the largest value of a row, plus
/// what an LSE in f32 costs: its last digit is a factor on the weights of a row; plus two ulp of the terms that cancel where
/// one key has all the weight: dO·V, and dO·O, which is summed apart. Where the case has no such gradients, an
/// error of 1e-6 of the largest value stands for them.
#[test]
fn gradients_of_other_peoples_calls_are_met() {
    let cases: Vec<Stored> = (golden_names().iter())
        .filter(|name| name.starts_with("torch/sdpa_") || name.starts_with("transformers/sink"))
        .map(|name| Stored::read(name))
        .filter(|case| case.names("ref64.grad_").next().is_some())
        .collect();
    assert!(cases.len() >= 60, "{} cases", cases.len());
    for (device_name, device) in devices() {
        let mut compared = 0;
        for case in &cases {
            let name = &case.name;
            for (part, got) in stored(case, &device) {
                let Some(truth) = case.tensor(&format!("ref64.{part}")) else { continue };
                let (truth, width) = (truth.row_major(), truth.shape().last().copied().unwrap_or(1).max(1));
                let most = largest(&truth);
                // Cases without an LSE have scores below 10.
                let lse = case.tensor("ref64.lse").map_or(10.0, |lse| {
                    lse.row_major().into_iter().filter(|x| x.is_finite()).fold(10.0, |a: f64, b| a.max(b.abs()))
                });
                let row_norm = |name: &str| {
                    let x = case.need(name);
                    x.row_major().chunks(x.shape()[x.shape().len() - 1].max(1)).map(norm).fold(0.0, f64::max)
                };
                let other = match part {
                    "grad_q" => largest(&case.need("in.k").row_major()),
                    "grad_k" => largest(&case.need("in.q").row_major()),
                    _ => 1.0,
                };
                let scale = case.get("scale").as_f64().unwrap_or(1.0 / (case.count("d") as f64).sqrt()).abs();
                let cancelled = match part {
                    "grad_v" => 0.0,
                    "grad_q" | "grad_k" => row_norm("cot.out") * row_norm("in.v") * other * scale,
                    _ => row_norm("cot.out") * row_norm("in.v"),
                };
                let of_lse = (lse * most + 2.0 * cancelled) * f64::from(f32::EPSILON);
                let theirs = ["t32", "t16"].into_iter().find_map(|kind| case.tensor(&format!("{kind}.{part}")));
                let theirs = theirs.map_or(1e-6 * most, |theirs| {
                    theirs.row_major().iter().zip(&truth).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
                });
                let got = got.download().unwrap();
                assert_eq!(got.len(), truth.len(), "{part} of {name}");
                for (row, truth) in got.chunks(width).zip(truth.chunks(width)) {
                    let ulp = largest(truth) * f64::from(f32::EPSILON);
                    for (&got, &truth) in row.iter().zip(truth) {
                        let error = (f64::from(got) - truth).abs();
                        let bar = 2.0 * theirs + 4.0 * ulp + of_lse + 1e-9;
                        assert!(
                            error <= bar,
                            "{part} of {name} on {device_name}: {got} is {error:.2e} from {truth}; {bar:.2e}"
                        );
                    }
                }
                compared += 1;
            }
        }
        assert!(compared >= 150, "{compared} gradients on {device_name}");
    }
}
