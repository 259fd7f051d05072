// O = softmax(scale · Q·Kᵀ → softcap → + bias → mask) · V, LSE = ln Σ exp S          fused, for GPUs
// Q [b, h, i, d]   K, V [b, h / group, j, d]   O [b, h, i, d]   LSE [b, h, i]
//
// Like flash.wgsl, for adapters with fast workgroup memory. A workgroup takes a block of rows. For 32 keys at a time,
// the parts of Q and K, and then of P and V, that it works on are in workgroup memory. Eight invocations share a row;
// each has four rows by four keys of S, and four rows of every eighth vec4 of O, in registers (Dao 2023, algorithm 1;
// register tiles as in any matrix product). The sum of a row stays separate in its eight invocations until the end.

// Invocations per row, vec4s of a part of a row in workgroup memory, and groups of four keys in a step: all the same
// number.
const ACROSS: u32 = 8u;
const ROWS: u32 = 4u;
const KEYS: u32 = 32u;
const BLOCK_ROWS: u32 = 32u;
const DEPTH4: u32 = 16u;
const COLS4: u32 = 16u;
// Parts of a key, of a value: ACROSS vec4s each.
const K_PARTS: u32 = 2u;
const V_PARTS: u32 = 2u;
// vec4s that an invocation loads of a part of the rows, of the keys.
const ROW_LOADS: u32 = 4u;
const KEY_LOADS: u32 = 4u;

const_assert BLOCK_ROWS * ACROSS == WORKGROUP * ROWS;
const_assert ROW_LOADS * WORKGROUP == BLOCK_ROWS * ACROSS;
const_assert KEY_LOADS * WORKGROUP == KEYS * ACROSS;
const_assert K_PARTS * ACROSS >= DEPTH4 && V_PARTS * ACROSS >= COLS4;

// @use fused

// A part of Q, then of P: BLOCK_ROWS rows of ACROSS vec4s.
var<workgroup> rows_part: array<vec4<f32>, BLOCK_ROWS * ACROSS>;
// A part of K, then of V.
var<workgroup> keys_part: array<vec4<f32>, KEYS * ACROSS>;
// One number from each invocation of a row.
var<workgroup> of_row: array<f32, BLOCK_ROWS * ACROSS>;
var<workgroup> any_not_finite: atomic<u32>;

// The position of vec4 d of a row; rows that are read together are in different banks.
fn slot(row: u32, d: u32) -> u32 {
    return row * ACROSS + (d ^ ((row / 4u) % ACROSS));
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
        let at = row_of(work, work.first_row + n * (WORKGROUP / ACROSS) + down);
        q_base[n] = row_at(params.q, place_of(work, at));
        q_position[n] = position_of(work, at.y);
    }

    var sum: array<vec4<f32>, ROWS * V_PARTS>;
    var peak: array<f32, ROWS>;
    var total: array<f32, ROWS>;
    // The largest bits of any score so far; see softmax_row.wgsl.
    var score_bits: array<u32, ROWS>;
    var has_not_finite = vec4<bool>();
    // @unroll
    for (var r = 0u; r < ROWS; r++) {
        let sums = first_sums(work, head[r]);
        peak[r] = sums.peak;
        // Of a row's partial sums, the first includes the sink.
        total[r] = select(0.0, sums.total, across == 0u);
        score_bits[r] = sums.score_bits;
    }
    // Workgroup memory is not initialised; a barrier follows before any value is read.
    if (local == 0u) {
        atomicStore(&any_not_finite, 0u);
    }
    for (var j = next_key(work, work.start); j < work.end; j = next_key(work, j + KEYS)) {
        var product = array<vec4<f32>, ROWS>();
        for (var part = 0u; part < K_PARTS; part++) {
            let d = part * ACROSS + across;
            // The previous contents have been read.
            workgroupBarrier();
            // @unroll
            for (var n = 0u; n < ROW_LOADS; n++) {
                rows_part[slot(n * (WORKGROUP / ACROSS) + down, across)] =
                    select(vec4<f32>(), rotated_q(q_base[n], min(d, DEPTH4 - 1u), q_position[n]), d < DEPTH4);
            }
            // @unroll
            for (var n = 0u; n < KEY_LOADS; n++) {
                let c = n * (WORKGROUP / ACROSS) + down;
                let key = min(j + c, work.len_k - 1u);
                let from_row = work.k_base + key * params.k.strides.z;
                let k4 = rotated_k(from_row, min(d, DEPTH4 - 1u), key + params.slice.key_0);
                keys_part[slot(c, across)] = select(vec4<f32>(), k4, d < DEPTH4);
            }
            workgroupBarrier();
            for (var e = 0u; e < ACROSS; e++) {
                var k4 = array<vec4<f32>, 4>();
                // @unroll
                for (var c = 0u; c < 4u; c++) {
                    k4[c] = keys_part[slot(across * 4u + c, e)];
                }
                // @unroll
                for (var r = 0u; r < ROWS; r++) {
                    let q4 = rows_part[slot(down * ROWS + r, e)];
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
            of_row[(down * ROWS + r) * ACROSS + across] = largest(LEAST, x);
        }
        // Every part of Q and K has been read, and every maximum is ready.
        workgroupBarrier();
        // @unroll
        for (var r = 0u; r < ROWS; r++) {
            var highest = peak[r];
            for (var n = 0u; n < ACROSS; n++) {
                highest = max(highest, of_row[(down * ROWS + r) * ACROSS + n]);
            }
            let factor = exp_below(vec4<f32>(peak[r]), highest).x;
            let w = select(vec4<f32>(), exp_below(scores[r].x, highest), scores[r].seen);
            peak[r] = highest;
            total[r] = total[r] * factor + sum_of_four(w);
            rows_part[slot(down * ROWS + r, across)] = w;
            // @unroll
            for (var part = 0u; part < V_PARTS; part++) {
                sum[r * V_PARTS + part] *= factor;
            }
        }
        // @unroll
        for (var part = 0u; part < V_PARTS; part++) {
            if (part > 0u) {
                workgroupBarrier();
            }
            let d = part * ACROSS + across;
            // @unroll
            for (var n = 0u; n < KEY_LOADS; n++) {
                let c = n * (WORKGROUP / ACROSS) + down;
                let value = load_v(work.v_base + min(j + c, work.len_k - 1u) * params.v.strides.z, min(d, COLS4 - 1u));
                has_not_finite = has_not_finite | not_finite(value);
                keys_part[slot(c, across)] = select(value, vec4<f32>(), not_finite(value) | vec4<bool>(d >= COLS4));
            }
            workgroupBarrier();
            for (var e = 0u; e < ACROSS; e++) {
                var v4 = array<vec4<f32>, 4>();
                // @unroll
                for (var c = 0u; c < 4u; c++) {
                    v4[c] = keys_part[slot(e * 4u + c, across)];
                }
                // @unroll
                for (var r = 0u; r < ROWS; r++) {
                    let p4 = rows_part[slot(down * ROWS + r, e)];
                    // @unroll
                    for (var c = 0u; c < 4u; c++) {
                        sum[r * V_PARTS + part] = fma(vec4<f32>(p4[c]), v4[c], sum[r * V_PARTS + part]);
                    }
                }
            }
        }
    }

    if (any(has_not_finite)) {
        atomicStore(&any_not_finite, 1u);
    }
    // Joins the results of a row's invocations, in order.
    // @unroll
    for (var r = 0u; r < ROWS; r++) {
        of_row[(down * ROWS + r) * ACROSS + across] = total[r];
    }
    workgroupBarrier();
    // @unroll
    for (var r = 0u; r < ROWS; r++) {
        total[r] = 0.0;
        for (var n = 0u; n < ACROSS; n++) {
            total[r] += of_row[(down * ROWS + r) * ACROSS + n];
        }
    }
    workgroupBarrier();
    // @unroll
    for (var r = 0u; r < ROWS; r++) {
        of_row[(down * ROWS + r) * ACROSS + across] = select(0.0, 1.0, score_bits[r] >= INFINITY_BITS);
    }
    workgroupBarrier();
    let nan = vec4<f32>(bitcast<f32>(params.not_a_number));
    var o_base: array<u32, ROWS>;
    // @unroll
    for (var r = 0u; r < ROWS; r++) {
        var not_finite_scores = 0.0;
        for (var n = 0u; n < ACROSS; n++) {
            not_finite_scores += of_row[(down * ROWS + r) * ACROSS + n];
        }
        let is_nan = not_finite_scores > 0.0;
        let place = place_of(work, vec2<u32>(head[r], query[r]));
        o_base[r] = row_at(params.o, place) + work.split * params.o_split_stride;
        if (row + r < work.rows && across == 0u) {
            store_lse(row_at(params.lse, place) + work.split * params.lse.strides.w, lse_of_row(peak[r], total[r], is_nan));
        }
        // @unroll
        for (var part = 0u; part < V_PARTS; part++) {
            let d = part * ACROSS + across;
            if (row + r < work.rows && d < COLS4) {
                let o4 = sum[r * V_PARTS + part] * inverse_of(total[r], is_nan);
                store_o(o_base[r], d, select(o4, nan, is_nan), false);
            }
        }
    }

    if (atomicLoad(&any_not_finite) != 0u) {
        add_not_finite(
            b, head, query, o_base, max(work.rows, row) - row, band, work.v_base, vec2<u32>(work.start, work.end),
            vec3<u32>(across, (params.dim_v + 3u) / 4u, ACROSS),
        );
    }
}
