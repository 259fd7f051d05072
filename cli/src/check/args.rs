//! The options of `attn check`, and their dispatch.

use std::path::PathBuf;

use clap::Args;

use super::report;
use super::suite::{self, Folder, Wanted};
use crate::error::{Result, usage};

#[derive(Args, Debug)]
#[command(after_help = "\
Without DIR, attn check runs the suite on every adapter and on the CPU backend, each in its own process. The suite \
has the built-in cases of ONNX, PyTorch, transformers, Keras and JAX, and more than 5,400 cases drawn from --seed, \
over every op, storage type and kernel variant. A drawn f32 result may be off by 3e-6 of the largest value (3e-5 for \
sums over recomputed weights), with an NMSE of at most 1e-10 against float64. f16 and bf16 results may also be off \
by their rounding. Each case runs twice and must give the same bits. docs/check.md explains the report.

With DIR, attn check runs a folder of cases on the best adapter or on those that --adapter selects. Cases are \
safetensors files whose header's __metadata__ holds a JSON text `case` that says what to compute. in.* and param.* \
are input tensors; out.* (ONNX), ref64.* (float64) and out32.* (transformers) are expected results. Tolerances: for \
ONNX the case's own, and for f32 also 5e-6 of the largest value from float64. For PyTorch f32 twice the error of \
PyTorch's own f32 and 8 ulp, for f16 the error of PyTorch's own f16. PyTorch records no error for weights; they may \
be as far off as its output, relative to the largest value. For transformers twice the error of its own f32, or 5e-6 \
of the largest value if none is recorded. Each case runs twice. Failures are printed as they happen. The report has \
the same forms as the suite's. Its ids, NAME@METHOD, can be passed to --repro with the same DIR.

Ops keras.MultiHeadAttention, keras.GroupQueryAttention and jax.nn.dot_product_attention hold a call of that function: \
arguments by name (missing ones have their defaults), tensors as in.NAME, Keras's weights as param.query/kernel and so \
on. out32.* (or t32.*) is the framework's own result. An unknown tensor skips the case; an unknown argument is named \
with the result.

Methods: auto (the default of a call), three-passes, fused, a tile of the fused kernel such as \
rows8x8/keys8/subgroup8 or rows4x64/keys4, or all: three-passes, fused and a fixed list of tiles with and without \
subgroups. If a method cannot compute a case, or an op has no methods, the case is skipped with the reason. The CPU \
backend has one method only.

Exit status: 0 if all cases passed or failed as known, 1 for a failure or if every case was skipped, 2 for wrong \
usage, 3 without an adapter.

Examples:
  attn check --quick
  attn check --html report.html --json report.json
  attn check --adapter vulkan --op attention --variant fused
  attn check --repro attention/plain/f32/1000000@fused --shrink
  attn check --diff before.json after.json
  attn check conformance/cases/onnx --html report.html
  attn check conformance/cases/torch --adapter vulkan --method all
  attn check conformance/cases/torch --adapter cpu --filter mask --verbose
  attn check conformance/cases/torch --repro sdpa_dim005@fused")]
pub struct CheckArgs {
    /// A folder of cases instead of the suite; index.json lists them, or else every .safetensors file is a case
    dir: Option<PathBuf>,
    #[command(flatten)]
    suite: suite::SuiteArgs,
    /// Run only cases whose name contains this
    #[arg(long, value_name = "SUBSTR")]
    filter: Option<String>,
    /// Compute the cases with this method; may be repeated
    #[arg(long = "method", value_name = "NAME", value_parser = suite::parse_method, default_value = "auto")]
    methods: Vec<String>,
    /// Print every case of a folder, not only those that fail
    #[arg(short, long)]
    verbose: bool,
    #[command(flatten)]
    forms: report::Forms,
    /// Run nothing: show a report that --json wrote, and write it in other forms; exit status 0 whatever it contains
    #[arg(long, value_name = "REPORT", help_heading = "Report", conflicts_with_all = ["dir", "filter", "methods", "verbose", "SuiteArgs"])]
    from: Option<PathBuf>,
    /// Run nothing: show what changed between two reports that --json wrote; exit status 1 if a case fails that did not
    /// fail before, a case that passed is skipped or missing, a second run gives different bits, or an adapter is
    /// missing or ended early
    #[arg(long, value_names = ["OLD", "NEW"], num_args = 2, help_heading = "Report",
        conflicts_with_all = ["dir", "filter", "methods", "verbose", "from", "SuiteArgs", "Forms"])]
    diff: Option<Vec<PathBuf>>,
}

/// Whether the check passed.
pub fn check(args: &CheckArgs, adapter: Option<&str>) -> Result<bool> {
    if let Some(order) = &args.suite.worker {
        return suite::work(order);
    }
    if let Some(option) = args.from.as_ref().map(|_| "--from").or(args.diff.as_ref().map(|_| "--diff"))
        && adapter.is_some()
    {
        usage!("{option} runs nothing, so it cannot be combined with --adapter");
    }
    if let Some(path) = &args.from {
        report::show(path, &args.forms)?;
        return Ok(true);
    }
    if let Some([old, new]) = args.diff.as_deref() {
        return report::diff(old, new);
    }
    match &args.dir {
        Some(dir) => {
            if let Some(option) = args.suite.only_without_a_folder() {
                let dir = dir.display();
                usage!("{option} is for the built-in suite; leave out the folder {dir}");
            }
        }
        None if args.verbose || args.methods != ["auto"] => {
            let option = if args.verbose { "--verbose" } else { "--method" };
            usage!("{option} is for a folder of cases; the suite runs every variant, or those of --variant");
        }
        None => {}
    }
    args.forms.check_folders()?;
    let folder = args.dir.as_ref().map(|dir| Folder { dir: dir.clone(), methods: args.methods.clone() });
    let wanted = Wanted { filter: args.filter.as_deref(), adapter, folder, verbose: args.verbose };
    suite::check(&args.suite, &wanted, |found| {
        args.forms.write(found)?;
        report::print(found);
        Ok(())
    })
}
