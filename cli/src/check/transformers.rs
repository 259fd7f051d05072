//! Cases of the attention of models in transformers.

use wgpu_attention::{Attention, Device, Weights};

use super::Stop;
use super::case::Case;
use super::compare::Comparison;
use crate::array::Array;

/// Attention with a learned sink per head, as in gpt-oss; the output is `[batch, len, heads, dim]`.
pub fn sink_attention(case: &Case, device: &Device, attention: Attention) -> Result<Vec<Comparison>, Stop> {
    case.expect_inputs(&["q", "k", "v", "sinks", "mask"])?;
    let (q, k, v) = (case.upload("q", device)?, case.upload("k", device)?, case.upload("v", device)?);
    let mut attention = attention.sink(case.upload("sinks", device)?).weights(Weights::PerHead);
    if let Some(mask) = case.optional("mask")? {
        attention = attention.bias(mask.upload("mask", device)?);
    }
    let attended = attention.forward(&q, &k, &v)?;
    let mut results = vec![("out", Array::download(&attended.output.permute(&[0, 2, 1, 3])?)?)];
    if let Some(weights) = &attended.weights {
        results.push(("weights", Array::download(weights)?));
    }
    case.against_torch(q.dtype(), "out", &results)
}
