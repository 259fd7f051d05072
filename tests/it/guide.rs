//! The guide for learners: every page shows what its lesson prints, on every device. Its pictures are those that the
//! lesson draws, and its links have targets. Its Rust blocks are doctests (`src/lib.rs`).

#[path = "../../examples/lesson_1.rs"]
#[allow(dead_code, clippy::duplicate_mod, reason = "a program of its own, run here as a module")]
mod lesson_1;
#[path = "../../examples/lesson_2.rs"]
#[allow(dead_code, clippy::duplicate_mod, reason = "a program of its own, run here as a module")]
mod lesson_2;
#[path = "../../examples/lesson_3.rs"]
#[allow(dead_code, clippy::duplicate_mod, reason = "a program of its own, run here as a module")]
mod lesson_3;
#[path = "../../examples/lesson_4.rs"]
#[allow(dead_code, clippy::duplicate_mod, reason = "a program of its own, run here as a module")]
mod lesson_4;
#[path = "../../examples/lesson_5.rs"]
#[allow(dead_code, clippy::duplicate_mod, reason = "a program of its own, run here as a module")]
mod lesson_5;

use std::path::{Path, PathBuf};

use crate::kit::devices;
use image::RgbImage;
use wgpu_attention::Device;

type Lesson = fn(&Device, &mut String) -> Result<RgbImage, Box<dyn std::error::Error>>;

const PAGES: [&str; 6] =
    ["README", "1-why-attention", "2-scaled-dot-product", "3-multi-head", "4-self-and-cross", "5-positions"];

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/guide").join(name)
}

fn page(name: &str) -> String {
    let path = file(&format!("{name}.md"));
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The lines of all blocks in that language.
fn blocks<'a>(page: &'a str, language: &str) -> Vec<&'a str> {
    let mut inside = None;
    let mut lines = Vec::new();
    for line in page.lines() {
        match (line.strip_prefix("```"), inside) {
            (Some(language), None) => inside = Some(language),
            (Some(_), Some(_)) => inside = None,
            (None, Some(found)) if found == language && !line.trim().is_empty() => lines.push(line),
            _ => {}
        }
    }
    assert!(inside.is_none(), "a block is not closed");
    lines
}

/// A line split into alternating text and numbers. A number begins with a digit (or a minus and a digit) that does not
/// follow a letter.
fn pieces(line: &str) -> Vec<&str> {
    let bytes = line.as_bytes();
    let digit = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_digit);
    let mut cuts = vec![0];
    let mut at = 0;
    while at < bytes.len() {
        let after_letter = at > 0 && bytes[at - 1].is_ascii_alphabetic();
        if after_letter || !(digit(at) || bytes[at] == b'-' && digit(at + 1)) {
            at += 1;
            continue;
        }
        let start = at;
        at += 1;
        while digit(at) || bytes.get(at) == Some(&b'.') && digit(at + 1) {
            at += 1;
        }
        if bytes.get(at) == Some(&b'e') && (digit(at + 1) || bytes.get(at + 1) == Some(&b'-') && digit(at + 2)) {
            at += 2;
            while digit(at) {
                at += 1;
            }
        }
        cuts.extend([start, at]);
    }
    cuts.push(bytes.len());
    cuts.windows(2).map(|cut| &line[cut[0]..cut[1]]).filter(|piece| !piece.is_empty()).collect()
}

/// Whether a device may print `actual` where the page shows `shown`: text and whole numbers exactly, a decimal
/// within one unit of its last digit, a rounding error (`4e-7`) up to ten times as large, and at least one in 10⁶.
fn agree(shown: &str, actual: &str) -> bool {
    let (shown, actual) = (pieces(shown), pieces(actual));
    shown.len() == actual.len()
        && shown.iter().zip(actual).all(|(&shown, actual)| {
            let (Ok(a), Ok(b)) = (shown.parse::<f64>(), actual.parse::<f64>()) else { return shown == actual };
            if shown.contains('e') {
                return actual.contains('e') && b <= (10.0 * a).max(1e-6);
            }
            match (shown.split_once('.'), actual.split_once('.')) {
                (Some((_, decimals)), Some((_, others))) => {
                    let unit = 10f64.powi(-(decimals.len() as i32));
                    decimals.len() == others.len() && (a - b).abs() < 1.5 * unit
                }
                _ => shown == actual,
            }
        })
}

#[test]
fn the_comparison_can_fail() {
    for (shown, actual) in [
        ("the  0.12", "the  0.13"),
        ("off by 4e-7", "off by 3e-6"),
        ("off by 0e0", "off by 6e-8"),
        ("x -1.50, 3 left", "x -1.51, 3 left"),
    ] {
        assert!(agree(shown, actual), "{shown} | {actual}");
    }
    for (shown, actual) in [
        ("the  0.12", "the  0.14"),
        ("the  0.12", "a    0.12"),
        ("the  0.12", "the 0.12"),
        ("off by 4e-7", "off by 5e-6"),
        ("off by 4e-7", "off by 2.89"),
        ("off by 4e-7", "off by NaN"),
        ("0.12", "NaN"),
        ("0.12", "0.1"),
        ("12 of 13", "12 of 14"),
        ("100%", "99%"),
        ("1.50", "-1.50"),
        ("head 1", "head 1 "),
    ] {
        assert!(!agree(shown, actual), "{shown} | {actual}");
    }
}

#[track_caller]
fn check(name: &str, lesson: Lesson) {
    let text = page(name);
    let shown = blocks(&text, "output");
    let picture = image::open(file(&format!("{name}.png"))).unwrap().into_rgb8();
    for (device_name, device) in devices() {
        let mut out = String::new();
        let drawn = lesson(&device, &mut out).unwrap_or_else(|error| panic!("{name} on {device_name}: {error}"));
        let printed: Vec<&str> = out.lines().filter(|line| !line.trim().is_empty()).collect();
        for (n, line) in printed.iter().enumerate() {
            let shown = shown.get(n).copied().unwrap_or("(the end of the page)");
            assert!(agree(shown, line), "{name}.md on {device_name}\n  page:    {shown}\n  printed: {line}");
        }
        assert_eq!(printed.len(), shown.len(), "{name}.md shows more than is printed");

        assert_eq!(drawn.dimensions(), picture.dimensions(), "{name}.png is not what the lesson draws");
        let pairs = drawn.iter().zip(picture.iter());
        let apart = pairs.filter(|&(a, b)| a.abs_diff(*b) > 16).count() as f64 / drawn.len() as f64;
        assert!(apart < 0.005, "{name}.png differs in {:.1} % from what {device_name} draws", 100.0 * apart);
    }
}

#[test]
fn why_attention() {
    check("1-why-attention", lesson_1::lesson);
}

#[test]
fn scaled_dot_product() {
    check("2-scaled-dot-product", lesson_2::lesson);
}

#[test]
fn multi_head() {
    check("3-multi-head", lesson_3::lesson);
}

#[test]
fn self_and_cross() {
    check("4-self-and-cross", lesson_4::lesson);
}

#[test]
fn positions() {
    check("5-positions", lesson_5::lesson);
}

/// The text after `](`, up to the closing bracket.
fn links(page: &str) -> Vec<&str> {
    page.match_indices("](").filter_map(|(at, _)| page[at + 2..].split_once(')').map(|(link, _)| link)).collect()
}

#[test]
fn links_and_pictures_are_there() {
    let library = include_str!("../../src/lib.rs");
    let index = page("README");
    for name in PAGES {
        let text = page(name);
        assert!(!links(&text).is_empty(), "{name}.md has no links");
        for link in links(&text) {
            assert!(file(link).exists(), "{name}.md: {link} leads nowhere");
        }
        if name == "README" {
            continue;
        }
        assert!(links(&index).contains(&format!("{name}.md").as_str()), "the index does not lead to {name}.md");
        assert!(library.contains(&format!("include_str!(\"../docs/guide/{name}.md\")")), "{name}.md has no doctests");
        assert!(!blocks(&text, "rust").is_empty(), "{name}.md has no code");
        assert!(text.contains("## Exercises"), "{name}.md has no exercises");
        let picture = std::fs::metadata(file(&format!("{name}.png"))).unwrap();
        assert!(links(&text).contains(&format!("{name}.png").as_str()), "{name}.md does not show its picture");
        assert!(picture.len() < 120_000, "{name}.png has {} bytes", picture.len());
    }
    let readme = include_str!("../../README.md");
    assert!(links(readme).contains(&"docs/guide/README.md"), "the README does not lead to the guide");
}
