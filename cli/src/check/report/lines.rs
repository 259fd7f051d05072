//! One-line results for the cases of a folder, printed as soon as they are available.

use super::data::{Adapter, CaseResult, Output, Status, visible};
use crate::check::compare::difference;

/// The lines for a result. For a failure: every wrong output. For a pass: what was ignored. If `verbose`: every output
/// of every case. `on` names the adapter if there are several.
pub fn lines(result: &CaseResult, on: Option<&Adapter>, verbose: bool) -> Vec<String> {
    let word = match result.status {
        Status::Passed => "ok",
        Status::Failed => "FAILED",
        Status::Skipped => "skipped",
        Status::Known => "known",
        Status::Mended => "MENDED",
    };
    let on = on.map_or(String::new(), |adapter| format!(" on {}", adapter.label()));
    let line =
        |word: &str, parts: &[&str]| format!("{word} {}{on}: {}", visible(&result.id), visible(&parts.join("; ")));
    let is_bad = matches!(result.status, Status::Failed | Status::Mended);
    // An output that could not be compared has no numbers; the reason covers it.
    let has_numbers = |output: &&Output| output.ok || output.count > 0;
    let shown = result.outputs.iter().filter(|output| verbose || is_bad && !output.ok).filter(has_numbers);
    let note = result.note.as_deref();
    let mut all: Vec<String> = shown
        .map(|output| {
            let numbers = output.numbers();
            let parts: Vec<&str> = [Some(numbers.as_str()), note].into_iter().flatten().collect();
            line(if output.ok { "ok" } else { word }, &parts)
        })
        .collect();
    let by_numbers =
        result.outputs.iter().any(|output| !output.ok) && result.outputs.iter().all(|one| has_numbers(&one));
    match (&result.reason, note) {
        (Some(reason), _) if (verbose || is_bad) && !by_numbers => all.push(line(word, &[reason])),
        (None, Some(note)) if all.is_empty() => all.push(line(word, &[note])),
        _ => {}
    }
    all
}

impl Output {
    /// A description of the worst element.
    fn numbers(&self) -> String {
        let Output { name, against, allowed, worst, got, expected, .. } = self;
        let head = format!("{name} against {against}");
        if worst.is_empty() && self.count == 0 {
            return format!("{head}: empty");
        }
        let off = difference(*got, *expected);
        format!("{head}: difference {off:.2e}, allowed {allowed:.2e}, at {worst:?} ({got:e} instead of {expected:e})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(status: Status, reason: Option<&str>, outputs: &[(bool, u64)]) -> CaseResult {
        let output = |&(ok, count): &(bool, u64)| Output {
            name: "out".into(),
            against: "ref64".into(),
            ok,
            count,
            worst: vec![0; (count > 0).into()],
            ..Output::default()
        };
        CaseResult {
            id: "a@auto".into(),
            status,
            reason: reason.map(str::to_string),
            outputs: outputs.iter().map(output).collect(),
            ..CaseResult::default()
        }
    }

    #[test]
    fn what_is_wrong_is_told_and_the_rest_where_asked() {
        let numbers = "out against ref64: difference 0.00e0, allowed 0.00e0, at [0] (0e0 instead of 0e0)";
        let wrong = result(Status::Failed, Some("out is off"), &[(true, 1), (false, 1)]);
        assert_eq!(lines(&wrong, None, false), [format!("FAILED a@auto: {numbers}")]);
        assert_eq!(lines(&wrong, None, true), [format!("ok a@auto: {numbers}"), format!("FAILED a@auto: {numbers}")]);
        // Nothing could be compared, or only the bits of a second run differ.
        for outputs in [&[(false, 0), (true, 1)][..], &[(true, 1)], &[]] {
            let failed = result(Status::Failed, Some("the \u{1b}shape"), outputs);
            let on = Adapter { name: "llvmpipe".into(), backend: "GL".into(), ..Adapter::default() };
            assert_eq!(lines(&failed, Some(&on), false), ["FAILED a@auto on llvmpipe (GL): the \\u{1b}shape"]);
        }
        let mut passed = result(Status::Passed, None, &[(true, 1), (true, 0)]);
        assert_eq!(lines(&passed, None, false), [""; 0]);
        let all = [format!("ok a@auto: {numbers}"), "ok a@auto: out against ref64: empty".to_string()];
        assert_eq!(lines(&passed, None, true), all);
        passed.note = Some("not known".into());
        assert_eq!(lines(&passed, None, false), ["ok a@auto: not known"]);
        let skipped = result(Status::Skipped, Some("lacks f16"), &[]);
        assert_eq!(lines(&skipped, None, false), [""; 0]);
        assert_eq!(lines(&skipped, None, true), ["skipped a@auto: lacks f16"]);
    }
}
