//! The suite's options of `attn check`.

use std::path::PathBuf;

use clap::Args;

use super::faults::Fault;
use super::plan::{self, Selection};

#[derive(Args, Debug)]
#[command(next_help_heading = "Suite")]
pub struct SuiteArgs {
    /// Some hundred cases instead of thousands
    #[arg(long)]
    pub quick: bool,
    /// Only this op (attention, softmax, onnx, torch ...); may be repeated
    #[arg(long = "op", value_name = "NAME")]
    pub ops: Vec<String>,
    /// Only this variant (auto, fused, three-passes, a cut such as rows4x64/keys4); may be repeated
    #[arg(long = "variant", value_name = "NAME", value_parser = parse_variant)]
    pub variants: Vec<String>,
    /// Print the cases, and run none
    #[arg(long, conflicts_with_all = ["Forms", "repro"])]
    pub list: bool,
    /// What random cases are drawn from
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// How long a case may take, compilation included, before its driver counts as hung
    #[arg(long, value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub time_limit: u64,
    /// Run one case, by the id that a report gives
    #[arg(long, value_name = "CASE-ID", conflicts_with_all = ["Forms", "quick", "ops", "variants", "seed", "filter"])]
    pub repro: Option<String>,
    /// Make the case of --repro as small as it still fails, and print all that a bug report needs
    #[arg(long, requires = "repro", conflicts_with = "dawn")]
    pub shrink: bool,
    /// Known faults of drivers, instead of those that the program carries
    #[arg(long, value_name = "FILE")]
    pub known_issues: Option<PathBuf>,
    /// Break something on purpose, to see that it is found
    #[arg(long, value_name = "FAULT", value_enum)]
    pub plant: Option<Fault>,
    /// Run single calls on Dawn for Node too, Chrome's WebGPU, from exported plans (ATTN_DAWN says where it is)
    #[arg(long)]
    pub dawn: bool,
    /// For the program's own use
    #[arg(long, hide = true, value_name = "ORDER")]
    pub worker: Option<String>,
}

fn parse_variant(text: &str) -> Result<String, String> {
    text.parse().map(plan::variant).map_err(|error: wgpu_attention::Error| error.to_string())
}

impl SuiteArgs {
    pub fn selection(&self, filter: Option<&str>) -> Selection {
        Selection {
            quick: self.quick,
            seed: self.seed,
            ops: self.ops.clone(),
            variants: self.variants.clone(),
            filter: filter.map(str::to_string),
            only: None,
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
