//! Pictures as PNG and SVG, from the same drawing code.

use std::io::Write;
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::FontTransform;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::error::{Error, Result, fail, usage};
use crate::files;
use crate::font::{self, FONT};

pub type Area<B> = DrawingArea<B, Shift>;
pub type Drawn<B> = Result<(), DrawingAreaErrorKind<<B as DrawingBackend>::ErrorType>>;

/// A picture that any backend can draw.
pub trait Picture {
    /// Width and height in pixels.
    fn size(&self) -> (i32, i32);
    /// The number of rectangles and lines for its data.
    fn marks(&self) -> usize {
        0
    }
    /// Every text in it, to find glyphs that the embedded font lacks.
    fn texts(&self) -> Vec<&str> {
        Vec::new()
    }
    fn draw<B: DrawingBackend>(&self, root: &Area<B>) -> Drawn<B>;
}

/// The longest side, in pixels: viewers and encoders are slow beyond.
const LONGEST: i32 = 16_384;
/// The most pixels: 192 MB.
const PIXELS: i64 = 64 << 20;
/// An SVG has an element for every cell and line; viewers are slow with more.
const SVG_MARKS: usize = 100_000;

/// Okabe and Ito's colours, which are distinguishable with any colour vision. Yellow is omitted: it is too light for a
/// line on white.
pub const COLOURS: [RGBColor; 7] = [
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

/// Rejects a path that is not a picture or whose folder does not exist, before any work is done.
pub fn check_output(path: &Path) -> Result<()> {
    match extension(path).as_str() {
        "png" | "svg" => files::check_folder(path),
        _ => usage!("{}: the ending must be .png or .svg", path.display()),
    }
}

pub fn write(path: &Path, picture: &impl Picture) -> Result<()> {
    let cannot = |error: &dyn std::fmt::Display| Error::Failed(format!("cannot draw {}: {error}", path.display()));
    font::register().map_err(|error| cannot(&error))?;
    let (width, height) = picture.size();
    if width.max(height) > LONGEST || i64::from(width) * i64::from(height) > PIXELS {
        fail!(
            "cannot draw {}: {width} × {height} pixels exceed {LONGEST} on a side or {PIXELS} in total; draw \
             fewer tokens, positions or heads",
            path.display()
        );
    }
    let size = (width as u32, height as u32);
    if extension(path) == "svg" {
        if picture.marks() > SVG_MARKS {
            fail!(
                "cannot draw {}: the SVG would have {} cells and lines, and more than {SVG_MARKS} are too many for \
                 viewers; use .png, or draw fewer tokens, positions or heads",
                path.display(),
                picture.marks()
            );
        }
        let mut text = String::new();
        draw(SVGBackend::with_string(&mut text, size), picture).map_err(|error| cannot(&error))?;
        return files::write_whole(path, |file| file.write_all(text.as_bytes()).map_err(|error| cannot(&error)));
    }
    if let Some(missing) = font::missing(&picture.texts()) {
        anstream::eprintln!(
            "note: the embedded font has no {missing}; {} shows boxes instead, and an .svg uses your viewer's font",
            path.display()
        );
    }
    let mut pixels = vec![0u8; width as usize * height as usize * 3];
    draw(BitMapBackend::with_buffer(&mut pixels, size), picture).map_err(|error| cannot(&error))?;
    let picture = image::RgbImage::from_raw(size.0, size.1, pixels).expect("three bytes a pixel");
    files::write_whole(path, |file| {
        picture.write_to(&mut std::io::BufWriter::new(file), image::ImageFormat::Png).map_err(|error| cannot(&error))
    })
}

fn draw<B: DrawingBackend>(backend: B, picture: &impl Picture) -> Result<(), String> {
    let root = backend.into_drawing_area();
    let drawn = || {
        root.fill(&WHITE)?;
        picture.draw(&root)?;
        root.present()
    };
    drawn().map_err(|error| error.to_string())
}

pub const LEFT: Pos = Pos { h_pos: HPos::Left, v_pos: VPos::Center };
pub const RIGHT: Pos = Pos { h_pos: HPos::Right, v_pos: VPos::Center };
pub const CENTRE: Pos = Pos { h_pos: HPos::Center, v_pos: VPos::Center };
pub const ABOVE: Pos = Pos { h_pos: HPos::Center, v_pos: VPos::Top };

/// Both backends place centred text too high, the bitmap one more so. This offset is halfway between what they need.
fn sink(size: i32) -> i32 {
    (size * 2 + 12) / 25
}

/// Horizontal text.
pub fn text<B: DrawingBackend>(
    root: &Area<B>,
    text: &str,
    at: (i32, i32),
    size: i32,
    pos: Pos,
    ink: RGBColor,
) -> Drawn<B> {
    let at = (at.0, at.1 + if matches!(pos.v_pos, VPos::Center) { sink(size) } else { 0 });
    root.draw_text(text, &TextStyle::from((FONT, f64::from(size)).into_font()).color(&ink).pos(pos), at)
}

/// Text that reads upwards.
pub fn upright<B: DrawingBackend>(root: &Area<B>, text: &str, at: (i32, i32), size: i32, pos: Pos) -> Drawn<B> {
    let font = (FONT, f64::from(size)).into_font().transform(FontTransform::Rotate270);
    let at = (at.0 + if matches!(pos.v_pos, VPos::Center) { sink(size) } else { 0 }, at.1);
    root.draw_text(text, &TextStyle::from(font).color(&BLACK).pos(pos), at)
}

pub fn rectangle<B: DrawingBackend>(root: &Area<B>, from: (i32, i32), to: (i32, i32), ink: &impl Color) -> Drawn<B> {
    root.draw(&Rectangle::new([from, to], ink.filled()))
}

/// A legend entry: a short line with the n-th marker, and its name, `size` pixels high.
pub fn legend<B: DrawingBackend>(root: &Area<B>, name: &str, at: (i32, i32), n: usize, size: i32) -> Drawn<B> {
    let style = COLOURS[n % COLOURS.len()].stroke_width(3);
    root.draw(&PathElement::new([at, (at.0 + 44, at.1)], style))?;
    mark(root, (at.0 + 22, at.1), n)?;
    text(root, name, (at.0 + LEGEND, at.1), size, LEFT, BLACK)
}

/// Where the name begins in a legend entry.
pub const LEGEND: i32 = 56;

/// The marker of the n-th line: lines differ in shape as well as in colour.
pub fn mark<B: DrawingBackend, C: CoordTranslate>(area: &DrawingArea<B, C>, at: C::From, n: usize) -> Drawn<B>
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
