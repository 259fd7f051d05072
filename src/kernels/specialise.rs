//! Turns a shader file into the WGSL text of one variant.
//!
//! Every file is valid WGSL unchanged. Specialisation acts on five marks, all of them comments or whole lines that are
//! valid WGSL without it:
//!
//! - `const NAME: T = value;`, a line of its own: the value is replaced.
//! - `alias NAME = type;`, at the start of a line: the type is replaced.
//! - `// @block name` … `// @end`: the lines between are replaced by one line, or by the body after `// @or other`;
//!   blocks may be nested.
//! - `// @use part(x y), other`: blocks whose bodies are separate files (`parts.rs`).
//! - `// @unroll` before a `for (var i = 0u; i < N; i++) {` with a constant `N`: the body is unrolled, with `i`
//!   replaced by its value. Old drivers (Mesa 22) do not unroll on their own, and registers cannot be indexed by a
//!   variable.

use std::collections::BTreeMap;

use super::parts::compose;
use crate::error::{Error, Result};

/// What to change in a shader file. Values are WGSL text.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Changes {
    /// Values of `const` lines.
    pub consts: BTreeMap<&'static str, String>,
    /// Types of `alias` lines.
    pub aliases: BTreeMap<&'static str, &'static str>,
    /// The content of a block.
    pub blocks: BTreeMap<&'static str, Body>,
}

/// Another body of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Body {
    /// This line.
    Line(&'static str),
    /// The body after `// @or` with this name.
    Or(&'static str),
    /// This part, `name` or `name(x)`; `x` comes before the arguments of the use.
    Part(&'static str),
}

impl Changes {
    /// `const name = value` for an unsigned number.
    pub fn number(mut self, name: &'static str, value: u32) -> Self {
        self.consts.insert(name, format!("{value}u"));
        self
    }
    /// `const name = value` for a flag.
    pub fn flag(mut self, name: &'static str, value: bool) -> Self {
        self.consts.insert(name, value.to_string());
        self
    }
    /// `alias name = ty`.
    pub fn alias(mut self, name: &'static str, ty: &'static str) -> Self {
        self.aliases.insert(name, ty);
        self
    }
    /// Sets another body for a block; the last one wins.
    pub fn block(mut self, name: &'static str, body: Body) -> Self {
        self.blocks.insert(name, body);
        self
    }
    /// Sets a line for a block.
    pub fn line(self, name: &'static str, line: &'static str) -> Self {
        self.block(name, Body::Line(line))
    }
    /// Sets another part for a block.
    pub fn part(self, name: &'static str, part: &'static str) -> Self {
        self.block(name, Body::Part(part))
    }
}

pub(super) fn fault(file: &str, message: String) -> Error {
    Error::Value(format!("shader {file}: {message}"))
}

/// The text of a variant. A change that matches nothing in the file is an error.
pub fn specialise(file: &str, source: &str, changes: &Changes) -> Result<String> {
    let (lines, consts) = changed(file, source, changes)?;
    let mut out = String::new();
    unroll(file, &lines, &consts, &mut out)?;
    Ok(out)
}

/// The text of a file with its parts, unchanged.
pub fn as_it_stands(file: &str, source: &str) -> Result<String> {
    let (lines, _) = changed(file, source, &Changes::default())?;
    Ok(lines.join("\n") + "\n")
}

/// The lines of a variant before unrolling, and its constants.
fn changed(file: &str, source: &str, changes: &Changes) -> Result<(Vec<String>, BTreeMap<String, u64>)> {
    let source = compose(file, source, changes)?;
    // `compose` has checked whether parts are used.
    let bodies = changes.blocks.iter().filter(|(_, body)| !matches!(body, Body::Part(_))).map(|(name, _)| name);
    let mut unused: Vec<&str> = changes.consts.keys().chain(changes.aliases.keys()).chain(bodies).copied().collect();
    let mut lines: Vec<String> = Vec::new();
    let mut consts: BTreeMap<String, u64> = BTreeMap::new();
    // Open blocks, each nested in the one before, and whether their lines are left out.
    let mut open: Vec<(&str, bool)> = Vec::new();
    for line in source.lines() {
        let trimmed = line.trim();
        if let Some(name) = trimmed.strip_prefix("// @block ") {
            let is_left_out = open.iter().any(|&(_, left_out)| left_out);
            let body = changes.blocks.get(name).filter(|_| !is_left_out);
            if let Some(Body::Line(line)) = body {
                unused.retain(|&n| n != name);
                lines.push(line.to_string());
            }
            open.push((name, is_left_out || matches!(body, Some(Body::Line(_) | Body::Or(_)))));
            continue;
        }
        if let (Some(body), Some((name, left_out))) = (trimmed.strip_prefix("// @or "), open.last_mut()) {
            let is_chosen =
                changes.blocks.get(*name).is_some_and(|chosen| matches!(chosen, Body::Or(or) if *or == body));
            if is_chosen {
                unused.retain(|n| n != name);
            }
            *left_out = !is_chosen;
            continue;
        }
        if trimmed == "// @end" {
            if open.pop().is_none() {
                return Err(fault(file, "`// @end` without a block".into()));
            }
            continue;
        }
        if open.iter().any(|&(_, left_out)| left_out) {
            continue;
        }
        let mut line = line.to_string();
        if let Some((name, head)) = declared(&line, "const ", ':') {
            if let Some(value) = changes.consts.get(name) {
                unused.retain(|&n| n != name);
                line = format!("{head} = {value};");
            }
            if let Some(value) = line.split_once('=').and_then(|(_, v)| evaluate(v.trim_end_matches(';'), &consts)) {
                consts.insert(name_of(&line), value);
            }
        } else if let Some((name, head)) = declared(&line, "alias ", '=')
            && let Some(ty) = changes.aliases.get(name)
        {
            unused.retain(|&n| n != name);
            line = format!("{head} = {ty};");
        }
        lines.push(line);
    }
    if let Some((name, _)) = open.last() {
        return Err(fault(file, format!("block {name} has no `// @end`")));
    }
    if !unused.is_empty() {
        return Err(fault(file, format!("has no const, alias or block called {}", unused.join(", "))));
    }
    Ok((lines, consts))
}

/// `(NAME, "const NAME: T")` of a declaration on a line of its own.
fn declared<'a>(line: &'a str, keyword: &str, end: char) -> Option<(&'a str, &'a str)> {
    let rest = line.trim_start().strip_prefix(keyword)?;
    let (name, _) = rest.split_once(end)?;
    let (head, _) = line.split_once('=')?;
    Some((name.trim(), head.trim_end()))
}

fn name_of(line: &str) -> String {
    line.trim_start().trim_start_matches("const ").split(':').next().unwrap_or_default().trim().to_string()
}

fn unroll(file: &str, lines: &[String], consts: &BTreeMap<String, u64>, out: &mut String) -> Result<()> {
    let mut at = 0;
    while at < lines.len() {
        if lines[at].trim() != "// @unroll" {
            out.push_str(&lines[at]);
            out.push('\n');
            at += 1;
            continue;
        }
        let head = lines.get(at + 1).map_or("", |line| line.trim());
        let (variable, bound) = parse_for(head)
            .ok_or_else(|| fault(file, format!("`// @unroll` stands before `{head}`, not before a counting loop")))?;
        let count = evaluate(bound, consts)
            .ok_or_else(|| fault(file, format!("the bound `{bound}` of an unrolled loop is not constant")))?;
        let mut depth = 1i64;
        let mut end = at + 2;
        while end < lines.len() {
            depth += braces(&lines[end]);
            if depth == 0 {
                break;
            }
            end += 1;
        }
        if end == lines.len() {
            return Err(fault(file, format!("the loop `{head}` does not end")));
        }
        for i in 0..count {
            let value = format!("{i}u");
            let body: Vec<String> =
                lines[at + 2..end].iter().map(|line| replace_word(line, variable, &value)).collect();
            out.push_str("{\n");
            unroll(file, &body, consts, out)?;
            out.push_str("}\n");
        }
        at = end + 1;
    }
    Ok(())
}

fn braces(line: &str) -> i64 {
    let code = line.split("//").next().unwrap_or("");
    code.matches('{').count() as i64 - code.matches('}').count() as i64
}

/// `(i, N)` of `for (var i = 0u; i < N; i++) {`.
fn parse_for(line: &str) -> Option<(&str, &str)> {
    let rest = line.strip_prefix("for (var ")?;
    let (variable, rest) = rest.split_once(" = 0u; ")?;
    let rest = rest.strip_prefix(variable)?.strip_prefix(" < ")?;
    let (bound, rest) = rest.split_once("; ")?;
    (rest == format!("{variable}++) {{")).then_some((variable, bound))
}

pub(super) fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

fn replace_word(line: &str, word: &str, value: &str) -> String {
    let mut out = String::with_capacity(line.len());
    let mut rest = line;
    while let Some(at) = rest.find(word) {
        // A member (`.c`) is not the variable.
        let before = rest[..at].chars().next_back().or_else(|| out.chars().next_back());
        let after = rest[at + word.len()..].chars().next();
        let whole = !before.is_some_and(|c| is_word(c) || c == '.') && !after.is_some_and(is_word);
        out.push_str(&rest[..at]);
        out.push_str(if whole { value } else { word });
        rest = &rest[at + word.len()..];
    }
    out.push_str(rest);
    out
}

/// The value of an unsigned constant expression of names, numbers and `* / % +`, with the usual precedence, left to
/// right.
fn evaluate(text: &str, consts: &BTreeMap<String, u64>) -> Option<u64> {
    let atom = |text: &str| -> Option<u64> {
        let text = text.trim();
        text.strip_suffix('u').unwrap_or(text).parse().ok().or_else(|| consts.get(text).copied())
    };
    let product = |text: &str| -> Option<u64> {
        let mut value: Option<u64> = None;
        let mut operator = '*';
        let mut start = 0;
        for (at, c) in text.char_indices().chain([(text.len(), '*')]) {
            if !matches!(c, '*' | '/' | '%') {
                continue;
            }
            let next = atom(&text[start..at])?;
            value = match (value, operator) {
                (None, _) => Some(next),
                (Some(v), '*') => v.checked_mul(next),
                (Some(v), '/') => v.checked_div(next),
                (Some(v), _) => v.checked_rem(next),
            };
            value?;
            operator = c;
            start = at + 1;
        }
        value
    };
    text.split('+').try_fold(0u64, |sum, term| sum.checked_add(product(term)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "const N: u32 = 2u;
const M: u32 = N * 2u;
alias Elem = f32;
// @block body
fn body() {}
// @end
fn main() {
    // @unroll
    for (var i = 0u; i < M; i++) {
        x[i] = sum.i + xi; // i
    }
}
";

    #[test]
    fn every_mark_is_acted_on() {
        let changes = Changes::default().number("N", 1).alias("Elem", "vec4<f32>").line("body", "fn other() {}");
        let text = specialise("f", FILE, &changes).unwrap();
        assert!(text.contains("const N: u32 = 1u;"));
        assert!(text.contains("alias Elem = vec4<f32>;"));
        assert!(text.contains("fn other() {}") && !text.contains("fn body"));
        assert!(text.contains("x[0u] = sum.i + xi;") && text.contains("x[1u] = sum.i + xi;"));
        assert!(!text.contains("x[2u]") && !text.contains("for"));
    }

    #[test]
    fn unknown_names_and_broken_marks_are_errors() {
        for changes in [
            Changes::default().number("K", 1),
            Changes::default().alias("Other", "f32"),
            Changes::default().line("nobody", ""),
            Changes::default().block("body", Body::Or("nobody")),
        ] {
            assert!(specialise("f", FILE, &changes).is_err());
        }
        for source in [
            "// @end\n",
            "// @block a\n",
            "// @unroll\nlet x = 1;\n",
            "// @unroll\nfor (var i = 0u; i < Q; i++) {\n}\n",
        ] {
            assert!(specialise("f", source, &Changes::default()).is_err(), "{source}");
        }
    }

    #[test]
    fn constant_expressions() {
        let consts = BTreeMap::from([("A".to_string(), 6u64)]);
        for (text, value) in
            [("A * 2u", Some(12)), ("A / 4u + 1u", Some(2)), ("A % 4u", Some(2)), ("B", None), ("A / 0u", None)]
        {
            assert_eq!(evaluate(text, &consts), value, "{text}");
        }
    }
}
