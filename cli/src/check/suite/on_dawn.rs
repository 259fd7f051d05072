//! Cases as exported plans, on Dawn for Node.

use std::time::Duration;

use wgpu_attention::{Device, ExportedCall, Gpu, GpuOptions, wgpu};
use wgpu_attention_conformance::Case as Drawn;

use super::faults::Fault;
use super::judge;
use super::plan::{Item, Work};
use crate::check::dawn::{Dawn, START};
use crate::check::report::{Adapter, CaseResult};
use crate::check::stop::Stop;
use crate::error::{Result, usage};

/// Plans that one process of Node runs: they lie in files until all are done.
pub const PLANS: usize = 8;

/// Dawn, where the environment says it is; `limit` is for both runs of a plan.
pub fn dawn(limit: Duration) -> Result<Dawn> {
    let Some(dawn) = Dawn::from_environment(limit) else {
        usage!(
            "--dawn needs ATTN_DAWN, a folder with node_modules/webgpu (tests/portability/install-dawn makes \
             target/portability one), and where Dawn shall have another Vulkan driver, ATTN_DAWN_DRIVER, its manifest"
        );
    };
    Ok(dawn)
}

/// How long to wait for a worker where a plan may take `limit`: Dawn itself tells sooner.
pub fn patience(limit: Duration) -> Duration {
    limit + START + Duration::from_secs(30)
}

/// What plans are made on: an adapter with WebGPU's own limits and without subgroups.
pub fn planner(index: usize, fault: Option<Fault>) -> Result<Device> {
    let mut options = GpuOptions::adapter(index.to_string()).without_subgroups(true).limits(wgpu::Limits::default());
    options.rewrite = fault.and_then(Fault::rewrite);
    Ok(Device::Gpu(Gpu::with_options(&options)?))
}

/// The case of an item that is one forward call, which another implementation of WebGPU can run as a plan.
fn exportable(item: &Item) -> Option<&Drawn> {
    match &item.work {
        Work::Drawn(case) if case.op.is_one_call() => Some(case),
        _ => None,
    }
}

/// Those that [`run`] takes.
pub fn items(all: Vec<Item>) -> Vec<Item> {
    all.into_iter().filter(|item| exportable(item).is_some()).collect()
}

/// Tells the adapter that Dawn chose, as soon as it is known, and the results in the order of the items.
pub fn run(
    dawn: &Dawn,
    device: &Device,
    items: &[Item],
    mut tell: impl FnMut(Option<Adapter>, CaseResult),
) -> Result<()> {
    let calls: Vec<(&Item, &Drawn, Result<ExportedCall, Stop>)> = (items.iter())
        .filter_map(|item| {
            let case = exportable(item)?;
            let call = case.export(device, item.method).map_err(Stop::from);
            let call = call.and_then(|call| call.ok_or_else(|| Stop::Skip("it is no single call".into())));
            Some((item, case, call))
        })
        .collect();
    let plans: Vec<&ExportedCall> = calls.iter().filter_map(|(.., call)| call.as_ref().ok()).collect();
    let mut waiting = calls.iter();
    // What is no plan has its place between those that are.
    let mut pass = |tell: &mut dyn FnMut(Option<Adapter>, CaseResult)| {
        for (item, case, call) in waiting.by_ref() {
            match call {
                Ok(call) => return Some((item, case, call)),
                Err(stop) => tell(None, judge::stopped(item, stop)),
            }
        }
        None
    };
    dawn.run(&plans, |adapter, found| {
        if let Some((item, case, call)) = pass(&mut tell) {
            tell(adapter, judge::dawn(item, case, call, &found));
        }
    })?;
    pass(&mut tell);
    Ok(())
}
