// Y[b, i, d] = X[b, i, d] + Z[row of token i of b, d], or X[b, i, d] · σ(Z[b, i, d]),  σ(z) = 1 / (1 + exp(−z))
// X [b, i, d], any strides   Z [row, d] or [b, i, d], any strides   Y [b, i, d], row-major
//
// Adds positions (Vaswani et al. 2017, section 3.5), or applies a layer's gate (Qiu et al. 2025, "Gated Attention for
// Large Language Models"; Keras's use_gate): X is the heads' results before the output projection, Z a projection of
// the query. One invocation per token and four columns.

alias XElem = f32;
alias ZElem = f32;
alias YElem = f32;

struct Params {
    x: View,
    z: View,
    y_offset: u32,
    // One head.
    heads: u32,
    len: u32,
    dim: u32,
    row_0: u32,
    rows_batch_stride: u32,
    total: u32,
    not_a_number: u32,
}

@group(0) @binding(1) var<storage, read> x: array<XElem>;
@group(0) @binding(2) var<storage, read_write> y: array<YElem>;
@group(0) @binding(3) var<storage, read> z: array<ZElem>;

// @use each_element, view, axes, row_of, load(x dim false), load(z dim false), sigmoid, store_four

fn run(at: u32) {
    let dim4 = (params.dim + 3u) / 4u;
    let d4 = at % dim4;
    let token = at / dim4;
    let axes = axes_of(token);
    let x4 = load_x(row_at(params.x, axes), d4);
    let z4 = load_z(row_at(params.z, vec3<u32>(axes.xy, row_of(axes.x, axes.z))), d4);
    // @block combined
    let combined = x4 + z4;
    // @end
    store_four(params.y_offset + token * params.dim, d4 * 4u, params.dim, combined);
}
