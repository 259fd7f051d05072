//! Pictures for the guide: heatmaps and curves, side by side, in colours that are distinguishable with any colour
//! vision.

use std::ops::Range;

use image::RgbImage;
use plotters::coord::Shift;
use plotters::coord::ranged1d::KeyPointHint;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{FontStyle, FontTransform, register_font};

use super::Result;

/// A part of the picture.
pub type Area<'a> = DrawingArea<BitMapBackend<'a>, Shift>;

const FONT: &str = "monospace";
const TEXT: i32 = 16;
const TITLE: i32 = 19;

/// Okabe and Ito's colours without the yellow, which is too light for a line on white.
const COLOURS: [RGBColor; 7] = [
    RGBColor(0x00, 0x72, 0xb2),
    RGBColor(0xd5, 0x5e, 0x00),
    RGBColor(0x00, 0x9e, 0x73),
    RGBColor(0xcc, 0x79, 0xa7),
    RGBColor(0x56, 0xb4, 0xe9),
    RGBColor(0xe6, 0x9f, 0x00),
    RGBColor(0x00, 0x00, 0x00),
];

/// A white picture that `paint` draws on.
pub fn picture(width: u32, height: u32, paint: impl FnOnce(&Area<'_>) -> Result<()>) -> Result<RgbImage> {
    register_font(FONT, FontStyle::Normal, epaint_default_fonts::HACK_REGULAR)
        .map_err(|_| "the embedded font is not readable")?;
    let mut pixels = vec![0u8; (width * height * 3) as usize];
    {
        let area = BitMapBackend::with_buffer(&mut pixels, (width, height)).into_drawing_area();
        area.fill(&WHITE)?;
        paint(&area)?;
        area.present()?;
    }
    Ok(RgbImage::from_raw(width, height, pixels).expect("three bytes a pixel"))
}

fn style(size: i32, upright: bool, h: HPos, v: VPos) -> TextStyle<'static> {
    let transform = if upright { FontTransform::Rotate270 } else { FontTransform::None };
    TextStyle::from((FONT, f64::from(size)).into_font().transform(transform)).color(&BLACK).pos(Pos::new(h, v))
}

fn text_width(text: &str, size: i32) -> i32 {
    (text.chars().count() as f64 * f64::from(size) * 0.62).ceil() as i32
}

/// A line of text, centred at the top of the area.
pub fn title(area: &Area<'_>, text: &str) -> Result<()> {
    let (width, _) = area.dim_in_pixel();
    area.draw_text(text, &style(TITLE, false, HPos::Center, VPos::Top), (width as i32 / 2, 10))?;
    Ok(())
}

/// `values` `[rows, columns]` as colours from `low` (dark) to `high` (bright), each cell `cell` pixels wide, with
/// optional labels on the left and below. Cells of 28 pixels and more show values of at least a tenth of `high`.
pub struct Heatmap<'a> {
    pub title: &'a str,
    pub values: &'a [f32],
    pub columns: usize,
    pub row_labels: &'a [String],
    pub column_labels: &'a [String],
    pub row_axis: &'a str,
    pub column_axis: &'a str,
    pub range: (f32, f32),
    pub cell: i32,
}

impl Heatmap<'_> {
    fn label_room(labels: &[String]) -> i32 {
        labels.iter().map(|label| text_width(label, TEXT)).max().map_or(0, |width| width + 8)
    }

    fn left(&self) -> i32 {
        12 + if self.row_axis.is_empty() { 0 } else { TEXT + 10 } + Self::label_room(self.row_labels)
    }

    /// Width and height in pixels, so that no text is cut off.
    pub fn size(&self) -> (u32, u32) {
        let (left, top) = (self.left(), 12 + TITLE + 12);
        let rows = (self.values.len() / self.columns) as i32;
        let grid = left + self.columns as i32 * self.cell + 12;
        let axis = if self.column_axis.is_empty() { 0 } else { TEXT + 10 };
        let width = grid.max(text_width(self.title, TITLE) + 24);
        (width as u32, (top + rows * self.cell + Self::label_room(self.column_labels) + axis + 14) as u32)
    }

    pub fn draw(&self, area: &Area<'_>) -> Result<()> {
        title(area, self.title)?;
        let (left, top, cell) = (self.left(), 12 + TITLE + 12, self.cell);
        let gap = if cell >= 12 { 1 } else { 0 };
        let rows = (self.values.len() / self.columns) as i32;
        for (n, &value) in self.values.iter().enumerate() {
            let (x, y) = (left + (n % self.columns) as i32 * cell, top + (n / self.columns) as i32 * cell);
            let share = ((value - self.range.0) / (self.range.1 - self.range.0)).clamp(0.0, 1.0);
            let colour = ViridisRGB.get_color(share);
            area.draw(&Rectangle::new([(x, y), (x + cell - gap, y + cell - gap)], colour.filled()))?;
            if cell >= 28 && value >= 0.1 * self.range.1 {
                let ink = if share > 0.6 { BLACK } else { WHITE };
                let number = format!("{value:.2}");
                let at = (x + cell / 2, y + cell / 2);
                let number = if cell < 40 { number.trim_start_matches('0') } else { &number };
                area.draw_text(number, &style(14, false, HPos::Center, VPos::Center).color(&ink), at)?;
            }
        }
        for (i, label) in self.row_labels.iter().enumerate() {
            let at = (left - 8, top + i as i32 * cell + cell / 2);
            area.draw_text(label, &style(TEXT, false, HPos::Right, VPos::Center), at)?;
        }
        let below = top + rows * cell;
        for (j, label) in self.column_labels.iter().enumerate() {
            let at = (left + j as i32 * cell + cell / 2, below + 8);
            area.draw_text(label, &style(TEXT, true, HPos::Right, VPos::Center), at)?;
        }
        if !self.row_axis.is_empty() {
            let at = (12, top + rows * cell / 2);
            area.draw_text(self.row_axis, &style(TEXT, true, HPos::Center, VPos::Top), at)?;
        }
        if !self.column_axis.is_empty() {
            let at = (left + self.columns as i32 * cell / 2, below + Self::label_room(self.column_labels) + 8);
            area.draw_text(self.column_axis, &style(TEXT, false, HPos::Center, VPos::Top), at)?;
        }
        Ok(())
    }
}

/// Curves with a legend below.
pub struct Curves<'a> {
    pub title: &'a str,
    pub x_axis: &'a str,
    pub y_axis: &'a str,
    /// The labelled places of the horizontal axis, from its beginning to its end; on a logarithmic axis all above 0.
    pub x_ticks: &'a [f64],
    pub y_ticks: &'a [f64],
    pub logarithmic: bool,
    /// Markers on every point, for curves with few points.
    pub marks: bool,
    pub lines: &'a [(&'a str, Vec<(f64, f64)>)],
}

/// From the first to the last of these labelled places.
struct Axis(Vec<f64>);

impl Ranged for Axis {
    type FormatOption = plotters::coord::ranged1d::DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        let Range { start, end } = self.range();
        limit.0 + (f64::from(limit.1 - limit.0) * (value - start) / (end - start)).round() as i32
    }
    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.0.clone()
    }
    fn range(&self) -> Range<f64> {
        self.0[0]..self.0[self.0.len() - 1]
    }
}

const LEGEND_ROW: i32 = 24;

impl Curves<'_> {
    pub fn draw(&self, area: &Area<'_>) -> Result<()> {
        title(area, self.title)?;
        let (_, height) = area.dim_in_pixel();
        let legend = self.lines.len() as i32 * LEGEND_ROW + 18;
        let (upper, lower) = area.split_vertically(height as i32 - legend);
        let place = |x: f64| if self.logarithmic { x.log2() } else { x };
        let y = (self.y_ticks[0], self.y_ticks[self.y_ticks.len() - 1]);
        let x_axis = Axis(self.x_ticks.iter().map(|&x| place(x)).collect());
        let y_axis = Axis(self.y_ticks.to_vec());
        let label = self.y_ticks.iter().map(|y| text_width(&y.to_string(), TEXT)).max().unwrap_or(0);
        let mut chart = ChartBuilder::on(&upper)
            .margin_top(12 + TITLE + 12)
            .margin_left(10)
            .margin_right(24)
            .x_label_area_size(3 * TEXT)
            .y_label_area_size(label + 2 * TEXT + 8)
            .build_cartesian_2d(x_axis, y_axis)?;
        let text = TextStyle::from((FONT, f64::from(TEXT)).into_font());
        chart
            .configure_mesh()
            .bold_line_style(RGBColor(0xdd, 0xdd, 0xdd))
            .light_line_style(TRANSPARENT)
            .x_label_formatter(&|x| if self.logarithmic { x.exp2().round().to_string() } else { x.to_string() })
            .y_label_formatter(&|y| y.to_string())
            .label_style(text.clone())
            .axis_desc_style(text.clone())
            .x_desc(self.x_axis)
            .y_desc(self.y_axis)
            .draw()?;
        for (n, (name, points)) in self.lines.iter().enumerate() {
            let colour = COLOURS[n % COLOURS.len()];
            // Clip curves to the edge of the chart.
            let points: Vec<(f64, f64)> = points.iter().map(|&(px, py)| (place(px), py.clamp(y.0, y.1))).collect();
            chart.draw_series(LineSeries::new(points.clone(), colour.stroke_width(2)))?;
            if self.marks {
                for at in points {
                    mark(chart.plotting_area(), at, n)?;
                }
            }
            let y = 8 + n as i32 * LEGEND_ROW + LEGEND_ROW / 2;
            lower.draw(&PathElement::new([(30, y), (70, y)], colour.stroke_width(3)))?;
            if self.marks {
                mark(&lower, (50, y), n)?;
            }
            lower.draw_text(name, &style(TEXT, false, HPos::Left, VPos::Center), (82, y))?;
        }
        Ok(())
    }
}

/// The marker of the n-th line: lines differ in shape as well as in colour.
fn mark<C: CoordTranslate>(area: &DrawingArea<BitMapBackend<'_>, C>, at: C::From, n: usize) -> Result<()>
where
    C::From: Clone,
{
    let colour = COLOURS[n % COLOURS.len()];
    match n % 4 {
        0 => area.draw(&Circle::new(at, 5, colour.filled()))?,
        1 => area.draw(&TriangleMarker::new(at, 8, colour.filled()))?,
        2 => area.draw(&(EmptyElement::at(at) + Rectangle::new([(-5, -5), (5, 5)], colour.filled())))?,
        _ => area.draw(&Cross::new(at, 6, colour.stroke_width(3)))?,
    }
    Ok(())
}
