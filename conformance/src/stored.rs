//! The case files of other implementations in f64, for tests of the reference.

use std::collections::{BTreeMap, BTreeSet};

use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use wgpu_attention::problem::Layout;
use wgpu_attention::reference::View;

use crate::golden::golden;

/// A tensor in f64.
#[derive(Clone, Debug, PartialEq)]
pub struct Wide {
    pub data: Vec<f64>,
    pub layout: Layout,
}

impl Wide {
    /// Row-major.
    pub fn new(shape: &[usize], data: Vec<f64>) -> Wide {
        let layout = Layout::contiguous(shape).expect("as large as its data");
        assert_eq!(layout.len(), data.len(), "a tensor of shape {shape:?}");
        Wide { data, layout }
    }

    pub fn view(&self) -> View<'_> {
        View { data: &self.data, layout: &self.layout }
    }

    pub fn shape(&self) -> &[usize] {
        self.layout.shape()
    }

    /// The same elements in another shape; the tensor must be row-major.
    pub fn reshaped(&self, shape: &[usize]) -> Wide {
        Wide::new(shape, self.data.clone())
    }

    /// The axes in another order, without moving elements.
    pub fn permuted(&self, axes: &[usize]) -> Wide {
        Wide { data: self.data.clone(), layout: self.layout.permute(axes).expect("each axis once") }
    }

    /// The `len` entries of the first axis from `start`.
    pub fn rows(&self, start: usize, len: usize) -> Wide {
        Wide { data: self.data.clone(), layout: self.layout.narrow(0, start, len).expect("a part of the rows") }
    }

    /// The elements in the order of the index.
    pub fn row_major(&self) -> Vec<f64> {
        self.layout.positions().map(|at| self.data[at]).collect()
    }
}

/// One case file: what to compute, and the tensors that were computed from and expected.
#[derive(Clone, Debug)]
pub struct Stored {
    pub name: String,
    case: Value,
    tensors: BTreeMap<String, Wide>,
    /// The names of the boolean tensors.
    bools: BTreeSet<String>,
}

impl Stored {
    /// The case file of that name, such as `torch/mha_causal`. Panics if it is missing or broken.
    pub fn read(name: &str) -> Stored {
        let bytes = golden(name).unwrap_or_else(|| panic!("no case {name}"));
        let refuse = |error: &dyn std::fmt::Display| -> ! { panic!("the case {name}: {error}") };
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap_or_else(|error| refuse(&error));
        let metadata = header.metadata().as_ref().and_then(|metadata| metadata.get("case"));
        let case = serde_json::from_str(metadata.unwrap_or_else(|| refuse(&"no description")));
        let file = SafeTensors::deserialize(&bytes).unwrap_or_else(|error| refuse(&error));
        let (mut tensors, mut bools) = (BTreeMap::new(), BTreeSet::new());
        for (tensor, view) in file.iter() {
            let data = decoded(view.dtype(), view.data()).unwrap_or_else(|| refuse(&format!("the type of {tensor}")));
            tensors.insert(tensor.to_string(), Wide::new(view.shape(), data));
            if view.dtype() == Dtype::BOOL {
                bools.insert(tensor.to_string());
            }
        }
        Stored { name: name.into(), case: case.unwrap_or_else(|error| refuse(&error)), tensors, bools }
    }

    /// A member of the description; null if missing.
    pub fn get(&self, key: &str) -> &Value {
        &self.case[key]
    }

    /// A member that is a whole number.
    pub fn count(&self, key: &str) -> usize {
        let number = self.case[key].as_u64();
        number.unwrap_or_else(|| panic!("{}: \"{key}\" is {}, not a whole number", self.name, self.case[key])) as usize
    }

    /// A member that is true or false; false if missing.
    pub fn flag(&self, key: &str) -> bool {
        self.case[key].as_bool().unwrap_or(false)
    }

    pub fn tensor(&self, name: &str) -> Option<&Wide> {
        self.tensors.get(name)
    }

    pub fn need(&self, name: &str) -> &Wide {
        self.tensor(name).unwrap_or_else(|| panic!("{}: no tensor {name}", self.name))
    }

    /// A tensor of booleans; `None` if it holds numbers or is missing.
    pub fn bools(&self, name: &str) -> Option<Vec<bool>> {
        self.bools.contains(name).then(|| self.need(name).data.iter().map(|&x| x == 1.0).collect())
    }

    /// Full names with that beginning.
    pub fn names<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = &'a str> {
        self.tensors.keys().map(String::as_str).filter(move |name| name.starts_with(prefix))
    }
}

/// Little-endian elements in f64; `None` for a type that no case has.
fn decoded(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f64>> {
    macro_rules! numbers {
        ($type:ty) => {
            bytes.chunks_exact(size_of::<$type>()).map(|x| <$type>::from_le_bytes(x.try_into().expect("exact chunks")))
        };
    }
    Some(match dtype {
        Dtype::F64 => numbers!(f64).collect(),
        Dtype::F32 => numbers!(f32).map(f64::from).collect(),
        Dtype::F16 => numbers!(f16).map(f16::to_f64).collect(),
        Dtype::BF16 => numbers!(bf16).map(bf16::to_f64).collect(),
        Dtype::I32 => numbers!(i32).map(f64::from).collect(),
        Dtype::I64 => numbers!(i64).map(|x| x as f64).collect(),
        Dtype::BOOL | Dtype::U8 => bytes.iter().map(|&x| f64::from(x)).collect(),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden::golden_names;

    #[test]
    fn types_are_widened() {
        let of = |dtype, bytes: &[u8]| decoded(dtype, bytes).unwrap();
        assert_eq!(of(Dtype::F64, &1.5f64.to_le_bytes()), [1.5]);
        assert_eq!(of(Dtype::F32, &[1.5f32.to_le_bytes(), (-2f32).to_le_bytes()].concat()), [1.5, -2.0]);
        assert_eq!(of(Dtype::F16, &f16::from_f32(1.5).to_le_bytes()), [1.5]);
        assert_eq!(of(Dtype::BF16, &bf16::from_f32(1.5).to_le_bytes()), [1.5]);
        assert_eq!(of(Dtype::I32, &(-3i32).to_le_bytes()), [-3.0]);
        assert_eq!(of(Dtype::I64, &(-3i64).to_le_bytes()), [-3.0]);
        assert_eq!(of(Dtype::BOOL, &[0, 1]), [0.0, 1.0]);
        assert_eq!(decoded(Dtype::C64, &[0; 8]), None);
    }

    #[test]
    fn cases_with_gradients_are_read() {
        let has_gradients = |name: &&String| !name.starts_with("keras_jax/") && !name.starts_with("onnx/");
        let names = golden_names();
        let cases: Vec<Stored> = names.iter().filter(has_gradients).map(|name| Stored::read(name)).collect();
        let of = |op: &str| cases.iter().filter(|case| case.get("op") == op).count();
        assert_eq!(["sdpa", "mha", "varlen"].map(of), [60, 30, 4]);
        let case = Stored::read("torch/mha_attn_bool2d");
        assert_eq!((case.count("num_heads"), case.flag("bias"), case.flag("nothing")), (4, true, false));
        assert_eq!(case.need("in.attn_mask").shape(), [7, 9]);
        assert!(case.bools("in.attn_mask").unwrap().contains(&true));
        assert_eq!((case.bools("in.query"), case.bools("in.nothing")), (None, None));
    }
}
