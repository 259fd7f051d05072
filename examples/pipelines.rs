//! Opens each adapter, prints what planning knows of it, separated by tabs, and creates the pipelines of the benchmark
//! shapes P1 to P9 on it. Nothing is computed, so `./gpu-compilers` runs it on fake devices too.

use wgpu_attention::problem::Layout;
use wgpu_attention::{
    Align, Attention, Capabilities, Dtype, Gpu, GpuOptions, MultiHeadAttention, MultiHeadConfig, Projections, Result,
    Tensor, wgpu,
};

/// A tensor whose contents nobody reads.
fn blank(gpu: &Gpu, shape: &[usize]) -> Result<Tensor> {
    let layout = Layout::contiguous(shape)?;
    let buffer = gpu.device().create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size: 4 * layout.len() as u64,
        usage: wgpu::BufferUsages::STORAGE,
        mapped_at_creation: false,
    });
    Tensor::from_wgpu(gpu, &buffer, shape, layout.strides(), 0, Dtype::F32)
}

/// Recording creates the pipelines; nothing is submitted.
fn encoder(gpu: &Gpu) -> wgpu::CommandEncoder {
    gpu.device().create_command_encoder(&Default::default())
}

fn attention(gpu: &Gpu, [batch, heads_q, heads_kv, len_q, len_k, dim]: [usize; 6], causal: bool) -> Result<()> {
    let q = blank(gpu, &[batch, heads_q, len_q, dim])?;
    let k = blank(gpu, &[batch, heads_kv, len_k, dim])?;
    let mut attention = Attention::new();
    if causal {
        attention = attention.causal(Align::BottomRight);
    }
    attention.encode(gpu, &mut encoder(gpu), &q, &k, &k, None)?;
    Ok(())
}

fn layer(gpu: &Gpu, batch: usize, len: usize, width: usize, heads: usize) -> Result<()> {
    let weight = blank(gpu, &[width, width])?;
    let projections = Projections::new(weight.clone(), weight.clone(), weight.clone(), weight);
    let layer = MultiHeadAttention::from_projections(MultiHeadConfig::new(width, heads)?.bias(false), projections)?;
    let x = blank(gpu, &[batch, len, width])?;
    layer.encode(gpu, &mut encoder(gpu), &x, &x, &x, &Attention::new())?;
    Ok(())
}

/// The fields of a line of tests/gpu/limits.tsv.
fn line(one: &Capabilities) -> String {
    let subgroup = one.subgroup_min.map_or("-".into(), |least| least.to_string());
    [
        one.kind.to_string(),
        subgroup,
        one.max_binding.to_string(),
        one.max_buffer.to_string(),
        one.max_storage_buffers.to_string(),
        one.max_workgroups.to_string(),
        one.max_invocations.to_string(),
        one.workgroup_memory.to_string(),
        one.offset_alignment.to_string(),
    ]
    .join("\t")
}

fn main() -> Result<()> {
    for adapter in Gpu::adapters() {
        let gpu = Gpu::with_options(&GpuOptions::adapter(adapter.index.to_string()))?;
        println!("{}\t{}", adapter.info.name, line(gpu.capabilities()));
        let before = gpu.allocation_counts().pipelines;
        for (shape, causal) in [
            ([1, 12, 12, 512, 512, 64], false),
            ([1, 12, 12, 1024, 1024, 64], true),
            ([1, 32, 8, 512, 512, 128], true),
            ([1, 32, 8, 1, 4096, 128], false),
            ([1, 4, 4, 4096, 4096, 64], true),
            ([4, 8, 8, 128, 512, 64], false),
            ([1, 8, 8, 64, 64, 64], false),
        ] {
            attention(&gpu, shape, causal)?;
        }
        layer(&gpu, 8, 128, 512, 8)?;
        // One token.
        layer(&gpu, 1, 1, 4096, 32)?;
        println!("{} pipelines", gpu.allocation_counts().pipelines - before);
    }
    Ok(())
}
