//! Kernels are put together from `shaders/NAME.wgsl` and the parts that it names.
//!
//! `// @use view(q)` stands for the text of `shaders/parts/view.wgsl`. A part whose first line is `// @for x y` has
//! its words `x` and `y` (whole ones, and those between underscores) replaced by the arguments. A part that a kernel
//! names is a block of it (`view`, with arguments `view_q`), which [`Changes`] may give another part; parts that parts
//! name just stand there.

use super::specialise::{Body, Changes, fault, is_word};
use crate::error::Result;

macro_rules! parts {
    ($($name:literal)*) => {
        [$(($name, include_str!(concat!("../../shaders/parts/", $name, ".wgsl")))),*]
    };
}

const PARTS: &[(&str, &str)] = &parts! {
    "all_seen" "bands" "bands_packed" "bias" "element" "element_half" "flash_params" "join_sum" "load" "load_half"
    "load_wide" "load_wide_bf16" "load_wide_f16" "load_words" "load_words_bf16" "load_words_f16" "lse" "mask"
    "numbers" "one_bf16" "one_f16" "pack_bf16" "pack_f16" "pair" "place" "relative" "relative_fours" "relative_none"
    "relative_slope" "rotary" "rotary_interleaved" "rotary_none" "row_of" "score" "sequence" "sequence_packed" "sink"
    "splits" "store" "store_four" "store_fours" "store_fours_half" "store_wide" "store_wide_bf16" "store_wide_f16"
    "sums" "sums_wide" "tanh" "tiles" "turn" "turn_wide" "visible"
};

/// The text of a file with that of its parts, as blocks.
pub(super) fn compose(file: &str, source: &str, changes: &Changes) -> Result<String> {
    let mut out = String::with_capacity(2 * source.len());
    let parts = changes.blocks.iter().filter(|(_, body)| matches!(body, Body::Part(_)));
    let mut unused: Vec<&str> = parts.map(|(&name, _)| name).collect();
    for line in source.lines() {
        let Some(uses) = line.trim().strip_prefix("// @use ") else {
            out.push_str(line);
            out.push('\n');
            continue;
        };
        let (name, mut arguments) = parse(uses);
        let key = match arguments.first() {
            Some(first) => format!("{name}_{first}"),
            None => name.to_string(),
        };
        unused.retain(|&one| one != key);
        let mut part = name;
        if let Some(Body::Part(other)) = changes.blocks.get(key.as_str()) {
            let (name, more) = parse(other);
            part = name;
            arguments.splice(0..0, more);
        }
        out.push_str(&format!("// @block {key}\n"));
        insert(file, part, &arguments, &mut out)?;
        out.push_str("// @end\n");
    }
    match unused.as_slice() {
        [] => Ok(out),
        names => Err(fault(file, format!("uses no part {}", names.join(", ")))),
    }
}

/// `view(q w)`: the name and the arguments.
fn parse(uses: &str) -> (&str, Vec<&str>) {
    match uses.trim_end_matches(')').split_once('(') {
        Some((name, arguments)) => (name, arguments.split(' ').collect()),
        None => (uses, Vec::new()),
    }
}

fn insert(file: &str, name: &str, arguments: &[&str], out: &mut String) -> Result<()> {
    let Some(&(_, text)) = PARTS.iter().find(|(part, _)| *part == name) else {
        return Err(fault(file, format!("there is no part {name}")));
    };
    let mut words: Vec<(&str, &str)> = Vec::new();
    for line in text.lines() {
        if let Some(names) = line.strip_prefix("// @for ") {
            let names: Vec<&str> = names.split(' ').collect();
            if arguments.len() < names.len() {
                return Err(fault(
                    file,
                    format!("part {name} takes {}, not {}", names.join(", "), arguments.join(", ")),
                ));
            }
            words = names.into_iter().zip(arguments.iter().copied()).collect();
            continue;
        }
        let line = replaced(line, &words);
        if let Some(uses) = line.strip_prefix("// @use ") {
            let (name, arguments) = parse(uses);
            insert(file, name, &arguments, out)?;
            continue;
        }
        out.push_str(&line);
        out.push('\n');
    }
    Ok(())
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
        let text = compose("f", "// @use load(q dim_k PADDED_K w)\n", &Changes::default()).unwrap();
        assert!(text.starts_with("// @block load_q\nfn load_q(at: u32, d4: u32)"), "{text}");
        assert!(text.contains("let step = params.q_strides.w;") && text.contains("vec4<u32>(params.dim_k)"), "{text}");
        let wide = Changes::default().part("load_q", "load_wide");
        let text = compose("f", "// @use load(q dim_k !PADDED w)\n", &wide).unwrap();
        assert!(text.contains("let four = q[at / 4u + d4];") && text.contains("!PADDED && d4 * 4u"), "{text}");
        let halves = Changes::default().part("load_q", "load_half(f16)");
        let text = compose("f", "// @use load(q dim_k PADDED w)\n", &halves).unwrap();
        assert!(text.contains("fn one_q(at: u32) -> f32"), "{text}");
    }

    #[test]
    fn what_is_no_part_or_has_no_words_is_an_error() {
        for source in ["// @use nobody\n", "// @use load(q)\n", "// @use load\n"] {
            assert!(compose("f", source, &Changes::default()).is_err(), "{source}");
        }
        assert!(compose("f", "", &Changes::default().part("load_q", "load_wide")).is_err());
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
