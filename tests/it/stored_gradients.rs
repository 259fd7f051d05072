//! The f64 reference against gradients that other implementations computed in float64: PyTorch's attention and layer,
//! packed sequences, transformers' sinks, relative keys and Llama layers.

use std::collections::BTreeMap;

use crate::kit::{Wide, largest};
use wgpu_attention::problem::{Layout, MaskMeaning, Positions, Problem, Rows, WantedGradients};
use wgpu_attention::reference::{
    self, Cotangents, Distance, Inputs, Layer, LayerInputs, Projection, Rotary, Rules, View,
};
use wgpu_attention::{Align, Layout as AnyLayout};
use wgpu_attention_conformance::{Stored, difference, golden_names};

/// How far a result may be from the stored one, relative to the largest of its row. Rows below a millionth of the
/// largest result, such as the gradient of a query that sees a single key, are 0 but for rounding, and judged relative to
/// that millionth.
const BAR: f64 = 1e-9;

/// Gradients that are 0 but for rounding as a whole, because a score that is added to a whole row changes no weight, and a
/// single key or equal keys leave no choice. They must be below [`ZERO`] here and in the case.
const CANCELLED: [(&str, &str); 5] = [
    ("torch/sdpa_len_q257_kv1", "grad_k"),
    ("torch/sdpa_len_q257_kv1", "grad_q"),
    ("torch/sdpa_mask_float_q1", "grad_mask"),
    ("torch/sdpa_num_all_equal", "grad_q"),
    ("transformers/shaw_relative_key_l5", "grad_param.linear_k.bias"),
];
const ZERO: f64 = 1e-13;

/// Results by their names in a case, row-major.
type Results = BTreeMap<String, Vec<f64>>;

fn named<const N: usize>(results: [(&str, Option<Vec<f64>>); N]) -> Results {
    results.into_iter().filter_map(|(name, result)| Some((name.to_string(), result?))).collect()
}

/// Fails if a case has an input, a parameter or a cotangent that its reader does not know.
fn expect_only(case: &Stored, known: &[&str]) {
    for name in case.names("in.").chain(case.names("cot.")) {
        assert!(known.contains(&name), "{}: {name} is not known", case.name);
    }
}

/// The mask of a case, boolean or additive, broadcast to `shape`.
struct Mask {
    bools: Option<Vec<bool>>,
    floats: Vec<f64>,
    layout: AnyLayout,
}

impl Mask {
    fn new(case: &Stored, name: &str, own_shape: &[usize], shape: &[usize]) -> Mask {
        let layout = Layout::contiguous(own_shape).unwrap().broadcast_to(shape).unwrap();
        Mask { bools: case.bools(name), floats: case.need(name).data.clone(), layout }
    }

    fn add<'a>(&'a self, meaning: MaskMeaning, rules: &mut Rules<'a>) {
        match &self.bools {
            Some(data) => rules.masks.push((View { data, layout: &self.layout }, meaning)),
            None => rules.biases.push(View { data: &self.floats, layout: &self.layout }),
        }
    }
}

fn root(dim: usize) -> f64 {
    1.0 / (dim as f64).sqrt()
}

/// `scaled_dot_product_attention`.
fn sdpa(case: &Stored) -> Results {
    expect_only(case, &["in.q", "in.k", "in.v", "in.attn_mask", "cot.out"]);
    // Leading axes are one batch axis.
    let [q, k, v, output] = ["in.q", "in.k", "in.v", "cot.out"].map(|name| {
        let x = case.need(name);
        let (lead, tail) = x.shape().split_at(x.shape().len() - 3);
        x.reshaped(&[lead.iter().product(), tail[0], tail[1], tail[2]])
    });
    let positions = Positions { causal: case.flag("is_causal_top_left"), ..Positions::default() };
    let problem = Problem::new(q.shape(), k.shape(), v.shape(), None, None, &positions, 0).unwrap();
    let mask = case.tensor("in.attn_mask");
    let mask = mask.map(|mask| Mask::new(case, "in.attn_mask", mask.shape(), &problem.mask_shape()));
    let mut inputs = Inputs::new(q.view(), k.view(), v.view());
    inputs.rules.scale = case.get("scale").as_f64().or(Some(root(problem.dim_k)));
    inputs.rules.softcap = case.get("softcap").as_f64();
    if let Some(mask) = &mask {
        mask.add(MaskMeaning::Keep, &mut inputs.rules);
    }
    let outputs = reference::attention(&problem, &inputs);
    let cotangents = Cotangents { output: Some(output.view()), ..Cotangents::default() };
    let all = reference::backward(&problem, &inputs, &outputs, &cotangents, WantedGradients::ALL);
    let mask = all.biases.and_then(|mut biases| biases.pop());
    named([
        ("out", Some(outputs.output)),
        ("lse", Some(outputs.lse)),
        ("weights", Some(outputs.weights)),
        ("grad_q", all.q),
        ("grad_k", all.k),
        ("grad_v", all.v),
        ("grad_mask", mask),
    ])
}

/// Packed sequences, `[total, heads, dim]`.
fn varlen(case: &Stored) -> Results {
    expect_only(case, &["in.q", "in.k", "in.v", "in.cu_seqlens_q", "in.cu_seqlens_k", "cot.out"]);
    let heads_first = |name: &str| {
        let x = case.need(name);
        let shape: Vec<usize> = [1].iter().chain(x.shape()).copied().collect();
        x.reshaped(&shape).permuted(&[0, 2, 1, 3])
    };
    let [q, k, v, output] = ["in.q", "in.k", "in.v", "cot.out"].map(heads_first);
    let (causal, align) = match case.get("causal").as_str() {
        None => (false, Align::TopLeft),
        Some("bottom_right") => (true, Align::BottomRight),
        Some("top_left") => (true, Align::TopLeft),
        Some(other) => panic!("{}: the causal alignment {other} is not known", case.name),
    };
    let starts = |name: &str| -> Vec<usize> { case.need(name).data.iter().map(|&start| start as usize).collect() };
    let (starts_q, starts_k) = (starts("in.cu_seqlens_q"), starts("in.cu_seqlens_k"));
    let (total_q, total_k) = (q.shape()[2], k.shape()[2]);
    let positions = Positions { causal, align, ..Positions::default() };
    let sequences = positions.sequences(&starts_q, &starts_k, total_q, total_k).unwrap();
    let problem = Problem::new(q.shape(), k.shape(), v.shape(), None, None, &Positions::default(), 0).unwrap();
    let mut inputs = Inputs::new(q.view(), k.view(), v.view());
    inputs.rules.scale = Some(root(problem.dim_k));
    let outputs = reference::attention_packed(&problem, &inputs, &sequences);
    let cotangents = Cotangents { output: Some(output.view()), ..Cotangents::default() };
    let all = reference::backward_packed(&problem, &inputs, &sequences, &cotangents, WantedGradients::ALL);
    let tokens_first =
        |x: Option<Vec<f64>>, like: &Wide| Some(Wide::new(like.shape(), x?).permuted(&[0, 2, 1, 3]).row_major());
    named([
        ("out", tokens_first(Some(outputs.output), &output)),
        ("lse", Some(outputs.lse)),
        ("grad_q", tokens_first(all.q, &q)),
        ("grad_k", tokens_first(all.k, &k)),
        ("grad_v", tokens_first(all.v, &v)),
    ])
}

/// Attention with a sink per head; the output is `[batch, len, heads, dim]`.
fn sink_attention(case: &Stored) -> Results {
    expect_only(case, &["in.q", "in.k", "in.v", "in.sinks", "in.mask", "cot.out"]);
    let [q, k, v, sinks] = ["in.q", "in.k", "in.v", "in.sinks"].map(|name| case.need(name));
    let problem = Problem::new(q.shape(), k.shape(), v.shape(), None, None, &Positions::default(), 0).unwrap();
    let mask = case.tensor("in.mask");
    let mask = mask.map(|mask| {
        let layout = mask.layout.broadcast_to(&problem.mask_shape()).unwrap();
        Wide { data: mask.data.clone(), layout }
    });
    let mut inputs = Inputs::new(q.view(), k.view(), v.view());
    inputs.rules.scale = Some(root(problem.dim_k));
    inputs.rules.sink = Some(sinks.view());
    inputs.rules.biases.extend(mask.as_ref().map(Wide::view));
    let outputs = reference::attention(&problem, &inputs);
    let output = case.need("cot.out").permuted(&[0, 2, 1, 3]);
    let cotangents = Cotangents { output: Some(output.view()), ..Cotangents::default() };
    let all = reference::backward(&problem, &inputs, &outputs, &cotangents, WantedGradients::ALL);
    let tokens_first = Wide::new(output.shape(), outputs.output).permuted(&[0, 2, 1, 3]).row_major();
    named([
        ("out", Some(tokens_first)),
        ("weights", Some(outputs.weights)),
        ("grad_q", all.q),
        ("grad_k", all.k),
        ("grad_v", all.v),
        ("grad_sinks", all.sink),
    ])
}

/// A projection of a layer whose weight and bias have these names.
fn linear<'a>(case: &'a Stored, name: &str) -> Projection<'a> {
    let bias = case.tensor(&format!("param.{name}.bias")).map(Wide::view);
    Projection { weight: case.need(&format!("param.{name}.weight")).view(), bias }
}

/// `nn.MultiheadAttention`; a true mask entry means masked out.
fn mha(case: &Stored) -> Results {
    expect_only(
        case,
        &["in.query", "in.key", "in.value", "in.attn_mask", "in.key_padding_mask", "cot.out", "cot.weights"],
    );
    let (is_unbatched, is_self) = (case.flag("unbatched"), case.flag("self_attention"));
    let order: [usize; 3] = if case.flag("batch_first") || is_unbatched { [0, 1, 2] } else { [1, 0, 2] };
    // As [batch, len, dim].
    let batched = |x: &Wide| match *x.shape() {
        [len, dim] => x.reshaped(&[1, len, dim]),
        _ => x.permuted(&order),
    };
    let inputs = ["in.query", "in.key", "in.value"];
    let [query, key, value] = inputs.map(|name| batched(case.need(if is_self { "in.query" } else { name })));
    let (batch, len_q, len_k) = (query.shape()[0], query.shape()[1], key.shape()[1]);
    let (heads, width) = (case.count("num_heads"), case.count("embed_dim"));
    let packed = case.tensor("param.in_proj_weight");
    let weights = [0, 1, 2].map(|n| match packed {
        Some(all) => all.rows(n * width, width),
        None => case.need(["param.q_proj_weight", "param.k_proj_weight", "param.v_proj_weight"][n]).clone(),
    });
    let biases = [0, 1, 2].map(|n| Some(case.tensor("param.in_proj_bias")?.rows(n * width, width)));
    let bias_kv = ["param.bias_k", "param.bias_v"].map(|name| Some(case.tensor(name)?.reshaped(&[width])));
    let layer = Layer {
        heads: [heads, heads],
        projections: [0, 1, 2]
            .map(|n| Projection { weight: weights[n].view(), bias: biases[n].as_ref().map(Wide::view) }),
        out: linear(case, "out_proj"),
        gate: None,
        norms: None,
        bias_kv: bias_kv[0].as_ref().zip(bias_kv[1].as_ref()).map(|(key, value)| [key.view(), value.view()]),
        zero_attn: case.flag("add_zero_attn"),
    };
    let positions = Positions::default();
    let full = [batch, heads, len_q, len_k];
    let attn_mask = case.tensor("in.attn_mask").map(|mask| {
        // Three axes are [batch · heads, len_q, len_k].
        let own = if mask.shape().len() == 3 { full.to_vec() } else { mask.shape().to_vec() };
        Mask::new(case, "in.attn_mask", &own, &full)
    });
    // With a mask, is_causal is only a hint about the mask.
    assert!(attn_mask.is_some() || !case.flag("is_causal"), "{}", case.name);
    let padding = case.tensor("in.key_padding_mask");
    let padding = padding.map(|_| Mask::new(case, "in.key_padding_mask", &[batch, 1, 1, len_k], &full));
    let mut rules = Rules { scale: Some(root(width / heads)), ..Rules::default() };
    for mask in attn_mask.iter().chain(&padding) {
        mask.add(MaskMeaning::Hide, &mut rules);
    }
    let inputs =
        LayerInputs { query: query.view(), key: key.view(), value: value.view(), positions: &positions, rules };
    let outputs = reference::layer(&layer, &inputs);
    let output = batched(case.need("cot.out"));
    let all_keys = outputs.weights_shape[3];
    let is_averaged = case.flag("average_attn_weights");
    let weights_shape: &[usize] =
        if is_averaged { &[batch, len_q, all_keys] } else { &[batch, heads, len_q, all_keys] };
    let d_weights = case.tensor("cot.weights").map(|weights| weights.reshaped(weights_shape));
    let cotangents = Cotangents { output: Some(output.view()), lse: None, weights: d_weights.as_ref().map(Wide::view) };
    let all = reference::layer_backward(&layer, &inputs, &cotangents);

    // As the case has its axes.
    let placed = |x: Vec<f64>, like: &Wide| Wide::new(like.shape(), x).permuted(&order).row_major();
    let square = len_q * all_keys;
    let mean = |at: usize| {
        let of = |h: usize| outputs.attended.weights[(at / square * heads + h) * square + at % square];
        (0..heads).map(of).sum::<f64>() / heads as f64
    };
    let returned = if is_averaged { (0..batch * square).map(mean).collect() } else { outputs.attended.weights.clone() };
    let sum = |parts: [&Vec<f64>; 3]| (0..parts[0].len()).map(|at| parts.iter().map(|part| part[at]).sum()).collect();
    let mut results = Results::new();
    let mut add = |name: &str, values: Vec<f64>| drop(results.insert(name.into(), values));
    add("out", placed(outputs.output, &output));
    if case.flag("need_weights") {
        add("weights", returned);
    }
    if is_self {
        add("grad_query", placed(sum([&all.query, &all.key, &all.value]), &query));
    } else {
        add("grad_query", placed(all.query, &query));
        add("grad_key", placed(all.key, &key));
        add("grad_value", placed(all.value, &value));
    }
    let [q, k, v] = all.projections;
    if packed.is_some() {
        add("grad_param.in_proj_weight", [q.weight, k.weight, v.weight].concat());
    } else {
        for (name, part) in [("q", q.weight), ("k", k.weight), ("v", v.weight)] {
            add(&format!("grad_param.{name}_proj_weight"), part);
        }
    }
    if biases[0].is_some() {
        add("grad_param.in_proj_bias", [q.bias, k.bias, v.bias].concat());
    }
    add("grad_param.out_proj.weight", all.out.weight);
    if layer.out.bias.is_some() {
        add("grad_param.out_proj.bias", all.out.bias);
    }
    for (name, part) in ["grad_param.bias_k", "grad_param.bias_v"].into_iter().zip(all.bias_kv.into_iter().flatten()) {
        add(name, part);
    }
    results
}

/// Llama's attention: grouped heads, rotary positions, causal, optionally with a window.
fn llama_attention(case: &Stored) -> Results {
    let positions = Positions {
        causal: case.flag("causal"),
        // The case counts the query's own key.
        window_left: case.get("sliding_window").as_u64().map(|window| window as usize - 1),
        ..Positions::default()
    };
    let (len, dim) = (case.need("in.x").shape()[1], case.count("head_dim"));
    let base = case.get("rope_theta").as_f64().unwrap();
    let angles = (0..len * dim / 2).map(|at| {
        let (position, pair) = (at / (dim / 2), at % (dim / 2));
        position as f64 * base.powf(-2.0 * pair as f64 / dim as f64)
    });
    let angles: Vec<f64> = angles.collect();
    let [cos, sin] =
        [f64::cos, f64::sin].map(|f| Wide::new(&[len, dim / 2], angles.iter().map(|&angle| f(angle)).collect()));
    let rules = Rules {
        scale: Some(root(dim)),
        rotary: Some(Rotary {
            cos: cos.view(),
            sin: sin.view(),
            interleaved: false,
            rows: [Rows::From(0), Rows::From(0)],
        }),
        ..Rules::default()
    };
    let names = ["q_proj", "k_proj", "v_proj", "o_proj"];
    self_attention(case, [case.count("Hq"), case.count("Hkv")], names, &positions, rules)
}

/// Attention with the relative keys of Shaw et al.
fn shaw_relative_key(case: &Stored) -> Results {
    let keys = case.need("param.distance_embedding.weight");
    let left = case.count("left_max");
    assert_eq!(keys.shape()[0], left + case.count("right_max") + 1, "{}", case.name);
    let rules = Rules {
        scale: Some(root(keys.shape()[1])),
        distance: Some(Distance::Shaw { keys: keys.view(), left }),
        ..Rules::default()
    };
    let names = ["linear_q", "linear_k", "linear_v", "linear_out"];
    self_attention(case, [case.count("heads"); 2], names, &Positions::default(), rules)
}

/// A layer over one input, whose projections have these names.
fn self_attention(
    case: &Stored,
    heads: [usize; 2],
    names: [&str; 4],
    positions: &Positions,
    rules: Rules<'_>,
) -> Results {
    expect_only(case, &["in.x", "cot.out"]);
    let [q, k, v, out] = names.map(|name| linear(case, name));
    let layer = Layer { heads, projections: [q, k, v], out, gate: None, norms: None, bias_kv: None, zero_attn: false };
    let x = case.need("in.x").view();
    let inputs = LayerInputs { query: x, key: x, value: x, positions, rules };
    let outputs = reference::layer(&layer, &inputs);
    let cotangents = Cotangents { output: Some(case.need("cot.out").view()), ..Cotangents::default() };
    let all = reference::layer_backward(&layer, &inputs, &cotangents);
    let parts = all.query.iter().zip(&all.key).zip(&all.value);
    let mut results = named([
        ("out", Some(outputs.output)),
        ("weights", Some(outputs.attended.weights)),
        ("grad_x", Some(parts.map(|((query, key), value)| query + key + value).collect())),
        ("grad_param.distance_embedding.weight", all.attention.distance),
    ]);
    let projections = layer.projections.into_iter().chain([layer.out]);
    for ((name, part), own) in names.into_iter().zip(all.projections.into_iter().chain([all.out])).zip(projections) {
        results.insert(format!("grad_param.{name}.weight"), part.weight);
        if own.bias.is_some() {
            results.insert(format!("grad_param.{name}.bias"), part.bias);
        }
    }
    results
}

/// The largest difference from the stored results, relative to the largest of its row, and its name. Every stored result
/// must be computed.
fn worst(case: &Stored, results: &Results) -> (f64, String) {
    let mut worst = (0.0, String::new());
    for full in case.names("ref64.") {
        let (name, stored) = (&full["ref64.".len()..], case.need(full));
        let Some(got) = results.get(name) else { panic!("{}: {full} is not computed", case.name) };
        assert_eq!(got.len(), stored.data.len(), "{}: {full}", case.name);
        if CANCELLED.contains(&(&case.name, name)) {
            assert!(got.iter().chain(&stored.data).all(|x| x.abs() < ZERO), "{}: {full} is not 0", case.name);
            continue;
        }
        let width = stored.shape().last().copied().unwrap_or(1).max(1);
        let least = (1e-6 * largest(&stored.data)).max(f64::MIN_POSITIVE);
        for (n, (got, expected)) in got.chunks(width).zip(stored.data.chunks(width)).enumerate() {
            for (&x, &e) in got.iter().zip(expected) {
                let off = difference(x, e) / largest(expected).max(least);
                // NaN cannot be: `difference` gives 0 or ∞ for it.
                if off > worst.0 {
                    worst = (off, format!("{name}, row {n}: {x} instead of {e}"));
                }
            }
        }
    }
    worst
}

#[test]
fn stored_gradients_are_reproduced() {
    let mut counts = BTreeMap::new();
    let mut largest_of = BTreeMap::new();
    let mut failures = Vec::new();
    for name in golden_names() {
        let case = match name.split_once('/') {
            Some(("torch" | "transformers", _)) => Stored::read(&name),
            _ => continue,
        };
        if case.names("ref64.grad_").next().is_none() {
            continue;
        }
        let op = case.get("op").as_str().unwrap().to_string();
        let results = match op.as_str() {
            "sdpa" => sdpa(&case),
            "varlen" => varlen(&case),
            "mha" => mha(&case),
            "sink_attention" => sink_attention(&case),
            "llama_attention" => llama_attention(&case),
            "shaw_relative_key" => shaw_relative_key(&case),
            other => panic!("{name}: the op {other} is not known"),
        };
        let (off, what) = worst(&case, &results);
        if off > BAR {
            failures.push(format!("{name}: off by {off:.1e}: {what}"));
        }
        *counts.entry(op.clone()).or_insert(0) += 1;
        let largest = largest_of.entry(op).or_insert((0.0, String::new()));
        if off > largest.0 {
            *largest = (off, format!("{name}, {what}"));
        }
        // One number off by more than the bar is noticed.
        let mut wrong = results;
        let gradient = case.names("ref64.grad_").last().unwrap()["ref64.".len()..].to_string();
        let values = wrong.get_mut(&gradient).unwrap();
        let most = (0..values.len()).max_by(|&a, &b| values[a].abs().total_cmp(&values[b].abs())).unwrap();
        values[most] = values[most] * (1.0 + 1e-8) + 1e-300;
        assert!(worst(&case, &wrong).0 > BAR, "{name}: {gradient}");
    }
    for (op, (off, what)) in &largest_of {
        println!("{op}: at most {off:.1e} of a row: {what}");
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    let counts: Vec<(&str, i32)> = counts.iter().map(|(op, &n)| (op.as_str(), n)).collect();
    assert_eq!(
        counts,
        [
            ("llama_attention", 3),
            ("mha", 30),
            ("sdpa", 60),
            ("shaw_relative_key", 1),
            ("sink_attention", 3),
            ("varlen", 4)
        ]
    );
}
