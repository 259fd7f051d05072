//! Kernels as pure data: the shader files, the text of each variant, and the steps of a call on an adapter with given
//! capabilities. Independent of wgpu and GPUs.

pub mod access;
mod capabilities;
pub mod catalogue;
pub mod gpu_kind;
mod method;
pub mod params;
mod parts;
pub mod plan;
mod specialise;
mod tuning_key;
pub mod turns;

pub use access::{Access, Operand};
pub use capabilities::{AdapterClass, Capabilities};
pub use catalogue::{Kernel, Variant, variant_names, variant_source};
pub use gpu_kind::GpuKind;
pub(crate) use method::three_passes_compete;
pub use method::{Method, Tile};
pub use plan::{Binding, Cost, Plan, Slot, Step};
pub use specialise::{Body, Changes, specialise};
pub use tuning_key::{KeyRules, TuningKey};
