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
