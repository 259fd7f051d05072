// O = softmax(scale · Q·Kᵀ → softcap → + bias → mask) · V, LSE = ln Σ exp S          fused
// Q [b, h, i, d]   K, V [b, h / group, j, d]   O [b, h, i, d]   LSE [b, h, i]
//
// FlashAttention-2 (Dao 2023, algorithm 1): the scores of KEYS keys at a time, a running maximum and sum
// per row (Milakov and Gimelshein 2018), the output rescaled when the maximum grows. Each invocation
// keeps ROWS rows of Q and O in registers. A row is a query of a head; the rows of all heads that share
// keys lie one after another. With subgroups, SHARE lanes load different parts of K and V and hand
// them round. Keys may be cut into splits, each with its own O and LSE; merge.wgsl joins them.
//
// A sink is one more score per head without a value: the running maximum and sum of split 0 start with it
// (Xiao et al. 2024, "Efficient Streaming Language Models with Attention Sinks", section 3.3).
//
// 0 · NaN is NaN, so a weight of 0 does not hide a masked value. Values are finite as a rule: the
// sum takes a value that is not finite as 0; where there was one, the terms that a row may see are
// added at the end.

const WORKGROUP: u32 = 64u;
const ROWS: u32 = 1u;
const KEYS: u32 = 4u;
// vec4s that hold a weight for each of them.
const GROUPS: u32 = 1u;
const DEPTH4: u32 = 4u;
const COLS4: u32 = 4u;
// Loads per lane and key: DEPTH4 / SHARE, rounded up.
const K_LOADS: u32 = 4u;
// Parts of a row that are loaded, stored between two turns of a loop.
const Q_LOADS: u32 = 1u;
const O_STORES: u32 = 1u;
const SHARE: u32 = 1u;
// Keys whose values are looked at together where some are not finite.
const SPAN: u32 = 32u;
const SOFTCAP: bool = true;
const BANDED: bool = true;
// True with a mask or a bias.
const LISTED: bool = true;
// True with a bias by distance.
const RELATIVE: bool = true;
const SINK: bool = true;
// True when the registers hold more than the width of a key, of a value.
const PADDED_K: bool = true;
const PADDED_V: bool = true;

const_assert KEYS <= GROUPS * 4u;
const_assert K_LOADS * SHARE >= DEPTH4;
const_assert KEYS * COLS4 % SHARE == 0u;

alias QElem = f32;
alias KElem = f32;
alias VElem = f32;
alias OElem = f32;

// @use flash_params

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> q: array<QElem>;
@group(0) @binding(2) var<storage, read> k: array<KElem>;
@group(0) @binding(3) var<storage, read_write> o: array<OElem>;
@group(0) @binding(8) var<storage, read> v: array<VElem>;

// @use lse

// @use bands

// @use mask(a 5)

// @use mask(b 6)

// @use bias

// @use tiles

// @use all_seen

// @use relative

// @use sink

// @use visible

// @use load(q dim_k PADDED_K w)

// @use load(k dim_k PADDED_K w)

// @use rotary

// @use load(v dim_v PADDED_V w)

// @use store(o dim_v !PADDED_V)

// @use tanh

// @use numbers

// @use place

// @use sequence

// @use score

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
    let bh = index / (params.splits * params.row_blocks);
    let head_kv = bh % params.heads_kv;
    let sequence = sequence_of((index / params.splits) % params.row_blocks, bh / params.heads_kv);
    let b = sequence.b;
    let len_q = sequence.len_q;
    let len_k = sequence.len_k;
    let band = band_of(sequence.index);

    let rows = params.group * len_q;
    let first_row = sequence.row_block * WORKGROUP * ROWS;
    let row = first_row + local * ROWS;
    let k_base = params.k_offset + b * params.k_strides.x + head_kv * params.k_strides.y
        + sequence.first_key * params.k_strides.z;
    let v_base = params.v_offset + b * params.v_strides.x + head_kv * params.v_strides.y
        + sequence.first_key * params.v_strides.z;

    // Before the loops: some drivers leave what does not change where it stands, and divisions are dear.
    var head: array<u32, ROWS>;
    var query: array<u32, ROWS>;
    var relative_from: array<u32, ROWS>;
    var q_base: array<u32, ROWS>;
    var q_tile: array<vec4<f32>, ROWS * DEPTH4>;
    // @unroll
    for (var r = 0u; r < ROWS; r++) {
        let at = min(row + r, rows - 1u);
        head[r] = head_kv * params.group + at / len_q;
        query[r] = at % len_q;
        relative_from[r] = relative_row(b, head[r], query[r]);
        q_base[r] = params.q_offset + b * params.q_strides.x + head[r] * params.q_strides.y
            + (sequence.first_query + query[r]) * params.q_strides.z;
    }
    // Loads and stores of single lanes are long pieces of code on software adapters, and take longest to
    // compile: one for each row stands in a loop, and selects put what it gives into its register.
    // @block bring_q
    for (var first = 0u; first < DEPTH4; first += Q_LOADS) {
        // @unroll
        for (var r = 0u; r < ROWS; r++) {
            // @unroll
            for (var n = 0u; n < Q_LOADS; n++) {
                let q4 = turned_q(q_base[r], first + n, u32(i32(query[r] + params.row_0) + band.w));
                // @unroll
                for (var e = 0u; e < DEPTH4 / Q_LOADS; e++) {
                    let to = r * DEPTH4 + e * Q_LOADS + n;
                    q_tile[to] = select(q_tile[to], q4, first == e * Q_LOADS);
                }
            }
        }
    }
    // @or halves
    // Both halves of a pair rotate together.
    for (var d = 0u; d < PAIRS4; d++) {
        // @unroll
        for (var r = 0u; r < ROWS; r++) {
            let at = u32(i32(query[r] + params.row_0) + band.w) * 2u * PAIRS4 + d;
            let cosine = angles[at];
            let sine = angles[at + PAIRS4];
            let low = load_q(q_base[r], d);
            let high = load_q(q_base[r], d + PAIRS4);
            let turned_low = low * cosine - high * sine;
            let turned_high = high * cosine + low * sine;
            // @unroll
            for (var e = 0u; e < PAIRS4; e++) {
                q_tile[r * DEPTH4 + e] = select(q_tile[r * DEPTH4 + e], turned_low, d == e);
                q_tile[r * DEPTH4 + PAIRS4 + e] = select(q_tile[r * DEPTH4 + PAIRS4 + e], turned_high, d == e);
            }
        }
    }
    // @end

    // Which part of a key this lane loads, load by load; which key and which part of its value.
    var k_part: array<u32, K_LOADS>;
    // @unroll
    for (var n = 0u; n < K_LOADS; n++) {
        k_part[n] = min(n * SHARE + lane, DEPTH4 - 1u);
    }
    var v_lane: array<u32, KEYS * COLS4 / SHARE>;
    var v_part: array<u32, KEYS * COLS4 / SHARE>;
    // @unroll
    for (var n = 0u; n < KEYS * COLS4 / SHARE; n++) {
        v_lane[n] = v_base + (n * SHARE + lane) % KEYS * params.v_strides.z;
        v_part[n] = (n * SHARE + lane) / KEYS;
    }

    // The keys of this split that any row of this workgroup can see by position.
    var start = min(split * sequence.keys_per_split, len_k);
    var end = min(start + sequence.keys_per_split, len_k);
    if (BANDED) {
        let last_row = min(first_row + WORKGROUP * ROWS, rows) - 1u;
        let one_head = first_row / len_q == last_row / len_q;
        let first_query = select(0u, first_row % len_q, one_head);
        let last_query = select(len_q - 1u, last_row % len_q, one_head);
        let low = u32(max(i32(first_query + params.row_0) + band.y - i32(params.key_0), 0));
        if (params.ruled_keys >= params.key_0 + len_k) {
            let high = i32(last_query + params.row_0) + band.z - i32(params.key_0);
            end = min(end, u32(max(min(high, band.x - 1 - i32(params.key_0)) + 1, 0)));
            start = max(start, low / KEYS * KEYS);
        } else {
            // The extra keys at the end are seen by every row.
            start = max(start, min(low, max(params.ruled_keys, params.key_0) - params.key_0) / KEYS * KEYS);
        }
    }

    var sum: array<vec4<f32>, ROWS * COLS4>;
    var peak: array<f32, ROWS>;
    var total: array<f32, ROWS>;
    // The largest bits, without sign, of a score that was seen: NaN and +∞ make a row NaN. Bits, since
    // drivers differ on NaN in max and exp2.
    var worst: array<u32, ROWS>;
    var found = vec4<bool>();
    // @unroll
    for (var r = 0u; r < ROWS; r++) {
        peak[r] = LEAST;
        if (SINK && split == 0u) {
            let score = sink_of(head[r]);
            let bits = bitcast<u32>(score);
            // A sink of −∞ is none.
            if (bits != params.minus_infinity) {
                peak[r] = score;
                total[r] = 1.0;
                worst[r] = bits & 0x7fffffffu;
            }
        }
    }
    let tile_row = b * params.tile_batch_stride + head_kv * params.tile_head_stride
        + sequence.row_block * params.tiles;
    for (var j = next_key(tile_row, start, end); j < end; j = next_key(tile_row, j + KEYS, end)) {
        let listed = !all_seen(tile_row, j);
        var mine = vec4<f32>();
        var weight = array<vec4<f32>, ROWS * GROUPS>();
        // Not written out: a quarter of the text, and what the loop carries is little.
        for (var c = 0u; c < KEYS; c++) {
            // Behind the last key lies what is not seen.
            let key = k_base + (j + c) * params.k_strides.z;
            let position = min(j + c, len_k - 1u) + params.key_0;
            // @block bring_k
            // @or halves
            // A key's vec4s of a lane; those APART loads from each other are pairs and rotate together.
            const APART: u32 = 1u;
            var brought = array<vec4<f32>, K_LOADS>();
            // @unroll
            for (var n = 0u; n < K_LOADS; n++) {
                brought[n] = load_k(key, k_part[n]);
            }
            // @unroll
            for (var n = 0u; n < APART; n++) {
                let at = position * 2u * PAIRS4 + k_part[n];
                let cosine = angles[at];
                let sine = angles[at + PAIRS4];
                let low = brought[n];
                let high = brought[n + APART];
                brought[n] = low * cosine - high * sine;
                brought[n + APART] = high * cosine + low * sine;
            }
            // @end
            var part = array<f32, ROWS>();
            // @unroll
            for (var d = 0u; d < DEPTH4; d++) {
                if (d % SHARE == 0u) {
                    // @block part_k
                    mine = turned_k(key, k_part[d / SHARE], position);
                    // @end
                }
                // @block share_k
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
                // @unroll
                for (var g = 0u; g < GROUPS; g++) {
                    let is_here = vec4<u32>(4u * g) + vec4<u32>(0u, 1u, 2u, 3u) == vec4<u32>(c);
                    weight[r * GROUPS + g] = select(weight[r * GROUPS + g], vec4<f32>(part[r]), is_here);
                }
            }
        }
        var more = array<vec4<f32>, ROWS * GROUPS>();
        // @block relative_step
        // @unroll
        for (var r = 0u; r < ROWS; r++) {
            // @unroll
            for (var g = 0u; g < GROUPS; g++) {
                more[r * GROUPS + g] = relative_at(relative_from[r], away(query[r], j + 4u * g, band));
            }
        }
        // @or runs
        // The rows are neighbours: what their distances add overlaps, ROWS + 3 values for each four keys.
        const NEAR: u32 = 1u;
        // @unroll
        for (var g = 0u; g < GROUPS; g++) {
            let first = away(query[ROWS - 1u], j + 4u * g, band);
            var near = array<vec4<f32>, NEAR>();
            // @unroll
            for (var n = 0u; n < NEAR; n++) {
                near[n] = relative_at(relative_from[0u], first + vec4<i32>(4 * i32(n)));
            }
            // @unroll
            for (var r = 0u; r < ROWS; r++) {
                // @unroll
                for (var e = 0u; e < 4u; e++) {
                    more[r * GROUPS + g][e] = near[(ROWS - 1u - r + e) / 4u][(ROWS - 1u - r + e) % 4u];
                }
            }
        }
        // @end
        var factor = array<f32, ROWS>();
        // @unroll
        for (var r = 0u; r < ROWS; r++) {
            var scores = array<Scores, GROUPS>();
            var highest = peak[r];
            // @unroll
            for (var g = 0u; g < GROUPS; g++) {
                scores[g] = finish(weight[r * GROUPS + g], b, head[r], query[r], j + 4u * g, end, band, listed, more[r * GROUPS + g]);
                let x = select(vec4<f32>(LEAST), scores[g].x, scores[g].seen);
                let bits = bitcast<vec4<u32>>(x) & vec4<u32>(0x7fffffffu);
                worst[r] = max(max(max(worst[r], bits.x), bits.y), max(bits.z, bits.w));
                highest = max(max(highest, max(x.x, x.y)), max(x.z, x.w));
                scores[g].x = x;
            }
            factor[r] = exp2(max((peak[r] - highest) * LOG2_E, -200.0));
            peak[r] = highest;
            total[r] *= factor[r];
            // @unroll
            for (var g = 0u; g < GROUPS; g++) {
                let w = weigh(scores[g], highest);
                weight[r * GROUPS + g] = w;
                total[r] += (w.x + w.y) + (w.z + w.w);
            }
        }
        // @unroll
        for (var d = 0u; d < COLS4; d++) {
            // The values first, then row by row: what a row sums stands in registers for all keys of the step.
            var v_tile = array<vec4<f32>, KEYS>();
            // @unroll
            for (var c = 0u; c < KEYS; c++) {
                if ((d * KEYS + c) % SHARE == 0u) {
                    let n = (d * KEYS + c) / SHARE;
                    mine = load_v(v_lane[n] + j * params.v_strides.z, v_part[n]);
                    found = found | not_finite(mine);
                    mine = select(mine, vec4<f32>(), not_finite(mine));
                }
                // @block share_v
                let v4 = mine;
                // @end
                v_tile[c] = v4;
            }
            // @unroll
            for (var r = 0u; r < ROWS; r++) {
                var row_sum = sum[r * COLS4 + d] * factor[r];
                // @unroll
                for (var c = 0u; c < KEYS; c++) {
                    row_sum = fma(vec4<f32>(weight[r * GROUPS + c / 4u][c % 4u]), v_tile[c], row_sum);
                }
                sum[r * COLS4 + d] = row_sum;
            }
        }
    }

    let nan = bitcast<f32>(params.not_a_number);
    var o_base: array<u32, ROWS>;
    var divisor: array<f32, ROWS>;
    // @unroll
    for (var r = 0u; r < ROWS; r++) {
        o_base[r] = params.o_offset + b * params.o_strides.x + head[r] * params.o_strides.y
            + (sequence.first_query + query[r]) * params.o_strides.z + split * params.o_split_stride;
        let is_nan = worst[r] >= 0x7f800000u;
        // A row without visible keys has total 0 and stays 0.
        divisor[r] = select(select(1.0 / total[r], 0.0, total[r] == 0.0), nan, is_nan);
        if (row + r < rows) {
            let value = select(peak[r] + log2(total[r]) * LN_2, bitcast<f32>(params.minus_infinity), total[r] == 0.0);
            store_lse(
                params.lse_offset + dot(params.lse_strides, vec3<u32>(b, head[r], split)) + sequence.first_query + query[r],
                select(value, nan, is_nan),
            );
        }
    }
    for (var first = 0u; first < COLS4; first += O_STORES) {
        // @unroll
        for (var r = 0u; r < ROWS; r++) {
            // @unroll
            for (var n = 0u; n < O_STORES; n++) {
                var o4 = vec4<f32>();
                // @unroll
                for (var e = 0u; e < COLS4 / O_STORES; e++) {
                    o4 = select(o4, sum[r * COLS4 + e * O_STORES + n], first == e * O_STORES);
                }
                if (row + r < rows) {
                    store_o(o_base[r], first + n, select(o4 * divisor[r], vec4<f32>(nan), worst[r] >= 0x7f800000u), false);
                }
            }
        }
    }

    // @block any_not_finite
    let careful = any(found);
    // @end
    // What values that are not finite add to the rows that see them. A weight is above 0, so that it is the values
    // alone. Few turns of loops for each key: some drivers count them (src/kernels/turns.rs).
    let repaired = select(start, end, careful);
    for (var j = start; j < repaired; j += SPAN) {
        let span = min(SPAN, end - j);
        // A bit for each key that a row sees.
        var sees = array<u32, ROWS>();
        for (var c = 0u; c < span; c++) {
            // @unroll
            for (var r = 0u; r < ROWS; r++) {
                if (row + r < rows && visible(b, head[r], query[r], j + c, band)) {
                    sees[r] |= 1u << c;
                }
            }
        }
        // Bounds that no compiler knows: written out, this rare part would take longer than all the rest.
        for (var d = 0u; d < (params.dim_v + 3u) / 4u; d++) {
            var term = array<vec4<f32>, ROWS>();
            for (var first = 0u; first < span; first += 4u) {
                // @unroll
                for (var n = 0u; n < 4u; n++) {
                    let c = first + n;
                    let value = load_v(v_base + min(j + c, end - 1u) * params.v_strides.z, d);
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
                    store_o(o_base[r], d, term[r], true);
                }
            }
        }
    }
}
