//! f16 and bf16 storage on every device.

use crate::kit::{Call, Order, assert_close, bits, devices, gpus, limited, methods, methods_in_turn};
use half::{bf16, f16};
use wgpu_attention::problem::{MaskMeaning, Positions};
use wgpu_attention::{
    Align, Attention, Device, Dtype, Element, Gpu, Mask, Method, ScoreStage, Tensor, Weights, project,
};

/// Relative to the scale of a row, plus half a unit in the last place if a result is rounded to a half type. The truth
/// is that of the rounded operands, because rounding the input is not an error of the library.
const TOLERANCE: f64 = 3e-6;

fn call(order: Order, dim_k: usize, dim_v: usize) -> Call {
    Call {
        order,
        positions: Positions { causal: true, align: Align::BottomRight, ..Default::default() },
        seed: 5,
        ..Call::plain([2, 4, 21, dim_k], [2, 2, 37, dim_k], [2, 2, 37, dim_v])
    }
}

/// A call with operands and rules of half types or f32, by some methods or all.
fn holds(call: &Call, stored: Dtype, rules: Dtype, methods: impl Fn(&Device) -> Vec<Method>) {
    let data = call.data().rounded(stored, rules);
    let (truth, stages) = call.truth(&data);
    for (name, device) in devices() {
        let [q, k, v] = call.operands(&device, &data, stored).unwrap();
        for method in methods(&device) {
            let what = format!("{stored} with rules of {rules} by {method} on {name}: {call:?}");
            let attention = call.ruled_as(&device, &data, call.attention().method(method), rules).unwrap();
            let out = attention.clone().lse(true).forward(&q, &k, &v).unwrap();
            let output = out.output.download().unwrap();
            assert_eq!(out.output.dtype(), stored, "{what}");
            assert!(output.iter().all(|&y| stored.round(y) == y), "{what}: not rounded");
            truth.hold(&what, &out, TOLERANCE);
            let asked = attention.lse(true).weights(Weights::PerHead).scores(Some(ScoreStage::Masked));
            let all = asked.forward(&q, &k, &v).unwrap();
            truth.hold(&what, &all, TOLERANCE);
            truth.hold_scores(&format!("scores of {what}"), &all.scores.unwrap(), &stages[2], TOLERANCE);
            assert_eq!(
                bits(&all.output.download().unwrap()),
                bits(&output),
                "{what}: weights beside it change the output"
            );
        }
    }
}

#[test]
fn halves_in_every_order_and_at_odd_widths() {
    let both = |_: &Device| vec![Method::Auto, Method::ThreePasses];
    for (order, dim_k, dim_v) in
        [(Order::Bhsd, 16, 16), (Order::Bshd, 8, 20), (Order::Packed, 7, 7), (Order::Bhds, 5, 9)]
    {
        for stored in [Dtype::F16, Dtype::BF16] {
            holds(&call(order, dim_k, dim_v), stored, Dtype::F32, both);
        }
    }
}

#[test]
fn rules_of_halves_beside_operands_of_any_type() {
    // A bias, a mask, a softcap and a sink; operands and rules have independent types.
    let call = Call {
        masks: vec![(vec![21, 37], MaskMeaning::Keep)],
        biases: vec![vec![4, 1, 37], vec![2, 1, 21, 37]],
        softcap: Some(4.0),
        sink: true,
        ..call(Order::Bhsd, 12, 20)
    };
    // Another method for each pair, because each compiles its own kernels.
    for (n, (stored, rules)) in [
        (Dtype::F32, Dtype::F16),
        (Dtype::F32, Dtype::BF16),
        (Dtype::F16, Dtype::F16),
        (Dtype::F16, Dtype::BF16),
        (Dtype::BF16, Dtype::F16),
        (Dtype::BF16, Dtype::BF16),
    ]
    .into_iter()
    .enumerate()
    {
        holds(&call, stored, rules, |device| methods_in_turn(device, n, 1));
    }
}

#[test]
fn halves_by_every_method() {
    for stored in [Dtype::F16, Dtype::BF16] {
        let n = usize::from(stored == Dtype::BF16);
        holds(&call(Order::Bhsd, 16, 16), stored, Dtype::F32, |device| {
            methods(device).into_iter().skip(n).step_by(2).collect()
        });
    }
}

#[test]
fn small_rows_of_halves_beside_large_ones() {
    // Heads whose values differ by 1e4: each row is judged by its own scale, down to the smallest normal f16 numbers.
    for stored in [Dtype::F16, Dtype::BF16] {
        let call = call(Order::Bhsd, 16, 16);
        let mut data = call.data();
        for (at, x) in data.v.iter_mut().enumerate() {
            *x *= [1.0, 1e-4, 1e4][at / (37 * 16) % 3];
        }
        let data = data.rounded(stored, Dtype::F32);
        let (truth, _) = call.truth(&data);
        for (name, device) in devices() {
            for method in [Method::Auto, Method::ThreePasses] {
                let [q, k, v] = call.operands(&device, &data, stored).unwrap();
                let out = call.attention().method(method).forward(&q, &k, &v).unwrap();
                truth.hold(&format!("{stored} by {method} on {name}"), &out, TOLERANCE);
            }
        }
    }
}

#[test]
fn splits_of_the_keys_merge_into_half_types() {
    // Few queries over many keys: the keys are split, and the parts merged in f32.
    let call = Call { q: [1, 2, 3, 8], k: [1, 1, 900, 8], v: [1, 1, 900, 8], ..call(Order::Bhsd, 8, 8) };
    let data = call.data().rounded(Dtype::F16, Dtype::F32);
    let (truth, _) = call.truth(&data);
    for (name, device) in devices() {
        let [q, k, v] = call.operands(&device, &data, Dtype::F16).unwrap();
        let (out, profile) = call.attention().lse(true).forward_profiled(&q, &k, &v).unwrap();
        if device.gpu().is_some() {
            assert!(profile.kernels.iter().any(|kernel| kernel.starts_with("merge")), "{name}: {profile:?}");
        }
        truth.hold(&name, &out, TOLERANCE);
    }
}

#[test]
fn every_half_is_read_and_written_exactly() {
    // One key: the output is the value, whatever its bits.
    let all: Vec<u16> = (0..=u16::MAX).collect();
    let values: Vec<f16> = all.iter().map(|&bits| f16::from_bits(bits)).collect();
    let brains: Vec<bf16> = all.iter().map(|&bits| bf16::from_bits(bits)).collect();
    for (name, device) in devices() {
        let q = Tensor::from_slice(&device, &[256, 1, 1, 4], &[f16::ONE; 1024]).unwrap();
        let v = Tensor::from_slice(&device, &[256, 1, 1, 256], &values).unwrap();
        let out = Attention::new().forward(&q, &q, &v).unwrap().output.download().unwrap();
        for (x, y) in values.iter().zip(&out) {
            assert!(x.to_f32() == *y || x.is_nan() && y.is_nan(), "{name}: {x:?} came back as {y}");
        }
        let q = Tensor::from_slice(&device, &[256, 1, 1, 4], &[bf16::ONE; 1024]).unwrap();
        let v = Tensor::from_slice(&device, &[256, 1, 1, 256], &brains).unwrap();
        let out = Attention::new().forward(&q, &q, &v).unwrap().output.download().unwrap();
        for (x, y) in brains.iter().zip(&out) {
            // Below 2^-126 an adapter may flush a number to 0.
            let tiny = x.to_f32().abs() < f32::MIN_POSITIVE && *y == 0.0;
            assert!(x.to_f32() == *y || tiny || x.is_nan() && y.is_nan(), "{name}: {x:?} came back as {y}");
        }
    }
}

#[test]
fn results_are_rounded_to_nearest_even() {
    // Two keys of equal weight: means halfway between two half-type numbers, and beyond the largest.
    let pairs =
        [(1.0, 1.0009765625), (1.0009765625, 1.001953125), (65504.0, 65504.0), (6e-8, 0.0), (-2.5e-5, -2.52e-5)];
    for (name, device) in devices() {
        let v: Vec<f16> = pairs.iter().flat_map(|&(a, b)| [a, a, a, a, b, b, b, b]).map(f16::from_f64).collect();
        let v = Tensor::from_slice(&device, &[pairs.len(), 1, 2, 4], &v).unwrap();
        let out = Attention::new().scale(0.0).forward(&v, &v, &v).unwrap().output.download().unwrap();
        for (n, &(a, b)) in pairs.iter().enumerate() {
            let mean = (f64::from(f16::from_f64(a)) + f64::from(f16::from_f64(b))) / 2.0;
            assert_eq!(out[n * 8], f16::from_f64(mean).to_f32(), "{name}: the mean of {a} and {b}");
        }
    }
}

#[test]
fn halves_take_half_the_memory_and_mix_with_f32() {
    let call = Call {
        biases: vec![vec![4, 1, 37]],
        masks: vec![(vec![21, 37], MaskMeaning::Keep)],
        ..call(Order::Bhsd, 16, 16)
    };
    let data = call.data().rounded(Dtype::F32, Dtype::F16);
    let (truth, _) = call.truth(&data);
    for (name, gpu) in gpus() {
        let device = wgpu_attention::Device::Gpu(gpu.clone());
        let before = gpu.allocation_counts().bytes;
        let big = Tensor::from_slice(&device, &[1 << 20], &vec![f16::ONE; 1 << 20]).unwrap();
        assert_eq!(gpu.allocation_counts().bytes - before, 2 << 20, "{name}");
        assert_eq!(big.narrow(0, 7, 3).unwrap().download().unwrap(), [1.0; 3]);
        // A half-type bias gives the same bits as the same numbers in f32.
        let bias: Vec<f16> = data.biases[0].iter().map(|&x| f16::from_f32(x)).collect();
        let run = |bias: Tensor| {
            let mask = Mask::keep_where(Tensor::from_bools(&device, &[21, 37], &data.masks[0]).unwrap()).unwrap();
            let [q, k, v] = [(call.q, &data.q), (call.k, &data.k), (call.v, &data.v)]
                .map(|(shape, data)| Tensor::from_slice(&device, &shape, data).unwrap());
            call.attention().mask(mask).bias(bias).forward(&q, &k, &v).unwrap().output
        };
        let half = run(Tensor::from_slice(&device, &[4, 1, 37], &bias).unwrap());
        let whole = run(Tensor::from_slice(&device, &[4, 1, 37], &data.biases[0]).unwrap());
        assert_eq!(bits(&half.download().unwrap()), bits(&whole.download().unwrap()), "{name}");
        truth.hold_output(&name, &half, TOLERANCE);
        // Operands that only f32 kernels read.
        let x: Vec<f16> = (0..60).map(|i| f16::from_f32(i as f32 * 0.1)).collect();
        let exps: Vec<f64> = x.iter().map(|x| x.to_f64().exp()).collect();
        let softmax: Vec<f64> =
            (0..60).map(|at| exps[at] / (0..4).map(|n| exps[at / 20 * 20 + n * 5 + at % 5]).sum::<f64>()).collect();
        let y = wgpu_attention::softmax(&Tensor::from_slice(&device, &[3, 4, 5], &x).unwrap(), 1).unwrap();
        assert_eq!(y.dtype(), Dtype::F16);
        assert_close(&name, &y, &softmax, 1e-6);
    }
}

#[test]
fn an_output_of_halves_must_be_whole_fours() {
    for (name, gpu) in gpus() {
        let device = wgpu_attention::Device::Gpu(gpu.clone());
        let buffer = gpu.device().create_buffer(&wgpu_attention::wgpu::BufferDescriptor {
            label: None,
            size: 4096,
            usage: wgpu_attention::wgpu::BufferUsages::STORAGE | wgpu_attention::wgpu::BufferUsages::COPY_SRC,
            mapped_at_creation: false,
        });
        let x = Tensor::from_slice(&device, &[1, 1, 3, 8], &[f16::ONE; 24]).unwrap();
        let mut encoder = gpu.device().create_command_encoder(&Default::default());
        let odd = Tensor::from_wgpu(&gpu, &buffer, &[1, 1, 3, 8], &[0, 0, 8, 1], 3, Dtype::F16).unwrap();
        let message = Attention::new().encode(&gpu, &mut encoder, &x, &x, &x, Some(&odd)).unwrap_err().to_string();
        assert!(message.contains("whole fours") && message.contains("offset 3"), "{name}: {message}");
        let good = Tensor::from_wgpu(&gpu, &buffer, &[1, 1, 3, 8], &[0, 0, 8, 1], 8, Dtype::F16).unwrap();
        let passes = Attention::new().method(Method::ThreePasses);
        let message = passes.encode(&gpu, &mut encoder, &x, &x, &x, Some(&good)).unwrap_err().to_string();
        assert!(message.contains("fused"), "{name}: {message}");
        let kept = Attention::new().encode(&gpu, &mut encoder, &x, &x, &x, Some(&good)).unwrap();
        gpu.queue().submit([encoder.finish()]);
        assert_eq!(kept.output.download_as::<f16>().unwrap(), [f16::ONE; 24], "{name}");
    }
}

/// The results of kernels with every kind of load, over tensors of `T`.
fn bits_of_loads<T: Element>(gpu: &Gpu) -> [Vec<u32>; 4] {
    let tensor = |shape: &[usize], by: f32| {
        let data: Vec<T> = (0..shape.iter().product()).map(|n| T::from_f32((n as f32 * by).sin())).collect();
        Tensor::from_slice(gpu, shape, &data).unwrap()
    };
    let [q, k, v] = [0.3, 0.7, 1.1].map(|by| tensor(&[2, 3, 21, 16], by));
    let fused = Attention::new().causal(Align::TopLeft).forward(&q, &k, &v).unwrap();
    let weights = Attention::new().weights(Weights::PerHead).forward(&q, &k, &v).unwrap();
    let few = project(&tensor(&[2, 1, 40], 0.9), &tensor(&[24, 40], 1.3), None).unwrap();
    let many = project(&tensor(&[1, 30, 40], 0.9), &tensor(&[24, 40], 1.3), None).unwrap();
    [&fused.output, &weights.output, &few, &many].map(|one| bits(&one.download().unwrap()))
}

/// Devices with 64-bit words (those of `limited` have none) load the same data in another way.
#[test]
fn wide_loads_of_64_bits_change_no_bit() {
    let without = limited(|_| {});
    let mut tried = 0;
    for (name, gpu) in gpus() {
        if !gpu.device().features().contains(wgpu::Features::SHADER_INT64) {
            continue;
        }
        let (_, plain) = without.iter().find(|(other, _)| *other == name).unwrap();
        assert!(!plain.device().features().contains(wgpu::Features::SHADER_INT64));
        assert_eq!(bits_of_loads::<f32>(&gpu), bits_of_loads::<f32>(plain), "{name}");
        assert_eq!(bits_of_loads::<f16>(&gpu), bits_of_loads::<f16>(plain), "{name}, f16");
        assert_eq!(bits_of_loads::<bf16>(&gpu), bits_of_loads::<bf16>(plain), "{name}, bf16");
        tried += 1;
    }
    // Every Linux machine that runs the tests has Mesa's software adapter.
    assert!(tried > 0 || !cfg!(target_os = "linux"));
}
