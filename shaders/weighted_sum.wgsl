// O = P·V                                                         pass 3 of the taught method
// P [b, h, i, j]   V [b, h / group, j, d]   O [b, h, i, d]
//
// Vaswani et al. 2017, section 3.2.1. Each invocation sums ROWS rows of O over COLS4 · 4 columns in
// registers. With subgroups, SHARE lanes load different parts of V and hand them round.
//
// 0 · NaN is NaN, so a weight of 0 does not hide a masked value. Values are finite as a rule: the
// sum runs without a look at the masks and takes a value that is not finite as 0; where there was one,
// the terms that a row may see are added at the end.
//
// A sink has no value. One that is NaN or +∞ makes its head NaN, rows that see no key too: a sum over no keys
// writes 0 or that first, the others add to it.

const WORKGROUP: u32 = 64u;
const ROWS: u32 = 4u;
const KEYS: u32 = 4u;
const COLS4: u32 = 4u;
const SHARE: u32 = 1u;
// Keys whose values are looked at together where some are not finite.
const SPAN: u32 = 32u;
const BANDED: bool = true;
// Adds to O what the keys before this slice gave.
const ACCUMULATE: bool = false;
const SINK: bool = true;

const_assert KEYS == 4u;
const_assert KEYS * COLS4 % SHARE == 0u;

alias VElem = f32;
alias OElem = f32;

struct Params {
    p_strides: vec4<u32>,
    v_strides: vec4<u32>,
    o_strides: vec4<u32>,
    mask_a_strides: vec4<u32>,
    mask_b_strides: vec4<u32>,
    bias_strides: vec4<u32>,
    // Valid keys, lowest and highest visible key relative to the query.
    band: vec4<i32>,
    p_offset: u32,
    v_offset: u32,
    o_offset: u32,
    mask_a_offset: u32,
    mask_b_offset: u32,
    bias_offset: u32,
    mask_a_keeps: u32,
    mask_b_keeps: u32,
    batch_0: u32,
    head_0: u32,
    head_kv_0: u32,
    row_0: u32,
    key_0: u32,
    heads: u32,
    group: u32,
    len_q: u32,
    len_k: u32,
    ruled_keys: u32,
    dim: u32,
    row_blocks: u32,
    column_blocks: u32,
    workgroups: u32,
    minus_infinity: u32,
    not_a_number: u32,
    sink_offset: u32,
    sink_stride: u32,
    pad_0: u32,
    pad_1: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> p: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> v: array<VElem>;
@group(0) @binding(3) var<storage, read_write> o: array<OElem>;

// @use bands

// @use mask(a 5)

// @use mask(b 6)

// @use bias

// @use sink

// @use visible

// @use load(v dim true w)

// @use store(o dim false)

fn not_finite(x: vec4<f32>) -> vec4<bool> {
    return (bitcast<vec4<u32>>(x) & vec4<u32>(0x7f800000u)) == vec4<u32>(0x7f800000u);
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
    let column_block = index % params.column_blocks;
    let row_block = (index / params.column_blocks) % params.row_blocks;
    let bh = index / (params.column_blocks * params.row_blocks);
    let h = bh % params.heads;
    let b = bh / params.heads;
    let head_kv = (params.head_0 + h) / params.group - params.head_kv_0;
    let band = band_of(b);

    let first_row = row_block * WORKGROUP * ROWS;
    let row = first_row + local * ROWS;
    let column = column_block * COLS4;
    let p_base = params.p_offset + b * params.p_strides.x + h * params.p_strides.y;
    let v_base = params.v_offset + b * params.v_strides.x + head_kv * params.v_strides.y;
    let o_base = params.o_offset + b * params.o_strides.x + h * params.o_strides.y;

    // Keys that no row of this workgroup can see weigh 0: start and stop where the first can be seen.
    var start = 0u;
    var end = params.len_k;
    if (BANDED) {
        let low = i32(first_row + params.row_0) + band.y - i32(params.key_0);
        start = u32(clamp(low, 0, i32(params.len_k))) / KEYS * KEYS;
        if (params.ruled_keys >= params.key_0 + params.len_k) {
            let high = i32(first_row + WORKGROUP * ROWS - 1u + params.row_0) + band.z - i32(params.key_0);
            let keys = band.x - 1 - i32(params.key_0);
            end = u32(clamp(min(high, keys) + 1, 0, i32(params.len_k)));
        } else {
            // The extra keys at the end are seen by every row.
            start = min(start, (max(params.ruled_keys, params.key_0) - params.key_0) / KEYS * KEYS);
        }
    }

    var sum: array<vec4<f32>, ROWS * COLS4>;
    var found = vec4<bool>();
    for (var j = start; j < end; j += KEYS) {
        var weight = array<vec4<f32>, ROWS>();
        // @unroll
        for (var r = 0u; r < ROWS; r++) {
            weight[r] = p[(p_base + min(row + r, params.len_q - 1u) * params.p_strides.z + params.key_0 + j) / 4u];
        }
        var mine = vec4<f32>();
        // @unroll
        for (var d = 0u; d < COLS4; d++) {
            var part = array<vec4<f32>, ROWS>();
            // @unroll
            for (var c = 0u; c < KEYS; c++) {
                if ((d * KEYS + c) % SHARE == 0u) {
                    let place = d * KEYS + c + lane;
                    let key = j + place % KEYS;
                    mine = select(
                        vec4<f32>(),
                        load_v(v_base + min(key, params.len_k - 1u) * params.v_strides.z, column + place / KEYS),
                        key < params.len_k,
                    );
                    found = found | not_finite(mine);
                    mine = select(mine, vec4<f32>(), not_finite(mine));
                }
                // @block share
                let v4 = mine;
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

    var broken = false;
    if (SINK) {
        let bits = bitcast<u32>(sink_of(h));
        broken = (bits & 0x7fffffffu) >= 0x7f800000u && bits != params.minus_infinity;
    }
    let nan = vec4<f32>(bitcast<f32>(params.not_a_number));
    // @unroll
    for (var r = 0u; r < ROWS; r++) {
        if (row + r < params.len_q) {
            let at = o_base + (row + r) * params.o_strides.z;
            // @unroll
            for (var d = 0u; d < COLS4; d++) {
                store_o(at, column + d, select(sum[r * COLS4 + d], nan, broken), ACCUMULATE);
            }
        }
    }

    // @block any_not_finite
    let careful = any(found);
    // @end
    // What values that are not finite add to the rows that see them. A weight is above 0, so that it is the values
    // alone. Few turns of loops for each key: some drivers count them (src/kernels/turns.rs).
    let columns = min(COLS4, (params.dim + 3u) / 4u - min(column, (params.dim + 3u) / 4u));
    let repaired = select(start, end, careful);
    for (var j = start; j < repaired; j += SPAN) {
        let span = min(SPAN, end - j);
        // A bit for each key that a row sees.
        var sees = array<u32, ROWS>();
        for (var c = 0u; c < span; c++) {
            // @unroll
            for (var r = 0u; r < ROWS; r++) {
                if (row + r < params.len_q && visible(b, h, row + r, j + c, band)) {
                    sees[r] |= 1u << c;
                }
            }
        }
        // Bounds that no compiler knows: written out, this rare part would take longer than all the rest.
        for (var d = 0u; d < columns; d++) {
            var term = array<vec4<f32>, ROWS>();
            for (var first = 0u; first < span; first += 4u) {
                // @unroll
                for (var n = 0u; n < 4u; n++) {
                    let c = first + n;
                    let value = load_v(v_base + min(j + c, end - 1u) * params.v_strides.z, column + d);
                    let term_of_key = select(vec4<f32>(), value, not_finite(value));
                    // @unroll
                    for (var r = 0u; r < ROWS; r++) {
                        term[r] += select(vec4<f32>(), term_of_key, vec4<bool>(((sees[r] >> c) & 1u) != 0u));
                    }
                }
            }
            // @unroll
            for (var r = 0u; r < ROWS; r++) {
                if (any(not_finite(term[r]))) {
                    store_o(o_base + (row + r) * params.o_strides.z, column + d, term[r], true);
                }
            }
        }
    }
}
