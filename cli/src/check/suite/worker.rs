//! Runs the cases of one adapter in a separate process, so that a hang or crash does not end the report. The process
//! gets its order on the command line and reports its progress as lines of JSON.

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

/// An order for a worker.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Order {
    /// List the adapters of one backend or of all, and which of them match `which`.
    List { backend: Option<String>, which: Option<String>, fault: Option<Fault> },
    /// List the cases.
    Cases { on: Place, selection: Selection },
    /// Run cases; `limit` is the time limit of one case in seconds.
    Run { on: Place, selection: Selection, from: usize, fault: Option<Fault>, limit: u64 },
    /// Observe how workgroups of these sizes run.
    Observe { on: Place, workgroups: BTreeSet<u32> },
}

/// Where cases run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Place {
    Cpu,
    /// The adapter at an index, with its name and backend at enumeration. The index counts all adapters, or only those
    /// of the backend `alone` if the driver of another backend crashed.
    Gpu {
        index: usize,
        name: String,
        backend: String,
        alone: Option<String>,
    },
    /// Dawn for Node, with plans made for WebGPU's default limits on the adapter at an index.
    Dawn {
        index: usize,
        alone: Option<String>,
    },
}

impl Place {
    /// The only backend to enumerate, if any.
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

/// A message from a worker.
#[derive(Debug, Serialize, Deserialize)]
#[allow(clippy::large_enum_variant, reason = "one at a time")]
pub enum Line {
    Adapters {
        all: Vec<Place>,
        called: Vec<Place>,
    },
    /// The ids of the cases.
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
    /// All cases are done.
    End,
    /// The device could not be opened.
    Refused(String),
}

/// Sends a line to the parent. Exits if the parent no longer listens.
fn send(line: &Line) {
    let text = serde_json::to_string(line).unwrap_or_default();
    let mut out = std::io::stdout().lock();
    // A driver may have written to stdout without a final newline.
    if write!(out, "\n{text}\n").and_then(|()| out.flush()).is_err() {
        std::process::exit(1);
    }
}

pub fn open(place: &Place, fault: Option<Fault>) -> Result<Device, String> {
    let (index, name, backend) = match place {
        Place::Cpu => return Ok(Device::Cpu),
        Place::Dawn { .. } => return Err("Dawn runs plans, and only within a suite".into()),
        Place::Gpu { index, name, backend, .. } => (index, name, backend),
    };
    fault.iter().for_each(|fault| fault.seen());
    let rewrite = fault.and_then(Fault::rewrite);
    let mut options = GpuOptions::adapter(index.to_string());
    options.rewrite = rewrite;
    let gpu = Gpu::with_options(&options).map_err(|error| error.to_string())?;
    let found = (gpu.info().name.as_str(), backend_name(gpu.info().backend));
    if found != (name.as_str(), backend.as_str()) {
        return Err(format!("adapter {index} is now {} ({}), not {place}", found.0, found.1));
    }
    Ok(Device::Gpu(gpu))
}

/// The main function of a worker process.
pub fn work(order: &str) -> Result<bool> {
    let order: Order = serde_json::from_str(order)
        .map_err(|error| Error::Usage(format!("not a valid order for a worker: {error}")))?;
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
            send(&Line::Adapters {
                called: all.iter().filter(called).map(place).collect(),
                all: all.iter().map(place).collect(),
            });
        }
        Order::Cases { on, selection } => match open(&on, None) {
            Err(reason) => send(&Line::Refused(reason)),
            Ok(device) => send(&Line::Cases(items(&device, &selection).iter().map(Item::id).collect())),
        },
        Order::Run { on: Place::Dawn { index, .. }, selection, from, fault, limit } => {
            let limit = Duration::from_secs(limit);
            if let Err(reason) = run_on_dawn(index, &selection, from, fault, limit) {
                send(&Line::Refused(reason.to_string()));
            }
        }
        Order::Run { on, selection, from, fault, .. } => {
            messages::listen(true);
            match open(&on, fault) {
                Err(reason) => send(&Line::Refused(reason)),
                Ok(device) => run(&device, &items(&device, &selection), from, fault),
            }
        }
        Order::Observe { on, workgroups } => {
            let device = open(&on, None).map_err(Error::Failed)?;
            let seen = |gpu| workgroups.iter().filter_map(|&size| observe::observe(gpu, size).ok()).collect();
            send(&Line::Observed(device.gpu().map_or(Vec::new(), seen)));
        }
    }
    Ok(true)
}

fn run_on_dawn(index: usize, selection: &Selection, from: usize, fault: Option<Fault>, limit: Duration) -> Result<()> {
    let dawn = on_dawn::dawn(limit)?;
    let device = on_dawn::planner(index, fault)?;
    let items = on_dawn::items(items(&device, selection));
    let unknown = Adapter { name: "Dawn".into(), backend: "Dawn".into(), ..Adapter::default() };
    send(&Line::Adapter { adapter: unknown, items: items.len() });
    let start = |at: usize| {
        if let Some(item) = items.get(at) {
            send(&Line::Start { at, blank: judge::blank(item) });
        }
    };
    let mut at = from;
    start(at);
    for part in items.get(from..).unwrap_or_default().chunks(PLANS) {
        on_dawn::run(&dawn, &device, part, |adapter, result| {
            if let Some(adapter) = adapter {
                send(&Line::Adapter { adapter, items: items.len() });
            }
            send(&Line::Result(result));
            at += 1;
            start(at);
        })?;
    }
    send(&Line::End);
    Ok(())
}

fn run(device: &Device, items: &[Item], from: usize, fault: Option<Fault>) {
    send(&Line::Adapter { adapter: observe::adapter(device), items: items.len() });
    for (at, item) in items.iter().enumerate().skip(from) {
        send(&Line::Start { at, blank: judge::blank(item) });
        if let Some(fault) = fault
            && (at == STRIKES_AT || items.len() == 1)
        {
            fault.strike(device);
        }
        send(&Line::Result(judge::run(item, device)));
    }
    send(&Line::End);
}

/// A worker process; waiting for it has a time limit.
pub struct Worker {
    child: Child,
    lines: mpsc::Receiver<Line>,
    /// The end of its stderr.
    complaints: Option<std::thread::JoinHandle<String>>,
}

/// The result of waiting for a worker.
#[allow(clippy::large_enum_variant, reason = "one at a time")]
pub enum Waited {
    Line(Line),
    /// No line within the time limit.
    Hung,
    /// The process has ended, with a description of how.
    Ended(String),
}

/// How many bytes of stderr are kept.
const KEPT: usize = 600;

impl Worker {
    pub fn start(order: &Order) -> Result<Worker> {
        let failed = |error: &dyn std::fmt::Display| Error::Failed(format!("cannot start a worker: {error}"));
        let text = serde_json::to_string(order).map_err(|error| failed(&error))?;
        let program = std::env::current_exe().map_err(|error| failed(&error))?;
        let mut command = Command::new(program);
        command.args(["check", "--worker", &text]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // Adapters are identified by their index, independent of the user's preferences.
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
                // A driver may write to stdout too.
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

    /// Kills the process and returns the end of its stderr.
    pub fn complaints(&mut self) -> String {
        let _ = self.child.kill();
        // Its child processes may keep stderr open.
        let complaints = self.complaints.take().filter(|_| ends(&mut self.child, GRACE).is_some());
        complaints
            .and_then(|complaints| complaints.join().ok())
            .filter(|text| !text.is_empty())
            .map_or_else(String::new, |text| format!("; last output: {text}"))
    }

    fn last_words(&mut self, limit: Duration) -> String {
        // Its stdout is closed, so it is about to exit, but a driver may hang during exit.
        let status = ends(&mut self.child, limit).unwrap_or_else(|| "it did not exit".into());
        status + &self.complaints()
    }
}

/// How long to wait for a process that was killed.
const GRACE: Duration = Duration::from_secs(2);

/// The exit status of a process, if it ends within a time limit.
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
        // A process that hangs in the kernel never ends; leave it.
        let _ = ends(&mut self.child, GRACE);
    }
}
