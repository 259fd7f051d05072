// O = P·V                                                         pass 3 of the unfused method
// P [b, h, i, j]   V [b, h / group, j, d]   O [b, h, i, d]
//
// Vaswani et al. 2017, section 3.2.1. Each invocation sums ROWS rows of O over COLS4 · 4 columns in registers. With
// subgroups, SHARE lanes load different parts of V and broadcast them.
//
// A sink has no value. A sink of NaN or +∞ makes its head NaN, including rows that see no key: a sum over no keys first
// writes 0 or that, and the other sums add to it.

const ROWS: u32 = 4u;
const KEYS: u32 = 4u;
const COLS4: u32 = 4u;
const SHARE: u32 = 1u;
// Adds to the result that earlier slices of the keys left in O.
const ACCUMULATE: bool = false;
const SINK: bool = true;

const_assert KEYS * COLS4 % SHARE == 0u;

alias VElem = f32;
alias OElem = f32;

struct Params {
    p: View,
    v: View,
    o: View,
    rules: Rules,
    slice: Slice,
    dim: u32,
    row_blocks: u32,
    column_blocks: u32,
    sink_offset: u32,
    sink_stride: u32,
    workgroups: u32,
    minus_infinity: u32,
    not_a_number: u32,
}

@group(0) @binding(1) var<storage, read> p: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> v: array<VElem>;
@group(0) @binding(3) var<storage, read_write> o: array<OElem>;

// @use each_workgroup, rules, sink, softmax_row, not_finite, load(v dim true), store(o dim false)

fn run(index: u32, local: u32, lane: u32) {
    let tile = tile_of(index, params.row_blocks, params.column_blocks);
    let b = tile.b;
    let h = tile.h;
    let band = tile.band;
    let len_q = params.slice.len_q;
    let len_k = params.slice.len_k;

    let first_row = tile.row_block * WORKGROUP * ROWS;
    let row = first_row + local * ROWS;
    let column = tile.column_block * COLS4;
    let p_base = row_at(params.p, vec3<u32>(b, h, 0u)) + params.slice.key_0;
    let v_base = row_at(params.v, vec3<u32>(b, tile.head_kv, 0u));
    let o_base = row_at(params.o, vec3<u32>(b, h, 0u));
    // Keys that no row of this workgroup can see have weight 0.
    let last_row = min(first_row + WORKGROUP * ROWS, len_q) - 1u;
    // The bound is more than a parameter; see README.md.
    let end = select(0u, len_k, tile.row_block < params.row_blocks);
    let keys = keys_in_band(first_row, last_row, band, vec2<u32>(0u, end), KEYS, len_k);

    var sum: array<vec4<f32>, ROWS * COLS4>;
    var has_not_finite = vec4<bool>();
    for (var j = keys.x; j < keys.y; j += KEYS) {
        var weight = array<vec4<f32>, ROWS>();
        // @unroll
        for (var r = 0u; r < ROWS; r++) {
            weight[r] = p[(p_base + min(row + r, len_q - 1u) * params.p.strides.z + j) / 4u];
        }
        var loaded = vec4<f32>();
        // @unroll
        for (var d = 0u; d < COLS4; d++) {
            var part = array<vec4<f32>, ROWS>();
            // @unroll
            for (var c = 0u; c < KEYS; c++) {
                if ((d * KEYS + c) % SHARE == 0u) {
                    let place = d * KEYS + c + lane;
                    let key = j + place % KEYS;
                    loaded = select(
                        vec4<f32>(),
                        load_v(v_base + min(key, len_k - 1u) * params.v.strides.z, column + place / KEYS),
                        key < len_k,
                    );
                    has_not_finite = has_not_finite | not_finite(loaded);
                    loaded = select(loaded, vec4<f32>(), not_finite(loaded));
                }
                // @block share
                let v4 = loaded;
                // @end
                // @unroll
                for (var r = 0u; r < ROWS; r++) {
                    part[r] = fma(vec4<f32>(weight[r][c]), v4, part[r]);
                }
            }
            // @unroll
            for (var r = 0u; r < ROWS; r++) {
                sum[r * COLS4 + d] += part[r];
            }
        }
    }

    let is_nan = SINK && makes_nan(sink_of(h));
    let nan = vec4<f32>(bitcast<f32>(params.not_a_number));
    var head: array<u32, ROWS>;
    var query: array<u32, ROWS>;
    var o_row: array<u32, ROWS>;
    // @unroll
    for (var r = 0u; r < ROWS; r++) {
        head[r] = h;
        query[r] = row + r;
        o_row[r] = o_base + (row + r) * params.o.strides.z;
        if (row + r < len_q) {
            // @unroll
            for (var d = 0u; d < COLS4; d++) {
                store_o(o_row[r], column + d, select(sum[r * COLS4 + d], nan, is_nan), ACCUMULATE);
            }
        }
    }

    // @block any_not_finite
    let any_not_finite = any(has_not_finite);
    // @end
    if (any_not_finite) {
        add_not_finite(
            b, head, query, o_row, max(len_q, row) - row, band, v_base, keys,
            vec3<u32>(column, min(column + COLS4, (params.dim + 3u) / 4u), 1u),
        );
    }
}
