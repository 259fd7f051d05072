// C[b, h, block, tile] |= 1 where a row of the block may see a key of the tile, |= 2 where one may not
// masks, bias [b, h, i, j]   C [b, h, block, tile]: 1 every key is seen, 2 none, 3 some
//
// What masks and biases leave of every tile of keys that flash.wgsl reads: it passes over those that no row
// sees, and does not look again where all see all. Rows are blocked as there: the queries of all heads that
// share keys lie one after another. One invocation per row and tile.

const WORKGROUP: u32 = 64u;
// Keys per tile.
const TILE: u32 = 32u;

struct Params {
    mask_a_strides: vec4<u32>,
    mask_b_strides: vec4<u32>,
    bias_strides: vec4<u32>,
    mask_a_offset: u32,
    mask_b_offset: u32,
    bias_offset: u32,
    mask_a_keeps: u32,
    mask_b_keeps: u32,
    heads_kv: u32,
    group: u32,
    len_q: u32,
    len_k: u32,
    ruled_keys: u32,
    rows_per_block: u32,
    row_blocks: u32,
    tiles: u32,
    total: u32,
    workgroups: u32,
    minus_infinity: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(3) var<storage, read_write> classes: array<atomic<u32>>;

// @use mask(a 5)

// @use mask(b 6)

// @use bias

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let index = workgroup.y * workgroups.x + workgroup.x;
    let at = index * WORKGROUP + local;
    if (index >= params.workgroups || at >= params.total) {
        return;
    }
    // Lanes of neighbouring rows work on one tile.
    let entry = at / params.rows_per_block;
    let tile = entry % params.tiles;
    let block = (entry / params.tiles) % params.row_blocks;
    let bh = entry / (params.tiles * params.row_blocks);
    let b = bh / params.heads_kv;
    let row = block * params.rows_per_block + at % params.rows_per_block;
    if (row >= params.group * params.len_q) {
        return;
    }
    let h = bh % params.heads_kv * params.group + row / params.len_q;
    let i = row % params.len_q;
    var found = 0u;
    for (var j = tile * TILE; j < min((tile + 1u) * TILE, params.len_k); j++) {
        // The extra keys at the end are seen by every row.
        let seen = j >= params.ruled_keys || (passes_a(b, h, i, j) && passes_b(b, h, i, j)
            && bitcast<u32>(bias_at(b, h, i, j)) != params.minus_infinity);
        found |= select(2u, 1u, seen);
        if (found == 3u) {
            break;
        }
    }
    atomicOr(&classes[entry], found);
}
