//! The font of pictures, embedded, so that they look the same on every machine.

use plotters::style::{FontStyle, register_font};

/// Its name; an SVG file carries it, and a viewer has a monospaced font of its own.
pub const FONT: &str = "monospace";
/// The advance of the font relative to its size, rounded up.
const ADVANCE: f64 = 0.62;

pub fn register() -> Result<(), &'static str> {
    register_font(FONT, FontStyle::Normal, epaint_default_fonts::HACK_REGULAR)
        .map_err(|_| "the embedded font is not readable")
}

/// Pixels, rounded up.
pub fn text_width(text: &str, size: i32) -> i32 {
    (text.chars().count() as f64 * f64::from(size) * ADVANCE).ceil() as i32
}
