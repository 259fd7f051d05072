//! `attn check`: whether attention comes out right.

pub mod case;
pub mod compare;
mod dawn;
pub mod folder;
mod jax;
mod keras;
mod onnx;
pub mod report;
mod signature;
mod suite;
mod torch;
mod transformers;

pub use folder::{CheckArgs, check};
