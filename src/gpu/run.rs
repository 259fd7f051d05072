//! Compiling variants and executing plans.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use super::buffers::{GpuBuffer, Purpose};
use super::{Gpu, lock};
use crate::attention::{Attended, Operands, Relative, Wanted, Weights, in_order_of};
use crate::device::Device;
use crate::error::{Result, value_error};
use crate::inspect::{Chosen, Inspected};
use crate::kernels::access::is_wide;
use crate::kernels::plan::{self, AttentionOperands, InspectOperands};
use crate::kernels::{Method, Operand, Plan, ShapeClass, Slot, Step, Variant, three_passes_compete};
use crate::position::Rotation;
use crate::problem::{Dtype, Layout, Place, Problem, Rows, ScoreStage, Sequence};
use crate::tensor::{Storage, Tensor};

/// A compiled variant.
pub struct Pipeline {
    pipeline: wgpu::ComputePipeline,
    layout: wgpu::BindGroupLayout,
    /// The number of each variable.
    numbers: HashMap<String, u32>,
}

/// A buffer that a WGSL text declares.
pub(super) struct Declared<'a> {
    pub name: &'a str,
    pub number: u32,
    pub kind: wgpu::BufferBindingType,
}

/// The buffers that a WGSL text declares.
pub(super) fn declared_bindings(source: &str) -> impl Iterator<Item = Declared<'_>> {
    source.lines().filter_map(|line| {
        let (number, rest) = line.strip_prefix("@group(0) @binding(")?.split_once(')')?;
        let (space, rest) = rest.split_once('>')?;
        let (name, _) = rest.split_once(':')?;
        let kind = if space.ends_with("uniform") {
            wgpu::BufferBindingType::Uniform
        } else {
            wgpu::BufferBindingType::Storage { read_only: !space.ends_with("read_write") }
        };
        Some(Declared { name: name.trim(), number: number.parse().ok()?, kind })
    })
}

impl Gpu {
    /// The WGSL of a variant as it is compiled on this adapter.
    pub fn source(&self, variant: &Variant) -> Result<String> {
        if self.0.loads_64_bits {
            return self.rewritten(&variant.loading_64_bits());
        }
        let mut source = self.rewritten(variant)?;
        if variant.uses_subgroups() && self.0.info.backend == wgpu::Backend::BrowserWebGpu {
            // Browsers ask for the line, naga refuses it.
            source.insert_str(0, "enable subgroups;\n");
        }
        Ok(source)
    }

    /// The WGSL of a variant that any adapter takes.
    pub(super) fn rewritten(&self, variant: &Variant) -> Result<String> {
        let source = variant.source()?;
        let changed = self.0.rewrite.and_then(|rewrite| rewrite(variant, &source));
        Ok(changed.unwrap_or(source))
    }

    /// The compiled variant; compiles it the first time.
    async fn pipeline(&self, variant: &Variant) -> Result<Arc<Pipeline>> {
        if let Some(pipeline) = lock(&self.0.pipelines).get(variant) {
            return Ok(pipeline.clone());
        }
        let source = self.source(variant)?;
        let pipeline = Arc::new(self.scoped(&variant.name, || self.compile(variant, &source)).await?);
        lock(&self.0.pipelines).insert(variant.clone(), pipeline.clone());
        Ok(pipeline)
    }

    fn compile(&self, variant: &Variant, source: &str) -> Pipeline {
        let device = &self.0.device;
        let label = Some(variant.name.as_str());
        let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
            label,
            source: wgpu::ShaderSource::Wgsl(source.into()),
        });
        let entries: Vec<_> = declared_bindings(source)
            .map(|Declared { number, kind, .. }| wgpu::BindGroupLayoutEntry {
                binding: number,
                visibility: wgpu::ShaderStages::COMPUTE,
                ty: wgpu::BindingType::Buffer { ty: kind, has_dynamic_offset: false, min_binding_size: None },
                count: None,
            })
            .collect();
        let layout = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label, entries: &entries });
        let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label,
            bind_group_layouts: &[Some(&layout)],
            ..Default::default()
        });
        let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label,
            layout: Some(&pipeline_layout),
            module: &module,
            entry_point: Some("main"),
            compilation_options: wgpu::PipelineCompilationOptions {
                // What has workgroup memory writes it before it reads.
                zero_initialize_workgroup_memory: false,
                ..Default::default()
            },
            cache: None,
        });
        let numbers = declared_bindings(source).map(|one| (one.name.to_string(), one.number)).collect();
        Pipeline { pipeline, layout, numbers }
    }
}

/// What ran in a call, and for how long.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Profile {
    /// The kernel variants in the order they ran, each once; none on the CPU backend.
    pub kernels: Vec<String>,
    /// From the start to the end of the compute pass by the adapter's own clock; `None` on the CPU backend,
    /// and where the device lacks [`wgpu::Features::TIMESTAMP_QUERY`].
    pub gpu_time: Option<Duration>,
}

/// A kernel as it was sent to the adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct Traced {
    /// The kernel; [`Gpu::source`] gives its text.
    pub variant: Variant,
    /// Workgroups in x and y.
    pub workgroups: [u32; 2],
    /// Why attention runs on these kernels; empty where there is one way only.
    pub why: String,
}

/// Work for a caller's encoders, cut into slices of about as long as a submit may take
/// ([`GpuOptions::seconds_per_submit`](crate::GpuOptions::seconds_per_submit)): a GPU that works on one submit for two
/// seconds is reset by Windows and by some drivers.
///
/// Encode the slices in order, each into an encoder of its own, and submit these in that order. Keep this, the inputs and
/// the results until the last is submitted.
pub struct EncodeSlices {
    recording: Recording,
    pipelines: Vec<Arc<Pipeline>>,
    ranges: Vec<Range<usize>>,
}

impl std::fmt::Debug for EncodeSlices {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "EncodeSlices({} of {:.3} s on {:?})", self.len(), self.seconds(), self.recording.gpu)
    }
}

impl EncodeSlices {
    /// How many slices there are.
    pub fn len(&self) -> usize {
        self.ranges.len()
    }
    /// True when there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }
    /// How long all slices take together, about: on the long side, by what
    /// [`Gpu::multiply_add_ceiling`] measured, or by a guess for the kind of adapter before it was asked.
    pub fn seconds(&self) -> f64 {
        let operations: f64 = self.recording.steps.iter().map(|bound| bound.step.cost.operations).sum();
        operations / self.recording.gpu.operations_per_second()
    }
    /// Records slice `n`: one compute pass, no submit.
    pub fn encode(&self, n: usize, encoder: &mut wgpu::CommandEncoder) -> Result<()> {
        let Some(range) = self.ranges.get(n) else {
            return Err(value_error!("there is no slice {n}: there are {}, from 0 on", self.len()));
        };
        self.record(range.clone(), encoder)
    }

    fn record(&self, range: Range<usize>, encoder: &mut wgpu::CommandEncoder) -> Result<()> {
        let Recording { gpu, .. } = &self.recording;
        let dispatch = || self.recording.dispatch(range, &self.pipelines, None, encoder, None);
        gpu.scoped_now(&self.recording.label(), dispatch)
    }
}

/// A part of a buffer.
pub(super) struct Part {
    /// `None`: of the recording's own parameters.
    pub buffer: Option<GpuBuffer>,
    pub offset: u64,
    pub size: u64,
}

/// A planned step with its real buffers.
pub(super) struct Bound {
    pub step: Step,
    why: Arc<str>,
    /// The uniform block first.
    pub parts: Vec<(&'static str, Part)>,
}

/// Steps on one adapter, to run in one compute pass.
pub(crate) struct Recording {
    device: Device,
    pub(super) gpu: Gpu,
    pub(super) steps: Vec<Bound>,
    purpose: Purpose,
    /// Uniform blocks and tables that go into one pooled buffer; `None` keeps each by its content.
    pub(super) parameters: Option<Vec<u8>>,
}

/// Where a uniform block may begin on any adapter.
const ALIGNMENT: usize = 256;

pub(super) fn buffer_of(tensor: &Tensor) -> &GpuBuffer {
    match tensor.storage() {
        Storage::Gpu(buffer) => buffer,
        #[cfg(feature = "cpu")]
        _ => unreachable!("devices are checked before"),
    }
}

impl Recording {
    pub fn new(gpu: &Gpu) -> Recording {
        Recording {
            device: Device::Gpu(gpu.clone()),
            gpu: gpu.clone(),
            steps: Vec::new(),
            purpose: Purpose::Call,
            parameters: None,
        }
    }

    /// For a step of a sequence: its parameters are new every time, and not worth keeping.
    pub fn for_step(gpu: &Gpu) -> Recording {
        Recording { parameters: Some(Vec::new()), ..Recording::new(gpu) }
    }

    /// For work that waits in a caller's encoder.
    pub fn for_encoder(gpu: &Gpu) -> Recording {
        Recording { purpose: Purpose::Encoder, ..Recording::new(gpu) }
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    /// A new tensor of f32 that is rounded to `dtype` on download.
    fn output(&self, what: &str, layout: Layout, dtype: Dtype) -> Result<Tensor> {
        self.output_stored(what, layout, dtype, Dtype::F32)
    }

    /// A new tensor held as `stored`.
    fn output_stored(&self, what: &str, layout: Layout, dtype: Dtype, stored: Dtype) -> Result<Tensor> {
        let buffer = self.gpu.allocate(what, plan::padded_bytes(&layout, stored), Purpose::Call)?;
        Ok(Tensor::from_gpu(buffer, layout, dtype, stored))
    }

    /// A boolean tensor of this call's own. One for a caller's encoder gets a buffer that nothing else ever uses: the
    /// tensor is gone before the encoder is submitted, and an upload of another call must not write over it.
    pub fn bools(&self, shape: &[usize], data: &[bool]) -> Result<Tensor> {
        if self.purpose == Purpose::Call {
            return Tensor::from_bools(&self.device, shape, data);
        }
        let layout = Layout::contiguous(shape)?;
        let bytes: Vec<u8> = data.iter().map(|&x| u8::from(x)).collect();
        Ok(Tensor::from_gpu(self.gpu.upload_once("mask", &bytes)?, layout, Dtype::Bool, Dtype::Bool))
    }

    /// One number in a tensor of `layout`, in a buffer that is never written again.
    pub fn number(&self, value: f32, layout: Layout) -> Tensor {
        let buffer = self.gpu.adopt(&self.gpu.constant(bytemuck::bytes_of(&[value; 4])));
        Tensor::from_gpu(buffer, layout, Dtype::F32, Dtype::F32)
    }

    /// The same values in a buffer of f32, for kernels that read nothing else.
    pub fn widened(&mut self, x: &Tensor) -> Result<Tensor> {
        if matches!(x.stored(), Dtype::F32 | Dtype::Bool) {
            return Ok(x.clone());
        }
        // What is repeated along an axis is widened once.
        let mut once = x.layout().clone();
        for axis in 0..once.rank() {
            if once.strides()[axis] == 0 && once.shape()[axis] > 1 {
                once = once.narrow(axis, 0, 1)?;
            }
        }
        let wide = self.row_major(&x.with_layout(once))?;
        Ok(wide.with_layout(wide.layout().broadcast_to(x.shape())?))
    }

    pub fn add(&mut self, plan: Plan, find: impl Fn(Slot) -> Option<GpuBuffer>) -> Result<()> {
        let scratch = plan
            .scratch
            .iter()
            .map(|&bytes| self.gpu.allocate("working memory", bytes, self.purpose))
            .collect::<Result<Vec<_>>>()?;
        let bands = self.constant(bytemuck::cast_slice(&plan.bands));
        let places = self.constant(bytemuck::cast_slice(&plan.places));
        let rows = self.constant(bytemuck::cast_slice(&plan.rows));
        let why: Arc<str> = plan.why.into();
        for step in plan.steps {
            let mut parts = vec![("params", self.constant(&step.params))];
            for binding in &step.bindings {
                let table = |part: &Part| Part { buffer: part.buffer.clone(), ..*part };
                let part = match binding.slot {
                    Slot::Bands if !plan.bands.is_empty() => table(&bands),
                    Slot::Places if !plan.places.is_empty() => table(&places),
                    Slot::Rows if !plan.rows.is_empty() => table(&rows),
                    slot => {
                        let buffer = match slot {
                            Slot::Scratch(n) => Some(scratch[n].clone()),
                            slot => find(slot),
                        };
                        let buffer = buffer.ok_or_else(|| {
                            value_error!("{} was planned without a buffer for {slot:?}", step.variant.name)
                        })?;
                        let total = buffer.raw().size();
                        // An operand part without elements may begin at the buffer's end: bind its start instead.
                        let offset = if binding.offset >= total { 0 } else { binding.offset };
                        let size = binding.size.min((total - offset) / 4 * 4);
                        Part { buffer: Some(buffer), offset, size }
                    }
                };
                parts.push((binding.name, part));
            }
            self.steps.push(Bound { step, why: why.clone(), parts });
        }
        Ok(())
    }

    /// Whether planning may measure the adapter: for a caller's encoder that would be a submit that nobody asked for.
    fn may_submit(&self) -> bool {
        self.purpose != Purpose::Encoder
    }

    /// A place for a uniform block or a table.
    fn constant(&mut self, bytes: &[u8]) -> Part {
        let size = bytes.len().next_multiple_of(16);
        match &mut self.parameters {
            Some(all) => {
                let offset = all.len().next_multiple_of(ALIGNMENT);
                all.resize(offset + size, 0);
                all[offset..][..bytes.len()].copy_from_slice(bytes);
                Part { buffer: None, offset: offset as u64, size: size as u64 }
            }
            None if bytes.is_empty() => Part { buffer: None, offset: 0, size: 0 },
            None => {
                let buffer = self.gpu.adopt(&self.gpu.constant(bytes));
                Part { buffer: Some(buffer), offset: 0, size: size as u64 }
            }
        }
    }

    pub fn project(
        &mut self,
        x: &Tensor,
        w: &Tensor,
        bias: Option<&Tensor>,
        extra: &[Option<&Tensor>],
    ) -> Result<Tensor> {
        let bias = bias.map(|bias| self.widened(bias)).transpose()?;
        let bias = bias.as_ref();
        let extra = extra
            .iter()
            .map(|row| row.map(|row| self.widened(row)).transpose())
            .collect::<Result<Vec<Option<Tensor>>>>()?;
        let extra: Vec<Option<&Tensor>> = extra.iter().map(Option::as_ref).collect();
        let layouts: Vec<Option<&Layout>> = extra.iter().map(|row| row.map(Tensor::layout)).collect();
        let operations = 2.0 * x.layout().len() as f64 * w.shape()[0] as f64;
        let gpu = self.gpu.clone();
        let capabilities = gpu.capabilities_for(operations, self.may_submit())?;
        let plan = plan::project(x.operand(), w.operand(), bias.map(Tensor::layout), &layouts, &capabilities)?;
        let shape = [x.shape()[0], x.shape()[1] + extra.len(), w.shape()[0]];
        let layout = Layout::contiguous(&shape)?;
        let y = self.output("projection", layout, x.dtype())?;
        self.add(plan, |slot| {
            Some(buffer_of(match slot {
                Slot::Q => x,
                Slot::K => w,
                Slot::Output => &y,
                Slot::Bias(0) => bias?,
                Slot::Bias(n) => (*extra.get(n - 1)?)?,
                _ => return None,
            }))
            .cloned()
        })?;
        Ok(y)
    }

    pub fn attention(
        &mut self,
        problem: &Problem,
        operands: &Operands,
        wanted: Wanted,
        output: Option<&Tensor>,
        output_layout: Layout,
    ) -> Result<Attended> {
        let Operands { q, k, v, masks, biases, relative, rotary, sink } = operands;
        let biases = biases.iter().map(|bias| self.widened(bias)).collect::<Result<Vec<_>>>()?;
        let sink = sink.as_ref().map(|sink| self.widened(sink)).transpose()?;
        let dtype = q.dtype();
        let asked_for = output_layout.clone();
        let output_layout = output.map_or(output_layout, |output| output.layout().clone());
        let stored = match output {
            Some(output) => output.stored(),
            None if is_wide(&output_layout) => dtype,
            None => Dtype::F32,
        };
        if stored != Dtype::F32 && !is_wide(&output_layout) {
            return Err(value_error!(
                "an output of {stored} must have rows, strides and an offset of whole fours: shape {:?}, strides {:?}, \
                 offset {}",
                output_layout.shape(),
                output_layout.strides(),
                output_layout.offset()
            ));
        }
        let mut planned = AttentionOperands {
            q: q.operand(),
            k: k.operand(),
            v: v.operand(),
            output: Operand { layout: &output_layout, stored },
            masks: masks.iter().map(|mask| (mask.tensor().layout(), mask.meaning())).collect(),
            biases: biases.iter().map(Tensor::layout).collect(),
            relative: relative.as_ref().map(Relative::operand),
            rotary: rotary.as_ref().map(|(rotary, _)| rotary.rotation().operand()),
            sink: sink.as_ref().map(Tensor::layout),
            lse: wanted.lse,
            weights: wanted.weights == Weights::PerHead,
            averaged: wanted.weights == Weights::Averaged,
            stage: wanted.scores,
            method: wanted.method,
        };
        if wanted.method == Method::Auto {
            let masked = !masks.is_empty() || !biases.is_empty();
            let class = ShapeClass::of(problem, [q, k, v].map(|x| x.stored()), masked);
            planned.method = match self.gpu.tuned(&class) {
                Some(Method::ThreePasses)
                    if !three_passes_compete(problem) || output.is_some() && stored != Dtype::F32 =>
                {
                    Method::Auto
                }
                found => found.unwrap_or_default(),
            };
        }
        let gpu = self.gpu.clone();
        let capabilities = gpu.capabilities_for(problem.operations(), self.may_submit())?;
        let mut plan = match plan::attention(problem, &planned, &capabilities) {
            // Where the kernel cannot turn them, queries and keys are turned before it runs.
            Err(_) if let Some((rotary, rows)) = rotary => {
                let mut turn = |x: &Tensor, rows: &Rows| {
                    let &[b, h, i, d] = x.shape() else { unreachable!("four axes") };
                    self.rotate(x, rotary.rotation(), rows, in_order_of(x.layout(), [b, h, i, d])?)
                };
                let (q, k) = (turn(q, &rows[0])?, turn(k, &rows[1])?);
                let turned = Operands { q, k, rotary: None, ..operands.clone() };
                return self.attention(problem, &turned, wanted, output, asked_for);
            }
            // What was found on one call of the class need not fit every other.
            Err(_) if planned.method != wanted.method => {
                planned.method = wanted.method;
                plan::attention(problem, &planned, &capabilities)
            }
            plan => plan,
        }?;
        if wanted.method == Method::Auto && planned.method != Method::Auto {
            plan.why = format!("tuned for such calls: {}", plan.why);
        }
        let square = |recording: &Recording, what: &str, layout: &Option<Layout>| {
            let make = |layout: &Layout| recording.output(what, layout.clone(), dtype);
            layout.as_ref().map(make).transpose()
        };
        let weights = square(self, "weights", &plan.weights)?;
        let averaged = square(self, "averaged weights", &plan.averaged)?;
        let stage = square(self, "scores", &plan.stage)?;
        let lse = wanted
            .lse
            .then(|| {
                let layout = Layout::contiguous(&[problem.batch, problem.heads_q, problem.len_q])?;
                self.output("lse", layout, Dtype::F32)
            })
            .transpose()?;
        let output = match output {
            Some(output) if plan.output == stored => output.clone(),
            Some(_) => {
                return Err(value_error!(
                    "three passes add up their output in f32; an output buffer of {stored} needs the fused method"
                ));
            }
            None => self.output_stored("output", output_layout, dtype, plan.output)?,
        };
        self.add(plan, |slot| {
            Some(buffer_of(match slot {
                Slot::Q => q,
                Slot::K => k,
                Slot::V => v,
                Slot::Mask(n) => masks.get(n)?.tensor(),
                Slot::Bias(n) => biases.get(n)?,
                Slot::Relative => &relative.as_ref()?.table,
                Slot::Angles => rotary.as_ref()?.0.rotation().fused,
                Slot::Sink => sink.as_ref()?,
                Slot::Output => &output,
                Slot::Lse => lse.as_ref()?,
                Slot::Weights => weights.as_ref()?,
                Slot::Averaged => averaged.as_ref()?,
                Slot::Stage => stage.as_ref()?,
                _ => return None,
            }))
            .cloned()
        })?;
        let scores = match wanted.scores {
            Some(ScoreStage::Weights) => weights.clone(),
            _ => stage,
        };
        let weights = match wanted.weights {
            Weights::None => None,
            Weights::PerHead => weights,
            Weights::Averaged => averaged,
        };
        Ok(Attended { output, lse, weights, scores })
    }

    pub fn inspect(
        &mut self,
        problem: &Problem,
        operands: &Operands,
        lse: &Tensor,
        chosen: &Chosen,
    ) -> Result<Inspected> {
        let Operands { q, k, masks, biases, relative, .. } = operands;
        let biases = biases.iter().map(|bias| self.widened(bias)).collect::<Result<Vec<_>>>()?;
        let lse = &self.widened(lse)?;
        let gpu = self.gpu.clone();
        let capabilities = gpu.capabilities_for(problem.operations(), self.may_submit())?;
        let plan = plan::inspect(
            problem,
            &InspectOperands {
                q: q.operand(),
                k: k.operand(),
                lse: lse.layout(),
                masks: masks.iter().map(|mask| (mask.tensor().layout(), mask.meaning())).collect(),
                biases: biases.iter().map(Tensor::layout).collect(),
                relative: relative.as_ref().map(Relative::operand),
                heads: &chosen.heads,
                queries: chosen.queries.clone(),
                weights: chosen.weights,
                column_sums: chosen.column_sums,
                entropy: chosen.entropy,
            },
            &capabilities,
        )?;
        let result = |what: &str, layout: &Option<Layout>, dtype| {
            let make = |layout: &Layout| self.output(what, layout.clone(), dtype);
            layout.as_ref().map(make).transpose()
        };
        let inspected = Inspected {
            weights: result("weights", &plan.weights, q.dtype())?,
            column_sums: result("column sums", &plan.column_sums, Dtype::F32)?,
            entropy: result("entropies", &plan.entropy, Dtype::F32)?,
        };
        self.add(plan, |slot| {
            Some(buffer_of(match slot {
                Slot::Q => q,
                Slot::K => k,
                Slot::Lse => lse,
                Slot::Mask(n) => masks.get(n)?.tensor(),
                Slot::Bias(n) => biases.get(n)?,
                Slot::Relative => &relative.as_ref()?.table,
                Slot::Weights => inspected.weights.as_ref()?,
                Slot::ColumnSums => inspected.column_sums.as_ref()?,
                Slot::Entropy => inspected.entropy.as_ref()?,
                _ => return None,
            }))
            .cloned()
        })?;
        Ok(inspected)
    }

    /// Sequences one behind another: operands `[1, h, total, d]`; `output` has the layout of the result.
    pub fn packed(
        &mut self,
        problem: &Problem,
        operands: &Operands,
        sequences: &[Sequence],
        wanted: Wanted,
        layout: Layout,
    ) -> Result<Attended> {
        let Operands { q, k, v, sink, .. } = operands;
        let sink = sink.as_ref().map(|sink| self.widened(sink)).transpose()?;
        let dtype = q.dtype();
        let stored = if is_wide(&layout) { dtype } else { Dtype::F32 };
        let operands = AttentionOperands {
            q: q.operand(),
            k: k.operand(),
            v: v.operand(),
            output: Operand { layout: &layout, stored },
            masks: Vec::new(),
            biases: Vec::new(),
            relative: None,
            rotary: None,
            sink: sink.as_ref().map(Tensor::layout),
            lse: wanted.lse,
            weights: false,
            averaged: false,
            stage: None,
            method: wanted.method,
        };
        let pairs = |one: &Sequence| one.len_q as f64 * one.len_k as f64;
        let per_pair = (problem.heads_q * 2 * (problem.dim_k + problem.dim_v)) as f64;
        let operations = sequences.iter().map(pairs).sum::<f64>() * per_pair;
        let capabilities = self.gpu.capabilities_for(operations, self.may_submit())?;
        let plan = plan::packed(problem, &operands, sequences, &capabilities)?;
        let lse_layout = Layout::contiguous(&[1, problem.heads_q, problem.len_q])?;
        let lse = wanted.lse.then(|| self.output("lse", lse_layout, Dtype::F32)).transpose()?;
        let output = self.output_stored("output", layout, dtype, stored)?;
        self.add(plan, |slot| {
            Some(buffer_of(match slot {
                Slot::Q => q,
                Slot::K => k,
                Slot::V => v,
                Slot::Sink => sink.as_ref()?,
                Slot::Output => &output,
                Slot::Lse => lse.as_ref()?,
                _ => return None,
            }))
            .cloned()
        })?;
        Ok(Attended { output, lse, weights: None, scores: None })
    }

    pub fn softmax(&mut self, x: &Tensor, axis: usize) -> Result<Tensor> {
        let rank = x.layout().rank();
        // The axis goes last, what is before it becomes three axes.
        let mut order: Vec<usize> = (0..rank).filter(|&a| a != axis).collect();
        order.push(axis);
        let mut layout = x.layout().permute(&order)?;
        while layout.rank() < 4 {
            layout = layout.unsqueeze(0)?;
        }
        if layout.rank() > 4 {
            return Err(value_error!("softmax of a tensor with {rank} axes: at most 4 are supported on an adapter"));
        }
        let plan = plan::softmax(Operand { layout: &layout, stored: x.stored() }, &self.gpu.0.capabilities)?;
        let padded = plan.weights.clone().expect("a softmax has a result");
        let out = self.output("softmax", padded, x.dtype())?;
        self.add(plan, |slot| match slot {
            Slot::Q => Some(buffer_of(x).clone()),
            Slot::Output => Some(buffer_of(&out).clone()),
            _ => None,
        })?;
        // Back to the caller's axes.
        let mut layout = out.layout().clone();
        while layout.rank() > rank {
            layout = layout.select(0, 0)?;
        }
        let mut back = vec![0; rank];
        for (at, &a) in order.iter().enumerate() {
            back[a] = at;
        }
        Ok(out.with_layout(layout.permute(&back)?))
    }

    /// Copies rows of X into Y, a cache whose rows are padded to whole vec4s: one place per batch entry.
    pub fn scatter(&mut self, x: &Tensor, y: &Tensor, places: &[Place]) -> Result<()> {
        let (from, to) = (buffer_of(x), buffer_of(y));
        if from.is(to) {
            return Err(value_error!(
                "rows cannot be copied within one buffer: the source is a view of the cache itself"
            ));
        }
        let plan = plan::scatter(x.operand(), y.operand(), places, &self.gpu.0.capabilities)?;
        self.add(plan, |slot| match slot {
            Slot::Q => Some(from.clone()),
            Slot::Output => Some(to.clone()),
            _ => None,
        })
    }

    /// X `[b, h, i, d]` turned by the angles of its rows, in a tensor of `layout`.
    pub fn rotate(&mut self, x: &Tensor, rotation: Rotation<'_>, rows: &Rows, layout: Layout) -> Result<Tensor> {
        let Rotation { table, pairs, interleaved, .. } = rotation;
        let capabilities = &self.gpu.0.capabilities;
        let plan = plan::rotate(x.operand(), &layout, table.layout(), (pairs, interleaved), rows, capabilities)?;
        let y = self.output("rotated rows", layout, x.dtype())?;
        self.add(plan, |slot| match slot {
            Slot::Q => Some(buffer_of(x).clone()),
            Slot::K => Some(buffer_of(table).clone()),
            Slot::Output => Some(buffer_of(&y).clone()),
            _ => None,
        })?;
        Ok(y)
    }

    /// X `[b, i, d]` plus the rows of a table `[row, d]`, row-major.
    pub fn add_positions(&mut self, x: &Tensor, table: &Tensor, rows: &Rows) -> Result<Tensor> {
        let plan = plan::add_positions(x.operand(), table.operand(), rows, &self.gpu.0.capabilities)?;
        let y = self.output("embeddings", Layout::contiguous(x.shape())?, x.dtype())?;
        self.add(plan, |slot| match slot {
            Slot::Q => Some(buffer_of(x).clone()),
            Slot::K => Some(buffer_of(table).clone()),
            Slot::Output => Some(buffer_of(&y).clone()),
            _ => None,
        })?;
        Ok(y)
    }

    /// `factor · X[b, h, i, column of j − i]` for X `[b, h, i, column]`, row-major `[b, h, i, j]`.
    pub fn relative(&mut self, x: &Tensor, columns: &[u32], len_k: usize, factor: f32) -> Result<Tensor> {
        let x = self.widened(x)?;
        let plan = plan::relative(x.layout(), columns, len_k, factor, &self.gpu.0.capabilities)?;
        let mut shape = x.shape().to_vec();
        shape[3] = len_k;
        let bias = self.output("a bias", Layout::contiguous(&shape)?, x.dtype())?;
        self.add(plan, |slot| match slot {
            Slot::Q => Some(buffer_of(&x).clone()),
            Slot::Output => Some(buffer_of(&bias).clone()),
            _ => None,
        })?;
        Ok(bias)
    }

    /// RMSNorm, or where `centred` LayerNorm, over the last axis of X (four axes), row-major.
    pub fn normalise(
        &mut self,
        x: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        centred: bool,
        epsilon: f32,
    ) -> Result<Tensor> {
        let weight = self.widened(weight)?;
        let bias = bias.map(|bias| self.widened(bias)).transpose()?;
        let bias_layout = bias.as_ref().map(Tensor::layout);
        let capabilities = &self.gpu.0.capabilities;
        let plan = plan::normalise(x.operand(), weight.layout(), bias_layout, centred, epsilon, capabilities)?;
        let y = self.output("normalised rows", Layout::contiguous(x.shape())?, x.dtype())?;
        self.add(plan, |slot| {
            Some(buffer_of(match slot {
                Slot::Q => x,
                Slot::K => &weight,
                Slot::Bias(_) => bias.as_ref()?,
                Slot::Output => &y,
                _ => return None,
            }))
            .cloned()
        })?;
        Ok(y)
    }

    /// `X · σ(G)` of two tensors `[b, i, d]`, row-major.
    pub fn gate(&mut self, x: &Tensor, g: &Tensor) -> Result<Tensor> {
        let plan = plan::gate(x.operand(), g.operand(), &self.gpu.0.capabilities)?;
        let y = self.output("gated rows", Layout::contiguous(x.shape())?, x.dtype())?;
        self.add(plan, |slot| {
            Some(buffer_of(match slot {
                Slot::Q => x,
                Slot::K => g,
                Slot::Output => &y,
                _ => return None,
            }))
            .cloned()
        })?;
        Ok(y)
    }

    /// X (at most four axes) in a row-major buffer of f32.
    pub fn row_major(&mut self, x: &Tensor) -> Result<Tensor> {
        let mut four = x.layout().clone();
        while four.rank() < 4 {
            four = four.unsqueeze(0)?;
        }
        let plan = plan::widen(Operand { layout: &four, stored: x.stored() }, &self.gpu.0.capabilities)?;
        let copied = self.output("a row-major copy", Layout::contiguous(x.shape())?, x.dtype())?;
        self.add(plan, |slot| match slot {
            Slot::Q => Some(buffer_of(x).clone()),
            Slot::Output => Some(buffer_of(&copied).clone()),
            _ => None,
        })?;
        Ok(copied)
    }

    /// Joins two results `[b, h, i, d]` with their LSEs `[b, h, i]`.
    pub fn merge(&mut self, outputs: [&Tensor; 2], lses: [&Tensor; 2], layout: Layout) -> Result<[Tensor; 2]> {
        let dtype = outputs[0].dtype();
        let outputs = [self.widened(outputs[0])?, self.widened(outputs[1])?];
        let lses = [self.widened(lses[0])?, self.widened(lses[1])?];
        let (outputs, lses) = (outputs.each_ref(), lses.each_ref());
        let plan =
            plan::merge(outputs.map(Tensor::layout), lses.map(Tensor::layout), &layout, &self.gpu.0.capabilities)?;
        let lse_layout = Layout::contiguous(&layout.shape()[..3])?;
        let output = self.output("output", layout, dtype)?;
        let lse = self.output("lse", lse_layout, Dtype::F32)?;
        self.add(plan, |slot| {
            Some(buffer_of(match slot {
                Slot::Q => outputs[0],
                Slot::K => outputs[1],
                Slot::Bias(n) => *lses.get(n)?,
                Slot::Output => &output,
                Slot::Lse => &lse,
                _ => return None,
            }))
            .cloned()
        })?;
        Ok([output, lse])
    }

    fn bind_group(&self, pipeline: &Pipeline, bound: &Bound, parameters: Option<&GpuBuffer>) -> wgpu::BindGroup {
        let entries: Vec<_> = (bound.parts.iter())
            .map(|&(name, ref part)| wgpu::BindGroupEntry {
                // One that is not declared is refused by wgpu, with the kernel's name.
                binding: pipeline.numbers.get(name).copied().unwrap_or(u32::MAX),
                resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                    buffer: part.buffer.as_ref().or(parameters).expect("allocated where there are any").raw(),
                    offset: part.offset,
                    size: wgpu::BufferSize::new(part.size),
                }),
            })
            .collect();
        self.gpu.0.device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: Some(&bound.step.variant.name),
            layout: &pipeline.layout,
            entries: &entries,
        })
    }

    async fn pipelines(&self) -> Result<Vec<Arc<Pipeline>>> {
        let mut pipelines = Vec::with_capacity(self.steps.len());
        for bound in &self.steps {
            pipelines.push(self.gpu.pipeline(&bound.step.variant).await?);
        }
        Ok(pipelines)
    }

    fn label(&self) -> String {
        self.steps.first().map_or("nothing".into(), |bound| {
            format!("{} (with {} more steps)", bound.step.variant.name, self.steps.len() - 1)
        })
    }

    fn dispatch(
        &self,
        range: Range<usize>,
        pipelines: &[Arc<Pipeline>],
        parameters: Option<&GpuBuffer>,
        encoder: &mut wgpu::CommandEncoder,
        timestamps: Option<&wgpu::QuerySet>,
    ) {
        let (is_first, is_last) = (range.start == 0, range.end == self.steps.len());
        let (steps, pipelines) = (&self.steps[range.clone()], &pipelines[range]);
        if let Some(trace) = lock(&self.gpu.0.trace).as_mut() {
            trace.extend(steps.iter().map(|bound| Traced {
                variant: bound.step.variant.clone(),
                workgroups: bound.step.workgroups,
                why: bound.why.to_string(),
            }));
        }
        let bind = |(bound, pipeline): (&Bound, &Arc<Pipeline>)| self.bind_group(pipeline, bound, parameters);
        let groups: Vec<_> = steps.iter().zip(pipelines).map(bind).collect();
        // From the start of the first pass to the end of the last.
        let timestamp_writes =
            timestamps.filter(|_| is_first || is_last).map(|query_set| wgpu::ComputePassTimestampWrites {
                query_set,
                beginning_of_pass_write_index: is_first.then_some(0),
                end_of_pass_write_index: is_last.then_some(1),
            });
        let mut pass =
            encoder.begin_compute_pass(&wgpu::ComputePassDescriptor { label: Some("attention"), timestamp_writes });
        for ((bound, pipeline), group) in steps.iter().zip(pipelines).zip(&groups) {
            pass.set_pipeline(&pipeline.pipeline);
            pass.set_bind_group(0, group, &[]);
            pass.dispatch_workgroups(bound.step.workgroups[0], bound.step.workgroups[1], 1);
        }
    }

    /// Steps that go into one submit each: as many as take no longer than that may, by the estimate.
    fn submits(&self) -> Vec<Range<usize>> {
        let most = self.gpu.operations_per_submit();
        let (mut ranges, mut first, mut operations) = (Vec::new(), 0, 0.0);
        for (n, bound) in self.steps.iter().enumerate() {
            let more = bound.step.cost.operations;
            if n > first && operations + more > most {
                ranges.push(first..n);
                (first, operations) = (n, 0.0);
            }
            operations += more;
        }
        if first < self.steps.len() {
            ranges.push(first..self.steps.len());
        }
        ranges
    }

    /// As [`Recording::submit`], whatever it takes and out of sight of [`Gpu::trace`]: what measures the adapter.
    #[cfg(not(target_arch = "wasm32"))]
    pub async fn submit_measured(self) -> Result<()> {
        let pipelines = self.pipelines().await?;
        let gpu = self.gpu.clone();
        gpu.scoped(&self.label(), || {
            let trace = lock(&gpu.0.trace).take();
            let mut encoder = gpu.0.device.create_command_encoder(&Default::default());
            self.dispatch(0..self.steps.len(), &pipelines, None, &mut encoder, None);
            gpu.0.queue.submit([encoder.finish()]);
            *lock(&gpu.0.trace) = trace;
        })
        .await
    }

    /// One encoder, one compute pass and one submit; several of each where they would take too long.
    pub async fn submit(self) -> Result<()> {
        self.gpu.check()?;
        if self.steps.is_empty() {
            return Ok(());
        }
        let pipelines = self.pipelines().await?;
        let gpu = self.gpu.clone();
        let parameters = match &self.parameters {
            Some(bytes) => Some(gpu.allocate("parameters", bytes.len() as u64, Purpose::Parameters)?),
            None => None,
        };
        gpu.scoped(&self.label(), || {
            if let (Some(buffer), Some(bytes)) = (&parameters, &self.parameters) {
                gpu.0.queue.write_buffer(buffer.raw(), 0, bytes);
            }
            for range in self.submits() {
                let mut encoder = gpu.0.device.create_command_encoder(&Default::default());
                self.dispatch(range, &pipelines, parameters.as_ref(), &mut encoder, None);
                gpu.0.queue.submit([encoder.finish()]);
            }
        })
        .await
    }

    /// As [`Recording::submit`]; waits for the end and tells what ran.
    pub async fn submit_profiled(self) -> Result<Profile> {
        let mut profile = Profile::default();
        for bound in &self.steps {
            if !profile.kernels.contains(&bound.step.variant.name) {
                profile.kernels.push(bound.step.variant.name.clone());
            }
        }
        let gpu = self.gpu.clone();
        if self.steps.is_empty() || !gpu.0.device.features().contains(wgpu::Features::TIMESTAMP_QUERY) {
            self.submit().await?;
            #[cfg(not(target_arch = "wasm32"))]
            gpu.wait()?;
            return Ok(profile);
        }
        gpu.check()?;
        let pipelines = self.pipelines().await?;
        let bytes = 2 * u64::from(wgpu::QUERY_SIZE);
        let label = Some("timestamps");
        let buffer = gpu
            .scoped(&self.label(), || {
                let device = &gpu.0.device;
                let queries = device.create_query_set(&wgpu::QuerySetDescriptor {
                    label,
                    ty: wgpu::QueryType::Timestamp,
                    count: 2,
                });
                let buffer = device.create_buffer(&wgpu::BufferDescriptor {
                    label,
                    size: bytes,
                    usage: wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC,
                    mapped_at_creation: false,
                });
                for range in self.submits() {
                    let is_last = range.end == self.steps.len();
                    let mut encoder = device.create_command_encoder(&Default::default());
                    self.dispatch(range, &pipelines, None, &mut encoder, Some(&queries));
                    if is_last {
                        encoder.resolve_query_set(&queries, 0..2, &buffer, 0);
                    }
                    gpu.0.queue.submit([encoder.finish()]);
                }
                buffer
            })
            .await?;
        let ticks: [u64; 2] = gpu.adopt(&buffer).read(0..bytes, bytemuck::pod_read_unaligned).await?;
        // A driver that does not really count leaves zeros.
        let elapsed = ticks[1].checked_sub(ticks[0]).filter(|&elapsed| elapsed > 0);
        profile.gpu_time = elapsed.map(|elapsed| {
            Duration::from_nanos((elapsed as f64 * f64::from(gpu.0.queue.get_timestamp_period())) as u64)
        });
        Ok(profile)
    }

    /// Into the caller's encoder: one compute pass, no submit.
    pub fn encode(self, encoder: &mut wgpu::CommandEncoder) -> Result<()> {
        if self.steps.is_empty() {
            return self.gpu.check();
        }
        let slices = self.slices()?;
        slices.record(0..slices.recording.steps.len(), encoder)
    }

    /// For the caller's encoders, in slices that each take no longer than a submit may.
    pub fn slices(self) -> Result<EncodeSlices> {
        self.gpu.check()?;
        #[cfg(not(target_arch = "wasm32"))]
        let pipelines = pollster::block_on(self.pipelines())?;
        #[cfg(target_arch = "wasm32")]
        let pipelines = {
            let ready: Vec<_> = {
                let cache = lock(&self.gpu.0.pipelines);
                self.steps.iter().map(|bound| cache.get(&bound.step.variant).cloned()).collect()
            };
            ready.into_iter().collect::<Option<Vec<_>>>().ok_or_else(|| {
                value_error!("a browser compiles asynchronously: run forward_async once on these shapes before encode")
            })?
        };
        let ranges = self.submits();
        Ok(EncodeSlices { recording: self, pipelines, ranges })
    }
}
