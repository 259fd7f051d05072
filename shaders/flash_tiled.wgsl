// O = softmax(scale · Q·Kᵀ → softcap → + bias → mask) · V, LSE = ln Σ exp S          fused, for GPUs
// Q [b, h, i, d]   K, V [b, h / group, j, d]   O [b, h, i, d]   LSE [b, h, i]
//
// Like flash.wgsl, for adapters with fast workgroup memory. A workgroup takes a block of rows: ACROSS invocations share
// ROWS rows, each with ROWS rows by four keys of S, and ROWS rows of every ACROSS-th vec4 of O, in registers (Dao 2023,
// algorithm 1; register tiles as in any matrix product). Workgroup memory holds a part of the rows of Q and of the keys,
// then the weights P and a part of V. The sum of a row stays separate in its invocations until the end.
//
// Arrays in workgroup memory are nested. The outer index depends on the invocation and is computed and checked once; the
// inner ones are constants, which become offsets of the load instructions. One unused vec4 per outer element keeps
// invocations in different banks.

// @use fused

// Invocations per row.
const ACROSS: u32 = 8u;
const ROWS: u32 = 4u;
// Four keys per invocation and step.
const KEYS: u32 = 4u * ACROSS;
const DOWN: u32 = WORKGROUP / ACROSS;
const BLOCK_ROWS: u32 = DOWN * ROWS;
const DEPTH4: u32 = 16u;
const COLS4: u32 = 16u;
// A part of Q and K: vec4s of each row and key, and number of parts.
const PART4: u32 = 8u;
const K_PARTS: u32 = (DEPTH4 + PART4 - 1u) / PART4;
// A part of V: vec4s of each value per invocation, keys in fours; number of parts along the columns and the keys.
const V_AT_ONCE: u32 = 2u;
const V_FOURS: u32 = PART4 / V_AT_ONCE;
const V_STRIPS: u32 = 1u;
const V_PARTS: u32 = ACROSS / V_FOURS;
// vec4s of O per row and invocation.
const O_PARTS: u32 = V_STRIPS * V_AT_ONCE;
// vec4s that an invocation loads of a part of the rows, of the keys or values.
const ROW_LOADS: u32 = 4u;
const KEY_LOADS: u32 = 4u * PART4 / DOWN;
// vec4s that hold one number per row.
const ROWS4: u32 = 1u;
// Unused vec4s.
const ROW_PAD: u32 = 1u;

const_assert ROWS4 * 4u >= ROWS;
const_assert ROW_LOADS * ACROSS >= ROWS * PART4 && KEY_LOADS * DOWN == 4u * PART4;
const_assert V_FOURS * V_AT_ONCE == PART4 && V_PARTS * V_FOURS == ACROSS && V_PARTS >= V_AT_ONCE;
const_assert O_PARTS * ACROSS >= COLS4;

// A part of Q, V_AT_ONCE times DOWN times ROWS rows by V_FOURS vec4s; then the weights, V_PARTS times the same.
// `run` uses what is smaller than a vec4 last: drivers place variables in this order, one after another, and load a vec4
// at once only if it is aligned.
var<workgroup> rows_part: array<array<vec4<f32>, ROWS * V_FOURS + ROW_PAD>, DOWN * V_PARTS>;
// A part of K, four keys by PART4 vec4s per lane; then of V, 4 · V_FOURS keys by V_AT_ONCE vec4s.
var<workgroup> keys_part: array<array<vec4<f32>, 4u * PART4 + 1u>, ACROSS>;
// One number for each row from each of its invocations.
var<workgroup> of_rows: array<array<vec4<f32>, ACROSS * ROWS4>, DOWN>;
var<workgroup> any_not_finite: atomic<u32>;
// The index of the workgroup.
var<workgroup> index_again: u32;

// Whether parts of Q and K, and of V, are all whole.
const WHOLE_K: bool = K_PARTS * PART4 == DEPTH4;
const WHOLE_V: bool = O_PARTS * ACROSS == COLS4;
// Rows that the workgroup loads at a time, of a part of Q or K, and of V.
const K_STRIDE: u32 = WORKGROUP / PART4;
const V_WIDTH: u32 = ACROSS * V_AT_ONCE;
const V_STRIDE: u32 = WORKGROUP / V_WIDTH;

// vec4 d of a row of Q or K, and of V, to load; beyond the end the last one.
fn k_column(d: u32) -> u32 {
    return select(min(d, DEPTH4 - 1u), d, WHOLE_K);
}
fn v_column(d: u32) -> u32 {
    return select(min(d, COLS4 - 1u), d, WHOLE_V);
}

// What this invocation loads of a part of the keys from j. Beyond the last key nothing is seen.
fn keys_from(work: Work, j: u32, part: u32, local: u32) -> array<vec4<f32>, KEY_LOADS> {
    var loaded = array<vec4<f32>, KEY_LOADS>();
    let d = part * PART4 + local % PART4;
    let row = local / PART4 * params.k.strides.z;
    // @unroll
    for (var n = 0u; n < KEY_LOADS; n++) {
        let first = j + n * K_STRIDE;
        let position = min(first + local / PART4, work.len_k - 1u) + params.slice.key_0;
        let k4 = rotated_k(work.k_base + first * params.k.strides.z + row, k_column(d), position);
        loaded[n] = select(vec4<f32>(), k4, WHOLE_K || d < DEPTH4);
    }
    return loaded;
}
// The same for values.
fn values_from(work: Work, j: u32, strip: u32, local: u32) -> array<vec4<f32>, KEY_LOADS> {
    var loaded = array<vec4<f32>, KEY_LOADS>();
    let d = strip * V_WIDTH + local % V_WIDTH;
    let row = local / V_WIDTH * params.v.strides.z;
    // @unroll
    for (var n = 0u; n < KEY_LOADS; n++) {
        let v4 = load_v(work.v_base + (j + n * V_STRIDE) * params.v.strides.z + row, v_column(d));
        loaded[n] = select(vec4<f32>(), v4, WHOLE_V || d < COLS4);
    }
    return loaded;
}

fn run(index: u32, local: u32, lane: u32) {
    let work = work_of(index);
    let b = work.b;
    let band = work.band;
    let down = local / ACROSS;
    let across = local % ACROSS;
    let row = work.first_row + down * ROWS;

    // The rows that this invocation works on, and those that it loads.
    var head: array<u32, ROWS>;
    var query: array<u32, ROWS>;
    var relative_from: array<u32, ROWS>;
    // @unroll
    for (var r = 0u; r < ROWS; r++) {
        let at = row_of(work, row + r);
        head[r] = at.x;
        query[r] = at.y;
        relative_from[r] = relative_row(b, head[r], query[r]);
    }
    var q_base: array<u32, ROW_LOADS>;
    var q_position: array<u32, ROW_LOADS>;
    // @unroll
    for (var n = 0u; n < ROW_LOADS; n++) {
        let at = row_of(work, work.first_row + n * K_STRIDE + local / PART4);
        q_base[n] = row_at(params.q, place_of(work, at));
        q_position[n] = position_of(work, at.y);
    }

    var sum: array<vec4<f32>, ROWS * O_PARTS>;
    var peak: array<f32, ROWS>;
    var total: array<f32, ROWS>;
    // The largest bits of any score so far; see softmax_row.wgsl.
    var score_bits: array<u32, ROWS>;
    var has_not_finite = false;
    // @unroll
    for (var r = 0u; r < ROWS; r++) {
        let sums = first_sums(work, head[r]);
        peak[r] = sums.peak;
        // Of a row's partial sums, the first includes the sink.
        total[r] = select(0.0, sums.total, across == 0u);
        score_bits[r] = sums.score_bits;
    }
    for (var j = next_key(work, work.start); j < work.end; j = next_key(work, j + KEYS)) {
        var product = array<vec4<f32>, ROWS>();
        for (var part = 0u; part < K_PARTS; part++) {
            var loaded = keys_from(work, j, part, local);
            // The previous contents have been read.
            workgroupBarrier();
            // Few rows have fewer vec4s than there are invocations.
            if (ROWS * PART4 >= ACROSS || local < DOWN * ROWS * PART4) {
                let d = part * PART4 + local % PART4;
                let e = local % PART4;
                let r = local / PART4;
                // @unroll
                for (var n = 0u; n < ROW_LOADS; n++) {
                    let outer = (n * (K_STRIDE / ROWS) + r / ROWS) * V_AT_ONCE + e / V_FOURS;
                    rows_part[outer][r % ROWS * V_FOURS + e % V_FOURS] =
                        select(vec4<f32>(), rotated_q(q_base[n], k_column(d), q_position[n]), WHOLE_K || d < DEPTH4);
                }
            }
            // @unroll
            for (var n = 0u; n < KEY_LOADS; n++) {
                let c = local / PART4;
                keys_part[n * (K_STRIDE / 4u) + c / 4u][c % 4u * PART4 + local % PART4] = loaded[n];
            }
            workgroupBarrier();
            // @unroll
            for (var e = 0u; e < PART4; e++) {
                var k4 = array<vec4<f32>, 4>();
                // @unroll
                for (var c = 0u; c < 4u; c++) {
                    k4[c] = keys_part[across][c * PART4 + e];
                }
                // @unroll
                for (var r = 0u; r < ROWS; r++) {
                    let q4 = rows_part[down * V_AT_ONCE + e / V_FOURS][r * V_FOURS + e % V_FOURS];
                    // @unroll
                    for (var c = 0u; c < 4u; c++) {
                        product[r][c] = dot_on(q4, k4[c], product[r][c]);
                    }
                }
            }
        }
        let masked = !block_is_full(work, j);
        let first = j + across * 4u;
        var scores = array<Scores, ROWS>();
        var highest_here = array<vec4<f32>, ROWS4>();
        // @unroll
        for (var r = 0u; r < ROWS; r++) {
            let by_distance = relative_at(relative_from[r], distances(query[r], first, band));
            scores[r] = scores_of(
                product[r], by_distance, b, head[r], vec4<u32>(query[r]), four_from(first), band, masked,
                four_from(first) < vec4<u32>(work.end),
            );
            let x = select(vec4<f32>(LEAST), scores[r].x, scores[r].seen);
            score_bits[r] = largest_bits(score_bits[r], x);
            scores[r].x = x;
            highest_here[r / 4u][r % 4u] = largest(LEAST, x);
        }
        // @unroll
        for (var n = 0u; n < ROWS4; n++) {
            of_rows[down][across * ROWS4 + n] = highest_here[n];
        }
        // Every part of Q and K has been read, and every maximum is ready.
        workgroupBarrier();
        // @unroll
        for (var n = 0u; n < ROWS4; n++) {
            // @unroll
            for (var other = 0u; other < ACROSS; other++) {
                highest_here[n] = max(highest_here[n], of_rows[down][other * ROWS4 + n]);
            }
        }
        // @unroll
        for (var r = 0u; r < ROWS; r++) {
            let highest = max(peak[r], highest_here[r / 4u][r % 4u]);
            let factor = exp_below(vec4<f32>(peak[r]), highest).x;
            let w = select(vec4<f32>(), exp_below(scores[r].x, highest), scores[r].seen);
            peak[r] = highest;
            total[r] = total[r] * factor + sum_of_four(w);
            rows_part[down * V_PARTS + across / V_FOURS][r * V_FOURS + across % V_FOURS] = w;
            // @unroll
            for (var p = 0u; p < O_PARTS; p++) {
                sum[r * O_PARTS + p] *= factor;
            }
        }
        // @unroll
        for (var strip = 0u; strip < V_STRIPS; strip++) {
            for (var part = 0u; part < V_PARTS; part++) {
                var loaded = values_from(work, j + part * V_FOURS * 4u, strip, local);
                if (strip + part > 0u) {
                    workgroupBarrier();
                }
                // @unroll
                for (var n = 0u; n < KEY_LOADS; n++) {
                    let c = n * V_STRIDE + local / V_WIDTH;
                    let d = local % V_WIDTH;
                    let is_not = not_finite(loaded[n]);
                    has_not_finite = has_not_finite | any(is_not);
                    keys_part[d % ACROSS][c * V_AT_ONCE + d / ACROSS] = select(loaded[n], vec4<f32>(), is_not);
                }
                workgroupBarrier();
                // @unroll
                for (var g = 0u; g < V_FOURS; g++) {
                    var p4 = array<vec4<f32>, ROWS>();
                    // @unroll
                    for (var r = 0u; r < ROWS; r++) {
                        p4[r] = rows_part[down * V_PARTS + part][r * V_FOURS + g];
                    }
                    // @unroll
                    for (var c = 0u; c < 4u; c++) {
                        // @unroll
                        for (var p = 0u; p < V_AT_ONCE; p++) {
                            let v4 = keys_part[across][(g * 4u + c) * V_AT_ONCE + p];
                            // @unroll
                            for (var r = 0u; r < ROWS; r++) {
                                let o = r * O_PARTS + strip * V_AT_ONCE + p;
                                sum[o] = fma(vec4<f32>(p4[r][c]), v4, sum[o]);
                            }
                        }
                    }
                }
            }
        }
    }

    // Joins the results of a row's invocations, in order.
    var joined = array<vec4<f32>, ROWS4>();
    // @unroll
    for (var r = 0u; r < ROWS; r++) {
        joined[r / 4u][r % 4u] = total[r];
    }
    // @unroll
    for (var n = 0u; n < ROWS4; n++) {
        of_rows[down][across * ROWS4 + n] = joined[n];
    }
    if (local == 0u) {
        atomicStore(&any_not_finite, 0u);
        index_again = index;
    }
    workgroupBarrier();
    if (has_not_finite) {
        atomicStore(&any_not_finite, 1u);
    }
    // @unroll
    for (var n = 0u; n < ROWS4; n++) {
        joined[n] = vec4<f32>();
        for (var other = 0u; other < ACROSS; other++) {
            joined[n] += of_rows[down][other * ROWS4 + n];
        }
    }
    // @unroll
    for (var r = 0u; r < ROWS; r++) {
        total[r] = joined[r / 4u][r % 4u];
        joined[r / 4u][r % 4u] = select(0.0, 1.0, score_bits[r] >= INFINITY_BITS);
    }
    workgroupBarrier();
    // @unroll
    for (var n = 0u; n < ROWS4; n++) {
        of_rows[down][across * ROWS4 + n] = joined[n];
    }
    workgroupBarrier();
    // @unroll
    for (var n = 0u; n < ROWS4; n++) {
        joined[n] = vec4<f32>();
        for (var other = 0u; other < ACROSS; other++) {
            joined[n] += of_rows[down][other * ROWS4 + n];
        }
    }
    let last = work_of(index_again);
    let last_row = last.first_row + down * ROWS;
    let nan = vec4<f32>(bitcast<f32>(params.not_a_number));
    var o_base: array<u32, ROWS>;
    // @unroll
    for (var r = 0u; r < ROWS; r++) {
        let at = row_of(last, last_row + r);
        head[r] = at.x;
        query[r] = at.y;
        let is_nan = joined[r / 4u][r % 4u] > 0.0;
        let place = place_of(last, at);
        o_base[r] = row_at(params.o, place) + last.split * params.o_split_stride;
        if (last_row + r < last.rows && across == 0u) {
            store_lse(row_at(params.lse, place) + last.split * params.lse.strides.w, lse_of_row(peak[r], total[r], is_nan));
        }
        // @unroll
        for (var p = 0u; p < O_PARTS; p++) {
            let d = p * ACROSS + across;
            if (last_row + r < last.rows && d < COLS4) {
                let o4 = sum[r * O_PARTS + p] * inverse_of(total[r], is_nan);
                store_o(o_base[r], d, select(o4, nan, is_nan), false);
            }
        }
    }

    if (atomicLoad(&any_not_finite) != 0u) {
        add_not_finite(
            b, head, query, o_base, max(last.rows, last_row) - last_row, band, last.v_base, vec2<u32>(last.start, last.end),
            vec3<u32>(across, (params.dim_v + 3u) / 4u, ACROSS),
        );
    }
}
