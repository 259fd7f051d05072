//! Terminal tables.

use std::ops::Range;

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};

/// A table with a line around every cell, no wider than the terminal.
pub fn table() -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED).set_content_arrangement(ContentArrangement::Dynamic);
    table
}

/// Right-aligns columns of numbers. The header must be set first.
pub fn align_right(table: &mut Table, columns: Range<usize>) {
    for column in columns {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
}
