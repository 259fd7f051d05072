//! Calls in a caller's encoder: which buffers they keep alive, where outputs may be written, which tensors they accept.

use crate::kit::{bits, gpus, noise};
use half::f16;
use rand::SeedableRng;
use rand_pcg::Pcg64;
use wgpu_attention::position::{Rotary, RotaryConfig, TokenPositions};
use wgpu_attention::{
    Align, Attention, Device, Dtype, Error, Gpu, Inspect, KvCache, KvCacheConfig, Method, MultiHeadAttention,
    MultiHeadConfig, Tensor, Weights, encode_project, project, wgpu,
};

const SHAPE: [usize; 4] = [1, 2, 40, 16];
const LEN: usize = 2 * 40 * 16;

fn random(seed: u64) -> Vec<f32> {
    noise(&mut Pcg64::seed_from_u64(seed), LEN)
}

fn tensor(gpu: &Gpu, seed: u64) -> Tensor {
    Tensor::from_slice(gpu, &SHAPE, &random(seed)).unwrap()
}

fn downloaded(tensor: &Tensor) -> Vec<u32> {
    bits(&tensor.download().unwrap())
}

/// Uploads to every buffer of these sizes that was returned to the pool: operands and weights.
fn overwrite(gpu: &Gpu) -> Vec<Tensor> {
    let upload = |n: usize| {
        let shape = if n.is_multiple_of(2) { SHAPE } else { [1, 2, 40, 40] };
        Tensor::from_slice(gpu, &shape, &vec![7.0f32; shape.iter().product()]).unwrap()
    };
    (0..48).map(upload).collect()
}

/// Records a call into an encoder and returns its results; everything else that it created is dropped.
type Records = Box<dyn Fn(&Gpu, &mut wgpu::CommandEncoder) -> Vec<Tensor>>;

fn calls() -> Vec<(&'static str, Records)> {
    let attention = || Attention::new().causal(Align::TopLeft).lse(true);
    vec![
        (
            "attention",
            Box::new(move |gpu, encoder| {
                let [q, k, v] = [1, 2, 3].map(|seed| tensor(gpu, seed));
                let attended = attention().encode(gpu, encoder, &q, &k, &v, None).unwrap();
                vec![attended.output, attended.lse.unwrap()]
            }),
        ),
        (
            "attention whose LSE is dropped",
            Box::new(move |gpu, encoder| {
                let [q, k, v] = [1, 2, 3].map(|seed| tensor(gpu, seed));
                vec![attention().encode(gpu, encoder, &q, &k, &v, None).unwrap().output]
            }),
        ),
        (
            "attention, and a call that is refused while it is recorded",
            Box::new(move |gpu, encoder| {
                let [q, k, v] = [1, 2, 3].map(|seed| tensor(gpu, seed));
                let attention = attention().weights(Weights::PerHead);
                let output = attention.encode(gpu, encoder, &q, &k, &v, None).unwrap().output;
                // Its weights are those of the call before, which are not needed any more.
                let half = Tensor::from_slice(gpu, &SHAPE, &[f16::ZERO; LEN]).unwrap();
                let passes = attention.method(Method::ThreePasses);
                let error = passes.encode(gpu, encoder, &q, &k, &v, Some(&half)).unwrap_err();
                assert!(error.to_string().contains("needs the fused method"), "{error}");
                vec![output]
            }),
        ),
        (
            "inspection",
            Box::new(move |gpu, encoder| {
                let [q, k] = [1, 2].map(|seed| tensor(gpu, seed));
                let lse = attention().encode(gpu, encoder, &q, &k, &k, None).unwrap().lse.unwrap();
                let inspect = Inspect::new().weights().column_sums();
                let seen = attention().encode_inspect(gpu, encoder, &q, &k, &lse, &inspect).unwrap();
                vec![seen.weights.unwrap(), seen.column_sums.unwrap()]
            }),
        ),
        (
            "a layer",
            Box::new(|gpu, encoder| {
                let layer = MultiHeadAttention::new(gpu, MultiHeadConfig::new(16, 2).unwrap(), 5).unwrap();
                let x = Tensor::from_slice(gpu, &[2, 40, 16], &random(4)).unwrap();
                let padding = Tensor::from_bools(gpu, &[2, 40], &[[false; 40], [true; 40]].concat()).unwrap();
                let attention = Attention::new().key_padding(wgpu_attention::Mask::hide_where(padding).unwrap());
                vec![layer.encode(gpu, encoder, &x, &x, &x, &attention).unwrap().output]
            }),
        ),
        (
            "a layer and its cache",
            Box::new(|gpu, encoder| {
                let layer = MultiHeadAttention::new(gpu, MultiHeadConfig::new(16, 2).unwrap(), 5).unwrap();
                let mut cache = KvCache::new(gpu, KvCacheConfig::new(2, 2, 64, 8)).unwrap();
                let x = Tensor::from_slice(gpu, &[2, 40, 16], &random(4)).unwrap();
                let last = x.narrow(1, 39, 1).unwrap();
                let attention = Attention::new();
                let first = layer.encode_step(gpu, encoder, &mut cache, &x, &attention, Some(&[39, 7])).unwrap();
                let second = layer.encode_step(gpu, encoder, &mut cache, &last, &attention, None).unwrap();
                vec![first.output.narrow(1, 0, 7).unwrap(), second.output]
            }),
        ),
        (
            "a projection and rotary positions",
            Box::new(|gpu, encoder| {
                let rotary = Rotary::new(gpu, &RotaryConfig::new(16), 64).unwrap();
                let weight = Tensor::from_slice(gpu, &[16, 16], &random(6)[..256]).unwrap();
                let y = encode_project(gpu, encoder, &tensor(gpu, 1), &weight, None).unwrap();
                vec![rotary.encode(gpu, encoder, &y, &TokenPositions::From(3)).unwrap()]
            }),
        ),
    ]
}

#[test]
fn buffers_dropped_before_the_submit_are_not_reused() {
    for (name, gpu) in gpus() {
        for (what, record) in calls() {
            let run = |between: &dyn Fn() -> Vec<Tensor>| {
                let mut encoder = gpu.device().create_command_encoder(&Default::default());
                let results = record(&gpu, &mut encoder);
                let others = between();
                gpu.queue().submit([encoder.finish()]);
                let results: Vec<_> = results.iter().map(downloaded).collect();
                for other in others {
                    assert!(other.download().unwrap().iter().all(|&x| x == 7.0), "{what} on {name} wrote elsewhere");
                }
                results
            };
            let expected = run(&Vec::new);
            assert_eq!(run(&|| overwrite(&gpu)), expected, "{what} on {name}");
        }
    }
}

#[test]
fn encoders_are_submitted_in_any_order_or_dropped() {
    for (name, gpu) in gpus() {
        for (what, record) in calls() {
            let new = || gpu.device().create_command_encoder(&Default::default());
            let mut encoder = new();
            let expected = record(&gpu, &mut encoder);
            gpu.queue().submit([encoder.finish()]);
            let expected: Vec<_> = expected.iter().map(downloaded).collect();

            let (mut first, mut second, mut never) = (new(), new(), new());
            let of_first = [record(&gpu, &mut first), record(&gpu, &mut first)];
            drop(record(&gpu, &mut never));
            let of_second = record(&gpu, &mut second);
            drop(never);
            gpu.queue().submit([second.finish()]);
            gpu.queue().submit([first.finish()]);
            for results in of_first.iter().chain([&of_second]) {
                assert_eq!(results.iter().map(downloaded).collect::<Vec<_>>(), expected, "{what} on {name}");
            }
        }
    }
}

/// Memory held by encoders is returned, whether they were submitted or dropped.
#[test]
fn repeated_encoders_allocate_nothing() {
    for (name, gpu) in gpus() {
        let [q, k, v] = [1, 2, 3].map(|seed| tensor(&gpu, seed));
        let run = |n: usize| {
            let mut encoder = gpu.device().create_command_encoder(&Default::default());
            for _ in 0..4 {
                drop(Attention::new().lse(true).encode(&gpu, &mut encoder, &q, &k, &v, None).unwrap());
            }
            if n.is_multiple_of(2) {
                gpu.queue().submit([encoder.finish()]);
                gpu.wait().unwrap();
            }
        };
        (0..4).for_each(run);
        let before = gpu.allocation_counts();
        (0..100).for_each(run);
        assert_eq!(gpu.allocation_counts(), before, "{name}");
    }
}

/// The last handle of a device may be the one that an encoder holds.
#[test]
fn an_encoder_outlives_the_gpu() {
    for n in 0..gpus().len() {
        let (_, gpu) = gpus().swap_remove(n);
        let (device, queue) = (gpu.device().clone(), gpu.queue().clone());
        let mut encoder = device.create_command_encoder(&Default::default());
        let x = tensor(&gpu, 1);
        drop(Attention::new().encode(&gpu, &mut encoder, &x, &x, &x, None).unwrap());
        drop((x, gpu));
        queue.submit([encoder.finish()]);
        device.poll(wgpu::PollType::wait_indefinitely()).unwrap();
    }
}

/// A caller's buffer with `parts` consecutive tensors.
fn arena(gpu: &Gpu, usage: wgpu::BufferUsages, parts: usize) -> (wgpu::Buffer, Vec<Tensor>) {
    let buffer = gpu.device().create_buffer(&wgpu::BufferDescriptor {
        label: Some("arena"),
        size: (parts * LEN * 4) as u64,
        usage: usage | wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    });
    for part in 0..parts {
        let values = random(part as u64 + 1);
        gpu.queue().write_buffer(&buffer, (part * LEN * 4) as u64, bytemuck::cast_slice(&values));
    }
    let strides = [LEN, 40 * 16, 16, 1];
    let tensors = (0..parts)
        .map(|part| Tensor::from_wgpu(gpu, &buffer, &SHAPE, &strides, part * LEN, Dtype::F32).unwrap())
        .collect();
    (buffer, tensors)
}

#[test]
fn writes_to_a_part_of_a_buffer_leave_the_rest_unchanged() {
    for (name, gpu) in gpus() {
        let (_buffer, parts) = arena(&gpu, wgpu::BufferUsages::COPY_SRC, 4);
        let [q, k, v, free] = parts.as_slice() else { unreachable!() };
        let expected = Attention::new().forward(&tensor(&gpu, 1), &tensor(&gpu, 2), &tensor(&gpu, 3)).unwrap();
        let attended = Attention::new().forward(q, k, v).unwrap();
        assert_eq!(downloaded(&attended.output), downloaded(&expected.output), "{name}");

        let mut encoder = gpu.device().create_command_encoder(&Default::default());
        let own = tensor(&gpu, 4);
        for (output, [q, k, v], operand, disjoint) in [
            (free, [q, &own, &own], "Q", true),
            (free, [&own, k, &own], "K", true),
            (q, [q, k, v], "Q", false),
            (v, [&own, &own, v], "V", false),
        ] {
            let error = Attention::new().encode(&gpu, &mut encoder, q, k, v, Some(output)).unwrap_err();
            let message = error.to_string();
            assert!(message.contains("a buffer of its own"), "{message}");
            match error {
                Error::Aliased { operand: named, overlaps } => {
                    assert_eq!((named.as_str(), !overlaps), (operand, disjoint))
                }
                other => panic!("{other:?}"),
            }
        }
        // Elements that overlap.
        let (_buffer, parts) = arena(&gpu, wgpu::BufferUsages::COPY_SRC, 1);
        let repeated = parts[0].narrow(2, 0, 1).unwrap();
        let strides = repeated.layout().broadcast_to(&SHAPE).unwrap().strides().to_vec();
        let repeated = Tensor::from_wgpu(&gpu, &_buffer, &SHAPE, &strides, 0, Dtype::F32).unwrap();
        let error = Attention::new().encode(&gpu, &mut encoder, &own, &own, &own, Some(&repeated)).unwrap_err();
        assert!(error.to_string().contains("share a place"), "{error}");
        // Rejected calls recorded nothing.
        let output = Attention::new().encode(&gpu, &mut encoder, q, k, v, None).unwrap().output;
        gpu.queue().submit([encoder.finish()]);
        assert_eq!(downloaded(&output), downloaded(&expected.output), "{name}");
    }
}

#[test]
fn buffers_of_another_device_or_usage_are_rejected() {
    for (name, gpu) in gpus() {
        // Another device of the same adapter.
        let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
        let adapters = pollster::block_on(instance.enumerate_adapters(gpu.info().backend.into()));
        let (device, queue) = pollster::block_on(adapters[0].request_device(&Default::default())).unwrap();
        let other = Gpu::from_wgpu(&adapters[0], device, queue);
        let (buffer, parts) = arena(&other, wgpu::BufferUsages::empty(), 1);

        let error = parts[0].download().unwrap_err();
        assert!(matches!(&error, Error::Value(message) if message.contains("COPY_SRC")), "{name}: {error:?}");
        let own = tensor(&gpu, 1);
        for error in [
            Attention::new().forward(&own, &parts[0], &own).unwrap_err(),
            Attention::new().forward(&parts[0], &own, &own).unwrap_err(),
            project(&own, &parts[0].select(0, 0).unwrap().select(0, 0).unwrap(), None).unwrap_err(),
            Device::from(&gpu)
                .gpu()
                .map(|gpu| {
                    let mut encoder = gpu.device().create_command_encoder(&Default::default());
                    Attention::new().encode(gpu, &mut encoder, &parts[0], &parts[0], &parts[0], None).unwrap_err()
                })
                .unwrap(),
        ] {
            assert!(matches!(error, Error::Device { .. }), "{name}: {error:?}");
        }
        let _ = buffer;
    }
    // Two devices of one instance: a buffer of the one as a tensor of the other.
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
    for adapter in pollster::block_on(instance.enumerate_adapters(wgpu::Backends::all())) {
        let new = || {
            let (device, queue) = pollster::block_on(adapter.request_device(&Default::default())).unwrap();
            Gpu::from_wgpu(&adapter, device, queue)
        };
        let (one, two) = (new(), new());
        let (buffer, _) = arena(&one, wgpu::BufferUsages::COPY_SRC, 1);
        let error = Tensor::from_wgpu(&two, &buffer, &SHAPE, &[LEN, 640, 16, 1], 0, Dtype::F32).unwrap_err();
        assert!(matches!(&error, Error::Device { there, .. } if there.starts_with("another device")), "{error:?}");
    }
}
