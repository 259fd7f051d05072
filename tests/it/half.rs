//! f16 and bf16 storage on every device.

use crate::kit::{self, Call, Order, assert_close, bits, devices, gpus, limited};
use half::{bf16, f16};
use wgpu_attention::problem::{MaskMeaning, Positions};
use wgpu_attention::{Align, Attention, Dtype, Element, Gpu, Mask, Method, Tensor, Weights, project};

fn call(order: Order, dim_k: usize, dim_v: usize) -> Call {
    Call {
        q: [2, 4, 21, dim_k],
        k: [2, 2, 37, dim_k],
        v: [2, 2, 37, dim_v],
        order,
        positions: Positions { causal: true, align: Align::BottomRight, ..Default::default() },
        scale: None,
        softcap: None,
        masks: vec![],
        biases: vec![],
        sink: false,
        seed: 5,
    }
}

/// Half an ulp of the largest value, and the error of f32 sums.
fn tolerance(dtype: Dtype) -> f64 {
    let half_ulp = if dtype == Dtype::F16 { 1.0 / 2048.0 } else { 1.0 / 256.0 };
    half_ulp + 3e-6
}

fn holds<T: Element>(order: Order, dim_k: usize, dim_v: usize) {
    let call = call(order, dim_k, dim_v);
    let mut data = call.data();
    let halves = |values: &[f32]| -> Vec<T> { values.iter().map(|&x| T::from_f32(x)).collect() };
    let [q, k, v] = [&data.q, &data.k, &data.v].map(|values| halves(values));
    let wide = |values: &[T]| -> Vec<f32> { values.iter().map(|x| x.to_f32()).collect() };
    (data.q, data.k, data.v) = (wide(&q), wide(&k), wide(&v));
    let (truth, _) = call.truth(&data);
    for (name, device) in devices() {
        let what = format!("{} {order:?} {dim_k} {dim_v} on {name}", T::DTYPE);
        let [q, k, v] = [(call.q, &q, 0), (call.k, &k, 1), (call.v, &v, 2)]
            .map(|(shape, data, part)| kit::place(&device, shape, data, order, part).unwrap());
        for method in [Method::Auto, Method::ThreePasses] {
            let attention = call.attention().lse(true).weights(Weights::PerHead).method(method);
            let out = attention.forward(&q, &k, &v).unwrap();
            assert_eq!(out.output.dtype(), T::DTYPE);
            let output = out.output.download().unwrap();
            assert!(output.iter().all(|&y| T::from_f32(y).to_f32() == y), "{what}: rounded");
            assert_close(&what, &output, &truth.output, tolerance(T::DTYPE));
            assert_close(&what, &out.lse.unwrap().download().unwrap(), &truth.lse, 3e-6);
            assert_close(&what, &out.weights.unwrap().download().unwrap(), &truth.weights, tolerance(T::DTYPE));
        }
    }
}

#[test]
fn halves_in_every_order_and_at_odd_widths() {
    for (order, dim_k, dim_v) in
        [(Order::Bhsd, 16, 16), (Order::Bshd, 8, 20), (Order::Packed, 7, 7), (Order::Bhds, 5, 9)]
    {
        holds::<f16>(order, dim_k, dim_v);
        holds::<bf16>(order, dim_k, dim_v);
    }
}

#[test]
fn splits_of_the_keys_join_into_halves() {
    // Few queries over many keys: pieces of the keys, joined in f32.
    let call = Call { q: [1, 2, 3, 8], k: [1, 1, 900, 8], v: [1, 1, 900, 8], ..call(Order::Bhsd, 8, 8) };
    let mut data = call.data();
    let halves = |values: &[f32]| -> Vec<f16> { values.iter().map(|&x| f16::from_f32(x)).collect() };
    let [q, k, v] = [&data.q, &data.k, &data.v].map(|values| halves(values));
    let wide = |values: &[f16]| -> Vec<f32> { values.iter().map(|x| x.to_f32()).collect() };
    (data.q, data.k, data.v) = (wide(&q), wide(&k), wide(&v));
    let (truth, _) = call.truth(&data);
    for (name, device) in devices() {
        let upload = |shape: [usize; 4], values: &[f16]| Tensor::from_slice(&device, &shape, values).unwrap();
        let (q, k, v) = (upload(call.q, &q), upload(call.k, &k), upload(call.v, &v));
        let (out, profile) = call.attention().lse(true).forward_profiled(&q, &k, &v).unwrap();
        if device.gpu().is_some() {
            assert!(profile.kernels.iter().any(|kernel| kernel.starts_with("merge")), "{name}: {profile:?}");
        }
        assert_close(&name, &out.output.download().unwrap(), &truth.output, tolerance(Dtype::F16));
        assert_close(&name, &out.lse.unwrap().download().unwrap(), &truth.lse, 3e-6);
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
            // Below 2^-126 an adapter may take a number for 0.
            let tiny = x.to_f32().abs() < f32::MIN_POSITIVE && *y == 0.0;
            assert!(x.to_f32() == *y || tiny || x.is_nan() && y.is_nan(), "{name}: {x:?} came back as {y}");
        }
    }
}

#[test]
fn results_are_rounded_to_nearest_even() {
    // Two keys of equal weight: means that lie half way between two halves, and beyond the largest.
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
    let data = call.data();
    let (truth, _) = call.truth(&data);
    for (name, gpu) in gpus() {
        let device = wgpu_attention::Device::Gpu(gpu.clone());
        let before = gpu.allocation_counts().bytes;
        let big = Tensor::from_slice(&device, &[1 << 20], &vec![f16::ONE; 1 << 20]).unwrap();
        assert_eq!(gpu.allocation_counts().bytes - before, 2 << 20, "{name}");
        assert_eq!(big.narrow(0, 7, 3).unwrap().download().unwrap(), [1.0; 3]);
        // A bias of halves; queries of f32 over keys that are not.
        let bias: Vec<f16> = data.biases[0].iter().map(|&x| f16::from_f32(x)).collect();
        let rounded: Vec<f32> = bias.iter().map(|x| x.to_f32()).collect();
        let run = |bias: Tensor| {
            let mask = Mask::keep(Tensor::from_bools(&device, &[21, 37], &data.masks[0]).unwrap()).unwrap();
            let [q, k, v] = [(call.q, &data.q), (call.k, &data.k), (call.v, &data.v)]
                .map(|(shape, data)| Tensor::from_slice(&device, &shape, data).unwrap());
            call.attention().mask(mask).bias(bias).forward(&q, &k, &v).unwrap().output.download().unwrap()
        };
        let half = run(Tensor::from_slice(&device, &[4, 1, 37], &bias).unwrap());
        assert_eq!(bits(&half), bits(&run(Tensor::from_slice(&device, &[4, 1, 37], &rounded).unwrap())), "{name}");
        assert_close(&name, &half, &truth.output, 2e-3);
        // What only f32 kernels read.
        let x: Vec<f16> = (0..60).map(|i| f16::from_f32(i as f32 * 0.1)).collect();
        let x = Tensor::from_slice(&device, &[3, 4, 5], &x).unwrap();
        let y = wgpu_attention::softmax(&x, 1).unwrap();
        assert_eq!(y.dtype(), Dtype::F16);
        let sums: f32 = y.select(2, 0).unwrap().select(0, 0).unwrap().download().unwrap().iter().sum();
        assert!((sums - 1.0).abs() < 2e-3, "{name}: {sums}");
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

/// What kernels of every kind of load give, over tensors that hold `T`.
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

/// Words of 64 bits, where a device has them (those of `limited` have not), are another way to load the same.
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
