// What hides the key of a pair, and what biases add to its score. Defined only here.
// @use view, bands, mask(a 5), mask(b 6), bias(a 7), bias(b 14)

// Number of pairs, out of four, that are evaluated together; the others are ignored.
const PAIRS: u32 = 4u;
const BANDED: bool = true;
// True if there is a mask or a bias.
const MASKED: bool = true;
const TWO_BIASES: bool = true;

struct Mask {
    view: View,
    // Whether true entries keep the key.
    keeps: u32,
}
// A bias by distance: b, h, i, and a column for each distance from `low` to `high`.
struct Relative {
    strides: vec4<u32>,
    offset: u32,
    low: i32,
    high: i32,
    factor: f32,
}
struct Rules {
    // Valid keys, lowest and highest visible key relative to the query, position of query 0.
    band: vec4<i32>,
    mask_a: Mask,
    mask_b: Mask,
    bias_a: View,
    bias_b: View,
    relative: Relative,
    scale: f32,
    softcap: f32,
    // Every query sees the keys from here on.
    maskable_keys: u32,
}
// The part of a call that a dispatch works on.
struct Slice {
    batch_0: u32,
    head_0: u32,
    head_kv_0: u32,
    row_0: u32,
    key_0: u32,
    heads: u32,
    heads_kv: u32,
    // Query heads per key/value head.
    group: u32,
    len_q: u32,
    // Nested blocks have sizes that are multiples of 16 bytes.
    @size(12) len_k: u32,
}

fn four_from(first: u32) -> vec4<u32> {
    return vec4<u32>(first) + vec4<u32>(0u, 1u, 2u, 3u);
}

struct Rule {
    seen: vec4<bool>,
    maskable: vec4<bool>,
    bias_a: vec4<f32>,
    bias_b: vec4<f32>,
}

// The rules for four pairs of queries i and keys j of the slice. Masks and biases are read where `masked`.
fn rule_of(b: u32, h: u32, i: vec4<u32>, j: vec4<u32>, band: vec4<i32>, masked: bool) -> Rule {
    let row = vec4<i32>(i + params.slice.row_0);
    let key = vec4<i32>(j + params.slice.key_0);
    let maskable = key < vec4<i32>(i32(params.rules.maskable_keys));
    var rule = Rule(vec4<bool>(true), maskable, vec4<f32>(), vec4<f32>());
    if (BANDED) {
        let inside = (key < vec4<i32>(band.x)) & (key >= row + vec4<i32>(band.y)) & (key <= row + vec4<i32>(band.z));
        rule.seen = inside | !maskable;
    }
    if (MASKED && masked) {
        // @unroll
        for (var c = 0u; c < 4u; c++) {
            if (c < PAIRS) {
                let bias = added_a(b, h, i[c], j[c]);
                var passes = passes_a(b, h, i[c], j[c]) & passes_b(b, h, i[c], j[c])
                    & (bitcast<u32>(bias) != params.minus_infinity);
                rule.bias_a[c] = select(0.0, bias, maskable[c]);
                if (TWO_BIASES) {
                    let second = added_b(b, h, i[c], j[c]);
                    passes &= bitcast<u32>(second) != params.minus_infinity;
                    rule.bias_b[c] = select(0.0, second, maskable[c]);
                }
                rule.seen[c] = rule.seen[c] & (passes | !maskable[c]);
            }
        }
    }
    return rule;
}

// The range of keys of the slice, in whole steps, that any query from `first` to `last` can see by position.
fn keys_in_band(first: u32, last: u32, band: vec4<i32>, keys: vec2<u32>, step: u32, len_k: u32) -> vec2<u32> {
    if (!BANDED) {
        return keys;
    }
    let key_0 = params.slice.key_0;
    let low = u32(max(i32(first + params.slice.row_0) + band.y - i32(key_0), 0));
    let high = min(i32(last + params.slice.row_0) + band.z, band.x - 1) - i32(key_0);
    // Every row sees the extra keys at the end. No branch; see README.md on bounds.
    let maskable = max(params.rules.maskable_keys, key_0) - key_0;
    let end = select(keys.y, min(keys.y, u32(max(high + 1, 0))), maskable >= len_k);
    return vec2<u32>(max(keys.x, min(low, maskable) / step * step), end);
}

// The tile of a result that a workgroup works on: a block of rows and a block of columns.
struct Tile {
    band: vec4<i32>,
    b: u32,
    h: u32,
    head_kv: u32,
    row_block: u32,
    column_block: u32,
}
fn tile_of(index: u32, row_blocks: u32, column_blocks: u32) -> Tile {
    let bh = index / (column_blocks * row_blocks);
    let h = bh % params.slice.heads;
    let b = bh / params.slice.heads;
    let head_kv = (params.slice.head_0 + h) / params.slice.group - params.slice.head_kv_0;
    return Tile(band_of(b), b, h, head_kv, (index / column_blocks) % row_blocks, index % column_blocks);
}
