//! Computes one item and judges its results.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use wgpu_attention::kernels::Kernel;
use wgpu_attention::{Device, Dtype, ExportedCall, Method, Traced};
use wgpu_attention_conformance::{self as conformance, Case as Drawn, Expected, Got, bits};

use super::messages::{self, Message};
use super::plan::{self, Item, Work};
use super::variant::variant;
use crate::check::case::Case;
use crate::check::compare::{Comparison, compare_each, difference, ulp};
use crate::check::compute::compute;
use crate::check::dawn::DawnResult;
use crate::check::report::{CaseResult, Output, Status};
use crate::check::stop::Stop;

/// The largest normalised mean square error of f32 results; llama.cpp allows 5e-4 for its flash attention.
pub const NMSE: f64 = 1e-10;

/// What rounding to a type may add: relative to an element, and to the NMSE.
fn rounding(dtype: Dtype) -> (f64, f64) {
    // Half a unit in the last place of the smallest significand, and its square.
    let relative = conformance::rounding(dtype);
    match dtype {
        Dtype::F16 => (relative, 2.5e-7),
        Dtype::BF16 => (relative, 1.6e-5),
        _ => (relative, NMSE),
    }
}

impl Output {
    /// Mean squares below `floor` count as `floor`; `dtype` is the type that values are rounded to.
    fn of(comparison: &Comparison, nmse_allowed: f64, floor: f64, dtype: Dtype) -> Output {
        let (stats, nmse) = (comparison.stats, comparison.stats.nmse(floor));
        let worst = comparison.worst.as_ref();
        Output {
            name: comparison.output.clone(),
            against: comparison.against.into(),
            ok: comparison.ok && nmse <= nmse_allowed,
            count: stats.count,
            max_abs: stats.max_abs,
            allowed: worst.map_or(0.0, |worst| worst.allowed),
            ulps: stats.max_abs / ulp(stats.there, dtype),
            nmse,
            nmse_allowed,
            worst: worst.map(|worst| worst.index.clone()).unwrap_or_default(),
            got: worst.map_or(0.0, |worst| worst.got),
            expected: worst.map_or(0.0, |worst| worst.expected),
            nans: stats.nans,
        }
    }

    /// A description of what is wrong.
    fn complaint(&self) -> String {
        let Output { name, against, allowed, ulps, nmse, worst, got, expected, nans, count, .. } = self;
        let off = difference(*got, *expected);
        let nans = if *nans > 0 { format!(", {nans} of {count} are NaN") } else { String::new() };
        let bound =
            if self.nmse_allowed.is_finite() { format!(" of {:.0e}", self.nmse_allowed) } else { String::new() };
        format!(
            "{name} is off by {off:.2e} ({allowed:.1e} allowed, {ulps:.1e} ulp at most, NMSE {nmse:.1e}{bound}), at \
             {worst:?} {got:e} instead of {expected:e}, against {against}{nans}"
        )
    }
}

/// Compares a result with the truth.
pub fn judge(got: &Got, expected: &Expected) -> (Output, Option<String>) {
    let (relative, nmse_allowed) = rounding(got.dtype);
    let values: Vec<f64> = got.values.iter().map(|&x| f64::from(x)).collect();
    // A logarithm near 0 is not more precise than one near 1, so its error is not judged relative to its size.
    let floor = if matches!(expected.name, "lse" | "entropy") { 1.0 } else { 0.0 };
    let before = f64::from(expected.roundings - 1);
    let nmse_allowed = if relative > 0.0 { nmse_allowed * (1.0 + before) } else { nmse_allowed };
    // The tolerance is relative to the element's own row, because one relative to a large row would hide errors in a
    // small one.
    let limits = expected.allowed(got.dtype);
    let allowed = |at: usize, _| limits[at];
    let comparison = compare_each(got.name, "f64", (&got.shape, &values), (&expected.shape, &expected.values), allowed);
    (Output::of(&comparison, nmse_allowed, floor, got.dtype), comparison.reason)
}

/// The outcome of a case.
#[derive(Default)]
struct Judged {
    outputs: Vec<Output>,
    /// A reason for failure that the outputs do not show.
    reason: Option<String>,
    /// What was ignored in computing the case.
    note: Option<String>,
    same_bits: Option<bool>,
}

impl Judged {
    fn add(&mut self, got: &Got, expected: &Expected) {
        let (output, reason) = judge(got, expected);
        self.outputs.push(output);
        self.reason = self.reason.take().or(reason);
    }
}

fn drawn(case: &Drawn, device: &Device, method: Method, results: Vec<Got>) -> Result<Judged, Stop> {
    let truth = case.truth();
    let mut judged = Judged::default();
    if results.len() != truth.len() {
        judged.reason = Some(format!("{} results instead of {}", results.len(), truth.len()));
    }
    for (got, expected) in results.iter().zip(&truth) {
        judged.add(got, expected);
    }
    let again = case.run(device, method)?;
    let same = |(a, b): (&Got, &Got)| bits(&a.values) == bits(&b.values);
    judged.same_bits = Some(results.len() == again.len() && results.iter().zip(&again).all(same));
    Ok(judged)
}

fn judged(comparisons: &[Comparison], again: &[Comparison], dtype: Dtype) -> Judged {
    // The LSE and scores may stay f32.
    let rounded = |one: &Comparison| if one.fits.contains(&dtype) { dtype } else { Dtype::F32 };
    let outputs = comparisons.iter().map(|one| Output::of(one, f64::INFINITY, 0.0, rounded(one))).collect();
    let problem = |one: &Comparison| Some(format!("{} against {}: {}", one.output, one.against, one.reason.as_ref()?));
    let reason = comparisons.iter().find_map(problem);
    let note = comparisons.iter().find_map(|one| one.note.clone());
    let bits = |of: &[Comparison]| of.iter().map(|one| one.fingerprint).collect::<Vec<_>>();
    Judged { outputs, reason, note, same_bits: Some(bits(comparisons) == bits(again)) }
}

/// Compares Dawn's result of a plan with the truth of the case that the plan was made from.
pub fn dawn(item: &Item, case: &Drawn, call: &ExportedCall, found: &DawnResult) -> CaseResult {
    let mut result = blank(item);
    result.milliseconds = found.milliseconds;
    result.kernels = call.steps.iter().map(|step| step.kernel.clone()).collect();
    result.kernels.dedup();
    result.why = Some("exported as a plan".into());
    match &found.outputs {
        Err(reason) if found.lacks => (result.status, result.reason) = (Status::Skipped, Some(reason.clone())),
        Err(reason) => result.reason = Some(reason.clone()),
        Ok(outputs) => {
            let truth = case.truth();
            let mut judged = Judged { same_bits: Some(found.same_bits), ..Judged::default() };
            for expected in &truth {
                let Some(output) = outputs.iter().find(|output| output.name == expected.name) else {
                    judged.reason = Some(format!("there is no {}", expected.name));
                    continue;
                };
                let dtype = if expected.name == "output" { case.storage } else { Dtype::F32 };
                let got =
                    Got { name: expected.name, shape: output.shape.clone(), values: output.values.clone(), dtype };
                judged.add(&got, expected);
            }
            conclude(&mut result, judged);
        }
    }
    result
}

/// The result of an item that has nothing to compare.
pub fn stopped(item: &Item, stop: &Stop) -> CaseResult {
    let mut result = blank(item);
    match stop {
        Stop::Skip(reason) => (result.status, result.reason) = (Status::Skipped, Some(reason.clone())),
        Stop::Error(error) => result.reason = Some(error.to_string()),
    }
    result
}

/// Derives the status from the comparisons.
fn conclude(result: &mut CaseResult, judged: Judged) {
    (result.same_bits, result.note) = (judged.same_bits, judged.note);
    let bad = judged.outputs.iter().find(|one| !one.ok).map(Output::complaint);
    let bits = (judged.same_bits == Some(false)).then(|| "a second run gave different bits".to_string());
    result.reason = judged.reason.or(bad).or(bits);
    result.outputs = judged.outputs;
    // If nothing was compared, nothing was shown, so it is not a pass.
    if result.reason.is_none() && !result.outputs.is_empty() {
        result.status = Status::Passed;
    } else if result.reason.is_none() {
        result.reason = Some("nothing was compared".into());
    }
}

/// Records which kernels ran, and why.
fn record(result: &mut CaseResult, trace: &[Traced]) {
    for one in trace {
        if !result.kernels.contains(&one.variant.name) {
            result.kernels.push(one.variant.name.clone());
        }
    }
    result.why = trace.iter().map(|one| &one.why).find(|why| !why.is_empty()).cloned();
    // The workgroup size of the main kernel, not of one that prepares its operands.
    let prepares = |kernel| matches!(kernel, Kernel::BlockMask | Kernel::Copy | Kernel::CombineBiases | Kernel::Rotate);
    let main = trace.iter().find(|one| !prepares(one.variant.kernel)).or(trace.first());
    result.workgroup = main.map(|one| one.variant.workgroup_size());
}

/// The result of an item before it has run: a failure.
pub fn blank(item: &Item) -> CaseResult {
    let storage = match &item.work {
        Work::Drawn(case) => case.storage.to_string(),
        Work::Golden(_) => Dtype::F32.to_string(),
        Work::File(file) => file.storage.clone(),
    };
    CaseResult {
        id: item.id(),
        op: item.op().into(),
        variant: variant(item.method),
        storage,
        status: Status::Failed,
        ..CaseResult::default()
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
    format!("panicked: {}", text.unwrap_or("without a message"))
}

/// Runs an item on a device twice and compares it with its answers.
pub fn run(item: &Item, device: &Device) -> CaseResult {
    let mut result = blank(item);
    let start = Instant::now();
    let mut seconds = 0.0;
    let mut work = || -> Result<Judged, Stop> {
        match &item.work {
            Work::Drawn(case) => {
                let (first, trace) = traced(device, || case.run(device, item.method));
                seconds = start.elapsed().as_secs_f64();
                record(&mut result, &trace);
                drawn(case, device, item.method, first?)
            }
            Work::Golden(_) | Work::File(_) => {
                let case = match &item.work {
                    Work::Golden(name) => Case::parse(name.clone(), plan::golden(name)?)?,
                    Work::File(file) => Case::read(&file.path)?,
                    Work::Drawn(_) => unreachable!("another arm"),
                };
                result.storage = case.storage().to_string();
                let (first, trace) = traced(device, || compute(&case, device, item.method));
                seconds = start.elapsed().as_secs_f64();
                record(&mut result, &trace);
                Ok(judged(&first?, &compute(&case, device, item.method)?, case.storage()))
            }
        }
    };
    // A panic is a bug of this project. It is one failure in the report and must not end the run.
    let outcome = catch_unwind(AssertUnwindSafe(&mut work));
    result.milliseconds = 1e3 * if seconds > 0.0 { seconds } else { start.elapsed().as_secs_f64() };
    match outcome {
        Err(panic) => result.reason = Some(panic_text(panic.as_ref())),
        Ok(Err(Stop::Skip(reason))) => (result.status, result.reason) = (Status::Skipped, Some(reason)),
        Ok(Err(Stop::Error(error))) => result.reason = Some(error.to_string()),
        Ok(Ok(judged)) => conclude(&mut result, judged),
    }
    hear(&mut result);
    result
}

/// Adds messages logged during the case; for the first case also those logged while the device opened. An error fails
/// the case even if its numbers are right.
fn hear(result: &mut CaseResult) {
    for Message { is_error, text } in messages::heard() {
        if is_error && result.status != Status::Failed {
            (result.status, result.reason) = (Status::Failed, Some(format!("driver or layer: {text}")));
        }
        if !result.messages.contains(&text) {
            result.messages.push(text);
        }
    }
}

fn traced<T>(device: &Device, work: impl FnOnce() -> T) -> (T, Vec<Traced>) {
    match device.gpu() {
        Some(gpu) => gpu.trace(work),
        None => (work(), Vec::new()),
    }
}
