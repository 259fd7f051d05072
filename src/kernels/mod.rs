//! First floor: kernels as pure data.
