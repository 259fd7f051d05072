//! Compiles variants and executes plans.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use super::buffers::{GpuBuffer, Purpose, Recorded};
use super::{Gpu, lock};
use crate::error::{Result, value_error};
use crate::kernels::{Capabilities, Plan, Slot, Step, Variant};
#[cfg(not(target_arch = "wasm32"))]
use crate::wait::{may_block, wait_for};

/// A compiled variant.
pub struct Pipeline {
    pipeline: wgpu::ComputePipeline,
    layout: wgpu::BindGroupLayout,
    /// The binding number of each variable.
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
    /// The WGSL of a variant, as compiled on this adapter.
    pub fn source(&self, variant: &Variant) -> Result<String> {
        if self.0.loads_64_bits {
            return self.rewritten(&variant.loading_64_bits());
        }
        let mut source = self.rewritten(variant)?;
        if variant.uses_subgroups() && self.0.info.backend == wgpu::Backend::BrowserWebGpu {
            // Browsers require this line; naga refuses it.
            source.insert_str(0, "enable subgroups;\n");
        }
        Ok(source)
    }

    /// The WGSL of a variant in the form that any adapter accepts.
    pub(super) fn rewritten(&self, variant: &Variant) -> Result<String> {
        let source = variant.source()?;
        let changed = self.0.rewrite.and_then(|rewrite| rewrite(variant, &source));
        Ok(changed.unwrap_or(source))
    }

    /// The compiled variant; compiled on first use.
    pub(super) async fn pipeline(&self, variant: &Variant) -> Result<Arc<Pipeline>> {
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
                // Kernels write workgroup memory before they read it.
                zero_initialize_workgroup_memory: false,
                ..Default::default()
            },
            cache: None,
        });
        let numbers = declared_bindings(source).map(|one| (one.name.to_string(), one.number)).collect();
        Pipeline { pipeline, layout, numbers }
    }
}

/// The kernels that ran in a call, and how long they took.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Profile {
    /// The kernel variants in the order they first ran, each once; none on the CPU backend.
    pub kernels: Vec<String>,
    /// From the start to the end of the compute pass, by the adapter's own clock. `None` on the CPU backend, and if the
    /// device lacks [`wgpu::Features::TIMESTAMP_QUERY`].
    pub gpu_time: Option<Duration>,
    /// How long the CPU backend's threads computed, on average over all of them. The rest of a call goes to planning,
    /// memory, waking threads and waiting for them. `None` on an adapter.
    pub cpu_time: Option<Duration>,
}

/// A kernel dispatch.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Traced {
    /// The kernel; [`Gpu::source`] gives its WGSL.
    pub variant: Variant,
    /// Number of workgroups in x and y.
    pub workgroups: [u32; 2],
    /// Why attention runs on these kernels; empty if there is only one way.
    pub why: String,
}

/// Work for a caller's encoders, split into slices that each take about as long as a submit may
/// ([`GpuOptions::seconds_per_submit`](crate::GpuOptions::seconds_per_submit)). Windows and some drivers reset a GPU
/// that works on one submit for two seconds.
///
/// Encode the slices in order, each into its own encoder, and submit the encoders in that order.
pub struct EncodeSlices {
    steps: Steps,
    pipelines: Vec<Arc<Pipeline>>,
    ranges: Vec<Range<usize>>,
}

impl std::fmt::Debug for EncodeSlices {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "EncodeSlices({} of {:.3} s on {:?})", self.len(), self.seconds(), self.steps.gpu)
    }
}

impl EncodeSlices {
    /// Number of slices.
    pub fn len(&self) -> usize {
        self.ranges.len()
    }
    /// True if there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }
    /// A conservative estimate of the total time of all slices, from what [`Gpu::multiply_add_ceiling`] measured, or
    /// from a guess for the kind of adapter if it was not measured.
    pub fn seconds(&self) -> f64 {
        let operations: f64 = self.steps.bound.iter().map(|bound| bound.step.cost.operations).sum();
        operations / self.steps.gpu.operations_per_second()
    }
    /// Records slice `n`: one compute pass, no submit.
    pub fn encode(&self, n: usize, encoder: &mut wgpu::CommandEncoder) -> Result<()> {
        let Some(range) = self.ranges.get(n) else {
            return Err(value_error!("there is no slice {n}: there are {}, from 0 on", self.len()));
        };
        self.record(range.clone(), encoder)?;
        let buffers = self.steps.bound[range.clone()].iter().flat_map(|bound| &bound.parts);
        self.steps.gpu.recorded(encoder).hold(buffers.filter_map(|(_, part)| part.buffer.clone()));
        Ok(())
    }

    fn record(&self, range: Range<usize>, encoder: &mut wgpu::CommandEncoder) -> Result<()> {
        let dispatch = || self.steps.dispatch(range, &self.pipelines, None, encoder, None);
        self.steps.gpu.scoped_now(&self.steps.label(), dispatch)
    }
}

/// A part of a buffer.
#[derive(Clone)]
pub(super) struct Part {
    /// `None`: the steps' own parameters.
    pub buffer: Option<GpuBuffer>,
    pub offset: u64,
    pub size: u64,
}

/// A planned step with its buffers.
pub(super) struct Bound {
    pub step: Step,
    why: Arc<str>,
    /// The uniform block first.
    pub parts: Vec<(&'static str, Part)>,
}

/// Steps on one adapter that run in one compute pass.
pub(crate) struct Steps {
    pub gpu: Gpu,
    pub(super) bound: Vec<Bound>,
    /// Whether they are recorded into a caller's encoder.
    are_encoded: bool,
    /// What was recorded before into the target encoder, if that is a single known one.
    recorded: Option<Arc<Recorded>>,
    /// Uniform blocks and tables that go into one pooled buffer. `None`: each is cached by its content.
    pub(super) parameters: Option<Vec<u8>>,
    /// Whether this measures the adapter: in one submit, however long it takes, and hidden from [`Gpu::trace`].
    measures: bool,
}

/// An offset alignment of uniform blocks that every adapter accepts.
const ALIGNMENT: usize = 256;

impl Steps {
    pub fn new(gpu: &Gpu) -> Steps {
        Steps {
            gpu: gpu.clone(),
            bound: Vec::new(),
            are_encoded: false,
            recorded: None,
            parameters: None,
            measures: false,
        }
    }

    /// For a decoding step, whose parameters change every time and are not worth caching.
    pub fn for_step(gpu: &Gpu) -> Steps {
        Steps { parameters: Some(Vec::new()), ..Steps::new(gpu) }
    }

    /// For work that is recorded into one or several of a caller's encoders.
    pub fn for_encoders(gpu: &Gpu, encoder: Option<&wgpu::CommandEncoder>) -> Steps {
        let recorded = encoder.map(|encoder| gpu.recorded(encoder));
        Steps { are_encoded: true, recorded, ..Steps::new(gpu) }
    }

    #[cfg(not(target_arch = "wasm32"))]
    pub(super) fn for_measuring(gpu: &Gpu) -> Steps {
        Steps { measures: true, ..Steps::new(gpu) }
    }

    /// Memory that is written before it is read.
    pub fn allocate(&self, what: &str, bytes: u64) -> Result<GpuBuffer> {
        self.gpu.allocate_for(self.recorded.as_ref(), what, bytes, Purpose::Call)
    }

    /// The adapter's capabilities for work of `operations` operations.
    pub fn capabilities_for(&self, operations: f64) -> Result<Cow<'_, Capabilities>> {
        // Measuring the adapter needs a submit, which a caller who only encodes did not ask for, and it would block an
        // executor's thread.
        #[cfg(not(target_arch = "wasm32"))]
        let may_measure = !self.are_encoded && may_block();
        #[cfg(target_arch = "wasm32")]
        let may_measure = false;
        self.gpu.capabilities_for(operations, may_measure)
    }

    /// A plan for work of `operations` operations, whose kernels the driver accepts.
    pub fn accepted(&self, operations: f64, plan: impl Fn(&Capabilities) -> Result<Plan>) -> Result<Plan> {
        loop {
            let made = plan(&*self.capabilities_for(operations)?)?;
            #[cfg(not(target_arch = "wasm32"))]
            if may_block() && !self.gpu.accepts(&made) {
                continue;
            }
            return Ok(made);
        }
    }

    /// Adds the steps of a plan, with these buffers in its slots.
    pub fn add(&mut self, plan: Plan, buffers: &[(Slot, &GpuBuffer)]) -> Result<()> {
        let scratch =
            plan.scratch.iter().map(|&bytes| self.allocate("working memory", bytes)).collect::<Result<Vec<_>>>()?;
        let bands = self.constant(bytemuck::cast_slice(&plan.bands));
        let places = self.constant(bytemuck::cast_slice(&plan.places));
        let rows = self.constant(bytemuck::cast_slice(&plan.rows));
        let why: Arc<str> = plan.why.into();
        for step in plan.steps {
            let mut parts = vec![("params", self.constant(&step.params))];
            for binding in &step.bindings {
                let part = match binding.slot {
                    Slot::Bands if !plan.bands.is_empty() => bands.clone(),
                    Slot::Places if !plan.places.is_empty() => places.clone(),
                    Slot::Rows if !plan.rows.is_empty() => rows.clone(),
                    slot => {
                        let buffer = match slot {
                            Slot::Scratch(n) => Some(&scratch[n]),
                            slot => buffers.iter().find(|(of, _)| *of == slot).map(|&(_, buffer)| buffer),
                        };
                        let buffer = buffer.ok_or_else(|| {
                            value_error!("{} was planned without a buffer for {slot:?}", step.variant.name)
                        })?;
                        let total = buffer.raw().size();
                        // An empty part of an operand may begin at the buffer's end: bind the buffer's start instead.
                        let offset = if binding.offset >= total { 0 } else { binding.offset };
                        let size = binding.size.min((total - offset) / 4 * 4);
                        Part { buffer: Some(buffer.clone()), offset, size }
                    }
                };
                parts.push((binding.name, part));
            }
            self.bound.push(Bound { step, why: why.clone(), parts });
        }
        Ok(())
    }

    /// Stores a uniform block or a table.
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
            None => Part { buffer: Some(self.gpu.constant(bytes)), offset: 0, size: size as u64 },
        }
    }

    fn bind_group(&self, pipeline: &Pipeline, bound: &Bound, parameters: Option<&GpuBuffer>) -> wgpu::BindGroup {
        let entries: Vec<_> = (bound.parts.iter())
            .map(|&(name, ref part)| wgpu::BindGroupEntry {
                // If it is not declared, wgpu reports an error with the kernel's name.
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
        let mut pipelines = Vec::with_capacity(self.bound.len());
        for bound in &self.bound {
            pipelines.push(self.gpu.pipeline(&bound.step.variant).await?);
        }
        Ok(pipelines)
    }

    /// Compiles all pipelines.
    pub async fn compile(self) -> Result<()> {
        self.gpu.check()?;
        self.pipelines().await.map(drop)
    }

    fn label(&self) -> String {
        self.bound.first().map_or("nothing".into(), |bound| {
            format!("{} (with {} more steps)", bound.step.variant.name, self.bound.len() - 1)
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
        let (is_first, is_last) = (range.start == 0, range.end == self.bound.len());
        let (steps, pipelines) = (&self.bound[range.clone()], &pipelines[range]);
        if let Some(trace) = lock(&self.gpu.0.trace).as_mut().filter(|_| !self.measures) {
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

    /// The steps of each submit: as many as fit the time limit, by the estimate.
    fn submits(&self) -> Vec<Range<usize>> {
        let most = if self.measures { f64::INFINITY } else { self.gpu.operations_per_submit() };
        let (mut ranges, mut first, mut operations) = (Vec::new(), 0, 0.0);
        for (n, bound) in self.bound.iter().enumerate() {
            let more = bound.step.cost.operations;
            if n > first && operations + more > most {
                ranges.push(first..n);
                (first, operations) = (n, 0.0);
            }
            operations += more;
        }
        if first < self.bound.len() {
            ranges.push(first..self.bound.len());
        }
        ranges
    }

    /// One encoder, one compute pass and one submit, or several of each if one would take too long.
    pub async fn submit(self) -> Result<()> {
        self.send(false).await.map(drop)
    }

    /// Like [`Steps::submit`], but waits for the end and reports what ran.
    pub async fn submit_profiled(self) -> Result<Profile> {
        let mut profile = Profile::default();
        for bound in &self.bound {
            if !profile.kernels.contains(&bound.step.variant.name) {
                profile.kernels.push(bound.step.variant.name.clone());
            }
        }
        let gpu = &self.gpu;
        let has_clock = gpu.0.device.features().contains(wgpu::Features::TIMESTAMP_QUERY);
        let Some(timestamps) = self.send(has_clock).await? else {
            #[cfg(not(target_arch = "wasm32"))]
            gpu.wait()?;
            return Ok(profile);
        };
        let ticks: [u64; 2] = gpu.adopt(&timestamps).read(0..timestamps.size(), bytemuck::pod_read_unaligned).await?;
        // A driver without real timestamps leaves zeros.
        let elapsed = ticks[1].checked_sub(ticks[0]).filter(|&elapsed| elapsed > 0);
        profile.gpu_time = elapsed.map(|elapsed| {
            Duration::from_nanos((elapsed as f64 * f64::from(gpu.0.queue.get_timestamp_period())) as u64)
        });
        Ok(profile)
    }

    /// Submits the steps, if there are any. If `timed`, returns a buffer with the times of their start and end.
    async fn send(&self, timed: bool) -> Result<Option<wgpu::Buffer>> {
        let gpu = &self.gpu;
        gpu.check()?;
        if self.bound.is_empty() {
            return Ok(None);
        }
        let pipelines = self.pipelines().await?;
        let parameters = match &self.parameters {
            Some(bytes) => Some(gpu.allocate("parameters", bytes.len() as u64, Purpose::Parameters)?),
            None => None,
        };
        let device = &gpu.0.device;
        gpu.scoped(&self.label(), || {
            if let (Some(buffer), Some(bytes)) = (&parameters, &self.parameters) {
                gpu.0.queue.write_buffer(buffer.raw(), 0, bytes);
            }
            let label = Some("timestamps");
            let clock = timed.then(|| {
                let ty = wgpu::QueryType::Timestamp;
                let queries = device.create_query_set(&wgpu::QuerySetDescriptor { label, ty, count: 2 });
                let buffer = device.create_buffer(&wgpu::BufferDescriptor {
                    label,
                    size: 2 * u64::from(wgpu::QUERY_SIZE),
                    usage: wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC,
                    mapped_at_creation: false,
                });
                (queries, buffer)
            });
            for range in self.submits() {
                let is_last = range.end == self.bound.len();
                let mut encoder = device.create_command_encoder(&Default::default());
                let queries = clock.as_ref().map(|(queries, _)| queries);
                self.dispatch(range, &pipelines, parameters.as_ref(), &mut encoder, queries);
                if let Some((queries, buffer)) = clock.as_ref().filter(|_| is_last) {
                    encoder.resolve_query_set(queries, 0..2, buffer, 0);
                }
                gpu.0.queue.submit([encoder.finish()]);
            }
            clock.map(|(_, buffer)| buffer)
        })
        .await
    }

    /// Records into the caller's encoder: one compute pass, no submit.
    pub fn encode(self, encoder: &mut wgpu::CommandEncoder) -> Result<()> {
        if self.bound.is_empty() {
            return self.gpu.check();
        }
        let slices = self.slices()?;
        let recorded = slices.record(0..slices.steps.bound.len(), encoder);
        let Steps { gpu, bound, .. } = slices.steps;
        let parts = bound.into_iter().flat_map(|bound| bound.parts);
        gpu.recorded(encoder).hold(parts.filter_map(|(_, part)| part.buffer));
        recorded
    }

    /// Slices for the caller's encoders, each no longer than a submit may take.
    pub fn slices(self) -> Result<EncodeSlices> {
        self.gpu.check()?;
        #[cfg(not(target_arch = "wasm32"))]
        let pipelines = wait_for(self.pipelines())?;
        #[cfg(target_arch = "wasm32")]
        let pipelines = {
            let ready: Vec<_> = {
                let cache = lock(&self.gpu.0.pipelines);
                self.bound.iter().map(|bound| cache.get(&bound.step.variant).cloned()).collect()
            };
            ready.into_iter().collect::<Option<Vec<_>>>().ok_or_else(|| {
                value_error!("a browser compiles asynchronously: run forward_async once on these shapes before encode")
            })?
        };
        let ranges = self.submits();
        Ok(EncodeSlices { steps: self, pipelines, ranges })
    }
}
