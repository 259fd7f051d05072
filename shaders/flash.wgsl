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
