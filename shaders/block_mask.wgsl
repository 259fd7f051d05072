// M[b, h, block of rows, block of keys] |= 1 where a row may see a key of the block, |= 2 where one may not
// masks, bias [b, h, i, j]   M [b, h, row block, key block]: 1 full, 2 empty, 3 partial
//
// Computes what masks and biases leave of every block of keys that flash.wgsl reads. That kernel skips blocks that no
// row sees, and does not read masks again for blocks that all rows see. Rows are blocked in the same way: the queries
// of all heads that share keys are consecutive. One invocation per row and block of keys.

// Keys per block.
const BLOCK: u32 = 32u;

struct Params {
    rules: Rules,
    slice: Slice,
    rows_per_block: u32,
    row_blocks: u32,
    key_blocks: u32,
    total: u32,
    minus_infinity: u32,
}

@group(0) @binding(3) var<storage, read_write> blocks: array<atomic<u32>>;

// @use each_element, rules

fn run(at: u32) {
    // Lanes of adjacent rows work on the same block of keys.
    let entry = at / params.rows_per_block;
    let key_block = entry % params.key_blocks;
    let row_block = (entry / params.key_blocks) % params.row_blocks;
    let bh = entry / (params.key_blocks * params.row_blocks);
    let b = bh / params.slice.heads_kv;
    let row = row_block * params.rows_per_block + at % params.rows_per_block;
    if (row >= params.slice.group * params.slice.len_q) {
        return;
    }
    let h = bh % params.slice.heads_kv * params.slice.group + row / params.slice.len_q;
    let i = row % params.slice.len_q;
    let end = min((key_block + 1u) * BLOCK, params.slice.len_k);
    var found = 0u;
    for (var j = key_block * BLOCK; j < end; j += 4u) {
        let key = four_from(j);
        let is_key = key < vec4<u32>(end);
        let seen = rule_of(b, h, vec4<u32>(i), key, vec4<i32>(), true).seen;
        found |= select(0u, 1u, any(seen & is_key)) | select(0u, 2u, any(!seen & is_key));
        if (found == 3u) {
            break;
        }
    }
    atomicOr(&blocks[entry], found);
}
