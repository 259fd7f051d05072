//! A folder of cases, which runs in place of the built-in suite.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use wgpu_attention::{Device, Method};

use super::variant::parse_id;
use crate::check::case::{Case, parse_json};
use crate::error::{Error, Result, fail, usage};
use crate::files;

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Folder {
    pub dir: PathBuf,
    /// The methods for the cases, as `--method` names them.
    pub methods: Vec<String>,
}

/// A case of a folder.
#[derive(Clone, Debug)]
pub struct CaseFile {
    /// The file name without its extension.
    pub name: String,
    pub path: PathBuf,
    /// The op as the case names it, and the storage type of its operands; known even if the case crashes the process.
    pub op: String,
    pub storage: String,
}

impl Folder {
    /// The names of its cases.
    pub fn names(&self, filter: Option<&str>) -> Result<Vec<String>> {
        if !self.dir.is_dir() {
            fail!("{} is not a folder of cases", self.dir.display());
        }
        let index = self.dir.join("index.json");
        let mut names: Vec<String> = if index.exists() {
            let bad = |what: &str| Error::Failed(format!("{} is not a valid list of cases: {what}", index.display()));
            let text = String::from_utf8(files::read_bytes(&index)?).map_err(|error| bad(&error.to_string()))?;
            let list = parse_json(&text).map_err(|error| bad(&error.to_string()))?;
            let list = list.as_array().ok_or_else(|| bad("it must be an array of objects with a \"name\""))?;
            list.iter()
                .map(|entry| {
                    let name =
                        entry.get("name").unwrap_or(entry).as_str().ok_or_else(|| bad("an entry has no \"name\""))?;
                    // A name must be a file of this folder; it must not lead out of it.
                    match Path::new(name).file_name().and_then(|file| file.to_str()) == Some(name) {
                        true => Ok(name.to_string()),
                        false => Err(bad(&format!("{name:?} is not a file name"))),
                    }
                })
                .collect::<Result<_>>()?
        } else {
            let entries = std::fs::read_dir(&self.dir)
                .map_err(|error| Error::Failed(format!("cannot read {}: {error}", self.dir.display())))?;
            let files = entries.flatten().map(|entry| entry.path());
            let cases = files.filter(|path| path.extension().is_some_and(|ending| ending == "safetensors"));
            cases.filter_map(|path| Some(path.file_stem()?.to_str()?.to_string())).collect()
        };
        if names.is_empty() {
            fail!("{} holds no cases (index.json, or .safetensors files)", self.dir.display());
        }
        names.sort();
        // Ids are unique.
        names.dedup();
        if let Some(part) = filter {
            names.retain(|name| name.contains(part));
            if names.is_empty() {
                fail!("no case of {} has \"{part}\" in its name", self.dir.display());
            }
        }
        Ok(names)
    }

    /// The methods on a device, without duplicates; if there is only one method, that one.
    pub fn methods(&self, device: &Device) -> Vec<Method> {
        let Some(gpu) = device.gpu() else { return vec![Method::Auto] };
        let mut methods = Vec::new();
        for word in &self.methods {
            let more = match word.parse() {
                Ok(method) => vec![method],
                Err(_) => Method::every(gpu.capabilities()),
            };
            for method in more {
                if !methods.contains(&method) {
                    methods.push(method);
                }
            }
        }
        methods
    }

    /// The case with that name. A file that cannot be read is a failing case.
    pub fn case(&self, name: String) -> CaseFile {
        let path = self.dir.join(format!("{name}.safetensors"));
        let (op, storage) = match Case::read(&path) {
            Ok(case) => (case.op().to_string(), case.storage().to_string()),
            Err(_) => ("unreadable".into(), "–".into()),
        };
        CaseFile { name, path, op, storage }
    }

    /// The case with that id, and its method.
    pub fn parse(&self, id: &str) -> Result<(CaseFile, Method)> {
        let (name, method) = parse_id(id).map_err(Error::Usage)?;
        if !self.names(None)?.iter().any(|one| one == name) {
            let dir = self.dir.display();
            usage!("{dir} holds no case {name}; `attn check {dir} --list` prints every case");
        }
        Ok((self.case(name.into()), method))
    }
}
