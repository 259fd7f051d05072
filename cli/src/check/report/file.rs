//! The report as a file.

use std::collections::HashSet;
use std::path::Path;

use serde::Deserialize;

use super::data::{Report, SCHEMA, visible};
use crate::error::{Error, Result, fail};
use crate::files;

/// The member that identifies the format, read before anything else.
#[derive(Deserialize)]
struct Head {
    schema: Option<String>,
}

/// Reads a report.
///
/// # Errors
/// If the file is not a report of a known version or lacks members, or if a result has an unknown adapter or repeats
/// the id of another result of its adapter.
pub fn read(path: &Path) -> Result<Report> {
    let shown = path.display();
    let bytes = files::read_bytes(path)?;
    let bad = |error: serde_json::Error| {
        Error::Failed(format!("{shown} is not a report of attn check: {}", visible(&error.to_string())))
    };
    let head: Head = serde_json::from_slice(&bytes).map_err(bad)?;
    let Some(schema) = head.schema else {
        fail!("{shown} is not a report of attn check: it has no \"schema\"; this version of attn knows \"{SCHEMA}\"");
    };
    if schema != SCHEMA {
        fail!("{shown}: the schema is {schema:?}; this version of attn knows \"{SCHEMA}\"");
    }
    let report: Report = serde_json::from_slice(&bytes).map_err(bad)?;
    let mut seen = HashSet::new();
    for (at, result) in report.results.iter().enumerate() {
        if result.adapter >= report.adapters.len() {
            let count = report.adapters.len();
            fail!("{shown}: result {at} is of adapter {}, but there are {count} adapters, from 0", result.adapter);
        }
        if !seen.insert((result.adapter, result.id.as_str())) {
            let (id, adapter) = (&result.id, result.adapter);
            fail!("{shown}: result {at} repeats the id {id:?}; ids must be unique for adapter {adapter}");
        }
    }
    Ok(report)
}

/// Writes a report atomically.
pub fn write(path: &Path, report: &Report) -> Result<()> {
    let value = serde_json::to_value(report)
        .map_err(|error| Error::Failed(format!("cannot write {}: {error}", path.display())))?;
    files::write_json(path, &value)
}
