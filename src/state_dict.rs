//! Named tensors on the host, as in a PyTorch state dict.

use std::collections::BTreeMap;

#[cfg(feature = "safetensors")]
use crate::error::Error;
use crate::error::{Result, shape_error};
use crate::problem::checked_len;

/// A tensor on the host, f32, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct HostTensor {
    shape: Vec<usize>,
    data: Vec<f32>,
}

impl HostTensor {
    /// A tensor of row-major `data`, which must have as many values as `shape`.
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

/// A tensor whose values were not read: its type cannot be read as floats, or it was not requested.
#[derive(Clone, Debug, PartialEq)]
struct Unread {
    dtype: String,
    shape: Vec<usize>,
}

/// The type of a tensor in a shard that was not opened.
pub(crate) const NOT_OPENED: &str = "not read";

/// Named tensors, in order of name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StateDict {
    tensors: BTreeMap<String, HostTensor>,
    unread: BTreeMap<String, Unread>,
}

impl StateDict {
    /// The tensor called `name`, if its values were read.
    pub fn get(&self, name: &str) -> Option<&HostTensor> {
        self.tensors.get(name)
    }
    /// Adds or replaces a tensor.
    pub fn insert(&mut self, name: impl Into<String>, tensor: HostTensor) {
        let name = name.into();
        self.unread.remove(&name);
        self.tensors.insert(name, tensor);
    }
    /// Removes a tensor; false if there is none with that name.
    pub fn remove(&mut self, name: &str) -> bool {
        self.tensors.remove(name).is_some() | self.unread.remove(name).is_some()
    }
    /// All tensors whose values were read, in order of name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &HostTensor)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }
    /// The names of all tensors, including those whose values were not read.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().chain(self.unread.keys()).map(String::as_str)
    }
    /// True if there is no tensor at all.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty() && self.unread.is_empty()
    }
    /// Type and shape of a tensor whose values were not read: integers, booleans, types of 8 bits or fewer, and tensors
    /// that [`StateDict::open`] did not select (type `not read` and no axes, if the tensor is in a shard that was not
    /// opened).
    pub fn unread(&self, name: &str) -> Option<(&str, &[usize])> {
        self.unread.get(name).map(|tensor| (tensor.dtype.as_str(), tensor.shape.as_slice()))
    }
    pub(crate) fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name) || self.unread.contains_key(name)
    }
    pub(crate) fn shape_of(&self, name: &str) -> Option<&[usize]> {
        self.get(name).map(HostTensor::shape).or_else(|| self.unread(name).map(|(_, shape)| shape))
    }

    /// Reads a safetensors file. f64, f16 and bf16 values are converted to f32. For tensors of other types, only names,
    /// types and shapes are kept; see [`StateDict::unread`].
    ///
    /// # Errors
    ///
    /// - [`File`](Error::File): `bytes` is not a valid safetensors file; the message says what it is instead, if known.
    /// - [`Overflow`](Error::Overflow): a tensor's number of elements does not fit in 64 bits.
    #[cfg(feature = "safetensors")]
    pub fn from_safetensors(bytes: &[u8]) -> Result<StateDict> {
        let invalid = |why: String| {
            let is = files::what_it_is(bytes).map(|is| format!("; {is}")).unwrap_or_default();
            Error::File(format!("not a valid safetensors file ({} bytes): {why}{is}", bytes.len()))
        };
        let header_len = files::header_len(bytes, bytes.len() as u64).map_err(invalid)?;
        let (header, data) = bytes[8..].split_at(header_len);
        let metadata = files::tensors(header, data.len() as u64).map_err(invalid)?;
        let mut state = StateDict::default();
        for (name, info) in metadata.tensors() {
            let (first, end) = info.data_offsets;
            state.take(name, info.dtype, &info.shape, Some(&data[first..end]))?;
        }
        Ok(state)
    }

    /// Adds a tensor from a file; without values if `data` is missing or not floats.
    #[cfg(feature = "safetensors")]
    fn take(&mut self, name: String, dtype: safetensors::Dtype, shape: &[usize], data: Option<&[u8]>) -> Result<()> {
        match data.and_then(|data| floats(dtype, data)) {
            Some(values) => self.insert(name, HostTensor::new(shape, values)?),
            // If two shards contain a name, the values come from the shard that the index names.
            None if self.tensors.contains_key(&name) => {}
            None => {
                self.unread.insert(name, Unread { dtype: dtype.to_string(), shape: shape.to_vec() });
            }
        }
        Ok(())
    }

    /// The bytes of a safetensors file, which PyTorch reads with `load_file`. A tensor whose values were not read is an
    /// error that names it; remove it with [`StateDict::remove`].
    #[cfg(feature = "safetensors")]
    pub fn to_safetensors(&self) -> Result<Vec<u8>> {
        if let Some((name, tensor)) = self.unread.iter().next() {
            return Err(Error::File(format!(
                "{name} {:?} of type {} cannot be written, its values were not read ({} such tensors); remove it first \
                 to write the others",
                tensor.shape,
                tensor.dtype,
                self.unread.len()
            )));
        }
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

/// The values of a float tensor as f32; `None` for other types.
#[cfg(feature = "safetensors")]
fn floats(dtype: safetensors::Dtype, data: &[u8]) -> Option<Vec<f32>> {
    use safetensors::Dtype::{BF16, F16, F32, F64};
    fn each<const N: usize>(data: &[u8], value: impl Fn([u8; N]) -> f32) -> Option<Vec<f32>> {
        Some(data.as_chunks::<N>().0.iter().map(|bytes| value(*bytes)).collect())
    }
    match dtype {
        F32 => each(data, f32::from_le_bytes),
        F64 => each(data, |bytes| f64::from_le_bytes(bytes) as f32),
        F16 => each(data, |bytes| half::f16::from_le_bytes(bytes).to_f32()),
        BF16 => each(data, |bytes| half::bf16::from_le_bytes(bytes).to_f32()),
        _ => None,
    }
}

/// The number of insertions, deletions and substitutions that turn one word into the other (Levenshtein 1966). Compares
/// only the beginnings of long words, because names in files may be arbitrarily long.
pub(crate) fn edits(a: &str, b: &str) -> usize {
    const LONGEST: usize = 200;
    let [a, b] = [a, b].map(|word| word.chars().take(LONGEST));
    let b: Vec<char> = b.collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let changed = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

/// The `count` names nearest to `word`.
pub(crate) fn closest<'a>(word: &str, names: impl Iterator<Item = &'a str>, count: usize) -> Vec<&'a str> {
    let mut all: Vec<(usize, &str)> = names.map(|name| (edits(name, word), name)).collect();
    all.sort_unstable();
    all.into_iter().take(count).map(|(_, name)| name).collect()
}

#[cfg(feature = "safetensors")]
mod files;
#[cfg(all(feature = "safetensors", not(target_arch = "wasm32")))]
pub(crate) use files::open::Wanted;
