//! Exported calls, run with wgpu only.
#![cfg(feature = "export")]

use crate::kit::{self, Call, bits};
use wgpu::util::DeviceExt;
use wgpu_attention::position::{Rotary, RotaryConfig, alibi};
use wgpu_attention::{
    Attended, Attention, BindingKind, Device, Dtype, ExportedCall, Gpu, Method, ScoreStage, Tensor, Weights, wgpu,
};

/// The bytes of every buffer after the last step.
fn replay(gpu: &Gpu, call: &ExportedCall) -> Vec<Vec<u8>> {
    let device = gpu.device();
    let usage = wgpu::BufferUsages::STORAGE
        | wgpu::BufferUsages::UNIFORM
        | wgpu::BufferUsages::COPY_SRC
        | wgpu::BufferUsages::COPY_DST;
    let buffers: Vec<wgpu::Buffer> = (call.buffers.iter())
        .map(|buffer| {
            // Buffers that are written before they are read may hold anything.
            let garbage = vec![0xee; buffer.size as usize];
            let contents = buffer.contents.as_ref().unwrap_or(&garbage);
            assert_eq!(contents.len() as u64, buffer.size);
            device.create_buffer_init(&wgpu::util::BufferInitDescriptor { label: None, contents, usage })
        })
        .collect();
    let mut encoder = device.create_command_encoder(&Default::default());
    for step in &call.steps {
        let source = step.wgsl.strip_prefix("enable subgroups;\n").unwrap_or(&step.wgsl);
        let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
            label: None,
            source: wgpu::ShaderSource::Wgsl(source.into()),
        });
        let entries: Vec<_> = (step.bindings.iter())
            .map(|binding| wgpu::BindGroupLayoutEntry {
                binding: binding.binding,
                visibility: wgpu::ShaderStages::COMPUTE,
                ty: wgpu::BindingType::Buffer {
                    ty: match binding.kind {
                        BindingKind::Uniform => wgpu::BufferBindingType::Uniform,
                        kind => wgpu::BufferBindingType::Storage { read_only: kind == BindingKind::Read },
                    },
                    has_dynamic_offset: false,
                    min_binding_size: None,
                },
                count: None,
            })
            .collect();
        let layout =
            device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: None, entries: &entries });
        let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: None,
            bind_group_layouts: &[Some(&layout)],
            ..Default::default()
        });
        let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: None,
            layout: Some(&pipeline_layout),
            module: &module,
            entry_point: Some("main"),
            compilation_options: Default::default(),
            cache: None,
        });
        let entries: Vec<_> = (step.bindings.iter())
            .map(|binding| wgpu::BindGroupEntry {
                binding: binding.binding,
                resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                    buffer: &buffers[binding.buffer],
                    offset: binding.offset,
                    size: wgpu::BufferSize::new(binding.size),
                }),
            })
            .collect();
        let group =
            device.create_bind_group(&wgpu::BindGroupDescriptor { label: None, layout: &layout, entries: &entries });
        let mut pass = encoder.begin_compute_pass(&Default::default());
        pass.set_pipeline(&pipeline);
        pass.set_bind_group(0, &group, &[]);
        let [x, y, z] = step.workgroups;
        pass.dispatch_workgroups(x, y, z);
    }
    let staging: Vec<wgpu::Buffer> = (buffers.iter())
        .map(|buffer| {
            let staging = device.create_buffer(&wgpu::BufferDescriptor {
                label: None,
                size: buffer.size(),
                usage: wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::MAP_READ,
                mapped_at_creation: false,
            });
            encoder.copy_buffer_to_buffer(buffer, 0, &staging, 0, buffer.size());
            staging
        })
        .collect();
    gpu.queue().submit([encoder.finish()]);
    staging.iter().for_each(|staging| staging.map_async(wgpu::MapMode::Read, .., Result::unwrap));
    gpu.wait().unwrap();
    staging.iter().map(|staging| staging.get_mapped_range(..).unwrap().to_vec()).collect()
}

/// Runs the call directly and as a plan; every result has the same bits.
fn compare(what: &str, gpu: &Gpu, attention: &Attention, [q, k, v]: &[Tensor; 3]) -> ExportedCall {
    let call = attention.export(q, k, v).unwrap_or_else(|error| panic!("{what}: {error}"));
    let bytes = replay(gpu, &call);
    let Attended { output, lse, weights, scores, .. } = attention.forward(q, k, v).unwrap();
    let expected = [("output", Some(output)), ("lse", lse), ("weights", weights), ("scores", scores)];
    let expected: Vec<_> = expected.into_iter().filter_map(|(name, tensor)| Some((name, tensor?))).collect();
    assert_eq!(call.outputs.len(), expected.len(), "{what}");
    for (found, (name, expected)) in call.outputs.iter().zip(&expected) {
        assert_eq!((found.name, &found.shape[..]), (*name, expected.shape()), "{what}");
        let values = found.read(&bytes[found.buffer]).unwrap();
        assert_eq!(bits(&values), bits(&expected.download().unwrap()), "{name} of {what}");
    }
    call
}

#[test]
fn replayed_calls_give_the_same_bits() {
    for (name, gpu) in kit::gpus() {
        let device = Device::Gpu(gpu.clone());
        let methods = Method::every(gpu.capabilities());
        let limits = gpu.device().limits();
        for seed in 0..6 {
            let call = Call::random(seed);
            let data = call.data();
            let stored = [Dtype::F32, Dtype::F16, Dtype::BF16][seed as usize % 3];
            let operands = call.operands(&device, &data, stored).unwrap();
            let mut attention = call.ruled(&device, &data, call.attention().lse(true)).unwrap();
            attention = match seed % 4 {
                0 => attention.weights(Weights::PerHead).scores(Some(ScoreStage::Masked)),
                1 => attention.weights(Weights::Averaged),
                _ => attention.method(methods[seed as usize % methods.len()]),
            };
            // Not every tile supports every call.
            if attention.forward(&operands[0], &operands[1], &operands[2]).is_err() {
                attention = attention.method(Method::Auto);
            }
            let what = format!("call {seed} on {name}: {call:?}");
            let exported = compare(&what, &gpu, &attention, &operands);
            let needs = |name: &str| exported.limits[name];
            assert!(needs("maxBufferSize") <= limits.max_buffer_size, "{what}");
            assert!(
                needs("maxStorageBuffersPerShaderStage") <= limits.max_storage_buffers_per_shader_stage.into(),
                "{what}"
            );
            let alignment = limits.min_storage_buffer_offset_alignment.into();
            assert!(needs("minStorageBufferOffsetAlignment") >= alignment, "{what}");
            let has = !exported.features.is_empty();
            assert_eq!(exported.steps.iter().any(|step| step.wgsl.contains("subgroup_invocation_id")), has, "{what}");
            assert_eq!(exported.subgroup_min, gpu.capabilities().subgroup_min.filter(|_| has), "{what}");
        }
    }
}

#[test]
fn positions_and_leading_axes_too() {
    for (name, gpu) in kit::gpus() {
        let data = kit::noise(&mut rand::SeedableRng::seed_from_u64(3), 4 * 20 * 16);
        let x = Tensor::from_slice(&gpu, &[4, 20, 16], &data).unwrap();
        let operands = [x.clone(), x.clone(), x];
        let rotary = Rotary::new(&gpu, &RotaryConfig::new(16), 64).unwrap();
        let slopes = Tensor::from_slice(&gpu, &[4], &alibi::slopes(4).unwrap()).unwrap();
        for method in [Method::Fused, Method::ThreePasses] {
            let attention = Attention::new().method(method).rotary(rotary.clone()).alibi(slopes.clone());
            let call = compare(&format!("{method} on {name}"), &gpu, &attention, &operands);
            assert_eq!(call.outputs[0].shape, [4, 20, 16]);
            // One buffer shared by three operands.
            let operands =
                call.buffers.iter().filter(|buffer| buffer.size == 4 * 20 * 16 * 4 && buffer.contents.is_some());
            assert_eq!(operands.count(), 1, "{method} on {name}");
        }
    }
}

#[test]
fn a_saved_call_is_a_folder() {
    let (_, gpu) = kit::gpus().remove(0);
    let call = Call::random(8);
    let device = Device::Gpu(gpu);
    let [q, k, v] = call.operands(&device, &call.data(), Dtype::F16).unwrap();
    let exported = call.attention().lse(true).export(&q, &k, &v).unwrap();
    let folder = tempfile::tempdir().unwrap();
    exported.save(folder.path()).unwrap();
    let text = std::fs::read_to_string(folder.path().join("plan.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["schema"], "wgpu-attention-plan/1");
    assert_eq!(json["steps"][0]["wgsl"], exported.steps[0].wgsl);
    assert_eq!(json["steps"][0]["bindings"][0]["kind"], "uniform");
    assert_eq!(json["outputs"][0]["dtype"], "f16");
    assert_eq!(json["outputs"][1]["name"], "lse");
    for (n, buffer) in exported.buffers.iter().enumerate() {
        let file = folder.path().join(format!("buffer-{n}.bin"));
        assert_eq!(json["buffers"][n]["contents"], buffer.contents.is_some());
        assert_eq!(std::fs::read(file).ok(), buffer.contents);
    }
    let missing = folder.path().join("missing");
    let error = exported.save(&missing).unwrap_err().to_string();
    assert!(error.contains("missing"), "{error}");
}

#[test]
fn calls_without_kernels_are_not_exported() {
    let x = Tensor::from_slice(&Device::Cpu, &[2, 2], &[1f32; 4]).unwrap();
    let error = Attention::new().export(&x, &x, &x).unwrap_err().to_string();
    assert!(error.contains("CPU backend"), "{error}");
    for (_, gpu) in kit::gpus() {
        let x = Tensor::from_slice(&gpu, &[2, 0, 4], &[0f32; 0]).unwrap();
        let call = Attention::new().export(&x, &x, &x).unwrap();
        assert!(call.steps.is_empty());
        assert_eq!(call.outputs[0].read(&[0; 4]).unwrap(), [0f32; 0]);
        let y = Tensor::from_slice(&gpu, &[2, 3, 4], &[0f32; 24]).unwrap();
        let call = Attention::new().export(&y, &y, &y).unwrap();
        let error = call.outputs[0].read(&[0; 95]).unwrap_err().to_string();
        assert!(error.contains("95 bytes"), "{error}");
    }
}
