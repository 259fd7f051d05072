//! Runs the suite in worker processes: enumerates adapters and runs their cases, even if drivers hang or crash.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use wgpu_attention::Device;

use super::args::SuiteArgs;
use super::known::Issues;
use super::on_dawn;
use super::plan::Selection;
use super::worker::{Line, Order, Place, Waited, Worker};
use crate::check::report::{Adapter, CaseResult};
use crate::error::{Error, Result, fail, usage};
use crate::progress::Bar;

/// After this many hangs and crashes the rest of an adapter's cases are not run.
const MOST_CRASHES: usize = 3;

/// The adapters that match `--adapter`, or else `WGPU_ADAPTER_NAME`. If neither is given: all adapters and the CPU
/// backend. Adapters whose driver crashed during enumeration are returned separately.
pub fn places(adapter: Option<&str>, args: &SuiteArgs) -> Result<(Vec<Place>, Vec<Adapter>)> {
    let limit = Duration::from_secs(args.time_limit);
    let by_environment = std::env::var("WGPU_ADAPTER_NAME").ok().filter(|name| !name.is_empty());
    let which = adapter.or(by_environment.as_deref()).unwrap_or("all");
    if which.eq_ignore_ascii_case("cpu") {
        return Ok((vec![Place::Cpu], Vec::new()));
    }
    let which = Some(which).filter(|which| !which.eq_ignore_ascii_case("all"));
    let list = |backend: Option<&str>| -> Result<(Vec<Place>, Vec<Place>), String> {
        let order =
            Order::List { backend: backend.map(str::to_string), which: which.map(str::to_string), fault: args.plant };
        match Worker::start(&order).map_err(|error| error.to_string())?.wait(limit) {
            Waited::Line(Line::Adapters { all, called }) => Ok((all, called)),
            Waited::Line(_) => Err("an unexpected answer".into()),
            Waited::Hung => Err(format!("no answer within {} s", limit.as_secs())),
            Waited::Ended(how) => Err(how),
        }
    };
    let mut broken = Vec::new();
    let (mut all, called) = match list(None) {
        Ok(found) => found,
        // A driver hangs or crashes during enumeration. List each backend separately to find it and keep the others.
        Err(_) => {
            let (mut all, mut called) = (Vec::new(), Vec::new());
            for backend in ["vulkan", "metal", "dx12", "gl"] {
                match list(Some(backend)) {
                    Ok(found) => {
                        all.extend(found.0);
                        called.extend(found.1);
                    }
                    Err(how) => broken.push(Adapter {
                        name: "unknown".into(),
                        backend: backend.into(),
                        ended: Some(format!("listing its adapters: {how}")),
                        ..Adapter::default()
                    }),
                }
            }
            (all, called)
        }
    };
    match which {
        None if all.is_empty() && broken.is_empty() => Err(Error::NoAdapter(
            "there is no GPU adapter: install a driver (Mesa's llvmpipe runs on any processor), or check only the CPU \
             backend with --adapter cpu"
                .into(),
        )),
        None => {
            all.push(Place::Cpu);
            Ok((all, broken))
        }
        Some(_) if !called.is_empty() => Ok((called, Vec::new())),
        Some(which) => {
            all.push(Place::Cpu);
            let known: Vec<String> = all.iter().map(Place::to_string).collect();
            let crashed: Vec<_> =
                broken.into_iter().filter_map(|adapter| Some((adapter.backend, adapter.ended?))).collect();
            let crashed: String = crashed.iter().map(|(backend, how)| format!("; {backend}: {how}")).collect();
            Err(Error::NoAdapter(format!("no adapter answers to \"{which}\"; there are {}{crashed}", known.join(", "))))
        }
    }
}

/// Where a folder of cases runs: on the best adapter, on a named one or on all; on the CPU backend if there is no
/// adapter.
pub fn folder_places(adapter: Option<&str>, args: &SuiteArgs) -> Result<(Vec<Place>, Vec<Adapter>)> {
    if adapter.is_some_and(|which| which.eq_ignore_ascii_case("all")) {
        return match places(adapter, args) {
            Err(Error::NoAdapter(_)) => Ok((vec![Place::Cpu], Vec::new())),
            found => found,
        };
    }
    match one_place(adapter, args) {
        // A named adapter that does not exist is an error, never a fallback.
        Err(Error::NoAdapter(_)) if adapter.is_none() && std::env::var_os("WGPU_ADAPTER_NAME").is_none() => {
            anstream::eprintln!("{}", Device::fallback_notice("wgpu found none that can compute"));
            Ok((vec![Place::Cpu], Vec::new()))
        }
        found => Ok((vec![found?], Vec::new())),
    }
}

/// The place where a single case runs.
pub fn one_place(adapter: Option<&str>, args: &SuiteArgs) -> Result<Place> {
    let (places, broken) = places(adapter, args)?;
    match broken.into_iter().find_map(|adapter| Some((adapter.backend, adapter.ended?))) {
        // Never fall back to the CPU backend.
        Some((backend, how)) if places == [Place::Cpu] => fail!("{backend}: {how}"),
        _ => Ok(places.into_iter().next().unwrap_or(Place::Cpu)),
    }
}

/// Dawn, with plans made on the first adapter.
pub fn dawn(places: &[Place]) -> Result<Place> {
    let planner = places.iter().find_map(|place| match place {
        Place::Gpu { index, alone, .. } => Some(Place::Dawn { index: *index, alone: alone.clone() }),
        _ => None,
    });
    match planner {
        Some(place) => Ok(place),
        None => usage!("--dawn needs an adapter to make plans on"),
    }
}

/// Runs the cases of one adapter, even if its driver hangs or crashes. `lines` of a result are printed as soon as it is
/// available.
pub fn run(
    place: &Place,
    args: &SuiteArgs,
    selection: &Selection,
    issues: &Issues,
    lines: impl Fn(&Adapter, &CaseResult) -> Vec<String>,
) -> Result<(Adapter, Vec<CaseResult>)> {
    let limit = match place {
        // Dawn has its own time limit, which gives a better reason.
        Place::Dawn { .. } => on_dawn::patience(Duration::from_secs(args.time_limit)),
        _ => Duration::from_secs(args.time_limit),
    };
    let start = Instant::now();
    let mut adapter = Adapter { name: place.to_string(), ..Adapter::default() };
    if let Place::Gpu { name, backend, .. } = place {
        (adapter.name, adapter.backend) = (name.clone(), backend.clone());
    }
    let (mut results, mut from, mut total, mut crashes) = (Vec::new(), 0, 0, 0);
    let mut bar: Option<Bar> = None;
    'worker: loop {
        let (on, selection) = (place.clone(), selection.clone());
        let order = Order::Run { on, selection, from, fault: args.plant, limit: args.time_limit };
        let mut worker = Worker::start(&order)?;
        let mut running: Option<(usize, CaseResult)> = None;
        let mut keep = |mut result: CaseResult, adapter: &Adapter, bar: &Option<Bar>| {
            issues.apply(adapter, &mut result);
            for line in lines(adapter, &result) {
                match bar {
                    Some(bar) => bar.line(&line),
                    None => anstream::println!("{line}"),
                }
            }
            results.push(result);
        };
        let failure = loop {
            match worker.wait(limit) {
                Waited::Line(Line::Adapter { adapter: found, items }) => {
                    (adapter, total) = (found, items);
                    bar.get_or_insert_with(|| Bar::new(items));
                }
                Waited::Line(Line::Start { at, blank }) => {
                    if let Some((_, lost)) = running.replace((at, blank)) {
                        let reason = Some("the worker sent no result".into());
                        keep(CaseResult { reason, ..lost }, &adapter, &bar);
                    }
                }
                Waited::Line(Line::Result(result)) => {
                    running = None;
                    if let Some(bar) = &mut bar {
                        bar.step(&result.id);
                    }
                    keep(result, &adapter, &bar);
                }
                Waited::Line(Line::End) => {
                    if results.len() != total {
                        adapter.ended = Some(format!("only {} results for {total} cases", results.len()));
                    }
                    break 'worker;
                }
                Waited::Line(Line::Refused(reason)) => {
                    adapter.ended = Some(format!("the device could not be opened: {reason}"));
                    break 'worker;
                }
                Waited::Line(Line::Adapters { .. } | Line::Cases(_) | Line::Observed(_)) => {}
                Waited::Hung => {
                    let seconds = limit.as_secs();
                    break format!("hung: no answer within {seconds} s (--time-limit){}", worker.complaints());
                }
                Waited::Ended(how) => break format!("crashed: {how}"),
            }
        };
        crashes += 1;
        let Some((at, result)) = running else {
            adapter.ended = Some(format!("{failure}, between cases or before the first one"));
            break;
        };
        from = at + 1;
        let id = result.id.clone();
        keep(CaseResult { reason: Some(format!("the driver {failure}")), ..result }, &adapter, &bar);
        if crashes == MOST_CRASHES {
            adapter.ended = Some(format!(
                "stopped after {crashes} hangs and crashes, the last in {id}; {} of {total} cases were not run",
                total - from.min(total)
            ));
            break;
        }
    }
    if matches!(place, Place::Gpu { .. }) && adapter.ended.is_none() {
        observe(place, &mut adapter, &mut results, limit)?;
    }
    adapter.seconds = start.elapsed().as_secs_f64();
    Ok((adapter, results))
}

/// Observes how workgroups of the sizes that ran execute on the device. This runs in its own process, so that a failure
/// here is not attributed to a case. Without an answer the sizes stay unknown.
fn observe(place: &Place, adapter: &mut Adapter, results: &mut [CaseResult], limit: Duration) -> Result<()> {
    let workgroups: BTreeSet<u32> = results.iter().filter_map(|result| result.workgroup).collect();
    if workgroups.is_empty() {
        return Ok(());
    }
    match Worker::start(&Order::Observe { on: place.clone(), workgroups })?.wait(limit) {
        Waited::Line(Line::Observed(seen)) => adapter.observed = seen,
        Waited::Line(_) => {}
        Waited::Hung => adapter.ended = Some("hung after all cases, while observing subgroups".into()),
        Waited::Ended(how) => {
            adapter.ended = Some(format!("ended after all cases, while observing subgroups: {how}"));
        }
    }
    for result in results {
        let seen = adapter.observed.iter().find(|seen| Some(seen.workgroup) == result.workgroup);
        result.subgroup = seen.and_then(|seen| seen.subgroup);
    }
    Ok(())
}
