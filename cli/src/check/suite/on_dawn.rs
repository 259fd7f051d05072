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

/// Plans per Node process: their files exist until all are done.
pub const PLANS: usize = 8;

/// Dawn, at the location given by the environment; `limit` is for both runs of a plan.
pub fn dawn(limit: Duration) -> Result<Dawn> {
    let Some(dawn) = Dawn::from_environment(limit) else {
        usage!(
            "--dawn needs ATTN_DAWN, a folder with node_modules/webgpu (tests/portability/install-dawn creates it in \
             target/portability); to use another Vulkan driver for Dawn, set ATTN_DAWN_DRIVER to its manifest"
        );
    };
    Ok(dawn)
}

/// How long to wait for a worker if a plan may take `limit`; Dawn's own time limit expires sooner.
pub fn patience(limit: Duration) -> Duration {
    limit + START + Duration::from_secs(30)
}

/// The device that plans are made on: an adapter with WebGPU's default limits and without subgroups.
pub fn planner(index: usize, fault: Option<Fault>) -> Result<Device> {
    let mut options = GpuOptions::adapter(index.to_string()).without_subgroups(true).limits(wgpu::Limits::default());
    options.rewrite = fault.and_then(Fault::rewrite);
    Ok(Device::Gpu(Gpu::with_options(&options)?))
}

/// The case of an item that is a single forward call, which another WebGPU implementation can run as a plan.
fn exportable(item: &Item) -> Option<&Drawn> {
    match &item.work {
        Work::Drawn(case) if case.op.is_one_call() => Some(case),
        _ => None,
    }
}

/// The cases that [`run`] accepts.
pub fn items(all: Vec<Item>) -> Vec<Item> {
    all.into_iter().filter(|item| exportable(item).is_some()).collect()
}

/// Reports the adapter that Dawn chose, as soon as it is known, and the results in the order of the items.
pub fn run(
    dawn: &Dawn,
    device: &Device,
    items: &[Item],
    mut report: impl FnMut(Option<Adapter>, CaseResult),
) -> Result<()> {
    let calls: Vec<(&Item, &Drawn, Result<ExportedCall, Stop>)> = (items.iter())
        .filter_map(|item| {
            let case = exportable(item)?;
            let call = case.export(device, item.method).map_err(Stop::from);
            let call = call.and_then(|call| call.ok_or_else(|| Stop::Skip("it is not a single call".into())));
            Some((item, case, call))
        })
        .collect();
    let plans: Vec<&ExportedCall> = calls.iter().filter_map(|(.., call)| call.as_ref().ok()).collect();
    let mut waiting = calls.iter();
    // Report items without a plan in order, between those with one.
    let mut pass = |report: &mut dyn FnMut(Option<Adapter>, CaseResult)| {
        for (item, case, call) in waiting.by_ref() {
            match call {
                Ok(call) => return Some((item, case, call)),
                Err(stop) => report(None, judge::stopped(item, stop)),
            }
        }
        None
    };
    dawn.run(&plans, |adapter, found| {
        if let Some((item, case, call)) = pass(&mut report) {
            report(adapter, judge::dawn(item, case, call, &found));
        }
    })?;
    pass(&mut report);
    Ok(())
}
