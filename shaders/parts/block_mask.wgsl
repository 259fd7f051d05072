// What masks and biases leave of a block of keys; see block_mask.wgsl.
const BLOCK: u32 = 32u;
@group(0) @binding(11) var<storage, read> block_mask: array<u32>;
// The first key from j whose block any row may see.
fn next_key(work: Work, j: u32) -> u32 {
    var next = j;
    while (next < work.end && block_mask[work.mask_base + next / BLOCK] == 2u) {
        next = (next / BLOCK + 1u) * BLOCK;
    }
    return next;
}
