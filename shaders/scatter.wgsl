// Y[b, h, (to + i) mod rows, d] = X[b, h, from + i, d] for i < count, with (from, to, count) of each b
// X [b, h, i, d]   Y [b, h, rows, d], rows padded to whole vec4s
//
// Appends to a cache of keys or values, writes over its rows (ONNX's TensorScatter) and moves them to
// another buffer. One invocation per row and four columns.

const WORKGROUP: u32 = 64u;

alias XElem = f32;
alias YElem = vec4<f32>;

struct Params {
    x_strides: vec4<u32>,
    y_strides: vec4<u32>,
    x_offset: u32,
    y_offset: u32,
    heads: u32,
    // The largest count.
    len: u32,
    dim: u32,
    rows: u32,
    place_0: u32,
    total: u32,
    workgroups: u32,
    pad_0: u32,
    pad_1: u32,
    pad_2: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<XElem>;
@group(0) @binding(2) var<storage, read_write> y: array<YElem>;
@group(0) @binding(3) var<storage, read> places: array<vec4<u32>>;

// @use load(x dim false w)

// @use store_fours

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
    let dim4 = (params.dim + 3u) / 4u;
    let row = at / dim4;
    let i = row % params.len;
    let h = row / params.len % params.heads;
    let b = row / params.len / params.heads;
    let place = places[params.place_0 + b];
    if (i >= place.z) {
        return;
    }
    let x_at = params.x_offset + dot(params.x_strides.xyz, vec3<u32>(b, h, place.x + i));
    let y_at = params.y_offset + dot(params.y_strides.xyz, vec3<u32>(b, h, (place.y + i) % params.rows));
    store_y(y_at, at % dim4, load_x(x_at, at % dim4));
}
