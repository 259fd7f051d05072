//! Where tensors live and calls run: an adapter, or the CPU backend.

use crate::error::{Error, Result};
use crate::gpu::{Gpu, GpuOptions};

/// An adapter, or the CPU backend. Cheap to clone.
#[derive(Clone, Debug)]
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

    /// As [`Device::new`], with a say in which adapter.
    pub fn with_options(options: &GpuOptions) -> Result<Device> {
        match Gpu::with_options(options) {
            Ok(gpu) => Ok(Device::Gpu(gpu)),
            #[cfg(feature = "cpu")]
            Err(Error::NoAdapter(reason)) if !options.names_an_adapter() => {
                log::warn!("{}", Device::fallback_notice(&reason));
                Ok(Device::Cpu)
            }
            Err(error) => Err(error),
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
        let [here, there] = [self.name(), of_tensors.name()];
        Err(Error::Device(format!("the tensors live on {there} but the call runs on {here}")))
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
