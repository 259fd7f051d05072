// Blocks of keys that a step covers.
const BLOCKS: u32 = 1u;
// Whether all rows see all keys of a step.
fn block_is_full(work: Work, j: u32) -> bool {
    var is_full = true;
    // @unroll
    for (var n = 0u; n < BLOCKS; n++) {
        is_full = is_full && block_mask[work.mask_base + j / BLOCK + n] == 1u;
    }
    return is_full;
}
