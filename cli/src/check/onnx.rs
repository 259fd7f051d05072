//! Cases of ONNX's operators.

use serde_json::Value;
use wgpu_attention::position::{Pairing, Rotary, TokenPositions};
use wgpu_attention::{
    Align, Attention, Device, HostTensor, KvCache, KvCacheConfig, Mask, ScatterMode, ScoreStage, Tensor,
};

use super::case::{Case, add_mask, as_float, as_int};
use super::compare::Comparison;
use super::stop::Stop;
use crate::array::{Array, Values};
use crate::error::{Result, fail};

fn attribute<'a>(case: &'a Case, name: &str) -> &'a Value {
    &case.get("attributes")[name]
}
/// Skips a case with an unknown attribute, because it could change the answer.
fn expect_attributes(case: &Case, known: &[&str]) -> Result<(), Stop> {
    let given = case.get("attributes").as_object();
    match given.and_then(|all| all.keys().find(|name| !known.contains(&name.as_str()))) {
        None => Ok(()),
        Some(odd) => Err(Stop::Skip(format!("the attribute {odd} is not known"))),
    }
}
fn int(case: &Case, name: &str) -> Result<Option<i64>> {
    as_int(name, attribute(case, name))
}
fn float(case: &Case, name: &str) -> Result<Option<f64>> {
    as_float(name, attribute(case, name))
}
/// One side of the window; -1 leaves it open.
fn window_side(case: &Case, name: &str) -> Result<Option<usize>> {
    match int(case, name)? {
        None | Some(-1) => Ok(None),
        Some(n) => match usize::try_from(n) {
            Ok(n) => Ok(Some(n)),
            Err(_) => fail!("{name} = {n} must be -1 or not negative"),
        },
    }
}

/// Attention of opsets 23 to 25.
pub fn attention(case: &Case, device: &Device, mut attention: Attention) -> Result<Vec<Comparison>, Stop> {
    const INPUTS: [&str; 7] = ["Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen"];
    const ATTRIBUTES: [&str; 9] = [
        "is_causal",
        "kv_num_heads",
        "left_window_size",
        "q_num_heads",
        "qk_matmul_output_mode",
        "right_window_size",
        "scale",
        "softcap",
        // The softmax is always computed in f32.
        "softmax_precision",
    ];
    case.expect_inputs(&INPUTS)?;
    expect_attributes(case, &ATTRIBUTES)?;
    let q_in = case.upload("Q", device)?;
    let is_flat = q_in.shape().len() == 3;
    let q = four_axes(case, "q_num_heads", q_in)?;
    let (mut k, mut v) = (
        four_axes(case, "kv_num_heads", case.upload("K", device)?)?,
        four_axes(case, "kv_num_heads", case.upload("V", device)?)?,
    );
    let past_len = case.optional("past_key")?.and_then(|past| past.shape().get(2).copied()).unwrap_or(0);
    if case.optional("past_key")?.is_some() {
        let (past_key, past_value) = (case.upload("past_key", device)?, case.upload("past_value", device)?);
        let mut cache = cache_for(&past_key, &past_value, k.shape().get(2).copied().unwrap_or(0))?;
        cache.append(&past_key, &past_value)?;
        cache.append(&k, &v)?;
        (k, v) = (cache.keys()?.with_dtype(k.dtype())?, cache.values()?.with_dtype(v.dtype())?);
    }
    let (Some(&len_q), Some(&len_k)) = (q.shape().get(2), k.shape().get(2)) else {
        fail!("Q and K must have three or four axes");
    };

    // The position of the queries: after the past, or at the end of the valid keys.
    let mut align = Align::Offset(past_len as i64);
    if let Some(valid) = case.optional("nonpad_kv_seqlen")? {
        let valid = valid.lengths("nonpad_kv_seqlen")?;
        align = Align::PerBatch(valid.iter().map(|&n| n as i64 - len_q as i64).collect());
        attention = attention.key_lengths(valid.iter().map(|&n| n.min(len_k)).collect());
    }
    attention =
        if int(case, "is_causal")?.unwrap_or(0) != 0 { attention.causal(align) } else { attention.align(align) };
    attention = attention.window(window_side(case, "left_window_size")?, window_side(case, "right_window_size")?);
    if let Some(scale) = float(case, "scale")? {
        attention = attention.scale(scale as f32);
    }
    if let Some(cap) = float(case, "softcap")?.filter(|&cap| cap != 0.0) {
        attention = attention.softcap(cap as f32);
    }
    if let Some(mask) = case.optional("attn_mask")? {
        let mask = pad_keys(&mask, len_k)?;
        attention = add_mask(attention, "attn_mask", &mask, Mask::keep_where, device)?;
    }
    let stage = match int(case, "qk_matmul_output_mode")?.unwrap_or(0) {
        0 => ScoreStage::Scaled,
        1 => ScoreStage::Capped,
        2 => ScoreStage::Masked,
        3 => ScoreStage::Weights,
        other => return Err(Stop::Skip(format!("the qk_matmul_output_mode {other} is not known"))),
    };
    let wants_scores = case.get("outputs").get("qk_matmul_output").is_some();
    let attended = attention.scores(wants_scores.then_some(stage)).forward(&q, &k, &v)?;

    let mut output = attended.output;
    if is_flat {
        // Back to [batch, len, heads * dim].
        let [b, h, s, d] = *output.shape() else { fail!("the output must have four axes") };
        let array = Array::download(&output.permute(&[0, 2, 1, 3])?)?;
        output = Array::from_floats(&[b, s, h * d], array.to_f32(), output.dtype())?.upload("Y", device)?;
    }
    let mut results = vec![
        ("Y", Array::download(&output)?),
        ("present_key", Array::download(&k)?),
        ("present_value", Array::download(&v)?),
    ];
    if let Some(scores) = &attended.scores {
        results.push(("qk_matmul_output", Array::download(scores)?));
    }
    case.against_onnx(&results)
}

/// `[batch, len, heads * dim]` as `[batch, heads, len, dim]`; four axes stay.
fn four_axes(case: &Case, heads: &str, tensor: Tensor) -> Result<Tensor> {
    let [b, s, width] = *tensor.shape() else { return Ok(tensor) };
    let count = usize::try_from(int(case, heads)?.unwrap_or(0)).unwrap_or(0);
    if count == 0 || !width.is_multiple_of(count) {
        fail!("{:?} does not split into {heads} = {count} heads", tensor.shape());
    }
    Ok(tensor.reshape(&[b, s, count, width / count])?.permute(&[0, 2, 1, 3])?)
}

/// A cache with room for a past and `more` tokens.
fn cache_for(k: &Tensor, v: &Tensor, more: usize) -> Result<KvCache> {
    let (&[batch, heads, len, dim_k], &[_, _, _, dim_v]) = (k.shape(), v.shape()) else {
        fail!("the past keys {:?} and values {:?} must have four axes", k.shape(), v.shape());
    };
    let capacity = len.saturating_add(more);
    Ok(KvCache::new(k.device(), KvCacheConfig::new(batch, heads, capacity, dim_k).dim_v(dim_v))?)
}

/// TensorScatter of opset 24: overwrites rows of a cache.
pub fn tensor_scatter(case: &Case, device: &Device) -> Result<Vec<Comparison>, Stop> {
    case.expect_inputs(&["past_cache", "update", "write_indices"])?;
    let mode = match attribute(case, "mode").as_str() {
        None if attribute(case, "mode").is_null() => ScatterMode::Linear,
        Some("linear") => ScatterMode::Linear,
        Some("circular") => ScatterMode::Circular,
        _ => return Err(Stop::Skip(format!("the mode {} is not known", attribute(case, "mode")))),
    };
    let past = case.upload("past_cache", device)?;
    let update = case.upload("update", device)?;
    let rank = past.shape().len();
    let axis = int(case, "axis")?.unwrap_or(-2);
    let at = if axis < 0 { axis + rank as i64 } else { axis };
    if !(3..=4).contains(&rank) || !(1..rank as i64).contains(&at) {
        return Err(Stop::Skip(format!("axis {axis} of a cache with {rank} axes is not known")));
    }
    // Permute to [batch, heads, rows, dim], where the axis holds the rows, and back.
    let mut axes: Vec<usize> = (0..rank).collect();
    axes.swap(at as usize, rank - 2);
    let to_rows = |tensor: Tensor| -> Result<Tensor> {
        if tensor.shape().len() != rank {
            fail!("update {:?} and past_cache {:?} must have as many axes", tensor.shape(), past.shape());
        }
        let rows = tensor.permute(&axes)?;
        Ok(if rank == 3 { rows.unsqueeze(1)? } else { rows })
    };
    let (rows, update) = (to_rows(past.clone())?, to_rows(update)?);
    let starts = match case.optional("write_indices")? {
        Some(starts) => starts.lengths("write_indices")?,
        None => vec![0; rows.shape()[0]],
    };
    // A cache has keys and values; here they are the same.
    let mut cache = cache_for(&rows, &rows, 0)?;
    cache.append(&rows, &rows)?;
    cache.write(&starts, &update, &update, mode)?;
    let present = if rank == 3 { cache.keys()?.select(1, 0)? } else { cache.keys()? };
    let present = Array::download(&present.permute(&axes)?.with_dtype(past.dtype())?)?;
    case.against_onnx(&[("present_cache", present)])
}

/// A mask whose last axis is shorter than the keys hides the remaining keys.
fn pad_keys(mask: &Array, len_k: usize) -> Result<Array> {
    let Some((&have, lead)) = mask.shape().split_last() else { return Ok(mask.clone()) };
    if have >= len_k {
        return Ok(mask.clone());
    }
    fn widen<T: Copy>(data: &[T], rows: usize, have: usize, want: usize, hidden: T) -> Vec<T> {
        let row = |i: usize| data[i * have..][..have].iter().copied().chain(std::iter::repeat_n(hidden, want - have));
        (0..rows).flat_map(row).collect()
    }
    let rows: usize = lead.iter().product();
    let shape: Vec<usize> = lead.iter().copied().chain([len_k]).collect();
    match mask.values() {
        Values::Bool(x) => Array::new(&shape, Values::Bool(widen(x, rows, have, len_k, false))),
        _ => {
            let values = widen(&mask.to_f32(), rows, have, len_k, f32::NEG_INFINITY);
            Array::from_floats(&shape, values, mask.dtype("attn_mask")?)
        }
    }
}

/// Softmax since opset 13: over one axis.
pub fn softmax(case: &Case, device: &Device) -> Result<Vec<Comparison>, Stop> {
    if as_int("opset", case.get("opset"))?.is_some_and(|opset| opset < 13) {
        return Err(Stop::Skip("before opset 13 Softmax flattens its input".into()));
    }
    case.expect_inputs(&["input"])?;
    let axis = int(case, "axis")?.unwrap_or(-1) as isize;
    let result = wgpu_attention::softmax(&case.upload("input", device)?, axis)?;
    case.against_onnx(&[("output", Array::download(&result)?)])
}

/// RotaryEmbedding of opset 23, with the caches it is given.
pub fn rotary_embedding(case: &Case, device: &Device) -> Result<Vec<Comparison>, Stop> {
    case.expect_inputs(&["X", "cos_cache", "sin_cache", "position_ids"])?;
    expect_attributes(case, &["interleaved", "num_heads", "rotary_embedding_dim"])?;
    let x_in = case.upload("X", device)?;
    let x = four_axes(case, "num_heads", x_in.clone())?;
    let (cos, sin) = (case.input("cos_cache")?, case.input("sin_cache")?);
    // Without position ids the caches have one row per token.
    let positions = match case.optional("position_ids")? {
        Some(ids) => ids.lengths("position_ids")?,
        None => (0..cos.shape().iter().rev().skip(1).product()).collect(),
    };
    let Some(&pairs) = cos.shape().last() else { fail!("cos_cache needs at least one axis") };
    let width = match int(case, "rotary_embedding_dim")?.unwrap_or(0) {
        0 => x.shape().last().copied().unwrap_or(0),
        width => usize::try_from(width).unwrap_or(0),
    };
    if width != 2 * pairs {
        fail!("a cos_cache of {pairs} pairs does not fit a rotary dimension of {width}");
    }
    let rows = |cache: &Array| {
        HostTensor::new(&[cache.values().len() / pairs.max(1), pairs], cache.to_f32()).map_err(Stop::from)
    };
    let pairing = match int(case, "interleaved")?.unwrap_or(0) {
        0 => Pairing::HalfSplit,
        1 => Pairing::Interleaved,
        other => return Err(Stop::Skip(format!("interleaved = {other} is not known"))),
    };
    let rotary = Rotary::from_tables(device, &rows(&cos)?, &rows(&sin)?, pairing)?;
    let mut rotated = rotary.rotate(&x, &TokenPositions::Given(positions))?;
    if x_in.shape().len() == 3 {
        rotated = rotated.permute(&[0, 2, 1, 3])?.reshape(x_in.shape())?;
    }
    case.against_onnx(&[("Y", Array::download(&rotated)?)])
}
