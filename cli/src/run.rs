//! `attn run`: attention over the user's own tensors.

use std::ops::Range;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use wgpu_attention::{Inspect, Tensor, Weights};

use crate::array::Array;
use crate::error::{Error, Result, fail, usage};
use crate::files::{self, TensorFile};
use crate::options::{AttentionArgs, WeightsWord, in_options};
use crate::progress::Spinner;
use crate::target;

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum LayoutWord {
    /// [batch, heads, len, dim]
    Bhsd,
    /// [batch, len, heads, dim]
    Bshd,
}

#[derive(Args, Debug)]
#[command(after_help = "\
IN holds q, k and v (f32, f16 or bf16; f64 is rounded to f32). Optional tensors: mask (bool, or u8 of 0 and 1; needs \
--mask), bias, key_padding ([batch, len_k]: bool for a mask, floats for a bias), key_lengths and query_lengths \
(integers, one per batch entry) and sink (one score per query head). Masks and biases broadcast to [batch, heads, \
len_q, len_k], whatever the layout. Any other tensor name is an error. bfloat16 in NumPy files is read and written as \
ml_dtypes stores it (V2).

The output file holds `output` and, if requested, `lse`, `weights`, `column_sums` and `entropy`. output and weights \
have the type of q; the others are f32.

Examples:
  attn run in.safetensors -o out.safetensors
  attn run in.npz -o out.npz --causal bottom-right --lse
  attn run in.safetensors -o out.safetensors --mask keep --weights averaged
  attn run in.safetensors -o out.npz --weights --inspect-heads 1,3 --inspect-queries 100..164
  attn run in.safetensors -o out.npz --column-sums --entropy
  attn run --q q.npy --k k.npy --v v.npy -o out.npy --layout bshd
  attn run folder-with-q-k-v-npy -o out.npz --window 128,0")]
pub struct RunArgs {
    /// A .safetensors or .npz file, or a folder of .npy files
    #[arg(value_name = "IN", required_unless_present = "q")]
    input: Option<PathBuf>,
    /// The queries, instead of IN; FILE:NAME picks one of several tensors (also for --k and --v)
    #[arg(long, value_name = "FILE", requires_all = ["k", "v"], conflicts_with = "input")]
    q: Option<String>,
    /// The keys
    #[arg(long, value_name = "FILE", requires = "q")]
    k: Option<String>,
    /// The values
    #[arg(long, value_name = "FILE", requires = "q")]
    v: Option<String>,
    /// The output file: .safetensors, .npz, or .npy for a single tensor
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
    #[command(flatten)]
    attention: AttentionArgs,
    /// Also write the attention weights; --weights alone means per-head
    #[arg(long, value_enum, num_args = 0..=1, default_missing_value = "per-head")]
    weights: Option<WeightsWord>,
    /// Also write the log-sum-exp of each query's scores
    #[arg(long)]
    lse: bool,
    /// Restrict weights, column_sums and entropy to these query heads
    #[arg(long, value_name = "H,H,...", value_delimiter = ',')]
    inspect_heads: Option<Vec<usize>>,
    /// Restrict weights, column_sums and entropy to these queries; END is excluded
    #[arg(long, value_name = "FIRST..END", value_parser = parse_range)]
    inspect_queries: Option<Range<usize>>,
    /// Also write each key's weights summed over the queries: [batch, heads, len_k]
    #[arg(long)]
    column_sums: bool,
    /// Also write the entropy of each query's weights, in nats: [batch, heads, len_q]
    #[arg(long)]
    entropy: bool,
    /// The order of axes in q, k, v and output
    #[arg(long, value_enum, default_value = "bhsd")]
    layout: LayoutWord,
}

struct Inputs {
    q: Array,
    k: Array,
    v: Array,
    mask: Option<Array>,
    bias: Option<Array>,
    key_padding: Option<Array>,
    key_lengths: Option<Array>,
    query_lengths: Option<Array>,
    sink: Option<Array>,
}

/// The tensor names that a file may hold.
const NAMES: [&str; 9] = ["q", "k", "v", "mask", "bias", "key_padding", "key_lengths", "query_lengths", "sink"];

impl RunArgs {
    fn read(&self) -> Result<Inputs> {
        match (&self.input, &self.q, &self.k, &self.v) {
            (None, Some(q), Some(k), Some(v)) => Ok(Inputs {
                q: files::read_named(q)?,
                k: files::read_named(k)?,
                v: files::read_named(v)?,
                mask: None,
                bias: None,
                key_padding: None,
                key_lengths: None,
                query_lengths: None,
                sink: None,
            }),
            (Some(path), ..) => {
                if path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("npy")) && path.is_file() {
                    usage!(
                        "{} holds one array; give three as --q FILE --k FILE --v FILE, or the folder of q.npy, k.npy and \
                         v.npy",
                        path.display()
                    );
                }
                let file = TensorFile::open(path)?;
                let inputs = Inputs {
                    q: file.need("q")?,
                    k: file.need("k")?,
                    v: file.need("v")?,
                    mask: file.get("mask")?,
                    bias: file.get("bias")?,
                    key_padding: file.get("key_padding")?,
                    key_lengths: file.get("key_lengths")?,
                    query_lengths: file.get("query_lengths")?,
                    sink: file.get("sink")?,
                };
                file.expect_only(&NAMES)?;
                Ok(inputs)
            }
            _ => usage!("give IN, or all of --q, --k and --v"),
        }
    }

    /// Converts a tensor between the user's layout and `[.., heads, len, dim]`, in either direction.
    fn heads_first(&self, name: &str, tensor: &Tensor) -> Result<Tensor> {
        if self.layout == LayoutWord::Bhsd {
            return Ok(tensor.clone());
        }
        let rank = tensor.shape().len();
        if rank < 3 {
            fail!("{name} {:?} needs at least three axes for --layout bshd: [len, heads, dim]", tensor.shape());
        }
        let mut axes: Vec<usize> = (0..rank).collect();
        axes.swap(rank - 3, rank - 2);
        Ok(tensor.permute(&axes)?)
    }
}

fn parse_range(text: &str) -> Result<Range<usize>, String> {
    let ends = text.split_once("..").and_then(|(start, end)| Some(start.parse().ok()?..end.parse().ok()?));
    ends.ok_or_else(|| "expected two numbers, such as 10..20 (10 to 19)".into())
}

impl RunArgs {
    /// Rewords a library error in terms of the program's options.
    fn explain(&self, error: wgpu_attention::Error, inputs: &Inputs) -> Error {
        let error = match error {
            wgpu_attention::Error::Shape(message) => message,
            other => return in_options(other, AVERAGED, CHOSEN),
        };
        // The axes of heads and lengths may be swapped.
        let at = |array: &Array, back: usize| array.shape().len().checked_sub(back).map(|axis| array.shape()[axis]);
        let fits = |back: usize| match [&inputs.q, &inputs.k, &inputs.v].map(|array| at(array, back)) {
            [Some(q), Some(k), Some(v)] => k == v && k > 0 && q % k == 0,
            _ => false,
        };
        let (bhsd, (now, other)) = (self.layout == LayoutWord::Bhsd, ("bhsd", "bshd"));
        let way_out = match (fits(if bhsd { 3 } else { 2 }), fits(if bhsd { 2 } else { 3 })) {
            (false, true) if bhsd => {
                format!("; the layout is {now}; if heads come after the lengths, use --layout {other}")
            }
            (false, true) => format!("; the layout is {other}; if heads come before the lengths, use --layout {now}"),
            _ => String::new(),
        };
        Error::Failed(format!("{error}{way_out}"))
    }

    /// Whether the user restricted heads or queries.
    fn chooses(&self) -> bool {
        self.inspect_heads.is_some() || self.inspect_queries.is_some()
    }

    /// What to recompute after the forward call. Weights come from the forward call itself unless heads or queries are
    /// restricted.
    fn inspect(&self) -> Result<Option<Inspect>> {
        let weights = self.chooses() && self.weights.is_some();
        if weights && WeightsWord::of(self.weights) == Weights::Averaged {
            usage!("--inspect-heads and --inspect-queries work with per-head weights, not with averaged ones");
        }
        if !(weights || self.column_sums || self.entropy) {
            if self.chooses() {
                usage!(
                    "--inspect-heads and --inspect-queries restrict what --weights, --column-sums and --entropy \
                     write; add at least one of these"
                );
            }
            return Ok(None);
        }
        let mut inspect = Inspect::new();
        if let Some(heads) = &self.inspect_heads {
            inspect = inspect.heads(heads);
        }
        if let Some(queries) = &self.inspect_queries {
            inspect = inspect.queries(queries.clone());
        }
        if weights {
            inspect = inspect.weights();
        }
        if self.column_sums {
            inspect = inspect.column_sums();
        }
        if self.entropy {
            inspect = inspect.entropy();
        }
        Ok(Some(inspect))
    }
}

/// Alternatives to suggest when the weights do not fit in memory.
const AVERAGED: &str = "--weights averaged writes one matrix for all heads";
const CHOSEN: &str = "--inspect-heads and --inspect-queries write only some of the weights, --column-sums and --entropy \
                      write summaries of them";

pub fn run(args: &RunArgs, adapter: Option<&str>) -> Result<()> {
    let names: Vec<&str> = [
        ("output", true),
        ("lse", args.lse),
        ("weights", args.weights.is_some()),
        ("column_sums", args.column_sums),
        ("entropy", args.entropy),
    ]
    .into_iter()
    .filter_map(|(name, wanted)| wanted.then_some(name))
    .collect();
    let inspect = args.inspect()?;
    files::check_output(&args.output, &names)?;
    let inputs = args.read()?;
    let is_mask = |array: &Option<Array>| array.as_ref().is_some_and(|array| !array.is_float());
    if args.attention.mask.is_some() && inputs.mask.is_none() && !is_mask(&inputs.key_padding) {
        usage!("--mask needs a mask, but the input holds neither a tensor \"mask\" nor a boolean \"key_padding\"");
    }
    let target = target::target(adapter)?;
    target.announce();
    let device = &target.device;
    let _spinner = Spinner::start(format!("attention on {}", device.name()));
    let upload = |name: &str, array: &Array| args.heads_first(name, &array.upload(name, device)?);
    let (q, k, v) = (upload("q", &inputs.q)?, upload("k", &inputs.k)?, upload("v", &inputs.v)?);
    let mut attention = args.attention.attention().lse(args.lse || inspect.is_some());
    if !args.chooses() {
        attention = attention.weights(WeightsWord::of(args.weights));
    }
    if let Some(mask) = &inputs.mask {
        attention = attention.mask(args.attention.meant("mask", mask, device)?);
    }
    if let Some(bias) = &inputs.bias {
        attention = AttentionArgs::add_bias(attention, bias, device)?;
    }
    if let Some(padding) = &inputs.key_padding {
        attention = args.attention.pad_keys(attention, padding, device)?;
    }
    if let Some(lengths) = &inputs.key_lengths {
        attention = attention.key_lengths(lengths.lengths("key_lengths")?);
    }
    if let Some(lengths) = &inputs.query_lengths {
        attention = attention.query_lengths(lengths.lengths("query_lengths")?);
    }
    if let Some(sink) = &inputs.sink {
        attention = attention.sink(sink.upload("sink", device)?);
    }
    let attended = attention.forward(&q, &k, &v).map_err(|error| args.explain(error, &inputs))?;
    let seen = match (&inspect, &attended.lse) {
        (Some(inspect), Some(lse)) => {
            Some(attention.inspect(&q, &k, lse, inspect).map_err(|error| in_options(error, AVERAGED, CHOSEN))?)
        }
        _ => None,
    };
    let (of_chosen, column_sums, entropy) =
        seen.map_or((None, None, None), |seen| (seen.weights, seen.column_sums, seen.entropy));
    let mut results = vec![("output", Array::download(&args.heads_first("output", &attended.output)?)?)];
    for (name, tensor) in [
        ("lse", attended.lse.filter(|_| args.lse)),
        ("weights", attended.weights.or(of_chosen)),
        ("column_sums", column_sums),
        ("entropy", entropy),
    ] {
        if let Some(tensor) = tensor {
            results.push((name, Array::download(&tensor)?));
        }
    }
    files::write_tensors(&args.output, &results)
}
