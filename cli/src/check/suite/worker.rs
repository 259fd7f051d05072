//! The cases of one adapter in a process of their own: what hangs or falls there is no end of the report. The
//! process is told on its command line what to do, and tells what it does line by line, as JSON.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use wgpu_attention::{AdapterSummary, Device, Gpu, GpuOptions};

use super::faults::{Fault, STRIKES_AT};
use super::on_dawn::PLANS;
use super::plan::{Item, Selection, items};
use super::{judge, messages, observe, on_dawn};
use crate::check::report::{Adapter, CaseResult, Observed};
use crate::error::{Error, Result};
use crate::target::backend_name;

/// What a worker is to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Order {
    /// Tell which adapters there are, of one backend or of all, and which of them are called `which`.
    List { backend: Option<String>, which: Option<String>, fault: Option<Fault> },
    /// Tell which cases there are.
    Cases { on: Place, selection: Selection },
    /// Run cases; `limit` is how many seconds one may take.
    Run { on: Place, selection: Selection, from: usize, fault: Option<Fault>, limit: u64 },
    /// See how workgroups of these sizes run.
    Observe { on: Place, workgroups: BTreeSet<u32> },
}

/// Where cases run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Place {
    Cpu,
    /// The adapter at an index, by the name and backend that it had when adapters were listed: all of them, or those
    /// of `WGPU_BACKEND` `alone` where a driver of another fell.
    Gpu {
        index: usize,
        name: String,
        backend: String,
        alone: Option<String>,
    },
    /// Dawn for Node, over plans made for WebGPU's own limits on the adapter at an index.
    Dawn {
        index: usize,
        alone: Option<String>,
    },
}

impl Place {
    /// The one backend that is to be looked at.
    pub fn alone(&self) -> Option<&String> {
        match self {
            Place::Cpu => None,
            Place::Gpu { alone, .. } | Place::Dawn { alone, .. } => alone.as_ref(),
        }
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Place::Cpu => f.write_str("cpu"),
            Place::Dawn { .. } => f.write_str("dawn"),
            Place::Gpu { name, backend, .. } => write!(f, "{name} ({backend})"),
        }
    }
}

/// What a worker tells.
#[derive(Debug, Serialize, Deserialize)]
#[allow(clippy::large_enum_variant, reason = "one at a time")]
pub enum Line {
    Adapters {
        all: Vec<Place>,
        called: Vec<Place>,
    },
    /// Their ids.
    Cases(Vec<String>),
    Adapter {
        adapter: Adapter,
        items: usize,
    },
    Start {
        at: usize,
        blank: CaseResult,
    },
    Result(CaseResult),
    Observed(Vec<Observed>),
    /// All is done.
    End,
    /// The device does not open.
    Refused(String),
}

/// A line for the parent. Where nobody listens any more there is nothing left to do.
fn tell(line: &Line) {
    let text = serde_json::to_string(line).unwrap_or_default();
    let mut out = std::io::stdout().lock();
    // A driver may have written there without an end of line.
    if write!(out, "\n{text}\n").and_then(|()| out.flush()).is_err() {
        std::process::exit(1);
    }
}

pub fn open(place: &Place, fault: Option<Fault>) -> Result<Device, String> {
    let (index, name, backend) = match place {
        Place::Cpu => return Ok(Device::Cpu),
        Place::Dawn { .. } => return Err("Dawn runs plans, within a suite alone".into()),
        Place::Gpu { index, name, backend, .. } => (index, name, backend),
    };
    fault.iter().for_each(|fault| fault.seen());
    let rewrite = fault.and_then(Fault::rewrite);
    let mut options = GpuOptions::adapter(index.to_string());
    options.rewrite = rewrite;
    let gpu = Gpu::with_options(&options).map_err(|error| error.to_string())?;
    let found = (gpu.info().name.as_str(), backend_name(gpu.info().backend));
    if found != (name.as_str(), backend.as_str()) {
        return Err(format!("adapter {index} is {} ({}) now, not {place}", found.0, found.1));
    }
    Ok(Device::Gpu(gpu))
}

/// What the process started as a worker does.
pub fn work(order: &str) -> Result<bool> {
    let order: Order =
        serde_json::from_str(order).map_err(|error| Error::Usage(format!("no order for a worker: {error}")))?;
    match order {
        Order::List { backend, which, fault } => {
            fault.iter().for_each(|fault| fault.seen());
            let place = |adapter: &AdapterSummary| Place::Gpu {
                index: adapter.index,
                name: adapter.info.name.clone(),
                backend: backend_name(adapter.info.backend).into(),
                alone: backend.clone(),
            };
            let all = Gpu::adapters();
            let called = |adapter: &&AdapterSummary| which.as_ref().is_some_and(|which| adapter.answers_to(which));
            tell(&Line::Adapters {
                called: all.iter().filter(called).map(place).collect(),
                all: all.iter().map(place).collect(),
            });
        }
        Order::Cases { on, selection } => match open(&on, None) {
            Err(reason) => tell(&Line::Refused(reason)),
            Ok(device) => tell(&Line::Cases(items(&device, &selection).iter().map(Item::id).collect())),
        },
        Order::Run { on: Place::Dawn { index, .. }, selection, from, fault, limit } => {
            let limit = Duration::from_secs(limit);
            if let Err(reason) = run_on_dawn(index, &selection, from, fault, limit) {
                tell(&Line::Refused(reason.to_string()));
            }
        }
        Order::Run { on, selection, from, fault, .. } => {
            messages::listen(true);
            match open(&on, fault) {
                Err(reason) => tell(&Line::Refused(reason)),
                Ok(device) => run(&device, &items(&device, &selection), from, fault),
            }
        }
        Order::Observe { on, workgroups } => {
            let device = open(&on, None).map_err(Error::Failed)?;
            let seen = |gpu| workgroups.iter().filter_map(|&size| observe::observe(gpu, size).ok()).collect();
            tell(&Line::Observed(device.gpu().map_or(Vec::new(), seen)));
        }
    }
    Ok(true)
}

fn run_on_dawn(index: usize, selection: &Selection, from: usize, fault: Option<Fault>, limit: Duration) -> Result<()> {
    let dawn = on_dawn::dawn(limit)?;
    let device = on_dawn::planner(index, fault)?;
    let items = on_dawn::items(items(&device, selection));
    let unknown = Adapter { name: "Dawn".into(), backend: "Dawn".into(), ..Adapter::default() };
    tell(&Line::Adapter { adapter: unknown, items: items.len() });
    let start = |at: usize| {
        if let Some(item) = items.get(at) {
            tell(&Line::Start { at, blank: judge::blank(item) });
        }
    };
    let mut at = from;
    start(at);
    for part in items.get(from..).unwrap_or_default().chunks(PLANS) {
        on_dawn::run(&dawn, &device, part, |adapter, result| {
            if let Some(adapter) = adapter {
                tell(&Line::Adapter { adapter, items: items.len() });
            }
            tell(&Line::Result(result));
            at += 1;
            start(at);
        })?;
    }
    tell(&Line::End);
    Ok(())
}

fn run(device: &Device, items: &[Item], from: usize, fault: Option<Fault>) {
    tell(&Line::Adapter { adapter: observe::adapter(device), items: items.len() });
    for (at, item) in items.iter().enumerate().skip(from) {
        tell(&Line::Start { at, blank: judge::blank(item) });
        if let Some(fault) = fault
            && (at == STRIKES_AT || items.len() == 1)
        {
            fault.strike(device);
        }
        tell(&Line::Result(judge::run(item, device)));
    }
    tell(&Line::End);
}

/// A worker that may be waited for, but not for ever.
pub struct Worker {
    child: Child,
    lines: mpsc::Receiver<Line>,
    /// The end of what it wrote to stderr.
    complaints: Option<std::thread::JoinHandle<String>>,
}

/// What comes of waiting.
#[allow(clippy::large_enum_variant, reason = "one at a time")]
pub enum Waited {
    Line(Line),
    /// Nothing within the time limit.
    Hung,
    /// The process has ended; how, in words.
    Ended(String),
}

/// So much of stderr is kept.
const KEPT: usize = 600;

impl Worker {
    pub fn start(order: &Order) -> Result<Worker> {
        let failed = |error: &dyn std::fmt::Display| Error::Failed(format!("cannot start a worker: {error}"));
        let text = serde_json::to_string(order).map_err(|error| failed(&error))?;
        let program = std::env::current_exe().map_err(|error| failed(&error))?;
        let mut command = Command::new(program);
        command.args(["check", "--worker", &text]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // Adapters are told apart by their own index, not by what a user prefers.
        command.env_remove("WGPU_ADAPTER_NAME");
        let alone = match order {
            Order::List { backend, .. } => backend.as_ref(),
            Order::Cases { on, .. } | Order::Run { on, .. } | Order::Observe { on, .. } => on.alone(),
        };
        if let Some(backend) = alone {
            command.env("WGPU_BACKEND", backend);
        }
        let mut child = command.spawn().map_err(|error| failed(&error))?;
        let (Some(stdout), Some(mut stderr)) = (child.stdout.take(), child.stderr.take()) else {
            return Err(failed(&"it has no output"));
        };
        let (send, lines) = mpsc::channel();
        std::thread::spawn(move || {
            let (mut stdout, mut line) = (BufReader::new(stdout), Vec::new());
            while let Ok(1..) = stdout.read_until(b'\n', &mut line) {
                // A driver may write there too, and anything.
                if let Ok(line) = serde_json::from_slice(&line)
                    && send.send(line).is_err()
                {
                    break;
                }
                line.clear();
            }
        });
        let complaints = std::thread::spawn(move || {
            let (mut kept, mut chunk) = (Vec::new(), [0; 4096]);
            while let Ok(n @ 1..) = stderr.read(&mut chunk) {
                kept.extend_from_slice(&chunk[..n]);
                let over = kept.len().saturating_sub(KEPT);
                kept.drain(..over);
            }
            String::from_utf8_lossy(&kept).trim().to_string()
        });
        Ok(Worker { child, lines, complaints: Some(complaints) })
    }

    pub fn wait(&mut self, limit: Duration) -> Waited {
        match self.lines.recv_timeout(limit) {
            Ok(line) => Waited::Line(line),
            Err(RecvTimeoutError::Timeout) => Waited::Hung,
            Err(RecvTimeoutError::Disconnected) => Waited::Ended(self.last_words(limit)),
        }
    }

    /// What it has said on stderr, after a time limit has passed. It is ended.
    pub fn complaints(&mut self) -> String {
        let _ = self.child.kill();
        // What it started may hold stderr open.
        let complaints = self.complaints.take().filter(|_| ends(&mut self.child, GRACE).is_some());
        complaints
            .and_then(|complaints| complaints.join().ok())
            .filter(|text| !text.is_empty())
            .map_or_else(String::new, |text| format!("; its last words: {text}"))
    }

    fn last_words(&mut self, limit: Duration) -> String {
        // Its output is closed: the end is near, but a driver may hang in its last breath.
        let status = ends(&mut self.child, limit).unwrap_or_else(|| "no end of its own".into());
        status + &self.complaints()
    }
}

/// For a process that was killed.
const GRACE: Duration = Duration::from_secs(2);

/// How a process ends within a time.
fn ends(child: &mut Child, limit: Duration) -> Option<String> {
    let start = Instant::now();
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status.to_string()),
            Ok(None) if start.elapsed() < limit => std::thread::sleep(Duration::from_millis(5)),
            _ => return None,
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        // One that hangs in the kernel never ends; it is left.
        let _ = ends(&mut self.child, GRACE);
    }
}
