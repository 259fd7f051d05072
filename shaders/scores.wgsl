// S = scale · Q·Kᵀ → softcap → + bias → mask                      pass 1 of the unfused method
// Q [b, h, i, d]   K [b, h / group, j, d]   S [b, h, i, j]; masked scores are −∞
//
// Vaswani et al. 2017, section 3.2.1. Each invocation keeps ROWS queries in registers and iterates over the keys KEYS
// at a time. With subgroups, SHARE lanes load different parts of the keys and broadcast them; without, every lane loads
// all of them. Wide heads are summed in chunks of DEPTH4 · 4 through S.

const ROWS: u32 = 4u;
const KEYS: u32 = 4u;
const DEPTH4: u32 = 4u;
const SHARE: u32 = 1u;
// True if chunks · DEPTH4 · 4 is more than the width of a head.
const PADDED: bool = true;

const_assert KEYS * DEPTH4 % SHARE == 0u;

alias QElem = f32;
alias KElem = f32;

struct Params {
    q: View,
    k: View,
    s: View,
    rules: Rules,
    slice: Slice,
    dim: u32,
    chunks: u32,
    row_blocks: u32,
    key_blocks: u32,
    keys_per_block: u32,
    workgroups: u32,
    minus_infinity: u32,
}

@group(0) @binding(1) var<storage, read> q: array<QElem>;
@group(0) @binding(2) var<storage, read> k: array<KElem>;
@group(0) @binding(3) var<storage, read_write> s: array<vec4<f32>>;

// @use each_workgroup, score, load(q dim PADDED), load(k dim PADDED)

fn run(index: u32, local: u32, lane: u32) {
    let tile = tile_of(index, params.row_blocks, params.key_blocks);
    let b = tile.b;
    let h = tile.h;
    let band = tile.band;
    let len_q = params.slice.len_q;
    let len_k = params.slice.len_k;

    let first_row = tile.row_block * WORKGROUP * ROWS;
    let row = first_row + local * ROWS;
    let k_base = row_at(params.k, vec3<u32>(b, tile.head_kv, 0u));
    let s_base = row_at(params.s, vec3<u32>(b, h, 0u)) + params.slice.key_0;
    let first_key = tile.column_block * params.keys_per_block;
    let end_key = min(first_key + params.keys_per_block, len_k);
    // The keys that any row of this workgroup can see by position.
    let last_row = min(first_row + WORKGROUP * ROWS, len_q) - 1u;
    let seen = keys_in_band(first_row, last_row, band, vec2<u32>(0u, len_k), KEYS, len_k);

    // The bound is more than a parameter; see README.md.
    let chunks = select(0u, params.chunks, tile.row_block < params.row_blocks);
    for (var chunk = 0u; chunk < chunks; chunk++) {
        var q_tile = array<vec4<f32>, ROWS * DEPTH4>();
        // @unroll
        for (var r = 0u; r < ROWS; r++) {
            let at = row_at(params.q, vec3<u32>(b, h, min(row + r, len_q - 1u)));
            // @unroll
            for (var d = 0u; d < DEPTH4; d++) {
                q_tile[r * DEPTH4 + d] = load_q(at, chunk * DEPTH4 + d);
            }
        }
        for (var j = first_key; j < end_key; j += KEYS) {
            let is_seen = j >= seen.x && j < seen.y;
            if (!is_seen && chunk + 1u < params.chunks) {
                continue;
            }
            var sum = array<vec4<f32>, ROWS>();
            if (is_seen) {
                if (chunk > 0u) {
                    // @unroll
                    for (var r = 0u; r < ROWS; r++) {
                        sum[r] = s[(s_base + min(row + r, len_q - 1u) * params.s.strides.z + j) / 4u];
                    }
                }
                var loaded = vec4<f32>();
                // @unroll
                for (var c = 0u; c < KEYS; c++) {
                    var part = array<f32, ROWS>();
                    // @unroll
                    for (var d = 0u; d < DEPTH4; d++) {
                        if ((c * DEPTH4 + d) % SHARE == 0u) {
                            let place = c * DEPTH4 + d + lane;
                            let key = min(j + place / DEPTH4, len_k - 1u);
                            loaded = load_k(k_base + key * params.k.strides.z, chunk * DEPTH4 + place % DEPTH4);
                        }
                        // @block share
                        let k4 = loaded;
                        // @end
                        // @unroll
                        for (var r = 0u; r < ROWS; r++) {
                            part[r] = dot_on(q_tile[r * DEPTH4 + d], k4, part[r]);
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
                if (row + r < len_q) {
                    let at = (s_base + (row + r) * params.s.strides.z + j) / 4u;
                    if (chunk + 1u < params.chunks) {
                        s[at] = sum[r];
                    } else {
                        var by_distance = vec4<f32>();
                        if (RELATIVE) {
                            by_distance = relative_at(relative_row(b, h, row + r), distances(row + r, j, band));
                        }
                        // Keys beyond the end are padding of S.
                        let key = four_from(j);
                        let scores = scores_of(
                            sum[r], by_distance, b, h, vec4<u32>(row + r), key, band, true, key < vec4<u32>(len_k),
                        );
                        s[at] = select(vec4<f32>(bitcast<f32>(params.minus_infinity)), scores.x, scores.seen);
                    }
                }
            }
        }
    }
}
