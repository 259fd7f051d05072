//! The cases of the suite: built-in ones of other frameworks, and those drawn from a seed.

use serde::{Deserialize, Serialize};
use wgpu_attention::{Device, Method};
use wgpu_attention_conformance::{Case as Drawn, Op, SOURCES, cases, golden_names};

use super::folder::{CaseFile, Folder};
use super::variant::{parse_id, variant};
use crate::error::{Error, Result, fail, usage};

/// A case with its method.
#[derive(Clone, Debug)]
pub struct Item {
    pub work: Work,
    pub method: Method,
}

#[derive(Clone, Debug)]
pub enum Work {
    /// A built-in case such as `onnx/test_attention_3d`.
    Golden(String),
    File(CaseFile),
    Drawn(Drawn),
}

/// Which part of the suite to run.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Selection {
    pub quick: bool,
    pub seed: u64,
    /// Ops by name; all if empty.
    pub ops: Vec<String>,
    /// Variants by name; all if empty.
    pub variants: Vec<String>,
    /// Part of an id.
    pub filter: Option<String>,
    /// A folder of cases instead of the suite.
    pub folder: Option<Folder>,
    /// One case by its id, regardless of the other fields.
    pub only: Option<String>,
}

impl Selection {
    /// The case with that id.
    pub fn item(&self, id: &str) -> Result<Item> {
        match &self.folder {
            Some(folder) => folder.parse(id).map(|(file, method)| Item { work: Work::File(file), method }),
            None => Item::parse(id),
        }
    }
}

/// All op names: sources of the built-in cases, and ops of the drawn ones.
pub fn ops() -> impl Iterator<Item = &'static str> {
    SOURCES.into_iter().chain(Op::ALL.map(Op::name))
}

impl Item {
    pub fn id(&self) -> String {
        match &self.work {
            Work::Golden(name) => format!("{name}@{}", variant(self.method)),
            Work::File(file) => format!("{}@{}", file.name, variant(self.method)),
            Work::Drawn(case) => format!("{case}@{}", variant(self.method)),
        }
    }

    /// The op of a drawn case or a file, or the source of a built-in case.
    pub fn op(&self) -> &str {
        match &self.work {
            Work::Golden(name) => name.split('/').next().unwrap_or_default(),
            Work::File(file) => &file.op,
            Work::Drawn(case) => case.op.name(),
        }
    }

    pub fn parse(id: &str) -> Result<Item> {
        let (case, method) = parse_id(id).map_err(Error::Usage)?;
        if golden_names().iter().any(|name| name == case) {
            return Ok(Item { work: Work::Golden(case.into()), method });
        }
        match case.parse() {
            Ok(drawn) => Ok(Item { work: Work::Drawn(drawn), method }),
            Err(reason) => usage!("{reason}; `attn check --list` prints every case"),
        }
    }
}

/// The bytes of a built-in case.
pub fn golden(name: &str) -> Result<Vec<u8>> {
    match wgpu_attention_conformance::golden(name) {
        Some(bytes) => Ok(bytes.into_owned()),
        None => fail!("there is no built-in case {name}"),
    }
}

/// All methods for attention on a device.
pub fn methods(device: &Device) -> Vec<Method> {
    let mut all = vec![Method::Auto];
    if let Some(gpu) = device.gpu() {
        all.extend(Method::every(gpu.capabilities()));
    }
    all
}

/// What to run on a device, in order.
pub fn items(device: &Device, selection: &Selection) -> Vec<Item> {
    if let Some(id) = &selection.only {
        return selection.item(id).into_iter().collect();
    }
    if let Some(folder) = &selection.folder {
        let names = folder.names(selection.filter.as_deref()).unwrap_or_default();
        let files: Vec<CaseFile> = names.into_iter().map(|name| folder.case(name)).collect();
        let by = |method| files.iter().map(move |file| Item { work: Work::File(file.clone()), method });
        return folder.methods(device).into_iter().flat_map(by).collect();
    }
    let methods = methods(device);
    let drawn = cases(&methods, selection.seed, selection.quick);
    let drawn = drawn.into_iter().map(|(case, method)| Item { work: Work::Drawn(case), method });
    let mut names = golden_names();
    if selection.quick {
        // Each compiles its own kernels.
        names = names.into_iter().step_by(6).collect();
    }
    let golden = names.into_iter().map(|name| Item { work: Work::Golden(name), method: Method::Auto });
    let chosen = |item: &Item| {
        let has = |list: &[String], name: &str| list.is_empty() || list.iter().any(|one| one == name);
        has(&selection.ops, item.op())
            && has(&selection.variants, &variant(item.method))
            && selection.filter.as_ref().is_none_or(|part| item.id().contains(part.as_str()))
    };
    golden.chain(drawn).filter(chosen).collect()
}
