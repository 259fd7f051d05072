//! A real layer and a real sentence: layer 3 of all-MiniLM-L6-v2, as embedded in the program `attn`.
#![allow(dead_code, reason = "each lesson uses its part")]

use std::path::Path;

use safetensors::SafeTensors;
use wgpu_attention::{Device, MultiHeadAttention, StateDict, Tensor};

use super::Result;

pub const HEADS: usize = 12;
pub const WIDTH: usize = 384;
/// Both sentences are padded to this many tokens.
const PADDED: usize = 24;

pub struct Sentence {
    pub tokens: Vec<String>,
    /// The input of the layer, `[len, 384]`, without padding.
    pub x: Vec<f32>,
    /// The output of PyTorch's layer in float64: `[len, 384]`.
    pub output: Vec<f32>,
    /// The weights of PyTorch's layer, `[12, len, len]`.
    pub weights: Vec<f32>,
}

impl Sentence {
    pub fn tensor(&self, device: &Device) -> Result<Tensor> {
        Ok(Tensor::from_slice(device, &[self.tokens.len(), WIDTH], &self.x)?)
    }

    /// The index of a word.
    pub fn find(&self, word: &str) -> Result<usize> {
        Ok(self
            .tokens
            .iter()
            .position(|token| token == word)
            .ok_or_else(|| format!("no \"{word}\" in the sentence"))?)
    }
}

fn read(name: &str) -> Result<Vec<u8>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("cli/data").join(name);
    Ok(std::fs::read(&path).map_err(|error| format!("cannot read {}: {error}", path.display()))?)
}

pub fn state() -> Result<StateDict> {
    Ok(StateDict::from_safetensors(&read("minilm-layer3.weights.safetensors")?)?)
}

pub fn layer(device: &Device) -> Result<MultiHeadAttention> {
    Ok(MultiHeadAttention::from_state_dict(device, &state()?, "", HEADS)?)
}

/// Sentence 0 or 1.
pub fn sentence(which: usize) -> Result<Sentence> {
    let bytes = read("minilm-layer3.case.safetensors")?;
    let (_, header) = SafeTensors::read_metadata(&bytes)?;
    let tokens = header.metadata().as_ref().and_then(|notes| notes.get(&format!("tokens{which}")));
    let tokens: Vec<String> = serde_json::from_str(tokens.ok_or("the example has no tokens")?)?;
    let case = StateDict::from_safetensors(&bytes)?;
    let part = |name: &str| -> Result<Vec<f32>> {
        let data = case.get(name).ok_or_else(|| format!("the example has no {name}"))?.data();
        Ok(data.chunks_exact(data.len() / 2).nth(which).expect("two sentences").to_vec())
    };
    let len = tokens.len();
    let unpadded = |head: &[f32]| -> Vec<f32> {
        head.chunks_exact(PADDED).take(len).flat_map(|row| row[..len].to_vec()).collect()
    };
    Ok(Sentence {
        x: part("x")?[..len * WIDTH].to_vec(),
        output: part("expected.output")?[..len * WIDTH].to_vec(),
        weights: part("expected.weights")?.chunks_exact(PADDED * PADDED).flat_map(unpadded).collect(),
        tokens,
    })
}
