//! Cases of Keras's layers: `MultiHeadAttention` and `GroupQueryAttention`.

use wgpu_attention::problem::checked_len;
use wgpu_attention::{Attention, Device, KerasKernels, Mask, MultiHeadAttention, MultiHeadConfig, Weights};

use super::case::Case;
use super::compare::Comparison;
use super::signature::{Arguments, Bits, Inputs, Near, OUTPUT, WEIGHTS, expects, hold, mean_where_nothing_is_seen};
use super::stop::Stop;
use crate::array::Array;
use crate::error::{Result, fail};

/// Arguments of both constructors and of `call`. Initializers and arguments for training do not change an answer.
const ARGUMENTS: [&str; 26] = [
    "activity_regularizer",
    "attention_axes",
    "autocast",
    "bias_constraint",
    "bias_initializer",
    "bias_regularizer",
    "dropout",
    "flash_attention",
    "head_dim",
    "kernel_constraint",
    "kernel_initializer",
    "kernel_regularizer",
    "key_dim",
    "num_heads",
    "num_key_value_heads",
    "num_query_heads",
    "output_shape",
    "return_attention_scores",
    "seed",
    "sliding_window",
    "trainable",
    "training",
    "use_bias",
    "use_causal_mask",
    "use_gate",
    "value_dim",
];
const TENSORS: [&str; 7] = ["query", "value", "key", "query_mask", "value_mask", "key_mask", "attention_mask"];
const PARTS: [&str; 5] = ["query", "key", "value", "gate", "attention_output"];

/// `keras.layers.MultiHeadAttention`.
pub fn multi_head_attention(case: &Case, device: &Device, attention: Attention) -> Result<Vec<Comparison>, Stop> {
    layer(case, device, attention, false)
}

/// `keras.layers.GroupQueryAttention`.
pub fn group_query_attention(case: &Case, device: &Device, attention: Attention) -> Result<Vec<Comparison>, Stop> {
    layer(case, device, attention, true)
}

/// The ways in which Keras may treat queries that see no keys.
#[derive(Clone, Copy, PartialEq)]
struct Reading {
    /// Such queries return the mean of V (`dot_product_attention`), or have weights of 0 (Keras's own softmax).
    mean: bool,
    /// MultiHeadAttention replaces its argument `query_mask` with the mask attached to the query, so the argument has
    /// no effect.
    has_query_mask: bool,
}

fn layer(case: &Case, device: &Device, attention: Attention, grouped: bool) -> Result<Vec<Comparison>, Stop> {
    let arguments = Arguments::of(case, &ARGUMENTS, &TENSORS)?;
    let dropout = arguments.float("dropout")?.unwrap_or(0.0);
    if dropout != 0.0 && arguments.flag("training", false)? {
        return Err(Stop::Skip(format!("dropout = {dropout} in training draws random numbers")));
    }
    let call = Call::of(case, arguments)?;
    let kernels = Kernels::of(case)?;
    let layer = kernels.layer(&call.arguments, device, grouped)?;

    // Keras computes weights itself if they are requested or if inputs have more than three axes.
    let asked = call.arguments.get("return_attention_scores");
    let wants_scores =
        if asked.is_null() { expects(case, WEIGHTS) } else { call.arguments.flag("return_attention_scores", false)? };
    let own_softmax = wants_scores || dropout != 0.0 || call.rank() != 3;
    let mut readings = vec![Reading { mean: !own_softmax, has_query_mask: true }];
    if asked.is_null() && call.rank() == 3 {
        readings.push(Reading { mean: own_softmax, has_query_mask: true });
    }
    if !grouped && call.query_mask.is_some() {
        let without: Vec<_> = readings.iter().map(|one| Reading { has_query_mask: false, ..*one }).collect();
        readings.extend(without);
    }

    let mut first = None;
    for reading in readings {
        let found = call.compute(case, &layer, &kernels, attention.clone(), reading, device)?;
        if found.iter().all(|one| one.ok) {
            return Ok(found);
        }
        first.get_or_insert(found);
    }
    Ok(first.expect("at least one reading"))
}

/// The arguments of a layer call.
struct Call {
    arguments: Arguments,
    /// `[..., dim]`
    query: Array,
    value: Array,
    key: Option<Array>,
    query_mask: Option<Bits>,
    /// `value_mask` and `key_mask`.
    key_masks: Vec<Bits>,
    attention_mask: Option<Bits>,
    /// The attention axes, and the others except for the last.
    axes: Vec<usize>,
    free: Vec<usize>,
    near: Near,
    /// Full names of the tensors above.
    used: Vec<String>,
}

impl Call {
    fn of(case: &Case, arguments: Arguments) -> Result<Call> {
        let mut inputs = Inputs::new(case);
        let query = inputs.need(&["query", "q", "x"])?;
        // In self-attention the input may be given only once.
        let value = inputs.find(&["value", "v"])?.unwrap_or_else(|| query.clone());
        let key = inputs.find(&["key", "k"])?;
        let (query_mask, attention_mask) = (inputs.bits("query_mask")?, inputs.bits("attention_mask")?);
        let key_masks = [inputs.bits("value_mask")?, inputs.bits("key_mask")?].into_iter().flatten().collect();
        let rank = query.shape().len();
        for (name, shape) in [("value", Some(value.shape())), ("key", key.as_ref().map(Array::shape))] {
            if rank < 3 || shape.is_some_and(|shape| shape.len() != rank) {
                fail!("query {:?} and {name} {shape:?} must have as many axes, three or more", query.shape());
            }
        }
        let axes = match arguments.ints("attention_axes")? {
            None => (1..rank - 1).collect(),
            Some(given) => {
                let last = rank as i64 - 1;
                let axes: Vec<i64> = given.iter().map(|&axis| if axis < 0 { axis + last + 1 } else { axis }).collect();
                let is_bad = |n: usize| !(0..last).contains(&axes[n]) || axes[..n].contains(&axes[n]);
                if axes.is_empty() || (0..axes.len()).any(is_bad) {
                    fail!(
                        "attention_axes {given:?} of a query {:?} must be distinct axes other than the last",
                        query.shape()
                    );
                }
                axes.into_iter().map(|axis| axis as usize).collect::<Vec<_>>()
            }
        };
        let free = (0..rank - 1).filter(|axis| !axes.contains(axis)).collect();
        let causal = arguments.flag("use_causal_mask", false)?;
        let window = match arguments.count("sliding_window")? {
            Some(0) => fail!("\"sliding_window\" is 0; it counts the query's own key"),
            window => window.map(|window| (window - 1, window - 1)),
        };
        Ok(Call {
            arguments,
            query,
            value,
            key,
            query_mask,
            key_masks,
            attention_mask,
            axes,
            free,
            near: Near { causal, window },
            used: inputs.used,
        })
    }

    fn rank(&self) -> usize {
        self.query.shape().len()
    }

    /// Lengths of some axes.
    fn lengths(array: &Array, axes: &[usize]) -> Vec<usize> {
        axes.iter().map(|&axis| array.shape()[axis]).collect()
    }

    /// `[free, attended to, dim]`.
    fn folded(&self, name: &str, array: &Array) -> Result<Array> {
        let (free, want) = (Call::lengths(array, &self.free), Call::lengths(&self.query, &self.free));
        if free != want {
            fail!(
                "query {:?} and {name} {:?} differ in axes {:?}, which are not attention axes",
                self.query.shape(),
                array.shape(),
                self.free
            );
        }
        let order: Vec<usize> = self.free.iter().chain(&self.axes).copied().chain([self.rank() - 1]).collect();
        let permuted = array.permute(&order)?;
        let len = checked_len(&Call::lengths(array, &self.axes))?;
        let dim = array.shape()[self.rank() - 1];
        Array::new(&[checked_len(&free)?, len, dim], permuted.values().clone())
    }

    /// All masks combined as in `_compute_attention_mask`: `[free, heads, queries, keys]`.
    fn seen(&self, heads: usize, reading: Reading) -> Result<Bits> {
        let (lens_q, lens_k) = (Call::lengths(&self.query, &self.axes), Call::lengths(&self.value, &self.axes));
        let mut masks = Vec::new();
        if let Some(mask) = self.query_mask.as_ref().filter(|_| reading.has_query_mask) {
            masks.push(mask.clone().expand(1)?);
        }
        for mask in &self.key_masks {
            masks.push(mask.clone().expand(2)?);
        }
        // Causal masks and windows apply along axis 1, whatever the attention axes are.
        masks.extend(self.near.bits(self.query.shape()[1], self.value.shape()[1])?);
        masks.extend(self.attention_mask.clone());
        let free = Call::lengths(&self.query, &self.free);
        let shape: Vec<usize> =
            free.iter().copied().chain([heads]).chain(lens_q.clone()).chain(lens_k.clone()).collect();
        let folded = [checked_len(&free)?, heads, checked_len(&lens_q)?, checked_len(&lens_k)?];
        let mut all = Bits::every(masks)?.unwrap_or(Bits::all(shape.len()));
        // Missing axes, such as the heads, are inserted before those of queries and keys.
        while all.shape.len() < shape.len() {
            all = all.expand(2 * self.axes.len() + 1)?;
        }
        Ok(all.broadcast("the mask", &shape)?.reshape(&folded))
    }

    /// The rules of the call for an input folded to three axes.
    fn rules(&self, attention: Attention, heads: usize, reading: Reading, device: &Device) -> Result<Attention> {
        let seen = self.seen(heads, reading)?;
        if reading.mean && seen.sees_nothing_somewhere() {
            return mean_where_nothing_is_seen(attention, &seen, device);
        }
        if self.rank() != 3 || self.axes != [1] {
            return Ok(attention.mask(Mask::keep_where(seen.upload(device)?)?));
        }
        let mut attention = attention;
        if let Some(mask) = self.query_mask.as_ref().filter(|_| reading.has_query_mask) {
            attention = attention.mask(Mask::keep_where(mask.clone().expand(1)?.expand(3)?.upload(device)?)?);
        }
        for mask in &self.key_masks {
            attention = attention.key_padding(Mask::keep_where(mask.upload(device)?)?);
        }
        if let Some(mask) = &self.attention_mask {
            let mut mask = mask.clone();
            while mask.shape.len() < 4 {
                mask = mask.expand(3)?;
            }
            attention = attention.mask(Mask::keep_where(mask.upload(device)?)?);
        }
        Ok(self.near.rules(attention))
    }

    fn compute(
        &self,
        case: &Case,
        layer: &MultiHeadAttention,
        kernels: &Kernels,
        attention: Attention,
        reading: Reading,
        device: &Device,
    ) -> Result<Vec<Comparison>, Stop> {
        let heads = layer.config().num_heads;
        let query = self.folded("query", &self.query)?.upload("query", device)?;
        let value = self.folded("value", &self.value)?.upload("value", device)?;
        let key = match &self.key {
            Some(key) => self.folded("key", key)?.upload("key", device)?,
            None => value.clone(),
        };
        let mut attention = self.rules(attention, heads, reading, device)?;
        if expects(case, WEIGHTS) {
            attention = attention.weights(Weights::PerHead);
        }
        let result = layer.forward(&query, &key, &value, &attention)?;

        // Restore the axes of the query, followed by those of the output shape.
        let (free, lens_q) = (Call::lengths(&self.query, &self.free), Call::lengths(&self.query, &self.axes));
        let lead: Vec<usize> = self.free.iter().chain(&self.axes).copied().collect();
        let mut order = vec![0; lead.len()];
        lead.iter().enumerate().for_each(|(at, &axis)| order[axis] = at);
        order.extend(lead.len()..lead.len() + kernels.output_shape().len());
        let folded: Vec<usize> = free.iter().chain(&lens_q).chain(kernels.output_shape()).copied().collect();
        let output = Array::download(&result.output)?;
        let mut answers = vec![(OUTPUT, Array::new(&folded, output.values().clone())?.permute(&order)?)];
        if let Some(weights) = &result.weights {
            let lens_k = Call::lengths(&self.value, &self.axes);
            let shape: Vec<usize> = free.into_iter().chain([heads]).chain(lens_q).chain(lens_k).collect();
            answers.push((WEIGHTS, Array::new(&shape, Array::download(weights)?.values().clone())?));
        }
        let used = [self.used.as_slice(), &kernels.used].concat();
        hold(case, query.dtype(), &self.arguments.unknown, &used, &answers)
    }
}

/// The weights of a layer, by their Keras paths.
struct Kernels {
    /// Kernel and bias of [`PARTS`].
    parts: [[Option<Array>; 2]; 5],
    used: Vec<String>,
}

impl Kernels {
    /// From `param.query/kernel` and so on; a layer name before it is ignored, and `.` or `_` may replace `/`.
    fn of(case: &Case) -> Result<Kernels> {
        let mut kernels = Kernels { parts: Default::default(), used: Vec::new() };
        for (name, array) in case.with_prefix("param.")? {
            let Some([part, which]) = Kernels::place(&name) else { continue };
            if kernels.parts[part][which].replace(array).is_some() {
                fail!("param.{name} is the second tensor of that meaning");
            }
            kernels.used.push(format!("param.{name}"));
        }
        for (n, part) in PARTS.iter().enumerate() {
            let needed = *part != "gate" || kernels.parts[n][1].is_some();
            if needed && kernels.parts[n][0].is_none() {
                fail!("no tensor param.{part}/kernel");
            }
        }
        Ok(kernels)
    }

    /// The index in [`PARTS`], and 0 for its kernel or 1 for its bias; `None` for any other tensor.
    fn place(name: &str) -> Option<[usize; 2]> {
        let plain = name.trim_end_matches(":0").replace('.', "/");
        let mut ways = plain.rsplit('/');
        let last = ways.next()?;
        let (part, last) = match ways.next() {
            Some(part) => (part, last),
            None => last.rsplit_once('_')?,
        };
        let part = part.trim_start_matches('_').trim_end_matches("_dense");
        let part = if ["output", "out"].contains(&part) { "attention_output" } else { part };
        let which = ["kernel", "bias"].iter().position(|which| *which == last)?;
        Some([PARTS.iter().position(|one| *one == part)?, which])
    }

    fn kernel(&self, part: usize) -> Result<[usize; 3]> {
        match self.parts[part][0].as_ref().map(Array::shape) {
            Some(&[a, b, c]) if part < 4 => Ok([a, b, c]),
            Some(&[a, b, ref rest @ ..]) if part == 4 && !rest.is_empty() => Ok([a, b, checked_len(rest)?]),
            shape => fail!("{}/kernel of shape {shape:?} must have three axes", PARTS[part]),
        }
    }

    /// Lengths of the output's last axes.
    fn output_shape(&self) -> &[usize] {
        &self.parts[4][0].as_ref().expect("needed").shape()[2..]
    }

    fn layer(&self, arguments: &Arguments, device: &Device, grouped: bool) -> Result<MultiHeadAttention> {
        let ([dim, heads, key_dim], [key_in, heads_kv, key_width]) = (self.kernel(0)?, self.kernel(1)?);
        let ([value_in, value_heads, value_dim], [out_heads, out_dim, output_dim]) = (self.kernel(2)?, self.kernel(4)?);
        let gated = self.parts[3][0].is_some();
        let gate = if gated { self.kernel(3)? } else { [dim, heads, value_dim] };
        if key_width != key_dim
            || value_heads != heads_kv
            || [out_heads, out_dim] != [heads, value_dim]
            || gate != [dim, heads, value_dim]
        {
            fail!(
                "kernels of query {:?}, key {:?}, value {:?}, gate {gate:?} and attention_output {:?} do not fit: \
                 [dim, heads, key_dim], [.., heads_kv, key_dim], [.., heads_kv, value_dim], [dim, heads, value_dim] \
                 and [heads, value_dim, ..] are expected",
                [dim, heads, key_dim],
                [key_in, heads_kv, key_width],
                [value_in, value_heads, value_dim],
                [out_heads, out_dim, output_dim]
            );
        }
        let counts: &[(&str, usize)] = if grouped {
            &[
                ("num_query_heads", heads),
                ("num_key_value_heads", heads_kv),
                ("head_dim", key_dim),
                ("head_dim", value_dim),
            ]
        } else {
            &[("num_heads", heads), ("num_heads", heads_kv), ("key_dim", key_dim), ("value_dim", value_dim)]
        };
        for (name, have) in counts {
            if let Some(given) = arguments.count(name)?
                && given != *have
            {
                fail!("the case's \"{name}\" is {given}, but the kernels say {have}");
            }
        }
        if let Some(given) = arguments.counts("output_shape")?.filter(|given| !given.is_empty())
            && given != self.output_shape()
        {
            fail!(
                "the case's \"output_shape\" is {given:?}, but attention_output/kernel says {:?}",
                self.output_shape()
            );
        }
        if gated != arguments.flag("use_gate", gated)? {
            fail!(
                "the case's \"use_gate\" is {}, but gate/kernel is {}",
                !gated,
                if gated { "there" } else { "missing" }
            );
        }
        let biased = self.parts[0][1].is_some();
        if biased != arguments.flag("use_bias", biased)? {
            fail!(
                "the case's \"use_bias\" is {}, but query/bias is {}",
                !biased,
                if biased { "there" } else { "missing" }
            );
        }
        for (n, part) in PARTS.iter().enumerate().filter(|(n, _)| self.parts[*n][0].is_some()) {
            if self.parts[n][1].is_some() != biased {
                fail!("{part}/bias and query/bias must both be present or both be absent");
            }
        }
        let floats = |part: usize, which: usize| self.parts[part][which].as_ref().map_or_else(Vec::new, Array::to_f32);
        let [query, key, value, gate, output] = std::array::from_fn(|part| floats(part, 0));
        let [b_query, b_key, b_value, b_gate, b_output] = std::array::from_fn(|part| floats(part, 1));
        let config = MultiHeadConfig::with_head_dims(dim, heads, key_dim, value_dim)?
            .heads_kv(heads_kv)
            .kdim(key_in)
            .vdim(value_in)
            .output_dim(output_dim)
            .bias(biased)
            .gate(gated);
        let mut kernels = KerasKernels::new(&query, &key, &value, &output);
        if biased {
            kernels = kernels.biases([&b_query, &b_key, &b_value, &b_output]);
        }
        if gated {
            kernels = kernels.gate(&gate, biased.then_some(&b_gate));
        }
        Ok(MultiHeadAttention::from_keras(device, config, kernels)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_go_by_several_names() {
        for name in [
            "query/kernel",
            "mha/query/kernel",
            "query.kernel",
            "query_kernel",
            "mha/query/kernel:0",
            "_query_dense/kernel",
        ] {
            assert_eq!(Kernels::place(name), Some([0, 0]), "{name}");
        }
        for name in ["attention_output/bias", "attention_output_bias", "output/bias", "gqa/attention_output/bias"] {
            assert_eq!(Kernels::place(name), Some([4, 1]), "{name}");
        }
        for name in ["query", "query/weight", "sinks/kernel", ""] {
            assert_eq!(Kernels::place(name), None, "{name}");
        }
    }
}
