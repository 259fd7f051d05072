// A[b, i, j] = Σ_h P[b, h, i, j] / heads_q
// P [b, h, i, j]   A [b, i, j]
//
// Heads are summed in order; a call on a slice of the heads adds to what the slices before it gave.

const WORKGROUP: u32 = 64u;
const ACCUMULATE: bool = false;

struct Params {
    // In vec4s: batch, head, row.
    p_strides: vec4<u32>,
    a_strides: vec4<u32>,
    p_offset4: u32,
    a_offset4: u32,
    heads: u32,
    len_q: u32,
    width4: u32,
    total: u32,
    workgroups: u32,
    factor: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> p: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> a: array<vec4<f32>>;

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let index = workgroup.y * workgroups.x + workgroup.x;
    let at = index * WORKGROUP + local;
    if (index >= params.workgroups || at >= params.total) {
        return;
    }
    let j = at % params.width4;
    let i = (at / params.width4) % params.len_q;
    let b = at / (params.width4 * params.len_q);
    let first = params.p_offset4 + b * params.p_strides.x + i * params.p_strides.z + j;
    // A bound that is more than a parameter: see README.md.
    let heads = select(0u, params.heads, at < params.total);
    var sum = vec4<f32>();
    for (var h = 0u; h < heads; h++) {
        sum += p[first + h * params.p_strides.y];
    }
    let here = params.a_offset4 + b * params.a_strides.x + i * params.a_strides.z + j;
    if (ACCUMULATE) {
        a[here] += sum * params.factor;
    } else {
        a[here] = sum * params.factor;
    }
}
