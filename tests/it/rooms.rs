//! The rooms of the library: every import points down, and `CONTRIBUTING.md` says the same as the table here.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Rooms from the bottom up, one floor per line: a room may use all rooms on lower floors, but none on its own or
/// above.
const FLOORS: &[&[&str]] = &[
    &["error"],
    &["problem"],
    &["memory", "wait"],
    &["kernels", "reference", "state_dict"],
    &["gpu", "cpu"],
    &["device"],
    &["tensor"],
    &["call"],
    &["lower"],
    &["position"],
    &["attention", "ops"],
    &["backward", "cache", "inspect", "packed", "tune"],
    &["multi_head"],
];

/// A path that begins with the crate or leaves its module, and the module that contains it.
#[derive(Debug)]
struct Import {
    module: Vec<String>,
    path: Vec<String>,
}

/// The tokens of Rust source, without comments, strings and characters.
fn tokens(text: &str) -> Vec<String> {
    let mut tokens = Vec::new();
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let taken = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |end| end + 2)
        } else if c == 'r' && (rest.starts_with("r\"") || rest.starts_with("r#\"")) {
            let marks = rest[1..].len() - rest[1..].trim_start_matches('#').len();
            let end = format!("\"{}", "#".repeat(marks));
            2 + marks + rest[2 + marks..].find(&end).expect("raw texts end") + end.len()
        } else if c == '"' {
            let mut escaped = false;
            let end = rest[1..].char_indices().find(|&(_, c)| {
                let ends = c == '"' && !escaped;
                escaped = c == '\\' && !escaped;
                ends
            });
            end.expect("texts end").0 + 2
        } else if let Some(character) = rest.strip_prefix('\'') {
            // A lifetime has no closing quote after its first character.
            let escape = usize::from(character.starts_with('\\'));
            let first = character.chars().nth(escape).expect("something is quoted");
            let len = escape + first.len_utf8();
            match character[len..].find('\'') {
                Some(0) => len + 2,
                Some(more) if escape == 1 => len + more + 2,
                _ => 1,
            }
        } else if c.is_alphanumeric() || c == '_' {
            let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
            tokens.push(rest[..end].to_string());
            end
        } else {
            if rest.starts_with("::") {
                tokens.push("::".into());
            } else if !c.is_whitespace() {
                tokens.push(c.into());
            }
            if rest.starts_with("::") { 2 } else { c.len_utf8() }
        };
        rest = &rest[taken..];
    }
    tokens
}

/// The paths after `crate` and `super` in a source text, with braced lists expanded; `module` is the text's own module.
fn imports(module: &[String], text: &str) -> Vec<Import> {
    let tokens = tokens(text);
    let mut inside = vec![module.to_vec()];
    let mut imports = Vec::new();
    for (at, token) in tokens.iter().enumerate() {
        match token.as_str() {
            "{" => {
                let mut here = inside.last().expect("braces are balanced").clone();
                if at >= 2 && tokens[at - 2] == "mod" {
                    here.push(tokens[at - 1].clone());
                }
                inside.push(here);
            }
            "}" => drop(inside.pop()),
            "crate" | "super" if at > 0 && tokens[at - 1] == "::" => {}
            "crate" | "super" if tokens.get(at + 1).is_some_and(|next| next == "::") => {
                let here = inside.last().expect("braces are balanced");
                for path in paths(&tokens[at..]) {
                    imports.push(Import { module: here.clone(), path });
                }
            }
            _ => {}
        }
    }
    imports
}

/// The paths at the start of a text: a single path, or those of a final braced list, each down to its first branch.
fn paths(tokens: &[String]) -> Vec<Vec<String>> {
    let mut path = Vec::new();
    let mut at = 0;
    while tokens[at] != "{" {
        path.push(tokens[at].clone());
        if tokens.get(at + 1).is_none_or(|next| next != "::") {
            return vec![path];
        }
        at += 2;
    }
    let (mut depth, mut all, mut begins) = (0, Vec::new(), true);
    for token in &tokens[at..] {
        match token.as_str() {
            "{" => depth += 1,
            "}" if depth == 1 => break,
            "}" => depth -= 1,
            "," if depth == 1 => {
                begins = true;
                continue;
            }
            word if depth == 1 && begins => all.push([path.clone(), vec![word.into()]].concat()),
            _ => {}
        }
        begins = depth == 1 && token == "{";
    }
    all
}

/// The origin of the names that `lib.rs` re-exports.
fn exported(lib: &str) -> BTreeMap<String, String> {
    let tokens = tokens(lib);
    let mut rooms = BTreeMap::new();
    for (at, token) in tokens.iter().enumerate() {
        if token == "use" && tokens[at - 1] == "pub" && tokens[at + 2] == "::" {
            let end = tokens[at..].iter().position(|token| token == ";").expect("statements end");
            let names = tokens[at + 3..at + end].iter();
            rooms.extend(names.map(|name| (name.clone(), tokens[at + 1].clone())));
        }
    }
    rooms
}

/// The room that an import leads to: the first module under the crate.
fn leads_to(import: &Import, exported: &BTreeMap<String, String>) -> Option<String> {
    let mut from: Vec<String> = match import.path[0].as_str() {
        "crate" => Vec::new(),
        _ => import.module.clone(),
    };
    let mut rest = &import.path[..];
    while let Some((word, more)) = rest.split_first() {
        match word.as_str() {
            "crate" => {}
            "super" => _ = from.pop(),
            _ => break,
        }
        rest = more;
    }
    let word = from.first().or(rest.first())?;
    Some(exported.get(word).unwrap_or(word).clone())
}

fn floor(room: &str) -> Option<usize> {
    FLOORS.iter().position(|rooms| rooms.contains(&room))
}

/// What is wrong with the imports of a room's text.
fn faults(module: &[String], text: &str, exported: &BTreeMap<String, String>) -> Vec<String> {
    let room = module[0].as_str();
    let here = floor(room).unwrap_or_else(|| panic!("the room {room} is in no line of the table"));
    let mut faults = Vec::new();
    for import in imports(module, text) {
        let path = import.path.join("::");
        let Some(there) = leads_to(&import, exported) else {
            faults.push(format!("{room}: {path} leads to no room"));
            continue;
        };
        if there != room && floor(&there).is_none_or(|floor| floor >= here) {
            faults.push(format!("{}: {path} leads to {there}, which is not below", module.join("::")));
        }
    }
    faults
}

fn sources(folder: &Path, into: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, into);
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            into.push(path);
        }
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

fn exports() -> BTreeMap<String, String> {
    exported(&std::fs::read_to_string(root().join("lib.rs")).unwrap())
}

#[test]
fn imports_point_down() {
    let exported = exports();
    let mut files = Vec::new();
    sources(&root(), &mut files);
    files.sort();
    let mut wrong = Vec::new();
    let mut met = 0;
    for file in files.iter().filter(|file| **file != root().join("lib.rs")) {
        let text = std::fs::read_to_string(file).unwrap();
        let inner = file.strip_prefix(root()).unwrap().with_extension("");
        let mut module: Vec<String> = inner.iter().map(|part| part.to_str().unwrap().into()).collect();
        if module.last().is_some_and(|name| name == "mod") {
            module.pop();
        }
        met += imports(&module, &text).len();
        wrong.extend(faults(&module, &text, &exported));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // Check that the reader finds imports.
    assert!(files.len() > 50 && met > 300, "{met} imports in {} files", files.len());
}

#[test]
fn an_import_that_points_up_is_caught() {
    let exported = exports();
    let fails = |module: &[&str], text: &str| {
        let module: Vec<String> = module.iter().map(|&part| part.into()).collect();
        !faults(&module, text, &exported).is_empty()
    };
    for (module, text) in [
        (&["gpu", "run"][..], "use crate::tensor::Tensor;"),
        (&["gpu", "run"], "use crate::Tensor;"),
        (&["gpu", "run"], "use crate::{GpuOptions, Tensor};"),
        (&["gpu", "run"], "use crate::{kernels::{Plan, Slot}, call};"),
        (&["gpu", "run"], "fn f() { let x = crate::call::Operands::new(); }"),
        (&["gpu", "run"], "#[cfg(test)]\nmod tests { use super::super::super::lower::Recording; }"),
        (&["gpu"], "use crate::cpu::View;"),
        (&["tensor"], "use super::lower::Recording;"),
        (&["tensor"], "use super::{device::Device, lower};"),
        (&["cache", "rules"], "use crate::inspect::Inspect;"),
        (&["problem"], "const C: char = '\"'; use crate::kernels::Plan; const D: char = '\"';"),
        (&["problem"], "use crate::no_such_room::Plan;"),
        (&["error"], "method: crate::Method,"),
    ] {
        assert!(fails(module, text), "{module:?} {text}");
    }
    for (module, text) in [
        (&["gpu", "run"][..], "use super::{Gpu, lock}; use crate::kernels::{Plan, plan::{self, Slot}};"),
        (&["gpu", "run"], "mod tests { use super::*; use super::super::Gpu; } use crate::{GpuOptions, kernels};"),
        (
            &["tensor"],
            "// crate::lower is above\nconst TEXT: &str = \"crate::lower \\\" crate::call\"; use crate::Gpu;",
        ),
        (&["tensor"], "/// [`Attention`](crate::Attention)\npub(crate) fn f<'a>(x: &'a crate::Device) {}"),
    ] {
        assert!(!fails(module, text), "{module:?} {text}");
    }
}

#[test]
fn the_table_in_contributing_matches() {
    let text = std::fs::read_to_string(root().with_file_name("CONTRIBUTING.md")).unwrap();
    let section = text.split("## Module layers").nth(1).unwrap().split("\n## ").next().unwrap();
    let rows = section.lines().filter(|line| line.starts_with("| `src/"));
    // The table is top-down in CONTRIBUTING.md and bottom-up here.
    let mut floors: Vec<Vec<String>> = rows
        .map(|row| {
            let rooms = row.split('|').nth(1).unwrap().split('`').skip(1).step_by(2);
            let name =
                |path: &str| path.trim_start_matches("src/").trim_end_matches(".rs").trim_end_matches('/').into();
            rooms.map(name).collect()
        })
        .collect();
    floors.reverse();
    assert_eq!(floors.len(), FLOORS.len());
    for (named, floor) in floors.iter_mut().zip(FLOORS) {
        named.sort();
        let mut floor = floor.to_vec();
        floor.sort();
        assert_eq!(*named, floor);
    }
}
