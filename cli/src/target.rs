//! `--adapter`: which device runs the work.

use wgpu_attention::{Device, Gpu, GpuOptions};

use crate::error::{Error, Result, usage};

/// A device to run on.
pub struct Target {
    pub device: Device,
    /// Why this is not the device that a user would expect.
    pub notice: Option<String>,
}

impl Target {
    fn of(device: impl Into<Device>) -> Target {
        Target { device: device.into(), notice: None }
    }

    /// Name, backend and driver in one line.
    pub fn label(&self) -> String {
        match self.device.gpu() {
            Some(gpu) => {
                let info = gpu.info();
                match driver_name(info).as_str() {
                    "" => format!("{} ({})", info.name, backend_name(info.backend)),
                    driver => format!("{} ({}, {driver})", info.name, backend_name(info.backend)),
                }
            }
            None => "cpu (the CPU backend)".into(),
        }
    }

    /// Prints the notice, if any, to stderr.
    pub fn announce(&self) {
        if let Some(notice) = &self.notice {
            anstream::eprintln!("{notice}");
        }
    }
}

/// Name and version of the driver; empty if unknown.
pub fn driver_name(info: &wgpu_attention::wgpu::AdapterInfo) -> String {
    format!("{} {}", info.driver, info.driver_info).trim().to_string()
}

pub fn backend_name(backend: wgpu_attention::wgpu::Backend) -> &'static str {
    use wgpu_attention::wgpu::Backend;
    match backend {
        Backend::Vulkan => "Vulkan",
        Backend::Metal => "Metal",
        Backend::Dx12 => "DX12",
        Backend::Gl => "GL",
        Backend::BrowserWebGpu => "WebGPU",
        Backend::Noop => "no-op",
    }
}

/// Every device that `which` names; more than one only for `all`.
pub fn targets(which: Option<&str>) -> Result<Vec<Target>> {
    if which.is_some_and(|which| which.eq_ignore_ascii_case("all")) {
        let mut all = Vec::new();
        for adapter in Gpu::adapters() {
            all.push(Target::of(Gpu::with_options(&options(&adapter.index.to_string()))?));
        }
        all.push(Target::of(Device::Cpu));
        return Ok(all);
    }
    Ok(vec![target(which)?])
}

/// The one device that `which` names.
pub fn target(which: Option<&str>) -> Result<Target> {
    let Some(which) = which else {
        return match Gpu::new() {
            Ok(gpu) => Ok(Target::of(gpu)),
            // If the environment names an adapter that does not exist, that is an error, never a fallback.
            Err(error @ wgpu_attention::Error::NoAdapter { .. }) if std::env::var_os("WGPU_ADAPTER_NAME").is_none() => {
                Ok(Target { device: Device::Cpu, notice: Some(Device::fallback_notice(&error.to_string())) })
            }
            Err(error) => Err(error.into()),
        };
    };
    if which.eq_ignore_ascii_case("all") {
        usage!("--adapter all is not supported here; name one of {}", known());
    }
    if which.eq_ignore_ascii_case("cpu") {
        return Ok(Target::of(Device::Cpu));
    }
    match Gpu::with_options(&options(which)) {
        Ok(gpu) => Ok(Target::of(gpu)),
        Err(wgpu_attention::Error::NoAdapter { .. }) => {
            Err(Error::NoAdapter(format!("no adapter answers to \"{which}\"; there are {}", known())))
        }
        Err(error) => Err(error.into()),
    }
}

fn options(which: &str) -> GpuOptions {
    GpuOptions::adapter(which)
}

fn known() -> String {
    let adapters = Gpu::adapters().into_iter();
    let mut names: Vec<String> = adapters
        .map(|adapter| format!("{}: {} ({})", adapter.index, adapter.info.name, backend_name(adapter.info.backend)))
        .collect();
    names.push("cpu".into());
    names.join(", ")
}
