//! Attention in WGSL compute shaders, driven from Rust through wgpu, on any adapter.
//!
//! ```text
//! S = scale · Q·Kᵀ  →  softcap  →  + bias  →  mask  →  P = softmax(S) over keys  →  O = P·V
//!
//! Q [batch, heads_q, len_q, dim_k]    K [batch, heads_kv, len_k, dim_k]    V [batch, heads_kv, len_k, dim_v]
//! P [batch, heads_q, len_q, len_k]    O [batch, heads_q, len_q, dim_v]     LSE [batch, heads_q, len_q]
//! ```
//!
//! ```
//! use wgpu_attention::{Attention, Device, Tensor};
//!
//! # fn main() -> wgpu_attention::Result<()> {
//! let device = Device::new()?;
//! let x = Tensor::from_slice(&device, &[2, 3], &[1.0f32, 0.0, 0.0, 0.0, 1.0, 0.0])?;
//! let out = Attention::new().scale(0.0).forward(&x, &x, &x)?.output.download()?;
//! assert_eq!(out, [0.5, 0.5, 0.0, 0.5, 0.5, 0.0]); // scale 0: every key weighs the same
//! # Ok(())
//! # }
//! ```
//!
//! Call [`Attention`], [`MultiHeadAttention`] and [`KvCache`]. [`Device`], [`Gpu`] and [`Tensor`] say where a call runs
//! and what it reads; [`position`] holds the positional methods. [`variant_names`] and [`variant_source`] list and
//! print the kernels. Hidden modules are for this project's own tests and tools and may change without notice.
//!
//! # Blocking and async calls
//!
//! A call without `_async` returns once its work is submitted; `download` waits for the results. Its `_async` twin
//! takes the same arguments and does not block the executor's thread: drivers compile and wait on a thread pool. Calls
//! that block all the same say so in their documentation.
//!
//! New to attention? `docs/guide/` in the repository explains it in five lessons.
//!
//! Limits:
//!
//! - Sequences are shorter than 2²⁹.
//! - Arithmetic is f32.
//! - Requested weights and scores are stored in memory, in slices if the adapter's limits require it. So are the scores
//!   of heads wider than 512 (1,024 on software adapters if few rows share a key head).
#![cfg_attr(docsrs, feature(doc_cfg))]
#![forbid(unsafe_code)]
#![warn(missing_docs)]

/// The README's code, compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

/// The guide's code.
#[cfg(doctest)]
mod guide {
    #[doc = include_str!("../docs/guide/1-why-attention.md")]
    struct WhyAttention;
    #[doc = include_str!("../docs/guide/2-scaled-dot-product.md")]
    struct ScaledDotProduct;
    #[doc = include_str!("../docs/guide/3-multi-head.md")]
    struct MultiHead;
    #[doc = include_str!("../docs/guide/4-self-and-cross.md")]
    struct SelfAndCross;
    #[doc = include_str!("../docs/guide/5-positions.md")]
    struct Positions;
}

mod attention;
mod backward;
mod cache;
mod call;
#[cfg(feature = "cpu")]
mod cpu;
mod device;
mod error;
mod gpu;
mod inspect;
#[doc(hidden)]
pub mod kernels;
mod lower;
mod memory;
mod multi_head;
mod ops;
mod packed;
pub mod position;
#[doc(hidden)]
pub mod problem;
#[doc(hidden)]
pub mod reference;
mod state_dict;
mod tensor;
#[cfg(not(target_arch = "wasm32"))]
mod tune;
mod wait;

pub use attention::{Attention, EmptyRows};
pub use cache::{KvCache, KvCacheConfig, ScatterMode};
pub use call::{Attended, Cotangents, Gradients, Inspected, Mask};
pub use device::Device;
pub use error::{Error, Result};
pub use gpu::{AdapterSummary, AllocationCounts, EncodeSlices, Gpu, GpuOptions, Profile, Traced};
#[cfg(all(feature = "export", not(target_arch = "wasm32")))]
pub use gpu::{BindingKind, ExportedBinding, ExportedBuffer, ExportedCall, ExportedOutput, ExportedStep};
pub use inspect::Inspect;
pub use kernels::catalogue::{Variant, variant_names, variant_source};
pub use kernels::{AdapterClass, Capabilities, GpuKind, KeyRules, Method, Tile, TuningKey};
pub use multi_head::{
    KerasKernels, LoadOptions, MultiHeadAttention, MultiHeadConfig, MultiHeadOutput, Names, NormKind, NormSpan,
    Projections, QueryKeyNorm,
};
pub use ops::{encode_project, merge_async, project_async, softmax_async};
#[cfg(not(target_arch = "wasm32"))]
pub use ops::{merge, project, softmax};
pub use problem::{Align, Dtype, Element, Layout, MaskMeaning, ScoreStage, WantedGradients, Weights};
pub use state_dict::{HostTensor, StateDict};
pub use tensor::Tensor;
#[cfg(not(target_arch = "wasm32"))]
pub use tune::{Candidate, Tuned};
pub use {half, wgpu};
