//! Finds an adapter and reads its capabilities.

use crate::error::{Error, Result};
use crate::kernels::turns::MESA_LOOP_TURNS;
use crate::kernels::{AdapterClass, Capabilities, GpuKind, Variant};
use crate::memory::system_memory;

/// Which adapter to use, and how.
#[derive(Clone, Debug, Default)]
#[must_use]
#[non_exhaustive]
pub struct GpuOptions {
    /// A backend word (`vulkan`, `metal`, `dx12`, `gl`), an index into [`Gpu::adapters`](crate::Gpu::adapters),
    /// part of an adapter's name, or both a backend and part of a name: `gl:llvmpipe`. `None`: `WGPU_BACKEND` and
    /// `WGPU_ADAPTER_NAME` decide; if neither is set, the best adapter.
    pub adapter: Option<String>,
    /// Does not use subgroup kernels, even if the adapter has subgroups.
    pub without_subgroups: bool,
    /// The device's limits. `None`: all that the adapter offers. With [`wgpu::Limits::default`], WebGPU's own limits,
    /// plans fit every implementation.
    pub limits: Option<wgpu::Limits>,
    /// Maximum number of iterations of all loops of an invocation together, for drivers that silently stop loops there;
    /// `attn check` measures it. `None`: 65,000 on Mesa's software drivers, unlimited elsewhere.
    pub max_loop_turns: Option<u32>,
    /// Estimated seconds that one submit may take. `None`: half a second. Longer work is split into several submits,
    /// because Windows and some drivers reset a GPU that works on one submit for two seconds.
    pub seconds_per_submit: Option<f64>,
    /// Changes the WGSL of a variant before it is compiled; a result of `None` leaves it unchanged. For tests that
    /// break a kernel on purpose, and for experiments.
    pub rewrite: Option<fn(&Variant, &str) -> Option<String>>,
    /// Plans as for a GPU of this kind, so that any adapter, a software one too, runs and checks the kernels that such a
    /// GPU runs. `None`: what `WGPU_ATTENTION_PLAN_AS` names (`amd`, `nvidia`, …), else the adapter's own kind.
    pub planned_as: Option<GpuKind>,
}

impl GpuOptions {
    /// Selects the adapter `which`: a backend word, an index or part of a name.
    pub fn adapter(which: impl Into<String>) -> GpuOptions {
        GpuOptions { adapter: Some(which.into()), ..Default::default() }
    }

    /// The best adapter, with all its limits.
    pub fn new() -> GpuOptions {
        GpuOptions::default()
    }
    /// Sets [`GpuOptions::without_subgroups`].
    pub fn without_subgroups(mut self, yes: bool) -> Self {
        self.without_subgroups = yes;
        self
    }
    /// Sets [`GpuOptions::limits`].
    pub fn limits(mut self, limits: wgpu::Limits) -> Self {
        self.limits = Some(limits);
        self
    }
    /// Sets [`GpuOptions::max_loop_turns`].
    pub fn max_loop_turns(mut self, turns: u32) -> Self {
        self.max_loop_turns = Some(turns);
        self
    }
    /// Sets [`GpuOptions::seconds_per_submit`].
    pub fn seconds_per_submit(mut self, seconds: f64) -> Self {
        self.seconds_per_submit = Some(seconds);
        self
    }
    /// Sets [`GpuOptions::rewrite`].
    pub fn rewrite(mut self, rewrite: fn(&Variant, &str) -> Option<String>) -> Self {
        self.rewrite = Some(rewrite);
        self
    }

    /// Sets [`GpuOptions::planned_as`].
    pub fn planned_as(mut self, kind: GpuKind) -> Self {
        self.planned_as = Some(kind);
        self
    }

    /// With what only the environment says.
    pub(super) fn with_environment(mut self) -> Result<GpuOptions> {
        if self.planned_as.is_none()
            && let Ok(kind) = std::env::var("WGPU_ATTENTION_PLAN_AS")
            && !kind.is_empty()
        {
            let kind = kind.parse().map_err(|error| Error::Value(format!("WGPU_ATTENTION_PLAN_AS: {error}")))?;
            self.planned_as = Some(kind);
        }
        Ok(self)
    }

    /// True if an adapter was requested, here or by `WGPU_ADAPTER_NAME`.
    #[cfg(feature = "cpu")]
    pub(crate) fn names_an_adapter(&self) -> bool {
        self.adapter.is_some() || environment_name().is_some()
    }
}

fn environment_name() -> Option<String> {
    std::env::var("WGPU_ADAPTER_NAME").ok().filter(|name| !name.is_empty())
}

/// One adapter of this machine.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct AdapterSummary {
    /// Index in [`Gpu::adapters`](crate::Gpu::adapters); accepted as [`GpuOptions::adapter`].
    pub index: usize,
    /// Name, driver, backend, type, subgroup sizes.
    pub info: wgpu::AdapterInfo,
    /// The adapter's own limits.
    pub limits: wgpu::Limits,
    /// The adapter's features.
    pub features: wgpu::Features,
}

impl AdapterSummary {
    /// Whether `which`, as in [`GpuOptions::adapter`], matches this adapter.
    pub fn answers_to(&self, which: &str) -> bool {
        answers(which, self.index, &self.info)
    }
}

/// Splits a name into its leading backend, if any, and the rest.
fn parted(which: &str) -> (Option<wgpu::Backend>, &str) {
    let (word, name) = which.split_once(':').unwrap_or((which, ""));
    match backend_word(word) {
        Some(backend) => (Some(backend), name),
        None => (None, which),
    }
}

fn answers(which: &str, index: usize, info: &wgpu::AdapterInfo) -> bool {
    if let Ok(asked) = which.parse::<usize>() {
        return asked == index;
    }
    let (backend, name) = parted(which);
    backend.is_none_or(|backend| backend == info.backend) && info.name.to_lowercase().contains(&name.to_lowercase())
}

/// An instance that loads only `backends`, because merely enumerating GL opens a display connection.
fn instance(backends: wgpu::Backends) -> wgpu::Instance {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle_from_env();
    // If the driver reports a memory budget, an allocation beyond it fails with our error instead of taking the machine
    // down.
    descriptor.memory_budget_thresholds.for_resource_creation.get_or_insert(95);
    descriptor.backends = backends;
    wgpu::Instance::new(descriptor)
}

/// Smaller is better.
fn rank(info: &wgpu::AdapterInfo) -> (u32, u32) {
    let kind = match info.device_type {
        wgpu::DeviceType::DiscreteGpu => 0,
        wgpu::DeviceType::IntegratedGpu => 1,
        wgpu::DeviceType::VirtualGpu => 2,
        wgpu::DeviceType::Other => 3,
        wgpu::DeviceType::Cpu => 4,
    };
    let backend = match info.backend {
        wgpu::Backend::Vulkan | wgpu::Backend::Metal | wgpu::Backend::BrowserWebGpu => 0,
        wgpu::Backend::Dx12 => 1,
        wgpu::Backend::Gl => 2,
        wgpu::Backend::Noop => 3,
    };
    (kind, backend)
}

/// Adapters of `backends` that can compute, best first.
async fn find(backends: wgpu::Backends) -> Vec<wgpu::Adapter> {
    #[cfg(target_arch = "wasm32")]
    {
        instance(backends).request_adapter(&Default::default()).await.into_iter().collect()
    }
    #[cfg(not(target_arch = "wasm32"))]
    {
        let backends = backends & wgpu::Backends::from_env().unwrap_or(wgpu::Backends::all());
        let mut found = instance(backends).enumerate_adapters(backends).await;
        found.retain(|adapter| {
            let flags = adapter.get_downlevel_capabilities().flags;
            flags.contains(wgpu::DownlevelFlags::COMPUTE_SHADERS)
                && adapter.limits().max_storage_buffers_per_shader_stage >= 4
        });
        found.sort_by_key(|adapter| rank(&adapter.get_info()));
        found
    }
}

/// Every adapter, best first.
pub async fn list() -> Vec<AdapterSummary> {
    let summary = |(index, adapter): (usize, wgpu::Adapter)| AdapterSummary {
        index,
        info: adapter.get_info(),
        limits: adapter.limits(),
        features: adapter.features(),
    };
    find(wgpu::Backends::all()).await.into_iter().enumerate().map(summary).collect()
}

fn backend_word(word: &str) -> Option<wgpu::Backend> {
    Some(match word.to_lowercase().as_str() {
        "vulkan" | "vk" => wgpu::Backend::Vulkan,
        "metal" | "mtl" => wgpu::Backend::Metal,
        "dx12" | "d3d12" => wgpu::Backend::Dx12,
        "gl" | "gles" | "opengl" => wgpu::Backend::Gl,
        "webgpu" => wgpu::Backend::BrowserWebGpu,
        _ => return None,
    })
}

/// The adapter that `options` select.
pub async fn choose(options: &GpuOptions) -> Result<wgpu::Adapter> {
    // GL ranks last and is slow to enumerate, so an unnamed choice tries it only if nothing else is found.
    let mut found = match (&options.adapter, environment_name()) {
        (None, None) => find(wgpu::Backends::all() - wgpu::Backends::GL).await,
        (Some(which), _) => match parted(which).0 {
            Some(backend) => find(backend.into()).await,
            None => Vec::new(),
        },
        _ => Vec::new(),
    };
    if found.is_empty() {
        found = find(wgpu::Backends::all()).await;
    }
    let names: Vec<String> = found
        .iter()
        .enumerate()
        .map(|(n, adapter)| {
            let info = adapter.get_info();
            format!("{n}: {} ({})", info.name, info.backend)
        })
        .collect();
    if found.is_empty() {
        return Err(Error::NoAdapter { asked: options.adapter.clone().or_else(environment_name), found: names });
    }
    let has_name =
        |adapter: &wgpu::Adapter, part: &str| adapter.get_info().name.to_lowercase().contains(&part.to_lowercase());
    let at = match (&options.adapter, environment_name()) {
        (Some(which), _) => (0..found.len()).find(|&at| answers(which, at, &found[at].get_info())),
        (None, Some(part)) => found.iter().position(|adapter| has_name(adapter, &part)),
        (None, None) => Some(0),
    };
    match at {
        Some(at) => Ok(found.swap_remove(at)),
        None => Err(Error::NoAdapter { asked: options.adapter.clone().or_else(environment_name), found: names }),
    }
}

/// The iteration limit of drivers that are known to have one: Mesa's CPU drivers, including those behind a virtual GPU.
fn known_loop_turns(info: &wgpu::AdapterInfo) -> Option<u32> {
    let counts = [&info.name, &info.driver].into_iter().any(|text| text.to_lowercase().contains("llvmpipe"));
    counts.then_some(MESA_LOOP_TURNS)
}

/// Whether an adapter is a GPU or runs on the CPU.
pub fn class(info: &wgpu::AdapterInfo) -> AdapterClass {
    match info.device_type {
        wgpu::DeviceType::Cpu => AdapterClass::Cpu,
        _ => AdapterClass::Gpu,
    }
}

/// The capabilities of a device, as planning uses them.
pub fn capabilities(info: &wgpu::AdapterInfo, device: &wgpu::Device, options: &GpuOptions) -> Capabilities {
    let limits = device.limits();
    let has_subgroups = device.features().contains(wgpu::Features::SUBGROUP) && !options.without_subgroups;
    let is_software = class(info) == AdapterClass::Cpu;
    let class = if options.planned_as.is_some() { AdapterClass::Gpu } else { class(info) };
    Capabilities {
        adapter: info.name.clone(),
        class,
        kind: options.planned_as.unwrap_or_else(|| GpuKind::of(info.vendor, &info.name)),
        subgroup_min: has_subgroups.then_some(info.subgroup_min_size),
        max_binding: limits.max_storage_buffer_binding_size,
        max_buffer: limits.max_buffer_size,
        max_storage_buffers: limits.max_storage_buffers_per_shader_stage,
        max_workgroups: limits.max_compute_workgroups_per_dimension,
        max_invocations: limits.max_compute_invocations_per_workgroup.min(limits.max_compute_workgroup_size_x),
        workgroup_memory: limits.max_compute_workgroup_storage_size,
        offset_alignment: u64::from(limits.min_storage_buffer_offset_alignment).max(16),
        memory: is_software.then(system_memory).flatten(),
        refused_tiles: Vec::new(),
        refuses_tiled_products: false,
        max_operations: None,
        max_loop_turns: options.max_loop_turns.or_else(|| known_loop_turns(info)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_adapter_answers_to_its_index_backend_and_name() {
        let mut info = wgpu::AdapterInfo::new(wgpu::DeviceType::Cpu, wgpu::Backend::Gl);
        info.name = "llvmpipe (LLVM 15, 256 bits): a:b".into();
        for which in ["2", "gl", "OpenGL", "LLVMpipe", "gl:llvmpipe", "gles:LLVM 15", "gl:", "a:b", ""] {
            assert!(answers(which, 2, &info), "{which}");
        }
        for which in ["0", "22", "vulkan", "vulkan:llvmpipe", "gl:radeon", "metal:", "b:a"] {
            assert!(!answers(which, 2, &info), "{which}");
        }
    }
}
