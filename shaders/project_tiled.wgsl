// Y = X·Wᵀ + b          for GPUs
// X [b, l, in]   W [out, in]   b [out]   Y [b, l, out]
//
// Like project.wgsl, for adapters with fast workgroup memory: a tiled matrix product. A workgroup computes DOWN · ROWS
// rows by 4 · ACROSS outputs, an invocation ROWS rows by four outputs in registers. Workgroup memory holds PART4 vec4s of
// each row and output, in nested arrays as in flash_tiled.wgsl.

// @use projection, store_four

const ROWS: u32 = 8u;
// Invocations per row.
const ACROSS: u32 = 16u;
const DOWN: u32 = WORKGROUP / ACROSS;
const PART4: u32 = 4u;
// vec4s that an invocation loads of a part of X and of W, and rows that a workgroup loads at a time.
const X_LOADS: u32 = ROWS * PART4 / ACROSS;
const W_LOADS: u32 = 4u * PART4 / DOWN;
const STRIDE: u32 = WORKGROUP / PART4;

const_assert X_LOADS * ACROSS == ROWS * PART4 && W_LOADS * DOWN == 4u * PART4;
const_assert STRIDE % ROWS == 0u && STRIDE % 4u == 0u;

var<workgroup> x_part: array<array<vec4<f32>, ROWS * PART4 + 1u>, DOWN>;
var<workgroup> w_part: array<array<vec4<f32>, 4u * PART4 + 1u>, ACROSS>;

fn run(index: u32, local: u32, lane: u32) {
    let first_row = index / params.out_blocks * (DOWN * ROWS);
    let first_out = index % params.out_blocks * (4u * ACROSS);
    let down = local / ACROSS;
    let across = local % ACROSS;
    // What this invocation loads: vec4 `column` of every STRIDE-th row.
    let loads_row = local / PART4;
    let column = local % PART4;
    var x_base: array<u32, X_LOADS>;
    // @unroll
    for (var n = 0u; n < X_LOADS; n++) {
        x_base[n] = row_base(params.x, first_row + n * STRIDE + loads_row);
    }
    var w_base: array<u32, W_LOADS>;
    // @unroll
    for (var n = 0u; n < W_LOADS; n++) {
        let out = min(first_out + n * STRIDE + loads_row, params.dim_out - 1u);
        w_base[n] = params.w.offset + out * params.w.strides.z;
    }

    var sum: array<vec4<f32>, ROWS>;
    // The bound is more than a parameter; see README.md.
    let columns4 = select(0u, (params.dim_in + 3u) / 4u, first_row < params.rows);
    for (var d = 0u; d < columns4; d += PART4) {
        var x4 = array<vec4<f32>, X_LOADS>();
        // @unroll
        for (var n = 0u; n < X_LOADS; n++) {
            x4[n] = load_x(x_base[n], d + column);
        }
        var w4 = array<vec4<f32>, W_LOADS>();
        // @unroll
        for (var n = 0u; n < W_LOADS; n++) {
            w4[n] = load_w(w_base[n], d + column);
        }
        // The previous contents have been read.
        workgroupBarrier();
        // @unroll
        for (var n = 0u; n < X_LOADS; n++) {
            x_part[n * (STRIDE / ROWS) + loads_row / ROWS][loads_row % ROWS * PART4 + column] = x4[n];
        }
        // @unroll
        for (var n = 0u; n < W_LOADS; n++) {
            w_part[n * (STRIDE / 4u) + loads_row / 4u][loads_row % 4u * PART4 + column] = w4[n];
        }
        workgroupBarrier();
        // @unroll
        for (var e = 0u; e < PART4; e++) {
            var of_outs = array<vec4<f32>, 4>();
            // @unroll
            for (var c = 0u; c < 4u; c++) {
                of_outs[c] = w_part[across][c * PART4 + e];
            }
            // @unroll
            for (var r = 0u; r < ROWS; r++) {
                let of_row = x_part[down][r * PART4 + e];
                // @unroll
                for (var c = 0u; c < 4u; c++) {
                    sum[r][c] = dot_on(of_row, of_outs[c], sum[r][c]);
                }
            }
        }
    }

    let out = first_out + across * 4u;
    let bias4 = vec4<f32>(bias_of(out), bias_of(out + 1u), bias_of(out + 2u), bias_of(out + 3u));
    // @unroll
    for (var r = 0u; r < ROWS; r++) {
        let row = first_row + down * ROWS + r;
        if (row < params.rows && out < params.dim_out) {
            store_four(row_base(params.y, row), out, params.dim_out, sum[r] + bias4);
        }
    }
}
