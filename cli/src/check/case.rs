//! One case file.

use std::path::Path;

use serde_json::Value;
use wgpu_attention::{Attention, Device, Dtype, Mask, Tensor};

use super::compare::{Comparison, compare, largest_finite};
use super::stop::Stop;
use crate::array::{Array, Values};
use crate::error::{Error, Result, fail};
use crate::files::{self, TensorFile};

/// How far f32 may be from float64, relative to the largest value, if a case records no f32 error of its own.
pub const F32_SUMS: f64 = 5e-6;
/// "A few ulp" of f32, added to twice PyTorch's own error.
pub const F32_ULPS: f64 = 8.0 * f32::EPSILON as f64;
/// Half an ulp of f16.
const F16_HALF_ULP: f64 = 1.0 / 2048.0;

pub struct Case {
    file: TensorFile,
    json: Value,
}

impl Case {
    pub fn read(path: &Path) -> Result<Case> {
        Case::parse(path.display().to_string(), files::read_bytes(path)?)
    }

    /// Reads a case from the bytes of a file with that name.
    pub fn parse(path: String, bytes: Vec<u8>) -> Result<Case> {
        let file = TensorFile::from_safetensors(path, bytes)?;
        let Some(text) = file.metadata("case") else {
            fail!("{}: the header's __metadata__ holds no \"case\"", file.path);
        };
        let json = parse_json(text)
            .map_err(|error| Error::Failed(format!("{}: the case is not valid JSON: {error}", file.path)))?;
        if !json["op"].is_string() {
            fail!("{}: the case has no \"op\"", file.path);
        }
        Ok(Case { file, json })
    }

    pub fn op(&self) -> &str {
        self.json["op"].as_str().expect("checked when read")
    }
    /// The storage type of its operands: the type of the first float input.
    pub fn storage(&self) -> Dtype {
        let names = self.file.names();
        let inputs = names.iter().filter(|name| name.starts_with("in."));
        let dtypes = inputs.filter_map(|name| self.file.need(name).ok()?.dtype(name).ok());
        dtypes.into_iter().find(|&dtype| dtype != Dtype::Bool).unwrap_or(Dtype::F32)
    }
    /// A member of the case; null when missing.
    pub fn get(&self, key: &str) -> &Value {
        &self.json[key]
    }
    /// All members.
    pub fn members(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.json.as_object().into_iter().flatten().map(|(key, value)| (key.as_str(), value))
    }
    /// False when missing.
    pub fn flag(&self, key: &str) -> Result<bool> {
        as_flag(key, &self.json[key], false)
    }
    pub fn float(&self, key: &str) -> Result<Option<f64>> {
        as_float(key, &self.json[key])
    }
    pub fn count(&self, key: &str) -> Result<usize> {
        let value = &self.json[key];
        match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
            Some(n) => Ok(n),
            None => fail!("the case's \"{key}\" is {value}; it must be a whole number"),
        }
    }

    pub fn input(&self, name: &str) -> Result<Array> {
        self.file.need(&format!("in.{name}"))
    }
    pub fn optional(&self, name: &str) -> Result<Option<Array>> {
        self.file.get(&format!("in.{name}"))
    }
    pub fn upload(&self, name: &str, device: &Device) -> Result<Tensor> {
        self.input(name)?.upload(name, device)
    }

    /// The inputs `q`, `k` and `v`.
    pub fn operands(&self, device: &Device) -> Result<[Tensor; 3]> {
        Ok([self.upload("q", device)?, self.upload("k", device)?, self.upload("v", device)?])
    }

    /// Tensors whose name starts with `prefix`, under the rest of the name.
    pub fn with_prefix(&self, prefix: &str) -> Result<Vec<(String, Array)>> {
        let names = self.file.names();
        let names = names.iter().filter_map(|name| Some((name.strip_prefix(prefix)?, name)));
        names.map(|(short, name)| Ok((short.to_string(), self.file.need(name)?))).collect()
    }

    /// The tensor with that full name.
    pub fn tensor(&self, name: &str) -> Result<Array> {
        self.file.need(name)
    }
    pub fn tensor_names(&self) -> Vec<String> {
        self.file.names()
    }

    /// Skips a case with an unknown input, because it could change the answer.
    pub fn expect_inputs(&self, known: &[&str]) -> Result<(), Stop> {
        let names = self.file.names();
        match names.iter().filter_map(|name| name.strip_prefix("in.")).find(|name| !known.contains(name)) {
            None => Ok(()),
            Some(odd) => Err(Stop::Skip(format!("the input {odd} is not known"))),
        }
    }

    /// Compares results with ONNX's answers, and f32 also with float64. Every `out.*` must be present.
    pub fn against_onnx(&self, results: &[(&str, Array)]) -> Result<Vec<Comparison>, Stop> {
        let mut all = Vec::new();
        let (Some(rtol), Some(atol)) = (self.float("rtol")?, self.float("atol")?) else {
            fail!("the case gives no rtol and atol");
        };
        let expected = self.with_prefix("out.")?;
        let listed = self.json["outputs"].as_object().into_iter().flat_map(|outputs| outputs.keys());
        if let Some(name) = listed.into_iter().find(|name| expected.iter().all(|(have, _)| have != *name)) {
            fail!("the file holds no out.{name}, which the case lists");
        }
        for (name, expected) in &expected {
            let Some((_, got)) = results.iter().find(|(have, _)| have == name) else {
                return Err(Stop::Skip(format!("the output {name} is not known")));
            };
            let is_bf16 = matches!(expected.values(), Values::BF16(_));
            let rtol = self.float("rtol_bf16_outputs")?.filter(|_| is_bf16).unwrap_or(rtol);
            all.push(held(name, "out", got, expected, |x| atol + rtol * x.abs()));
            if let Some(truth) = self.file.get(&format!("ref64.{name}"))?
                && matches!(expected.values(), Values::F32(_))
            {
                let limit = F32_SUMS * largest_finite(&truth.to_f64());
                all.push(held(name, "ref64", got, &truth, |_| limit));
            }
        }
        Ok(all)
    }

    /// Compares results with float64, within the tolerance derived from PyTorch's own error. `first` must be expected.
    pub fn against_torch(&self, dtype: Dtype, first: &str, results: &[(&str, Array)]) -> Result<Vec<Comparison>, Stop> {
        self.file.need(&format!("ref64.{first}"))?;
        let mut all = Vec::new();
        for (name, got) in results {
            let Some(truth) = self.file.get(&format!("ref64.{name}"))? else { continue };
            let values = truth.to_f64();
            let most = largest_finite(&values);
            let torch = self.torch_error(name, dtype, &values)?;
            let limit = match dtype {
                Dtype::F16 => match torch.filter(|&error| error > 0.0) {
                    Some(error) => error,
                    None if got.dtype(name)? == Dtype::F16 => F16_HALF_ULP * most,
                    None => F32_ULPS * most,
                },
                _ => 2.0 * torch.unwrap_or(0.0) + F32_ULPS * most,
            };
            all.push(held(name, "ref64", got, &truth, |_| limit));
        }
        Ok(all)
    }

    /// PyTorch's own largest error on an output, as recorded or computed from its result.
    fn torch_error(&self, name: &str, dtype: Dtype, truth: &[f64]) -> Result<Option<f64>> {
        if let Some(error) = self.json["torch_err"][name]["max_abs"].as_f64() {
            return Ok(Some(error));
        }
        let Some(torch) = self.file.get(&format!("t32.{name}"))? else {
            // PyTorch returns no weights here. They have the same score error as the output, so use the output's
            // relative error.
            let out = &self.json["torch_err"]["out"];
            return Ok(match (name, out["max_abs"].as_f64(), out["ref_max"].as_f64()) {
                ("weights", Some(error), Some(most)) if most > 0.0 && dtype == Dtype::F32 => {
                    Some(error / most * largest_finite(truth))
                }
                _ => None,
            });
        };
        let errors = torch.to_f64().into_iter().zip(truth).map(|(a, b)| (a - b).abs());
        Ok(Some(errors.filter(|error| error.is_finite()).fold(0.0, f64::max)))
    }
}

/// Adds a mask: either bools, with the given meaning of true, or numbers, which are a bias.
pub fn add_mask(
    attention: Attention,
    name: &str,
    mask: &Array,
    meaning: fn(Tensor) -> Result<Mask, wgpu_attention::Error>,
    device: &Device,
) -> Result<Attention, Stop> {
    match mask.is_bool() {
        true => Ok(attention.mask(meaning(mask.upload_bools(name, device)?)?)),
        false => Ok(attention.bias(mask.upload(name, device)?)),
    }
}

/// A boolean member; `default` when missing.
pub fn as_flag(name: &str, value: &Value, default: bool) -> Result<bool> {
    match value {
        Value::Null => Ok(default),
        Value::Bool(flag) => Ok(*flag),
        other => fail!("the case's \"{name}\" is {other}; it must be true or false"),
    }
}

/// A number, or `None` when missing; another type is an error.
pub fn as_float(name: &str, value: &Value) -> Result<Option<f64>> {
    match value.as_f64() {
        None if !value.is_null() => fail!("the case's \"{name}\" is {value}; it must be a number"),
        number => Ok(number),
    }
}

/// A whole number, or `None` when missing.
pub fn as_int(name: &str, value: &Value) -> Result<Option<i64>> {
    match value.as_i64() {
        None if !value.is_null() => fail!("the case's \"{name}\" is {value}; it must be a whole number"),
        number => Ok(number),
    }
}

/// Parses JSON as Python writes it: bare NaN and Infinity, which JSON does not allow, become strings, so that they are
/// neither numbers nor missing.
pub fn parse_json(text: &str) -> serde_json::Result<Value> {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let taken = if first == '"' {
            let mut escaped = false;
            let end = rest.char_indices().skip(1).find(|&(_, c)| {
                let closes = c == '"' && !escaped;
                escaped = c == '\\' && !escaped;
                closes
            });
            end.map_or(rest.len(), |(at, _)| at + 1)
        } else if let Some(word) = ["NaN", "Infinity", "-Infinity"].into_iter().find(|word| rest.starts_with(word)) {
            plain.push_str(&format!("\"{word}\""));
            rest = &rest[word.len()..];
            continue;
        } else {
            first.len_utf8()
        };
        plain.push_str(&rest[..taken]);
        rest = &rest[taken..];
    }
    serde_json::from_str(&plain)
}

pub fn held(
    name: &str,
    against: &'static str,
    got: &Array,
    expected: &Array,
    allowed: impl Fn(f64) -> f64,
) -> Comparison {
    compare(name, against, (got.shape(), &got.to_f64()), (expected.shape(), &expected.to_f64()), allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_as_python_writes_it() {
        let json = parse_json(r#"{"a": [NaN, -Infinity, 1], "b": "NaN \" Infinity"}"#).unwrap();
        assert_eq!(json["a"][2], 1);
        assert!(json["a"][0] == "NaN" && json["a"][1] == "-Infinity");
        assert_eq!(json["b"], "NaN \" Infinity");
        assert!(parse_json("{").is_err());
        assert!(parse_json("\"open").is_err());
    }
}
