//! Why a case has nothing to compare.

use crate::error::Error;

/// Why a case has no comparisons.
pub enum Stop {
    Skip(String),
    Error(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Stop {
        Stop::Error(error)
    }
}
impl From<wgpu_attention::Error> for Stop {
    fn from(error: wgpu_attention::Error) -> Stop {
        match error {
            // The method does not support it, or the adapter lacks a feature or limit.
            wgpu_attention::Error::Method { .. }
            | wgpu_attention::Error::Unsupported { .. }
            | wgpu_attention::Error::TooLarge { .. } => Stop::Skip(error.to_string()),
            _ => Stop::Error(error.into()),
        }
    }
}
