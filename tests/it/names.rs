//! Layers of well-known models, read by the names of their tensors; rejected files; sharded files.

use rand::SeedableRng;
use rand_pcg::Pcg64;
use wgpu_attention::{
    Attention, Device, HostTensor, LoadOptions, MultiHeadAttention, MultiHeadConfig, Names, NormKind, NormSpan,
    QueryKeyNorm, StateDict, Tensor,
};

use crate::kit::noise;

/// The state dict of a CPU layer with random parameters.
fn random(config: MultiHeadConfig, seed: u64) -> StateDict {
    let mut rng = Pcg64::seed_from_u64(seed);
    let layer = MultiHeadAttention::new(Device::Cpu, config, seed).unwrap();
    let mut state = layer.state_dict().unwrap();
    for (name, tensor) in layer.state_dict().unwrap().iter() {
        if !["norm_epsilon", "attention_scale"].contains(&name) {
            state.insert(name, HostTensor::new(tensor.shape(), noise(&mut rng, tensor.data().len())).unwrap());
        }
    }
    state
}

/// The parts of a layer under plain names: `q.weight`, `k.bias`, `out.weight` …
struct Parts {
    rows: [usize; 3],
    width: usize,
    state: StateDict,
}

impl Parts {
    fn of(config: &MultiHeadConfig, state: &StateDict) -> Parts {
        let rows = [
            config.num_heads * config.head_dim,
            config.heads_kv * config.head_dim,
            config.heads_kv * config.value_head_dim,
        ];
        Parts { rows, width: config.embed_dim, state: state.clone() }
    }
    fn get(&self, name: &str) -> HostTensor {
        self.state.get(name).unwrap_or_else(|| panic!("no {name}")).clone()
    }
    /// The weight of queries (0), keys or values.
    fn weight(&self, n: usize) -> HostTensor {
        let start: usize = self.rows[..n].iter().sum();
        match self.state.get("in_proj_weight") {
            None => self.get(["q_proj_weight", "k_proj_weight", "v_proj_weight"][n]),
            Some(all) => {
                let part = &all.data()[start * self.width..][..self.rows[n] * self.width];
                HostTensor::new(&[self.rows[n], self.width], part.to_vec()).unwrap()
            }
        }
    }
    fn bias(&self, n: usize) -> HostTensor {
        let start: usize = self.rows[..n].iter().sum();
        let part = self.get("in_proj_bias").data()[start..][..self.rows[n]].to_vec();
        HostTensor::new(&[self.rows[n]], part).unwrap()
    }
    fn has_bias(&self) -> bool {
        self.state.get("in_proj_bias").is_some()
    }
    /// With other names for queries, keys, values and the output.
    fn apart(&self, names: [&str; 4]) -> StateDict {
        let mut state = StateDict::default();
        for (n, name) in names.iter().take(3).enumerate() {
            state.insert(format!("{name}.weight"), self.weight(n));
            if self.has_bias() {
                state.insert(format!("{name}.bias"), self.bias(n));
            }
        }
        self.rename(&mut state, "out_proj", names[3]);
        state
    }
    fn rename(&self, state: &mut StateDict, from: &str, to: &str) {
        for part in ["weight", "bias"] {
            if let Some(tensor) = self.state.get(&format!("{from}.{part}")) {
                state.insert(format!("{to}.{part}"), tensor.clone());
            }
        }
    }
    /// Fused into one tensor, with rows in this order: (index of Q, K or V, row).
    fn fused(&self, order: &[(usize, usize)], [qkv, out]: [&str; 2]) -> StateDict {
        let mut state = StateDict::default();
        let weights = [0, 1, 2].map(|n| self.weight(n));
        let row = |&(n, row): &(usize, usize)| weights[n].data()[row * self.width..][..self.width].to_vec();
        let all: Vec<f32> = order.iter().flat_map(row).collect();
        state.insert(format!("{qkv}.weight"), HostTensor::new(&[order.len(), self.width], all).unwrap());
        if self.has_bias() {
            let biases = [0, 1, 2].map(|n| self.bias(n));
            let all = order.iter().map(|&(n, row)| biases[n].data()[row]).collect();
            state.insert(format!("{qkv}.bias"), HostTensor::new(&[order.len()], all).unwrap());
        }
        self.rename(&mut state, "out_proj", out);
        state
    }
    fn blocks(&self) -> Vec<(usize, usize)> {
        (0..3).flat_map(|n| (0..self.rows[n]).map(move |row| (n, row))).collect()
    }
    /// With the rows of each key/value head grouped.
    fn by_head(&self, heads_kv: usize) -> Vec<(usize, usize)> {
        let each = |n: usize| self.rows[n] / heads_kv;
        (0..heads_kv).flat_map(|g| (0..3).flat_map(move |n| (0..each(n)).map(move |r| (n, g * each(n) + r)))).collect()
    }
}

/// Everything under a prefix.
fn under(prefix: &str, state: &StateDict) -> StateDict {
    let mut all = StateDict::default();
    state.iter().for_each(|(name, tensor)| all.insert(format!("{prefix}{name}"), tensor.clone()));
    all
}

fn transposed(tensor: &HostTensor) -> HostTensor {
    let &[rows, columns] = tensor.shape() else { panic!("a matrix") };
    let data = (0..columns).flat_map(|c| (0..rows).map(move |r| tensor.data()[r * columns + c])).collect();
    HostTensor::new(&[columns, rows], data).unwrap()
}

fn buffer(shape: &[usize]) -> HostTensor {
    HostTensor::new(shape, vec![1.0; shape.iter().product()]).unwrap()
}

fn load(state: &StateDict, prefix: &str, options: &LoadOptions) -> Result<MultiHeadAttention, wgpu_attention::Error> {
    MultiHeadAttention::from_state_dict_with(Device::Cpu, state, prefix, options)
}

/// Checks that the loaded layer equals `truth`, number by number.
#[track_caller]
fn same(state: &StateDict, prefix: &str, options: &LoadOptions, config: &MultiHeadConfig, truth: &StateDict) {
    let layer = load(state, prefix, options).unwrap_or_else(|error| panic!("{prefix}: {error}"));
    assert_eq!(layer.config(), config, "{prefix}");
    assert_eq!(layer.state_dict().unwrap(), *truth, "{prefix}");
}

#[track_caller]
fn refused(state: &StateDict, prefix: &str, options: &LoadOptions, parts: &[&str]) {
    let Err(error) = load(state, prefix, options) else { panic!("{prefix:?} is read; {parts:?}") };
    let message = error.to_string();
    for part in parts {
        assert!(message.contains(part), "\"{part}\" is not in: {message}");
    }
}

fn plain() -> MultiHeadConfig {
    MultiHeadConfig::new(12, 4).unwrap()
}

/// The other modules of a block, next to an attention layer.
fn with_neighbours(state: &mut StateDict, block: &str) {
    for name in ["mlp.up_proj.weight", "intermediate.dense.weight", "output.dense.weight", "input_layernorm.weight"] {
        state.insert(format!("{block}{name}"), buffer(&[2]));
    }
}

#[test]
fn separate_projections() {
    let options = LoadOptions::new(4);
    let grouped = || MultiHeadConfig::with_head_dims(12, 4, 5, 5).unwrap().heads_kv(2);
    for (config, names, block, prefix) in [
        (grouped().bias(false), ["q_proj", "k_proj", "v_proj", "o_proj"], "model.layers.0.", "self_attn."),
        // Qwen 2: biases only on the input projections.
        (grouped().out_bias(false), ["q_proj", "k_proj", "v_proj", "o_proj"], "model.layers.0.", "self_attn."),
        (plain(), ["q_proj", "k_proj", "v_proj", "out_proj"], "text_model.encoder.layers.3.", "self_attn."),
        (plain(), ["q_proj", "k_proj", "v_proj", "dense"], "model.layers.1.", "self_attn."),
        (plain(), ["self.query", "self.key", "self.value", "output.dense"], "encoder.layer.0.", "attention."),
        (
            plain(),
            ["attention.query", "attention.key", "attention.value", "output.dense"],
            "encoder.layer.0.",
            "attention.",
        ),
        (plain(), ["query", "key", "value", "dense"], "albert.", "attention."),
        (plain(), ["q_lin", "k_lin", "v_lin", "out_lin"], "transformer.layer.0.", "attention."),
        (plain(), ["q", "k", "v", "o"], "encoder.layer.0.attention.", "attn."),
        (plain().bias(false).scale(Some(1.0)), ["q", "k", "v", "o"], "encoder.block.1.layer.0.", "SelfAttention."),
        (plain().bias(false).out_bias(true), ["to_q", "to_k", "to_v", "to_out.0"], "up.0.", "attn1."),
        // GPT-Neo does not scale.
        (
            plain().bias(false).out_bias(true).scale(Some(1.0)),
            ["q_proj", "k_proj", "v_proj", "out_proj"],
            "transformer.h.0.",
            "attn.attention.",
        ),
    ] {
        let truth = random(config.clone(), 1);
        let mut state = under(&format!("{block}{prefix}"), &Parts::of(&config, &truth).apart(names));
        with_neighbours(&mut state, block);
        same(&state, &format!("{block}{prefix}"), &options, &config, &truth);
        same(&state, format!("{block}{prefix}").trim_end_matches('.'), &options, &config, &truth);
        let found = state.layers();
        assert!(found.iter().any(|(at, _)| *at == format!("{block}{prefix}")), "{found:?}");
        // Errors for the block, the model and a misspelt prefix say where the layer is.
        for wrong in [block, "", &format!("{block}{}x.", &prefix[..prefix.len() - 1])] {
            refused(&state, wrong, &options, &[&format!("{block}{prefix}")]);
        }
    }
}

#[test]
fn only_conventional_names_outside_attention_are_skipped() {
    let (config, options) = (plain(), LoadOptions::new(4));
    let truth = random(config.clone(), 2);
    let parts = Parts::of(&config, &truth);
    // BERT: the output is next to `self.`; LayerNorm follows the residual.
    let mut bert = under("layer.0.attention.", &parts.apart(["self.query", "self.key", "self.value", "output.dense"]));
    with_neighbours(&mut bert, "layer.0.");
    bert.insert("layer.0.attention.output.LayerNorm.weight", buffer(&[12]));
    bert.insert("layer.0.attention.output.LayerNorm.bias", buffer(&[12]));
    same(&bert, "layer.0.attention.self.", &options, &config, &truth);
    same(&bert, "layer.0.attention.", &options, &config, &truth);
    bert.insert("layer.0.attention.self.distance_embedding.weight", buffer(&[5, 3]));
    refused(
        &bert,
        "layer.0.attention.self.",
        &options,
        &["unexpected tensor layer.0.attention.self.distance_embedding.weight"],
    );
    // ViT: the same, one level deeper.
    let mut vit =
        under("l.attention.", &parts.apart(["attention.query", "attention.key", "attention.value", "output.dense"]));
    with_neighbours(&mut vit, "l.");
    same(&vit, "l.attention.attention.", &options, &config, &truth);
    // GPT-2: weights are [in, out]; the causal mask is recognised by its shape.
    let fused = parts.fused(&parts.blocks(), ["c_attn", "c_proj"]);
    let mut gpt2 = StateDict::default();
    for (name, tensor) in under("h.0.attn.", &fused).iter() {
        gpt2.insert(name, if tensor.shape().len() == 2 { transposed(tensor) } else { tensor.clone() });
    }
    same(&gpt2, "h.0.attn.", &options, &config, &truth);
    gpt2.insert("h.0.attn.bias", buffer(&[1, 1, 6, 6]));
    gpt2.insert("h.0.attn.masked_bias", buffer(&[]));
    same(&gpt2, "h.0.attn.", &options, &config, &truth);
    gpt2.insert("h.0.attn.bias", buffer(&[36]));
    refused(&gpt2, "h.0.attn.", &options, &["unexpected tensor h.0.attn.bias"]);
    // Llama's frequencies; other tensors are errors that name them, and can be ignored by name.
    let mut llama = under("a.", &parts.apart(["q_proj", "k_proj", "v_proj", "o_proj"]));
    llama.insert("a.rotary_emb.inv_freq", buffer(&[2]));
    same(&llama, "a.", &options, &config, &truth);
    llama.insert("a.sinks", buffer(&[4]));
    refused(&llama, "a.", &options, &["unexpected tensor a.sinks", "Attention::sink", "--ignore"]);
    same(&llama, "a.", &options.clone().ignore("sinks"), &config, &truth);
    same(&llama, "a.", &options.clone().ignore("a.sinks"), &config, &truth);
    refused(&llama, "a.", &options.clone().ignore("sinks").ignore("snks"), &["\"snks\" is to be ignored, but"]);
    refused(&llama, "a.", &options.clone().ignore("q_proj.bias"), &["\"q_proj.bias\" is to be ignored, but"]);
}

#[test]
fn fused_projections() {
    let of = |config: &MultiHeadConfig, seed| {
        let truth = random(config.clone(), seed);
        (Parts::of(config, &truth), truth)
    };
    let options = LoadOptions::new(4);
    let config = plain();
    let (parts, truth) = of(&config, 3);
    for names in [["qkv", "proj"], ["qkv", "projection"], ["Wqkv", "Wo"], ["Wqkv", "out_proj"], ["qkv_proj", "o_proj"]]
    {
        same(&under("b.0.attn.", &parts.fused(&parts.blocks(), names)), "b.0.attn.", &options, &config, &truth);
    }
    // BEiT: no bias for keys.
    let mut beit = parts.fused(&parts.blocks(), ["qkv", "proj"]);
    beit.remove("qkv.bias");
    beit.insert("q_bias", parts.bias(0));
    beit.insert("v_bias", parts.bias(2));
    let read = load(&beit, "", &options).unwrap().state_dict().unwrap();
    let mut expected = truth.get("in_proj_bias").unwrap().data().to_vec();
    expected[12..24].fill(0.0);
    assert_eq!(read.get("in_proj_bias").unwrap().data(), expected);
    // GPT-NeoX and BLOOM: the rows of each head are grouped, with buffers next to them.
    let mut neox = parts.fused(&parts.by_head(4), ["query_key_value", "dense"]);
    neox.insert("bias", buffer(&[1, 1, 8, 8]));
    neox.insert("masked_bias", buffer(&[]));
    neox.insert("rotary_emb.inv_freq", buffer(&[2]));
    same(&under("layers.0.attention.", &neox), "layers.0.attention.", &options, &config, &truth);
    // nn.Linear under GPT-2's names: two models differ, so one must be specified.
    let nano = parts.fused(&parts.blocks(), ["c_attn", "c_proj"]);
    refused(&nano, "", &options, &["nanogpt", "gpt-bigcode", "--names"]);
    same(&nano, "", &options.clone().names(Names::NanoGpt), &config, &truth);
    let code = parts.fused(&parts.by_head(4), ["c_attn", "c_proj"]);
    same(&code, "", &options.clone().names(Names::GptBigCode), &config, &truth);
    same(&code, "", &options.clone().model("gpt_bigcode", None), &config, &truth);
    for heads_kv in [1, 2] {
        let config = MultiHeadConfig::with_head_dims(12, 4, 5, 5).unwrap().heads_kv(heads_kv).bias(false);
        let (parts, truth) = of(&config, 4);
        let phi = parts.fused(&parts.blocks(), ["qkv_proj", "o_proj"]);
        same(&phi, "", &options, &config, &truth);
        same(&phi, "", &options.clone().heads_kv(heads_kv), &config, &truth);
        refused(&phi, "", &options.clone().heads_kv(4), &["qkv_proj.weight", "4 key/value heads"]);
        // Falcon 7B and 40B.
        let falcon = parts.fused(&parts.by_head(heads_kv), ["query_key_value", "dense"]);
        same(&falcon, "", &options, &config, &truth);
        let config = config.bias(true).out_bias(false);
        let (parts, truth) = of(&config, 5);
        let glm = parts.fused(&parts.blocks(), ["query_key_value", "dense"]);
        refused(&glm, "", &options, &["chatglm", "falcon"]);
        same(&glm, "", &options.clone().names(Names::ChatGlm), &config, &truth);
    }
    // StarCoder: one key/value head.
    let config = plain().heads_kv(1);
    let (parts, truth) = of(&config, 6);
    same(&parts.fused(&parts.blocks(), ["c_attn", "c_proj"]), "", &options, &config, &truth);
    // Heads of two widths in one tensor: recognised by the number of key/value heads.
    let config = MultiHeadConfig::with_head_dims(12, 4, 5, 4).unwrap().heads_kv(2);
    let (parts, truth) = of(&config, 7);
    let odd = parts.fused(&parts.blocks(), ["qkv", "proj"]);
    refused(&odd, "", &options, &["38 rows do not divide"]);
    same(&odd, "", &options.clone().heads_kv(2), &config, &truth);
}

#[test]
fn norms_of_queries_and_keys() {
    let options = LoadOptions::new(4);
    let rms = QueryKeyNorm::new(NormKind::Rms, NormSpan::Head, 1e-6);
    let with = |norm, names: [&str; 2], seed| {
        let config = plain().heads_kv(2).bias(false).norm(Some(norm));
        let truth = random(config.clone(), seed);
        let parts = Parts::of(&config, &truth);
        let mut state = parts.apart(["q_proj", "k_proj", "v_proj", "o_proj"]);
        let word = if norm.kind == NormKind::Rms { "norm" } else { "layernorm" };
        for (n, letter) in ["q", "k"].into_iter().enumerate() {
            parts.rename(&mut state, &format!("{letter}_{word}"), names[n]);
        }
        (config, truth, state)
    };
    let (config, truth, state) = with(rms, ["q_norm", "k_norm"], 8);
    // Qwen 3 and Gemma 3 use the same names for different norms.
    refused(&state, "", &options, &["q_norm.weight [3]", "qwen3", "gemma3", "--names"]);
    same(&state, "", &options.clone().names(Names::Qwen3), &config, &truth);
    same(&state, "", &options.clone().model("qwen3_moe", None), &config, &truth);
    let expected = config.clone().norm(Some(QueryKeyNorm::new(NormKind::Rms, NormSpan::Head, 1e-3)));
    let layer = load(&state, "", &options.clone().model("qwen3", Some(1e-3))).unwrap();
    assert_eq!(layer.config(), &expected);
    let layer = load(&state, "", &options.clone().names(Names::Qwen3).norm_epsilon(1e-3)).unwrap();
    assert_eq!(layer.config(), &expected);
    let read = load(&state, "", &options.clone().model("gemma3_text", None)).unwrap().state_dict().unwrap();
    for name in ["q_norm.weight", "k_norm.weight"] {
        let plus_one: Vec<f32> = truth.get(name).unwrap().data().iter().map(|w| 1.0 + w).collect();
        assert_eq!(read.get(name).unwrap().data(), plus_one);
    }
    refused(&state, "", &options.clone().model("a model of tomorrow", None), &["qwen3"]);
    // OLMo 2: over all heads, which is unambiguous.
    let (config, truth, state) = with(QueryKeyNorm::new(NormKind::Rms, NormSpan::Width, 1e-6), ["q_norm", "k_norm"], 9);
    same(&state, "", &options, &config, &truth);
    // A norm with a bias is LayerNorm.
    let layer_norm = QueryKeyNorm::new(NormKind::Layer, NormSpan::Head, 1e-6).bias(true);
    let (config, truth, state) = with(layer_norm, ["q_norm", "k_norm"], 10);
    same(&state, "", &options.clone().norm_epsilon(1e-6), &config, &truth);
    let (config, truth, state) =
        with(QueryKeyNorm::new(NormKind::Layer, NormSpan::Head, 1e-5).bias(true), ["q_layernorm", "k_layernorm"], 11);
    same(&state, "", &options, &config, &truth);
    // Without a bias it is LFM2's RMSNorm or a LayerNorm.
    let bare = QueryKeyNorm::new(NormKind::Layer, NormSpan::Head, 1e-5);
    let (config, truth, unbiased) = with(bare, ["q_layernorm", "k_layernorm"], 14);
    refused(&unbiased, "", &options, &["q_layernorm.weight", "has no bias", "LFM2", "qwen3", "llama"]);
    same(&unbiased, "", &options.clone().names(Names::Llama), &config, &truth);
    let rms_so_called = QueryKeyNorm::new(NormKind::Rms, NormSpan::Head, 1e-5);
    let (config, truth, lfm2) = with(rms_so_called, ["q_layernorm", "k_layernorm"], 15);
    same(&lfm2, "", &options.clone().names(Names::Qwen3), &config, &truth);
    same(&lfm2, "", &options.clone().model("lfm2", None), &config, &truth);
    // The epsilon of a configuration applies whatever its model is called.
    let named = options.clone().names(Names::Qwen3).model("a model of tomorrow", Some(1e-3));
    assert_eq!(load(&lfm2, "", &named).unwrap().config().norm.unwrap().epsilon, 1e-3);
    // An extremely long name takes little time and gives a short message.
    let mut long = truth.clone();
    long.insert("x".repeat(10 << 20), buffer(&[1]));
    let Err(error) = load(&long, "", &options) else { panic!("a tensor too many is read") };
    assert!(error.to_string().len() < 4096, "{} bytes", error.to_string().len());
    let mut half = state.clone();
    half.remove("k_layernorm.bias");
    refused(&half, "", &options, &["either both or neither must have a bias"]);
    half.remove("k_layernorm.weight");
    refused(&half, "", &options, &["q_layernorm.weight and k_layernorm.weight must come together"]);
    let mut wide = state;
    wide.insert("q_layernorm.weight", buffer(&[5]));
    refused(&wide, "", &options, &["q_layernorm.weight has 5 values"]);
    // timm: a gate, and norms by their bias.
    let config = plain().gate(true).norm(Some(layer_norm));
    let truth = random(config.clone(), 12);
    let parts = Parts::of(&config, &truth);
    let mut timm = parts.fused(&parts.blocks(), ["qkv", "proj"]);
    parts.rename(&mut timm, "gate_proj", "gate");
    parts.rename(&mut timm, "q_layernorm", "q_norm");
    parts.rename(&mut timm, "k_layernorm", "k_norm");
    same(&under("blocks.0.attn.", &timm), "blocks.0.attn.", &options, &config, &truth);
    timm.insert("norm.weight", buffer(&[12]));
    refused(&timm, "", &options, &["unexpected tensor norm.weight"]);
    // PyTorch's layer has none.
    let mut torch = random(plain(), 13);
    torch.insert("q_norm.weight", buffer(&[3]));
    torch.insert("k_norm.weight", buffer(&[3]));
    refused(&torch, "", &options, &["q_norm.weight [3]", "--norm-epsilon"]);
}

#[test]
fn unknown_tensors_are_named() {
    let options = LoadOptions::new(4);
    let truth = random(plain(), 14);
    for (name, shape, parts) in [
        ("in_proj.bias", &[36][..], &["unexpected tensor in_proj.bias", "is in_proj_bias meant?"][..]),
        ("out_proj.weight_scale", &[12], &["out_proj.weight_scale", "dequantised"]),
        ("lora_A.weight", &[2, 12], &["merge adapters"]),
        ("mlp.fc1.weight", &[2, 12], &["unexpected tensor mlp.fc1.weight"]),
    ] {
        let mut state = truth.clone();
        state.insert(name, buffer(shape));
        refused(&state, "", &options, parts);
    }
    let mut twice = truth.clone();
    twice.insert("q_proj.bias", buffer(&[12]));
    refused(&twice, "", &options, &["in_proj_bias and q_proj.bias"]);
    let mut own = Parts::of(&plain(), &truth).apart(["q_proj", "k_proj", "v_proj", "out_proj"]);
    own.insert("o_proj.weight", buffer(&[12, 12]));
    refused(&own, "", &options, &["two tensors for one"]);
    own.remove("o_proj.weight");
    own.remove("k_proj.weight");
    refused(&own, "", &options, &["no tensor k_proj.weight", "out_proj.bias"]);
    refused(&truth, "", &LoadOptions::new(0), &["at least 1 head"]);
    refused(&truth, "", &LoadOptions::new(5), &["12 columns are not a positive multiple of num_heads = 5"]);
    refused(&truth, "", &options.clone().names(Names::Bert), &["not named as those of an attention layer of bert"]);
    // Grouped heads that do not fit.
    let grouped = random(plain().heads_kv(2), 15);
    refused(&grouped, "", &LoadOptions::new(3), &["with 3 heads"]);
    refused(&grouped, "", &options.clone().heads_kv(4), &["that is 2 key/value heads, not 4"]);
    let mut uneven = grouped;
    uneven.insert("v_proj_weight", buffer(&[3, 12]));
    refused(&uneven, "", &options, &["2 heads of keys and 1 of values"]);
    // The table in T5's first layer.
    let config = plain().bias(false);
    let mut t5 = Parts::of(&config, &random(config.clone(), 16)).apart(["q", "k", "v", "o"]);
    t5.insert("relative_attention_bias.weight", buffer(&[32, 4]));
    refused(&t5, "", &options, &["relative_attention_bias.weight", "Attention::t5_bias"]);
    assert_eq!(load(&t5, "", &options.ignore("relative_attention_bias.weight")).unwrap().config().scale, Some(1.0));
}

/// The bytes of a safetensors file.
fn safetensors(entries: &[(&str, &str, &[usize], Vec<u8>)]) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, dtype, shape, bytes) in entries {
        let start = data.len();
        data.extend(bytes);
        let info = serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": [start, data.len()]});
        header.insert(name.to_string(), info);
    }
    let header = serde_json::Value::Object(header).to_string();
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()
}

fn entry<'a>(name: &'a str, tensor: &'a HostTensor) -> (&'a str, &'static str, &'a [usize], Vec<u8>) {
    (name, "F32", tensor.shape(), tensor.data().iter().flat_map(|x| x.to_le_bytes()).collect())
}

#[test]
fn other_types_keep_their_names() {
    let truth = random(plain(), 17);
    for (name, dtype, bytes) in
        [("in_proj_bias", "I8", 36), ("out_proj.bias", "F8_E4M3", 12), ("out_proj.bias", "I64", 96)]
    {
        let floats = truth.iter().filter(|(known, _)| *known != name).map(|(name, tensor)| entry(name, tensor));
        let shape = truth.get(name).unwrap().shape().to_vec();
        let mut entries: Vec<_> = floats.collect();
        entries.push((name, dtype, &shape, vec![0; bytes]));
        let state = StateDict::from_safetensors(&safetensors(&entries)).unwrap();
        assert_eq!((state.get(name), state.unread(name)), (None, Some((dtype, shape.as_slice()))));
        refused(&state, "", &LoadOptions::new(4), &[name, &format!("is of type {dtype}"), "dequantised"]);
        let message = state.to_safetensors().unwrap_err().to_string();
        assert!(message.contains(name) && message.contains(dtype), "{message}");
        let mut without = state;
        assert!(without.remove(name) && !without.remove(name));
        assert!(without.to_safetensors().is_ok());
    }
}

#[test]
fn shards_and_folders() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (config, options) = (plain(), LoadOptions::new(4));
    let truth = random(config.clone(), 18);
    let parts = Parts::of(&config, &truth);
    let prefix = "encoder.layer.0.attention.";
    let mut model = under(prefix, &parts.apart(["self.query", "self.key", "self.value", "output.dense"]));
    with_neighbours(&mut model, "encoder.layer.0.");
    let mut map = serde_json::Map::new();
    let mut shards: [Vec<_>; 3] = Default::default();
    for (n, (name, tensor)) in model.iter().enumerate() {
        let shard = if name.starts_with(prefix) { n % 2 } else { 2 };
        shards[shard].push(entry(name, tensor));
        map.insert(name.into(), format!("model-{shard}.safetensors").into());
    }
    for (n, shard) in shards.iter().take(2).enumerate() {
        std::fs::write(at(&format!("model-{n}.safetensors")), safetensors(shard)).unwrap();
    }
    let write = |map: &serde_json::Map<String, serde_json::Value>| {
        let json = serde_json::json!({"metadata": {"total_size": 0}, "weight_map": map});
        std::fs::write(at("model.safetensors.index.json"), json.to_string()).unwrap();
    };
    write(&map);
    // The third shard is missing, but it holds nothing of the layer.
    let index = at("model.safetensors.index.json");
    for prefix in [prefix, "encoder.layer.0.attention.self.", "encoder.layer.0.attention"] {
        for path in [index.as_path(), folder.path()] {
            let state = StateDict::open_layer(path, prefix).unwrap();
            same(&state, prefix, &options, &config, &truth);
            assert_eq!(state.unread("encoder.layer.0.mlp.up_proj.weight"), Some(("not read", &[][..])));
        }
    }
    let state = StateDict::open(&index, "encoder.layer.0.attention.").unwrap();
    same(&state, prefix, &options, &config, &truth);
    refused(
        &StateDict::open(&index, "encoder.layer.0.attention.output.").unwrap(),
        prefix,
        &options,
        &["were not read"],
    );
    let say = |error: wgpu_attention::Error, parts: &[&str]| {
        let message = error.to_string();
        parts.iter().for_each(|part| assert!(message.contains(part), "\"{part}\" is not in: {message}"));
    };
    say(StateDict::open(&index, "").unwrap_err(), &["model-2.safetensors"]);
    let mut wrong = map.clone();
    wrong.insert("encoder.layer.0.attention.self.query.gone".into(), "model-0.safetensors".into());
    write(&wrong);
    say(StateDict::open(&index, prefix).unwrap_err(), &["query.gone should be in model-0.safetensors"]);
    for file in ["../model-0.safetensors", "/etc/passwd", "", "."] {
        wrong.insert("encoder.layer.0.attention.self.query.gone".into(), file.into());
        write(&wrong);
        say(StateDict::open(&index, prefix).unwrap_err(), &["is not next to the index"]);
    }
    for text in ["", "[]", "{\"weight_map\": 3}", "{\"weight_map\": {\"a\": 3}}", &"[".repeat(1000)] {
        std::fs::write(&index, text).unwrap();
        say(StateDict::open(&index, "").unwrap_err(), &["weight_map"]);
    }
    // One file: the same values; other tensors only by name and shape.
    let all: Vec<_> = model.iter().map(|(name, tensor)| entry(name, tensor)).collect();
    std::fs::write(at("model.safetensors"), safetensors(&all)).unwrap();
    let state = StateDict::open_layer(folder.path(), prefix).unwrap();
    same(&state, prefix, &options, &config, &truth);
    assert_eq!(state.unread("encoder.layer.0.mlp.up_proj.weight"), Some(("F32", &[2][..])));
    assert_eq!(StateDict::open(at("model.safetensors"), "").unwrap(), model);
    let empty = tempfile::tempdir().unwrap();
    say(StateDict::open(empty.path(), "").unwrap_err(), &["holds no model.safetensors"]);
}

#[test]
fn files_that_are_something_else_say_what() {
    let folder = tempfile::tempdir().unwrap();
    let npz = [&b"PK\x03\x04"[..], &[0; 26], b"q.npy", &[0; 40]].concat();
    let torch = [&b"PK\x03\x04"[..], &[0; 26], b"archive/data.pkl", &[0; 40]].concat();
    for (bytes, part) in [
        (&torch[..], "torch.load"),
        (b"\x80\x02}q\x00X\x06\x00\x00\x00weightq\x01", "torch.load"),
        (&npz, ".npz"),
        (b"GGUF\x03\0\0\0\0\0\0\0", "GGUF"),
        (b"\x89HDF\r\n\x1a\n\0\0\0\0", "HDF5"),
        (b"\x93NUMPY\x01\0v\0{'descr'", "NumPy array"),
        (b"{\"weight_map\": {}}", "index of shards"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"", "8 bytes"),
        (&[255; 64], "not a valid safetensors file"),
    ] {
        let path = folder.path().join("weights.bin");
        std::fs::write(&path, bytes).unwrap();
        let message = StateDict::open(&path, "").unwrap_err().to_string();
        assert!(message.contains(part) && message.contains("weights.bin"), "{message}");
        if !bytes.is_empty() {
            let message = StateDict::from_safetensors(bytes).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
    }
}

#[test]
fn every_naming_scheme_is_parsed() {
    for names in Names::ALL {
        assert_eq!(names.word().parse::<Names>().unwrap(), names);
    }
    assert!("bart".parse::<Names>().unwrap_err().to_string().contains("llama"));
}

/// A Llama layer computes the same as PyTorch's layer without biases.
#[test]
fn a_llama_layer_computes_what_pytorchs_does() {
    let config = plain().bias(false);
    let truth = random(config.clone(), 19);
    let llama = Parts::of(&config, &truth).apart(["q_proj", "k_proj", "v_proj", "o_proj"]);
    let x = Tensor::from_slice(Device::Cpu, &[2, 5, 12], &noise(&mut Pcg64::seed_from_u64(20), 120)).unwrap();
    let run = |state: &StateDict| {
        let layer = load(state, "", &LoadOptions::new(4)).unwrap();
        layer.forward(&x, &x, &x, &Attention::new()).unwrap().output.download().unwrap()
    };
    assert_eq!(run(&llama), run(&truth));
}
