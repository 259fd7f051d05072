//! Small kernels that probe an adapter.

use wgpu_attention::wgpu::{self, util::DeviceExt};
use wgpu_attention::{Error, Gpu, Result};

/// Runs one workgroup of a WGSL text and returns its only buffer (binding 0, read and written), initially `words`.
pub fn one_workgroup(gpu: &Gpu, what: &'static str, text: &str, words: &[u32]) -> Result<Vec<u32>> {
    let device = gpu.device();
    let failed = |message: String| Error::Gpu { adapter: gpu.info().name.clone(), during: what.into(), message };
    let label = Some(what);
    let scope = device.push_error_scope(wgpu::ErrorFilter::Validation);
    let module = device
        .create_shader_module(wgpu::ShaderModuleDescriptor { label, source: wgpu::ShaderSource::Wgsl(text.into()) });
    let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
        label,
        layout: None,
        module: &module,
        entry_point: Some("main"),
        compilation_options: Default::default(),
        cache: None,
    });
    let contents: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
    let buffer = device.create_buffer_init(&wgpu::util::BufferInitDescriptor { label, contents: &contents, usage });
    let size = contents.len() as u64;
    let read = device.create_buffer(&wgpu::BufferDescriptor {
        label,
        size,
        usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    });
    let group = device.create_bind_group(&wgpu::BindGroupDescriptor {
        label,
        layout: &pipeline.get_bind_group_layout(0),
        entries: &[wgpu::BindGroupEntry { binding: 0, resource: buffer.as_entire_binding() }],
    });
    let mut encoder = device.create_command_encoder(&Default::default());
    {
        let mut pass = encoder.begin_compute_pass(&Default::default());
        pass.set_pipeline(&pipeline);
        pass.set_bind_group(0, &group, &[]);
        pass.dispatch_workgroups(1, 1, 1);
    }
    encoder.copy_buffer_to_buffer(&buffer, 0, &read, 0, size);
    gpu.queue().submit([encoder.finish()]);
    if let Some(error) = pollster::block_on(scope.pop()) {
        return Err(failed(error.to_string()));
    }
    read.map_async(wgpu::MapMode::Read, .., |_| {});
    gpu.wait()?;
    let mapped = read.get_mapped_range(..).map_err(|error| failed(error.to_string()))?;
    let word = |at: usize| u32::from_le_bytes([mapped[at], mapped[at + 1], mapped[at + 2], mapped[at + 3]]);
    Ok((0..words.len()).map(|n| word(4 * n)).collect())
}
