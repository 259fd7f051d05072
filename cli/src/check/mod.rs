//! `attn check`: whether attention comes out right.

pub mod case;
pub mod compare;
mod dawn;
pub mod folder;
mod onnx;
pub mod report;
mod suite;
mod torch;
mod transformers;

pub use folder::{CheckArgs, check};
