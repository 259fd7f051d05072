//! Shared code of the tests: every device of this machine, and the random calls of `conformance`.

use wgpu_attention::{AdapterSummary, Device, Gpu, GpuKind, GpuOptions, Method, wgpu};
pub use wgpu_attention_conformance::{
    Call, Data, Order, Truth, Wide, assert_close, assert_close_to, assert_logs_close, bits, largest, noise, place,
    rounding, wide, worst,
};

/// The CPU backend and every adapter. If all adapters have subgroups, the first is also included without. (A software
/// adapter compiles for seconds, and the quick suite of `attn check` covers both kinds of kernels on each.) Having no
/// adapter is a failure: `./test` installs a software one.
pub fn devices() -> Vec<(String, Device)> {
    let adapters = Gpu::adapters();
    assert!(!adapters.is_empty(), "no GPU adapter at all; ./test installs Mesa's software adapter");
    let open = |adapter: &AdapterSummary, without_subgroups: bool| {
        let options = GpuOptions::adapter(adapter.index.to_string()).without_subgroups(without_subgroups);
        let kernels = if without_subgroups { ", plain kernels" } else { "" };
        let name = format!("{} ({}{kernels})", adapter.info.name, adapter.info.backend);
        let gpu = Gpu::with_options(&options).unwrap_or_else(|error| panic!("{name}: {error}"));
        (name, Device::Gpu(gpu))
    };
    let mut devices = vec![("cpu".to_string(), Device::Cpu)];
    devices.extend(adapters.iter().map(|adapter| open(adapter, false)));
    if adapters.iter().all(|adapter| adapter.features.contains(wgpu::Features::SUBGROUP)) {
        devices.push(open(&adapters[0], true));
    }
    devices
}

/// The first adapter, planned as for two kinds of GPUs: those with large tiles and unknown ones. What a GPU runs is
/// checked on a software adapter.
pub fn as_gpus() -> Vec<(String, Device)> {
    let kinds = [GpuKind::Amd, GpuKind::Other];
    let open = |kind: GpuKind| {
        let gpu = Gpu::with_options(&GpuOptions::adapter("0").planned_as(kind)).unwrap();
        (format!("{} planned as {kind}", gpu.info().name), Device::Gpu(gpu))
    };
    kinds.map(open).into()
}

/// Every method on a device: planning's choice, then one of each kind.
pub fn methods(device: &Device) -> Vec<Method> {
    let every = device.gpu().map(|gpu| Method::every(gpu.capabilities()));
    [Method::Auto].into_iter().chain(every.into_iter().flatten()).collect()
}

/// Planning's choice and `count` of the other methods, which differ for every `turn`. Each compiles its own kernels,
/// and all calls of a test together cover all methods.
pub fn methods_in_turn(device: &Device, turn: usize, count: usize) -> Vec<Method> {
    let all = methods(device);
    let others = all.len() - 1;
    let chosen = (0..count.min(others)).map(|n| all[1 + (turn * count + n) % others]);
    [Method::Auto].into_iter().chain(chosen).collect()
}

/// Only the GPU devices.
pub fn gpus() -> Vec<(String, Gpu)> {
    let gpu = |(name, device): (String, Device)| device.gpu().cloned().map(|gpu| (name, gpu));
    devices().into_iter().filter_map(gpu).collect()
}

/// The adapters of this machine, with a device that offers less than the adapter supports.
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
