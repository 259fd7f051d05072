//! `attn mha`: a whole multi-head layer over the user's own tensors.

use std::path::{Path, PathBuf};

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use wgpu_attention::{LoadOptions, MultiHeadAttention, Names, StateDict};

use crate::array::Array;
use crate::error::{Error, Result, usage};
use crate::files;
use crate::options::{AttentionArgs, WeightsWord, in_options};
use crate::progress::Spinner;
use crate::target;

#[derive(Args, Debug)]
#[command(after_help = "\
The weights are a PyTorch nn.MultiheadAttention state dict or a layer of a well-known model (Llama, Qwen, Gemma, \
OLMo, CLIP, BART, OPT, Whisper, BERT, ViT, GPT-2, GPT-NeoX, Falcon, Phi, T5, timm, ...). The tensor names identify the \
model; if they are ambiguous, use --names. model_type and rms_norm_eps are read from transformers' config.json beside \
the file. Every tensor under the prefix is used, or the call fails and names it. Only tensors that are not part of \
attention are skipped (BERT's output.LayerNorm, GPT-2's causal mask). A model's positions, softcap and scale come from \
its configuration, not its weights: see --scale, --softcap and --bias.

Inputs are [batch, len, dim] or [len, dim]. Without --key and --value the call is self-attention over the query. \
Masks and biases are [len_q, len_k], [batch, heads, len_q, len_k] (axes of length 1 broadcast) or, with three axes, \
[batch * heads, len_q, len_k] as in PyTorch. A mask per batch entry is [batch, 1, len_q, len_k].

The output file holds `output` and, if requested, `weights`.

Examples:
  attn mha --weights layer.safetensors --heads 8 --query x.npy -o out.safetensors
  attn mha --weights bert/model.safetensors --prefix encoder.layer.0.attention. --heads 12 --query x.npy -o out.npy
  attn mha --weights llama/model.safetensors.index.json --prefix model.layers.0.self_attn. --heads 32 --query x.npy \\
      --causal top-left -o out.npy
  attn mha --weights model.safetensors --prefix encoder.layers.0.self_attn. --heads 12 \\
      --query batch.npz:x --key-padding batch.npz:padding --mask drop -o out.npz --return-weights averaged")]
pub struct MhaArgs {
    /// The layer's weights: a safetensors file, the index of a sharded one (model.safetensors.index.json), or a folder
    /// with either
    #[arg(long, value_name = "PATH")]
    weights: PathBuf,
    /// The prefix of the layer's tensor names, such as encoder.layers.0.self_attn.
    #[arg(long, default_value = "")]
    prefix: String,
    /// Heads of the layer
    #[arg(long, value_name = "N")]
    heads: usize,
    /// Key/value heads; needed if Q, K and V are one fused tensor and their heads differ in width
    #[arg(long, value_name = "N")]
    kv_heads: Option<usize>,
    /// The naming scheme of the weights [default: detected from the tensor names]
    #[arg(long, value_name = "NAMES", value_parser = parse_names())]
    names: Option<Names>,
    /// Epsilon of the query and key norms [default: from config.json, else 1e-6, or 1e-5 for q_layernorm]
    #[arg(long, value_name = "EPSILON", allow_negative_numbers = true)]
    norm_epsilon: Option<f32>,
    /// A tensor under the prefix to skip, by name; may be repeated
    #[arg(long, value_name = "TENSOR")]
    ignore: Vec<String>,
    /// Input that queries are projected from: FILE, or FILE:NAME for one of several tensors
    #[arg(long, value_name = "FILE")]
    query: String,
    /// Input that keys are projected from [default: the query]
    #[arg(long, value_name = "FILE")]
    key: Option<String>,
    /// Input that values are projected from [default: the key]
    #[arg(long, value_name = "FILE")]
    value: Option<String>,
    /// The output file: .safetensors, .npz, or .npy for a single tensor
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
    /// Append a key and a value of zeros (add_zero_attn)
    #[arg(long)]
    zero_attn: bool,
    /// Inputs and output are [len, batch, dim], PyTorch's default
    #[arg(long)]
    seq_first: bool,
    /// Also write the attention weights; --return-weights alone means per-head
    #[arg(long, value_enum, num_args = 0..=1, default_missing_value = "per-head")]
    return_weights: Option<WeightsWord>,
    /// A boolean mask over queries and keys (needs --mask)
    #[arg(long, value_name = "FILE")]
    attn_mask: Option<String>,
    /// A boolean mask [batch, len_k] over keys (needs --mask), or floats to add to the scores
    #[arg(long, value_name = "FILE")]
    key_padding: Option<String>,
    /// An additive bias over queries and keys
    #[arg(long, value_name = "FILE")]
    bias: Option<String>,
    #[command(flatten)]
    attention: AttentionArgs,
}

/// Parses `--names`.
fn parse_names() -> impl TypedValueParser<Value = Names> {
    PossibleValuesParser::new(Names::ALL.map(Names::word)).map(|word| word.parse().expect("one of the words"))
}

impl MhaArgs {
    fn options(&self) -> LoadOptions {
        let mut options = LoadOptions::new(self.heads);
        if let Some((model_type, epsilon)) = model_of(&self.weights) {
            options = options.model(&model_type, epsilon);
        }
        if let Some(heads) = self.kv_heads {
            options = options.heads_kv(heads);
        }
        if let Some(names) = self.names {
            options = options.names(names);
        }
        if let Some(epsilon) = self.norm_epsilon {
            options = options.norm_epsilon(epsilon);
        }
        self.ignore.iter().fold(options, LoadOptions::ignore)
    }
}

/// `model_type` and the norm epsilon from transformers' `config.json` beside the weights, if there is one. They only
/// resolve ambiguous names, so a file that cannot be read is ignored.
fn model_of(weights: &Path) -> Option<(String, Option<f32>)> {
    let folder = if weights.is_dir() { weights } else { weights.parent()? };
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(folder.join("config.json")).ok()?).ok()?;
    // Vision-language models keep the language model's part in `text_config`.
    let text = json.get("text_config").filter(|text| text.get("model_type").is_some()).unwrap_or(&json);
    let epsilons = ["rms_norm_eps", "norm_eps", "layer_norm_eps"].map(|name| text.get(name)?.as_f64());
    let epsilon = epsilons.into_iter().flatten().next().map(|epsilon| epsilon as f32);
    Some((text.get("model_type")?.as_str()?.to_string(), epsilon))
}

pub fn mha(args: &MhaArgs, adapter: Option<&str>) -> Result<()> {
    let names: &[&str] = if args.return_weights.is_some() { &["output", "weights"] } else { &["output"] };
    files::check_output(&args.output, names)?;
    if args.attention.mask.is_some() && args.attn_mask.is_none() && args.key_padding.is_none() {
        usage!("--mask needs a mask: --attn-mask or --key-padding");
    }
    let state =
        StateDict::open_layer(&args.weights, &args.prefix).map_err(|error| files::explain(&args.weights, error))?;
    let query = files::read_named(&args.query)?;
    let (key, value) = (files::read_optional(&args.key)?, files::read_optional(&args.value)?);
    let [attn_mask, key_padding, bias] = [
        files::read_optional(&args.attn_mask)?,
        files::read_optional(&args.key_padding)?,
        files::read_optional(&args.bias)?,
    ];

    let is_float = key_padding.as_ref().is_some_and(Array::is_float);
    if args.attention.mask.is_some() && attn_mask.is_none() && is_float {
        usage!("--mask needs a mask, but the key padding holds floats, which are added to the scores");
    }

    let target = target::target(adapter)?;
    target.announce();
    let device = &target.device;
    let _spinner = Spinner::start(format!("a layer on {}", device.name()));
    let layer = MultiHeadAttention::from_state_dict_with(device, &state, &args.prefix, &args.options())
        .map_err(|error| Error::Failed(format!("{}: {error}", args.weights.display())))?
        .with_zero_attn(args.zero_attn)?
        .with_batch_first(!args.seq_first);
    // If the inputs are the same, share one tensor, so that the layer projects it once.
    let query = query.upload("query", device)?;
    let key = key.map(|key| key.upload("key", device)).transpose()?.unwrap_or_else(|| query.clone());
    let value = value.map(|value| value.upload("value", device)).transpose()?.unwrap_or_else(|| key.clone());
    let mut attention = args.attention.attention().weights(WeightsWord::of(args.return_weights));
    if let Some(mask) = &attn_mask {
        attention = attention.mask(args.attention.meant("attention mask", mask, device)?);
    }
    if let Some(mask) = &key_padding {
        attention = args.attention.pad_keys(attention, mask, device)?;
    }
    if let Some(bias) = &bias {
        attention = AttentionArgs::add_bias(attention, bias, device)?;
    }
    let result = layer
        .forward(&query, &key, &value, &attention)
        .map_err(|error| in_options(error, "--return-weights averaged writes one matrix for all heads", ""))?;
    let mut results = vec![("output", Array::download(&result.output)?)];
    if let Some(weights) = &result.weights {
        results.push(("weights", Array::download(weights)?));
    }
    files::write_tensors(&args.output, &results)
}
