//! `attn bench`: measures how long calls take.

pub mod measure;
mod plot;
pub mod shape;

use std::path::PathBuf;

use clap::Args;
use serde_json::json;
use wgpu_attention::kernels::gpu_kind::predicted_share;
use wgpu_attention::{Gpu, GpuKind, Method, Weights, wgpu};

use crate::error::{Result, usage};
use crate::files;
use crate::picture;
use crate::progress::Spinner;
use crate::table::{align_right, table};
use crate::target::{self, Target, backend_name, driver_name};
use measure::{Effort, Times, measure};
use plot::{Line, Plot};
use shape::{Shape, Work};

#[derive(Args, Debug)]
#[command(after_help = "\
Shapes are b,hq,hkv,sq,skv,d or b,hq,hkv,sq,skv,d,dv: batch, query heads, key/value heads, queries, keys, head width \
and, if it differs, the width of values; all f32. Suffixes:
  :causal  hide the keys after each query (the last query sees every key)
  :backward, :train
           time the gradients of Q, K and V, or the forward and them
  :xN      record N calls into one encoder and report their total time
  :rotary, :rotary-interleaved, :alibi, :t5, :shaw
           add positions inside the kernels
  :stored  with positions: rotate rows, or compute a bias of the size of the scores, before the call
  :mask    add a dense causal mask

Named shapes:
  P1  1,12,12,512,512,64              P5  1,4,4,4096,4096,64:causal
  P2  1,12,12,1024,1024,64:causal     P6  a self-attention layer, width 512, 8 heads, batch 8, length 128
  P3  1,32,8,512,512,128:causal       P7  4,8,8,128,512,64
  P4  1,32,8,1,4096,128 (decode)      P8  one token through a projection, 4096 to 4096
  P9  1,8,8,64,64,64; and P9:x100     P10 1,16,1,1,4096,576,512 (decode, MLA)
  P11 1,1,1,2048,2048,513 (a head wider than 512)

Each call is waited for. The first call is reported separately, because it compiles the kernels that no earlier row \
compiled. The median covers the calls after a warm-up; GFLOP/s and GB/s are computed from it. Operations are the \
multiply-adds of the matrix products over visible keys, counted as two each. The ceiling is what a kernel of \
multiply-adds in registers reaches on the adapter; `of 57 %` is what docs/gpu.md predicts for the kernel on this kind of \
GPU, not a measurement. Bytes count each operand read once and the output written once. \
GPU ms is the time of the compute pass by the adapter's own clock, measured in separate calls. Idle, on the CPU backend, \
is the share of a call in which its threads do not compute (median of up to 100 separate calls): the call is planned, \
memory is found, threads are woken or wait for each other. A call that is too small for several threads leaves the \
others idle.

Examples:
  attn bench
  attn bench --adapter all --shape P1 --shape 1,16,4,1,8192,128 --json times.json
  attn bench --lengths 128,256,512,1024 --heads 8 --dim 64 --method fused,passes --plot times.png")]
pub struct BenchArgs {
    /// A named shape or b,hq,hkv,sq,skv,d, with any suffixes; may be repeated [default: all named shapes]
    #[arg(long = "shape", value_name = "SHAPE", value_parser = Shape::parse)]
    shapes: Vec<Shape>,
    /// Time self-attention of these lengths
    #[arg(long, value_name = "N,N,…", value_delimiter = ',', value_parser = positive)]
    lengths: Vec<usize>,
    /// For --lengths: query heads, or query and key/value heads
    #[arg(long, value_name = "HQ[,HKV]", default_value = "8", value_parser = parse_heads, requires = "lengths")]
    heads: [usize; 2],
    /// For --lengths: head width
    #[arg(long, default_value = "64", value_parser = positive, requires = "lengths")]
    dim: usize,
    /// For --lengths: batch size
    #[arg(long, default_value = "1", value_parser = positive, requires = "lengths")]
    batch: usize,
    /// For --lengths: causal attention
    #[arg(long, requires = "lengths")]
    causal: bool,
    /// Methods to time: auto, fused, passes (three passes) or a tile of the fused kernel, as rows8x8/keys8/subgroup8
    /// (rows per invocation, invocations, keys per step, lanes that share loads). The CPU backend has one method only
    #[arg(long, value_name = "METHOD,…", value_delimiter = ',', default_value = "auto", value_parser = parse_method)]
    method: Vec<Method>,
    /// Also time each shape with its attention weights returned
    #[arg(long)]
    weights: bool,
    /// Timed calls per row
    #[arg(long, value_name = "N", value_parser = positive, conflicts_with = "seconds")]
    repeat: Option<usize>,
    /// Seconds of timed calls per row; at least three calls [default: 1.5]
    #[arg(long, value_name = "S", value_parser = parse_seconds)]
    seconds: Option<f64>,
    /// Write every row as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Plot time over length, one line per method and adapter: .png or .svg
    #[arg(long, value_name = "FILE", requires = "lengths")]
    plot: Option<PathBuf>,
}

fn positive(text: &str) -> Result<usize, String> {
    text.trim().parse().ok().filter(|&n| n >= 1).ok_or_else(|| "expected a whole number of at least 1".into())
}

fn parse_heads(text: &str) -> Result<[usize; 2], String> {
    let (q, kv) = text.split_once(',').unwrap_or((text, text));
    Ok([positive(q)?, positive(kv)?])
}

fn parse_seconds(text: &str) -> Result<f64, String> {
    const MOST: f64 = 3600.0;
    text.parse().ok().filter(|s| (0.0..=MOST).contains(s)).ok_or_else(|| format!("expected 0 to {MOST} seconds"))
}

fn parse_method(text: &str) -> Result<Method, String> {
    match text {
        "passes" => Ok(Method::ThreePasses),
        other => other
            .parse()
            .map_err(|error: wgpu_attention::Error| format!("{error}; other methods are auto, fused and passes")),
    }
}

fn method_name(method: Method) -> String {
    match method {
        Method::ThreePasses => "passes".into(),
        other => other.to_string(),
    }
}

/// One measurement, done or failed.
struct Row<'a> {
    shape: &'a Shape,
    /// The length, if this row is part of a sweep.
    length: Option<usize>,
    method: Option<Method>,
    weights: bool,
    /// The device's peak operations per second.
    ceiling: f64,
    /// The kind of GPU, if it is one.
    gpu: Option<GpuKind>,
    times: Result<Times>,
}

impl Row<'_> {
    fn way(&self) -> String {
        let method = self.method.map(method_name).unwrap_or_default();
        match (method.as_str(), self.weights) {
            (method, false) => method.to_string(),
            ("", true) => "weights".into(),
            (method, true) => format!("{method}, weights"),
        }
    }

    /// In 10⁹ per second.
    fn rate(&self, amount: f64, times: &Times) -> f64 {
        amount / (times.median * 1e6)
    }

    /// The fraction of the ceiling that the compilers' listings predict.
    fn predicted(&self, times: &Times) -> Option<f64> {
        times.kernels.iter().find_map(|name| predicted_share(self.gpu?, name))
    }

    fn kernel(times: &Times) -> String {
        if times.kernels.is_empty() { "cpu".into() } else { times.kernels.join(" + ") }
    }

    fn json(&self, target: &Target) -> serde_json::Value {
        let problem = &self.shape.problem;
        let times = self.times.as_ref().ok();
        let gflops = times.map(|times| self.rate(self.shape.operations(), times));
        let info = target.device.gpu().map(|gpu| gpu.info());
        json!({
            "shape": self.shape.name,
            "operation": match self.shape.work {
                Work::Attention => "attention",
                Work::Layer => "layer",
                Work::Projection => "projection",
            },
            "batch": problem.batch,
            "heads_q": problem.heads_q,
            "heads_kv": problem.heads_kv,
            "len_q": problem.len_q,
            "len_k": problem.len_k,
            "dim": problem.dim_k,
            "dim_v": problem.dim_v,
            "causal": self.shape.causal,
            "calls": self.shape.calls,
            "adapter": target.device.name(),
            "backend": info.map_or("cpu", |info| backend_name(info.backend)),
            "driver": info.map(driver_name),
            "method": self.method.map(method_name),
            "weights": self.weights,
            "kernel": times.map(Row::kernel),
            "kernels": times.map(|times| &times.kernels),
            "first_ms": times.map(|times| times.first),
            "best_ms": times.map(|times| times.best),
            "median_ms": times.map(|times| times.median),
            "idle_percent": times.and_then(|times| times.idle).map(|idle| 100.0 * idle),
            "gpu_ms": times.and_then(|times| times.gpu),
            "timed_calls": times.map(|times| times.count),
            "operations": self.shape.operations(),
            "gflops": gflops,
            "ceiling_gflops": self.ceiling / 1e9,
            "percent_of_ceiling": gflops.map(|gflops| gflops * 1e11 / self.ceiling),
            "predicted_percent_of_ceiling": times.and_then(|times| self.predicted(times)).map(|share| share * 100.0),
            "bytes": self.shape.bytes(),
            "gb_per_s": times.map(|times| self.rate(self.shape.bytes(), times)),
            "error": self.times.as_ref().err().map(|error| error.to_string()),
        })
    }

    fn cells(&self) -> Vec<String> {
        let dash = || "–".to_string();
        let mut cells = vec![self.shape.name.clone(), self.way()];
        match &self.times {
            Err(error) => {
                cells.extend(std::iter::repeat_with(dash).take(8));
                cells.push(format!("does not run: {error}"));
            }
            Ok(times) => {
                let gflops = self.rate(self.shape.operations(), times);
                cells.extend([times.first, times.best, times.median].map(digits));
                cells.push(times.gpu.map_or_else(dash, digits));
                cells.push(times.idle.map_or_else(dash, |idle| format!("{:.0} %", 100.0 * idle)));
                cells.push(digits(gflops));
                let predicted =
                    self.predicted(times).map_or(String::new(), |share| format!(" of {:.0} %", share * 100.0));
                cells.push(format!("{:.0} %{predicted}", gflops * 1e11 / self.ceiling));
                cells.push(match self.shape.is_decode() {
                    true => {
                        let gb = self.rate(self.shape.bytes(), times);
                        format!("{} of {} MB", digits(gb), digits(self.shape.bytes() / 1e6))
                    }
                    false => dash(),
                });
                cells.push(Row::kernel(times).replace(" + ", "\n"));
            }
        }
        cells
    }
}

/// Three significant digits.
pub fn digits(value: f64) -> String {
    match value {
        x if x >= 99.95 => format!("{x:.0}"),
        x if x >= 9.995 => format!("{x:.1}"),
        x if x >= 0.9995 => format!("{x:.2}"),
        x => format!("{x:.3}"),
    }
}

/// Whether every row could be measured.
pub fn bench(args: &BenchArgs, adapter: Option<&str>) -> Result<bool> {
    let mut lengths = args.lengths.clone();
    lengths.sort_unstable();
    lengths.dedup();
    if let Some(path) = &args.plot {
        picture::check_output(path)?;
        if lengths.len() < 2 {
            usage!("--plot draws time over length: give --lengths at least two different lengths");
        }
    }
    if let Some(path) = &args.json {
        files::check_folder(path)?;
    }
    let mut shapes: Vec<(Shape, Option<usize>)> = args.shapes.iter().map(|shape| (shape.clone(), None)).collect();
    for &len in &lengths {
        let shape = Shape::square(args.batch, args.heads, len, args.dim, args.causal);
        shapes.push((shape.map_err(crate::error::Error::Usage)?, Some(len)));
    }
    if shapes.is_empty() {
        shapes = Shape::named().into_iter().map(|shape| (shape, None)).collect();
    }
    let effort = args.repeat.map_or(Effort::Seconds(args.seconds.unwrap_or(1.5)), Effort::Calls);
    let mut methods = args.method.clone();
    let mut seen = Vec::new();
    methods.retain(|method| {
        !seen.contains(method) && {
            seen.push(*method);
            true
        }
    });

    let targets = target::targets(adapter)?;
    let mut report = Vec::new();
    let mut lines = Vec::new();
    let mut complete = true;
    for target in &targets {
        target.announce();
        let rows = rows(target, &shapes, &methods, args.weights, effort)?;
        print_table(target, &rows);
        complete &= rows.iter().all(|row| row.times.is_ok());
        report.extend(rows.iter().map(|row| row.json(target)));
        lines.extend(sweep(target, &rows));
    }
    if let Some(path) = &args.json {
        files::write_json(path, &serde_json::Value::Array(report))?;
    }
    if let Some(path) = &args.plot {
        let [heads_q, heads_kv] = args.heads;
        let heads = if heads_q == heads_kv { heads_q.to_string() } else { format!("{heads_q} over {heads_kv}") };
        let causal = if args.causal { ", causal" } else { "" };
        let title = format!("attention: batch {}, heads {heads}, width {}{causal}", args.batch, args.dim);
        plot::write(path, &Plot { title: &title, lengths: &lengths, lines: &lines })?;
        anstream::println!("plot written to {}", path.display());
    }
    Ok(complete)
}

/// Measures everything on one device.
fn rows<'a>(
    target: &Target,
    shapes: &'a [(Shape, Option<usize>)],
    methods: &[Method],
    with_weights: bool,
    effort: Effort,
) -> Result<Vec<Row<'a>>> {
    let device = &target.device;
    let ceiling = device.multiply_add_ceiling()?;
    // A software adapter may be planned as a GPU, but does not compute like one.
    let is_gpu = |gpu: &&Gpu| gpu.info().device_type != wgpu::DeviceType::Cpu;
    let gpu = device.gpu().filter(is_gpu).map(|gpu| gpu.capabilities().kind);
    let methods: Vec<Option<Method>> = match device.gpu() {
        Some(_) => methods.iter().copied().map(Some).collect(),
        None => vec![None],
    };
    let kept: &[bool] = if with_weights { &[false, true] } else { &[false] };
    let total = shapes.len() * methods.len() * kept.len();
    let mut rows = Vec::with_capacity(total);
    for (shape, length) in shapes {
        for &method in &methods {
            for &weights in kept {
                let done = rows.len() + 1;
                let _spinner = Spinner::start(format!("{} on {}, {done} of {total}", shape.name, device.name()));
                let wanted = if weights { Weights::PerHead } else { Weights::None };
                let times = measure(shape, device, method.unwrap_or_default(), wanted, effort);
                rows.push(Row { shape, length: *length, method, weights, ceiling, gpu, times });
            }
        }
    }
    Ok(rows)
}

fn print_table(target: &Target, rows: &[Row<'_>]) {
    let Some(first) = rows.first() else { return };
    anstream::println!("{}; multiply-add ceiling {} GFLOP/s", target.label(), digits(first.ceiling / 1e9));
    let mut table = table();
    table.set_header([
        "shape",
        "method",
        "first ms",
        "best ms",
        "median ms",
        "GPU ms",
        "idle",
        "GFLOP/s",
        "ceiling",
        "GB/s",
        "kernels",
    ]);
    for row in rows {
        table.add_row(row.cells());
    }
    align_right(&mut table, 2..10);
    anstream::println!("{table}\n");
}

/// The rows of the sweep as lines: one per method, with weights and without.
fn sweep(target: &Target, rows: &[Row<'_>]) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    for row in rows {
        let (Some(length), Ok(times)) = (row.length, &row.times) else { continue };
        let mut name = match target.device.gpu() {
            Some(gpu) => format!("{} ({})", gpu.info().name, backend_name(gpu.info().backend)),
            None => "cpu backend".into(),
        };
        let way = row.way();
        if !way.is_empty() {
            name = format!("{way}: {name}");
        }
        match lines.iter_mut().find(|line| line.name == name) {
            Some(line) => line.points.push((length, times.median)),
            None => lines.push(Line { name, points: vec![(length, times.median)] }),
        }
    }
    lines
}
