//! Self-attention and cross-attention. The page: docs/guide/4-self-and-cross.md.

mod guide;
#[path = "guide/real.rs"]
mod real;

use std::fmt::Write;

use guide::Result;
use guide::draw::{Heatmap, picture};
use image::RgbImage;
use real::{HEADS, Sentence, WIDTH};
use wgpu_attention::{Align, Attention, Device, MultiHeadAttention, MultiHeadConfig, Tensor, Weights};

fn main() -> std::process::ExitCode {
    guide::main(lesson)
}

/// The head in which a pronoun attends to its antecedent.
const HEAD: usize = 1;

pub fn lesson(device: &Device, out: &mut String) -> Result<RgbImage> {
    let layer = real::layer(device)?;
    let (animal, words) = (real::sentence(0)?, real::sentence(1)?);
    let itself = pronoun(device, out, &layer, &animal)?;
    writeln!(out)?;
    one_query(device, out, &layer, &animal)?;
    writeln!(out)?;
    let across = across(device, out, &layer, &animal, &words)?;
    writeln!(out)?;
    other_widths(device, out)?;
    draw(&animal, &itself, &words, &across)
}

/// One head of `[heads, len_q, len_k]`.
fn head(weights: &[f32], head: usize) -> &[f32] {
    let one = weights.len() / HEADS;
    &weights[head * one..][..one]
}

/// The tokens with the highest weights, highest first.
fn top(tokens: &[String], weights: &[f32], count: usize) -> String {
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]));
    let shown: Vec<String> = order.iter().take(count).map(|&j| format!("{} {:.2}", tokens[j], weights[j])).collect();
    shown.join("  ")
}

/// Self-attention: queries, keys and values from one sentence.
fn pronoun(device: &Device, out: &mut String, layer: &MultiHeadAttention, sentence: &Sentence) -> Result<Vec<f32>> {
    let x = sentence.tensor(device)?;
    let it = sentence.find("it")?;
    let len = sentence.tokens.len();
    let attention = Attention::new().weights(Weights::PerHead);
    let seen = layer.forward(&x, &x, &x, &attention)?;
    let weights = seen.weights.expect("asked for").download()?;
    writeln!(out, "self-attention: {:?} to {:?} gives {:?}", x.shape(), x.shape(), seen.output.shape())?;
    writeln!(out, "\"it\" in head {HEAD}")?;
    writeln!(out, "  sees all   {}", top(&sentence.tokens, &head(&weights, HEAD)[it * len..][..len], 4))?;
    let causal = layer.forward(&x, &x, &x, &attention.causal(Align::TopLeft))?.weights.expect("asked for");
    let causal = causal.download()?;
    writeln!(out, "  causal     {}", top(&sentence.tokens, &head(&causal, HEAD)[it * len..][..len], 4))?;
    Ok(head(&weights, HEAD).to_vec())
}

/// The query "it" alone, to the whole sentence: the same row, because queries do not see each other.
fn one_query(device: &Device, out: &mut String, layer: &MultiHeadAttention, sentence: &Sentence) -> Result<()> {
    let x = sentence.tensor(device)?;
    let it = sentence.find("it")?;
    let all = layer.forward(&x, &x, &x, &Attention::new())?.output;
    let alone = layer.forward(&x.narrow(0, it, 1)?, &x, &x, &Attention::new())?.output;
    writeln!(out, "cross-attention: [1, {WIDTH}] to {:?} gives {:?}", x.shape(), alone.shape())?;
    let off = guide::difference(&alone.download()?, &all.narrow(0, it, 1)?.download()?);
    writeln!(out, "\"it\" asked alone and in its sentence: largest difference {off:.0e}")?;
    Ok(())
}

/// Cross-attention: queries from one sentence, keys and values from another.
fn across(
    device: &Device,
    out: &mut String,
    layer: &MultiHeadAttention,
    keys: &Sentence,
    queries: &Sentence,
) -> Result<Vec<f32>> {
    let (x, y) = (queries.tensor(device)?, keys.tensor(device)?);
    let seen = layer.forward(&x, &y, &y, &Attention::new().weights(Weights::PerHead))?;
    let weights = seen.weights.expect("asked for");
    writeln!(out, "cross-attention: {:?} to {:?} gives {:?}", x.shape(), y.shape(), seen.output.shape())?;
    writeln!(out, "weights {:?}", weights.shape())?;
    let weights = weights.download()?;
    let len = keys.tokens.len();
    writeln!(out, "words of the one in head {HEAD}, to the other")?;
    for word in ["its", "look", "learn", "meaning"] {
        let row = &head(&weights, HEAD)[queries.find(word)? * len..][..len];
        writeln!(out, "  {word:8}   {}", top(&keys.tokens, row, 3))?;
    }
    Ok(head(&weights, HEAD).to_vec())
}

/// Keys and values of another width than the queries: a decoder 384 wide that attends to 49 image patches, each 512
/// wide.
fn other_widths(device: &Device, out: &mut String) -> Result<()> {
    let config = MultiHeadConfig::new(WIDTH, HEADS)?.kdim(512).vdim(512);
    let layer = MultiHeadAttention::new(device, config, 4)?;
    let decoder = Tensor::from_slice(device, &[5, WIDTH], &[0.1; 5 * WIDTH])?;
    let patches = Tensor::from_slice(device, &[49, 512], &[0.1; 49 * 512])?;
    let seen = layer.forward(&decoder, &patches, &patches, &Attention::new())?;
    writeln!(out, "cross-attention: {:?} to {:?} gives {:?}", decoder.shape(), patches.shape(), seen.output.shape())?;
    Ok(())
}

fn draw(animal: &Sentence, itself: &[f32], words: &Sentence, across: &[f32]) -> Result<RgbImage> {
    let map = |title, row_labels, values| Heatmap {
        title,
        values,
        columns: animal.tokens.len(),
        row_labels,
        column_labels: &animal.tokens,
        row_axis: "queries",
        column_axis: "keys",
        range: (0.0, 1.0),
        cell: 28,
    };
    let maps = [
        map("self-attention, head 1", &animal.tokens[..], itself),
        map("cross-attention, head 1", &words.tokens[..], across),
    ];
    let [left, right] = maps.each_ref().map(Heatmap::size);
    picture(left.0 + right.0, left.1.max(right.1), |area| {
        let (first, second) = area.split_horizontally(left.0);
        maps[0].draw(&first)?;
        maps[1].draw(&second)
    })
}
