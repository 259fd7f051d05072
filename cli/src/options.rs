//! Options that several subcommands share.

use clap::{Args, ValueEnum};
use wgpu_attention::{Align, Attention, Device, Mask, MaskMeaning, Weights};

use crate::array::Array;
use crate::error::{Error, Result, usage};

/// What a mask's true entries mean. There is no default: frameworks differ.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum MaskWord {
    /// True: the query may attend to the key (PyTorch's scaled_dot_product_attention, JAX, ONNX)
    Keep,
    /// True: the query may not attend to the key (PyTorch's MultiheadAttention)
    Drop,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum WeightsWord {
    /// [batch, heads, len_q, len_k]
    PerHead,
    /// The mean over heads: [batch, len_q, len_k]
    Averaged,
}

impl WeightsWord {
    pub fn of(word: Option<WeightsWord>) -> Weights {
        match word {
            None => Weights::None,
            Some(WeightsWord::PerHead) => Weights::PerHead,
            Some(WeightsWord::Averaged) => Weights::Averaged,
        }
    }
}

/// Rewords a library error in terms of the program's options: advice that saves memory names options. The mean over
/// heads is suggested only if it takes less memory.
pub fn in_options(error: wgpu_attention::Error, averaged: &str, others: &str) -> Error {
    use wgpu_attention::Error::TooLarge;
    match error {
        TooLarge { what, needed, limit_name, limit, adapter, way_out } if !way_out.is_empty() => {
            let plain = TooLarge { what, needed, limit_name, limit, adapter, way_out: "" }.to_string();
            let averaged = if way_out.contains("Weights::Averaged") { averaged } else { "" };
            let said: Vec<&str> =
                [plain.as_str(), averaged, others].into_iter().filter(|part| !part.is_empty()).collect();
            Error::Failed(said.join("; "))
        }
        other => other.into(),
    }
}

/// The two sides of a window.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Window {
    left: Option<usize>,
    right: Option<usize>,
}

#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Attention")]
pub struct AttentionArgs {
    /// Query i sees key j only if j <= i + offset: top-left (offset 0), bottom-right (len_k - len_q) or an offset
    #[arg(long, value_name = "top-left|bottom-right|N", value_parser = parse_align, allow_negative_numbers = true)]
    causal: Option<Align>,
    /// Query i sees L keys to the left and R keys to the right of its own position, which does not count
    /// (transformers' sliding_window = W is W-1,0); empty or - leaves a side open
    #[arg(long, value_name = "L,R", value_parser = parse_window, allow_hyphen_values = true)]
    window: Option<Window>,
    /// Scores S become cap * tanh(S / cap), before bias and mask
    #[arg(long, value_name = "CAP", allow_negative_numbers = true)]
    softcap: Option<f32>,
    /// Scale of Q·Kᵀ [default: 1/sqrt(dim)]
    #[arg(long, allow_negative_numbers = true)]
    scale: Option<f32>,
    /// What true means in a boolean mask
    #[arg(long, value_enum)]
    pub mask: Option<MaskWord>,
}

impl AttentionArgs {
    /// Whether the user gave any of them.
    pub fn any(&self) -> bool {
        let AttentionArgs { causal, window, softcap, scale, mask } = self;
        causal.is_some() || window.is_some() || softcap.is_some() || scale.is_some() || mask.is_some()
    }

    /// Everything but masks and biases.
    pub fn attention(&self) -> Attention {
        let mut attention = Attention::new();
        if let Some(align) = &self.causal {
            attention = attention.causal(align.clone());
        }
        if let Some(Window { left, right }) = self.window {
            attention = attention.window(left, right);
        }
        if let Some(cap) = self.softcap {
            attention = attention.softcap(cap);
        }
        if let Some(scale) = self.scale {
            attention = attention.scale(scale);
        }
        attention
    }

    /// Adds key padding: a boolean mask as `--mask` defines it, or floats, which are a bias.
    pub fn pad_keys(&self, attention: Attention, array: &Array, device: &Device) -> Result<Attention> {
        let name = "key padding mask";
        if array.is_float() {
            return Ok(attention.key_padding_bias(array.upload(name, device)?));
        }
        Ok(attention.key_padding(self.meant(name, array, device)?))
    }

    /// Adds a bias.
    pub fn add_bias(attention: Attention, array: &Array, device: &Device) -> Result<Attention> {
        if array.is_bool() {
            usage!(
                "the bias holds bools, so it is a mask; pass it as one (--attn-mask FILE, or the tensor \"mask\" of \
                 attn run), with --mask keep or --mask drop to say what true means"
            );
        }
        Ok(attention.bias(array.upload("bias", device)?))
    }

    /// A boolean mask as `--mask` defines it.
    pub fn meant(&self, name: &str, array: &Array, device: &Device) -> Result<Mask> {
        if array.is_float() {
            usage!(
                "the {name} holds floats ({}), so it is a bias; pass it as one (--bias FILE, or the tensor \"bias\" of \
                 attn run)",
                array.values().type_name()
            );
        }
        let meaning = match self.mask {
            Some(MaskWord::Keep) => MaskMeaning::Keep,
            Some(MaskWord::Drop) => MaskMeaning::Hide,
            None => usage!(
                "the meaning of true in the {name} is unknown: add --mask keep (true may be attended to) \
                 or --mask drop (true is masked out)"
            ),
        };
        Ok(Mask::new(array.upload_bools(name, device)?, meaning)?)
    }
}

fn parse_align(text: &str) -> Result<Align, String> {
    match text {
        "top-left" => Ok(Align::TopLeft),
        "bottom-right" => Ok(Align::BottomRight),
        number => number
            .parse()
            .map(Align::Offset)
            .map_err(|_| "expected top-left, bottom-right or a whole number (the offset)".into()),
    }
}

fn parse_window(text: &str) -> Result<Window, String> {
    let side = |side: &str| match side.trim() {
        "" | "-" => Ok(None),
        number => number.parse().map(Some).map_err(|_| {
            format!(
                "\"{number}\" is not a number of keys, 0 or more; - leaves a side open (-1 in FlashAttention and ONNX)"
            )
        }),
    };
    match text.split_once(',') {
        Some((left, right)) => Ok(Window { left: side(left)?, right: side(right)? }),
        None => Err("expected two sides, such as 3,0 or 3,- (open to the right)".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_have_two_sides() {
        assert_eq!(parse_window("3,0"), Ok(Window { left: Some(3), right: Some(0) }));
        assert_eq!(parse_window("-,2"), Ok(Window { left: None, right: Some(2) }));
        assert_eq!(parse_window(","), Ok(Window { left: None, right: None }));
        assert!(parse_window("3").is_err());
        assert!(parse_window("-1,0").is_err());
    }

    #[test]
    fn an_offset_may_be_negative() {
        assert_eq!(parse_align("-3"), Ok(Align::Offset(-3)));
        assert!(parse_align("yes").is_err());
    }
}
