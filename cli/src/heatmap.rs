//! A labelled heatmap as a PNG.

use std::path::Path;

use plotters::prelude::*;
use plotters::style::FontTransform;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::error::{Error, Result, fail};
use crate::files;
use crate::font::{self, FONT, text_width};

/// `values` is `[rows, columns]`, between 0 and 1.
pub struct Heatmap<'a> {
    pub title: &'a str,
    pub rows: &'a [String],
    pub columns: &'a [String],
    pub values: &'a [f32],
}

const CELL: i32 = 44;
const TEXT: i32 = 20;
const TITLE: i32 = 26;
const MARGIN: i32 = 24;

/// viridis: even steps in lightness, readable with any colour vision.
fn colour(value: f32) -> RGBColor {
    ViridisRGB.get_color(value.clamp(0.0, 1.0))
}

pub fn write(path: &Path, map: &Heatmap<'_>) -> Result<()> {
    if map.values.len() != map.rows.len() * map.columns.len() {
        fail!("{} values do not fill {} rows of {}", map.values.len(), map.rows.len(), map.columns.len());
    }
    let cannot = |error: &dyn std::fmt::Display| Error::Failed(format!("cannot draw {}: {error}", path.display()));
    font::register().map_err(|error| cannot(&error))?;

    // The layout follows the labels, so that no text is cut.
    let widest = |labels: &[String]| labels.iter().map(|label| text_width(label, TEXT)).max().unwrap_or(0);
    let label_gap = 10;
    let left = MARGIN + TEXT + 14 + widest(map.rows) + label_gap;
    let grid = (map.columns.len() as i32 * CELL, map.rows.len() as i32 * CELL);
    let top = MARGIN + TITLE + 20;
    let bar_left = left + grid.0 + 34;
    let bar_width = 26;
    let width =
        (bar_left + bar_width + 12 + text_width("1.00", TEXT) + MARGIN).max(text_width(map.title, TITLE) + 2 * MARGIN);
    let height = top + grid.1 + label_gap + widest(map.columns) + 14 + TEXT + MARGIN;

    let mut pixels = vec![0u8; (width * height * 3) as usize];
    {
        let root = BitMapBackend::with_buffer(&mut pixels, (width as u32, height as u32)).into_drawing_area();
        root.fill(&WHITE).map_err(|error| cannot(&error))?;
        let text = |text: &str, at: (i32, i32), size: i32, pos: Pos, turn: FontTransform, ink: &RGBColor| {
            let style = TextStyle::from((FONT, f64::from(size)).into_font().transform(turn)).color(ink).pos(pos);
            root.draw_text(text, &style, at).map_err(|error| cannot(&error))
        };
        let rectangle = |from: (i32, i32), to: (i32, i32), ink: RGBColor| {
            root.draw(&Rectangle::new([from, to], ink.filled())).map_err(|error| cannot(&error))
        };
        let level = FontTransform::None;
        text(map.title, (width / 2, MARGIN), TITLE, Pos::new(HPos::Center, VPos::Top), level.clone(), &BLACK)?;

        for (i, row) in map.rows.iter().enumerate() {
            let y = top + i as i32 * CELL;
            text(
                row,
                (left - label_gap, y + CELL / 2),
                TEXT,
                Pos::new(HPos::Right, VPos::Center),
                level.clone(),
                &BLACK,
            )?;
            for j in 0..map.columns.len() {
                let (x, value) = (left + j as i32 * CELL, map.values[i * map.columns.len() + j]);
                rectangle((x, y), (x + CELL - 1, y + CELL - 1), colour(value))?;
                // The weights that matter, in numbers too.
                if value >= 0.1 {
                    let ink = if value > 0.6 { BLACK } else { WHITE };
                    let number = format!("{value:.2}");
                    text(
                        number.strip_prefix('0').unwrap_or(&number),
                        (x + CELL / 2, y + CELL / 2),
                        16,
                        Pos::new(HPos::Center, VPos::Center),
                        level.clone(),
                        &ink,
                    )?;
                }
            }
        }
        let below = top + grid.1 + label_gap;
        for (j, column) in map.columns.iter().enumerate() {
            let x = left + j as i32 * CELL + CELL / 2;
            text(column, (x, below), TEXT, Pos::new(HPos::Right, VPos::Center), FontTransform::Rotate270, &BLACK)?;
        }
        let middle = (left + grid.0 / 2, top + grid.1 / 2);
        let caption = below + widest(map.columns) + 14;
        text(
            "key: the token attended to",
            (middle.0, caption),
            TEXT,
            Pos::new(HPos::Center, VPos::Top),
            level.clone(),
            &BLACK,
        )?;
        text(
            "query: the token that attends",
            (MARGIN, middle.1),
            TEXT,
            Pos::new(HPos::Center, VPos::Top),
            FontTransform::Rotate270,
            &BLACK,
        )?;

        for y in 0..grid.1 {
            let value = 1.0 - y as f32 / (grid.1 - 1).max(1) as f32;
            rectangle((bar_left, top + y), (bar_left + bar_width, top + y + 1), colour(value))?;
        }
        for tick in 0..=4 {
            let value = f64::from(tick) / 4.0;
            let y = top + ((1.0 - value) * f64::from(grid.1 - 1)).round() as i32;
            rectangle((bar_left + bar_width, y), (bar_left + bar_width + 6, y + 1), BLACK)?;
            text(
                &format!("{value:.2}"),
                (bar_left + bar_width + 12, y),
                TEXT,
                Pos::new(HPos::Left, VPos::Center),
                level.clone(),
                &BLACK,
            )?;
        }
        root.present().map_err(|error| cannot(&error))?;
    }
    let picture = image::RgbImage::from_raw(width as u32, height as u32, pixels).expect("three bytes a pixel");
    files::write_whole(path, |file| {
        picture.write_to(&mut std::io::BufWriter::new(file), image::ImageFormat::Png).map_err(|error| cannot(&error))
    })
}
