// Y = X·Wᵀ + b
// X [b, l, in]   W [out, in]   b [out]   Y [b, l, out]
//
// The projections of Vaswani et al. 2017, section 3.2.2, in PyTorch's convention for W. Each
// invocation keeps ROWS rows of X in registers and walks over the outputs OUTS at a time; with
// subgroups, SHARE lanes load different parts of W and hand them round. The input width is summed in
// chunks of DEPTH4 · 4 through Y.

const WORKGROUP: u32 = 64u;
const ROWS: u32 = 4u;
const OUTS: u32 = 4u;
const DEPTH4: u32 = 4u;
const LOADS: u32 = 1u;
// DEPTH4 / LOADS
const GROUPS: u32 = 4u;
const SHARE: u32 = 1u;
const PADDED: bool = true;

const_assert OUTS == 4u;
const_assert LOADS * GROUPS == DEPTH4;

alias XElem = f32;
alias WElem = f32;
alias YElem = f32;

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
@group(0) @binding(3) var<storage, read_write> y: array<YElem>;

// @block bias
@group(0) @binding(4) var<storage, read> bias: array<f32>;
fn bias_of(o: u32) -> vec4<f32> {
    let at = params.bias_offset + o * params.bias_stride;
    let step = params.bias_stride;
    return vec4<f32>(bias[at], bias[at + step], bias[at + 2u * step], bias[at + 3u * step]);
}
// @end

// @use load(x dim_in PADDED z)

// @use load(w dim_in PADDED y)

// @use sums

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
    // @block lane_builtin
    // @end
) {
    // @block lane
    let lane = 0u;
    // @end
    let index = workgroup.y * workgroups.x + workgroup.x;
    if (index >= params.workgroups) {
        return;
    }
    let out_block = index % params.out_blocks;
    let row_block = index / params.out_blocks;
    let row = (row_block * WORKGROUP + local) * ROWS;
    let first_out = out_block * params.outs_per_block;
    let end_out = min(first_out + params.outs_per_block, params.dim_out);

    // Before the loops: some drivers leave what does not change where it stands, and divisions are dear.
    var x_base: array<u32, ROWS>;
    var y_base: array<u32, ROWS>;
    // @unroll
    for (var r = 0u; r < ROWS; r++) {
        x_base[r] = params.x_offset + row_base(row + r, params.x_strides);
        y_base[r] = params.y_offset + row_base(row + r, params.y_strides);
    }

    // A bound that is more than a parameter: see README.md.
    let chunks = select(0u, params.chunks, row_block < params.row_blocks);
    for (var chunk = params.chunk_0; chunk < chunks; chunk++) {
        let last = chunk + 1u == params.all_chunks;
        var x_tile = array<vec4<f32>, ROWS * DEPTH4>();
        // Loads of single lanes are long pieces of code on software adapters, and take longest to compile:
        // LOADS for each row stand in a loop, and selects put what they give into its register.
        for (var first = 0u; first < DEPTH4; first += LOADS) {
            // @unroll
            for (var r = 0u; r < ROWS; r++) {
                // @unroll
                for (var n = 0u; n < LOADS; n++) {
                    let x4 = load_x(x_base[r], chunk * DEPTH4 + first + n);
                    // @unroll
                    for (var e = 0u; e < GROUPS; e++) {
                        let to = r * DEPTH4 + e * LOADS + n;
                        x_tile[to] = select(x_tile[to], x4, first == e * LOADS);
                    }
                }
            }
        }
        for (var j = first_out; j < end_out; j += OUTS) {
            var sum = array<vec4<f32>, ROWS>();
            if (chunk > 0u) {
                // @unroll
                for (var r = 0u; r < ROWS; r++) {
                    sum[r] = load_y(y_base[r], j);
                }
            }
            var mine = vec4<f32>();
            // Not written out: a loop that fits the instruction cache is faster, and compiles sooner.
            for (var c = 0u; c < OUTS; c++) {
                let out = min(j + c, params.dim_out - 1u);
                let w_base = params.w_offset + out * params.w_strides.x;
                var part = array<f32, ROWS>();
                // @unroll
                for (var d = 0u; d < DEPTH4; d++) {
                    if (d % SHARE == 0u) {
                        mine = load_w(w_base, chunk * DEPTH4 + min(d + lane, DEPTH4 - 1u));
                    }
                    // @block share
                    let w4 = mine;
                    // @end
                    // @unroll
                    for (var r = 0u; r < ROWS; r++) {
                        let x4 = x_tile[r * DEPTH4 + d];
                        part[r] = fma(x4.w, w4.w, fma(x4.z, w4.z, fma(x4.y, w4.y, fma(x4.x, w4.x, part[r]))));
                    }
                }
                // @unroll
                for (var r = 0u; r < ROWS; r++) {
                    sum[r] += select(vec4<f32>(), vec4<f32>(part[r]), vec4<u32>(0u, 1u, 2u, 3u) == vec4<u32>(c));
                }
            }
            var bias4 = vec4<f32>();
            if (last) {
                bias4 = bias_of(j);
            }
            // @unroll
            for (var r = 0u; r < ROWS; r++) {
                if (row + r < params.rows) {
                    store_y(y_base[r], j, sum[r] + bias4);
                }
            }
        }
    }
}
