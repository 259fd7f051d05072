// P = exp(S − LSE), S = scale · Q·Kᵀ → softcap → + bias → mask            weights for the fused path
// weights P [b, h, i, j]   column sums Σ_i P [b, h, j]   entropy −Σ_j P·ln P [b, h, i]
//
// P is recomputed tile by tile from Q, K and LSE, as in the backward pass of FlashAttention-2 (Dao 2023, algorithm 2,
// line 11). Each invocation keeps ROWS rows of the outer operand in registers and iterates over the inner one STEP rows
// at a time. Queries are outer and keys inner; for column sums it is the other way round, so that every sum is computed
// by one invocation in a fixed order. With subgroups, SHARE lanes load different parts of the inner rows and broadcast
// them. The inner rows may be split, each split with its own sum; mean_heads.wgsl joins them in order.

const ROWS: u32 = 4u;
const STEP: u32 = 4u;
const DEPTH4: u32 = 4u;
// Heads wider than DEPTH4 · 4 are read in chunks, and the outer rows again at every step.
const CHUNKS: u32 = 1u;
const SHARE: u32 = 1u;
// True if CHUNKS · DEPTH4 · 4 is more than the width of a head.
const PADDED: bool = true;
// 0: weights, 1: column sums, 2: entropy.
const RESULT: u32 = 2u;
const BY_KEY: bool = RESULT == 1u;

const_assert STEP * DEPTH4 % SHARE == 0u;

alias OuterElem = f32;
alias InnerElem = f32;
alias OElem = f32;

struct Params {
    outer: View,
    inner: View,
    // Batch, head, outer row; for sums also the split.
    o: View,
    // Batch, head, query.
    lse: View,
    rules: Rules,
    slice: Slice,
    dim: u32,
    outer_blocks: u32,
    splits: u32,
    // Inner rows of a split.
    split_rows: u32,
    workgroups: u32,
    minus_infinity: u32,
    not_a_number: u32,
}

@group(0) @binding(1) var<storage, read> outer: array<OuterElem>;
@group(0) @binding(2) var<storage, read> inner: array<InnerElem>;
@group(0) @binding(3) var<storage, read_write> o: array<OElem>;
@group(0) @binding(8) var<storage, read> lse: array<f32>;

// @use each_workgroup, score, softmax_row, load(outer dim PADDED), load(inner dim PADDED)

// @block store_weights
fn store_weights(at: u32, weights: vec4<f32>) {
    o[at] = sum_of_four(weights);
}
// @end

fn lse_of(b: u32, h: u32, i: u32) -> f32 {
    return lse[row_at(params.lse, vec3<u32>(b, h, i))];
}

// exp of anything less is 0.
const LEAST_LOG: f32 = -138.0;

// P of one outer row with the inner rows `first`, `first + 1`, …, from their products; for the entropy, the terms −P·ln
// P. Hidden pairs give 0.
fn weights_of(
    product: vec4<f32>, b: u32, h: u32, row: u32, first: u32, end: u32, row_lse: vec4<f32>, band: vec4<i32>,
) -> vec4<f32> {
    let inner_rows = four_from(first);
    let i = select(vec4<u32>(row), inner_rows, BY_KEY);
    let j = select(inner_rows, vec4<u32>(row), BY_KEY);
    var by_distance = vec4<f32>();
    if (RELATIVE && BY_KEY) {
        // @unroll
        for (var c = 0u; c < STEP; c++) {
            by_distance[c] = relative_at(relative_row(b, h, first + c), distances(first + c, row, band)).x;
        }
    } else if (RELATIVE) {
        by_distance = relative_at(relative_row(b, h, row), distances(row, first, band));
    }
    // A row whose LSE is −∞ sees nothing.
    let is_pair = (inner_rows < vec4<u32>(end)) & (bitcast<vec4<u32>>(row_lse) != vec4<u32>(params.minus_infinity));
    let scores = scores_of(product, by_distance, b, h, i, j, band, true, is_pair);
    let exact = scores.x - row_lse;
    let log_p = max(exact, vec4<f32>(LEAST_LOG));
    var y = exp2(log_p * LOG2_E);
    if (RESULT == 2u) {
        // Rounding may raise ln P above 0 by an ulp.
        y *= max(-log_p, vec4<f32>());
    }
    // Detected by bits, because drivers differ on NaN in max and exp2.
    let is_nan = (bitcast<vec4<u32>>(exact) & vec4<u32>(0x7fffffffu)) > vec4<u32>(INFINITY_BITS);
    y = select(y, vec4<f32>(bitcast<f32>(params.not_a_number)), is_nan);
    return select(vec4<f32>(), y, scores.seen);
}

// The range of inner rows that an outer row from `first` to `last` can see, or be seen by, by position.
fn inner_in_band(first: u32, last: u32, band: vec4<i32>) -> vec2<u32> {
    if (!BY_KEY) {
        return keys_in_band(first, last, band, vec2<u32>(0u, params.slice.len_k), STEP, params.slice.len_k);
    }
    let key_0 = i32(params.slice.key_0);
    // Every query sees the keys that no rule applies to.
    if (!BANDED || i32(last) + key_0 >= i32(params.rules.maskable_keys)) {
        return vec2<u32>(0u, params.slice.len_q);
    }
    let low = max(i32(first) + key_0 - band.z - i32(params.slice.row_0), 0);
    let high = max(i32(last) + key_0 - band.y - i32(params.slice.row_0) + 1, 0);
    return vec2<u32>(u32(low), select(0u, u32(high), i32(first) + key_0 < band.x));
}

fn run(index: u32, local: u32, lane: u32) {
    // The column blocks are the splits.
    let place = tile_of(index, params.outer_blocks, params.splits);
    let b = place.b;
    let h = place.h;
    let band = place.band;

    let outer_len = select(params.slice.len_q, params.slice.len_k, BY_KEY);
    let inner_len = select(params.slice.len_k, params.slice.len_q, BY_KEY);
    let first_row = place.row_block * WORKGROUP * ROWS;
    let row = first_row + local * ROWS;
    let inner_base = row_at(params.inner, vec3<u32>(b, select(place.head_kv, h, BY_KEY), 0u));
    let start = place.column_block * params.split_rows;
    let end = min(start + params.split_rows, inner_len);
    let seen = inner_in_band(first_row, min(first_row + WORKGROUP * ROWS, outer_len) - 1u, band);

    // Computed before the loops: some drivers do not hoist loop invariants, and integer division is slow.
    var outer_at: array<u32, ROWS>;
    var outer_lse: array<f32, ROWS>;
    var tile: array<vec4<f32>, ROWS * DEPTH4>;
    // @unroll
    for (var r = 0u; r < ROWS; r++) {
        let own = min(row + r, outer_len - 1u);
        outer_at[r] = row_at(params.outer, vec3<u32>(b, select(h, place.head_kv, BY_KEY), own));
        if (!BY_KEY) {
            outer_lse[r] = lse_of(b, h, own);
        }
        if (CHUNKS == 1u) {
            // @unroll
            for (var d = 0u; d < DEPTH4; d++) {
                tile[r * DEPTH4 + d] = load_outer(outer_at[r], d);
            }
        }
    }
    // Which inner row, and which part of it, this lane loads, for each load.
    var inner_from: array<u32, STEP * DEPTH4 / SHARE>;
    var inner_part: array<u32, STEP * DEPTH4 / SHARE>;
    // @unroll
    for (var n = 0u; n < STEP * DEPTH4 / SHARE; n++) {
        inner_from[n] = inner_base + (n * SHARE + lane) / DEPTH4 * params.inner.strides.z;
        inner_part[n] = (n * SHARE + lane) % DEPTH4;
    }
    let out_base = row_at(params.o, vec3<u32>(b, h, 0u));

    var total: array<vec4<f32>, ROWS>;
    for (var at = start; at < end; at += STEP) {
        let is_seen = at + STEP > seen.x && at < seen.y;
        var sum = array<vec4<f32>, ROWS>();
        var step_lse = vec4<f32>();
        if (is_seen) {
            for (var chunk = 0u; chunk < CHUNKS; chunk++) {
                if (CHUNKS > 1u) {
                    // @unroll
                    for (var r = 0u; r < ROWS; r++) {
                        // @unroll
                        for (var d = 0u; d < DEPTH4; d++) {
                            tile[r * DEPTH4 + d] = load_outer(outer_at[r], chunk * DEPTH4 + d);
                        }
                    }
                }
                var loaded = vec4<f32>();
                // @unroll
                for (var c = 0u; c < STEP; c++) {
                    var part = array<f32, ROWS>();
                    // @unroll
                    for (var d = 0u; d < DEPTH4; d++) {
                        if ((c * DEPTH4 + d) % SHARE == 0u) {
                            // Beyond the last row nothing is seen.
                            let n = (c * DEPTH4 + d) / SHARE;
                            loaded = load_inner(inner_from[n] + at * params.inner.strides.z, chunk * DEPTH4 + inner_part[n]);
                        }
                        // @block share
                        let y4 = loaded;
                        // @end
                        // @unroll
                        for (var r = 0u; r < ROWS; r++) {
                            part[r] = dot_on(tile[r * DEPTH4 + d], y4, part[r]);
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
                    step_lse[c] = lse_of(b, h, min(at + c, params.slice.len_q - 1u));
                }
                // @or shared
                let one = lse_of(b, h, min(at + lane % 4u, params.slice.len_q - 1u));
                step_lse = vec4<f32>(
                    subgroupBroadcast(one, 0u), subgroupBroadcast(one, 1u), subgroupBroadcast(one, 2u), subgroupBroadcast(one, 3u),
                );
                // @end
            }
        }
        // @unroll
        for (var r = 0u; r < ROWS; r++) {
            var weights = vec4<f32>();
            if (is_seen) {
                let row_lse = select(vec4<f32>(outer_lse[r]), step_lse, BY_KEY);
                weights = weights_of(sum[r], b, h, min(row + r, outer_len - 1u), at, end, row_lse, band);
                total[r] += weights;
            }
            if (RESULT == 0u && row + r < outer_len) {
                store_weights(out_base + (row + r) * params.o.strides.z + at, weights);
            }
        }
    }
    // @unroll
    for (var r = 0u; r < ROWS; r++) {
        if (RESULT > 0u && row + r < outer_len) {
            store_weights(out_base + (row + r) * params.o.strides.z + place.column_block * params.o.strides.w, total[r]);
        }
    }
}
