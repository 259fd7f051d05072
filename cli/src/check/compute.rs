//! Computes a case file with the function for its op.

use wgpu_attention::{Attention, Device, Method};

use super::case::Case;
use super::compare::Comparison;
use super::stop::Stop;
use super::{jax, keras, onnx, torch, transformers};
use crate::error::fail;

/// Computes a case on a device with a method and compares it with its answers.
pub fn compute(case: &Case, device: &Device, method: Method) -> Result<Vec<Comparison>, Stop> {
    let attention = Attention::new().method(method);
    let all = match case.op() {
        "Attention" => onnx::attention(case, device, attention),
        "sdpa" => torch::sdpa(case, device, attention),
        "varlen" => torch::varlen(case, device, attention),
        "mha" => torch::mha(case, device, attention),
        "keras.MultiHeadAttention" => keras::multi_head_attention(case, device, attention),
        "keras.GroupQueryAttention" => keras::group_query_attention(case, device, attention),
        "jax.nn.dot_product_attention" => jax::dot_product_attention(case, device, attention),
        "sink_attention" => transformers::sink_attention(case, device, attention),
        "shaw_relative_key" => transformers::shaw_relative_key(case, device, attention),
        "llama_attention" => transformers::llama_attention(case, device, attention),
        op if method != Method::Auto => Err(Stop::Skip(format!("the op {op} has no methods"))),
        "Softmax" => onnx::softmax(case, device),
        "TensorScatter" => onnx::tensor_scatter(case, device),
        "RotaryEmbedding" => onnx::rotary_embedding(case, device),
        "alibi_slopes" => transformers::alibi_slopes(case),
        "sinusoidal" => transformers::sinusoidal(case, device),
        "sinusoidal_t2t" => transformers::sinusoidal_t2t(case),
        "t5_bucket" => transformers::t5_bucket(case),
        "t5_bias" => transformers::t5_bias(case, device),
        "rope_half_split" => transformers::rope_half_split(case, device),
        "rope_interleaved" => transformers::rope_interleaved(case, device),
        other => Err(Stop::Skip(format!("the op {other} is not known"))),
    }?;
    if all.is_empty() {
        fail!("the case expects no output");
    }
    Ok(all)
}
