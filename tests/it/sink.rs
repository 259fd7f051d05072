//! A learned sink per head: an additional score without a value, on every device against the f64 truth.

use crate::kit::{
    self, Call, Order, assert_close, assert_logs_close, bits, devices, gpus, limited, methods, methods_in_turn, wide,
};
use half::f16;
use wgpu_attention::problem::{MaskMeaning, Positions};
use wgpu_attention::{
    Align, Attention, Device, Dtype, Inspect, KvCache, KvCacheConfig, Method, MultiHeadAttention, MultiHeadConfig,
    Tensor, Weights, merge,
};

const TOLERANCE: f64 = 3e-6;

fn causal(align: Align) -> Positions {
    Positions { causal: true, align, ..Default::default() }
}

#[test]
fn every_method_gives_the_truth() {
    let grouped = Call { sink: true, ..Call::plain([2, 4, 21, 12], [2, 2, 40, 12], [2, 2, 40, 8]) };
    let calls = [
        grouped.clone(),
        // Some queries see nothing.
        Call { positions: causal(Align::PerBatch(vec![3, -4])), order: Order::Bshd, ..grouped.clone() },
        Call {
            masks: vec![(vec![21, 40], MaskMeaning::Keep)],
            biases: vec![vec![4, 1, 40]],
            positions: causal(Align::BottomRight),
            softcap: Some(2.0),
            ..grouped
        },
        // Keys that are split.
        Call { sink: true, ..Call::plain([1, 4, 3, 16], [1, 2, 900, 16], [1, 2, 900, 16]) },
    ];
    for (name, device) in devices() {
        for (n, call) in calls.iter().enumerate() {
            // The first call uses every method, the others alternate, because each compiles its own kernels.
            let methods = if n == 0 { methods(&device) } else { methods_in_turn(&device, n, 3) };
            for method in methods {
                call.check_output(&name, &device, method, TOLERANCE);
            }
            call.check(&name, &device, TOLERANCE);
        }
        if let Some(gpu) = device.gpu() {
            let data = calls[3].data();
            let [q, k, v] = [(calls[3].q, &data.q), (calls[3].k, &data.k), (calls[3].v, &data.v)]
                .map(|(shape, data)| Tensor::from_slice(gpu, &shape, data).unwrap());
            let sink = Tensor::from_slice(gpu, &[4], &data.sink.unwrap()).unwrap();
            let (_, profile) = Attention::new().sink(sink).forward_profiled(&q, &k, &v).unwrap();
            assert!(profile.kernels[0].ends_with("/sink") && profile.kernels[1].starts_with("merge"), "{profile:?}");
        }
    }
}

#[test]
fn without_any_key_the_sink_is_the_lse() {
    for (name, device) in devices() {
        for len_k in [0, 5] {
            let blind = Positions { key_lengths: Some(vec![0; 2]), ..Default::default() };
            let positions = if len_k == 0 { Positions::default() } else { blind };
            let call = Call { sink: true, positions, ..Call::plain([2, 3, 4, 8], [2, 3, len_k, 8], [2, 3, len_k, 8]) };
            let mut data = call.data();
            data.sink = Some(vec![-2.5, f32::NEG_INFINITY, 100.0]);
            for method in methods_in_turn(&device, len_k, 4) {
                let attention = Attention::new().lse(true).weights(Weights::PerHead).method(method);
                let attention = if len_k == 0 { attention } else { attention.key_lengths(vec![0; 2]) };
                let out = call.run(&device, &data, attention).unwrap();
                assert!(out.output.download().unwrap().iter().all(|&x| x == 0.0), "{name}, {method}");
                assert!(out.weights.unwrap().download().unwrap().iter().all(|&x| x == 0.0), "{name}, {method}");
                let lse = out.lse.unwrap().download().unwrap();
                for (n, &x) in lse.iter().enumerate() {
                    assert_eq!(x, [-2.5, f32::NEG_INFINITY, 100.0][n / 4 % 3], "{name}, {method}, {len_k} keys");
                }
            }
        }
    }
}

#[test]
fn extreme_and_non_finite_sinks() {
    // Query 0 sees nothing; the second call splits its keys, the third has none.
    let calls = [
        Call {
            sink: true,
            positions: causal(Align::Offset(-1)),
            ..Call::plain([2, 4, 9, 8], [2, 2, 9, 8], [2, 2, 9, 8])
        },
        Call { sink: true, ..Call::plain([1, 4, 2, 8], [1, 4, 700, 8], [1, 4, 700, 8]) },
        Call { sink: true, ..Call::plain([1, 4, 2, 8], [1, 4, 0, 8], [1, 4, 0, 8]) },
    ];
    for (name, device) in devices() {
        for (n, call) in calls.iter().enumerate() {
            for odd in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, 1e-40, 60.0, -60.0] {
                // One head has the odd value; its neighbours do not.
                let mut data = call.data();
                data.sink = Some(vec![0.5, odd, -0.5, 1.5]);
                let (truth, _) = call.truth(&data);
                for method in methods_in_turn(&device, n, 4) {
                    let attention = call.attention().lse(true).weights(Weights::PerHead).method(method);
                    let out = call.run(&device, &data, attention).unwrap();
                    let what = format!("a call with a sink of {odd} on {name}, {method}: {:?}", call.k);
                    let broken = odd.is_nan() || odd == f32::INFINITY;
                    assert_eq!(truth.output.iter().filter(|x| x.is_nan()).count() > 0, broken);
                    truth.hold(&what, &out, TOLERANCE);
                }
            }
        }
    }
}

#[test]
fn none_is_minus_infinity() {
    let plain =
        Call { positions: causal(Align::BottomRight), ..Call::plain([1, 2, 9, 8], [1, 2, 20, 8], [1, 2, 20, 8]) };
    let mut data = plain.data();
    let (truth, _) = plain.truth(&data);
    data.sink = Some(vec![f32::NEG_INFINITY; 2]);
    for (name, device) in devices() {
        for method in methods_in_turn(&device, 1, 4) {
            let out = plain.run(&device, &data, plain.attention().lse(true).method(method)).unwrap();
            truth.hold_output(&name, &out.output, TOLERANCE);
            assert_logs_close(&name, &out.lse.unwrap(), &truth.lse, TOLERANCE);
        }
    }
}

#[test]
fn the_same_bits_in_every_batch() {
    let call = Call { sink: true, ..Call::plain([5, 4, 13, 8], [5, 2, 30, 8], [5, 2, 30, 8]) };
    let data = call.data();
    let alone = Call { q: [1, 4, 13, 8], k: [1, 2, 30, 8], v: [1, 2, 30, 8], ..call.clone() };
    for (name, device) in devices() {
        for method in methods_in_turn(&device, 2, 4) {
            let run = |call: &Call, data: &kit::Data| {
                let attention = call.attention().lse(true).method(method);
                let out = call.run(&device, data, attention).unwrap();
                [bits(&out.output.download().unwrap()), bits(&out.lse.unwrap().download().unwrap())]
            };
            let [output, lse] = run(&call, &data);
            for b in 0..5 {
                let part = |x: &[f32]| x[b * x.len() / 5..][..x.len() / 5].to_vec();
                let one = kit::Data { q: part(&data.q), k: part(&data.k), v: part(&data.v), ..data.clone() };
                let [one_output, one_lse] = run(&alone, &one);
                assert_eq!(one_output, output[b * 4 * 13 * 8..][..4 * 13 * 8], "{name}, {method}");
                assert_eq!(one_lse, lse[b * 4 * 13..][..4 * 13], "{name}, {method}");
            }
        }
    }
}

#[test]
fn sinks_of_any_type_and_stride() {
    let call = Call { sink: true, ..Call::plain([1, 4, 9, 8], [1, 2, 20, 8], [1, 2, 20, 8]) };
    let mut data = call.data();
    let sink = [0.5f32, -1.25, 3.0, f32::NEG_INFINITY];
    data.sink = Some(sink.to_vec());
    let (truth, _) = call.truth(&data);
    for (name, device) in devices() {
        let halves = sink.map(f16::from_f32);
        let dense = Tensor::from_slice(&device, &[4], &halves).unwrap();
        // The third column of a table.
        let table: Vec<f32> = sink.iter().flat_map(|&x| [f32::NAN, f32::NAN, x]).collect();
        let column = Tensor::from_slice(&device, &[4, 3], &table).unwrap().select(1, 2).unwrap();
        let table: Vec<f16> = table.iter().map(|&x| f16::from_f32(x)).collect();
        let half_column = Tensor::from_slice(&device, &[4, 3], &table).unwrap().select(1, 2).unwrap();
        let [q, k, v] = [(call.q, &data.q), (call.k, &data.k), (call.v, &data.v)]
            .map(|(shape, data)| Tensor::from_slice(&device, &shape, data).unwrap());
        for sink in [dense, column, half_column] {
            for method in [Method::Auto, Method::ThreePasses] {
                let attention = Attention::new().sink(sink.clone()).method(method);
                let out = attention.forward(&q, &k, &v).unwrap();
                assert_eq!(out.output.dtype(), Dtype::F32);
                truth.hold_output(&name, &out.output, TOLERANCE);
            }
        }
    }
}

#[test]
fn a_cache_and_a_merge() {
    let call = Call {
        sink: true,
        positions: causal(Align::TopLeft),
        ..Call::plain([1, 4, 30, 8], [1, 2, 30, 8], [1, 2, 30, 8])
    };
    let data = call.data();
    let (truth, _) = call.truth(&data);
    for (name, device) in devices() {
        let [q, k, v] = [(call.q, &data.q), (call.k, &data.k), (call.v, &data.v)]
            .map(|(shape, data)| Tensor::from_slice(&device, &shape, data).unwrap());
        let attention = Attention::new().sink(Tensor::from_slice(&device, &[4], data.sink.as_ref().unwrap()).unwrap());
        let mut cache = KvCache::new(&device, KvCacheConfig::new(1, 2, 32, 8)).unwrap();
        for (at, n) in [(0, 20), (20, 1), (21, 1), (22, 8)] {
            let [q, k, v] = [&q, &k, &v].map(|x| x.narrow(2, at, n).unwrap());
            let out = cache.step(&attention, &q, &k, &v).unwrap().output;
            let expected: Vec<f64> =
                (0..4).flat_map(|h| truth.output[(h * 30 + at) * 8..][..n * 8].iter().copied()).collect();
            assert_close(&name, &out, &expected, TOLERANCE);
        }
        // The newest query over two halves of the keys, the sink in one of them.
        let q = q.narrow(2, 29, 1).unwrap();
        let half = |attention: &Attention, at| {
            let [k, v] = [&k, &v].map(|x| x.narrow(2, at, 15).unwrap());
            let out = attention.clone().lse(true).forward(&q, &k, &v).unwrap();
            (out.output, out.lse.unwrap())
        };
        let (a, b) = (half(&attention, 0), half(&Attention::new(), 15));
        let joined = merge(&a.0, &a.1, &b.0, &b.1).unwrap();
        let expected: Vec<f64> = (0..4).flat_map(|h| truth.output[(h * 30 + 29) * 8..][..8].iter().copied()).collect();
        assert_close(&name, &joined.output, &expected, TOLERANCE);
        let expected: Vec<f64> = (0..4).map(|h| truth.lse[h * 30 + 29]).collect();
        assert_logs_close(&name, &joined.lse.unwrap(), &expected, TOLERANCE);
    }
}

#[test]
fn inspected_weights_include_it_through_the_lse() {
    let call = Call {
        sink: true,
        positions: causal(Align::Offset(-2)),
        ..Call::plain([2, 4, 11, 8], [2, 2, 23, 8], [2, 2, 23, 8])
    };
    let data = call.data();
    let truth = call.inspected(&data, &[1, 2], 0..11);
    for (name, device) in devices() {
        let [q, k, v] = [(call.q, &data.q), (call.k, &data.k), (call.v, &data.v)]
            .map(|(shape, data)| Tensor::from_slice(&device, &shape, data).unwrap());
        let sink = Tensor::from_slice(&device, &[4], data.sink.as_ref().unwrap()).unwrap();
        let attention = call.attention().lse(true).sink(sink);
        let lse = attention.forward(&q, &k, &v).unwrap().lse.unwrap();
        let inspect = Inspect::new().heads(&[1, 2]).weights().column_sums().entropy();
        let seen = attention.inspect(&q, &k, &lse, &inspect).unwrap();
        assert_close(&name, &seen.weights.unwrap(), &truth.weights, 2.0 * TOLERANCE);
        assert_close(&name, &seen.column_sums.unwrap(), &truth.column_sums, 2.0 * TOLERANCE);
        assert_logs_close(&name, &seen.entropy.unwrap(), &truth.entropy, 2.0 * TOLERANCE);
    }
}

#[test]
fn a_layer_supports_it() {
    // With extra keys, which no rule masks: they still share the weight with the sink.
    let config = MultiHeadConfig::new(24, 4).unwrap().add_zero_attn(true);
    let x: Vec<f32> = (0..2 * 7 * 24).map(|n| (n as f32 * 0.37).sin()).collect();
    let run = |device: &Device, sink: &[f32]| {
        let layer = MultiHeadAttention::new(device, config.clone(), 5).unwrap();
        let x = Tensor::from_slice(device, &[2, 7, 24], &x).unwrap();
        let sink = Tensor::from_slice(device, &[sink.len()], sink).unwrap();
        let out = layer.forward(&x, &x, &x, &Attention::new().weights(Weights::PerHead).sink(sink))?;
        Ok::<_, wgpu_attention::Error>([out.output, out.weights.unwrap()].map(|tensor| tensor.download().unwrap()))
    };
    let without = run(&Device::Cpu, &[f32::NEG_INFINITY; 4]).unwrap();
    let sinks = [0.5f32, 1.0, -1.0, 2.0];
    for (name, device) in devices() {
        let [output, weights] = run(&device, &sinks).unwrap();
        assert!(kit::worst(&output, &wide(&without[0])).0 > 1e-3, "{name}");
        let [output_cpu, _] = run(&Device::Cpu, &sinks).unwrap();
        assert_close(&name, &(output, 24), &wide(&output_cpu), TOLERANCE);
        // Compute P with a sink from P without: the sink's share is the same for all keys of a query.
        for (row, plain) in weights.chunks(8).zip(without[1].chunks(8)) {
            let left: f32 = row.iter().sum();
            assert!(left < 0.99, "{name}: {left}");
            for (with, plain) in row.iter().zip(plain) {
                assert!((with - plain * left).abs() < 1e-6, "{name}: {with} of {plain} with {left} left");
            }
        }
        let message = run(&device, &sinks[..3]).unwrap_err().to_string();
        assert!(message.contains("a sink of shape [3] must be [heads_q] = [4]"), "{name}: {message}");
    }
}

#[test]
fn misfits_are_errors_with_the_numbers() {
    for (name, device) in devices() {
        let x = Tensor::from_slice(&device, &[2, 4, 3, 8], &[0.5f32; 192]).unwrap();
        let packed = Tensor::from_slice(&device, &[6, 4, 8], &[0.5f32; 192]).unwrap();
        let bools = Tensor::from_bools(&device, &[4], &[true; 4]).unwrap();
        let floats =
            |shape: &[usize]| Tensor::from_slice(&device, shape, &vec![0.5f32; shape.iter().product()]).unwrap();
        for (sink, say) in [
            (floats(&[3]), "a sink of shape [3] must be [heads_q] = [4]: one score per query head"),
            (floats(&[4, 1]), "a sink of shape [4, 1] must be [heads_q] = [4]"),
            (floats(&[0]), "a sink of shape [0] must be [heads_q] = [4]"),
            (bools, "the sink is a bool tensor"),
        ] {
            let attention = Attention::new().sink(sink);
            let message = attention.forward(&x, &x, &x).unwrap_err().to_string();
            assert!(message.contains(say), "{name}: {message}");
            let message =
                attention.forward_packed(&packed, &packed, &packed, &[0, 6], &[0, 6]).unwrap_err().to_string();
            assert!(message.contains(say), "{name}: {message}");
        }
        if device.gpu().is_some() {
            let elsewhere = Tensor::from_slice(Device::Cpu, &[4], &[0.5f32; 4]).unwrap();
            let message = Attention::new().sink(elsewhere).forward(&x, &x, &x).unwrap_err().to_string();
            assert!(message.contains("the sink lives on cpu"), "{name}: {message}");
        }
    }
}

#[test]
fn rules_make_room_for_it() {
    // Rules that do not fit together with the sink are combined.
    let call = Call {
        sink: true,
        masks: vec![(vec![2, 1, 9, 20], MaskMeaning::Keep), (vec![9, 20], MaskMeaning::Hide)],
        biases: vec![vec![4, 1, 20]],
        positions: causal(Align::PerBatch(vec![3, 11])),
        ..Call::plain([2, 4, 9, 8], [2, 2, 20, 8], [2, 2, 20, 8])
    };
    let buffers = |most: u32| limited(move |limits| limits.max_storage_buffers_per_shader_stage = most);
    for most in [16, 8, 5, 4] {
        for (name, gpu) in buffers(most) {
            call.check(&format!("{name} with {most} buffers"), &Device::Gpu(gpu), TOLERANCE);
        }
    }
}

#[test]
fn a_thousand_forwards_allocate_nothing() {
    for (name, gpu) in gpus() {
        let x = Tensor::from_slice(&gpu, &[1, 2, 8, 8], &[0.5f32; 128]).unwrap();
        let sink = Tensor::from_slice(&gpu, &[2], &[f16::from_f32(0.5); 2]).unwrap();
        let attention = Attention::new().sink(sink);
        drop(attention.forward(&x, &x, &x).unwrap());
        let before = gpu.allocation_counts();
        (0..1000).for_each(|_| drop(attention.forward(&x, &x, &x).unwrap()));
        gpu.wait().unwrap();
        assert_eq!(gpu.allocation_counts(), before, "{name}");
    }
}
