// B[b, h, i, j] = factor · X[b, h, i, column of the distance j − i]
// X [b, h, i, column]   columns [j − i + len_q − 1]   B [b, h, i, j], row-major
//
// Biases by distance: ALiBi (X: a slope times each distance), T5 (X: a learned number per bucket), Shaw et al.
// 2018, section 3.3 (X: the query times each relative key). One invocation per element.

const WORKGROUP: u32 = 64u;

struct Params {
    x_strides: vec4<u32>,
    x_offset: u32,
    y_offset: u32,
    heads: u32,
    len_q: u32,
    len_k: u32,
    // The entry of `columns` for query 0 and key 0.
    distance_0: u32,
    total: u32,
    workgroups: u32,
    factor: f32,
    pad_0: u32,
    pad_1: u32,
    pad_2: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
@group(0) @binding(3) var<storage, read> columns: array<u32>;

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
    let j = flat % params.len_k;
    let row = flat / params.len_k;
    let i = row % params.len_q;
    let h = row / params.len_q % params.heads;
    let b = row / params.len_q / params.heads;
    let column = columns[params.distance_0 + j - i];
    let at = params.x_offset + dot(params.x_strides, vec4<u32>(b, h, i, column));
    y[params.y_offset + flat] = params.factor * x[at];
}
