// Y[b, i, d] = X[b, i, d] · σ(G[b, i, d]),  σ(g) = 1 / (1 + exp(−g))
// X, G [b, i, d], any strides   Y [b, i, d], row-major
//
// The gate of a layer (Qiu et al. 2025, "Gated Attention for Large Language Models"; Keras's use_gate): X is what
// the heads attended to, before the output projection, G a projection of the query. One invocation per token and
// four columns.

alias XElem = f32;
alias GElem = f32;
alias YElem = f32;

struct Params {
    x: View,
    g: View,
    y_offset: u32,
    // One head.
    heads: u32,
    len: u32,
    dim: u32,
    total: u32,
    not_a_number: u32,
}

@group(0) @binding(1) var<storage, read> x: array<XElem>;
@group(0) @binding(2) var<storage, read_write> y: array<YElem>;
@group(0) @binding(3) var<storage, read> g: array<GElem>;

// @use each_element, view, axes, load(x dim false), load(g dim false), store_four

const LOG2_E: f32 = 1.4426950408889634;

// In base 2, where drivers are exact; the bounds keep ∞ out. NaN is told by its bits.
fn sigmoid(g4: vec4<f32>) -> vec4<f32> {
    let is_nan = (bitcast<vec4<u32>>(g4) & vec4<u32>(0x7fffffffu)) > vec4<u32>(0x7f800000u);
    let value = 1.0 / (1.0 + exp2(clamp(g4 * -LOG2_E, vec4<f32>(-126.0), vec4<f32>(126.0))));
    return select(value, vec4<f32>(bitcast<f32>(params.not_a_number)), is_nan);
}

fn run(at: u32) {
    let dim4 = (params.dim + 3u) / 4u;
    let d4 = at % dim4;
    let token = at / dim4;
    let axes = axes_of(token);
    let gated = load_x(row_at(params.x, axes), d4) * sigmoid(load_g(row_at(params.g, axes), d4));
    store_four(params.y_offset + token * params.dim, d4 * 4u, params.dim, gated);
}
