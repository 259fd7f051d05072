//! The report as a file.

use std::collections::HashSet;
use std::path::Path;

use serde::Deserialize;

use super::data::{Report, SCHEMA, visible};
use crate::error::{Error, Result, fail};
use crate::files;

/// What tells the kind of file before anything else is believed.
#[derive(Deserialize)]
struct Head {
    schema: Option<String>,
}

/// Reads a report.
///
/// # Errors
/// What is not a report of a version known here, what lacks members, and a result of an adapter that is not listed or
/// with the id of another result of the same adapter.
pub fn read(path: &Path) -> Result<Report> {
    let shown = path.display();
    let bytes = files::read_bytes(path)?;
    let bad = |error: serde_json::Error| {
        Error::Failed(format!("{shown} is not a report of attn check: {}", visible(&error.to_string())))
    };
    let head: Head = serde_json::from_slice(&bytes).map_err(bad)?;
    let Some(schema) = head.schema else {
        fail!("{shown} is not a report of attn check: it has no \"schema\"; \"{SCHEMA}\" is known");
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
            fail!("{shown}: result {at} has the id {id:?} of another; an id is there once for adapter {adapter}");
        }
    }
    Ok(report)
}

/// Writes a report whole or not at all.
pub fn write(path: &Path, report: &Report) -> Result<()> {
    let value = serde_json::to_value(report)
        .map_err(|error| Error::Failed(format!("cannot write {}: {error}", path.display())))?;
    files::write_json(path, &value)
}
