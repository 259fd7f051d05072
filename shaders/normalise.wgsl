// Y[r] = (X[r] − m) / √(s + ε) · w + b, over the last axis of every row r
// X [a, b, c, d], any strides   w, b [d]   Y [a, b, c, d], row-major
//   RMSNorm (Zhang and Sennrich 2019):  m = 0            s = mean of X[r]²
//   LayerNorm (Ba et al. 2016):         m = mean of X[r]  s = mean of (X[r] − m)²
//
// The norms of queries and keys in a layer. LANES invocations share a row; 1 on CPU adapters unless the row is wide,
// since a barrier costs more than it saves there.

const WORKGROUP: u32 = 64u;
const LANES: u32 = 64u;
// LayerNorm.
const CENTRED: bool = true;

const_assert WORKGROUP % LANES == 0u;

alias XElem = f32;
alias YElem = f32;

struct Params {
    x_strides: vec4<u32>,
    x_offset: u32,
    y_offset: u32,
    w_offset: u32,
    w_stride: u32,
    bias_offset: u32,
    bias_stride: u32,
    // Lengths of axes b, c and d.
    heads: u32,
    len: u32,
    dim: u32,
    rows: u32,
    workgroups: u32,
    epsilon: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<XElem>;
@group(0) @binding(2) var<storage, read_write> y: array<YElem>;
@group(0) @binding(3) var<storage, read> w: array<f32>;

fn weight_of(d: u32) -> vec4<f32> {
    let step = params.w_stride;
    let at = params.w_offset + d * step;
    return vec4<f32>(w[at], w[at + step], w[at + 2u * step], w[at + 3u * step]);
}

// @block shift
@group(0) @binding(4) var<storage, read> bias: array<f32>;
fn shift_of(d: u32) -> vec4<f32> {
    let step = params.bias_stride;
    let at = params.bias_offset + d * step;
    return vec4<f32>(bias[at], bias[at + step], bias[at + 2u * step], bias[at + 3u * step]);
}
// @end

// @use load(x dim false w)

// @use store_four

// @use join_sum

// Four neighbours of a row without its mean; 0 behind its end.
fn centred(at: u32, d4: u32, mean: f32) -> vec4<f32> {
    let d = d4 * 4u;
    let is_in = vec4<u32>(d, d + 1u, d + 2u, d + 3u) < vec4<u32>(params.dim);
    return select(vec4<f32>(), load_x(at, d4) - mean, is_in);
}

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let index = workgroup.y * workgroups.x + workgroup.x;
    if (index >= params.workgroups) {
        return;
    }
    let row = index * (WORKGROUP / LANES) + local / LANES;
    let lane = local % LANES;
    let read = min(row, params.rows - 1u);
    let place = vec3<u32>(read / params.len / params.heads, read / params.len % params.heads, read % params.len);
    let at = params.x_offset + dot(params.x_strides.xyz, place);

    // A bound that is more than a parameter: see README.md.
    let dim4 = select(0u, (params.dim + 3u) / 4u, index < params.workgroups);
    let dim = f32(params.dim);
    var mean = 0.0;
    if (CENTRED) {
        var sums = vec4<f32>();
        for (var d4 = lane; d4 < dim4; d4 += LANES) {
            sums += load_x(at, d4);
        }
        mean = join_sum(local, (sums.x + sums.y) + (sums.z + sums.w)) / dim;
    }
    var squares = vec4<f32>();
    for (var d4 = lane; d4 < dim4; d4 += LANES) {
        let x4 = centred(at, d4, mean);
        squares += x4 * x4;
    }
    let spread = join_sum(local, (squares.x + squares.y) + (squares.z + squares.w)) / dim;
    if (row >= params.rows) {
        return;
    }
    let factor = 1.0 / sqrt(spread + params.epsilon);
    for (var d4 = lane; d4 < dim4; d4 += LANES) {
        let value = centred(at, d4, mean) * factor * weight_of(d4 * 4u) + shift_of(d4 * 4u);
        store_four(params.y_offset + row * params.dim, d4 * 4u, params.dim, value);
    }
}
