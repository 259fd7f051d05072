//! How well-known models name the tensors of an attention layer, and what the names imply: the axis order of a weight,
//! the order of fused rows, the scale. Checked against the sources of PyTorch 2.15, transformers 5.24 and timm 1.0.31.

use crate::error::{Error, Result, value_error};

/// The naming convention of a layer's tensors. Detected from the names if these are unambiguous.
///
/// Only the attention itself is read. Pass positions (rotary, relative), windows, softcaps and scales from a model's
/// configuration to each call through [`Attention`](crate::Attention). Clipping of queries, keys and values (`clip_qkv`
/// of MPT, DBRX, OLMo) is not in weight files and is not computed. Scales that a model's code sets are not in weight
/// files either: Zamba's is `(head_dim / 2)^-0.5`; set it with [`Attention::scale`](crate::Attention::scale).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Names {
    /// `in_proj_weight`, `in_proj_bias` (or `q_proj_weight` …, `q_proj.bias` …), `out_proj`, `bias_k`, `bias_v`:
    /// `nn.MultiheadAttention`. Also what [`MultiHeadAttention::state_dict`](crate::MultiHeadAttention::state_dict)
    /// writes in addition: `gate_proj`, `q_norm`, `k_norm` (RMSNorm), `q_layernorm`, `k_layernorm`, `norm_epsilon`,
    /// `attention_scale`.
    PyTorch,
    /// `q_proj`, `k_proj`, `v_proj` and `o_proj`, `out_proj` or `dense`, with or without biases: Llama, Qwen 2,
    /// Mistral, Phi, CLIP, BART, OPT, Whisper, GPT-J. Norms that are LayerNorm (`q_layernorm` or `q_norm` with a bias)
    /// or span all heads (OLMo 2) are read. RMSNorm per head needs [`Names::Qwen3`] or [`Names::Gemma3`]. `q_layernorm`
    /// without a bias needs an explicit [`Names::Qwen3`] (RMSNorm) or [`Names::Llama`] (LayerNorm).
    Llama,
    /// Like [`Names::Llama`] with RMSNorm of each head's queries and keys, times `w`: Qwen 3, LFM2.
    Qwen3,
    /// Like [`Names::Llama`] with RMSNorm of each head's queries and keys, times `1 + w`: Gemma 3.
    Gemma3,
    /// Like [`Names::Llama`] with RMSNorm over all heads of queries and keys: OLMo 2.
    Olmo2,
    /// Like [`Names::Llama`] with scale 1: GPT-Neo.
    GptNeo,
    /// `query`, `key`, `value` (under `self.` or `attention.`) and `output.dense`, which may be next to the prefix:
    /// BERT, RoBERTa, ViT; `dense`: ALBERT. The LayerNorm after the residual is not part of attention and is skipped.
    Bert,
    /// `q_lin`, `k_lin`, `v_lin`, `out_lin`: DistilBERT, XLM.
    DistilBert,
    /// `c_attn` and `c_proj` of `Conv1D`, `[in, out]`: GPT-2. The buffers `bias` (its causal mask) and `masked_bias`
    /// are skipped.
    Gpt2,
    /// `c_attn` and `c_proj` of `nn.Linear`, with all queries, then all keys, then all values: nanoGPT.
    NanoGpt,
    /// Like [`Names::NanoGpt`] with one key/value head; otherwise with the rows of each head together: GPT-BigCode,
    /// StarCoder.
    GptBigCode,
    /// `qkv` and `proj` (`projection`), with all queries, then all keys, then all values; `q_norm`, `k_norm` (LayerNorm
    /// with a bias, else RMSNorm) and `gate`: timm, BLIP, Qwen-VL's vision model.
    Timm,
    /// `Wqkv` and `Wo` or `out_proj`, in the same row order: ModernBERT, MPT, FlashAttention's `MHA`.
    Wqkv,
    /// `qkv_proj` and `o_proj`, in the same row order: Phi-3.
    Phi3,
    /// `query_key_value` and `dense`, with the rows of each key/value head together: Falcon, GPT-NeoX, BLOOM,
    /// Persimmon.
    Falcon,
    /// `query_key_value` and `dense`, with all queries, then all keys, then all values: ChatGLM 2 and 3.
    ChatGlm,
    /// `q`, `k`, `v`, `o` without biases, scale 1: T5.
    T5,
    /// `q`, `k`, `v`, `o` with biases: MPNet.
    Mpnet,
    /// `to_q`, `to_k`, `to_v`, `to_out.0`: diffusers.
    Diffusers,
}

impl Names {
    /// All conventions.
    pub const ALL: [Names; 19] = [
        Names::PyTorch,
        Names::Llama,
        Names::Qwen3,
        Names::Gemma3,
        Names::Olmo2,
        Names::GptNeo,
        Names::Bert,
        Names::DistilBert,
        Names::Gpt2,
        Names::NanoGpt,
        Names::GptBigCode,
        Names::Timm,
        Names::Wqkv,
        Names::Phi3,
        Names::Falcon,
        Names::ChatGlm,
        Names::T5,
        Names::Mpnet,
        Names::Diffusers,
    ];

    /// The convention's short name: `pytorch`, `llama`, `gpt2` …
    pub fn word(self) -> &'static str {
        match self {
            Names::PyTorch => "pytorch",
            Names::Llama => "llama",
            Names::Qwen3 => "qwen3",
            Names::Gemma3 => "gemma3",
            Names::Olmo2 => "olmo2",
            Names::GptNeo => "gpt-neo",
            Names::Bert => "bert",
            Names::DistilBert => "distilbert",
            Names::Gpt2 => "gpt2",
            Names::NanoGpt => "nanogpt",
            Names::GptBigCode => "gpt-bigcode",
            Names::Timm => "timm",
            Names::Wqkv => "wqkv",
            Names::Phi3 => "phi3",
            Names::Falcon => "falcon",
            Names::ChatGlm => "chatglm",
            Names::T5 => "t5",
            Names::Mpnet => "mpnet",
            Names::Diffusers => "diffusers",
        }
    }

    /// The convention for a `model_type` of transformers' `config.json` if the tensor names alone are ambiguous; `None`
    /// for others.
    pub fn of_model_type(model_type: &str) -> Option<Names> {
        match model_type {
            "qwen3" | "qwen3_moe" | "qwen3_vl_text" | "qwen3_vl_moe_text" | "lfm2" | "lfm2_moe" => Some(Names::Qwen3),
            "gemma3" | "gemma3_text" => Some(Names::Gemma3),
            "olmo2" | "olmo3" | "olmoe" => Some(Names::Olmo2),
            "gpt_neo" => Some(Names::GptNeo),
            "gpt_bigcode" => Some(Names::GptBigCode),
            "chatglm" => Some(Names::ChatGlm),
            "falcon" | "gpt_neox" | "bloom" | "persimmon" => Some(Names::Falcon),
            "t5" | "mt5" | "umt5" => Some(Names::T5),
            _ => None,
        }
    }

    pub(super) fn family(self) -> &'static Family {
        match self {
            Names::PyTorch => &PYTORCH,
            Names::Llama | Names::Qwen3 | Names::Gemma3 | Names::Olmo2 | Names::GptNeo => &LLAMA,
            Names::Bert => &BERT,
            Names::DistilBert => &DISTILBERT,
            Names::Gpt2 | Names::NanoGpt | Names::GptBigCode => &C_ATTN,
            Names::Timm => &TIMM,
            Names::Wqkv => &WQKV,
            Names::Phi3 => &PHI3,
            Names::Falcon | Names::ChatGlm => &QUERY_KEY_VALUE,
            Names::T5 | Names::Mpnet => &Q_K_V_O,
            Names::Diffusers => &DIFFUSERS,
        }
    }
}

impl std::fmt::Display for Names {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.word())
    }
}

impl std::str::FromStr for Names {
    type Err = Error;
    fn from_str(word: &str) -> Result<Names> {
        Names::ALL.into_iter().find(|names| names.word() == word).ok_or_else(|| {
            value_error!("no names are called {word:?}; there are {}", Names::ALL.map(Names::word).join(", "))
        })
    }
}

/// The role of a tensor in a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Slot {
    /// Queries, keys and values fused.
    Qkv,
    Q,
    K,
    V,
    Out,
    Gate,
    QNorm,
    KNorm,
    QLayerNorm,
    KLayerNorm,
    /// The extra key of `add_bias_kv`.
    BiasK,
    BiasV,
    Epsilon,
    Scale,
}

/// A weight or a bias of a slot. Anything else counts as a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    Weight,
    Bias,
}

pub(super) type Role = (Slot, Part);

/// Names that belong together.
pub(super) struct Family {
    /// Modules: `NAME.weight` and `NAME.bias`. `../` means next to the last word of a prefix that ends in one of
    /// `inner`.
    modules: &'static [(Slot, &'static [&'static str])],
    /// Tensors with other names.
    tensors: &'static [(Role, &'static str)],
    /// Tensors that are not part of attention, or not parameters: a name, or a beginning of one that ends in `.`.
    passed_over: &'static [&'static str],
    /// Endings of prefixes whose last word has the output projection next to it: BERT's `attention.self.`, ViT's
    /// `attention.attention.`, but not `attention.`, which has another module's next to it.
    pub inner: &'static [&'static str],
    /// The possible meanings of the names; the first is the default.
    pub readings: &'static [Names],
}

impl Family {
    pub const ALL: [&'static Family; 11] =
        [&PYTORCH, &LLAMA, &BERT, &DISTILBERT, &C_ATTN, &TIMM, &WQKV, &PHI3, &QUERY_KEY_VALUE, &Q_K_V_O, &DIFFUSERS];

    /// Every name with its role.
    pub fn names(&self) -> impl Iterator<Item = (Role, String)> + '_ {
        let modules = self.modules.iter().flat_map(|&(slot, names)| names.iter().map(move |name| (slot, name)));
        let modules = modules.flat_map(|(slot, name)| {
            [(Part::Weight, "weight"), (Part::Bias, "bias")]
                .map(|(part, word)| ((slot, part), format!("{name}.{word}")))
        });
        modules.chain(self.tensors.iter().map(|&(role, name)| (role, name.to_string())))
    }

    /// Whether a tensor is skipped. The masks that GPT-2 and similar models store are recognised by their shapes.
    pub fn passes_over(&self, name: &str, shape: &[usize]) -> bool {
        self.passed_over.iter().any(|&known| match known {
            "bias" => name == known && shape.len() == 4,
            "masked_bias" => name == known && shape.iter().product::<usize>() == 1,
            _ => name == known || known.ends_with('.') && name.starts_with(known),
        })
    }

    /// The required slots that are missing, given the existing roles.
    pub fn missing(&self, has: impl Fn(Role) -> bool) -> Vec<Slot> {
        let weight = |slot| has((slot, Part::Weight));
        let fused = self.knows(Slot::Qkv) && (weight(Slot::Qkv) || !self.knows(Slot::Q));
        let needed: &[Slot] = if fused { &[Slot::Qkv, Slot::Out] } else { &[Slot::Q, Slot::K, Slot::V, Slot::Out] };
        needed.iter().copied().filter(|&slot| !weight(slot)).collect()
    }

    fn knows(&self, slot: Slot) -> bool {
        self.names().any(|(role, _)| role == (slot, Part::Weight))
    }

    /// The names of a slot's weight.
    pub fn weights_of(&self, slot: Slot) -> Vec<String> {
        self.names().filter(|(role, _)| *role == (slot, Part::Weight)).map(|(_, name)| name).collect()
    }
}

const WEIGHT: Part = Part::Weight;
const BIAS: Part = Part::Bias;

const UNNAMED: Family = Family { modules: &[], tensors: &[], passed_over: &[], inner: &[], readings: &[] };

static PYTORCH: Family = Family {
    modules: &[
        (Slot::Out, &["out_proj"]),
        (Slot::Gate, &["gate_proj"]),
        (Slot::QNorm, &["q_norm"]),
        (Slot::KNorm, &["k_norm"]),
        (Slot::QLayerNorm, &["q_layernorm"]),
        (Slot::KLayerNorm, &["k_layernorm"]),
    ],
    tensors: &[
        ((Slot::Qkv, WEIGHT), "in_proj_weight"),
        ((Slot::Qkv, BIAS), "in_proj_bias"),
        ((Slot::Q, WEIGHT), "q_proj_weight"),
        ((Slot::K, WEIGHT), "k_proj_weight"),
        ((Slot::V, WEIGHT), "v_proj_weight"),
        ((Slot::Q, BIAS), "q_proj.bias"),
        ((Slot::K, BIAS), "k_proj.bias"),
        ((Slot::V, BIAS), "v_proj.bias"),
        ((Slot::BiasK, WEIGHT), "bias_k"),
        ((Slot::BiasV, WEIGHT), "bias_v"),
        ((Slot::Epsilon, WEIGHT), "norm_epsilon"),
        ((Slot::Scale, WEIGHT), "attention_scale"),
    ],
    readings: &[Names::PyTorch],
    ..UNNAMED
};

static LLAMA: Family = Family {
    modules: &[
        (Slot::Q, &["q_proj"]),
        (Slot::K, &["k_proj"]),
        (Slot::V, &["v_proj"]),
        (Slot::Out, &["o_proj", "out_proj", "dense"]),
        (Slot::Gate, &["gate_proj"]),
        (Slot::QNorm, &["q_norm"]),
        (Slot::KNorm, &["k_norm"]),
        (Slot::QLayerNorm, &["q_layernorm"]),
        (Slot::KLayerNorm, &["k_layernorm"]),
    ],
    // GPT-J and GPT-Neo store their causal masks, old Llamas their frequencies.
    passed_over: &["bias", "masked_bias", "rotary_emb.inv_freq"],
    readings: &[Names::Llama, Names::Qwen3, Names::Gemma3, Names::Olmo2, Names::GptNeo],
    ..UNNAMED
};

static BERT: Family = Family {
    modules: &[
        (Slot::Q, &["query", "self.query", "attention.query"]),
        (Slot::K, &["key", "self.key", "attention.key"]),
        (Slot::V, &["value", "self.value", "attention.value"]),
        (Slot::Out, &["output.dense", "../output.dense", "dense"]),
    ],
    passed_over: &["output.LayerNorm.", "LayerNorm."],
    inner: &["self", "attention.attention"],
    readings: &[Names::Bert],
    ..UNNAMED
};

static DISTILBERT: Family = Family {
    modules: &[(Slot::Q, &["q_lin"]), (Slot::K, &["k_lin"]), (Slot::V, &["v_lin"]), (Slot::Out, &["out_lin"])],
    readings: &[Names::DistilBert],
    ..UNNAMED
};

static C_ATTN: Family = Family {
    modules: &[(Slot::Qkv, &["c_attn"]), (Slot::Out, &["c_proj"])],
    passed_over: &["bias", "masked_bias"],
    readings: &[Names::Gpt2, Names::NanoGpt, Names::GptBigCode],
    ..UNNAMED
};

static TIMM: Family = Family {
    modules: &[
        (Slot::Qkv, &["qkv"]),
        (Slot::Out, &["proj", "projection"]),
        (Slot::Gate, &["gate"]),
        (Slot::QNorm, &["q_norm"]),
        (Slot::KNorm, &["k_norm"]),
    ],
    // BEiT's biases; it has none for keys.
    tensors: &[((Slot::Q, BIAS), "q_bias"), ((Slot::V, BIAS), "v_bias")],
    readings: &[Names::Timm],
    ..UNNAMED
};

static WQKV: Family = Family {
    modules: &[(Slot::Qkv, &["Wqkv"]), (Slot::Out, &["Wo", "out_proj"])],
    passed_over: &["rotary_emb.inv_freq"],
    readings: &[Names::Wqkv],
    ..UNNAMED
};

static PHI3: Family = Family {
    modules: &[(Slot::Qkv, &["qkv_proj"]), (Slot::Out, &["o_proj"])],
    passed_over: &["rotary_emb.inv_freq"],
    readings: &[Names::Phi3],
    ..UNNAMED
};

static QUERY_KEY_VALUE: Family = Family {
    modules: &[
        (Slot::Qkv, &["query_key_value"]),
        (Slot::Out, &["dense"]),
        (Slot::QLayerNorm, &["q_layernorm"]),
        (Slot::KLayerNorm, &["k_layernorm"]),
    ],
    passed_over: &["bias", "masked_bias", "rotary_emb.inv_freq"],
    readings: &[Names::Falcon, Names::ChatGlm],
    ..UNNAMED
};

static Q_K_V_O: Family = Family {
    modules: &[(Slot::Q, &["q"]), (Slot::K, &["k"]), (Slot::V, &["v"]), (Slot::Out, &["o"])],
    readings: &[Names::T5, Names::Mpnet],
    ..UNNAMED
};

static DIFFUSERS: Family = Family {
    modules: &[(Slot::Q, &["to_q"]), (Slot::K, &["to_k"]), (Slot::V, &["to_v"]), (Slot::Out, &["to_out.0"])],
    readings: &[Names::Diffusers],
    ..UNNAMED
};
