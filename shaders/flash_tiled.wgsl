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

struct Params {
    q_strides: vec4<u32>,
    k_strides: vec4<u32>,
    v_strides: vec4<u32>,
    o_strides: vec4<u32>,
    mask_a_strides: vec4<u32>,
    mask_b_strides: vec4<u32>,
    bias_strides: vec4<u32>,
    relative_strides: vec4<u32>,
    // Valid keys, lowest and highest visible key relative to the query, where query 0 stands.
    band: vec4<i32>,
    q_offset: u32,
    k_offset: u32,
    v_offset: u32,
    o_offset: u32,
    mask_a_offset: u32,
    mask_b_offset: u32,
    bias_offset: u32,
    mask_a_keeps: u32,
    mask_b_keeps: u32,
    batch_0: u32,
    row_0: u32,
    key_0: u32,
    heads_kv: u32,
    // Query heads per key/value head.
    group: u32,
    len_q: u32,
    len_k: u32,
    ruled_keys: u32,
    dim_k: u32,
    dim_v: u32,
    row_blocks: u32,
    splits: u32,
    keys_per_split: u32,
    // From the output of one split to the next.
    o_split_stride: u32,
    lse_offset: u32,
    // Batch, head, split.
    lse_strides: vec3<u32>,
    workgroups: u32,
    minus_infinity: u32,
    not_a_number: u32,
    scale: f32,
    softcap: f32,
    // Of the classes of tiles.
    tile_batch_stride: u32,
    tile_head_stride: u32,
    tiles: u32,
    sink_stride: u32,
    relative_offset: u32,
    relative_low: i32,
    relative_high: i32,
    relative_factor: f32,
    sink_offset: u32,
    pad_0: u32,
    pad_1: u32,
    pad_2: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> q: array<QElem>;
@group(0) @binding(2) var<storage, read> k: array<KElem>;
@group(0) @binding(3) var<storage, read_write> o: array<OElem>;
@group(0) @binding(8) var<storage, read> v: array<VElem>;

// @block lse
@group(0) @binding(9) var<storage, read_write> lse: array<f32>;
fn store_lse(at: u32, value: f32) {
    lse[at] = value;
}
// @end

// @block bands
@group(0) @binding(4) var<storage, read> bands: array<vec4<i32>>;
fn band_of(b: u32) -> vec4<i32> {
    return bands[params.batch_0 + b];
}
// @end

// @block mask_a
@group(0) @binding(5) var<storage, read> mask_a: array<u32>;
fn passes_a(b: u32, h: u32, i: u32, j: u32) -> bool {
    let at = params.mask_a_offset + dot(params.mask_a_strides, vec4<u32>(b, h, i, j));
    return (((mask_a[at / 4u] >> (8u * (at % 4u))) & 255u) != 0u) == (params.mask_a_keeps != 0u);
}
// @end

// @block mask_b
@group(0) @binding(6) var<storage, read> mask_b: array<u32>;
fn passes_b(b: u32, h: u32, i: u32, j: u32) -> bool {
    let at = params.mask_b_offset + dot(params.mask_b_strides, vec4<u32>(b, h, i, j));
    return (((mask_b[at / 4u] >> (8u * (at % 4u))) & 255u) != 0u) == (params.mask_b_keeps != 0u);
}
// @end

// @block bias
@group(0) @binding(7) var<storage, read> bias: array<f32>;
fn bias_at(b: u32, h: u32, i: u32, j: u32) -> f32 {
    return bias[params.bias_offset + dot(params.bias_strides, vec4<u32>(b, h, i, j))];
}
// @end

// @block tiles
// What masks and biases leave of a tile of keys: classify.wgsl.
const TILE: u32 = 32u;
@group(0) @binding(11) var<storage, read> tiles: array<u32>;
// The first key from j on whose tile any row may see.
fn next_key(row: u32, j: u32, end: u32) -> u32 {
    var next = j;
    while (next < end && tiles[row + next / TILE] == 2u) {
        next = (next / TILE + 1u) * TILE;
    }
    return next;
}
// @end

// @block all_seen
fn all_seen(row: u32, j: u32) -> bool {
    return tiles[row + j / TILE] == 1u;
}
// @end

// @block relative
// What the distance of key and query adds to a score: X[b, h, i, clip(distance, low, high) − low].
@group(0) @binding(12) var<storage, read> relative: array<f32>;
fn relative_row(b: u32, h: u32, i: u32) -> u32 {
    return params.relative_offset + dot(params.relative_strides.xyz, vec3<u32>(b, h, i));
}
fn relative_at(row: u32, distance: vec4<i32>) -> vec4<f32> {
    let low = vec4<i32>(params.relative_low);
    let column = vec4<u32>(clamp(distance, low, vec4<i32>(params.relative_high)) - low);
    let at = vec4<u32>(row) + column * params.relative_strides.w;
    return params.relative_factor * vec4<f32>(relative[at.x], relative[at.y], relative[at.z], relative[at.w]);
}
// @end

// @block sink
@group(0) @binding(10) var<storage, read> sink: array<f32>;
fn sink_of(h: u32) -> f32 {
    return sink[params.sink_offset + h * params.sink_stride];
}
// @end

// @block visible
// Whether query i may see key j, all rules together; a bias of −∞ hides too.
fn visible(b: u32, h: u32, i: u32, j: u32, band: vec4<i32>) -> bool {
    let row = i32(i + params.row_0);
    let key = i32(j + params.key_0);
    if (u32(key) >= params.ruled_keys) {
        return true;
    }
    if (BANDED && !(key < band.x && key >= row + band.y && key <= row + band.z)) {
        return false;
    }
    return passes_a(b, h, i, j) && passes_b(b, h, i, j)
        && bitcast<u32>(bias_at(b, h, i, j)) != params.minus_infinity;
}
// @end

// @block load_q
fn load_q(at: u32, d4: u32) -> vec4<f32> {
    let d = d4 * 4u;
    let step = params.q_strides.w;
    let first = at + d * step;
    // Lanes beyond the width must be 0, so that what lies there never enters.
    return select(
        vec4<f32>(),
        vec4<f32>(q[first], q[first + step], q[first + 2u * step], q[first + 3u * step]),
        vec4<u32>(d, d + 1u, d + 2u, d + 3u) < vec4<u32>(params.dim_k),
    );
}
// @end

// @block load_k
fn load_k(at: u32, d4: u32) -> vec4<f32> {
    let d = d4 * 4u;
    let step = params.k_strides.w;
    let first = at + d * step;
    // Lanes beyond the width must be 0, so that what lies there never enters.
    return select(
        vec4<f32>(),
        vec4<f32>(k[first], k[first + step], k[first + 2u * step], k[first + 3u * step]),
        vec4<u32>(d, d + 1u, d + 2u, d + 3u) < vec4<u32>(params.dim_k),
    );
}
// @end

// @block turn
// Rotary positions: vec4 d4 of a row that stands at `position`, its first `2 · PAIRS4` vec4s turned, each with
// the one half of them away (half-split pairs). Angles: cosines, then sines, of each position.
@group(0) @binding(13) var<storage, read> angles: array<vec4<f32>>;
const PAIRS4: u32 = 1u;
fn turned(x: vec4<f32>, other: vec4<f32>, d4: u32, position: u32) -> vec4<f32> {
    let pair = d4 % PAIRS4;
    let at = position * 2u * PAIRS4 + pair;
    let sine = select(angles[at + PAIRS4], -angles[at + PAIRS4], vec4<bool>(d4 < PAIRS4));
    return select(x * angles[at] + other * sine, x, vec4<bool>(d4 >= 2u * PAIRS4));
}
fn partner(d4: u32) -> u32 {
    return select(d4 - PAIRS4, d4 + PAIRS4, d4 < PAIRS4);
}
fn turned_q(at: u32, d4: u32, position: u32) -> vec4<f32> {
    return turned(load_q(at, d4), load_q(at, min(partner(d4), 2u * PAIRS4 - 1u)), d4, position);
}
fn turned_k(at: u32, d4: u32, position: u32) -> vec4<f32> {
    return turned(load_k(at, d4), load_k(at, min(partner(d4), 2u * PAIRS4 - 1u)), d4, position);
}
// @end

// @block load_v
fn load_v(at: u32, d4: u32) -> vec4<f32> {
    let d = d4 * 4u;
    let step = params.v_strides.w;
    let first = at + d * step;
    // Lanes beyond the width must be 0, so that what lies there never enters.
    return select(
        vec4<f32>(),
        vec4<f32>(v[first], v[first + step], v[first + 2u * step], v[first + 3u * step]),
        vec4<u32>(d, d + 1u, d + 2u, d + 3u) < vec4<u32>(params.dim_v),
    );
}
// @end

// @block store_o
fn store_o(at: u32, d4: u32, value: vec4<f32>, add: bool) {
    // @unroll
    for (var e = 0u; e < 4u; e++) {
        let d = d4 * 4u + e;
        if (d < params.dim_v) {
            let here = at + d * params.o_strides.w;
            if (add) {
                o[here] += value[e];
            } else {
                o[here] = value[e];
            }
        }
    }
}
// @end

// @block tanh
// Cephes tanhf: a driver's own tanh may overflow or lose small arguments.
fn tanh_exact(x: vec4<f32>) -> vec4<f32> {
    let z = x * x;
    let small = ((((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z
        + 1.33314422036e-1) * z - 3.33332819422e-1) * z * x + x;
    let a = min(abs(x), vec4<f32>(20.0));
    let large = sign(x) * (1.0 - 2.0 / (exp2(a * 2.8853900817779268) + 1.0));
    return select(large, small, abs(x) < vec4<f32>(0.625));
}
// @end

// @block numbers
const LOG2_E: f32 = 1.4426950408889634;
const LN_2: f32 = 0.6931471805599453;
// The running maximum starts at the least finite number: WGSL has no literal for −∞.
const LEAST: f32 = -3.4028234663852886e38;

fn not_finite(x: vec4<f32>) -> vec4<bool> {
    return (bitcast<vec4<u32>>(x) & vec4<u32>(0x7f800000u)) == vec4<u32>(0x7f800000u);
}
// @end

// @block place
// Where the rows and keys of a workgroup lie.
struct Sequence {
    // Which band, and which step of the batch strides.
    index: u32,
    b: u32,
    row_block: u32,
    first_query: u32,
    len_q: u32,
    first_key: u32,
    len_k: u32,
    keys_per_split: u32,
}
// @end

// @block sequence
fn sequence_of(block: u32, b: u32) -> Sequence {
    return Sequence(b, b, block, 0u, params.len_q, 0u, params.len_k, params.keys_per_split);
}
// @end

// @block finish
struct Scores {
    x: vec4<f32>,
    // False for what is no key, may not be seen, or is −∞.
    seen: vec4<bool>,
}

// The distances of keys j, j + 1, … from query i.
fn away(i: u32, j: u32, band: vec4<i32>) -> vec4<i32> {
    return vec4<i32>(0, 1, 2, 3) + vec4<i32>(i32(j + params.key_0) - i32(i + params.row_0) - band.w);
}

// Scores of keys j, j + 1, …; `more` is what their distances add.
fn finish(sum: vec4<f32>, b: u32, h: u32, i: u32, j: u32, end: u32, band: vec4<i32>, listed: bool, more: vec4<f32>) -> Scores {
    let step = vec4<u32>(0u, 1u, 2u, 3u);
    var x = sum * params.scale;
    if (SOFTCAP) {
        let is_nan = (bitcast<vec4<u32>>(x) & vec4<u32>(0x7fffffffu)) > vec4<u32>(0x7f800000u);
        x = select(params.softcap * tanh_exact(x / params.softcap), x, is_nan);
    }
    var seen = (vec4<u32>(j) + step < vec4<u32>(end)) & (step < vec4<u32>(KEYS));
    let key = vec4<i32>(vec4<u32>(j + params.key_0) + step);
    if (BANDED) {
        let row = vec4<i32>(i32(i + params.row_0));
        let inside = (key < vec4<i32>(band.x)) & (key >= row + vec4<i32>(band.y)) & (key <= row + vec4<i32>(band.z));
        seen = seen & (inside | (key >= vec4<i32>(i32(params.ruled_keys))));
    }
    if (RELATIVE) {
        x += select(more, vec4<f32>(), key >= vec4<i32>(i32(params.ruled_keys)));
    }
    if (LISTED && listed) {
        // @unroll
        for (var c = 0u; c < 4u; c++) {
            if (c < KEYS) {
                let ruled = u32(key[c]) < params.ruled_keys;
                let bias = bias_at(b, h, i, j + c);
                let passes = passes_a(b, h, i, j + c) & passes_b(b, h, i, j + c)
                    & (bitcast<u32>(bias) != params.minus_infinity);
                x[c] = select(x[c], x[c] + bias, ruled);
                seen[c] = seen[c] & (passes | !ruled);
            }
        }
    }
    return Scores(x, seen & (bitcast<vec4<u32>>(x) != vec4<u32>(params.minus_infinity)));
}

// exp(x − peak) of what is seen; the floor keeps −∞ out of exp2, which some drivers get wrong.
fn weigh(scores: Scores, peak: f32) -> vec4<f32> {
    return select(vec4<f32>(), exp2(max((scores.x - peak) * LOG2_E, vec4<f32>(-200.0))), scores.seen);
}
// @end

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
