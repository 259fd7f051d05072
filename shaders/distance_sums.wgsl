// Y[b, h, i, c] = factor · Σ_j X[b, h, i, j] over the keys whose distance from the query has column c
// X: dX [b, h, i, j]   Y [b, h, i, c]   columns: that of each distance, then the positions of the first queries
//
// The gradients of biases by distance: of T5's buckets, of relative keys, and of ALiBi's slopes, where each pair counts
// with its negated distance. One invocation per query and column.

// True for one column, whose pairs are weighed by their negated distance.
const SLOPES: bool = false;
// Numbers that are summed before they are added to the rest: longer sums lose digits.
const SUMMED: u32 = 64u;

struct Params {
    x: View,
    y: View,
    heads: u32,
    len: u32,
    keys: u32,
    columns: u32,
    // The smallest and the largest distance; others count as these.
    low: i32,
    high: i32,
    // Where the positions of the first queries are in `columns`.
    offsets: u32,
    offset_stride: u32,
    total: u32,
    factor: f32,
}

@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
@group(0) @binding(3) var<storage, read> columns: array<u32>;

// @use each_element, view, axes

fn run(at: u32) {
    let axes = axes_of(at / params.columns);
    let column = at % params.columns;
    let stands = i32(axes.z) + bitcast<i32>(columns[params.offsets + axes.x * params.offset_stride]);
    let first_at = row_at(params.x, axes);
    // The bound is more than a parameter; see README.md.
    let keys = select(0u, params.keys, axes.z < params.len);
    var sum = 0.0;
    for (var first = 0u; first < keys; first += SUMMED) {
        var part = 0.0;
        for (var j = first; j < min(first + SUMMED, keys); j++) {
            let distance = i32(j) - stands;
            let value = x[first_at + j * params.x.strides.w];
            if (SLOPES) {
                part -= f32(abs(distance)) * value;
            } else {
                let here = columns[u32(clamp(distance, params.low, params.high) - params.low)];
                part += select(0.0, value, here == column);
            }
        }
        sum += part;
    }
    y[row_at(params.y, axes) + column * params.y.strides.w] = params.factor * sum;
}
