//! `attn` without arguments: runs a real layer over a real sentence and compares the result with float64.

use std::path::Path;
use std::time::{Duration, Instant};

use anstyle::{AnsiColor, Style};
use wgpu_attention::{Attention, Device, Mask, MultiHeadAttention, StateDict, Tensor, Weights};

use crate::array::Array;
use crate::check::compare::largest_difference;
use crate::error::{Error, Result, fail};
use crate::files::TensorFile;
use crate::heatmap::{Heatmap, Scale};
use crate::picture;
use crate::target::{self, Target};

const WEIGHTS: &[u8] = include_bytes!("../data/minilm-layer3.weights.safetensors");
const CASE: &[u8] = include_bytes!("../data/minilm-layer3.case.safetensors");
const HEADS: usize = 12;
/// The head in which a pronoun attends to its antecedent.
const HEAD: usize = 1;
const WORD: &str = "it";
const ALLOWED: f64 = 3e-6;
const PICTURE: &str = "attn-heatmap.png";
const DIM: Style = Style::new().dimmed();
const BOLD: Style = Style::new().bold();
const GOOD: Style = Style::new().fg_color(Some(anstyle::Color::Ansi(AnsiColor::Green)));
const BAD: Style = Style::new().fg_color(Some(anstyle::Color::Ansi(AnsiColor::Red)));
const BAR: Style = Style::new().fg_color(Some(anstyle::Color::Ansi(AnsiColor::Cyan)));

struct Example {
    state: StateDict,
    tokens: Vec<String>,
    x: Array,
    padding: Array,
    output: Array,
    weights: Array,
}

impl Example {
    fn load() -> Result<Example> {
        let case = TensorFile::from_safetensors("the example".into(), CASE.to_vec())?;
        let tokens = case.metadata("tokens0").and_then(|text| serde_json::from_str(text).ok());
        Ok(Example {
            state: StateDict::from_safetensors(WEIGHTS)?,
            tokens: tokens.ok_or_else(|| Error::Failed("the example has no tokens".into()))?,
            x: case.need("x")?,
            padding: case.need("key_padding_mask")?,
            output: case.need("expected.output")?,
            weights: case.need("expected.weights")?,
        })
    }

    /// The layer, its input and the attention options.
    fn upload(&self, device: &Device) -> Result<(MultiHeadAttention, Tensor, Attention)> {
        let layer = MultiHeadAttention::from_state_dict(device, &self.state, "", HEADS)?;
        let padding = Mask::hide_where(self.padding.upload_bools("key_padding_mask", device)?)?;
        let attention = Attention::new().key_padding(padding).weights(Weights::PerHead);
        Ok((layer, self.x.upload("x", device)?, attention))
    }
}

pub fn demo(adapter: Option<&str>) -> Result<()> {
    let example = Example::load()?;
    anstream::println!(
        "{BOLD}\"The animal didn't cross the street because it was too tired.\"{BOLD:#}\n\
         self-attention of layer 3 of all-MiniLM-L6-v2, {HEADS} heads\n"
    );
    let targets = target::targets(adapter)?;
    let mut good = true;
    let mut last = None;
    for target in &targets {
        target.announce();
        let (ok, weights) = attend(target, &example)?;
        good &= ok;
        last = Some(weights);
        anstream::println!();
    }
    if let Some(weights) = last {
        let head = head_of_sentence(&weights, HEAD, example.tokens.len());
        show_word(&example.tokens, &head)?;
        let path = Path::new(PICTURE);
        let title = format!("layer 3, head {HEAD}: what each token attends to");
        let (tokens, scale) = (&example.tokens, Scale { least: 0.0, most: 1.0 });
        picture::write(path, &Heatmap { title: &title, rows: tokens, columns: tokens, values: &head, scale })?;
        let folder = std::env::current_dir().unwrap_or_default();
        anstream::println!("\nheatmap of head {HEAD} written to {}", folder.join(path).display());
    }
    if !good {
        fail!("the result differs from the expected output by more than {ALLOWED:e}");
    }
    Ok(())
}

/// Runs the layer and prints a summary; returns whether the output is right, and the weights.
fn attend(target: &Target, example: &Example) -> Result<(bool, Vec<f32>)> {
    let device = &target.device;
    let (layer, x, attention) = example.upload(device)?;
    let call = || -> Result<(Duration, Vec<f32>, Vec<f32>)> {
        let start = Instant::now();
        let result = layer.forward(&x, &x, &x, &attention)?;
        let output = result.output.download()?;
        let weights = result.weights.expect("asked for").download()?;
        Ok((start.elapsed(), output, weights))
    };
    let (first, output, weights) = call()?;
    let (again, ..) = call()?;
    let off = largest_difference(&output, &example.output.to_f64());
    let weights_off = largest_difference(&weights, &example.weights.to_f64());
    let ok = off <= ALLOWED;
    let verdict = if ok { format!("{GOOD}ok{GOOD:#}") } else { format!("{BAD}not ok{BAD:#}") };
    let line = |name: &str, text: &str| anstream::println!("{DIM}{name:<9}{DIM:#}{text}");
    line("adapter", &target.label());
    let kernels = device.gpu().map(|gpu| gpu.kernels()).unwrap_or_else(|| vec!["rayon and pulp, no shaders".into()]);
    for (n, kernel) in kernels.iter().enumerate() {
        line(if n == 0 { "kernels" } else { "" }, kernel);
    }
    let ms = |time: Duration| format!("{:.2} ms", time.as_secs_f64() * 1e3);
    let compiling = if device.gpu().is_some() { " (it compiles the kernels)" } else { "" };
    line("time", &format!("first call {}{compiling}, again {}", ms(first), ms(again)));
    line("output", &format!("{verdict}, at most {off:.1e} from the expected output ({ALLOWED:.0e} is allowed)"));
    line("weights", &format!("at most {weights_off:.1e} from the expected weights"));
    Ok((ok, weights))
}

/// The tokens of the sentence and the weights `[HEADS, len, len]` of the layer over it, computed on `adapter`.
pub fn sentence(adapter: Option<&str>) -> Result<(Vec<String>, Vec<f32>)> {
    let example = Example::load()?;
    let target = target::target(adapter)?;
    target.announce();
    let (layer, x, attention) = example.upload(&target.device)?;
    let weights = layer.forward(&x, &x, &x, &attention)?.weights.expect("asked for").download()?;
    let len = example.tokens.len();
    Ok((example.tokens, (0..HEADS).flat_map(|head| head_of_sentence(&weights, head, len)).collect()))
}

/// `[len, len]` of one head and sentence 0 without its padding, from `[2, 12, 24, 24]`.
fn head_of_sentence(weights: &[f32], head: usize, len: usize) -> Vec<f32> {
    const PADDED: usize = 24;
    let head = &weights[head * PADDED * PADDED..][..PADDED * PADDED];
    head.chunks_exact(PADDED).take(len).flat_map(|row| &row[..len]).copied().collect()
}

/// A table of what one word attends to, largest first.
fn show_word(tokens: &[String], head: &[f32]) -> Result<()> {
    const SHOWN: usize = 5;
    const WIDTH: f32 = 40.0;
    let Some(at) = tokens.iter().position(|token| token == WORD) else { fail!("the example lost its \"{WORD}\"") };
    let row = &head[at * tokens.len()..][..tokens.len()];
    let mut order: Vec<usize> = (0..row.len()).collect();
    order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
    anstream::println!("{BOLD}what \"{WORD}\" attends to in head {HEAD}{BOLD:#}");
    let widest = order.iter().take(SHOWN).map(|&j| tokens[j].chars().count()).max().unwrap_or(0);
    for &j in order.iter().take(SHOWN) {
        let bar = "█".repeat((row[j] * WIDTH).round() as usize);
        anstream::println!("  {:<widest$}  {:.2}  {BAR}{bar}{BAR:#}", tokens[j], row[j]);
    }
    Ok(())
}
