//! How often the loops of an invocation turn before a driver ends them.

use wgpu_attention::wgpu::{self, util::DeviceExt};
use wgpu_attention::{Error, Gpu, Result};

/// Turns of the first loop; as many again are turned in two loops within each other.
const HALF: u32 = 500_000;
/// Turns that are asked for in all.
pub const ASKED: u32 = 2 * HALF;
const START: u32 = 12_345;

/// No compiler knows the end of such a chain without going through it (Knuth, TAOCP 2, 3.2.1).
const fn next(x: u32) -> u32 {
    x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223)
}

const TEXT: &str = "
@group(0) @binding(0) var<storage, read> given: array<u32>;
@group(0) @binding(1) var<storage, read_write> x: array<u32>;
@compute @workgroup_size(1)
fn main() {
    var value = given[0];
    for (var i = 0u; i < given[1]; i++) {
        value = value * 1664525u + 1013904223u;
    }
    for (var i = 0u; i < given[2]; i++) {
        for (var j = 0u; j < given[3]; j++) {
            value = value * 1664525u + 1013904223u;
        }
    }
    x[0] = value;
}
";

/// How many of [`ASKED`] turns an invocation really makes.
pub fn turns(gpu: &Gpu) -> Result<u32> {
    let device = gpu.device();
    let failed = |message: String| Error::Gpu {
        adapter: gpu.info().name.clone(),
        during: "counting the turns of loops".into(),
        message,
    };
    let label = Some("loops");
    let scope = device.push_error_scope(wgpu::ErrorFilter::Validation);
    let module = device
        .create_shader_module(wgpu::ShaderModuleDescriptor { label, source: wgpu::ShaderSource::Wgsl(TEXT.into()) });
    let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
        label,
        layout: None,
        module: &module,
        entry_point: Some("main"),
        compilation_options: Default::default(),
        cache: None,
    });
    let given = [START, HALF, HALF / 1000, 1000].map(u32::to_le_bytes).concat();
    let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
    let given = device.create_buffer_init(&wgpu::util::BufferInitDescriptor { label, contents: &given, usage });
    let x = device.create_buffer_init(&wgpu::util::BufferInitDescriptor { label, contents: &[0; 4], usage });
    let read = device.create_buffer(&wgpu::BufferDescriptor {
        label,
        size: 4,
        usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    });
    let entry = |binding, buffer: &wgpu::Buffer| (binding, buffer.clone());
    let buffers = [entry(0, &given), entry(1, &x)];
    let entries = buffers
        .each_ref()
        .map(|(binding, buffer)| wgpu::BindGroupEntry { binding: *binding, resource: buffer.as_entire_binding() });
    let layout = &pipeline.get_bind_group_layout(0);
    let group = device.create_bind_group(&wgpu::BindGroupDescriptor { label, layout, entries: &entries });
    let mut encoder = device.create_command_encoder(&Default::default());
    {
        let mut pass = encoder.begin_compute_pass(&Default::default());
        pass.set_pipeline(&pipeline);
        pass.set_bind_group(0, &group, &[]);
        pass.dispatch_workgroups(1, 1, 1);
    }
    encoder.copy_buffer_to_buffer(&x, 0, &read, 0, 4);
    gpu.queue().submit([encoder.finish()]);
    if let Some(error) = pollster::block_on(scope.pop()) {
        return Err(failed(error.to_string()));
    }
    read.map_async(wgpu::MapMode::Read, .., |_| {});
    gpu.wait()?;
    let mapped = read.get_mapped_range(..).map_err(|error| failed(error.to_string()))?;
    let end = u32::from_le_bytes([mapped[0], mapped[1], mapped[2], mapped[3]]);
    let mut value = START;
    for turn in 0..=ASKED {
        if value == end {
            return Ok(turn);
        }
        value = next(value);
    }
    Err(failed(format!("the chain ends at {end}, which no number of turns up to {ASKED} gives")))
}
