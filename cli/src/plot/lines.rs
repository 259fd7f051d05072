//! Lines from queries to keys, as in BertViz's head view (Vig 2019, "A Multiscale Visualization of Attention in the
//! Transformer Model").

use plotters::element::DashedPathElement;
use plotters::prelude::*;

use super::seen::{Seen, head_name};
use crate::error::{Result, fail};
use crate::font::text_width;
use crate::heatmap::{GAP, MARGIN, NAN, SMALLEST, TEXT, TITLE, short};
use crate::picture::{ABOVE, Area, CENTRE, COLOURS, Drawn, LEFT, Picture, RIGHT, rectangle, text};

/// Two columns of tokens, with a line for every visible weight: its opacity is the weight, its colour is the head. The
/// lines of one query end in a strip of blocks, one per head, in the order of the heads.
pub struct Lines<'a> {
    title: &'a str,
    seen: &'a Seen,
    queries: &'a [String],
    keys: &'a [String],
    token: Option<usize>,
    /// Head, query, key and weight of every line, faintest first so that strong ones are on top.
    lines: Vec<(usize, usize, usize, f32)>,
}

/// More lines would merge into a blot.
const MOST: usize = 100_000;
/// Smaller weights are invisible, and have no line.
const FAINTEST: f32 = 0.005;
/// The space between the columns.
const SPAN: i32 = 380;
const BLOCK: i32 = 14;
const GREY: RGBColor = RGBColor(0x76, 0x76, 0x76);

impl<'a> Lines<'a> {
    pub fn new(
        title: &'a str,
        seen: &'a Seen,
        queries: &'a [String],
        keys: &'a [String],
        token: Option<usize>,
    ) -> Result<Lines<'a>> {
        let chosen = token.map_or(0..queries.len(), |at| at..at + 1);
        let mut lines = Vec::new();
        for head in 0..seen.heads.len() {
            for i in chosen.clone() {
                let row = &seen.head(head)[i * keys.len()..][..keys.len()];
                let visible = row.iter().enumerate().filter(|(_, weight)| weight.is_nan() || **weight >= FAINTEST);
                lines.extend(visible.map(|(j, &weight)| (head, i, j, weight)));
            }
        }
        if lines.len() > MOST {
            fail!("{} lines are too many to be distinguished (at most {MOST}); use --token or --head", lines.len());
        }
        lines.sort_by(|a, b| a.3.total_cmp(&b.3));
        Ok(Lines { title, seen, queries, keys, token, lines })
    }

    /// Pixels from one token to the next, and the text size.
    fn row(&self) -> (i32, i32) {
        let step = (1000 / self.queries.len().max(self.keys.len()) as i32).clamp(SMALLEST + 2, 30);
        (step, (step - 2).min(TEXT))
    }
    /// The width of the blocks behind the lines of one query.
    fn strip(&self) -> i32 {
        if self.token.is_some() && self.seen.heads.len() > 1 { self.seen.heads.len() as i32 * BLOCK + GAP } else { 0 }
    }
    /// Where the weights are written as numbers, if there is only one head.
    fn numbers(&self) -> i32 {
        let one = self.token.is_some() && self.seen.heads.len() == 1;
        if one { text_width("1.00", self.row().1) + GAP } else { 0 }
    }
    fn widest(&self, tokens: &[String]) -> i32 {
        tokens.iter().map(|token| text_width(token, self.row().1)).max().unwrap_or(0)
    }
    /// Where lines begin and end.
    fn sides(&self) -> (i32, i32) {
        let left = MARGIN + self.widest(self.queries).max(text_width("query", TEXT)) + GAP;
        (left, left + SPAN)
    }
    fn width(&self) -> i32 {
        let (_, right) = self.sides();
        let keys = self.widest(self.keys).max(text_width("key", TEXT));
        (right + self.strip() + self.numbers() + GAP + keys).max(text_width(self.title, TITLE) + MARGIN) + MARGIN
    }
    /// The positions of the heads' names in the legend, line by line, and the number of lines.
    fn legend(&self) -> (Vec<(i32, i32)>, i32) {
        let (mut x, mut line) = (MARGIN, 0);
        let mut places = Vec::new();
        for head in &self.seen.heads {
            let room = BLOCK + 6 + text_width(&head_name(head), TEXT) + MARGIN;
            if x > MARGIN && x + room > self.width() {
                (x, line) = (MARGIN, line + 1);
            }
            places.push((x, line));
            x += room;
        }
        (places, line + 1)
    }
    fn top(&self) -> i32 {
        MARGIN + TITLE + 14 + self.legend().1 * (TEXT + 8) + 2 * TEXT
    }
    fn nan(&self) -> bool {
        self.lines.iter().any(|line| line.3.is_nan())
    }
}

impl Picture for Lines<'_> {
    fn size(&self) -> (i32, i32) {
        let rows = self.queries.len().max(self.keys.len()) as i64 * i64::from(self.row().0);
        let note = if self.nan() { TEXT + 14 } else { 0 };
        (self.width(), (i64::from(self.top() + note + MARGIN) + rows).min(1 << 24) as i32)
    }
    fn marks(&self) -> usize {
        self.lines.len()
    }
    fn texts(&self) -> Vec<&str> {
        self.queries.iter().chain(self.keys).map(String::as_str).chain([self.title]).collect()
    }

    fn draw<B: DrawingBackend>(&self, root: &Area<B>) -> Drawn<B> {
        let (width, height) = self.size();
        text(root, self.title, (width / 2, MARGIN), TITLE, ABOVE, BLACK)?;
        let colour = |head: usize| COLOURS[head % COLOURS.len()];
        let (places, _) = self.legend();
        for (head, (x, line)) in places.into_iter().enumerate() {
            let y = MARGIN + TITLE + 14 + line * (TEXT + 8) + TEXT / 2;
            rectangle(root, (x, y - BLOCK / 2), (x + BLOCK, y + BLOCK / 2), &colour(head))?;
            text(root, &head_name(&self.seen.heads[head]), (x + BLOCK + 6, y), TEXT, LEFT, BLACK)?;
        }
        let ((left, right), top, (step, size)) = (self.sides(), self.top(), self.row());
        let y = |n: usize| top + n as i32 * step + step / 2;
        let keys = right + self.strip() + self.numbers() + GAP;
        text(root, "query", (left - GAP, top - TEXT / 2 - 4), TEXT, RIGHT, GREY)?;
        text(root, "key", (keys, top - TEXT / 2 - 4), TEXT, LEFT, GREY)?;

        for &(head, i, j, weight) in &self.lines {
            // Heads side by side, because they would overlap.
            let heads = self.seen.heads.len() as i32;
            let apart = (2 * head as i32 + 1 - heads) * (step - 8).max(0) / (2 * heads);
            let ends = [(left, y(i) + apart), (right, y(j) + apart)];
            // Lines of NaN are dashed; a block of NaN is grey and crossed out.
            if weight.is_nan() {
                root.draw(&DashedPathElement::new(ends, 6, 6, NAN.stroke_width(2)))?;
            } else {
                let ink = colour(head).mix(f64::from(weight.clamp(0.0, 1.0)));
                let thick = if heads == 1 { 3 } else { 2 };
                root.draw(&PathElement::new(ends, ink.stroke_width(thick)))?;
            }
            if self.strip() > 0 {
                let (x, half) = (right + 4 + head as i32 * BLOCK, (step / 2 - 1).min(9));
                let (from, to) = ((x, y(j) - half), (x + BLOCK - 1, y(j) + half));
                if weight.is_nan() {
                    rectangle(root, from, to, &NAN)?;
                    root.draw(&PathElement::new([(from.0 + 1, to.1 - 1), (to.0 - 1, from.1 + 1)], BLACK))?;
                } else {
                    rectangle(root, from, to, &colour(head).mix(f64::from(weight.clamp(0.0, 1.0))))?;
                }
            }
            if self.numbers() > 0 && (weight.is_nan() || weight >= 0.01) {
                let number = if weight.is_nan() { "NaN".into() } else { short(weight) };
                let middle = right + 4 + (self.numbers() - GAP) / 2;
                text(root, &number, (middle, y(j)), size, CENTRE, BLACK)?;
            }
        }
        for (i, token) in self.queries.iter().enumerate() {
            let ink = if self.token.is_none_or(|at| at == i) { BLACK } else { GREY };
            text(root, token, (left - GAP, y(i)), size, RIGHT, ink)?;
        }
        for (j, token) in self.keys.iter().enumerate() {
            text(root, token, (keys, y(j)), size, LEFT, BLACK)?;
        }
        if self.nan() {
            let note = "dashed and crossed out: NaN";
            text(root, note, (MARGIN, height - MARGIN - TEXT / 2), TEXT, LEFT, BLACK)?;
        }
        Ok(())
    }
}
