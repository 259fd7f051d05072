// O = softmax(scale · Q·Kᵀ → softcap → + bias → mask) · V, LSE = ln Σ exp S          fused
// Q [b, h, i, d]   K, V [b, h / group, j, d]   O [b, h, i, d]   LSE [b, h, i]
//
// FlashAttention-2 (Dao 2023, algorithm 1): computes the scores of KEYS keys at a time, keeps a running maximum and sum
// per row (Milakov and Gimelshein 2018), and rescales the output when the maximum grows. Each invocation keeps ROWS
// rows of Q and O in registers. A row is a query of a head; the rows of all heads that share keys are consecutive. With
// subgroups, SHARE lanes load different parts of K and V and broadcast them. Keys may be split, each split with its own
// O and LSE; merge.wgsl joins them.
//
// A sink is one extra score per head without a value: the running maximum and sum of split 0 start with it (Xiao et al.
// 2024, "Efficient Streaming Language Models with Attention Sinks", section 3.3).

const ROWS: u32 = 1u;
const BLOCK_ROWS: u32 = WORKGROUP * ROWS;
const KEYS: u32 = 4u;
// Number of vec4s that hold one weight per key.
const GROUPS: u32 = 1u;
const DEPTH4: u32 = 4u;
const COLS4: u32 = 4u;
// Loads per lane and key: DEPTH4 / SHARE, rounded up.
const K_LOADS: u32 = 4u;
// Number of parts of a row to load, and to store, per loop iteration.
const Q_LOADS: u32 = 1u;
const O_STORES: u32 = 1u;
const SHARE: u32 = 1u;

const_assert KEYS <= GROUPS * 4u;
const_assert K_LOADS * SHARE >= DEPTH4;
const_assert KEYS * COLS4 % SHARE == 0u;

// @use fused

fn run(index: u32, local: u32, lane: u32) {
    let work = work_of(index);
    let b = work.b;
    let band = work.band;
    let row = work.first_row + local * ROWS;

    // Computed before the loops: some drivers do not hoist loop invariants, and integer division is slow.
    var head: array<u32, ROWS>;
    var query: array<u32, ROWS>;
    var relative_from: array<u32, ROWS>;
    var q_base: array<u32, ROWS>;
    var q_tile: array<vec4<f32>, ROWS * DEPTH4>;
    // @unroll
    for (var r = 0u; r < ROWS; r++) {
        let at = row_of(work, row + r);
        head[r] = at.x;
        query[r] = at.y;
        relative_from[r] = relative_row(b, head[r], query[r]);
        q_base[r] = row_at(params.q, place_of(work, at));
    }
    // Loads and stores of single lanes become long code on software adapters and take the longest to compile. So there
    // is one per row in a loop, and selects put its result into the right register.
    // @block load_rows
    for (var first = 0u; first < DEPTH4; first += Q_LOADS) {
        // @unroll
        for (var r = 0u; r < ROWS; r++) {
            // @unroll
            for (var n = 0u; n < Q_LOADS; n++) {
                let q4 = rotated_q(q_base[r], first + n, position_of(work, query[r]));
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
            let position = position_of(work, query[r]);
            let halves = rotated_halves(load_q(q_base[r], d), load_q(q_base[r], d + PAIRS4), d, position);
            // @unroll
            for (var e = 0u; e < PAIRS4; e++) {
                q_tile[r * DEPTH4 + e] = select(q_tile[r * DEPTH4 + e], halves[0], d == e);
                q_tile[r * DEPTH4 + PAIRS4 + e] = select(q_tile[r * DEPTH4 + PAIRS4 + e], halves[1], d == e);
            }
        }
    }
    // @end

    // Which part of a key this lane loads, for each load; and which key and which part of its value.
    var k_part: array<u32, K_LOADS>;
    // @unroll
    for (var n = 0u; n < K_LOADS; n++) {
        k_part[n] = min(n * SHARE + lane, DEPTH4 - 1u);
    }
    var v_from: array<u32, KEYS * COLS4 / SHARE>;
    var v_part: array<u32, KEYS * COLS4 / SHARE>;
    // @unroll
    for (var n = 0u; n < KEYS * COLS4 / SHARE; n++) {
        v_from[n] = work.v_base + (n * SHARE + lane) % KEYS * params.v.strides.z;
        v_part[n] = (n * SHARE + lane) / KEYS;
    }

    var sum: array<vec4<f32>, ROWS * COLS4>;
    var peak: array<f32, ROWS>;
    var total: array<f32, ROWS>;
    // The largest bits of any score so far; see softmax_row.wgsl.
    var score_bits: array<u32, ROWS>;
    var has_not_finite = vec4<bool>();
    // @unroll
    for (var r = 0u; r < ROWS; r++) {
        let sums = first_sums(work, head[r]);
        peak[r] = sums.peak;
        total[r] = sums.total;
        score_bits[r] = sums.score_bits;
    }
    for (var j = next_key(work, work.start); j < work.end; j = next_key(work, j + KEYS)) {
        let masked = !block_is_full(work, j);
        var loaded = vec4<f32>();
        var weight = array<vec4<f32>, ROWS * GROUPS>();
        // Not unrolled: this keeps the text to a quarter, and the loop carries little state.
        for (var c = 0u; c < KEYS; c++) {
            // Beyond the last key nothing is seen.
            let key = work.k_base + (j + c) * params.k.strides.z;
            let position = min(j + c, work.len_k - 1u) + params.slice.key_0;
            // @block load_key
            // @or halves
            // A lane's vec4s of a key; those APART loads from each other form pairs and rotate together.
            const APART: u32 = 1u;
            var parts = array<vec4<f32>, K_LOADS>();
            // @unroll
            for (var n = 0u; n < K_LOADS; n++) {
                parts[n] = load_k(key, k_part[n]);
            }
            // @unroll
            for (var n = 0u; n < APART; n++) {
                let halves = rotated_halves(parts[n], parts[n + APART], k_part[n], position);
                parts[n] = halves[0];
                parts[n + APART] = halves[1];
            }
            // @end
            var part = array<f32, ROWS>();
            // @unroll
            for (var d = 0u; d < DEPTH4; d++) {
                if (d % SHARE == 0u) {
                    // @block part_k
                    loaded = rotated_k(key, k_part[d / SHARE], position);
                    // @end
                }
                // @block share_k
                let k4 = loaded;
                // @end
                // @unroll
                for (var r = 0u; r < ROWS; r++) {
                    part[r] = dot_on(q_tile[r * DEPTH4 + d], k4, part[r]);
                }
            }
            // @unroll
            for (var r = 0u; r < ROWS; r++) {
                // @unroll
                for (var g = 0u; g < GROUPS; g++) {
                    let is_here = four_from(4u * g) == vec4<u32>(c);
                    weight[r * GROUPS + g] = select(weight[r * GROUPS + g], vec4<f32>(part[r]), is_here);
                }
            }
        }
        var by_distance = array<vec4<f32>, ROWS * GROUPS>();
        // @block by_distance
        // @unroll
        for (var r = 0u; r < ROWS; r++) {
            // @unroll
            for (var g = 0u; g < GROUPS; g++) {
                by_distance[r * GROUPS + g] = relative_at(relative_from[r], distances(query[r], j + 4u * g, band));
            }
        }
        // @or neighbours
        // The rows are adjacent, so their biases by distance overlap: ROWS + 3 values for every four keys.
        const NEAR: u32 = 1u;
        // @unroll
        for (var g = 0u; g < GROUPS; g++) {
            let first = distances(query[ROWS - 1u], j + 4u * g, band);
            var near = array<vec4<f32>, NEAR>();
            // @unroll
            for (var n = 0u; n < NEAR; n++) {
                near[n] = relative_at(relative_from[0u], first + vec4<i32>(4 * i32(n)));
            }
            // @unroll
            for (var r = 0u; r < ROWS; r++) {
                // @unroll
                for (var e = 0u; e < 4u; e++) {
                    by_distance[r * GROUPS + g][e] = near[(ROWS - 1u - r + e) / 4u][(ROWS - 1u - r + e) % 4u];
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
                let key = four_from(j + 4u * g);
                let is_key = (key < vec4<u32>(work.end)) & (four_from(4u * g) < vec4<u32>(KEYS));
                let n = r * GROUPS + g;
                scores[g] = scores_of(
                    weight[n], by_distance[n], b, head[r], vec4<u32>(query[r]), key, band, masked, is_key,
                );
                let x = select(vec4<f32>(LEAST), scores[g].x, scores[g].seen);
                score_bits[r] = largest_bits(score_bits[r], x);
                highest = largest(highest, x);
                scores[g].x = x;
            }
            factor[r] = exp_below(vec4<f32>(peak[r]), highest).x;
            peak[r] = highest;
            total[r] *= factor[r];
            // @unroll
            for (var g = 0u; g < GROUPS; g++) {
                let w = select(vec4<f32>(), exp_below(scores[g].x, highest), scores[g].seen);
                weight[r * GROUPS + g] = w;
                total[r] += sum_of_four(w);
            }
        }
        // @unroll
        for (var d = 0u; d < COLS4; d++) {
            // Values first, then row by row, so that the terms of a row's sum are in registers for all keys of the
            // step.
            var v_tile = array<vec4<f32>, KEYS>();
            // @unroll
            for (var c = 0u; c < KEYS; c++) {
                if ((d * KEYS + c) % SHARE == 0u) {
                    let n = (d * KEYS + c) / SHARE;
                    loaded = load_v(v_from[n] + j * params.v.strides.z, v_part[n]);
                    has_not_finite = has_not_finite | not_finite(loaded);
                    loaded = select(loaded, vec4<f32>(), not_finite(loaded));
                }
                // @block share_v
                let v4 = loaded;
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

    let nan = vec4<f32>(bitcast<f32>(params.not_a_number));
    var o_base: array<u32, ROWS>;
    var divisor: array<f32, ROWS>;
    // @unroll
    for (var r = 0u; r < ROWS; r++) {
        let place = place_of(work, vec2<u32>(head[r], query[r]));
        o_base[r] = row_at(params.o, place) + work.split * params.o_split_stride;
        divisor[r] = inverse_of(total[r], score_bits[r] >= INFINITY_BITS);
        if (row + r < work.rows) {
            let lse = lse_of_row(peak[r], total[r], score_bits[r] >= INFINITY_BITS);
            store_lse(row_at(params.lse, place) + work.split * params.lse.strides.w, lse);
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
                if (row + r < work.rows) {
                    store_o(o_base[r], first + n, select(o4 * divisor[r], nan, score_bits[r] >= INFINITY_BITS), false);
                }
            }
        }
    }

    // @block any_not_finite
    let any_not_finite = any(has_not_finite);
    // @end
    if (any_not_finite) {
        // The bound is more than a parameter; see README.md.
        let columns = select(0u, (params.dim_v + 3u) / 4u, row < work.rows);
        add_not_finite(
            b, head, query, o_base, max(work.rows, row) - row, band, work.v_base, vec2<u32>(work.start, work.end),
            vec3<u32>(0u, columns, 1u),
        );
    }
}
