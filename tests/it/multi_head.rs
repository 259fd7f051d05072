//! The layer on every device, against projections and attention in f64.

use crate::distance::Distance;
use crate::kit::{Wide, assert_close, bits, devices, gpus, noise, rounding, wide};
use crate::rotary::written_out;
use rand::SeedableRng;
use rand_pcg::Pcg64;
use wgpu_attention::position::t5::Buckets;
use wgpu_attention::position::{Pairing, Rotary, RotaryConfig, RotaryScaling, TokenPositions};
use wgpu_attention::problem::{Layout, MaskMeaning, Positions, Rows};
use wgpu_attention::reference::{self, Layer, LayerInputs, Norm, Projection, Rules, View};
use wgpu_attention::{
    Align, Attention, Device, Dtype, HostTensor, KerasKernels, Mask, MultiHeadAttention, MultiHeadConfig, NormKind,
    NormSpan, QueryKeyNorm, ScoreStage, StateDict, Tensor, Weights,
};

const TOLERANCE: f64 = 4e-6;

/// The attention options of a layer call, for the f64 truth.
#[derive(Clone, Copy, Default)]
struct Asked<'a> {
    /// Keys to drop, `[batch, len_k]`.
    padding: Option<&'a [bool]>,
    causal: bool,
    softcap: Option<f32>,
    /// Query `i` is at position `queries + i`, key `j` at `keys + j`.
    rotary: Option<(&'a RotaryConfig, [usize; 2])>,
    distance: Option<&'a Distance>,
}

/// A layer's output and averaged weights in f64, from its state dict: `[batch, len, dim]` inputs.
fn truth(
    config: &MultiHeadConfig,
    state: &StateDict,
    inputs: [(&[usize], &[f32]); 3],
    asked: &Asked<'_>,
) -> (Vec<f64>, Vec<f64>) {
    let get = |name: &str| state.get(name).map(|tensor| Wide::new(tensor.shape(), wide(tensor.data())));
    let [query, key, value] = inputs.map(|(shape, data)| Wide::new(shape, wide(data)));
    let widths = [
        config.num_heads * config.head_dim,
        config.heads_kv * config.head_dim,
        config.heads_kv * config.value_head_dim,
    ];
    // The weights and biases of queries, keys and values, packed or not.
    let packed = get("in_proj_weight");
    let weights = [0, 1, 2].map(|n| match &packed {
        Some(all) => all.rows(widths[..n].iter().sum(), widths[n]),
        None => get(["q_proj_weight", "k_proj_weight", "v_proj_weight"][n]).unwrap(),
    });
    let all_biases = get("in_proj_bias");
    let biases = [0, 1, 2].map(|n| Some(all_biases.as_ref()?.rows(widths[..n].iter().sum(), widths[n])));
    let norms = [0, 1].map(|n| {
        let norm = config.norm?;
        let kind = if norm.kind == NormKind::Rms { "norm" } else { "layernorm" };
        let part = |part: &str| get(&format!("{}_{kind}.{part}", ["q", "k"][n]));
        Some((norm, part("weight").unwrap(), part("bias")))
    });
    let [out, gate] =
        ["out_proj", "gate_proj"].map(|name| [".weight", ".bias"].map(|part| get(&format!("{name}{part}"))));
    let bias_kv = ["bias_k", "bias_v"].map(|name| {
        let Wide { data, .. } = get(name)?;
        Some(Wide::new(&[data.len()], data))
    });
    fn projection<'a>(weight: &'a Wide, bias: &'a Option<Wide>) -> Projection<'a> {
        Projection { weight: weight.view(), bias: bias.as_ref().map(Wide::view) }
    }
    let norm = |n: usize| {
        let (norm, weight, bias) = norms[n].as_ref()?;
        let (centred, epsilon) = (norm.kind == NormKind::Layer, f64::from(norm.epsilon));
        Some(Norm { weight: weight.view(), bias: bias.as_ref().map(Wide::view), centred, epsilon })
    };
    let layer = Layer {
        heads: [config.num_heads, config.heads_kv],
        projections: [0, 1, 2].map(|n| projection(&weights[n], &biases[n])),
        out: projection(out[0].as_ref().unwrap(), &out[1]),
        gate: gate[0].as_ref().map(|weight| projection(weight, &gate[1])),
        norms: norm(0).zip(norm(1)).map(|(q, k)| [q, k]),
        bias_kv: bias_kv[0].as_ref().zip(bias_kv[1].as_ref()).map(|(key, value)| [key.view(), value.view()]),
        zero_attn: config.add_zero_attn,
    };
    let positions = Positions { causal: asked.causal, align: Align::TopLeft, ..Default::default() };
    // Cosines and sines of queries and of keys, one table after the other.
    let (len_q, len_k) = (query.layout.shape()[1], key.layout.shape()[1]);
    let extra_keys = usize::from(config.add_bias_kv) + usize::from(config.add_zero_attn);
    let rotary = asked.rotary.map(|(rotary, starts)| {
        let (mut cos, mut sin, mut pairs) = (Vec::new(), Vec::new(), 0);
        for (start, rows) in starts.into_iter().zip([len_q, len_k + extra_keys]) {
            let (frequencies, factor) = written_out(rotary, start + rows);
            let angles = (0..rows).flat_map(|row| frequencies.iter().map(move |f| (start + row) as f64 * f));
            for angle in angles {
                cos.push(factor * angle.cos());
                sin.push(factor * angle.sin());
            }
            pairs = frequencies.len();
        }
        let [cos, sin] = [cos, sin].map(|table| Wide::new(&[table.len() / pairs, pairs], table));
        (cos, sin, rotary.pairing == Pairing::Interleaved)
    });
    let compute = |distance: Option<reference::Distance<'_>>| {
        let mut inputs = LayerInputs {
            query: query.view(),
            key: key.view(),
            value: value.view(),
            positions: &positions,
            rules: Rules::default(),
        };
        let padding = Layout::contiguous(&[query.layout.shape()[0], 1, 1, len_k]).unwrap();
        let padding = padding.broadcast_to(&layer.mask_shape(&inputs)).unwrap();
        inputs.rules = Rules {
            masks: asked.padding.iter().map(|data| (View { data, layout: &padding }, MaskMeaning::Hide)).collect(),
            scale: config.scale.map(f64::from),
            softcap: asked.softcap.map(f64::from),
            rotary: rotary.as_ref().map(|(cos, sin, interleaved)| reference::Rotary {
                cos: cos.view(),
                sin: sin.view(),
                interleaved: *interleaved,
                rows: [Rows::From(0), Rows::From(len_q)],
            }),
            distance,
            ..Rules::default()
        };
        reference::layer(&layer, &inputs)
    };
    let outputs = match asked.distance {
        None => compute(None),
        Some(distance) => distance.in_f64(config.num_heads, config.head_dim, |distance| compute(Some(distance))),
    };
    let [batch, heads, len_q, len_k] = outputs.weights_shape;
    let square = len_q * len_k;
    let averaged = (0..batch * square)
        .map(|at| {
            let of = |h: usize| outputs.attended.weights[(at / square * heads + h) * square + at % square];
            (0..heads).map(of).sum::<f64>() / heads as f64
        })
        .collect();
    (outputs.output, averaged)
}

const RMS: QueryKeyNorm = QueryKeyNorm::new(NormKind::Rms, NormSpan::Head, 1e-6);

/// The same layer with random values for all parameters, including biases and norm weights.
fn shaken(layer: &MultiHeadAttention, device: &Device) -> MultiHeadAttention {
    let mut rng = Pcg64::seed_from_u64(77);
    let mut state = layer.state_dict().unwrap();
    for (name, tensor) in layer.state_dict().unwrap().iter() {
        if !["norm_epsilon", "attention_scale"].contains(&name) {
            let step = noise(&mut rng, tensor.data().len());
            let data = tensor.data().iter().zip(step).map(|(x, step)| x + 0.1 * step).collect();
            state.insert(name, HostTensor::new(tensor.shape(), data).unwrap());
        }
    }
    let config = layer.config();
    MultiHeadAttention::from_state_dict(device, &state, "", config.num_heads)
        .unwrap()
        .with_zero_attn(config.add_zero_attn)
        .unwrap()
        .with_batch_first(config.batch_first)
}

#[test]
fn self_and_cross_attention_match_the_truth() {
    let base = || MultiHeadConfig::new(24, 4).unwrap();
    let configs = [
        base().gate(true).output_dim(10).head_dims(7, 5),
        base().gate(true).kdim(10).bias(false).heads_kv(2),
        base().norm(Some(RMS)).heads_kv(2).head_dims(5, 7).out_bias(false),
        base().norm(Some(QueryKeyNorm::new(NormKind::Layer, NormSpan::Head, 1e-3).bias(true))).scale(Some(1.0)),
        base().norm(Some(QueryKeyNorm::new(NormKind::Rms, NormSpan::Width, 1e-6))).heads_kv(1).vdim(9).gate(true),
        base(),
        base().bias(false),
        base().heads_kv(2),
        base().kdim(10).vdim(17),
        base().add_bias_kv(true),
        base().add_zero_attn(true),
        base().add_bias_kv(true).add_zero_attn(true).kdim(9),
        base().head_dims(5, 7),
        MultiHeadConfig::new(35, 7).unwrap(),
    ];
    for (name, device) in devices() {
        for (n, config) in configs.iter().enumerate() {
            let mut rng = Pcg64::seed_from_u64(n as u64);
            let what = format!("{config:?} on {name}");
            let layer = shaken(&MultiHeadAttention::new(&device, config.clone(), 11).unwrap(), &device);
            assert_eq!(layer.config(), config);
            let state = layer.state_dict().unwrap();
            let (batch, len_q, len_k) = (2, 9, 13);
            let padding: Vec<bool> = (0..batch * len_k).map(|at| at % 5 == 3).collect();
            let is_self = config.kdim == config.embed_dim && config.vdim == config.embed_dim;
            let data = [(len_q, config.embed_dim), (len_k, config.kdim), (len_k, config.vdim)]
                .map(|(len, width)| (vec![batch, len, width], noise(&mut rng, batch * len * width)));
            let [q, k, v] = [0, 1, 2].map(|i| Tensor::from_slice(&device, &data[i].0, &data[i].1).unwrap());

            let mask = Mask::hide_where(Tensor::from_bools(&device, &[batch, len_k], &padding).unwrap()).unwrap();
            let attention = Attention::new().key_padding(mask).weights(Weights::Averaged);
            let out = layer.forward(&q, &k, &v, &attention).unwrap();
            let views = [0, 1, 2].map(|i| (data[i].0.as_slice(), data[i].1.as_slice()));
            let (output, weights) =
                truth(config, &state, views, &Asked { padding: Some(&padding), ..Asked::default() });
            assert_close(&what, &out.output, &output, TOLERANCE);
            assert_close(&what, &out.weights.unwrap(), &weights, TOLERANCE);

            if is_self {
                // The same input three times uses another path: one product for Q, K and V.
                let causal = Attention::new().causal(Align::TopLeft);
                let out = layer.forward(&q, &q, &q, &causal).unwrap().output;
                let (output, _) = truth(config, &state, [views[0]; 3], &Asked { causal: true, ..Asked::default() });
                assert_close(&what, &out, &output, TOLERANCE);
                // The same key and value, and another query.
                let out = layer.forward(&q, &k, &k, &Attention::new()).unwrap().output;
                let (output, _) = truth(config, &state, [views[0], views[1], views[1]], &Asked::default());
                assert_close(&what, &out, &output, TOLERANCE);
            }
        }
    }
}

#[test]
fn positions_in_a_layer_match_the_truth() {
    let base = || MultiHeadConfig::new(32, 4).unwrap();
    let mut rng = Pcg64::seed_from_u64(31);
    let alibi = Distance::Alibi(noise(&mut rng, 4));
    let buckets = Buckets { bidirectional: true, num_buckets: 8, max_distance: 6 };
    let t5 = Distance::T5(noise(&mut rng, 8 * 4), buckets);
    let shaw = Distance::Shaw(noise(&mut rng, 7 * 8), [4, 2]);
    let half = RotaryConfig::new(8);
    let part = RotaryConfig::new(6).pairing(Pairing::Interleaved).scaling(RotaryScaling::Linear { factor: 2.0 });
    let plain = Asked::default;
    let cases: Vec<(MultiHeadConfig, Asked<'_>)> = vec![
        (base(), Asked { rotary: Some((&half, [0, 0])), causal: true, ..plain() }),
        (base().heads_kv(2).norm(Some(RMS)), Asked { rotary: Some((&part, [0, 0])), ..plain() }),
        // Positions given by the caller.
        (base().gate(true), Asked { rotary: Some((&half, [50, 3])), softcap: Some(2.0), ..plain() }),
        (base(), Asked { distance: Some(&alibi), causal: true, ..plain() }),
        // Keys without a position have no distance.
        (base().add_zero_attn(true).add_bias_kv(true), Asked { distance: Some(&alibi), softcap: Some(2.0), ..plain() }),
        (base().heads_kv(2), Asked { distance: Some(&t5), ..plain() }),
        (base().norm(Some(RMS)).scale(Some(0.5)), Asked { distance: Some(&shaw), ..plain() }),
        (base(), Asked { distance: Some(&t5), rotary: Some((&part, [0, 0])), causal: true, ..plain() }),
    ];
    let (batch, len_q, len_k) = (2, 9, 13);
    let padding: Vec<bool> = (0..batch * len_k).map(|at| at % 5 == 3).collect();
    for (n, (config, asked)) in cases.into_iter().enumerate() {
        // Self-attention or cross-attention.
        for is_self in [true, false] {
            let len_k = if is_self { len_q } else { len_k };
            let asked = Asked { padding: (!is_self).then_some(&padding), ..asked };
            let data = [len_q, len_k].map(|len| (vec![batch, len, 32], noise(&mut rng, batch * len * 32)));
            let data = if is_self { [data[0].clone(), data[0].clone()] } else { data };
            let views = [0, 1, 1].map(|i| (data[i].0.as_slice(), data[i].1.as_slice()));
            for (name, device) in devices() {
                let what = format!("case {n}, self {is_self}, {config:?} on {name}");
                let layer = shaken(&MultiHeadAttention::new(&device, config.clone(), 11).unwrap(), &device);
                let (output, weights) = truth(&config, &layer.state_dict().unwrap(), views, &asked);
                let [q, k] = [0, 1].map(|i| Tensor::from_slice(&device, &data[i].0, &data[i].1).unwrap());
                let mut attention = Attention::new();
                if let Some(padding) = asked.padding {
                    let mask = Tensor::from_bools(&device, &[batch, len_k], padding).unwrap();
                    attention = attention.key_padding(Mask::hide_where(mask).unwrap());
                }
                if asked.causal {
                    attention = attention.causal(Align::TopLeft);
                }
                if let Some(cap) = asked.softcap {
                    attention = attention.softcap(cap);
                }
                if let Some((rotary, starts)) = asked.rotary {
                    let rotary = Rotary::new(&device, rotary, 64).unwrap();
                    let [queries, keys] = starts.map(TokenPositions::From);
                    attention = if starts == [0, 0] {
                        attention.rotary(rotary)
                    } else {
                        attention.rotary_at(rotary, queries, keys)
                    };
                }
                if let Some(distance) = asked.distance {
                    attention = distance.asked(attention, &device, 4, 8);
                }
                let k = if is_self { &q } else { &k };
                let out = layer.forward(&q, k, k, &attention).unwrap();
                assert_close(&what, &out.output, &output, TOLERANCE);
                let out = layer.forward(&q, k, k, &attention.weights(Weights::Averaged)).unwrap();
                assert_close(&what, &out.output, &output, TOLERANCE);
                assert_close(&what, &out.weights.unwrap(), &weights, TOLERANCE);
            }
        }
    }
}

#[test]
fn wide_rows_are_normalised_by_several_invocations() {
    // 70,400 and 17,600 wide: 64 and 8 invocations share a row.
    let norm = QueryKeyNorm::new(NormKind::Layer, NormSpan::Width, 1e-5).bias(true);
    let config = MultiHeadConfig::with_head_dims(2, 1100, 64, 1).unwrap().heads_kv(275).norm(Some(norm));
    let data = noise(&mut Pcg64::seed_from_u64(3), 2 * 3 * 2);
    for (name, device) in devices() {
        let layer = shaken(&MultiHeadAttention::new(&device, config.clone(), 4).unwrap(), &device);
        let x = Tensor::from_slice(&device, &[2, 3, 2], &data).unwrap();
        let out = layer.forward(&x, &x, &x, &Attention::new()).unwrap().output;
        let (output, _) =
            truth(&config, &layer.state_dict().unwrap(), [(&[2, 3, 2], data.as_slice()); 3], &Asked::default());
        assert_close(&name, &out, &output, 2e-5);
    }
}

#[test]
fn half_types_work_with_norms_and_gates() {
    let config = MultiHeadConfig::new(16, 2).unwrap().norm(Some(RMS)).gate(true);
    let data: Vec<half::f16> = noise(&mut Pcg64::seed_from_u64(5), 160).into_iter().map(half::f16::from_f32).collect();
    let floats: Vec<f32> = data.iter().map(|x| x.to_f32()).collect();
    for (name, device) in devices() {
        let layer = shaken(&MultiHeadAttention::new(&device, config.clone(), 4).unwrap(), &device);
        let x = Tensor::from_slice(&device, &[2, 5, 16], &data).unwrap();
        let out = layer.forward(&x, &x, &x, &Attention::new()).unwrap().output;
        assert_eq!(out.dtype(), Dtype::F16);
        let state = layer.state_dict().unwrap();
        let (output, _) = truth(&config, &state, [(&[2, 5, 16], floats.as_slice()); 3], &Asked::default());
        // Kernels also store the outputs of heads in half types, which the last projection sums.
        let held = if device.gpu().is_some() { rounding(Dtype::F16) } else { 0.0 };
        assert_close(&name, &out, &output, TOLERANCE + held);
    }
}

#[test]
fn non_finite_values_reach_only_their_own_tokens() {
    let config = MultiHeadConfig::new(8, 2).unwrap().norm(Some(RMS)).gate(true);
    for (name, device) in devices() {
        let layer = shaken(&MultiHeadAttention::new(&device, config.clone(), 4).unwrap(), &device);
        let mut data = noise(&mut Pcg64::seed_from_u64(5), 4 * 8);
        data[9] = f32::NAN;
        let query = Tensor::from_slice(&device, &[1, 4, 8], &data).unwrap();
        let key = Tensor::from_slice(&device, &[1, 3, 8], &noise(&mut Pcg64::seed_from_u64(6), 24)).unwrap();
        let out = layer.forward(&query, &key, &key, &Attention::new()).unwrap().output.download().unwrap();
        for (token, row) in out.chunks(8).enumerate() {
            assert!(row.iter().all(|x| x.is_nan() == (token == 1)), "{name}: token {token} is {row:?}");
        }
    }
}

#[test]
fn three_axes_of_a_mask_have_one_meaning() {
    let (len_q, len_k) = (3, 4);
    for (name, device) in devices() {
        for (batch, heads) in [(2, 2), (3, 2), (1, 2), (2, 1), (1, 1), (4, 2)] {
            let layer = MultiHeadAttention::new(&device, MultiHeadConfig::new(8, heads).unwrap(), 3).unwrap();
            let mut rng = Pcg64::seed_from_u64(9);
            let x = |rng: &mut Pcg64, len| Tensor::from_slice(&device, &[batch, len, 8], &noise(rng, batch * len * 8));
            let (q, k) = (x(&mut rng, len_q).unwrap(), x(&mut rng, len_k).unwrap());
            let values = noise(&mut rng, (batch * heads).max(5) * len_q * len_k);
            let run = |shape: &[usize], as_bias: bool| {
                let values = &values[..shape.iter().product()];
                let attention = if as_bias {
                    Attention::new().bias(Tensor::from_slice(&device, shape, values).unwrap())
                } else {
                    let bools: Vec<bool> = values.iter().map(|&x| x < 0.3).collect();
                    Attention::new()
                        .mask(Mask::keep_where(Tensor::from_bools(&device, shape, &bools).unwrap()).unwrap())
                };
                layer.forward(&q, &k, &k, &attention).and_then(|out| out.output.download())
            };
            for as_bias in [false, true] {
                let same = |a: &[usize], b: &[usize]| {
                    let what = format!("{name}, batch {batch}, heads {heads}, {a:?}");
                    assert_eq!(bits(&run(a, as_bias).expect(&what)), bits(&run(b, as_bias).unwrap()), "{what}");
                };
                same(&[batch * heads, len_q, len_k], &[batch, heads, len_q, len_k]);
                same(&[1, len_q, len_k], &[1, 1, len_q, len_k]);
                same(&[batch * heads, 1, len_k], &[batch, heads, 1, len_k]);
                for first in [batch, heads, 5] {
                    if first != 1 && first != batch * heads {
                        let message = run(&[first, len_q, len_k], as_bias).unwrap_err().to_string();
                        let parts = [
                            format!("[batch · heads, len_q, len_k] = [{}", batch * heads),
                            "[:, None]".into(),
                            "mask[None]".into(),
                        ];
                        parts.iter().for_each(|part| assert!(message.contains(part), "{message}"));
                    }
                }
            }
        }
    }
}

#[test]
fn parameter_counts() {
    for (config, count) in [
        (MultiHeadConfig::new(512, 8).unwrap(), 4 * 512 * 512 + 4 * 512),
        (MultiHeadConfig::new(12, 4).unwrap().bias(false), 576),
        (MultiHeadConfig::new(6, 3).unwrap(), 168),
        (MultiHeadConfig::new(16, 4).unwrap().heads_kv(1).bias(false), 16 * 16 * 2 + 2 * 4 * 16),
        // Keras: 2 heads of 3 (values 5) over 11, to 7, with a gate.
        (
            MultiHeadConfig::with_head_dims(11, 2, 3, 5).unwrap().output_dim(7).gate(true),
            11 * (6 + 6 + 10 + 10) + 6 + 6 + 10 + 10 + 10 * 7 + 7,
        ),
        (MultiHeadConfig::new(12, 4).unwrap().bias(false).norm(Some(RMS)), 576 + 6),
        (MultiHeadConfig::new(12, 4).unwrap().out_bias(false), 576 + 36),
    ] {
        assert_eq!(config.parameter_count().unwrap(), count);
        let layer = MultiHeadAttention::new(Device::Cpu, config, 0).unwrap();
        let state = layer.state_dict().unwrap();
        let learned = state.iter().filter(|(name, _)| *name != "norm_epsilon");
        let held: usize = learned.map(|(_, tensor)| tensor.data().len()).sum();
        assert_eq!((layer.parameter_count(), held), (count, count));
    }
}

#[test]
fn weights_are_transferred_unchanged() {
    for (name, device) in devices() {
        for config in [
            MultiHeadConfig::new(12, 3).unwrap().add_bias_kv(true),
            MultiHeadConfig::new(12, 3).unwrap().kdim(5),
            MultiHeadConfig::new(12, 6).unwrap().heads_kv(2).bias(false),
            MultiHeadConfig::new(8, 2).unwrap().head_dims(8, 8),
            MultiHeadConfig::new(8, 2).unwrap().head_dims(4, 3).add_bias_kv(true),
            MultiHeadConfig::with_head_dims(11, 3, 2, 5).unwrap().output_dim(4).gate(true).vdim(6),
            MultiHeadConfig::new(8, 4).unwrap().heads_kv(1).gate(true).bias(false).out_bias(true),
            MultiHeadConfig::new(12, 3).unwrap().out_bias(false).scale(Some(0.5)),
            MultiHeadConfig::new(12, 3).unwrap().norm(Some(RMS)),
            MultiHeadConfig::new(12, 1).unwrap().norm(Some(RMS)).heads_kv(1),
            MultiHeadConfig::new(12, 3).unwrap().norm(Some(QueryKeyNorm::new(NormKind::Layer, NormSpan::Head, 1e-6))),
            MultiHeadConfig::new(12, 4)
                .unwrap()
                .heads_kv(2)
                .norm(Some(QueryKeyNorm::new(NormKind::Layer, NormSpan::Width, 0.0).bias(true))),
        ] {
            let layer = MultiHeadAttention::new(&device, config.clone(), 5).unwrap();
            let state = layer.state_dict().unwrap();
            let bytes = state.to_safetensors().unwrap();
            let read = StateDict::from_safetensors(&bytes).unwrap();
            assert_eq!(read, state, "{name}");
            let again = MultiHeadAttention::from_state_dict(&device, &read, "", config.num_heads).unwrap();
            assert_eq!(again.config(), &config, "{name}");
            assert_eq!(again.state_dict().unwrap(), state, "{name}");
        }
    }
}

#[test]
fn keras_kernels_are_pytorch_weights_transposed() {
    keras(2, 8, false);
}

#[test]
fn keras_groups_heads_projects_to_another_width_and_gates() {
    // GroupedQueryAttention, output_shape, use_gate; 9 is not a multiple of the heads.
    keras(1, 9, true);
}

fn keras(heads_kv: usize, to: usize, gated: bool) {
    let mut rng = Pcg64::seed_from_u64(2);
    // [dim, heads, head_dim] with key_dim 3 and value_dim 5.
    let (dim, heads, key_dim, value_dim) = (if gated { 9 } else { 8 }, 2, 3, 5);
    let mut kernel = |n: usize| noise(&mut rng, n);
    let (query, key) = (kernel(dim * heads * key_dim), kernel(dim * heads_kv * key_dim));
    let (value, output) = (kernel(dim * heads_kv * value_dim), kernel(heads * value_dim * to));
    let biases = [heads * key_dim, heads_kv * key_dim, heads_kv * value_dim, to].map(&mut kernel);
    let (gate, gate_bias) = (kernel(dim * heads * value_dim), kernel(heads * value_dim));
    let x = kernel(4 * dim);
    let config = MultiHeadConfig::with_head_dims(dim, heads, key_dim, value_dim).unwrap();
    let config = config.heads_kv(heads_kv).output_dim(to).gate(gated);
    // Keras's computation: einsum("ld,dhk->lhk"), attention per head, einsum("lhv,hvo->lo").
    let project = |kernel: &[f32], bias: &[f32], width: usize| -> Vec<f64> {
        (0..4 * width)
            .map(|at| {
                let (l, c) = (at / width, at % width);
                let term = |d: usize| f64::from(x[l * dim + d]) * f64::from(kernel[d * width + c]);
                (0..dim).map(term).sum::<f64>() + f64::from(bias[c])
            })
            .collect()
    };
    let (q, k) = (project(&query, &biases[0], heads * key_dim), project(&key, &biases[1], heads_kv * key_dim));
    let v = project(&value, &biases[2], heads_kv * value_dim);
    let gates = project(&gate, &gate_bias, heads * value_dim);
    let mut expected = vec![0.0; 4 * to];
    for l in 0..4 {
        for h in 0..heads {
            let kv = h / (heads / heads_kv);
            let score = |j: usize| -> f64 {
                let term = |e: usize| q[(l * heads + h) * key_dim + e] * k[(j * heads_kv + kv) * key_dim + e];
                ((0..key_dim).map(term).sum::<f64>() / (key_dim as f64).sqrt()).exp()
            };
            let total: f64 = (0..4).map(score).sum();
            for e in 0..value_dim {
                let head: f64 = (0..4).map(|j| score(j) / total * v[(j * heads_kv + kv) * value_dim + e]).sum();
                let gate = 1.0 / (1.0 + (-gates[(l * heads + h) * value_dim + e]).exp());
                let head = if gated { head * gate } else { head };
                for o in 0..to {
                    expected[l * to + o] += head * f64::from(output[(h * value_dim + e) * to + o]);
                }
            }
        }
        for o in 0..to {
            expected[l * to + o] += f64::from(biases[3][o]);
        }
    }
    for (name, device) in devices() {
        let mut kernels = KerasKernels::new(&query, &key, &value, &output);
        kernels = kernels.biases([&biases[0], &biases[1], &biases[2], &biases[3]]);
        if gated {
            kernels = kernels.gate(&gate, Some(&gate_bias));
        }
        let layer = MultiHeadAttention::from_keras(&device, config.clone(), kernels).unwrap();
        let x = Tensor::from_slice(&device, &[1, 4, dim], &x).unwrap();
        let out = layer.forward(&x, &x, &x, &Attention::new()).unwrap().output;
        assert_close(&name, &out, &expected, TOLERANCE);
        let mut wrong = kernels;
        wrong.query = &query[1..];
        let message = MultiHeadAttention::from_keras(&device, config.clone(), wrong).unwrap_err().to_string();
        assert!(message.contains(&format!("query kernel has {} values", query.len() - 1)), "{message}");
        let wrong = kernels.gate(&gate, None);
        let message = MultiHeadAttention::from_keras(&device, config.clone(), wrong).unwrap_err().to_string();
        assert!(message.contains("gate"), "{message}");
    }
}

#[test]
fn batch_order_and_missing_batch() {
    for (name, device) in devices() {
        let config = MultiHeadConfig::new(8, 2).unwrap();
        let layer = MultiHeadAttention::new(&device, config.clone(), 1).unwrap();
        let data = noise(&mut Pcg64::seed_from_u64(4), 3 * 5 * 8);
        let x = Tensor::from_slice(&device, &[3, 5, 8], &data).unwrap();
        let first = layer.forward(&x, &x, &x, &Attention::new()).unwrap().output;
        let seq_first = MultiHeadAttention::new(&device, config.batch_first(false), 1).unwrap();
        let y = x.permute(&[1, 0, 2]).unwrap();
        let second = seq_first.forward(&y, &y, &y, &Attention::new()).unwrap().output;
        assert_eq!(second.shape(), [5, 3, 8]);
        let back = second.permute(&[1, 0, 2]).unwrap();
        assert_eq!(bits(&back.download().unwrap()), bits(&first.download().unwrap()), "{name}");
        let one = x.select(0, 1).unwrap();
        let alone = layer.forward(&one, &one, &one, &Attention::new().weights(Weights::PerHead)).unwrap();
        assert_eq!(alone.output.shape(), [5, 8]);
        assert_eq!(alone.weights.unwrap().shape(), [2, 5, 5]);
        let expected = first.select(0, 1).unwrap().download().unwrap();
        assert_eq!(bits(&alone.output.download().unwrap()), bits(&expected), "{name}");
    }
}

#[test]
fn a_layer_in_a_callers_encoder() {
    for (name, gpu) in gpus() {
        let device = Device::Gpu(gpu.clone());
        let layer = MultiHeadAttention::new(&device, MultiHeadConfig::new(16, 4).unwrap(), 8).unwrap();
        let x = Tensor::from_slice(&device, &[2, 6, 16], &noise(&mut Pcg64::seed_from_u64(6), 192)).unwrap();
        let mut encoder = gpu.device().create_command_encoder(&Default::default());
        let recorded = layer.encode(&gpu, &mut encoder, &x, &x, &x, &Attention::new()).unwrap();
        gpu.queue().submit([encoder.finish()]);
        let run = layer.forward(&x, &x, &x, &Attention::new()).unwrap();
        assert_eq!(bits(&recorded.output.download().unwrap()), bits(&run.output.download().unwrap()), "{name}");
    }
}

#[test]
fn xavier_weights_come_from_the_seed() {
    let config = MultiHeadConfig::new(64, 4).unwrap();
    let state = |seed| MultiHeadAttention::new(Device::Cpu, config.clone(), seed).unwrap().state_dict().unwrap();
    assert_eq!(state(1), state(1));
    assert_ne!(state(1), state(2));
    let packed = state(1);
    let weights = packed.get("in_proj_weight").unwrap().data();
    // Uniform in ±√(6 / (3 · 64 + 64)).
    let bound = (6.0f32 / 256.0).sqrt();
    assert!(weights.iter().all(|w| w.abs() <= bound));
    let variance = weights.iter().map(|w| f64::from(w * w)).sum::<f64>() / weights.len() as f64;
    approx::assert_relative_eq!(variance, f64::from(bound * bound) / 3.0, max_relative = 0.05);
    assert!(packed.get("in_proj_bias").unwrap().data().iter().all(|&b| b == 0.0));
}

#[test]
fn wrong_layers_are_errors_with_the_numbers() {
    let say = |result: Result<MultiHeadAttention, wgpu_attention::Error>, part: &str| {
        let message = result.expect_err(part).to_string();
        assert!(message.contains(part), "{message}");
    };
    let message = MultiHeadConfig::new(10, 3).unwrap_err().to_string();
    assert!(message.contains("embed_dim = 10 is not a positive multiple of num_heads = 3"), "{message}");
    assert!(MultiHeadConfig::new(10, 0).is_err());
    let config = MultiHeadConfig::new(12, 4).unwrap();
    say(
        MultiHeadAttention::new(Device::Cpu, config.clone().heads_kv(3), 0),
        "num_heads = 4 is not a multiple of heads_kv = 3",
    );
    say(MultiHeadAttention::new(Device::Cpu, config.clone().kdim(0), 0), "kdim must be at least 1");
    say(MultiHeadAttention::new(Device::Cpu, config.clone().kdim(usize::MAX), 0), "overflows");

    let layer = MultiHeadAttention::new(Device::Cpu, config, 0).unwrap();
    let state = layer.state_dict().unwrap();
    let load =
        |state: &StateDict, prefix: &str, heads| MultiHeadAttention::from_state_dict(Device::Cpu, state, prefix, heads);
    say(
        load(&state, "layer.", 4),
        "no tensor's name begins with the prefix \"layer.\"; attention layers lie under the prefix \"\" (pytorch)",
    );
    say(load(&state, "", 5), "not a positive multiple");
    let mut wrong = state.clone();
    wrong.insert("in_proj_weight", HostTensor::new(&[35, 12], vec![0.0; 420]).unwrap());
    say(load(&wrong, "", 4), "in_proj_weight has shape [35, 12]");
    let mut wrong = state.clone();
    wrong.insert("in_proj_bias", HostTensor::new(&[7], vec![0.0; 7]).unwrap());
    say(load(&wrong, "", 4), "in_proj_bias has 7 values in shape [7]; 36 are expected");
    let mut wrong = state;
    wrong.insert("bias_k", HostTensor::new(&[1, 1, 12], vec![0.0; 12]).unwrap());
    say(load(&wrong, "", 4), "must come together");
    for bytes in [&b""[..], b"12345678", &[255; 64], b"\x10\0\0\0\0\0\0\0{\"a\": nonsense!}"] {
        assert!(StateDict::from_safetensors(bytes).unwrap_err().to_string().contains("not a valid safetensors file"));
    }

    let x = |shape: &[usize]| Tensor::from_slice(Device::Cpu, shape, &vec![0.0f32; shape.iter().product()]).unwrap();
    let call = |q: &[usize], k: &[usize], v: &[usize]| layer.forward(&x(q), &x(k), &x(v), &Attention::new());
    for (q, k, v, part) in [
        (&[2, 3, 11][..], &[2, 3, 12][..], &[2, 3, 12][..], "must be 12 wide"),
        (&[2, 3, 12], &[2, 3, 12], &[2, 4, 12], "key and value one length"),
        (&[2, 3, 12], &[1, 3, 12], &[1, 3, 12], "one batch size"),
        (&[3, 12], &[1, 3, 12], &[1, 3, 12], "or all have none"),
        (&[12], &[12], &[12], "three axes"),
    ] {
        let message = call(q, k, v).unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    }
    assert_eq!(call(&[2, 0, 12], &[2, 3, 12], &[2, 3, 12]).unwrap().output.shape(), [2, 0, 12]);
}

#[test]
fn a_layer_returns_the_requested_attention_results() {
    for (name, device) in devices() {
        let layer = MultiHeadAttention::new(&device, MultiHeadConfig::new(16, 2).unwrap(), 5).unwrap();
        let data: Vec<f32> = (0..2 * 7 * 16).map(|i| (i as f32 * 0.37).sin()).collect();
        let x = Tensor::from_slice(&device, &[2, 7, 16], &data).unwrap();
        let attention = Attention::new().lse(true).scores(Some(ScoreStage::Masked)).weights(Weights::PerHead);
        let out = layer.forward(&x, &x, &x, &attention).unwrap();
        let [lse, scores, weights] =
            [out.lse, out.scores, out.weights].map(|result| result.unwrap_or_else(|| panic!("{name}: nothing")));
        assert_eq!((lse.shape(), scores.shape()), (&[2, 2, 7][..], &[2, 2, 7, 7][..]), "{name}");
        let (lse, scores) = (lse.download().unwrap(), scores.download().unwrap());
        let wanted: Vec<f64> = scores.iter().enumerate().map(|(at, x)| f64::from(x - lse[at / 7]).exp()).collect();
        assert_close(&name, &weights, &wanted, 3e-6);
        let one =
            layer.forward(&x.select(0, 0).unwrap(), &x.select(0, 0).unwrap(), &x.select(0, 0).unwrap(), &attention);
        assert_eq!(one.unwrap().lse.unwrap().shape(), [2, 7], "{name}");
    }
}
