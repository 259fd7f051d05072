// Y[b, h, (to + i) mod rows, d] = X[b, h, from + i, d] for i < count, with (from, to, count) of each b
// X [b, h, i, d]   Y [b, h, rows, d], rows padded to whole vec4s
//
// Appends to a cache of keys or values, overwrites its rows (ONNX's TensorScatter) and moves them to another buffer.
// One invocation per row and four columns.

alias XElem = f32;
alias YElem = vec4<f32>;

struct Params {
    x: View,
    y: View,
    heads: u32,
    // The largest count.
    len: u32,
    dim: u32,
    rows: u32,
    place_0: u32,
    total: u32,
}

@group(0) @binding(1) var<storage, read> x: array<XElem>;
@group(0) @binding(2) var<storage, read_write> y: array<YElem>;
@group(0) @binding(3) var<storage, read> places: array<vec4<u32>>;

// @use each_element, view, axes, load(x dim false), store_fours(y to_f32)

fn run(at: u32) {
    let dim4 = (params.dim + 3u) / 4u;
    let axes = axes_of(at / dim4);
    let place = places[params.place_0 + axes.x];
    if (axes.z >= place.z) {
        return;
    }
    let x_at = row_at(params.x, vec3<u32>(axes.xy, place.x + axes.z));
    let y_at = row_at(params.y, vec3<u32>(axes.xy, (place.y + axes.z) % params.rows));
    store_y(y_at, at % dim4, load_x(x_at, at % dim4));
}
