//! The embedded font of pictures, so that they look the same on every machine.

use ab_glyph::Font;
use plotters::style::{FontStyle, register_font};
use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

/// The font's name. An SVG file names it; a viewer without it uses its own monospaced font.
pub const FONT: &str = "monospace";
/// The advance of a monospaced font (0.6 em and a little) relative to its size, which plotters takes as 1.24 em.
const ADVANCE: f64 = 0.53;
/// The most columns of a label; a longer token loses its middle.
const LONGEST: usize = 28;

pub fn register() -> Result<(), &'static str> {
    register_font(FONT, FontStyle::Normal, epaint_default_fonts::HACK_REGULAR)
        .map_err(|_| "the embedded font is not readable")
}

/// Pixels, rounded up.
pub fn text_width(text: &str, size: i32) -> i32 {
    (text.width() as f64 * f64::from(size) * ADVANCE).ceil() as i32
}

/// A token in visible characters: control characters and direction marks are escaped, outer spaces become `·`.
pub fn visible(token: &str) -> String {
    if token.is_empty() {
        return "\"\"".into();
    }
    let inner = token.trim_matches(' ');
    let start = token.len() - token.trim_start_matches(' ').len();
    let mut out = String::new();
    for (at, c) in token.char_indices() {
        match c {
            ' ' if at < start || at >= start + inner.len() => out.push('·'),
            c if is_hidden(c) => out.extend(c.escape_default()),
            c => out.push(c),
        }
    }
    out
}

/// Invisible, or not allowed in XML: control characters and direction marks.
pub fn is_hidden(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{ad}' | '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fffe}' | '\u{ffff}')
}

/// [`visible`], shortened to fit a picture.
pub fn label(token: &str) -> String {
    let shown = visible(token);
    if shown.width() <= LONGEST {
        return shown;
    }
    let columns = |c: &char| c.width().unwrap_or(0);
    let take = |chars: &mut dyn Iterator<Item = char>| {
        let mut left = (LONGEST - 1) / 2;
        chars.take_while(|c| left.checked_sub(columns(c)).map(|rest| left = rest).is_some()).collect::<String>()
    };
    let end: String = take(&mut shown.chars().rev());
    format!("{}…{}", take(&mut shown.chars()), end.chars().rev().collect::<String>())
}

/// Examples of characters that the font has no glyph for.
pub fn missing(texts: &[&str]) -> Option<String> {
    const SHOWN: usize = 5;
    let font = ab_glyph::FontRef::try_from_slice(epaint_default_fonts::HACK_REGULAR).ok()?;
    let lacking: std::collections::BTreeSet<char> =
        texts.iter().flat_map(|text| text.chars()).filter(|&c| font.glyph_id(c).0 == 0).collect();
    let first: Vec<String> = lacking.iter().take(SHOWN).map(char::to_string).collect();
    let more = lacking.len().saturating_sub(SHOWN);
    match (lacking.is_empty(), more) {
        (true, _) => None,
        (_, 0) => Some(first.join(" ")),
        _ => Some(format!("{} and {more} more characters", first.join(" "))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_can_be_seen() {
        assert_eq!(visible(""), "\"\"");
        assert_eq!(visible(" a b "), "·a b·");
        assert_eq!(visible("  "), "··");
        assert_eq!(visible("\n\u{202e}x"), "\\n\\u{202e}x");
    }

    #[test]
    fn long_tokens_lose_their_middle() {
        assert_eq!(label(&"a".repeat(28)), "a".repeat(28));
        let long = label(&format!("{}{}", "a".repeat(50), "z".repeat(50)));
        assert_eq!(long, format!("{}…{}", "a".repeat(13), "z".repeat(13)));
        assert!(label(&"語".repeat(40)).width() <= LONGEST);
    }

    #[test]
    fn missing_glyphs_are_told() {
        font_has(&["Ġthe", "▁the", "##ed", "…", "é", "Ж", "λ", "−", "×", "·"]);
        assert_eq!(missing(&["a語"]), Some("語".into()));
    }

    #[track_caller]
    fn font_has(texts: &[&str]) {
        assert_eq!(missing(texts), None);
    }
}
