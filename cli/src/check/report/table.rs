//! The summary of a run in a terminal: a line per adapter, then the failures.

use std::fmt::Write;

use super::data::{CaseResult, Report, Status, Tally, short, visible, worst};
use crate::table::{align_right, table};

/// How many groups of failing results are shown.
const MOST_GROUPS: usize = 20;

pub fn text(report: &Report) -> String {
    let mut table = table();
    let all = Tally::of(&report.results);
    let number = |x: Option<f64>| x.map_or("–".into(), short);
    // Columns without any entries are omitted, because a terminal may have only 80 characters.
    let mut header = vec!["adapter", "passed", "failed", "skipped"];
    header.extend([("known", all.known), ("mended", all.mended)].iter().filter(|one| one.1 > 0).map(|one| one.0));
    header.extend(["worst NMSE", "worst ulp", "seconds"]);
    // A row for an adapter, or for a variant on it.
    let row = |label: String, results: Vec<&CaseResult>, seconds: Option<f64>| {
        let tally = Tally::of(results.iter().copied());
        let of = |name: &&str| match *name {
            "adapter" => label.clone(),
            "passed" => tally.passed.to_string(),
            "failed" => tally.failed.to_string(),
            "skipped" => tally.skipped.to_string(),
            "known" => tally.known.to_string(),
            "mended" => tally.mended.to_string(),
            "worst NMSE" => number(worst(results.iter().filter_map(|result| result.nmse()))),
            "worst ulp" => number(worst(results.iter().filter_map(|result| result.ulps()))),
            _ => seconds.map_or(String::new(), |seconds| format!("{seconds:.1}")),
        };
        header.iter().map(of).collect::<Vec<_>>()
    };
    for (at, adapter) in report.adapters.iter().enumerate() {
        table.add_row(row(adapter.label(), report.of_adapter(at).collect(), Some(adapter.seconds)));
        let variants = variants(report, at);
        for variant in variants.iter().filter(|_| report.folder.is_some() && variants.len() > 1) {
            let results = report.of_adapter(at).filter(|result| result.variant == *variant);
            table.add_row(row(format!("  {}", visible(variant)), results.collect(), None));
        }
    }
    table.set_header(&header);
    align_right(&mut table, 1..header.len());
    let mut out = format!("{table}\n");
    for adapter in &report.adapters {
        if let Some(ended) = &adapter.ended {
            let _ = writeln!(out, "ENDED {}: {}", adapter.label(), visible(ended));
        }
    }
    let bad = report.results.iter().filter(|result| matches!(result.status, Status::Failed | Status::Mended));
    let groups = groups(bad);
    for group in groups.iter().take(MOST_GROUPS) {
        let first = group.results[0];
        let verb = if first.status == Status::Mended { "MENDED" } else { "FAILED" };
        let numbers = [("NMSE", CaseResult::nmse as fn(&_) -> _), ("ulp", CaseResult::ulps)].map(|(name, of)| {
            let most = worst(group.results.iter().filter_map(|result| of(result)));
            most.map_or(String::new(), |most| format!(", worst {name} {}", short(most)))
        });
        let on = report.adapters[first.adapter].label();
        let _ = writeln!(out, "\n{verb} {} on {on}{}", group.title(), numbers.concat());
        let reason = match (first.status, &first.issue, &first.reason) {
            (Status::Mended, Some(issue), _) => format!("passes, although the known issue {issue} says that it fails"),
            (_, _, Some(reason)) => reason.clone(),
            _ => "no reason is given".into(),
        };
        let _ = writeln!(out, "  {}: {}\n  {}", visible(&first.id), visible(&reason), report.repro(first));
    }
    let left: usize = groups.iter().skip(MOST_GROUPS).map(|group| group.results.len()).sum();
    if left > 0 {
        let kinds = groups.len() - MOST_GROUPS;
        let _ = writeln!(out, "\nand {left} more in {kinds} more ops and variants; --html or --json FILE has all");
    }
    if let Some(first) = report.results.first().filter(|_| all.computed() == 0) {
        // Neither a failure nor a success.
        let reason = first.reason.as_deref().unwrap_or("no reason is given");
        let _ = writeln!(
            out,
            "NOTHING COMPUTED: all cases were skipped, the first {}: {}",
            visible(&first.id),
            visible(reason)
        );
    }
    // A blank line separates the failures above from the table.
    let _ = writeln!(out, "{}{all}", if groups.is_empty() { "" } else { "\n" });
    out
}

/// The variants of an adapter's results, in their order.
fn variants(report: &Report, adapter: usize) -> Vec<&str> {
    let mut all = Vec::new();
    for result in report.of_adapter(adapter) {
        if !all.contains(&result.variant.as_str()) {
            all.push(&result.variant);
        }
    }
    all
}

/// Results of one adapter, op, variant and status, in the order of the report.
pub struct Group<'a> {
    pub results: Vec<&'a CaseResult>,
}

impl Group<'_> {
    /// Op, variant and the number of cases, safe to print.
    pub fn title(&self) -> String {
        let CaseResult { op, variant, .. } = self.results[0];
        let count = self.results.len();
        format!("{}, {}: {count} case{}", visible(op), visible(variant), if count == 1 { "" } else { "s" })
    }
}

/// In the order of their first results.
pub fn groups<'a>(results: impl Iterator<Item = &'a CaseResult>) -> Vec<Group<'a>> {
    let mut groups: Vec<Group<'a>> = Vec::new();
    let mut places = std::collections::HashMap::new();
    for result in results {
        let key = (result.adapter, result.op.as_str(), result.variant.as_str(), result.status);
        let at = *places.entry(key).or_insert_with(|| {
            groups.push(Group { results: Vec::new() });
            groups.len() - 1
        });
        groups[at].results.push(result);
    }
    groups
}
