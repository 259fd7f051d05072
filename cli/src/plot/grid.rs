//! Every head as a small heatmap.

use plotters::prelude::*;

use super::seen::{Seen, head_name};
use crate::font::text_width;
use crate::heatmap::{self, Axis, Cells, MARGIN, Scale, TEXT, TITLE};
use crate::picture::{ABOVE, Area, Drawn, Picture, text, upright};

/// Heads side by side, with one scale; tokens label only the outer sides.
pub struct Grid<'a> {
    pub title: &'a str,
    pub seen: &'a Seen,
    /// Labels of the queries and of the keys.
    pub queries: &'a [String],
    pub keys: &'a [String],
    pub scale: Scale,
}

const BETWEEN: i32 = 22;
const HEAD: i32 = 18;

impl Grid<'_> {
    fn cells(&self, head: usize) -> Cells<'_> {
        let (rows, columns) = (Axis::Names(self.queries), Axis::Names(self.keys));
        let side = heatmap::cell(rows.len().max(columns.len()), 260, 24);
        Cells { values: self.seen.head(head), rows, columns, cell: (side, side), scale: self.scale }
    }
    fn name(&self, head: usize) -> String {
        head_name(&self.seen.heads[head])
    }
    /// Columns and rows of heads: a square, or one row fewer.
    fn shape(&self) -> (i32, i32) {
        let heads = self.seen.heads.len() as i32;
        let columns = (1..).find(|n| n * n >= heads).expect("squares grow");
        // 12 heads as 4 × 3, 8 as 4 × 2.
        let columns = (columns..=columns + 1).find(|n| heads % n == 0).unwrap_or(columns);
        (columns, (heads + columns - 1) / columns)
    }
    /// The distance from one head to the next.
    fn step(&self) -> (i32, i32) {
        let cells = self.cells(0);
        let widest = (0..self.seen.heads.len()).map(|head| text_width(&self.name(head), HEAD)).max().unwrap_or(0);
        (cells.width().max(widest) + BETWEEN, cells.height() + HEAD + 6 + BETWEEN)
    }
    /// Where the cells of head 0 begin.
    fn origin(&self) -> (i32, i32) {
        let (_, rows) = self.shape();
        let height = rows.saturating_mul(self.step().1);
        let above = (text_width(heatmap::queries(height), TEXT) - height).max(0) / 2;
        (MARGIN + TEXT + 14 + self.cells(0).row_room(), MARGIN + TITLE + 20 + above + HEAD + 6)
    }
    fn nan(&self) -> bool {
        self.seen.weights.iter().any(|weight| weight.is_nan())
    }
    /// Right and lower edge of the cells.
    fn end(&self) -> (i32, i32) {
        let ((left, top), (columns, rows), (right, down)) = (self.origin(), self.shape(), self.step());
        let edge = |from: i32, count: i32, step: i32| {
            (i64::from(from) + i64::from(count) * i64::from(step) - i64::from(BETWEEN)).min(1 << 24) as i32
        };
        (edge(left, columns, right), edge(top, rows, down) - HEAD - 6)
    }
}

impl Picture for Grid<'_> {
    fn size(&self) -> (i32, i32) {
        let ((left, top), (right, lower)) = (self.origin(), self.end());
        let caption = (text_width(heatmap::keys(right - left), TEXT) - (right - left)).max(0) / 2;
        let width = right + (34 + heatmap::bar_room(&self.scale)).max(caption) + MARGIN;
        let below = lower + self.cells(0).column_room() + 14 + TEXT;
        let bar = top + (lower - top).max(heatmap::bar_height(false)) + if self.nan() { 2 * TEXT } else { 0 };
        let side = (top + lower) / 2 + text_width(heatmap::queries(lower - top), TEXT) / 2;
        (width.max(text_width(self.title, TITLE) + 2 * MARGIN), below.max(bar).max(side) + MARGIN)
    }
    fn marks(&self) -> usize {
        self.seen.weights.len()
    }
    fn texts(&self) -> Vec<&str> {
        self.queries.iter().chain(self.keys).map(String::as_str).chain([self.title]).collect()
    }

    fn draw<B: DrawingBackend>(&self, root: &Area<B>) -> Drawn<B> {
        text(root, self.title, (self.size().0 / 2, MARGIN), TITLE, ABOVE, BLACK)?;
        let ((left, top), (right, lower)) = (self.origin(), self.end());
        let (columns, step) = (self.shape().0, self.step());
        let heads = self.seen.heads.len();
        for head in 0..heads {
            let (column, row) = (head as i32 % columns, head as i32 / columns);
            let at = (left + column * step.0, top + row * step.1);
            let cells = self.cells(head);
            let middle = at.0 + cells.width() / 2;
            text(root, &self.name(head), (middle, at.1 - HEAD - 6), HEAD, ABOVE, BLACK)?;
            cells.draw(root, at)?;
            if column == 0 {
                cells.row_labels(root, at)?;
            }
            if head + columns as usize >= heads {
                cells.column_labels(root, at)?;
            }
        }
        let below = lower + self.cells(0).column_room() + 14;
        text(root, heatmap::keys(right - left), ((left + right) / 2, below), TEXT, ABOVE, BLACK)?;
        upright(root, heatmap::queries(lower - top), (MARGIN, (top + lower) / 2), TEXT, ABOVE)?;
        let height = (lower - top).max(heatmap::bar_height(false));
        heatmap::bar(root, (right + 34, top), height, &self.scale, self.nan())
    }
}
