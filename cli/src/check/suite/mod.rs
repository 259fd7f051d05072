//! What `attn check` runs: the built-in suite on every adapter, or a folder of cases.

mod args;
mod faults;
mod folder;
mod judge;
mod known;
mod messages;
mod observe;
mod on_dawn;
mod plan;
mod run;
mod shrink;
mod variant;
mod worker;

use std::time::Duration;

use super::report::{self, Adapter, CaseResult, Report, Status, Tally};
use crate::error::{Error, Result, fail, usage};
use known::Issues;
use plan::{Selection, Work};
use worker::{Line, Order, Place, Waited, Worker};

pub use args::{SuiteArgs, Wanted};
pub use folder::Folder;
pub use variant::parse_method;
pub use worker::work;

fn check_ops(ops: &[String]) -> Result<()> {
    match ops.iter().find(|op| !plan::ops().any(|known| known == op.as_str())) {
        Some(odd) => usage!("there is no op \"{odd}\"; there are {}", plan::ops().collect::<Vec<_>>().join(", ")),
        None => Ok(()),
    }
}

/// Runs the suite; returns the report and whether it passed.
fn suite(args: &SuiteArgs, wanted: &Wanted<'_>) -> Result<Report> {
    let issues = Issues::read(args.known_issues.as_deref())?;
    let selection = args.selection(wanted);
    check_ops(&args.ops)?;
    let limit = Duration::from_secs(args.time_limit);
    let (mut places, broken) = places(args, wanted)?;
    if args.dawn {
        on_dawn::dawn(limit)?;
        places.push(run::dawn(&places)?);
    }
    if places == [Place::Cpu] && args.plant.is_some_and(|fault| fault.rewrite().is_some()) {
        usage!("--plant breaks kernels of adapters; the CPU backend has none");
    }
    let chosen = !(args.ops.is_empty() && args.variants.is_empty() && wanted.filter.is_none());
    let mut report = Report {
        schema: report::SCHEMA.into(),
        version: env!("CARGO_PKG_VERSION").into(),
        wgpu: env!("LOCKED_WGPU").into(),
        naga: env!("LOCKED_NAGA").into(),
        suite: if chosen {
            "chosen"
        } else if args.quick {
            "quick"
        } else {
            "full"
        }
        .into(),
        folder: wanted.folder.as_ref().map(|folder| folder.dir.display().to_string()),
        seed: if wanted.folder.is_some() { 0 } else { args.seed },
        date: jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
        host: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
        adapters: broken,
        results: Vec::new(),
    };
    let several = places.len() > 1;
    for place in places {
        let (adapter, results) = run::run(&place, args, &selection, &issues, |adapter, result| match &wanted.folder {
            Some(_) => report::lines(result, several.then_some(adapter), wanted.verbose),
            None => Vec::new(),
        })?;
        let at = report.adapters.len();
        report.adapters.push(adapter);
        report.results.extend(results.into_iter().map(|result| CaseResult { adapter: at, ..result }));
    }
    if report.results.is_empty() && report.adapters.iter().all(|adapter| adapter.ended.is_none()) {
        fail!("no case matches --op, --variant and --filter; `attn check --list` prints all");
    }
    Ok(report)
}

/// Where cases run, and the adapters whose driver crashed during enumeration.
fn places(args: &SuiteArgs, wanted: &Wanted<'_>) -> Result<(Vec<Place>, Vec<Adapter>)> {
    match &wanted.folder {
        Some(folder) => {
            // Report problems with the folder before anything runs. Its name must be UTF-8 for reports and workers.
            if folder.dir.to_str().is_none() {
                usage!("the name of the folder {} is not UTF-8", folder.dir.display());
            }
            folder.names(wanted.filter)?;
            run::folder_places(wanted.adapter, args)
        }
        None => run::places(wanted.adapter, args),
    }
}

/// The place where a single case runs.
fn one_place(args: &SuiteArgs, wanted: &Wanted<'_>) -> Result<Place> {
    match &wanted.folder {
        Some(_) => Ok(places(args, wanted)?.0.swap_remove(0)),
        None => run::one_place(wanted.adapter, args),
    }
}

/// Runs one case.
fn repro(id: &str, args: &SuiteArgs, wanted: &Wanted<'_>) -> Result<bool> {
    let item = args.selection(wanted).item(id)?;
    // Fail before anything runs if the file cannot be read.
    let issues = Issues::read(args.known_issues.as_deref())?;
    let limit = Duration::from_secs(args.time_limit);
    if wanted.adapter.is_some_and(|which| which.eq_ignore_ascii_case("all")) {
        usage!("--repro runs on one adapter");
    }
    let mut place = one_place(args, wanted)?;
    if args.dawn {
        on_dawn::dawn(limit)?;
        place = run::dawn(&[place])?;
    }
    let selection = Selection { only: Some(item.id()), folder: wanted.folder.clone(), ..Selection::default() };
    let (ran, results) = run::run(&place, args, &selection, &issues, |_, _| Vec::new())?;
    let Some(result) = results.first() else {
        match ran.ended {
            Some(how) => fail!("{place}: {how}"),
            None => fail!("{id} is not a single call, so there is no plan for it"),
        }
    };
    // A case that crashes its process, or was not judged in one, must not be repeated in this process.
    let can_shrink = matches!(item.work, Work::Drawn(_)) && result.milliseconds > 0.0 && place.alone().is_none();
    if !args.shrink || result.status != Status::Failed || !can_shrink {
        print(result, &place);
        if args.shrink {
            let why = match (&item.work, result.status) {
                (Work::Golden(_) | Work::File(_), Status::Failed) => "only drawn cases can be shrunk",
                (Work::Drawn(_), Status::Failed) => "it crashes its process",
                _ => "it does not fail",
            };
            anstream::println!("Not shrunk: {why}.");
        }
        return Ok(Tally::of(&results).is_good() && ran.ended.is_none());
    }
    messages::listen(false);
    let device = worker::open(&place, args.plant).map_err(Error::Failed)?;
    let (item, result, tried) = shrink::shrink(&item, &device);
    anstream::println!("{id} fails; the smallest case that fails in this way, of {tried} tried:\n");
    print(&result, &place);
    anstream::print!("{}", shrink::describe(&item, &result, &device, args.plant));
    Ok(false)
}

fn print(result: &CaseResult, place: &Place) {
    anstream::println!("{}: {} on {place}", result.status.word(), result.id);
    for (what, text) in
        [("why", &result.reason), ("note", &result.note), ("issue", &result.issue), ("kernels because", &result.why)]
    {
        if let Some(text) = text {
            anstream::println!("  {what}: {text}");
        }
    }
    for kernel in &result.kernels {
        anstream::println!("  kernel: {kernel}");
    }
    for message in &result.messages {
        anstream::println!("  driver or layer: {message}");
    }
    for one in &result.outputs {
        anstream::println!(
            "  {}: largest error {:.2e} ({:.1} ulp) of {:.2e} allowed, NMSE {:.1e}, worst at {:?} ({:e}, should be {:e}), {} NaN",
            one.name,
            one.max_abs,
            one.ulps,
            one.allowed,
            one.nmse,
            one.worst,
            one.got,
            one.expected,
            one.nans
        );
    }
    let bits = match result.same_bits {
        Some(true) => "the same bits in a second run",
        Some(false) => "different bits in a second run",
        None => "no second run",
    };
    anstream::println!("  {bits}, {:.1} ms including compilation", result.milliseconds);
}

/// Whether the suite passed.
pub fn check(args: &SuiteArgs, wanted: &Wanted<'_>, finish: impl FnOnce(&Report) -> Result<()>) -> Result<bool> {
    if let Some(id) = &args.repro {
        return repro(id, args, wanted);
    }
    if args.list {
        check_ops(&args.ops)?;
        let limit = Duration::from_secs(args.time_limit);
        let order = Order::Cases { on: one_place(args, wanted)?, selection: args.selection(wanted) };
        match Worker::start(&order)?.wait(limit) {
            Waited::Line(Line::Cases(ids)) => ids.iter().for_each(|id| anstream::println!("{id}")),
            Waited::Line(Line::Refused(reason)) => fail!("the device does not open: {reason}"),
            Waited::Line(_) => fail!("the worker sent an unexpected answer"),
            Waited::Hung => fail!("the driver gave no answer within {} s", args.time_limit),
            Waited::Ended(how) => fail!("the driver crashed: {how}"),
        }
        return Ok(true);
    }
    let report = suite(args, wanted)?;
    finish(&report)?;
    let tally = Tally::of(&report.results);
    Ok(tally.is_good() && report.adapters.iter().all(|adapter| adapter.ended.is_none()))
}
