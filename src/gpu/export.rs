//! A call as data: everything that another WebGPU implementation needs to run it.

use std::collections::BTreeMap;
use std::path::Path;

use half::{bf16, f16};
use serde::{Serialize, Serializer};

use super::buffers::GpuBuffer;
use super::run::{Steps, declared_bindings};
use crate::error::{Error, Result, shape_error, value_error};
use crate::kernels::Operand;
use crate::problem::{Dtype, Layout};

/// A planned call with its WGSL, its buffers and its dispatches, from [`Attention::export`](crate::Attention::export).
///
/// To run it, create every buffer, write the contents of those that have some, create a compute pipeline per step with
/// the entry point `main`, bind group 0, and dispatch the steps in order in one or more compute passes. The outputs are
/// then in their buffers.
///
/// [`ExportedCall::save`] writes `plan.json`, in the format of [`ExportedCall::to_json`], and the contents of buffer
/// `n` as `buffer-n.bin`. All numbers in the `.bin` files are little-endian. The JSON, `wgpu-attention-plan/1`:
///
/// ```text
/// { "schema": "wgpu-attention-plan/1",
///   "adapter": "…",               the adapter it was planned for
///   "features": ["subgroups"],    required features, by their WebGPU names
///   "subgroup_min": 8,            minimum lanes of a subgroup; null without subgroups
///   "limits": { "maxBufferSize": … },   required limits, by their WebGPU names; not what the adapter offers
///   "buffers": [{ "label", "size": bytes, "contents": whether there is a buffer-n.bin }],
///   "steps": [{ "kernel", "wgsl", "workgroups": [x, y, z],
///               "bindings": [{ "binding", "kind": "uniform" | "read" | "read_write", "buffer": n, "offset", "size" }] }],
///   "outputs": [{ "name": "output" | "lse" | "weights" | "scores", "buffer": n,
///                 "shape", "strides", "offset": in elements, "stored": "f32" | "f16" | "bf16", "dtype" }] }
/// ```
///
/// `limits` has `maxBufferSize`, `maxStorageBufferBindingSize`, `maxStorageBuffersPerShaderStage`,
/// `maxComputeInvocationsPerWorkgroup`, `maxComputeWorkgroupSizeX`, `maxComputeWorkgroupStorageSize`,
/// `maxComputeWorkgroupsPerDimension`, and `minStorageBufferOffsetAlignment`: the largest alignment that the plan's
/// offsets satisfy. The version increases when a member is removed or changes its type or meaning.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct ExportedCall {
    /// [`ExportedCall::SCHEMA`]
    pub schema: &'static str,
    /// The adapter it was planned for.
    pub adapter: String,
    /// Required features, by their WebGPU names.
    pub features: Vec<&'static str>,
    /// Minimum number of lanes of a subgroup; `None` if subgroups are not used.
    pub subgroup_min: Option<u32>,
    /// Required limits, by their WebGPU names.
    pub limits: BTreeMap<&'static str, u64>,
    /// Steps and outputs refer to these by index.
    pub buffers: Vec<ExportedBuffer>,
    /// Dispatches, in order.
    pub steps: Vec<ExportedStep>,
    /// Where the results are.
    pub outputs: Vec<ExportedOutput>,
}

/// A buffer of an [`ExportedCall`].
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct ExportedBuffer {
    /// `operand`, `parameters`, or `results`, which includes working memory.
    pub label: &'static str,
    /// Size in bytes.
    pub size: u64,
    /// Contents before the first step. `None`: arbitrary; the buffer is written before it is read.
    #[serde(serialize_with = "is_some")]
    pub contents: Option<Vec<u8>>,
}

/// A dispatch of an [`ExportedCall`].
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct ExportedStep {
    /// Name of the kernel variant.
    pub kernel: String,
    /// The WGSL in the form that browsers accept: with `enable subgroups;` if subgroups are used, a line that naga
    /// refuses.
    pub wgsl: String,
    /// Number of workgroups in x, y and z.
    pub workgroups: [u32; 3],
    /// The bindings of bind group 0.
    pub bindings: Vec<ExportedBinding>,
}

/// A part of a buffer bound to a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct ExportedBinding {
    /// The `@binding` number.
    pub binding: u32,
    /// How it is declared.
    pub kind: BindingKind,
    /// Index into [`ExportedCall::buffers`].
    pub buffer: usize,
    /// First byte.
    pub offset: u64,
    /// Size in bytes.
    pub size: u64,
}

/// How a kernel declares a binding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum BindingKind {
    /// `var<uniform>`
    Uniform,
    /// `var<storage, read>`
    Read,
    /// `var<storage, read_write>`
    ReadWrite,
}

/// A result of an [`ExportedCall`].
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct ExportedOutput {
    /// The field of [`Attended`](crate::Attended).
    pub name: &'static str,
    /// Index into [`ExportedCall::buffers`].
    pub buffer: usize,
    /// Lengths of the axes.
    pub shape: Vec<usize>,
    /// In elements.
    pub strides: Vec<usize>,
    /// The first element.
    pub offset: usize,
    /// The type in the buffer.
    #[serde(serialize_with = "as_text")]
    pub stored: Dtype,
    /// The type that values are rounded to when they are read.
    #[serde(serialize_with = "as_text")]
    pub dtype: Dtype,
}

fn is_some<S: Serializer>(contents: &Option<Vec<u8>>, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_bool(contents.is_some())
}

fn as_text<S: Serializer>(dtype: &Dtype, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(dtype)
}

impl ExportedCall {
    /// Name and version of the JSON.
    pub const SCHEMA: &'static str = "wgpu-attention-plan/1";

    /// Everything except the contents of buffers.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("only strings, numbers and booleans")
    }

    /// Writes `plan.json` and the contents of buffers into an existing folder.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let write = |name: String, bytes: &[u8]| {
            let path = folder.join(name);
            std::fs::write(&path, bytes).map_err(|error| Error::File(format!("{}: {error}", path.display())))
        };
        for (n, buffer) in self.buffers.iter().enumerate() {
            if let Some(contents) = &buffer.contents {
                write(format!("buffer-{n}.bin"), contents)?;
            }
        }
        write("plan.json".into(), self.to_json().as_bytes())
    }
}

impl ExportedOutput {
    /// The elements in row-major order, rounded to `dtype`, from the bytes of the buffer after the last step.
    pub fn read(&self, bytes: &[u8]) -> Result<Vec<f32>> {
        let size = self.stored.stored_size() as usize;
        let layout = Layout::strided(&self.shape, &self.strides, self.offset, bytes.len() / size)
            .map_err(|error| shape_error!("{} in {} bytes of {}: {error}", self.name, bytes.len(), self.stored))?;
        let value = |at: usize| match (self.stored, &bytes[at * size..][..size]) {
            (Dtype::F16, &[a, b]) => f16::from_le_bytes([a, b]).to_f32(),
            (Dtype::BF16, &[a, b]) => bf16::from_le_bytes([a, b]).to_f32(),
            (_, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
            (_, byte) => f32::from(byte[0]),
        };
        Ok(layout.positions().map(|at| self.dtype.round(value(at))).collect())
    }
}

/// Buffers in order of first use.
struct Buffers {
    /// `None`: the steps' parameters.
    met: Vec<(Option<GpuBuffer>, ExportedBuffer)>,
}

impl Buffers {
    /// The buffer's index. `label` is that of its first use, `size` the number of bytes used.
    fn index(&mut self, buffer: Option<&GpuBuffer>, label: &'static str, size: u64) -> usize {
        let is_it = |met: &Option<GpuBuffer>| match (met, buffer) {
            (Some(met), Some(buffer)) => met.is(buffer),
            (met, buffer) => met.is_none() && buffer.is_none(),
        };
        let at = self.met.iter().position(|(met, _)| is_it(met)).unwrap_or_else(|| {
            self.met.push((buffer.cloned(), ExportedBuffer { label, size: 0, contents: None }));
            self.met.len() - 1
        });
        let used = &mut self.met[at].1.size;
        *used = size.next_multiple_of(4).max(*used);
        at
    }
}

/// A result: its name, its buffer, its layout there, and its type.
pub(crate) type ExportedResult<'a> = (&'static str, &'a GpuBuffer, Operand<'a>, Dtype);

impl Steps {
    /// What [`Steps::submit`] would run, without running it. For steps from [`Steps::for_step`].
    pub async fn export(self, results: &[ExportedResult<'_>]) -> Result<ExportedCall> {
        let mut buffers = Buffers { met: Vec::new() };
        let mut steps = Vec::new();
        let mut features = Vec::new();
        for bound in &self.bound {
            let variant = &bound.step.variant;
            let mut wgsl = self.gpu.rewritten(variant)?;
            let declared: BTreeMap<String, (u32, wgpu::BufferBindingType)> =
                declared_bindings(&wgsl).map(|one| (one.name.to_string(), (one.number, one.kind))).collect();
            if variant.uses_subgroups() {
                // Added here, because naga refuses this line if the adapter uses it.
                wgsl.insert_str(0, "enable subgroups;\n");
                features = vec!["subgroups"];
            }
            let mut bindings = Vec::new();
            for &(name, ref part) in &bound.parts {
                let Some(&(binding, kind)) = declared.get(name) else {
                    return Err(value_error!("{} has no buffer {name}", variant.name));
                };
                let kind = match kind {
                    wgpu::BufferBindingType::Uniform => BindingKind::Uniform,
                    wgpu::BufferBindingType::Storage { read_only: true } => BindingKind::Read,
                    wgpu::BufferBindingType::Storage { .. } => BindingKind::ReadWrite,
                };
                // An empty part is bound as the whole buffer.
                let size = match (part.size, &part.buffer) {
                    (0, Some(buffer)) => (buffer.raw().size() - part.offset) / 4 * 4,
                    (size, _) => size,
                };
                let label = match (&part.buffer, kind) {
                    (None, _) => "parameters",
                    (_, BindingKind::ReadWrite) => "results",
                    _ => "operand",
                };
                let buffer = buffers.index(part.buffer.as_ref(), label, part.offset + size);
                bindings.push(ExportedBinding { binding, kind, buffer, offset: part.offset, size });
            }
            let [x, y] = bound.step.workgroups;
            steps.push(ExportedStep { kernel: variant.name.clone(), wgsl, workgroups: [x, y, 1], bindings });
        }
        let outputs = (results.iter())
            .map(|&(name, buffer, Operand { layout, stored }, dtype)| {
                let size = (layout.end() as u64 * stored.stored_size()).max(4);
                ExportedOutput {
                    name,
                    buffer: buffers.index(Some(buffer), "results", size),
                    shape: layout.shape().to_vec(),
                    strides: layout.strides().to_vec(),
                    offset: layout.offset(),
                    stored,
                    dtype,
                }
            })
            .collect();
        let mut exported = Vec::new();
        for (buffer, mut it) in buffers.met {
            it.contents = match &buffer {
                None => {
                    let bytes = self.parameters.clone().unwrap_or_default();
                    // An empty table at the end is not bound.
                    it.size = bytes.len() as u64;
                    Some(bytes)
                }
                Some(buffer) if it.label == "operand" => Some(buffer.read(0..it.size, <[u8]>::to_vec).await?),
                Some(_) => None,
            };
            exported.push(it);
        }
        Ok(ExportedCall {
            schema: ExportedCall::SCHEMA,
            adapter: self.gpu.info().name.clone(),
            subgroup_min: self.gpu.capabilities().subgroup_min.filter(|_| !features.is_empty()),
            features,
            limits: self.limits(&exported, &steps),
            buffers: exported,
            steps,
            outputs,
        })
    }

    fn limits(&self, buffers: &[ExportedBuffer], steps: &[ExportedStep]) -> BTreeMap<&'static str, u64> {
        let storage = |step: &ExportedStep| {
            step.bindings.iter().filter(|binding| binding.kind != BindingKind::Uniform).copied().collect::<Vec<_>>()
        };
        let bound: Vec<ExportedBinding> = steps.iter().flat_map(storage).collect();
        let variants = || self.bound.iter().map(|bound| &bound.step.variant);
        let invocations = variants().map(|variant| u64::from(variant.workgroup_size())).max().unwrap_or(0);
        let memory = variants().map(|variant| u64::from(variant.workgroup_memory())).max().unwrap_or(0);
        // WebGPU allows alignments up to 256.
        let agreed = bound.iter().fold(256, |all, binding| all | binding.offset);
        BTreeMap::from([
            ("maxBufferSize", buffers.iter().map(|buffer| buffer.size).max().unwrap_or(0)),
            ("maxStorageBufferBindingSize", bound.iter().map(|binding| binding.size).max().unwrap_or(0)),
            ("maxStorageBuffersPerShaderStage", steps.iter().map(|step| storage(step).len() as u64).max().unwrap_or(0)),
            ("maxComputeInvocationsPerWorkgroup", invocations),
            ("maxComputeWorkgroupSizeX", invocations),
            ("maxComputeWorkgroupStorageSize", memory),
            (
                "maxComputeWorkgroupsPerDimension",
                steps.iter().flat_map(|step| step.workgroups).max().unwrap_or(0).into(),
            ),
            ("minStorageBufferOffsetAlignment", 1 << agreed.trailing_zeros()),
        ])
    }
}
