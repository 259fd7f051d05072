//! Faults: lost devices, made-up limits, denied memory, timeouts, threads. Each ends in a specific error or in the
//! right result.

use std::time::{Duration, Instant};

use crate::kit::{Call, gpus, limited};
use wgpu_attention::kernels::{Kernel, Variant};
use wgpu_attention::{
    Attended, Attention, Device, Error, Gpu, GpuKind, GpuOptions, KvCache, KvCacheConfig, Method, MultiHeadAttention,
    MultiHeadConfig, Result, StateDict, Tensor, Weights, merge, project, softmax, wgpu,
};
use wgpu_attention_conformance::{FORMS, case_folder, draw, refused};

const TOLERANCE: f64 = 3e-6;

/// Q, K and V of equal rows; 512 rows keep a software adapter busy long enough.
fn rows(device: &Device, len: usize) -> [Tensor; 3] {
    let shape = [1, 8, len, 64];
    let values = vec![0.5f32; shape.iter().product()];
    [0, 1, 2].map(|_| Tensor::from_slice(device, &shape, &values).unwrap())
}

fn small(device: &Device) -> Result<Vec<f32>> {
    let x = Tensor::from_slice(device, &[1, 2, 4, 4], &[1.0f32; 32])?;
    Attention::new().forward(&x, &x, &x)?.output.download()
}

/// The adapters, each once.
fn opened() -> impl Iterator<Item = (String, Gpu)> {
    Gpu::adapters().into_iter().map(|adapter| {
        let options = GpuOptions::adapter(adapter.index.to_string());
        (format!("{} ({})", adapter.info.name, adapter.info.backend), Gpu::with_options(&options).unwrap())
    })
}

/// Every adapter twice: with a device opened by this library, and with a caller's device, which has no handlers.
fn devices() -> Vec<(String, Box<dyn Fn() -> Gpu>)> {
    let mut all: Vec<(String, Box<dyn Fn() -> Gpu>)> = Vec::new();
    for adapter in Gpu::adapters() {
        let name = format!("{} ({})", adapter.info.name, adapter.info.backend);
        let options = GpuOptions::adapter(adapter.index.to_string());
        all.push((name, Box::new(move || Gpu::with_options(&options).unwrap())));
    }
    for (n, (name, _)) in limited(|_| ()).into_iter().enumerate() {
        all.push((format!("a caller's {name}"), Box::new(move || limited(|_| ()).swap_remove(n).1)));
    }
    all
}

/// Uses of a device, up to the first error. Each works on objects made before the loss.
#[derive(Clone, Copy, Debug)]
enum Later {
    Download,
    Forward,
    ThreePasses,
    Softmax,
    Merge,
    Upload,
    CacheStep,
    CacheRead,
    Layer,
    Profiled,
}

const LATER: [Later; 10] = [
    Later::Download,
    Later::Forward,
    Later::ThreePasses,
    Later::Softmax,
    Later::Merge,
    Later::Upload,
    Later::CacheStep,
    Later::CacheRead,
    Later::Layer,
    Later::Profiled,
];

/// When the device is lost.
#[derive(Clone, Copy, Debug)]
enum Moment {
    /// The device is idle.
    Idle,
    /// Work is submitted and not done.
    InFlight,
    /// Work is submitted and waited for.
    Done,
}

#[test]
fn a_device_lost_at_any_moment_is_a_typed_error_and_a_new_one_works() {
    let mut tried = 0;
    for (name, open) in devices() {
        for moment in [Moment::Idle, Moment::InFlight, Moment::Done] {
            let gpu = open();
            let device = Device::from(&gpu);
            let x = Tensor::from_slice(&device, &[1, 2, 4, 4], &[1.0f32; 32]).unwrap();
            let mut cache = KvCache::new(&device, KvCacheConfig::new(1, 2, 16, 4)).unwrap();
            cache.append(&x, &x).unwrap();
            let layer = MultiHeadAttention::new(&device, MultiHeadConfig::new(8, 2).unwrap(), 1).unwrap();
            let tokens = Tensor::from_slice(&device, &[1, 3, 8], &[0.5f32; 24]).unwrap();
            let done = Attention::new().lse(true).forward(&x, &x, &x).unwrap();
            let lse = done.lse.unwrap();
            let mut in_flight = None;
            if !matches!(moment, Moment::Idle) {
                let [q, k, v] = rows(&device, 512);
                in_flight = Some(Attention::new().forward(&q, &k, &v).unwrap());
            }
            if matches!(moment, Moment::Done) {
                gpu.wait().unwrap();
            }
            gpu.device().destroy();
            for later in LATER {
                let began = Instant::now();
                let mut run = || -> Result<()> {
                    match later {
                        Later::Download => {
                            in_flight.as_ref().map_or(&done.output, |long| &long.output).download()?;
                        }
                        Later::Forward => {
                            Attention::new().weights(Weights::PerHead).forward(&x, &x, &x)?.output.download()?;
                        }
                        Later::ThreePasses => {
                            Attention::new().method(Method::ThreePasses).forward(&x, &x, &x)?.output.download()?;
                        }
                        Later::Softmax => {
                            softmax(&x, -1)?.download()?;
                        }
                        Later::Merge => {
                            merge(&done.output, &lse, &done.output, &lse)?.output.download()?;
                        }
                        Later::Upload => {
                            small(&device)?;
                        }
                        Later::CacheStep => {
                            cache.step(&Attention::new(), &x, &x, &x)?.output.download()?;
                        }
                        Later::CacheRead => {
                            cache.keys()?.download()?;
                        }
                        Later::Layer => {
                            layer.forward(&tokens, &tokens, &tokens, &Attention::new())?.output.download()?;
                        }
                        Later::Profiled => {
                            Attention::new().forward_profiled(&x, &x, &x)?.0.output.download()?;
                        }
                    }
                    Ok(())
                };
                let what = format!("{later:?} on {name}, lost when {moment:?}");
                match run() {
                    Err(Error::DeviceLost { .. }) => {}
                    other => panic!("{what}: {other:?}"),
                }
                assert!(began.elapsed() < Duration::from_secs(20), "{what}: {:?}", began.elapsed());
                tried += 1;
            }
            assert!(matches!(gpu.wait(), Err(Error::DeviceLost { .. })), "{name}, {moment:?}");
            assert_eq!(small(&Device::Gpu(open())).unwrap(), [1.0; 32], "a new device after {name}, {moment:?}");
        }
    }
    println!("{tried} calls on lost devices, each Error::DeviceLost");
}

#[test]
fn a_wait_that_ends_early_leaves_the_device_as_it_was() {
    for (name, gpu) in opened() {
        let device = Device::from(&gpu);
        assert_eq!(small(&device).unwrap(), [1.0; 32]);
        gpu.wait_for(Duration::from_secs(60)).unwrap();
        // The device is idle: a timeout of zero is enough.
        gpu.wait_for(Duration::ZERO).unwrap();
        // One dispatch of 8.6 G operations: a second on two cores.
        let [q, k, v] = rows(&device, 2048);
        let began = Instant::now();
        let output = Attention::new().forward(&q, &k, &v).unwrap().output;
        let submitted = began.elapsed();
        let most = Duration::from_millis(20);
        let early = gpu.wait_for(most);
        let waited = began.elapsed() - submitted;
        println!("{name}: submitted in {submitted:?}, waited {waited:?}: {early:?}");
        match early {
            Err(Error::TimedOut { ref adapter, after }) => {
                assert_eq!((adapter, after), (&gpu.info().name, most));
                assert!(waited < Duration::from_secs(1), "{name}: {waited:?}");
                gpu.wait_for(Duration::from_secs(300)).unwrap();
                println!("{name}: all of it took {:?}", began.elapsed() - submitted);
            }
            // Already done: a fast GPU, or a driver that computes during the submit.
            Ok(()) => {
                let wgpu::AdapterInfo { backend, device_type, .. } = gpu.info();
                let slow = (*backend, *device_type) == (wgpu::Backend::Vulkan, wgpu::DeviceType::Cpu);
                assert!(!slow, "{name} was done in {waited:?}");
            }
            other => panic!("{name}: {other:?}"),
        }
        assert!(output.download().unwrap().iter().all(|&x| (x - 0.5).abs() < 1e-5), "{name}");
    }
}

#[test]
fn threads_share_one_device() {
    const THREADS: u64 = 4;
    const CALLS: u64 = 24;
    for (name, gpu) in gpus() {
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let (name, gpu) = (format!("thread {thread} on {name}"), gpu.clone());
                scope.spawn(move || {
                    let device = Device::Gpu(gpu);
                    for n in 0..CALLS {
                        // All threads use the same kernels, each with its own data.
                        let call = Call {
                            seed: thread * CALLS + n,
                            ..Call::plain([1, 2, 9 + n as usize, 16], [1, 2, 33, 16], [1, 2, 33, 16])
                        };
                        let method = if n % 2 == 0 { Method::Auto } else { Method::ThreePasses };
                        call.check_output(&name, &device, method, TOLERANCE);
                    }
                });
            }
        });
    }
}

#[test]
fn dropping_objects_in_use_is_harmless() {
    for (name, gpu) in opened() {
        let device = Device::from(&gpu);
        let [q, k, v] = rows(&device, 512);
        for _ in 0..3 {
            // Results that nobody waits for return to the pool; the next upload of that size reuses their memory.
            drop(Attention::new().forward(&q, &k, &v).unwrap());
            let values: Vec<f32> = (0..q.shape().iter().product()).map(|n: usize| n as f32).collect();
            let x = Tensor::from_slice(&device, q.shape(), &values).unwrap();
            assert_eq!(x.download().unwrap(), values, "{name}");
        }
        let last = Attention::new().forward(&q, &k, &v).unwrap().output;
        // Operands and every handle of the device are dropped; the result keeps what it needs.
        drop((q, k, v, device, gpu));
        assert!(last.download().unwrap().iter().all(|&x| (x - 0.5).abs() < 1e-5), "{name}");
    }
    for (_, open) in devices() {
        let device = Device::Gpu(open());
        let [q, k, v] = rows(&device, 512);
        drop(Attention::new().forward(&q, &k, &v).unwrap());
    }
}

/// The right answer, or an error that is not a fault of this library.
fn right_or_refused(name: &str, device: &Device, call: &Call, refusals: &mut usize) {
    let data = call.data();
    let run = |method| -> Result<Attended> {
        let out = call.run(device, &data, call.attention().lse(true).method(method))?;
        // Errors on the device are reported here.
        out.output.download()?;
        Ok(out)
    };
    for method in [Method::Auto, Method::ThreePasses] {
        let what = format!("call {} by {method:?} on {name}: {call:?}", call.seed);
        match run(method) {
            Ok(out) => call.truth(&data).0.hold(&what, &out, TOLERANCE),
            Err(Error::Unsupported { .. } | Error::TooLarge { .. } | Error::Method { .. }) => *refusals += 1,
            Err(error) => panic!("{what}: {error:?}"),
        }
    }
}

type Lower = (&'static str, fn(&mut wgpu::Limits));

/// From WebGPU's minimum limits down.
const LOWERED: [Lower; 13] = [
    ("WebGPU's least", |limits| {
        let offset = (limits.min_storage_buffer_offset_alignment, limits.min_uniform_buffer_offset_alignment);
        *limits = wgpu::Limits::default().or_worse_values_from(limits);
        (limits.min_storage_buffer_offset_alignment, limits.min_uniform_buffer_offset_alignment) = offset;
    }),
    ("4 storage buffers", |limits| limits.max_storage_buffers_per_shader_stage = 4),
    ("5 storage buffers", |limits| limits.max_storage_buffers_per_shader_stage = 5),
    ("6 storage buffers", |limits| limits.max_storage_buffers_per_shader_stage = 6),
    ("7 storage buffers", |limits| limits.max_storage_buffers_per_shader_stage = 7),
    ("bindings of 1 MiB", |limits| limits.max_storage_buffer_binding_size = 1 << 20),
    ("bindings of 64 KiB", |limits| limits.max_storage_buffer_binding_size = 64 << 10),
    ("bindings of 16 KiB", |limits| limits.max_storage_buffer_binding_size = 16 << 10),
    ("64 workgroups a dimension", |limits| limits.max_compute_workgroups_per_dimension = 64),
    ("no workgroup memory", |limits| limits.max_compute_workgroup_storage_size = 0),
    ("4 KiB of workgroup memory", |limits| limits.max_compute_workgroup_storage_size = 4 << 10),
    ("8 invocations", |limits| {
        limits.max_compute_invocations_per_workgroup = 8;
        limits.max_compute_workgroup_size_x = 8;
    }),
    ("all of them", |limits| {
        limits.max_storage_buffers_per_shader_stage = 4;
        limits.max_storage_buffer_binding_size = 64 << 10;
        limits.max_compute_workgroups_per_dimension = 64;
        limits.max_compute_workgroup_storage_size = 4 << 10;
        limits.max_compute_invocations_per_workgroup = 64;
        limits.max_compute_workgroup_size_x = 64;
        limits.max_buffer_size = 1 << 20;
    }),
];

#[test]
fn lowered_limits_give_the_right_answer_or_say_what_is_missing() {
    let (mut calls, mut refusals) = (0, 0);
    for (at, (limit, lower)) in LOWERED.into_iter().enumerate() {
        for (name, gpu) in limited(lower) {
            let (name, device) = (format!("{name} with {limit}"), Device::Gpu(gpu));
            // Few kernels, which the driver's cache keeps across devices.
            for form in [at % FORMS.len(), FORMS.len() - 1] {
                for seed in 0..3 {
                    right_or_refused(&name, &device, &draw(&FORMS[form], 100 * at as u64 + seed), &mut refusals);
                    calls += 2;
                }
            }
        }
    }
    println!("{calls} calls under {} made-up limits, {refusals} refused", LOWERED.len());
    assert!(refusals * 10 <= calls, "{refusals} of {calls}: most calls fit these limits");
}

#[test]
fn denied_memory_is_a_typed_error_and_the_device_still_works() {
    for (name, gpu) in limited(|limits| limits.max_buffer_size = 64 << 10) {
        let device = Device::Gpu(gpu.clone());
        let refused = |result: Result<()>| match result {
            Err(Error::TooLarge { needed, limit, .. }) => assert!(needed > limit && limit == 64 << 10, "{name}"),
            other => panic!("{name}: {other:?}"),
        };
        for len in [16_385, 1 << 20] {
            refused(Tensor::from_slice(&device, &[len], &vec![1.0f32; len]).map(|_| ()));
        }
        refused(KvCache::new(&device, KvCacheConfig::new(1, 8, 1 << 20, 64)).map(|_| ()));
        // The operands fit, the weights do not.
        let x = Tensor::from_slice(&device, &[1, 1, 200, 4], &[1.0f32; 800]).unwrap();
        refused(Attention::new().weights(Weights::PerHead).forward(&x, &x, &x).map(|_| ()));
        assert_eq!(small(&device).unwrap(), [1.0; 32], "{name}");
    }
    // wgpu's own rejection, caught by a caller's error scope: the device still works too.
    for (name, gpu) in gpus() {
        let limit = gpu.device().limits().max_buffer_size;
        let scope = gpu.device().push_error_scope(wgpu::ErrorFilter::Validation);
        let _invalid = gpu.device().create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size: limit + 4,
            usage: wgpu::BufferUsages::STORAGE,
            mapped_at_creation: false,
        });
        assert!(pollster::block_on(scope.pop()).is_some(), "{name}");
        assert_eq!(small(&Device::Gpu(gpu)).unwrap(), [1.0; 32], "{name}");
    }
}

/// PyTorch state dicts with a few bytes changed.
#[cfg(feature = "safetensors")]
#[test]
fn a_duplicate_name_in_a_header_is_an_error() {
    let header = r#"{"w":{"dtype":"F16","shape":[1],"data_offsets":[0,2]},"w":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}"#;
    let file: Vec<u8> = (header.len() as u64).to_le_bytes().into_iter().chain(header.bytes()).chain([0, 60]).collect();
    let path = std::env::temp_dir().join(format!("wgpu-attention-twice-{}.safetensors", std::process::id()));
    std::fs::write(&path, &file).unwrap();
    for result in [StateDict::from_safetensors(&file), StateDict::open(&path, "")] {
        let message = result.unwrap_err().to_string();
        assert!(message.contains("\"w\" appears twice"), "{message}");
    }
    std::fs::remove_file(path).unwrap();
}

#[test]
fn broken_safetensors_are_errors() {
    let mut files: Vec<_> =
        std::fs::read_dir(case_folder("torch")).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|ending| ending == "safetensors"));
    files.sort_by_key(|path| (path.metadata().unwrap().len(), path.clone()));
    let files: Vec<Vec<u8>> = files.iter().take(20).map(|path| std::fs::read(path).unwrap()).collect();
    let header = |bytes: &[u8]| 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    refused("safetensors files", &files, header, 10_000, |bytes| match StateDict::from_safetensors(bytes) {
        Err(Error::File(_)) => false,
        Err(error) => panic!("{error:?}"),
        Ok(state) => {
            let held: usize = state.iter().map(|(_, tensor)| tensor.data().len()).sum();
            // Half types double in size; nothing else grows.
            assert!(held * 4 <= bytes.len() * 2);
            true
        }
    });
}

/// A driver that refuses a kernel is given another: first another tile, then tiles in registers; products likewise.
#[test]
fn refused_kernels_are_replaced() {
    fn refuse(variant: &Variant, text: &str) -> Option<String> {
        let is_refused = match variant.kernel {
            Kernel::FlashTiled => variant.name.contains("rows4x128") || variant.name.contains("dims20"),
            Kernel::ProjectTiled => true,
            _ => false,
        };
        is_refused.then(|| format!("{text}\nfn refused() -> u32 {{ return 1.5; }}\n"))
    }
    let options = GpuOptions::adapter("0").planned_as(GpuKind::Other).rewrite(refuse);
    let gpu = Gpu::with_options(&options).unwrap();
    let device = Device::Gpu(gpu.clone());
    for (dim, taken) in [(16, "flash_tiled/rows4x64/across16/"), (20, "flash/")] {
        let shape = [1, 2, 40, dim];
        let call = Call::plain(shape, shape, shape);
        let data = call.data();
        for _ in 0..2 {
            let (done, traced) = gpu.trace(|| call.run(&device, &data, Attention::new().lse(true)).unwrap());
            call.truth(&data).0.hold("with refused kernels", &done, TOLERANCE);
            assert!(traced.iter().any(|one| one.variant.name.starts_with(taken)), "{traced:?}");
        }
    }
    let x = Tensor::from_slice(&device, &[1, 9, 8], &[1.0f32; 72]).unwrap();
    let w = Tensor::from_slice(&device, &[5, 8], &[0.5f32; 40]).unwrap();
    assert_eq!(project(&x, &w, None).unwrap().download().unwrap(), [4.0; 45]);
    // Who insists on a tile learns what the driver says.
    let insisting = Attention::new().method("rows4x128/across16".parse().unwrap());
    let x = Tensor::from_slice(&device, &[1, 2, 40, 16], &[1.0f32; 1280]).unwrap();
    let refused = insisting.forward(&x, &x, &x);
    assert!(matches!(refused, Err(Error::Gpu { .. })), "{:?}", refused.err());
}
