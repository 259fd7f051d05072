//! `attn mha`: a whole multi-head layer over the user's own tensors.

use std::path::PathBuf;

use clap::Args;
use wgpu_attention::{MultiHeadAttention, StateDict};

use crate::array::Array;
use crate::error::{Result, usage};
use crate::files;
use crate::options::{AttentionArgs, WeightsWord, in_options};
use crate::progress::Spinner;
use crate::target;

#[derive(Args, Debug)]
#[command(after_help = "\
The weights are a PyTorch nn.MultiheadAttention state dict. Inputs are [batch, len, dim] \
(or [len, dim]); without --key and --value the layer attends from the query to itself.

The output holds `output`, and `weights` when asked for.

Examples:
  attn mha --weights layer.safetensors --heads 8 --query x.npy -o out.safetensors
  attn mha --weights model.safetensors --prefix encoder.layers.0.self_attn. --heads 12 \\
      --query batch.npz:x --key-padding batch.npz:padding --mask drop -o out.npz --return-weights averaged")]
pub struct MhaArgs {
    /// The layer's weights, a safetensors file
    #[arg(long, value_name = "FILE")]
    weights: PathBuf,
    /// What stands before the names of the layer's weights, such as encoder.layers.0.self_attn.
    #[arg(long, default_value = "")]
    prefix: String,
    /// Heads of the layer
    #[arg(long, value_name = "N")]
    heads: usize,
    /// Where the queries come from: FILE, or FILE:NAME for one tensor of several
    #[arg(long, value_name = "FILE")]
    query: String,
    /// Where the keys come from [default: the query]
    #[arg(long, value_name = "FILE")]
    key: Option<String>,
    /// Where the values come from [default: the key]
    #[arg(long, value_name = "FILE")]
    value: Option<String>,
    /// Where the result goes: .safetensors, .npz, or .npy for one tensor
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
    /// The layer appends a key and value of zeros (add_zero_attn)
    #[arg(long)]
    zero_attn: bool,
    /// Inputs and output are [len, batch, dim], PyTorch's default
    #[arg(long)]
    seq_first: bool,
    /// Also write the attention weights; alone it means per-head
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

pub fn mha(args: &MhaArgs, adapter: Option<&str>) -> Result<()> {
    let names: &[&str] = if args.return_weights.is_some() { &["output", "weights"] } else { &["output"] };
    files::check_output(&args.output, names)?;
    if args.attention.mask.is_some() && args.attn_mask.is_none() && args.key_padding.is_none() {
        usage!("--mask says what a mask means, but there is neither --attn-mask nor --key-padding");
    }
    let state = StateDict::from_safetensors(&files::read_bytes(&args.weights)?)
        .map_err(|error| files::explain(&args.weights, error))?;
    let read = |text: &Option<String>| text.as_ref().map(|text| files::read_named(text)).transpose();
    let query = files::read_named(&args.query)?;
    let (key, value) = (read(&args.key)?, read(&args.value)?);
    let (attn_mask, key_padding, bias) = (read(&args.attn_mask)?, read(&args.key_padding)?, read(&args.bias)?);

    let target = target::target(adapter)?;
    target.announce();
    let device = &target.device;
    let _spinner = Spinner::start(format!("a layer on {}", device.name()));
    let layer = MultiHeadAttention::from_state_dict(device, &state, &args.prefix, args.heads)?
        .with_zero_attn(args.zero_attn)
        .with_batch_first(!args.seq_first);
    // One tensor for all three where they are the same: the layer then projects it once.
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
