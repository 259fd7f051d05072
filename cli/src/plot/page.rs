//! An interactive page for exploring attention: one HTML file that works offline.

use std::path::Path;

use base64::Engine;
use serde_json::json;

use super::seen::Seen;
use crate::error::{Result, fail, usage};
use crate::files;
use crate::font;

const TEMPLATE: &str = include_str!("page.html");
/// 21 MB of text, which phones can handle.
const MOST_WEIGHTS: usize = 4 << 20;
/// Boxes on the page; browsers are slow beyond this.
const MOST_BOXES: usize = 50_000;

pub struct Page<'a> {
    pub seen: &'a Seen,
    /// The query that is selected at first.
    pub token: usize,
}

/// Rejects a path that is not a page or whose folder does not exist, before any work is done.
pub fn check_output(path: &Path) -> Result<()> {
    match path.extension().and_then(|ending| ending.to_str()) {
        Some("html" | "htm") => files::check_folder(path),
        _ => usage!("{}: the ending must be .html", path.display()),
    }
}

pub fn write(path: &Path, page: &Page<'_>) -> Result<()> {
    let seen = page.seen;
    let (weights, boxes) = (seen.weights.len(), (seen.heads.len() + 1) * seen.keys.len());
    if weights > MOST_WEIGHTS || boxes > MOST_BOXES {
        fail!(
            "cannot write {}: {} heads of {} queries and {} keys are {weights} weights and {boxes} boxes; a page can hold \
             {MOST_WEIGHTS} and {MOST_BOXES}; choose fewer heads with --head",
            path.display(),
            seen.heads.len(),
            seen.queries.len(),
            seen.keys.len()
        );
    }
    let shown = |tokens: &[String]| tokens.iter().map(|token| font::visible(token)).collect::<Vec<_>>();
    let bytes: Vec<u8> = seen.weights.iter().flat_map(|weight| weight.to_le_bytes()).collect();
    let data = json!({
        "title": font::visible(&seen.title),
        "heads": seen.heads,
        "queries": shown(&seen.queries),
        "keys": shown(&seen.keys),
        "same": seen.same,
        "token": page.token,
        // f32, little-endian, [heads, queries, keys]
        "weights": base64::engine::general_purpose::STANDARD.encode(bytes),
    });
    files::write_page(path, TEMPLATE, &data)
}
