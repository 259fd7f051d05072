//! A Markdown table of what passes where, for a README or an issue.

use std::collections::{BTreeSet, HashMap};
use std::fmt::Write;

use super::data::{CaseResult, Report, Tally, visible};

/// A row per op; `long`: per op, variant and storage type.
pub fn text(report: &Report, long: bool) -> String {
    let mut out = String::new();
    let Report { version, wgpu, date, .. } = report;
    let day = date.split('T').next().unwrap_or_default();
    let head = format!("attn {version}, wgpu {wgpu}, {}, {day}", report.cases());
    let _ = writeln!(out, "{}\n", escaped(&head));
    for (at, adapter) in report.adapters.iter().enumerate() {
        let driver = match adapter.driver_label() {
            driver if driver.is_empty() => String::new(),
            driver => format!(", {driver}"),
        };
        let backend = if adapter.backend.is_empty() { "unknown backend" } else { &adapter.backend };
        let tally = Tally::of(report.of_adapter(at));
        let _ = write!(out, "- **{}**: {}", escaped(&adapter.name), escaped(&format!("{backend}{driver}: {tally}")));
        match &adapter.ended {
            Some(ended) => _ = writeln!(out, "; **ended early**: {}", escaped(ended)),
            None => out.push('\n'),
        }
    }
    out.push('\n');

    let mut head = if long { vec!["op".into(), "variant".into()] } else { vec!["op".to_string()] };
    head.push("storage".into());
    let named = head.len();
    head.extend(report.adapters.iter().map(|adapter| escaped(&adapter.label())));
    row(&mut out, &head);
    let rule = |at: usize| if at < named { "---".to_string() } else { "--:".into() };
    row(&mut out, &(0..head.len()).map(rule).collect::<Vec<_>>());

    // In the order of the run; if `long`, grouped by op and sorted by variant and storage type.
    let mut rows: Vec<(Vec<&str>, Vec<&CaseResult>)> = Vec::new();
    let mut places = HashMap::new();
    for result in &report.results {
        let key: Vec<&str> =
            if long { vec![&result.op, &result.variant, &result.storage] } else { vec![result.op.as_str()] };
        let at = *places.entry(key.clone()).or_insert_with(|| {
            rows.push((key, Vec::new()));
            rows.len() - 1
        });
        rows[at].1.push(result);
    }
    if long {
        let first = |op: &str| report.results.iter().position(|result| result.op == op);
        rows.sort_by_cached_key(|(key, _)| (first(key[0]), key[1].to_string(), key[2].to_string()));
    }
    for (key, results) in &rows {
        let mut cells: Vec<String> = key.iter().map(|name| escaped(name)).collect();
        if !long {
            let storages: BTreeSet<&str> = results.iter().map(|result| result.storage.as_str()).collect();
            // f32 f16 bf16
            let storages: Vec<&str> = storages.into_iter().rev().collect();
            cells.push(escaped(&storages.join(" ")));
        }
        let of = |at: usize| results.iter().copied().filter(move |result| result.adapter == at);
        cells.extend((0..report.adapters.len()).map(|at| cell(Tally::of(of(at)))));
        row(&mut out, &cells);
    }
    out.push_str(
        "\n✓ passed, ✗ failed, known: failed as a known issue says, – not computed: a feature or limit is missing, or \
         the op is not known\n",
    );
    out
}

fn row(out: &mut String, cells: &[String]) {
    let _ = writeln!(out, "| {} |", cells.join(" | "));
}

fn cell(tally: Tally) -> String {
    let computed = tally.computed();
    let mut parts = Vec::new();
    match (tally.failed, tally.passed) {
        (0, 0) => {}
        (0, passed) => parts.push(format!("✓ {passed}")),
        (failed, _) => parts.push(format!("✗ {failed} of {computed}")),
    }
    let more = [("mended", tally.mended), ("known", tally.known)];
    parts.extend(more.iter().filter(|(_, count)| *count > 0).map(|(name, count)| format!("{name} {count}")));
    match (computed, tally.skipped) {
        (0, _) => parts.push("–".into()),
        (_, 0) => {}
        (_, skipped) => parts.push(format!("– {skipped}")),
    }
    parts.join(", ")
}

/// A text with Markdown's special characters escaped.
fn escaped(text: &str) -> String {
    let mut out = String::new();
    for c in visible(text).chars() {
        match c {
            '<' => out.push_str("&lt;"),
            '&' => out.push_str("&amp;"),
            '\\' | '|' | '>' | '*' | '_' | '`' | '[' | ']' | '~' | '#' | '$' | '!' => out.extend(['\\', c]),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_tells_the_worst_first() {
        let tally = |passed, failed, skipped, known, mended| Tally { passed, failed, skipped, known, mended };
        assert_eq!(cell(tally(240, 0, 0, 0, 0)), "✓ 240");
        assert_eq!(cell(tally(238, 2, 0, 0, 0)), "✗ 2 of 240");
        assert_eq!(cell(tally(0, 0, 0, 3, 0)), "known 3");
        assert_eq!(cell(tally(0, 0, 9, 0, 0)), "–");
        assert_eq!(cell(tally(0, 0, 0, 0, 0)), "–");
        assert_eq!(cell(tally(5, 1, 4, 2, 1)), "✗ 1 of 9, mended 1, known 2, – 4");
    }

    #[test]
    fn no_name_breaks_the_table() {
        assert_eq!(escaped("a|b*c_d<script>\n"), r"a\|b\*c\_d&lt;script\>\\n");
    }
}
