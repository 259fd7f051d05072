//! Known driver faults: `known-issues.toml`.

use std::path::Path;

use regex_lite::Regex;
use serde::Deserialize;

use crate::check::report::{Adapter, CaseResult, Status};
use crate::error::{Error, Result, fail};
use crate::files;

/// The built-in list.
const CARRIED: &str = include_str!("../../../known-issues.toml");

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    issue: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    id: String,
    link: String,
    case: String,
    message: String,
    backend: Option<String>,
    vendor: Option<u32>,
    adapter: Option<String>,
    driver: Option<String>,
}

struct Issue {
    id: String,
    link: String,
    case: Regex,
    message: String,
    backend: Option<String>,
    vendor: Option<u32>,
    adapter: Option<Regex>,
    driver: Option<Regex>,
}

/// The backend names in reports.
const BACKENDS: [&str; 6] = ["Vulkan", "Metal", "DX12", "GL", "WebGPU", "CPU"];

pub struct Issues(Vec<Issue>);

impl Issues {
    /// Reads issues from a file, or the built-in list.
    pub fn read(path: Option<&Path>) -> Result<Issues> {
        let (name, text) = match path {
            None => ("known-issues.toml".to_string(), CARRIED.to_string()),
            Some(path) => {
                let name = path.display().to_string();
                match String::from_utf8(files::read_bytes(path)?) {
                    Ok(text) => (name, text),
                    Err(error) => fail!("{name} is not text: {error}"),
                }
            }
        };
        Issues::parse(&text).map_err(|reason| Error::Failed(format!("{name}: {reason}")))
    }

    fn parse(text: &str) -> Result<Issues, String> {
        let file: File = toml::from_str(text).map_err(|error| error.to_string())?;
        let issue = |entry: Entry| {
            let Entry { id, link, case, message, backend, vendor, adapter, driver } = entry;
            let pattern = |what: &str, text: String| {
                Regex::new(&text).map_err(|error| format!("the {what} of issue {id}, \"{text}\": {error}"))
            };
            if backend.is_none() && vendor.is_none() && adapter.is_none() && driver.is_none() {
                return Err(format!("issue {id} names no backend, vendor, adapter or driver"));
            }
            if message.is_empty() {
                return Err(format!("the message of issue {id} is empty: it must say how the case fails"));
            }
            if let Some(odd) =
                backend.as_ref().filter(|name| !BACKENDS.iter().any(|one| one.eq_ignore_ascii_case(name)))
            {
                return Err(format!("issue {id} names an unknown backend {odd}; there are {}", BACKENDS.join(", ")));
            }
            let case = pattern("case", case)?;
            let adapter = adapter.map(|text| pattern("adapter", text)).transpose()?;
            let driver = driver.map(|text| pattern("driver", text)).transpose()?;
            Ok(Issue { id, link, case, message, backend, vendor, adapter, driver })
        };
        file.issue.into_iter().map(issue).collect::<Result<_, _>>().map(Issues)
    }

    /// Marks a result that matches a known issue.
    pub fn apply(&self, adapter: &Adapter, result: &mut CaseResult) {
        let concerns = |issue: &&Issue| {
            let driver = format!("{} {}", adapter.driver, adapter.driver_info);
            issue.case.is_match(&result.id)
                && issue.backend.as_ref().is_none_or(|name| name.eq_ignore_ascii_case(&adapter.backend))
                && issue.vendor.is_none_or(|vendor| vendor == adapter.vendor)
                && issue.adapter.as_ref().is_none_or(|pattern| pattern.is_match(&adapter.name))
                && issue.driver.as_ref().is_none_or(|pattern| pattern.is_match(&driver))
        };
        let says = |issue: &&Issue| result.reason.as_ref().is_some_and(|reason| reason.contains(&issue.message));
        let mut all = self.0.iter().filter(concerns);
        match result.status {
            Status::Failed => {
                if let Some(issue) = all.find(says) {
                    result.status = Status::Known;
                    result.issue = Some(format!("{} ({})", issue.id, issue.link));
                }
            }
            Status::Passed => {
                if let Some(issue) = all.next() {
                    result.status = Status::Mended;
                    result.issue = Some(format!("{} ({})", issue.id, issue.link));
                    result.reason = Some(format!("passes, although the known issue {} says that it fails", issue.id));
                }
            }
            Status::Skipped | Status::Known | Status::Mended => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::suite::judge::blank;
    use crate::check::suite::plan::Item;

    const ENTRY: &str = r#"
        [[issue]]
        id = "mesa-1"
        link = "https://example.org/1"
        case = "^attention/plain/f32/.*@fused$"
        message = "is off by"
        backend = "vulkan"
        driver = "Mesa 22\\."
    "#;

    fn after(adapter: &Adapter, id: &str, status: Status, reason: &str) -> CaseResult {
        let mut result = blank(&Item::parse(id).unwrap());
        (result.status, result.reason) = (status, (!reason.is_empty()).then(|| reason.to_string()));
        Issues::parse(ENTRY).unwrap().apply(adapter, &mut result);
        result
    }

    #[test]
    fn a_case_fails_as_it_is_said_to_or_is_an_alarm() {
        let adapter = Adapter {
            backend: "Vulkan".into(),
            driver: "llvmpipe".into(),
            driver_info: "Mesa 22.3.6".into(),
            ..Adapter::default()
        };
        let newer = Adapter { driver_info: "Mesa 23.1".into(), ..adapter.clone() };
        let (case, other) = ("attention/plain/f32/7@fused", "attention/plain/f32/7@three-passes");
        let off = "output is off by 1";
        let known = after(&adapter, case, Status::Failed, off);
        assert_eq!((known.status, known.issue.as_deref()), (Status::Known, Some("mesa-1 (https://example.org/1)")));
        assert_eq!(after(&adapter, case, Status::Failed, "the device was lost").status, Status::Failed);
        assert_eq!(after(&adapter, other, Status::Failed, off).status, Status::Failed);
        assert_eq!(after(&newer, case, Status::Failed, off).status, Status::Failed);
        let mended = after(&adapter, case, Status::Passed, "");
        assert_eq!(mended.status, Status::Mended);
        assert!(mended.reason.unwrap().contains("mesa-1"));
        assert_eq!(after(&newer, case, Status::Passed, "").status, Status::Passed);
        assert_eq!(after(&adapter, case, Status::Skipped, "").status, Status::Skipped);
    }

    #[test]
    fn what_the_program_carries_can_be_read_and_what_is_wrong_is_named() {
        Issues::read(None).unwrap();
        for (change, say) in [
            (("id = \"mesa-1\"", ""), "missing field `id`"),
            (("is off by", ""), "the message of issue mesa-1 is empty"),
            (("fused$", "fused("), "the case of issue mesa-1"),
            (("backend", "backends"), "unknown field `backends`"),
            (("\"vulkan\"", "\"vulcan\""), "an unknown backend vulcan; there are Vulkan,"),
        ] {
            let text = ENTRY.replace(change.0, change.1);
            let reason = Issues::parse(&text).err().unwrap();
            assert!(reason.contains(say), "{reason}");
        }
        let nobodys = ENTRY.lines().filter(|line| !line.contains("backend") && !line.contains("driver"));
        let reason = Issues::parse(&nobodys.collect::<Vec<_>>().join("\n")).err().unwrap();
        assert!(reason.contains("issue mesa-1 names no backend"), "{reason}");
    }
}
