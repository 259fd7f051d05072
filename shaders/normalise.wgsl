// Y[r] = (X[r] − m) / √(s + ε) · w + b, over the last axis of every row r
// X [a, b, c, d], any strides   w, b [d]   Y [a, b, c, d], row-major
//   RMSNorm (Zhang and Sennrich 2019):  m = 0            s = mean of X[r]²
//   LayerNorm (Ba et al. 2016):         m = mean of X[r]  s = mean of (X[r] − m)²
//
// The norms of queries and keys in a layer. LANES invocations share a row; 1 on CPU adapters unless the row is wide,
// because there a barrier costs more than it saves.

const LANES: u32 = 64u;
// True for LayerNorm.
const CENTRED: bool = true;

const_assert WORKGROUP % LANES == 0u;

alias XElem = f32;
alias YElem = f32;

struct Params {
    x: View,
    w: View,
    bias: View,
    y_offset: u32,
    heads: u32,
    len: u32,
    dim: u32,
    rows: u32,
    workgroups: u32,
    epsilon: f32,
}

@group(0) @binding(1) var<storage, read> x: array<XElem>;
@group(0) @binding(2) var<storage, read_write> y: array<YElem>;
@group(0) @binding(3) var<storage, read> w: array<f32>;

// @use each_workgroup, view, axes, load(x dim false), load(w dim false), shift, store_four, join(sum)

fn join_two_sum(a: f32, b: f32) -> f32 {
    return a + b;
}
// Four adjacent elements of a row minus its mean; 0 beyond its end.
fn centred(at: u32, d4: u32, mean: f32) -> vec4<f32> {
    let d = d4 * 4u;
    let is_in = vec4<u32>(d, d + 1u, d + 2u, d + 3u) < vec4<u32>(params.dim);
    return select(vec4<f32>(), load_x(at, d4) - mean, is_in);
}

fn run(index: u32, local: u32, lane: u32) {
    let row = index * (WORKGROUP / LANES) + local / LANES;
    let in_row = local % LANES;
    let at = row_at(params.x, axes_of(min(row, params.rows - 1u)));

    // The bound is more than a parameter; see README.md.
    let dim4 = select(0u, (params.dim + 3u) / 4u, row < params.rows);
    let dim = f32(params.dim);
    var mean = 0.0;
    if (CENTRED) {
        var sums = vec4<f32>();
        for (var d4 = in_row; d4 < dim4; d4 += LANES) {
            sums += load_x(at, d4);
        }
        mean = join_sum(local, (sums.x + sums.y) + (sums.z + sums.w)) / dim;
    }
    var squares = vec4<f32>();
    for (var d4 = in_row; d4 < dim4; d4 += LANES) {
        let x4 = centred(at, d4, mean);
        squares += x4 * x4;
    }
    let spread = join_sum(local, (squares.x + squares.y) + (squares.z + squares.w)) / dim;
    if (row >= params.rows) {
        return;
    }
    let factor = 1.0 / sqrt(spread + params.epsilon);
    for (var d4 = in_row; d4 < dim4; d4 += LANES) {
        let value = centred(at, d4, mean) * factor * load_w(params.w.offset, d4) + shift_of(d4);
        store_four(params.y_offset + row * params.dim, d4 * 4u, params.dim, value);
    }
}
