//! The report's options of `attn check`.

use std::path::{Path, PathBuf};

use clap::Args;

use super::data::Report;
use super::{file, html, junit, markdown, table};
use crate::error::{Error, Result, usage};
use crate::files;

/// Files to write the report to.
#[derive(Args, Debug, Default)]
#[command(next_help_heading = "Report")]
pub struct Forms {
    /// Write the result of every case as JSON, for --from and --diff
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write JUnit XML: one suite per adapter, known issues as skipped
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
    /// Write a Markdown table of the results: one row per op
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// In --markdown, write one row per op, variant and storage type
    #[arg(long, requires = "markdown")]
    long: bool,
    /// Write an interactive page with every result: one file that works offline
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

impl Forms {
    fn files(&self) -> impl Iterator<Item = (&'static str, &Path)> {
        let all =
            [("--json", &self.json), ("--junit", &self.junit), ("--markdown", &self.markdown), ("--html", &self.html)];
        all.into_iter().filter_map(|(name, path)| Some((name, path.as_deref()?)))
    }

    /// Rejects a file whose folder does not exist, and one file for two forms, before any work is done.
    pub fn check_folders(&self) -> Result<()> {
        for (at, (name, path)) in self.files().enumerate() {
            files::check_folder(path)?;
            if let Some((other, _)) = self.files().take(at).find(|(_, other)| files::is_same(other, path)) {
                usage!("{other} and {name} both write {}; each needs its own file", path.display());
            }
        }
        Ok(())
    }

    pub fn write(&self, report: &Report) -> Result<()> {
        if let Some(path) = &self.json {
            file::write(path, report)?;
        }
        if let Some(path) = &self.junit {
            junit::write(path, report)?;
        }
        if let Some(path) = &self.markdown {
            files::write_bytes(path, markdown::text(report, self.long).as_bytes())?;
        }
        if let Some(path) = &self.html {
            html::write(path, report)?;
        }
        Ok(())
    }
}

/// Prints the table that ends a run.
pub fn print(report: &Report) {
    anstream::print!("{}", table::text(report));
}

/// Prints a saved report's table and writes its other forms.
pub fn show(path: &Path, forms: &Forms) -> Result<()> {
    forms.check_folders()?;
    let report = file::read(path)?;
    forms.write(&report)?;
    print(&report);
    Ok(())
}

/// Prints what changed between two saved reports; returns whether nothing got worse. A report that cannot be read is a
/// usage error, because no regression was observed.
pub fn diff(old: &Path, new: &Path) -> Result<bool> {
    let read = |path| file::read(path).map_err(|error| Error::Usage(error.to_string()));
    let diff = super::diff::diff(&read(old)?, &read(new)?);
    anstream::print!("{}", diff.text);
    Ok(!diff.regressed)
}
