//! Tensors: a shape and strides over a buffer on a device.

#[cfg(feature = "cpu")]
use std::sync::Arc;

#[cfg(feature = "cpu")]
use crate::cpu::Buffer;
use crate::device::Device;
use crate::error::{Error, Result, shape_error, value_error};
use crate::gpu::{Gpu, GpuBuffer, Purpose};
use crate::kernels::Operand;
use crate::kernels::plan::{check_buffer, padded_bytes};
use crate::problem::{Dtype, Element, Layout, as_four_axes, checked_len};
use crate::wait::apart;
#[cfg(not(target_arch = "wasm32"))]
use crate::wait::wait_for;

/// A strided view of a buffer on a [`Device`]. Clones and views copy nothing.
///
/// An adapter stores f16 and bf16 values as such, two to a word; the CPU backend stores them as f32. Results computed
/// from them are rounded to that type on download, whatever type they were stored in.
#[derive(Clone, Debug)]
pub struct Tensor {
    storage: Storage,
    layout: Layout,
    dtype: Dtype,
    /// The type in the buffer: `dtype`, or f32 to be rounded to it.
    stored: Dtype,
}

#[derive(Clone, Debug)]
pub(crate) enum Storage {
    Gpu(GpuBuffer),
    #[cfg(feature = "cpu")]
    Cpu(Arc<Buffer>),
    #[cfg(feature = "cpu")]
    CpuBool(Arc<[u8]>),
}

fn check_len(shape: &[usize], len: usize) -> Result<()> {
    let expected = checked_len(shape)?;
    if expected != len {
        return Err(shape_error!("shape {shape:?} has {expected} elements but {len} were given"));
    }
    Ok(())
}

impl Tensor {
    /// Uploads row-major `data` (f32, f16 or bf16).
    ///
    /// # Errors
    ///
    /// - [`Shape`](Error::Shape): `data` does not have as many elements as `shape`.
    /// - [`Overflow`](Error::Overflow), [`TooLarge`](Error::TooLarge): the tensor does not fit.
    /// - [`DeviceLost`](Error::DeviceLost), [`OutOfMemory`](Error::OutOfMemory), [`Gpu`](Error::Gpu): the driver
    ///   failed.
    pub fn from_slice<T: Element>(device: impl Into<Device>, shape: &[usize], data: &[T]) -> Result<Tensor> {
        check_len(shape, data.len())?;
        let layout = Layout::contiguous(shape)?;
        let (storage, stored) = match device.into() {
            Device::Gpu(gpu) => (Storage::Gpu(gpu.upload("tensor", bytemuck::cast_slice(data))?), T::DTYPE),
            #[cfg(feature = "cpu")]
            Device::Cpu => (Storage::Cpu(Arc::new(data.iter().map(|x| x.to_f32()).collect())), Dtype::F32),
        };
        Ok(Tensor { storage, layout, dtype: T::DTYPE, stored })
    }

    /// Uploads a boolean tensor, one byte per element. [`Mask`](crate::Mask) defines what true means.
    pub fn from_bools(device: impl Into<Device>, shape: &[usize], data: &[bool]) -> Result<Tensor> {
        check_len(shape, data.len())?;
        let bytes: Vec<u8> = data.iter().map(|&x| u8::from(x)).collect();
        let storage = match device.into() {
            Device::Gpu(gpu) => Storage::Gpu(gpu.upload("mask", &bytes)?),
            #[cfg(feature = "cpu")]
            Device::Cpu => Storage::CpuBool(bytes.into()),
        };
        Ok(Tensor { storage, layout: Layout::contiguous(shape)?, dtype: Dtype::Bool, stored: Dtype::Bool })
    }

    /// A view of the caller's own buffer: packed elements of `dtype` (f16 and bf16 two to a word, [`Dtype::Bool`] one
    /// to a byte), strides and offset in elements. The buffer needs the usage `STORAGE`, and `COPY_SRC` for downloads.
    ///
    /// # Errors
    ///
    /// - [`Value`](Error::Value): the buffer lacks the usage `STORAGE` or is smaller than four bytes.
    /// - [`Device`](Error::Device): the buffer belongs to another device, or was destroyed.
    /// - [`Shape`](Error::Shape), [`Overflow`](Error::Overflow): shape and strides do not match, or reach beyond the
    ///   buffer.
    /// - [`DeviceLost`](Error::DeviceLost), [`OutOfMemory`](Error::OutOfMemory): the driver failed.
    pub fn from_wgpu(
        gpu: &Gpu,
        buffer: &wgpu::Buffer,
        shape: &[usize],
        strides: &[usize],
        offset: usize,
        dtype: Dtype,
    ) -> Result<Tensor> {
        if !buffer.usage().contains(wgpu::BufferUsages::STORAGE) {
            return Err(value_error!("the buffer's usage {:?} must include STORAGE", buffer.usage()));
        }
        gpu.expect_own(buffer)?;
        let available = (buffer.size() / dtype.stored_size()) as usize;
        let layout = Layout::strided(shape, strides, offset, available)?;
        Ok(Tensor { storage: Storage::Gpu(gpu.adopt(buffer)), layout, dtype, stored: dtype })
    }

    #[cfg(feature = "cpu")]
    pub(crate) fn from_cpu(data: impl Into<Buffer>, layout: Layout, dtype: Dtype) -> Tensor {
        let data = data.into();
        debug_assert!(layout.end() <= data.len());
        Tensor { storage: Storage::Cpu(Arc::new(data)), layout, dtype, stored: Dtype::F32 }
    }

    /// The floats, for writing in place. Other holders of the storage keep their contents.
    #[cfg(feature = "cpu")]
    pub(crate) fn cpu_mut(&mut self) -> &mut [f32] {
        match &mut self.storage {
            Storage::Cpu(data) => &mut *Arc::make_mut(data),
            _ => unreachable!("devices and types are checked before"),
        }
    }

    /// An uninitialised tensor, for elements that are written before they are read.
    pub(crate) fn blank(device: &Device, what: &str, layout: Layout, dtype: Dtype) -> Result<Tensor> {
        match device {
            Device::Gpu(gpu) => {
                let bytes = padded_bytes(&layout, dtype);
                check_buffer(gpu.capabilities(), what, bytes)?;
                Ok(Tensor::from_gpu(gpu.allocate(what, bytes, Purpose::Call)?, layout, dtype, dtype))
            }
            #[cfg(feature = "cpu")]
            Device::Cpu => {
                crate::memory::check_floats(what, &[layout.end()])?;
                Ok(Tensor::from_cpu(vec![0.0; layout.end()], layout, dtype))
            }
        }
    }

    pub(crate) fn from_gpu(buffer: GpuBuffer, layout: Layout, dtype: Dtype, stored: Dtype) -> Tensor {
        Tensor { storage: Storage::Gpu(buffer), layout, dtype, stored }
    }

    /// The device that the tensor is on.
    pub fn device(&self) -> Device {
        match &self.storage {
            Storage::Gpu(buffer) => Device::Gpu(buffer.gpu().clone()),
            #[cfg(feature = "cpu")]
            _ => Device::Cpu,
        }
    }
    /// Lengths of the axes.
    pub fn shape(&self) -> &[usize] {
        self.layout.shape()
    }
    /// Shape and strides.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }
    /// The type that the tensor was created with and that results are rounded to.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }
    /// The type in the buffer.
    pub(crate) fn stored(&self) -> Dtype {
        self.stored
    }
    /// What kernels need to know about it.
    pub(crate) fn operand(&self) -> Operand<'_> {
        Operand { layout: &self.layout, stored: self.stored }
    }
    pub(crate) fn storage(&self) -> &Storage {
        &self.storage
    }

    /// The same elements with another type tag: they are rounded to it on download.
    pub fn with_dtype(mut self, dtype: Dtype) -> Result<Tensor> {
        if (self.dtype == Dtype::Bool) != (dtype == Dtype::Bool) {
            return Err(value_error!("a {} tensor cannot become {dtype}", self.dtype));
        }
        self.dtype = dtype;
        Ok(self)
    }

    pub(crate) fn with_layout(&self, layout: Layout) -> Tensor {
        Tensor { storage: self.storage.clone(), layout, dtype: self.dtype, stored: self.stored }
    }

    /// The axes in another order: `[batch, len, heads, dim]` to `[batch, heads, len, dim]` is `[0, 2, 1, 3]`.
    pub fn permute(&self, axes: &[usize]) -> Result<Tensor> {
        Ok(self.with_layout(self.layout.permute(axes)?))
    }
    /// The `len` entries of `axis` from `start`.
    pub fn narrow(&self, axis: usize, start: usize, len: usize) -> Result<Tensor> {
        Ok(self.with_layout(self.layout.narrow(axis, start, len)?))
    }
    /// One entry of `axis`; the axis is removed. For packed `[b, s, 3, h, d]`, `select(2, 1)` is K.
    pub fn select(&self, axis: usize, index: usize) -> Result<Tensor> {
        Ok(self.with_layout(self.layout.select(axis, index)?))
    }
    /// A new axis of length 1 before `axis`.
    pub fn unsqueeze(&self, axis: usize) -> Result<Tensor> {
        Ok(self.with_layout(self.layout.unsqueeze(axis)?))
    }
    /// Another shape over the same elements, without a copy.
    ///
    /// # Errors
    ///
    /// - [`Shape`](Error::Shape): the number of elements differs, or the strides would require a copy
    ///   ([`Tensor::contiguous`] makes one).
    /// - [`Overflow`](Error::Overflow): the number of elements does not fit in 64 bits.
    pub fn reshape(&self, shape: &[usize]) -> Result<Tensor> {
        let layout = self.layout.reshape(shape)?.ok_or_else(|| {
            shape_error!(
                "shape {:?} with strides {:?} cannot be seen as {shape:?} without a copy",
                self.layout.shape(),
                self.layout.strides()
            )
        })?;
        Ok(self.with_layout(layout))
    }

    /// The elements in row-major order, rounded to the tensor's type; waits for the device.
    ///
    /// # Errors
    ///
    /// - [`Value`](Error::Value): a bool tensor (use [`Tensor::download_bools`]), or a caller's buffer without the
    ///   usage `COPY_SRC`.
    /// - [`DeviceLost`](Error::DeviceLost), [`OutOfMemory`](Error::OutOfMemory), [`TooLarge`](Error::TooLarge),
    ///   [`Gpu`](Error::Gpu): reading back failed, or an earlier call did.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn download(&self) -> Result<Vec<f32>> {
        wait_for(self.read())
    }

    /// Like [`Tensor::download`], in another element type.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn download_as<T: Element>(&self) -> Result<Vec<T>> {
        Ok(self.download()?.into_iter().map(T::from_f32).collect())
    }

    /// Like [`Tensor::download`], without blocking.
    pub async fn download_async(&self) -> Result<Vec<f32>> {
        let tensor = self.clone();
        apart(async move { tensor.read().await }).await
    }

    async fn read(&self) -> Result<Vec<f32>> {
        if self.dtype == Dtype::Bool {
            return Err(value_error!("a bool tensor is read back with download_bools"));
        }
        if self.layout.is_empty() {
            return Ok(Vec::new());
        }
        let (start, end) = (self.layout.offset(), self.layout.end());
        let gather = |data: &[f32]| -> Vec<f32> {
            let layout = self.layout.rebased(0);
            if layout.is_contiguous() {
                data[..layout.len()].iter().map(|&x| self.dtype.round(x)).collect()
            } else {
                layout.positions().map(|at| self.dtype.round(data[at])).collect()
            }
        };
        match &self.storage {
            Storage::Gpu(buffer) => {
                let size = self.stored.stored_size();
                // Copies move whole words.
                let (from, to) = (start as u64 * size / 4 * 4, (end as u64 * size).next_multiple_of(4));
                let skipped = start - (from / size) as usize;
                buffer.read(from..to, |bytes| gather(&self.stored.floats(bytes)[skipped..])).await
            }
            #[cfg(feature = "cpu")]
            Storage::Cpu(data) => Ok(gather(&data[start..end])),
            #[cfg(feature = "cpu")]
            Storage::CpuBool(_) => unreachable!("float tensors have float storage"),
        }
    }

    /// The elements of a boolean tensor in row-major order; waits for the device.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn download_bools(&self) -> Result<Vec<bool>> {
        if self.dtype != Dtype::Bool {
            return Err(value_error!("a {} tensor is read back with download", self.dtype));
        }
        if self.layout.is_empty() {
            return Ok(Vec::new());
        }
        let gather = |data: &[u8]| self.layout.positions().map(|at| data[at] != 0).collect();
        match &self.storage {
            Storage::Gpu(buffer) => {
                let end = (self.layout.end() as u64).next_multiple_of(4);
                wait_for(buffer.read(0..end, gather))
            }
            #[cfg(feature = "cpu")]
            Storage::CpuBool(data) => Ok(gather(data)),
            #[cfg(feature = "cpu")]
            Storage::Cpu(_) => unreachable!("bool tensors have byte storage"),
        }
    }

    /// True if both view the same elements of the same buffer.
    pub(crate) fn is_same_view(&self, other: &Tensor) -> bool {
        self.layout == other.layout && self.shares_buffer(other)
    }

    /// An error if a call that reads `operands` cannot write this tensor.
    pub(crate) fn expect_writable<'a>(
        &self,
        mut operands: impl Iterator<Item = (&'static str, &'a Tensor)>,
    ) -> Result<()> {
        if !self.layout.is_one_to_one() {
            return Err(value_error!(
                "the output {:?} with strides {:?} has elements that share a place in memory",
                self.shape(),
                self.layout.strides()
            ));
        }
        if let Some((name, operand)) = operands.find(|(_, operand)| operand.shares_buffer(self)) {
            let overlaps = operand.layout.offset() < self.layout.end() && self.layout.offset() < operand.layout.end();
            return Err(Error::Aliased { operand: name.into(), overlaps });
        }
        Ok(())
    }

    pub(crate) fn shares_buffer(&self, other: &Tensor) -> bool {
        match (&self.storage, &other.storage) {
            (Storage::Gpu(a), Storage::Gpu(b)) => a.is(b),
            #[cfg(feature = "cpu")]
            (Storage::Cpu(a), Storage::Cpu(b)) => Arc::ptr_eq(a, b),
            #[cfg(feature = "cpu")]
            _ => false,
        }
    }

    /// As `[batch, heads, len, dim]`: see [`as_four_axes`].
    pub(crate) fn as_four_axes(&self, name: &str) -> Result<Tensor> {
        Ok(self.with_layout(as_four_axes(name, &self.layout)?))
    }

    /// The shape of a tensor that has four axes.
    pub(crate) fn four_axes(&self) -> [usize; 4] {
        self.shape().try_into().expect("four axes")
    }

    pub(crate) fn expect_float(&self, name: &str) -> Result<()> {
        if self.dtype == Dtype::Bool {
            return Err(value_error!(
                "{name} is a bool tensor; floats are needed (masks are made with Mask::keep_where or Mask::hide_where)"
            ));
        }
        Ok(())
    }
}

/// The device that `tensor` and all `others` are on.
pub(crate) fn common_device<'a>(
    tensor: &Tensor,
    others: impl IntoIterator<Item = (&'a str, &'a Tensor)>,
) -> Result<Device> {
    let device = tensor.device();
    for (name, other) in others {
        if !device.same_as(&other.device()) {
            return Err(Error::Device { what: name.into(), there: other.device().name(), here: device.name() });
        }
    }
    Ok(device)
}
