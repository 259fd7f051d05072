//! The only room that talks to wgpu.

use crate::attention::{Attended, Operands, Wanted};
use crate::device::Device;
use crate::error::Result;
use crate::problem::{Layout, Problem};
use crate::tensor::Tensor;

/// Which adapter to take.
#[derive(Clone, Debug, Default)]
pub struct GpuOptions {
    /// A backend word (`vulkan`, `metal`, `dx12`, `gl`), an index into [`Gpu::adapters`], or part of
    /// an adapter's name. `None`: `WGPU_BACKEND` and `WGPU_ADAPTER_NAME` decide, else the best.
    pub adapter: Option<String>,
    /// Leaves the subgroup kernels out even where the adapter has subgroups.
    pub without_subgroups: bool,
}

impl GpuOptions {
    pub(crate) fn names_an_adapter(&self) -> bool {
        self.adapter.is_some()
    }
}

/// One adapter of this machine.
#[derive(Clone, Debug)]
pub struct AdapterSummary {
    /// Place in [`Gpu::adapters`]; accepted as [`GpuOptions::adapter`].
    pub index: usize,
    /// Name, driver, backend, type, subgroup sizes.
    pub info: wgpu::AdapterInfo,
    /// The adapter's own limits.
    pub limits: wgpu::Limits,
    /// The adapter's features.
    pub features: wgpu::Features,
}

/// An adapter with its device, pipeline cache and buffer pool. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Gpu {}

impl Gpu {
    /// The best adapter.
    pub fn new() -> Result<Gpu> {
        Gpu::with_options(&GpuOptions::default())
    }
    /// As asked.
    pub fn with_options(_options: &GpuOptions) -> Result<Gpu> {
        Err(crate::Error::NoAdapter("not built yet".into()))
    }
    /// Every adapter of this machine, best first.
    pub fn adapters() -> Vec<AdapterSummary> {
        Vec::new()
    }
    /// Name, driver, backend.
    pub fn info(&self) -> &wgpu::AdapterInfo {
        todo!()
    }
    /// Names of the kernel variants compiled so far, such as `scores/subgroup8`.
    pub fn kernels(&self) -> Vec<String> {
        todo!()
    }
    pub(crate) fn same_as(&self, _other: &Gpu) -> bool {
        todo!()
    }
    pub(crate) fn upload(&self, _label: &str, _bytes: &[u8]) -> Result<GpuBuffer> {
        todo!()
    }
    pub(crate) fn adopt(&self, _buffer: &wgpu::Buffer) -> GpuBuffer {
        todo!()
    }
}

#[derive(Clone, Debug)]
pub(crate) struct GpuBuffer {}

impl GpuBuffer {
    pub fn gpu(&self) -> &Gpu {
        todo!()
    }
    pub async fn read<T>(&self, _range: std::ops::Range<u64>, _convert: impl FnOnce(&[u8]) -> T) -> Result<T> {
        todo!()
    }
    pub fn is(&self, _other: &GpuBuffer) -> bool {
        todo!()
    }
}

pub(crate) struct Recording {}

impl Recording {
    pub fn new(_gpu: &Gpu) -> Recording {
        todo!()
    }
    pub fn device(&self) -> &Device {
        todo!()
    }
    pub fn project(
        &mut self,
        _x: &Tensor,
        _w: &Tensor,
        _bias: Option<&Tensor>,
        _extra: &[Option<&Tensor>],
    ) -> Result<Tensor> {
        todo!()
    }
    pub fn attention(
        &mut self,
        _problem: &Problem,
        _operands: &Operands,
        _wanted: Wanted,
        _output: Option<&Tensor>,
        _layout: Layout,
    ) -> Result<Attended> {
        todo!()
    }
    pub fn softmax(&mut self, _x: &Tensor, _axis: usize) -> Result<Tensor> {
        todo!()
    }
    pub async fn submit(self) -> Result<()> {
        todo!()
    }
    pub fn encode(self, _encoder: &mut wgpu::CommandEncoder) -> Result<()> {
        todo!()
    }
}
