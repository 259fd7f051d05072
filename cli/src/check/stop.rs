//! Why a case gives nothing to compare.

use crate::error::Error;

/// Why a case gives no comparisons.
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
            // Not what this method does, or a feature or limit that the adapter lacks.
            wgpu_attention::Error::Method { .. }
            | wgpu_attention::Error::Unsupported { .. }
            | wgpu_attention::Error::TooLarge { .. } => Stop::Skip(error.to_string()),
            _ => Stop::Error(error.into()),
        }
    }
}
