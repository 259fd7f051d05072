//! Compiling variants and executing plans.

use std::sync::Arc;

use super::buffers::{GpuBuffer, Purpose};
use super::{Gpu, lock};
use crate::attention::{Attended, Operands, Wanted, Weights};
use crate::device::Device;
use crate::error::{Result, value_error};
use crate::inspect::{Chosen, Inspected};
use crate::kernels::plan::{self, AttentionOperands, InspectOperands, padded_bytes};
use crate::kernels::{Plan, Slot, Step, Variant};
use crate::problem::{Dtype, Layout, Problem, ScoreStage};
use crate::tensor::{Storage, Tensor};

/// A compiled variant.
pub struct Pipeline {
    pipeline: wgpu::ComputePipeline,
    layout: wgpu::BindGroupLayout,
}

/// The bindings a WGSL text declares: number, and whether it is only read.
fn declared_bindings(source: &str) -> impl Iterator<Item = (u32, wgpu::BufferBindingType)> + '_ {
    source.lines().filter_map(|line| {
        let rest = line.strip_prefix("@group(0) @binding(")?;
        let (number, rest) = rest.split_once(')')?;
        let kind = if rest.contains("var<uniform>") {
            wgpu::BufferBindingType::Uniform
        } else {
            wgpu::BufferBindingType::Storage { read_only: rest.contains("var<storage, read>") }
        };
        Some((number.parse().ok()?, kind))
    })
}

impl Gpu {
    /// The compiled variant; compiles it the first time.
    async fn pipeline(&self, variant: &Variant) -> Result<Arc<Pipeline>> {
        if let Some(pipeline) = lock(&self.0.pipelines).get(variant) {
            return Ok(pipeline.clone());
        }
        let mut source = variant.source()?;
        if variant.uses_subgroups() && self.0.info.backend == wgpu::Backend::BrowserWebGpu {
            // Browsers ask for the line, naga refuses it.
            source.insert_str(0, "enable subgroups;\n");
        }
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
            .map(|(binding, ty)| wgpu::BindGroupLayoutEntry {
                binding,
                visibility: wgpu::ShaderStages::COMPUTE,
                ty: wgpu::BindingType::Buffer { ty, has_dynamic_offset: false, min_binding_size: None },
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
                // Only softmax has workgroup memory, and writes it before it reads.
                zero_initialize_workgroup_memory: false,
                ..Default::default()
            },
            cache: None,
        });
        Pipeline { pipeline, layout }
    }
}

/// A planned step with its real buffers.
struct Bound {
    step: Step,
    buffers: Vec<GpuBuffer>,
}

/// Steps on one adapter, to run in one compute pass.
pub(crate) struct Recording {
    device: Device,
    gpu: Gpu,
    steps: Vec<Bound>,
    purpose: Purpose,
}

fn buffer_of(tensor: &Tensor) -> &GpuBuffer {
    match tensor.storage() {
        Storage::Gpu(buffer) => buffer,
        #[cfg(feature = "cpu")]
        _ => unreachable!("devices are checked before"),
    }
}

impl Recording {
    pub fn new(gpu: &Gpu) -> Recording {
        Recording { device: Device::Gpu(gpu.clone()), gpu: gpu.clone(), steps: Vec::new(), purpose: Purpose::Call }
    }

    /// For work that waits in a caller's encoder.
    pub fn for_encoder(gpu: &Gpu) -> Recording {
        Recording { purpose: Purpose::Encoder, ..Recording::new(gpu) }
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    fn output(&self, what: &str, layout: Layout, bytes: u64, dtype: Dtype) -> Result<Tensor> {
        Ok(Tensor::from_gpu(self.gpu.allocate(what, bytes, Purpose::Call)?, layout, dtype))
    }

    fn add(&mut self, plan: Plan, find: impl Fn(Slot) -> Option<GpuBuffer>) -> Result<()> {
        let scratch = plan
            .scratch
            .iter()
            .map(|&bytes| self.gpu.allocate("working memory", bytes, self.purpose))
            .collect::<Result<Vec<_>>>()?;
        let bands = (!plan.bands.is_empty()).then(|| {
            let usage = wgpu::BufferUsages::STORAGE;
            self.gpu.adopt(&self.gpu.constant(bytemuck::cast_slice(&plan.bands), usage))
        });
        for step in plan.steps {
            let buffers = step
                .bindings
                .iter()
                .map(|binding| match binding.slot {
                    Slot::Scratch(n) => Ok(scratch[n].clone()),
                    Slot::Bands => bands.clone().ok_or(Slot::Bands),
                    slot => find(slot).ok_or(slot),
                })
                .collect::<std::result::Result<Vec<_>, Slot>>()
                .map_err(|slot| value_error!("{} was planned without a buffer for {slot:?}", step.variant.name))?;
            self.steps.push(Bound { step, buffers });
        }
        Ok(())
    }

    pub fn project(
        &mut self,
        x: &Tensor,
        w: &Tensor,
        bias: Option<&Tensor>,
        extra: &[Option<&Tensor>],
    ) -> Result<Tensor> {
        let layouts: Vec<Option<&Layout>> = extra.iter().map(|row| row.map(Tensor::layout)).collect();
        let plan = plan::project(x.layout(), w.layout(), bias.map(Tensor::layout), &layouts, &self.gpu.0.capabilities)?;
        let shape = [x.shape()[0], x.shape()[1] + extra.len(), w.shape()[0]];
        let layout = Layout::contiguous(&shape)?;
        let bytes = padded_bytes(&layout);
        let y = self.output("projection", layout, bytes, x.dtype())?;
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
        let Operands { q, k, v, masks, biases } = operands;
        let output_layout = output.map_or(output_layout, |output| output.layout().clone());
        let plan = plan::attention(
            problem,
            &AttentionOperands {
                q: q.layout(),
                k: k.layout(),
                v: v.layout(),
                output: &output_layout,
                masks: masks.iter().map(|mask| (mask.tensor().layout(), mask.meaning())).collect(),
                biases: biases.iter().map(Tensor::layout).collect(),
                lse: wanted.lse,
                weights: wanted.weights == Weights::PerHead,
                averaged: wanted.weights == Weights::Averaged,
                stage: wanted.scores,
                method: wanted.method,
            },
            &self.gpu.0.capabilities,
        )?;
        let dtype = q.dtype();
        let square = |recording: &Recording, what: &str, layout: &Option<Layout>| {
            let make = |layout: &Layout| recording.output(what, layout.clone(), padded_bytes(layout), dtype);
            layout.as_ref().map(make).transpose()
        };
        let weights = square(self, "weights", &plan.weights)?;
        let averaged = square(self, "averaged weights", &plan.averaged)?;
        let stage = square(self, "scores", &plan.stage)?;
        let lse = wanted
            .lse
            .then(|| {
                let layout = Layout::contiguous(&[problem.batch, problem.heads_q, problem.len_q])?;
                let bytes = padded_bytes(&layout);
                self.output("lse", layout, bytes, Dtype::F32)
            })
            .transpose()?;
        let output = match output {
            Some(output) => output.clone(),
            None => {
                let bytes = padded_bytes(&output_layout);
                self.output("output", output_layout, bytes, dtype)?
            }
        };
        self.add(plan, |slot| {
            Some(buffer_of(match slot {
                Slot::Q => q,
                Slot::K => k,
                Slot::V => v,
                Slot::Mask(n) => masks.get(n)?.tensor(),
                Slot::Bias(n) => biases.get(n)?,
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
        let Operands { q, k, masks, biases, .. } = operands;
        let plan = plan::inspect(
            problem,
            &InspectOperands {
                q: q.layout(),
                k: k.layout(),
                lse: lse.layout(),
                masks: masks.iter().map(|mask| (mask.tensor().layout(), mask.meaning())).collect(),
                biases: biases.iter().map(Tensor::layout).collect(),
                heads: &chosen.heads,
                queries: chosen.queries.clone(),
                weights: chosen.weights,
                column_sums: chosen.column_sums,
                entropy: chosen.entropy,
            },
            &self.gpu.0.capabilities,
        )?;
        let result = |what: &str, layout: &Option<Layout>, dtype| {
            let make = |layout: &Layout| self.output(what, layout.clone(), padded_bytes(layout), dtype);
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
                Slot::Weights => inspected.weights.as_ref()?,
                Slot::ColumnSums => inspected.column_sums.as_ref()?,
                Slot::Entropy => inspected.entropy.as_ref()?,
                _ => return None,
            }))
            .cloned()
        })?;
        Ok(inspected)
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
        let plan = plan::softmax(&layout, &self.gpu.0.capabilities)?;
        let padded = plan.weights.clone().expect("a softmax has a result");
        let bytes = padded_bytes(&padded);
        let out = self.output("softmax", padded, bytes, x.dtype())?;
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

    fn bind_group(&self, pipeline: &Pipeline, bound: &Bound) -> wgpu::BindGroup {
        let uniform = self.gpu.constant(&bound.step.params, wgpu::BufferUsages::UNIFORM);
        let mut entries = vec![wgpu::BindGroupEntry { binding: 0, resource: uniform.as_entire_binding() }];
        for (binding, buffer) in bound.step.bindings.iter().zip(&bound.buffers) {
            let total = buffer.raw().size();
            // An operand part without elements may begin at the buffer's end: bind its start instead.
            let offset = if binding.offset >= total { 0 } else { binding.offset };
            let size = binding.size.min((total - offset) / 4 * 4);
            entries.push(wgpu::BindGroupEntry {
                binding: binding.binding,
                resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                    buffer: buffer.raw(),
                    offset,
                    size: wgpu::BufferSize::new(size),
                }),
            });
        }
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

    fn dispatch(&self, pipelines: &[Arc<Pipeline>], encoder: &mut wgpu::CommandEncoder) {
        let groups: Vec<_> = self.steps.iter().zip(pipelines).map(|(bound, p)| self.bind_group(p, bound)).collect();
        let mut pass = encoder
            .begin_compute_pass(&wgpu::ComputePassDescriptor { label: Some("attention"), timestamp_writes: None });
        for ((bound, pipeline), group) in self.steps.iter().zip(pipelines).zip(&groups) {
            pass.set_pipeline(&pipeline.pipeline);
            pass.set_bind_group(0, group, &[]);
            pass.dispatch_workgroups(bound.step.workgroups[0], bound.step.workgroups[1], 1);
        }
    }

    /// One encoder, one compute pass, one submit.
    pub async fn submit(self) -> Result<()> {
        self.gpu.check()?;
        if self.steps.is_empty() {
            return Ok(());
        }
        let pipelines = self.pipelines().await?;
        let gpu = self.gpu.clone();
        gpu.scoped(&self.label(), || {
            let mut encoder = gpu.0.device.create_command_encoder(&Default::default());
            self.dispatch(&pipelines, &mut encoder);
            gpu.0.queue.submit([encoder.finish()]);
        })
        .await
    }

    /// Into the caller's encoder: one compute pass, no submit.
    pub fn encode(self, encoder: &mut wgpu::CommandEncoder) -> Result<()> {
        self.gpu.check()?;
        if self.steps.is_empty() {
            return Ok(());
        }
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
        self.gpu.scoped_now(&self.label(), || self.dispatch(&pipelines, encoder))
    }
}
