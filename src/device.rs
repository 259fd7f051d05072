//! Where tensors live and calls run: an adapter, or the CPU backend.

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
    /// The best adapter ([`Gpu::new`]); on a machine without any, the CPU backend, with one line to
    /// the log that says so ([`Device::fallback_notice`] holds the same line).
    ///
    /// An adapter that was asked for by name and is not there is an error, never a fallback.
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

    /// Why [`Device::new`] took the CPU backend in this process, for programs without a logger; `None` on an adapter,
    /// and where no call fell back.
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

    /// The adapter behind this device, if it is one.
    pub fn gpu(&self) -> Option<&Gpu> {
        match self {
            Device::Gpu(gpu) => Some(gpu),
            #[cfg(feature = "cpu")]
            Device::Cpu => None,
        }
    }

    /// The most f32 operations per second that this device does in multiply-adds
    /// ([`Gpu::multiply_add_ceiling`]); the CPU backend on all its threads. Measured once, then known.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn multiply_add_ceiling(&self) -> Result<f64> {
        match self {
            Device::Gpu(gpu) => gpu.multiply_add_ceiling(),
            #[cfg(feature = "cpu")]
            Device::Cpu => Ok(crate::cpu::multiply_add_ceiling()),
        }
    }

    /// Bytes of memory that tensors on this device can fill, where that is known: the machine's for the CPU
    /// backend and software adapters.
    pub fn memory(&self) -> Option<u64> {
        match self {
            Device::Gpu(gpu) => gpu.capabilities().memory,
            #[cfg(feature = "cpu")]
            Device::Cpu => crate::memory::system_memory(),
        }
    }

    /// An error unless tensors that live on `of_tensors` can take part in a call on this device.
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
