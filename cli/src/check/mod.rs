//! `attn check`: checks whether attention is right.

mod args;
pub mod case;
pub mod compare;
pub mod compute;
mod dawn;
mod jax;
mod keras;
mod onnx;
pub mod report;
mod signature;
mod stop;
mod suite;
mod torch;
mod transformers;

pub use args::{CheckArgs, check};
