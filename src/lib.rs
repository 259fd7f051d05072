//! Attention in WGSL compute shaders, driven from Rust through wgpu, on any adapter.
#![warn(missing_docs)]

mod attention;
#[cfg(feature = "cpu")]
mod cpu;
mod device;
mod error;
mod gpu;
pub mod kernels;
mod multi_head;
pub mod problem;
mod record;
pub mod reference;
mod state_dict;
mod tensor;

pub use attention::softmax_async;
pub use attention::{Attended, Attention, Mask, Weights, softmax};
pub use device::Device;
pub use error::{Error, Result};
pub use gpu::{AdapterSummary, AllocationCounts, Gpu, GpuOptions};
pub use multi_head::{KerasKernels, MultiHeadAttention, MultiHeadConfig, MultiHeadOutput};
pub use problem::{Align, Dtype, Element, Layout, MaskMeaning, ScoreStage};
pub use state_dict::{HostTensor, StateDict};
pub use tensor::Tensor;
pub use wgpu;
