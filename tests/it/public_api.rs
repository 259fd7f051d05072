//! The public interface against its listing, so that a change of it is seen in review. rustdoc writes the interface as
//! JSON, which only nightly compilers may do without RUSTC_BOOTSTRAP, and whose format may change: what is not known
//! here is an error.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use serde_json::Value;

const LISTING: &str = "docs/public-api.txt";
const UPDATE: &str = "UPDATE_PUBLIC_API";

#[test]
fn the_public_interface_is_as_listed() {
    let listing = Api::new(rustdoc()).listing();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(LISTING);
    if std::env::var_os(UPDATE).is_some() {
        std::fs::write(path, listing).unwrap();
        return;
    }
    let listed = std::fs::read_to_string(path).unwrap_or_default();
    let (before, now) = (with_headings(&listed), with_headings(&listing));
    let lines = |of: &BTreeSet<String>, other: &BTreeSet<String>, sign: char| -> Vec<String> {
        of.difference(other).map(|line| format!("{sign} {line}")).collect()
    };
    let changes = [lines(&before, &now, '-'), lines(&now, &before, '+')].concat();
    assert!(
        listed == listing,
        "the public interface is not what {LISTING} lists:\n{}\n{UPDATE}=1 cargo test --test it public_api renews it",
        changes.join("\n")
    );
}

/// The lines, each behind the line that it is indented under.
fn with_headings(listing: &str) -> BTreeSet<String> {
    let mut heading = "";
    let mut all = BTreeSet::new();
    for line in listing.lines() {
        match line.strip_prefix("    ") {
            Some(member) => all.insert(format!("{heading}: {member}")),
            None => {
                heading = line;
                all.insert(line.to_string())
            }
        };
    }
    all
}

/// What rustdoc writes of the library with all features.
fn rustdoc() -> Value {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
    cargo.current_dir(env!("CARGO_MANIFEST_DIR"));
    cargo.args(["rustdoc", "--quiet", "--package", "wgpu-attention", "--lib", "--all-features", "--target-dir"]);
    // For rustdoc alone, and not for build scripts: they compile what they build anew, with what nightly has.
    #[cfg(unix)]
    let target = {
        use std::os::unix::fs::PermissionsExt;
        let script = folder.join("rustdoc-json");
        std::fs::write(&script, "#!/bin/sh\nRUSTC_BOOTSTRAP=1 exec \"${WRAPPED_RUSTDOC:-rustdoc}\" \"$@\"\n").unwrap();
        std::fs::set_permissions(&script, PermissionsExt::from_mode(0o755)).unwrap();
        if let Some(own) = std::env::var_os("RUSTDOC") {
            cargo.env("WRAPPED_RUSTDOC", own);
        }
        cargo.env("RUSTDOC", script);
        folder.parent().expect("the target folder").to_path_buf()
    };
    #[cfg(not(unix))]
    let target = {
        cargo.env("RUSTC_BOOTSTRAP", "1");
        folder.join("public-api")
    };
    cargo.arg(&target).args(["--", "-Z", "unstable-options", "--output-format", "json"]);
    // What is public may lie in a module that is hidden.
    cargo.arg("--document-hidden-items");
    let done = cargo.output().expect("cargo starts");
    assert!(done.status.success(), "rustdoc gave no JSON:\n{}", String::from_utf8_lossy(&done.stderr));
    let json = std::fs::read(target.join("doc/wgpu_attention.json")).expect("rustdoc's JSON");
    serde_json::from_slice(&json).expect("JSON")
}

struct Api {
    json: Value,
    /// The shortest public path of an item, by its id.
    names: BTreeMap<u64, String>,
    /// Its other public paths, and what is there.
    others: BTreeMap<String, u64>,
}

/// The only member of an object: what an item or a type is.
fn only(value: &Value) -> (&str, &Value) {
    match value {
        Value::String(name) => (name, &Value::Null),
        Value::Object(members) if members.len() == 1 => {
            members.iter().next().map(|(name, value)| (name.as_str(), value)).expect("one")
        }
        _ => panic!("{value} is not one thing"),
    }
}

fn array(value: &Value) -> &[Value] {
    value.as_array().unwrap_or_else(|| panic!("{value} is no list"))
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("{value} is no text"))
}

fn id(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no id"))
}

fn flag(value: &Value) -> bool {
    value.as_bool().unwrap_or_else(|| panic!("{value} is neither true nor false"))
}

/// `a, b` of texts, in `around`, or nothing where there are none.
fn list(texts: impl IntoIterator<Item = String>, around: [&str; 2]) -> String {
    let texts: Vec<String> = texts.into_iter().collect();
    if texts.is_empty() { String::new() } else { format!("{}{}{}", around[0], texts.join(", "), around[1]) }
}

fn reexport(name: &str, path: &str) -> String {
    if name == path { format!("use {name}") } else { format!("use {name} as {path}") }
}

impl Api {
    fn new(json: Value) -> Api {
        let mut api = Api { names: BTreeMap::new(), others: BTreeMap::new(), json };
        let mut paths = BTreeMap::new();
        api.paths(api.json["root"].as_u64().expect("a root"), "", &mut paths);
        for (path, id) in paths {
            let length = |path: &str| path.split("::").count();
            let other = match api.names.get(&id) {
                Some(name) if length(name) <= length(&path) => Some(path),
                _ => api.names.insert(id, path),
            };
            api.others.extend(other.map(|path| (path, id)));
        }
        api
    }

    fn item(&self, id: u64) -> &Value {
        self.json["index"].get(id.to_string()).unwrap_or_else(|| panic!("there is no item {id}"))
    }

    fn inner(&self, id: u64) -> (&str, &Value) {
        only(&self.item(id)["inner"])
    }

    fn is_ours(&self, id: u64) -> bool {
        self.json["index"].get(id.to_string()).is_some_and(|item| item["crate_id"] == 0)
    }

    fn is_hidden(&self, id: u64) -> bool {
        let attributes = array(&self.item(id)["attrs"]).iter();
        attributes.map(Value::to_string).any(|text| text.to_lowercase().contains("doc") && text.contains("hidden"))
    }

    /// Of a list of ids, those that are not hidden.
    fn shown(&self, ids: &Value) -> impl Iterator<Item = u64> {
        array(ids).iter().map(id).filter(|&id| !self.is_hidden(id))
    }

    /// Everything below a module, by path.
    fn paths(&self, module: u64, path: &str, into: &mut BTreeMap<String, u64>) {
        for member in self.shown(&self.inner(module).1["items"]) {
            let (kind, inner) = self.inner(member);
            let name = |of: &Value| if path.is_empty() { text(of).into() } else { format!("{path}::{}", text(of)) };
            match kind {
                "use" => {
                    assert!(!flag(&inner["is_glob"]), "{inner}: a list of everything is not read");
                    let mut target = inner["id"].as_u64();
                    while let Some(id) = target.filter(|id| self.json["index"].get(id.to_string()).is_some()) {
                        match self.inner(id) {
                            ("use", inner) => target = inner["id"].as_u64(),
                            _ => break,
                        }
                    }
                    into.insert(name(&inner["name"]), target.unwrap_or(member));
                }
                "module" => {
                    let name: String = name(&self.item(member)["name"]);
                    self.paths(member, &name, into);
                    into.insert(name, member);
                }
                "impl" => {}
                _ => _ = into.insert(name(&self.item(member)["name"]), member),
            }
        }
    }

    fn listing(&self) -> String {
        let mut lines: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (&id, path) in &self.names {
            lines.insert(path.clone(), self.lines(id, path));
        }
        for (path, id) in &self.others {
            lines.insert(path.clone(), vec![reexport(&self.names[id], path)]);
        }
        let mut all: Vec<String> = lines.into_values().flatten().collect();
        // Traits of other crates' types.
        let index = self.json["index"].as_object().expect("an index");
        let foreign = index.values().filter_map(|item| {
            let inner = item["inner"].get("impl").filter(|_| item["crate_id"] == 0)?;
            let of = &inner["for"];
            let is_foreign = of.get("resolved_path").is_none_or(|path| !self.is_ours(id(&path["id"])));
            is_foreign.then(|| Some(format!("impl {} for {}", self.implemented(inner)?, self.ty(of))))?
        });
        all.extend(foreign.collect::<BTreeSet<String>>());
        let head = "The public interface with all features, without hidden items. tests/it/public_api.rs writes this and \
                    compares it.\nOf the traits that the compiler implements by itself, Send and Sync are listed.\n\n";
        head.to_string() + &all.join("\n") + "\n"
    }

    /// The lines of an item: its own, and those of what it holds, indented.
    fn lines(&self, of: u64, path: &str) -> Vec<String> {
        let Some(item) = self.json["index"].get(of.to_string()) else {
            return vec![reexport(&self.foreign(of), path)];
        };
        let (kind, inner) = only(&item["inner"]);
        let generics = || self.generics(&inner["generics"]);
        let open = array(&item["attrs"]).iter().any(|attribute| attribute == "non_exhaustive");
        let open = if open { "#[non_exhaustive] " } else { "" };
        let mut lines = Vec::new();
        match kind {
            "module" => lines.push(format!("mod {path}")),
            "use" => lines.push(reexport(text(&inner["source"]), path)),
            "function" => lines.push(self.function(path, inner)),
            "constant" => {
                let value = inner["const"]["value"].as_str().map(|value| format!(" = {value}")).unwrap_or_default();
                lines.push(format!("const {path}: {}{value}", self.ty(&inner["type"])));
            }
            "type_alias" => {
                let [params, bounds] = generics();
                lines.push(format!("type {path}{params} = {}{bounds}", self.ty(&inner["type"])));
            }
            "struct" => {
                let [params, bounds] = generics();
                let (shape, fields) = self.fields(&inner["kind"]);
                lines.push(format!("{open}struct {path}{params}{bounds}{shape}"));
                lines.extend(fields.into_iter().map(|field| format!("    {field}")));
                lines.extend(self.impls(&inner["impls"]));
            }
            "enum" => {
                let [params, bounds] = generics();
                lines.push(format!("{open}enum {path}{params}{bounds}"));
                for variant in self.shown(&inner["variants"]) {
                    let (shape, fields) = self.fields(&self.inner(variant).1["kind"]);
                    let name = text(&self.item(variant)["name"]);
                    lines.push(format!("    {name}{shape}{}", list(fields, [" { ", " }"])));
                }
                lines.extend(self.impls(&inner["impls"]));
            }
            "trait" => {
                let [params, bounds] = generics();
                let above = list(array(&inner["bounds"]).iter().map(|bound| self.bound(bound)), [": ", ""]);
                let above = above.replace(", ", " + ");
                lines.push(format!("trait {path}{params}{above}{bounds}"));
                lines.extend(self.shown(&inner["items"]).map(|member| format!("    {}", self.member(member))));
            }
            _ => panic!("{path} is a {kind}, which is not listed yet"),
        }
        lines
    }

    /// What follows the name of a struct or a variant, and its named fields.
    fn fields(&self, kind: &Value) -> (String, Vec<String>) {
        let field = |of: &Value| self.ty(self.inner(id(of)).1);
        match only(kind) {
            ("unit" | "plain", Value::Null) => (String::new(), Vec::new()),
            ("tuple", fields) => {
                let fields = array(fields).iter().map(|of| if of.is_null() { "_".into() } else { field(of) });
                (list(fields, ["(", ")"]), Vec::new())
            }
            ("plain" | "struct", inner) => {
                let named = |of: &Value| format!("{}: {}", text(&self.item(id(of))["name"]), field(of));
                let fields = array(&inner["fields"]);
                let shown = fields.iter().filter(|of| !self.is_hidden(id(of)));
                let shown: Vec<String> = shown.map(named).collect();
                let is_open = flag(&inner["has_stripped_fields"]) || shown.len() < fields.len();
                (if is_open { " { .. }" } else { "" }.into(), shown)
            }
            (kind, _) => panic!("fields of a kind {kind} are not known"),
        }
    }

    /// The functions of a type, and the traits that it implements.
    fn impls(&self, impls: &Value) -> Vec<String> {
        let (mut members, mut traits) = (BTreeSet::new(), BTreeSet::new());
        for inner in self.shown(impls).map(|of| self.inner(of).1) {
            if !inner["trait"].is_null() {
                traits.extend(self.implemented(inner));
                continue;
            }
            let [params, bounds] = self.generics(&inner["generics"]);
            let of = match params.is_empty() {
                true => String::new(),
                false => format!("impl{params} {}{bounds}: ", self.ty(&inner["for"])),
            };
            members.extend(self.shown(&inner["items"]).map(|member| format!("    {of}{}", self.member(member))));
        }
        members.into_iter().chain(Some(list(traits, ["    impl ", ""])).filter(|line| !line.is_empty())).collect()
    }

    /// The trait of an `impl`, where it is one to list.
    fn implemented(&self, inner: &Value) -> Option<String> {
        let path = inner.get("trait").filter(|path| !path.is_null() && inner["blanket_impl"].is_null())?;
        let name = self.path(path);
        // A trait that is not listed, such as a sealing one.
        if self.is_ours(id(&path["id"])) && !self.names.contains_key(&id(&path["id"])) {
            return None;
        }
        if name == "StructuralPartialEq" || flag(&inner["is_synthetic"]) && !["Send", "Sync"].contains(&name.as_str()) {
            return None;
        }
        let [params, bounds] = self.generics(&inner["generics"]);
        // Lifetimes without bounds say nothing.
        let is_free = array(&inner["generics"]["params"]).iter().all(|param| only(&param["kind"]).0 == "lifetime");
        let not = if flag(&inner["is_negative"]) { "!" } else { "" };
        let kinds = array(&inner["items"]).iter().map(|of| (self.item(id(of)), self.inner(id(of))));
        let types = kinds.filter(|(_, (kind, _))| *kind == "assoc_type");
        let types = types.map(|(item, (_, inner))| format!("{} = {}", text(&item["name"]), self.ty(&inner["type"])));
        let params = list(Some(params).filter(|params| !(params.is_empty() || is_free)), ["for", " "]);
        Some(format!("{params}{not}{name}{}{bounds}", list(types, [" { ", " }"])))
    }

    /// What an `impl` or a trait holds.
    fn member(&self, of: u64) -> String {
        let (item, (kind, inner)) = (self.item(of), self.inner(of));
        let name = text(&item["name"]);
        match kind {
            "function" => {
                let given = item["visibility"] == "default" && flag(&inner["has_body"]);
                self.function(name, inner) + if given { " { .. }" } else { "" }
            }
            "assoc_const" => format!("const {name}: {}", self.ty(&inner["type"])),
            "assoc_type" => {
                let bounds = array(&inner["bounds"]).iter().map(|bound| self.bound(bound)).collect::<Vec<_>>();
                format!("type {name}{}", list(Some(bounds.join(" + ")).filter(|bounds| !bounds.is_empty()), [": ", ""]))
            }
            _ => panic!("{name} is a {kind}, which is not listed yet"),
        }
    }

    fn function(&self, name: &str, inner: &Value) -> String {
        let [params, bounds] = self.generics(&inner["generics"]);
        let header = self.header(&inner["header"]);
        format!("{header}fn {name}{params}{}{bounds}", self.signature(&inner["sig"], true))
    }

    fn header(&self, header: &Value) -> String {
        let words = ["const", "unsafe", "async"].iter().filter(|word| flag(&header[format!("is_{word}")]));
        let mut text: String = words.map(|word| format!("{word} ")).collect();
        if header["abi"] != "Rust" {
            text += &format!("extern {} ", header["abi"]);
        }
        text
    }

    fn signature(&self, signature: &Value, is_named: bool) -> String {
        let inputs = array(&signature["inputs"]).iter().map(|input| {
            let (name, of) = (text(&input[0]), self.ty(&input[1]));
            match (name, of.as_str()) {
                ("self", "Self") => "self".into(),
                ("self", of) if of.starts_with('&') && of.ends_with("Self") => of.replace("Self", "self"),
                _ if is_named => format!("{name}: {of}"),
                _ => of,
            }
        });
        let inputs = inputs.collect::<Vec<String>>().join(", ");
        let output = &signature["output"];
        let output = if output.is_null() { String::new() } else { format!(" -> {}", self.ty(output)) };
        format!("({inputs}){output}")
    }

    /// Parameters in angle brackets, and the bounds that stand apart.
    fn generics(&self, generics: &Value) -> [String; 2] {
        let bounds = |of: &Value| array(of).iter().map(|bound| self.bound(bound)).collect::<Vec<_>>().join(" + ");
        let params = self.params(&generics["params"]);
        let apart = array(&generics["where_predicates"]).iter().map(|predicate| match only(predicate) {
            ("bound_predicate", inner) => {
                let higher =
                    list(Some(self.params(&inner["generic_params"])).filter(|text| !text.is_empty()), ["for", " "]);
                format!("{higher}{}: {}", self.ty(&inner["type"]), bounds(&inner["bounds"]))
            }
            (kind, _) => panic!("a {kind} is not known"),
        });
        [params, list(apart, [" where ", ""])]
    }

    fn params(&self, params: &Value) -> String {
        let params = array(params).iter().filter_map(|param| {
            let name = text(&param["name"]);
            match only(&param["kind"]) {
                ("lifetime", inner) => {
                    let outlives = array(&inner["outlives"]).iter().map(text).collect::<Vec<_>>().join(" + ");
                    Some(if outlives.is_empty() { name.to_string() } else { format!("{name}: {outlives}") })
                }
                ("type", inner) if flag(&inner["is_synthetic"]) => None,
                ("type", inner) => {
                    let bounds = array(&inner["bounds"]).iter().map(|bound| self.bound(bound)).collect::<Vec<_>>();
                    let bounds = list(Some(bounds.join(" + ")).filter(|bounds| !bounds.is_empty()), [": ", ""]);
                    let default = Some(&inner["default"]).filter(|default| !default.is_null());
                    Some(format!("{name}{bounds}{}", list(default.map(|of| self.ty(of)), [" = ", ""])))
                }
                ("const", inner) => Some(format!("const {name}: {}", self.ty(&inner["type"]))),
                (kind, _) => panic!("a parameter {kind} is not known"),
            }
        });
        list(params, ["<", ">"])
    }

    fn bound(&self, bound: &Value) -> String {
        match only(bound) {
            ("outlives", lifetime) => text(lifetime).into(),
            ("trait_bound", inner) => {
                let modifier = match text(&inner["modifier"]) {
                    "none" => "",
                    "maybe" => "?",
                    other => panic!("a bound {other} is not known"),
                };
                let higher =
                    list(Some(self.params(&inner["generic_params"])).filter(|text| !text.is_empty()), ["for", " "]);
                format!("{modifier}{higher}{}", self.path(&inner["trait"]))
            }
            (kind, _) => panic!("a bound {kind} is not known"),
        }
    }

    fn ty(&self, of: &Value) -> String {
        let lifetime = |of: &Value| of.as_str().map(|name| format!("{name} ")).unwrap_or_default();
        let types = |of: &Value| array(of).iter().map(|of| self.ty(of)).collect::<Vec<_>>().join(", ");
        match only(of) {
            ("resolved_path", inner) => self.path(inner),
            ("generic", inner) => text(inner).into(),
            ("primitive", inner) if inner == "never" => "!".into(),
            ("primitive", inner) => text(inner).into(),
            ("tuple", inner) if array(inner).len() == 1 => format!("({},)", types(inner)),
            ("tuple", inner) => format!("({})", types(inner)),
            ("slice", inner) => format!("[{}]", self.ty(inner)),
            ("array", inner) => format!("[{}; {}]", self.ty(&inner["type"]), text(&inner["len"])),
            ("borrowed_ref", inner) => {
                let is_mutable = if flag(&inner["is_mutable"]) { "mut " } else { "" };
                format!("&{}{is_mutable}{}", lifetime(&inner["lifetime"]), self.ty(&inner["type"]))
            }
            ("impl_trait", inner) => {
                let bounds: Vec<_> = array(inner).iter().map(|bound| self.bound(bound)).collect();
                format!("impl {}", bounds.join(" + "))
            }
            ("dyn_trait", inner) => {
                let traits = array(&inner["traits"]).iter().map(|of| self.path(&of["trait"]));
                let all: Vec<_> = traits.chain(inner["lifetime"].as_str().map(str::to_string)).collect();
                format!("dyn {}", all.join(" + "))
            }
            ("function_pointer", inner) => {
                format!("{}fn{}", self.header(&inner["header"]), self.signature(&inner["sig"], false))
            }
            ("qualified_path", inner) => match inner["trait"]["path"].as_str() {
                None | Some("") => format!("{}::{}", self.ty(&inner["self_type"]), text(&inner["name"])),
                Some(_) => {
                    let of = self.ty(&inner["self_type"]);
                    format!("<{of} as {}>::{}", self.path(&inner["trait"]), text(&inner["name"]))
                }
            },
            (kind, _) => panic!("a type {kind} is not known"),
        }
    }

    /// A type or a trait by its public name, with its arguments.
    fn path(&self, path: &Value) -> String {
        let of = id(&path["id"]);
        let name = self.names.get(&of).cloned().unwrap_or_else(|| self.foreign(of));
        let Some((kind, inner)) = path.get("args").filter(|args| !args.is_null()).map(only) else { return name };
        if kind == "parenthesized" {
            let inputs = array(&inner["inputs"]).iter().map(|of| self.ty(of)).collect::<Vec<_>>().join(", ");
            let output = Some(&inner["output"]).filter(|output| !output.is_null());
            return format!("{name}({inputs}){}", list(output.map(|of| self.ty(of)), [" -> ", ""]));
        }
        assert_eq!(kind, "angle_bracketed", "arguments in another form");
        let arguments = array(&inner["args"]).iter().map(|argument| match only(argument) {
            ("type", inner) => self.ty(inner),
            ("lifetime", inner) => text(inner).into(),
            ("const", inner) => text(&inner["expr"]).into(),
            (kind, _) => panic!("an argument {kind} is not known"),
        });
        let constraints = array(&inner["constraints"]).iter().map(|constraint| match only(&constraint["binding"]) {
            ("equality", inner) => format!("{} = {}", text(&constraint["name"]), self.ty(&inner["type"])),
            (kind, _) => panic!("a constraint {kind} is not known"),
        });
        format!("{name}{}", list(arguments.chain(constraints), ["<", ">"]))
    }

    /// What is not listed: what is hidden here by its path, another crate's by the crate and its own name, the standard library's by its name.
    fn foreign(&self, of: u64) -> String {
        let path = array(&self.json["paths"][of.to_string()]["path"]);
        let (first, last) = (text(&path[0]), text(&path[path.len() - 1]));
        match first {
            "std" | "core" | "alloc" if self.names.values().any(|name| name == last) => format!("std::{last}"),
            "std" | "core" | "alloc" => last.into(),
            "wgpu_attention" => path[1..].iter().map(text).collect::<Vec<_>>().join("::"),
            _ if path.len() == 1 => first.into(),
            _ => format!("{first}::{last}"),
        }
    }
}
