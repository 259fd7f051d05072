//! Device buffers. They are pooled, so a call of a shape that was seen before allocates nothing.

use std::collections::{BTreeMap, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use super::{AllocationCounts, Gpu, lock};
use crate::error::{Error, Result, value_error};
use crate::kernels::plan::check_buffer;

/// Most bytes of idle buffers to keep for later calls.
const MOST_IDLE: u64 = 1 << 30;

/// The usage of uniform blocks and tables.
const CONSTANT: wgpu::BufferUsages = wgpu::BufferUsages::UNIFORM.union(wgpu::BufferUsages::STORAGE);

/// What a pooled buffer may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Purpose {
    /// Tensors and working memory.
    Call,
    /// Uniform blocks and tables of a call whose parameters change every time.
    Parameters,
    /// Readback.
    Staging,
}

impl Purpose {
    fn usage(self) -> wgpu::BufferUsages {
        match self {
            Purpose::Staging => wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
            Purpose::Parameters => CONSTANT | wgpu::BufferUsages::COPY_DST,
            _ => wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST,
        }
    }
}

#[derive(Default)]
pub struct Pool {
    idle: Mutex<Idle>,
    created: AtomicU64,
    created_bytes: AtomicU64,
    /// What was recorded into encoders that have not finished, by encoder.
    recorded: Mutex<HashMap<u64, Weak<Recorded>>>,
}

#[derive(Default)]
struct Idle {
    buffers: BTreeMap<(Purpose, u64), Vec<wgpu::Buffer>>,
    bytes: u64,
}

/// The buffers of all calls recorded into one of a caller's encoders. They are not reused elsewhere until the encoder's
/// work is done or the encoder is dropped: an upload would run before that work, and another submit might.
pub(crate) struct Recorded {
    gpu: Gpu,
    encoder: u64,
    /// Buffers that calls in this encoder made and nobody holds any more, by size. Later calls in the same encoder may
    /// reuse them, because they run after those.
    idle: Mutex<BTreeMap<u64, Vec<wgpu::Buffer>>>,
    /// Buffers that were not made for this encoder.
    held: Mutex<Vec<GpuBuffer>>,
}

impl Recorded {
    /// Holds the buffers that a recorded call binds, except those made for this encoder and those of the caller.
    pub fn hold(&self, buffers: impl Iterator<Item = GpuBuffer>) {
        let comes_back = |buffer: &GpuBuffer| match &buffer.0.home {
            Home::Caller => true,
            Home::Encoder(recorded) => std::ptr::eq(recorded.as_ptr(), self),
            Home::Pool(_) => false,
        };
        lock(&self.held).extend(buffers.filter(|buffer| !comes_back(buffer)));
    }

    fn take(&self, size: u64) -> Option<wgpu::Buffer> {
        lock(&self.idle).get_mut(&size)?.pop()
    }

    fn give(&self, buffer: wgpu::Buffer) {
        lock(&self.idle).entry(buffer.size()).or_default().push(buffer);
    }
}

impl Drop for Recorded {
    fn drop(&mut self) {
        let pool = &self.gpu.0.pool;
        let idle = std::mem::take(&mut *lock(&self.idle));
        idle.into_values().flatten().for_each(|buffer| pool.give(Purpose::Call, buffer));
        lock(&pool.recorded).remove(&self.encoder);
    }
}

impl Pool {
    pub fn counts(&self) -> AllocationCounts {
        AllocationCounts {
            buffers: self.created.load(Ordering::Relaxed),
            bytes: self.created_bytes.load(Ordering::Relaxed),
            pipelines: 0,
        }
    }

    pub fn count(&self, bytes: u64) {
        self.created.fetch_add(1, Ordering::Relaxed);
        self.created_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    fn take(&self, purpose: Purpose, size: u64) -> Option<wgpu::Buffer> {
        let mut idle = lock(&self.idle);
        let buffer = idle.buffers.get_mut(&(purpose, size))?.pop()?;
        idle.bytes -= size;
        Some(buffer)
    }

    fn give(&self, purpose: Purpose, buffer: wgpu::Buffer) {
        let mut idle = lock(&self.idle);
        let size = buffer.size();
        if idle.bytes + size > MOST_IDLE {
            // New sizes crowd out old ones: start over rather than track age.
            *idle = Idle::default();
        }
        if size <= MOST_IDLE {
            idle.bytes += size;
            idle.buffers.entry((purpose, size)).or_default().push(buffer);
        }
    }
}

/// Uniform blocks and tables, cached by content.
pub struct Constants<B = wgpu::Buffer> {
    buffers: HashMap<Vec<u8>, B>,
    bytes: u64,
}

impl<B> Default for Constants<B> {
    fn default() -> Self {
        Constants { buffers: HashMap::new(), bytes: 0 }
    }
}

impl<B: Clone> Constants<B> {
    /// Most bytes to keep, for the keys on the host and for the buffers alike. A program with more shapes than fit
    /// creates some again.
    const MOST: u64 = 4 << 20;
    /// A larger table probably changes with every call and would push out the others.
    const LARGEST: u64 = 64 << 10;
    /// Approximate overhead of each entry, in bytes.
    const EACH: u64 = 1 << 10;

    fn keep(&mut self, bytes: &[u8], buffer: &B) {
        let size = bytes.len() as u64;
        if size > Self::LARGEST {
            return;
        }
        if self.bytes + size + Self::EACH > Self::MOST {
            *self = Self::default();
        }
        if self.buffers.insert(bytes.to_vec(), buffer.clone()).is_none() {
            self.bytes += size + Self::EACH;
        }
    }
}

/// Rounds a size up to a quarter of a power of two, so that nearly equal shapes share buffers.
fn size_class(bytes: u64, limit: u64) -> u64 {
    let bytes = bytes.max(256);
    let step = (bytes.next_power_of_two() / 8).max(256);
    bytes.next_multiple_of(step).min(limit.max(bytes.next_multiple_of(16)))
}

struct Owned {
    gpu: Gpu,
    buffer: wgpu::Buffer,
    home: Home,
}

/// Where a buffer goes that nobody holds any more.
enum Home {
    /// A caller's own, or a constant.
    Caller,
    Pool(Purpose),
    /// To later calls in the encoder that it was made for, until that is done.
    Encoder(Weak<Recorded>),
}

impl Drop for Owned {
    fn drop(&mut self) {
        let buffer = self.buffer.clone();
        match &self.home {
            Home::Caller => {}
            Home::Pool(purpose) => self.gpu.0.pool.give(*purpose, buffer),
            Home::Encoder(recorded) => match recorded.upgrade() {
                Some(recorded) => recorded.give(buffer),
                None => self.gpu.0.pool.give(Purpose::Call, buffer),
            },
        }
    }
}

/// A buffer that returns to the pool when its last clone is dropped.
#[derive(Clone)]
pub(crate) struct GpuBuffer(Arc<Owned>);

impl std::fmt::Debug for GpuBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "GpuBuffer({} bytes on {:?})", self.0.buffer.size(), self.0.gpu)
    }
}

impl Gpu {
    /// What has been recorded into this encoder so far.
    pub(crate) fn recorded(&self, encoder: &wgpu::CommandEncoder) -> Arc<Recorded> {
        let mut hasher = DefaultHasher::new();
        encoder.hash(&mut hasher);
        let key = hasher.finish();
        let mut all = lock(&self.0.pool.recorded);
        if let Some(recorded) = all.get(&key).and_then(Weak::upgrade) {
            return recorded;
        }
        let recorded =
            Arc::new(Recorded { gpu: self.clone(), encoder: key, idle: Mutex::default(), held: Mutex::default() });
        all.insert(key, Arc::downgrade(&recorded));
        let until_done = recorded.clone();
        encoder.on_submitted_work_done(move || drop(until_done));
        recorded
    }

    pub(crate) fn allocate(&self, what: &str, bytes: u64, purpose: Purpose) -> Result<GpuBuffer> {
        self.allocate_for(None, what, bytes, purpose)
    }

    /// Like [`Gpu::allocate`], for a call in an encoder: reuses what earlier calls in that encoder no longer need.
    pub(crate) fn allocate_for(
        &self,
        recorded: Option<&Arc<Recorded>>,
        what: &str,
        bytes: u64,
        purpose: Purpose,
    ) -> Result<GpuBuffer> {
        self.check()?;
        check_buffer(&self.0.capabilities, what, bytes)?;
        let size = size_class(bytes, self.0.capabilities.max_buffer);
        let idle = recorded.and_then(|recorded| recorded.take(size));
        let buffer = match idle.or_else(|| self.0.pool.take(purpose, size)) {
            Some(buffer) => buffer,
            None => {
                let descriptor = wgpu::BufferDescriptor {
                    label: Some(what),
                    size,
                    usage: purpose.usage(),
                    mapped_at_creation: false,
                };
                let buffer = self.scoped_now(what, || self.0.device.create_buffer(&descriptor))?;
                self.0.pool.count(size);
                buffer
            }
        };
        let home = recorded.map_or(Home::Pool(purpose), |recorded| Home::Encoder(Arc::downgrade(recorded)));
        Ok(GpuBuffer(Arc::new(Owned { gpu: self.clone(), buffer, home })))
    }

    pub(crate) fn upload(&self, what: &str, bytes: &[u8]) -> Result<GpuBuffer> {
        let buffer = self.allocate(what, bytes.len() as u64, Purpose::Call)?;
        self.write(what, &buffer, bytes)?;
        Ok(buffer)
    }

    fn write(&self, what: &str, buffer: &GpuBuffer, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.scoped_now(what, || {
            // wgpu copies whole words.
            let whole = bytes.len() / 4 * 4;
            self.0.queue.write_buffer(buffer.raw(), 0, &bytes[..whole]);
            if whole < bytes.len() {
                let mut last = [0; 4];
                last[..bytes.len() - whole].copy_from_slice(&bytes[whole..]);
                self.0.queue.write_buffer(buffer.raw(), whole as u64, &last);
            }
        })
    }

    /// An error unless the buffer belongs to this device.
    pub(crate) fn expect_own(&self, buffer: &wgpu::Buffer) -> Result<()> {
        let size = wgpu::BufferSize::new(buffer.size().min(16) / 4 * 4);
        let Some(size) = size else {
            return Err(value_error!("a buffer of {} bytes holds no element", buffer.size()));
        };
        let during = "taking a buffer";
        let bound = self.scoped_now(during, || {
            self.0.device.create_bind_group(&wgpu::BindGroupDescriptor {
                label: Some(during),
                layout: &self.0.one_buffer,
                entries: &[wgpu::BindGroupEntry {
                    binding: 0,
                    resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                        buffer,
                        offset: 0,
                        size: Some(size),
                    }),
                }],
            })
        });
        match bound {
            Ok(_) => Ok(()),
            Err(Error::Gpu { adapter, .. }) => Err(Error::Device {
                what: "the buffer".into(),
                there: "another device, or was destroyed,".into(),
                here: adapter,
            }),
            Err(error) => Err(error),
        }
    }

    pub(crate) fn adopt(&self, buffer: &wgpu::Buffer) -> GpuBuffer {
        GpuBuffer(Arc::new(Owned { gpu: self.clone(), buffer: buffer.clone(), home: Home::Caller }))
    }

    /// An immutable buffer of these bytes; cached by content.
    pub(crate) fn constant(&self, bytes: &[u8]) -> GpuBuffer {
        if let Some(buffer) = lock(&self.0.constants).buffers.get(bytes) {
            return self.adopt(buffer);
        }
        let size = (bytes.len() as u64).next_multiple_of(16).max(16);
        let buffer = self.0.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("parameters"),
            size,
            usage: CONSTANT,
            mapped_at_creation: true,
        });
        // On a lost device mapping fails; the call that uses the buffer reports the loss.
        if let Ok(mut view) = buffer.get_mapped_range_mut(..) {
            view.slice(..bytes.len()).copy_from_slice(bytes);
        }
        buffer.unmap();
        self.0.pool.count(size);
        lock(&self.0.constants).keep(bytes, &buffer);
        self.adopt(&buffer)
    }
}

impl GpuBuffer {
    pub fn gpu(&self) -> &Gpu {
        &self.0.gpu
    }

    pub fn is(&self, other: &GpuBuffer) -> bool {
        self.0.buffer == other.0.buffer
    }

    pub fn raw(&self) -> &wgpu::Buffer {
        &self.0.buffer
    }

    /// Reads a range back and passes it to `convert`. On native platforms the thread waits for the device.
    pub async fn read<T>(&self, range: Range<u64>, convert: impl FnOnce(&[u8]) -> T) -> Result<T> {
        const DURING: &str = "reading a tensor back";
        let gpu = self.gpu();
        gpu.check()?;
        if !self.0.buffer.usage().contains(wgpu::BufferUsages::COPY_SRC) {
            return Err(value_error!("a tensor over a buffer without the usage COPY_SRC cannot be read back"));
        }
        let size = (range.end - range.start).next_multiple_of(4);
        let staging = gpu.allocate("staging", size, Purpose::Staging)?;
        let (sender, receiver) = futures_channel::oneshot::channel();
        gpu.scoped(DURING, || {
            let mut encoder = gpu.0.device.create_command_encoder(&Default::default());
            encoder.copy_buffer_to_buffer(&self.0.buffer, range.start, staging.raw(), 0, size);
            gpu.0.queue.submit([encoder.finish()]);
            staging.raw().map_async(wgpu::MapMode::Read, 0..size, |result| {
                // If the caller gave up, the receiver is gone and the result is not needed.
                let _ = sender.send(result);
            });
        })
        .await?;
        #[cfg(not(target_arch = "wasm32"))]
        gpu.wait()?;
        match receiver.await {
            Ok(Ok(())) => {}
            // The copy was valid and is done, so only a lost device fails to map it.
            _ => return Err(gpu.lost("a buffer could not be mapped")),
        }
        let value = {
            let view =
                staging.raw().get_mapped_range(0..size).map_err(|error| gpu.failure(DURING, &error.to_string()))?;
            convert(&view)
        };
        staging.raw().unmap();
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::{Constants, size_class};

    #[test]
    fn what_is_kept_by_content_is_bounded_by_its_bytes() {
        let mut kept = Constants::<()>::default();
        // Lengths of a batch of 4,000 that change with every call, and of one that is too large to keep.
        for call in 0..2000u32 {
            kept.keep(&call.to_le_bytes().repeat(4000), &());
            kept.keep(&call.to_le_bytes().repeat(70_000), &());
            let held: u64 = kept.buffers.keys().map(|key| key.len() as u64).sum();
            assert!(held <= Constants::<()>::MOST && kept.bytes <= Constants::<()>::MOST, "{held}");
            assert!(kept.buffers.keys().all(|key| key.len() == 16_000));
        }
        // Small ones stay.
        let mut kept = Constants::<()>::default();
        (0..3000u32).for_each(|n| kept.keep(&n.to_le_bytes(), &()));
        assert_eq!(kept.buffers.len(), 3000);
    }

    #[test]
    fn size_classes_waste_little_and_respect_the_limit() {
        for bytes in [1, 256, 257, 1000, 4096, 100_000, 12_582_912, 134_217_728] {
            let class = size_class(bytes, 1 << 30);
            assert!(class >= bytes && class.is_multiple_of(16), "{bytes}: {class}");
            assert!(class <= bytes.max(512) * 5 / 4, "{bytes}: {class}");
        }
        assert_eq!(size_class(1000, 1000), 1008);
    }
}
