//! Cases of JAX: `jax.nn.dot_product_attention`.

use serde_json::Value;
use wgpu_attention::{Attention, Device, Mask, Tensor, Weights};

use super::case::Case;
use super::compare::Comparison;
use super::signature::{
    Arguments, Bits, Inputs, MASKED_SCORE, Near, OUTPUT, RESIDUAL, WEIGHTS, expects, hold, mean_where_nothing_is_seen,
};
use super::stop::Stop;
use crate::array::{Array, Values};
use crate::error::{Result, fail};

const ARGUMENTS: [&str; 7] = [
    "scale",
    "is_causal",
    "query_seq_lengths",
    "key_value_seq_lengths",
    "local_window_size",
    "implementation",
    "return_residual",
];
const TENSORS: [&str; 7] = ["query", "key", "value", "bias", "mask", "query_seq_lengths", "key_value_seq_lengths"];

/// Query `[batch, len, heads, dim]` or `[len, heads, dim]`; a true mask entry attends. If all keys of a query are
/// masked, JAX gives all keys the same weight. Queries beyond their length give 0.
pub fn dot_product_attention(case: &Case, device: &Device, attention: Attention) -> Result<Vec<Comparison>, Stop> {
    let arguments = Arguments::of(case, &ARGUMENTS, &TENSORS)?;
    match arguments.get("implementation") {
        Value::Null => {}
        Value::String(name) if ["xla", "cudnn"].contains(&name.as_str()) => {}
        other => return Err(Stop::Skip(format!("the implementation {other} is not known"))),
    }
    let mut inputs = Inputs::new(case);
    let mut operand = |names: [&str; 2]| inputs.need(&names)?.upload(names[0], device);
    let (q, k, v) = (operand(["query", "q"])?, operand(["key", "k"])?, operand(["value", "v"])?);
    let rank = q.shape().len();
    let heads_first = |name: &str, x: &Tensor| -> Result<Tensor> {
        match x.shape().len() {
            3 => Ok(x.permute(&[1, 0, 2])?.unsqueeze(0)?),
            4 => Ok(x.permute(&[0, 2, 1, 3])?),
            _ => fail!("{name} {:?} must be [batch, len, heads, dim] or [len, heads, dim]", x.shape()),
        }
    };
    let (q, k, v) = (heads_first("query", &q)?, heads_first("key", &k)?, heads_first("value", &v)?);
    let [batch, heads, len_q, _] = *q.shape() else { unreachable!("four axes") };
    let len_k = k.shape()[2];

    let mut attention = attention.lse(true);
    if let Some(scale) = arguments.float("scale")? {
        attention = attention.scale(scale as f32);
    }
    if let Some(bias) = inputs.find(&["bias"])? {
        attention = attention.bias(bias.upload("bias", device)?);
    }
    let mask = match inputs.find(&["mask"])? {
        None => None,
        Some(mask) if mask.is_float() => {
            fail!("the mask holds floats; JAX expects booleans there, and floats as bias");
        }
        Some(mask) => Some(Bits::of("mask", &mask)?),
    };
    let mut lengths = |name: &str, most: usize| -> Result<Option<Vec<usize>>> {
        let lengths = match inputs.find(&[name])? {
            Some(array) => Some(array.lengths(name)?),
            None => arguments.counts(name)?,
        };
        match lengths {
            Some(lengths) if lengths.len() != batch => {
                fail!("{name} has {} entries for a batch of {batch}", lengths.len())
            }
            // A larger length means all of them.
            lengths => Ok(lengths.map(|all| all.into_iter().map(|len| len.min(most)).collect())),
        }
    };
    let (query_lengths, key_lengths) = (lengths("query_seq_lengths", len_q)?, lengths("key_value_seq_lengths", len_k)?);
    let window = match arguments.counts("local_window_size")?.as_deref() {
        None => None,
        Some(&[both]) => Some((both, both)),
        Some(&[left, right]) => Some((left, right)),
        Some(other) => {
            fail!("local_window_size {other:?} must be one number or two");
        }
    };
    let near = Near { causal: arguments.flag("is_causal", false)?, window };

    // What each query sees, apart from the query lengths.
    let of_lengths = |lengths: &Vec<usize>| Bits::of_lengths(lengths, len_k)?.expand(2)?.expand(3);
    let of_lengths = key_lengths.as_ref().map(of_lengths).transpose()?;
    let masks = [near.bits(len_q, len_k)?, of_lengths, mask.clone()];
    let seen = Bits::every(masks.into_iter().flatten())?.unwrap_or(Bits::all(4));
    let seen = seen.broadcast("the mask", &[batch, heads, len_q, len_k])?;
    if seen.sees_nothing_somewhere() {
        attention = mean_where_nothing_is_seen(attention, &seen, device)?;
    } else {
        if let Some(mask) = &mask {
            attention = attention.mask(Mask::keep_where(mask.upload(device)?)?);
        }
        if let Some(lengths) = key_lengths {
            attention = attention.key_lengths(lengths);
        }
        attention = near.rules(attention);
    }
    if let Some(lengths) = query_lengths {
        attention = attention.query_lengths(lengths);
    }
    if expects(case, WEIGHTS) {
        attention = attention.weights(Weights::PerHead);
    }

    let attended = attention.forward(&q, &k, &v)?;
    let unbatched = |tensor: Tensor| if rank == 3 { tensor.select(0, 0) } else { Ok(tensor) };
    let output = unbatched(attended.output.permute(&[0, 2, 1, 3])?)?;
    let lse = attended.lse.expect("asked for").permute(&[0, 2, 1])?;
    let lse = Array::download(&unbatched(lse)?)?;
    // JAX's masked scores are finite.
    let finite = lse.to_f32().into_iter().map(|x| if x == f32::NEG_INFINITY { MASKED_SCORE } else { x }).collect();
    let lse = Array::new(lse.shape(), Values::F32(finite))?;
    let mut answers = vec![(OUTPUT, Array::download(&output)?), (RESIDUAL, lse)];
    if let Some(weights) = attended.weights {
        answers.push((WEIGHTS, Array::download(&unbatched(weights)?)?));
    }
    hold(case, q.dtype(), &arguments.unknown, &inputs.used, &answers)
}
