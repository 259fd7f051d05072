//! The results of a check as data: `--json` writes them, `--diff` compares them, and every other form is made from
//! them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::font;

/// Name and version of the JSON format. The version increases if a member is removed or changes its type or meaning.
/// Added members do not change it.
pub const SCHEMA: &str = "attn-check/1";

/// A run of the check on one machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`SCHEMA`]
    pub schema: String,
    /// The version of this program.
    pub version: String,
    pub wgpu: String,
    pub naga: String,
    /// `quick`, `full`, or `chosen` if filters excluded cases.
    pub suite: String,
    /// The folder that the cases are from, if they are not from the suite.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub folder: Option<String>,
    /// The seed of the random cases; 0 for a folder.
    pub seed: u64,
    /// When the run began: RFC 3339, UTC.
    pub date: String,
    /// Operating system and processor architecture.
    pub host: String,
    pub adapters: Vec<Adapter>,
    /// In the order in which they ran, adapter by adapter.
    pub results: Vec<CaseResult>,
}

/// A device that the cases ran on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Adapter {
    pub name: String,
    /// wgpu's name, such as `Vulkan`; `CPU` for the CPU backend.
    pub backend: String,
    /// `DiscreteGpu`, `Cpu` and so on.
    pub kind: String,
    /// PCI ids; 0 where unknown.
    pub vendor: u32,
    pub device: u32,
    pub driver: String,
    pub driver_info: String,
    /// The shader compilers that WGSL goes through.
    pub shader_compiler: String,
    /// The smallest and largest subgroup size that the adapter declares.
    pub subgroups: Option<[u32; 2]>,
    /// The features that the device was opened with, which kernels may use. The limits are all those of the adapter.
    pub features: Vec<String>,
    pub limits: BTreeMap<String, u64>,
    /// What a kernel observed on the device.
    pub observed: Vec<Observed>,
    /// Why there are no more results than those listed: the driver hung, crashed, or could not open a device.
    pub ended: Option<String>,
    pub seconds: f64,
}

/// Sizes observed by a kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Observed {
    /// Invocations per workgroup as requested in WGSL.
    pub workgroup: u32,
    /// How many ran.
    pub invocations: u32,
    /// Invocations per subgroup, if the adapter has subgroups.
    pub subgroup: Option<u32>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    Passed,
    #[default]
    Failed,
    /// Not computed: a feature or limit is missing, or the variant does not support the case.
    Skipped,
    /// Failed as described by a known issue.
    Known,
    /// Passed although a known issue says that it fails: the issue must be removed.
    Mended,
}

impl Status {
    /// The word in the JSON.
    pub fn word(self) -> &'static str {
        match self {
            Status::Passed => "passed",
            Status::Failed => "failed",
            Status::Skipped => "skipped",
            Status::Known => "known",
            Status::Mended => "mended",
        }
    }
}

/// One case on one adapter.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CaseResult {
    /// Index into [`Report::adapters`].
    pub adapter: usize,
    /// Names the case with its storage type and variant; the same in every run, and accepted by `--repro`.
    pub id: String,
    /// `attention`, `softmax` and so on; in a folder, the op that the case names.
    pub op: String,
    /// The requested method: `auto`, `three passes`, a tile such as `rows4x64/keys4`.
    pub variant: String,
    /// `f32`, `f16` or `bf16`: the storage type of the operands.
    pub storage: String,
    pub status: Status,
    /// The known issue, for [`Status::Known`] and [`Status::Mended`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub issue: Option<String>,
    /// Why it failed or was skipped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Unknown parts of the case that were ignored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub outputs: Vec<Output>,
    /// Whether a second run gave the same bits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub same_bits: Option<bool>,
    /// The kernel variants that ran.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kernels: Vec<String>,
    /// Why these kernels were chosen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// Warnings and errors of the driver or a validation layer during the case. An error fails the case.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub messages: Vec<String>,
    /// Invocations per workgroup of the main kernel, and per subgroup as observed on the device for that size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workgroup: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subgroup: Option<u32>,
    /// The time of the first run, including compilation.
    pub milliseconds: f64,
}

/// The comparison of one result tensor with the expected one.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Output {
    /// `output`, `lse`, `weights` and so on.
    pub name: String,
    /// `f64` for the truth computed here, else tensors of the case file: `out` (ONNX), `ref64`, `out32`.
    pub against: String,
    pub ok: bool,
    /// The number of elements.
    pub count: u64,
    /// The largest absolute error.
    #[serde(with = "number")]
    pub max_abs: f64,
    /// The error allowed at [`Output::worst`].
    #[serde(with = "number")]
    pub allowed: f64,
    /// The largest error in units in the last place of the expected value, in the type that values are rounded to.
    #[serde(with = "number")]
    pub ulps: f64,
    /// Σ(got − expected)² / Σ expected² over finite elements, and the value allowed.
    #[serde(with = "number")]
    pub nmse: f64,
    #[serde(with = "number")]
    pub nmse_allowed: f64,
    /// The element that exceeds its tolerance by the most, or is closest to it, and the two values.
    pub worst: Vec<usize>,
    #[serde(with = "number")]
    pub got: f64,
    #[serde(with = "number")]
    pub expected: f64,
    /// NaNs where none are expected.
    pub nans: u64,
}

/// JSON has no NaN and no infinity: they are strings.
mod number {
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(x: &f64, to: S) -> Result<S::Ok, S::Error> {
        if x.is_finite() { to.serialize_f64(*x) } else { to.serialize_str(&x.to_string()) }
    }

    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Either {
        Number(f64),
        Text(String),
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
        match Either::deserialize(from)? {
            Either::Number(x) => Ok(x),
            Either::Text(text) => match text.as_str() {
                "NaN" => Ok(f64::NAN),
                "inf" => Ok(f64::INFINITY),
                "-inf" => Ok(f64::NEG_INFINITY),
                other => Err(serde::de::Error::custom(format!("\"{other}\" is no number"))),
            },
        }
    }
}

impl Adapter {
    /// Name and backend, safe to print.
    pub fn label(&self) -> String {
        match visible(&self.backend) {
            backend if backend.is_empty() => visible(&self.name),
            backend => format!("{} ({backend})", visible(&self.name)),
        }
    }

    /// Name and version of the driver, safe to print; empty if unknown.
    pub fn driver_label(&self) -> String {
        visible(format!("{} {}", self.driver, self.driver_info).trim())
    }
}

impl CaseResult {
    /// The largest NMSE of its outputs; NaN is larger than any number.
    pub fn nmse(&self) -> Option<f64> {
        worst(self.outputs.iter().map(|output| output.nmse))
    }

    /// The largest error of its outputs in units in the last place.
    pub fn ulps(&self) -> Option<f64> {
        worst(self.outputs.iter().map(|output| output.ulps))
    }
}

/// The largest; NaN is larger than any number.
pub fn worst(values: impl Iterator<Item = f64>) -> Option<f64> {
    values.reduce(|a, b| if a.is_nan() || a >= b { a } else { b })
}

impl Report {
    pub fn of_adapter(&self, at: usize) -> impl Iterator<Item = &CaseResult> + Clone {
        self.results.iter().filter(move |result| result.adapter == at)
    }

    /// A description of the cases, safe to print.
    pub fn cases(&self) -> String {
        match &self.folder {
            Some(folder) if self.suite == "full" => format!("all cases of {}", visible(folder)),
            Some(folder) => format!("{} cases of {}", visible(&self.suite), visible(folder)),
            None => format!("{} suite, seed {}", visible(&self.suite), self.seed),
        }
    }

    /// The shell command that repeats the case. It names an adapter by backend and name, because another backend may
    /// have an adapter with the same name.
    pub fn repro(&self, result: &CaseResult) -> String {
        let adapter = &self.adapters[result.adapter];
        let check = match &self.folder {
            Some(folder) => format!("attn check {}", quoted(folder)),
            None => "attn check".into(),
        };
        if adapter.backend.starts_with("Dawn") {
            return format!("attn check --dawn --adapter 0 --repro {}", quoted(&result.id));
        }
        let which = match adapter.backend.as_str() {
            "CPU" => "cpu".into(),
            "" => adapter.name.clone(),
            backend if adapter.name.is_empty() => backend.to_lowercase(),
            backend => format!("{}:{}", backend.to_lowercase(), adapter.name),
        };
        format!("{check} --adapter {} --repro {}", quoted(&which), quoted(&result.id))
    }
}

/// A text in visible characters: control characters and direction marks, which a driver or a foreign file may contain,
/// are escaped.
pub fn visible(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if font::is_hidden(c) { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out
}

/// [`visible`] as one argument for a POSIX shell.
pub fn quoted(text: &str) -> String {
    let text = visible(text);
    let plain = |c: char| c.is_ascii_alphanumeric() || "@%+=:,./-_".contains(c);
    if !text.is_empty() && text.chars().all(plain) { text } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

/// The error of a case in a few digits.
pub fn short(x: f64) -> String {
    match x {
        0.0 => "0".into(),
        x if !x.is_finite() => x.to_string(),
        x if (0.1..1000.0).contains(&x.abs()) => format!("{x:.1}"),
        x => format!("{x:.1e}"),
    }
}

/// The number of results per status.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    pub passed: usize,
    pub failed: usize,
    pub skipped: usize,
    pub known: usize,
    pub mended: usize,
}

impl Tally {
    pub fn of<'a>(results: impl IntoIterator<Item = &'a CaseResult>) -> Tally {
        let mut tally = Tally::default();
        for result in results {
            match result.status {
                Status::Passed => tally.passed += 1,
                Status::Failed => tally.failed += 1,
                Status::Skipped => tally.skipped += 1,
                Status::Known => tally.known += 1,
                Status::Mended => tally.mended += 1,
            }
        }
        tally
    }

    /// The number of results that were computed.
    pub fn computed(&self) -> usize {
        self.passed + self.failed + self.known + self.mended
    }

    /// Nothing failed, no known issue must be removed, and at least one case was computed.
    pub fn is_good(&self) -> bool {
        self.failed == 0 && self.mended == 0 && self.passed + self.known > 0
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)?;
        if self.known > 0 {
            write!(f, ", {} failed as known", self.known)?;
        }
        if self.mended > 0 {
            write!(f, ", {} passed against a known issue", self.mended)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nan_is_the_worst() {
        assert_eq!(worst([1.0, 3.0, 2.0].into_iter()), Some(3.0));
        assert!(worst([1.0, f64::NAN, f64::INFINITY].into_iter()).is_some_and(f64::is_nan));
        assert!(worst([f64::INFINITY, f64::NAN].into_iter()).is_some_and(f64::is_nan));
        assert_eq!(worst([].into_iter()), None);
    }

    #[test]
    fn an_argument_stays_one_argument() {
        assert_eq!(quoted("attention-f32-1@rows4x8/keys4"), "attention-f32-1@rows4x8/keys4");
        assert_eq!(quoted("$(a) 'b'\n"), r"'$(a) '\''b'\''\n'");
        assert_eq!(quoted(""), "''");
    }
}
