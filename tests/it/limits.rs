//! Work larger than an adapter's limits: sliced, folded, or rejected with the numbers.

use crate::kit::{self, Call, Order, gpus, limited};
use crate::plans::check;
use wgpu_attention::kernels::plan::{self, AttentionOperands};
use wgpu_attention::kernels::{AdapterClass, Capabilities, Method, Plan, Slot, params};
use wgpu_attention::problem::{Align, Layout, MaskMeaning, Positions, Problem};
use wgpu_attention::{
    Attention, Device, Error, Gpu, KvCache, KvCacheConfig, MultiHeadAttention, MultiHeadConfig, NormKind, NormSpan,
    QueryKeyNorm, ScatterMode, Tensor, Weights, merge, wgpu,
};

const KIB: u64 = 1 << 10;

fn problem(q: [usize; 4], k: [usize; 4]) -> Problem {
    Problem::new(&q, &k, &k, None, None, &Positions::default(), 0).unwrap()
}

/// A call with keys as values, without any rules, and with the LSE.
fn plain<'a>(q: &'a Layout, k: &'a Layout) -> AttentionOperands<'a> {
    AttentionOperands {
        q: q.into(),
        k: k.into(),
        v: k.into(),
        output: q.into(),
        masks: vec![],
        biases: vec![],
        relative: None,
        rotary: None,
        sink: None,
        lse: true,
        weights: false,
        averaged: false,
        stage: None,
        method: Method::Auto,
        tuned: None,
    }
}

/// Plans a plain call with `masks` boolean masks and `biases` full-size biases in three passes. A call that fits must
/// also fit with `Method::Auto`, by fused kernels or because planning falls back.
fn plan(
    q: [usize; 4],
    k: [usize; 4],
    masks: usize,
    biases: usize,
    adapter: &Capabilities,
) -> wgpu_attention::Result<Plan> {
    let problem = problem(q, k);
    let [q, k] = [q, k].map(|shape| Layout::contiguous(&shape).unwrap());
    let full = Layout::contiguous(&problem.mask_shape()).unwrap();
    let passes = AttentionOperands {
        masks: vec![(&full, MaskMeaning::Keep); masks],
        biases: vec![&full; biases],
        method: Method::ThreePasses,
        ..plain(&q, &k)
    };
    let planned = plan::attention(&problem, &passes, adapter);
    if planned.is_ok() {
        check(&plan::attention(&problem, &AttentionOperands { method: Method::Auto, ..passes }, adapter)?, adapter);
    }
    planned
}

fn adapters() -> Vec<Capabilities> {
    let floor = Capabilities::webgpu_minimum();
    let mut all = vec![
        floor.clone(),
        Capabilities { adapter: "four buffers".into(), max_storage_buffers: 4, ..floor.clone() },
        Capabilities { adapter: "small bindings".into(), max_binding: 256 * KIB, ..floor.clone() },
        Capabilities { adapter: "few workgroups".into(), max_workgroups: 300, ..floor.clone() },
        Capabilities { adapter: "few invocations".into(), max_invocations: 64, ..floor.clone() },
        Capabilities { adapter: "few iterations".into(), max_loop_turns: Some(2000), ..floor.clone() },
        Capabilities {
            adapter: "few iterations of a software adapter".into(),
            class: AdapterClass::Cpu,
            max_loop_turns: Some(2000),
            ..floor.clone()
        },
    ];
    for class in [AdapterClass::Cpu, AdapterClass::Gpu] {
        for subgroup in [4, 8, 16, 32, 64, 128] {
            let adapter = format!("{class:?} with subgroups of {subgroup}");
            all.push(Capabilities { adapter, class, subgroup_min: Some(subgroup), ..floor.clone() });
        }
    }
    all
}

#[test]
fn plans_fit_every_adapter() {
    for adapter in adapters() {
        for (q, k) in [
            ([1, 12, 512, 64], [1, 12, 512, 64]),
            ([2, 8, 100, 33], [2, 2, 1000, 33]),
            ([1, 32, 1, 128], [1, 8, 4096, 128]),
            ([3, 4, 77, 1], [3, 4, 5, 1]),
            ([1, 1, 300, 512], [1, 1, 300, 512]),
        ] {
            for (masks, biases) in [(0, 0), (1, 0), (2, 1), (3, 2)] {
                let plan = plan(q, k, masks, biases, &adapter).unwrap_or_else(|e| panic!("{}: {e}", adapter.adapter));
                check(&plan, &adapter);
            }
        }
    }
}

#[test]
fn large_work_is_sliced_and_nothing_is_lost() {
    let adapter = Capabilities { max_binding: 1 << 20, ..Capabilities::webgpu_minimum() };
    // Scores of 4 · 4096 · 4096 · 4 bytes = 256 MiB through bindings of 1 MiB.
    let cut = plan([1, 4, 4096, 64], [1, 4, 4096, 64], 0, 0, &adapter).unwrap();
    check(&cut, &adapter);
    assert!(cut.scratch[0] <= 1 << 20, "{:?}", cut.scratch);
    // Every row of every head is weighed exactly once.
    let rows: u64 = (cut.steps.iter())
        .filter(|step| step.variant.name.starts_with("softmax"))
        .map(|step| u64::from(bytemuck::from_bytes::<wgpu_attention::kernels::params::Softmax>(&step.params).rows))
        .sum();
    assert_eq!(rows, 4 * 4096);

    // Keys that do not fit into one binding are sliced too, and their products summed.
    let cut = plan([1, 1, 2, 64], [1, 1, 20_000, 64], 1, 1, &adapter).unwrap();
    check(&cut, &adapter);
    assert!(cut.steps.iter().any(|step| step.variant.name.contains("accumulate")));

    // A hundred million workgroups need two dimensions.
    let many = plan(
        [1 << 15, 64, 4, 4],
        [1 << 15, 64, 4, 4],
        0,
        0,
        &Capabilities { max_binding: 1 << 31, max_buffer: 1 << 33, ..adapter.clone() },
    )
    .unwrap();
    assert!(many.steps.iter().any(|step| step.workgroups[1] > 1));
}

#[test]
fn work_that_cannot_fit_is_rejected_with_the_numbers() {
    let adapter = Capabilities { max_binding: 4096, ..Capabilities::webgpu_minimum() };
    let message = plan([1, 1, 8, 64], [1, 1, 5000, 64], 0, 0, &adapter).unwrap_err().to_string();
    assert!(message.contains("4096"), "{message}");
    let small = Capabilities { memory: Some(1 << 20), ..Capabilities::webgpu_minimum() };
    match plan([1, 8, 1024, 64], [1, 8, 1024, 64], 0, 0, &small) {
        Err(Error::TooLarge { needed, limit, .. }) => assert!(needed > limit && limit == 1 << 20),
        other => panic!("{other:?}"),
    }
}

#[test]
fn rules_that_do_not_fit_are_folded_into_one_bias() {
    let four = Capabilities { max_storage_buffers: 4, ..Capabilities::webgpu_minimum() };
    let folded = plan([2, 4, 9, 8], [2, 4, 9, 8], 1, 1, &four).unwrap();
    assert!(folded.steps.iter().any(|step| step.variant.name.starts_with("combine_biases/")));
    let minimum = Capabilities::webgpu_minimum();
    let native = Capabilities { max_storage_buffers: 16, ..minimum.clone() };
    for (masks, biases, adapter) in [(2, 1, &minimum), (2, 2, &native)] {
        let direct = plan([2, 4, 9, 8], [2, 4, 9, 8], masks, biases, adapter).unwrap();
        assert!(!direct.steps.iter().any(|step| step.variant.name.starts_with("combine_biases/")));
        for slot in [Slot::Mask(masks - 1), Slot::Bias(biases - 1)] {
            assert!(direct.steps.iter().any(|step| step.bindings.iter().any(|bound| bound.slot == slot)), "{slot:?}");
        }
    }
}

#[test]
fn slices_give_the_same_results() {
    let base = Call::random(0);
    let positions = Positions {
        causal: true,
        align: Align::PerBatch(vec![9, -3]),
        key_lengths: Some(vec![170, 200]),
        ..Default::default()
    };
    let calls = [
        Call {
            masks: vec![(vec![2, 1, 65, 200], MaskMeaning::Hide)],
            biases: vec![vec![4, 1, 200]],
            positions,
            ..base.clone()
        },
        Call {
            masks: vec![(vec![65, 200], MaskMeaning::Keep); 3],
            positions: Positions::default(),
            biases: vec![],
            ..base
        },
    ];
    for (n, call) in calls.into_iter().enumerate() {
        let call = Call {
            q: [2, 4, 65, 20],
            k: [2, 2, 200, 20],
            v: [2, 2, 200, 12],
            order: if n == 0 { Order::Bshd } else { Order::Bhsd },
            softcap: None,
            scale: None,
            sink: true,
            ..call
        };
        // Bindings of 64, 16 and 12 KiB: by batch, by head, by rows and by keys.
        for binding in [64 * KIB, 16 * KIB, 12 * KIB] {
            for (name, gpu) in limited(|limits| limits.max_storage_buffer_binding_size = binding) {
                let (name, device) = (format!("{name} with bindings of {binding}"), Device::Gpu(gpu));
                // Everything that a call can return if all four axes are sliced.
                if binding == 12 * KIB {
                    call.check(&name, &device, 3e-6);
                } else {
                    call.check_output(&name, &device, Method::Auto, 3e-6);
                    call.check_output(&name, &device, Method::ThreePasses, 3e-6);
                }
            }
        }
    }
}

#[test]
fn few_buffers_and_few_workgroups_give_the_same_results() {
    let few = |limits: &mut wgpu::Limits| {
        limits.max_storage_buffers_per_shader_stage = 4;
        limits.max_compute_workgroups_per_dimension = 40;
    };
    for (name, gpu) in limited(few) {
        let device = Device::Gpu(gpu);
        for seed in [3, 8] {
            Call::random(seed).check(&format!("{name}, four buffers"), &device, 3e-6);
        }
    }
}

#[test]
fn long_sequences_need_little_memory_and_short_dispatches() {
    // 65,536 queries and keys, causal: for 256 heads, stored scores would take 4 TB.
    let positions = Positions { causal: true, ..Default::default() };
    for class in [AdapterClass::Cpu, AdapterClass::Gpu] {
        for (heads, len_q) in [(1, 65_536), (256, 65_536), (1, 1), (8, 64)] {
            let (q, k) = ([1, heads, len_q, 64], [1, heads, 65_536, 64]);
            let problem = Problem::new(&q, &k, &k, None, None, &positions, 0).unwrap();
            let adapter =
                Capabilities { class, max_binding: 1 << 31, max_buffer: 1 << 32, ..Capabilities::webgpu_minimum() };
            let [q, k] = [q, k].map(|shape| Layout::contiguous(&shape).unwrap());
            let plan = plan::attention(&problem, &plain(&q, &k), &adapter).unwrap();
            check(&plan, &adapter);
            let what = format!("{class:?}, {heads} heads, {len_q} queries");
            assert!(plan.scratch.iter().sum::<u64>() <= 64 << 20, "{what}: {:?}", plan.scratch);
            let mut pairs = 0.0;
            for step in plan.steps.iter().filter(|step| step.variant.name.starts_with("flash")) {
                let params: &params::Flash = bytemuck::from_bytes(&step.params);
                // Batch 1, one query head per key head.
                let rows = f64::from(params.slice.heads_kv * params.slice.group) * f64::from(params.slice.len_q);
                let flop = rows * f64::from(params.slice.len_k) * 2.0 * 128.0;
                // A dispatch cannot be interrupted: a second of a software adapter's time, before masking.
                let most = if class == AdapterClass::Cpu { 20e9 } else { 1e12 };
                assert!(flop <= most, "{what}: {flop:e} FLOP in one dispatch");
                pairs += rows * f64::from(params.slice.len_k);
            }
            // Nothing is missing, and nothing is computed twice.
            assert_eq!(pairs, heads as f64 * len_q as f64 * 65_536.0, "{what}");
        }
    }
}

#[test]
fn dispatches_stay_within_their_time_limit() {
    // 24 × 256 × 8,192 × 256 once took 2.5 seconds in one submit.
    let (q, k) = ([24, 1, 256, 256], [24, 1, 8192, 256]);
    for class in [AdapterClass::Cpu, AdapterClass::Gpu] {
        let floor = Capabilities::webgpu_minimum();
        let adapter =
            Capabilities { class, max_operations: Some(1e9), max_binding: 1 << 30, max_buffer: 1 << 30, ..floor };
        let planned = plan(q, k, 1, 0, &adapter).unwrap();
        check(&planned, &adapter);
        let [q, k] = [q, k].map(|shape| Layout::contiguous(&shape).unwrap());
        let problem = Problem::new(q.shape(), k.shape(), k.shape(), None, None, &Positions::default(), 0).unwrap();
        let seen = plan::inspect(
            &problem,
            &plan::InspectOperands {
                q: (&q).into(),
                k: (&k).into(),
                lse: &Layout::contiguous(&[24, 1, 256]).unwrap(),
                masks: vec![],
                biases: vec![],
                relative: None,
                heads: &[0],
                queries: 0..256,
                weights: false,
                column_sums: true,
                entropy: true,
            },
            &adapter,
        );
        check(&seen.unwrap(), &adapter);
        let (x, w) = ([2, 3000, 512], [700, 512]);
        let [x, w] = [Layout::contiguous(&x).unwrap(), Layout::contiguous(&w).unwrap()];
        let projected = plan::project((&x).into(), (&w).into(), None, &[], &adapter).unwrap();
        check(&projected, &adapter);
        assert!(projected.steps.len() > 1);
    }
}

#[test]
fn long_work_is_split_into_several_submits_with_the_same_bits() {
    let call = Call::plain([1, 4, 300, 32], [1, 4, 500, 32], [1, 4, 500, 32]);
    let data = call.data();
    for adapter in Gpu::adapters() {
        let open = |seconds_per_submit| {
            let mut options = wgpu_attention::GpuOptions::adapter(adapter.index.to_string());
            options.seconds_per_submit = seconds_per_submit;
            Gpu::with_options(&options).unwrap()
        };
        let (whole, cut) = (open(None), open(Some(1e-3)));
        let run = |gpu: &Gpu, method| {
            let device = Device::Gpu(gpu.clone());
            let out = call.run(&device, &data, call.attention().lse(true).method(method)).unwrap();
            [out.output, out.lse.unwrap()].map(|tensor| kit::bits(&tensor.download().unwrap()))
        };
        for method in [Method::Auto, Method::ThreePasses] {
            assert_eq!(run(&whole, method), run(&cut, method), "{} by {method}", adapter.info.name);
        }
        // The same for a caller's encoders.
        let device = Device::Gpu(cut.clone());
        let [q, k, v] = call.operands(&device, &data, wgpu_attention::Dtype::F32).unwrap();
        let attention = call.attention().method(Method::ThreePasses);
        let (attended, slices) = attention.encode_slices(&cut, &q, &k, &v, None).unwrap();
        assert!(slices.len() > 1 && slices.seconds() > 1e-3, "{slices:?}");
        for n in 0..slices.len() {
            let mut encoder = cut.device().create_command_encoder(&Default::default());
            slices.encode(n, &mut encoder).unwrap();
            cut.queue().submit([encoder.finish()]);
        }
        assert_eq!(kit::bits(&attended.output.download().unwrap()), run(&whole, Method::ThreePasses)[0]);
        let mut encoder = cut.device().create_command_encoder(&Default::default());
        let message = slices.encode(slices.len(), &mut encoder).unwrap_err().to_string();
        assert!(message.contains(&format!("there are {}", slices.len())), "{message}");
    }
}

#[test]
fn a_projection_larger_than_a_binding() {
    for (name, gpu) in limited(|limits| limits.max_storage_buffer_binding_size = 8 * KIB) {
        let small = Device::Gpu(gpu);
        let config = MultiHeadConfig::new(48, 4).unwrap();
        let norm = QueryKeyNorm::new(NormKind::Layer, NormSpan::Head, 1e-5).bias(true);
        let configs = [config.clone().add_bias_kv(true).add_zero_attn(true), config.gate(true).norm(Some(norm))];
        let x: Vec<f32> = (0..3 * 50 * 48).map(|i| (i as f32 * 0.37).sin()).collect();
        let run = |device: &Device, config: &MultiHeadConfig| {
            let layer = MultiHeadAttention::new(device, config.clone(), 3).unwrap();
            let x = Tensor::from_slice(device, &[3, 50, 48], &x).unwrap();
            let out = layer.forward(&x, &x, &x, &Attention::new().weights(Weights::Averaged)).unwrap();
            [out.output, out.weights.unwrap()]
        };
        for config in &configs {
            for (cut, whole) in run(&small, config).iter().zip(&run(&Device::Cpu, config)) {
                kit::assert_close(&name, cut, &kit::wide(&whole.download().unwrap()), 3e-6);
            }
        }
    }
}

#[test]
fn a_cache_larger_than_a_binding() {
    // Sliced by batch and heads and, if one head is too large, by rows, including rows that wrap around.
    for (binding, capacity) in [(8 * KIB, 40), (4 * KIB, 150)] {
        for (name, gpu) in limited(|limits| limits.max_storage_buffer_binding_size = binding) {
            let run = |device: &Device| {
                let mut cache = KvCache::new(device, KvCacheConfig::new(3, 2, capacity, 24)).unwrap();
                let tokens = |n: usize, from: f32| {
                    let data: Vec<f32> = (0..3 * n * 2 * 24).map(|i| (i as f32 * 0.37 + from).sin()).collect();
                    let x = Tensor::from_slice(device, &[3, n, 2, 24], &data).unwrap();
                    x.permute(&[0, 2, 1, 3]).unwrap()
                };
                let x = tokens(capacity - 10, 1.0);
                cache.append_lengths(&x, &x, &[capacity - 10, 3, capacity - 20]).unwrap();
                let x = tokens(10, 2.0);
                cache.append_lengths(&x, &x, &[10, 7, 0]).unwrap();
                let one = tokens(1, 3.0);
                let step = cache.attend(&Attention::new().lse(true), &one).unwrap();
                let merged = merge(&step.output, step.lse.as_ref().unwrap(), &one, &one.select(3, 0).unwrap()).unwrap();
                cache.clear();
                let x = tokens(capacity, 4.0);
                cache.append(&x, &x).unwrap();
                let x = tokens(capacity - 5, 5.0);
                cache.write(&[0, 20, capacity], &x, &x, ScatterMode::Circular).unwrap();
                [step.output, merged.output, cache.keys().unwrap(), cache.values().unwrap()]
            };
            for (n, (cut, whole)) in run(&Device::Gpu(gpu)).iter().zip(&run(&Device::Cpu)).enumerate() {
                let what = format!("{name}, result {n}, bindings of {binding}");
                kit::assert_close(&what, cut, &kit::wide(&whole.download().unwrap()), 3e-6);
            }
        }
    }
}

#[test]
fn too_little_memory_is_an_error_before_allocating() {
    for (name, gpu) in gpus() {
        let device = Device::Gpu(gpu.clone());
        // Weights of 2^20 · 2^20 · 4 bytes from inputs of a few.
        let x = Tensor::from_slice(&device, &[1], &[0.5f32]).unwrap();
        let long =
            Tensor::from_wgpu(&gpu, &raw(&gpu), &[1, 1, 1 << 20, 1], &[0, 0, 0, 1], 0, wgpu_attention::Dtype::F32)
                .unwrap();
        // Planning measures the adapter once before work of this size.
        gpu.multiply_add_ceiling().unwrap();
        let before = gpu.allocation_counts();
        let message = Attention::new().weights(Weights::PerHead).forward(&long, &long, &long).unwrap_err().to_string();
        assert!(message.contains("4398046511104 bytes"), "{name}: {message}");
        assert_eq!(gpu.allocation_counts(), before, "{name}");
        drop(x);
    }
}

#[test]
fn the_cpu_backend_rejects_results_larger_than_memory() {
    // No input elements, 2^50 output rows.
    let q = Tensor::from_slice(Device::Cpu, &[1 << 22, 1 << 20, 1 << 8, 0], &[0.0f32; 0]).unwrap();
    let k = Tensor::from_slice(Device::Cpu, &[1 << 22, 1 << 20, 1, 0], &[0.0f32; 0]).unwrap();
    let message = Attention::new().forward(&q, &k, &k).unwrap_err().to_string();
    assert!(message.contains("the memory"), "{message}");
}

fn raw(gpu: &Gpu) -> wgpu::Buffer {
    gpu.device().create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size: 256,
        usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC,
        mapped_at_creation: false,
    })
}

#[test]
fn a_lost_device_is_a_typed_error_and_a_new_gpu_works() {
    for adapter in Gpu::adapters() {
        let options = wgpu_attention::GpuOptions::adapter(adapter.index.to_string());
        let gpu = Gpu::with_options(&options).unwrap();
        let x = Tensor::from_slice(&gpu, &[1, 1, 4, 4], &[1.0f32; 16]).unwrap();
        gpu.device().destroy();
        let _ = gpu.wait();
        let run = || Attention::new().forward(&x, &x, &x)?.output.download();
        let error = run().unwrap_err();
        assert!(matches!(error, Error::DeviceLost { .. }), "{}: {error:?}", adapter.info.name);
        let again = Gpu::with_options(&options).unwrap();
        let x = Tensor::from_slice(&again, &[1, 1, 4, 4], &[1.0f32; 16]).unwrap();
        assert_eq!(Attention::new().forward(&x, &x, &x).unwrap().output.download().unwrap(), [1.0; 16]);
    }
}

#[test]
fn an_unknown_adapter_is_an_error_that_lists_the_adapters() {
    for which in ["no such adapter", "99"] {
        let message = Gpu::with_options(&wgpu_attention::GpuOptions::adapter(which)).unwrap_err().to_string();
        assert!(message.contains(which) && message.contains("0: "), "{message}");
        assert!(Device::with_options(&wgpu_attention::GpuOptions::adapter(which)).is_err(), "never a silent fallback");
    }
}
