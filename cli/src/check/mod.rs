//! `attn check`: whether attention comes out right.

mod case;
pub mod compare;
mod dawn;
mod folder;
mod onnx;
mod report;
mod suite;
mod torch;
mod transformers;

pub use folder::{CheckArgs, check};
