// Y[b, i, d] = X[b, i, d] · σ(G[b, i, d]),  σ(g) = 1 / (1 + exp(−g))
// X, G [b, i, d], any strides   Y [b, i, d], row-major
//
// The gate of a layer (Qiu et al. 2025, "Gated Attention for Large Language Models"; Keras's use_gate): X is what
// the heads attended to, before the output projection, G a projection of the query. One invocation per token and
// four columns.

const WORKGROUP: u32 = 64u;

alias XElem = f32;
alias GElem = f32;
alias YElem = f32;

struct Params {
    x_strides: vec3<u32>,
    x_offset: u32,
    g_strides: vec3<u32>,
    g_offset: u32,
    y_offset: u32,
    len: u32,
    dim: u32,
    total: u32,
    workgroups: u32,
    not_a_number: u32,
    pad_0: u32,
    pad_1: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<XElem>;
@group(0) @binding(2) var<storage, read_write> y: array<YElem>;
@group(0) @binding(3) var<storage, read> g: array<GElem>;

// @use load(x dim false z)

// @use load(g dim false z)

// @use store_four

const LOG2_E: f32 = 1.4426950408889634;

// In base 2, where drivers are exact; the bounds keep ∞ out. NaN is told by its bits.
fn sigmoid(g4: vec4<f32>) -> vec4<f32> {
    let is_nan = (bitcast<vec4<u32>>(g4) & vec4<u32>(0x7fffffffu)) > vec4<u32>(0x7f800000u);
    let value = 1.0 / (1.0 + exp2(clamp(g4 * -LOG2_E, vec4<f32>(-126.0), vec4<f32>(126.0))));
    return select(value, vec4<f32>(bitcast<f32>(params.not_a_number)), is_nan);
}

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let index = workgroup.y * workgroups.x + workgroup.x;
    let flat = index * WORKGROUP + local;
    if (index >= params.workgroups || flat >= params.total) {
        return;
    }
    let dim4 = (params.dim + 3u) / 4u;
    let d4 = flat % dim4;
    let token = flat / dim4;
    let place = vec2<u32>(token / params.len, token % params.len);
    let x4 = load_x(params.x_offset + dot(params.x_strides.xy, place), d4);
    let g4 = load_g(params.g_offset + dot(params.g_strides.xy, place), d4);
    store_four(params.y_offset + token * params.dim, d4 * 4u, params.dim, x4 * sigmoid(g4));
}
