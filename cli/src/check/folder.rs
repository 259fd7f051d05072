//! `attn check DIR`: a folder of cases against their expected answers.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;
use wgpu_attention::Method;

use super::case::Case;
use super::compare::Comparison;
use super::compute::compute;
use super::stop::Stop;
use super::{case, report, suite};
use crate::error::{Error, Result, fail, usage};
use crate::files::{self, json_number as number};
use crate::progress::Bar;
use crate::target::{self, Target};

#[derive(Args, Debug)]
#[command(after_help = "\
Without DIR the suite runs, on every adapter and on the CPU backend, each in a process of its own: the cases of \
ONNX, PyTorch, transformers, Keras and JAX that the program carries, and more than 5,100 that are drawn from --seed, over every \
op, storage type and kernel variant. A drawn f32 result may be off by 3e-6 of the largest value (3e-5 for sums \
over recomputed weights) with an NMSE of at most 1e-10 against float64; f16 and bf16 results may be rounded besides. \
Each case runs twice and must give the same bits. What a report says: docs/check.md.

With DIR, a folder of cases: safetensors files whose header's __metadata__ holds a JSON text `case` that says \
what to compute. Tensors: in.* and param.* go in, out.* (ONNX), ref64.* (float64) and out32.* \
(transformers) are expected. Allowed there: for ONNX the case's own tolerance, and for f32 also 5e-6 of the largest \
value from float64; for PyTorch f32 twice the error of PyTorch's own f32 and 8 ulp, f16 the error of \
PyTorch's own f16. Weights, for which PyTorch records no error, may be as far off as its output, \
relative to the largest value. For transformers likewise twice the error of its own f32, or 5e-6 of \
the largest value where none is recorded.

Ops keras.MultiHeadAttention, keras.GroupQueryAttention and jax.nn.dot_product_attention hold a call of that function: its arguments by name, missing ones at their defaults, tensors as in.NAME, Keras's weights as param.query/kernel and so on; out32.* (or t32.*) is what the framework itself gives. A tensor that is not known skips the case; an argument that is not known is named with the result.

Methods: auto (what a call runs unless told otherwise), three-passes, fused, a cut of the fused kernel \
such as rows8x8/keys8/subgroup8 or rows4x64/keys4, or all: three-passes, fused and a fixed list of cuts \
with subgroups and without. A case that a method cannot compute is skipped with the reason, and so is \
one of an op that has no methods. The CPU backend has one way only.

Exit status: 0 when all passed or failed as known, 1 for a failure, 2 for a wrong call, 3 without an adapter.

Examples:
  attn check --quick
  attn check --html report.html --json report.json
  attn check --adapter vulkan --op attention --variant fused
  attn check --repro attention/plain/f32/1000000@fused --shrink
  attn check --diff before.json after.json
  attn check tests/cases/onnx
  attn check tests/cases/torch --adapter vulkan --method all
  attn check tests/cases/torch --adapter cpu --filter mask --verbose")]
pub struct CheckArgs {
    /// A folder instead of the suite; its index.json lists the cases, without one every .safetensors file is a case
    dir: Option<PathBuf>,
    #[command(flatten)]
    suite: suite::SuiteArgs,
    /// Only cases whose name contains this
    #[arg(long, value_name = "SUBSTR")]
    filter: Option<String>,
    /// Computes the cases in this way; may be repeated
    #[arg(long = "method", value_name = "NAME", value_parser = parse_method, default_value = "auto")]
    methods: Vec<MethodWord>,
    /// A line for every case, not only for failing ones
    #[arg(short, long)]
    verbose: bool,
    #[command(flatten)]
    forms: report::Forms,
    /// Run nothing: show a report that --json wrote, and write it in other forms; exit status 0 whatever it tells
    #[arg(long, value_name = "REPORT", help_heading = "Report", conflicts_with_all = ["dir", "filter", "methods", "verbose", "SuiteArgs"])]
    from: Option<PathBuf>,
    /// Run nothing: tell what changed from one report that --json wrote to another; exit status 1 where a case fails
    /// that did not, one that passed is skipped or no longer there, a second run gives other bits, or an adapter is
    /// gone or ended early
    #[arg(long, value_names = ["OLD", "NEW"], num_args = 2, help_heading = "Report",
        conflicts_with_all = ["dir", "filter", "methods", "verbose", "from", "SuiteArgs", "Forms"])]
    diff: Option<Vec<PathBuf>>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum MethodWord {
    All,
    One(Method),
}

fn parse_method(text: &str) -> Result<MethodWord, String> {
    match text {
        "all" => Ok(MethodWord::All),
        one => one.parse().map(MethodWord::One).map_err(|error: wgpu_attention::Error| error.to_string()),
    }
}

impl CheckArgs {
    /// The methods on a device, each once; none where there is one way only.
    fn methods(&self, target: &Target) -> Vec<Option<Method>> {
        let Some(gpu) = target.device.gpu() else { return vec![None] };
        let mut methods = Vec::new();
        for &word in &self.methods {
            let more = match word {
                MethodWord::All => Method::every(gpu.capabilities()),
                MethodWord::One(method) => vec![method],
            };
            for method in more.into_iter().map(Some) {
                if !methods.contains(&method) {
                    methods.push(method);
                }
            }
        }
        methods
    }
}

/// What came of one case.
enum Outcome {
    Compared(Vec<Comparison>),
    Skipped(String),
    /// The case could not be read or computed.
    Broken(String),
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

impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, more: Tally) {
        self.passed += more.passed;
        self.failed += more.failed;
        self.skipped += more.skipped;
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
    if let Some(order) = &args.suite.worker {
        return suite::work(order);
    }
    if let Some(option) = args.from.as_ref().map(|_| "--from").or(args.diff.as_ref().map(|_| "--diff"))
        && adapter.is_some()
    {
        usage!("{option} runs nothing, so --adapter makes no sense with it");
    }
    if let Some(path) = &args.from {
        report::show(path, &args.forms)?;
        return Ok(true);
    }
    if let Some([old, new]) = args.diff.as_deref() {
        return report::diff(old, new);
    }
    let Some(dir) = &args.dir else {
        if args.verbose || args.methods != [MethodWord::One(Method::Auto)] {
            let option = if args.verbose { "--verbose" } else { "--method" };
            usage!("{option} is for a folder of cases; the suite runs every variant, or those of --variant");
        }
        args.forms.check_folders()?;
        return suite::check(&args.suite, args.filter.as_deref(), adapter, |found| {
            args.forms.write(found)?;
            report::print(found);
            Ok(())
        });
    };
    if let Some(option) = args.suite.any() {
        usage!("{option} is for the suite that the program carries; leave the folder {} out", dir.display());
    }
    if let Some(form) = args.forms.beyond_json() {
        usage!("{form} is not made from a folder of cases; without a folder the suite runs, and writes it");
    }
    let names = case_names(dir, args.filter.as_deref())?;
    if let Some(path) = &args.forms.json {
        files::check_folder(path)?;
    }
    let targets = target::targets(adapter)?;
    let mut total = Tally::default();
    let (mut report, mut runs) = (Vec::new(), Vec::new());
    let ways: Vec<_> = targets.iter().map(|target| (target, args.methods(target))).collect();
    let several = ways.iter().map(|(_, methods)| methods.len()).sum::<usize>() > 1;
    for (target, methods) in ways {
        target.announce();
        for method in methods {
            let way = Way { target, method, several };
            let tally = way.check(args, dir, &names, &mut report);
            if several {
                anstream::println!("{}: {tally}", way.label());
            }
            total += tally;
            runs.push(json!({
                "adapter": target.device.name(),
                "method": way.method_name(),
                "passed": tally.passed,
                "failed": tally.failed,
                "skipped": tally.skipped,
            }));
        }
    }
    if let Some(path) = &args.forms.json {
        let report = json!({
            "folder": dir.display().to_string(),
            "passed": total.passed,
            "failed": total.failed,
            "skipped": total.skipped,
            "runs": runs,
            "cases": report,
        });
        files::write_json(path, &report)?;
    }
    anstream::println!("{total}");
    Ok(total.failed == 0)
}

/// A device, and how calls are computed on it.
struct Way<'a> {
    target: &'a Target,
    method: Option<Method>,
    /// Whether there are others.
    several: bool,
}

impl Way<'_> {
    fn method_name(&self) -> Option<String> {
        self.method.map(|method| method.to_string())
    }

    /// The device, and the method where it is not what calls run by themselves.
    fn label(&self) -> String {
        match self.method {
            None | Some(Method::Auto) => self.target.label(),
            Some(method) => format!("{}, {method}", self.target.label()),
        }
    }

    fn check(&self, args: &CheckArgs, dir: &Path, names: &[String], report: &mut Vec<serde_json::Value>) -> Tally {
        let mut tally = Tally::default();
        let mut bar = Bar::new(names.len());
        for name in names {
            let outcome = self.run_case(dir, name);
            match outcome.status() {
                "passed" => tally.passed += 1,
                "failed" => tally.failed += 1,
                _ => tally.skipped += 1,
            }
            let shown = match self.method {
                Some(method) if self.several && method != Method::Auto => format!("{name} by {method}"),
                _ => name.clone(),
            };
            for line in lines(&shown, &outcome, args.verbose) {
                bar.line(&line);
            }
            report.push(self.entry(name, &outcome));
            bar.step(name);
        }
        tally
    }

    fn run_case(&self, dir: &Path, name: &str) -> Outcome {
        let case = Case::read(&dir.join(format!("{name}.safetensors")));
        let compute = |case| compute(&case, &self.target.device, self.method.unwrap_or_default());
        match case.map_err(Stop::Error).and_then(compute) {
            Ok(all) => Outcome::Compared(all),
            Err(Stop::Skip(reason)) => Outcome::Skipped(reason),
            Err(Stop::Error(error)) => Outcome::Broken(error.to_string()),
        }
    }

    fn entry(&self, name: &str, outcome: &Outcome) -> serde_json::Value {
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
            "adapter": self.target.device.name(),
            "method": self.method_name(),
            "status": outcome.status(),
            "reason": reason,
            "outputs": outputs,
        })
    }
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

fn lines(name: &str, outcome: &Outcome, verbose: bool) -> Vec<String> {
    match outcome {
        Outcome::Broken(reason) => vec![format!("FAILED {name}: {reason}")],
        Outcome::Skipped(reason) if verbose => vec![format!("skipped {name}: {reason}")],
        Outcome::Skipped(_) => Vec::new(),
        Outcome::Compared(all) => all
            .iter()
            .filter(|one| verbose || !one.ok || one.reason.is_some())
            .map(|one| {
                let head =
                    format!("{} {name}: {} against {}", if one.ok { "ok" } else { "FAILED" }, one.output, one.against);
                match (&one.worst, &one.reason) {
                    (Some(worst), reason) => format!(
                        "{head}: difference {:.2e}, allowed {:.2e}, at {:?} ({:e} instead of {:e}){}",
                        worst.difference,
                        worst.allowed,
                        worst.index,
                        worst.got,
                        worst.expected,
                        reason.iter().map(|reason| format!("; {reason}")).collect::<String>()
                    ),
                    (None, Some(reason)) => format!("{head}: {reason}"),
                    (None, None) => format!("{head}: empty"),
                }
            })
            .collect(),
    }
}
