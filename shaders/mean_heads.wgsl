// A[b, i, j] = Σ_h P[b, h, i, j] / heads_q
// P [b, h, i, j]   A [b, i, j]
//
// Heads are summed in order; a call on a slice of the heads adds to the result of the slices before it.

const ACCUMULATE: bool = false;

struct Params {
    // In vec4s; A has no heads.
    p: View,
    a: View,
    heads: u32,
    len_q: u32,
    width4: u32,
    total: u32,
    factor: f32,
}

@group(0) @binding(1) var<storage, read> p: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> a: array<vec4<f32>>;

// @use each_element, view

fn run(at: u32) {
    let j = at % params.width4;
    let i = (at / params.width4) % params.len_q;
    let axes = vec3<u32>(at / (params.width4 * params.len_q), 0u, i);
    let first = row_at(params.p, axes) + j;
    // The bound is more than a parameter; see README.md.
    let heads = select(0u, params.heads, i < params.len_q);
    var sum = vec4<f32>();
    for (var h = 0u; h < heads; h++) {
        sum += p[first + h * params.p.strides.y];
    }
    let here = row_at(params.a, axes) + j;
    if (ACCUMULATE) {
        a[here] += sum * params.factor;
    } else {
        a[here] = sum * params.factor;
    }
}
