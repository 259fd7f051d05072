//! `attn check`: a folder of cases against their expected answers.

mod case;
pub mod compare;
mod onnx;
mod torch;
mod transformers;

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;

use crate::error::{Error, Result, fail};
use crate::files;
use crate::progress::Bar;
use crate::target::{self, Target};
use case::Case;
use compare::Comparison;

#[derive(Args, Debug)]
#[command(after_help = "\
A case is a safetensors file whose header's __metadata__ holds a JSON text `case` that says \
what to compute. Tensors: in.* and param.* go in, out.* (ONNX) and ref64.* (float64) are expected.

Allowed: for ONNX the case's own tolerance, and for f32 also 5e-6 of the largest value from \
float64; for PyTorch f32 twice the error of PyTorch's own f32 and 8 ulp, f16 the error of \
PyTorch's own f16. Weights, for which PyTorch records no error, may be as far off as its output, \
relative to the largest value.

Examples:
  attn check tests/cases/onnx
  attn check tests/cases/torch --adapter cpu --filter mask --verbose
  attn check tests/cases/torch --adapter all --json report.json")]
pub struct CheckArgs {
    /// The folder; its index.json lists the cases, without one every .safetensors file is a case
    dir: PathBuf,
    /// Only cases whose name contains this
    #[arg(long, value_name = "SUBSTR")]
    filter: Option<String>,
    /// A line for every case, not only for failing ones
    #[arg(short, long)]
    verbose: bool,
    /// Write the result of every case
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What came of one case.
enum Outcome {
    Compared(Vec<Comparison>),
    Skipped(String),
    /// The case could not be read or computed.
    Broken(String),
}

/// Why a case gives no comparisons.
enum Stop {
    Skip(String),
    Error(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Stop {
        Stop::Error(error)
    }
}
impl From<wgpu_attention::Error> for Stop {
    fn from(error: wgpu_attention::Error) -> Stop {
        Stop::Error(error.into())
    }
}

#[derive(Clone, Copy, Default)]
struct Tally {
    passed: usize,
    failed: usize,
    skipped: usize,
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

impl Outcome {
    fn status(&self) -> &'static str {
        match self {
            Outcome::Skipped(_) => "skipped",
            // Nothing compared is nothing shown: never a pass.
            Outcome::Compared(all) if !all.is_empty() && all.iter().all(|one| one.ok) => "passed",
            _ => "failed",
        }
    }
}

/// Whether no case failed.
pub fn check(args: &CheckArgs, adapter: Option<&str>) -> Result<bool> {
    let names = case_names(&args.dir, args.filter.as_deref())?;
    if let Some(path) = &args.json {
        files::check_folder(path)?;
    }
    let targets = target::targets(adapter)?;
    let mut total = Tally::default();
    let mut report = Vec::new();
    for target in &targets {
        target.announce();
        let tally = check_on(target, args, &names, &mut report);
        if targets.len() > 1 {
            anstream::println!("{}: {tally}", target.label());
        }
        total.passed += tally.passed;
        total.failed += tally.failed;
        total.skipped += tally.skipped;
    }
    if let Some(path) = &args.json {
        let report = json!({
            "folder": args.dir.display().to_string(),
            "passed": total.passed,
            "failed": total.failed,
            "skipped": total.skipped,
            "cases": report,
        });
        files::write_json(path, &report)?;
    }
    anstream::println!("{total}");
    Ok(total.failed == 0)
}

fn check_on(target: &Target, args: &CheckArgs, names: &[String], report: &mut Vec<serde_json::Value>) -> Tally {
    let mut tally = Tally::default();
    let mut bar = Bar::new(names.len());
    for name in names {
        let outcome = run_case(target, &args.dir, name);
        match outcome.status() {
            "passed" => tally.passed += 1,
            "failed" => tally.failed += 1,
            _ => tally.skipped += 1,
        }
        for line in lines(name, &outcome, args.verbose) {
            bar.line(&line);
        }
        report.push(entry(target, name, &outcome));
        bar.step(name);
    }
    tally
}

/// The cases of a folder.
fn case_names(dir: &Path, filter: Option<&str>) -> Result<Vec<String>> {
    if !dir.is_dir() {
        fail!("{} is not a folder of cases", dir.display());
    }
    let index = dir.join("index.json");
    let mut names: Vec<String> = if index.exists() {
        let bad = |what: &str| Error::Failed(format!("{} is not a list of cases: {what}", index.display()));
        let text = String::from_utf8(files::read_bytes(&index)?).map_err(|error| bad(&error.to_string()))?;
        let list = case::parse_json(&text).map_err(|error| bad(&error.to_string()))?;
        let list = list.as_array().ok_or_else(|| bad("an array of objects with a \"name\" is needed"))?;
        list.iter()
            .map(|entry| {
                let name =
                    entry.get("name").unwrap_or(entry).as_str().ok_or_else(|| bad("an entry has no \"name\""))?;
                // A name is a file of this folder, never a way out of it.
                match Path::new(name).file_name().and_then(|file| file.to_str()) == Some(name) {
                    true => Ok(name.to_string()),
                    false => Err(bad(&format!("{name:?} is not a file name"))),
                }
            })
            .collect::<Result<_>>()?
    } else {
        let entries =
            std::fs::read_dir(dir).map_err(|error| Error::Failed(format!("cannot read {}: {error}", dir.display())))?;
        let files = entries.flatten().map(|entry| entry.path());
        let cases = files.filter(|path| path.extension().is_some_and(|ending| ending == "safetensors"));
        cases.filter_map(|path| Some(path.file_stem()?.to_str()?.to_string())).collect()
    };
    if names.is_empty() {
        fail!("{} holds no cases (index.json, or .safetensors files)", dir.display());
    }
    names.sort();
    if let Some(part) = filter {
        names.retain(|name| name.contains(part));
        if names.is_empty() {
            fail!("no case of {} has \"{part}\" in its name", dir.display());
        }
    }
    Ok(names)
}

fn run_case(target: &Target, dir: &Path, name: &str) -> Outcome {
    let work = || -> Result<Vec<Comparison>, Stop> {
        let case = Case::read(&dir.join(format!("{name}.safetensors")))?;
        match case.op() {
            "Attention" => onnx::attention(&case, &target.device),
            "Softmax" => onnx::softmax(&case, &target.device),
            "TensorScatter" => onnx::tensor_scatter(&case, &target.device),
            "sdpa" => torch::sdpa(&case, &target.device),
            "varlen" => torch::varlen(&case, &target.device),
            "mha" => torch::mha(&case, &target.device),
            "sink_attention" => transformers::sink_attention(&case, &target.device),
            other => Err(Stop::Skip(format!("the op {other} is not known"))),
        }
    };
    match work() {
        Ok(all) if all.is_empty() => Outcome::Broken("the case expects no output".into()),
        Ok(all) => Outcome::Compared(all),
        Err(Stop::Skip(reason)) => Outcome::Skipped(reason),
        Err(Stop::Error(error)) => Outcome::Broken(error.to_string()),
    }
}

fn lines(name: &str, outcome: &Outcome, verbose: bool) -> Vec<String> {
    match outcome {
        Outcome::Broken(reason) => vec![format!("FAILED {name}: {reason}")],
        Outcome::Skipped(reason) if verbose => vec![format!("skipped {name}: {reason}")],
        Outcome::Skipped(_) => Vec::new(),
        Outcome::Compared(all) => all
            .iter()
            .filter(|one| verbose || !one.ok)
            .map(|one| {
                let head =
                    format!("{} {name}: {} against {}", if one.ok { "ok" } else { "FAILED" }, one.output, one.against);
                match (&one.worst, &one.reason) {
                    (Some(worst), _) => format!(
                        "{head}: difference {:.2e}, allowed {:.2e}, at {:?} ({:e} instead of {:e})",
                        worst.difference, worst.allowed, worst.index, worst.got, worst.expected
                    ),
                    (None, Some(reason)) => format!("{head}: {reason}"),
                    (None, None) => format!("{head}: empty"),
                }
            })
            .collect(),
    }
}

fn entry(target: &Target, name: &str, outcome: &Outcome) -> serde_json::Value {
    // JSON has no NaN and no infinity: those become text.
    let number = |x: f64| if x.is_finite() { json!(x) } else { json!(x.to_string()) };
    let (reason, outputs) = match outcome {
        Outcome::Skipped(reason) | Outcome::Broken(reason) => (Some(reason), Vec::new()),
        Outcome::Compared(all) => (
            None,
            all.iter()
                .map(|one| {
                    let worst = one.worst.as_ref().map(|worst| {
                        json!({
                            "difference": number(worst.difference),
                            "allowed": number(worst.allowed),
                            "index": worst.index,
                            "got": number(worst.got),
                            "expected": number(worst.expected),
                        })
                    });
                    json!({ "output": one.output, "against": one.against, "ok": one.ok, "worst": worst, "reason": one.reason })
                })
                .collect(),
        ),
    };
    json!({
        "case": name,
        "adapter": target.device.name(),
        "status": outcome.status(),
        "reason": reason,
        "outputs": outputs,
    })
}
