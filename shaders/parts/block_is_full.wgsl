fn block_is_full(work: Work, j: u32) -> bool {
    return block_mask[work.mask_base + j / BLOCK] == 1u;
}
