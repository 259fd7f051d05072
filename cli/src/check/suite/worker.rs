//! The cases of one adapter in a process of their own: what hangs or falls there is no end of the report. The
//! process is told on its command line what to do, and tells what it does line by line, as JSON.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use wgpu_attention::{Device, Gpu, GpuOptions};

use super::faults::{Fault, STRIKES_AT};
use super::on_dawn::PLANS;
use super::plan::{Item, Selection, items};
use super::{judge, messages, observe, on_dawn};
use crate::check::report::{Adapter, CaseResult};
use crate::error::{Error, Result};
use crate::target::backend_name;

/// What a worker is to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Order {
    /// Tell which adapters there are, of one backend or of all.
    List { backend: Option<String> },
    /// Run cases.
    Run { on: Place, selection: Selection, from: usize, fault: Option<Fault> },
}

/// Where cases run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Place {
    Cpu,
    /// The adapter at an index, by the name and backend that it had when adapters were listed.
    Gpu {
        index: usize,
        name: String,
        backend: String,
    },
    /// Dawn for Node, over plans made for WebGPU's own limits on the adapter at an index.
    Dawn {
        index: usize,
    },
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
    Adapters(Vec<Place>),
    Adapter {
        adapter: Adapter,
        items: usize,
    },
    Start {
        at: usize,
        blank: CaseResult,
    },
    Result(CaseResult),
    /// All is done; the sizes seen meanwhile.
    End(Vec<crate::check::report::Observed>),
    /// The device does not open.
    Refused(String),
}

/// A line for the parent. Where nobody listens any more there is nothing left to do.
fn tell(line: &Line) {
    let text = serde_json::to_string(line).unwrap_or_default();
    let mut out = std::io::stdout().lock();
    if writeln!(out, "{text}").and_then(|()| out.flush()).is_err() {
        std::process::exit(1);
    }
}

pub fn open(place: &Place, fault: Option<Fault>) -> Result<Device, String> {
    let (index, name, backend) = match place {
        Place::Cpu => return Ok(Device::Cpu),
        Place::Dawn { .. } => return Err("Dawn runs plans, within a suite alone".into()),
        Place::Gpu { index, name, backend } => (index, name, backend),
    };
    let rewrite = fault.and_then(Fault::rewrite);
    let options = GpuOptions { adapter: Some(index.to_string()), rewrite, ..GpuOptions::default() };
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
        Order::List { .. } => {
            let place = |adapter: wgpu_attention::AdapterSummary| Place::Gpu {
                index: adapter.index,
                name: adapter.info.name.clone(),
                backend: backend_name(adapter.info.backend).into(),
            };
            tell(&Line::Adapters(Gpu::adapters().into_iter().map(place).collect()));
        }
        Order::Run { on: Place::Dawn { index }, selection, from, fault } => {
            if let Err(reason) = run_on_dawn(index, &selection, from, fault) {
                tell(&Line::Refused(reason.to_string()));
            }
        }
        Order::Run { on, selection, from, fault } => {
            messages::listen();
            match open(&on, fault) {
                Err(reason) => tell(&Line::Refused(reason)),
                Ok(device) => run(&device, &items(&device, &selection), from, fault),
            }
        }
    }
    Ok(true)
}

fn run_on_dawn(index: usize, selection: &Selection, from: usize, fault: Option<Fault>) -> Result<()> {
    let dawn = on_dawn::dawn()?;
    let device = on_dawn::planner(index, fault)?;
    let items = on_dawn::items(items(&device, selection));
    let unknown = Adapter { name: "Dawn".into(), backend: "Dawn".into(), ..Adapter::default() };
    tell(&Line::Adapter { adapter: unknown, items: items.len() });
    for (n, part) in items.chunks(PLANS).enumerate() {
        let first = n * PLANS;
        if first + part.len() <= from {
            continue;
        }
        tell(&Line::Start { at: first, blank: judge::blank(&part[0]) });
        let (adapter, results) = on_dawn::run(&dawn, &device, part)?;
        if let Some(adapter) = adapter {
            tell(&Line::Adapter { adapter, items: items.len() });
        }
        for result in results.into_iter().skip(from.saturating_sub(first)) {
            tell(&Line::Result(result));
        }
    }
    tell(&Line::End(Vec::new()));
    Ok(())
}

fn run(device: &Device, items: &[Item], from: usize, fault: Option<Fault>) {
    tell(&Line::Adapter { adapter: observe::adapter(device), items: items.len() });
    let mut seen = BTreeMap::new();
    for (at, item) in items.iter().enumerate().skip(from) {
        tell(&Line::Start { at, blank: judge::blank(item) });
        if let Some(fault) = fault
            && at == STRIKES_AT
        {
            fault.strike(device);
        }
        let mut result = judge::run(item, device);
        if let (Some(gpu), Some(workgroup)) = (device.gpu(), result.workgroup) {
            // Seen once for each size; where the adapter does not say, the sizes stay unknown.
            let seen = seen.entry(workgroup).or_insert_with(|| observe::observe(gpu, workgroup).ok());
            result.subgroup = seen.and_then(|seen| seen.subgroup);
        }
        tell(&Line::Result(result));
    }
    tell(&Line::End(seen.into_values().flatten().collect()));
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
        if let Order::List { backend: Some(backend) } = order {
            command.env("WGPU_BACKEND", backend);
        }
        let mut child = command.spawn().map_err(|error| failed(&error))?;
        let (Some(stdout), Some(mut stderr)) = (child.stdout.take(), child.stderr.take()) else {
            return Err(failed(&"it has no output"));
        };
        let (send, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                // A driver may write there too.
                if let Ok(line) = serde_json::from_str(&line)
                    && send.send(line).is_err()
                {
                    break;
                }
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

    fn last_words(&mut self, limit: Duration) -> String {
        // Its output is closed: the end is near, but a driver may hang in its last breath.
        let start = Instant::now();
        let status = loop {
            match self.child.try_wait() {
                Ok(Some(status)) => break status.to_string(),
                Ok(None) if start.elapsed() < limit => std::thread::sleep(Duration::from_millis(5)),
                _ => {
                    let _ = self.child.kill();
                    break "no end of its own".into();
                }
            }
        };
        match self.complaints.take().and_then(|complaints| complaints.join().ok()) {
            Some(text) if !text.is_empty() => format!("{status}; its last words: {text}"),
            _ => status,
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
