//! JUnit XML for tools that collect test results: one suite per adapter.

use std::path::Path;
use std::time::Duration;

use quick_junit::{NonSuccessKind, Property, TestCase, TestCaseStatus, TestSuite, XmlString};

use super::data::{Adapter, CaseResult, Report, Status, visible};
use crate::error::{Error, Result};
use crate::files;

pub fn write(path: &Path, report: &Report) -> Result<()> {
    let cannot = |error: &dyn std::fmt::Display| Error::Failed(format!("cannot write {}: {error}", path.display()));
    files::write_whole(path, |file| xml(report).serialize(file).map_err(|error| cannot(&error)))
}

fn xml(report: &Report) -> quick_junit::Report {
    let mut all = quick_junit::Report::new("attn check");
    all.timestamp = report.date.parse().ok();
    let mut total = Duration::ZERO;
    for (at, adapter) in report.adapters.iter().enumerate() {
        let mut suite = TestSuite::new(adapter.label());
        let time = seconds(adapter.seconds);
        total = total.saturating_add(time);
        suite.set_time(time);
        suite.timestamp = all.timestamp;
        suite.add_properties(properties(report, adapter));
        suite.add_test_cases(report.of_adapter(at).map(|result| case(report, result)));
        if let Some(ended) = &adapter.ended {
            // Report cases that never ran as a failure, so that they are not overlooked.
            let mut status = TestCaseStatus::non_success(NonSuccessKind::Error);
            status.set_message(visible(ended));
            let mut case = TestCase::new("all cases run", status);
            case.set_classname("adapter");
            suite.add_test_case(case);
        }
        all.add_test_suite(suite);
    }
    all.set_time(total);
    all
}

/// 0 if it is not a valid time.
fn seconds(x: f64) -> Duration {
    Duration::try_from_secs_f64(x).unwrap_or_default()
}

fn properties(report: &Report, adapter: &Adapter) -> Vec<Property> {
    let mut all: Vec<(String, String)> = [
        ("version", &report.version),
        ("wgpu", &report.wgpu),
        ("naga", &report.naga),
        ("suite", &report.suite),
        ("host", &report.host),
        ("backend", &adapter.backend),
        ("kind", &adapter.kind),
        ("driver", &adapter.driver),
        ("driver_info", &adapter.driver_info),
        ("shader_compiler", &adapter.shader_compiler),
    ]
    .map(|(name, value)| (name.to_string(), value.clone()))
    .to_vec();
    all.extend(report.folder.iter().map(|folder| ("folder".into(), folder.clone())));
    all.push(("seed".into(), report.seed.to_string()));
    all.push(("vendor".into(), format!("{:#06x}", adapter.vendor)));
    all.push(("device".into(), format!("{:#06x}", adapter.device)));
    if let Some([least, most]) = adapter.subgroups {
        all.push(("subgroups".into(), format!("{least} to {most}")));
    }
    all.push(("features".into(), adapter.features.join(" ")));
    all.extend(adapter.limits.iter().map(|(name, value)| (format!("limits.{name}"), value.to_string())));
    all.iter().map(|(name, value)| Property::new(visible(name), visible(value))).collect()
}

fn case(report: &Report, result: &CaseResult) -> TestCase {
    let reason = result.reason.as_deref().unwrap_or("no reason is given");
    let issue = result.issue.as_deref().unwrap_or("unnamed");
    let (mut status, message) = match result.status {
        Status::Passed => (TestCaseStatus::success(), None),
        Status::Failed => (TestCaseStatus::non_success(NonSuccessKind::Failure), Some(reason.to_string())),
        Status::Skipped => (TestCaseStatus::skipped(), Some(reason.to_string())),
        Status::Known => (TestCaseStatus::skipped(), Some(format!("known issue {issue}: {reason}"))),
        Status::Mended => {
            let message = format!("passed, although the known issue {issue} says that it fails");
            (TestCaseStatus::non_success(NonSuccessKind::Failure), Some(message))
        }
    };
    if let Some(message) = message {
        status.set_type(result.status.word());
        status.set_message(visible(&message));
        if result.status != Status::Skipped {
            status.set_description(description(report, result));
        }
    }
    let mut case = TestCase::new(visible(&result.id), status);
    case.set_classname(visible(&format!("{}.{}.{}", result.op, result.variant, result.storage)));
    case.set_time(seconds(result.milliseconds / 1e3));
    if let Some(note) = &result.note {
        case.set_system_out(visible(note));
    }
    if !result.messages.is_empty() {
        case.set_system_err(result.messages.iter().map(|message| visible(message)).collect::<Vec<_>>().join("\n"));
    }
    case
}

/// All numbers, and how to reproduce them.
fn description(report: &Report, result: &CaseResult) -> XmlString {
    let mut lines = vec![report.repro(result)];
    lines.extend(result.outputs.iter().map(|output| {
        format!(
            "{} against {}: {}, largest error {:e} of {:e} allowed ({} ulp), NMSE {:e} of {:e}, at {:?} {:e} instead \
             of {:e}, {} of {} NaN",
            visible(&output.name),
            visible(&output.against),
            if output.ok { "ok" } else { "wrong" },
            output.max_abs,
            output.allowed,
            output.ulps,
            output.nmse,
            output.nmse_allowed,
            output.worst,
            output.got,
            output.expected,
            output.nans,
            output.count
        )
    }));
    if result.same_bits == Some(false) {
        lines.push("a second run gave different bits".into());
    }
    if !result.kernels.is_empty() {
        lines.push(format!("kernels: {}", visible(&result.kernels.join(", "))));
    }
    if let Some(why) = &result.why {
        lines.push(visible(why));
    }
    lines.join("\n").into()
}
