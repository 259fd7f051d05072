//! `attn check`: whether attention comes out right.

mod case;
pub mod compare;
#[allow(dead_code, reason = "its tests alone run it so far")]
mod dawn;
mod folder;
mod onnx;
mod report;
mod torch;
mod transformers;

pub use folder::{CheckArgs, check};
