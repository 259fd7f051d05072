//! What the tests share: every device of this machine, and the random calls of `conformance`.

use wgpu_attention::{Device, Gpu, GpuOptions, wgpu};
pub use wgpu_attention_conformance::{Call, Data, Order, assert_close, bits, noise, place, worst};

/// Every adapter, each with and without its subgroup kernels, and the CPU backend. No adapter at all
/// is a failure: `./test` installs a software one.
pub fn all_devices() -> Vec<(String, Device)> {
    let adapters = Gpu::adapters();
    assert!(!adapters.is_empty(), "no GPU adapter at all; ./test installs Mesa's software adapter");
    let mut devices = vec![("cpu".to_string(), Device::Cpu)];
    for adapter in adapters {
        let has_subgroups = adapter.features.contains(wgpu::Features::SUBGROUP);
        for without_subgroups in [false, true] {
            if without_subgroups && !has_subgroups {
                continue;
            }
            let options =
                GpuOptions { adapter: Some(adapter.index.to_string()), without_subgroups, ..GpuOptions::default() };
            let kernels = if without_subgroups { ", plain kernels" } else { "" };
            let name = format!("{} ({}{kernels})", adapter.info.name, adapter.info.backend);
            let gpu = Gpu::with_options(&options).unwrap_or_else(|error| panic!("{name}: {error}"));
            devices.push((name, Device::Gpu(gpu)));
        }
    }
    devices
}

/// The same, but where an adapter has no subgroups anyway, the others run their subgroup kernels alone: a software
/// adapter compiles for seconds, and the sweep has both of each.
pub fn devices() -> Vec<(String, Device)> {
    let mut all = all_devices();
    let is_plain = |device: &Device| device.gpu().is_some_and(|gpu| gpu.capabilities().subgroup_min.is_none());
    let made_plain = |name: &str| name.ends_with(", plain kernels)");
    if all.iter().any(|(name, device)| is_plain(device) && !made_plain(name)) {
        all.retain(|(name, _)| !made_plain(name));
    }
    all
}

/// The GPU devices alone.
pub fn gpus() -> Vec<(String, Gpu)> {
    let gpu = |(name, device): (String, Device)| device.gpu().cloned().map(|gpu| (name, gpu));
    devices().into_iter().filter_map(gpu).collect()
}

/// The adapters of this machine, with a device that offers less than they could.
pub fn limited(change: impl Fn(&mut wgpu::Limits)) -> Vec<(String, Gpu)> {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
    let adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::all()));
    assert!(!adapters.is_empty());
    adapters
        .into_iter()
        .map(|adapter| {
            let mut limits = adapter.limits();
            change(&mut limits);
            let descriptor = wgpu::DeviceDescriptor {
                required_limits: limits,
                required_features: adapter.features() & wgpu::Features::SUBGROUP,
                ..Default::default()
            };
            let (device, queue) = pollster::block_on(adapter.request_device(&descriptor)).unwrap();
            let info = adapter.get_info();
            (format!("{} ({})", info.name, info.backend), Gpu::from_wgpu(&adapter, device, queue))
        })
        .collect()
}
