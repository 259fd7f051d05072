// S = scale · Q·Kᵀ → softcap → + bias → mask                      pass 1 of the taught method
// Q [b, h, i, d]   K [b, h / group, j, d]   S [b, h, i, j]; masked scores are −∞
//
// Vaswani et al. 2017, section 3.2.1. Each invocation keeps ROWS queries in registers and walks over
// the keys KEYS at a time. With subgroups, SHARE lanes load different parts of the keys and hand them
// round; without, every lane loads them all. Wide heads are summed in chunks of DEPTH4 · 4 through S.

const WORKGROUP: u32 = 64u;
const ROWS: u32 = 4u;
const KEYS: u32 = 4u;
const DEPTH4: u32 = 4u;
const SHARE: u32 = 1u;
// True when chunks · DEPTH4 · 4 is more than the width of a head.
const PADDED: bool = true;
const SOFTCAP: bool = true;
const BANDED: bool = true;
// True with a bias by distance.
const RELATIVE: bool = true;
// 0: scaled, 1: after the softcap, 2: after bias and mask.
const STAGE: u32 = 2u;

const_assert KEYS == 4u;
const_assert KEYS * DEPTH4 % SHARE == 0u;

alias QElem = f32;
alias KElem = f32;

struct Params {
    q_strides: vec4<u32>,
    k_strides: vec4<u32>,
    s_strides: vec4<u32>,
    mask_a_strides: vec4<u32>,
    mask_b_strides: vec4<u32>,
    bias_strides: vec4<u32>,
    relative_strides: vec4<u32>,
    // Valid keys, lowest and highest visible key relative to the query, where query 0 stands.
    band: vec4<i32>,
    q_offset: u32,
    k_offset: u32,
    s_offset: u32,
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
    chunks: u32,
    row_blocks: u32,
    key_blocks: u32,
    keys_per_block: u32,
    workgroups: u32,
    minus_infinity: u32,
    scale: f32,
    softcap: f32,
    pad: u32,
    relative_offset: u32,
    relative_low: i32,
    relative_high: i32,
    relative_factor: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> q: array<QElem>;
@group(0) @binding(2) var<storage, read> k: array<KElem>;
@group(0) @binding(3) var<storage, read_write> s: array<vec4<f32>>;

// @use bands

// @use mask(a 5)

// @use mask(b 6)

// @use bias

// @use relative

// @use visible

// @use load(q dim PADDED w)

// @use load(k dim PADDED w)

// @use tanh

fn finish(sum: vec4<f32>, b: u32, h: u32, i: u32, j: u32, band: vec4<i32>) -> vec4<f32> {
    var x = sum * params.scale;
    if (STAGE >= 1u && SOFTCAP) {
        let is_nan = (bitcast<vec4<u32>>(x) & vec4<u32>(0x7fffffffu)) > vec4<u32>(0x7f800000u);
        x = select(params.softcap * tanh_exact(x / params.softcap), x, is_nan);
    }
    if (STAGE < 2u) {
        return x;
    }
    if (RELATIVE) {
        let key = vec4<i32>(vec4<u32>(j + params.key_0) + vec4<u32>(0u, 1u, 2u, 3u));
        let more = relative_at(relative_row(b, h, i), key - vec4<i32>(i32(i + params.row_0) + band.w));
        x += select(more, vec4<f32>(), key >= vec4<i32>(i32(params.ruled_keys)));
    }
    let hidden = bitcast<f32>(params.minus_infinity);
    // @unroll
    for (var c = 0u; c < KEYS; c++) {
        // Keys behind the end are padding of S.
        let ruled = j + c + params.key_0 < params.ruled_keys;
        if (j + c >= params.len_k || !visible(b, h, i, j + c, band)) {
            x[c] = hidden;
        } else if (ruled) {
            x[c] += bias_at(b, h, i, j + c);
        }
    }
    return x;
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
    let key_block = index % params.key_blocks;
    let row_block = (index / params.key_blocks) % params.row_blocks;
    let bh = index / (params.key_blocks * params.row_blocks);
    let h = bh % params.heads;
    let b = bh / params.heads;
    let head_kv = (params.head_0 + h) / params.group - params.head_kv_0;
    let band = band_of(b);

    let first_row = row_block * WORKGROUP * ROWS;
    let row = first_row + local * ROWS;
    let q_base = params.q_offset + b * params.q_strides.x + h * params.q_strides.y;
    let k_base = params.k_offset + b * params.k_strides.x + head_kv * params.k_strides.y;
    let s_base = params.s_offset + b * params.s_strides.x + h * params.s_strides.y;
    let first_key = key_block * params.keys_per_block;
    let end_key = min(first_key + params.keys_per_block, params.len_k);

    // The keys that any row of this workgroup can see by position.
    var low = i32(first_row + params.row_0) + band.y - i32(params.key_0);
    var high = i32(first_row + WORKGROUP * ROWS - 1u + params.row_0) + band.z - i32(params.key_0);
    high = min(high, band.x - 1 - i32(params.key_0));
    let ruled = i32(params.ruled_keys) - i32(params.key_0);

    // A bound that is more than a parameter: see README.md.
    let chunks = select(0u, params.chunks, index < params.workgroups);
    for (var chunk = 0u; chunk < chunks; chunk++) {
        var q_tile = array<vec4<f32>, ROWS * DEPTH4>();
        // @unroll
        for (var r = 0u; r < ROWS; r++) {
            let at = q_base + min(row + r, params.len_q - 1u) * params.q_strides.z;
            // @unroll
            for (var d = 0u; d < DEPTH4; d++) {
                q_tile[r * DEPTH4 + d] = load_q(at, chunk * DEPTH4 + d);
            }
        }
        for (var j = first_key; j < end_key; j += KEYS) {
            let inside = !BANDED || STAGE < 2u
                || (i32(j) <= high && i32(j + KEYS - 1u) >= low) || i32(j + KEYS) > ruled;
            if (!inside && chunk + 1u < params.chunks) {
                continue;
            }
            var sum = array<vec4<f32>, ROWS>();
            if (inside) {
                if (chunk > 0u) {
                    // @unroll
                    for (var r = 0u; r < ROWS; r++) {
                        sum[r] = s[(s_base + min(row + r, params.len_q - 1u) * params.s_strides.z + params.key_0 + j) / 4u];
                    }
                }
                var mine = vec4<f32>();
                // @unroll
                for (var c = 0u; c < KEYS; c++) {
                    var part = array<f32, ROWS>();
                    // @unroll
                    for (var d = 0u; d < DEPTH4; d++) {
                        if ((c * DEPTH4 + d) % SHARE == 0u) {
                            let place = c * DEPTH4 + d + lane;
                            let key = min(j + place / DEPTH4, params.len_k - 1u);
                            mine = load_k(k_base + key * params.k_strides.z, chunk * DEPTH4 + place % DEPTH4);
                        }
                        // @block share
                        let k4 = mine;
                        // @end
                        // @unroll
                        for (var r = 0u; r < ROWS; r++) {
                            let q4 = q_tile[r * DEPTH4 + d];
                            part[r] = fma(q4.w, k4.w, fma(q4.z, k4.z, fma(q4.y, k4.y, fma(q4.x, k4.x, part[r]))));
                        }
                    }
                    // @unroll
                    for (var r = 0u; r < ROWS; r++) {
                        sum[r][c] += part[r];
                    }
                }
            }
            // @unroll
            for (var r = 0u; r < ROWS; r++) {
                if (row + r < params.len_q) {
                    let at = (s_base + (row + r) * params.s_strides.z + params.key_0 + j) / 4u;
                    if (chunk + 1u < params.chunks) {
                        s[at] = sum[r];
                    } else {
                        s[at] = finish(sum[r], b, h, row + r, j, band);
                    }
                }
            }
        }
    }
}
