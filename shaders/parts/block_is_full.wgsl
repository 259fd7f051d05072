fn block_is_full(row: u32, j: u32) -> bool {
    return block_mask[row + j / BLOCK] == 1u;
}
