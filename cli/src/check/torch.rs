//! Cases of PyTorch's attention.

use wgpu_attention::{Align, Attended, Attention, Device, HostTensor, Mask, MultiHeadAttention, StateDict, Weights};

use super::case::{Case, add_mask};
use super::compare::Comparison;
use super::stop::Stop;
use crate::array::Array;
use crate::error::{Result, fail};

/// `scaled_dot_product_attention`.
pub fn sdpa(case: &Case, device: &Device, attention: Attention) -> Result<Vec<Comparison>, Stop> {
    case.expect_inputs(&["q", "k", "v", "attn_mask"])?;
    let [q, k, v] = case.operands(device)?;
    let mut attention = attention.lse(true).weights(Weights::PerHead);
    if let Some(mask) = case.optional("attn_mask")? {
        attention = add_mask(attention, "attn_mask", &mask, Mask::keep_where, device)?;
    }
    if case.flag("is_causal_top_left")? {
        attention = attention.causal(Align::TopLeft);
    }
    if let Some(scale) = case.float("scale")? {
        attention = attention.scale(scale as f32);
    }
    if let Some(cap) = case.float("softcap")? {
        attention = attention.softcap(cap as f32);
    }
    let attended = attention.forward(&q, &k, &v)?;
    case.against_torch(q.dtype(), "out", &results(&attended)?)
}

/// Everything that was requested.
fn results(attended: &Attended) -> Result<Vec<(&'static str, Array)>> {
    let all = [("out", Some(&attended.output)), ("lse", attended.lse.as_ref()), ("weights", attended.weights.as_ref())];
    all.into_iter()
        .filter_map(|(name, tensor)| Some((name, tensor?)))
        .map(|(name, x)| Ok((name, Array::download(x)?)))
        .collect()
}

/// Packed sequences, `[total, heads, dim]`.
pub fn varlen(case: &Case, device: &Device, attention: Attention) -> Result<Vec<Comparison>, Stop> {
    case.expect_inputs(&["q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"])?;
    let [q, k, v] = case.operands(device)?;
    let mut attention = attention.lse(true);
    attention = match case.get("causal").as_str() {
        None if !case.get("causal").is_null() => fail!("the case's \"causal\" is {}", case.get("causal")),
        None => attention,
        Some("bottom_right") => attention.causal(Align::BottomRight),
        Some("top_left") => attention.causal(Align::TopLeft),
        Some(other) => return Err(Stop::Skip(format!("the causal alignment {other} is not known"))),
    };
    let starts = |name: &str| -> Result<Vec<usize>> { case.input(name)?.lengths(name) };
    let (starts_q, starts_k) = (starts("cu_seqlens_q")?, starts("cu_seqlens_k")?);
    let attended = attention.forward_packed(&q, &k, &v, &starts_q, &starts_k)?;
    case.against_torch(q.dtype(), "out", &results(&attended)?)
}

/// `nn.MultiheadAttention`; a true mask entry means masked out.
pub fn mha(case: &Case, device: &Device, mut attention: Attention) -> Result<Vec<Comparison>, Stop> {
    case.expect_inputs(&["query", "key", "value", "key_padding_mask", "attn_mask"])?;
    let mut state = StateDict::default();
    for (name, array) in case.with_prefix("param.")? {
        state.insert(name, HostTensor::new(array.shape(), array.to_f32())?);
    }
    let layer = MultiHeadAttention::from_state_dict(device, &state, "", case.count("num_heads")?)?
        .with_zero_attn(case.flag("add_zero_attn")?)?
        .with_batch_first(case.flag("batch_first")?);
    let query = case.upload("query", device)?;
    let (key, value) = if case.flag("self_attention")? {
        (query.clone(), query.clone())
    } else {
        (case.upload("key", device)?, case.upload("value", device)?)
    };
    if case.flag("need_weights")? {
        let averaged = case.flag("average_attn_weights")?;
        attention = attention.weights(if averaged { Weights::Averaged } else { Weights::PerHead });
    }
    let key_padding = case.optional("key_padding_mask")?;
    if let Some(bias) = key_padding.as_ref().filter(|mask| mask.is_float()) {
        attention = attention.key_padding_bias(bias.upload("key_padding_mask", device)?);
    } else if let Some(mask) = &key_padding {
        attention = attention.key_padding(Mask::hide_where(mask.upload_bools("key_padding_mask", device)?)?);
    }
    match case.optional("attn_mask")? {
        Some(mask) => attention = add_mask(attention, "attn_mask", &mask, Mask::hide_where, device)?,
        // With a mask, is_causal is only a hint about the mask.
        None if case.flag("is_causal")? => attention = attention.causal(Align::TopLeft),
        None => {}
    }
    let result = layer.forward(&query, &key, &value, &attention)?;
    let mut results = vec![("out", Array::download(&result.output)?)];
    if let Some(weights) = &result.weights {
        results.push(("weights", Array::download(weights)?));
    }
    case.against_torch(query.dtype(), "out", &results)
}
