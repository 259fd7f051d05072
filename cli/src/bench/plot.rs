//! Time over length, on logarithmic axes.

use std::path::Path;

use plotters::coord::combinators::{BindKeyPoints, IntoLogRange};
use plotters::prelude::*;

use crate::error::{Result, fail};
use crate::font::{FONT, text_width};
use crate::picture::{self, Area, COLOURS, Drawn, LEGEND, Picture, legend, mark};

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

pub fn write(path: &Path, plot: &Plot<'_>) -> Result<()> {
    if plot.lines.is_empty() {
        fail!("cannot draw {}: no length could be measured", path.display());
    }
    picture::write(path, plot)
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

/// The lengths whose labels do not touch, including the longest length.
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

impl Picture for Plot<'_> {
    fn size(&self) -> (i32, i32) {
        let widest = self.lines.iter().map(|line| text_width(&line.name, TEXT)).max().unwrap_or(0);
        let width = CHART.0.max(widest + LEGEND + 3 * MARGIN).max(text_width(self.title, TITLE) + 2 * MARGIN);
        (width, CHART.1 + self.lines.len() as i32 * ROW + MARGIN)
    }

    fn draw<B: DrawingBackend>(&self, root: &Area<B>) -> Drawn<B> {
        let (upper, lower) = root.split_vertically(CHART.1);
        let times = || self.lines.iter().flat_map(|line| &line.points).map(|&(_, ms)| ms);
        let y = ticks(times().fold(f64::INFINITY, f64::min), times().fold(0.0, f64::max));
        let (first, last) = (self.lengths[0] as f64, self.lengths[self.lengths.len() - 1] as f64);
        let room = (last / first).powf(0.03);
        let x_axis = (first / room..last * room).log_scale().with_key_points(labelled(self.lengths));
        let y_axis = (y[0]..y[y.len() - 1]).log_scale().with_key_points(y.clone());
        let text = |size: i32| TextStyle::from((FONT, f64::from(size)).into_font());
        let label = y.iter().map(|&tick| text_width(&number(tick), TEXT)).max().unwrap_or(0);
        let mut chart = ChartBuilder::on(&upper)
            .caption(self.title, text(TITLE))
            .margin(MARGIN)
            .x_label_area_size(3 * TEXT + 10)
            .y_label_area_size(label + 2 * TEXT + 20)
            .build_cartesian_2d(x_axis, y_axis)?;
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
            .draw()?;
        for (n, line) in self.lines.iter().enumerate() {
            let points = line.points.iter().map(|&(length, ms)| (length as f64, ms));
            let style = COLOURS[n % COLOURS.len()].stroke_width(3);
            chart.draw_series(LineSeries::new(points.clone(), style))?;
            for point in points {
                mark(chart.plotting_area(), point, n)?;
            }
            legend(&lower, &line.name, (2 * MARGIN, n as i32 * ROW + ROW / 2), n, TEXT)?;
        }
        Ok(())
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
