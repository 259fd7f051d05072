//! Element types. Arithmetic is in f32; f16 and bf16 are storage formats.

use std::borrow::Cow;

use half::{bf16, f16};

/// The element type of a tensor, in which it was created and is returned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Dtype {
    /// 32-bit float.
    #[default]
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    BF16,
    /// One byte per element, 0 or 1: masks.
    Bool,
}

impl Dtype {
    /// Size in bytes of one element on an adapter.
    pub fn stored_size(self) -> u64 {
        match self {
            Dtype::Bool => 1,
            Dtype::F16 | Dtype::BF16 => 2,
            Dtype::F32 => 4,
        }
    }

    /// The values that bytes hold in this type.
    pub(crate) fn floats(self, bytes: &[u8]) -> Cow<'_, [f32]> {
        match self {
            Dtype::F16 => bytemuck::cast_slice::<u8, f16>(bytes).iter().map(|x| x.to_f32()).collect(),
            Dtype::BF16 => bytemuck::cast_slice::<u8, bf16>(bytes).iter().map(|x| x.to_f32()).collect(),
            Dtype::F32 => Cow::Borrowed(bytemuck::cast_slice(bytes)),
            Dtype::Bool => bytes.iter().map(|&x| f32::from(u8::from(x != 0))).collect(),
        }
    }

    /// `value` after a round trip through this type.
    pub fn round(self, value: f32) -> f32 {
        match self {
            Dtype::F16 => f16::from_f32(value).to_f32(),
            Dtype::BF16 => bf16::from_f32(value).to_f32(),
            _ => value,
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Dtype::F32 => "f32",
            Dtype::F16 => "f16",
            Dtype::BF16 => "bf16",
            Dtype::Bool => "bool",
        })
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

/// A float type that tensors can be created from and read back as.
pub trait Element: bytemuck::Pod + Send + Sync + sealed::Sealed + 'static {
    /// The tensor type of these elements.
    const DTYPE: Dtype;
    /// The value as f32.
    fn to_f32(self) -> f32;
    /// The nearest value of this type.
    fn from_f32(value: f32) -> Self;
}

impl Element for f32 {
    const DTYPE: Dtype = Dtype::F32;
    fn to_f32(self) -> f32 {
        self
    }
    fn from_f32(value: f32) -> Self {
        value
    }
}

impl Element for f16 {
    const DTYPE: Dtype = Dtype::F16;
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }
}

impl Element for bf16 {
    const DTYPE: Dtype = Dtype::BF16;
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
    fn from_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }
}
