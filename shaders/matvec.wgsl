// Y = X·Wᵀ + b for few rows of X: a product of a matrix and a few vectors
// X [b, l, in]   W [out, in]   b [out]   Y [b, l, out]
//
// What a token goes through while a sequence is decoded. W is read once, and nothing else costs time: the lanes of a
// workgroup stand side by side along the input width, so that their loads lie side by side too. Each adds up its part
// of ROWS · OUTS products. SHARE lanes add up theirs through subgroup operations (1: without); what they come to is
// added up at the end, in the order of the lanes.

const WORKGROUP: u32 = 64u;
const ROWS: u32 = 1u;
const OUTS: u32 = 4u;
const SHARE: u32 = 1u;
const PARTS: u32 = WORKGROUP / SHARE;

alias XElem = f32;
alias WElem = f32;

struct Params {
    // Batch, row, column.
    x_strides: vec4<u32>,
    w_strides: vec4<u32>,
    y_strides: vec4<u32>,
    x_offset: u32,
    w_offset: u32,
    y_offset: u32,
    bias_offset: u32,
    bias_stride: u32,
    rows: u32,
    len: u32,
    dim_in: u32,
    dim_out: u32,
    // Chunks of the width: before the last of this dispatch, in all, the first of this dispatch.
    chunks: u32,
    row_blocks: u32,
    out_blocks: u32,
    outs_per_block: u32,
    workgroups: u32,
    all_chunks: u32,
    chunk_0: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<XElem>;
@group(0) @binding(2) var<storage, read> w: array<WElem>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;

// @block bias
@group(0) @binding(4) var<storage, read> bias: array<f32>;
fn bias_of(o: u32) -> f32 {
    return bias[params.bias_offset + o * params.bias_stride];
}
// @end

// @use load(x dim_in false z)

// @use load(w dim_in false y)

// The sums of lanes: all products of the first ones first.
var<workgroup> part: array<f32, PARTS * ROWS * OUTS>;

// @block share
fn sum_of_lanes(x: f32) -> f32 {
    return x;
}
// @end

// Where row r, counted over all batch entries, begins.
fn row_base(row: u32, strides: vec4<u32>) -> u32 {
    let r = min(row, params.rows - 1u);
    return (r / params.len) * strides.x + (r % params.len) * strides.y;
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
    let first_out = index % params.out_blocks * OUTS;
    let first_row = index / params.out_blocks * ROWS;

    var x_base: array<u32, ROWS>;
    // @unroll
    for (var r = 0u; r < ROWS; r++) {
        x_base[r] = params.x_offset + row_base(first_row + r, params.x_strides);
    }
    var w_base: array<u32, OUTS>;
    // @unroll
    for (var o = 0u; o < OUTS; o++) {
        w_base[o] = params.w_offset + min(first_out + o, params.dim_out - 1u) * params.w_strides.x;
    }
    var sum: array<f32, ROWS * OUTS>;
    // A bound that is more than a parameter: see README.md.
    let depth4 = select(0u, (params.dim_in + 3u) / 4u, index < params.workgroups);
    for (var d = local; d < depth4; d += WORKGROUP) {
        var x4 = array<vec4<f32>, ROWS>();
        // @unroll
        for (var r = 0u; r < ROWS; r++) {
            x4[r] = load_x(x_base[r], d);
        }
        // @unroll
        for (var o = 0u; o < OUTS; o++) {
            let w4 = load_w(w_base[o], d);
            // @unroll
            for (var r = 0u; r < ROWS; r++) {
                sum[r * OUTS + o] += dot(x4[r], w4);
            }
        }
    }
    // @unroll
    for (var n = 0u; n < ROWS * OUTS; n++) {
        let total = sum_of_lanes(sum[n]);
        if (local % SHARE == 0u) {
            part[local / SHARE * ROWS * OUTS + n] = total;
        }
    }
    workgroupBarrier();
    for (var n = local; n < ROWS * OUTS; n += WORKGROUP) {
        var total = 0.0;
        for (var p = 0u; p < PARTS; p++) {
            total += part[p * ROWS * OUTS + n];
        }
        let row = first_row + n / OUTS;
        let out = first_out + n % OUTS;
        if (row < params.rows && out < params.dim_out) {
            y[params.y_offset + row_base(row, params.y_strides) + out] = total + bias_of(out);
        }
    }
}
