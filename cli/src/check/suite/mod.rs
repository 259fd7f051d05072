//! `attn check` without a folder: the suite that the program carries, on every adapter.

mod faults;
mod judge;
mod known;
mod messages;
mod observe;
mod on_dawn;
mod plan;
mod shrink;
mod worker;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;

use super::report::{self, Adapter, CaseResult, Report, Status, Tally};
use crate::error::{Error, Result, fail, usage};
use crate::progress::Bar;
use faults::Fault;
use known::Issues;
use plan::{Item, Selection};
use worker::{Line, Order, Place, Waited, Worker};

pub use worker::work;

#[derive(Args, Debug)]
#[command(next_help_heading = "Suite")]
pub struct SuiteArgs {
    /// Some hundred cases instead of thousands
    #[arg(long)]
    quick: bool,
    /// Only this op (attention, softmax, onnx, torch ...); may be repeated
    #[arg(long = "op", value_name = "NAME")]
    ops: Vec<String>,
    /// Only this variant (auto, fused, three-passes, a cut such as rows4x64/keys4); may be repeated
    #[arg(long = "variant", value_name = "NAME", value_parser = parse_variant)]
    variants: Vec<String>,
    /// Print the cases, and run none
    #[arg(long, conflicts_with = "Forms")]
    list: bool,
    /// What random cases are drawn from
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// How long a case may take, compilation included, before its driver counts as hung
    #[arg(long, value_name = "SECONDS", default_value_t = 120, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    time_limit: u64,
    /// Run one case, by the id that a report gives
    #[arg(long, value_name = "CASE-ID", conflicts_with = "Forms")]
    repro: Option<String>,
    /// Make the case of --repro as small as it still fails, and print all that a bug report needs
    #[arg(long, requires = "repro", conflicts_with = "dawn")]
    shrink: bool,
    /// Known faults of drivers, instead of those that the program carries
    #[arg(long, value_name = "FILE")]
    known_issues: Option<PathBuf>,
    /// Break something on purpose, to see that it is found
    #[arg(long, value_name = "FAULT", value_enum)]
    plant: Option<Fault>,
    /// Run single calls on Dawn for Node too, Chrome's WebGPU, from exported plans (ATTN_DAWN says where it is)
    #[arg(long)]
    dawn: bool,
    /// For the program's own use
    #[arg(long, hide = true, value_name = "ORDER")]
    pub worker: Option<String>,
}

fn parse_variant(text: &str) -> Result<String, String> {
    text.parse().map(plan::variant).map_err(|error: wgpu_attention::Error| error.to_string())
}

/// After so many hangs and crashes an adapter is given up.
const MOST_FALLS: usize = 3;

impl SuiteArgs {
    fn selection(&self, filter: Option<&str>) -> Selection {
        Selection {
            quick: self.quick,
            seed: self.seed,
            ops: self.ops.clone(),
            variants: self.variants.clone(),
            filter: filter.map(str::to_string),
        }
    }

    /// Whether any option is given that a check of a folder does not take.
    pub fn any(&self) -> Option<&'static str> {
        let given = [
            ("--quick", self.quick),
            ("--op", !self.ops.is_empty()),
            ("--variant", !self.variants.is_empty()),
            ("--list", self.list),
            ("--repro", self.repro.is_some()),
            ("--known-issues", self.known_issues.is_some()),
            ("--plant", self.plant.is_some()),
            ("--dawn", self.dawn),
        ];
        given.into_iter().find_map(|(name, given)| given.then_some(name))
    }
}

/// A version out of the lock file that the program was built with.
fn locked(package: &str) -> String {
    let lock = include_str!("../../../../Cargo.lock");
    let name = format!("name = \"{package}\"");
    let mut lines = lock.lines().skip_while(|line| *line != name).skip(1);
    let version = lines.next().and_then(|line| line.strip_prefix("version = \""));
    version.map_or("unknown", |version| version.trim_end_matches('"')).to_string()
}

/// The adapters that `--adapter` means: all of them, and the CPU backend, unless one is named.
fn places(adapter: Option<&str>, limit: Duration) -> Result<(Vec<Place>, Vec<Adapter>)> {
    let which = adapter.unwrap_or("all");
    if which.eq_ignore_ascii_case("cpu") {
        return Ok((vec![Place::Cpu], Vec::new()));
    }
    let list = |backend: Option<&str>| -> Result<Vec<Place>, String> {
        let order = Order::List { backend: backend.map(str::to_string) };
        match Worker::start(&order).map_err(|error| error.to_string())?.wait(limit) {
            Waited::Line(Line::Adapters(places)) => Ok(places),
            Waited::Line(_) => Err("an odd answer".into()),
            Waited::Hung => Err(format!("no answer within {} s", limit.as_secs())),
            Waited::Ended(how) => Err(how),
        }
    };
    let mut broken = Vec::new();
    let mut found = match list(None) {
        Ok(places) => places,
        // One driver hangs or falls even when it is looked at: which, and what about the others?
        Err(_) => {
            let mut all = Vec::new();
            for backend in ["vulkan", "metal", "dx12", "gl"] {
                match list(Some(backend)) {
                    Ok(places) => all.extend(places),
                    Err(how) => broken.push(Adapter {
                        name: "unknown".into(),
                        backend: backend.into(),
                        ended: Some(format!("listing its adapters: {how}")),
                        ..Adapter::default()
                    }),
                }
            }
            all
        }
    };
    if which.eq_ignore_ascii_case("all") {
        if found.is_empty() && broken.is_empty() {
            return Err(Error::NoAdapter(
                "there is no GPU adapter: install a driver (Mesa's llvmpipe runs on any processor), or check the CPU \
                 backend alone with --adapter cpu"
                    .into(),
            ));
        }
        found.push(Place::Cpu);
        return Ok((found, broken));
    }
    let is_named = |place: &Place| match place {
        Place::Cpu | Place::Dawn { .. } => false,
        Place::Gpu { index, name, backend } => {
            backend.eq_ignore_ascii_case(which)
                || which.parse() == Ok(*index)
                || which.parse::<usize>().is_err() && name.to_lowercase().contains(&which.to_lowercase())
        }
    };
    match found.iter().find(|place| is_named(place)) {
        Some(place) => Ok((vec![place.clone()], Vec::new())),
        None => {
            found.push(Place::Cpu);
            let known: Vec<String> = found.iter().map(Place::to_string).collect();
            Err(Error::NoAdapter(format!("no adapter answers to \"{which}\"; there are {}", known.join(", "))))
        }
    }
}

/// The first adapter, which Dawn's plans are made on.
fn first_gpu(places: &[Place]) -> Result<usize> {
    let index = |place: &Place| if let Place::Gpu { index, .. } = place { Some(*index) } else { None };
    match places.iter().find_map(index) {
        Some(index) => Ok(index),
        None => usage!("--dawn needs an adapter that plans are made for"),
    }
}

/// The cases of one adapter, however its driver behaves.
fn run_place(
    place: &Place,
    args: &SuiteArgs,
    selection: &Selection,
    issues: &Issues,
) -> Result<(Adapter, Vec<CaseResult>)> {
    let limit = Duration::from_secs(args.time_limit);
    let start = Instant::now();
    let mut adapter = Adapter { name: place.to_string(), ..Adapter::default() };
    if let Place::Gpu { name, backend, .. } = place {
        (adapter.name, adapter.backend) = (name.clone(), backend.clone());
    }
    let (mut results, mut from, mut total, mut falls) = (Vec::new(), 0, 0, 0);
    let mut bar: Option<Bar> = None;
    'worker: loop {
        let order = Order::Run { on: place.clone(), selection: selection.clone(), from, fault: args.plant };
        let mut worker = Worker::start(&order)?;
        let mut running: Option<(usize, CaseResult)> = None;
        let fallen = loop {
            match worker.wait(limit) {
                Waited::Line(Line::Adapter { adapter: told, items }) => {
                    (adapter, total) = (told, items);
                    bar.get_or_insert_with(|| Bar::new(items));
                }
                Waited::Line(Line::Start { at, blank }) => running = Some((at, blank)),
                Waited::Line(Line::Result(mut result)) => {
                    running = None;
                    issues.apply(&adapter, &mut result);
                    if let Some(bar) = &mut bar {
                        bar.step(&result.id);
                    }
                    results.push(result);
                }
                Waited::Line(Line::End(observed)) => {
                    adapter.observed = observed;
                    break 'worker;
                }
                Waited::Line(Line::Refused(reason)) => {
                    adapter.ended = Some(format!("the device does not open: {reason}"));
                    break 'worker;
                }
                Waited::Line(Line::Adapters(_)) => {}
                Waited::Hung => break format!("hung: no answer within {} s", args.time_limit),
                Waited::Ended(how) => break format!("crashed: {how}"),
            }
        };
        falls += 1;
        let Some((at, mut result)) = running else {
            adapter.ended = Some(format!("{fallen}, between cases or before the first"));
            break;
        };
        from = at + 1;
        result.reason = Some(format!("the driver {fallen}"));
        issues.apply(&adapter, &mut result);
        results.push(result);
        if falls == MOST_FALLS {
            adapter.ended = Some(format!(
                "given up after {falls} hangs and crashes, the last in {}; {} of {total} cases have not run",
                results.last().map_or("", |last| &last.id),
                total - from.min(total)
            ));
            break;
        }
    }
    adapter.seconds = start.elapsed().as_secs_f64();
    Ok((adapter, results))
}

/// Runs the suite; gives the report and whether all is well.
fn run(args: &SuiteArgs, filter: Option<&str>, adapter: Option<&str>) -> Result<Report> {
    let issues = Issues::read(args.known_issues.as_deref())?;
    let selection = args.selection(filter);
    if let Some(odd) = selection.ops.iter().find(|op| !plan::ops().any(|known| known == op.as_str())) {
        usage!("there is no op \"{odd}\"; there are {}", plan::ops().collect::<Vec<_>>().join(", "));
    }
    let (mut places, broken) = places(adapter, Duration::from_secs(args.time_limit))?;
    if args.dawn {
        on_dawn::dawn()?;
        places.push(Place::Dawn { index: first_gpu(&places)? });
    }
    let chosen = !(args.ops.is_empty() && args.variants.is_empty() && filter.is_none());
    let mut report = Report {
        schema: report::SCHEMA.into(),
        version: env!("CARGO_PKG_VERSION").into(),
        wgpu: locked("wgpu"),
        naga: locked("naga"),
        suite: if chosen {
            "chosen"
        } else if args.quick {
            "quick"
        } else {
            "full"
        }
        .into(),
        seed: args.seed,
        date: jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
        host: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
        adapters: broken,
        results: Vec::new(),
    };
    for place in places {
        let (adapter, results) = run_place(&place, args, &selection, &issues)?;
        let at = report.adapters.len();
        report.adapters.push(adapter);
        report.results.extend(results.into_iter().map(|result| CaseResult { adapter: at, ..result }));
    }
    if report.results.is_empty() && report.adapters.iter().all(|adapter| adapter.ended.is_none()) {
        fail!("no case is left by --op, --variant and --filter; `attn check --list` prints all");
    }
    Ok(report)
}

/// One case, in this process.
fn repro(id: &str, args: &SuiteArgs, adapter: Option<&str>) -> Result<bool> {
    let item = Item::parse(id)?;
    // A file that cannot be read is known before anything runs.
    let issues = Issues::read(args.known_issues.as_deref())?;
    let limit = Duration::from_secs(args.time_limit);
    let place = match adapter {
        Some(which) if which.eq_ignore_ascii_case("all") => usage!("--repro runs on one adapter"),
        _ => places(adapter, limit)?.0.remove(0),
    };
    messages::listen();
    if args.dawn {
        let (dawn, index) = (on_dawn::dawn()?, first_gpu(&[place])?);
        let place = Place::Dawn { index };
        let (adapter, mut results) = on_dawn::run(&dawn, &on_dawn::planner(index, args.plant)?, &[item])?;
        for result in &mut results {
            issues.apply(&adapter.clone().unwrap_or_default(), result);
            print(result, &place);
        }
        return Ok(Tally::of(&results).is_good());
    }
    let device = worker::open(&place, args.plant).map_err(Error::Failed)?;
    let mut result = judge::run(&item, &device);
    issues.apply(&observe::adapter(&device), &mut result);
    if !args.shrink || result.status != Status::Failed {
        print(&result, &place);
        return Ok(Tally::of([&result]).is_good());
    }
    let (item, result, tried) = shrink::shrink(&item, &device);
    anstream::println!("{id} fails; the smallest of {tried} that were tried and fail too:\n");
    print(&result, &place);
    let name = adapter.map_or("0".into(), str::to_string);
    anstream::print!("{}", shrink::describe(&item, &result, &device, &name));
    Ok(false)
}

fn print(result: &CaseResult, place: &Place) {
    anstream::println!("{}: {} on {place}", result.status.word(), result.id);
    for (what, text) in [("why", &result.reason), ("issue", &result.issue), ("kernels because", &result.why)] {
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
        Some(true) => "the same bits again",
        Some(false) => "other bits the second time",
        None => "not run a second time",
    };
    anstream::println!("  {bits}, {:.1} ms with compilation", result.milliseconds);
}

/// Whether all is well.
pub fn check(
    args: &SuiteArgs,
    filter: Option<&str>,
    adapter: Option<&str>,
    finish: impl FnOnce(&Report) -> Result<()>,
) -> Result<bool> {
    if let Some(id) = &args.repro {
        return repro(id, args, adapter);
    }
    if args.list {
        let place = places(adapter, Duration::from_secs(args.time_limit))?.0.remove(0);
        let device = worker::open(&place, None).map_err(Error::Failed)?;
        for item in plan::items(&device, &args.selection(filter)) {
            anstream::println!("{}", item.id());
        }
        return Ok(true);
    }
    let report = run(args, filter, adapter)?;
    finish(&report)?;
    let tally = Tally::of(&report.results);
    Ok(tally.is_good() && report.adapters.iter().all(|adapter| adapter.ended.is_none()))
}
