//! The first floor: kernels as pure data. Which shader files there are, how a variant's text is made,
//! and which steps a call takes on an adapter of given capabilities. No wgpu, no GPU.

pub mod access;
mod capabilities;
pub mod catalogue;
mod class;
pub mod params;
mod parts;
pub mod plan;
mod specialise;
pub mod turns;

pub use access::{Access, Operand};
pub use capabilities::{AdapterClass, Capabilities};
pub use catalogue::{Kernel, Variant, variant_names, variant_source};
pub use class::ShapeClass;
pub(crate) use class::three_passes_compete;
pub use plan::{Binding, Cost, Cut, Method, Plan, Slot, Step};
pub use specialise::{Body, Changes, specialise};
