//! The only module that calls wgpu: adapters and devices, buffers and their pool, pipelines, and the execution of
//! plans.

mod adapters;
mod buffers;
// Needs files, and crates that a browser build leaves out.
#[cfg(all(feature = "export", not(target_arch = "wasm32")))]
mod export;
// Needs std's clock, which browsers do not have.
#[cfg(not(target_arch = "wasm32"))]
mod probe;
mod run;
mod tuning;

pub use adapters::{AdapterSummary, GpuOptions};
pub(crate) use buffers::{GpuBuffer, Purpose};
#[cfg(all(feature = "export", not(target_arch = "wasm32")))]
pub use export::{BindingKind, ExportedBinding, ExportedBuffer, ExportedCall, ExportedOutput, ExportedStep};
pub(crate) use run::Steps;
pub use run::{EncodeSlices, Profile, Traced};

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
#[cfg(not(target_arch = "wasm32"))]
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::kernels::{AdapterClass, Capabilities, Kernel, Variant};
use crate::wait::apart;
#[cfg(not(target_arch = "wasm32"))]
use crate::wait::wait_for;
use buffers::{Constants, Pool};
use run::Pipeline;
use tuning::Tuning;

/// An adapter with its device, pipeline cache and buffer pool. Cheap to clone.
#[derive(Clone)]
pub struct Gpu(Arc<Inner>);

struct Inner {
    info: wgpu::AdapterInfo,
    capabilities: Capabilities,
    device: wgpu::Device,
    queue: wgpu::Queue,
    pipelines: Mutex<HashMap<Variant, Arc<Pipeline>>>,
    /// Uniform blocks and band tables by content. They are written once and never changed, so work recorded into a
    /// caller's encoder reads the values it was recorded with.
    constants: Mutex<Constants>,
    pool: Pool,
    /// A bind group layout of one storage buffer, to check which device a buffer belongs to.
    one_buffer: wgpu::BindGroupLayout,
    tuning: Tuning,
    /// Wide loads use 64-bit words, because software adapters load word by word.
    loads_64_bits: bool,
    rewrite: Option<fn(&Variant, &str) -> Option<String>>,
    seconds_per_submit: f64,
    /// The kernels that ran, while a trace is active.
    trace: Mutex<Option<Vec<Traced>>>,
    /// The rate that [`Gpu::multiply_add_ceiling`] measured.
    #[cfg(not(target_arch = "wasm32"))]
    ceiling: Mutex<Option<f64>>,
    /// Variants that the driver did not compile, or not in reasonable time.
    refused: Mutex<Vec<Variant>>,
    /// Why the device was lost, once it has been.
    lost: Arc<Mutex<Option<String>>>,
    /// The first error that no error scope caught.
    fault: Arc<Mutex<Option<String>>>,
}

/// A driver that compiles a kernel for longer is given others.
#[cfg(not(target_arch = "wasm32"))]
const MOST_COMPILING: Duration = Duration::from_secs(10);
/// Long enough that the cost of a submit is negligible, short enough for every watchdog.
const SECONDS_PER_SUBMIT: f64 = 0.5;
/// The fraction of an adapter's multiply-add ceiling that kernels reach at least, roughly.
const SHARE_REACHED: f64 = 0.2;
/// Roughly the number of operations that takes less than [`SECONDS_PER_SUBMIT`] on any adapter. Measuring the ceiling
/// pays off only above it.
const SURELY_SHORT: f64 = 1e9;

/// Buffers and pipelines created on an adapter so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct AllocationCounts {
    /// Number of buffers created: tensors, working memory, staging, uniform blocks.
    pub buffers: u64,
    /// Their total size in bytes.
    pub bytes: u64,
    /// Number of pipelines compiled.
    pub pipelines: u64,
}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Gpu({} over {})", self.0.info.name, self.0.info.backend)
    }
}

/// A poisoned lock is still usable: every guarded value is valid at every step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Gpu {
    /// The best adapter: discrete GPUs before integrated ones before software, native backends before GL.
    /// `WGPU_BACKEND` and `WGPU_ADAPTER_NAME` narrow the choice.
    ///
    /// The device is created with the adapter's own limits, unless [`GpuOptions::limits`] is set, and with these
    /// features if the adapter has them: `SUBGROUP` for the kernels, `TIMESTAMP_QUERY` for [`Profile::gpu_time`], and
    /// on software adapters `SHADER_INT64` for wider loads.
    ///
    /// # Errors
    ///
    /// - [`Error::NoAdapter`]: no adapter can compute, or none matches `WGPU_ADAPTER_NAME`.
    /// - [`Error::Gpu`]: the adapter did not create a device.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn new() -> Result<Gpu> {
        Gpu::with_options(&GpuOptions::default())
    }

    /// Like [`Gpu::new`], with options.
    ///
    /// # Errors
    ///
    /// - [`Error::NoAdapter`]: no adapter can compute, or none matches [`GpuOptions::adapter`] or `WGPU_ADAPTER_NAME`.
    /// - [`Error::Gpu`]: the adapter did not create a device, for example because [`GpuOptions::limits`] exceed its
    ///   own.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn with_options(options: &GpuOptions) -> Result<Gpu> {
        wait_for(Gpu::open(options.clone()))
    }

    /// Like [`Gpu::with_options`], without blocking.
    pub async fn request(options: &GpuOptions) -> Result<Gpu> {
        apart(Gpu::open(options.clone())).await
    }

    async fn open(options: GpuOptions) -> Result<Gpu> {
        let options = options.with_environment()?;
        let adapter = adapters::choose(&options).await?;
        let mut used = wgpu::Features::SUBGROUP | wgpu::Features::TIMESTAMP_QUERY;
        if adapters::class(&adapter.get_info()) == AdapterClass::Cpu {
            used |= wgpu::Features::SHADER_INT64;
        }
        let features = adapter.features() & used;
        let descriptor = wgpu::DeviceDescriptor {
            label: Some("wgpu-attention"),
            required_features: features,
            required_limits: options.limits.clone().unwrap_or_else(|| adapter.limits()),
            ..Default::default()
        };
        let info = adapter.get_info();
        let (device, queue) = adapter.request_device(&descriptor).await.map_err(|error| Error::Gpu {
            adapter: info.name.clone(),
            during: "creating the device".into(),
            message: error.to_string(),
        })?;
        let gpu = Gpu::assemble(info, device, queue, &options);
        // This is our own device, so an error that no scope catches is kept and reported by the next call.
        let fault = gpu.0.fault.clone();
        gpu.0.device.on_uncaptured_error(Arc::new(move |error| {
            lock(&fault).get_or_insert_with(|| error.to_string());
        }));
        let lost = gpu.0.lost.clone();
        gpu.0.device.set_device_lost_callback(move |reason, message| {
            lock(&lost).get_or_insert_with(|| format!("{reason:?}: {message}"));
        });
        Ok(gpu)
    }

    /// Uses a caller's device and queue. The device's error handlers stay in place, and only features and limits that
    /// it was created with are used. Subgroup kernels need [`wgpu::Features::SUBGROUP`], GPU times
    /// [`wgpu::Features::TIMESTAMP_QUERY`], and wide loads on software adapters [`wgpu::Features::SHADER_INT64`].
    pub fn from_wgpu(adapter: &wgpu::Adapter, device: wgpu::Device, queue: wgpu::Queue) -> Gpu {
        Gpu::assemble(adapter.get_info(), device, queue, &GpuOptions::default())
    }

    fn assemble(info: wgpu::AdapterInfo, device: wgpu::Device, queue: wgpu::Queue, options: &GpuOptions) -> Gpu {
        let capabilities = adapters::capabilities(&info, &device, options);
        let loads_64_bits =
            capabilities.class == AdapterClass::Cpu && device.features().contains(wgpu::Features::SHADER_INT64);
        let one_buffer = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
            label: Some("one buffer"),
            entries: &[wgpu::BindGroupLayoutEntry {
                binding: 0,
                visibility: wgpu::ShaderStages::COMPUTE,
                ty: wgpu::BindingType::Buffer {
                    ty: wgpu::BufferBindingType::Storage { read_only: true },
                    has_dynamic_offset: false,
                    min_binding_size: None,
                },
                count: None,
            }],
        });
        let gpu = Gpu(Arc::new(Inner {
            info,
            capabilities,
            device,
            queue,
            pipelines: Mutex::default(),
            constants: Mutex::default(),
            pool: Pool::default(),
            one_buffer,
            tuning: Tuning::default(),
            loads_64_bits,
            rewrite: options.rewrite,
            seconds_per_submit: options.seconds_per_submit.unwrap_or(SECONDS_PER_SUBMIT).max(1e-3),
            trace: Mutex::default(),
            #[cfg(not(target_arch = "wasm32"))]
            ceiling: Mutex::default(),
            refused: Mutex::default(),
            lost: Arc::default(),
            fault: Arc::default(),
        }));
        #[cfg(all(feature = "tune", not(target_arch = "wasm32")))]
        gpu.load_tuning();
        gpu
    }

    /// Every adapter of this machine, best first.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn adapters() -> Vec<AdapterSummary> {
        pollster::block_on(adapters::list())
    }

    /// Name, driver, backend and type.
    pub fn info(&self) -> &wgpu::AdapterInfo {
        &self.0.info
    }
    /// The adapter's capabilities, as planning uses them.
    pub fn capabilities(&self) -> &Capabilities {
        &self.0.capabilities
    }
    /// The wgpu device.
    pub fn device(&self) -> &wgpu::Device {
        &self.0.device
    }
    /// The wgpu queue.
    pub fn queue(&self) -> &wgpu::Queue {
        &self.0.queue
    }
    /// Names of the kernel variants compiled so far, such as `scores/rows4x8/subgroup8/depth64/wide`.
    pub fn kernels(&self) -> Vec<String> {
        let mut names: Vec<String> = lock(&self.0.pipelines).keys().map(|variant| variant.name.clone()).collect();
        names.sort();
        names
    }
    /// Buffers and pipelines created so far. Calls of a shape that was seen before add nothing.
    pub fn allocation_counts(&self) -> AllocationCounts {
        let mut counts = self.0.pool.counts();
        counts.pipelines = lock(&self.0.pipelines).len() as u64;
        counts
    }

    /// An estimate of the operations per second that kernels reach on this adapter: a fraction of
    /// [`Gpu::multiply_add_ceiling`] once that is measured, before that a guess by the kind of adapter.
    pub(crate) fn operations_per_second(&self) -> f64 {
        #[cfg(not(target_arch = "wasm32"))]
        if let Some(ceiling) = *lock(&self.0.ceiling) {
            return ceiling * SHARE_REACHED;
        }
        match self.0.capabilities.class {
            AdapterClass::Cpu => 10e9,
            AdapterClass::Gpu => 500e9,
        }
    }

    /// The number of operations in one submit.
    pub(crate) fn operations_per_submit(&self) -> f64 {
        self.0.seconds_per_submit * self.operations_per_second()
    }

    /// The adapter's capabilities for work of `operations` operations. If that may take long, they include how fast the
    /// adapter is. `may_submit` permits measuring that, which takes a tenth of a second once.
    pub(crate) fn capabilities_for(&self, operations: f64, may_submit: bool) -> Result<Cow<'_, Capabilities>> {
        let known = self.known_capabilities();
        if operations <= SURELY_SHORT {
            return Ok(known);
        }
        #[cfg(not(target_arch = "wasm32"))]
        if may_submit {
            self.multiply_add_ceiling()?;
        }
        // Browsers do not have std's clock.
        #[cfg(target_arch = "wasm32")]
        let _ = may_submit;
        let max_operations = Some(self.operations_per_submit().min(known.dispatch_operations()));
        Ok(Cow::Owned(Capabilities { max_operations, ..known.into_owned() }))
    }

    /// The capabilities, with what the driver has refused so far.
    fn known_capabilities(&self) -> Cow<'_, Capabilities> {
        let refused = lock(&self.0.refused);
        if refused.is_empty() {
            return Cow::Borrowed(&self.0.capabilities);
        }
        let mut known = self.0.capabilities.clone();
        known.refused_tiles = refused.iter().filter_map(Variant::tile).collect();
        known.refuses_tiled_products = refused.iter().any(|variant| variant.kernel == Kernel::ProjectTiled);
        Cow::Owned(known)
    }

    /// Compiles the kernels of a plan for which there are others, if the driver accepts them. Else remembers that, says
    /// so in the log and returns false: another plan is due.
    #[cfg(not(target_arch = "wasm32"))]
    pub(crate) fn accepts(&self, plan: &crate::kernels::Plan) -> bool {
        if self.0.capabilities.class != AdapterClass::Gpu {
            return true;
        }
        let replaceable = |variant: &&Variant| matches!(variant.kernel, Kernel::FlashTiled | Kernel::ProjectTiled);
        for variant in plan.steps.iter().map(|step| &step.variant).filter(replaceable) {
            // A caller who insists on a tile gets the driver's message.
            if lock(&self.0.refused).contains(variant) {
                continue;
            }
            let began = Instant::now();
            let compiled = wait_for(self.pipeline(variant));
            let adapter = &self.0.info.name;
            match compiled {
                Err(Error::DeviceLost { .. }) => return true,
                Err(error) => {
                    log::warn!("{adapter} does not compile {}, so another kernel runs: {error}", variant.name);
                    lock(&self.0.refused).push(variant.clone());
                    return false;
                }
                Ok(_) if began.elapsed() > MOST_COMPILING => {
                    let seconds = began.elapsed().as_secs_f64();
                    log::warn!("{adapter} compiled {} for {seconds:.0} s; later calls avoid its tile", variant.name);
                    lock(&self.0.refused).push(variant.clone());
                }
                Ok(_) => {}
            }
        }
        true
    }

    /// Runs `work` and reports what ran on this adapter meanwhile, including other threads' calls. Work recorded into a
    /// caller's encoder counts when it is recorded.
    pub fn trace<T>(&self, work: impl FnOnce() -> T) -> (T, Vec<Traced>) {
        *lock(&self.0.trace) = Some(Vec::new());
        let done = work();
        (done, lock(&self.0.trace).take().unwrap_or_default())
    }

    /// Waits until all submitted work is done.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn wait(&self) -> Result<()> {
        self.wait_until(None)
    }

    /// Like [`Gpu::wait`], but for no longer than `most`, after which it returns [`Error::TimedOut`]. The work
    /// continues, the device stays usable, and you can wait again. A driver that computes during the submit (such as GL
    /// on the CPU) leaves nothing to wait for.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn wait_for(&self, most: Duration) -> Result<()> {
        self.wait_until(Some(most))
    }

    #[cfg(not(target_arch = "wasm32"))]
    fn wait_until(&self, most: Option<Duration>) -> Result<()> {
        /// GL waits at most two seconds, whatever the timeout.
        const AT_A_TIME: Duration = Duration::from_secs(1);
        const DURING: &str = "waiting for the device";
        let began = Instant::now();
        loop {
            let asked = most.map_or(AT_A_TIME, |most| most.saturating_sub(began.elapsed()).min(AT_A_TIME));
            let poll = || self.0.device.poll(wgpu::PollType::Wait { submission_index: None, timeout: Some(asked) });
            let polled = Instant::now();
            // If the driver loses the device during a wait, wgpu panics.
            match std::panic::catch_unwind(std::panic::AssertUnwindSafe(poll)) {
                Ok(Ok(_)) => return self.check(),
                Ok(Err(wgpu::PollError::Timeout)) => {
                    self.check()?;
                    if let Some(after) = most.filter(|&most| began.elapsed() >= most) {
                        return Err(Error::TimedOut { adapter: self.0.info.name.clone(), after });
                    }
                    if polled.elapsed() < asked / 2 {
                        return Err(self.failure(DURING, "the driver does not wait"));
                    }
                }
                Ok(Err(error)) => return Err(self.failure(DURING, &error.to_string())),
                Err(panic) => {
                    return Err(self.lost(panic.downcast_ref().map_or("the driver lost it", String::as_str)));
                }
            }
        }
    }

    pub(crate) fn same_as(&self, other: &Gpu) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// An error if the device is lost or an earlier call failed outside any error scope.
    fn check(&self) -> Result<()> {
        if let Some(reason) = lock(&self.0.lost).clone() {
            return Err(Error::DeviceLost { adapter: self.0.info.name.clone(), reason });
        }
        match lock(&self.0.fault).take() {
            Some(message) => Err(self.failure("an earlier call", &message)),
            None => Ok(()),
        }
    }

    /// The device is lost. `reason` is used if wgpu gave none, as for a caller's own device.
    fn lost(&self, reason: &str) -> Error {
        let reason = lock(&self.0.lost).get_or_insert_with(|| reason.into()).clone();
        Error::DeviceLost { adapter: self.0.info.name.clone(), reason }
    }

    fn failure(&self, during: &str, message: &str) -> Error {
        if lock(&self.0.lost).is_some() || self.is_lost() {
            return self.lost(message);
        }
        Error::Gpu { adapter: self.0.info.name.clone(), during: during.into(), message: message.into() }
    }

    /// Probes the device: a caller's device does not have our handler, and ours is called only once the device is idle.
    /// On a lost device a buffer cannot be mapped, and no error scope reports that.
    fn is_lost(&self) -> bool {
        #[cfg(target_arch = "wasm32")]
        return false;
        #[cfg(not(target_arch = "wasm32"))]
        {
            let descriptor = wgpu::BufferDescriptor {
                label: Some("sign of life"),
                size: 4,
                usage: wgpu::BufferUsages::COPY_SRC,
                mapped_at_creation: true,
            };
            let map = || self.0.device.create_buffer(&descriptor).get_mapped_range_mut(..).is_ok();
            let (mapped, caught) = self.watched(map);
            !mapped && pollster::block_on(caught).is_none()
        }
    }

    /// Runs `work` inside error scopes; the future yields the first error that they caught. The scopes are closed when
    /// this returns, because they belong to the thread and must not be open across an await.
    fn watched<T, F: FnOnce() -> T>(&self, work: F) -> (T, impl Future<Output = Option<wgpu::Error>> + use<T, F>) {
        let filters = [wgpu::ErrorFilter::OutOfMemory, wgpu::ErrorFilter::Validation, wgpu::ErrorFilter::Internal];
        let [memory, validation, internal] = filters.map(|filter| self.0.device.push_error_scope(filter));
        let value = work();
        // Last pushed, first popped.
        let caught = [internal.pop(), validation.pop(), memory.pop()];
        let first = async move {
            let [internal, validation, memory] = caught;
            internal.await.or(validation.await).or(memory.await)
        };
        (value, first)
    }

    /// Runs `work` inside error scopes; the future yields its value, or what they caught.
    fn scoped<T, F: FnOnce() -> T>(&self, during: &str, work: F) -> impl Future<Output = Result<T>> + use<T, F> {
        let (value, caught) = self.watched(work);
        let (gpu, during) = (self.clone(), during.to_string());
        async move {
            match caught.await {
                None => Ok(value),
                Some(wgpu::Error::OutOfMemory { source }) => {
                    Err(Error::OutOfMemory { adapter: gpu.0.info.name.clone(), during, message: source.to_string() })
                }
                Some(error) => Err(gpu.failure(&during, &error.to_string())),
            }
        }
    }

    /// [`Gpu::scoped`] for callers that cannot await. Native scopes are ready at once. In a browser the answer comes
    /// later, and the device's error handler keeps it for the next call.
    fn scoped_now<T>(&self, during: &str, work: impl FnOnce() -> T) -> Result<T> {
        #[cfg(not(target_arch = "wasm32"))]
        return pollster::block_on(self.scoped(during, work));
        #[cfg(target_arch = "wasm32")]
        {
            let _ = during;
            Ok(work())
        }
    }
}
