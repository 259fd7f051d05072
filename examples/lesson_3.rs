//! Multi-head attention. The page: docs/guide/3-multi-head.md.

mod guide;
#[path = "guide/real.rs"]
mod real;

use std::fmt::Write;

use guide::Result;
use guide::draw::{Heatmap, picture};
use image::RgbImage;
use real::{HEADS, Sentence, WIDTH};
use wgpu_attention::{Attention, Device, Inspect, MultiHeadAttention, MultiHeadConfig, Tensor, Weights, project};

fn main() -> std::process::ExitCode {
    guide::main(lesson)
}

pub fn lesson(device: &Device, out: &mut String) -> Result<RgbImage> {
    let sentence = real::sentence(0)?;
    let heads = by_hand(device, out, &sentence)?;
    writeln!(out)?;
    what_heads_do(out, &sentence, &heads)?;
    writeln!(out)?;
    parameters(device, out)?;
    draw(&heads, sentence.tokens.len())
}

/// The results per head.
struct Heads {
    /// `[12, len, len]`.
    weights: Vec<f32>,
    /// `[12, len]`, in nats.
    entropy: Vec<f32>,
}

/// Computes projections, heads, attention and joining step by step, and compares with the layer in one call and
/// PyTorch.
fn by_hand(device: &Device, out: &mut String, sentence: &Sentence) -> Result<Heads> {
    let (len, dim) = (sentence.tokens.len(), WIDTH / HEADS);
    let state = real::state()?;
    let parameter = |name: &str| -> Result<Tensor> {
        let tensor = state.get(name).ok_or_else(|| format!("no {name}"))?;
        Ok(Tensor::from_slice(device, tensor.shape(), tensor.data())?)
    };
    let x = sentence.tensor(device)?;
    writeln!(out, "x                     {:?}", x.shape())?;
    let qkv = project(&x, &parameter("in_proj_weight")?, Some(&parameter("in_proj_bias")?))?;
    writeln!(out, "Q, K and V            {:?}", qkv.shape())?;
    let heads = |start: usize| -> Result<Tensor> {
        Ok(qkv.narrow(1, start, WIDTH)?.reshape(&[len, HEADS, dim])?.permute(&[1, 0, 2])?)
    };
    let (q, k, v) = (heads(0)?, heads(WIDTH)?, heads(2 * WIDTH)?);
    writeln!(out, "Q as heads            {:?}", q.shape())?;
    let attention = Attention::new().lse(true);
    let attended = attention.forward(&q, &k, &v)?;
    writeln!(out, "attended              {:?}", attended.output.shape())?;
    let joined = attended.output.permute(&[1, 0, 2])?.reshape(&[len, WIDTH])?;
    writeln!(out, "heads joined          {:?}", joined.shape())?;
    let output = project(&joined, &parameter("out_proj.weight")?, Some(&parameter("out_proj.bias")?))?;
    writeln!(out, "output                {:?}", output.shape())?;
    let output = output.download()?;

    let layer = real::layer(device)?;
    let seen = layer.forward(&x, &x, &x, &Attention::new().weights(Weights::PerHead))?;
    let layer_output = seen.output.download()?;
    let weights = seen.weights.expect("asked for").download()?;
    writeln!(out)?;
    writeln!(out, "largest difference")?;
    writeln!(out, "by hand and the layer         {:.0e}", guide::difference(&output, &layer_output))?;
    writeln!(out, "the layer and PyTorch         {:.0e}", guide::difference(&layer_output, &sentence.output))?;
    writeln!(out, "its weights and PyTorch's     {:.0e}", guide::difference(&weights, &sentence.weights))?;

    let inspect = Inspect::new().entropy();
    let entropy = attention.inspect(&q, &k, &attended.lse.expect("asked for"), &inspect)?.entropy;
    Ok(Heads { weights, entropy: entropy.expect("asked for").download()? })
}

/// How widely each head attends, how much of its weight is on [CLS], and its strongest links between two words.
fn what_heads_do(out: &mut String, sentence: &Sentence, heads: &Heads) -> Result<()> {
    let tokens = &sentence.tokens;
    let len = tokens.len();
    writeln!(out, "head  entropy  on [CLS]  strongest links between two words")?;
    for (h, weights) in heads.weights.chunks_exact(len * len).enumerate() {
        let entropy = heads.entropy[h * len..][..len].iter().sum::<f32>() / len as f32;
        let on_first = weights.iter().step_by(len).sum::<f32>() / len as f32;
        // Exclude the marks at both ends, and the weight of a word on itself.
        let words = 1..len - 1;
        let mut links: Vec<(usize, usize)> =
            words.clone().flat_map(|i| words.clone().filter(move |&j| j != i).map(move |j| (i, j))).collect();
        links.sort_by(|&(a, b), &(c, d)| weights[c * len + d].total_cmp(&weights[a * len + b]));
        let strongest: Vec<String> = links
            .iter()
            .take(3)
            .map(|&(i, j)| format!("{}→{} {:.2}", tokens[i], tokens[j], weights[i * len + j]))
            .collect();
        writeln!(out, "{h:4}{entropy:9.2}{on_first:10.2}  {}", strongest.join("  "))?;
    }
    let it = sentence.find("it")?;
    let mean = |j: usize| {
        let in_heads = heads.weights.iter().skip(it * len + j).step_by(len * len);
        in_heads.sum::<f32>() / HEADS as f32
    };
    let (animal, first) = (mean(sentence.find("animal")?), mean(0));
    writeln!(out, "mean of the heads: it→animal {animal:.2}  it→[CLS] {first:.2}")?;
    Ok(())
}

/// The number of learned parameters in layers of different shapes.
fn parameters(device: &Device, out: &mut String) -> Result<()> {
    let mut line = |name: &str, count: usize| writeln!(out, "{name:44}{count:9}");
    line("attention alone, whatever the width", 0)?;
    line("the real layer: 12 heads of 32", real::layer(device)?.parameter_count())?;
    let count = |config: MultiHeadConfig| -> Result<usize> {
        Ok(MultiHeadAttention::new(device, config, 0)?.parameter_count())
    };
    line("1 head of 384", count(MultiHeadConfig::new(WIDTH, 1)?)?)?;
    line("12 heads of 32, without biases", count(MultiHeadConfig::new(WIDTH, HEADS)?.bias(false))?)?;
    line("12 heads of 32, 3 for keys and values", count(MultiHeadConfig::new(WIDTH, HEADS)?.heads_kv(3))?)?;
    line("12 heads of 384", count(MultiHeadConfig::new(WIDTH, HEADS)?.head_dims(WIDTH, WIDTH))?)?;
    Ok(())
}

fn draw(heads: &Heads, len: usize) -> Result<RgbImage> {
    let titles: Vec<String> = (0..HEADS).map(|h| format!("head {h}")).collect();
    let maps = heads.weights.chunks_exact(len * len).zip(&titles).map(|(values, title)| Heatmap {
        title,
        values,
        columns: len,
        row_labels: &[],
        column_labels: &[],
        row_axis: "",
        column_axis: "",
        range: (0.0, 1.0),
        cell: 12,
    });
    let maps: Vec<Heatmap<'_>> = maps.collect();
    let (width, height) = maps[0].size();
    picture(4 * width, 3 * height, |area| {
        area.split_evenly((3, 4)).iter().zip(&maps).try_for_each(|(area, map)| map.draw(area))
    })
}
