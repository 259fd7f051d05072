// B[b, h, i, j] = factor · X[b, h, i, column of the distance j − i]
// X [b, h, i, column]   columns [j − i + len_q − 1]   B [b, h, i, j], row-major
//
// Biases by distance: ALiBi (X: a slope times each distance), T5 (X: a learned number per bucket), Shaw et al. 2018,
// section 3.3 (X: the query times each relative key). One invocation per query and four keys.

alias YElem = f32;

struct Params {
    x: View,
    y_offset: u32,
    heads: u32,
    // Number of queries.
    len: u32,
    len_k: u32,
    // The entry of `columns` for query 0 and key 0.
    distance_0: u32,
    total: u32,
    factor: f32,
}

@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<YElem>;
@group(0) @binding(3) var<storage, read> columns: array<u32>;

// @use each_element, view, axes, store_four

fn run(at: u32) {
    let fours = (params.len_k + 3u) / 4u;
    let j = at % fours * 4u;
    let row = at / fours;
    let axes = axes_of(row);
    let first = params.distance_0 + j - axes.z;
    // Entries beyond the last key repeat the last one.
    let last = params.distance_0 + params.len_k - 1u - axes.z;
    let column = vec4<u32>(
        columns[first], columns[min(first + 1u, last)], columns[min(first + 2u, last)], columns[min(first + 3u, last)],
    );
    let place = vec4<u32>(row_at(params.x, axes)) + column * params.x.strides.w;
    let value = vec4<f32>(x[place.x], x[place.y], x[place.z], x[place.w]);
    store_four(params.y_offset + row * params.len_k, j, params.len_k, params.factor * value);
}
