//! `attn plot attention`: what to draw, and the source of the weights.

use std::path::{Path, PathBuf};

use clap::Args;
use wgpu_attention::Weights;

use super::grid::Grid;
use super::lines::Lines;
use super::page::{self, Page};
use super::seen::{Seen, head_name};
use crate::array::Array;
use crate::error::{Error, Result, fail, usage};
use crate::files::{self, TensorFile};
use crate::font;
use crate::heatmap::{Heatmap, Scale};
use crate::options::AttentionArgs;
use crate::{demo, picture, target};

const PICTURE: &str = "attn-attention.png";

#[derive(Args, Debug)]
#[command(after_help = "\
Without --weights, --q and --k, attn plot attention draws the sentence and layer of `attn` without a command.

Weights are [heads, len_q, len_k] or [batch, heads, len_q, len_k] (one head: [len_q, len_k]), as \
`attn run --weights` and `attn mha --return-weights` write them. In a file with several tensors they are the one \
called weights, or FILE:NAME. With --q and --k ([.., heads, len, dim]) the library computes them.

Every head is drawn unless --head, --average or --lines is given. Labels shrink with their cells, down to 13 pixels; \
then only every 2nd, 5th, 10th, ... token has a label, with its number. A token of more than 28 columns loses its \
middle. Colours range from 0 to the largest weight drawn, rounded up; NaN is grey and crossed out.

Examples:
  attn plot attention                                       every head of the example
  attn plot attention --head 1 -o head.svg
  attn plot attention --lines --token it --head 1,8,10
  attn plot attention --html attention.html                 a page to explore
  attn plot attention --weights out.npz --tokens \"the,cat,sat\"
  attn plot attention --q qkv.npz:q --k qkv.npz:k --causal top-left --tokens tokens.txt --average")]
pub struct AttentionPlot {
    /// Attention weights: FILE, or FILE:NAME for one of several tensors
    #[arg(long, value_name = "FILE", conflicts_with_all = ["q", "k"])]
    weights: Option<String>,
    /// Queries to compute weights from: FILE, or FILE:NAME
    #[arg(long, value_name = "FILE", requires = "k")]
    q: Option<String>,
    /// Keys to compute weights from: FILE, or FILE:NAME
    #[arg(long, value_name = "FILE", requires = "q")]
    k: Option<String>,
    /// A boolean mask over queries and keys (needs --mask), for --q and --k
    #[arg(long, value_name = "FILE", requires = "q")]
    attn_mask: Option<String>,
    /// An additive bias over queries and keys, for --q and --k
    #[arg(long, value_name = "FILE", requires = "q")]
    bias: Option<String>,
    /// The batch entry to draw, if there are four axes [default: 0]
    #[arg(long, value_name = "B")]
    batch: Option<usize>,
    /// The tokens, separated by commas, or a file: a JSON list, or one token per line [default: numbers]
    #[arg(long, value_name = "A,B,...|FILE")]
    tokens: Option<String>,
    /// The keys' tokens, if they differ from the queries' [default: those of --tokens]
    #[arg(long, value_name = "A,B,...|FILE")]
    key_tokens: Option<String>,
    /// Draw only these heads; a single one is drawn large
    #[arg(long, value_name = "H,H,...", value_delimiter = ',')]
    head: Option<Vec<usize>>,
    /// Draw the mean over the heads
    #[arg(long)]
    average: bool,
    /// Draw lines from queries to keys: a colour per head, opacity by weight
    #[arg(long)]
    lines: bool,
    /// Draw only the lines of this query, and select it on the page: a token (its first occurrence) or its number
    #[arg(long, value_name = "WORD|INDEX")]
    token: Option<String>,
    /// Title of the picture
    #[arg(long)]
    title: Option<String>,
    /// The picture file: .png or .svg [default: attn-attention.png, or none with --html]
    #[arg(short, long, visible_alias = "out", value_name = "FILE")]
    output: Option<PathBuf>,
    /// Write an interactive page: one file that works offline
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    #[command(flatten)]
    attention: AttentionArgs,
}

/// One batch entry, as `[heads, len_q, len_k]`.
fn entry(name: &str, array: &Array, batch: Option<usize>) -> Result<([usize; 3], Vec<f32>)> {
    let shape = array.shape();
    if !array.is_float() {
        fail!("{name} holds no floats; attention weights are numbers between 0 and 1");
    }
    if shape.contains(&0) {
        fail!("{name} {shape:?} holds no weights");
    }
    let (entries, heads, len_q, len_k) = match *shape {
        [len_q, len_k] => (None, 1, len_q, len_k),
        [heads, len_q, len_k] => (None, heads, len_q, len_k),
        [entries, heads, len_q, len_k] => (Some(entries), heads, len_q, len_k),
        _ => fail!("{name} {shape:?} must be [batch, heads, len_q, len_k], [heads, len_q, len_k] or [len_q, len_k]"),
    };
    match (entries, batch) {
        (None, Some(_)) => usage!("--batch needs a batch axis, but {name} {shape:?} has none"),
        (Some(entries), Some(batch)) if batch >= entries => {
            fail!("there is no batch entry {batch}: {name} {shape:?} has {entries} entries, counted from 0")
        }
        _ => {}
    }
    let each = heads * len_q * len_k;
    let weights = array.to_f32()[batch.unwrap_or(0) * each..][..each].to_vec();
    // Rounding errors are much smaller, even with f16 and bf16.
    if let Some(at) = weights.iter().position(|weight| !weight.is_nan() && !(-1e-3..=1.001).contains(weight)) {
        let (head, i, j) = (at / (len_q * len_k), at / len_k % len_q, at % len_k);
        fail!("{name} is {} at head {head}, query {i}, key {j}; attention weights lie between 0 and 1", weights[at]);
    }
    Ok(([heads, len_q, len_k], weights))
}

/// Tokens from a file (a JSON list, or one token per line) or from a comma-separated list.
fn read_tokens(text: &str) -> Result<Vec<String>> {
    let path = Path::new(text);
    if !path.is_file() {
        return Ok(text.split(',').map(str::to_string).collect());
    }
    let content = String::from_utf8(files::read_bytes(path)?)
        .map_err(|error| Error::Failed(format!("{text} is not UTF-8: {error}")))?;
    if path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("json")) || content.starts_with("[\"") {
        return serde_json::from_str(&content)
            .map_err(|error| Error::Failed(format!("{text} is not a JSON list of strings: {error}")));
    }
    Ok(content.lines().map(str::to_string).collect())
}

impl AttentionPlot {
    fn seen(&self, adapter: Option<&str>) -> Result<Seen> {
        if self.attention.any() && self.q.is_none() {
            usage!(
                "--causal, --window, --softcap, --scale and --mask need --q and --k; given weights are drawn unchanged"
            );
        }
        let ([heads, len_q, len_k], weights, title, known) = match (&self.weights, &self.q, &self.k) {
            (Some(name), ..) => {
                let array = match Path::new(name).exists() {
                    true => {
                        let file = TensorFile::open(Path::new(name))?;
                        // The name that `attn run` and `attn mha` give them.
                        let ours = file.names().iter().any(|tensor| tensor == "weights").then_some("weights");
                        file.single(ours)?
                    }
                    false => files::read_named(name)?,
                };
                let (shape, weights) = entry(name, &array, self.batch)?;
                (shape, weights, "attention weights".to_string(), None)
            }
            (None, Some(q), Some(k)) => {
                let array = self.compute(q, k, adapter)?;
                let (shape, weights) = entry("the result", &array, self.batch)?;
                (shape, weights, "attention weights".to_string(), None)
            }
            _ => {
                if self.batch.is_some() || self.tokens.is_some() || self.key_tokens.is_some() {
                    usage!("--batch, --tokens and --key-tokens need --weights, or --q and --k");
                }
                let (tokens, weights) = demo::sentence(adapter)?;
                let len = tokens.len();
                let shape = [weights.len() / (len * len), len, len];
                (shape, weights, "all-MiniLM-L6-v2, layer 3".to_string(), Some(tokens))
            }
        };
        let given = match &self.tokens {
            Some(text) => Some(read_tokens(text)?),
            None => known,
        };
        let given_keys = self.key_tokens.as_deref().map(read_tokens).transpose()?;
        let fit = |what: &str, tokens: &Vec<String>, len: usize| -> Result<()> {
            match tokens.len() == len {
                true => Ok(()),
                false => fail!("{} tokens for {len} {what}; the numbers must match", tokens.len()),
            }
        };
        let numbers = |len: usize| (0..len).map(|n| n.to_string()).collect::<Vec<_>>();
        if let Some(keys) = &given_keys {
            fit("keys", keys, len_k)?;
        }
        if let Some(queries) = &given {
            fit("queries", queries, len_q)?;
            if given_keys.is_none() && len_k != len_q {
                usage!("{len_q} queries attend to {len_k} keys: give the keys' tokens too, with --key-tokens");
            }
        }
        let same = given_keys.is_none() && len_k == len_q;
        let queries = given.unwrap_or_else(|| numbers(len_q));
        let keys = given_keys.unwrap_or_else(|| if same { queries.clone() } else { numbers(len_k) });
        let title = self.title.clone().unwrap_or(title);
        let mut seen = Seen { title, heads: numbers(heads), weights, queries, keys, same };
        if let Some(chosen) = &self.head {
            seen.choose(chosen)?;
        }
        if self.average && seen.heads.len() > 1 {
            seen.average();
        }
        Ok(seen)
    }

    /// `[.., heads, len_q, len_k]` of the library.
    fn compute(&self, q: &str, k: &str, adapter: Option<&str>) -> Result<Array> {
        if self.attention.mask.is_some() && self.attn_mask.is_none() {
            usage!("--mask needs a mask, but there is no --attn-mask");
        }
        let (q, k) = (files::read_named(q)?, files::read_named(k)?);
        let (mask, bias) = (files::read_optional(&self.attn_mask)?, files::read_optional(&self.bias)?);
        let target = target::target(adapter)?;
        target.announce();
        let device = &target.device;
        let (q, k) = (q.upload("q", device)?, k.upload("k", device)?);
        let mut attention = self.attention.attention().weights(Weights::PerHead);
        if let Some(mask) = &mask {
            attention = attention.mask(self.attention.meant("attention mask", mask, device)?);
        }
        if let Some(bias) = &bias {
            attention = AttentionArgs::add_bias(attention, bias, device)?;
        }
        // Weights do not depend on values, so the keys are passed as values.
        let attended = attention.forward(&q, &k, &k)?;
        Array::download(&attended.weights.expect("asked for"))
    }
}

pub fn plot(args: &AttentionPlot, adapter: Option<&str>) -> Result<()> {
    if args.token.is_some() && !args.lines && args.html.is_none() {
        usage!("--token chooses the query for --lines and --html; add one of these");
    }
    if args.head.as_ref().is_some_and(Vec::is_empty) {
        usage!("--head needs at least one head");
    }
    let output = match (&args.output, &args.html) {
        (None, None) => Some(Path::new(PICTURE)),
        (output, _) => output.as_deref(),
    };
    if let Some(path) = output {
        picture::check_output(path)?;
    }
    if let Some(path) = &args.html {
        page::check_output(path)?;
    }
    let seen = args.seen(adapter)?;
    let token = args.token.as_ref().map(|word| seen.query(word)).transpose()?;
    if let Some(path) = output {
        draw(args, &seen, token, path)?;
        anstream::println!("picture written to {}", path.display());
    }
    if let Some(path) = &args.html {
        page::write(path, &Page { seen: &seen, token: token.unwrap_or(0) })?;
        anstream::println!("page written to {}", path.display());
    }
    Ok(())
}

fn draw(args: &AttentionPlot, seen: &Seen, token: Option<usize>, path: &Path) -> Result<()> {
    let labels = |tokens: &[String]| tokens.iter().map(|token| font::label(token)).collect::<Vec<_>>();
    let (queries, keys) = (&labels(&seen.queries), &labels(&seen.keys));
    let title = font::visible(&seen.title);
    if args.lines {
        let title = match token {
            Some(at) => format!("{title}: what \"{}\" attends to", queries[at]),
            None => title,
        };
        return picture::write(path, &Lines::new(&title, seen, queries, keys, token)?);
    }
    let scale = Scale::of_weights(&seen.weights);
    match seen.heads.as_slice() {
        [head] => {
            let title = format!("{title}, {}", head_name(head));
            let values = &seen.weights;
            picture::write(path, &Heatmap { title: &title, rows: queries, columns: keys, values, scale })
        }
        _ => picture::write(path, &Grid { title: &title, seen, queries, keys, scale }),
    }
}
