//! What a check found, as data: what `--json` writes, `--diff` compares and every other form is made from.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::font;

/// Name and version of the JSON. The number grows when a member goes, changes its type or its meaning; members may be
/// added without.
pub const SCHEMA: &str = "attn-check/1";

/// A run of the check on one machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`SCHEMA`]
    pub schema: String,
    /// Of this program.
    pub version: String,
    pub wgpu: String,
    pub naga: String,
    /// `quick`, `full`, or `chosen` where filters left cases out.
    pub suite: String,
    /// The folder that the cases are from, where it is not the suite's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub folder: Option<String>,
    /// What the random cases were drawn from; 0 for those of a folder.
    pub seed: u64,
    /// When it began: RFC 3339, UTC.
    pub date: String,
    /// Operating system and processor architecture.
    pub host: String,
    pub adapters: Vec<Adapter>,
    /// In the order they ran, adapter after adapter.
    pub results: Vec<CaseResult>,
}

/// A device that the cases ran on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Adapter {
    pub name: String,
    /// As wgpu calls it, `Vulkan` for one; `CPU` for the CPU backend.
    pub backend: String,
    /// `DiscreteGpu`, `Cpu` and so on.
    pub kind: String,
    /// PCI ids; 0 where unknown.
    pub vendor: u32,
    pub device: u32,
    pub driver: String,
    pub driver_info: String,
    /// What WGSL goes through.
    pub shader_compiler: String,
    /// Smallest and largest subgroup that the adapter declares.
    pub subgroups: Option<[u32; 2]>,
    /// That the device was opened with: what the kernels may use. Its limits are all that the adapter has.
    pub features: Vec<String>,
    pub limits: BTreeMap<String, u64>,
    /// What a kernel saw on the device itself.
    pub observed: Vec<Observed>,
    /// Why there are no results beyond those listed: the driver hung, crashed, or gave no device.
    pub ended: Option<String>,
    pub seconds: f64,
}

/// Sizes that a kernel saw.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Observed {
    /// Invocations of a workgroup as the WGSL asks for them.
    pub workgroup: u32,
    /// How many ran.
    pub invocations: u32,
    /// Invocations of a subgroup, where the adapter has them.
    pub subgroup: Option<u32>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    Passed,
    #[default]
    Failed,
    /// Not computed: a feature or limit is missing, or the variant does not do this.
    Skipped,
    /// Failed as a known issue says it does.
    Known,
    /// Passed although a known issue says that it fails: the issue has to go.
    Mended,
}

impl Status {
    /// As the JSON has it.
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
    /// Names the case with its storage type and variant; the same in every run, and what `--repro` takes.
    pub id: String,
    /// `attention`, `softmax` and so on; of a folder's case what the case says.
    pub op: String,
    /// Which kernels were asked for: `auto`, `three passes`, a tile such as `rows4x64/keys4`.
    pub variant: String,
    /// `f32`, `f16` or `bf16`: how the operands lie in memory.
    pub storage: String,
    pub status: Status,
    /// The known issue, for [`Status::Known`] and [`Status::Mended`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub issue: Option<String>,
    /// Why it failed or was skipped, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What of the case is not known, where it was computed without.
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
    /// Why these.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// What the driver or a validation layer said meanwhile: warnings and errors. An error fails the case.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub messages: Vec<String>,
    /// Invocations of a workgroup of the first kernel, and of a subgroup as seen on the device for that size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workgroup: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subgroup: Option<u32>,
    /// Of the first run, compilation included.
    pub milliseconds: f64,
}

/// One tensor of a case against what it should be.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Output {
    /// `output`, `lse`, `weights` and so on.
    pub name: String,
    /// `f64` for the truth computed here, else the file's tensors: `out` (ONNX), `ref64`, `out32`.
    pub against: String,
    pub ok: bool,
    /// Elements.
    pub count: u64,
    /// The largest absolute error.
    #[serde(with = "number")]
    pub max_abs: f64,
    /// What is allowed at [`Output::worst`].
    #[serde(with = "number")]
    pub allowed: f64,
    /// The largest error in units in the last place at the value expected there, of the type that values are rounded to.
    #[serde(with = "number")]
    pub ulps: f64,
    /// Σ(got − expected)² / Σ expected², over what is finite; what is allowed.
    #[serde(with = "number")]
    pub nmse: f64,
    #[serde(with = "number")]
    pub nmse_allowed: f64,
    /// The element that is furthest beyond its tolerance, or nearest to it, and the two values.
    pub worst: Vec<usize>,
    #[serde(with = "number")]
    pub got: f64,
    #[serde(with = "number")]
    pub expected: f64,
    /// NaNs where none are expected.
    pub nans: u64,
}

/// JSON has no NaN and no infinity: those are texts.
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
    /// Name and backend, fit to be printed.
    pub fn label(&self) -> String {
        match visible(&self.backend) {
            backend if backend.is_empty() => visible(&self.name),
            backend => format!("{} ({backend})", visible(&self.name)),
        }
    }

    /// Name and version of the driver, fit to be printed; empty where unknown.
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

    /// Which cases there are, in words, fit to be printed.
    pub fn cases(&self) -> String {
        match &self.folder {
            Some(folder) if self.suite == "full" => format!("all cases of {}", visible(folder)),
            Some(folder) => format!("{} cases of {}", visible(&self.suite), visible(folder)),
            None => format!("{} suite, seed {}", visible(&self.suite), self.seed),
        }
    }

    /// The line for a shell that runs the case again. An adapter goes by its backend and name: the name alone may mean
    /// another backend's.
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

/// A text in characters that can be seen: controls and marks of direction, which a driver or a file of somebody else
/// may carry, as escapes.
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

/// The error of a case in few digits.
pub fn short(x: f64) -> String {
    match x {
        0.0 => "0".into(),
        x if !x.is_finite() => x.to_string(),
        x if (0.1..1000.0).contains(&x.abs()) => format!("{x:.1}"),
        x => format!("{x:.1e}"),
    }
}

/// How many results have which status.
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

    /// Those that were computed.
    pub fn computed(&self) -> usize {
        self.passed + self.failed + self.known + self.mended
    }

    /// Nothing failed, no known issue has to go, and something was shown.
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
