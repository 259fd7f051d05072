//! Scaled dot-product attention. The page: docs/guide/2-scaled-dot-product.md.

mod guide;

use std::fmt::Write;

use guide::Result;
use guide::draw::{Curves, picture};
use image::RgbImage;
use rand::SeedableRng;
use rand_pcg::Pcg64;
use wgpu_attention::{Align, Attention, Device, Mask, Method, ScoreStage, Tensor, Weights};

fn main() -> std::process::ExitCode {
    guide::main(lesson)
}

pub fn lesson(device: &Device, out: &mut String) -> Result<RgbImage> {
    steps(device, out)?;
    writeln!(out)?;
    let picture = scaling(device, out)?;
    writeln!(out)?;
    masks(device, out)?;
    writeln!(out)?;
    future(device, out)?;
    Ok(picture)
}

const TOKENS: [&str; 3] = ["cats", "like", "milk"];
const D_K: usize = 4;
const QUERIES: [f32; 12] = [1.0, 0.0, 2.0, 0.0, 0.0, 2.0, 0.0, 2.0, 1.0, 1.0, 0.0, 1.0];
const KEYS: [f32; 12] = [0.0, 1.0, 1.0, 1.0, 2.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 2.0];
const VALUES: [f32; 6] = [1.0, 0.0, 0.0, 2.0, 3.0, 1.0];

/// Prints a token and its numbers on each line.
fn show(out: &mut String, name: &str, values: &[f32]) -> Result<()> {
    writeln!(out, "{name}")?;
    for (token, row) in TOKENS.iter().zip(guide::rows(values, values.len() / TOKENS.len())) {
        writeln!(out, "  {token}{row}")?;
    }
    Ok(())
}

fn operands(device: &Device) -> Result<[Tensor; 3]> {
    Ok([
        Tensor::from_slice(device, &[3, D_K], &QUERIES)?,
        Tensor::from_slice(device, &[3, D_K], &KEYS)?,
        Tensor::from_slice(device, &[3, 2], &VALUES)?,
    ])
}

/// The four steps on three tokens.
fn steps(device: &Device, out: &mut String) -> Result<()> {
    let [q, k, v] = operands(device)?;
    let attention = Attention::new().weights(Weights::PerHead).scores(Some(ScoreStage::Scaled));
    let raw = attention.clone().scale(1.0).forward(&q, &k, &v)?.scores.expect("asked for");
    let seen = attention.forward(&q, &k, &v)?;
    let (scaled, weights) = (seen.scores.expect("asked for"), seen.weights.expect("asked for"));
    show(out, "1. scores, Q·Kᵀ", &raw.download()?)?;
    show(out, "2. scaled, divided by √4 = 2", &scaled.download()?)?;
    show(out, "3. weights, the softmax of each row", &weights.download()?)?;
    show(out, "4. output, weights·V", &seen.output.download()?)?;
    writeln!(out)?;
    writeln!(out, "Q {:?}  K {:?}  V {:?}", q.shape(), k.shape(), v.shape())?;
    writeln!(out, "weights {:?}  output {:?}", weights.shape(), seen.output.shape())?;
    let sums: Vec<String> =
        weights.download()?.chunks_exact(3).map(|row| format!("{:.4}", row.iter().sum::<f32>())).collect();
    writeln!(out, "each row of weights sums to {}", sums.join(", "))?;
    let Err(error) = attention.forward(&q, &v, &v) else { return Err("keys of width 2 fitted".into()) };
    writeln!(out, "keys of another width are refused:\n  {error}")?;
    Ok(())
}

/// Why the scores are divided by √d_k: how widely random queries attend to 64 random keys, with and without scaling.
fn scaling(device: &Device, out: &mut String) -> Result<RgbImage> {
    const LEN: usize = 64;
    let widths = [1, 4, 16, 64, 256];
    let mut rng = Pcg64::seed_from_u64(2);
    writeln!(out, "       entropy of the weights    largest weight")?;
    writeln!(out, " d_k     scaled   not scaled     scaled   not scaled")?;
    let mut lines = [Vec::new(), Vec::new()];
    for width in widths {
        // ±1: mean 0 and variance 1, as from a freshly initialised layer.
        let q = Tensor::from_slice(device, &[LEN, width], &guide::signs(&mut rng, LEN * width))?;
        let k = Tensor::from_slice(device, &[LEN, width], &guide::signs(&mut rng, LEN * width))?;
        let mut entropies = [0.0; 2];
        let mut largest = [0.0; 2];
        for (n, attention) in [Attention::new(), Attention::new().scale(1.0)].into_iter().enumerate() {
            let seen = attention.weights(Weights::PerHead).method(Method::ThreePasses).forward(&q, &k, &k)?;
            let weights = seen.weights.expect("asked for").download()?;
            let entropy: f32 = weights.iter().filter(|&&p| p > 0.0).map(|p| -p * p.ln()).sum();
            entropies[n] = entropy / LEN as f32;
            let row_largest = |row: &[f32]| row.iter().copied().fold(0.0, f32::max);
            largest[n] = weights.chunks_exact(LEN).map(row_largest).sum::<f32>() / LEN as f32;
            lines[n].push((width as f64, f64::from(entropies[n])));
        }
        let [scaled, plain] = entropies;
        writeln!(out, "{width:4}{scaled:11.2}{plain:13.2}{:11.2}{:13.2}", largest[0], largest[1])?;
    }
    writeln!(out, "the most that 64 keys allow: ln 64 = {:.2}", (LEN as f32).ln())?;
    let [scaled, plain] = lines;
    let most = widths.map(|width| (width as f64, (LEN as f64).ln())).to_vec();
    picture(720, 520, |area| {
        Curves {
            title: "How widely a query looks at 64 keys",
            x_axis: "d_k, the width of queries and keys",
            y_axis: "entropy of the weights (nats)",
            x_ticks: &widths.map(|width| width as f64),
            y_ticks: &[0.0, 1.0, 2.0, 3.0, 4.0, 4.5],
            logarithmic: true,
            marks: true,
            lines: &[
                ("scores divided by √d_k", scaled),
                ("scores as they are", plain),
                ("ln 64: all keys alike", most),
            ],
        }
        .draw(area)
    })
}

/// The same three tokens with "milk" as padding, and under a causal mask as in a decoder.
fn masks(device: &Device, out: &mut String) -> Result<()> {
    let [q, k, v] = operands(device)?;
    let padding = Mask::hide_where(Tensor::from_bools(device, &[3], &[false, false, true])?)?;
    let padded = Attention::new().key_padding(padding).weights(Weights::PerHead).forward(&q, &k, &v)?;
    show(out, "weights, \"milk\" masked as padding", &padded.weights.expect("asked for").download()?)?;
    let causal = Attention::new().causal(Align::TopLeft).weights(Weights::PerHead).forward(&q, &k, &v)?;
    show(out, "weights, causal", &causal.weights.expect("asked for").download()?)
}

/// Under a causal mask no token depends on a later one, to the last bit.
fn future(device: &Device, out: &mut String) -> Result<()> {
    let [q, k, v] = operands(device)?;
    let attention = Attention::new().causal(Align::TopLeft);
    let before = attention.forward(&q, &k, &v)?.output.download()?;
    let mut values = VALUES;
    values[4] = f32::NAN; // the last token's value
    let changed = Tensor::from_slice(device, &[3, 2], &values)?;
    let after = attention.forward(&q, &k, &changed)?.output.download()?;
    writeln!(out, "a NaN in the value of \"milk\", causal")?;
    for (n, token) in TOKENS.iter().enumerate() {
        let bits = |output: &[f32]| output[2 * n..][..2].iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        let same = bits(&before) == bits(&after);
        writeln!(out, "  {token} {}", if same { "the same bits as before" } else { "changed" })?;
    }
    Ok(())
}
