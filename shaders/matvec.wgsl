// Y = X·Wᵀ + b for few rows of X: a product of a matrix and a few vectors
// X [b, l, in]   W [out, in]   b [out]   Y [b, l, out]
//
// The projections of a decoding step. W is read once, and nothing else takes time: the lanes of a workgroup are
// adjacent along the input width, so their loads are adjacent too. Each lane sums its part of ROWS · OUTS products.
// SHARE lanes add their sums through subgroup operations (1: without); these sums are added at the end, in the order of
// the lanes.

const ROWS: u32 = 1u;
const OUTS: u32 = 4u;
const SHARE: u32 = 1u;
const PARTS: u32 = WORKGROUP / SHARE;

// @use projection

// The sums of lanes: all products of the first lanes come first.
var<workgroup> part: array<f32, PARTS * ROWS * OUTS>;

// @block share
fn sum_of_lanes(x: f32) -> f32 {
    return x;
}
// @end

fn run(index: u32, local: u32, lane: u32) {
    let first_out = index % params.out_blocks * OUTS;
    let first_row = index / params.out_blocks * ROWS;

    var x_base: array<u32, ROWS>;
    // @unroll
    for (var r = 0u; r < ROWS; r++) {
        x_base[r] = row_base(params.x, first_row + r);
    }
    var w_base: array<u32, OUTS>;
    // @unroll
    for (var o = 0u; o < OUTS; o++) {
        w_base[o] = params.w.offset + min(first_out + o, params.dim_out - 1u) * params.w.strides.z;
    }
    var sum: array<f32, ROWS * OUTS>;
    // The bound is more than a parameter; see README.md.
    let depth4 = select(0u, (params.dim_in + 3u) / 4u, first_row < params.rows);
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
            y[row_base(params.y, row) + out] = total + bias_of(out);
        }
    }
}
