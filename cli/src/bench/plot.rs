//! Time over length, on logarithmic axes.

use std::path::Path;

use plotters::coord::Shift;
use plotters::coord::combinators::{BindKeyPoints, IntoLogRange};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::error::{Error, Result, fail, usage};
use crate::files;
use crate::font::{self, FONT, text_width};

pub struct Line {
    pub name: String,
    /// Length and milliseconds, in order of length.
    pub points: Vec<(usize, f64)>,
}

pub struct Plot<'a> {
    pub title: &'a str,
    /// At least two, in order.
    pub lengths: &'a [usize],
    pub lines: &'a [Line],
}

const TEXT: i32 = 18;
const TITLE: i32 = 24;
const MARGIN: i32 = 24;
const ROW: i32 = 30;
const CHART: (i32, i32) = (900, 560);

/// Okabe and Ito's colours, which every kind of colour vision tells apart, without the yellow, which
/// is too light for a line on white.
const COLOURS: [RGBColor; 7] = [
    RGBColor(0x00, 0x72, 0xb2),
    RGBColor(0xd5, 0x5e, 0x00),
    RGBColor(0x00, 0x9e, 0x73),
    RGBColor(0xcc, 0x79, 0xa7),
    RGBColor(0x56, 0xb4, 0xe9),
    RGBColor(0xe6, 0x9f, 0x00),
    RGBColor(0x00, 0x00, 0x00),
];

fn extension(path: &Path) -> String {
    path.extension().map(|ending| ending.to_string_lossy().to_lowercase()).unwrap_or_default()
}

/// Refuses what is not a picture, before the work is done.
pub fn check_ending(path: &Path) -> Result<()> {
    match extension(path).as_str() {
        "png" | "svg" => Ok(()),
        _ => usage!("{}: the ending must be .png or .svg", path.display()),
    }
}

pub fn write(path: &Path, plot: &Plot<'_>) -> Result<()> {
    if plot.lines.is_empty() {
        fail!("cannot draw {}: no length could be measured", path.display());
    }
    let cannot = |error: &dyn std::fmt::Display| Error::Failed(format!("cannot draw {}: {error}", path.display()));
    font::register().map_err(|error| cannot(&error))?;
    let widest = plot.lines.iter().map(|line| text_width(&line.name, TEXT)).max().unwrap_or(0);
    let width = CHART.0.max(widest + 3 * MARGIN + 60).max(text_width(plot.title, TITLE) + 2 * MARGIN) as u32;
    let height = (CHART.1 + plot.lines.len() as i32 * ROW + MARGIN) as u32;
    if extension(path) == "svg" {
        let mut text = String::new();
        draw(SVGBackend::with_string(&mut text, (width, height)), plot).map_err(|error| cannot(&error))?;
        return files::write_whole(path, |file| {
            use std::io::Write;
            file.write_all(text.as_bytes()).map_err(|error| cannot(&error))
        });
    }
    let mut pixels = vec![0u8; width as usize * height as usize * 3];
    draw(BitMapBackend::with_buffer(&mut pixels, (width, height)), plot).map_err(|error| cannot(&error))?;
    let picture = image::RgbImage::from_raw(width, height, pixels).expect("three bytes a pixel");
    files::write_whole(path, |file| {
        picture.write_to(&mut std::io::BufWriter::new(file), image::ImageFormat::Png).map_err(|error| cannot(&error))
    })
}

/// 1, 2 and 5 times the powers of ten from the last below `least` to the first above `most`.
fn ticks(least: f64, most: f64) -> Vec<f64> {
    let first = least.log10().floor() as i32 - 1;
    let last = most.log10().ceil() as i32 + 1;
    let all: Vec<f64> = (first..=last).flat_map(|power| [1.0, 2.0, 5.0].map(|n| n * 10f64.powi(power))).collect();
    let from = all.iter().rposition(|&tick| tick < least).unwrap_or(0);
    let to = all.iter().position(|&tick| tick > most).unwrap_or(all.len() - 1);
    all[from..=to].to_vec()
}

fn number(value: f64) -> String {
    // Rounded away: 10⁻¹ · 2 is not quite 0.2.
    let text = format!("{value:.9}");
    text.trim_end_matches('0').trim_end_matches('.').to_string()
}

/// Those of the lengths whose labels do not touch, the longest length among them.
fn labelled(lengths: &[usize]) -> Vec<f64> {
    let (first, last) = (lengths[0] as f64, lengths[lengths.len() - 1] as f64);
    let at = |length: f64| (length / first).ln() / (last / first).ln() * f64::from(CHART.0 - 160);
    let mut kept: Vec<f64> = Vec::new();
    for length in lengths.iter().rev().map(|&length| length as f64) {
        let room = f64::from(text_width(&length.to_string(), TEXT) + 12);
        if kept.last().is_none_or(|&next| at(next) - at(length) >= room) {
            kept.push(length);
        }
    }
    kept.reverse();
    kept
}

fn draw<B: DrawingBackend>(backend: B, plot: &Plot<'_>) -> Result<(), String> {
    let cannot = |error: DrawingAreaErrorKind<B::ErrorType>| error.to_string();
    let root = backend.into_drawing_area();
    root.fill(&WHITE).map_err(cannot)?;
    let (upper, legend) = root.split_vertically(CHART.1);

    let times = || plot.lines.iter().flat_map(|line| &line.points).map(|&(_, ms)| ms);
    let y = ticks(times().fold(f64::INFINITY, f64::min), times().fold(0.0, f64::max));
    let (first, last) = (plot.lengths[0] as f64, plot.lengths[plot.lengths.len() - 1] as f64);
    let room = (last / first).powf(0.03);
    let x_axis = (first / room..last * room).log_scale().with_key_points(labelled(plot.lengths));
    let y_axis = (y[0]..y[y.len() - 1]).log_scale().with_key_points(y.clone());
    let text = |size: i32| TextStyle::from((FONT, f64::from(size)).into_font());
    let label = y.iter().map(|&tick| text_width(&number(tick), TEXT)).max().unwrap_or(0);
    let mut chart = ChartBuilder::on(&upper)
        .caption(plot.title, text(TITLE))
        .margin(MARGIN)
        .x_label_area_size(3 * TEXT + 10)
        .y_label_area_size(label + 2 * TEXT + 20)
        .build_cartesian_2d(x_axis, y_axis)
        .map_err(cannot)?;
    chart
        .configure_mesh()
        .bold_line_style(RGBColor(0xdd, 0xdd, 0xdd))
        .light_line_style(TRANSPARENT)
        .x_label_formatter(&|length| number(*length))
        .y_label_formatter(&|ms| number(*ms))
        .label_style(text(TEXT))
        .axis_desc_style(text(TEXT))
        .x_desc("length: queries and keys")
        .y_desc("milliseconds per call, median")
        .draw()
        .map_err(cannot)?;
    for (n, line) in plot.lines.iter().enumerate() {
        let points = line.points.iter().map(|&(length, ms)| (length as f64, ms));
        let style = COLOURS[n % COLOURS.len()].stroke_width(3);
        chart.draw_series(LineSeries::new(points.clone(), style)).map_err(cannot)?;
        for point in points {
            mark(chart.plotting_area(), point, n).map_err(cannot)?;
        }
        legend_row(&legend, line, n).map_err(cannot)?;
    }
    root.present().map_err(cannot)
}

fn legend_row<B: DrawingBackend>(
    area: &DrawingArea<B, Shift>,
    line: &Line,
    n: usize,
) -> Result<(), DrawingAreaErrorKind<B::ErrorType>> {
    let y = n as i32 * ROW + ROW / 2;
    let style = COLOURS[n % COLOURS.len()].stroke_width(3);
    area.draw(&PathElement::new([(2 * MARGIN, y), (2 * MARGIN + 44, y)], style))?;
    mark(area, (2 * MARGIN + 22, y), n)?;
    let text = TextStyle::from((FONT, f64::from(TEXT)).into_font()).pos(Pos::new(HPos::Left, VPos::Center));
    area.draw_text(&line.name, &text, (2 * MARGIN + 56, y))
}

/// The n-th line's marker: lines differ by form as well as by colour.
fn mark<B: DrawingBackend, C: CoordTranslate>(
    area: &DrawingArea<B, C>,
    at: C::From,
    n: usize,
) -> Result<(), DrawingAreaErrorKind<B::ErrorType>>
where
    C::From: Clone,
{
    let colour = COLOURS[n % COLOURS.len()];
    match n % 4 {
        0 => area.draw(&Circle::new(at, 6, colour.filled())),
        1 => area.draw(&TriangleMarker::new(at, 9, colour.filled())),
        2 => area.draw(&(EmptyElement::at(at) + Rectangle::new([(-6, -6), (6, 6)], colour.filled()))),
        _ => area.draw(&Cross::new(at, 7, colour.stroke_width(3))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_enclose_the_values() {
        assert_eq!(ticks(0.3, 0.4).into_iter().map(number).collect::<Vec<_>>(), ["0.2", "0.5"]);
        assert_eq!(
            ticks(1.0, 20.0).into_iter().map(number).collect::<Vec<_>>(),
            ["0.5", "1", "2", "5", "10", "20", "50"]
        );
        assert_eq!(number(0.001), "0.001");
        assert_eq!(number(4096.0), "4096");
    }

    #[test]
    fn labels_do_not_touch_and_the_longest_length_has_one() {
        assert_eq!(labelled(&[128, 256, 512]), [128.0, 256.0, 512.0]);
        let many: Vec<usize> = (1..=200).map(|n| n * 16).collect();
        let kept = labelled(&many);
        assert!(kept.len() > 4 && kept.len() < 30, "{kept:?}");
        assert_eq!(kept.last(), Some(&3200.0));
    }
}
