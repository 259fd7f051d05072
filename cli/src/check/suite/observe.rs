//! What a device is, as reported by its driver and as observed by a kernel.

use std::collections::BTreeMap;

use wgpu_attention::{Device, Gpu, wgpu};
use wgpu_attention_conformance::one_workgroup;

use crate::check::report::{Adapter, Observed};
use crate::target::{backend_name, driver_name};

/// The shader compilers of a backend.
fn shader_compiler(backend: wgpu::Backend, info: &wgpu::AdapterInfo) -> String {
    let driver = Some(driver_name(info)).filter(|name| !name.is_empty()).unwrap_or("the driver".into());
    match backend {
        wgpu::Backend::Vulkan => format!("naga to SPIR-V, {driver}"),
        wgpu::Backend::Metal => format!("naga to MSL, {driver}"),
        wgpu::Backend::Dx12 => format!("naga to HLSL, DXC or FXC, {driver}"),
        wgpu::Backend::Gl => format!("naga to GLSL, {driver}"),
        wgpu::Backend::BrowserWebGpu => "the browser's".into(),
        wgpu::Backend::Noop => "none".into(),
    }
}

/// Limits under wgpu's own field names.
fn limits(gpu: &Gpu) -> BTreeMap<String, u64> {
    // Parsed from the debug output of `Limits`, so that no field is missed.
    let text = format!("{:?}", gpu.device().limits());
    let fields = text.trim_start_matches("Limits {").trim_end_matches('}').split(',');
    let field = |field: &str| {
        let (name, value) = field.split_once(':')?;
        Some((name.trim().to_string(), value.trim().parse().ok()?))
    };
    fields.filter_map(field).collect()
}

pub fn adapter(device: &Device) -> Adapter {
    let Some(gpu) = device.gpu() else {
        return Adapter {
            name: "CPU backend".into(),
            backend: "CPU".into(),
            kind: "Cpu".into(),
            shader_compiler: "none: Rust".into(),
            ..Adapter::default()
        };
    };
    let info = gpu.info();
    let has_subgroups = gpu.device().features().contains(wgpu::Features::SUBGROUP);
    Adapter {
        name: info.name.clone(),
        backend: backend_name(info.backend).into(),
        kind: format!("{:?}", info.device_type),
        vendor: info.vendor,
        device: info.device,
        driver: info.driver.clone(),
        driver_info: info.driver_info.clone(),
        shader_compiler: shader_compiler(info.backend, info),
        subgroups: has_subgroups.then_some([info.subgroup_min_size, info.subgroup_max_size]),
        features: gpu.device().features().iter_names().map(|(name, _)| name.to_string()).collect(),
        limits: limits(gpu),
        ..Adapter::default()
    }
}

/// How many invocations of a workgroup of that size run, and the size of their subgroups.
pub fn observe(gpu: &Gpu, workgroup: u32) -> Result<Observed, String> {
    let has_subgroups = gpu.device().features().contains(wgpu::Features::SUBGROUP);
    let (builtin, size) = match has_subgroups {
        true => ("@builtin(subgroup_size) size: u32", "size"),
        false => ("@builtin(local_invocation_index) local: u32", "0u"),
    };
    let source = format!(
        "@group(0) @binding(0) var<storage, read_write> seen: array<atomic<u32>, 2>;\n\
         @compute @workgroup_size({workgroup}) fn main({builtin}) {{\n\
             atomicAdd(&seen[0], 1u);\n    atomicMax(&seen[1], {size});\n}}\n"
    );
    let seen = one_workgroup(gpu, "sizes of workgroups", &source, &[0; 2]).map_err(|error| error.to_string())?;
    let (invocations, size) = (seen[0], seen[1]);
    Ok(Observed { workgroup, invocations, subgroup: has_subgroups.then_some(size) })
}
