// O = softmax(scale · Q·Kᵀ → softcap → + bias → mask) · V, LSE = ln Σ exp S          fused, for GPUs
// Q [b, h, i, d]   K, V [b, h / group, j, d]   O [b, h, i, d]   LSE [b, h, i]
//
// As flash.wgsl, for adapters whose workgroup memory is fast: a workgroup takes a block of rows, and for 32
// keys at a time the parts of Q and K, then of P and V, that it works on stand in workgroup memory. Eight
// invocations share a row; each has four rows by four keys of S, and four rows of every eighth vec4 of O, in
// registers (Dao 2023, algorithm 1; register tiles as in any matrix product). The sum of a row stays apart
// in its eight invocations until the end.
//
// 0 · NaN is NaN, so a weight of 0 does not hide a masked value. Values are finite as a rule: the
// sum takes a value that is not finite as 0; where there was one, the terms that a row may see are
// added at the end.

const WORKGROUP: u32 = 64u;
// Invocations of a row, vec4s of a part of a row in workgroup memory, keys of a thread's eight: all the same.
const ACROSS: u32 = 8u;
const ROWS: u32 = 4u;
const KEYS: u32 = 32u;
const BLOCK_ROWS: u32 = 32u;
const DEPTH4: u32 = 16u;
const COLS4: u32 = 16u;
// Parts of a key, of a value: ACROSS vec4s each.
const K_PARTS: u32 = 2u;
const V_PARTS: u32 = 2u;
// vec4s that an invocation brings to a part of the rows, of the keys.
const ROW_LOADS: u32 = 4u;
const KEY_LOADS: u32 = 4u;
// Keys whose values are looked at together where some are not finite.
const SPAN: u32 = 32u;
const SOFTCAP: bool = true;
const BANDED: bool = true;
// True with a mask or a bias.
const LISTED: bool = true;
// True with a bias by distance.
const RELATIVE: bool = true;
const SINK: bool = true;
// True when the vec4s hold more than the width of a key, of a value.
const PADDED_K: bool = true;
const PADDED_V: bool = true;

const_assert BLOCK_ROWS * ACROSS == WORKGROUP * ROWS;
const_assert ROW_LOADS * WORKGROUP == BLOCK_ROWS * ACROSS;
const_assert KEY_LOADS * WORKGROUP == KEYS * ACROSS;
const_assert K_PARTS * ACROSS >= DEPTH4 && V_PARTS * ACROSS >= COLS4;

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

// A part of Q, then of P: BLOCK_ROWS rows of ACROSS vec4s.
var<workgroup> rows_part: array<vec4<f32>, BLOCK_ROWS * ACROSS>;
// A part of K, then of V.
var<workgroup> keys_part: array<vec4<f32>, KEYS * ACROSS>;
// One number of each of the invocations of a row.
var<workgroup> of_row: array<f32, BLOCK_ROWS * ACROSS>;
var<workgroup> spoilt: atomic<u32>;

// Where vec4 d of a row stands: rows that are read together lie in different banks.
fn slot(row: u32, d: u32) -> u32 {
    return row * ACROSS + (d ^ ((row / 4u) % ACROSS));
}

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
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
    let first_row = sequence.row_block * BLOCK_ROWS;
    let down = local / ACROSS;
    let across = local % ACROSS;
    let row = first_row + down * ROWS;
    let k_base = params.k_offset + b * params.k_strides.x + head_kv * params.k_strides.y
        + sequence.first_key * params.k_strides.z;
    let v_base = params.v_offset + b * params.v_strides.x + head_kv * params.v_strides.y
        + sequence.first_key * params.v_strides.z;

    // The rows that this invocation works on, and those that it brings.
    var head: array<u32, ROWS>;
    var query: array<u32, ROWS>;
    var relative_from: array<u32, ROWS>;
    // @unroll
    for (var r = 0u; r < ROWS; r++) {
        let at = min(row + r, rows - 1u);
        head[r] = head_kv * params.group + at / len_q;
        query[r] = at % len_q;
        relative_from[r] = relative_row(b, head[r], query[r]);
    }
    var q_base: array<u32, ROW_LOADS>;
    var q_stands: array<u32, ROW_LOADS>;
    // @unroll
    for (var n = 0u; n < ROW_LOADS; n++) {
        let at = min(first_row + n * (WORKGROUP / ACROSS) + down, rows - 1u);
        q_base[n] = params.q_offset + b * params.q_strides.x
            + (head_kv * params.group + at / len_q) * params.q_strides.y
            + (sequence.first_query + at % len_q) * params.q_strides.z;
        q_stands[n] = u32(i32(at % len_q + params.row_0) + band.w);
    }

    // The keys of this split that any row of this workgroup can see by position.
    var start = min(split * sequence.keys_per_split, len_k);
    var end = min(start + sequence.keys_per_split, len_k);
    if (BANDED) {
        let last_row = min(first_row + BLOCK_ROWS, rows) - 1u;
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

    var sum: array<vec4<f32>, ROWS * V_PARTS>;
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
            // A sink of −∞ is none; of the sums of a row, the first has it.
            if (bits != params.minus_infinity) {
                peak[r] = score;
                total[r] = select(0.0, 1.0, across == 0u);
                worst[r] = bits & 0x7fffffffu;
            }
        }
    }
    // Workgroup memory holds anything at first; a barrier follows before any value is read.
    if (local == 0u) {
        atomicStore(&spoilt, 0u);
    }
    let tile_row = b * params.tile_batch_stride + head_kv * params.tile_head_stride
        + sequence.row_block * params.tiles;
    for (var j = next_key(tile_row, start, end); j < end; j = next_key(tile_row, j + KEYS, end)) {
        var product = array<vec4<f32>, ROWS>();
        for (var part = 0u; part < K_PARTS; part++) {
            let d = part * ACROSS + across;
            // What stands there has been read.
            workgroupBarrier();
            // @unroll
            for (var n = 0u; n < ROW_LOADS; n++) {
                rows_part[slot(n * (WORKGROUP / ACROSS) + down, across)] =
                    select(vec4<f32>(), turned_q(q_base[n], min(d, DEPTH4 - 1u), q_stands[n]), d < DEPTH4);
            }
            // @unroll
            for (var n = 0u; n < KEY_LOADS; n++) {
                let c = n * (WORKGROUP / ACROSS) + down;
                let key = min(j + c, len_k - 1u);
                let k4 = turned_k(k_base + key * params.k_strides.z, min(d, DEPTH4 - 1u), key + params.key_0);
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
                        product[r][c] = fma(q4.w, k4[c].w, fma(q4.z, k4[c].z, fma(q4.y, k4[c].y,
                            fma(q4.x, k4[c].x, product[r][c]))));
                    }
                }
            }
        }
        let listed = !all_seen(tile_row, j);
        var scores = array<Scores, ROWS>();
        // @unroll
        for (var r = 0u; r < ROWS; r++) {
            let more = relative_at(relative_from[r], away(query[r], j + across * 4u, band));
            scores[r] = finish(product[r], b, head[r], query[r], j + across * 4u, end, band, listed, more);
            let x = select(vec4<f32>(LEAST), scores[r].x, scores[r].seen);
            let bits = bitcast<vec4<u32>>(x) & vec4<u32>(0x7fffffffu);
            worst[r] = max(max(max(worst[r], bits.x), bits.y), max(bits.z, bits.w));
            scores[r].x = x;
            of_row[(down * ROWS + r) * ACROSS + across] = max(max(x.x, x.y), max(x.z, x.w));
        }
        // Every part of Q and K has been read, every maximum is there.
        workgroupBarrier();
        // @unroll
        for (var r = 0u; r < ROWS; r++) {
            var highest = peak[r];
            for (var n = 0u; n < ACROSS; n++) {
                highest = max(highest, of_row[(down * ROWS + r) * ACROSS + n]);
            }
            let factor = exp2(max((peak[r] - highest) * LOG2_E, -200.0));
            let w = weigh(scores[r], highest);
            peak[r] = highest;
            total[r] = total[r] * factor + ((w.x + w.y) + (w.z + w.w));
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
                let value = load_v(v_base + min(j + c, len_k - 1u) * params.v_strides.z, min(d, COLS4 - 1u));
                found = found | not_finite(value);
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

    if (any(found)) {
        atomicStore(&spoilt, 1u);
    }
    // What the invocations of a row know, joined in order.
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
        of_row[(down * ROWS + r) * ACROSS + across] = select(0.0, 1.0, worst[r] >= 0x7f800000u);
    }
    workgroupBarrier();
    let nan = bitcast<f32>(params.not_a_number);
    var o_base: array<u32, ROWS>;
    var divisor: array<f32, ROWS>;
    var is_nan: array<bool, ROWS>;
    // @unroll
    for (var r = 0u; r < ROWS; r++) {
        var spoilt_by = 0.0;
        for (var n = 0u; n < ACROSS; n++) {
            spoilt_by += of_row[(down * ROWS + r) * ACROSS + n];
        }
        is_nan[r] = spoilt_by > 0.0;
        o_base[r] = params.o_offset + b * params.o_strides.x + head[r] * params.o_strides.y
            + (sequence.first_query + query[r]) * params.o_strides.z + split * params.o_split_stride;
        // A row without visible keys has total 0 and stays 0.
        divisor[r] = select(select(1.0 / total[r], 0.0, total[r] == 0.0), nan, is_nan[r]);
        if (row + r < rows && across == 0u) {
            let value = select(peak[r] + log2(total[r]) * LN_2, bitcast<f32>(params.minus_infinity), total[r] == 0.0);
            store_lse(
                params.lse_offset + dot(params.lse_strides, vec3<u32>(b, head[r], split)) + sequence.first_query + query[r],
                select(value, nan, is_nan[r]),
            );
        }
        // @unroll
        for (var part = 0u; part < V_PARTS; part++) {
            let d = part * ACROSS + across;
            if (row + r < rows && d < COLS4) {
                store_o(o_base[r], d, select(sum[r * V_PARTS + part] * divisor[r], vec4<f32>(nan), is_nan[r]), false);
            }
        }
    }

    // What values that are not finite add to the rows that see them. A weight is above 0, so that it is the values
    // alone. Few turns of loops for each key: some drivers count them (src/kernels/turns.rs).
    let repaired = select(start, end, atomicLoad(&spoilt) != 0u);
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
        for (var d = across; d < (params.dim_v + 3u) / 4u; d += ACROSS) {
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
