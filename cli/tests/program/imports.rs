//! The modules of the program have no circular imports.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// A module as its path: `[]` is `main.rs`, `[check, report, html]` is `check/report/html.rs`.
type Module = Vec<String>;

/// The modules in `folder`, with their source text.
fn sources(folder: &Path, module: &Module, all: &mut BTreeMap<Module, String>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap().to_string();
        let inner = [module.as_slice(), std::slice::from_ref(&name)].concat();
        if path.is_dir() {
            sources(&path, &inner, all);
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            let is_own = ["main", "mod"].contains(&name.as_str());
            all.insert(if is_own { module.clone() } else { inner }, std::fs::read_to_string(&path).unwrap());
        }
    }
}

/// A source text without comments and without its unit tests, which come last and may import anything.
fn code(text: &str) -> String {
    let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    text.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

/// Every path of `code` that begins with one of `starts`, with its lists (`a::{b, c::d}`) written out.
fn paths(code: &str, starts: &[&str]) -> Vec<Vec<String>> {
    let is_name = |c: char| c.is_alphanumeric() || c == '_';
    let mut all = Vec::new();
    for (at, _) in code.char_indices() {
        // A name begins here that is not a later part of another path.
        let before = &code[..at];
        if before.ends_with(is_name) || before.ends_with("::") || !code[at..].starts_with(is_name) {
            continue;
        }
        let name = code[at..].split(|c| !is_name(c)).next().unwrap_or_default();
        if starts.contains(&name) && code[at + name.len()..].starts_with("::") {
            tree(&code[at..], &mut Vec::new(), &mut all);
        }
    }
    all
}

/// Reads a path, or a tree of paths, after `lead`; returns the rest of the text.
fn tree<'a>(text: &'a str, lead: &mut Vec<String>, all: &mut Vec<Vec<String>>) -> &'a str {
    let text = text.trim_start();
    if let Some(mut rest) = text.strip_prefix('{') {
        while !rest.trim_start().is_empty() && !rest.trim_start().starts_with('}') {
            let left = tree(rest, &mut lead.clone(), all).trim_start();
            let left = left.strip_prefix(',').unwrap_or(left);
            // Stop if this is not a list of paths.
            if left.len() == rest.len() {
                return "";
            }
            rest = left;
        }
        return rest.trim_start().strip_prefix('}').unwrap_or_default();
    }
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
    let (name, rest) = text.split_at(end);
    if name != "self" || lead.is_empty() {
        lead.push(name.to_string());
    }
    if let Some(rest) = rest.strip_prefix("::") {
        return tree(rest, lead, all);
    }
    all.push(lead.clone());
    // `a as b`
    rest.trim_start().strip_prefix("as ").map_or(rest, |rest| rest.trim_start_matches(|c: char| c != ',' && c != '}'))
}

/// The modules that a module uses.
fn used(module: &Module, text: &str, all: &BTreeMap<Module, String>) -> BTreeSet<Module> {
    let children: Vec<&str> = (all.keys())
        .filter(|other| other.len() == module.len() + 1 && other.starts_with(module))
        .filter_map(|other| other.last().map(String::as_str))
        .collect();
    let mut used = BTreeSet::new();
    for path in paths(&code(text), &[&["crate", "super", "self"][..], &children].concat()) {
        let mut full = if path[0] == "crate" { Vec::new() } else { module.clone() };
        for name in path {
            match name.as_str() {
                "crate" | "self" => {}
                "super" => _ = full.pop(),
                _ => full.push(name),
            }
        }
        // The module is followed by names of its items.
        while !all.contains_key(&full) && full.pop().is_some() {}
        used.insert(full);
    }
    used.remove(module);
    used
}

/// The modules of a circular import, if there is one: files, and folders as a whole.
fn circle(all: &BTreeMap<Module, String>) -> Option<String> {
    // For each folder, which of its files and folders use which; the folder's own file has no name.
    let mut levels: BTreeMap<Module, BTreeMap<String, BTreeSet<String>>> = BTreeMap::new();
    for (from, text) in all {
        for to in used(from, text, all) {
            let common = from.iter().zip(&to).take_while(|(a, b)| a == b).count();
            let part = |module: &Module| module.get(common).cloned().unwrap_or_default();
            levels.entry(from[..common].to_vec()).or_default().entry(part(from)).or_default().insert(part(&to));
        }
    }
    levels.iter().find_map(|(folder, uses)| {
        let found = uses.keys().find_map(|start| way_back(start, uses))?;
        let names = found.iter().map(|name| if name.is_empty() { "(its own file)" } else { name });
        Some(format!("in /{}: {}", folder.join("/"), names.collect::<Vec<_>>().join(" uses ")))
    })
}

/// A path from `start` back to itself, if there is one.
fn way_back(start: &str, uses: &BTreeMap<String, BTreeSet<String>>) -> Option<Vec<String>> {
    let (mut open, mut seen) = (vec![vec![start.to_string()]], BTreeSet::new());
    while let Some(way) = open.pop() {
        for next in uses.get(way.last()?).into_iter().flatten() {
            let longer = [way.as_slice(), std::slice::from_ref(next)].concat();
            if next == start {
                return Some(longer);
            }
            if seen.insert(next) {
                open.push(longer);
            }
        }
    }
    None
}

#[test]
fn no_modules_use_each_other_in_a_circle() {
    let mut all = BTreeMap::new();
    sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &Vec::new(), &mut all);
    assert!(all.len() > 50, "{:?}", all.keys());
    // The reader works: main.rs uses its modules, and a list of paths is read to its end.
    let of = |module: &[&str]| {
        let module: Module = module.iter().map(|name| name.to_string()).collect();
        used(&module, &all[&module], &all).iter().map(|used| used.join("/")).collect::<Vec<_>>()
    };
    assert!(of(&[]).contains(&"check".into()) && of(&[]).contains(&"error".into()), "{:?}", of(&[]));
    assert_eq!(of(&["plot", "page"]), ["error", "files", "font", "plot/seen"]);
    assert_eq!(circle(&all), None);
}

#[test]
fn a_circle_is_found() {
    let circle = |files: &[(&str, &str)]| {
        let module = |path: &str| path.split('/').filter(|name| !name.is_empty()).map(str::to_string).collect();
        circle(&files.iter().map(|(path, text)| (module(path), text.to_string())).collect())
    };
    let two = circle(&[("", "mod a; mod b;"), ("a", "use crate::b::B;"), ("b", "fn f() -> crate::a::A {}")]);
    assert_eq!(two.unwrap(), "in /: a uses b uses a");
    let three =
        [("d/a", "use super::{x::Y as Z, b};"), ("d/b", "use crate::d::c::{self, C};"), ("d/c", "super::a::f()")];
    assert_eq!(circle(&three).unwrap(), "in /d: a uses b uses c uses a");
    // From outside, a folder counts as one module, however its files are organised.
    let folders = [("d/a", "use crate::e::b::B;"), ("d/b", ""), ("e/a", "use crate::d::b::B;"), ("e/b", "")];
    assert_eq!(circle(&folders).unwrap(), "in /: d uses e uses d");
    let own = [("d", "mod a;\npub use a::{A};"), ("d/a", "use super::Of;")];
    assert_eq!(circle(&own).unwrap(), "in /d: (its own file) uses a uses (its own file)");
    // One direction only; mentions in comments and in unit tests do not count.
    let down = [
        ("", "mod a;\nfn main() { a::a() }"),
        ("a", "use crate::b::{C, D};\nuse self::inner;"),
        ("b", "// as crate::a\n#[cfg(test)]\nmod tests {\n    use crate::a;\n}"),
    ];
    assert_eq!(circle(&down), None);
}
