//! Cases as exported plans, on Dawn for Node.

use std::time::Duration;

use wgpu_attention::{Device, Gpu, GpuOptions, wgpu};
use wgpu_attention_conformance::Case as Drawn;

use super::faults::Fault;
use super::judge;
use super::plan::{Item, Work};
use crate::check::dawn::Dawn;
use crate::check::report::{Adapter, CaseResult};
use crate::error::{Result, fail, usage};

/// Plans that one process of Node runs: few, so that the report hears of them in time.
pub const PLANS: usize = 8;
/// For both runs of one plan.
const PLAN_LIMIT: Duration = Duration::from_secs(60);

/// Dawn, where the environment says it is.
pub fn dawn() -> Result<Dawn> {
    let Some(dawn) = Dawn::from_environment(PLAN_LIMIT) else {
        usage!(
            "--dawn needs ATTN_DAWN, a folder with node_modules/webgpu (tests/portability/install-dawn makes \
             target/portability one), and where Dawn shall have another Vulkan driver, ATTN_DAWN_DRIVER, its manifest"
        );
    };
    Ok(dawn)
}

/// What plans are made on: an adapter with WebGPU's own limits and without subgroups.
pub fn planner(index: usize, fault: Option<Fault>) -> Result<Device> {
    let options = GpuOptions {
        adapter: Some(index.to_string()),
        without_subgroups: true,
        limits: Some(wgpu::Limits::default()),
        rewrite: fault.and_then(Fault::rewrite),
    };
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

/// The adapter that Dawn chose, `None` where nothing came to an end, and the results in the order of the items.
pub fn run(dawn: &Dawn, device: &Device, items: &[Item]) -> Result<(Option<Adapter>, Vec<CaseResult>)> {
    let export = |item: &Item| -> Result<_> {
        let case = exportable(item);
        match case.map(|case| case.export(device, item.method)).transpose()?.flatten() {
            Some(call) => Ok(call),
            None => fail!("{} is no single call, which a plan is made of", item.id()),
        }
    };
    let calls = items.iter().map(export).collect::<Result<Vec<_>>>()?;
    let run = dawn.run(&calls)?;
    let judged = items.iter().zip(&calls).zip(&run.results);
    let judged = judged.filter_map(|((item, call), found)| Some(judge::dawn(item, exportable(item)?, call, found)));
    Ok((run.adapter, judged.collect()))
}
