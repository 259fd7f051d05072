//! What changed between two reports.

use std::collections::{HashMap, HashSet};
use std::fmt::Write;

use super::data::{Adapter, CaseResult, Observed, Report, Status, Tally, short, visible};
use super::table::groups;

/// An NMSE below this is rounding error, however much it grew.
const NOISE: f64 = 1e-14;
/// The factor by which an NMSE must grow to count.
const GROWTH: f64 = 10.0;
/// Groups of cases shown for each kind of change.
const MOST_GROUPS: usize = 10;

/// What changed, as text.
pub struct Diff {
    pub text: String,
    /// Whether anything got worse: a case newly fails, a new case fails, a case that passed is skipped or missing, a
    /// second run no longer gives the same bits, or an adapter ended early or is missing.
    pub regressed: bool,
}

/// Kinds of change of a case; regressions come first.
#[derive(Clone, Copy, PartialEq)]
enum Change {
    Fails,
    Missing,
    Skipped,
    OtherBits,
    NewFails,
    Inaccurate,
    Passes,
    Status,
    New,
    Gone,
}

const CHANGES: [(Change, &str); 10] = [
    (Change::Fails, "REGRESSION: newly failing"),
    (Change::Missing, "REGRESSION: passed, and no longer there"),
    (Change::Skipped, "REGRESSION: passed, and skipped now"),
    (Change::OtherBits, "REGRESSION: a second run no longer gives the same bits"),
    (Change::NewFails, "REGRESSION: new cases that fail"),
    (Change::Inaccurate, "less accurate (NMSE more than 10 times larger)"),
    (Change::Passes, "newly passing"),
    (Change::Status, "another status"),
    (Change::New, "new cases"),
    (Change::Gone, "cases no longer there that had not passed"),
];

/// A case that changed. If it is missing from the new report, `result` is the old one.
struct Changed<'a> {
    change: Change,
    result: &'a CaseResult,
    what: String,
}

/// Compares `new` with `old`. Adapters are paired by position if both reports have the same number, so that a driver
/// may change its name; otherwise by name and backend, in order if several have the same. Cases are paired by id, and
/// if an id is missing, by what is computed, because other subgroups or limits assign cases to other variants.
pub fn diff(old: &Report, new: &Report) -> Diff {
    let mut text = String::new();
    let mut regressed = false;
    let folder = |of: &Report| of.folder.clone().unwrap_or("none".into());
    for (name, a, b) in [
        ("attn", &old.version, &new.version),
        ("wgpu", &old.wgpu, &new.wgpu),
        ("naga", &old.naga, &new.naga),
        ("suite", &old.suite, &new.suite),
        ("folder", &folder(old), &folder(new)),
        ("seed", &old.seed.to_string(), &new.seed.to_string()),
        ("host", &old.host, &new.host),
    ] {
        moved(&mut text, name, a, b);
    }
    let pairs = pairs(&old.adapters, &new.adapters);
    for (at, adapter) in old.adapters.iter().enumerate() {
        if !pairs.iter().any(|&(a, _)| a == Some(at)) {
            regressed = true;
            let tally = Tally::of(old.of_adapter(at));
            let _ = writeln!(text, "REGRESSION: {} is no longer there: {tally}", adapter.label());
        }
    }
    for &(a, b) in &pairs {
        let adapter = &new.adapters[b];
        let label = adapter.label();
        let Some(a) = a else {
            let _ = writeln!(text, "{label} is new: {}", Tally::of(new.of_adapter(b)));
            continue;
        };
        for line in device(&old.adapters[a], adapter) {
            let _ = writeln!(text, "{label}: {line}");
        }
        match (&old.adapters[a].ended, &adapter.ended) {
            (None, Some(how)) => {
                regressed = true;
                let _ = writeln!(text, "REGRESSION: {label} ended early: {}", visible(how));
            }
            (Some(how), None) => _ = writeln!(text, "{label} no longer ends early: {}", visible(how)),
            (Some(a), Some(b)) if a != b => {
                let _ = writeln!(text, "{label} ended early: {}; was: {}", visible(b), visible(a));
            }
            _ => {}
        }
        let changed = cases(old.of_adapter(a), new.of_adapter(b));
        for (change, title) in CHANGES {
            let of: Vec<&Changed<'_>> = changed.iter().filter(|one| one.change == change).collect();
            regressed |= !of.is_empty() && title.starts_with("REGRESSION");
            section(&mut text, &format!("{label}: {title}"), &of);
        }
    }
    let times = times(old, new, &pairs);
    match (text.is_empty(), times.is_empty()) {
        (true, true) => text.push_str("nothing changed\n"),
        (true, false) => _ = writeln!(text, "nothing changed except the time: {times}"),
        (false, true) => {}
        (false, false) => _ = writeln!(text, "time: {times}"),
    }
    Diff { text, regressed }
}

fn moved(text: &mut String, name: &str, old: &str, new: &str) {
    if old != new {
        let _ = writeln!(text, "{name}: {}, was {}", visible(new), visible(old));
    }
}

/// The new adapters in order, each with the old one that it is compared with.
fn pairs(old: &[Adapter], new: &[Adapter]) -> Vec<(Option<usize>, usize)> {
    if old.len() == new.len() {
        return (0..new.len()).map(|at| (Some(at), at)).collect();
    }
    let mut taken = HashSet::new();
    let is_same = |a: &Adapter, b: &Adapter| (&a.name, &a.backend) == (&b.name, &b.backend);
    let mut pair = |b: &Adapter| (0..old.len()).find(|&a| is_same(&old[a], b) && taken.insert(a));
    new.iter().enumerate().map(|(at, adapter)| (pair(adapter), at)).collect()
}

/// Changes of the device itself.
fn device(old: &Adapter, new: &Adapter) -> Vec<String> {
    let mut lines = String::new();
    let range = |of: &Adapter| of.subgroups.map_or("none".into(), |[least, most]| format!("{least} to {most}"));
    let pci = |of: &Adapter| format!("{:#06x}:{:#06x}", of.vendor, of.device);
    for (name, a, b) in [
        ("name", &old.name, &new.name),
        ("backend", &old.backend, &new.backend),
        ("kind", &old.kind, &new.kind),
        ("PCI ids", &pci(old), &pci(new)),
        ("driver", &old.driver_label(), &new.driver_label()),
        ("shader compiler", &old.shader_compiler, &new.shader_compiler),
        ("declared subgroups", &range(old), &range(new)),
    ] {
        moved(&mut lines, name, a, b);
    }
    let of = |adapter: &Adapter| adapter.features.iter().cloned().collect::<HashSet<_>>();
    let (a, b) = (of(old), of(new));
    for (what, one, other) in [("new", &b, &a), ("lost", &a, &b)] {
        let mut names: Vec<&str> = one.difference(other).map(String::as_str).collect();
        names.sort();
        if !names.is_empty() {
            let _ = writeln!(lines, "{what} features: {}", visible(&names.join(" ")));
        }
    }
    let names = old.limits.keys().chain(new.limits.keys().filter(|name| !old.limits.contains_key(*name)));
    for name in names {
        let of = |adapter: &Adapter| adapter.limits.get(name).map_or("unknown".into(), u64::to_string);
        moved(&mut lines, &visible(name), &of(old), &of(new));
    }
    for b in &new.observed {
        if let Some(a) = old.observed.iter().find(|a| a.workgroup == b.workgroup && *a != b) {
            let of = |seen: &Observed| match seen.subgroup {
                Some(size) => format!("{} invocations in subgroups of {size}", seen.invocations),
                None => format!("{} invocations", seen.invocations),
            };
            moved(&mut lines, &format!("workgroup of {}", b.workgroup), &of(a), &of(b));
        }
    }
    lines.lines().map(str::to_string).collect()
}

/// Changes of the cases of a pair of adapters.
fn cases<'a>(
    old: impl Iterator<Item = &'a CaseResult> + Clone,
    new: impl Iterator<Item = &'a CaseResult> + Clone,
) -> Vec<Changed<'a>> {
    let before: HashMap<&str, &CaseResult> = old.clone().map(|result| (result.id.as_str(), result)).collect();
    let after: HashSet<&str> = new.clone().map(|result| result.id.as_str()).collect();
    // Pair the remaining results by case, ignoring the variant.
    let mut single: HashMap<&str, Vec<&CaseResult>> = HashMap::new();
    for result in old.clone().filter(|result| !after.contains(result.id.as_str())) {
        single.entry(case(result)).or_default().push(result);
    }
    let mut all = Vec::new();
    for result in new {
        let reason = |lead: String| match &result.reason {
            Some(reason) => format!("{lead}: {}", visible(reason)),
            None => lead,
        };
        let word = result.status.word();
        let same = before.get(result.id.as_str()).copied();
        let mut other = || single.get_mut(case(result)).filter(|all| all.len() == 1)?.pop();
        let Some(a) = same.or_else(&mut other) else {
            let change = if result.status == Status::Failed { Change::NewFails } else { Change::New };
            all.push(Changed { change, result, what: reason(word.into()) });
            continue;
        };
        let change = match (a.status, result.status) {
            (a, b) if a == b => None,
            (_, Status::Failed) => Some(Change::Fails),
            (Status::Mended, Status::Passed) => Some(Change::Status),
            (_, Status::Passed) => Some(Change::Passes),
            (Status::Passed, Status::Skipped) => Some(Change::Skipped),
            _ => Some(Change::Status),
        };
        if let Some(change) = change {
            let by = if same.is_some() { String::new() } else { format!(" by {}", visible(&a.variant)) };
            all.push(Changed { change, result, what: reason(format!("{word}, was {}{by}", a.status.word())) });
        }
        if a.same_bits == Some(true) && result.same_bits == Some(false) {
            all.push(Changed { change: Change::OtherBits, result, what: word.into() });
        }
        if change != Some(Change::Fails)
            && let Some(what) = same.and_then(|a| less_accurate(a, result))
        {
            all.push(Changed { change: Change::Inaccurate, result, what });
        }
    }
    let left: HashSet<&str> = single.values().flatten().map(|result| result.id.as_str()).collect();
    for result in old.filter(|result| left.contains(result.id.as_str())) {
        let change = if result.status == Status::Passed { Change::Missing } else { Change::Gone };
        all.push(Changed { change, result, what: format!("was {}", result.status.word()) });
    }
    all
}

/// An id without its variant.
fn case(result: &CaseResult) -> &str {
    result.id.rsplit_once('@').map_or(result.id.as_str(), |(case, _)| case)
}

/// The first output whose NMSE grew.
fn less_accurate(old: &CaseResult, new: &CaseResult) -> Option<String> {
    new.outputs.iter().find_map(|b| {
        let a = old.outputs.iter().find(|a| (&a.name, &a.against) == (&b.name, &b.against))?;
        // NaN is worse than any number.
        let grew = a.nmse.is_finite() && (!b.nmse.is_finite() || b.nmse > GROWTH * a.nmse && b.nmse > NOISE);
        grew.then(|| format!("NMSE of {} {}, was {}", visible(&b.name), short(b.nmse), short(a.nmse)))
    })
}

fn section(text: &mut String, title: &str, changed: &[&Changed<'_>]) {
    if changed.is_empty() {
        return;
    }
    let _ = writeln!(text, "{title}: {}", changed.len());
    // A result occurs once per kind of change.
    let whats: HashMap<&str, &str> = changed.iter().map(|one| (one.result.id.as_str(), one.what.as_str())).collect();
    let groups = groups(changed.iter().map(|one| one.result));
    for group in groups.iter().take(MOST_GROUPS) {
        let id = group.results[0].id.as_str();
        let _ = writeln!(text, "  {}, the first {}: {}", group.title(), visible(id), whats[id]);
    }
    let left: usize = groups.iter().skip(MOST_GROUPS).map(|group| group.results.len()).sum();
    if left > 0 {
        let _ = writeln!(text, "  and {left} more");
    }
}

/// Times that differ.
fn times(old: &Report, new: &Report, pairs: &[(Option<usize>, usize)]) -> String {
    let mut parts = Vec::new();
    let mut total = (0.0, 0.0);
    for &(a, b) in pairs {
        let Some(a) = a else { continue };
        let (before, after) = (old.adapters[a].seconds, new.adapters[b].seconds);
        total = (total.0 + before, total.1 + after);
        if before != after {
            parts.push(format!("{} {after:.1} s, was {before:.1} s", new.adapters[b].label()));
        }
    }
    if parts.len() > 1 {
        parts.push(format!("together {:.1} s, was {:.1} s", total.1, total.0));
    }
    parts.join("; ")
}
