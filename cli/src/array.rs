//! Host arrays, as read from files.

use half::{bf16, f16};
use wgpu_attention::{Device, Dtype, Layout, Tensor};

use crate::error::{Result, fail};

/// The elements, in row-major order.
#[derive(Clone, Debug, PartialEq)]
pub enum Values {
    Bool(Vec<bool>),
    /// Any integer type.
    Int(Vec<i64>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
    F32(Vec<f32>),
    F64(Vec<f64>),
}

/// A row-major array.
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    shape: Vec<usize>,
    values: Values,
}

impl Values {
    pub fn len(&self) -> usize {
        match self {
            Values::Bool(x) => x.len(),
            Values::Int(x) => x.len(),
            Values::F16(x) => x.len(),
            Values::BF16(x) => x.len(),
            Values::F32(x) => x.len(),
            Values::F64(x) => x.len(),
        }
    }
    pub fn type_name(&self) -> &'static str {
        match self {
            Values::Bool(_) => "bool",
            Values::Int(_) => "integer",
            Values::F16(_) => "f16",
            Values::BF16(_) => "bf16",
            Values::F32(_) => "f32",
            Values::F64(_) => "f64",
        }
    }
}

impl Array {
    pub fn new(shape: &[usize], values: Values) -> Result<Array> {
        let expected = wgpu_attention::problem::checked_len(shape)?;
        if expected != values.len() {
            fail!("shape {shape:?} has {expected} elements but {} were given", values.len());
        }
        Ok(Array { shape: shape.to_vec(), values })
    }

    /// f32 values, rounded to a tensor type.
    pub fn from_floats(shape: &[usize], data: Vec<f32>, dtype: Dtype) -> Result<Array> {
        let values = match dtype {
            Dtype::F16 => Values::F16(data.into_iter().map(f16::from_f32).collect()),
            Dtype::BF16 => Values::BF16(data.into_iter().map(bf16::from_f32).collect()),
            _ => Values::F32(data),
        };
        Array::new(shape, values)
    }

    /// The contents of a float tensor, in its own type.
    pub fn download(tensor: &Tensor) -> Result<Array> {
        Array::from_floats(tensor.shape(), tensor.download()?, tensor.dtype())
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }
    pub fn values(&self) -> &Values {
        &self.values
    }
    pub fn is_bool(&self) -> bool {
        matches!(self.values, Values::Bool(_))
    }

    pub fn is_float(&self) -> bool {
        !matches!(self.values, Values::Bool(_) | Values::Int(_))
    }

    /// The tensor type of a float array; for other types an error that names `name` and the types it may have.
    pub fn dtype(&self, name: &str) -> Result<Dtype> {
        match self.values {
            Values::F16(_) => Ok(Dtype::F16),
            Values::BF16(_) => Ok(Dtype::BF16),
            // The upload rounds it.
            Values::F32(_) | Values::F64(_) => Ok(Dtype::F32),
            _ => fail!(
                "{name} is {}; it must be f32, f16, bf16 or f64 (in Python, x.astype('float32'))",
                self.values.type_name()
            ),
        }
    }

    /// Uploads a float array. f64 is rounded to f32, with a note on stderr the first time.
    pub fn upload(&self, name: &str, device: &Device) -> Result<Tensor> {
        self.dtype(name)?;
        Ok(match &self.values {
            Values::F16(x) => Tensor::from_slice(device, &self.shape, x)?,
            Values::BF16(x) => Tensor::from_slice(device, &self.shape, x)?,
            Values::F32(x) => Tensor::from_slice(device, &self.shape, x)?,
            Values::F64(x) => {
                let rounded = self.to_f32();
                note_rounding(name, x, &rounded);
                Tensor::from_slice(device, &self.shape, &rounded)?
            }
            _ => unreachable!("dtype() rejects other types"),
        })
    }

    /// Uploads a boolean array; bytes of 0 and 1 are accepted too.
    pub fn upload_bools(&self, name: &str, device: &Device) -> Result<Tensor> {
        Ok(Tensor::from_bools(device, &self.shape, &self.bools(name)?)?)
    }

    pub fn bools(&self, name: &str) -> Result<Vec<bool>> {
        match &self.values {
            Values::Bool(x) => Ok(x.clone()),
            Values::Int(x) => match x.iter().position(|value| !(0..=1).contains(value)) {
                None => Ok(x.iter().map(|&value| value == 1).collect()),
                Some(at) => fail!("{name} holds {} at element {at}; only 0 and 1 can be booleans", x[at]),
            },
            other => fail!(
                "{name} is {}; it must be bool, or u8 of 0 and 1 (in Python, x.astype(bool)); an additive mask of floats \
                 is a bias",
                other.type_name()
            ),
        }
    }

    pub fn ints(&self, name: &str) -> Result<&[i64]> {
        match &self.values {
            Values::Int(x) => Ok(x),
            other => fail!(
                "{name} is {}; it must be integers, such as i64 (in Python, x.astype('int64'))",
                other.type_name()
            ),
        }
    }

    /// Non-negative integers.
    pub fn lengths(&self, name: &str) -> Result<Vec<usize>> {
        let ints = self.ints(name)?;
        match ints.iter().position(|&x| x < 0) {
            None => Ok(ints.iter().map(|&x| x as usize).collect()),
            Some(at) => fail!("{name}[{at}] = {} must not be negative", ints[at]),
        }
    }

    /// Every number as f64.
    pub fn to_f64(&self) -> Vec<f64> {
        match &self.values {
            Values::Bool(x) => x.iter().map(|&x| f64::from(u8::from(x))).collect(),
            Values::Int(x) => x.iter().map(|&x| x as f64).collect(),
            Values::F16(x) => x.iter().map(|x| x.to_f64()).collect(),
            Values::BF16(x) => x.iter().map(|x| x.to_f64()).collect(),
            Values::F32(x) => x.iter().map(|&x| f64::from(x)).collect(),
            Values::F64(x) => x.clone(),
        }
    }

    /// Every number as f32, rounded.
    pub fn to_f32(&self) -> Vec<f32> {
        match &self.values {
            Values::F32(x) => x.clone(),
            _ => self.to_f64().into_iter().map(|x| x as f32).collect(),
        }
    }

    /// The same elements with permuted axes.
    pub fn permute(&self, axes: &[usize]) -> Result<Array> {
        let layout = Layout::contiguous(&self.shape)?.permute(axes)?;
        fn gather<T: Copy>(data: &[T], layout: &Layout) -> Vec<T> {
            layout.positions().map(|at| data[at]).collect()
        }
        let values = match &self.values {
            Values::Bool(x) => Values::Bool(gather(x, &layout)),
            Values::Int(x) => Values::Int(gather(x, &layout)),
            Values::F16(x) => Values::F16(gather(x, &layout)),
            Values::BF16(x) => Values::BF16(gather(x, &layout)),
            Values::F32(x) => Values::F32(gather(x, &layout)),
            Values::F64(x) => Values::F64(gather(x, &layout)),
        };
        Array::new(layout.shape(), values)
    }
}

/// Notes on stderr, once, that f64 is rounded, and for every tensor how many of its values overflow f32.
fn note_rounding(name: &str, values: &[f64], rounded: &[f32]) {
    static SAID: std::sync::Once = std::sync::Once::new();
    SAID.call_once(|| anstream::eprintln!("note: {name} is f64; f64 tensors are rounded to f32, the compute type"));
    let beyond =
        values.iter().zip(rounded).filter(|(value, rounded)| value.is_finite() && !rounded.is_finite()).count();
    if beyond > 0 {
        anstream::eprintln!("note: {beyond} of the values of {name} overflow f32 and become infinite");
    }
}
