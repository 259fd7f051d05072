//! Named tensors on the host: what a PyTorch state dict holds.

use std::collections::BTreeMap;

use crate::error::{Error, Result, shape_error};
use crate::problem::checked_len;

/// A tensor on the host, f32, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct HostTensor {
    shape: Vec<usize>,
    data: Vec<f32>,
}

impl HostTensor {
    /// `data` must have as many values as `shape` says.
    pub fn new(shape: &[usize], data: Vec<f32>) -> Result<HostTensor> {
        if checked_len(shape)? != data.len() {
            return Err(shape_error!("shape {shape:?} does not hold {} values", data.len()));
        }
        Ok(HostTensor { shape: shape.to_vec(), data })
    }
    /// Lengths of the axes.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }
    /// The values, row-major.
    pub fn data(&self) -> &[f32] {
        &self.data
    }
}

/// Names and tensors, in name order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StateDict(BTreeMap<String, HostTensor>);

impl StateDict {
    /// The tensor called `name`.
    pub fn get(&self, name: &str) -> Option<&HostTensor> {
        self.0.get(name)
    }
    /// Adds or replaces a tensor.
    pub fn insert(&mut self, name: impl Into<String>, tensor: HostTensor) {
        self.0.insert(name.into(), tensor);
    }
    /// All tensors in name order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &HostTensor)> {
        self.0.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    pub(crate) fn names_or_nothing(&self) -> String {
        const SHOWN: usize = 12;
        let names: Vec<&str> = self.0.keys().take(SHOWN).map(String::as_str).collect();
        match (names.is_empty(), self.0.len().saturating_sub(SHOWN)) {
            (true, _) => "nothing".into(),
            (_, 0) => names.join(", "),
            (_, more) => format!("{} and {more} more", names.join(", ")),
        }
    }

    /// Reads a safetensors file; f64, f16 and bf16 values are converted to f32, tensors of integers
    /// are left out.
    #[cfg(feature = "safetensors")]
    pub fn from_safetensors(bytes: &[u8]) -> Result<StateDict> {
        use safetensors::Dtype::{BF16, F16, F32, F64};
        let file = safetensors::SafeTensors::deserialize(bytes)
            .map_err(|error| Error::File(format!("not a valid safetensors file ({} bytes): {error}", bytes.len())))?;
        let mut state = StateDict::default();
        for (name, view) in file.tensors() {
            let data = view.data();
            let values: Vec<f32> = match view.dtype() {
                F32 => data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
                F64 => data
                    .chunks_exact(8)
                    .map(|b| f64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]) as f32)
                    .collect(),
                F16 => data.chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
                BF16 => data.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
                _ => continue,
            };
            state.insert(name, HostTensor::new(view.shape(), values)?);
        }
        Ok(state)
    }

    /// The bytes of a safetensors file that PyTorch reads back with `load_file`.
    #[cfg(feature = "safetensors")]
    pub fn to_safetensors(&self) -> Result<Vec<u8>> {
        let bytes: Vec<(&str, &HostTensor, Vec<u8>)> = self
            .iter()
            .map(|(name, tensor)| (name, tensor, tensor.data.iter().flat_map(|x| x.to_le_bytes()).collect()))
            .collect();
        let views = bytes
            .iter()
            .map(|(name, tensor, data)| {
                safetensors::tensor::TensorView::new(safetensors::Dtype::F32, tensor.shape.clone(), data)
                    .map(|view| (*name, view))
            })
            .collect::<std::result::Result<Vec<_>, _>>()
            .map_err(|error| Error::File(format!("cannot write safetensors: {error}")))?;
        safetensors::serialize(views, None).map_err(|error| Error::File(format!("cannot write safetensors: {error}")))
    }
}
