//! Cases that record a call of a Python function: its named arguments, masks with NumPy broadcasting, and its results.

use std::collections::BTreeMap;

use serde_json::Value;
use wgpu_attention::{Align, Attention, Device, Dtype, Layout, Mask, Tensor};

use super::case::{Case, F32_SUMS, F32_ULPS, as_flag, as_float, as_int, held};
use super::compare::{Comparison, difference};
use super::stop::Stop;
use crate::array::{Array, Values};
use crate::error::{Result, fail};

/// Members of a case that describe it but do not affect the computation.
const ABOUT: [&str; 29] = [
    "backend",
    "batch",
    "comment",
    "description",
    "device",
    "dtype",
    "embed_dim",
    "feature_dim",
    "floatx",
    "fully_masked_convention",
    "fully_masked_rows",
    "generator",
    "jax",
    "jaxlib",
    "keras",
    "layout",
    "n_params",
    "name",
    "note",
    "notes",
    "numpy",
    "op",
    "query_dim",
    "rank",
    "self_attention",
    "source",
    "tier",
    "torch",
    "versions",
];

/// Members whose own members are arguments.
const GROUPS: [&str; 9] =
    ["args", "arguments", "attributes", "call", "config", "constructor", "init", "kwargs", "layer"];

/// The score that JAX assigns to masked keys. If a row sees nothing, all keys have the same weight.
pub const MASKED_SCORE: f32 = -0.7 * f32::MAX;

/// Values of this size come from masked scores, so they are no measure of the size of the others.
const MASKED_SIZE: f64 = 1e30;

/// The most entries of a mask that is materialised.
const MOST_ENTRIES: usize = 1 << 28;

/// The arguments of a call, and the unknown parts of the case.
pub struct Arguments {
    values: BTreeMap<String, Value>,
    pub unknown: Vec<String>,
}

impl Arguments {
    /// `known` lists the supported arguments; the case may also name `tensors`, to describe them.
    pub fn of(case: &Case, known: &[&str], tensors: &[&str]) -> Result<Arguments> {
        let mut found = Arguments { values: BTreeMap::new(), unknown: Vec::new() };
        for (key, value) in case.members() {
            match value.as_object().filter(|_| GROUPS.contains(&key)) {
                None => found.add(key, value, known, tensors)?,
                Some(group) => {
                    for (key, value) in group {
                        found.add(key, value, known, tensors)?;
                    }
                }
            }
        }
        Ok(found)
    }

    fn add(&mut self, key: &str, value: &Value, known: &[&str], tensors: &[&str]) -> Result<()> {
        if known.contains(&key) {
            if let Some(before) = self.values.insert(key.into(), value.clone())
                && before != *value
            {
                fail!("the case gives \"{key}\" as {before} and as {value}");
            }
        } else if !value.is_null() && !tensors.contains(&key) && !is_about(key, value) {
            self.unknown.push(key.into());
        }
        Ok(())
    }

    /// Null when missing.
    pub fn get(&self, key: &str) -> &Value {
        self.values.get(key).unwrap_or(&Value::Null)
    }
    pub fn flag(&self, key: &str, default: bool) -> Result<bool> {
        as_flag(key, self.get(key), default)
    }
    pub fn float(&self, key: &str) -> Result<Option<f64>> {
        as_float(key, self.get(key))
    }
    pub fn count(&self, key: &str) -> Result<Option<usize>> {
        match as_int(key, self.get(key))? {
            None => Ok(None),
            Some(n) => match usize::try_from(n) {
                Ok(n) => Ok(Some(n)),
                Err(_) => fail!("the case's \"{key}\" is {n}; it must not be negative"),
            },
        }
    }
    /// A list of whole numbers; a single number is a list of one.
    pub fn ints(&self, key: &str) -> Result<Option<Vec<i64>>> {
        let value = self.get(key);
        let list = match value {
            Value::Null => return Ok(None),
            Value::Array(list) => list.iter().map(Value::as_i64).collect(),
            one => one.as_i64().map(|one| vec![one]),
        };
        match list {
            Some(list) => Ok(Some(list)),
            None => fail!("the case's \"{key}\" is {value}; it must be whole numbers"),
        }
    }
    /// Like [`Arguments::ints`], but none may be negative.
    pub fn counts(&self, key: &str) -> Result<Option<Vec<usize>>> {
        let Some(ints) = self.ints(key)? else { return Ok(None) };
        match ints.iter().map(|&n| usize::try_from(n).ok()).collect() {
            Some(counts) => Ok(Some(counts)),
            None => fail!("the case's \"{key}\" is {ints:?}; no number may be negative"),
        }
    }
}

/// Shapes, versions and recorded errors. Free text has no effect on the computation.
fn is_about(key: &str, value: &Value) -> bool {
    let is_letters = key.len() <= 3 && key.starts_with(|c: char| c.is_ascii_uppercase());
    let endings = ["_err", "_error", "_errors", "_shape", "_shapes", "_version", "_versions", "_len", "_note"];
    ABOUT.contains(&key) || is_letters || endings.iter().any(|end| key.ends_with(end)) || value.is_string()
}

/// The tensors of a call, looked up by name.
pub struct Inputs<'a> {
    case: &'a Case,
    /// The full names of the tensors found.
    pub used: Vec<String>,
}

impl<'a> Inputs<'a> {
    pub fn new(case: &'a Case) -> Inputs<'a> {
        Inputs { case, used: Vec::new() }
    }

    /// The first tensor found under one of these names.
    pub fn find(&mut self, names: &[&str]) -> Result<Option<Array>> {
        for name in names {
            if let Some(array) = self.case.optional(name)? {
                self.used.push(format!("in.{name}"));
                return Ok(Some(array));
            }
        }
        Ok(None)
    }
    pub fn need(&mut self, names: &[&str]) -> Result<Array> {
        match self.find(names)? {
            Some(array) => Ok(array),
            None => fail!("no tensor in.{}", names[0]),
        }
    }
    /// A mask of that name.
    pub fn bits(&mut self, name: &str) -> Result<Option<Bits>> {
        self.find(&[name])?.map(|array| Bits::of(name, &array)).transpose()
    }
}

/// Which keys each query sees by position, counted from the first query and the first key.
#[derive(Clone, Copy, Default)]
pub struct Near {
    pub causal: bool,
    /// This many keys to the left and to the right of a query's own position.
    pub window: Option<(usize, usize)>,
}

impl Near {
    /// As a materialised mask; `None` if every query sees every key.
    pub fn bits(&self, len_q: usize, len_k: usize) -> Result<Option<Bits>> {
        if !self.causal && self.window.is_none() {
            return Ok(None);
        }
        let (left, right) = self.window.unwrap_or((usize::MAX, usize::MAX));
        let sees = |i: usize, j: usize| i <= j.saturating_add(left) && j <= i.saturating_add(right);
        Bits::of_positions(len_q, len_k, |i, j| (!self.causal || j <= i) && sees(i, j)).map(Some)
    }

    /// As rules of the library.
    pub fn rules(&self, mut attention: Attention) -> Attention {
        if self.causal {
            attention = attention.causal(Align::TopLeft);
        }
        if let Some((left, right)) = self.window {
            attention = attention.window(Some(left), Some(right));
        }
        attention
    }
}

/// Booleans with NumPy broadcasting.
#[derive(Clone, Debug, PartialEq)]
pub struct Bits {
    pub shape: Vec<usize>,
    data: Vec<bool>,
}

impl Bits {
    /// From a mask's array: bool, or numbers that are 0 or 1.
    pub fn of(name: &str, array: &Array) -> Result<Bits> {
        let data = match array.values() {
            Values::Bool(_) | Values::Int(_) => array.bools(name)?,
            _ => {
                let numbers = array.to_f64();
                if let Some(odd) = numbers.iter().find(|&&x| x != 0.0 && x != 1.0) {
                    fail!("{name} holds {odd}; only 0 and 1 can be booleans");
                }
                numbers.into_iter().map(|x| x == 1.0).collect()
            }
        };
        Ok(Bits { shape: array.shape().to_vec(), data })
    }

    /// One entry per query and key, `[1, len_q, len_k]`.
    fn of_positions(len_q: usize, len_k: usize, keeps: impl Fn(usize, usize) -> bool) -> Result<Bits> {
        room(&[len_q, len_k])?;
        let data = (0..len_q).flat_map(|i| (0..len_k).map(move |j| (i, j))).map(|(i, j)| keeps(i, j)).collect();
        Ok(Bits { shape: vec![1, len_q, len_k], data })
    }

    /// `[batch, most]`: in each batch entry, true for the first `lengths[b]` positions.
    pub fn of_lengths(lengths: &[usize], most: usize) -> Result<Bits> {
        room(&[lengths.len(), most])?;
        let data = lengths.iter().flat_map(|&len| (0..most).map(move |at| at < len)).collect();
        Ok(Bits { shape: vec![lengths.len(), most], data })
    }

    /// Inserts an axis of length 1, as NumPy's `expand_dims(x, -from_end)`.
    pub fn expand(mut self, from_end: usize) -> Result<Bits> {
        match (self.shape.len() + 1).checked_sub(from_end) {
            Some(at) => self.shape.insert(at, 1),
            None => fail!("a mask of shape {:?} has too few axes", self.shape),
        }
        Ok(self)
    }

    /// Prepends axes of length 1 up to `rank`.
    fn with_rank(mut self, rank: usize) -> Bits {
        while self.shape.len() < rank {
            self.shape.insert(0, 1);
        }
        self
    }

    pub fn broadcast(&self, name: &str, shape: &[usize]) -> Result<Bits> {
        room(shape)?;
        let Ok(layout) = Layout::contiguous(&self.shape)?.broadcast_to(shape) else {
            fail!("{name} of shape {:?} does not broadcast to {shape:?}", self.shape);
        };
        Ok(Bits { shape: shape.to_vec(), data: layout.positions().map(|at| self.data[at]).collect() })
    }

    /// The conjunction of the masks, if there are any.
    pub fn every(masks: impl IntoIterator<Item = Bits>) -> Result<Option<Bits>> {
        let mut masks = masks.into_iter();
        let Some(first) = masks.next() else { return Ok(None) };
        masks.try_fold(first, |all, mask| all.and(&mask)).map(Some)
    }

    /// A single true entry with that many axes: it hides nothing.
    pub fn all(rank: usize) -> Bits {
        Bits { shape: vec![1; rank], data: vec![true] }
    }

    fn and(&self, other: &Bits) -> Result<Bits> {
        let rank = self.shape.len().max(other.shape.len());
        let (a, b) = (self.clone().with_rank(rank), other.clone().with_rank(rank));
        let shape: Vec<usize> = a.shape.iter().zip(&b.shape).map(|(&a, &b)| if a == 1 { b } else { a }).collect();
        let (mut a, b) = (a.broadcast("a mask", &shape)?, b.broadcast("a mask", &shape)?);
        a.data.iter_mut().zip(b.data).for_each(|(a, b)| *a &= b);
        Ok(a)
    }

    pub fn reshape(mut self, shape: &[usize]) -> Bits {
        assert_eq!(shape.iter().product::<usize>(), self.data.len());
        self.shape = shape.to_vec();
        self
    }

    /// Whether each row of the last axis is all false: `[.., 1]`.
    fn blind_rows(&self) -> Bits {
        let mut shape = self.shape.clone();
        let width = shape.pop().unwrap_or(1);
        let data = match width {
            0 => vec![true; shape.iter().product()],
            _ => self.data.chunks(width).map(|row| !row.contains(&true)).collect(),
        };
        shape.push(1);
        Bits { shape, data }
    }

    pub fn sees_nothing_somewhere(&self) -> bool {
        self.blind_rows().data.contains(&true)
    }

    pub fn upload(&self, device: &Device) -> Result<Tensor> {
        Ok(Tensor::from_bools(device, &self.shape, &self.data)?)
    }
}

fn room(shape: &[usize]) -> Result<()> {
    let entries = wgpu_attention::problem::checked_len(shape)?;
    if entries > MOST_ENTRIES {
        fail!("a mask of shape {shape:?} has {entries} entries; at most {MOST_ENTRIES} can be materialised");
    }
    Ok(())
}

/// The rule given by `seen` `[batch, heads, len_q, len_k]`, except that rows which see nothing give all keys the same
/// weight, as if masked scores were one large negative number.
pub fn mean_where_nothing_is_seen(attention: Attention, seen: &Bits, device: &Device) -> Result<Attention> {
    let blind = seen.blind_rows();
    let scores = blind.data.iter().map(|&blind| if blind { MASKED_SCORE } else { 0.0 }).collect();
    let bias = Array::from_floats(&blind.shape, scores, Dtype::F32)?.upload("the masked scores", device)?;
    let mut kept = seen.clone();
    let width = seen.shape.last().copied().unwrap_or(0).max(1);
    for (row, _) in kept.data.chunks_mut(width).zip(&blind.data).filter(|(_, blind)| **blind) {
        row.fill(true);
    }
    Ok(attention.bias(bias).mask(Mask::keep_where(kept.upload(device)?)?))
}

/// An answer: its own name, then its aliases.
pub type Answer<'a> = (&'a [&'a str], Array);

pub const OUTPUT: &[&str] = &["output", "out", "attention_output", "encoded", "y"];
pub const WEIGHTS: &[&str] = &["attention_scores", "weights", "attention_weights", "attn_weights", "scores", "probs"];
pub const RESIDUAL: &[&str] = &["residual", "lse", "logsumexp"];

/// The framework's own result in the case's own type.
const OWN: [&str; 8] = ["out32", "t32", "out16", "t16", "own", "own32", "keras32", "jax32"];

/// Whether a case expects an answer of one of these names.
pub fn expects(case: &Case, names: &[&str]) -> bool {
    let all = case.tensor_names();
    names.iter().any(|name| all.contains(&format!("ref64.{name}")) || all.contains(&format!("out.{name}")))
}

/// Compares answers with float64 (or `out.*` if there is none). The tolerance is twice the framework's own error and 8
/// ulp, or 5e-6 of the largest value if no error is recorded; plus half an ulp of a half type. Every tensor of the case
/// must be known; `inputs` and `params` are the names of those that were used.
pub fn hold(
    case: &Case,
    dtype: Dtype,
    unknown: &[String],
    used: &[String],
    answers: &[Answer<'_>],
) -> Result<Vec<Comparison>, Stop> {
    let known = |name: &str| answers.iter().any(|(names, _)| names.contains(&name));
    for full in case.tensor_names() {
        let (prefix, name) = full.split_once('.').unwrap_or(("", &full));
        let is_answer = prefix == "ref64" || prefix == "out" || OWN.contains(&prefix);
        let is_gradient = prefix == "cot" || is_answer && name.starts_with("grad_");
        if !(is_gradient || is_answer && known(name) || used.contains(&full)) {
            return Err(Stop::Skip(format!("the tensor {full} is not known")));
        }
    }
    let half_ulp = match dtype {
        Dtype::F16 => 2f64.powi(-11),
        Dtype::BF16 => 2f64.powi(-8),
        _ => 0.0,
    };
    let mut all = Vec::new();
    for (names, got) in answers {
        let tensor = |prefix: &str| -> Result<Option<Array>> {
            let names = names.iter().map(|name| format!("{prefix}.{name}"));
            let have = case.tensor_names();
            names.into_iter().find(|name| have.contains(name)).map(|name| case.tensor(&name)).transpose()
        };
        let (against, expected) = match (tensor("ref64")?, tensor("out")?) {
            (Some(truth), _) => ("ref64", truth),
            (None, Some(out)) => ("out", out),
            (None, None) => continue,
        };
        let truth = expected.to_f64();
        let plain = |x: f64| x.abs() < MASKED_SIZE;
        let most = truth.iter().filter(|x| plain(**x)).fold(0f64, |most, x| most.max(x.abs()));
        let mut own = None;
        for prefix in OWN {
            if let Some(theirs) = tensor(prefix)?
                && theirs.shape() == expected.shape()
            {
                let off = theirs.to_f64().into_iter().zip(&truth).filter(|(_, x)| plain(**x));
                let off = off.map(|(a, b)| difference(a, *b)).filter(|x| x.is_finite());
                own = Some(off.fold(own.unwrap_or(0.0), f64::max));
            }
        }
        let own = own.or_else(|| recorded_error(case, names)).filter(|&own| own <= most);
        let limit = own.map_or(F32_SUMS * most, |own| 2.0 * own + F32_ULPS * most) + half_ulp * most;
        all.push(held(names[0], against, got, &expected, |x| if plain(x) { limit } else { F32_SUMS * x.abs() }));
    }
    if !unknown.is_empty() {
        let note = format!("the case's {} is not known and was ignored", unknown.join(", "));
        for one in &mut all {
            one.note = Some(note.clone());
        }
    }
    Ok(all)
}

/// `torch_err`, `keras_err` and the like: the largest error of an answer.
fn recorded_error(case: &Case, names: &[&str]) -> Option<f64> {
    let tables = case.members().filter(|(key, _)| key.ends_with("_err")).map(|(_, table)| table);
    tables
        .flat_map(|table| names.iter().map(move |name| &table[*name]))
        .find_map(|error| error["max_abs"].as_f64().or_else(|| error.as_f64()))
}
