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
//! Where things are: [`Attention`], [`MultiHeadAttention`] and [`KvCache`] are what a user calls; [`Device`], [`Gpu`] and
//! [`Tensor`] say where; [`position`] tells attention where tokens stand; [`problem`] holds the rules in checked
//! arithmetic; [`kernels`] the shaders as plain data and the planning of a call; [`mod@reference`] the f64 truth that
//! tests lean on.
//!
//! New to attention? `docs/guide/` in the repository teaches it in five lessons.
//!
//! Limits: sequences are shorter than 2²⁹; weights and scores that are asked for are held in memory, in
//! slices where the adapter's limits ask for it, and so are those of heads wider than 512 (1,024 on software adapters
//! where few rows share a key head); arithmetic is f32.
#![cfg_attr(docsrs, feature(doc_cfg))]
#![forbid(unsafe_code)]
#![warn(missing_docs)]

/// The code of the README, compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

/// The code of the guide for learners.
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
mod cache;
mod call;
#[cfg(feature = "cpu")]
mod cpu;
mod device;
mod error;
mod gpu;
mod inspect;
pub mod kernels;
mod lower;
mod memory;
mod multi_head;
mod ops;
mod packed;
pub mod position;
pub mod problem;
pub mod reference;
mod state_dict;
mod tensor;
#[cfg(not(target_arch = "wasm32"))]
mod tune;

pub use attention::{Attention, EmptyRows};
pub use cache::{KvCache, KvCacheConfig, ScatterMode};
pub use call::{Attended, Inspected, Mask};
pub use device::Device;
pub use error::{Error, Result};
pub use gpu::{AdapterSummary, AllocationCounts, EncodeSlices, Gpu, GpuOptions, Profile, Traced};
#[cfg(all(feature = "export", not(target_arch = "wasm32")))]
pub use gpu::{BindingKind, ExportedBinding, ExportedBuffer, ExportedCall, ExportedOutput, ExportedStep};
pub use inspect::Inspect;
pub use kernels::{KeyRules, Method, Tile, TuningKey};
pub use multi_head::{
    KerasKernels, LoadOptions, MultiHeadAttention, MultiHeadConfig, MultiHeadOutput, Names, NormKind, NormSpan,
    QueryKeyNorm,
};
#[cfg(not(target_arch = "wasm32"))]
pub use ops::{merge, project, softmax};
pub use ops::{merge_async, project_async, softmax_async};
pub use problem::{Align, Dtype, Element, Layout, MaskMeaning, ScoreStage, Weights};
pub use state_dict::{HostTensor, StateDict};
pub use tensor::Tensor;
#[cfg(not(target_arch = "wasm32"))]
pub use tune::{Candidate, Tuned};
pub use {half, wgpu};
