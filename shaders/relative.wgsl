// B[b, h, i, j] = factor · X[b, h, i, column of the distance j − i]
// X [b, h, i, column]   columns [j − i + len_q − 1]   B [b, h, i, j], row-major
//
// Biases by distance: ALiBi (X: a slope times each distance), T5 (X: a learned number per bucket), Shaw et al.
// 2018, section 3.3 (X: the query times each relative key). One invocation per query and four keys.

const WORKGROUP: u32 = 64u;

alias YElem = f32;

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
@group(0) @binding(2) var<storage, read_write> y: array<YElem>;
@group(0) @binding(3) var<storage, read> columns: array<u32>;

// @use store_four

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
    let fours = (params.len_k + 3u) / 4u;
    let j = flat % fours * 4u;
    let row = flat / fours;
    let i = row % params.len_q;
    let h = row / params.len_q % params.heads;
    let b = row / params.len_q / params.heads;
    let at = params.x_offset + dot(params.x_strides.xyz, vec3<u32>(b, h, i));
    let first = params.distance_0 + j - i;
    // Behind the last key the last one stands in.
    let last = params.distance_0 + params.len_k - 1u - i;
    let column = vec4<u32>(
        columns[first], columns[min(first + 1u, last)], columns[min(first + 2u, last)], columns[min(first + 3u, last)],
    );
    let place = vec4<u32>(at) + column * params.x_strides.w;
    let value = vec4<f32>(x[place.x], x[place.y], x[place.z], x[place.w]);
    store_four(params.y_offset + row * params.len_k, j, params.len_k, params.factor * value);
}
