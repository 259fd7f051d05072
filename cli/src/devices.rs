//! `attn devices`: lists the adapters of this machine and the kernels that run on them.

use clap::Args;
use serde_json::json;
use wgpu_attention::kernels::gpu_kind::predicted_share;
use wgpu_attention::wgpu::Features;
use wgpu_attention::{AdapterSummary, Attention, Device, Gpu, GpuKind, GpuOptions, Tensor};

use crate::error::{Error, Result};
use crate::table::table;
use crate::target::{self, backend_name, driver_name};

#[derive(Args, Debug)]
#[command(after_help = "\
The kernels listed are those that a small call ran on the adapter.

Examples:
  attn devices
  attn devices --json
  attn devices --adapter vulkan")]
pub struct DevicesArgs {
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

const FEATURES: [(&str, Features); 3] = [
    ("SUBGROUP", Features::SUBGROUP),
    ("SHADER_F16", Features::SHADER_F16),
    ("TIMESTAMP_QUERY", Features::TIMESTAMP_QUERY),
];

/// The kernels of a small call.
fn kernels(device: &Device) -> Result<Vec<String>> {
    let x = Tensor::from_slice(device, &[1, 2, 64, 64], &vec![0.5f32; 2 * 64 * 64])?;
    Attention::new().forward(&x, &x, &x)?.output.download()?;
    Ok(match device.gpu() {
        Some(gpu) => gpu.kernels(),
        None => Vec::new(),
    })
}

fn bytes(count: u64) -> String {
    match count {
        n if n >= 1 << 30 => format!("{:.1} GiB", n as f64 / (1u64 << 30) as f64),
        n if n >= 1 << 20 => format!("{:.1} MiB", n as f64 / (1u64 << 20) as f64),
        n => format!("{:.1} KiB", n as f64 / 1024.0),
    }
}

pub fn devices(args: &DevicesArgs, adapter: Option<&str>) -> Result<()> {
    let mut adapters = Gpu::adapters();
    let mut with_cpu = true;
    // A requested adapter is found by the library's own rule and recognised by its info.
    if let Some(which) = adapter.filter(|which| !which.eq_ignore_ascii_case("all")) {
        let chosen = target::target(Some(which))?;
        with_cpu = chosen.device.gpu().is_none();
        adapters.retain(|adapter| chosen.device.gpu().is_some_and(|gpu| same(gpu, adapter)));
    }
    let opened: Vec<(AdapterSummary, Result<Vec<String>>)> = adapters
        .into_iter()
        .map(|adapter| {
            let options = GpuOptions::adapter(adapter.index.to_string());
            let names = Gpu::with_options(&options).map_err(Error::from).and_then(|gpu| kernels(&Device::Gpu(gpu)));
            (adapter, names)
        })
        .collect();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    if args.json {
        print_json(&opened, with_cpu, threads)
    } else {
        print_table(&opened, with_cpu, threads);
        Ok(())
    }
}

fn same(gpu: &Gpu, adapter: &AdapterSummary) -> bool {
    let (a, b) = (gpu.info(), &adapter.info);
    (a.backend, &a.name, a.vendor, a.device) == (b.backend, &b.name, b.vendor, b.device)
}

fn print_table(opened: &[(AdapterSummary, Result<Vec<String>>)], with_cpu: bool, threads: usize) {
    let mut table = table();
    table.set_header(["", "adapter", "subgroups", "features", "limits", "kernels"]);
    for (adapter, names) in opened {
        let AdapterSummary { index, info, limits, features, .. } = adapter;
        let has: Vec<&str> =
            FEATURES.iter().filter(|(_, bit)| features.contains(*bit)).map(|(name, _)| *name).collect();
        table.add_row([
            index.to_string(),
            format!("{}\n{}, {}\n{}", info.name, backend_name(info.backend), kind(info), driver_name(info)),
            if features.contains(Features::SUBGROUP) {
                format!("{}–{}", info.subgroup_min_size, info.subgroup_max_size)
            } else {
                "none".into()
            },
            if has.is_empty() { "none that the kernels use".into() } else { has.join("\n") },
            format!(
                "storage binding {}\nbuffer {}\nworkgroup storage {}\n{} invocations per workgroup\n{} storage buffers per stage",
                bytes(limits.max_storage_buffer_binding_size),
                bytes(limits.max_buffer_size),
                bytes(limits.max_compute_workgroup_storage_size.into()),
                limits.max_compute_invocations_per_workgroup,
                limits.max_storage_buffers_per_shader_stage
            ),
            match names {
                Ok(names) => names.join("\n"),
                Err(error) => format!("does not run: {error}"),
            },
        ]);
    }
    if with_cpu {
        table.add_row(["cpu", "the CPU backend", "", "", &format!("{threads} threads"), "rayon and pulp"]);
    }
    anstream::println!("{table}");
}

fn kind(info: &wgpu_attention::wgpu::AdapterInfo) -> &'static str {
    use wgpu_attention::wgpu::DeviceType;
    match info.device_type {
        DeviceType::DiscreteGpu => "discrete GPU",
        DeviceType::IntegratedGpu => "integrated GPU",
        DeviceType::VirtualGpu => "virtual GPU",
        DeviceType::Cpu => "software",
        DeviceType::Other => "other",
    }
}

/// What the compilers' listings predict of the kernels, for a GPU.
fn predicted(info: &wgpu_attention::wgpu::AdapterInfo, names: &Result<Vec<String>>) -> Option<f64> {
    let kind = GpuKind::of(info.vendor, &info.name);
    let is_gpu = info.device_type != wgpu_attention::wgpu::DeviceType::Cpu;
    let share = names.as_ref().ok()?.iter().find_map(|name| predicted_share(kind, name));
    share.filter(|_| is_gpu).map(|share| share * 100.0)
}

fn print_json(opened: &[(AdapterSummary, Result<Vec<String>>)], with_cpu: bool, threads: usize) -> Result<()> {
    let mut rows: Vec<serde_json::Value> = opened
        .iter()
        .map(|(adapter, names)| {
            let AdapterSummary { index, info, limits, features, .. } = adapter;
            let has: Vec<&str> = FEATURES.iter().filter(|(_, bit)| features.contains(*bit)).map(|(n, _)| *n).collect();
            json!({
                "index": index,
                "name": info.name,
                "backend": backend_name(info.backend),
                "driver": info.driver,
                "driver_info": info.driver_info,
                "type": kind(info),
                "subgroup_min_size": info.subgroup_min_size,
                "subgroup_max_size": info.subgroup_max_size,
                "features": has,
                "limits": {
                    "max_storage_buffer_binding_size": limits.max_storage_buffer_binding_size,
                    "max_buffer_size": limits.max_buffer_size,
                    "max_compute_workgroup_storage_size": limits.max_compute_workgroup_storage_size,
                    "max_compute_invocations_per_workgroup": limits.max_compute_invocations_per_workgroup,
                    "max_storage_buffers_per_shader_stage": limits.max_storage_buffers_per_shader_stage,
                },
                "kernels": names.as_ref().ok(),
                // The kernel of a call of width 64.
                "predicted_percent_of_ceiling": predicted(info, names),
                "error": names.as_ref().err().map(|error| error.to_string()),
            })
        })
        .collect();
    if with_cpu {
        rows.push(json!({ "index": null, "name": "cpu", "backend": "cpu", "type": "CPU backend", "threads": threads }));
    }
    let text = serde_json::to_string_pretty(&rows).map_err(|error| Error::Failed(error.to_string()))?;
    anstream::println!("{text}");
    Ok(())
}
