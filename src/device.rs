//! The device that holds tensors and runs calls: an adapter, or the CPU backend.

use crate::error::{Error, Result};
use crate::gpu::{Gpu, GpuOptions};

#[cfg(feature = "cpu")]
static FALLBACK_REASON: std::sync::OnceLock<String> = std::sync::OnceLock::new();

/// An adapter, or the CPU backend. Cheap to clone.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Device {
    /// An adapter, through wgpu.
    Gpu(Gpu),
    /// The CPU backend: the same calls, threaded, without an adapter.
    #[cfg(feature = "cpu")]
    Cpu,
}

impl Device {
    /// The best adapter ([`Gpu::new`]). On a machine without one, the CPU backend, with a warning in the log
    /// ([`Device::fallback_notice`] gives the same line).
    ///
    /// # Errors
    ///
    /// - [`NoAdapter`](Error::NoAdapter): `WGPU_ADAPTER_NAME` names an adapter that does not exist, or there is none
    ///   and the feature `cpu` is off. An adapter that is requested by name never falls back to the CPU backend.
    /// - [`Gpu`](Error::Gpu): the adapter did not create a device.
    pub fn new() -> Result<Device> {
        Device::with_options(&GpuOptions::default())
    }

    /// Like [`Device::new`], with a choice of adapter; the name `cpu` is the CPU backend.
    pub fn with_options(options: &GpuOptions) -> Result<Device> {
        #[cfg(feature = "cpu")]
        if options.adapter.as_deref().is_some_and(|name| name.eq_ignore_ascii_case("cpu")) {
            return Ok(Device::Cpu);
        }
        match Gpu::with_options(options) {
            Ok(gpu) => Ok(Device::Gpu(gpu)),
            #[cfg(feature = "cpu")]
            Err(error @ Error::NoAdapter { .. }) if !options.names_an_adapter() => {
                let reason = error.to_string();
                log::warn!("{}", Device::fallback_notice(&reason));
                let _ = FALLBACK_REASON.set(reason);
                Ok(Device::Cpu)
            }
            Err(error) => Err(error),
        }
    }

    /// Why [`Device::new`] fell back to the CPU backend in this process, for programs without a logger. `None` on an
    /// adapter, and if no call fell back.
    pub fn fallback_reason(&self) -> Option<&'static str> {
        match self {
            Device::Gpu(_) => None,
            #[cfg(feature = "cpu")]
            Device::Cpu => FALLBACK_REASON.get().map(String::as_str),
        }
    }

    /// The line that says why the CPU backend was chosen.
    pub fn fallback_notice(reason: &str) -> String {
        format!("no GPU adapter ({reason}); using the CPU backend")
    }

    /// The adapter's name, or `cpu`.
    pub fn name(&self) -> String {
        match self {
            Device::Gpu(gpu) => gpu.info().name.clone(),
            #[cfg(feature = "cpu")]
            Device::Cpu => "cpu".into(),
        }
    }

    /// The adapter, if this device is one.
    pub fn gpu(&self) -> Option<&Gpu> {
        match self {
            Device::Gpu(gpu) => Some(gpu),
            #[cfg(feature = "cpu")]
            Device::Cpu => None,
        }
    }

    /// The highest rate of f32 multiply-adds that this device reaches, in operations per second
    /// ([`Gpu::multiply_add_ceiling`]); for the CPU backend, on all its threads. Measured once, then cached.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn multiply_add_ceiling(&self) -> Result<f64> {
        match self {
            Device::Gpu(gpu) => gpu.multiply_add_ceiling(),
            #[cfg(feature = "cpu")]
            Device::Cpu => Ok(crate::cpu::multiply_add_ceiling()),
        }
    }

    /// Bytes of memory available to tensors on this device, if known: the machine's memory for the CPU backend and
    /// software adapters.
    pub fn memory(&self) -> Option<u64> {
        match self {
            Device::Gpu(gpu) => gpu.capabilities().memory,
            #[cfg(feature = "cpu")]
            Device::Cpu => crate::memory::system_memory(),
        }
    }

    /// An error unless a call on this device can use tensors on `of_tensors`.
    pub(crate) fn expect_same(&self, of_tensors: &Device) -> Result<()> {
        if self.same_as(of_tensors) {
            return Ok(());
        }
        Err(Error::Device { what: "a tensor".into(), there: of_tensors.name(), here: self.name() })
    }

    pub(crate) fn same_as(&self, other: &Device) -> bool {
        match (self, other) {
            (Device::Gpu(a), Device::Gpu(b)) => a.same_as(b),
            #[cfg(feature = "cpu")]
            (Device::Cpu, Device::Cpu) => true,
            #[cfg(feature = "cpu")]
            _ => false,
        }
    }
}

impl From<Gpu> for Device {
    fn from(gpu: Gpu) -> Device {
        Device::Gpu(gpu)
    }
}

impl From<&Gpu> for Device {
    fn from(gpu: &Gpu) -> Device {
        Device::Gpu(gpu.clone())
    }
}

impl From<&Device> for Device {
    fn from(device: &Device) -> Device {
        device.clone()
    }
}
