//! `attn check`: whether attention comes out right.

pub mod case;
pub mod compare;
pub mod compute;
mod dawn;
mod folder;
mod jax;
mod keras;
mod onnx;
pub mod report;
mod signature;
mod stop;
mod suite;
mod torch;
mod transformers;

pub use folder::{CheckArgs, check};
