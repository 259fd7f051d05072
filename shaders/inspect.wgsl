// P = exp(S − LSE), S = scale · Q·Kᵀ → softcap → + bias → mask            weights beside the fused path
// weights P [b, h, i, j]   column sums Σ_i P [b, h, j]   entropy −Σ_j P·ln P [b, h, i]
//
// P is recomputed tile by tile from Q, K and LSE, as in the backward pass of FlashAttention-2 (Dao 2023,
// algorithm 2, line 11). Each invocation keeps ROWS rows of one operand in registers and walks over the
// other STEP rows at a time: queries are kept and keys walked over, for column sums the other way round,
// so that every sum is one invocation's, in a fixed order. With subgroups, SHARE lanes load different
// parts of what is walked over and hand them round. The walk may be cut into splits, each with its own
// sum; mean_heads.wgsl joins them in order.

const WORKGROUP: u32 = 64u;
const ROWS: u32 = 4u;
const STEP: u32 = 4u;
const DEPTH4: u32 = 4u;
// Heads wider than DEPTH4 · 4 are read in chunks, the kept rows again at every step.
const CHUNKS: u32 = 1u;
const SHARE: u32 = 1u;
// True when CHUNKS · DEPTH4 · 4 is more than the width of a head.
const PADDED: bool = true;
const SOFTCAP: bool = true;
const BANDED: bool = true;
// True with a bias by distance.
const RELATIVE: bool = true;
// 0: weights, 1: column sums, 2: entropy.
const RESULT: u32 = 2u;
const BY_KEY: bool = RESULT == 1u;

const_assert STEP == 4u;
const_assert STEP * DEPTH4 % SHARE == 0u;

alias KeptElem = f32;
alias WalkedElem = f32;
alias OElem = f32;

struct Params {
    kept_strides: vec4<u32>,
    walked_strides: vec4<u32>,
    // Batch, head, kept row; for sums then the split.
    out_strides: vec4<u32>,
    // Batch, head, query.
    lse_strides: vec4<u32>,
    mask_a_strides: vec4<u32>,
    mask_b_strides: vec4<u32>,
    bias_strides: vec4<u32>,
    relative_strides: vec4<u32>,
    // Valid keys, lowest and highest visible key relative to the query, where query 0 stands.
    band: vec4<i32>,
    kept_offset: u32,
    walked_offset: u32,
    out_offset: u32,
    lse_offset: u32,
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
    kept_blocks: u32,
    splits: u32,
    // Rows walked over in a split.
    split_rows: u32,
    workgroups: u32,
    minus_infinity: u32,
    not_a_number: u32,
    scale: f32,
    softcap: f32,
    relative_offset: u32,
    relative_low: i32,
    relative_high: i32,
    relative_factor: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> kept: array<KeptElem>;
@group(0) @binding(2) var<storage, read> walked: array<WalkedElem>;
@group(0) @binding(3) var<storage, read_write> o: array<OElem>;
@group(0) @binding(8) var<storage, read> lse: array<f32>;

// @use bands

// @use mask(a 5)

// @use mask(b 6)

// @use bias

// @use relative

// @use visible

// @use load(kept dim PADDED w)

// @use load(walked dim PADDED w)

// @block store_weights
fn store_weights(at: u32, weights: vec4<f32>) {}
// @end

// @block store_sum
fn store_sum(at: u32, sum: f32) {
    o[at] = sum;
}
// @end

fn lse_of(b: u32, h: u32, i: u32) -> f32 {
    return lse[params.lse_offset + dot(params.lse_strides, vec4<u32>(b, h, i, 0u))];
}

// @use tanh

const LOG2_E: f32 = 1.4426950408889634;
// exp of less is 0.
const LEAST_LOG: f32 = -138.0;

// P of kept row `own` with the walked rows `first`, `first + 1`, …, from their products; for the entropy
// the terms −P·ln P. What may not be seen gives 0.
fn weigh(
    sum: vec4<f32>,
    b: u32,
    h: u32,
    own: u32,
    first: u32,
    end: u32,
    row_lse: vec4<f32>,
    band: vec4<i32>,
) -> vec4<f32> {
    var x = sum * params.scale;
    if (SOFTCAP) {
        let is_nan = (bitcast<vec4<u32>>(x) & vec4<u32>(0x7fffffffu)) > vec4<u32>(0x7f800000u);
        x = select(params.softcap * tanh_exact(x / params.softcap), x, is_nan);
    }
    // A row whose LSE is −∞ sees nothing.
    var seen = bitcast<vec4<u32>>(row_lse) != vec4<u32>(params.minus_infinity);
    // @unroll
    for (var c = 0u; c < STEP; c++) {
        let i = select(own, first + c, BY_KEY);
        let j = select(first + c, own, BY_KEY);
        if (first + c >= end || !visible(b, h, i, j, band)) {
            seen[c] = false;
        } else if (j + params.key_0 < params.ruled_keys) {
            x[c] += bias_at(b, h, i, j);
            if (RELATIVE) {
                let distance = i32(j + params.key_0) - i32(i + params.row_0) - band.w;
                x[c] += relative_at(relative_row(b, h, i), vec4<i32>(distance)).x;
            }
        }
    }
    seen = seen & (bitcast<vec4<u32>>(x) != vec4<u32>(params.minus_infinity));
    let exact = x - row_lse;
    let log_p = max(exact, vec4<f32>(LEAST_LOG));
    var y = exp2(log_p * LOG2_E);
    if (RESULT == 2u) {
        // Rounding may lift ln P above 0 by an ulp.
        y *= max(-log_p, vec4<f32>());
    }
    // Told by bits, since drivers differ on NaN in max and exp2.
    let is_nan = (bitcast<vec4<u32>>(exact) & vec4<u32>(0x7fffffffu)) > vec4<u32>(0x7f800000u);
    y = select(y, vec4<f32>(bitcast<f32>(params.not_a_number)), is_nan);
    return select(vec4<f32>(), y, seen);
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
    let split = index % params.splits;
    let kept_block = (index / params.splits) % params.kept_blocks;
    let bh = index / (params.splits * params.kept_blocks);
    let h = bh % params.heads;
    let b = bh / params.heads;
    let head_kv = (params.head_0 + h) / params.group - params.head_kv_0;
    let band = band_of(b);

    let kept_len = select(params.len_q, params.len_k, BY_KEY);
    let first_row = kept_block * WORKGROUP * ROWS;
    let row = first_row + local * ROWS;
    let kept_base = params.kept_offset + b * params.kept_strides.x + select(h, head_kv, BY_KEY) * params.kept_strides.y;
    let walked_base = params.walked_offset + b * params.walked_strides.x
        + select(head_kv, h, BY_KEY) * params.walked_strides.y;
    let start = split * params.split_rows;
    let end = min(start + params.split_rows, select(params.len_k, params.len_q, BY_KEY));

    // What any kept row of this workgroup can see, or be seen by, by position.
    let row_0 = i32(params.row_0);
    let key_0 = i32(params.key_0);
    let ruled = i32(params.ruled_keys) - key_0;
    let last_row = min(first_row + WORKGROUP * ROWS, kept_len) - 1u;
    var low = i32(first_row) + row_0 + band.y - key_0;
    var high = min(i32(last_row) + row_0 + band.z, band.x - 1) - key_0;
    if (BY_KEY) {
        low = i32(first_row) + key_0 - band.z - row_0;
        high = select(-1, i32(last_row) + key_0 - band.y - row_0, i32(first_row) + key_0 < band.x);
    }

    // Before the loops: some drivers leave what does not change where it stands, and divisions are dear.
    var kept_at: array<u32, ROWS>;
    var kept_lse: array<f32, ROWS>;
    var tile: array<vec4<f32>, ROWS * DEPTH4>;
    // @unroll
    for (var r = 0u; r < ROWS; r++) {
        let own = min(row + r, kept_len - 1u);
        kept_at[r] = kept_base + own * params.kept_strides.z;
        if (!BY_KEY) {
            kept_lse[r] = lse_of(b, h, own);
        }
        if (CHUNKS == 1u) {
            // @unroll
            for (var d = 0u; d < DEPTH4; d++) {
                tile[r * DEPTH4 + d] = load_kept(kept_at[r], d);
            }
        }
    }
    // Which walked row and which part of it this lane loads, load by load.
    var walked_lane: array<u32, STEP * DEPTH4 / SHARE>;
    var walked_part: array<u32, STEP * DEPTH4 / SHARE>;
    // @unroll
    for (var n = 0u; n < STEP * DEPTH4 / SHARE; n++) {
        walked_lane[n] = walked_base + (n * SHARE + lane) / DEPTH4 * params.walked_strides.z;
        walked_part[n] = (n * SHARE + lane) % DEPTH4;
    }
    let out_base = params.out_offset + b * params.out_strides.x + h * params.out_strides.y;

    var total: array<vec4<f32>, ROWS>;
    for (var at = start; at < end; at += STEP) {
        // Keys that no rule speaks of are seen by every query.
        let unruled = select(i32(at + STEP) > ruled, i32(last_row) >= ruled, BY_KEY);
        let inside = !BANDED || (i32(at) <= high && i32(at + STEP - 1u) >= low) || unruled;
        var sum = array<vec4<f32>, ROWS>();
        var step_lse = vec4<f32>();
        if (inside) {
            for (var chunk = 0u; chunk < CHUNKS; chunk++) {
                if (CHUNKS > 1u) {
                    // @unroll
                    for (var r = 0u; r < ROWS; r++) {
                        // @unroll
                        for (var d = 0u; d < DEPTH4; d++) {
                            tile[r * DEPTH4 + d] = load_kept(kept_at[r], chunk * DEPTH4 + d);
                        }
                    }
                }
                var mine = vec4<f32>();
                // @unroll
                for (var c = 0u; c < STEP; c++) {
                    var part = array<f32, ROWS>();
                    // @unroll
                    for (var d = 0u; d < DEPTH4; d++) {
                        if ((c * DEPTH4 + d) % SHARE == 0u) {
                            // Behind the last row lies what is not seen.
                            let n = (c * DEPTH4 + d) / SHARE;
                            let from_row = walked_lane[n] + at * params.walked_strides.z;
                            mine = load_walked(from_row, chunk * DEPTH4 + walked_part[n]);
                        }
                        // @block share
                        let y4 = mine;
                        // @end
                        // @unroll
                        for (var r = 0u; r < ROWS; r++) {
                            let x4 = tile[r * DEPTH4 + d];
                            part[r] = fma(x4.w, y4.w, fma(x4.z, y4.z, fma(x4.y, y4.y, fma(x4.x, y4.x, part[r]))));
                        }
                    }
                    // @unroll
                    for (var r = 0u; r < ROWS; r++) {
                        sum[r][c] += part[r];
                    }
                }
            }
            if (BY_KEY) {
                // @block share_lse
                // @unroll
                for (var c = 0u; c < STEP; c++) {
                    step_lse[c] = lse_of(b, h, min(at + c, params.len_q - 1u));
                }
                // @or shared
                let one = lse_of(b, h, min(at + lane % 4u, params.len_q - 1u));
                step_lse = vec4<f32>(
                    subgroupBroadcast(one, 0u), subgroupBroadcast(one, 1u), subgroupBroadcast(one, 2u), subgroupBroadcast(one, 3u),
                );
                // @end
            }
        }
        // @unroll
        for (var r = 0u; r < ROWS; r++) {
            var weights = vec4<f32>();
            if (inside) {
                let row_lse = select(vec4<f32>(kept_lse[r]), step_lse, BY_KEY);
                weights = weigh(sum[r], b, h, min(row + r, kept_len - 1u), at, end, row_lse, band);
                total[r] += weights;
            }
            if (RESULT == 0u && row + r < kept_len) {
                store_weights(out_base + (row + r) * params.out_strides.z + at, weights);
            }
        }
    }
    // @unroll
    for (var r = 0u; r < ROWS; r++) {
        if (RESULT > 0u && row + r < kept_len) {
            let sum = (total[r].x + total[r].y) + (total[r].z + total[r].w);
            store_sum(out_base + (row + r) * params.out_strides.z + split * params.out_strides.w, sum);
        }
    }
}
