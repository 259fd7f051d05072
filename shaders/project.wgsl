// Y = X·Wᵀ + b
// X [b, l, in]   W [out, in]   b [out]   Y [b, l, out]
//
// The projections of Vaswani et al. 2017, section 3.2.2, in PyTorch's convention for W. Each invocation keeps ROWS rows
// of X in registers and iterates over the outputs OUTS at a time. With subgroups, SHARE lanes load different parts of W
// and broadcast them. The input width is summed in chunks of DEPTH4 · 4 through Y.

const ROWS: u32 = 4u;
const OUTS: u32 = 4u;
const DEPTH4: u32 = 4u;
const LOADS: u32 = 1u;
// DEPTH4 / LOADS
const GROUPS: u32 = 4u;
const SHARE: u32 = 1u;

const_assert LOADS * GROUPS == DEPTH4;

// @use projection, load_four, store_four

fn run(index: u32, local: u32, lane: u32) {
    let out_block = index % params.out_blocks;
    let row_block = index / params.out_blocks;
    let row = (row_block * WORKGROUP + local) * ROWS;
    let first_out = out_block * params.outs_per_block;
    let end_out = min(first_out + params.outs_per_block, params.dim_out);

    // Computed before the loops: some drivers do not hoist loop invariants, and integer division is slow.
    var x_base: array<u32, ROWS>;
    var y_base: array<u32, ROWS>;
    // @unroll
    for (var r = 0u; r < ROWS; r++) {
        x_base[r] = row_base(params.x, row + r);
        y_base[r] = row_base(params.y, row + r);
    }

    // The bound is more than a parameter; see README.md.
    let chunks = select(0u, params.chunks, row_block < params.row_blocks);
    for (var chunk = params.chunk_0; chunk < chunks; chunk++) {
        let last = chunk + 1u == params.all_chunks;
        var x_tile = array<vec4<f32>, ROWS * DEPTH4>();
        // Loads of single lanes become long code on software adapters and take the longest to compile. So there are
        // LOADS per row in a loop, and selects put their results into the right register.
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
                    sum[r] = load_four(y_base[r], j);
                }
            }
            var loaded = vec4<f32>();
            // Not unrolled: a loop that fits in the instruction cache is faster, and compiles sooner.
            for (var c = 0u; c < OUTS; c++) {
                let out = min(j + c, params.dim_out - 1u);
                let w_base = params.w.offset + out * params.w.strides.z;
                var part = array<f32, ROWS>();
                // @unroll
                for (var d = 0u; d < DEPTH4; d++) {
                    if (d % SHARE == 0u) {
                        loaded = load_w(w_base, chunk * DEPTH4 + min(d + lane, DEPTH4 - 1u));
                    }
                    // @block share
                    let w4 = loaded;
                    // @end
                    // @unroll
                    for (var r = 0u; r < ROWS; r++) {
                        part[r] = dot_on(x_tile[r * DEPTH4 + d], w4, part[r]);
                    }
                }
                // @unroll
                for (var r = 0u; r < ROWS; r++) {
                    sum[r] += select(vec4<f32>(), vec4<f32>(part[r]), vec4<u32>(0u, 1u, 2u, 3u) == vec4<u32>(c));
                }
            }
            var bias4 = vec4<f32>();
            if (last) {
                bias4 = vec4<f32>(bias_of(j), bias_of(j + 1u), bias_of(j + 2u), bias_of(j + 3u));
            }
            // @unroll
            for (var r = 0u; r < ROWS; r++) {
                if (row + r < params.rows) {
                    store_four(y_base[r], j, params.dim_out, sum[r] + bias4);
                }
            }
        }
    }
}
