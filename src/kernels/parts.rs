//! Composes kernels from `shaders/NAME.wgsl` and the parts that it names.
//!
//! `// @use load(q), view` includes the text of `shaders/parts/load.wgsl` and `view.wgsl`. If the first line of a part
//! is `// @for x y`, its words `x` and `y` (whole words, and those between underscores) are replaced by the arguments.
//! A part is a block (`view`, with arguments `load_q`), which [`Changes`] may replace by another part or a line. Parts
//! use parts; one that is used twice is included once.

use std::collections::BTreeSet;

use super::specialise::{Body, Changes, fault, is_word};
use crate::error::Result;

macro_rules! parts {
    ($($name:literal)*) => {
        [$(($name, include_str!(concat!("../../shaders/parts/", $name, ".wgsl")))),*]
    };
}

const PARTS: &[(&str, &str)] = &parts! {
    "add_bias" "axes" "bands" "bands_packed" "bias" "block_is_full" "block_mask" "capped" "d_lse" "d_weights"
    "each_element" "each_workgroup" "element" "element_bf16" "element_f16" "fused" "join" "keep_dx" "load" "load_four"
    "load_wide" "lse" "mask" "not_finite" "of_bf16" "of_bf16_words" "of_f16" "of_f16_words" "of_f32" "of_f32_words"
    "pair" "projection" "relative" "relative_fours" "relative_none" "relative_slope" "rotary" "rotary_interleaved"
    "rotary_none" "rotate_unit" "rotate_unit_wide" "row_of" "rules" "score" "sequence" "sequence_packed"
    "shared_value" "shift" "sigmoid" "sink" "softmax_row" "splits" "store" "store_four" "store_fours" "store_wide"
    "tanh" "to_bf16" "to_f16" "to_f32" "view"
};

/// The text of a file with the text of its parts, as blocks.
pub(super) fn compose(file: &str, source: &str, changes: &Changes) -> Result<String> {
    let mut composer = Composer { file, changes, used: BTreeSet::new(), out: String::with_capacity(4 * source.len()) };
    composer.lines(source, &[])?;
    let parts = changes.blocks.iter().filter(|(_, body)| matches!(body, Body::Part(_)));
    let unused: Vec<&str> = parts.map(|(&name, _)| name).filter(|&name| !composer.used.contains(name)).collect();
    match unused.as_slice() {
        [] => Ok(composer.out),
        names => Err(fault(file, format!("uses no part {}", names.join(", ")))),
    }
}

struct Composer<'a> {
    file: &'a str,
    changes: &'a Changes,
    /// Blocks that are already included: what several parts use is included once.
    used: BTreeSet<String>,
    out: String,
}

impl Composer<'_> {
    /// Lines of a file or a part, with `words` replaced.
    fn lines(&mut self, text: &str, words: &[(&str, &str)]) -> Result<()> {
        for line in text.lines().filter(|line| !line.starts_with("// @for ")) {
            let line = replaced(line, words);
            match line.strip_prefix("// @use ") {
                Some(uses) => uses.split(", ").try_for_each(|one| self.block(one))?,
                None => {
                    self.out.push_str(&line);
                    self.out.push('\n');
                }
            }
        }
        Ok(())
    }

    /// Includes the text for `view(q w)`, as a block.
    fn block(&mut self, uses: &str) -> Result<()> {
        let (name, mut arguments) = parse(uses);
        let key = match arguments.first() {
            Some(first) => format!("{name}_{first}"),
            None => name.to_string(),
        };
        if !self.used.insert(key.clone()) {
            return Ok(());
        }
        self.out.push_str(&format!("// @block {key}\n"));
        match self.changes.blocks.get(key.as_str()) {
            Some(Body::Line(_)) => {}
            Some(Body::Part(other)) => {
                let (name, first) = parse(other);
                arguments.splice(0..0, first);
                self.part(name, &arguments)?;
            }
            _ => self.part(name, &arguments)?,
        }
        self.out.push_str("// @end\n");
        Ok(())
    }

    fn part(&mut self, name: &str, arguments: &[&str]) -> Result<()> {
        let Some(&(_, text)) = PARTS.iter().find(|(part, _)| *part == name) else {
            return Err(fault(self.file, format!("there is no part {name}")));
        };
        let names = text.lines().find_map(|line| line.strip_prefix("// @for ")).unwrap_or_default();
        let words: Vec<&str> = names.split_whitespace().collect();
        if arguments.len() < words.len() {
            let message = format!("part {name} takes {}, not {}", words.join(", "), arguments.join(", "));
            return Err(fault(self.file, message));
        }
        let words: Vec<(&str, &str)> = words.into_iter().zip(arguments.iter().copied()).collect();
        self.lines(text, &words)
    }
}

/// `view(q w)`: the name and the arguments.
fn parse(uses: &str) -> (&str, Vec<&str>) {
    match uses.trim_end_matches(')').split_once('(') {
        Some((name, arguments)) => (name, arguments.split(' ').collect()),
        None => (uses, Vec::new()),
    }
}

/// A line with words replaced, and parts of words between underscores.
fn replaced(line: &str, words: &[(&str, &str)]) -> String {
    if words.is_empty() {
        return line.to_string();
    }
    let value = |word: &str| words.iter().find(|(name, _)| *name == word).map(|&(_, value)| value);
    let mut out = String::with_capacity(line.len() + 16);
    let mut rest = line;
    while let Some(start) = rest.find(is_word) {
        let end = rest[start..].find(|c| !is_word(c)).map_or(rest.len(), |end| start + end);
        out.push_str(&rest[..start]);
        let word = &rest[start..end];
        let pieces: Vec<&str> = word.split('_').map(|piece| value(piece).unwrap_or(piece)).collect();
        out.push_str(value(word).unwrap_or(&pieces.join("_")));
        rest = &rest[end..];
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_takes_the_words_of_its_use() {
        let text = compose("f", "// @use load(q dim_k PADDED_K)\n", &Changes::default()).unwrap();
        assert!(text.starts_with("// @block load_q\n") && text.contains("fn load_q(at: u32, d4: u32)"), "{text}");
        assert!(text.contains("let step = params.q.strides.w;") && text.contains("vec4<u32>(params.dim_k)"), "{text}");
        let wide = Changes::default().part("load_q", "load_wide(of_f16)");
        let text = compose("f", "// @use load(q dim_k !PADDED)\n", &wide).unwrap();
        assert!(text.contains("of_f16(q[at / 4u + d4])") && text.contains("!PADDED && d4 * 4u"), "{text}");
        let halves = Changes::default().part("element_q", "element_f16");
        let text = compose("f", "// @use load(q dim_k PADDED)\n", &halves).unwrap();
        assert!(text.contains("fn element_q(at: u32) -> f32") && text.contains("unpack2x16float"), "{text}");
    }

    #[test]
    fn what_is_no_part_or_has_no_words_is_an_error() {
        for source in ["// @use nobody\n", "// @use load(q)\n", "// @use load\n"] {
            assert!(compose("f", source, &Changes::default()).is_err(), "{source}");
        }
        assert!(compose("f", "", &Changes::default().part("load_q", "load_wide(of_f32)")).is_err());
    }

    #[test]
    fn every_part_is_there_once_and_nothing_else() {
        let mut files: Vec<String> = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/shaders/parts"))
            .unwrap()
            .map(|file| file.unwrap().file_name().into_string().unwrap())
            .collect();
        files.sort();
        let mut named: Vec<String> = PARTS.iter().map(|(name, _)| format!("{name}.wgsl")).collect();
        named.sort();
        assert_eq!(files, named);
    }
}
