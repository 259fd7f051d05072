//! Reads layers from state dicts and writes them back. Every tensor under the prefix is used, skipped because its
//! naming convention says so, or named in an error.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use super::names::{Family, Part, Role, Slot};
use super::{
    MultiHeadAttention, MultiHeadConfig, Names, NormKind, NormSpan, Parameters, Projection, QueryKeyNorm, transposed,
};
use crate::device::Device;
use crate::error::{Error, Result, shape_error, value_error};
use crate::problem::checked_len;
use crate::state_dict::{HostTensor, NOT_OPENED, StateDict, closest, edits};

/// How to read a layer from a [`StateDict`]: what its tensors do not say.
#[derive(Clone, Debug, PartialEq)]
#[must_use]
pub struct LoadOptions {
    num_heads: usize,
    heads_kv: Option<usize>,
    names: Option<Names>,
    model: Option<Names>,
    model_epsilon: Option<f32>,
    norm_epsilon: Option<f32>,
    ignored: Vec<String>,
}

impl LoadOptions {
    /// A layer with `num_heads` query heads; everything else is inferred from names and shapes.
    pub fn new(num_heads: usize) -> LoadOptions {
        LoadOptions {
            num_heads,
            heads_kv: None,
            names: None,
            model: None,
            model_epsilon: None,
            norm_epsilon: None,
            ignored: Vec::new(),
        }
    }
    /// Sets the number of key/value heads. Separate weights determine it. Fused weights (`in_proj_weight`, `qkv`,
    /// `c_attn`, `query_key_value`) determine it only if queries, keys and values have heads of equal width, which is
    /// assumed if this is not set.
    pub fn heads_kv(mut self, heads_kv: usize) -> Self {
        self.heads_kv = Some(heads_kv);
        self
    }
    /// Sets the naming convention of the tensors.
    pub fn names(mut self, names: Names) -> Self {
        self.names = Some(names);
        self
    }
    /// Passes on what transformers' `config.json` says about the model: `model_type`, which is used if the tensors'
    /// names are ambiguous ([`Names::of_model_type`]), and the epsilon of its norms (`rms_norm_eps`, `norm_eps`,
    /// `layer_norm_eps`).
    pub fn model(mut self, model_type: &str, norm_epsilon: Option<f32>) -> Self {
        self.model = Names::of_model_type(model_type);
        self.model_epsilon = norm_epsilon;
        self
    }
    /// Sets the epsilon of the norms of queries and keys, which weight files do not contain. The default is 1e-6 (Qwen
    /// 3, Gemma 3, timm), and 1e-5 for `q_layernorm` (Phi, Persimmon).
    pub fn norm_epsilon(mut self, epsilon: f32) -> Self {
        self.norm_epsilon = Some(epsilon);
        self
    }
    /// Skips a tensor, by its full name or by its name after the prefix.
    pub fn ignore(mut self, name: impl Into<String>) -> Self {
        self.ignored.push(name.into());
        self
    }
}

impl MultiHeadAttention {
    /// A layer from the tensors under `prefix` in a state dict (such as `encoder.layers.0.self_attn.`): PyTorch's
    /// `nn.MultiheadAttention`, the output of [`MultiHeadAttention::state_dict`], or a layer of a well-known model
    /// ([`Names`]). Widths, key/value heads and biases are inferred from the shapes. Set what a state dict does not
    /// contain (`add_zero_attn`, `batch_first`) afterwards. If only some of queries, keys and values have a bias, it is
    /// 0 for the others.
    ///
    /// Every tensor under the prefix is used, skipped as its [`Names`] define, or named in an error.
    ///
    /// # Errors
    ///
    /// - [`File`](Error::File): tensors are missing, unexpected, not read or not floats, or their names are ambiguous.
    /// - [`Shape`](Error::Shape): the shapes do not fit each other or `num_heads`.
    /// - [`Value`](Error::Value): `num_heads` or `heads_kv` is 0, a tensor to ignore does not exist, or the resulting
    ///   config breaks a rule.
    /// - [`Overflow`](Error::Overflow), [`TooLarge`](Error::TooLarge): the weights do not fit the device.
    /// - [`DeviceLost`](Error::DeviceLost), [`OutOfMemory`](Error::OutOfMemory), [`Gpu`](Error::Gpu): the driver
    ///   failed.
    pub fn from_state_dict(
        device: impl Into<Device>,
        state: &StateDict,
        prefix: &str,
        num_heads: usize,
    ) -> Result<Self> {
        Self::from_state_dict_with(device, state, prefix, &LoadOptions::new(num_heads))
    }

    /// Like [`MultiHeadAttention::from_state_dict`], with options for what the tensors do not say.
    pub fn from_state_dict_with(
        device: impl Into<Device>,
        state: &StateDict,
        prefix: &str,
        options: &LoadOptions,
    ) -> Result<Self> {
        let found = Found::new(state, prefix, options)?;
        let (config, parameters) = found.layer(options)?;
        Self::from_parameters(device.into(), config, &parameters)
    }

    /// The layer's parameters under PyTorch's names, packed as PyTorch packs them. Parameters that PyTorch's layer does
    /// not have are named as described in [`Names::PyTorch`]. [`MultiHeadAttention::from_state_dict`] reads every layer
    /// back.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn state_dict(&self) -> Result<StateDict> {
        let mut state = StateDict::default();
        let config = &self.config;
        let mut put = |name: &str, shape: &[usize], data: Vec<f32>| -> Result<()> {
            state.insert(name, HostTensor::new(shape, data)?);
            Ok(())
        };
        let (embed, heads) = (config.embed_dim, config.num_heads);
        let [q, k, v] = [config.q_width()?, config.k_width()?, config.v_width()?];
        // PyTorch packs only when all three are square.
        let torch_packs = config.is_packed() && config.heads_kv == heads && [q, k, v] == [embed; 3];
        let inputs = [("q", &self.q), ("k", &self.k), ("v", &self.v)];
        if torch_packs {
            let mut all = Vec::new();
            for (_, linear) in inputs {
                all.extend(linear.weight.download()?);
            }
            put("in_proj_weight", &[3 * embed, embed], all)?;
        } else {
            for (name, linear) in inputs {
                put(&format!("{name}_proj_weight"), linear.weight.shape(), linear.weight.download()?)?;
            }
        }
        if config.bias {
            let mut all = Vec::new();
            for bias in inputs.iter().filter_map(|(_, linear)| linear.bias.as_ref()) {
                all.extend(bias.download()?);
            }
            put("in_proj_bias", &[all.len()], all)?;
        }
        let mut modules = vec![("out_proj", &self.out)];
        modules.extend(self.gate.iter().map(|gate| ("gate_proj", gate)));
        if let (Some(norm), Some([q, k])) = (config.norm, &self.norms) {
            modules.extend(match norm.kind {
                NormKind::Rms => [("q_norm", q), ("k_norm", k)],
                NormKind::Layer => [("q_layernorm", q), ("k_layernorm", k)],
            });
            put("norm_epsilon", &[1], vec![norm.epsilon])?;
        }
        for (name, linear) in modules {
            put(&format!("{name}.weight"), linear.weight.shape(), linear.weight.download()?)?;
            if let Some(bias) = &linear.bias {
                put(&format!("{name}.bias"), bias.shape(), bias.download()?)?;
            }
        }
        if let Some((k, v)) = &self.bias_kv {
            put("bias_k", &[1, 1, k.shape()[0]], k.download()?)?;
            put("bias_v", &[1, 1, v.shape()[0]], v.download()?)?;
        }
        if let Some(scale) = config.scale {
            put("attention_scale", &[1], vec![scale])?;
        }
        Ok(state)
    }
}

impl StateDict {
    /// The attention layers in this state dict: the prefix of each for [`MultiHeadAttention::from_state_dict`], and the
    /// meaning of its names unless more is known about the model.
    pub fn layers(&self) -> Vec<(String, Names)> {
        let names: BTreeSet<&str> = self.names().collect();
        let mut layers = BTreeMap::new();
        for family in Family::ALL {
            // Look for keys, because a query weight alone may be something else, or for fused weights, which have no
            // keys.
            let firsts: Vec<String> = [Slot::Qkv, Slot::K].iter().flat_map(|&slot| family.weights_of(slot)).collect();
            for name in &names {
                for first in &firsts {
                    let Some(prefix) = name.strip_suffix(first.as_str()) else { continue };
                    if !(prefix.is_empty() || prefix.ends_with('.')) {
                        continue;
                    }
                    if missing(family, &there(family, prefix, |name| names.contains(name))).is_empty() {
                        layers.entry(prefix.to_string()).or_insert(family.readings[0]);
                    }
                }
            }
        }
        layers.into_iter().collect()
    }

    /// Suggests other prefixes than `prefix`.
    fn other_prefixes(&self, prefix: &str) -> String {
        const SHOWN: usize = 3;
        let mut layers = self.layers();
        layers.sort_by_cached_key(|(at, _)| (!at.starts_with(prefix), edits(at, prefix)));
        let shown: Vec<String> = layers.iter().take(SHOWN).map(|(at, names)| format!("{at:?} ({names})")).collect();
        match (layers.len(), layers.len().saturating_sub(SHOWN)) {
            (0, _) if self.is_empty() => "it holds no tensors at all".into(),
            (0, _) => format!(
                "none of its tensors are named like those of a known attention layer; the nearest names are \
                 {}",
                closest(prefix, self.names(), 6).join(", ")
            ),
            (_, 0) => format!("attention layers lie under the prefix {}", shown.join(", ")),
            (_, more) => format!("attention layers lie under the prefixes {} and {more} more", shown.join(", ")),
        }
    }
}

#[cfg(all(feature = "safetensors", not(target_arch = "wasm32")))]
impl StateDict {
    /// Like [`StateDict::open`], for one attention layer under `prefix`: reads only values that the layer may use, so
    /// that a layer of a large model takes little memory.
    pub fn open_layer(path: impl AsRef<std::path::Path>, prefix: &str) -> Result<StateDict> {
        let names = names_behind(prefix);
        use crate::state_dict::Wanted;
        let choice = |name: &str| match () {
            () if names.contains(name) => Wanted::Values,
            () if name.starts_with(prefix) => Wanted::Header,
            () => Wanted::Name,
        };
        StateDict::open_chosen(path.as_ref(), &choice)
    }
}

/// Every name that a layer under `prefix`, with or without the trailing dot, may use.
#[cfg(all(feature = "safetensors", not(target_arch = "wasm32")))]
fn names_behind(prefix: &str) -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    for prefix in [prefix, &format!("{prefix}.")] {
        for family in Family::ALL {
            all.extend(family.names().filter_map(|(_, name)| place(family, prefix, &name)));
        }
    }
    all
}

/// The full name of one of a family's tensors under `prefix`.
fn place(family: &Family, prefix: &str, name: &str) -> Option<String> {
    let Some(beside) = name.strip_prefix("../") else { return Some(format!("{prefix}{name}")) };
    let module = prefix.strip_suffix('.')?;
    let is_inner =
        |word: &&str| module.strip_suffix(*word).is_some_and(|outer| outer.is_empty() || outer.ends_with('.'));
    family.inner.iter().any(is_inner).then(|| {
        let outer = &module[..module.rfind('.').map_or(0, |dot| dot + 1)];
        format!("{outer}{beside}")
    })
}

/// The tensors of a family that exist under `prefix`.
fn there(family: &'static Family, prefix: &str, has: impl Fn(&str) -> bool) -> Vec<(Role, String)> {
    let places = family.names().filter_map(|(role, name)| Some((role, place(family, prefix, &name)?)));
    places.filter(|(_, name)| has(name)).collect()
}

fn missing(family: &Family, roles: &[(Role, String)]) -> Vec<Slot> {
    family.missing(|role| roles.iter().any(|(known, _)| *known == role))
}

/// A layer's tensors, by role.
struct Found<'a> {
    prefix: String,
    family: &'static Family,
    /// Each with its full name, for messages.
    tensors: BTreeMap<Role, (String, &'a HostTensor)>,
    /// Whether mask buffers of GPT-J and GPT-Neo were skipped.
    has_mask: bool,
}

impl<'a> Found<'a> {
    fn new(state: &'a StateDict, prefix: &str, options: &LoadOptions) -> Result<Found<'a>> {
        // The prefix may be a module's name without the trailing dot.
        let dotted = format!("{prefix}.");
        let lacks_dot =
            !prefix.is_empty() && !prefix.ends_with('.') && state.names().any(|name| name.starts_with(&dotted));
        let prefix = if lacks_dot { dotted } else { prefix.to_string() };
        let under: Vec<&str> = state.names().filter_map(|name| name.strip_prefix(prefix.as_str())).collect();
        if under.is_empty() {
            return Err(Error::File(format!(
                "no tensor's name begins with the prefix {prefix:?}; {}",
                state.other_prefixes(&prefix)
            )));
        }
        let family = match options.names {
            Some(names) => names.family(),
            // Prefers a complete family, then the one that explains more tensors. Of equals the first, which comes last
            // in this reversed order.
            None => (Family::ALL.into_iter().rev())
                .max_by_key(|family| {
                    let roles = there(family, &prefix, |name| state.contains(name));
                    let missing = missing(family, &roles).len();
                    (missing == 0, roles.len(), std::cmp::Reverse(missing))
                })
                .expect("there are families"),
        };
        let roles = there(family, &prefix, |name| state.contains(name));
        let missing = missing(family, &roles);
        if !missing.is_empty() {
            if roles.is_empty() {
                return Err(Error::File(format!(
                    "the {} tensors under the prefix {prefix:?} ({}) are not named as those of an attention layer{}; {}",
                    under.len(),
                    shortened(&under),
                    options.names.map(|names| format!(" of {names}")).unwrap_or_default(),
                    state.other_prefixes(&prefix)
                )));
            }
            let lacks: Vec<String> = missing
                .iter()
                .map(|&slot| {
                    let names = family.weights_of(slot).into_iter().filter_map(|name| place(family, &prefix, &name));
                    names.collect::<Vec<_>>().join(" or ")
                })
                .collect();
            return Err(Error::File(format!(
                "no tensor {}, which go{} with {} in the names of {}; under the prefix lie {}; {}",
                lacks.join(", no tensor "),
                if lacks.len() == 1 { "es" } else { "" },
                roles[0].1,
                family.readings[0],
                shortened(&under),
                state.other_prefixes(&prefix)
            )));
        }

        let mut tensors: BTreeMap<Role, (String, &HostTensor)> = BTreeMap::new();
        for (role, name) in roles {
            let Some(tensor) = state.get(&name) else {
                let (dtype, shape) = state.unread(&name).expect("a name that is there");
                return Err(Error::File(match dtype {
                    "F32" | "F16" | "BF16" | "F64" | NOT_OPENED => {
                        format!("the values of {name} were not read: open more of the file (StateDict::open)")
                    }
                    _ => format!(
                        "{name} {shape:?} is of type {dtype}; F32, F16, BF16 or F64 is needed: quantised weights must be \
                         dequantised first"
                    ),
                }));
            };
            if let Some((other, _)) = tensors.insert(role, (name.clone(), tensor)) {
                return Err(Error::File(format!("{other} and {name} are two tensors for one; only one can be used")));
            }
        }
        let used: BTreeSet<&str> = tensors.values().map(|(name, _)| name.as_str()).collect();
        let mut unknown_ignored: Vec<&String> = options.ignored.iter().collect();
        let mut unexpected = Vec::new();
        let mut has_mask = false;
        for name in under {
            let whole = format!("{prefix}{name}");
            if used.contains(whole.as_str()) {
                continue;
            }
            let before = unknown_ignored.len();
            unknown_ignored.retain(|ignored| **ignored != name && **ignored != whole);
            let shape = state.shape_of(&whole).unwrap_or_default();
            let is_passed_over = family.passes_over(name, shape);
            has_mask |= is_passed_over && matches!(name, "bias" | "masked_bias");
            if unknown_ignored.len() == before && !is_passed_over {
                unexpected.push(name);
            }
        }
        if let Some(name) = unknown_ignored.first() {
            return Err(value_error!(
                "{name:?} is to be ignored, but is no tensor under the prefix {prefix:?} that is left over"
            ));
        }
        if !unexpected.is_empty() {
            return Err(unexpected_error(state, &prefix, family, &unexpected));
        }
        Ok(Found { prefix, family, tensors, has_mask })
    }

    fn get(&self, slot: Slot, part: Part) -> Option<&(String, &'a HostTensor)> {
        self.tensors.get(&(slot, part))
    }

    /// The weight of an existing slot, `[rows, columns]`.
    fn matrix(&self, slot: Slot) -> Result<(&str, [usize; 2], &'a [f32])> {
        let (name, tensor) = self.get(slot, Part::Weight).expect("checked when it was found");
        match *tensor.shape() {
            [0, _] | [_, 0] => Err(shape_error!("{name} has shape {:?}, which holds nothing", tensor.shape())),
            [rows, columns] => Ok((name, [rows, columns], tensor.data())),
            _ => Err(shape_error!("{name} has shape {:?}; two axes are expected", tensor.shape())),
        }
    }

    /// A vector of `len` values; axes of length 1 are ignored.
    fn vector(&self, slot: Slot, part: Part, len: usize) -> Result<Option<Vec<f32>>> {
        let Some((name, tensor)) = self.get(slot, part) else { return Ok(None) };
        let width = tensor.shape().last().copied().unwrap_or(1);
        if tensor.data().len() != len || width != len {
            return Err(shape_error!(
                "{name} has {} values in shape {:?}; {len} are expected, [{len}]",
                tensor.data().len(),
                tensor.shape()
            ));
        }
        Ok(Some(tensor.data().to_vec()))
    }

    fn has(&self, slot: Slot, part: Part) -> bool {
        self.tensors.contains_key(&(slot, part))
    }

    /// The meaning of the names.
    fn reading(&self, options: &LoadOptions) -> Result<Names> {
        if let Some(names) = options.names {
            return Ok(names);
        }
        if let Some(names) = options.model.filter(|names| std::ptr::eq(names.family(), self.family)) {
            return Ok(names);
        }
        let bias_of = |slot| self.has(slot, Part::Bias);
        Ok(match self.family.readings[0] {
            Names::Llama if self.is_gpt_neo() => Names::GptNeo,
            Names::T5 if [Slot::Q, Slot::K, Slot::V, Slot::Out].into_iter().any(bias_of) => Names::Mpnet,
            Names::Gpt2 => {
                let (name, [rows, columns], _) = self.matrix(Slot::Qkv)?;
                let (out_name, out, _) = self.matrix(Slot::Out)?;
                let width = out[0];
                match (out[0] == out[1], rows == width, columns == width) {
                    (true, true, false) => Names::Gpt2,
                    (true, false, true) if rows != 3 * width || options.heads_kv == Some(1) => Names::GptBigCode,
                    (true, false, true) if options.num_heads == 1 => Names::NanoGpt,
                    (true, false, true) => {
                        return Err(Error::File(format!(
                            "{name} [{rows}, {columns}] may be nanoGPT's (all queries, all keys, all values) or \
                             GPT-BigCode's (the rows of each head together): choose names {} or {} (--names)",
                            Names::NanoGpt,
                            Names::GptBigCode
                        )));
                    }
                    _ => {
                        return Err(shape_error!(
                            "{name} [{rows}, {columns}] and {out_name} {out:?} fit neither GPT-2's Conv1D ([in, 3 · in] and \
                             [in, in]) nor nn.Linear; choose names {}, {} or {} (--names) if they are right",
                            Names::Gpt2,
                            Names::NanoGpt,
                            Names::GptBigCode
                        ));
                    }
                }
            }
            Names::Falcon => {
                // ChatGLM has a bias here but none on the output, and fewer key/value heads than heads.
                let (name, [rows, _], _) = self.matrix(Slot::Qkv)?;
                let (_, [_, joined], _) = self.matrix(Slot::Out)?;
                if bias_of(Slot::Qkv) && !bias_of(Slot::Out) && rows != 3 * joined {
                    return Err(Error::File(format!(
                        "{name} may be ChatGLM's (all queries, all keys, all values) or Falcon's (the rows of each \
                         key/value head together): choose names {} or {} (--names)",
                        Names::ChatGlm,
                        Names::Falcon
                    )));
                }
                Names::Falcon
            }
            names => names,
        })
    }

    /// GPT-Neo has CLIP's names and no scale. Its module is `attn.attention`. GPT-J has the same buffers, but no output
    /// bias.
    fn is_gpt_neo(&self) -> bool {
        let biased = [Slot::Q, Slot::K, Slot::V].into_iter().any(|slot| self.has(slot, Part::Bias));
        let (out, _) = self.get(Slot::Out, Part::Weight).expect("checked when it was found");
        let is_its_shape = !biased && self.has(Slot::Out, Part::Bias) && out.ends_with("out_proj.weight");
        is_its_shape && (self.has_mask || self.prefix.ends_with("attn.attention."))
    }

    fn layer(&self, options: &LoadOptions) -> Result<(MultiHeadConfig, Parameters)> {
        let heads = options.num_heads;
        if heads == 0 || options.heads_kv == Some(0) {
            return Err(value_error!("a layer has at least 1 head and 1 key/value head"));
        }
        let names = self.reading(options)?;
        let is_conv1d = names == Names::Gpt2;
        let (out_name, out_shape, out_data) = self.matrix(Slot::Out)?;
        let [output_dim, joined] = if is_conv1d { [out_shape[1], out_shape[0]] } else { out_shape };
        let value_head_dim = divided(&format!("{out_name} {out_shape:?}"), "columns", joined, heads)?;
        let split = if self.has(Slot::Qkv, Part::Weight) {
            self.fused(names, options, joined, value_head_dim)?
        } else {
            self.apart(options, value_head_dim)?
        };
        let Split { heads_kv, head_dim, widths: [embed_dim, kdim, vdim], weights: [q, k, v] } = split;
        let mut config = MultiHeadConfig::with_head_dims(embed_dim, heads, head_dim, value_head_dim)?
            .heads_kv(heads_kv)
            .kdim(kdim)
            .vdim(vdim)
            .output_dim(output_dim);
        config.check()?;

        let rows = [config.q_width()?, config.k_width()?, config.v_width()?];
        let [b_q, b_k, b_v] = self.biases(names, options, rows, config.group())?;
        let b_gate = self.vector(Slot::Gate, Part::Bias, joined)?;
        config.bias = [&b_q, &b_k, &b_v, &b_gate].iter().any(|bias| bias.is_some());
        let is_biased = config.bias;
        let filled = |bias: Option<Vec<f32>>, len: usize| is_biased.then(|| bias.unwrap_or(vec![0.0; len]));
        let gate = match self.has(Slot::Gate, Part::Weight) {
            false if b_gate.is_some() => {
                return Err(Error::File(format!("{}gate has a bias and no weight", self.prefix)));
            }
            false => None,
            true => {
                let (name, shape, weight) = self.matrix(Slot::Gate)?;
                if shape != [joined, embed_dim] {
                    return Err(shape_error!(
                        "{name} has shape {shape:?}; [heads · value_head_dim, embed_dim] = {:?} is expected",
                        [joined, embed_dim]
                    ));
                }
                Some(Projection { weight: weight.to_vec(), bias: filled(b_gate, joined) })
            }
        };
        config.gate = gate.is_some();
        let out = Projection {
            weight: if is_conv1d { transposed(out_data, joined, output_dim) } else { out_data.to_vec() },
            bias: self.vector(Slot::Out, Part::Bias, output_dim)?,
        };
        config.out_bias = out.bias.is_some();
        let norms = self.norms(names, options, &mut config)?;
        let extra = [Slot::BiasK, Slot::BiasV];
        let bias_kv = match extra.map(|slot| self.has(slot, Part::Weight)) {
            [false, false] => None,
            [true, true] => {
                let row = |n: usize| self.vector(extra[n], Part::Weight, rows[n + 1]);
                row(0)?.zip(row(1)?).map(|(key, value)| [key, value])
            }
            _ => return Err(Error::File(format!("{0}bias_k and {0}bias_v must come together", self.prefix))),
        };
        config.add_bias_kv = bias_kv.is_some();
        config.scale = match self.vector(Slot::Scale, Part::Weight, 1)? {
            Some(scale) => Some(scale[0]),
            None if matches!(names, Names::T5 | Names::GptNeo) => Some(1.0),
            None => None,
        };
        let parameters = Parameters {
            q: Projection { weight: q, bias: filled(b_q, rows[0]) },
            k: Projection { weight: k, bias: filled(b_k, rows[1]) },
            v: Projection { weight: v, bias: filled(b_v, rows[2]) },
            out,
            gate,
            norms,
            bias_kv,
        };
        Ok((config, parameters))
    }

    /// Queries, keys and values from separate tensors.
    fn apart(&self, options: &LoadOptions, value_head_dim: usize) -> Result<Split> {
        let heads = options.num_heads;
        let parts = [self.matrix(Slot::Q)?, self.matrix(Slot::K)?, self.matrix(Slot::V)?];
        let [(q_name, q, _), (k_name, k, _), (v_name, v, _)] = parts;
        let head_dim = divided(&format!("{q_name} {q:?}"), "rows", q[0], heads)?;
        let rule = |rule: String| shape_error!("{q_name} {q:?}, {k_name} {k:?}, {v_name} {v:?}: {rule}");
        if !k[0].is_multiple_of(head_dim) || !v[0].is_multiple_of(value_head_dim) {
            return Err(rule(format!(
                "with {heads} heads a head of queries and keys is {head_dim} wide and one of values {value_head_dim}; \
                 the rows for keys and values must be multiples of that"
            )));
        }
        let heads_kv = k[0] / head_dim;
        if v[0] / value_head_dim != heads_kv || !heads.is_multiple_of(heads_kv) {
            return Err(rule(format!(
                "with {heads} heads of {head_dim} (values {value_head_dim}) that is {heads_kv} heads of keys and {} of \
                 values, which must be equal and divide {heads}",
                v[0] / value_head_dim
            )));
        }
        if let Some(wanted) = options.heads_kv
            && wanted != heads_kv
        {
            return Err(rule(format!("that is {heads_kv} key/value heads, not {wanted}")));
        }
        Ok(Split { heads_kv, head_dim, widths: [q[1], k[1], v[1]], weights: parts.map(|(_, _, data)| data.to_vec()) })
    }

    /// Queries, keys and values from one fused tensor.
    fn fused(&self, names: Names, options: &LoadOptions, joined: usize, value_head_dim: usize) -> Result<Split> {
        let heads = options.num_heads;
        let (name, shape, data) = self.matrix(Slot::Qkv)?;
        if let Some(slot) = [Slot::Q, Slot::K, Slot::V].into_iter().find(|&slot| self.has(slot, Part::Weight)) {
            let (other, _) = self.get(slot, Part::Weight).expect("just seen");
            return Err(Error::File(format!(
                "{name} and {other}: queries, keys and values must be either fused or separate"
            )));
        }
        let is_conv1d = names == Names::Gpt2;
        let [rows, columns] = if is_conv1d { [shape[1], shape[0]] } else { shape };
        let by_head = names == Names::Falcon;
        // Rows = (heads + heads_kv) · head_dim + heads_kv · value_head_dim.
        let fit = |heads_kv: usize| {
            let keys = rows.checked_sub(heads_kv.checked_mul(value_head_dim)?)?;
            let each = heads.checked_add(heads_kv)?;
            (heads.is_multiple_of(heads_kv) && keys > 0 && keys.is_multiple_of(each)).then_some((heads_kv, keys / each))
        };
        let one_width = |heads_kv: usize| fit(heads_kv).filter(|&(_, head_dim)| head_dim == value_head_dim);
        let found = match options.heads_kv {
            Some(heads_kv) if by_head => one_width(heads_kv),
            Some(heads_kv) => fit(heads_kv),
            None => {
                let two = (rows / value_head_dim).saturating_sub(heads);
                Some(two / 2).filter(|&heads_kv| heads_kv > 0 && two.is_multiple_of(2)).and_then(one_width)
            }
        };
        let Some((heads_kv, head_dim)) = found else {
            return Err(shape_error!(
                "{name} has shape {shape:?}; {} rows do not divide into queries, keys and values of {heads} heads of \
                 {value_head_dim} ({joined} columns of the output projection over {heads} heads){}: \
                 (heads + 2 · kv_heads) · width = 3 · {joined} = {} is expected where all have as many heads",
                rows,
                options.heads_kv.map(|n| format!(" and {n} key/value heads")).unwrap_or_default(),
                3 * joined
            ));
        };
        let turned = if is_conv1d { transposed(data, shape[0], shape[1]) } else { data.to_vec() };
        let order = order_of(names, heads, heads_kv, head_dim, value_head_dim);
        let weights = order.map(|rows| {
            rows.into_iter().flat_map(|row| turned[row * columns..(row + 1) * columns].iter().copied()).collect()
        });
        Ok(Split { heads_kv, head_dim, widths: [columns; 3], weights })
    }

    /// Biases of queries, keys and values, fused or separate.
    fn biases(
        &self,
        names: Names,
        options: &LoadOptions,
        rows: [usize; 3],
        group: usize,
    ) -> Result<[Option<Vec<f32>>; 3]> {
        let slots = [Slot::Q, Slot::K, Slot::V];
        let total = rows.iter().sum();
        let Some(fused) = self.vector(Slot::Qkv, Part::Bias, total)? else {
            let mut own = [None, None, None];
            for n in 0..3 {
                own[n] = self.vector(slots[n], Part::Bias, rows[n])?;
            }
            return Ok(own);
        };
        if let Some((other, _)) = slots.iter().find_map(|&slot| self.get(slot, Part::Bias)) {
            let (name, _) = self.get(Slot::Qkv, Part::Bias).expect("just read");
            return Err(Error::File(format!(
                "{name} and {other}: there must be either one fused bias or separate ones"
            )));
        }
        let heads = options.num_heads;
        let heads_kv = heads / group;
        // With separate weights, a fused bias is in plain order.
        let is_fused = self.has(Slot::Qkv, Part::Weight);
        let order = order_of(
            if is_fused { names } else { Names::PyTorch },
            heads,
            heads_kv,
            rows[0] / heads,
            rows[2] / heads_kv,
        );
        Ok(order.map(|rows| Some(rows.into_iter().map(|row| fused[row]).collect())))
    }

    /// The norms of queries and keys; sets `config.norm`.
    fn norms(
        &self,
        names: Names,
        options: &LoadOptions,
        config: &mut MultiHeadConfig,
    ) -> Result<Option<[Projection; 2]>> {
        let weight = |slot| self.get(slot, Part::Weight);
        let kinds = [
            ([Slot::QNorm, Slot::KNorm], "q_norm", "k_norm"),
            ([Slot::QLayerNorm, Slot::KLayerNorm], "q_layernorm", "k_layernorm"),
        ];
        let there: Vec<_> = (kinds.into_iter())
            .filter(|(slots, ..)| slots.iter().any(|&slot| self.has(slot, Part::Weight) || self.has(slot, Part::Bias)))
            .collect();
        let epsilon = self.vector(Slot::Epsilon, Part::Weight, 1)?.map(|epsilon| epsilon[0]);
        let (slots, q_word, k_word) = match there[..] {
            [] if epsilon.is_some() => {
                return Err(Error::File(format!("{}norm_epsilon exists, but there is no norm", self.prefix)));
            }
            [] => return Ok(None),
            [one] => one,
            _ => {
                return Err(Error::File(format!(
                    "{0}q_norm and {0}q_layernorm: only one norm is possible",
                    self.prefix
                )));
            }
        };
        let (Some((q_name, q)), Some((k_name, _))) = (weight(slots[0]), weight(slots[1])) else {
            return Err(Error::File(format!(
                "{0}{q_word}.weight and {0}{k_word}.weight must come together",
                self.prefix
            )));
        };
        let [bias_q, bias_k] = slots.map(|slot| self.has(slot, Part::Bias));
        if bias_q != bias_k {
            return Err(Error::File(format!("{q_name} and {k_name}: either both or neither must have a bias")));
        }
        let is_layernorm = slots[0] == Slot::QLayerNorm;
        let width = q.data().len();
        let span = if width == config.head_dim { NormSpan::Head } else { NormSpan::Width };
        let kind = match names {
            Names::Qwen3 if is_layernorm && !bias_q => NormKind::Rms,
            Names::Llama if is_layernorm && !bias_q && options.names != Some(Names::Llama) => {
                return Err(Error::File(format!(
                    "{q_name} {:?} has no bias, which a LayerNorm usually has; LFM2 uses this name for an RMSNorm: \
                     choose names {} (RMSNorm times w) or {} (LayerNorm) (--names)",
                    q.shape(),
                    Names::Qwen3,
                    Names::Llama
                )));
            }
            _ if is_layernorm => NormKind::Layer,
            Names::PyTorch if epsilon.is_none() && options.norm_epsilon.is_none() => {
                return Err(Error::File(format!(
                    "{q_name} {:?} is no part of nn.MultiheadAttention; if it is an RMSNorm of queries, give its epsilon \
                     (LoadOptions::norm_epsilon, --norm-epsilon)",
                    q.shape()
                )));
            }
            Names::Llama | Names::Timm if bias_q => NormKind::Layer,
            Names::Llama if span == NormSpan::Head => {
                return Err(Error::File(format!(
                    "{q_name} {:?} is a norm of each head's queries, which models with these names compute differently: \
                     choose names {} (RMSNorm times w) or {} (RMSNorm times 1 + w) (--names)",
                    q.shape(),
                    Names::Qwen3,
                    Names::Gemma3
                )));
            }
            _ => NormKind::Rms,
        };
        let widths = config.norm_widths(span)?;
        let mut norms = Vec::with_capacity(2);
        for (slot, width) in slots.into_iter().zip(widths) {
            let mut weight = self.vector(slot, Part::Weight, width)?.expect("just seen");
            if names == Names::Gemma3 {
                weight.iter_mut().for_each(|w| *w += 1.0);
            }
            norms.push(Projection { weight, bias: self.vector(slot, Part::Bias, width)? });
        }
        let usual = if is_layernorm { 1e-5 } else { 1e-6 };
        let epsilon = options.norm_epsilon.or(epsilon).or(options.model_epsilon).unwrap_or(usual);
        config.norm = Some(QueryKeyNorm { kind, span, epsilon, bias: bias_q });
        Ok(norms.try_into().ok())
    }
}

/// Queries, keys and values separated: weights `[rows, width]`.
struct Split {
    heads_kv: usize,
    head_dim: usize,
    widths: [usize; 3],
    weights: [Vec<f32>; 3],
}

/// The rows of a fused tensor that belong to queries, keys and values.
fn order_of(names: Names, heads: usize, heads_kv: usize, head_dim: usize, value_head_dim: usize) -> [Vec<usize>; 3] {
    let [q, k, v] = [heads * head_dim, heads_kv * head_dim, heads_kv * value_head_dim];
    let by_head = names == Names::Falcon || names == Names::GptBigCode && heads_kv == heads;
    if !by_head {
        return [(0..q).collect(), (q..q + k).collect(), (q + k..q + k + v).collect()];
    }
    // For each key/value head: the rows of its query heads, then its key's, then its value's.
    let mut order = [Vec::with_capacity(q), Vec::with_capacity(k), Vec::with_capacity(v)];
    let mut row = 0;
    for _ in 0..heads_kv {
        for (of, width) in [(0, q / heads_kv), (1, head_dim), (2, value_head_dim)] {
            order[of].extend(row..row + width);
            row += width;
        }
    }
    order
}

fn divided(what: &str, axis: &str, len: usize, heads: usize) -> Result<usize> {
    if !len.is_multiple_of(heads) {
        return Err(shape_error!("{what}: {len} {axis} are not a positive multiple of num_heads = {heads}"));
    }
    checked_len(&[len / heads])
}

/// A name shortened for display: names in files may be arbitrarily long.
fn cut(name: &str) -> Cow<'_, str> {
    const SHOWN: usize = 200;
    match name.char_indices().nth(SHOWN) {
        Some((end, _)) => Cow::Owned(format!("{}… ({} bytes)", &name[..end], name.len())),
        None => Cow::Borrowed(name),
    }
}

/// The first few of a list.
fn shortened(names: &[&str]) -> String {
    const SHOWN: usize = 6;
    let shown: Vec<Cow<'_, str>> = names.iter().take(SHOWN).map(|name| cut(name)).collect();
    let shown = shown.join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

fn unexpected_error(state: &StateDict, prefix: &str, family: &Family, unexpected: &[&str]) -> Error {
    let whole: Vec<String> = unexpected.iter().map(|name| format!("{prefix}{name}")).collect();
    let whole: Vec<&str> = whole.iter().map(String::as_str).collect();
    let mut text = format!(
        "unexpected tensor{} {} beside a layer with the names of {}",
        if whole.len() == 1 { "" } else { "s" },
        shortened(&whole),
        family.readings[0]
    );
    const LOOKED_AT: usize = 32;
    for name in unexpected.iter().take(LOOKED_AT) {
        let (shape, known) = (state.shape_of(&format!("{prefix}{name}")).unwrap_or_default(), family.names());
        let near = known.map(|(_, known)| known).min_by_key(|known| edits(known, name));
        let is = |part: &str| name.contains(part);
        let hint = match near {
            _ if is("relative_attention_bias") => {
                "it is T5's bias by distance: pass it to Attention::t5_bias and ignore it here".into()
            }
            _ if is("sink") => "pass a sink to Attention::sink and ignore it here".into(),
            _ if is("lora_") => "merge adapters into the weights first".into(),
            _ if ["weight_scale", "scale_inv", "SCB", "qweight", "qzeros", "absmax", "quant"]
                .iter()
                .any(|word| is(word)) =>
            {
                "quantised weights must be dequantised first".into()
            }
            Some(near) if edits(&near, name) <= 2.max(name.len() / 4) => format!("is {prefix}{near} meant?"),
            _ => continue,
        };
        let shape = if shape.is_empty() { String::new() } else { format!(" {shape:?}") };
        text.push_str(&format!("; {prefix}{}{shape}: {hint}", cut(name)));
        break;
    }
    let inside = state.layers().into_iter().filter(|(at, _)| at.starts_with(prefix) && at != prefix).count();
    if inside > 0 {
        text.push_str(&format!("; {}", state.other_prefixes(prefix)));
    }
    text.push_str(
        "; nothing is dropped silently: take it out of the file, or ignore it by name (LoadOptions::ignore, --ignore)",
    );
    Error::File(text)
}
