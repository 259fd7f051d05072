//! The suite's options of `attn check`.

use std::path::PathBuf;

use clap::Args;

use super::faults::Fault;
use super::folder::Folder;
use super::plan::Selection;
use super::variant::parse_variant;

#[derive(Args, Debug)]
#[command(next_help_heading = "Suite")]
pub struct SuiteArgs {
    /// Run a few hundred cases instead of thousands
    #[arg(long)]
    pub quick: bool,
    /// Run only this op (attention, softmax, onnx, torch ...); may be repeated
    #[arg(long = "op", value_name = "NAME")]
    pub ops: Vec<String>,
    /// Run only this variant (auto, fused, three-passes, a tile such as rows4x64/keys4); may be repeated
    #[arg(long = "variant", value_name = "NAME", value_parser = parse_variant)]
    pub variants: Vec<String>,
    /// List the cases without running them
    #[arg(long, conflicts_with_all = ["Forms", "repro"])]
    pub list: bool,
    /// Draw random cases from this seed
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// Time that a case may take, compilation included, before its driver counts as hung
    #[arg(long, value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub time_limit: u64,
    /// Run one case, by its id in a report
    #[arg(long, value_name = "CASE-ID", conflicts_with_all = ["Forms", "quick", "ops", "variants", "seed", "filter", "methods", "verbose"])]
    pub repro: Option<String>,
    /// Shrink the case of --repro to the smallest that still fails, and print everything that a bug report needs
    #[arg(long, requires = "repro", conflicts_with = "dawn")]
    pub shrink: bool,
    /// Known driver faults, instead of the built-in list
    #[arg(long, value_name = "FILE")]
    pub known_issues: Option<PathBuf>,
    /// Introduce a fault on purpose, to test that it is found
    #[arg(long, value_name = "FAULT", value_enum)]
    pub plant: Option<Fault>,
    /// Also run single calls on Dawn for Node, Chrome's WebGPU, from exported plans (ATTN_DAWN says where it is)
    #[arg(long)]
    pub dawn: bool,
    /// For internal use
    #[arg(long, hide = true, value_name = "ORDER")]
    pub worker: Option<String>,
}

/// Options outside the suite's own.
pub struct Wanted<'a> {
    pub filter: Option<&'a str>,
    pub adapter: Option<&'a str>,
    /// A folder of cases, instead of the suite.
    pub folder: Option<Folder>,
    /// Print a line for every case of the folder.
    pub verbose: bool,
}

impl SuiteArgs {
    pub fn selection(&self, wanted: &Wanted<'_>) -> Selection {
        Selection {
            quick: self.quick,
            seed: self.seed,
            ops: self.ops.clone(),
            variants: self.variants.clone(),
            filter: wanted.filter.map(str::to_string),
            folder: wanted.folder.clone(),
            only: None,
        }
    }

    /// The first given option that does not apply to a folder of cases.
    pub fn only_without_a_folder(&self) -> Option<&'static str> {
        let given = [
            ("--quick", self.quick),
            ("--op", !self.ops.is_empty()),
            ("--variant", !self.variants.is_empty()),
            ("--dawn", self.dawn),
        ];
        given.into_iter().find_map(|(name, given)| given.then_some(name))
    }
}
