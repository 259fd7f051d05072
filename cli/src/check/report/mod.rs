//! The report of a check, and its forms: a table, JSON, JUnit, Markdown and a page.

mod args;
mod data;
mod diff;
pub mod file;
mod html;
mod junit;
mod lines;
mod markdown;
mod table;

pub use args::{Forms, diff, print, show};
pub use data::{Adapter, CaseResult, Observed, Output, Report, SCHEMA, Status, Tally, quoted};
pub use lines::lines;
