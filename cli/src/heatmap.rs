//! Heatmaps of matrices: the parts, and a labelled heatmap.

use plotters::prelude::*;

use crate::font::text_width;
use crate::picture::{ABOVE, Area, CENTRE, Drawn, LEFT, Picture, RIGHT, rectangle, text, upright};

pub const TEXT: i32 = 20;
/// Labels shrink with their cells down to this size. Below it, only every 2nd, 5th, 10th … cell has one.
pub const SMALLEST: i32 = 13;
pub const TITLE: i32 = 26;
pub const MARGIN: i32 = 24;
/// Between cells and labels.
pub const GAP: i32 = 10;
const BAR: i32 = 26;
/// From this weight on, a cell shows its number.
const NUMBERED: f32 = 0.1;
/// The colour of NaN, which is not in viridis.
pub const NAN: RGBColor = RGBColor(0xb4, 0xb4, 0xb4);

/// The labels along one side of a matrix.
#[derive(Clone, Copy)]
pub enum Axis<'a> {
    /// Labels as given.
    Names(&'a [String]),
    /// `len` numbers from `first` on.
    Numbers { first: i64, len: usize },
}

/// The labels that fit, each with the index of its cell.
pub struct Labels {
    pub size: i32,
    pub shown: Vec<(usize, String)>,
    /// The longest label, in pixels.
    pub length: i32,
}

impl Axis<'_> {
    pub fn len(&self) -> usize {
        match self {
            Axis::Names(names) => names.len(),
            Axis::Numbers { len, .. } => *len,
        }
    }

    /// The labels of cells that are `cell` pixels wide. `level`: horizontal labels side by side.
    pub fn labels(&self, cell: i32, level: bool) -> Labels {
        let size = cell.clamp(SMALLEST, TEXT);
        let room = match self {
            Axis::Numbers { first, len } if level => {
                let widest =
                    text_width(&first.to_string(), size).max(text_width(&(first + *len as i64).to_string(), size));
                widest + GAP
            }
            _ => size,
        };
        let steps = (0..).flat_map(|power| [1, 2, 5].map(|step| step * 10i64.pow(power)));
        let every = steps.into_iter().find(|every| every * i64::from(cell) >= i64::from(room)).expect("steps grow");
        let shown: Vec<(usize, String)> = match self {
            Axis::Names(names) if every == 1 => names.iter().cloned().enumerate().collect(),
            // With its index, because readers cannot count the missing neighbours.
            Axis::Names(names) => names
                .iter()
                .enumerate()
                .step_by(every as usize)
                .map(|(n, name)| (n, if *name == n.to_string() { name.clone() } else { format!("{n} {name}") }))
                .collect(),
            Axis::Numbers { first, len } => (0..*len)
                .map(|n| (n, first + n as i64))
                .filter(|(_, number)| number % every == 0)
                .map(|(n, number)| (n, number.to_string()))
                .collect(),
        };
        let length = shown.iter().map(|(_, label)| text_width(label, size)).max().unwrap_or(0);
        Labels { size, shown, length }
    }
}

/// The values of the first and the last colour.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scale {
    pub least: f32,
    pub most: f32,
}

impl Scale {
    /// From the smallest to the largest of `values`, ignoring NaN.
    pub fn of(values: impl Iterator<Item = f32>) -> Scale {
        let (least, most) = values
            .filter(|value| value.is_finite())
            .fold((f32::INFINITY, f32::NEG_INFINITY), |(least, most), value| (least.min(value), most.max(value)));
        if least <= most { Scale { least, most } } else { Scale { least: 0.0, most: 1.0 } }
    }

    /// From 0 to the largest weight, rounded up to half a power of ten.
    pub fn of_weights(weights: &[f32]) -> Scale {
        let most = f64::from(Scale::of(weights.iter().copied()).most);
        let step = 10f64.powf(most.log10().floor()) / 2.0;
        let most = if most > 0.0 { ((most / step - 1e-6).ceil() * step).min(1.0) } else { 1.0 };
        Scale { least: 0.0, most: most as f32 }
    }

    /// The position of `value` on the scale, between 0 and 1.
    fn part(&self, value: f32) -> f32 {
        let range = self.most - self.least;
        if range > 0.0 { ((value - self.least) / range).clamp(0.0, 1.0) } else { 0.5 }
    }

    /// viridis: perceptually uniform, readable with any colour vision.
    pub fn colour(&self, value: f32) -> RGBColor {
        if value.is_nan() { NAN } else { ViridisRGB.get_color(self.part(value)) }
    }

    /// The text colour with the better contrast on that colour.
    fn ink(&self, value: f32) -> RGBColor {
        if value.is_nan() || self.part(value) > 0.45 { BLACK } else { WHITE }
    }

    fn ticks(&self) -> Vec<(f64, String)> {
        let (least, range) = (f64::from(self.least), f64::from(self.most) - f64::from(self.least));
        let number = |value: f64| number(value, range);
        let parts = if range > 0.0 { 4 } else { 0 };
        (0..=parts).map(|n| f64::from(n) / 4.0).map(|part| (part, number(least + part * range))).collect()
    }
}

/// Formats a number on a scale that spans `range`.
pub fn number(value: f64, range: f64) -> String {
    let decimals = 2 - if range > 0.0 { range.log10().round() as i32 } else { -1 };
    match value.abs() {
        size if size >= 1e6 || decimals > 6 => format!("{value:.2e}"),
        // Not −0.
        _ => format!("{:.*}", decimals.max(0) as usize, value + 0.0),
    }
}

/// A matrix of cells, `[rows, columns]`.
pub struct Cells<'a> {
    pub values: &'a [f32],
    pub rows: Axis<'a>,
    pub columns: Axis<'a>,
    /// The size of one cell, in pixels.
    pub cell: (i32, i32),
    pub scale: Scale,
}

/// The largest cell size, at most `most`, of which `count` cells fit into `room` pixels; at least one pixel.
pub fn cell(count: usize, room: i32, most: i32) -> i32 {
    (i64::from(room) / count.max(1) as i64).clamp(1, i64::from(most)) as i32
}

impl Cells<'_> {
    pub fn width(&self) -> i32 {
        i32::try_from(self.columns.len() as i64 * i64::from(self.cell.0)).unwrap_or(i32::MAX / 4)
    }
    pub fn height(&self) -> i32 {
        i32::try_from(self.rows.len() as i64 * i64::from(self.cell.1)).unwrap_or(i32::MAX / 4)
    }

    pub fn draw<B: DrawingBackend>(&self, root: &Area<B>, (left, top): (i32, i32)) -> Drawn<B> {
        let (width, height) = self.cell;
        let numbers = width >= 40 && height >= TEXT;
        for (n, &value) in self.values.iter().enumerate() {
            let (i, j) = (n / self.columns.len(), n % self.columns.len());
            let (x, y) = (left + j as i32 * width, top + i as i32 * height);
            // A rectangle excludes its far corner in an SVG and includes it in a bitmap: the next cell covers it.
            rectangle(root, (x, y), (x + width, y + height), &self.scale.colour(value))?;
            if numbers && (value.is_nan() || value >= NUMBERED) {
                let number = if value.is_nan() { "NaN".into() } else { short(value) };
                text(root, &number, (x + width / 2, y + height / 2), 16, CENTRE, self.scale.ink(value))?;
            } else if value.is_nan() && width.min(height) >= 6 {
                root.draw(&PathElement::new([(x + 1, y + height - 1), (x + width - 1, y + 1)], BLACK))?;
            }
        }
        Ok(())
    }

    /// Draws labels to the left of cells at `at`.
    pub fn row_labels<B: DrawingBackend>(&self, root: &Area<B>, (left, top): (i32, i32)) -> Drawn<B> {
        let labels = self.rows.labels(self.cell.1, false);
        for (i, label) in &labels.shown {
            let y = top + *i as i32 * self.cell.1 + self.cell.1 / 2;
            text(root, label, (left - GAP, y), labels.size, RIGHT, BLACK)?;
        }
        Ok(())
    }

    /// Draws labels below cells at `at`: numbers horizontal, names vertical.
    pub fn column_labels<B: DrawingBackend>(&self, root: &Area<B>, (left, top): (i32, i32)) -> Drawn<B> {
        let level = matches!(self.columns, Axis::Numbers { .. });
        let labels = self.columns.labels(self.cell.0, level);
        for (j, label) in &labels.shown {
            let at = (left + *j as i32 * self.cell.0 + self.cell.0 / 2, top + self.height() + GAP);
            if level {
                text(root, label, at, labels.size, ABOVE, BLACK)?;
            } else {
                upright(root, label, at, labels.size, RIGHT)?;
            }
        }
        Ok(())
    }

    /// The space that row labels take.
    pub fn row_room(&self) -> i32 {
        self.rows.labels(self.cell.1, false).length + GAP
    }
    /// The space that column labels take.
    pub fn column_room(&self) -> i32 {
        let level = matches!(self.columns, Axis::Numbers { .. });
        let labels = self.columns.labels(self.cell.0, level);
        GAP + if level { labels.size } else { labels.length }
    }
}

/// `.68`, `1.00`.
pub fn short(value: f32) -> String {
    let number = format!("{value:.2}");
    number.strip_prefix('0').map(str::to_string).unwrap_or(number)
}

/// A colour bar of the scale, `height` pixels high, with a NaN sample below it if there are any.
pub fn bar<B: DrawingBackend>(
    root: &Area<B>,
    (left, top): (i32, i32),
    height: i32,
    scale: &Scale,
    nan: bool,
) -> Drawn<B> {
    let steps = height.min(256);
    let edge = |step: i32| top + (i64::from(step) * i64::from(height) / i64::from(steps)) as i32;
    for step in 0..steps {
        let part = 1.0 - step as f32 / (steps - 1).max(1) as f32;
        let colour = ViridisRGB.get_color(part);
        rectangle(root, (left, edge(step)), (left + BAR, edge(step + 1)), &colour)?;
    }
    for (part, label) in scale.ticks() {
        let y = top + ((1.0 - part) * f64::from(height - 1)).round() as i32;
        rectangle(root, (left + BAR, y), (left + BAR + 6, y + 1), &BLACK)?;
        text(root, &label, (left + BAR + 12, y), TEXT, LEFT, BLACK)?;
    }
    if nan {
        let y = top + height + TEXT;
        rectangle(root, (left, y), (left + BAR, y + TEXT), &NAN)?;
        root.draw(&PathElement::new([(left + 2, y + TEXT - 2), (left + BAR - 2, y + 2)], BLACK))?;
        text(root, "NaN", (left + BAR + 12, y + TEXT / 2), TEXT, LEFT, BLACK)?;
    }
    Ok(())
}

/// The width of [`bar`] with its labels.
pub fn bar_room(scale: &Scale) -> i32 {
    let widest = scale.ticks().iter().map(|(_, label)| text_width(label, TEXT)).max().unwrap_or(0);
    BAR + 12 + widest.max(text_width("NaN", TEXT))
}

/// The height that [`bar`] needs.
pub fn bar_height(nan: bool) -> i32 {
    let ticks = 5 * TEXT + TEXT / 2;
    if nan { ticks + 2 * TEXT } else { ticks }
}

/// The heatmap of what each token attends to, in one head or in the mean of several.
pub struct Heatmap<'a> {
    pub title: &'a str,
    /// The queries.
    pub rows: &'a [String],
    /// The keys.
    pub columns: &'a [String],
    /// `[rows, columns]`.
    pub values: &'a [f32],
    pub scale: Scale,
}

/// The axis title of the rows, for the given number of pixels.
pub fn queries(room: i32) -> &'static str {
    let full = "query: the token that attends";
    if text_width(full, TEXT) <= room { full } else { "query" }
}

/// The axis title of the columns, for the given number of pixels.
pub fn keys(room: i32) -> &'static str {
    let full = "key: the token attended to";
    if text_width(full, TEXT) <= room { full } else { "key" }
}

impl Heatmap<'_> {
    fn cells(&self) -> Cells<'_> {
        let (rows, columns) = (Axis::Names(self.rows), Axis::Names(self.columns));
        let side = cell(rows.len().max(columns.len()), 1000, 44);
        Cells { values: self.values, rows, columns, cell: (side, side), scale: self.scale }
    }
    fn nan(&self) -> bool {
        self.values.iter().any(|value| value.is_nan())
    }
    /// Where the cells begin. The layout depends on the labels, so that no text is cut off.
    fn origin(&self, cells: &Cells<'_>) -> (i32, i32) {
        let above = (text_width(queries(cells.height()), TEXT) - cells.height()).max(0) / 2;
        (MARGIN + TEXT + 14 + cells.row_room(), MARGIN + TITLE + 20 + above)
    }
}

impl Picture for Heatmap<'_> {
    fn size(&self) -> (i32, i32) {
        let cells = self.cells();
        let (left, top) = self.origin(&cells);
        let caption = (text_width(keys(cells.width()), TEXT) - cells.width()).max(0) / 2;
        let right = left + cells.width() + (34 + bar_room(&self.scale)).max(caption);
        let below = top + cells.height() + cells.column_room() + 14 + TEXT;
        let lowest = top + cells.height().max(bar_height(self.nan()));
        let lowest = lowest.max(top + (cells.height() + text_width(queries(cells.height()), TEXT)) / 2);
        let nan = if self.nan() { top + cells.height().max(bar_height(false)) + 2 * TEXT } else { 0 };
        let width = (right + MARGIN).max(text_width(self.title, TITLE) + 2 * MARGIN);
        (width, below.max(lowest).max(nan) + MARGIN)
    }
    fn marks(&self) -> usize {
        self.values.len()
    }
    fn texts(&self) -> Vec<&str> {
        self.rows.iter().chain(self.columns).map(String::as_str).chain([self.title]).collect()
    }

    fn draw<B: DrawingBackend>(&self, root: &Area<B>) -> Drawn<B> {
        let cells = self.cells();
        let (left, top) = self.origin(&cells);
        text(root, self.title, (self.size().0 / 2, MARGIN), TITLE, ABOVE, BLACK)?;
        cells.draw(root, (left, top))?;
        cells.row_labels(root, (left, top))?;
        cells.column_labels(root, (left, top))?;
        let middle = (left + cells.width() / 2, top + cells.height() / 2);
        let below = top + cells.height() + cells.column_room() + 14;
        text(root, keys(cells.width()), (middle.0, below), TEXT, ABOVE, BLACK)?;
        upright(root, queries(cells.height()), (MARGIN, middle.1), TEXT, ABOVE)?;
        let at = (left + cells.width() + 34, top);
        bar(root, at, cells.height().max(bar_height(false)), &self.scale, self.nan())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_thin_out_where_cells_are_small() {
        let names: Vec<String> = (0..100).map(|n| format!("t{n}")).collect();
        let labels = Axis::Names(&names).labels(44, false);
        assert_eq!((labels.size, labels.shown.len()), (TEXT, 100));
        let labels = Axis::Names(&names).labels(4, false);
        assert_eq!((labels.size, labels.shown.len()), (SMALLEST, 20), "every 5th: 20 pixels");
        assert_eq!(labels.shown[1], (5, "5 t5".into()));
        let labels = Axis::Numbers { first: -30, len: 61 }.labels(6, true);
        assert!(labels.shown.iter().any(|shown| *shown == (30, "0".into())), "{:?}", labels.shown);
    }

    #[test]
    fn scales_hold_what_they_show() {
        assert_eq!(Scale::of_weights(&[0.0, 0.68, f32::NAN]), Scale { least: 0.0, most: 0.7 });
        assert_eq!(Scale::of_weights(&[0.98]).most, 1.0);
        assert_eq!(Scale::of_weights(&[0.0]).most, 1.0);
        assert_eq!(Scale::of_weights(&[]).most, 1.0);
        assert_eq!(Scale::of([2.0, -1.0].into_iter()), Scale { least: -1.0, most: 2.0 });
        assert_eq!(Scale { least: 0.0, most: 1.0 }.ticks()[1].1, "0.25");
        assert_eq!(Scale { least: 3.0, most: 3.0 }.ticks().len(), 1);
    }

    #[test]
    fn numbers_stand_out_from_every_colour() {
        let lightness = |c: RGBColor| {
            let part = |x: u8| {
                let x = f64::from(x) / 255.0;
                if x <= 0.04045 { x / 12.92 } else { ((x + 0.055) / 1.055).powf(2.4) }
            };
            0.2126 * part(c.0) + 0.7152 * part(c.1) + 0.0722 * part(c.2)
        };
        let scale = Scale { least: 0.0, most: 1.0 };
        for value in (0..=100).map(|n| n as f32 / 100.0).chain([f32::NAN]) {
            let (a, b) = (lightness(scale.colour(value)), lightness(scale.ink(value)));
            let contrast = (a.max(b) + 0.05) / (a.min(b) + 0.05);
            assert!(contrast >= 4.3, "{contrast} at {value}");
        }
    }
}
